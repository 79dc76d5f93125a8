//! Disks: who may have which, and never two who write.
//!
//! The policy says who may attach a disk, to read or to write. That an image has one writer or several readers is no rule of a policy but what images
//! are, so it is looked at here, by the file itself and not by its name. The second line is a lock of the file (flock), which keeps other
//! processes of the same kind away; it is advice to others.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FlockOperation, flock, fstat};
use vmm_devices::channel::VmIdentity;
use vmm_devices::virtio::block::{Backend, BlockSizes, RawFile, RawFileError};
use vmm_memory::vm_memory::VolatileSlice;
use vmm_policy::{Action, Hold, Honours, Object, Refused, Request};

use super::gate::Enforcement;

/// Why a disk is not to be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The policy says no.
    #[error("disk {name:?}: {refused}")]
    Refused {
        /// Which.
        name: String,
        /// Why.
        refused: Refused,
    },
    /// Nobody such is there.
    #[error("disk {name:?}: vm {vm} is not registered")]
    Stranger {
        /// Which.
        name: String,
        /// Who.
        vm: VmIdentity,
    },
    /// Another has it.
    #[error("disk {name:?}: {path} is open by {by} for {how}; an image has one writer, or readers alone", path = path.display())]
    InUse {
        /// Which was asked for.
        name: String,
        /// Its file.
        path: PathBuf,
        /// Who has it, and by which name.
        by: String,
        /// What for.
        how: &'static str,
    },
    /// Another process has it.
    #[error("disk {name:?}: another process has {path} open; an image has one writer, or readers alone", path = path.display())]
    Locked {
        /// Which was asked for.
        name: String,
        /// Its file.
        path: PathBuf,
    },
    /// It cannot be opened.
    #[error(transparent)]
    File(#[from] RawFileError),
    /// The host says nothing of it.
    #[error("disk {name:?}: {source}")]
    Host {
        /// Which.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// Device and inode of a file.
type Identity = (u64, u64);

/// Those who have an image: `true` for a writer.
type Users = HashMap<Identity, Vec<(bool, String)>>;

/// Gives out disks. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Disks {
    enforcement: Enforcement,
    users: Arc<Mutex<Users>>,
}

/// A place among the users of an image, given up when it is dropped.
struct Place {
    users: Arc<Mutex<Users>>,
    image: Identity,
    user: (bool, String),
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_image) = users.get_mut(&self.image) {
            if let Some(at) = of_image.iter().position(|user| *user == self.user) {
                of_image.swap_remove(at);
            }
            if of_image.is_empty() {
                users.remove(&self.image);
            }
        }
    }
}

fn how(writes: bool) -> &'static str {
    if writes { "writing" } else { "reading" }
}

/// Keeps other programs that look at such locks from writing to a file, and if it is to be written from opening it at all, until it is closed.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] if another has it, and what the host says where a file system has no locks.
pub fn lock_image(file: &RawFile, read_only: bool) -> io::Result<()> {
    let lock = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    Ok(flock(file.file(), lock)?)
}

impl Disks {
    /// Those that the policy there allows.
    #[must_use]
    pub fn new(enforcement: &Enforcement) -> Self {
        Self { enforcement: enforcement.clone(), users: Arc::default() }
    }

    /// Opens the file of a disk for a virtual machine, to read and write or to read. `name` is what the policy calls it.
    ///
    /// # Errors
    /// If the policy refuses, somebody who writes has it or one who would write is late, or it is no file for a disk.
    pub fn open(
        &self,
        vm: VmIdentity,
        name: &str,
        path: &Path,
        read_only: bool,
    ) -> Result<PolicedDisk, DiskError> {
        // Before the file is touched.
        let subject = self.enforcement.subject(vm);
        let subject = subject.ok_or_else(|| DiskError::Stranger { name: name.to_owned(), vm })?;
        let action = if read_only { Action::AttachRo } else { Action::Attach };
        let request = Request::new(subject, action, Object::disk(name));
        let hold = self.enforcement.monitor().hold(&request, Honours::NONE);
        let hold = hold.map_err(|refused| DiskError::Refused { name: name.to_owned(), refused })?;
        let file = RawFile::open(path, read_only)?;
        let place = self.take(&file, (name, path), vm, read_only)?;
        lock_image(&file, read_only).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => DiskError::Locked { name: name.to_owned(), path: path.to_owned() },
            _ => DiskError::Host { name: name.to_owned(), source },
        })?;
        Ok(PolicedDisk { hold, file, _place: place })
    }

    fn take(
        &self,
        file: &RawFile,
        (name, path): (&str, &Path),
        vm: VmIdentity,
        read_only: bool,
    ) -> Result<Place, DiskError> {
        let metadata = fstat(file.file())
            .map_err(|error| DiskError::Host { name: name.to_owned(), source: error.into() })?;
        let image = (metadata.st_dev, metadata.st_ino);
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        let of_image = users.entry(image).or_default();
        if let Some((writes, by)) = of_image.iter().find(|(writes, _)| *writes || !read_only) {
            let (name, path, by) = (name.to_owned(), path.to_owned(), by.clone());
            return Err(DiskError::InUse { name, path, by, how: how(*writes) });
        }
        let user = (!read_only, format!("vm {vm} as {name:?}"));
        of_image.push(user.clone());
        drop(users);
        Ok(Place { users: Arc::clone(&self.users), image, user })
    }
}

/// A file that is a disk as long as there is a right to it. Requests that are under way when that is taken back end first; those after it
/// fail, of which the guest hears as an I/O error.
pub struct PolicedDisk {
    hold: Hold,
    file: RawFile,
    // After the file, whose lock goes with it.
    _place: Place,
}

impl fmt::Debug for PolicedDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolicedDisk")
            .field("hold", &self.hold)
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

impl PolicedDisk {
    fn with<R>(&self, what: impl FnOnce(&RawFile) -> io::Result<R>) -> io::Result<R> {
        match self.hold.enter() {
            Some(_using) => what(&self.file),
            None => Err(io::Error::new(io::ErrorKind::PermissionDenied, "the right to the disk is gone")),
        }
    }
}

impl Backend for PolicedDisk {
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn is_read_only(&self) -> bool {
        self.file.is_read_only()
    }

    fn block_sizes(&self) -> BlockSizes {
        self.file.block_sizes()
    }

    fn read_at(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
        self.with(|file| file.read_at(buffers, offset))
    }

    fn write_at(&self, buffers: &[VolatileSlice<'_>], offset: u64, durable: bool) -> io::Result<usize> {
        self.with(|file| file.write_at(buffers, offset, durable))
    }

    fn flush(&self) -> io::Result<()> {
        self.with(RawFile::flush)
    }

    fn can_discard(&self) -> bool {
        self.file.can_discard()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.with(|file| file.discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.with(|file| file.write_zeroes(offset, len, unmap))
    }
}

//! A directory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags};

use super::{Listed, Storage, StorageFile};

/// A log in a directory. What is made there is for its owner to write and for the owner's group to read; links are not followed.
#[derive(Clone, Debug)]
pub struct FsStorage {
    root: PathBuf,
}

const NO_LINK: i32 = OFlags::NOFOLLOW.union(OFlags::CLOEXEC).bits().cast_signed();

impl FsStorage {
    /// The directory at `root`, which is made if it is not there.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn create(root: impl Into<PathBuf>) -> io::Result<Self> {
        let root = root.into();
        make_folder(&root)?;
        Ok(Self { root })
    }

    /// The directory at `root`, which is there.
    ///
    /// # Errors
    /// If it is not, or is no directory.
    pub fn existing(root: impl Into<PathBuf>) -> io::Result<Self> {
        let root = root.into();
        if std::fs::metadata(&root)?.is_dir() {
            Ok(Self { root })
        } else {
            Err(io::ErrorKind::NotADirectory.into())
        }
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn place(&self, path: &str) -> io::Result<PathBuf> {
        let place = self.root.join(path);
        if let Some(folder) = place.parent()
            && !folder.exists()
        {
            make_folder(folder)?;
        }
        Ok(place)
    }
}

fn make_folder(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o750).create(path)
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o640).custom_flags(NO_LINK);
    options
}

fn sync_folder(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

impl Storage for FsStorage {
    fn create(&self, path: &str) -> io::Result<Box<dyn StorageFile>> {
        let place = self.place(path)?;
        let file = options().read(true).append(true).create_new(true).open(&place)?;
        sync_folder(&place)?;
        Ok(Box::new(FsFile(file)))
    }

    fn open(&self, path: &str) -> io::Result<Box<dyn StorageFile>> {
        Ok(Box::new(FsFile(options().read(true).append(true).open(self.root.join(path))?)))
    }

    fn open_to_read(&self, path: &str) -> io::Result<Box<dyn StorageFile>> {
        Ok(Box::new(FsFile(options().read(true).open(self.root.join(path))?)))
    }

    fn read(&self, path: &str, limit: u64) -> io::Result<Option<Vec<u8>>> {
        let file = match options().read(true).open(self.root.join(path)) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            file => file?,
        };
        let mut bytes = Vec::new();
        file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(Some(bytes)) }
    }

    fn replace(&self, path: &str, bytes: &[u8], durable: bool) -> io::Result<()> {
        let place = self.place(path)?;
        if !durable {
            return options().write(true).create(true).truncate(true).open(&place)?.write_all(bytes);
        }
        let mut beside = place.clone().into_os_string();
        beside.push(".tmp");
        let beside = PathBuf::from(beside);
        let mut file = options().write(true).create(true).truncate(true).open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&beside, &place)?;
        sync_folder(&place)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        std::fs::remove_file(self.root.join(path))
    }

    fn list(&self, folder: &str) -> io::Result<Vec<Listed>> {
        let entries = match std::fs::read_dir(self.root.join(folder)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut listed = Vec::new();
        for entry in entries {
            let entry = entry?;
            let metadata = entry.metadata()?;
            listed.push(Listed {
                name: entry.file_name().to_string_lossy().into_owned(),
                folder: metadata.is_dir(),
                length: metadata.len(),
            });
        }
        listed.sort();
        Ok(listed)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(File::open(&self.root)?)?)
    }

    fn lock(&self) -> io::Result<Option<Box<dyn Send>>> {
        let file = options().write(true).create(true).truncate(false).open(self.root.join("lock"))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Box::new(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

struct FsFile(File);

impl StorageFile for FsFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.0.read_at(rest, offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }
}

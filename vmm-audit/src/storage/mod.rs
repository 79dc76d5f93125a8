//! Where a log lies: the few things that it wants of files, so that tests can have them fail.

#[cfg(any(test, feature = "testkit"))]
pub mod faulty;
mod fs;
mod memory;

use std::io;

use crate::merkle::tiles::{TileId, TileSource};

pub use fs::FsStorage;
pub use memory::MemoryStorage;

/// A file in a folder of the storage, or such a folder.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Whether it is a folder.
    pub folder: bool,
    /// Its length in bytes.
    pub length: u64,
}

/// Files by relative paths whose elements are separated by `/`. Folders come with the files in them.
pub trait Storage: Send + Sync {
    /// Makes a file that is not there yet.
    ///
    /// # Errors
    /// If there is one, or the system refuses.
    fn create(&self, path: &str) -> io::Result<Box<dyn StorageFile>>;

    /// Opens a file to read it and append to it.
    ///
    /// # Errors
    /// If there is none, or the system refuses.
    fn open(&self, path: &str) -> io::Result<Box<dyn StorageFile>>;

    /// Opens a file to read it.
    ///
    /// # Errors
    /// If there is none, or the system refuses.
    fn open_to_read(&self, path: &str) -> io::Result<Box<dyn StorageFile>> {
        self.open(path)
    }

    /// A whole file, or `None` if there is none.
    ///
    /// # Errors
    /// If it has more than `limit` bytes, or the system refuses.
    fn read(&self, path: &str, limit: u64) -> io::Result<Option<Vec<u8>>>;

    /// Writes a whole file in place of the one there is: all of it or, if this is interrupted and `durable`, nothing of it. Only
    /// then is it on the disk when this returns.
    ///
    /// # Errors
    /// If the system refuses.
    fn replace(&self, path: &str, bytes: &[u8], durable: bool) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// If there is none, or the system refuses.
    fn remove(&self, path: &str) -> io::Result<()>;

    /// What is in a folder, by name; nothing if there is no such folder.
    ///
    /// # Errors
    /// If the system refuses.
    fn list(&self, folder: &str) -> io::Result<Vec<Listed>>;

    /// Waits until all that has been written, names too, is on the disk.
    ///
    /// # Errors
    /// If the system refuses, or the disk fails.
    fn sync(&self) -> io::Result<()>;

    /// Makes this the only writer, as long as what is returned is there. `None` if there is another.
    ///
    /// # Errors
    /// If the system refuses.
    fn lock(&self) -> io::Result<Option<Box<dyn Send>>>;
}

/// An open file.
pub trait StorageFile: Send {
    /// Its length in bytes.
    ///
    /// # Errors
    /// If the system refuses.
    fn length(&self) -> io::Result<u64>;

    /// Reads from `offset` on, as much as there is and fits.
    ///
    /// # Errors
    /// If the system refuses.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// Writes at the end. After an error a part may be written.
    ///
    /// # Errors
    /// If the system refuses.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Waits until what was written is on the disk.
    ///
    /// # Errors
    /// If it is not: nobody knows then how much of it is.
    fn sync(&mut self) -> io::Result<()>;

    /// Makes it shorter.
    ///
    /// # Errors
    /// If the system refuses.
    fn truncate(&mut self, length: u64) -> io::Result<()>;
}

impl TileSource for &dyn Storage {
    fn tile(&self, id: TileId) -> io::Result<Option<Vec<u8>>> {
        self.read(&id.path(), 8192)
    }
}

/// All files below `folder`, with their paths and lengths.
///
/// # Errors
/// Those of [`Storage::list`].
pub(crate) fn walk(storage: &dyn Storage, folder: &str) -> io::Result<Vec<(String, u64)>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for listed in storage.list(&folder)? {
            let path = if folder.is_empty() { listed.name } else { format!("{folder}/{}", listed.name) };
            if listed.folder { folders.push(path) } else { files.push((path, listed.length)) }
        }
    }
    files.sort();
    Ok(files)
}

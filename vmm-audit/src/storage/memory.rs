//! Storage in memory, which can lose what a machine without power loses.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Listed, Storage, StorageFile};

#[derive(Clone, Debug, Default)]
struct Contents {
    bytes: Vec<u8>,
    /// What is on the disk that this stands for.
    durable: Vec<u8>,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, Contents>,
    locked: bool,
}

/// Storage in memory, for tests. Its clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct MemoryStorage(Arc<Mutex<State>>);

impl MemoryStorage {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is left after a power failure: what was synchronised, and of each file as many of the bytes after that as `torn` says.
    pub fn after_power_loss(&self, torn: usize) -> Self {
        let left = |contents: &Contents| {
            let mut bytes = contents.durable.clone();
            let behind = contents.bytes.get(bytes.len()..).unwrap_or_default();
            bytes.extend_from_slice(behind.get(..torn).unwrap_or(behind));
            Contents { durable: bytes.clone(), bytes }
        };
        let files =
            self.state().files.iter().map(|(path, contents)| (path.clone(), left(contents))).collect();
        Self(Arc::new(Mutex::new(State { files, locked: false })))
    }

    /// All there is now, as another storage.
    pub fn copy(&self) -> Self {
        self.after_power_loss(usize::MAX)
    }

    /// All files and their bytes.
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        self.state().files.iter().map(|(path, contents)| (path.clone(), contents.bytes.clone())).collect()
    }

    /// Puts a file there, whatever it was.
    pub fn put(&self, path: &str, bytes: Vec<u8>) {
        self.state().files.insert(path.to_owned(), Contents { durable: bytes.clone(), bytes });
    }
}

struct MemoryFile {
    state: MemoryStorage,
    path: String,
}

impl MemoryFile {
    fn with<T>(&self, f: impl FnOnce(&mut Contents) -> T) -> io::Result<T> {
        self.state.state().files.get_mut(&self.path).map(f).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl StorageFile for MemoryFile {
    fn length(&self) -> io::Result<u64> {
        self.with(|contents| contents.bytes.len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.with(|contents| {
            let offset = usize::try_from(offset).unwrap_or(usize::MAX);
            let there = contents.bytes.get(offset..).unwrap_or_default();
            let count = there.len().min(buffer.len());
            if let Some((to, from)) = buffer.get_mut(..count).zip(there.get(..count)) {
                to.copy_from_slice(from);
            }
            count
        })
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.with(|contents| contents.bytes.extend_from_slice(bytes))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.with(|contents| contents.durable.clone_from(&contents.bytes))
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.with(|contents| contents.bytes.truncate(usize::try_from(length).unwrap_or(usize::MAX)))
    }
}

/// Unlocks when it is dropped.
struct Lock(MemoryStorage);

impl Drop for Lock {
    fn drop(&mut self) {
        self.0.state().locked = false;
    }
}

impl Storage for MemoryStorage {
    fn create(&self, path: &str) -> io::Result<Box<dyn StorageFile>> {
        let mut state = self.state();
        if state.files.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        state.files.insert(path.to_owned(), Contents::default());
        Ok(Box::new(MemoryFile { state: self.clone(), path: path.to_owned() }))
    }

    fn open(&self, path: &str) -> io::Result<Box<dyn StorageFile>> {
        let file = MemoryFile { state: self.clone(), path: path.to_owned() };
        file.length()?;
        Ok(Box::new(file))
    }

    fn read(&self, path: &str, limit: u64) -> io::Result<Option<Vec<u8>>> {
        let bytes = self.state().files.get(path).map(|contents| contents.bytes.clone());
        match bytes {
            Some(bytes) if bytes.len() as u64 > limit => Err(io::ErrorKind::FileTooLarge.into()),
            bytes => Ok(bytes),
        }
    }

    fn replace(&self, path: &str, bytes: &[u8], durable: bool) -> io::Result<()> {
        let mut state = self.state();
        let contents = state.files.entry(path.to_owned()).or_default();
        contents.bytes = bytes.to_vec();
        if durable {
            contents.durable = bytes.to_vec();
        }
        Ok(())
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.state().files.remove(path).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn list(&self, folder: &str) -> io::Result<Vec<Listed>> {
        let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        let mut listed: BTreeMap<String, Listed> = BTreeMap::new();
        for (path, contents) in &self.state().files {
            let Some(rest) = path.strip_prefix(&prefix) else { continue };
            let (name, folder) = rest.split_once('/').map_or((rest, false), |(name, _)| (name, true));
            let length = if folder { 0 } else { contents.bytes.len() as u64 };
            listed.insert(name.to_owned(), Listed { name: name.to_owned(), folder, length });
        }
        Ok(listed.into_values().collect())
    }

    fn sync(&self) -> io::Result<()> {
        self.state().files.values_mut().for_each(|contents| contents.durable.clone_from(&contents.bytes));
        Ok(())
    }

    fn lock(&self) -> io::Result<Option<Box<dyn Send>>> {
        let mut state = self.state();
        if std::mem::replace(&mut state.locked, true) {
            return Ok(None);
        }
        Ok(Some(Box::new(Lock(self.clone()))))
    }
}

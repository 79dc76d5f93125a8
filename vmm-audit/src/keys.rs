//! The log's keys and how they follow one another.
//!
//! The key of an epoch signs checkpoints until it signs one that names the key of the next epoch; then it is destroyed. Whoever takes
//! over the host later has the key of the present epoch and no earlier one, so that what earlier epochs have signed stays as it is,
//! and anyone who has the public key of epoch 0 can see that (forward security).
//!
//! Secret keys lie in a [`KeyStore`] outside of the log. The file of [`FileKeys`] is replaced at each epoch and the old one overwritten
//! with zeros, which a file system or disk that writes elsewhere makes vain; a store in a TPM or HSM is another `KeyStore`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use data_encoding::BASE64;
use zeroize::Zeroizing;

use crate::checkpoint::Checkpoint;
use crate::note::{NoteError, Signer, Verifier};
use crate::storage::Storage;

/// What goes wrong with keys.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The file cannot be read or written.
    #[error("key file {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others than its owner may read it.
    #[error("key file {path} has mode {mode:03o}: only its owner may have access (600 or 400)")]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It is no key file.
    #[error("not a key file: {0}")]
    Form(&'static str),
    /// A key or its name is wrong.
    #[error(transparent)]
    Note(#[from] NoteError),
    /// The store is for another log.
    #[error("the keys are those of log {found:?}, not of {expected:?}")]
    Origin {
        /// Whose they are.
        found: String,
        /// Whose they should be.
        expected: String,
    },
}

/// All that a log's writer keeps of keys.
#[derive(Debug)]
pub struct Keys {
    /// The public key of epoch 0: what verifiers are given.
    pub root: Verifier,
    /// The present epoch.
    pub epoch: u64,
    /// Its key.
    pub current: Signer,
    /// The key of the next epoch, once it is there.
    pub next: Option<Signer>,
}

impl Keys {
    /// New ones, for the log called `origin`.
    ///
    /// # Errors
    /// If the name cannot be one.
    pub fn generate(origin: &str) -> Result<Self, KeyError> {
        let current = Signer::generate(origin)?;
        Ok(Self { root: current.verifier().clone(), epoch: 0, current, next: None })
    }

    fn to_text(&self) -> Zeroizing<String> {
        let next = self.next.as_ref();
        let next = next.map_or_else(String::new, |next| format!("next {}\n", BASE64.encode(&*next.seed())));
        let (root, epoch, seed) = (&self.root, self.epoch, BASE64.encode(&*self.current.seed()));
        Zeroizing::new(format!("vmm-audit keys v1\nroot {root}\nepoch {epoch}\ncurrent {seed}\n{next}"))
    }

    fn from_text(text: &str) -> Result<Self, KeyError> {
        let mut lines = text.lines();
        let mut after =
            |prefix: &str, why| lines.next().and_then(|l| l.strip_prefix(prefix)).ok_or(KeyError::Form(why));
        after("vmm-audit keys v1", "the first line is not `vmm-audit keys v1`")?;
        let root: Verifier = after("root ", "no root key")?.parse()?;
        let epoch =
            after("epoch ", "no epoch")?.parse().map_err(|_| KeyError::Form("the epoch is no number"))?;
        let signer = |text: &str| {
            let seed = Zeroizing::new(
                BASE64.decode(text.as_bytes()).map_err(|_| KeyError::Form("a key is not base64"))?,
            );
            let seed: &[u8; 32] =
                seed.as_slice().try_into().map_err(|_| KeyError::Form("a secret key has 32 bytes"))?;
            Ok::<_, KeyError>(Signer::from_seed(root.name(), seed)?)
        };
        let current = signer(after("current ", "no current key")?)?;
        let next = after("next ", "").ok().map(signer).transpose()?;
        Ok(Self { root, epoch, current, next })
    }
}

/// Where the secret keys are.
pub trait KeyStore: Send {
    /// The keys, or `None` if there are none yet.
    ///
    /// # Errors
    /// If they cannot be read.
    fn load(&mut self) -> Result<Option<Keys>, KeyError>;

    /// Keeps `keys` in place of those before, which are gone for good when this returns.
    ///
    /// # Errors
    /// If it does not work; those before are still there then.
    fn save(&mut self, keys: &Keys) -> Result<(), KeyError>;
}

/// Keys in a file that only its owner may read.
#[derive(Clone, Debug)]
pub struct FileKeys {
    path: PathBuf,
}

impl FileKeys {
    /// At `path`; nothing is read yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    fn error(&self, source: io::Error) -> KeyError {
        KeyError::Io { path: self.path.clone(), source }
    }

    fn write(&self, text: &str) -> io::Result<()> {
        let mut beside = self.path.clone().into_os_string();
        beside.push(".tmp");
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        let old = OpenOptions::new().write(true).open(&self.path);
        std::fs::rename(&beside, &self.path)?;
        if let Some(folder) = self.path.parent() {
            let folder = if folder.as_os_str().is_empty() { std::path::Path::new(".") } else { folder };
            File::open(folder)?.sync_all()?;
        }
        if let Ok(old) = old {
            let length = usize::try_from(old.metadata()?.len()).unwrap_or(0).min(1 << 16);
            old.write_all_at(&vec![0; length], 0)?;
            old.sync_all()?;
        }
        Ok(())
    }
}

impl KeyStore for FileKeys {
    fn load(&mut self) -> Result<Option<Keys>, KeyError> {
        let file = match File::open(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(|e| self.error(e))?,
        };
        let mode = file.metadata().map_err(|e| self.error(e))?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Mode { path: self.path.clone(), mode });
        }
        let mut text = Zeroizing::new(String::with_capacity(1024));
        file.take(4096).read_to_string(&mut text).map_err(|e| self.error(e))?;
        Keys::from_text(&text).map(Some)
    }

    fn save(&mut self, keys: &Keys) -> Result<(), KeyError> {
        self.write(&keys.to_text()).map_err(|e| self.error(e))
    }
}

/// Keys in memory, for tests and for logs that end with their process. Its clones are the same one.
#[derive(Clone, Default)]
pub struct MemoryKeys(Arc<Mutex<Option<Zeroizing<String>>>>);

impl MemoryKeys {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Another store with the same keys.
    pub fn copy(&self) -> Self {
        Self(Arc::new(Mutex::new(self.0.lock().unwrap_or_else(PoisonError::into_inner).clone())))
    }
}

impl KeyStore for MemoryKeys {
    fn load(&mut self) -> Result<Option<Keys>, KeyError> {
        let text = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        text.map(|text| Keys::from_text(&text)).transpose()
    }

    fn save(&mut self, keys: &Keys) -> Result<(), KeyError> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(keys.to_text());
        Ok(())
    }
}

/// The public keys of a log, from epoch 0 to the present one, each signed by the one before.
#[derive(Clone, Debug)]
pub struct KeyChain {
    keys: Vec<Verifier>,
    /// Size of the log at which each key but the first began to sign.
    begins: Vec<u64>,
}

/// Where a succession of keys breaks.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {why}")]
pub struct SuccessionError {
    /// The file.
    pub path: String,
    /// What is wrong with it.
    pub why: String,
}

/// The file that says who follows the key of `epoch`.
pub(crate) fn succession_path(epoch: u64) -> String {
    format!("keys/{epoch:08}")
}

impl KeyChain {
    /// Of the key of epoch 0 alone.
    pub fn new(root: Verifier) -> Self {
        Self { keys: vec![root], begins: Vec::new() }
    }

    /// The key of an epoch.
    pub fn key(&self, epoch: u64) -> Option<&Verifier> {
        usize::try_from(epoch).ok().and_then(|epoch| self.keys.get(epoch))
    }

    /// The last epoch that there is a key of.
    pub fn last_epoch(&self) -> u64 {
        self.begins.len() as u64
    }

    /// Sizes of the log between which the key of `epoch` may sign.
    pub fn range(&self, epoch: u64) -> (u64, u64) {
        let at = |n: Option<u64>| {
            n.and_then(|n| usize::try_from(n).ok()).and_then(|n| self.begins.get(n)).copied()
        };
        (at(epoch.checked_sub(1)).unwrap_or(0), at(Some(epoch)).unwrap_or(u64::MAX))
    }

    /// Adds the key that `checkpoint`, whose signature has been checked, names as the next.
    ///
    /// # Errors
    /// If it names none, or is not of the last epoch.
    pub fn follow(&mut self, checkpoint: &Checkpoint) -> Result<(), NoteError> {
        if checkpoint.epoch != self.last_epoch() {
            return Err(NoteError::Form("the checkpoint that names the next key is of another epoch"));
        }
        let next = checkpoint.next.as_deref().ok_or(NoteError::Form("no next key is named"))?;
        let next: Verifier = next.parse()?;
        if next.name() != checkpoint.origin {
            return Err(NoteError::Form("the next key has another name than the log"));
        }
        self.keys.push(next);
        self.begins.push(checkpoint.size);
        Ok(())
    }

    /// Checks that a note is a checkpoint that one of the keys has signed in its time.
    ///
    /// # Errors
    /// If it is not.
    pub fn open(&self, note: &[u8]) -> Result<Checkpoint, NoteError> {
        let epoch = Checkpoint::unverified(note)?.epoch;
        let key = self.key(epoch).ok_or_else(|| NoteError::Unsigned(format!("a key of epoch {epoch}")))?;
        let checkpoint = Checkpoint::open(note, key)?;
        let (from, to) = self.range(epoch);
        if (from..=to).contains(&checkpoint.size) {
            Ok(checkpoint)
        } else {
            Err(NoteError::Form("signed by a key outside of its epoch"))
        }
    }

    /// All keys that the log names, from the one that is trusted.
    ///
    /// # Errors
    /// If a file does not continue the succession. What was found until then is the first of the two.
    pub fn load(root: Verifier, storage: &dyn Storage) -> (Self, Option<SuccessionError>) {
        let mut chain = Self::new(root);
        loop {
            let path = succession_path(chain.last_epoch());
            let error = |why: String| Some(SuccessionError { path: path.clone(), why });
            let note = match storage.read(&path, crate::note::MAX_NOTE as u64) {
                Ok(Some(note)) => note,
                Ok(None) => return (chain, None),
                Err(e) => return (chain, error(e.to_string())),
            };
            let followed = chain.open(&note).and_then(|checkpoint| chain.follow(&checkpoint));
            if let Err(e) = followed {
                return (chain, error(e.to_string()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_is_its_owners_and_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        let mut store = FileKeys::new(&path);
        assert!(store.load().unwrap().is_none());
        let mut keys = Keys::generate("log.example").unwrap();
        store.save(&keys).unwrap();
        let inode = File::open(&path).unwrap();
        keys.next = Some(Signer::generate("log.example").unwrap());
        store.save(&keys).unwrap();
        let loaded = store.load().unwrap().unwrap();
        assert_eq!(loaded.root, keys.root);
        assert_eq!(loaded.next.unwrap().verifier(), keys.next.unwrap().verifier());
        // What an earlier open descriptor still sees is nothing.
        let mut old = Vec::new();
        (&inode).read_to_end(&mut old).unwrap();
        assert!(!old.is_empty() && old.iter().all(|b| *b == 0));

        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(store.load(), Err(KeyError::Mode { mode: 0o640, .. })));
    }

    #[test]
    fn a_key_signs_in_its_epoch_only() {
        let (a, b) = (Signer::generate("l").unwrap(), Signer::generate("l").unwrap());
        let checkpoint = |size, epoch, next: Option<&Signer>| Checkpoint {
            origin: "l".to_owned(),
            size,
            root: crate::digest::Digest::default(),
            chain: crate::digest::Digest::default(),
            time: 0,
            epoch,
            next: next.map(|next| next.verifier().to_string()),
            rings: Vec::new(),
            closed: false,
        };
        let mut chain = KeyChain::new(a.verifier().clone());
        chain.follow(&checkpoint(10, 0, Some(&b))).unwrap();
        assert!(chain.open(checkpoint(10, 0, Some(&b)).sign(&a).unwrap().as_bytes()).is_ok());
        assert!(chain.open(checkpoint(11, 0, None).sign(&a).unwrap().as_bytes()).is_err());
        assert!(chain.open(checkpoint(11, 1, None).sign(&b).unwrap().as_bytes()).is_ok());
        assert!(chain.open(checkpoint(9, 1, None).sign(&b).unwrap().as_bytes()).is_err());
        assert!(chain.open(checkpoint(11, 1, None).sign(&a).unwrap().as_bytes()).is_err());
        assert!(chain.follow(&checkpoint(12, 0, Some(&b))).is_err());
    }
}

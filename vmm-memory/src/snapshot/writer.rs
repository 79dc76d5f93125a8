//! Writing a snapshot.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use tempfile::TempPath;

use super::SnapshotDigest;
use super::error::SnapshotError;
use super::format::{
    ARCHITECTURE, Digest, Entry, HEADER_SIZE, Header, MAGIC, MAX_STATE, MAX_STATES, MAX_TABLE, Table,
    VERSION, check_name,
};
use super::ram::{RamOptions, RamStats, save};
use super::state::{SnapshotState, StateFormat};
use crate::GuestRam;

/// The state that says where RAM was.
pub(super) const RAM: &str = "ram";

struct State {
    name: String,
    format: &'static str,
    bytes: Vec<u8>,
}

/// Writes a snapshot. Nothing is at its path until it is [finished](Self::finish), and then all of it: what was there before, say an older
/// snapshot, is replaced in one step.
///
/// The virtual machine is paused meanwhile, its devices are idle, and nobody else writes its RAM.
pub struct SnapshotWriter {
    path: PathBuf,
    name: OsString,
    /// Where it will be. What it takes to put it there is open from the beginning: a process that has confined itself opens nothing.
    directory: File,
    file: File,
    /// Where it is meanwhile.
    place: TempPath,
    versions: BTreeMap<&'static str, u16>,
    states: Vec<State>,
    records: Vec<u8>,
    states_at: u64,
    base: Digest,
}

impl SnapshotWriter {
    /// Begins one that will be at `path`. In its directory there has to be room for it, for now under another name.
    ///
    /// # Errors
    /// [`SnapshotError::File`].
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, SnapshotError> {
        let path = path.into();
        let Some(name) = path.file_name().map(ToOwned::to_owned) else {
            let what = format!("the path {}", path.display());
            return Err(SnapshotError::Unwritable { what, problem: "it names no file".to_owned() });
        };
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let directory = File::open(parent).map_err(failed(&path, "opening its directory"))?;
        let named = tempfile::Builder::new().prefix(".snapshot").tempfile_in(parent);
        let (file, place) = named.map_err(failed(&path, "creating a file beside it"))?.into_parts();
        Ok(Self {
            path,
            name,
            directory,
            file,
            place,
            versions: BTreeMap::new(),
            states: Vec::new(),
            records: Vec::new(),
            states_at: HEADER_SIZE,
            base: [0; 32],
        })
    }

    /// Writes the states of a family in an older version from here on, for an older release to read.
    ///
    /// # Errors
    /// [`SnapshotError::Unwritable`] if this release does not know that version, or has written one of them already.
    pub fn version(&mut self, format: StateFormat, version: u16) -> Result<(), SnapshotError> {
        let problem = if !(format.oldest..=format.newest).contains(&version) {
            format!("known are {} to {}", format.oldest, format.newest)
        } else if self.states.iter().any(|state| state.format == format.name) {
            "a state was written in another one already".to_owned()
        } else {
            self.versions.insert(format.name, version);
            return Ok(());
        };
        Err(SnapshotError::Unwritable { what: format!("version {version} of {}", format.name), problem })
    }

    /// Adds a state, under a name that no other has.
    ///
    /// # Errors
    /// [`SnapshotError::Encode`] if the version that is written cannot express it, and [`SnapshotError::Unwritable`] if it is too large, there are
    /// too many, or its name cannot be one.
    pub fn put<S: SnapshotState>(&mut self, name: &str, state: &S) -> Result<(), SnapshotError> {
        let format = S::FORMAT;
        let unwritable =
            |problem: String| SnapshotError::Unwritable { what: format!("the state \"{name}\""), problem };
        check_name(name)
            .and_then(|()| check_name(format.name))
            .map_err(|problem| unwritable(problem.to_owned()))?;
        if self.states.iter().any(|other| other.name == name) {
            return Err(unwritable("it holds one of that name already".to_owned()));
        }
        if self.states.len() >= MAX_STATES {
            return Err(unwritable(format!("it holds {MAX_STATES} already, which is the most")));
        }
        let version = *self.versions.entry(format.name).or_insert(format.newest);
        let bytes = state.encode(version).map_err(|source| SnapshotError::Encode {
            name: name.to_owned(),
            format: format.name,
            version,
            source,
        })?;
        if bytes.len() > MAX_STATE {
            return Err(unwritable(format!("it has {} bytes; at most {MAX_STATE} are allowed", bytes.len())));
        }
        self.states.push(State { name: name.to_owned(), format: format.name, bytes });
        Ok(())
    }

    /// Adds RAM, once: all regions, those that are shared with others as well.
    ///
    /// # Errors
    /// [`SnapshotError::File`], for instance for want of room; [`SnapshotError::Base`] if RAM is laid out otherwise than in the base, or that has
    /// too many below it;
    /// [`SnapshotError::Unwritable`] for a second one, and for memory that the host cannot read.
    pub fn put_ram(&mut self, ram: &GuestRam, options: &RamOptions<'_>) -> Result<RamStats, SnapshotError> {
        let unwritable =
            |what: String, problem: &str| SnapshotError::Unwritable { what, problem: problem.to_owned() };
        if self.states.iter().any(|state| state.name == RAM) {
            return Err(unwritable("RAM".to_owned(), "it holds some already"));
        }
        for region in ram.regions() {
            use vm_memory::GuestMemoryRegion as _;
            let gpa = region.start_addr();
            let Some(range) = ram.guest_memfd(gpa) else { continue };
            if region.file_offset().is_none_or(|file| !std::sync::Arc::ptr_eq(file.arc(), range.memfd.file()))
            {
                let what = format!("the RAM at {:#x}", gpa.0);
                return Err(unwritable(
                    what,
                    "a private half of it is in a guest_memfd, which the host cannot read",
                ));
            }
        }
        if let Some((base, _)) = options.base {
            base.check_base_of(ram)?;
            self.base = base.digest().0;
        }
        let saved = save(ram, &self.file, options).map_err(failed(&self.path, "writing RAM"))?;
        self.put(RAM, &saved.layout)?;
        (self.records, self.states_at) = (saved.records, saved.end);
        Ok(saved.stats)
    }

    /// Writes what is left, makes it durable, and puts it to its path.
    ///
    /// # Errors
    /// [`SnapshotError::File`].
    pub fn finish(self) -> Result<SnapshotDigest, SnapshotError> {
        let formats: Vec<(String, u16)> =
            self.versions.iter().map(|(name, version)| ((*name).to_owned(), *version)).collect();
        let mut table = Table { formats, entries: Vec::new() };
        let mut bytes = Vec::new();
        for State { name, format, bytes: state } in &self.states {
            let format = self.versions.keys().position(|name| name == format).unwrap_or(0);
            let (offset, len) = (self.states_at + bytes.len() as u64, state.len());
            let digest = blake3::hash(state).into();
            table.entries.push(Entry { name: name.clone(), format, offset, len, digest });
            bytes.extend_from_slice(state);
        }
        let table = table.write();
        if table.len() > MAX_TABLE {
            let problem = format!("its table has {} bytes; at most {MAX_TABLE} are allowed", table.len());
            return Err(SnapshotError::Unwritable { what: "all these states".to_owned(), problem });
        }
        let chunks_at = self.states_at + bytes.len() as u64;
        let table_at = chunks_at + self.records.len() as u64;
        let mut header = Header {
            magic: [0; 8],
            version: VERSION.into(),
            architecture: ARCHITECTURE.into(),
            states_at: self.states_at.into(),
            chunks_at: chunks_at.into(),
            table_at: table_at.into(),
            end: (table_at + table.len() as u64).into(),
            chunks_digest: blake3::hash(&self.records).into(),
            table_digest: blake3::hash(&table).into(),
            base: self.base,
            digest: [0; 32],
        };
        header.magic.copy_from_slice(MAGIC.as_bytes());
        let header_bytes = header.seal();
        let file = &self.file;
        let write = || -> io::Result<()> {
            file.write_all_at(&bytes, self.states_at)?;
            file.write_all_at(&self.records, chunks_at)?;
            file.write_all_at(&table, table_at)?;
            file.write_all_at(&header_bytes, 0)?;
            file.sync_all()
        };
        write().map_err(failed(&self.path, "writing it"))?;
        let put = || -> io::Result<()> {
            let from = self.place.file_name().unwrap_or_default();
            rustix::fs::renameat(&self.directory, from, &self.directory, &self.name)?;
            self.directory.sync_all()
        };
        put().map_err(failed(&self.path, "putting it there"))?;
        // Nothing is at that place any more.
        self.place.keep().map_err(|error| failed(&self.path, "putting it there")(error.error))?;
        Ok(SnapshotDigest(header.digest))
    }
}

impl std::fmt::Debug for SnapshotWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let states: Vec<&str> = self.states.iter().map(|state| &*state.name).collect();
        f.debug_struct("SnapshotWriter")
            .field("path", &self.path)
            .field("states", &states)
            .finish_non_exhaustive()
    }
}

pub(super) fn failed(path: &Path, operation: &'static str) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |source| SnapshotError::File { path, operation, source }
}

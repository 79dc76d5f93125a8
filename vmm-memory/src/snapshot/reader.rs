//! Reading a snapshot.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::SnapshotDigest;
use super::error::SnapshotError;
use super::format::{ARCHITECTURE, Entry, HEADER_SIZE, Header, MAGIC, MAX_STATE, MAX_TABLE, Table, VERSION};
use super::ram::chunk::RECORD;
use super::ram::image::Image;
use super::ram::{LazyRam, RamLayout, RamOptions};
use super::state::{SnapshotState, StateFormat};
use super::writer::{RAM, failed};
use crate::GuestRam;

/// Most snapshots of which each is based on the next.
const MAX_DEPTH: usize = 64;

/// A part of the file, for what is said of it.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) name: String,
    pub(super) begin: u64,
    pub(super) len: u64,
}

impl Part {
    fn new(name: &str, begin: u64, end: u64) -> Self {
        Self { name: name.to_owned(), begin, len: end.saturating_sub(begin) }
    }
}

/// A snapshot to be read: its header, table, states and the records of RAM are whole, as [`open`](Self::open) has seen. RAM is checked as it is
/// [loaded](Self::load_ram), or [apart](Self::verify_ram) from that.
///
/// To restore a virtual machine, take all its states, ask whether [anything is left](Self::finish), make the machine, and load RAM: so what is
/// wrong with the file shows before there is a machine, or the guest has not run.
///
/// Whoever can write the file can make a machine of their own of it: its digest tells whether it is the one that was written
/// ([`digest`](Self::digest)), and that has to come from elsewhere.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    file: Arc<File>,
    header: Header,
    table: Table,
    image: Option<Image>,
    base: Option<Arc<Snapshot>>,
    taken: Mutex<BTreeSet<String>>,
}

impl Snapshot {
    /// Opens a snapshot that is based on no other.
    ///
    /// # Errors
    /// [`SnapshotError`] in most of its kinds: what it is that is no snapshot, damaged, cut off, of a newer release or of another architecture.
    /// [`SnapshotError::Base`] if it is based on another.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, SnapshotError> {
        Self::read(path.into(), None)
    }

    /// Opens an incremental snapshot with the one that it is based on.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`SnapshotError::Base`] if it is based on none, or on another one.
    pub fn open_on(base: &Arc<Self>, path: impl Into<PathBuf>) -> Result<Self, SnapshotError> {
        Self::read(path.into(), Some(Arc::clone(base)))
    }

    fn read(path: PathBuf, base: Option<Arc<Self>>) -> Result<Self, SnapshotError> {
        let file = File::open(&path).map_err(failed(&path, "opening it"))?;
        let size = file.metadata().map_err(failed(&path, "fstat"))?.len();
        let header = read_header(&path, &file, size)?;
        let mut this = Self {
            path,
            file: Arc::new(file),
            header,
            table: Table::default(),
            image: None,
            base,
            taken: Mutex::default(),
        };
        this.check_base()?;
        this.table = this.read_table()?;
        for entry in &this.table.entries {
            // All of them now, so that what is damaged shows before anything is made of it.
            drop(this.state_bytes(entry)?);
        }
        this.image = this.read_image()?;
        Ok(this)
    }

    /// The digest that covers all of it, and which no other snapshot has.
    pub fn digest(&self) -> SnapshotDigest {
        SnapshotDigest(self.header.digest)
    }

    /// The digest of the snapshot that it is based on, if it is.
    pub fn base_digest(&self) -> Option<SnapshotDigest> {
        (self.header.base != [0; 32]).then_some(SnapshotDigest(self.header.base))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the states, in the order in which they were written.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.table.entries.iter().map(|entry| &*entry.name)
    }

    /// Families of states, and the version of each in which they were written.
    pub fn versions(&self) -> impl Iterator<Item = (&str, u16)> {
        self.table.formats.iter().map(|(name, version)| (&**name, *version))
    }

    /// A state.
    ///
    /// # Errors
    /// [`SnapshotError::NoState`], [`SnapshotError::OtherFormat`]; [`SnapshotError::Version`] for one of a newer release;
    /// [`SnapshotError::Decode`] if it means nothing.
    pub fn get<S: SnapshotState>(&self, name: &str) -> Result<S, SnapshotError> {
        let (state, _) = self.decode(name)?;
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        Ok(state)
    }

    /// Asks whether all states have been taken: one that has not is of something that this machine lacks.
    ///
    /// # Errors
    /// [`SnapshotError::Unread`] names them.
    pub fn finish(&self) -> Result<(), SnapshotError> {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let names: Vec<String> =
            self.names().filter(|name| *name != RAM && !taken.contains(*name)).map(str::to_owned).collect();
        if names.is_empty() { Ok(()) } else { Err(SnapshotError::Unread { path: self.path.clone(), names }) }
    }

    /// Where RAM was; `None` if there is none.
    pub fn ram_layout(&self) -> Option<&RamLayout> {
        self.image.as_ref().map(|image| &image.layout)
    }

    /// Makes RAM what it was, checking all of it. It has to be laid out as it was; what it is made of, and what was in it, does not matter. Nothing
    /// of it is dirty then.
    ///
    /// # Errors
    /// [`SnapshotError::Damaged`] tells which RAM; [`SnapshotError::Layout`] where the two differ. The RAM is useless then.
    pub fn load_ram(&self, ram: &GuestRam, options: &RamOptions<'_>) -> Result<(), SnapshotError> {
        self.image()?.load(self, ram, options)
    }

    /// RAM that shares pages with the file, and with all others who map it, until they are written: there at once, whatever its size.
    ///
    /// Its pages are not checked. Who does not know that the file is as it was written calls [`verify_ram`](Self::verify_ram), before the guest
    /// runs or beside it, and stops the guest if it fails. Nobody may change the file while anybody has it mapped: that changes
    /// guests, or kills their monitor by SIGBUS where the file becomes shorter.
    ///
    /// Of an incremental snapshot the lowest one is mapped, and what the others have is read and checked.
    ///
    /// # Errors
    /// [`SnapshotError::Layout`] if it is packed; what the host says about mapping it.
    pub fn map_ram(&self, track_dirty: bool, options: &RamOptions<'_>) -> Result<GuestRam, SnapshotError> {
        self.image()?.map(self, track_dirty, options)
    }

    /// Lets `ram` become what it was while the guest runs: whoever touches a page that is not there waits until it has come out of the file and was
    /// checked (userfaultfd(2)); what nobody touches comes in between. It also works for what is packed, and leaves nothing of the file mapped.
    ///
    /// RAM has to be anonymous memory, laid out as it was; what was in it does not matter, and nothing of it is dirty then. Another mapping of
    /// the memory would not see what is missing. `failed` is called if the file is damaged, or the host refuses. Whoever touches what is missing
    /// then waits for good, vCPUs too, which cannot be kicked out of that: it is for `failed` to end the process.
    ///
    /// # Errors
    /// [`SnapshotError::Layout`]; [`SnapshotError::Host`] where the host has no user faults, or keeps them from this process
    /// (`vm.unprivileged_userfaultfd`).
    pub fn load_ram_lazily(
        self: &Arc<Self>,
        ram: &GuestRam,
        failed: impl FnOnce(&SnapshotError) + Send + 'static,
    ) -> Result<LazyRam, SnapshotError> {
        Image::load_lazily(self, ram, Box::new(failed))
    }

    /// Checks all of RAM that this file has, and that nothing else is there. A base is to be checked apart from it.
    ///
    /// # Errors
    /// [`SnapshotError::Damaged`] tells which RAM.
    pub fn verify_ram(&self, options: &RamOptions<'_>) -> Result<(), SnapshotError> {
        self.image.as_ref().map_or(Ok(()), |image| image.verify(self, options))
    }

    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    pub(super) fn image(&self) -> Result<&Image, SnapshotError> {
        self.image.as_ref().ok_or_else(|| self.no_state(RAM))
    }

    /// The base, and its RAM.
    pub(super) fn base_image(&self) -> Option<(&Self, &Image)> {
        let base = self.base.as_deref()?;
        Some((base, base.image.as_ref()?))
    }

    /// The snapshot below all others, and its RAM.
    pub(super) fn lowest<'a>(&'a self, image: &'a Image) -> (&'a Self, &'a Image) {
        let mut lowest = (self, image);
        while let Some(below) = lowest.0.base_image() {
            lowest = below;
        }
        lowest
    }

    /// How many snapshots one has below it that is based on this one.
    fn depth(&self) -> usize {
        std::iter::successors(Some(self), |base| base.base.as_deref()).count()
    }

    /// Whether a snapshot of `ram` can be based on it.
    pub(super) fn check_base_of(&self, ram: &GuestRam) -> Result<(), SnapshotError> {
        let depth = self.depth();
        let problem = match &self.image {
            Some(_) if depth >= MAX_DEPTH => Some(format!(
                "{depth} snapshots would be below the next; at most {} are allowed",
                MAX_DEPTH - 1
            )),
            None => Some("it has no RAM, so that nothing can be based on it".to_owned()),
            Some(image) => image.layout.differs(ram),
        };
        problem.map_or(Ok(()), |problem| Err(SnapshotError::Base { path: self.path.clone(), problem }))
    }

    pub(super) fn damaged(&self, part: &Part, problem: String) -> SnapshotError {
        damaged(&self.path, part, problem)
    }

    /// Reads bytes of a part. That they are there was seen when the file was opened.
    pub(super) fn read_at(&self, into: &mut [u8], offset: u64, part: &Part) -> Result<(), SnapshotError> {
        read_at(&self.path, &self.file, into, offset, part)
    }

    fn no_state(&self, name: &str) -> SnapshotError {
        let present = self.names().map(str::to_owned).collect();
        SnapshotError::NoState { path: self.path.clone(), name: name.to_owned(), present }
    }

    fn decode<S: SnapshotState>(&self, name: &str) -> Result<(S, &Entry), SnapshotError> {
        let entry =
            self.table.entries.iter().find(|entry| entry.name == name).ok_or_else(|| self.no_state(name))?;
        let StateFormat { name: expected, newest, oldest } = S::FORMAT;
        let (format, version) =
            self.table.formats.get(entry.format).map_or(("", 0), |(name, version)| (name, *version));
        if format != expected {
            return Err(SnapshotError::OtherFormat {
                path: self.path.clone(),
                name: name.to_owned(),
                found: format.to_owned(),
                expected,
            });
        }
        if !(oldest..=newest).contains(&version) {
            return Err(SnapshotError::Version {
                path: self.path.clone(),
                what: format!("the state \"{name}\" of {expected}"),
                found: version.into(),
                oldest: oldest.into(),
                newest: newest.into(),
            });
        }
        let bytes = self.state_bytes(entry)?;
        let state = S::decode(&bytes, version).map_err(|source| SnapshotError::Decode {
            path: self.path.clone(),
            name: name.to_owned(),
            format: expected,
            version,
            source,
        })?;
        Ok((state, entry))
    }

    fn state_bytes(&self, entry: &Entry) -> Result<Vec<u8>, SnapshotError> {
        let part = Part {
            name: format!("the state \"{}\"", entry.name),
            begin: entry.offset,
            len: entry.len as u64,
        };
        let mut bytes = vec![0; entry.len.min(MAX_STATE)];
        self.read_at(&mut bytes, entry.offset, &part)?;
        if blake3::hash(&bytes) != entry.digest {
            return Err(self.damaged(&part, "its digest is another".to_owned()));
        }
        Ok(bytes)
    }

    fn check_base(&self) -> Result<(), SnapshotError> {
        let problem = match (self.base_digest(), &self.base) {
            (None, None) => return Ok(()),
            (Some(expected), Some(base)) if expected == base.digest() => {
                let depth = base.depth();
                if depth < MAX_DEPTH {
                    return Ok(());
                }
                format!("{depth} snapshots are below it; at most {} are allowed", MAX_DEPTH - 1)
            }
            (Some(expected), Some(base)) => {
                format!("it is based on {expected}, and {} is {}", base.path.display(), base.digest())
            }
            (Some(expected), None) => format!("it is based on {expected}, and has to be opened with that"),
            (None, Some(base)) => format!("it is based on no other, and not on {}", base.path.display()),
        };
        Err(SnapshotError::Base { path: self.path.clone(), problem })
    }

    fn read_table(&self) -> Result<Table, SnapshotError> {
        let (begin, end) = (self.header.table_at.get(), self.header.end.get());
        let part = Part::new("the table", begin, end);
        let len = usize::try_from(part.len).ok().filter(|len| *len <= MAX_TABLE).ok_or_else(|| {
            self.damaged(&part, format!("it has {} bytes; at most {MAX_TABLE} are allowed", part.len))
        })?;
        let mut bytes = vec![0; len];
        self.read_at(&mut bytes, begin, &part)?;
        if blake3::hash(&bytes) != self.header.table_digest {
            return Err(self.damaged(&part, "its digest is another".to_owned()));
        }
        Table::read(&bytes, self.header.states_at.get(), self.header.chunks_at.get())
            .map_err(|problem| self.damaged(&part, problem))
    }

    fn read_image(&self) -> Result<Option<Image>, SnapshotError> {
        let (begin, end) = (self.header.chunks_at.get(), self.header.table_at.get());
        let part = Part::new("the records of RAM", begin, end);
        let layout = match self.decode::<RamLayout>(RAM) {
            Ok((layout, _)) => layout,
            Err(SnapshotError::NoState { .. })
                if part.len == 0 && self.header.states_at.get() == HEADER_SIZE =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        // As many as the layout says: the file's size bounds them, and what there is to read.
        let expected = layout.chunks().saturating_mul(RECORD as u64);
        let len = usize::try_from(part.len).ok().filter(|_| part.len == expected).ok_or_else(|| {
            self.damaged(
                &part,
                format!("they have {} bytes; the layout of RAM asks for {expected}", part.len),
            )
        })?;
        let mut bytes = vec![0; len];
        self.read_at(&mut bytes, begin, &part)?;
        if blake3::hash(&bytes) != self.header.chunks_digest {
            return Err(self.damaged(&part, "their digest is another".to_owned()));
        }
        let image = Image::new(layout, &bytes, self.header.states_at.get(), self.base.is_some())
            .map_err(|problem| self.damaged(&part, problem))?;
        if let Some(base) = &self.base {
            let same = base.image.as_ref().is_some_and(|base| base.layout.regions == image.layout.regions);
            if !same {
                let problem = format!("its RAM is laid out otherwise than in {}", base.path.display());
                return Err(SnapshotError::Base { path: self.path.clone(), problem });
            }
        }
        Ok(Some(image))
    }
}

fn damaged(path: &Path, part: &Part, problem: String) -> SnapshotError {
    SnapshotError::Damaged {
        path: path.to_owned(),
        part: part.name.clone(),
        offset: part.begin,
        end: part.begin.saturating_add(part.len),
        problem,
    }
}

fn read_at(path: &Path, file: &File, into: &mut [u8], offset: u64, part: &Part) -> Result<(), SnapshotError> {
    file.read_exact_at(into, offset).map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => damaged(path, part, "the file ends in it".to_owned()),
        _ => SnapshotError::File { path: path.to_owned(), operation: "reading it", source },
    })
}

fn read_header(path: &Path, file: &File, size: u64) -> Result<Header, SnapshotError> {
    let part = Part::new("the header", 0, HEADER_SIZE);
    let mut page = vec![0; usize::try_from(HEADER_SIZE.min(size)).unwrap_or(0)];
    read_at(path, file, &mut page, 0, &part)?;
    if !page.starts_with(MAGIC.as_bytes()) {
        return Err(SnapshotError::NotASnapshot { path: path.to_owned(), expected: MAGIC.trim_end() });
    }
    if size < HEADER_SIZE {
        return Err(damaged(path, &part, format!("the file has {size} bytes")));
    }
    let (header, is_sealed) =
        Header::read(&page).ok_or_else(|| damaged(path, &part, "it is too short".to_owned()))?;
    // What another version's header looks like is not known here.
    if header.version.get() != VERSION {
        return Err(SnapshotError::Version {
            path: path.to_owned(),
            what: "its envelope".to_owned(),
            found: header.version.get(),
            oldest: VERSION,
            newest: VERSION,
        });
    }
    if !is_sealed {
        return Err(damaged(path, &part, "its digest is another".to_owned()));
    }
    if header.architecture.get() != ARCHITECTURE {
        return Err(SnapshotError::Architecture {
            path: path.to_owned(),
            found: header.architecture.get(),
            expected: ARCHITECTURE,
        });
    }
    let parts = [
        HEADER_SIZE,
        header.states_at.get(),
        header.chunks_at.get(),
        header.table_at.get(),
        header.end.get(),
    ];
    if !parts.is_sorted() {
        return Err(damaged(path, &part, format!("its parts are not in order: they end at {parts:x?}")));
    }
    if header.end.get() != size {
        let problem = format!("it should end at {:#x}, and the file has {size:#x} bytes", header.end.get());
        return Err(damaged(path, &Part::new("its length", 0, header.end.get()), problem));
    }
    Ok(header)
}

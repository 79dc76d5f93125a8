//! ELF kernels: loadable segments, entry point and notes.
//!
//! Every field of the file is hostile. The `object` crate supplies the structures of both ELF classes
//! and walks notes; the bounds are checked here, so that an error names the field that is wrong.

use std::ops::Range;

use object::LittleEndian;
use object::elf;
use object::read::elf::{FileHeader, NoteIterator, ProgramHeader};

use super::error::{BootError, slice};
use super::notes::XenNotes;

/// Total size of the note segments that are examined: real kernels have about 1 KiB of notes, and
/// program headers may name the same bytes again and again.
const MAX_NOTE_BYTES: u64 = 1 << 20;

/// A loadable segment: a program header of type `PT_LOAD` with bytes in memory (ELF gABI, program header).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadSegment {
    /// Index in the program header table.
    pub index: usize,
    /// `p_paddr`: guest-physical address of the first byte.
    pub paddr: u64,
    /// `p_vaddr`: virtual address of the first byte.
    pub vaddr: u64,
    /// `p_offset`: offset of the first byte in the file.
    pub offset: u64,
    /// `p_filesz`: bytes taken from the file.
    pub filesz: u64,
    /// `p_memsz`: bytes in memory, at least `filesz`; those past `filesz` are zero.
    pub memsz: u64,
    /// `p_flags`: 1 is execute, 2 is write, 4 is read.
    pub flags: u32,
}

impl LoadSegment {
    /// The guest-physical range, `.bss` included.
    pub fn physical(&self) -> Range<u64> {
        self.paddr..self.paddr.saturating_add(self.memsz)
    }

    /// Whether `address` points at a byte that comes from the file.
    fn holds_code_at(&self, address: u64) -> bool {
        address.checked_sub(self.paddr).is_some_and(|offset| offset < self.filesz)
    }
}

/// What an ELF file says about how to load it.
#[derive(Debug, Clone)]
pub(super) struct ElfImage {
    pub(super) is_64: bool,
    /// `e_entry`, as it is in the file.
    pub(super) entry: u64,
    /// Ascending by physical address, disjoint, never empty.
    pub(super) segments: Vec<LoadSegment>,
    pub(super) notes: XenNotes,
}

impl ElfImage {
    /// Reads the headers of `file`, which starts with the ELF magic.
    pub(super) fn parse(file: &[u8]) -> Result<Self, BootError> {
        let ident = slice(file, "ELF header e_ident", 0, size_of::<elf::Ident>() as u64)?;
        if let Some(&data) = ident.get(5)
            && data != elf::ELFDATA2LSB.0
        {
            return Err(BootError::field("e_ident[EI_DATA]", data.into(), "1 (ELFDATA2LSB)"));
        }
        match ident.get(4).map(|&class| elf::FileClass(class)) {
            Some(elf::ELFCLASS64) => {
                Self::parse_class::<elf::FileHeader64<LittleEndian>>(file, elf::EM_X86_64)
            }
            Some(elf::ELFCLASS32) => Self::parse_class::<elf::FileHeader32<LittleEndian>>(file, elf::EM_386),
            class => Err(BootError::field(
                "e_ident[EI_CLASS]",
                class.map_or(0, |class| class.0.into()),
                "1 (ELFCLASS32), 2 (ELFCLASS64)",
            )),
        }
    }

    fn parse_class<E>(file: &[u8], machine: elf::Machine) -> Result<Self, BootError>
    where
        E: FileHeader<Endian = LittleEndian>,
    {
        let e = LittleEndian;
        let bytes = slice(file, "ELF header", 0, size_of::<E>() as u64)?;
        // Magic, class and byte order have been checked, so this is about e_ident[EI_VERSION].
        let header = E::parse(bytes).map_err(|_| {
            let version = bytes.get(6).copied().unwrap_or_default();
            BootError::field("e_ident[EI_VERSION]", version.into(), "1 (EV_CURRENT)")
        })?;
        if header.e_machine(e) != machine {
            let allowed = format!("{} for this ELF class (x86)", machine.0);
            return Err(BootError::field("e_machine", header.e_machine(e).0.into(), allowed));
        }
        if !matches!(header.e_type(e), elf::ET_EXEC | elf::ET_DYN) {
            return Err(BootError::field("e_type", header.e_type(e).0.into(), "2 (ET_EXEC), 3 (ET_DYN)"));
        }

        let mut segments = Vec::new();
        let mut notes = XenNotes::default();
        let mut note_bytes = 0;
        let headers = program_headers::<E>(file, header)?;
        for (index, header) in headers.iter().enumerate() {
            match header.p_type(e) {
                elf::PT_LOAD => segments.extend(segment::<E>(file, index, header)?),
                elf::PT_NOTE => read_notes::<E>(file, index, header, &mut note_bytes, &mut notes)?,
                _ => {}
            }
        }
        if segments.is_empty() {
            return Err(BootError::NoSegments { phnum: headers.len() });
        }
        segments.sort_by_key(|segment| segment.paddr);
        for (lower, higher) in segments.iter().zip(segments.iter().skip(1)) {
            if lower.physical().end > higher.paddr {
                return Err(BootError::SegmentsOverlap {
                    first: lower.index,
                    second: higher.index,
                    first_end: lower.physical().end,
                    second_paddr: higher.paddr,
                });
            }
        }
        Ok(Self { is_64: header.is_type_64(), entry: header.e_entry(e).into(), segments, notes })
    }

    /// The guest-physical address of `e_entry`.
    ///
    /// ELF calls `e_entry` a virtual address, and a kernel linked for the higher half uses it so;
    /// vmlinux stores a physical address there instead. Only code can hold an entry: the per-CPU data of
    /// some vmlinux has virtual address 0.
    pub(super) fn physical_entry(&self) -> Result<u64, BootError> {
        let by_virtual_address = self.segments.iter().find_map(|segment| {
            let offset = self.entry.checked_sub(segment.vaddr)?;
            (offset < segment.filesz && segment.flags & elf::PF_X.0 != 0)
                .then(|| segment.paddr.saturating_add(offset))
        });
        match by_virtual_address {
            Some(entry) => Ok(entry),
            None => self.check_entry("e_entry", self.entry),
        }
    }

    /// `entry` if it is the physical address of a byte that the file supplies.
    pub(super) fn check_entry(&self, field: &'static str, entry: u64) -> Result<u64, BootError> {
        if self.segments.iter().any(|segment| segment.holds_code_at(entry)) {
            Ok(entry)
        } else {
            Err(BootError::EntryOutsideImage { field, entry })
        }
    }
}

fn program_headers<'data, E>(file: &'data [u8], header: &E) -> Result<&'data [E::ProgramHeader], BootError>
where
    E: FileHeader<Endian = LittleEndian>,
{
    let e = LittleEndian;
    let entry_size = size_of::<E::ProgramHeader>();
    if usize::from(header.e_phentsize(e)) != entry_size {
        let allowed = format!("{entry_size:#x} for this ELF class");
        return Err(BootError::field("e_phentsize", header.e_phentsize(e).into(), allowed));
    }
    let count = header.e_phnum(e);
    if count == 0 || count == u16::MAX {
        return Err(BootError::field("e_phnum", count.into(), "1 to 0xfffe"));
    }
    let length = u64::from(count) * entry_size as u64;
    let bytes = slice(
        file,
        "program header table (e_phoff, e_phnum * e_phentsize)",
        header.e_phoff(e).into(),
        length,
    )?;
    // The size fits by construction and the structures have no alignment, so this does not fail.
    let (headers, _) = object::pod::slice_from_bytes(bytes, count.into())
        .map_err(|()| BootError::field("e_phnum", count.into(), "as many headers as the table holds"))?;
    Ok(headers)
}

/// The segment that a `PT_LOAD` header describes; `None` if it occupies no memory.
fn segment<E>(file: &[u8], index: usize, header: &E::ProgramHeader) -> Result<Option<LoadSegment>, BootError>
where
    E: FileHeader<Endian = LittleEndian>,
{
    let e = LittleEndian;
    let segment = LoadSegment {
        index,
        paddr: header.p_paddr(e).into(),
        vaddr: header.p_vaddr(e).into(),
        offset: header.p_offset(e).into(),
        filesz: header.p_filesz(e).into(),
        memsz: header.p_memsz(e).into(),
        flags: header.p_flags(e).0,
    };
    let LoadSegment { paddr, vaddr, offset, filesz, memsz, .. } = segment;
    if filesz > memsz {
        return Err(BootError::SegmentSize { index, filesz, memsz });
    }
    if memsz == 0 {
        return Ok(None);
    }
    let file_size = file.len() as u64;
    if filesz > 0 && offset.checked_add(filesz).is_none_or(|end| end > file_size) {
        return Err(BootError::SegmentOutsideFile { index, offset, filesz, file_size });
    }
    let limit = if E::is_type_64_sized() { u64::MAX } else { u32::MAX.into() };
    for (field, address) in [("p_paddr", paddr), ("p_vaddr", vaddr)] {
        if address.checked_add(memsz - 1).is_none_or(|last| last > limit) {
            return Err(BootError::SegmentWraps { index, field, address, memsz, limit });
        }
    }
    Ok(Some(segment))
}

fn read_notes<E>(
    file: &[u8],
    index: usize,
    header: &E::ProgramHeader,
    total: &mut u64,
    xen: &mut XenNotes,
) -> Result<(), BootError>
where
    E: FileHeader<Endian = LittleEndian>,
{
    let e = LittleEndian;
    let size: u64 = header.p_filesz(e).into();
    *total = total.saturating_add(size);
    if *total > MAX_NOTE_BYTES {
        return Err(BootError::field(
            format!("program header {index}: p_filesz of all note segments so far"),
            *total,
            format!("at most {MAX_NOTE_BYTES:#x}"),
        ));
    }
    let offset: u64 = header.p_offset(e).into();
    let what = format!("program header {index} (PT_NOTE): p_offset, p_filesz");
    let bytes = slice(file, what, offset, size)?;
    let place = || format!("program header {index} (PT_NOTE)");
    let mut notes = NoteIterator::<E>::new(e, header.p_align(e), bytes).map_err(|_| {
        BootError::field(format!("{}: p_align", place()), header.p_align(e).into(), "0 to 4, 8")
    })?;
    while let Some(note) = notes.next().map_err(|error| BootError::note(place(), error.to_string()))? {
        // Some tools count the NUL in n_namesz and some do not.
        if note.name() == b"Xen" {
            xen.insert(note.n_type(e).0, note.desc())?;
        }
    }
    Ok(())
}

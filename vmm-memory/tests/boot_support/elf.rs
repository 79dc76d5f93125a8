//! A builder of ELF files of both classes.

/// Offset of the first program header's fields for a 64-bit file.
pub const PHDR_64: usize = 64;

pub struct Segment {
    pub paddr: u64,
    pub vaddr: u64,
    pub data: Vec<u8>,
    pub memsz: u64,
    pub flags: u32,
}

pub struct ElfBuilder {
    is_64: bool,
    entry: u64,
    segments: Vec<Segment>,
    notes: Vec<u8>,
}

impl ElfBuilder {
    pub fn new(is_64: bool, entry: u64) -> Self {
        Self { is_64, entry, segments: Vec::new(), notes: Vec::new() }
    }

    /// An executable segment whose virtual address is its physical one.
    pub fn segment(self, paddr: u64, data: &[u8], memsz: u64) -> Self {
        self.mapped_segment(paddr, paddr, data, memsz, 5)
    }

    pub fn mapped_segment(mut self, paddr: u64, vaddr: u64, data: &[u8], memsz: u64, flags: u32) -> Self {
        self.segments.push(Segment { paddr, vaddr, data: data.to_vec(), memsz, flags });
        self
    }

    pub fn note(mut self, kind: u32, desc: &[u8]) -> Self {
        self.notes.extend(4_u32.to_le_bytes());
        self.notes.extend(u32::try_from(desc.len()).unwrap().to_le_bytes());
        self.notes.extend(kind.to_le_bytes());
        self.notes.extend(b"Xen\0");
        self.notes.extend(desc);
        self.notes.resize(self.notes.len().next_multiple_of(4), 0);
        self
    }

    pub fn pvh(self, entry: u32) -> Self {
        self.note(18, &u64::from(entry).to_le_bytes())
    }

    /// Headers, then notes, then the segments, each 16-byte aligned.
    pub fn build(&self) -> Vec<u8> {
        let (ehdr, phdr) = if self.is_64 { (64, 56) } else { (52, 32) };
        let count = self.segments.len() + usize::from(!self.notes.is_empty());
        let mut offset = (ehdr + phdr * count).next_multiple_of(16);
        let mut headers = Vec::new();
        let mut content = Vec::new();
        let mut add = |kind: u32, flags: u32, vaddr: u64, paddr: u64, data: &[u8], memsz: u64| {
            self.program_header(
                &mut headers,
                kind,
                flags,
                [offset as u64, vaddr, paddr, data.len() as u64, memsz],
            );
            content.extend_from_slice(data);
            content.resize(content.len().next_multiple_of(16), 0);
            offset += data.len().next_multiple_of(16);
        };
        if !self.notes.is_empty() {
            add(4, 4, 0, 0, &self.notes, self.notes.len() as u64);
        }
        for segment in &self.segments {
            add(1, segment.flags, segment.vaddr, segment.paddr, &segment.data, segment.memsz);
        }
        let mut file = self.elf_header(ehdr, phdr, count);
        file.extend(headers);
        file.resize(file.len().next_multiple_of(16), 0);
        file.extend(content);
        file
    }

    fn word(&self, out: &mut Vec<u8>, value: u64) {
        if self.is_64 {
            out.extend(value.to_le_bytes());
        } else {
            out.extend(u32::try_from(value).unwrap().to_le_bytes());
        }
    }

    fn elf_header(&self, ehdr: usize, phdr: usize, count: usize) -> Vec<u8> {
        let half = |value: usize| u16::try_from(value).unwrap().to_le_bytes();
        let mut out = b"\x7fELF".to_vec();
        out.extend([if self.is_64 { 2 } else { 1 }, 1, 1]);
        out.resize(16, 0);
        out.extend(half(2));
        out.extend(half(if self.is_64 { 62 } else { 3 }));
        out.extend(1_u32.to_le_bytes());
        self.word(&mut out, self.entry);
        self.word(&mut out, ehdr as u64);
        self.word(&mut out, 0);
        out.extend(0_u32.to_le_bytes());
        for value in [ehdr, phdr, count, 0, 0, 0] {
            out.extend(half(value));
        }
        out
    }

    fn program_header(&self, out: &mut Vec<u8>, kind: u32, flags: u32, words: [u64; 5]) {
        let [offset, vaddr, paddr, filesz, memsz] = words;
        out.extend(kind.to_le_bytes());
        if self.is_64 {
            out.extend(flags.to_le_bytes());
        }
        for value in [offset, vaddr, paddr, filesz, memsz] {
            self.word(out, value);
        }
        if !self.is_64 {
            out.extend(flags.to_le_bytes());
        }
        self.word(out, 4);
    }
}

/// A 64-bit ELF with a PVH note: code at 1 MiB, data with `.bss` at 2 MiB.
pub fn pvh_kernel() -> Vec<u8> {
    ElfBuilder::new(true, 0x10_0000)
        .segment(0x10_0000, &[0x90; 0x40], 0x40)
        .mapped_segment(0x20_0000, 0x20_0000, b"data", 0x3000, 6)
        .pvh(0x10_0010)
        .build()
}

/// The same without the note.
pub fn flat_kernel() -> Vec<u8> {
    ElfBuilder::new(true, 0x10_0000)
        .segment(0x10_0000, &[0x90; 0x40], 0x40)
        .mapped_segment(0x20_0000, 0x20_0000, b"data", 0x3000, 6)
        .build()
}

/// A 32-bit ELF whose first segment starts with a multiboot 1 header, linked at 4 MiB.
pub fn multiboot_kernel(flags: u32) -> Vec<u8> {
    let mut code = super::multiboot_header(flags, &[]);
    code.resize(0x100, 0xf4);
    ElfBuilder::new(false, 0x40_000c).segment(0x40_0000, &code, 0x2000).build()
}

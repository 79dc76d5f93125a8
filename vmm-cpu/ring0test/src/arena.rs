//! The arena of one scenario: tables, stacks, code and the state that it starts with, all valid until a topic spoils some.

use anyhow::{Result, ensure};
use iced_x86::code_asm::CodeAssembler;

use crate::layout::*;

/// Bits of page-table entries.
pub mod entry {
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
}

pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

pub mod cr4 {
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

pub mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

pub mod rflags {
    pub const FIXED: u64 = 2;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const ID: u64 = 1 << 21;
    pub const STATUS: u64 = 0x8d5;
}

/// How linear addresses are translated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Protected mode without paging.
    #[default]
    Flat,
    /// 32-bit paging.
    Paged,
    /// PAE paging.
    Pae,
    /// Long mode.
    Long,
}

impl Mode {
    pub fn is_paged(self) -> bool {
        self != Mode::Flat
    }

    /// Bytes of a page-table entry.
    pub fn entry_bytes(self) -> u64 {
        if self == Mode::Paged { 4 } else { 8 }
    }
}

/// A code or data segment descriptor. `access` is its byte 5, `flags` G, D/B, L and AVL.
pub fn descriptor(base: u64, limit: u64, access: u64, flags: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

/// The first eight bytes of a gate. `rights` is its byte 5, `extra` its byte 4.
pub fn gate(selector: u16, offset: u64, rights: u64, extra: u64) -> u64 {
    offset & 0xffff | u64::from(selector) << 16 | extra << 32 | rights << 40 | (offset & 0xffff_0000) << 32
}

/// [`PAGE`] as a length.
const PAGE_BYTES: usize = 0x1000;

/// One scenario's memory.
#[derive(Clone, Debug)]
pub struct Arena {
    pub base: u64,
    pub mode: Mode,
    pages: Vec<Option<Box<[u8; PAGE_BYTES]>>>,
}

impl Arena {
    /// A scenario of 64-bit or, in legacy modes, 32-bit code at privilege level 0 in flat segments. If `user`, the pages
    /// of code, data and user stack belong to privilege level 3.
    pub fn new(base: u64, mode: Mode, user: bool) -> Self {
        let mut arena = Self { base, mode, pages: vec![None; usize::try_from(ARENA / PAGE).unwrap_or(0)] };
        arena.tables();
        arena.interrupts();
        arena.tasks();
        if mode.is_paged() {
            arena.paging(user);
        }
        for word in 0..PAGE / 2 {
            arena.put(page::CODE + 2 * word, 2, 0xcd | u64::from(END_VECTOR) << 8);
        }
        arena.start();
        arena
    }

    /// Address of what lies at `offset`.
    pub fn at(&self, offset: u64) -> u64 {
        self.base + offset
    }

    /// Where the window begins: three pages of linear addresses whose page tables are the topic's, of frames A to C. Large
    /// pages that have this arena in them lead there too.
    pub fn window(&self) -> u64 {
        let base = if self.mode == Mode::Long { 0x80_0000_0000 } else { 0x4000_0000 };
        base + self.at(page::FRAME_A)
    }

    /// The same three pages below 4 GiB, in long mode.
    pub fn low_window(&self) -> u64 {
        0x4000_0000 + self.at(page::FRAME_A)
    }

    /// Writes the low `bytes` bytes of a value. What lies outside of the arena is dropped.
    pub fn put(&mut self, offset: u64, bytes: u64, value: u64) {
        for n in 0..bytes {
            let offset = offset + n;
            let page = usize::try_from(offset / PAGE).ok().and_then(|page| self.pages.get_mut(page));
            let Some(page) = page else { continue };
            let page = page.get_or_insert_with(|| Box::new([0; PAGE_BYTES]));
            if let Some(byte) = usize::try_from(offset % PAGE).ok().and_then(|at| page.get_mut(at)) {
                *byte = (value >> (8 * n) & 0xff) as u8;
            }
        }
    }

    /// Reads `bytes` bytes, at most 8.
    pub fn get(&self, offset: u64, bytes: u64) -> u64 {
        (0..bytes).fold(0, |value, n| {
            let offset = offset + n;
            let page = usize::try_from(offset / PAGE).ok().and_then(|page| self.pages.get(page));
            let byte =
                page.and_then(Option::as_ref).and_then(|page| page.get(usize::try_from(offset % PAGE).ok()?));
            value | u64::from(byte.copied().unwrap_or(0)) << (8 * n)
        })
    }

    pub fn put64(&mut self, offset: u64, value: u64) {
        self.put(offset, 8, value);
    }

    /// The pages that hold something, with their offsets.
    pub fn pages(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let pages = self.pages.iter().zip(0_u64..);
        pages.filter_map(|(page, n)| page.as_ref().map(|page| (n * PAGE, page.as_slice())))
    }

    /// Assembles code of that many bits at `offset` into the code page, followed by the interrupt that ends the
    /// scenario; the offset of its end.
    pub fn code(
        &mut self,
        bits: u32,
        offset: u64,
        build: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    ) -> Result<u64> {
        let mut a = CodeAssembler::new(bits)?;
        build(&mut a)?;
        a.int(i32::from(END_VECTOR))?;
        let ip = self.code_address(bits, offset);
        let code = a.assemble(ip)?;
        let end = offset + code.len() as u64;
        ensure!(end <= PAGE, "code of {} bytes", code.len());
        self.bytes(page::CODE + offset, &code);
        Ok(end)
    }

    /// Writes bytes.
    pub fn bytes(&mut self, offset: u64, bytes: &[u8]) {
        for (byte, n) in bytes.iter().zip(0_u64..) {
            self.put(offset + n, 1, u64::from(*byte));
        }
    }

    /// What RIP is at an offset of the code page: 16-bit segments begin at the arena.
    pub fn code_address(&self, bits: u32, offset: u64) -> u64 {
        if bits == 16 { page::CODE + offset } else { self.at(page::CODE) + offset }
    }

    /// What the stack pointer is at the top of a stack page, for a segment of 16, 32 or 64 bits.
    pub fn stack_top(&self, bits: u32, stack: u64) -> u64 {
        let offset = stack + PAGE - 64;
        if bits == 16 { offset } else { self.at(offset) }
    }

    /// Writes an entry of the GDT.
    pub fn gdt(&mut self, selector: u16, descriptor: u64) {
        self.put64(page::GDT + u64::from(selector & !7), descriptor);
    }

    /// Writes an entry of the LDT.
    pub fn ldt(&mut self, selector: u16, descriptor: u64) {
        self.put64(page::LDT + u64::from(selector & !7), descriptor);
    }

    /// A general register, by its encoding.
    pub fn register(&mut self, n: u64, value: u64) {
        self.put64(header::REGISTERS + 8 * n, value);
        if n == 3 {
            self.put(header::START_32, 4, value);
        }
    }

    /// Lets the handler of a vector return.
    pub fn resume(&mut self, vector: u8) {
        let at = header::RESUME + u64::from(vector / 8);
        self.put(at, 1, self.get(at, 1) | 1 << (vector % 8));
    }

    /// Where the program starts: code and stack segment, offset in the code page, the page of its stack, RFLAGS.
    pub fn enter(&mut self, cs: u16, ss: u16, bits: u32, offset: u64, stack: u64, flags: u64) {
        let rip = self.code_address(bits, offset);
        let wide_stack =
            if bits == 16 && matches!(ss, selector::DATA_16 | selector::USER_DATA_16) { 16 } else { 32 };
        let rsp = self.stack_top(wide_stack, stack);
        let flags = flags | rflags::FIXED;
        for (value, n) in [rip, cs.into(), flags, rsp, ss.into()].into_iter().zip(0..) {
            self.put64(header::FRAME_64 + 8 * n, value);
        }
        if self.mode != Mode::Long {
            for (value, n) in [rip, cs.into(), flags, rsp, ss.into()].into_iter().zip(0..) {
                self.put(header::FRAME_32 + 4 * n, 4, value);
            }
        }
        self.register(4, rsp);
    }

    /// The same segment in DS, ES, FS and GS.
    pub fn data_segments(&mut self, selector: u16) {
        for field in [header::DS, header::ES, header::FS, header::GS] {
            self.put(field, 2, selector.into());
        }
        self.put(header::START_32 + 4, 4, selector.into());
    }

    /// Linear address of the descriptor table entry of a vector.
    pub fn idt_offset(&self, vector: u8) -> u64 {
        page::IDT + u64::from(vector) * if self.mode == Mode::Long { 16 } else { 8 }
    }

    /// Replaces the rights of a gate, its byte 5.
    pub fn gate_rights(&mut self, vector: u8, rights: u64) {
        let at = self.idt_offset(vector);
        self.put(at + 5, 1, rights);
    }

    fn tables(&mut self) {
        let base = self.base;
        let entries = [
            (selector::CODE_32, descriptor(0, 0xf_ffff, 0x9b, 0xc)),
            (selector::DATA, descriptor(0, 0xf_ffff, 0x93, 0xc)),
            (selector::CODE_64, descriptor(0, 0xf_ffff, 0x9b, 0xa)),
            (selector::HARNESS, descriptor(HARNESS, 0xf_ffff, 0x9b, 0xc)),
            (selector::USER_CODE_32, descriptor(0, 0xf_ffff, 0xfb, 0xc)),
            (selector::USER_DATA, descriptor(0, 0xf_ffff, 0xf3, 0xc)),
            (selector::USER_CODE_64, descriptor(0, 0xf_ffff, 0xfb, 0xa)),
            (selector::TSS, descriptor(self.at(page::TSS), 0x67, 0x89, 0)),
            (selector::LDT, descriptor(self.at(page::LDT), 0xff, 0x82, 0)),
            (selector::CODE_16, descriptor(base, 0xffff, 0x9b, 0)),
            (selector::USER_CODE_16, descriptor(base, 0xffff, 0xfb, 0)),
            (selector::CONFORMING_32, descriptor(0, 0xf_ffff, 0x9e, 0xc)),
            (selector::CONFORMING_64, descriptor(0, 0xf_ffff, 0x9e, 0xa)),
            (selector::CODE_1, descriptor(0, 0xf_ffff, 0xbb, 0xc)),
            (selector::DATA_1, descriptor(0, 0xf_ffff, 0xb3, 0xc)),
            (selector::CODE_2, descriptor(0, 0xf_ffff, 0xdb, 0xc)),
            (selector::DATA_2, descriptor(0, 0xf_ffff, 0xd3, 0xc)),
            (selector::DATA_16, descriptor(base, 0xffff, 0x93, 0)),
            (selector::USER_DATA_16, descriptor(base, 0xffff, 0xf3, 0)),
            (selector::OTHER_TSS, descriptor(self.at(page::OTHER_TSS), 0x67, 0x89, 0)),
            (selector::FAULT_TSS, descriptor(self.at(page::FAULT_TSS), 0x67, 0x89, 0)),
        ];
        for (selector, descriptor) in entries {
            self.gdt(selector, descriptor);
        }
        self.put(header::GDTR, 2, 0x2ff);
        self.put64(header::GDTR + 2, self.at(page::GDT));
        self.put(header::IDTR, 2, 0xfff);
        self.put64(header::IDTR + 2, self.at(page::IDT));
        self.put(header::LDTR, 2, selector::LDT.into());
        self.put(header::TR, 2, selector::TSS.into());
    }

    fn interrupts(&mut self) {
        for vector in 0..=255_u8 {
            let rights = if vector == END_VECTOR { 0xee } else { 0x8e };
            if self.mode == Mode::Long {
                let ist = if vector == 8 { 7 } else { 0 };
                let stub = STUBS_64 + u64::from(vector) * 32;
                self.put64(self.idt_offset(vector), gate(selector::CODE_64, stub, rights, ist));
            } else if vector == 8 {
                self.put64(self.idt_offset(vector), gate(selector::FAULT_TSS, 0, 0x85, 0));
            } else {
                let stub = STUBS_32 + u64::from(vector) * 16;
                self.put64(self.idt_offset(vector), gate(selector::CODE_32, stub, rights, 0));
            }
        }
    }

    /// Lets all vectors but that of the double fault go through 16-bit gates.
    pub fn narrow_gates(&mut self) {
        for vector in (0..=255_u8).filter(|vector| *vector != 8) {
            let rights = if vector == END_VECTOR { 0xe6 } else { 0x86 };
            let stub = STUBS_32 + u64::from(vector) * 16 - HARNESS;
            self.put64(self.idt_offset(vector), gate(selector::HARNESS, stub, rights, 0));
        }
        self.put(header::FLAGS, 4, self.get(header::FLAGS, 4) | flag::NARROW_GATES);
    }

    fn tasks(&mut self) {
        if self.mode == Mode::Long {
            for (stack, n) in [page::INNER_STACK, page::MIDDLE_STACK, page::MIDDLE_STACK].into_iter().zip(0..)
            {
                self.put64(page::TSS + 4 + 8 * n, self.at(stack + PAGE - 64 - 0x200 * n));
            }
            for n in 0..7 {
                self.put64(page::TSS + 0x24 + 8 * n, self.at(page::IST + PAGE - 64 - 0x200 * n));
            }
            self.put64(page::TSS + 0x24 + 8 * 6, self.at(page::FAULT_STACK + PAGE - 64));
            return;
        }
        let stacks = [
            (page::INNER_STACK, selector::DATA, 0),
            (page::MIDDLE_STACK, selector::DATA_1, 0),
            (page::MIDDLE_STACK, selector::DATA_2, 0x800),
        ];
        for (tss, eip, stack) in [
            (page::TSS, 0, 0),
            (page::OTHER_TSS, self.at(page::CODE + 0x800), page::OTHER_STACK),
            (page::FAULT_TSS, STUBS_32 + 8 * 16, page::FAULT_STACK),
        ] {
            for ((page, ss, below), n) in stacks.into_iter().zip(0..) {
                self.put(tss + 4 + 8 * n, 4, self.at(page + PAGE - 64 - below));
                self.put(tss + 8 + 8 * n, 2, ss.into());
            }
            self.put(tss + 0x1c, 4, if self.mode.is_paged() { self.at(page::ROOT) } else { 0 });
            self.put(tss + 0x20, 4, eip);
            self.put(tss + 0x24, 4, rflags::FIXED);
            self.put(tss + 0x38, 4, self.at(stack + PAGE - 64));
            let data = selector::DATA;
            for (value, n) in [data, selector::CODE_32, data, data, data, data].into_iter().zip(0..) {
                self.put(tss + 0x48 + 4 * n, 2, value.into());
            }
            self.put(tss + 0x60, 2, selector::LDT.into());
            self.put(tss + 0x66, 2, 0x68);
        }
    }

    /// Writes a page-table entry of the mode.
    pub fn entry(&mut self, table: u64, index: u64, value: u64) {
        let bytes = self.mode.entry_bytes();
        self.put(table + index % (PAGE / bytes) * bytes, bytes, value);
    }

    fn paging(&mut self, user: bool) {
        use entry::*;
        let mode = self.mode;
        let table = P | W | U;
        let (shift, indices) = if mode == Mode::Paged { (22, 1024) } else { (21, 512) };
        let directory = if mode == Mode::Paged { page::ROOT } else { page::DIRECTORY };
        match mode {
            Mode::Pae => {
                self.entry(page::ROOT, 0, self.at(page::DIRECTORY) | P);
                self.entry(page::ROOT, 1, self.at(page::WINDOW_DIRECTORY) | P);
            }
            Mode::Long => {
                self.entry(page::ROOT, 0, self.at(page::POINTERS) | table);
                self.entry(page::ROOT, 1, self.at(page::WINDOW_POINTERS) | table);
                self.entry(page::POINTERS, 0, self.at(page::DIRECTORY) | table);
                self.entry(page::POINTERS, 1, self.at(page::WINDOW_DIRECTORY) | table);
                self.entry(page::WINDOW_POINTERS, 0, self.at(page::WINDOW_DIRECTORY) | table);
            }
            _ => {}
        }
        self.entry(directory, 0, self.at(page::LOW_TABLE) | table);
        self.entry(directory, self.base >> shift, self.at(page::TABLE) | table);
        for page in HARNESS / PAGE..HARNESS_MAPPED / PAGE {
            self.entry(page::LOW_TABLE, page, (page * PAGE) | P | W | A | D);
        }
        for page in 0..ARENA / PAGE {
            let offset = page * PAGE;
            let is_users = user
                && matches!(
                    offset,
                    page::CODE | page::DATA | page::DATA_2 | page::USER_STACK | page::OTHER_STACK
                );
            let rights = if is_users { U } else { 0 };
            self.entry(page::TABLE, (self.at(offset) / PAGE) % indices, self.at(offset) | P | W | rights);
        }
        if mode != Mode::Long {
            for page in 0..16 {
                let offset = page * PAGE;
                let users = matches!(offset, page::CODE | page::DATA | page::DATA_2 | page::USER_STACK);
                let rights = if users { U } else { 0 };
                self.entry(page::LOW_TABLE, VIRTUAL_SEGMENT / 0x100 + page, self.at(offset) | P | W | rights);
            }
        }
        let window = self.window();
        if mode == Mode::Paged {
            self.entry(page::ROOT, window >> 22, self.at(page::WINDOW_TABLE) | table);
        } else {
            self.entry(page::WINDOW_DIRECTORY, window >> 21, self.at(page::WINDOW_TABLE) | table);
        }
        for (frame, n) in [page::FRAME_A, page::FRAME_B, page::FRAME_C].into_iter().zip(0..) {
            self.entry(page::WINDOW_TABLE, window / PAGE + n, self.at(frame) | table);
        }
    }

    fn start(&mut self) {
        let mode = self.mode;
        let (cs, ss, bits) = match mode {
            Mode::Long => (selector::CODE_64, selector::DATA, 64),
            _ => (selector::CODE_32, selector::DATA, 32),
        };
        let paging = if mode.is_paged() { cr0::PG | cr0::WP } else { 0 };
        self.put64(header::CR0, cr0::PE | cr0::ET | cr0::NE | paging);
        self.put64(header::CR3, if mode.is_paged() { self.at(page::ROOT) } else { 0 });
        let pae = if matches!(mode, Mode::Pae | Mode::Long) { cr4::PAE } else { 0 };
        self.put64(header::CR4, cr4::OSFXSR | pae);
        if mode == Mode::Long {
            self.put(header::LONG, 4, 1);
            self.put64(header::EFER, efer::LME | efer::NXE | efer::SCE);
        }
        self.put64(header::DR6, 0xffff_0ff0);
        self.put64(header::DR7, 0x400);
        self.put(header::MAX_EVENTS, 4, event::MAX);
        self.enter(cs, ss, bits, 0, page::STACK, 0);
        self.data_segments(selector::DATA);
    }

    /// Sets bits of a header field of 64 bits.
    pub fn set(&mut self, field: u64, bits: u64) {
        self.put64(field, self.get(field, 8) | bits);
    }
}

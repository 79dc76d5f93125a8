//! Where things lie in the guest's memory, and the tables that it starts with: sane ones with changes.

use vmm_cpu::state::{DescriptorTable, GeneralRegisters, Segment, SystemRegisters};

use super::arena::{Arena, BELOW_4G, LAST, MOVABLE, RAM, ROM};
use super::guest::{DescriptorChange, Entry, EntryChange, EntryIndex, Mode, SegmentChange, Start};

pub const GDT: u64 = 0x1000;
pub const LDT: u64 = 0x1800;
pub const IDT: u64 = 0x2000;
/// Three of them, 0x100 bytes each.
pub const TASKS: u64 = 0x3000;
/// Handlers of exceptions and interrupts, 64 bytes each.
pub const HANDLERS: u64 = 0x4000;
pub const CODE: u64 = 0x6000;
pub const CODE_SIZE: u16 = 0x2000;
pub const STACK: u64 = 0x9f00;
const INNER_STACK: u64 = 0xaf00;
const INTERRUPT_STACK: u64 = 0xbf00;
/// Page tables, a page each, as [`TABLE`] has them.
pub const TABLES: u64 = 0x1_0000;
pub const APIC: u64 = 0xfee0_0000;

const PML4: u64 = TABLES;
const PDPT: u64 = TABLES + 0x1000;
/// Directories of the first and the last of 4 GiB.
const PD_LOW: u64 = TABLES + 0x2000;
const PD_HIGH: u64 = TABLES + 0x3000;
/// The first and the second 2 MiB.
const PT_LOW: u64 = TABLES + 0x4000;
const PT_NEXT: u64 = TABLES + 0x5000;
const PD_32: u64 = TABLES + 0x6000;
const PT_32: u64 = TABLES + 0x7000;
const PDPT_PAE: u64 = TABLES + 0x8000;

const TABLE: [u64; 9] = [PML4, PDPT, PD_LOW, PD_HIGH, PT_LOW, PT_NEXT, PD_32, PT_32, PDPT_PAE];

/// Where the last GiB of guest-physical addresses is seen in 64-bit mode.
const LAST_GIB: u64 = 1 << 32;
const LAST_SEEN: u64 = LAST_GIB + (1 << 30) - LAST.size;

/// Addresses at which something ends or begins.
pub const PLACES: &[u64] = &[
    0,
    0x400,
    GDT,
    GDT + 0x50,
    LDT,
    IDT,
    IDT + 14 * 16,
    TASKS,
    TASKS + 0x64,
    HANDLERS,
    CODE,
    CODE + 0x1000,
    CODE + 0x2000,
    STACK,
    0x8000,
    0x9000,
    0xffff,
    0x1_0000,
    TABLES + 0x4000,
    0x9_0000,
    RAM.size - 8,
    RAM.size - 1,
    RAM.size,
    MOVABLE.gpa,
    MOVABLE.gpa + MOVABLE.size,
    ROM.gpa,
    ROM.gpa + ROM.size,
    ROM.gpa - 4,
    0x40_0000,
    APIC,
    APIC + 0x300,
    BELOW_4G.gpa,
    0xffff_fff8,
    1 << 32,
    LAST_SEEN,
    LAST_SEEN + LAST.size - 8,
    LAST_SEEN + LAST.size,
    0x7fff_ffff_f000,
    0x8000_0000_0000,
    // The page tables themselves.
    0xffff_8000_0000_0000,
    0xffff_ff80_0000_0000 + CODE,
    0xffff_ffff_ffff_fff0,
    u64::MAX,
];

/// Selectors of the GDT below, at both privilege levels, of the LDT, and some that lead nowhere.
pub const SELECTORS: &[u16] = &[
    0x08, 0x10, 0x18, 0x20, 0x28, 0x33, 0x3b, 0x43, 0x48, 0x50, 0x60, 0x70, 0x80, 0x88, 0x90, 0x98, 0xa0,
    0x4b, 0x53, 0x73, 0x83, 0x9b, 0, 3, 0x0c, 0x14, 0x0f, 0x17, 0xf8, 0xfff8, 0x13, 0x0b, 0xa8, 0xb3,
];

/// Model-specific registers that there are, and some that there are not.
pub const MSRS: &[u32] = &[
    0x10,
    0x1b,
    0x1b,
    0xfe,
    0x174,
    0x175,
    0x176,
    0x1a0,
    0x1d9,
    0x200,
    0x20f,
    0x250,
    0x277,
    0x2ff,
    0x6e0,
    0x6e0,
    0xc000_0080,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
    0xc001_0015,
    0x8b,
    0x17,
    0x210,
    0x4b56_4d00,
    0x830,
    0x80b,
    0x838,
    0x832,
    0x83e,
    0x80f,
];

const PRESENT: u64 = 1;
/// Present, writable, for users.
const OPEN: u64 = 7;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;

struct Writer<'a>(&'a Arena);

impl Writer<'_> {
    fn u64(&self, gpa: u64, value: u64) {
        self.0.write(gpa, &value.to_le_bytes());
    }

    fn u32(&self, gpa: u64, value: u32) {
        self.0.write(gpa, &value.to_le_bytes());
    }
}

/// Page tables that map 4 GiB onto themselves for every kind of paging, and some changes.
pub fn write_page_tables(arena: &Arena, changes: &[EntryChange]) {
    let mut tables = Tables(vec![0; TABLE.len() * 4096]);
    tables.set(PML4, PDPT | OPEN);
    tables.set(PML4 + 511 * 8, PDPT | OPEN);
    // The tables as memory.
    tables.set(PML4 + 256 * 8, PML4 | OPEN);
    tables.set(PDPT, PD_LOW | OPEN);
    tables.set(PDPT + 3 * 8, PD_HIGH | OPEN);
    let last_gib = (1 << 46) - (1 << 30);
    tables.set(PDPT + 4 * 8, last_gib | OPEN | LARGE);
    tables.set(PDPT_PAE, PD_LOW | PRESENT);
    tables.set(PDPT_PAE + 3 * 8, PD_HIGH | PRESENT);
    let both = |flags: u64| flags | flags << 32;
    for index in 0..512 {
        tables.set(PD_LOW + index * 8, index << 21 | OPEN | LARGE);
        tables.set(PD_HIGH + index * 8, 3 << 30 | index << 21 | OPEN | LARGE);
        tables.set(PT_LOW + index * 8, index << 12 | OPEN | if index & 1 == 0 { GLOBAL } else { 0 });
        tables.set(PT_NEXT + index * 8, 1 << 21 | index << 12 | OPEN);
        // Two entries of 32-bit paging.
        let [first, second] = [index * 2, index * 2 + 1];
        tables.set(PD_32 + index * 8, first << 22 | second << 54 | both(OPEN | LARGE));
        tables.set(PT_32 + index * 8, first << 12 | second << 44 | both(OPEN));
    }
    tables.set(PD_LOW, PT_LOW | OPEN);
    tables.set(PD_LOW + 8, PT_NEXT | OPEN);
    tables.set(PD_32, (PT_32 | OPEN) | (1 << 22 | OPEN | LARGE) << 32);
    for change in changes {
        tables.change(change);
    }
    arena.write(TABLES, &tables.0);
}

/// The page tables on their way to memory.
struct Tables(Vec<u8>);

impl Tables {
    fn entry(&mut self, gpa: u64) -> &mut [u8; 8] {
        let at = (gpa - TABLES) as usize;
        (&mut self.0[at..at + 8]).try_into().unwrap()
    }

    fn set(&mut self, gpa: u64, value: u64) {
        *self.entry(gpa) = value.to_le_bytes();
    }

    fn change(&mut self, change: &EntryChange) {
        let table = TABLE[usize::from(change.table) % TABLE.len()];
        let index = match change.index {
            EntryIndex::Low(index) | EntryIndex::Low2(index) => u64::from(index & 0x1f),
            EntryIndex::Any(index) => u64::from(index & 0x1ff),
        };
        let now = u64::from_le_bytes(*self.entry(table + index * 8));
        let entry = match change.entry {
            Entry::Flip(bits) => now ^ u64::from(bits & 0x1ff),
            Entry::FlipHigh(bits) => now ^ u64::from(bits) << 48,
            Entry::Frame(value, flags) => value.get() & 0x000f_ffff_ffff_f000 | u64::from(flags & 0xfff),
            Entry::Table(table, flags) => {
                TABLE[usize::from(table) % TABLE.len()] | u64::from(flags & 0xfff) | PRESENT
            }
            Entry::Any(value) => value,
        };
        self.set(table + index * 8, entry);
    }
}

const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const CODE_16: u64 = 0x000f_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const DATA_16: u64 = 0x000f_9300_0000_ffff;
const USER: u64 = 3 << 45;
const CONFORMING: u64 = 4 << 40;

/// A system descriptor: base, limit, type and privilege level.
fn system(base: u64, limit: u64, kind: u64, dpl: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | (0x80 | dpl << 5 | kind) << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56
}

/// The first half of a gate.
fn gate(selector: u64, offset: u64, kind: u64, dpl: u64, low: u64) -> u64 {
    offset & 0xffff
        | selector << 16
        | low << 32
        | (0x80 | dpl << 5 | kind) << 40
        | (offset >> 16 & 0xffff) << 48
}

fn task(n: u64) -> u64 {
    TASKS + n * 0x100
}

/// Selector of the code segment at privilege level 0.
fn kernel_code(mode: Mode) -> u64 {
    match mode.code_bits() {
        _ if mode.is_long() => 0x08,
        32 => 0x18,
        _ => 0x20,
    }
}

/// GDT, LDT, IDT or IVT, task-state segments and handlers.
pub fn write_tables(arena: &Arena, mode: Mode, handlers: [u8; 4], changes: &[DescriptorChange]) {
    let out = Writer(arena);
    let long = mode.is_long();
    let code = kernel_code(mode);
    let handler = |kind: u8| HANDLERS + u64::from(kind & 15) * 64;
    let descriptors = [
        0,
        CODE_64,
        DATA,
        CODE_32,
        CODE_16,
        DATA_16,
        CODE_64 | USER,
        DATA | USER,
        CODE_32 | USER,
        CODE_32 | CONFORMING,
        system(task(0), 0x67, 9, 0),
        0,
        system(LDT, 0xff, 2, 0),
        0,
        gate(code, handler(8), 0xc, 3, 2),
        0,
        gate(0x90, 0, 5, 3, 0),
        system(task(1), 0x67, 1, 0),
        system(task(2), 0x67, 9, 3),
        gate(code, handler(0), 4, 3, 1),
        // Expand-down data.
        DATA & !0xf_0000_0000_ffff | 4 << 40 | 0xfff,
        CODE_64 | CONFORMING,
        DATA_16 | USER,
    ];
    for (index, descriptor) in (0..).zip(descriptors) {
        out.u64(GDT + index * 8, descriptor);
        // The LDT holds the same, but for the system descriptors.
        out.u64(LDT + index * 8, if descriptor >> 44 & 1 != 0 { descriptor } else { DATA });
    }
    for n in 0..3 {
        write_task(&out, n, long, code);
    }
    write_handlers(arena, mode, handlers);
    if mode == Mode::Real {
        for vector in 0..256_u64 {
            out.u32(vector * 4, handler(handler_of(vector as u8)) as u32);
        }
    } else {
        let step = if long { 16 } else { 8 };
        for vector in 0..256 {
            let dpl = if vector & 3 == 0 { 3 } else { 0 };
            let ist = if long { vector & 15 & 1 } else { 0 };
            let kind = if vector & 64 == 0 { 0xe } else { 0xf };
            let low = gate(code, handler(handler_of(vector as u8)), kind, dpl, ist);
            out.u64(IDT + vector * step, low);
        }
    }
    for change in changes {
        change_descriptor(&out, arena, mode, change);
    }
}

/// Exceptions with an error code have handlers that drop it.
fn handler_of(vector: u8) -> u8 {
    match vector {
        8 | 10..=14 | 17 => 1,
        0..32 => 0,
        _ => 2 + (vector & 1),
    }
}

fn write_task(out: &Writer<'_>, n: u64, long: bool, code: u64) {
    let at = task(n);
    if long {
        for level in 0..3 {
            out.u64(at + 4 + level * 8, INNER_STACK);
        }
        for ist in 0..7 {
            out.u64(at + 0x24 + ist * 8, INTERRUPT_STACK + ist);
        }
    } else {
        out.u32(at, 0x50);
        out.u32(at + 4, INNER_STACK as u32);
        out.u32(at + 8, 0x10);
        out.u32(at + 0x1c, PD_32 as u32);
        out.u32(at + 0x20, CODE as u32);
        out.u32(at + 0x24, 2);
        out.u32(at + 0x38, STACK as u32);
        for (slot, selector) in (0..).zip([0x10, code as u32, 0x10, 0x10, 0x10, 0x10]) {
            out.u32(at + 0x48 + slot * 4, selector);
        }
        // The debug trap flag in one of them.
        out.u32(at + 0x64, if n == 2 { 0x60_0001 } else { 0x60_0000 });
    }
}

/// Handlers 0 to 3 as the input has them, others fixed. Those with odd numbers drop an error code.
fn write_handlers(arena: &Arena, mode: Mode, choices: [u8; 4]) {
    let bits = if mode.is_long() { 64 } else { mode.code_bits() };
    for n in 0..16_u8 {
        let choice = choices.get(usize::from(n)).copied().unwrap_or(n);
        let mut code = Vec::new();
        // Most go on behind the instruction that faulted, as far as they know its length.
        let skip = if n < 2 { [1, 2, 3, 4, 5, 6, 3, 0][usize::from(choice & 7)] } else { 0 };
        let drops_error = n & 1 != 0 && n < 2;
        match bits {
            64 => {
                if drops_error {
                    code.extend([0x48, 0x83, 0xc4, 0x08]);
                }
                if skip > 0 {
                    code.extend([0x48, 0x83, 0x04, 0x24, skip]);
                }
            }
            32 => {
                if drops_error {
                    code.extend([0x83, 0xc4, 0x04]);
                }
                if skip > 0 {
                    code.extend([0x83, 0x04, 0x24, skip]);
                }
            }
            _ => {
                if drops_error && mode != Mode::Real {
                    code.extend([0x83, 0xc4, 0x02]);
                }
                if skip > 0 {
                    code.extend([0x55, 0x8b, 0xec, 0x83, 0x46, 0x02, skip, 0x5d]);
                }
            }
        }
        match choice >> 4 {
            0 => code.push(0xf4),
            1 => code.extend([0xcd, 0x40]),
            2 => code.extend([0xec]),
            3 => code.extend([0x0f, 0x0b]),
            4 => code.extend([0xfb, 0x90]),
            _ => {}
        }
        if n == 8 {
            // Of the call gate.
            code.push(0xcb);
        }
        if bits == 64 {
            code.push(0x48);
        }
        code.push(0xcf);
        arena.write(HANDLERS + u64::from(n) * 64, &code);
    }
}

fn change_descriptor(out: &Writer<'_>, arena: &Arena, mode: Mode, change: &DescriptorChange) {
    let address = |index: u8| {
        let table = if index & 0x80 != 0 { LDT } else { GDT };
        table + u64::from(index % 24) * 8
    };
    let read = |at: u64| {
        let mut bytes = [0; 8];
        let address = vmm_memory::vm_memory::MemoryRegionAddress(at);
        vmm_memory::vm_memory::Bytes::read_slice(&**arena.region(RAM), &mut bytes, address).unwrap();
        u64::from_le_bytes(bytes)
    };
    let step = if mode.is_long() { 16 } else { 8 };
    match *change {
        DescriptorChange::Flip { index, bits } => out.u64(address(index), read(address(index)) ^ bits),
        DescriptorChange::Attributes { index, bits } => {
            let bits = u64::from(bits & 0xf0ff) << 40;
            out.u64(address(index), read(address(index)) ^ bits);
        }
        DescriptorChange::Any { index, raw } => out.u64(address(index), raw),
        DescriptorChange::Gate { vector, kind, selector, target, ist } => {
            let selector = SELECTORS[usize::from(selector) % SELECTORS.len()];
            let kind = [5, 6, 7, 0xe, 0xf, 0xc, 5, 0x1f][usize::from(kind & 7)];
            let target = HANDLERS + u64::from(target & 15) * 64;
            let low = gate(selector.into(), target, kind, u64::from(ist >> 6), (ist & 7).into());
            out.u64(IDT + u64::from(vector & 0x1f) * step, low);
        }
        DescriptorChange::AnyGate { vector, raw } => {
            out.u64(IDT + u64::from(vector) * step, raw[0]);
            out.u64(IDT + u64::from(vector) * step + 8, raw[1]);
        }
        DescriptorChange::Task { offset, value } => {
            out.u64(task(u64::from(offset >> 6) % 3) + u64::from(offset & 0x3f) * 2, value.get());
        }
    }
}

/// General registers of a start.
pub fn general_registers(start: &Start) -> GeneralRegisters {
    let [rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15, stack] =
        start.registers.map(super::guest::Value::get);
    let rsp = if start.odd & 1 != 0 { stack } else { STACK };
    let rflags = if start.odd & 2 != 0 { start.rflags.into() } else { u64::from(start.rflags & 0x0cd5) };
    GeneralRegisters {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: CODE + u64::from(start.entry),
        rflags: rflags | 2,
    }
}

/// System registers of a start. `now` has what does not change.
pub fn system_registers(start: &Start, now: &SystemRegisters) -> SystemRegisters {
    let mode = start.mode;
    let user = start.user && mode.is_protected();
    let dpl = if user { 3 } else { 0 };
    let (mut code, mut data) = if mode == Mode::Real {
        (Segment::real_mode(0, true), Segment::real_mode(0, false))
    } else if mode.code_bits() == 64 {
        (Segment::code64(if user { 0x33 } else { 0x08 }), Segment::data32(if user { 0x3b } else { 0x10 }))
    } else {
        (Segment::code32(if user { 0x43 } else { 0x18 }), Segment::data32(if user { 0x3b } else { 0x10 }))
    };
    if mode == Mode::Protected16 {
        code = Segment { selector: 0x20 | u16::from(dpl), big: false, ..code };
        data = Segment { big: false, ..data };
    }
    (code.dpl, data.dpl) = (dpl, dpl);
    let mut system = *now;
    (system.cs, system.ds, system.es, system.fs, system.gs, system.ss) = (code, data, data, data, data, data);
    system.tr = Segment::task_state(0x50, task(0));
    system.ldtr =
        Segment { selector: 0x60, base: LDT, limit: 0xff, kind: 2, present: true, ..Segment::default() };
    system.gdtr = DescriptorTable { base: GDT, limit: 0xff };
    system.idtr = DescriptorTable { base: IDT, limit: if mode.is_long() { 0xfff } else { 0x7ff } };
    (system.cr0, system.cr4, system.efer) = (SystemRegisters::CR0_ET | 0x20, 0x600, 0);
    if mode.is_protected() {
        system.cr0 |= SystemRegisters::CR0_PE;
    } else {
        system.idtr = DescriptorTable { base: 0, limit: 0x3ff };
    }
    if mode.is_paged() {
        system.cr0 |= SystemRegisters::CR0_PG | 1 << 16;
        system.cr4 |= 0x90;
    }
    system.cr3 = match mode {
        Mode::Pae => PDPT_PAE,
        Mode::Paged32 => PD_32,
        _ => PML4,
    };
    if mode == Mode::Pae || mode.is_long() {
        system.cr4 |= SystemRegisters::CR4_PAE;
    }
    if mode.is_long() {
        system.efer = SystemRegisters::EFER_LME | SystemRegisters::EFER_LMA | 1 << 11 | 1;
    }
    let applies = |bit: u8| start.odd >> bit & 1 != 0;
    if applies(2) {
        // MP, EM, TS, NE, WP, AM; rarely others.
        system.cr0 ^= u64::from(start.cr0) & 0x5_002e;
    }
    if applies(3) {
        system.cr4 ^= u64::from(start.cr4) & 0x30_0f9f;
    }
    if applies(4) && applies(5) {
        system.cr0 ^= u64::from(start.cr0);
        system.cr4 ^= u64::from(start.cr4);
        system.efer ^= u64::from(start.efer) << 5;
    }
    if applies(6) {
        system.efer ^= u64::from(start.efer & 1) | u64::from(start.efer & 8) << 8;
    }
    for change in &start.segments {
        change_segment(&mut system, change);
    }
    system
}

/// Applies a change to one of the eight segment registers.
pub fn change_segment(system: &mut SystemRegisters, change: &SegmentChange) {
    let segment = match change.register & 7 {
        0 => &mut system.cs,
        1 => &mut system.ss,
        2 => &mut system.ds,
        3 => &mut system.es,
        4 => &mut system.fs,
        5 => &mut system.gs,
        6 => &mut system.tr,
        _ => &mut system.ldtr,
    };
    segment.selector = SELECTORS[usize::from(change.selector) % SELECTORS.len()];
    if let Some(base) = change.base {
        segment.base = base.get();
    }
    if let Some(limit) = change.limit {
        segment.limit = limit;
    }
    let flip = |bit: u16| change.flip >> bit & 1 != 0;
    // A type of more than 4 bits is refused, which is tried now and then.
    segment.kind ^= (change.flip & 0xf) as u8;
    if change.flip >> 12 == 0xf {
        segment.kind = change.flip as u8;
        segment.dpl ^= 4;
    }
    segment.code_or_data ^= flip(4);
    segment.dpl ^= (change.flip >> 5 & 3) as u8;
    segment.present ^= flip(7);
    segment.long ^= flip(8);
    segment.big ^= flip(9);
    segment.granularity ^= flip(10);
    segment.unusable ^= flip(11) && flip(7);
}

//! What the engine keeps in guest-physical memory: stubs, descriptor tables, stacks, and the page tables for them.
//!
//! Written once, when the machine is made; the engine reads back nothing but the frame that the processor pushed for
//! an exception, and treats that as hostile.
//!
//! | page of the private region | what | who may reach it in a root |
//! |---|---|---|
//! | 0 | entry page: the stubs | everybody reads and executes |
//! | 1 | interrupt descriptor table | supervisor |
//! | 2 to 2 + 18 n | per vCPU: task state, stacks, 16 pages of descriptor table | supervisor |
//! | then | page tables | nobody |

use vmm_memory::vm_memory::{Bytes as _, GuestAddress};
use vmm_memory::{GuestMemoryMap, PAGE_SIZE};

use super::descriptors::{ENTRIES, STUB_CS, TASK_STATE, own};
use super::layout::{Layout, PRIVATE_SLOT, PRIVATE_VA};
use super::shim::{SHIM_SLOT, ShimPages};
use crate::error::{Error, Result};
use crate::own_tables::{interrupt_table, task_state, task_state_descriptor};
use crate::state::GeneralRegisters;

/// Slot of the machine-to-physical table in kernel roots.
pub const M2P_SLOT: usize = 259;

/// Where the guest kernel sees the machine-to-physical table.
pub const M2P_VA: u64 = 0xffff_8180_0000_0000;

/// Slot that Xen has it in, and that kernels have built in which do not ask.
pub(super) const XEN_M2P_SLOT: usize = 256;

/// Where such a kernel looks for the machine-to-physical table (`MACH2PHYS_VIRT_START`).
pub const XEN_M2P_VA: u64 = 0xffff_8000_0000_0000;

/// Port that the stubs of SYSCALL leave by.
pub(super) const PORT_SYSCALL: u8 = 0x20;

/// Port that the engine's own operations leave by.
pub(super) const PORT_OPERATION: u8 = 0x21;

/// What a store to the shim's doorbell counts as.
pub(super) const PORT_SHIM: u8 = 0x22;

/// Port of exception 0; the others follow.
pub(super) const PORT_EXCEPTION: u8 = 0x40;

/// Exceptions: gates of the interrupt descriptor table. INT n beyond is #GP.
pub(super) const EXCEPTIONS: u8 = 32;

/// Stub of SYSCALL from 64-bit code.
pub(super) const VA_SYSCALL: u64 = PRIVATE_VA;

/// Stub of SYSCALL from 32-bit code.
pub(super) const VA_SYSCALL_32: u64 = PRIVATE_VA + 0x10;

/// Operation: forget the translation of the address in RAX.
pub(super) const VA_FLUSH_PAGE: u64 = PRIVATE_VA + 0x20;

/// Operation: for each of the addresses in [`touched`] registers, a store that changes nothing; then as [`VA_LOAD_ROOT`].
const VA_TOUCH: u64 = PRIVATE_VA + 0x30;

/// Operation: load the root in RBP, which forgets all translations.
pub(super) const VA_LOAD_ROOT: u64 = VA_TOUCH + MAX_TOUCHED as u64 * TOUCH_SIZE;

/// Addresses that one operation touches.
pub(super) const MAX_TOUCHED: usize = 12;

/// LOCK OR QWORD PTR [register], 0
const TOUCH_SIZE: u64 = 5;

/// The operation that touches the last `count` of [`MAX_TOUCHED`] registers.
pub(super) fn touch(count: usize) -> u64 {
    VA_LOAD_ROOT - count.min(MAX_TOUCHED) as u64 * TOUCH_SIZE
}

/// The registers that it takes addresses from, in that order.
pub(super) fn touched(registers: &mut GeneralRegisters) -> [&mut u64; MAX_TOUCHED] {
    let GeneralRegisters { rax, rcx, rdx, rbx, rsi, rdi, r8, r9, r10, r11, r14, r15, .. } = registers;
    [rax, rcx, rdx, rbx, rsi, rdi, r8, r9, r10, r11, r14, r15]
}

/// In ring 3: loads FS with the selector in RCX, gives it the base in RAX, loads it with a null selector, and reads the base.
pub(super) const VA_NULL_SELECTOR: u64 = PRIVATE_VA + 0x80;

/// In ring 3: CPUID. The OUT behind it is not allowed there, which ends it.
pub(super) const VA_CPUID: u64 = PRIVATE_VA + 0xe0;

/// In ring 3: XGETBV, likewise.
pub(super) const VA_XGETBV: u64 = PRIVATE_VA + 0xf0;

/// Stub of exception 0; the others follow, [`STUB_SIZE`] bytes each.
const VA_EXCEPTIONS: u64 = PRIVATE_VA + 0x100;

const STUB_SIZE: u64 = 8;

const ENTRY_PAGE: u64 = 0;
const IDT_PAGE: u64 = 1;
const FIRST_VCPU_PAGE: u64 = 2;
const GDT_PAGES: u64 = ENTRIES as u64 * 8 / PAGE_SIZE;
const PAGES_PER_VCPU: u64 = 2 + GDT_PAGES;

/// Page-table entry bits (Intel SDM 3A table 5-20).
pub(super) const PRESENT: u64 = 1;
pub(super) const WRITABLE: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
pub(super) const ACCESSED: u64 = 1 << 5;
pub(super) const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
pub(super) const NO_EXECUTE: u64 = 1 << 63;

/// An entry that leads to another table.
pub(super) const TABLE: u64 = PRESENT | WRITABLE | USER | ACCESSED;

const LARGE_PAGE: u64 = 2 << 20;
/// Memory under one page directory.
pub(super) const DIRECTORY: u64 = 1 << 30;
pub(super) const TABLE_ENTRIES: u64 = 512;

/// Where the parts of the private region lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Private {
    layout: Layout,
    vcpus: u64,
    shim: Option<ShimPages>,
}

impl Private {
    pub(super) fn new(layout: Layout, vcpus: u32) -> Self {
        Self { layout, vcpus: vcpus.into(), shim: None }
    }

    /// The same with an in-guest fast path behind.
    ///
    /// # Errors
    /// As [`ShimPages::new`].
    pub(super) fn with_shim(self, vcpus: u32) -> Result<Self> {
        let start = self.layout.private().0 + self.size();
        Ok(Self { shim: Some(ShimPages::new(self.layout, start, vcpus)?), ..self })
    }

    pub(super) fn shim(&self) -> Option<&ShimPages> {
        self.shim.as_ref()
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }

    /// Pages that the roots show.
    fn shown_pages(&self) -> u64 {
        FIRST_VCPU_PAGE + self.vcpus * PAGES_PER_VCPU
    }

    /// Page tables under [`PRIVATE_SLOT`] of the lowest level.
    fn leaf_tables(&self) -> u64 {
        self.shown_pages().div_ceil(TABLE_ENTRIES)
    }

    fn m2p_directories(&self) -> u64 {
        self.layout.m2p_size().div_ceil(DIRECTORY)
    }

    /// Page directories that map the domain's RAM for the engine's own stores.
    fn ram_directories(&self) -> u64 {
        self.layout.ram().div_ceil(DIRECTORY)
    }

    /// Bytes of the region, which starts at [`Layout::private`].
    pub(super) fn size(&self) -> u64 {
        let tables = 2 + self.leaf_tables() + 1 + self.m2p_directories() + 2 + self.ram_directories();
        (self.shown_pages() + tables) * PAGE_SIZE + self.shim.map_or(0, |shim| shim.size())
    }

    fn page(&self, number: u64) -> u64 {
        self.layout.private().0 + number * PAGE_SIZE
    }

    fn vcpu_page(index: u32) -> u64 {
        FIRST_VCPU_PAGE + u64::from(index) * PAGES_PER_VCPU
    }

    fn shown_at(page: u64) -> u64 {
        PRIVATE_VA + page * PAGE_SIZE
    }

    pub(super) fn idt(&self, vcpu: u32) -> (u64, u16) {
        let at = if self.shim.is_some() { ShimPages::idt(vcpu) } else { Self::shown_at(IDT_PAGE) };
        (at, u16::from(EXCEPTIONS) * 16 - 1)
    }

    /// Where SYSCALL of 64-bit code goes.
    pub(super) fn syscall(&self, vcpu: u32) -> u64 {
        if self.shim.is_some() { ShimPages::entry(vcpu) } else { VA_SYSCALL }
    }

    pub(super) fn gdt(&self, vcpu: u32) -> (u64, u16) {
        (Self::shown_at(Self::vcpu_page(vcpu) + 2), u16::MAX)
    }

    pub(super) fn task_state(&self, vcpu: u32) -> u64 {
        Self::shown_at(Self::vcpu_page(vcpu))
    }

    /// Where an entry of the descriptor table lies.
    pub(super) fn descriptor(&self, vcpu: u32, index: u16) -> GuestAddress {
        GuestAddress(self.page(Self::vcpu_page(vcpu) + 2) + u64::from(index % ENTRIES) * 8)
    }

    /// Guest-virtual end of the stack that a vector's frame is pushed to. Debug exceptions have their own, since they may
    /// come up at the first instruction of another exception's stub, whose frame is still wanted.
    pub(super) fn stack_end(&self, vcpu: u32, vector: u8) -> u64 {
        if self.shim.is_some() {
            return ShimPages::stack_end(vcpu, vector);
        }
        Self::shown_at(Self::vcpu_page(vcpu) + 1) + if vector == 1 { PAGE_SIZE } else { PAGE_SIZE / 2 }
    }

    /// Guest-physical address of the same.
    pub(super) fn stack_end_gpa(&self, vcpu: u32, vector: u8) -> GuestAddress {
        if let Some(shim) = &self.shim {
            return shim.stack_end_gpa(vcpu, vector);
        }
        GuestAddress(self.layout.private().0 + (self.stack_end(vcpu, vector) - PRIVATE_VA))
    }

    /// The exception whose stub starts at `rip`.
    pub(super) fn exception_of(rip: u64) -> Option<u8> {
        let offset = rip.checked_sub(VA_EXCEPTIONS).filter(|offset| offset.is_multiple_of(STUB_SIZE))?;
        u8::try_from(offset / STUB_SIZE).ok().filter(|vector| *vector < EXCEPTIONS)
    }

    /// Whether the stubs lie there.
    pub(super) fn is_entry_page(rip: u64) -> bool {
        rip & !(PAGE_SIZE - 1) == PRIVATE_VA
    }

    fn table_page(&self, number: u64) -> u64 {
        self.page(self.shown_pages() + number)
    }

    /// What goes into [`PRIVATE_SLOT`] of a root.
    pub(super) fn private_entry(&self) -> u64 {
        self.table_page(0) | TABLE
    }

    /// What goes into [`M2P_SLOT`] of a kernel root.
    pub(super) fn m2p_entry(&self) -> u64 {
        self.table_page(2 + self.leaf_tables()) | TABLE | NO_EXECUTE
    }

    /// A root that shows the engine's pages, and the domain's RAM from 0.
    pub(super) fn own_root(&self) -> u64 {
        self.table_page(3 + self.leaf_tables() + self.m2p_directories())
    }

    /// Writes all of it.
    pub(super) fn write(&self, memory: &GuestMemoryMap, compatibility_mode: bool) -> Result<()> {
        let put = |gpa: u64, bytes: &[u8]| {
            memory
                .write_slice(bytes, GuestAddress(gpa))
                .map_err(|source| Error::Backend { backend: super::super::NAME, source: Box::new(source) })
        };
        let entry = |table: u64, index: u64, value: u64| put(table + index * 8, &value.to_le_bytes());
        put(self.page(ENTRY_PAGE), &entry_page())?;
        put(self.page(IDT_PAGE), &interrupt_table(STUB_CS, (0..EXCEPTIONS).map(Self::stub)))?;
        for vcpu in 0..u32::try_from(self.vcpus).unwrap_or(u32::MAX) {
            let stacks = [0, 1].map(|vector| self.stack_end(vcpu, vector));
            put(self.page(Self::vcpu_page(vcpu)), &task_state(stacks))?;
            for (selector, descriptor) in own(compatibility_mode) {
                put(self.descriptor(vcpu, selector >> 3).0, &descriptor.to_le_bytes())?;
            }
            let [low, high] = task_state_descriptor(self.task_state(vcpu));
            put(self.descriptor(vcpu, TASK_STATE >> 3).0, &low.to_le_bytes())?;
            put(self.descriptor(vcpu, (TASK_STATE >> 3) + 1).0, &high.to_le_bytes())?;
        }

        // The engine's pages.
        let (pointers, directory, leaves) = (self.table_page(0), self.table_page(1), self.table_page(2));
        entry(pointers, 0, directory | TABLE)?;
        for table in 0..self.leaf_tables() {
            entry(directory, table, (leaves + table * PAGE_SIZE) | TABLE)?;
        }
        for page in 0..self.shown_pages() {
            let rights = match page {
                ENTRY_PAGE => PRESENT | USER | ACCESSED,
                IDT_PAGE => PRESENT | ACCESSED | NO_EXECUTE,
                _ => PRESENT | WRITABLE | ACCESSED | DIRTY | NO_EXECUTE,
            };
            entry(leaves, page, self.page(page) | rights)?;
        }

        // The machine-to-physical table, large pages.
        let pointers = self.table_page(2 + self.leaf_tables());
        write_large(&entry, pointers, self.layout.m2p().0, self.layout.m2p_size(), USER | NO_EXECUTE)?;

        // The engine's own root.
        let (root, pointers) = (self.own_root(), self.own_root() + PAGE_SIZE);
        entry(root, 0, pointers | TABLE)?;
        entry(root, PRIVATE_SLOT as u64, self.private_entry())?;
        write_large(&entry, pointers, 0, self.layout.ram(), WRITABLE | DIRTY | NO_EXECUTE)?;
        if let Some(shim) = &self.shim {
            entry(root, SHIM_SLOT as u64, shim.own_entry())?;
            shim.write(memory, Self::stub, GuestAddress(self.page(IDT_PAGE)))?;
        }
        Ok(())
    }

    /// The stub of an exception.
    fn stub(vector: u8) -> u64 {
        VA_EXCEPTIONS + u64::from(vector) * STUB_SIZE
    }
}

/// Fills the tables from `pointers` on so that they map `size` bytes from `gpa` on in large pages.
pub(super) fn write_large(
    entry: &impl Fn(u64, u64, u64) -> Result<()>,
    pointers: u64,
    gpa: u64,
    size: u64,
    rights: u64,
) -> Result<()> {
    for page in 0..size.div_ceil(LARGE_PAGE) {
        let directory = pointers + (1 + page / TABLE_ENTRIES) * PAGE_SIZE;
        if page.is_multiple_of(TABLE_ENTRIES) {
            entry(pointers, page / TABLE_ENTRIES, directory | TABLE)?;
        }
        let value = (gpa + page * LARGE_PAGE) | PRESENT | ACCESSED | LARGE | rights;
        entry(directory, page % TABLE_ENTRIES, value)?;
    }
    Ok(())
}

/// The stubs. What follows an OUT is not reached: the engine sets all registers before the guest runs again.
fn entry_page() -> Vec<u8> {
    const OUT: u8 = 0xe6;
    let mut page = vec![0xcc; usize::try_from(PAGE_SIZE).unwrap_or(0)];
    let mut put = |va: u64, code: &[u8]| {
        let start = usize::try_from(va - PRIVATE_VA).unwrap_or(usize::MAX);
        if let Some(place) = page.get_mut(start..start.saturating_add(code.len())) {
            place.copy_from_slice(code);
        }
    };
    put(VA_SYSCALL, &[OUT, PORT_SYSCALL]);
    put(VA_SYSCALL_32, &[OUT, PORT_SYSCALL]);
    // INVLPG [RAX]
    put(VA_FLUSH_PAGE, &[0x0f, 0x01, 0x38, OUT, PORT_OPERATION]);
    // LOCK OR QWORD PTR [register], 0, which shows an entry to who shadows tables, and keeps what a processor sets in it
    // meanwhile.
    for (at, register) in (0..).zip([0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 14, 15]) {
        let rex = if register < 8 { 0x48 } else { 0x49 };
        put(VA_TOUCH + at * TOUCH_SIZE, &[0xf0, rex, 0x83, 0x08 | register & 7, 0]);
    }
    // MOV CR3, RBP
    put(VA_LOAD_ROOT, &[0x0f, 0x22, 0xdd, OUT, PORT_OPERATION]);
    // MOV FS, ECX; WRFSBASE RAX; XOR ECX, ECX; MOV FS, ECX; RDFSBASE RAX
    put(VA_NULL_SELECTOR, &[0x8e, 0xe1, 0xf3, 0x48, 0x0f, 0xae, 0xd0, 0x31, 0xc9, 0x8e, 0xe1]);
    put(VA_NULL_SELECTOR + 11, &[0xf3, 0x48, 0x0f, 0xae, 0xc0, OUT, PORT_OPERATION]);
    put(VA_CPUID, &[0x0f, 0xa2, OUT, PORT_OPERATION]);
    put(VA_XGETBV, &[0x0f, 0x01, 0xd0, OUT, PORT_OPERATION]);
    for vector in 0..EXCEPTIONS {
        put(VA_EXCEPTIONS + u64::from(vector) * STUB_SIZE, &[OUT, PORT_EXCEPTION + vector]);
    }
    page
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Mnemonic, Register};

    use super::*;

    #[test]
    fn tables_lie_behind_each_other() {
        for (ram, vcpus) in [(4 << 20, 1), (5 << 30, 8), (1 << 40, 64)] {
            let private = Private::new(Layout::new(ram).unwrap(), vcpus);
            let end = private.own_root() + (2 + private.ram_directories()) * PAGE_SIZE;
            assert_eq!(end, private.layout.private().0 + private.size());
            let m2p = private.m2p_entry() & 0x000f_ffff_ffff_f000;
            assert!(m2p < private.own_root() && m2p > private.private_entry() & !0xfff);
        }
    }

    #[test]
    fn stubs_leave_by_their_port() {
        let page = entry_page();
        for (va, port) in [(VA_SYSCALL, PORT_SYSCALL), (VA_SYSCALL_32, PORT_SYSCALL)]
            .into_iter()
            .chain(
                [VA_FLUSH_PAGE, VA_LOAD_ROOT, VA_NULL_SELECTOR, VA_CPUID, VA_XGETBV]
                    .map(|va| (va, PORT_OPERATION)),
            )
            .chain((0..EXCEPTIONS).map(|n| (VA_EXCEPTIONS + u64::from(n) * STUB_SIZE, PORT_EXCEPTION + n)))
        {
            let code = &page[usize::try_from(va - PRIVATE_VA).unwrap()..];
            let mut decoder = Decoder::with_ip(64, code, va, DecoderOptions::NONE);
            let out = decoder.iter().find(|i| i.mnemonic() == Mnemonic::Out).unwrap();
            let length = out.ip() - va;
            let room = if va == VA_NULL_SELECTOR { VA_CPUID - va } else { 12 };
            assert!(length + 2 <= room, "the stub ends before the next one: {length}");
            assert_eq!((out.mnemonic(), out.immediate8()), (Mnemonic::Out, port));
        }
    }

    #[test]
    fn touching_names_each_register_once() {
        let page = entry_page();
        for count in 0..=MAX_TOUCHED {
            let start = touch(count);
            let code = &page[usize::try_from(start - PRIVATE_VA).unwrap()..];
            let touches = Decoder::with_ip(64, code, start, DecoderOptions::NONE)
                .into_iter()
                .take_while(|i| i.mnemonic() == Mnemonic::Or)
                .inspect(|i| assert!(i.has_lock_prefix() && i.immediate(1) == 0 && i.len() == 5, "{i}"))
                .map(|i| i.memory_base());
            let mut registers = GeneralRegisters::default();
            (0..).zip(touched(&mut registers)).for_each(|(number, register)| *register = number);
            let numbers: Vec<_> = touches.map(|base| number_of(&registers, base)).collect();
            assert_eq!(numbers, Vec::from_iter((MAX_TOUCHED - count) as u64..MAX_TOUCHED as u64));
        }
    }

    fn number_of(registers: &GeneralRegisters, base: Register) -> u64 {
        match base {
            Register::RAX => registers.rax,
            Register::RCX => registers.rcx,
            Register::RDX => registers.rdx,
            Register::RBX => registers.rbx,
            Register::RSI => registers.rsi,
            Register::RDI => registers.rdi,
            Register::R8 => registers.r8,
            Register::R9 => registers.r9,
            Register::R10 => registers.r10,
            Register::R11 => registers.r11,
            Register::R14 => registers.r14,
            Register::R15 => registers.r15,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn exceptions_are_known_by_their_stub() {
        assert_eq!(Private::exception_of(VA_EXCEPTIONS), Some(0));
        assert_eq!(Private::exception_of(VA_EXCEPTIONS + 14 * STUB_SIZE), Some(14));
        for rip in [VA_EXCEPTIONS + 1, VA_EXCEPTIONS + 32 * STUB_SIZE, VA_SYSCALL, 0, u64::MAX] {
            assert_eq!(Private::exception_of(rip), None, "{rip:#x}");
        }
    }
}

//! What the engine keeps in guest-physical memory: stubs, descriptor tables, stacks, and page tables.
//!
//! Programs run on copies of their top-level tables, which have their own half of the address space and, in [`SLOT`], these
//! pages. Written once, but for copies and lists; nothing that is read back is believed.
//!
//! | page | what | who reaches it |
//! |---|---|---|
//! | 0 | stubs | everybody reads and executes |
//! | 1, 2 | interrupt and global descriptor table | supervisor |
//! | then two a vCPU | task state and stacks; list of entries to show | supervisor |
//! | then | copies of top-level tables | supervisor |
//! | then | page tables | nobody |

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, MemoryRegionAddress};
use vmm_memory::{GuestRam, GuestRegion, PAGE_SIZE, RegionConfig};

use crate::error::{Error, Result};
use crate::kvm::NAME;

/// Entry of the top-level tables that leads here: one that Linux leaves to hypervisors.
const SLOT: u64 = 258;

/// Where it leads.
const VA: u64 = 0xffff_8100_0000_0000;

/// Port that SYSCALL's stub leaves by.
pub(super) const PORT_SYSCALL: u16 = 0x20;
/// Port that the engine's own operations leave by.
pub(super) const PORT_DONE: u16 = 0x21;
/// Port of exception 0; the others follow.
pub(super) const PORT_EXCEPTION: u16 = 0x40;
/// Exceptions.
pub(super) const EXCEPTIONS: u16 = 32;

/// Stub of SYSCALL.
pub(super) const VA_SYSCALL: u64 = VA;
/// Operation: for RCX addresses in the list at RSI, a store that changes nothing; then as [`VA_LOAD_ROOT`].
pub(super) const VA_SHOW: u64 = VA + 0x20;
/// Operation: load the root in RBP.
pub(super) const VA_LOAD_ROOT: u64 = VA_SHOW + 9;
/// Stub of exception 0; the others follow.
const VA_EXCEPTIONS: u64 = VA + 0x100;
const STUB_SIZE: u64 = 8;

/// Code and data of the stubs, and the first task state.
pub(super) const STUB_CS: u16 = 0x08;
pub(super) const STUB_SS: u16 = 0x10;
const TASK_STATES: u16 = 0x40;

const STUBS: u64 = 0;
const IDT: u64 = 1;
const GDT: u64 = 2;
const VCPUS: u64 = 3;

/// Copies of top-level tables.
pub(super) const COPIES: u64 = MOST_COPIES as u64;
/// The same.
pub(super) const MOST_COPIES: usize = 24;
/// vCPUs, at most.
pub(in crate::kvm) const MAX_VCPUS: u32 = 8;
/// Addresses in a list.
pub(super) const LIST: usize = PAGE_BYTES / 8;
/// Bytes of a page.
pub(super) const PAGE_BYTES: usize = 4096;

const FIRST_COPY: u64 = VCPUS + 2 * MAX_VCPUS as u64;
const SHOWN: u64 = FIRST_COPY + COPIES;
const POINTERS: u64 = SHOWN;
const DIRECTORY: u64 = SHOWN + 1;
const LEAVES: u64 = SHOWN + 2;
const OWN_ROOT: u64 = SHOWN + 3;
const RAM_POINTERS: u64 = SHOWN + 4;
const RAM_DIRECTORIES: u64 = SHOWN + 5;

const ENTRIES: u64 = 512;
/// Memory below this can be shown.
pub(super) const MAX_RAM: u64 = ENTRIES << 30;
const PAGES: u64 = RAM_DIRECTORIES + ENTRIES;

/// Page-table entry bits (Intel SDM 3A table 5-20). Without XD: it is reserved where the guest has not turned it on.
pub(super) const PRESENT: u64 = 1;
pub(super) const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
pub(super) const ACCESSED: u64 = 1 << 5;
pub(super) const DIRTY: u64 = 1 << 6;
pub(super) const LARGE: u64 = 1 << 7;
const TABLE: u64 = PRESENT | WRITABLE | USER | ACCESSED;

/// See the module.
#[derive(Debug)]
pub(super) struct Pages {
    region: Arc<GuestRegion>,
    gpa: u64,
}

impl Pages {
    /// Makes the pages at the end of guest-physical memory of that width.
    pub(super) fn new(gpa_bits: u8) -> Result<Self> {
        let end = 1_u64 << gpa_bits.clamp(36, 52);
        // Behind it there is room for what comes and goes, see `finish::shadows`.
        let gpa = end - (PAGES + 1).next_multiple_of(ENTRIES) * PAGE_SIZE;
        let failed = |source| Error::Backend { backend: NAME, source };
        let ram = GuestRam::builder()
            .region(RegionConfig::new(GuestAddress(gpa), PAGES * PAGE_SIZE))
            .build()
            .map_err(|error| failed(Box::new(error)))?;
        let region = ram.regions().into_iter().next();
        let region = region.ok_or_else(|| failed("memory without a region".into()))?;
        let this = Self { region, gpa };
        this.write()?;
        Ok(this)
    }

    pub(super) fn region(&self) -> &Arc<GuestRegion> {
        &self.region
    }

    fn page(&self, number: u64) -> u64 {
        self.gpa + number * PAGE_SIZE
    }

    fn put(&self, page: u64, offset: u64, bytes: &[u8]) -> Result<()> {
        let place = MemoryRegionAddress(page * PAGE_SIZE + offset);
        self.region
            .write_slice(bytes, place)
            .map_err(|source| Error::Backend { backend: NAME, source: Box::new(source) })
    }

    fn put_entry(&self, page: u64, index: u64, value: u64) -> Result<()> {
        let place = MemoryRegionAddress(page * PAGE_SIZE + index * 8);
        self.region
            .store(value, place, Ordering::SeqCst)
            .map_err(|source| Error::Backend { backend: NAME, source: Box::new(source) })
    }

    fn write(&self) -> Result<()> {
        self.put(STUBS, 0, &stubs())?;
        self.put(IDT, 0, &interrupt_table())?;
        self.put_entry(GDT, u64::from(STUB_CS / 8), 0x00af_9b00_0000_ffff)?;
        self.put_entry(GDT, u64::from(STUB_SS / 8), 0x00cf_9300_0000_ffff)?;
        for vcpu in 0..MAX_VCPUS {
            let base = self.task_state(vcpu);
            let low = 0x67 | (base & 0xff_ffff) << 16 | 0x8b << 40 | (base >> 24 & 0xff) << 56;
            self.put_entry(GDT, u64::from(self.task(vcpu) / 8), low)?;
            self.put_entry(GDT, u64::from(self.task(vcpu) / 8) + 1, base >> 32)?;
            self.put(Self::vcpu_page(vcpu), 0, &task_state(vcpu))?;
        }
        self.put_entry(POINTERS, 0, self.page(DIRECTORY) | TABLE)?;
        self.put_entry(DIRECTORY, 0, self.page(LEAVES) | TABLE)?;
        for page in 0..SHOWN {
            let rights = match page {
                STUBS => PRESENT | USER | ACCESSED,
                IDT => PRESENT | ACCESSED,
                _ => PRESENT | WRITABLE | ACCESSED | DIRTY,
            };
            self.put_entry(LEAVES, page, self.page(page) | rights)?;
        }
        self.put_entry(OWN_ROOT, 0, self.page(RAM_POINTERS) | TABLE)?;
        for root in (0..COPIES).map(|copy| FIRST_COPY + copy).chain([OWN_ROOT]) {
            self.put_entry(root, SLOT, self.page(POINTERS) | TABLE)?;
        }
        Ok(())
    }

    /// Shows guest memory from `start` to `end` in the engine's own root, at its guest-physical address; whether all of it
    /// finds room.
    pub(super) fn show_memory(&self, start: u64, end: u64) -> Result<bool> {
        const GIB: u64 = 1 << 30;
        const LARGE_PAGE: u64 = 2 << 20;
        for number in start / GIB..end.min(MAX_RAM).div_ceil(GIB) {
            for index in 0..ENTRIES {
                let gpa = number * GIB + index * LARGE_PAGE;
                let rights = PRESENT | WRITABLE | ACCESSED | DIRTY | LARGE;
                self.put_entry(RAM_DIRECTORIES + number, index, gpa | rights)?;
            }
            self.put_entry(RAM_POINTERS, number, self.page(RAM_DIRECTORIES + number) | TABLE)?;
        }
        Ok(end <= MAX_RAM)
    }

    /// The root that shows the engine's pages, and guest memory.
    pub(super) fn own_root(&self) -> u64 {
        self.page(OWN_ROOT)
    }

    /// Guest-physical address of a copy.
    pub(super) fn copy(&self, number: u64) -> u64 {
        self.page(FIRST_COPY + number % COPIES)
    }

    /// Stores an entry of a copy.
    pub(super) fn set_copy_entry(&self, number: u64, index: u64, value: u64) -> Result<()> {
        self.put_entry(FIRST_COPY + number % COPIES, index % 256, value)
    }

    /// Where the stubs see an entry of a copy.
    pub(super) fn copy_entry_va(number: u64, index: u64) -> u64 {
        VA + (FIRST_COPY + number % COPIES) * PAGE_SIZE + index * 8
    }

    pub(super) fn idt(&self) -> (u64, u16) {
        (VA + IDT * PAGE_SIZE, EXCEPTIONS * 16 - 1)
    }

    pub(super) fn gdt(&self) -> (u64, u16) {
        (VA + GDT * PAGE_SIZE, 0xfff)
    }

    /// Selector of a task state.
    pub(super) fn task(&self, vcpu: u32) -> u16 {
        TASK_STATES + 16 * u16::try_from(vcpu % MAX_VCPUS).unwrap_or(0)
    }

    fn vcpu_page(vcpu: u32) -> u64 {
        VCPUS + 2 * u64::from(vcpu % MAX_VCPUS)
    }

    pub(super) fn task_state(&self, vcpu: u32) -> u64 {
        VA + Self::vcpu_page(vcpu) * PAGE_SIZE
    }

    /// Puts a list where the stub for [`VA_SHOW`] finds it; its address.
    pub(super) fn set_list(&self, vcpu: u32, list: &[u64]) -> Result<u64> {
        let page = Self::vcpu_page(vcpu) + 1;
        let bytes: Vec<u8> = list.iter().take(LIST).flat_map(|va| va.to_le_bytes()).collect();
        self.put(page, 0, &bytes)?;
        Ok(VA + page * PAGE_SIZE)
    }

    /// The frame that the processor pushed for an exception: error code, RIP, CS, RFLAGS, RSP, SS.
    pub(super) fn frame(&self, vcpu: u32, vector: u16) -> Result<[u64; 6]> {
        let place = Self::vcpu_page(vcpu) * PAGE_SIZE + stack_end(vector) - 48;
        let mut bytes = [0; 48];
        self.region
            .read_slice(&mut bytes, MemoryRegionAddress(place))
            .map_err(|source| Error::Backend { backend: NAME, source: Box::new(source) })?;
        let mut frame = [0; 6];
        for (value, bytes) in frame.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *value = u64::from_le_bytes(*bytes);
        }
        Ok(frame)
    }
}

/// End of the stack of an exception in the page of the task state: debug exceptions have their own, since they may come up at
/// the first instruction of another exception's stub.
fn stack_end(vector: u16) -> u64 {
    if vector == 1 { PAGE_SIZE } else { PAGE_SIZE / 2 }
}

/// A 64-bit task state (Intel SDM 3A 9.7) with two interrupt stacks and no I/O permissions.
fn task_state(vcpu: u32) -> [u8; 0x68] {
    let mut bytes = [0; 0x68];
    let page = VA + Pages::vcpu_page(vcpu) * PAGE_SIZE;
    for (offset, end) in [(4, stack_end(0)), (0x24, stack_end(0)), (0x2c, stack_end(1))] {
        if let Some(field) = bytes.get_mut(offset..offset + 8) {
            field.copy_from_slice(&(page + end).to_le_bytes());
        }
    }
    [bytes[0x66], bytes[0x67]] = 0x68_u16.to_le_bytes();
    bytes
}

/// The stubs. What follows an OUT is not reached: all registers are set before the vCPU runs again.
fn stubs() -> Vec<u8> {
    const OUT: u8 = 0xe6;
    let mut page = vec![0xcc; PAGE_BYTES];
    let mut put = |va: u64, code: &[u8]| {
        let start = usize::try_from(va - VA).unwrap_or(usize::MAX);
        if let Some(place) = page.get_mut(start..start.saturating_add(code.len())) {
            place.copy_from_slice(code);
        }
    };
    let [syscall, done, exception] =
        [PORT_SYSCALL, PORT_DONE, PORT_EXCEPTION].map(|port| port.to_le_bytes()[0]);
    put(VA_SYSCALL, &[OUT, syscall]);
    // again: LODSQ; LOCK OR QWORD PTR [RAX], 0; LOOP again
    put(VA_SHOW, &[0x48, 0xad, 0xf0, 0x48, 0x83, 0x08, 0, 0xe2, 0xf7]);
    // MOV CR3, RBP
    put(VA_LOAD_ROOT, &[0x0f, 0x22, 0xdd, OUT, done]);
    for vector in 0..32 {
        put(VA_EXCEPTIONS + u64::from(vector) * STUB_SIZE, &[OUT, exception + vector]);
    }
    page
}

/// Interrupt gates to the stubs. Programs may use INT3 themselves.
fn interrupt_table() -> Vec<u8> {
    let mut table = Vec::new();
    for vector in 0..u64::from(EXCEPTIONS) {
        let target = VA_EXCEPTIONS + vector * STUB_SIZE;
        let dpl: u64 = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let stack: u64 = if vector == 1 { 2 } else { 1 };
        let low = target & 0xffff
            | u64::from(STUB_CS) << 16
            | stack << 32
            | (0x8e | dpl << 5) << 40
            | (target >> 16 & 0xffff) << 48;
        table.extend(low.to_le_bytes());
        table.extend((target >> 32).to_le_bytes());
    }
    table
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    use super::*;

    #[test]
    fn stubs_leave_by_their_port() {
        let page = stubs();
        let exceptions =
            (0..EXCEPTIONS).map(|n| (VA_EXCEPTIONS + u64::from(n) * STUB_SIZE, PORT_EXCEPTION + n));
        for (va, port) in [(VA_SYSCALL, PORT_SYSCALL), (VA_SHOW, PORT_DONE), (VA_LOAD_ROOT, PORT_DONE)]
            .into_iter()
            .chain(exceptions)
        {
            let code = &page[usize::try_from(va - VA).unwrap()..];
            let mut decoder = Decoder::with_ip(64, code, va, DecoderOptions::NONE);
            let out = decoder.iter().find(|i| i.mnemonic() == Mnemonic::Out).unwrap();
            assert_eq!(u16::from(out.immediate8()), port, "{va:#x}");
            assert!(out.ip() - va < 16);
        }
        let show = &page[usize::try_from(VA_SHOW - VA).unwrap()..];
        let code: Vec<_> = Decoder::with_ip(64, show, VA_SHOW, DecoderOptions::NONE).iter().take(4).collect();
        assert!(
            code[0].mnemonic() == Mnemonic::Lodsq && code[1].has_lock_prefix() && code[1].immediate(1) == 0
        );
        assert_eq!((code[2].mnemonic(), code[2].near_branch_target()), (Mnemonic::Loop, VA_SHOW));
        assert_eq!(code[3].ip(), VA_LOAD_ROOT);
    }

    #[test]
    fn copies_show_the_engines_pages_and_not_its_tables() {
        let pages = Pages::new(46).unwrap();
        let entry = |page: u64, index: u64| -> u64 {
            pages.region.load(MemoryRegionAddress(page * PAGE_SIZE + index * 8), Ordering::SeqCst).unwrap()
        };
        for copy in 0..COPIES {
            assert_eq!(entry(FIRST_COPY + copy, SLOT), pages.page(POINTERS) | TABLE);
        }
        assert_eq!(entry(LEAVES, SHOWN), 0);
        assert!((1..SHOWN).all(|page| entry(LEAVES, page) & USER == 0));
        assert_eq!(entry(LEAVES, 0) & (USER | WRITABLE), USER);
        assert!(pages.show_memory(0, 3 << 30).unwrap() && !pages.show_memory(0, MAX_RAM + 1).unwrap());
        assert_eq!(entry(RAM_DIRECTORIES + 2, 1) & !0xfff, (2 << 30) + (2 << 20));
    }
}

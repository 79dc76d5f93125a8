//! What the engine keeps in guest-physical memory: stubs, descriptor tables, stacks, and page tables.
//!
//! Programs run on copies of their top-level tables, which have their own half of the address space and, in [`SLOT`], these
//! pages, whose contents are in `code`. A stub leaves by a store to a door, an address without memory, which tells what it is.
//!
//! | page | what | the guest may | programs may, in [`SLOT`] |
//! |---|---|---|---|
//! | 0 | stubs | read | read, execute |
//! | 1, 2, 3 | interrupt and global descriptor table, task states | read | |
//! | then one a vCPU | list of entries to show | read | |
//! | then | page tables | read | |
//! | then one a vCPU | stacks | write | |
//! | then | copies of top-level tables | write | |
//! | the last but one | door of SYSCALL's stub | | write |
//! | the last | door of the other stubs | | |
//!
//! Threat model: a guest's kernel can lead its programs to all of this by tables of its own, at its guest-physical address. So
//! what the engine's own operations need cannot be written from the guest: they come to an end, whatever the guest does.
//! What can be written there ends the stay of a program in another way than it should, or the guest; of what is read back, the
//! stacks, nothing is believed.

mod code;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, MemoryRegionAddress};
use vmm_memory::{GuestRam, GuestRegion, PAGE_SIZE, RegionConfig};

use self::code::{DOOR_DONE, exception_stub, stack_end, stack_ends, stubs};
pub(super) use self::code::{VA_PROGRAMS_DOOR, VA_SHOW, VA_SYSCALL, VA_SYSCALL_END, exception_at};
use crate::error::{Error, Result};
use crate::kvm::NAME;
use crate::own_tables::{interrupt_table, task_state, task_state_descriptor};

/// Entry of the top-level tables that leads here: one that Linux leaves to hypervisors.
pub(super) const SLOT: u64 = 258;

/// Where it leads.
const VA: u64 = 0xffff_8100_0000_0000;

/// Exceptions.
pub(super) const EXCEPTIONS: u16 = 32;

/// Code and data of the stubs, and the first task state.
pub(super) const STUB_CS: u16 = 0x08;
pub(super) const STUB_SS: u16 = 0x10;
const TASK_STATES: u16 = 0x40;

/// vCPUs, at most.
pub(in crate::kvm) const MAX_VCPUS: u32 = 8;
/// Copies of top-level tables.
pub(super) const MOST_COPIES: usize = 24;
/// The same.
const COPIES: u64 = MOST_COPIES as u64;
/// Addresses in a list.
pub(super) const LIST: usize = PAGE_BYTES / 8;
/// Bytes of a page.
pub(super) const PAGE_BYTES: usize = 4096;

const ENTRIES: u64 = 512;
const VCPUS: u64 = MAX_VCPUS as u64;

const STUBS: u64 = 0;
const IDT: u64 = 1;
const GDT: u64 = 2;
const TASKS: u64 = 3;
const LISTS: u64 = 4;
const POINTERS: u64 = LISTS + VCPUS;
const DIRECTORY: u64 = POINTERS + 1;
const LEAVES: u64 = POINTERS + 2;
const OWN_ROOT: u64 = POINTERS + 3;
const RAM_POINTERS: u64 = POINTERS + 4;
const RAM_DIRECTORIES: u64 = POINTERS + 5;
/// Pages from here on can be written from the guest.
const STACKS: u64 = RAM_DIRECTORIES + ENTRIES;
const FIRST_COPY: u64 = STACKS + VCPUS;
/// There is no memory from here on; first there is room for what comes and goes, see `finish::shadows`.
const MEMORY: u64 = FIRST_COPY + COPIES;
const ALL: u64 = (MEMORY + 3).next_multiple_of(ENTRIES);
const PROGRAMS_DOOR: u64 = ALL - 2;
const STUBS_DOOR: u64 = ALL - 1;

/// In [`SLOT`]: where the first page is that can be written, and the doors.
const SHOWN_STACKS: u64 = 32;
const SHOWN_DOORS: u64 = SHOWN_STACKS + VCPUS + COPIES;

/// Memory below this can be shown.
pub(super) const MAX_RAM: u64 = ENTRIES << 30;

/// Page-table entry bits (Intel SDM 3A table 5-20). Without XD: it is reserved where the guest has not turned it on.
pub(super) const PRESENT: u64 = 1;
pub(super) const WRITABLE: u64 = 1 << 1;
pub(super) const USER: u64 = 1 << 2;
pub(super) const ACCESSED: u64 = 1 << 5;
pub(super) const DIRTY: u64 = 1 << 6;
pub(super) const LARGE: u64 = 1 << 7;
const TABLE: u64 = PRESENT | WRITABLE | USER | ACCESSED;

/// What a store to a door, or a load, says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Door {
    /// SYSCALL's stub, or a program that goes there by itself.
    SystemCall,
    /// The stub of an exception.
    Exception(u16),
    /// An operation of the engine's is done.
    Done,
    /// Nobody that belongs here.
    Stray,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Pages {
    /// What the guest cannot write, and what it can.
    fixed: Arc<GuestRegion>,
    written: Arc<GuestRegion>,
    gpa: u64,
}

impl Pages {
    /// Makes the pages at the end of guest-physical memory of that width.
    pub(super) fn new(gpa_bits: u8) -> Result<Self> {
        let gpa = (1_u64 << gpa_bits.clamp(36, 52)) - ALL * PAGE_SIZE;
        let failed = |source| Error::Backend { backend: NAME, source };
        let config = |from: u64, to: u64| {
            RegionConfig::new(GuestAddress(gpa + from * PAGE_SIZE), (to - from) * PAGE_SIZE)
        };
        let ram = GuestRam::builder()
            .region(config(STUBS, STACKS))
            .region(config(STACKS, MEMORY))
            .build()
            .map_err(|error| failed(Box::new(error)))?;
        let Ok([fixed, written]) = <[_; 2]>::try_from(ram.regions()) else {
            return Err(failed("memory without its regions".into()));
        };
        let this = Self { fixed, written, gpa };
        this.write()?;
        Ok(this)
    }

    /// What the guest may read, and what it may write.
    pub(super) fn regions(&self) -> [&Arc<GuestRegion>; 2] {
        [&self.fixed, &self.written]
    }

    /// The door at a guest-physical address.
    pub(super) fn door(&self, gpa: u64) -> Option<Door> {
        let offset = gpa.checked_sub(self.page(PROGRAMS_DOOR))?;
        Some(match offset.checked_sub(PAGE_SIZE) {
            None if offset == 0 => Door::SystemCall,
            Some(DOOR_DONE) => Door::Done,
            Some(exception) if exception.is_multiple_of(8) && exception / 8 < EXCEPTIONS.into() => {
                Door::Exception(u16::try_from(exception / 8).unwrap_or(0))
            }
            Some(beyond) if beyond >= PAGE_SIZE => return None,
            _ => Door::Stray,
        })
    }

    fn page(&self, number: u64) -> u64 {
        self.gpa + number * PAGE_SIZE
    }

    /// The region of a page, and where it is in there.
    fn place(&self, page: u64, offset: u64) -> (&GuestRegion, MemoryRegionAddress) {
        let (region, page) = if page < STACKS { (&self.fixed, page) } else { (&self.written, page - STACKS) };
        (region, MemoryRegionAddress(page * PAGE_SIZE + offset))
    }

    fn put(&self, page: u64, offset: u64, bytes: &[u8]) -> Result<()> {
        let (region, place) = self.place(page, offset);
        region
            .write_slice(bytes, place)
            .map_err(|source| Error::Backend { backend: NAME, source: Box::new(source) })
    }

    fn put_entry(&self, page: u64, index: u64, value: u64) -> Result<()> {
        let (region, place) = self.place(page, index * 8);
        region
            .store(value, place, Ordering::SeqCst)
            .map_err(|source| Error::Backend { backend: NAME, source: Box::new(source) })
    }

    fn write(&self) -> Result<()> {
        self.put(STUBS, 0, &stubs())?;
        self.put(IDT, 0, &interrupt_table(STUB_CS, (0..EXCEPTIONS).map(exception_stub)))?;
        self.put_entry(GDT, u64::from(STUB_CS / 8), 0x00af_9b00_0000_ffff)?;
        self.put_entry(GDT, u64::from(STUB_SS / 8), 0x00cf_9300_0000_ffff)?;
        for vcpu in 0..MAX_VCPUS {
            let base = self.task_state(vcpu);
            let [low, high] = task_state_descriptor(base);
            self.put_entry(GDT, u64::from(self.task(vcpu) / 8), low)?;
            self.put_entry(GDT, u64::from(self.task(vcpu) / 8) + 1, high)?;
            self.put(TASKS, base % PAGE_SIZE, &task_state(stack_ends(vcpu)))?;
        }
        self.put_entry(POINTERS, 0, self.page(DIRECTORY) | TABLE)?;
        self.put_entry(DIRECTORY, 0, self.page(LEAVES) | TABLE)?;
        // Bits that processors set are set: they cannot be.
        let (read, written) = (PRESENT | ACCESSED, PRESENT | WRITABLE | ACCESSED | DIRTY);
        for page in (STUBS..POINTERS).chain(STACKS..MEMORY).chain([PROGRAMS_DOOR, STUBS_DOOR]) {
            let rights = match page {
                STUBS => read | USER,
                PROGRAMS_DOOR => written | USER,
                page if page < STACKS => read,
                _ => written,
            };
            self.put_entry(LEAVES, shown(page), self.page(page) | rights)?;
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
        va(FIRST_COPY + number % COPIES) + index * 8
    }

    pub(super) fn idt(&self) -> (u64, u16) {
        (va(IDT), EXCEPTIONS * 16 - 1)
    }

    pub(super) fn gdt(&self) -> (u64, u16) {
        (va(GDT), 0xfff)
    }

    /// Selector of a task state.
    pub(super) fn task(&self, vcpu: u32) -> u16 {
        TASK_STATES + 16 * u16::try_from(vcpu % MAX_VCPUS).unwrap_or(0)
    }

    pub(super) fn task_state(&self, vcpu: u32) -> u64 {
        va(TASKS) + TASK_STATE_ROOM * u64::from(vcpu % MAX_VCPUS)
    }

    /// Puts a list where the stub for [`VA_SHOW`] finds it; its address.
    pub(super) fn set_list(&self, vcpu: u32, list: &[u64]) -> Result<u64> {
        let page = LISTS + u64::from(vcpu % MAX_VCPUS);
        let bytes: Vec<u8> = list.iter().take(LIST).flat_map(|va| va.to_le_bytes()).collect();
        self.put(page, 0, &bytes)?;
        Ok(va(page))
    }

    /// The frame that the processor pushed for an exception: error code, RIP, CS, RFLAGS, RSP, SS.
    pub(super) fn frame(&self, vcpu: u32, vector: u16) -> Result<[u64; 6]> {
        let (region, place) = self.place(stack(vcpu), stack_end(vector) - 48);
        let mut bytes = [0; 48];
        region
            .read_slice(&mut bytes, place)
            .map_err(|source| Error::Backend { backend: NAME, source: Box::new(source) })?;
        let mut frame = [0; 6];
        for (value, bytes) in frame.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *value = u64::from_le_bytes(*bytes);
        }
        Ok(frame)
    }
}

/// Where a page is in [`SLOT`], by number.
fn shown(page: u64) -> u64 {
    match page {
        PROGRAMS_DOOR => SHOWN_DOORS,
        STUBS_DOOR => SHOWN_DOORS + 1,
        page if page < STACKS => page,
        page => SHOWN_STACKS + page - STACKS,
    }
}

/// Where a page is in [`SLOT`].
fn va(page: u64) -> u64 {
    VA + shown(page) * PAGE_SIZE
}

/// The page with the stacks of a vCPU.
fn stack(vcpu: u32) -> u64 {
    STACKS + u64::from(vcpu % MAX_VCPUS)
}

/// Bytes from one task state to the next.
const TASK_STATE_ROOM: u64 = 0x80;

#[cfg(test)]
mod tests {
    use vmm_memory::vm_memory::GuestMemoryRegion as _;

    use super::*;

    #[test]
    fn other_addresses_are_no_doors_that_a_stub_has() {
        let pages = Pages::new(46).unwrap();
        let door = pages.page(STUBS_DOOR);
        for stray in [door + 1, door + 8 * u64::from(EXCEPTIONS), door + 0xfff, door - 1] {
            assert_eq!(pages.door(stray), Some(Door::Stray), "{stray:#x}");
        }
        assert_eq!(pages.door(door + PAGE_SIZE), None);
        assert_eq!(pages.door(pages.page(PROGRAMS_DOOR) - 1), None);
    }

    #[test]
    fn what_operations_need_cannot_be_written_from_the_guest() {
        let pages = Pages::new(46).unwrap();
        let [fixed, written] = pages.regions();
        let is_fixed = |gpa: u64| fixed.contains(gpa & !(PAGE_SIZE - 1)) && !written.contains(gpa);
        for page in [STUBS, IDT, GDT, TASKS, LISTS, POINTERS, DIRECTORY, LEAVES, OWN_ROOT, RAM_POINTERS] {
            assert!(is_fixed(pages.page(page)), "{page}");
        }
        assert!(is_fixed(pages.own_root()) && is_fixed(pages.page(RAM_DIRECTORIES + ENTRIES - 1)));
        for copy in 0..COPIES {
            assert_eq!(entry(&pages, FIRST_COPY + copy, SLOT), pages.page(POINTERS) | TABLE);
        }
        // In the slot: tables are not there, and programs see nothing but stubs and one door.
        for index in 0..ENTRIES {
            let entry = entry(&pages, LEAVES, index);
            let page = (entry & !(PAGE_SIZE - 1)).checked_sub(pages.gpa).map(|offset| offset / PAGE_SIZE);
            let Some(page) = page.filter(|_| entry & PRESENT != 0) else { continue };
            assert_eq!(shown(page), index);
            assert!(!(POINTERS..STACKS).contains(&page));
            assert_eq!(entry & USER != 0, matches!(page, STUBS | PROGRAMS_DOOR));
            assert_eq!(entry & WRITABLE != 0, page >= STACKS);
        }
        assert!(pages.show_memory(0, 3 << 30).unwrap() && !pages.show_memory(0, MAX_RAM + 1).unwrap());
        let directory = entry(&pages, RAM_DIRECTORIES + 2, 1);
        assert_eq!((directory & !0xfff, directory & USER), ((2 << 30) + (2 << 20), 0));
    }

    pub(super) fn entry(pages: &Pages, page: u64, index: u64) -> u64 {
        let (region, place) = pages.place(page, index * 8);
        region.load(place, Ordering::SeqCst).unwrap()
    }

    pub(super) trait Contains {
        fn contains(&self, gpa: u64) -> bool;
    }

    impl Contains for Arc<GuestRegion> {
        fn contains(&self, gpa: u64) -> bool {
            gpa.checked_sub(self.start_addr().0).is_some_and(|offset| offset < self.len())
        }
    }
}

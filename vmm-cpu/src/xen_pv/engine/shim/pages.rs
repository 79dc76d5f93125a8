//! The pages of the shim, in guest-physical memory and in the two kinds of root.
//!
//! | at | kernel root | user root |
//! |---|---|---|
//! | 0 | code | gates, and what programs run on the way in and out |
//! | 0x1000 | code | nothing |
//! | 0x2000 | data, writable | data, for ring 0 |
//! | 0x3000 | exception stacks, writable | exception stacks, for ring 0 |
//! | 0x4000 | doorbell: no memory, so that a store leaves the guest | nothing |
//! | 0x5000 | descriptor table of interrupts, for ring 0 | another one, for ring 0 |
//!
//! The engine's own root has stacks, and at 0x5000 a table with nothing of the shim.

use vmm_memory::vm_memory::{Bytes as _, GuestAddress};
use vmm_memory::{GuestMemoryMap, PAGE_SIZE};
use zerocopy::IntoBytes as _;

use super::code::{self, Labels};
use super::data::Data;
use super::{SHIM_VA, WINDOW_VA};
use crate::error::{Error, Result};
use crate::own_tables::interrupt_table;
use crate::state::rflags;
use crate::xen_pv::engine::descriptors::{FLAT_CS64, FLAT_SS, STUB_CS};
use crate::xen_pv::engine::layout::Layout;
use crate::xen_pv::engine::private::{
    ACCESSED, DIRECTORY, DIRTY, EXCEPTIONS, NO_EXECUTE, PRESENT, TABLE, TABLE_ENTRIES, USER, WRITABLE,
    write_large,
};

/// Guest-virtual distance of the parts of two virtual processors.
const STRIDE: u64 = 0x1_0000;

const DATA: u64 = 0x2000;
const STACKS: u64 = 0x3000;
const DOORBELL: u64 = 0x4000;
const INTERRUPTS: u64 = 0x5000;

/// Pages of a virtual processor in guest-physical memory: three of code, data, stacks, two descriptor tables.
const PAGES: u64 = 7;

/// INT3.
const BREAKPOINT: u8 = 0xcc;

/// Vectors that the shim is entered by.
const DIVIDE_ERROR: u8 = 0;
const GENERAL_PROTECTION: u8 = 13;
const PAGE_FAULT: u8 = 14;

/// Where the shim's parts lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShimPages {
    layout: Layout,
    start: u64,
    vcpus: u64,
    pub(super) labels: Labels,
}

impl ShimPages {
    /// Parts for so many virtual processors from guest-physical address `start` on.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where this crate has no shim for the processor that it is compiled for.
    pub(crate) fn new(layout: Layout, start: u64, vcpus: u32) -> Result<Self> {
        let Some((_, labels)) = code::image() else {
            return Err(Error::unsupported("an in-guest fast path", "it is for x86-64"));
        };
        Ok(Self { layout, start, vcpus: vcpus.into(), labels })
    }

    fn leaf_tables(&self) -> u64 {
        (self.vcpus * STRIDE / PAGE_SIZE).div_ceil(TABLE_ENTRIES)
    }

    /// Memory that the window shows.
    fn window_size(&self) -> u64 {
        self.layout.private().0
    }

    fn window_directories(&self) -> u64 {
        self.window_size().div_ceil(DIRECTORY)
    }

    /// Bytes of guest-physical memory.
    pub(crate) fn size(&self) -> u64 {
        let tables = 3 * (2 + self.leaf_tables()) + 1 + self.window_directories();
        (self.vcpus * PAGES + tables) * PAGE_SIZE
    }

    /// The guest-physical page that is no memory.
    pub(crate) fn doorbell(&self) -> GuestAddress {
        GuestAddress((self.start + self.size()).next_multiple_of(2 << 20))
    }

    fn page(&self, vcpu: u32, number: u64) -> u64 {
        self.start + (u64::from(vcpu) * PAGES + number) * PAGE_SIZE
    }

    fn table(&self, number: u64) -> u64 {
        self.start + (self.vcpus * PAGES + number) * PAGE_SIZE
    }

    /// Where SYSCALL goes.
    pub(crate) fn entry(vcpu: u32) -> u64 {
        SHIM_VA + u64::from(vcpu) * STRIDE
    }

    pub(crate) fn data(&self, vcpu: u32) -> GuestAddress {
        GuestAddress(self.page(vcpu, 3))
    }

    /// Guest-virtual end of the stack that a vector's frame is pushed to.
    pub(crate) fn stack_end(vcpu: u32, vector: u8) -> u64 {
        Self::entry(vcpu) + STACKS + stack_offset(vector)
    }

    /// Guest-physical address of the same.
    pub(crate) fn stack_end_gpa(&self, vcpu: u32, vector: u8) -> GuestAddress {
        GuestAddress(self.page(vcpu, 4) + stack_offset(vector))
    }

    pub(crate) fn idt(vcpu: u32) -> u64 {
        Self::entry(vcpu) + INTERRUPTS
    }

    /// What goes into the shim's slot of kernel roots.
    pub(crate) fn kernel_entry(&self) -> u64 {
        self.table(0) | TABLE
    }

    /// What goes into the shim's slot of user roots.
    pub(crate) fn user_entry(&self) -> u64 {
        self.table(2 + self.leaf_tables()) | TABLE
    }

    /// What goes into the shim's slot of the engine's own root, where every exception leaves the guest.
    pub(crate) fn own_entry(&self) -> u64 {
        self.table(2 * (2 + self.leaf_tables())) | TABLE
    }

    /// What goes into the window's slot of kernel roots.
    pub(crate) fn window_entry(&self) -> u64 {
        self.table(3 * (2 + self.leaf_tables())) | TABLE | NO_EXECUTE
    }

    /// The data that a virtual processor begins with.
    pub(crate) fn initial_data(&self, vcpu: u32) -> Data {
        let entry = Self::entry(vcpu);
        let frame = |label: u32| {
            let flags = rflags::FIXED | rflags::IF;
            [entry + u64::from(label), FLAT_CS64.into(), flags, entry + DATA + PAGE_SIZE, FLAT_SS.into()]
        };
        Data {
            window: WINDOW_VA,
            marks: WINDOW_VA + self.layout.marks().0,
            m2p: WINDOW_VA + self.layout.m2p().0,
            frames: self.layout.frames(),
            map_frames: self.layout.abi_frames().end,
            alone: u64::from(self.vcpus == 1),
            frame_trap: frame(self.labels.trap),
            frame_fault: frame(self.labels.fault),
            frame_protection: frame(self.labels.protection),
            vcpus: self.vcpus,
            base: entry,
            frame_hypercall: frame(self.labels.hypercall_ring3),
            ..Data::default()
        }
    }

    /// Guest-virtual address of guest-physical memory in the window.
    pub(crate) fn window(gpa: u64) -> u64 {
        WINDOW_VA + gpa
    }

    /// Writes all of it; `stubs` says where the stub of an exception is that the shim does not take, `plain` is a page with
    /// a descriptor table that has those alone.
    pub(crate) fn write(
        &self,
        memory: &GuestMemoryMap,
        stubs: impl Fn(u8) -> u64,
        plain: GuestAddress,
    ) -> Result<()> {
        let put = |gpa: u64, bytes: &[u8]| {
            memory.write_slice(bytes, GuestAddress(gpa)).map_err(|source| Error::Backend {
                backend: super::super::super::NAME,
                source: Box::new(source),
            })
        };
        let entry = |table: u64, index: u64, value: u64| put(table + index * 8, &value.to_le_bytes());
        let [kernel, user, own_root] = [0, 1, 2].map(|view| self.table(view * (2 + self.leaf_tables())));
        for root in [kernel, user, own_root] {
            entry(root, 0, (root + PAGE_SIZE) | TABLE)?;
            for table in 0..self.leaf_tables() {
                entry(root + PAGE_SIZE, table, (root + (2 + table) * PAGE_SIZE) | TABLE)?;
            }
        }
        for vcpu in 0..u32::try_from(self.vcpus).unwrap_or(u32::MAX) {
            let [first, second, gates] = self.code(vcpu);
            let own = |vector: u8, handlers: &[(u8, u32)]| {
                let handler = handlers.iter().find(|(handled, _)| *handled == vector);
                handler.map_or_else(|| stubs(vector), |(_, label)| Self::entry(vcpu) + u64::from(*label))
            };
            let of_kernel = |vector| {
                let (trap, protection) = (self.labels.kernel_trap, self.labels.kernel_protection);
                own(vector, &[(DIVIDE_ERROR, trap), (GENERAL_PROTECTION, protection)])
            };
            let of_user = |vector| {
                own(vector, &[(DIVIDE_ERROR, self.labels.user_trap), (PAGE_FAULT, self.labels.user_fault)])
            };
            put(self.page(vcpu, 0), &first)?;
            put(self.page(vcpu, 1), &second)?;
            put(self.page(vcpu, 2), &gates)?;
            put(self.page(vcpu, 3), self.initial_data(vcpu).as_bytes())?;
            put(self.page(vcpu, 5), &interrupt_table(STUB_CS, (0..EXCEPTIONS).map(of_kernel)))?;
            put(self.page(vcpu, 6), &interrupt_table(STUB_CS, (0..EXCEPTIONS).map(of_user)))?;
            const CODE: u64 = PRESENT | USER | ACCESSED;
            const TABLES: u64 = PRESENT | ACCESSED | NO_EXECUTE;
            const MEMORY: u64 = PRESENT | WRITABLE | ACCESSED | DIRTY | NO_EXECUTE;
            let mappings = [
                (kernel, 0, self.page(vcpu, 0) | CODE),
                (kernel, PAGE_SIZE, self.page(vcpu, 1) | CODE),
                (kernel, DATA, self.page(vcpu, 3) | MEMORY | USER),
                (kernel, STACKS, self.page(vcpu, 4) | MEMORY | USER),
                (kernel, DOORBELL, self.doorbell().0 | MEMORY | USER),
                (kernel, INTERRUPTS, self.page(vcpu, 5) | TABLES),
                (user, 0, self.page(vcpu, 2) | CODE),
                (user, DATA, self.page(vcpu, 3) | MEMORY),
                (user, STACKS, self.page(vcpu, 4) | MEMORY),
                (user, INTERRUPTS, self.page(vcpu, 6) | TABLES),
                (own_root, STACKS, self.page(vcpu, 4) | MEMORY),
                (own_root, INTERRUPTS, plain.0 | TABLES),
            ];
            for (root, at, value) in mappings {
                let page = (u64::from(vcpu) * STRIDE + at) / PAGE_SIZE;
                let table = root + (2 + page / TABLE_ENTRIES) * PAGE_SIZE;
                entry(table, page % TABLE_ENTRIES, value)?;
            }
        }
        let pointers = self.table(3 * (2 + self.leaf_tables()));
        let rights = WRITABLE | DIRTY | USER | NO_EXECUTE;
        write_large(&entry, pointers, 0, self.window_size(), rights)
    }

    /// The code of a virtual processor: two pages of kernel roots and one of user roots.
    fn code(&self, vcpu: u32) -> [Vec<u8>; 3] {
        let labels = &self.labels;
        let mut code = code::image().map_or(Vec::new(), |(image, _)| image.to_vec());
        // The instruction before the label compares the low half of the address that trapped.
        for (patch, trap) in [
            (labels.patch_leave_user, labels.leave_user),
            (labels.patch_leave_user_whole, labels.leave_user_whole),
            (labels.patch_load_root, labels.load_root),
            (labels.patch_flush_page, labels.flush_page),
        ] {
            let low = u32::try_from((Self::entry(vcpu) + u64::from(trap)) & 0xffff_ffff).unwrap_or(0);
            let at = usize::try_from(patch).unwrap_or(usize::MAX);
            if let Some(place) = code.get_mut(at.wrapping_sub(4)..at) {
                place.copy_from_slice(&low.to_le_bytes());
            }
        }
        let second = code.split_off(code.len() / 2);
        let mut gates = code.clone();
        for (to, from, end) in [
            (0, labels.user_syscall, labels.user_syscall_end),
            (labels.leave_user, labels.user_landing, labels.user_landing_end),
        ] {
            let [to, from, end] = [to, from, end].map(|label| usize::try_from(label).unwrap_or(usize::MAX));
            if from <= end && end <= gates.len() {
                gates.copy_within(from..end, to);
            }
        }
        // What traps to ring 0 on the kernel root is nothing for programs.
        let landed = labels.leave_user + (labels.user_landing_end - labels.user_landing);
        if let Some(rest) = gates.get_mut(usize::try_from(landed).unwrap_or(usize::MAX)..) {
            rest.fill(BREAKPOINT);
        }
        [code, second, gates]
    }
}

/// Debug exceptions have a stack of their own, as in [`Private::stack_end`](super::super::private::Private::stack_end).
fn stack_offset(vector: u8) -> u64 {
    if vector == 1 { PAGE_SIZE } else { PAGE_SIZE / 2 }
}

//! Where everything goes, and putting it there.
//!
//! | guest-physical, ascending | mapped |
//! |---|---|
//! | from 0: the kernel, where its segments say | at VIRT_BASE |
//! | initrd, for kernels that want it mapped | behind it |
//! | physical-to-machine table, for kernels without INIT_P2M | behind it |
//! | start information, xenstore page, console page | behind it |
//! | page tables: root first | behind it |
//! | boot stack, then up to 4 MiB that are free | behind it |
//! | initrd | not |
//! | physical-to-machine table and the page tables for it | at INIT_P2M |

use std::ops::Range;

use vmm_memory::boot::XenNotes;
use vmm_memory::vm_memory::{Bytes as _, GuestAddress};
use vmm_memory::{GuestMemoryMap, PAGE_SIZE};

use super::error::{BuildError, BuildItem};
use super::start_info::{SIF_MOD_START_PFN, SIF_VIRT_P2M_4TOOLS, StartInfo};
use super::tables::{Mapping, slot};
use super::{MAX_COMMAND_LINE, PvBoot, PvEntry};
use crate::xen_pv::engine::Layout;

/// Features that a kernel may insist on: those of Xen's PV ABI on x86 that are there.
const FEATURES: [&str; 3] = ["writable_page_tables", "pae_pgdir_above_4gb", "mmu_pt_update_preserve_ad"];

/// The end of what is mapped is a multiple of this, with at least [`PADDING`] behind the last element.
const REGION: u64 = 4 << 20;
const PADDING: u64 = 512 << 10;

/// First guest-virtual address that a kernel may use, behind Xen's range.
const KERNEL_START: u64 = 0xffff_8800_0000_0000;

/// Bytes of a hypercall's code in the hypercall page.
const HYPERCALL_STUB: u64 = 32;
const HYPERCALLS: u64 = 128;
const HYPERCALL_IRET: u32 = 23;

/// The event channels of the pages that a domain starts with; 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "each field is the port of its name")]
pub struct Rings {
    pub console_port: u32,
    pub store_port: u32,
}

/// Where the parts of a domain go.
#[derive(Debug)]
pub struct Plan<'a> {
    boot: &'a PvBoot<'a>,
    layout: Layout,
    virt_base: u64,
    paddr_offset: u64,
    entry: u64,
    hypercall_page: Option<u64>,
    initrd: Range<u64>,
    initrd_is_mapped: bool,
    p2m: Range<u64>,
    start_info: u64,
    store: u64,
    console: u64,
    tables: Range<u64>,
    stack: u64,
    region: Mapping,
    /// The mapping of `p2m` where the kernel chose one, with its tables behind the table.
    p2m_mapping: Option<Mapping>,
}

/// Gives out frames, ascending.
struct Frames {
    next: u64,
    limit: u64,
}

impl Frames {
    fn take(&mut self, item: BuildItem, count: u64) -> Result<Range<u64>, BuildError> {
        let start = self.next;
        match start.checked_add(count).filter(|end| *end <= self.limit) {
            Some(end) => {
                self.next = end;
                Ok(start..end)
            }
            None => Err(BuildError::NoRoom {
                item,
                end: start.saturating_add(count).saturating_mul(PAGE_SIZE),
                ram: self.limit * PAGE_SIZE,
            }),
        }
    }
}

fn field(field: &'static str, value: u64, allowed: impl Into<String>) -> BuildError {
    BuildError::Field { field, value, allowed: allowed.into() }
}

fn pages(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_SIZE)
}

impl<'a> Plan<'a> {
    pub(super) fn new(boot: &'a PvBoot<'a>, layout: Layout) -> Result<Self, BuildError> {
        let length = boot.command_line.len();
        if length > MAX_COMMAND_LINE {
            return Err(BuildError::CommandLine { length, max: MAX_COMMAND_LINE });
        }
        if boot.command_line.contains('\0') {
            return Err(BuildError::Nul);
        }
        let none = XenNotes::default();
        let notes = boot.kernel().xen_notes().unwrap_or(&none);
        check_features(notes)?;
        let virt_base = notes.virt_base().unwrap_or(0);
        let lowest = if virt_base < 1 << 47 { 0 } else { KERNEL_START };
        if !virt_base.is_multiple_of(REGION) || virt_base < lowest {
            let allowed = format!("a multiple of 4 MiB below 2^47, or from {KERNEL_START:#x} up");
            return Err(field("Xen note VIRT_BASE", virt_base, allowed));
        }
        let paddr_offset = notes.paddr_offset().unwrap_or(0);
        let ram = layout.ram();
        let mut kernel_end = 0;
        for segment in boot.kernel().segments() {
            // What the file cannot give is found before anything of the domain changes.
            boot.kernel().segment_bytes(segment)?;
            let end =
                segment.paddr.checked_sub(paddr_offset).and_then(|start| start.checked_add(segment.memsz));
            match end {
                Some(end) if end <= ram => kernel_end = kernel_end.max(end),
                Some(end) => {
                    return Err(BuildError::NoRoom { item: BuildItem::Segment(segment.index), end, ram });
                }
                None => {
                    let allowed =
                        format!("at least PADDR_OFFSET, {paddr_offset:#x}, and below 2^64 with p_memsz");
                    return Err(field("p_paddr", segment.paddr, allowed));
                }
            }
        }
        let in_kernel = |what, va: u64| match va.checked_sub(virt_base) {
            Some(offset) if offset < kernel_end => Ok(va),
            _ => Err(field(
                what,
                va,
                format!("{virt_base:#x} up to {:#x}", virt_base.saturating_add(kernel_end)),
            )),
        };
        let entry = in_kernel("Xen note ENTRY", notes.entry().unwrap_or(0))?;
        let hypercall_page = match notes.hypercall_page() {
            Some(page) if page % PAGE_SIZE != 0 => {
                return Err(field("Xen note HYPERCALL_PAGE", page, "a multiple of 4096"));
            }
            Some(page) => Some(in_kernel("Xen note HYPERCALL_PAGE", page)?),
            None => None,
        };

        let mut frames = Frames { next: pages(kernel_end), limit: layout.frames() };
        let initrd_pages = pages(boot.initrd.len() as u64);
        let initrd_is_mapped = notes.mod_start_pfn() != Some(true);
        let mut initrd = 0..0;
        if initrd_is_mapped {
            initrd = frames.take(BuildItem::Initrd, initrd_pages)?;
        }
        let p2m_pages = pages(layout.frames() * 8);
        let p2m_va = notes.init_p2m().filter(|va| fits_p2m(*va, virt_base, p2m_pages));
        let mut p2m = 0..0;
        if p2m_va.is_none() {
            p2m = frames.take(BuildItem::P2m, p2m_pages)?;
        }
        let start_info = frames.take(BuildItem::StartInfo, 1)?.start;
        let store = frames.take(BuildItem::Rings, 1)?.start;
        let console = frames.take(BuildItem::Rings, 1)?.start;

        // The page tables map themselves and what follows.
        let first = frames.next;
        let mut count = 0;
        let region = loop {
            let end = ((first + count + 1) * PAGE_SIZE + PADDING).next_multiple_of(REGION);
            if virt_base.checked_add(end).is_none_or(|end| end > u64::MAX - REGION) {
                return Err(field(
                    "Xen note VIRT_BASE",
                    virt_base,
                    "an address with room for the kernel above",
                ));
            }
            let region = Mapping { va: virt_base, frames: 0..end / PAGE_SIZE, first_table: first + 1 };
            let needed = 1 + region.table_count();
            if needed == count {
                break region;
            }
            count = needed;
        };
        if !region.is_in_one_slot() {
            return Err(field(
                "Xen note VIRT_BASE",
                virt_base,
                "an address with room for the kernel in its 512 GiB",
            ));
        }
        let tables = frames.take(BuildItem::PageTables, count)?;
        let stack = frames.take(BuildItem::Stack, 1)?.start;
        let rest = region.frames.end - frames.next;
        frames.take(BuildItem::Stack, rest)?;

        if !initrd_is_mapped {
            initrd = frames.take(BuildItem::Initrd, initrd_pages)?;
        }
        let mut p2m_mapping = None;
        if let Some(va) = p2m_va {
            p2m = frames.take(BuildItem::P2m, p2m_pages)?;
            let mapping = Mapping { va, frames: p2m.clone(), first_table: frames.next };
            frames.take(BuildItem::P2m, mapping.table_count())?;
            p2m_mapping = Some(mapping);
        }
        Ok(Self {
            boot,
            layout,
            virt_base,
            paddr_offset,
            entry,
            hypercall_page,
            initrd,
            initrd_is_mapped,
            p2m,
            start_info,
            store,
            console,
            tables,
            stack,
            region,
            p2m_mapping,
        })
    }

    /// Frame of the console's ring.
    pub fn console_frame(&self) -> u64 {
        self.console
    }

    /// Frame of the ring to xenstore.
    pub fn store_frame(&self) -> u64 {
        self.store
    }

    fn va(&self, frame: u64) -> u64 {
        self.virt_base + frame * PAGE_SIZE
    }

    /// Writes everything into the memory that the layout was made for.
    ///
    /// # Errors
    /// [`BuildError::Write`] if the memory is not of that layout.
    pub fn write(&self, memory: &GuestMemoryMap, rings: Rings) -> Result<PvEntry, BuildError> {
        let put = |item, address: u64, bytes: &[u8]| {
            memory.write_slice(bytes, GuestAddress(address)).map_err(|source| BuildError::Write {
                item,
                address,
                source,
            })
        };
        for segment in self.boot.kernel().segments() {
            let item = BuildItem::Segment(segment.index);
            let bytes = self.boot.kernel().segment_bytes(segment)?;
            let start = segment.paddr - self.paddr_offset;
            put(item, start, bytes)?;
            zero(&put, item, start + bytes.len() as u64, start + segment.memsz)?;
        }
        if let Some(va) = self.hypercall_page {
            put(BuildItem::HypercallPage, va - self.virt_base, &hypercall_page())?;
        }
        put(BuildItem::Initrd, self.initrd.start * PAGE_SIZE, self.boot.initrd)?;
        for frame in [self.store, self.console] {
            zero(&put, BuildItem::Rings, frame * PAGE_SIZE, (frame + 1) * PAGE_SIZE)?;
        }

        // Frame numbers are the same on both sides.
        let chunk = PAGE_SIZE / 8;
        for first in (0..self.layout.frames()).step_by(usize::try_from(chunk).unwrap_or(1)) {
            let numbers: Vec<u8> =
                (first..(first + chunk).min(self.layout.frames())).flat_map(u64::to_le_bytes).collect();
            put(BuildItem::P2m, self.p2m.start * PAGE_SIZE + first * 8, &numbers)?;
            put(BuildItem::M2p, self.layout.m2p().0 + first * 8, &numbers)?;
        }

        let root = self.tables.start;
        let put_table = |frame: u64, entries: &[u64; 512]| {
            let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            put(BuildItem::PageTables, frame * PAGE_SIZE, &bytes)
        };
        let mut entries = [0; 512];
        for mapping in [Some(&self.region), self.p2m_mapping.as_ref()].into_iter().flatten() {
            mapping.write(&self.tables, &put_table)?;
            if let Some(entry) = entries.get_mut(slot(mapping.va)) {
                *entry = mapping.root_entry();
            }
        }
        put_table(root, &entries)?;
        put(BuildItem::StartInfo, self.start_info * PAGE_SIZE, &self.start_info(rings).to_page())?;
        Ok(PvEntry {
            rip: self.entry,
            rsp: self.va(self.stack + 1),
            start_info: self.va(self.start_info),
            root: GuestAddress(root * PAGE_SIZE),
        })
    }

    fn start_info(&self, rings: Rings) -> StartInfo {
        let mut flags = SIF_VIRT_P2M_4TOOLS;
        let mut info = StartInfo {
            nr_pages: self.layout.frames(),
            shared_info: self.layout.abi_frames().start * PAGE_SIZE,
            store_mfn: self.store,
            store_evtchn: rings.store_port,
            console_mfn: self.console,
            console_evtchn: rings.console_port,
            pt_base: self.va(self.tables.start),
            nr_pt_frames: self.tables.end - self.tables.start,
            mfn_list: self.va(self.p2m.start),
            ..StartInfo::default()
        };
        if let Some(mapping) = &self.p2m_mapping {
            info.mfn_list = mapping.va;
            info.first_p2m_pfn = self.p2m.start;
            info.nr_p2m_frames = self.p2m.end - self.p2m.start + mapping.table_count();
        }
        if !self.boot.initrd.is_empty() {
            info.mod_len = self.boot.initrd.len() as u64;
            if self.initrd_is_mapped {
                info.mod_start = self.va(self.initrd.start);
            } else {
                info.mod_start = self.initrd.start;
                flags |= SIF_MOD_START_PFN;
            }
        }
        info.flags = flags;
        info.set_command_line(&self.boot.command_line);
        info
    }
}

/// Whether a physical-to-machine table can be mapped there, in a slot of its own.
fn fits_p2m(va: u64, virt_base: u64, pages: u64) -> bool {
    let mapping = Mapping { va, frames: 0..pages, first_table: 0 };
    let is_kernels = !(1 << 47..KERNEL_START).contains(&va);
    va.is_multiple_of(PAGE_SIZE) && is_kernels && mapping.is_in_one_slot() && slot(va) != slot(virt_base)
}

fn check_features(notes: &XenNotes) -> Result<(), BuildError> {
    let wanted = notes.features().unwrap_or_default();
    for name in wanted.split('|').filter_map(|name| name.strip_prefix('!')) {
        if !FEATURES.contains(&name) {
            return Err(BuildError::Feature { name: name.to_owned() });
        }
    }
    Ok(())
}

fn zero(
    put: &impl Fn(BuildItem, u64, &[u8]) -> Result<(), BuildError>,
    item: BuildItem,
    start: u64,
    end: u64,
) -> Result<(), BuildError> {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    let mut address = start;
    while address < end {
        let length = usize::try_from(end - address).unwrap_or(usize::MAX);
        let piece = ZEROES.get(..length).unwrap_or(&ZEROES);
        put(item, address, piece)?;
        address += piece.len() as u64;
    }
    Ok(())
}

/// The page of stubs by which older kernels make hypercalls: SYSCALL with RCX and R11 kept.
fn hypercall_page() -> Vec<u8> {
    let mut page = vec![0xcc; usize::try_from(HYPERCALLS * HYPERCALL_STUB).unwrap_or(0)];
    for (nr, stub) in (0_u32..).zip(page.chunks_mut(usize::try_from(HYPERCALL_STUB).unwrap_or(1))) {
        // PUSH RCX; PUSH R11; MOV EAX, nr; SYSCALL; POP R11; POP RCX; RET. IRET has its frame of Xen's on the stack,
        // whose first word is RAX, and does not come back.
        let [a, b, c, d] = nr.to_le_bytes();
        let code: &[u8] = if nr == HYPERCALL_IRET {
            &[0x51, 0x41, 0x53, 0x50, 0xb8, a, b, c, d, 0x0f, 0x05]
        } else {
            &[0x51, 0x41, 0x53, 0xb8, a, b, c, d, 0x0f, 0x05, 0x41, 0x5b, 0x59, 0xc3]
        };
        for (to, from) in stub.iter_mut().zip(code) {
            *to = *from;
        }
    }
    page
}

//! Reads, writes and executes at addresses that are the kernel's or the engine's.

use std::ops::Range;

use crate::catch::{Outcome, Registers, SIGSEGV, attempt};
use crate::code::Code;
use crate::report::Report;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const SLOT: u64 = 1 << 39;

/// The page by which an engine in the processor's ring 3 enters and leaves, which programs may read and execute: see the
/// docs of `vmm_cpu::xen_pv::engine`. With a fast path in the guest each vCPU has another such page, see
/// [`entry_pages`]. Nothing else in the upper half is a program's.
pub(crate) const ENTRY_PAGE: u64 = 0xffff_8100_0000_0000;

/// Where the fast path of the first vCPU is, and how far it is to the next one's.
const FAST_PATH: u64 = 0xffff_8080_0000_0000;
const FAST_PATH_STRIDE: u64 = 0x1_0000;

/// Pages that programs may read and execute, whether there are so many vCPUs or not.
pub(crate) fn entry_pages() -> impl Iterator<Item = u64> {
    std::iter::once(ENTRY_PAGE).chain((0..8).map(|vcpu| FAST_PATH + vcpu * FAST_PATH_STRIDE))
}

/// Linux lets programs call these three, and with another configuration read the page.
const VSYSCALL: u64 = 0xffff_ffff_ff60_0000;
const VSYSCALLS: [u64; 3] = [VSYSCALL, VSYSCALL + 0x400, VSYSCALL + 0x800];

/// A start of a slot of the top-level table.
fn slot(number: u64) -> u64 {
    ((number << 39).cast_signed() << 16 >> 16).cast_unsigned()
}

/// Addresses in an order that is the same in every run. `density` is 1 for all of them, more for fewer.
fn addresses(density: u64) -> Vec<u64> {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut list = Vec::new();
    for number in 256..512 {
        let base = slot(number);
        for offset in [0, PAGE - 1, 2 * MIB, 1 << 30, SLOT - (1 << 30), SLOT - 2 * MIB, SLOT - PAGE, SLOT - 1]
        {
            list.push(base + offset);
        }
        for _ in 0..(32 / density).max(2) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            list.push(base + (random & (SLOT - 1)));
        }
    }
    // Page by page: slots of the hypervisor, the kernel's regions (Documentation/x86/x86_64/mm.rst).
    let mut pages = |start: u64, count: u64, step: u64| {
        let step = step * PAGE;
        list.extend((0..count * PAGE / step).map(|number| start + number * step));
    };
    for number in 256..272 {
        pages(slot(number), 64, 1);
    }
    pages(ENTRY_PAGE, 256, 1);
    pages(FAST_PATH, 64, 1);
    // The domain's memory, where a fast path shows it to the guest kernel.
    pages(slot(260), 1 << 16, 4 * density);
    pages(slot(259), 256, density);
    // Machine-to-physical table, by large pages, and where Xen's own would be.
    pages(slot(259), 1 << 18, 512);
    pages(slot(256), 1 << 18, 512);
    // LDT, direct map, vmalloc, memory map, CPU entry areas.
    pages(slot(272), 64, 1);
    pages(slot(273), 1 << 16, 4 * density);
    pages(0xffff_c900_0000_0000, 4096, density);
    pages(0xffff_ea00_0000_0000, 2048, density);
    pages(0xffff_fe00_0000_0000, 512, density);
    // Kernel image, modules, fixed maps, the last page.
    pages(0xffff_ffff_8000_0000, 1 << 14, 2 * density);
    pages(0xffff_ffff_a000_0000, 1 << 12, 4 * density);
    pages(0xffff_ffff_ff00_0000, 1 << 12, density);
    list.extend([VSYSCALL, VSYSCALL + 0x400, VSYSCALL + 0x800, VSYSCALL + 0x123, u64::MAX - 4095, u64::MAX]);
    // What is canonical no more.
    for address in [0x8000_0000_0000, 0x8000_0000_0fff, 0x1234_5678_9abc_def0, 1 << 63, 0xffff_7fff_ffff_ffff]
    {
        list.push(address);
    }
    list
}

/// Mapped ranges of this process.
fn own_ranges() -> Vec<Range<u64>> {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc/self/maps");
    let number = |text: &str| u64::from_str_radix(text, 16).expect("an address");
    let range = |line: &str| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        Some(number(start)..number(end))
    };
    maps.lines().filter_map(range).collect()
}

/// Pages in the lower half that no mapping of this process has: what the kernel used of it at its start, for one.
fn lower_half(density: u64) -> Vec<u64> {
    let mut list = vec![0, 8, PAGE];
    for number in (0..256).step_by(usize::try_from(density).unwrap_or(1)) {
        list.extend([
            slot(number),
            slot(number) + 2 * MIB,
            slot(number) + (1 << 30),
            slot(number + 1) & (SLOT * 256 - 1),
        ]);
    }
    // The last page is never a program's.
    list.extend([0x80_0000_0000, 0x80_0000_1000, 0x7fff_ffff_f000, 0x7fff_ffff_ffff]);
    let own = own_ranges();
    // A stack grows into what is below it.
    list.retain(|at| !own.iter().any(|range| (range.start.saturating_sub(16 * MIB)..range.end).contains(at)));
    list
}

fn is_canonical(address: u64) -> bool {
    (address.cast_signed() << 16 >> 16).cast_unsigned() == address
}

fn is_entry_page(address: u64) -> bool {
    entry_pages().any(|page| page == address & !(PAGE - 1))
}

/// SIGSEGV that says where.
fn is_fault(outcome: Outcome, address: u64, rip: u64) -> bool {
    let Outcome::Signal(caught) = outcome else { return false };
    caught.signal == SIGSEGV && caught.rip == rip && (!is_canonical(address) || caught.address == address)
}

pub(crate) fn all(report: &mut Report, code: &mut Code, density: u64) {
    // MOVZX EAX, [RDI]; RET. LOCK OR [RDI], AL; RET, which would change nothing.
    let read = code.add(&[0x0f, 0xb6, 0x07, 0xc3]);
    let write = code.add(&[0xf0, 0x08, 0x07, 0xc3]);
    let mut list = addresses(density);
    list.extend(lower_half(density));

    report.subject("memory, read");
    for &address in &list {
        let outcome = attempt(read, &Registers { rdi: address, ..Registers::default() });
        let allowed = is_entry_page(address) || address & !(PAGE - 1) == VSYSCALL;
        let expected = is_fault(outcome, address, read) || allowed && matches!(outcome, Outcome::Returned(_));
        report.record(expected, outcome.kind(), format_args!("{address:#x}"), outcome);
    }
    report.subject("memory, write");
    for &address in &list {
        let outcome = attempt(write, &Registers { rdi: address, ..Registers::default() });
        report.record(
            is_fault(outcome, address, write),
            outcome.kind(),
            format_args!("{address:#x}"),
            outcome,
        );
    }
    report.subject("memory, execute");
    for &address in list.iter().filter(|address| !is_entry_page(**address)) {
        let outcome = attempt(address, &Registers::default());
        // A CALL to what is not canonical does not get there.
        let fault = if is_canonical(address) {
            is_fault(outcome, address, address)
        } else {
            matches!(outcome, Outcome::Signal(caught) if caught.signal == SIGSEGV)
        };
        // Linux answers a call of something else there itself, and does not say where it was.
        let fault = fault || address & !(PAGE - 1) == VSYSCALL && outcome.kind() == "SIGSEGV";
        let call = VSYSCALLS.contains(&address) && matches!(outcome, Outcome::Returned(_));
        report.record(fault || call, outcome.kind(), format_args!("{address:#x}"), outcome);
    }
}

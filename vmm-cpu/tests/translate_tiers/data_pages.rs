//! Pages of data whose translation of addresses changes, and such to which stores have to be noticed.

use std::sync::Arc;

use iced_x86::code_asm::{CodeAssembler, dword_ptr, eax, ecx, qword_ptr, r8, r9, rax, rbx, rcx, rdi};
use vmm_cpu::GuestAccess;
use vmm_memory::vm_memory::GuestAddress;
use vmm_memory::{Backing, GuestRam, GuestRegion, PageBitmap, RegionConfig};

use super::machine::{
    CODE, DATA, MMIO, Machine, PAGE, PML4, POINTERS, WINDOW, entry, on_each_tier_and_level, window_entry,
};
use super::program::{Code, Made, assemble, here};

/// Frames that a page leads to by turns.
const FRAMES: [u64; 2] = [CODE + 0x1_0000, CODE + 0x1_4000];
const ROUNDS: u64 = 20;

/// Rounds from [`ROUNDS`] down to 1 in RCX, each with a trap and then `body`, with RDI at the window; then HLT.
fn rounds(body: impl FnOnce(&mut CodeAssembler) -> Made) -> Code {
    assemble(CODE, |a| {
        a.mov(rdi, WINDOW)?;
        a.mov(ecx, ROUNDS as u32)?;
        let again = here(a)?;
        a.int(0x80)?;
        body(a)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    })
}

/// A word is read and one more stored.
fn count(a: &mut CodeAssembler) -> Made {
    a.add(rbx, qword_ptr(rdi + 8))?;
    a.inc(qword_ptr(rdi + 8))
}

#[test]
fn a_page_is_remapped() {
    let code = rounds(count);
    let (sum, words) = on_each_tier_and_level(|tier| {
        let mut machine = Machine::new(tier, &code);
        machine.ram.set_word(FRAMES[1] + 8, 1000);
        let general = machine.run_with(|trap, ram| {
            ram.map(0, FRAMES[(trap.general.rcx / 2 % 2) as usize] | entry::ALL);
        });
        (general.rbx, FRAMES.map(|frame| machine.ram.word(frame + 8)))
    });
    assert_eq!(words, [10, 1010]);
    assert_eq!(sum, 45 + 10_045);
}

#[test]
fn two_pages_are_one() {
    // What is stored through one is read through the other at once.
    let code = rounds(|a| {
        a.mov(qword_ptr(rdi + 8), rcx)?;
        a.add(rbx, qword_ptr(rdi + PAGE as i32 + 8))?;
        a.inc(dword_ptr(rdi + PAGE as i32 + 8))?;
        a.add(rbx, qword_ptr(rdi + 8))
    });
    let sum = on_each_tier_and_level(|tier| {
        let mut machine = Machine::new(tier, &code);
        machine.ram.map(0, FRAMES[0] | entry::ALL);
        machine.ram.map(1, FRAMES[0] | entry::ALL);
        machine.run_with(|trap, _| assert_eq!(trap.vector, 0x80)).rbx
    });
    assert_eq!(sum, (1..=ROUNDS).map(|n| n + n + 1).sum::<u64>());
}

#[test]
fn accessed_and_dirty_are_set_again() {
    const ACCESSED: u64 = 1 << 5;
    const DIRTY: u64 = 1 << 6;
    // Page 0 is read and page 1 written; each in some rounds.
    let code = assemble(CODE, |a| {
        a.mov(rdi, WINDOW)?;
        a.mov(ecx, ROUNDS as u32)?;
        let again = here(a)?;
        let (mut no_read, mut no_write) = (a.create_label(), a.create_label());
        a.int(0x80)?;
        a.test(ecx, 1)?;
        a.je(no_read)?;
        a.mov(rax, qword_ptr(rdi))?;
        a.set_label(&mut no_read)?;
        a.test(ecx, 2)?;
        a.je(no_write)?;
        a.mov(qword_ptr(rdi + PAGE as i32), rax)?;
        a.set_label(&mut no_write)?;
        a.int(0x81)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    });
    let seen = on_each_tier_and_level(|tier| {
        let mut machine = Machine::new(tier, &code);
        let mut seen = Vec::new();
        machine.run_with(|trap, ram| match trap.vector {
            0x80 => (0..2).for_each(|page| ram.map(page, FRAMES[page as usize] | entry::ALL)),
            _ => seen.push([0, 1].map(|page| ram.word(window_entry(page)) & (ACCESSED | DIRTY))),
        });
        seen
    });
    let expected = (1..=ROUNDS)
        .rev()
        .map(|n| [if n & 1 != 0 { ACCESSED } else { 0 }, if n & 2 != 0 { ACCESSED | DIRTY } else { 0 }]);
    assert_eq!(seen, expected.collect::<Vec<_>>());
}

#[test]
fn a_page_becomes_read_only_absent_and_a_devices() {
    let code = rounds(count);
    let seen = on_each_tier_and_level(|tier| {
        let mut machine = Machine::new(tier, &code);
        let mut faults = Vec::new();
        let general = machine.run_with(|trap, ram| match trap.vector {
            0x80 => {
                let entry = match trap.general.rcx % 4 {
                    0 => FRAMES[0] | entry::ALL,
                    1 => FRAMES[0] | entry::PRESENT | entry::USER,
                    2 => 0,
                    _ => MMIO | entry::ALL,
                };
                ram.map(0, entry);
            }
            14 => {
                faults.push((trap.cr2, trap.error & 3, trap.general.rcx));
                ram.map(0, FRAMES[0] | entry::ALL);
            }
            _ => panic!("{trap:x?}"),
        });
        // What the device says is not a sum, but the same everywhere.
        (faults, general.rbx, machine.ram.word(FRAMES[0] + 8), machine.device.clone())
    });
    let (faults, _, word, device) = seen;
    let of_round = |n: u64| match n % 4 {
        1 => Some((WINDOW + 8, 3, n)),
        2 => Some((WINDOW + 8, 0, n)),
        _ => None,
    };
    assert_eq!(faults, (1..=ROUNDS).rev().filter_map(of_round).collect::<Vec<_>>());
    assert_eq!(word, ROUNDS * 3 / 4);
    // Each a load to add, and a load and a store to count.
    assert_eq!(device.log.len() as u64, ROUNDS / 4 * 3);
    assert!(device.log.iter().all(|(gpa, _)| *gpa == MMIO + 8));
}

#[test]
fn as_many_regions_as_there_are() {
    // The low 512 GiB are there once more at each multiple of that, up to the middle of the address space.
    const TIMES: u64 = 200;
    let code = assemble(CODE, |a| {
        a.mov(r9, 4_u64)?;
        let all = here(a)?;
        a.mov(ecx, TIMES as u32)?;
        a.mov(rdi, DATA)?;
        let again = here(a)?;
        a.inc(qword_ptr(rdi))?;
        a.add(rbx, qword_ptr(rdi))?;
        a.mov(r8, 1_u64 << 39)?;
        a.add(rdi, r8)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.dec(r9)?;
        a.jne(all)?;
        a.hlt()
    });
    let (sum, word) = on_each_tier_and_level(|tier| {
        let mut machine = Machine::new(tier, &code);
        for n in 1..TIMES {
            machine.ram.set_word(PML4 + n * 8, POINTERS | entry::ALL);
        }
        (machine.run().rbx, machine.ram.word(DATA))
    });
    assert_eq!((sum, word), ((1..=4 * TIMES).sum::<u64>(), 4 * TIMES));
}

/// Memory of the VMM's, besides.
const GPA: u64 = 0x1000_0000;

fn region() -> Arc<GuestRegion> {
    let region = RegionConfig::new(GuestAddress(GPA), 4 * PAGE).backing(Backing::Memfd);
    let ram = GuestRam::builder().region(region).build().unwrap();
    ram.regions().into_iter().next().unwrap()
}

#[test]
fn memory_is_taken_away_and_comes_back() {
    use vmm_memory::vm_memory::{Bytes, MemoryRegionAddress};

    let code = assemble(CODE, |a| {
        a.mov(rdi, WINDOW)?;
        a.mov(ecx, 3)?;
        let again = here(a)?;
        count(a)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    });
    let (word, device) = on_each_tier_and_level(|tier| {
        let mut machine = Machine::new(tier, &code);
        machine.ram.map(0, GPA | entry::ALL);
        let region = region();
        for round in 0..6 {
            if round % 2 == 0 {
                machine.vm.map_memory(Arc::clone(&region), GuestAccess::ReadWrite).unwrap();
            } else {
                machine.vm.unmap_memory(GuestAddress(GPA)).unwrap();
            }
            machine.run_at(CODE);
        }
        let word: u64 = region.read_obj(MemoryRegionAddress(8)).unwrap();
        (word, machine.device.clone())
    });
    assert_eq!(word, 9);
    assert_eq!(device.log.len(), 3 * 3 * 3);
}

#[test]
fn stores_are_logged() {
    // Page n of four is written in rounds that n divides.
    let code = assemble(CODE, |a| {
        a.mov(rdi, WINDOW)?;
        for page in 0..4 {
            let mut next = a.create_label();
            // A bit of R8 for each.
            a.bt(r8, page)?;
            a.jae(next)?;
            a.mov(qword_ptr(rdi + PAGE as u32 * page + 8), rdi)?;
            a.set_label(&mut next)?;
            a.mov(eax, dword_ptr(rdi + PAGE as u32 * page))?;
        }
        a.hlt()
    });
    let logs = on_each_tier_and_level(|tier| {
        let mut machine = Machine::new(tier, &code);
        let region = region();
        machine.vm.map_memory(Arc::clone(&region), GuestAccess::ReadWrite).unwrap();
        for page in 0..4 {
            machine.ram.map(page, (GPA + page * PAGE) | entry::ALL);
        }
        // All pages have been written before the log begins.
        machine.set(|general| general.r8 = 0b1111);
        machine.run();
        machine.vm.dirty_log().unwrap().start(GuestAddress(GPA)).unwrap();
        let mut logs = Vec::new();
        for pages in [0b0001, 0b1010, 0, 0b1111, 0b0100] {
            machine.set(|general| general.r8 = pages);
            machine.run_at(CODE);
            let mut log = PageBitmap::for_region(&region);
            machine.vm.dirty_log().unwrap().harvest(&region, &mut log).unwrap();
            logs.push((0..4).filter(|page| log.contains(*page)).fold(0, |bits, page| bits | 1 << page));
        }
        logs
    });
    assert_eq!(logs, [0b0001, 0b1010, 0, 0b1111, 0b0100]);
}

#[test]
fn data_become_code_and_data_again() {
    // MOV EAX, imm32; RET is stored at the window, called, and stored anew.
    let code = rounds(|a| {
        a.mov(rax, 0x0000_c300_0000_00b8_u64)?;
        a.mov(qword_ptr(rdi), rax)?;
        a.mov(dword_ptr(rdi + 1), ecx)?;
        // Elsewhere in the page, before there is code in it.
        a.mov(qword_ptr(rdi + 0x800), rcx)?;
        a.call(rdi)?;
        a.add(rbx, rax)?;
        // And while there is.
        a.add(qword_ptr(rdi + 0x800), rcx)?;
        a.mov(dword_ptr(rdi + 1), 0x1_0000)?;
        a.call(rdi)?;
        a.add(rbx, rax)?;
        a.add(rbx, qword_ptr(rdi + 0x800))
    });
    let sum = on_each_tier_and_level(|tier| {
        let mut machine = Machine::new(tier, &code);
        machine.ram.map(0, FRAMES[0] | entry::ALL);
        machine.run_with(|trap, _| assert_eq!(trap.vector, 0x80)).rbx
    });
    assert_eq!(sum, (1..=ROUNDS).map(|n| n + 0x1_0000 + 2 * n).sum::<u64>());
}

//! Code whose page tables change: what was translated at a linear address is not what runs there any more.

use iced_x86::code_asm::{
    CodeAssembler, byte_ptr, cr3, cr4, dword_ptr, ecx, qword_ptr, r8, r9, rax, rbx, rdi, rdx, rsi,
};

use super::machine::{
    CODE, DIRECTORY, HIGH, Machine, PAGE, STACK, WINDOW, entry, on_each_tier, on_each_tier_at, window_entry,
};
use super::program::{Code, Made, assemble, here};

/// Frames with functions.
const FRAMES: [u64; 2] = [CODE + 0x1_0000, CODE + 0x1_1000];

/// A function that returns `value`, by way of a second block.
fn function(value: u32) -> Vec<u8> {
    let code = assemble(WINDOW, |a| {
        let mut second = a.create_label();
        a.jmp(second)?;
        a.int3()?;
        a.set_label(&mut second)?;
        a.mov(iced_x86::code_asm::eax, value)?;
        a.ret()
    });
    code.bytes
}

/// Calls the function in the first page of the window in 20 rounds, between which `change` is executed with a new
/// page-table entry in RDX and RDI at its place; adds what the calls return to RBX.
fn calls(change: impl FnOnce(&mut CodeAssembler) -> Made) -> Code {
    assemble(CODE, |a| {
        a.mov(rdi, window_entry(0))?;
        a.mov(rdx, FRAMES[0] | entry::ALL)?;
        a.mov(rsi, FRAMES[0] ^ FRAMES[1])?;
        a.mov(r8, WINDOW)?;
        a.mov(ecx, 20)?;
        let again = here(a)?;
        a.xor(rdx, rsi)?;
        change(a)?;
        // Directly, and by way of a register.
        a.call(WINDOW)?;
        a.add(rbx, rax)?;
        a.call(r8)?;
        a.add(rbx, rax)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    })
}

/// A machine with two functions, the first of them mapped.
fn machine(tier: super::machine::Tier, code: &Code) -> Machine {
    let machine = Machine::new(tier, code);
    machine.ram.write(FRAMES[0], &function(1));
    machine.ram.write(FRAMES[1], &function(100));
    machine.ram.map(0, FRAMES[0] | entry::ALL);
    machine
}

/// Both functions by turns, each twice in a round.
const BY_TURNS: u64 = 20 * 101;

#[test]
fn and_the_page_is_invalidated() {
    let code = calls(|a| {
        a.mov(qword_ptr(rdi), rdx)?;
        a.invlpg(byte_ptr(r8))
    });
    assert_eq!(on_each_tier(|tier| machine(tier, &code).run().rbx), BY_TURNS);
}

#[test]
fn and_everything_is_invalidated() {
    let code = calls(|a| {
        a.mov(qword_ptr(rdi), rdx)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)
    });
    assert_eq!(on_each_tier(|tier| machine(tier, &code).run().rbx), BY_TURNS);
}

#[test]
fn and_global_pages_too() {
    let code = calls(|a| {
        a.or(rdx, i32::try_from(entry::GLOBAL).unwrap())?;
        a.mov(qword_ptr(rdi), rdx)?;
        a.mov(rax, cr4)?;
        a.xor(rax, 0x80)?;
        a.mov(cr4, rax)?;
        a.xor(rax, 0x80)?;
        a.mov(cr4, rax)
    });
    assert_eq!(on_each_tier(|tier| machine(tier, &code).run().rbx), BY_TURNS);
}

#[test]
fn and_a_large_page_is_invalidated_by_any_address_in_it() {
    // The window is by turns one page of 2 MiB, the start of memory, and small ones.
    let code = assemble(CODE, |a| {
        a.mov(rdi, DIRECTORY + 8)?;
        a.mov(rsi, qword_ptr(rdi))?;
        a.mov(rdx, entry::ALL | 1 << 7)?;
        a.mov(r8, WINDOW + 0x12_3456)?;
        a.mov(r9, WINDOW + FRAMES[0])?;
        a.mov(ecx, 20)?;
        let again = here(a)?;
        a.xchg(rsi, rdx)?;
        a.mov(qword_ptr(rdi), rsi)?;
        // The large page is invalidated by another address, the small one by its own.
        a.xchg(r8, r9)?;
        a.invlpg(byte_ptr(r8))?;
        a.mov(rax, WINDOW + FRAMES[0])?;
        a.call(rax)?;
        a.add(rbx, rax)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    });
    let sum = on_each_tier(|tier| {
        let mut machine = machine(tier, &code);
        // Where the large page has the first function, the window has the second.
        machine.ram.map(FRAMES[0] / PAGE, FRAMES[1] | entry::ALL);
        machine.run().rbx
    });
    assert_eq!(sum, 10 * 101);
}

#[test]
fn under_the_code_that_runs() {
    // Two frames with the same code but for one immediate operand.
    let version = |value: u32| {
        assemble(WINDOW, |a| {
            a.mov(rdi, window_entry(0))?;
            a.mov(rsi, FRAMES[0] ^ FRAMES[1])?;
            a.mov(rdx, WINDOW)?;
            a.mov(ecx, 20)?;
            let again = here(a)?;
            a.xor(qword_ptr(rdi), rsi)?;
            a.invlpg(byte_ptr(rdx))?;
            a.add(rbx, i32::try_from(value).unwrap())?;
            a.dec(ecx)?;
            a.jne(again)?;
            a.hlt()
        })
    };
    let sum = on_each_tier(|tier| {
        let mut machine = machine(tier, &assemble(CODE, |a| a.jmp(WINDOW)));
        machine.ram.write(FRAMES[0], &version(1).bytes);
        machine.ram.write(FRAMES[1], &version(100).bytes);
        machine.run().rbx
    });
    assert_eq!(sum, 10 * 101);
}

#[test]
fn and_changed_while_nothing_led_there() {
    // The page goes away, its frame is written through another address, and it comes back.
    let code = assemble(CODE, |a| {
        a.mov(rdi, window_entry(0))?;
        a.mov(r8, WINDOW)?;
        a.mov(rsi, HIGH + FRAMES[0])?;
        a.mov(ecx, 20)?;
        let again = here(a)?;
        a.mov(rdx, qword_ptr(rdi))?;
        a.mov(qword_ptr(rdi), 0)?;
        a.invlpg(byte_ptr(r8))?;
        // What MOV EAX has as its operand, behind a jump of two bytes and INT3.
        a.mov(dword_ptr(rsi + 4), ecx)?;
        a.mov(qword_ptr(rdi), rdx)?;
        a.call(WINDOW)?;
        a.add(rbx, rax)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    });
    assert_eq!(on_each_tier(|tier| machine(tier, &code).run().rbx), 20 * 21 / 2);
}

#[test]
fn and_not_there_or_not_to_be_executed() {
    // What takes the function away, and the error code of the fetch at privilege levels 0 and 3.
    const FETCH: u64 = 1 << 4;
    let user = 1 << 2;
    let changes = [
        (0, FETCH, FETCH | user),
        (FRAMES[0] | entry::ALL | entry::NO_EXECUTE, FETCH | 1, FETCH | user | 1),
        (FRAMES[0] | entry::PRESENT | entry::WRITABLE, u64::MAX, FETCH | user | 1),
    ];
    let code = assemble(CODE, |a| {
        a.mov(ecx, 6)?;
        let again = here(a)?;
        a.call(WINDOW)?;
        a.add(rbx, rax)?;
        a.int(0x80)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.int(0x81)
    });
    for (bad, supervisor_error, user_error) in changes {
        for is_user in [false, true] {
            let error = if is_user { user_error } else { supervisor_error };
            let faults = on_each_tier_at(is_user, |tier| {
                let mut machine = machine(tier, &code);
                let mut faults = Vec::new();
                let general = machine.run_with(|trap, ram| match trap.vector {
                    0x80 => ram.map(0, if trap.general.rcx % 2 == 0 { bad } else { FRAMES[0] | entry::ALL }),
                    14 => {
                        faults.push((trap.error, trap.cr2, trap.general.rip, trap.general.rsp));
                        ram.map(0, FRAMES[0] | entry::ALL);
                    }
                    0x81 => trap.end(),
                    _ => panic!("{trap:x?}"),
                });
                assert_eq!(general.rbx, 6);
                faults
            });
            // Of the calls in rounds 5, 3 and 1.
            let expected = if error == u64::MAX { 0 } else { 3 };
            assert_eq!(faults, vec![(error, WINDOW, WINDOW, STACK - 8); expected], "{bad:#x} {is_user}");
        }
    }
}

#[test]
fn by_the_vmm_which_maps_other_memory() {
    use std::sync::Arc;
    use vmm_cpu::GuestAccess;
    use vmm_memory::vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
    use vmm_memory::{GuestRam, RegionConfig};

    const GPA: u64 = 0x1000_0000;
    let code = assemble(CODE, |a| {
        a.mov(ecx, 3)?;
        let again = here(a)?;
        a.call(WINDOW)?;
        a.add(rbx, rax)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    });
    let regions = [1, 100].map(|value| {
        let region = RegionConfig::new(GuestAddress(GPA), PAGE);
        let ram = GuestRam::builder().region(region).build().unwrap();
        let region = ram.regions().into_iter().next().unwrap();
        region.write_slice(&function(value), MemoryRegionAddress(0)).unwrap();
        region
    });
    let sum = on_each_tier(|tier| {
        let mut machine = machine(tier, &code);
        machine.ram.map(0, GPA | entry::ALL);
        for round in 0..6 {
            machine.vm.map_memory(Arc::clone(&regions[round % 2]), GuestAccess::ReadWrite).unwrap();
            machine.run_at(CODE);
            machine.vm.unmap_memory(GuestAddress(GPA)).unwrap();
        }
        machine.vcpu.registers().unwrap().rbx
    });
    assert_eq!(sum, 9 * 101);
}

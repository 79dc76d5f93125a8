//! What a program reads follows the page tables as soon as the processor would have to look: after INVLPG, after a load of
//! CR3, after changes of CR0 and CR4; and what the test changes from outside.

use iced_x86::code_asm::*;
use vmm_cpu::GuestAccess;
use vmm_memory::PageBitmap;
use vmm_memory::vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

use crate::machine::{
    ACCESSED, Answer, CR0, CR4, Call, DATA, DIRTY, EXTRA, Emit, GLOBAL, OTHER_SPACE, PRESENT, SPACE, Setup,
    Tier, USER, WRITABLE, call, page, run_on, same_on_all, same_with,
};

const PLACE: u64 = 0x1234_5678_0000;
/// An address that the TLB keeps where it keeps that of [`PLACE`].
const RIVAL: u64 = PLACE + (2048 << 12);
const READ_ONLY: u64 = PRESENT | USER;

/// Page `n` begins with 0x1000 and its number.
fn number_pages(setup: &mut Setup) {
    for n in 0..0x20 {
        setup.word(page(n), 0x1000 + n);
    }
}

fn program(emit: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> CodeAssembler {
    let mut a = CodeAssembler::new(64).unwrap();
    emit(&mut a).unwrap();
    call(&mut a, Call::Exit);
    a
}

/// Loads the quadword at an address.
fn load(a: &mut CodeAssembler, to: AsmRegister64, address: u64) -> Result<(), IcedError> {
    a.mov(rbx, address)?;
    a.mov(to, qword_ptr(rbx))
}

fn store(a: &mut CodeAssembler, address: u64, value: u32) -> Result<(), IcedError> {
    a.mov(rbx, address)?;
    a.mov(qword_ptr(rbx), i32::try_from(value).unwrap())
}

#[test]
fn invlpg_forgets_a_page() {
    let run = same_on_all(|setup| {
        number_pages(setup);
        let entry = setup.map(SPACE, PLACE, page(1), DATA);
        let mut a = program(|a| {
            load(a, r12, PLACE)?;
            load(a, r12, PLACE)?;
            call(a, Call::Store(entry, page(2) | DATA));
            call(a, Call::Invalidate(PLACE));
            load(a, r13, PLACE)?;
            store(a, PLACE + 8, 7)?;
            call(a, Call::Store(entry, page(3) | READ_ONLY));
            call(a, Call::Invalidate(PLACE + 0xfff));
            load(a, r14, PLACE)
        });
        setup.program(&mut a);
    });
    assert_eq!((run.registers.r12, run.registers.r13, run.registers.r14), (0x1001, 0x1002, 0x1003));
    assert_eq!((run.setup.read(page(1) + 8), run.setup.read(page(2) + 8)), (0, 7));
}

#[test]
fn rights_that_are_taken_are_gone_after_invlpg() {
    for (bits, error) in [(0, 6), (READ_ONLY, 7), (PRESENT | WRITABLE, 7)] {
        let run = same_on_all(|setup| {
            number_pages(setup);
            let entry = setup.map(SPACE, PLACE, page(1), DATA);
            let mut a = program(|a| {
                store(a, PLACE, 5)?;
                store(a, PLACE, 6)?;
                call(a, Call::Store(entry, page(1) | bits));
                call(a, Call::Invalidate(PLACE));
                store(a, PLACE, 7)
            });
            setup.program(&mut a);
        });
        let event = &run.events[0];
        assert_eq!((run.events.len(), event.vector, event.error, event.address), (1, 14, error, PLACE));
        assert_eq!(run.setup.read(page(1)), 6);
    }
}

/// Writes to where RBX points to, by whatever way: what is there was 0x1002 and 0x1013 afterwards.
const WRITES: &[Emit] = &[
    |a| {
        a.stc()?;
        a.adc(qword_ptr(rbx), 0x10)
    },
    |a| a.mov(qword_ptr(rbx), 0x1013),
    |a| a.lock().add(qword_ptr(rbx), 0x11),
    |a| {
        a.mov(edx, 0x11)?;
        a.xadd(qword_ptr(rbx), rdx)
    },
    |a| {
        a.mov(eax, 0x1002)?;
        a.mov(edx, 0x1013)?;
        a.lock().cmpxchg(qword_ptr(rbx), rdx)
    },
    |a| {
        a.mov(eax, 0x13)?;
        a.mov(rdi, rbx)?;
        a.mov(ecx, 1)?;
        a.rep().stosb()
    },
    |a| {
        a.mov(edx, 4)?;
        a.bts(qword_ptr(rbx), rdx)?;
        a.lock().inc(byte_ptr(rbx))
    },
    |a| {
        a.mov(rsp, rbx)?;
        a.add(rsp, 8)?;
        a.push(0x1013)?;
        a.mov(rsp, crate::machine::STACK)
    },
    |a| {
        a.mov(ah, 0x13)?;
        a.mov(byte_ptr(rbx), ah)
    },
];

#[test]
fn a_page_is_copied_when_it_is_written() {
    for (write, invalidate) in WRITES.iter().flat_map(|write| [(write, 0), (write, PLACE)]) {
        let run = same_on_all(|setup| {
            number_pages(setup);
            let entry = setup.map(SPACE, PLACE, page(1), READ_ONLY);
            setup.map(SPACE, PLACE + 0x1000, page(1), READ_ONLY);
            setup.answer(Answer { store: (entry, page(2) | DATA), invalidate, resume: 0 });
            let mut a = program(|a| {
                load(a, r12, PLACE)?;
                load(a, r12, PLACE + 0x1000)?;
                a.mov(rbx, PLACE)?;
                write(a)?;
                load(a, r13, PLACE)?;
                load(a, r14, PLACE + 0x1000)
            });
            setup.program(&mut a);
        });
        assert_eq!(run.events.len(), 1);
        assert_eq!((run.registers.r12, run.registers.r13, run.registers.r14), (0x1001, 0x1013, 0x1001));
        assert_eq!((run.setup.read(page(1)), run.setup.read(page(2))), (0x1001, 0x1013));
    }
}

#[test]
fn a_page_that_may_be_written_now_is_one_for_reads_and_writes() {
    // Nothing is flushed, and nothing faults. To read the old page is allowed, to write what was read there is not.
    for write in WRITES {
        let run = same_on_all(|setup| {
            number_pages(setup);
            let entry = setup.map(SPACE, PLACE, page(1), READ_ONLY);
            let mut a = program(|a| {
                load(a, r12, PLACE)?;
                call(a, Call::Store(entry, page(2) | DATA));
                a.mov(rbx, PLACE)?;
                write(a)?;
                load(a, r13, PLACE)
            });
            setup.program(&mut a);
        });
        assert_eq!((run.events.len(), run.registers.r12, run.registers.r13), (0, 0x1001, 0x1013));
        assert_eq!((run.setup.read(page(1)), run.setup.read(page(2))), (0x1001, 0x1013));
    }
}

#[test]
fn a_page_fault_forgets_the_page() {
    let mut behind = 0;
    for _ in 0..2 {
        let run = same_on_all(|setup| {
            number_pages(setup);
            let entry = setup.map(SPACE, PLACE, page(1), READ_ONLY);
            setup.answer(Answer { store: (entry, page(2) | DATA), invalidate: 0, resume: behind });
            let mut a = program(|a| {
                load(a, r12, PLACE)?;
                load(a, r12, PLACE)?;
                a.mov(qword_ptr(rbx), 1)?;
                a.nop()?;
                load(a, r13, PLACE)
            });
            setup.program(&mut a);
        });
        // What it is about, the second time.
        if behind != 0 {
            assert_eq!((run.registers.r12, run.registers.r13), (0x1001, 0x1002));
        }
        // MOV with an immediate.
        behind = run.events[0].rip + 7;
    }
}

#[test]
fn a_page_that_comes_needs_no_invlpg() {
    let run = same_on_all(|setup| {
        number_pages(setup);
        let entry = setup.map(SPACE, PLACE, 0, 0);
        setup.answer(Answer { store: (entry, page(1) | READ_ONLY), ..Answer::default() });
        setup.answer(Answer { store: (entry, page(1) | DATA), ..Answer::default() });
        let mut a = program(|a| {
            load(a, r12, PLACE)?;
            store(a, PLACE, 9)?;
            load(a, r13, PLACE)
        });
        setup.program(&mut a);
    });
    assert_eq!((run.registers.r12, run.registers.r13), (0x1001, 9));
}

#[test]
fn spaces_have_pages_of_their_own_at_the_same_address() {
    let run = same_on_all(|setup| {
        number_pages(setup);
        setup.map(SPACE, PLACE, page(1), DATA);
        let other = setup.map(OTHER_SPACE, PLACE, page(2), DATA);
        setup.map(SPACE, PLACE + 0x1000, page(4), DATA);
        let mut a = program(|a| {
            load(a, r12, PLACE)?;
            load(a, r12, PLACE + 0x1000)?;
            call(a, Call::SetCr3(OTHER_SPACE));
            load(a, r13, PLACE)?;
            store(a, PLACE + 8, 2)?;
            call(a, Call::SetCr3(SPACE));
            load(a, r14, PLACE)?;
            store(a, PLACE + 8, 1)?;
            // Of the space that is not in use, nothing has to be flushed.
            call(a, Call::Store(other, page(3) | DATA));
            call(a, Call::SetCr3(OTHER_SPACE));
            load(a, r15, PLACE)?;
            store(a, PLACE + 8, 3)?;
            // No page is there.
            load(a, r8, PLACE + 0x1000)
        });
        setup.program(&mut a);
    });
    let registers = &run.registers;
    assert_eq!([registers.r13, registers.r14, registers.r15], [0x1002, 0x1001, 0x1003]);
    assert_eq!([1, 2, 3].map(|n| run.setup.read(page(n) + 8)), [1, 2, 3]);
    assert_eq!((run.events.len(), run.events[0].address), (1, PLACE + 0x1000));
}

#[test]
fn a_load_of_cr3_forgets_all_that_is_not_global() {
    for bits in [0, GLOBAL] {
        let run = same_on_all(|setup| {
            number_pages(setup);
            let entry = setup.map(SPACE, PLACE, page(1), DATA | bits);
            let mut a = program(|a| {
                load(a, r12, PLACE)?;
                load(a, r12, PLACE)?;
                call(a, Call::Store(entry, page(2) | DATA | bits));
                call(a, Call::SetCr3(SPACE));
                load(a, r13, PLACE)?;
                call(a, Call::SetCr4(CR4 & !(1 << 7)));
                load(a, r14, PLACE)?;
                call(a, Call::Store(entry, page(3) | DATA | bits));
                call(a, Call::SetCr4(CR4));
                load(a, r15, PLACE)
            });
            setup.program(&mut a);
        });
        let registers = &run.registers;
        if bits == 0 {
            assert_eq!(registers.r13, 0x1002);
        }
        assert_eq!((registers.r14, registers.r15), (0x1002, 0x1003));
    }
}

#[test]
fn write_protection_that_is_switched_forgets_everything() {
    let run = same_on_all(|setup| {
        number_pages(setup);
        let entry = setup.map(SPACE, PLACE, page(1), DATA);
        let mut a = program(|a| {
            load(a, r12, PLACE)?;
            call(a, Call::Store(entry, page(2) | READ_ONLY));
            call(a, Call::SetCr0(CR0 & !(1 << 16)));
            load(a, r13, PLACE)?;
            // It is for the kernel alone.
            store(a, PLACE, 1)
        });
        setup.program(&mut a);
    });
    assert_eq!((run.registers.r12, run.registers.r13), (0x1001, 0x1002));
    assert_eq!((run.events.len(), run.events[0].error), (1, 7));
}

#[test]
fn invlpg_forgets_all_of_a_large_page() {
    let large = page(0) + 0x20_0000;
    let run = same_on_all(|setup| {
        for n in 0..4 {
            setup.word(large + n * 0x1000, n);
            setup.word(large + 0x20_0000 + n * 0x1000, 0x10 + n);
        }
        let entry = setup.map_large(SPACE, PLACE & !0x1f_ffff, large, DATA);
        let base = PLACE & !0x1f_ffff;
        let mut a = program(|a| {
            load(a, r12, base + 0x1000)?;
            load(a, r13, base + 0x2000)?;
            call(a, Call::Store(entry, (large + 0x20_0000) | DATA | 1 << 7));
            call(a, Call::Invalidate(base + 0x3000));
            load(a, r14, base + 0x1000)?;
            load(a, r15, base + 0x2000)
        });
        setup.program(&mut a);
    });
    let registers = &run.registers;
    assert_eq!([registers.r12, registers.r13, registers.r14, registers.r15], [1, 2, 0x11, 0x12]);
}

#[test]
fn invlpg_forgets_all_of_a_page_that_became_large() {
    let large = page(0) + 0x20_0000;
    let run = same_on_all(|setup| {
        let base = PLACE & !0x1f_ffff;
        for n in 0..4 {
            setup.word(large + n * 0x1000, n);
            setup.word(large + 0x20_0000 + n * 0x1000, 0x10 + n);
            setup.map(SPACE, base + n * 0x1000, large + n * 0x1000, DATA);
        }
        // What leads to the table is what becomes a large page.
        let entry = setup.entry(SPACE, base, 21);
        let mut a = program(|a| {
            load(a, r12, base + 0x1000)?;
            load(a, r13, base + 0x2000)?;
            // The same pages.
            call(a, Call::Store(entry, large | DATA | ACCESSED | DIRTY | 1 << 7));
            call(a, Call::SetCr3(SPACE));
            load(a, r12, base + 0x1000)?;
            load(a, r13, base + 0x2000)?;
            call(a, Call::Store(entry, (large + 0x20_0000) | DATA | 1 << 7));
            call(a, Call::Invalidate(base + 0x3000));
            load(a, r14, base + 0x1000)?;
            load(a, r15, base + 0x2000)
        });
        setup.program(&mut a);
    });
    let registers = &run.registers;
    assert_eq!([registers.r12, registers.r13, registers.r14, registers.r15], [1, 2, 0x11, 0x12]);
}

#[test]
fn bits_that_the_kernel_clears_are_set_again() {
    let run = same_on_all(|setup| {
        number_pages(setup);
        let entry = setup.map(SPACE, PLACE, page(1), DATA);
        let mut a = program(|a| {
            store(a, PLACE, 1)?;
            call(a, Call::Store(entry, page(1) | DATA));
            call(a, Call::SetCr3(SPACE));
            load(a, r12, PLACE)?;
            load(a, r12, PLACE)?;
            call(a, Call::Load(entry));
            a.mov(r12, rax)?;
            store(a, PLACE, 2)?;
            call(a, Call::Load(entry));
            a.mov(r13, rax)?;
            call(a, Call::Store(entry, page(1) | DATA));
            call(a, Call::Invalidate(PLACE));
            store(a, PLACE, 3)?;
            call(a, Call::Load(entry));
            a.mov(r14, rax)
        });
        setup.program(&mut a);
    });
    let registers = &run.registers;
    let both = ACCESSED | DIRTY;
    assert_eq!(
        [registers.r12, registers.r13, registers.r14].map(|entry| entry & both),
        [ACCESSED, both, both]
    );
}

#[test]
fn where_instructions_are_counted_accessed_bits_are_those_of_the_interpreter() {
    let prepare = |setup: &mut Setup| {
        number_pages(setup);
        let entry = setup.map(SPACE, PLACE, page(1), DATA);
        setup.map(SPACE, RIVAL, page(2), DATA);
        setup.map(OTHER_SPACE, PLACE, page(3), DATA);
        let look = |a: &mut CodeAssembler, to| {
            call(a, Call::Load(entry));
            a.mov(to, rax)
        };
        let mut a = program(|a| {
            // The TLB forgets the page, but not because anything was flushed.
            store(a, PLACE, 1)?;
            load(a, r12, RIVAL)?;
            call(a, Call::Store(entry, page(1) | DATA | DIRTY));
            load(a, r12, PLACE)?;
            look(a, r12)?;
            // It does not forget it.
            call(a, Call::Store(entry, page(1) | DATA));
            load(a, r13, PLACE)?;
            look(a, r13)?;
            store(a, PLACE, 1)?;
            // It forgets it with the address space.
            call(a, Call::SetCr3(OTHER_SPACE));
            load(a, r14, PLACE)?;
            call(a, Call::Store(entry, page(1) | DATA | ACCESSED | DIRTY));
            call(a, Call::SetCr3(SPACE));
            load(a, r14, RIVAL)?;
            call(a, Call::Store(entry, page(1) | DATA | DIRTY));
            load(a, r14, PLACE)?;
            look(a, r14)?;
            call(a, Call::Tell(0));
            call(a, Call::Store(entry, page(1) | DATA));
            load(a, r15, PLACE)?;
            look(a, r15)
        });
        setup.program(&mut a);
    };
    // What the host does with the log is nothing that the program can see.
    let told = |setup: &mut Setup, _| {
        let log = setup.vm.dirty_log().unwrap();
        log.harvest(&setup.ram, &mut PageBitmap::for_region(&setup.ram)).unwrap();
    };
    let runs = [Tier::Interpreter, Tier::Translator(true), Tier::Window(true)]
        .map(|tier| run_on(tier, &prepare, &told));
    assert!(runs[2].count("window-pages-mapped") > 3);
    let seen = runs.each_ref().map(|run| {
        let registers = &run.registers;
        [registers.r12, registers.r13, registers.r14, registers.r15].map(|entry| entry & (ACCESSED | DIRTY))
    });
    assert_eq!(seen[0], [ACCESSED | DIRTY, 0, ACCESSED | DIRTY, 0]);
    assert_eq!((seen[1], seen[2]), (seen[0], seen[0]));
}

#[test]
fn code_that_a_program_writes_is_executed() {
    const FUNCTION: u64 = 0x7000_0000_0000;
    let run = same_on_all(|setup| {
        setup.map(SPACE, FUNCTION, page(1), DATA);
        setup.map(SPACE, PLACE, page(1), DATA);
        // MOV EAX, 1; RET.
        setup.write(page(1), &[0xb8, 1, 0, 0, 0, 0xc3]);
        let mut a = program(|a| {
            a.xor(r12d, r12d)?;
            for value in 2..6 {
                // By both of its addresses, one of which may have been written before it was code.
                let at = if value & 1 == 0 { FUNCTION } else { PLACE };
                a.mov(rbx, at)?;
                a.mov(byte_ptr(rbx + 0x800), value)?;
                a.mov(rdx, FUNCTION)?;
                a.call(rdx)?;
                a.shl(r12, 8)?;
                a.or(r12, rax)?;
                a.mov(byte_ptr(rbx + 1), value)?;
                a.call(rdx)?;
                a.shl(r12, 8)?;
                a.or(r12, rax)?;
            }
            Ok(())
        });
        setup.program(&mut a);
    });
    assert_eq!(run.registers.r12, 0x0102_0203_0304_0405);
}

#[test]
fn code_that_a_program_writes_all_the_time_is_executed() {
    const FUNCTION: u64 = 0x7000_0000_0000;
    const TIMES: u64 = 5000;
    let run = same_on_all(|setup| {
        setup.map(SPACE, FUNCTION, page(1), DATA);
        setup.map(SPACE, PLACE, page(1), DATA);
        // MOV of CL to the immediate of the next instruction; MOV EAX, 0; ADD EAX, 0; RET.
        let code = [0x88, 0x0d, 1, 0, 0, 0, 0xb8, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0xc3];
        setup.write(page(1) + 0x100, &code);
        let mut a = program(|a| {
            a.mov(rbx, FUNCTION + 0x100)?;
            a.mov(rsi, PLACE + 0x100)?;
            a.mov(rdx, rbx)?;
            a.mov(ecx, TIMES as u32)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            // The immediate of ADD, by both addresses in turn.
            a.mov(byte_ptr(rbx + 12), cl)?;
            a.inc(qword_ptr(rsi + 0x800))?;
            a.call(rdx)?;
            a.add(r12, rax)?;
            a.xchg(rbx, rsi)?;
            a.dec(ecx)?;
            a.jne(again)
        });
        setup.program(&mut a);
    });
    let sum = (1..=TIMES).map(|n| 2 * (n & 0xff)).sum::<u64>();
    assert_eq!((run.registers.r12, run.setup.read(page(1) + 0x900)), (sum, TIMES));
}

#[test]
fn a_dirty_log_sees_what_a_window_writes() {
    let run = same_with(
        |setup| {
            for n in 1..5 {
                setup.map(SPACE, PLACE + n * 0x1000, page(n), DATA);
            }
            let mut a = program(|a| {
                store(a, PLACE + 0x1000, 1)?;
                store(a, PLACE + 0x2000, 1)?;
                load(a, r12, PLACE + 0x3000)?;
                call(a, Call::Tell(0));
                store(a, PLACE + 0x2000, 2)?;
                store(a, PLACE + 0x3000, 2)?;
                store(a, PLACE + 0x3000, 3)?;
                load(a, r12, PLACE + 0x1000)?;
                call(a, Call::Tell(2));
                store(a, PLACE + 0x3000, 4)?;
                store(a, PLACE + 0x4000, 4)?;
                call(a, Call::Tell(3));
                call(a, Call::Tell(1));
                store(a, PLACE + 0x1000, 5)
            });
            setup.program(&mut a);
        },
        |setup, what| {
            let log = setup.vm.dirty_log().unwrap();
            match what {
                0 => log.start(GuestAddress(0)).unwrap(),
                1 => log.stop(GuestAddress(0)).unwrap(),
                _ => {
                    let mut pages = PageBitmap::for_region(&setup.ram);
                    log.harvest(&setup.ram, &mut pages).unwrap();
                    let written: Vec<_> = (1..5).filter(|n| pages.contains(page(*n) >> 12)).collect();
                    let expected: &[u64] = if what == 2 { &[2, 3] } else { &[3, 4] };
                    assert_eq!(written, expected, "{:?}", setup.tier);
                }
            }
        },
    );
    assert_eq!([1, 2, 3, 4].map(|n| run.setup.read(page(n))), [5, 2, 4, 4]);
}

#[test]
fn a_region_that_is_taken_away_is_gone() {
    let run = same_with(
        |setup| {
            setup.add_extra();
            setup.extra.as_ref().unwrap().write_slice(&[0x77; 8], MemoryRegionAddress(0x1000)).unwrap();
            setup.map(SPACE, PLACE, EXTRA + 0x1000, DATA);
            let mut a = program(|a| {
                load(a, r12, PLACE)?;
                store(a, PLACE + 8, 1)?;
                call(a, Call::Tell(0));
                // It is a device's now.
                load(a, r13, PLACE)?;
                store(a, PLACE + 8, 2)?;
                load(a, r13, PLACE)?;
                call(a, Call::Tell(1));
                load(a, r14, PLACE + 8)?;
                store(a, PLACE + 8, 3)?;
                call(a, Call::Tell(0));
                call(a, Call::Tell(2));
                load(a, r15, PLACE + 8)?;
                // That the guest may not write.
                store(a, PLACE + 8, 4)?;
                load(a, r8, PLACE + 8)
            });
            setup.program(&mut a);
        },
        |setup, what| {
            let extra = setup.extra.clone().unwrap();
            match what {
                0 => drop(setup.vm.unmap_memory(GuestAddress(EXTRA)).unwrap()),
                1 => setup.vm.map_memory(extra, GuestAccess::ReadWrite).unwrap(),
                _ => setup.vm.map_memory(extra, GuestAccess::ReadOnly).unwrap(),
            }
        },
    );
    let registers = &run.registers;
    assert_eq!(registers.r12, 0x7777_7777_7777_7777);
    assert_eq!([registers.r13, registers.r14, registers.r15, registers.r8], [0, 1, 3, 3]);
}

#[test]
fn a_data_breakpoint_is_hit() {
    let run = same_on_all(|setup| {
        number_pages(setup);
        setup.map(SPACE, PLACE, page(1), DATA);
        setup.answer(Answer::default());
        let mut a = program(|a| {
            store(a, PLACE, 1)?;
            store(a, PLACE, 2)?;
            call(a, Call::Watch(PLACE, 0xd_0401));
            store(a, PLACE, 3)?;
            call(a, Call::Watch(PLACE, 0x400));
            store(a, PLACE, 4)?;
            store(a, PLACE, 5)
        });
        setup.program(&mut a);
    });
    assert_eq!((run.events.len(), run.events[0].vector, run.setup.read(page(1))), (1, 1, 5));
}

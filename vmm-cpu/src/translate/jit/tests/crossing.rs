//! Instructions that begin in one page and end in the next.

use iced_x86::code_asm::{byte_ptr, cr2, qword_ptr, r8, r9, rbp, rbx, rcx, rsp};

use super::*;
use crate::translate::cpu::{RAX, RBP, RBX};
use crate::translate::exception::vector;
use crate::translate::test_support::CODE_64;

/// The page with the first bytes.
const FIRST: u64 = FREE;
/// The page with the others.
const SECOND: u64 = FREE + PAGE;
/// A frame that is mapped there at times.
const OTHER_FRAME: u64 = FREE + 2 * PAGE;
/// The instruction that crosses: ADD RAX, 1, with one byte of the immediate in the first page.
const CROSSING: u64 = SECOND - 3;
/// INC RBX, JMP there: with the flags in the processor.
const FUNCTION: u64 = CROSSING - 12;
/// INC RBX, MOV RDX, [RSP], and on to there: with the flags saved.
const SAVING: u64 = CROSSING - 7;
const HANDLER: u64 = 0x9000;

fn put_functions(vcpu: &mut Vcpu) {
    vcpu.put_bytes(FUNCTION, &[0x48, 0xff, 0xc3, 0xeb, 7]);
    vcpu.put_bytes(SAVING, &[0x48, 0xff, 0xc3, 0x48, 0x8b, 0x14, 0x24]);
    // And RET.
    vcpu.put_bytes(CROSSING, &[0x48, 0x05, 1, 0, 0, 0, 0xc3]);
    // Plus 0x100, RET.
    vcpu.put_bytes(OTHER_FRAME, &[1, 0, 0, 0xc3]);
}

/// A loop of `count` rounds in which RCX counts down.
fn repeated(
    a: &mut CodeAssembler,
    count: u64,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Result<(), iced_x86::IcedError> {
    let mut again = a.create_label();
    a.mov(rcx, count)?;
    a.set_label(&mut again)?;
    body(a)?;
    a.dec(rcx)?;
    a.jnz(again)
}

#[test]
fn are_translated_and_reached_from_everywhere() {
    on_all(|mut vcpu| {
        put_functions(&mut vcpu);
        // From the page before its own, through a pointer, and by falling into it.
        vcpu.put(MAIN, |a| {
            a.mov(r8, CROSSING)?;
            repeated(a, 1000, |a| {
                a.call(FUNCTION)?;
                a.call(SAVING)?;
                a.call(CROSSING)?;
                a.call(r8)
            })?;
            a.hlt()
        });
        vcpu.run();
        assert_eq!((vcpu.register(RAX), vcpu.register(RBX)), (4000, 2000));
        if vcpu.counts_translated() {
            let interpreted = vcpu.guest.core.instructions - vcpu.figure("translated-instructions");
            assert!(interpreted < 200, "{interpreted} of {}", vcpu.guest.core.instructions);
        }
    });
}

#[test]
fn what_the_second_page_is_mapped_to_counts() {
    for both in [false, true] {
        on_all(|mut vcpu| {
            put_functions(&mut vcpu);
            vcpu.put(MAIN, |a| {
                a.mov(r8, entry(SECOND))?;
                a.mov(r9, CROSSING)?;
                repeated(a, 20, |a| {
                    for (frame, first) in [(SECOND, FUNCTION), (OTHER_FRAME, SAVING)] {
                        a.mov(qword_ptr(r8), i32::try_from(frame | 7).unwrap())?;
                        if both {
                            a.invlpg(qword_ptr(FIRST))?;
                        }
                        a.invlpg(qword_ptr(SECOND))?;
                        a.call(first)?;
                        for _ in 0..3 {
                            a.call(FUNCTION)?;
                            a.call(SAVING)?;
                            a.call(CROSSING)?;
                            a.call(r9)?;
                        }
                    }
                    Ok(())
                })?;
                a.hlt()
            });
            vcpu.run();
            assert_eq!((vcpu.register(RAX), vcpu.register(RBX)), (20 * 13 * (1 + 0x101), 20 * 14));
        });
    }
}

#[test]
fn a_second_page_that_is_gone_faults_at_its_start() {
    for both in [false, true] {
        on_all(|mut vcpu| {
            put_functions(&mut vcpu);
            vcpu.guest.gate(vector::PF, CODE_64, HANDLER, 0x8e, 0);
            // R8 counts faults, R9 is the address, RBP where the instruction was.
            vcpu.put(HANDLER, |a| {
                a.inc(r8)?;
                a.mov(r9, cr2)?;
                a.mov(rbp, qword_ptr(rsp + 8))?;
                a.or(qword_ptr(entry(SECOND)), 1)?;
                a.add(rsp, 8)?;
                a.iretq()
            });
            // A function of the first page alone.
            vcpu.put(FIRST, |a| a.ret());
            vcpu.put(MAIN, |a| {
                repeated(a, 30, |a| {
                    a.and(qword_ptr(entry(SECOND)), -2)?;
                    if both {
                        a.invlpg(qword_ptr(FIRST))?;
                    }
                    a.invlpg(qword_ptr(SECOND))?;
                    a.call(FIRST)?;
                    a.call(FUNCTION)?;
                    a.call(SAVING)
                })?;
                a.hlt()
            });
            vcpu.run();
            assert_eq!((vcpu.register(RAX), vcpu.register(RBX), vcpu.register(8)), (60, 60, 30));
            assert_eq!((vcpu.register(9), vcpu.register(RBP)), (SECOND, CROSSING));
        });
    }
}

#[test]
fn stores_to_either_part_are_seen_at_once() {
    on_all(|mut vcpu| {
        put_functions(&mut vcpu);
        // The immediate's first byte, in the first page, and its second, in the second page, count up.
        vcpu.put(MAIN, |a| {
            repeated(a, 20, |a| {
                a.call(FUNCTION)?;
                a.inc(byte_ptr(CROSSING + 2))?;
                a.call(SAVING)?;
                a.inc(byte_ptr(SECOND))
            })?;
            a.hlt()
        });
        vcpu.run();
        let expected: u64 = (0..20).map(|n| (n << 8) + n + 1 + (n << 8) + n + 2).sum();
        assert_eq!((vcpu.register(RAX), vcpu.register(RBX)), (expected, 40));
    });
}

#[test]
fn stores_beside_them_leave_them_translated() {
    let options = TranslateOptions::default().translate_after(Some(0));
    let mut vcpu = Vcpu::new(options, ClockSource::Deterministic);
    put_functions(&mut vcpu);
    vcpu.put(MAIN, |a| {
        repeated(a, 1000, |a| {
            a.call(FUNCTION)?;
            a.mov(qword_ptr(SECOND + 16), rbx)
        })?;
        a.hlt()
    });
    vcpu.run();
    assert_eq!(vcpu.register(RAX), 1000);
    assert!(vcpu.figure("translations") < 20, "{}", vcpu.figure("translations"));
}

/// What devices and the VMM write is seen when the vCPU is run again.
#[test]
fn writes_of_others_are_seen_when_the_pages_are_taken_up() {
    on_all(|mut vcpu| {
        put_functions(&mut vcpu);
        vcpu.put(MAIN, |a| {
            repeated(a, 5, |a| {
                // Of both pages, before the instruction that crosses is looked for.
                a.call(SECOND + 3)?;
                a.call(FUNCTION)?;
                a.call(SAVING)
            })?;
            a.hlt()
        });
        let mut expected = 0;
        for (at, byte, sum) in [(SECOND, 0, 1), (SECOND, 1, 0x101), (CROSSING + 2, 7, 0x107), (SECOND, 0, 7)]
        {
            vcpu.put_bytes(at, &[byte]);
            vcpu.run();
            expected += 10 * sum;
            assert_eq!(vcpu.register(RAX), expected);
        }
    });
}

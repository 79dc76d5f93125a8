//! Accesses that fault: the program's registers and flags are those before the instruction, whatever it is and wherever
//! its access leads.
#![allow(unsafe_code, reason = "memory is mapped where the window ends")]

use iced_x86::code_asm::*;

use crate::machine::{
    Answer, CODE, Call, DATA, Emit, PRESENT, SPACE, STACK, Setup, Tier, USER, WRITABLE, call, page,
    same_on_all, same_with,
};

/// Bytes of code for each instruction under test.
const SLOT: u64 = 0x100;
/// Where code is that ends a slot, and which branches find in memory.
const LANDING: u64 = CODE + 0x3_f000;
/// Where a page that lies elsewhere too can always be written.
const ALIAS: u64 = 0x5555_0000_0000;
/// What RDI points to.
const ELSEWHERE: u64 = ALIAS + 0x2800;

/// Instructions whose operand is where RBX, RSP or RBP points to; RSP is 8 more, since most go down first.
const INSTRUCTIONS: &[(&str, Emit)] = &[
    ("mov rax, m", |a| a.mov(rax, qword_ptr(rbx))),
    ("mov r10, m", |a| a.mov(r10, qword_ptr(rbx))),
    ("mov r15d, m", |a| a.mov(r15d, dword_ptr(rbx))),
    ("mov m, rcx", |a| a.mov(qword_ptr(rbx), rcx)),
    ("mov m, r11", |a| a.mov(qword_ptr(rbx), r11)),
    ("mov m, imm", |a| a.mov(qword_ptr(rbx), 0x1234)),
    ("mov with index", |a| a.mov(rdx, qword_ptr(rbx + rcx - 3))),
    ("mov with index in memory", |a| a.mov(qword_ptr(rbx + r10 * 2 - 20), r11)),
    ("movzx", |a| a.movzx(r10d, byte_ptr(rbx))),
    ("movsxd", |a| a.movsxd(rsi, dword_ptr(rbx))),
    ("add m, rdx", |a| a.add(qword_ptr(rbx), rdx)),
    ("lock add m, rdx", |a| a.lock().add(qword_ptr(rbx), rdx)),
    ("adc m, r10", |a| a.adc(qword_ptr(rbx), r10)),
    ("adc r10, m", |a| a.adc(r10, qword_ptr(rbx))),
    ("sbb m, imm", |a| a.sbb(dword_ptr(rbx), 7)),
    ("cmp m, imm", |a| a.cmp(byte_ptr(rbx), 7)),
    ("test m, r15", |a| a.test(qword_ptr(rbx), r15)),
    ("inc m", |a| a.inc(qword_ptr(rbx))),
    ("lock dec m", |a| a.lock().dec(word_ptr(rbx))),
    ("neg m", |a| a.neg(qword_ptr(rbx))),
    ("not m", |a| a.not(qword_ptr(rbx))),
    ("xadd m, rdx", |a| a.xadd(qword_ptr(rbx), rdx)),
    ("lock xadd m, r10", |a| a.lock().xadd(qword_ptr(rbx), r10)),
    ("xchg m, r15", |a| a.xchg(qword_ptr(rbx), r15)),
    ("xchg m, ecx", |a| a.xchg(dword_ptr(rbx), ecx)),
    ("cmpxchg", |a| a.cmpxchg(qword_ptr(rbx), rdx)),
    ("lock cmpxchg m, r10", |a| a.lock().cmpxchg(qword_ptr(rbx), r10)),
    ("cmpxchg8b", |a| a.cmpxchg8b(qword_ptr(rbx))),
    ("cmpxchg16b", |a| a.lock().cmpxchg16b(xmmword_ptr(rbx))),
    ("bts m, imm", |a| a.bts(qword_ptr(rbx), 5)),
    ("bt m, rcx", |a| a.bt(qword_ptr(rbx), rcx)),
    ("btc m, rcx", |a| a.btc(qword_ptr(rbx), rcx)),
    ("bsf", |a| a.bsf(r10, qword_ptr(rbx))),
    ("shl m, 3", |a| a.shl(qword_ptr(rbx), 3)),
    ("shl m, cl", |a| a.shl(qword_ptr(rbx), cl)),
    ("rcl m, 1", |a| a.rcl(qword_ptr(rbx), 1)),
    ("shld m, r10, 4", |a| a.shld(qword_ptr(rbx), r10, 4)),
    ("setc m", |a| a.setc(byte_ptr(rbx))),
    ("cmovo rdx, m", |a| a.cmovo(rdx, qword_ptr(rbx))),
    ("cmovc r11, m", |a| a.cmovc(r11, qword_ptr(rbx))),
    ("imul rdx, m", |a| a.imul_2(rdx, qword_ptr(rbx))),
    ("imul r10, m, imm", |a| a.imul_3(r10, qword_ptr(rbx), 7)),
    ("mul m", |a| a.mul(qword_ptr(rbx))),
    ("div m", |a| a.div(qword_ptr(rbx))),
    ("idiv m", |a| a.idiv(dword_ptr(rbx))),
    ("add ah, m", |a| a.add(ah, byte_ptr(rbx))),
    ("mov m, ch", |a| a.mov(byte_ptr(rbx), ch)),
    ("push rdx", |a| a.push(rdx)),
    ("push r10", |a| a.push(r10)),
    ("push rsp", |a| a.push(rsp)),
    ("push imm", |a| a.push(-5)),
    ("push m", |a| a.push(qword_ptr(rbx))),
    ("push other", |a| a.push(qword_ptr(rdi))),
    ("push m, elsewhere", |a| {
        a.mov(rsp, rdi)?;
        a.push(qword_ptr(rbx))
    }),
    ("pushfq", |a| a.pushfq()),
    ("pop rdx", |a| a.pop(rdx)),
    ("pop r10", |a| a.pop(r10)),
    ("pop rsp", |a| a.pop(rsp)),
    ("pop m", |a| a.pop(qword_ptr(rbx))),
    ("popfq", |a| a.popfq()),
    ("leave", |a| a.leave()),
    ("enter", |a| a.enter(16, 0)),
    ("call", |a| a.call(LANDING)),
    ("call r10", |a| {
        a.mov(r10, LANDING)?;
        a.call(r10)
    }),
    ("call m", |a| a.call(qword_ptr(rbx))),
    ("call m, stack elsewhere", |a| {
        a.lea(rsp, ptr(rdi + 0x80))?;
        a.call(qword_ptr(rbx))
    }),
    ("call elsewhere", |a| a.call(qword_ptr(rdi))),
    ("jmp m", |a| a.jmp(qword_ptr(rbx))),
    ("ret", |a| a.ret()),
    ("ret 16", |a| a.ret_1(16)),
    ("movaps", |a| a.movaps(xmm0, xmmword_ptr(rbx))),
    ("movaps m", |a| a.movaps(xmmword_ptr(rbx), xmm1)),
    ("movups", |a| a.movups(xmm0, xmmword_ptr(rbx))),
    ("movups m", |a| a.movups(xmmword_ptr(rbx), xmm1)),
    ("paddd", |a| a.paddd(xmm0, xmmword_ptr(rbx))),
    ("addsd", |a| a.addsd(xmm0, qword_ptr(rbx))),
    ("ucomisd", |a| a.ucomisd(xmm0, qword_ptr(rbx))),
    ("cvtsi2sd", |a| a.cvtsi2sd(xmm0, qword_ptr(rbx))),
    ("cvttsd2si", |a| a.cvttsd2si(r10, qword_ptr(rbx))),
    ("movd m", |a| a.movd(dword_ptr(rbx), xmm1)),
    ("movhps m", |a| a.movhps(qword_ptr(rbx), xmm1)),
    ("movnti", |a| a.movnti(qword_ptr(rbx), r11)),
    ("popcnt", |a| a.popcnt(r10, qword_ptr(rbx))),
    ("rep movsb", |a| {
        a.mov(rsi, rdi)?;
        a.mov(rdi, rbx)?;
        a.rep().movsb()
    }),
    ("rep stosq", |a| {
        a.mov(rdi, rbx)?;
        a.rep().stosq()
    }),
    ("lodsb", |a| {
        a.mov(rsi, rbx)?;
        a.lodsb()
    }),
    ("two in a row", |a| {
        a.mov(rdx, qword_ptr(rdi))?;
        a.add(rdx, qword_ptr(rbx))
    }),
    ("behind a store", |a| {
        a.add(qword_ptr(rdi + 8), 1)?;
        a.adc(qword_ptr(rbx), rdx)
    }),
];

/// What comes before the instruction, so that the flags are in the processor alone, in memory alone, and in both.
const PRELUDES: &[Emit] = &[
    |a| {
        a.mov(r8d, 0xff)?;
        a.add(r8b, 1)
    },
    |a| {
        a.mov(r8, i64::MAX)?;
        a.add(r8, 1)
    },
    |a| {
        a.push(0x8d7)?;
        a.popfq()
    },
    |a| {
        a.push(0x8d7)?;
        a.popfq()?;
        a.setc(r8b)
    },
];

fn slot(n: u64, place: u64, prelude: Emit, instruction: Emit) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut emit = || -> Result<(), IcedError> {
        a.mov(rsp, STACK)?;
        a.mov(rdi, ALIAS + (place & 0xfff))?;
        a.mov(rax, LANDING)?;
        for word in [0, 8, 16] {
            a.mov(qword_ptr(rdi + word), rax)?;
        }
        a.mov(rdi, ELSEWHERE)?;
        a.mov(qword_ptr(rdi), rax)?;
        a.mov(rbx, place)?;
        a.mov(eax, 5)?;
        a.mov(ecx, 3)?;
        a.mov(edx, 0)?;
        a.mov(esi, 0x1111)?;
        a.mov(r9d, 0x99)?;
        a.mov(r10d, 10)?;
        a.mov(r11d, 0xb)?;
        a.mov(r12d, 0xc)?;
        a.mov(r15d, 0xf)?;
        a.mov(rbp, rbx)?;
        prelude(&mut a)?;
        a.lea(rsp, ptr(rbx + 8))?;
        instruction(&mut a)?;
        a.ud2()
    };
    emit().unwrap();
    let code = a.assemble(CODE + n * SLOT).unwrap();
    assert!(code.len() as u64 <= SLOT);
    code
}

/// Lets each instruction access `place`, each prelude before it.
fn every_instruction_at(place: u64, map: impl Fn(&mut Setup)) -> Vec<u64> {
    let slots: Vec<_> = INSTRUCTIONS
        .iter()
        .flat_map(|(name, instruction)| PRELUDES.iter().map(move |prelude| (*name, *prelude, *instruction)))
        .collect();
    let run = same_on_all(|setup| {
        map(setup);
        for n in 0..3 {
            setup.map(SPACE, ALIAS + n * 0x1000, page(1 + n), DATA);
        }
        setup.code(LANDING, &[0x0f, 0x0b]);
        for (n, (_, prelude, instruction)) in (0..).zip(&slots) {
            setup.code(CODE + n * SLOT, &slot(n, place, *prelude, *instruction));
            setup.answer(Answer { resume: CODE + (n + 1) * SLOT, ..Answer::default() });
        }
        setup.code(CODE + slots.len() as u64 * SLOT, &[0x0f, 0x0b]);
    });
    assert_eq!(run.events.len(), slots.len() + 1, "an exception for each");
    assert!(run.count("window-faults") > 0);
    run.events.iter().map(|event| event.vector).collect()
}

fn faults(vectors: &[u64], vector: u64) -> usize {
    vectors.iter().filter(|known| **known == vector).count()
}

const PLACE: u64 = 0x1234_5678_0000;

#[test]
fn nothing_is_lost_where_everything_is_allowed() {
    for offset in [0x100, 0x1f8, 0x103, 0x13f] {
        let vectors = every_instruction_at(PLACE + offset, |setup| {
            setup.map(SPACE, PLACE, page(1), DATA);
        });
        assert!(faults(&vectors, 14) == 0 && faults(&vectors, 6) > 200);
    }
}

#[test]
fn nothing_is_lost_in_a_page_fault() {
    for bits in [0, PRESENT | USER, PRESENT | WRITABLE] {
        let vectors = every_instruction_at(PLACE + 0x100, |setup| {
            setup.map(SPACE, PLACE, page(1), bits);
        });
        assert!(faults(&vectors, 14) > 100, "{bits:#x}: {}", faults(&vectors, 14));
    }
}

#[test]
fn nothing_is_lost_in_a_fault_of_the_second_page() {
    for bits in [0, PRESENT | USER, DATA] {
        for offset in [0xffc, 0xff8, 0xfff] {
            let vectors = every_instruction_at(PLACE + offset, |setup| {
                setup.map(SPACE, PLACE, page(1), DATA);
                setup.map(SPACE, PLACE + 0x1000, page(2), bits);
            });
            assert_eq!(faults(&vectors, 14) > 0, bits != DATA, "{bits:#x} {offset:#x}");
        }
    }
}

#[test]
fn nothing_is_lost_where_a_region_ends() {
    for (offset, allowed) in [(0, true), (4, true), (1, false)] {
        let vectors = every_instruction_at(0x1234_ffff_fff8 + offset, |setup| {
            setup.map(SPACE, 0x1234_ffff_f000, page(1), DATA);
            setup.map(SPACE, 0x1235_0000_0000, page(2), if allowed { DATA } else { 0 });
        });
        assert_eq!(faults(&vectors, 14) == 0, allowed);
    }
}

#[test]
fn nothing_is_lost_at_addresses_that_are_none() {
    for place in [0x8000_0000_0000, 0xffff_7fff_ffff_fff0, 0x0001_0000_0040_0000, u64::MAX - 0x1000] {
        let vectors = every_instruction_at(place, |_| {});
        assert!(faults(&vectors, 13) + faults(&vectors, 12) + faults(&vectors, 14) > 100);
    }
    // The last ones.
    every_instruction_at(0x7fff_ffff_eff0, |_| {});
    every_instruction_at(u64::MAX - 7, |_| {});
}

/// Makes sure that there is memory of the host below the largest range of addresses that is kept free, if that is the window.
fn settle_below_window() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let number = |digits: &str| usize::from_str_radix(digits, 16).unwrap();
    let free = maps.lines().filter_map(|line| {
        let (start, rest) = line.split_once('-')?;
        let (end, rest) = rest.split_once(' ')?;
        rest.starts_with("---p").then(|| (number(end) - number(start), number(start)))
    });
    let (_, start) = free.max().unwrap();
    let (len, rights) = (4 << 20, libc::PROT_READ | libc::PROT_WRITE);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let place = std::ptr::without_provenance_mut(start - len);
    // SAFETY: it replaces nothing.
    let memory = unsafe { libc::mmap(place, len, rights, flags, -1, 0) };
    let error = std::io::Error::last_os_error().raw_os_error();
    assert!(memory != libc::MAP_FAILED || error == Some(libc::EEXIST), "nothing lies below the window");
}

#[test]
fn no_displacement_leads_out_of_the_window() {
    let neighbour = 0x1_8000_0000 - 0x20_0000;
    for base in [0x8000_0000_u64, 0x1_0000_0000, neighbour, 0x2345_0000_0000, PLACE] {
        for displacement in [i32::MIN, i32::MIN + 1, -4097, -4096, -4095, 4095, 4096, 4097, i32::MAX] {
            let run = same_with(
                |setup| {
                    setup.map(SPACE, PLACE, page(1), DATA);
                    let mut a = CodeAssembler::new(64).unwrap();
                    a.mov(rdi, PLACE).unwrap();
                    a.mov(rsi, qword_ptr(rdi)).unwrap();
                    call(&mut a, Call::Tell(0));
                    a.mov(rbx, base).unwrap();
                    a.mov(rax, qword_ptr(rbx + displacement)).unwrap();
                    a.ud2().unwrap();
                    setup.program(&mut a);
                },
                |setup, _| {
                    if matches!(setup.tier, Tier::Window(_)) {
                        settle_below_window();
                    }
                },
            );
            let address = base.wrapping_add_signed(displacement.into());
            let expected = if address == PLACE + 4095 { PLACE + 0x1000 } else { address };
            assert_eq!(
                (run.events[0].vector, run.events[0].address),
                (14, expected),
                "{base:#x} {displacement:#x}"
            );
        }
    }
}

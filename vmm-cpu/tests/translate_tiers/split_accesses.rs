//! Accesses that go to two pages, whose frames are not neighbours: one of them absent, not to be accessed, or a device's.

use iced_x86::code_asm::{
    CodeAssembler, al, ax, byte_ptr, dword_ptr, eax, ebx, ecx, edx, qword_ptr, r8, r9, r10, r12, rax, rbp,
    rcx, rdi, rdx, rsi, rsp, tbyte_ptr, word_ptr, xmm0, xmm1, xmmword_ptr,
};

use super::machine::{
    CODE, DATA, Device, MMIO, Machine, PAGE, Ram, STACK, Tier, Trap, WINDOW, entry, on_each_tier_at,
};
use super::program::{Code, Made, assemble, here};

/// Where the second of the two pages begins.
const BORDER: u64 = WINDOW + 0x11 * PAGE;
const FIRST: u64 = CODE + 0x1_0000;
const SECOND: u64 = CODE + 0x1_4000;

fn map_both(ram: &Ram) {
    ram.map(0x10, FIRST | entry::ALL);
    ram.map(0x11, SECOND | entry::ALL);
}

/// An access, with RDI at its first byte, and how many bytes it has. RSI is at [`DATA`], ECX is 1.
struct Access {
    name: &'static str,
    bytes: u64,
    effect: Effect,
    code: fn(&mut CodeAssembler) -> Made,
}

#[derive(Clone, Copy, PartialEq)]
enum Effect {
    Reads,
    Writes,
    /// Writes what is there.
    WritesBack,
}

const fn load(name: &'static str, bytes: u64, code: fn(&mut CodeAssembler) -> Made) -> Access {
    Access { name, bytes, effect: Effect::Reads, code }
}

const fn store(name: &'static str, bytes: u64, code: fn(&mut CodeAssembler) -> Made) -> Access {
    Access { name, bytes, effect: Effect::Writes, code }
}

const fn store_back(name: &'static str, bytes: u64, code: fn(&mut CodeAssembler) -> Made) -> Access {
    Access { name, bytes, effect: Effect::WritesBack, code }
}

const ACCESSES: &[Access] = &[
    load("MOV of a word", 2, |a| a.mov(ax, word_ptr(rdi))),
    load("MOV of a doubleword", 4, |a| a.mov(eax, dword_ptr(rdi))),
    load("MOV of a quadword", 8, |a| a.mov(rax, qword_ptr(rdi))),
    load("ADC", 8, |a| a.adc(rax, qword_ptr(rdi))),
    load("CMP", 4, |a| a.cmp(dword_ptr(rdi), edx)),
    load("MOVZX", 2, |a| a.movzx(eax, word_ptr(rdi))),
    load("IMUL", 8, |a| a.imul_2(rax, qword_ptr(rdi))),
    load("BT of a bit string", 8, |a| a.bt(qword_ptr(rdi), rcx)),
    load("CMOVE", 8, |a| a.cmove(rax, qword_ptr(rdi))),
    load("MOVUPS", 16, |a| a.movups(xmm1, xmmword_ptr(rdi))),
    load("MOVQ", 8, |a| a.movq(xmm1, qword_ptr(rdi))),
    load("FLD", 10, |a| a.fld(tbyte_ptr(rdi))),
    load("POP", 8, |a| {
        a.mov(rsp, rdi)?;
        a.pop(rdx)
    }),
    load("LEAVE", 8, |a| {
        a.mov(rbp, rdi)?;
        a.leave()
    }),
    load("LODSQ", 8, |a| {
        a.mov(rsi, rdi)?;
        a.lodsq()
    }),
    load("REP MOVSQ from there", 8, |a| {
        a.xchg(rsi, rdi)?;
        a.rep().movsq()
    }),
    load("CMPSQ", 8, |a| a.cmpsq()),
    store("MOV of a word", 2, |a| a.mov(word_ptr(rdi), ax)),
    store("MOV of a doubleword", 4, |a| a.mov(dword_ptr(rdi), eax)),
    store("MOV of a quadword", 8, |a| a.mov(qword_ptr(rdi), rax)),
    store("MOV of an immediate", 4, |a| a.mov(dword_ptr(rdi), 0x1234_5678)),
    store("ADC", 8, |a| a.adc(qword_ptr(rdi), rax)),
    store("INC", 4, |a| a.inc(dword_ptr(rdi))),
    store("NEG", 2, |a| a.neg(word_ptr(rdi))),
    store("RCL", 8, |a| a.rcl(qword_ptr(rdi), 3)),
    store("SHLD by CL", 4, |a| a.shld(dword_ptr(rdi), eax, iced_x86::code_asm::cl)),
    store("XCHG", 8, |a| a.xchg(qword_ptr(rdi), rax)),
    store("LOCK XADD", 4, |a| a.lock().xadd(dword_ptr(rdi), eax)),
    store_back("LOCK CMPXCHG", 8, |a| a.lock().cmpxchg(qword_ptr(rdi), rdx)),
    store_back("CMPXCHG8B", 8, |a| a.cmpxchg8b(qword_ptr(rdi))),
    store("BTC of a bit string", 8, |a| a.btc(qword_ptr(rdi), rcx)),
    store("MOVNTI", 8, |a| a.movnti(qword_ptr(rdi), rax)),
    store("MOVUPS", 16, |a| a.movups(xmmword_ptr(rdi), xmm0)),
    store("MOVQ", 8, |a| a.movq(qword_ptr(rdi), xmm0)),
    store("FSTP", 10, |a| {
        a.fld1()?;
        a.fstp(tbyte_ptr(rdi))
    }),
    store("PUSH", 8, |a| {
        a.lea(rsp, iced_x86::code_asm::ptr(rdi + 8))?;
        a.push(rdx)
    }),
    store("PUSHF", 8, |a| {
        a.lea(rsp, iced_x86::code_asm::ptr(rdi + 8))?;
        a.pushfq()
    }),
    store("CALL", 8, |a| {
        let mut next = a.create_label();
        a.lea(rsp, iced_x86::code_asm::ptr(rdi + 8))?;
        a.call(next)?;
        a.set_label(&mut next)?;
        a.nop()
    }),
    store("STOSQ", 8, |a| a.stosq()),
    store("REP STOSD", 4, |a| a.rep().stosd()),
    store("REP MOVSQ to there", 8, |a| a.rep().movsq()),
];

/// Status flags before an access: CF, AF, SF and OF, but not ZF and PF.
const FLAGS: u64 = 0x891;

/// Makes flags, accesses, stores flags and all registers by a trap; in three rounds, with a trap before each.
fn accesses(access: &Access, address: u64) -> Code {
    assemble(CODE, |a| {
        a.mov(r10, 3_u64)?;
        let again = here(a)?;
        a.int(0x80)?;
        // So that the TLB knows what there is to know.
        a.lock().add(byte_ptr(r8), 0)?;
        a.lock().add(byte_ptr(r9), 0)?;
        a.mov(al, byte_ptr(r12))?;
        a.mov(rsp, STACK)?;
        a.mov(rdi, address)?;
        a.mov(rsi, DATA)?;
        a.mov(rdx, 0x8877_6655_4433_2211_u64)?;
        a.xor(r8, r8)?;
        a.mov(r9, r8)?;
        a.mov(r12, r8)?;
        a.mov(rax, 0x0102_0304_8506_0708_u64)?;
        a.mov(ecx, 1)?;
        a.mov(ebx, 0x7fff_ffff)?;
        a.add(ebx, ebx)?;
        a.stc()?;
        (access.code)(a)?;
        a.int(0x81)?;
        a.dec(r10)?;
        a.jne(again)?;
        a.int(0x82)
    })
}

/// Everything that was seen of such a run.
#[derive(Debug, PartialEq)]
struct Seen {
    /// Traps, without those before each round.
    traps: Vec<Trap>,
    device: Device,
    /// Both frames and the data, at the end.
    memory: Vec<u8>,
    vector: Vec<u8>,
}

fn fill(ram: &Ram) {
    let pattern: Vec<u8> = (0..PAGE).map(|at| (at * 7 + 3) as u8).collect();
    ram.write(FIRST, &pattern);
    ram.write(SECOND, &pattern);
    ram.write(DATA, &[0x5a; 64]);
}

fn memory(ram: &Ram) -> Vec<u8> {
    let mut memory = ram.bytes(FIRST, PAGE as usize);
    memory.extend(ram.bytes(SECOND, PAGE as usize));
    memory.extend(ram.bytes(DATA, 64));
    memory
}

/// Runs accesses at `address`; `entries` are what the two pages are in each round, `check` is called with each fault and
/// memory as it is then.
fn run(
    tier: Tier,
    access: &Access,
    address: u64,
    entries: [[u64; 2]; 3],
    check: impl Fn(&Trap, &[u8]),
) -> Seen {
    let mut machine = Machine::new(tier, &accesses(access, address));
    machine.set_xmm0(std::array::from_fn(|n| 0xe0 + n as u8));
    fill(&machine.ram);
    let mut traps = Vec::new();
    let mut round = 0;
    let mut before = memory(&machine.ram);
    let on_trap = |trap: &mut Trap, ram: &Ram| match trap.vector {
        0x80 => {
            let [first, second] = entries[round];
            ram.map(0x10, first);
            ram.map(0x11, second);
            round += 1;
            // The pages, away from what is accessed, or others where they are not to be touched.
            let can = |entry: u64, rights: u64| {
                let rights = if tier.user { rights | entry::USER } else { rights };
                entry & !(PAGE - 1) != MMIO && entry & rights == rights
            };
            let write = entry::PRESENT | entry::WRITABLE;
            trap.general.r8 = if can(first, write) { BORDER - 0x800 } else { DATA + 0x80 };
            trap.general.r9 = if can(second, write) { BORDER + 0x800 } else { DATA + 0x80 };
            let readable = if can(first, write) { second } else { first };
            let page = if can(first, write) { BORDER } else { BORDER - PAGE };
            trap.general.r12 = if can(readable, entry::PRESENT) { page + 0x400 } else { DATA + 0x80 };
            before = memory(ram);
        }
        0x81 => traps.push(*trap),
        0x82 => trap.end(),
        14 => {
            traps.push(*trap);
            check(trap, &before);
            assert!(memory(ram) == before, "something was stored before the fault");
            map_both(ram);
        }
        _ => panic!("{trap:x?}"),
    };
    machine.run_with(on_trap);
    let device = machine.device.clone();
    let vector = machine.vcpu.save().unwrap().xsave.bytes()[..416].to_vec();
    Seen { traps, device, memory: memory(&machine.ram), vector }
}

const BOTH: [u64; 2] = [FIRST | entry::ALL, SECOND | entry::ALL];

#[test]
fn accesses_to_two_frames_are_those_to_one() {
    for access in ACCESSES {
        for (first, user) in (1..access.bytes).flat_map(|first| [(first, false), (first, true)]) {
            let at = BORDER - first;
            let seen =
                on_each_tier_at(user, |tier| run(tier, access, at, [BOTH; 3], |trap, _| panic!("{trap:x?}")));
            assert_eq!(seen.traps.len(), 3, "{}", access.name);
            // The same bytes at an address in one page only: the pattern continues there as it does at the border.
            let pattern = |at: u64| (at * 7 + 3) as u8;
            let changed: Vec<usize> =
                (0..2 * PAGE as usize).filter(|&at| seen.memory[at] != pattern(at as u64 % PAGE)).collect();
            let inside = (PAGE - first) as usize..(PAGE - first + access.bytes) as usize;
            assert!(changed.iter().all(|at| inside.contains(at)), "{} changes {changed:x?}", access.name);
            assert_eq!(
                changed.is_empty(),
                access.effect != Effect::Writes,
                "{}, {first} bytes before",
                access.name
            );
        }
    }
}

#[test]
fn one_of_the_two_pages_faults() {
    const WRITE: u64 = 2;
    const USER: u64 = 4;
    for access in ACCESSES {
        for first in [1, access.bytes - 1] {
            for (page, user) in [(0, false), (1, false), (0, true), (1, true)] {
                let at = BORDER - first;
                let bads = [
                    (0, 0),
                    ([FIRST, SECOND][page] | entry::PRESENT | entry::USER, 1),
                    ([FIRST, SECOND][page] | entry::PRESENT | entry::WRITABLE, 1),
                ];
                for (kind, (bad, error)) in bads.into_iter().enumerate() {
                    let faults =
                        kind == 0 || kind == 1 && access.effect != Effect::Reads || kind == 2 && user;
                    let error = error
                        | if access.effect != Effect::Reads { WRITE } else { 0 }
                        | if user { USER } else { 0 };
                    let mut entries = [BOTH; 3];
                    // Cold the first time, warm the third.
                    entries[0][page] = bad;
                    entries[2][page] = bad;
                    let cr2 = if page == 0 { at } else { BORDER };
                    let what =
                        format!("{}, {first} before the border, page {page}, {kind}, {user}", access.name);
                    let seen = on_each_tier_at(user, |tier| {
                        run(tier, access, at, entries, |trap, _| {
                            assert_eq!((trap.cr2, trap.error), (cr2, error), "{what}");
                            assert_eq!(trap.general.rflags & 0x8d5, FLAGS, "{what}");
                        })
                    });
                    let vectors: Vec<u64> = seen.traps.iter().map(|trap| trap.vector).collect();
                    let expected: &[u64] = if faults { &[14, 0x81, 0x81, 14, 0x81] } else { &[0x81; 3] };
                    assert_eq!(vectors, expected, "{what}");
                }
            }
        }
    }
}

#[test]
fn one_of_the_two_pages_is_a_devices() {
    for access in ACCESSES {
        for first in [1, access.bytes - 1] {
            for (page, user) in [(0, false), (1, true), (0, true), (1, false)] {
                let at = BORDER - first;
                let mut entries = [BOTH; 3];
                entries[0][page] = MMIO | entry::ALL;
                entries[2][page] = MMIO | entry::ALL;
                let seen = on_each_tier_at(user, |tier| {
                    run(tier, access, at, entries, |trap, _| panic!("{trap:x?}"))
                });
                let what = format!("{}, {first} before the border, page {page}", access.name);
                assert!(!seen.device.log.is_empty(), "{what}");
                let mine = if page == 0 {
                    MMIO + PAGE - first..MMIO + PAGE
                } else {
                    MMIO..MMIO + access.bytes - first
                };
                for (gpa, data) in &seen.device.log {
                    assert!(mine.contains(gpa), "{what}: {gpa:#x}");
                    assert!(
                        mine.contains(&(gpa + (data.len() as u64).max(1) - 1)),
                        "{what}: {gpa:#x} {data:x?}"
                    );
                }
            }
        }
    }
}

//! A fault in every kind of access, with status flags that are live: the page absent, read-only or the supervisor's, and an
//! address that is not canonical. Nothing is half done; and once the handler has repaired what was wrong, the instruction
//! comes to what it comes to elsewhere.

use iced_x86::code_asm::{
    ecx, qword_ptr, r8, r9, r10, r11d, r12, r13, r14, r15, rax, rbp, rbx, rdi, rdx, rsi, rsp,
};
use vmm_cpu::state::GeneralRegisters;

use super::accesses::{ACCESSES, Access, NEXT_AT, image};
use super::machine::{
    CODE, DATA, HIGH, Machine, PAGE, Ram, STACK, Tier, Trap, WINDOW, entry, on_each_tier_at,
};
use super::program::{Code, here, labelled};

/// Page of the window with the data, its frame, and where the data begin.
const WINDOW_PAGE: u64 = 5;
const FRAME: u64 = CODE + 0x1_0000;
const OFFSET: u64 = 0x120;
const GOOD: u64 = WINDOW + WINDOW_PAGE * PAGE + OFFSET;
/// Not canonical, as is what is near.
const BAD: u64 = 0x8000_0000_0000 + OFFSET;
/// CF, AF, SF and OF.
const FLAGS: u64 = 0x891;
/// Faults push it.
const RESUME_FLAG: u64 = 1 << 16;

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wrong {
    Absent,
    ReadOnly,
    Supervisors,
    NotCanonical,
}

impl Wrong {
    fn entry(self) -> u64 {
        match self {
            Self::Absent => FRAME & !1,
            Self::ReadOnly => FRAME | entry::PRESENT | entry::USER,
            Self::Supervisors => FRAME | entry::PRESENT | entry::WRITABLE,
            Self::NotCanonical => FRAME | entry::ALL,
        }
    }
}

/// The program: three rounds with a trap before each (0x80), behind the instruction (0x81) and at the end (0x82). Of the
/// instruction and of what follows it the addresses.
fn program(access: &Access, with_it: bool) -> (Code, [u64; 2]) {
    labelled(CODE, |a| {
        a.mov(r15, 3_u64)?;
        let again = here(a)?;
        a.int(0x80)?;
        // So that the TLB knows what may be read.
        a.mov(r13, qword_ptr(r13))?;
        a.cld()?;
        a.mov(rdi, r14)?;
        a.mov(r14, 0_u64)?;
        a.mov(rsp, STACK)?;
        a.mov(rsi, DATA)?;
        a.mov(rax, 0x8182_8384_8586_8788_u64)?;
        a.mov(rbx, 0x0102_0304_0506_0708_u64)?;
        a.mov(rdx, 0x1112_1314_1516_1718_u64)?;
        a.mov(rbp, 0x2122_2324_2526_2728_u64)?;
        a.mov(r8, 0x3132_3334_3536_3738_u64)?;
        a.mov(r9, 0x4142_4344_4546_4748_u64)?;
        a.mov(r10, 0x5152_5354_5556_5758_u64)?;
        a.mov(r12, 0x6162_6364_6566_6768_u64)?;
        a.mov(r13, 0x7172_7374_7576_7778_u64)?;
        a.mov(ecx, 3)?;
        a.mov(r11d, 0x7fff_ffff)?;
        a.add(r11d, r11d)?;
        a.stc()?;
        (access.prepare)(a)?;
        let at = here(a)?;
        if with_it {
            (access.instruction)(a)?;
        }
        a.nop()?;
        let next = here(a)?;
        a.int(0x81)?;
        a.dec(r15)?;
        a.jne(again)?;
        a.int(0x82)?;
        Ok([at, next])
    })
}

fn machine(tier: Tier, code: &Code) -> Machine {
    let mut machine = Machine::new(tier, code);
    machine.set_xmm0(std::array::from_fn(|n| 0x40 + n as u8));
    let mut system = machine.vcpu.system_registers().unwrap();
    (system.fs.base, system.gs.base) = (0x10, 0x10);
    machine.vcpu.set_system_registers(&system).unwrap();
    machine
}

/// Brings memory into its first state.
fn fill(ram: &Ram, next: u64) {
    ram.write(FRAME, &[0xee; PAGE as usize]);
    ram.write(FRAME + OFFSET, &image());
    ram.set_word(FRAME + OFFSET, next);
    ram.write(DATA, &[0x5a; 64]);
    ram.set_word(NEXT_AT, next);
}

fn memory(ram: &Ram) -> Vec<u8> {
    let mut memory = ram.bytes(FRAME, PAGE as usize);
    memory.extend(ram.bytes(DATA, 64));
    memory.extend(ram.bytes(STACK - 128, 128));
    memory
}

/// What a run comes to: the faults, the traps behind the instruction, and memory at each of those with vector registers at
/// the end.
#[derive(Debug, PartialEq)]
struct Seen {
    faults: Vec<Trap>,
    behind: Vec<Trap>,
    memory: Vec<u8>,
}

/// Runs the program, with something wrong in the first and the third round.
fn run(tier: Tier, access: &Access, good: u64, wrong: Option<Wrong>) -> Seen {
    let (code, [_, next]) = program(access, true);
    let mut machine = machine(tier, &code);
    let (mut faults, mut behind, mut seen) = (Vec::new(), Vec::new(), Vec::new());
    let mut round = 0;
    let mut before = Vec::new();
    machine.run_with(|trap, ram| match trap.vector {
        0x80 => {
            let wrong = wrong.filter(|_| round != 1);
            round += 1;
            fill(ram, next);
            before = memory(ram);
            ram.map(WINDOW_PAGE, wrong.map_or(FRAME | entry::ALL, Wrong::entry));
            trap.general.r14 = if wrong == Some(Wrong::NotCanonical) { BAD } else { good };
            trap.general.r13 = if wrong == Some(Wrong::ReadOnly) { good - OFFSET } else { DATA };
        }
        0x81 => {
            // CR2 is that of the last fault, if there was one.
            behind.push(Trap { cr2: 0, ..*trap });
            seen.extend(memory(ram));
        }
        0x82 => trap.end(),
        12..=14 => {
            assert!(memory(ram) == before, "{}: something was stored before the fault", access.name);
            faults.push(*trap);
            ram.map(WINDOW_PAGE, FRAME | entry::ALL);
            repair(&mut trap.general, good);
        }
        _ => panic!("{}: {trap:x?}", access.name),
    });
    seen.extend(&machine.vcpu.save().unwrap().xsave.bytes()[..416]);
    Seen { faults, behind, memory: seen }
}

/// Makes bad addresses good ones.
fn repair(general: &mut GeneralRegisters, good: u64) {
    let g = general;
    for register in [&mut g.rdi, &mut g.rsi, &mut g.rsp, &mut g.rbp, &mut g.rbx, &mut g.r12] {
        let distance = register.wrapping_sub(BAD).cast_signed();
        if distance.abs() < 0x1000 {
            *register = good.wrapping_add_signed(distance);
        }
    }
}

/// Registers right before the instruction.
fn before(access: &Access, address: u64, user: bool) -> GeneralRegisters {
    let (_, [at, next]) = program(access, true);
    let (code, _) = program(access, false);
    let mut machine = machine(Tier::INTERPRETED.at(user), &code);
    let mut before = None;
    machine.run_with(|trap, ram| match trap.vector {
        0x80 => {
            fill(ram, next);
            (trap.general.r13, trap.general.r14) = (DATA, address);
        }
        0x81 => {
            before = Some(GeneralRegisters { rip: at, ..trap.general });
            trap.end();
        }
        _ => panic!("{}: {trap:x?}", access.name),
    });
    before.unwrap()
}

/// How far behind RDI the first byte is that is accessed.
fn distance(access: &Access) -> u64 {
    match access.name {
        "LDMXCSR" => 24,
        "POPF" => 32,
        _ => 0,
    }
}

fn check(access: &Access, good: u64, user: bool, wrong: Wrong) {
    let what = format!("{}, {wrong:?}, {good:#x}, {user}", access.name);
    let undisturbed = on_each_tier_at(user, |tier| run(tier, access, good, None));
    assert!(undisturbed.faults.is_empty() && undisturbed.behind.len() == 3, "{what}: {undisturbed:x?}");
    let seen = on_each_tier_at(user, |tier| run(tier, access, good, Some(wrong)));
    assert_eq!(seen.behind, undisturbed.behind, "{what}");
    assert!(seen.memory == undisturbed.memory, "{what}: memory or vector registers");

    let address = if wrong == Wrong::NotCanonical { BAD } else { good };
    let there = before(access, address, user);
    assert_eq!(there.rflags & 0x8d5, FLAGS, "{what}");
    assert_eq!(seen.faults.len(), 2, "{what}");
    for (fault, round) in seen.faults.iter().zip([3, 1]) {
        let rflags = there.rflags | RESUME_FLAG;
        assert_eq!(fault.general, GeneralRegisters { r15: round, rflags, ..there }, "{what}");
        let error = match wrong {
            Wrong::NotCanonical => 0,
            Wrong::Absent => 0,
            Wrong::ReadOnly | Wrong::Supervisors => 1,
        };
        if wrong == Wrong::NotCanonical {
            let vector = if access.by_stack { 12 } else { 13 };
            assert_eq!((fault.vector, fault.error), (vector, error), "{what}");
        } else {
            let error = error | if access.writes { 2 } else { 0 } | if user { 4 } else { 0 };
            assert_eq!((fault.vector, fault.error), (14, error), "{what}");
            assert_eq!(fault.cr2, good + distance(access), "{what}");
        }
    }
}

fn check_all(user: bool, wrong: Wrong, is_meant: impl Fn(&Access) -> bool) {
    for access in ACCESSES.iter().filter(|access| is_meant(access)) {
        check(access, GOOD, user, wrong);
    }
}

#[test]
fn the_page_is_absent() {
    check_all(false, Wrong::Absent, |_| true);
}

#[test]
fn the_page_is_absent_for_a_user() {
    check_all(true, Wrong::Absent, |_| true);
}

#[test]
fn the_page_is_absent_at_a_high_address() {
    for access in ACCESSES {
        check(access, HIGH + GOOD, false, Wrong::Absent);
    }
}

#[test]
fn the_page_is_read_only() {
    check_all(false, Wrong::ReadOnly, |access| access.writes);
}

#[test]
fn the_page_is_read_only_for_a_user() {
    check_all(true, Wrong::ReadOnly, |access| access.writes);
}

#[test]
fn the_page_is_the_supervisors() {
    check_all(true, Wrong::Supervisors, |_| true);
}

#[test]
fn the_address_is_not_canonical() {
    check_all(false, Wrong::NotCanonical, |_| true);
}

#[test]
fn the_address_is_not_canonical_for_a_user() {
    check_all(true, Wrong::NotCanonical, |_| true);
}

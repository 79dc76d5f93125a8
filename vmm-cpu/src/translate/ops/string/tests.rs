use super::*;
use crate::translate::core::Reason;
use crate::translate::ops::misc::bench::{Bench, CODE, HOLE, Numbers, RAM};

/// A stretch of RAM that random tests work on.
const ARENA: u64 = 0x8_0000;
const ARENA_BYTES: u64 = 0x4000;

fn fault_address(result: Result<u32, Reason>) -> Option<u64> {
    match result {
        Err(Reason::Exception(exception)) => exception.cr2,
        _ => None,
    }
}

/// What the manual says, one byte and one element at a time.
struct Model {
    memory: Vec<u8>,
    width: u64,
    backward: bool,
    rsi: u64,
    rdi: u64,
    rcx: u64,
    rax: u64,
    /// Operands of the last comparison.
    compared: Option<(u64, u64)>,
}

impl Model {
    fn load(&self, address: u64) -> u64 {
        let at = usize::try_from(address - ARENA).unwrap();
        (0..self.width)
            .rev()
            .fold(0, |value, n| value << 8 | u64::from(self.memory[at + usize::try_from(n).unwrap()]))
    }

    fn store(&mut self, address: u64, value: u64) {
        let at = usize::try_from(address - ARENA).unwrap();
        for n in 0..usize::try_from(self.width).unwrap() {
            self.memory[at + n] = value.to_le_bytes()[n];
        }
    }

    fn step(&self, register: u64) -> u64 {
        if self.backward { register - self.width } else { register + self.width }
    }

    /// One iteration of the instruction with that opcode (of its form for bytes).
    fn iterate(&mut self, opcode: u8) {
        let accumulator = self.rax & u64::MAX >> (64 - 8 * self.width);
        match opcode {
            0xa4 => self.store(self.rdi, self.load(self.rsi)),
            0xa6 => self.compared = Some((self.load(self.rsi), self.load(self.rdi))),
            0xaa => self.store(self.rdi, accumulator),
            0xac => {
                let loaded = self.load(self.rsi);
                self.rax = match self.width {
                    1 | 2 => self.rax & u64::MAX << (8 * self.width) | loaded,
                    _ => loaded,
                };
            }
            _ => self.compared = Some((accumulator, self.load(self.rdi))),
        }
        if matches!(opcode, 0xa4 | 0xa6 | 0xac) {
            self.rsi = self.step(self.rsi);
        }
        if !matches!(opcode, 0xac) {
            self.rdi = self.step(self.rdi);
        }
        self.rcx -= 1;
    }
}

/// The bytes of an instruction.
fn code(prefix: u8, opcode: u8, width: u64) -> Vec<u8> {
    let opcode = if width == 1 { opcode } else { opcode + 1 };
    match width {
        2 => vec![0x66, prefix, opcode],
        8 => vec![prefix, 0x48, opcode],
        _ => vec![prefix, opcode],
    }
}

#[test]
fn repetitions_do_what_single_elements_would() {
    let (mut bench, mut numbers) = (Bench::new(64), Numbers(11));
    let opcodes = [0xa4, 0xa4, 0xa6, 0xaa, 0xac, 0xae];
    let mut ended_early = 0;
    for round in 0..3000 {
        let opcode = opcodes[round % opcodes.len()];
        let prefix = if round % 2 == 0 { 0xf3 } else { 0xf2 };
        let width = 1 << (numbers.next() % 4);
        let backward = numbers.next() % 2 == 0;
        // Nearly constant memory, so that comparisons go on for a while.
        let constant = prefix == 0xf3 && matches!(opcode, 0xa6 | 0xae);
        let mut memory: Vec<u8> =
            (0..ARENA_BYTES).map(|n| if constant { 0x55 } else { n.to_le_bytes()[0] ^ 0xaa }).collect();
        for _ in 0..4 {
            let at = usize::try_from(numbers.next() % ARENA_BYTES).unwrap();
            memory[at] = 0x55;
            memory[at / 2] ^= 1;
        }
        let count = match numbers.next() % 4 {
            0 => numbers.next() % 4,
            1 => numbers.next() % 64,
            _ => numbers.next() % (0x1800 / width),
        };
        let span = count * width + 8;
        let place = |n: u64| {
            let low = n % (ARENA_BYTES - span);
            ARENA + if backward { low + span - 8 } else { low }
        };
        let rsi = place(numbers.next());
        let mut rdi = place(numbers.next());
        if numbers.next() % 2 == 0 {
            // Close to each other.
            let near = rsi.wrapping_add(numbers.next() % 80).wrapping_sub(40);
            if (ARENA + if backward { span } else { 0 }..ARENA + ARENA_BYTES - span).contains(&near) {
                rdi = near;
            }
        }
        let rax = 0x5555_5555_5555_5555;
        let mut model = Model { memory, width, backward, rsi, rdi, rcx: count, rax, compared: None };
        bench.poke(ARENA, &model.memory);
        bench.set(&[(RSI, rsi), (RDI, rdi), (RCX, count), (RAX, rax)]);
        let before = bits::FIXED | if backward { bits::DF } else { 0 } | bits::CF;
        bench.core.cpu.flags.set(before);
        while model.rcx != 0 {
            model.iterate(opcode);
            if model.compared.is_some_and(|(a, b)| (a == b) == (prefix == 0xf2)) {
                ended_early += u32::from(model.rcx != 0);
                break;
            }
        }
        let code = code(prefix, opcode, width);
        bench.run_through(&code).unwrap();
        let what = format!("{code:x?} of {count} at {rsi:x}, {rdi:x}, DF {backward}");
        assert_eq!((bench.r(RSI), bench.r(RDI), bench.r(RCX)), (model.rsi, model.rdi, model.rcx), "{what}");
        assert_eq!(bench.r(RAX), model.rax, "{what}");
        assert!(bench.peek(ARENA, model.memory.len()) == model.memory, "{what}");
        let flags = &bench.core.cpu.flags;
        match model.compared {
            Some((a, b)) => assert_eq!((flags.zf(), flags.cf()), (a == b, a < b), "{what}"),
            None => assert_eq!(flags.get(), before, "{what}"),
        }
    }
    assert!(ended_early > 100, "{ended_early}");
}

#[test]
fn a_page_is_moved_in_few_pieces() {
    let mut bench = Bench::new(64);
    bench.set(&[(RSI, 0x8_0000), (RDI, 0x9_0000), (RCX, 0x1000)]);
    assert!(bench.run_through(&[0xf3, 0x48, 0xa5]).unwrap() <= 18);
    bench.set(&[(RDI, 0x9_0000), (RCX, 0x8000)]);
    assert!(bench.run_through(&[0xf3, 0xaa]).unwrap() <= 18);
    // Not in one go: interrupts are looked at.
    bench.set(&[(RDI, 0x9_0000), (RCX, 0x8000)]);
    bench.run(&[0xf3, 0xaa]).unwrap();
    assert!(bench.core.cpu.rip == CODE && bench.r(RCX) >= 0x8000 - 0x1040);
}

#[test]
fn what_the_tlb_has_does_not_count() {
    // MOVSB, STOSW, CMPSB, LODSD, INSB, OUTSW, and how much of a page is left when they begin.
    let codes: [&[u8]; 6] = [
        &[0xf3, 0xa4],
        &[0x66, 0xf3, 0xab],
        &[0xf3, 0xa6],
        &[0xf3, 0xad],
        &[0xf3, 0x6c],
        &[0x66, 0xf3, 0x6f],
    ];
    for code in codes {
        let mut runs = Vec::new();
        for (warm, flushes) in [(false, false), (true, false), (false, true)] {
            let mut bench = Bench::new(64);
            if warm {
                bench.set(&[(RSI, 0x8_0000), (RDI, 0x9_0000), (RCX, 0x3000)]);
                bench.run_through(&[0xf3, 0xa4]).unwrap();
            }
            bench.poke(0x8_0000, &[0; 0x8000]);
            bench.poke(0x9_0000, &[0; 0x8000]);
            bench.devices.log.clear();
            bench.set(&[(RSI, 0x8_0123), (RDI, 0x9_0ff0), (RCX, 0x2345), (RAX, 0), (RDX, 0x1f0)]);
            let mut counted = 0;
            while bench.r(RCX) != 0 {
                counted += u32::from(bench.run(code).is_ok());
                if flushes {
                    bench.core.tlb.flush_all();
                }
            }
            runs.push((counted, bench.devices.log));
        }
        assert!(runs.iter().all(|run| *run == runs[0]), "{code:x?}: {:?}", runs.iter().map(|run| run.0));
        assert!((3..=10).contains(&runs[0].0), "{code:x?}: {}", runs[0].0);
    }
}

#[test]
fn faults_leave_what_is_left() {
    let mut bench = Bench::new(64);
    for (code, width) in [(vec![0xf3, 0xa4], 1), (vec![0xf3, 0x48, 0xa5], 8), (vec![0xf3, 0x48, 0xab], 8)] {
        bench.poke(HOLE - 0x1800, &[0; 0x1800]);
        bench.set(&[(RSI, 0x8_0010), (RDI, HOLE - 0x1800), (RCX, 0x2000 / width), (RAX, u64::MAX)]);
        bench.poke(0x8_0010, &[0xff; 0x2000]);
        assert_eq!(fault_address(bench.run_through(&code)), Some(HOLE), "{code:x?}");
        assert_eq!((bench.r(RDI), bench.r(RCX)), (HOLE, 0x800 / width), "{code:x?}");
        assert_eq!(bench.core.cpu.rip, CODE);
        assert_eq!(bench.peek(HOLE - 0x1800, 0x1800), [0xff; 0x1800], "{code:x?}");
    }
    // Downwards, with an element that reaches into the hole from below.
    bench.core.cpu.flags.set_control(bits::DF, true);
    bench.set(&[(RDI, HOLE + 0x1014), (RCX, 100)]);
    assert_eq!(fault_address(bench.run_through(&[0xf3, 0x48, 0xab])), Some(HOLE + 0xffc));
    assert_eq!((bench.r(RDI), bench.r(RCX)), (HOLE + 0xffc, 97));
    bench.core.cpu.flags.set_control(bits::DF, false);
    // The source faults first.
    bench.set(&[(RSI, HOLE + 8), (RDI, HOLE + 16), (RCX, 1)]);
    assert_eq!(fault_address(bench.run_through(&[0xf3, 0xa4])), Some(HOLE + 8));
    bench.set(&[(RDI, HOLE), (RCX, 1)]);
    assert_eq!(fault_address(bench.run_through(&[0xae])), Some(HOLE));
}

#[test]
fn devices_get_elements() {
    let mut bench = Bench::new(64);
    bench.poke(0x8_0000, &[1, 2, 3, 4, 5, 6]);
    bench.set(&[(RSI, 0x8_0000), (RDI, RAM + 0x10), (RCX, 3)]);
    bench.run_through(&[0x66, 0xf3, 0xa5]).unwrap();
    let log = std::mem::take(&mut bench.devices.log);
    let wanted: Vec<(u64, Vec<u8>)> =
        vec![(RAM + 0x10, vec![1, 2]), (RAM + 0x12, vec![3, 4]), (RAM + 0x14, vec![5, 6])];
    assert_eq!(log, wanted);
    bench.set(&[(RSI, RAM), (RDI, 0x8_0000), (RCX, 2)]);
    bench.run_through(&[0xf3, 0xa5]).unwrap();
    assert_eq!(
        bench.devices.log.iter().map(|(gpa, data)| (*gpa, data.len())).collect::<Vec<_>>(),
        [(RAM, 4), (RAM + 4, 4)]
    );
    assert_eq!(bench.peek(0x8_0000, 8), [0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17]);
}

#[test]
fn single_steps_are_iterations() {
    let mut bench = Bench::new(64);
    for stepping in [true, false] {
        bench.core.debug.single_step = stepping;
        bench.core.cpu.flags.set_control(bits::TF, !stepping);
        bench.set(&[(RDI, 0x8_0000), (RCX, 3)]);
        assert_eq!(bench.run_through(&[0xf3, 0xaa]).unwrap(), 3);
    }
}

#[test]
fn no_iteration_changes_nothing() {
    let mut bench = Bench::new(64);
    let registers = [(RSI, u64::MAX), (RDI, u64::MAX), (RCX, 0xffff_ffff_0000_0000)];
    bench.set(&registers);
    bench.run(&[0x67, 0xf3, 0xa4]).unwrap();
    for (register, value) in registers {
        assert_eq!(bench.r(register), value);
    }
    assert_ne!(bench.core.cpu.rip, CODE);
}

#[test]
fn narrow_addresses_wrap() {
    let mut bench = Bench::new(64);
    bench.poke(0x8_0000, &[7; 16]);
    bench.set(&[(RSI, 0xffff_ffff_0008_0000), (RDI, 0x5555_0000_0009_0000), (RCX, 0xffff_ffff_0000_0010)]);
    bench.run_through(&[0x67, 0xf3, 0xa4]).unwrap();
    assert_eq!((bench.r(RSI), bench.r(RDI), bench.r(RCX)), (0x8_0010, 0x9_0010, 0));
    assert_eq!(bench.peek(0x9_0000, 16), [7; 16]);
    let mut bench = Bench::new(16);
    bench.poke(0xfff0, &[0; 16]);
    bench.set(&[(RDI, 0x1_fff8), (RCX, 0x3_0010), (RAX, 0x99)]);
    bench.run_through(&[0xf3, 0xaa]).unwrap();
    assert_eq!((bench.r(RDI), bench.r(RCX)), (0x1_0008, 0x3_0000));
    assert_eq!((bench.peek(0xfff8, 8), bench.peek(0, 8)), (vec![0x99; 8], vec![0x99; 8]));
    assert_eq!(bench.peek(0x1_0000, 1), [0]);
    // In the middle of a page, too.
    bench.core.cpu.segment_mut(index::ES).base = 0x2_0100;
    bench.set(&[(RDI, 0xfff8), (RCX, 0x10)]);
    bench.run_through(&[0xf3, 0xaa]).unwrap();
    assert_eq!((bench.peek(0x3_00f8, 8), bench.peek(0x2_0100, 8)), (vec![0x99; 8], vec![0x99; 8]));
    assert_eq!(bench.peek(0x3_0100, 1), [0]);
}

#[test]
fn segments_have_bases_and_limits() {
    let mut bench = Bench::new(32);
    bench.core.cpu.segment_mut(index::FS).base = 0x1_0000;
    bench.core.cpu.segment_mut(index::ES).limit = 0x9_000f;
    bench.poke(0x9_0000, &[3; 64]);
    bench.set(&[(RSI, 0x8_0000), (RDI, 0x9_0008), (RCX, 32)]);
    // The eight elements within the limit are moved, the next faults.
    let result = bench.run_through(&[0x64, 0xf3, 0xa4]);
    assert!(matches!(result, Err(Reason::Exception(exception)) if exception.vector == 13));
    assert_eq!((bench.r(RSI), bench.r(RDI), bench.r(RCX)), (0x8_0008, 0x9_0010, 24));
    // An override is for the source only.
    bench.set(&[(RSI, 0x8_0000), (RDI, 0x9_0000), (RCX, 3)]);
    bench.poke(0x9_0000, &[1, 2, 3, 4]);
    bench.poke(0x8_0000, &[9; 4]);
    bench.run_through(&[0x64, 0xf3, 0xa6]).unwrap();
    assert_eq!(bench.r(RCX), 0);
}

#[test]
fn ports_move_whole_runs() {
    let mut bench = Bench::new(64);
    bench.poke(0x8_0000, &[0; 0x2000]);
    bench.set(&[(RDI, 0x8_0ffc), (RCX, 6), (RDX, 0x1f0)]);
    bench.run_through(&[0x66, 0xf3, 0x6d]).unwrap();
    assert_eq!((bench.r(RDI), bench.r(RCX)), (0x8_1008, 0));
    let read: Vec<u8> = bench.devices.log.iter().flat_map(|(_, data)| data.clone()).collect();
    assert_eq!(bench.peek(0x8_0ffc, 12), read);
    assert!(bench.devices.log.iter().all(|(port, data)| *port == 0x1f0 && data.len() % 2 == 0));
    assert!(bench.devices.log.len() < 6, "{:x?}", bench.devices.log);
    bench.devices.log.clear();
    // What cannot be stored is not read.
    bench.set(&[(RDI, HOLE - 1), (RCX, 3)]);
    assert_eq!(fault_address(bench.run_through(&[0xf3, 0x6c])), Some(HOLE));
    assert_eq!((bench.devices.log.len(), bench.r(RDI), bench.r(RCX)), (1, HOLE, 2));
    bench.devices.log.clear();
    bench.set(&[(RDI, HOLE - 1), (RCX, 1)]);
    assert_eq!(fault_address(bench.run_through(&[0x66, 0xf3, 0x6d])), Some(HOLE));
    assert!(bench.devices.log.is_empty());
    bench.poke(0x8_0000, b"string");
    bench.set(&[(RSI, 0x8_0000), (RCX, 6), (RDX, 0xe9)]);
    bench.run_through(&[0xf3, 0x6e]).unwrap();
    let written: Vec<u8> = bench.devices.log.iter().flat_map(|(_, data)| data.clone()).collect();
    assert_eq!((written.as_slice(), bench.r(RSI)), (b"string".as_slice(), 0x8_0006));
    // Downwards.
    bench.devices.log.clear();
    bench.core.cpu.flags.set_control(bits::DF, true);
    bench.set(&[(RSI, 0x8_0005), (RCX, 6)]);
    bench.run_through(&[0xf3, 0x6e]).unwrap();
    let written: Vec<u8> = bench.devices.log.iter().flat_map(|(_, data)| data.clone()).collect();
    assert_eq!(written, b"gnirts");
}

#[test]
fn ports_must_be_permitted_even_for_nothing() {
    let mut bench = Bench::new(64);
    bench.core.mode.cpl = 3;
    // No map of ports.
    bench.core.cpu.tr.limit = 0;
    for code in [[0xf3, 0x6c], [0xf3, 0x6f]] {
        bench.set(&[(RCX, 0), (RSI, ARENA), (RDI, ARENA)]);
        let Err(Reason::Exception(exception)) = bench.run(&code) else { panic!("{code:x?} completed") };
        assert_eq!((exception.vector, exception.error), (13, Some(0)), "{code:x?}");
    }
}

#[test]
fn source_faults_before_the_destination() {
    // 32-bit code in compatibility mode, whose addresses are those of segments and whose pages are those of 64-bit code.
    let mut bench = Bench::new(64);
    bench.core.mode.code_bits = 32;
    for code in [0xa5, 0xa7] {
        bench.set(&[(RSI, HOLE + 8), (RDI, 0xffff_ffff)]);
        assert_eq!(fault_address(bench.run(&[code]).map(|()| 1)), Some(HOLE + 8), "{code:x}");
        bench.set(&[(RSI, HOLE - 2)]);
        assert_eq!(fault_address(bench.run(&[code]).map(|()| 1)), Some(HOLE), "{code:x}");
    }
}

#[test]
fn a_prefix_that_means_nothing_does_not_change_the_exception() {
    use crate::translate::cpu::RSI;
    use crate::translate::exception::vector;
    let mut guest = crate::translate::test_support::Guest::long();
    guest.core.cpu.set_r(RSI, 1 << 62);
    // MOVSB, LODSW, CMPSQ and OUTSD, with the prefix of SS.
    for code in [&[0x36, 0xa4][..], &[0x36, 0x66, 0xad], &[0x36, 0x48, 0xa7], &[0x36, 0x6f]] {
        let exception = guest.fault(code);
        assert_eq!((exception.vector, exception.error), (vector::GP, Some(0)), "{code:x?}");
    }
}

#[test]
fn a_page_at_two_addresses_overlaps_itself() {
    use crate::translate::cpu::{RCX, RDI, RSI};
    const SEEN: u64 = 0x10_0000;
    const ALSO: u64 = 0x1f_0000;
    let mut guest = crate::translate::test_support::Guest::long();
    let table = guest.core.cpu.cr3 + 3 * PAGE;
    guest.write::<8>(table + (ALSO >> 12) * 8, SEEN | 7);
    guest.write::<4>(SEEN, 0x0033_2211);
    for (register, at) in [(RSI, SEEN), (RDI, ALSO)] {
        guest.core.cpu.set_r(register, at);
        // The TLB has both.
        guest.execute(&[0x80, if register == RSI { 0x0e } else { 0x0f }, 0]).unwrap();
    }
    guest.core.cpu.set_r(RDI, ALSO + 3);
    guest.core.cpu.set_r(RCX, 29);
    // REP MOVSB
    guest.execute(&[0xf3, 0xa4]).unwrap();
    let bytes: Vec<u64> = (0..32).map(|n| guest.read::<1>(SEEN + n)).collect();
    assert!(
        bytes.iter().zip([0x11, 0x22, 0x33].iter().cycle()).all(|(one, other)| one == other),
        "{bytes:x?}"
    );
}

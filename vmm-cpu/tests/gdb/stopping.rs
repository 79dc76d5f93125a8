//! Breakpoints, watchpoints, steps, and several vCPUs.

use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::{CodeAssembler, rax, rbx};

use crate::machine::{CODE, DATA, Machine};

const RAX: usize = 0;
const RBX: usize = 1;
const INT3: u8 = 0xcc;

#[test]
fn a_software_breakpoint_stops_and_is_not_seen() {
    let (machine, places) = Machine::looping(1);
    let mut gdb = machine.attach();
    let code = gdb.ask(&format!("m{:x},8", places.call));
    assert_eq!(gdb.ask(&format!("Z0,{:x},1", places.call)), "OK");
    assert_eq!(machine.bytes(places.call), [INT3]);
    assert_eq!(gdb.ask(&format!("m{:x},8", places.call)), code);
    for round in 1..4 {
        assert_eq!(gdb.stop("c"), "T05thread:01;swbreak:;");
        assert_eq!((gdb.rip(), gdb.register(RBX)), (places.call, round));
        // As GDB steps over one.
        assert_eq!(gdb.ask(&format!("z0,{:x},1", places.call)), "OK");
        assert_eq!(gdb.stop("vCont;s:p1.1"), "T05thread:01;");
        assert_eq!(gdb.rip(), places.called);
        assert_eq!(gdb.ask(&format!("Z0,{:x},1", places.call)), "OK");
    }
    // A write beneath keeps the breakpoint, and is there when that goes.
    assert_eq!(gdb.ask(&format!("M{:x},1:90", places.call)), "OK");
    assert_eq!(machine.bytes(places.call), [INT3]);
    assert_eq!(gdb.ask(&format!("m{:x},1", places.call)), "90");
    assert_eq!(gdb.ask(&format!("z0,{:x},1", places.call)), "OK");
    assert_eq!(machine.bytes(places.call), [0x90]);
    assert_eq!(gdb.ask("Z0,10000000,1"), "E16", "where nothing is mapped");
}

#[test]
fn hardware_breakpoints_stop_and_are_few() {
    let (machine, places) = Machine::looping(1);
    let mut gdb = machine.attach();
    for address in [places.store, places.loaded, places.returned, places.called] {
        assert_eq!(gdb.ask(&format!("Z1,{address:x},1")), "OK");
    }
    assert_eq!(gdb.ask("Z1,1234,1"), "E16");
    for address in [places.store, places.loaded, places.called, places.returned] {
        assert_eq!(gdb.stop("c"), "T05thread:01;hwbreak:;");
        assert_eq!(gdb.rip(), address);
        assert_eq!(gdb.ask(&format!("z1,{address:x},1")), "OK");
    }
    assert_eq!(gdb.ask("z1,1234,1"), "E16");
}

#[test]
fn watchpoints_stop_behind_the_access() {
    let (machine, places) = Machine::looping(1);
    let mut gdb = machine.attach();
    assert_eq!(gdb.ask(&format!("Z2,{DATA:x},8")), "OK");
    assert_eq!(gdb.stop("c"), format!("T05thread:01;watch:{DATA:x};").replace("watch:4", "watch:04"));
    assert_eq!((gdb.rip(), machine.word(DATA)), (places.stored, 1));
    assert_eq!(gdb.ask(&format!("z2,{DATA:x},8")), "OK");
    // A load; one that is not aligned takes several of the processor's.
    for (kind, name) in [(4, "awatch"), (3, "rwatch")] {
        let address = DATA + 9;
        assert_eq!(gdb.ask(&format!("Z{kind},{address:x},7")), "OK");
        let stop = gdb.stop("c");
        assert!(stop.starts_with(&format!("T05thread:01;{name}:")) && stop.ends_with("40009;"), "{stop}");
        assert_eq!(gdb.rip(), places.loaded);
        assert_eq!(gdb.ask(&format!("z{kind},{address:x},7")), "OK");
    }
    assert_eq!(gdb.ask(&format!("Z2,{:x},10", DATA + 1)), "E16", "of five parts");
    assert_eq!(gdb.ask("Z2,0,ffffffffffffffff"), "E16");
}

#[test]
fn a_step_moves_one_vcpu_alone_or_lets_others_run() {
    let (machine, places) = Machine::looping(2);
    let mut gdb = machine.attach();
    let other = || machine.with(1, |vcpu| vcpu.registers().unwrap());
    let still = other();
    for (address, count) in [(places.store, 1), (places.stored, 1), (places.loaded, 1)] {
        assert_eq!(gdb.stop("vCont;s:p1.1"), "T05thread:01;");
        assert_eq!((gdb.rip(), gdb.register(RBX)), (address, count));
    }
    assert_eq!(other(), still);
    while other() == still {
        assert_eq!(gdb.stop("vCont;s:p1.1;c"), "T05thread:01;");
    }
    assert_eq!(gdb.stop("vCont;s:p1.2"), "T05thread:02;");
}

/// A guest that takes a while from one breakpoint to the next, so that every vCPU has the time to get there.
fn slow_guest(vcpus: u32) -> (Machine, u64) {
    let mut code = CodeAssembler::new(64).unwrap();
    let mut labels: [_; 3] = std::array::from_fn(|_| code.create_label());
    let [top, spin, place] = &mut labels;
    code.set_label(top).unwrap();
    code.mov(rax, 50_000_u64).unwrap();
    code.set_label(spin).unwrap();
    code.dec(rax).unwrap();
    code.jnz(*spin).unwrap();
    code.set_label(place).unwrap();
    code.inc(rbx).unwrap();
    code.jmp(*top).unwrap();
    let code = code.assemble_options(CODE, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS).unwrap();
    let place = code.label_ip(place).unwrap();
    (Machine::new(vcpus, &code.inner.code_buffer, &[]), place)
}

#[test]
fn every_vcpu_that_stops_is_told() {
    const VCPUS: usize = 3;
    for kind in ["0", "1"] {
        let (machine, place) = slow_guest(VCPUS.try_into().unwrap());
        let mut gdb = machine.attach();
        assert_eq!(gdb.ask(&format!("Z{kind},{place:x},1")), "OK");
        let mut told = [0; VCPUS];
        while told.iter().any(|times| *times < 3) {
            let stop = gdb.stop("vCont;c");
            let thread: usize = stop[10..12].parse().unwrap();
            let reason = if kind == "0" { "swbreak" } else { "hwbreak" };
            assert_eq!(stop, format!("T05thread:0{thread};{reason}:;"));
            told[thread - 1] += 1;
            // The thread that stopped is the one that is looked at, and none was told twice or lost.
            assert_eq!((gdb.rip(), gdb.register(RBX)), (place, told[thread - 1] - 1));
            assert_eq!(gdb.ask(&format!("z{kind},{place:x},1")), "OK");
            assert_eq!(gdb.stop(&format!("vCont;s:p1.{thread}")), format!("T05thread:0{thread};"));
            assert_eq!(gdb.ask(&format!("Z{kind},{place:x},1")), "OK");
        }
    }
}

#[test]
fn an_interrupt_stops_vcpus_that_run() {
    let (machine, places) = Machine::looping(2);
    let mut gdb = machine.attach();
    for _ in 0..3 {
        gdb.send("vCont;c");
        machine.assert_running();
        gdb.send_bytes(&[3]);
        assert_eq!(gdb.receive().unwrap(), "T02thread:01;");
        let rip = gdb.rip();
        assert!((places.top..=places.called + 3).contains(&rip), "{rip:#x}");
        let stopped = machine.word(DATA);
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert_eq!(machine.word(DATA), stopped);
    }
}

#[test]
fn guest_time_stands_still_meanwhile() {
    let (machine, _) = Machine::looping(1);
    let clock = machine.vm.clock().unwrap();
    let mut gdb = machine.attach();
    let stopped = clock.now().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert_eq!(clock.now().unwrap(), stopped);
    gdb.send("c");
    machine.assert_running();
    assert!(clock.now().unwrap() > stopped);
}

/// Counts in RBX, and executes an INT3 of its own, whose handler counts in RAX.
fn guest_with_int3() -> (Machine, [u64; 4]) {
    let mut code = CodeAssembler::new(64).unwrap();
    let mut labels: [_; 4] = std::array::from_fn(|_| code.create_label());
    let [top, int3, behind, handler] = &mut labels;
    code.set_label(top).unwrap();
    code.inc(rbx).unwrap();
    code.set_label(int3).unwrap();
    code.int3().unwrap();
    code.set_label(behind).unwrap();
    code.jmp(*top).unwrap();
    code.set_label(handler).unwrap();
    code.inc(rax).unwrap();
    code.iretq().unwrap();
    let code = code.assemble_options(CODE, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS).unwrap();
    let places = labels.map(|label| code.label_ip(&label).unwrap());
    (Machine::new(1, &code.inner.code_buffer, &[(3, places[3])]), places)
}

#[test]
fn an_int3_of_the_guests_own_is_the_guests() {
    let (machine, [_, int3, behind, handler]) = guest_with_int3();
    let mut gdb = machine.attach();
    // One of the debugger's elsewhere, so that INT3 stops at all.
    assert_eq!(gdb.ask(&format!("Z0,{behind:x},1")), "OK");
    for round in 1..4 {
        assert_eq!(gdb.stop("c"), "T05thread:01;swbreak:;");
        assert_eq!((gdb.rip(), gdb.register(RAX), gdb.register(RBX)), (behind, round, round));
        assert_eq!(gdb.ask(&format!("z0,{behind:x},1")), "OK");
        gdb.stop("vCont;s:p1.1");
        assert_eq!(gdb.ask(&format!("Z0,{behind:x},1")), "OK");
    }
    // A step goes to where the handler begins.
    gdb.stop("vCont;s:p1.1");
    assert_eq!(gdb.rip(), int3);
    assert_eq!(gdb.stop("vCont;s:p1.1"), "T05thread:01;");
    assert_eq!(gdb.rip(), handler);
    // With a breakpoint on it, it is the debugger's first.
    assert_eq!(gdb.ask(&format!("Z0,{int3:x},1")), "OK");
    assert_eq!(gdb.ask(&format!("z0,{behind:x},1")), "OK");
    assert_eq!(gdb.stop("c"), "T05thread:01;swbreak:;");
    assert_eq!(gdb.rip(), int3);
    assert_eq!(gdb.ask(&format!("z0,{int3:x},1")), "OK");
    assert_eq!(machine.bytes(int3), [INT3]);
}

//! Detaching, losing the connection, killing, and machines that end.

use vmm_cpu::gdb::Event;
use vmm_cpu::{Halt, VcpuExit};

use crate::machine::{DATA, Machine};

#[test]
fn a_machine_goes_on_when_the_debugger_detaches_and_can_be_debugged_again() {
    let (machine, places) = Machine::looping(2);
    machine.resume();
    machine.assert_running();
    let code: [u8; 16] = machine.bytes(places.top);
    for round in 0..3 {
        let mut gdb = machine.attach();
        assert_eq!(gdb.ask(&format!("Z0,{:x},1", places.call)), "OK");
        assert_eq!(gdb.ask(&format!("Z1,{:x},1", places.store)), "OK");
        assert!(gdb.stop("c").starts_with("T05thread:0"));
        if round == 1 {
            // Gone without a word.
            drop(gdb);
        } else {
            assert_eq!(gdb.ask("D"), "OK");
            assert!(gdb.is_closed());
        }
        machine.assert_running();
        assert_eq!(machine.bytes(places.top), code);
    }
}

#[test]
fn a_machine_that_waits_for_a_debugger_waits_on_if_one_looks_in() {
    let (machine, _) = Machine::looping(1);
    drop(machine.attach());
    // The next one is served when the first is done with.
    let mut gdb = machine.attach();
    assert_eq!(machine.word(DATA), 0);
    assert!(!machine.threads.is_running());
    assert_eq!(gdb.ask("D;1"), "OK");
    machine.assert_running();
}

#[test]
fn the_vmm_starts_no_machine_that_a_debugger_has_stopped() {
    let (machine, _) = Machine::looping(1);
    let gdb = machine.attach();
    machine.resume();
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert!(!machine.threads.is_running());
    // When that is gone, it runs as the VMM wants.
    drop(gdb);
    machine.assert_running();
}

#[test]
fn the_vmm_is_told_that_the_machine_is_to_end() {
    for (kill, answer) in [("k", None), ("vKill;1", Some("OK"))] {
        let (mut machine, _) = Machine::looping(1);
        let mut gdb = machine.attach();
        gdb.send(kill);
        assert_eq!(gdb.receive().as_deref(), answer);
        assert!(gdb.is_closed());
        assert!(matches!(machine.event(), Event::Killed));
        assert!(!machine.threads.is_running());
        machine.finish(0);
    }
}

#[test]
fn the_debugger_is_told_that_the_machine_has_ended() {
    let (mut machine, _) = Machine::looping(1);
    let mut gdb = machine.attach();
    gdb.send("c");
    machine.assert_running();
    machine.finish(7);
    assert_eq!(gdb.receive().unwrap(), "W07");
    assert!(gdb.is_closed());
    // And one that has it stopped is hung up on.
    let (mut machine, _) = Machine::looping(1);
    let mut gdb = machine.attach();
    machine.finish(0);
    assert!(gdb.is_closed());
}

/// Two bytes that are no instruction, and no handlers: a triple fault.
const UD2: &[u8] = &[0x0f, 0x0b];

#[test]
fn the_debugger_sees_what_ended_a_vcpu_and_then_the_vmm() {
    let machine = Machine::new(1, UD2, &[]);
    let mut gdb = machine.attach();
    assert_eq!(gdb.stop("c"), "T06thread:01;");
    assert!(machine.events.try_recv().is_err());
    gdb.rip();
    gdb.send("c");
    let Event::Exit(VcpuExit { index: 0, reason: Ok(Halt::Shutdown) }) = machine.event() else {
        panic!("another event")
    };
}

#[test]
fn without_a_debugger_the_vmm_hears_at_once() {
    let mut machine = Machine::new(1, UD2, &[]);
    machine.resume();
    assert!(matches!(machine.event(), Event::Exit(VcpuExit { index: 0, reason: Ok(Halt::Shutdown) })));
    // One that comes later finds it as it is; what it leaves behind is told no second time.
    let mut gdb = machine.attach();
    assert_eq!(gdb.ask("D"), "OK");
    machine.finish(0);
}

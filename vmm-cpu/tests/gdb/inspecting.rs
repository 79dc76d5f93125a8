//! Registers, memory, threads, `monitor`.

use crate::client::{hex, unhex};
use crate::machine::{CODE, DATA, Machine, NO_MEMORY, STACK, UNMAPPED, WINDOW, WINDOW_PAGES};

const RBX: usize = 1;
const RSP: usize = 7;
const XMM3: usize = 43;
const FS_BASE: usize = 57;
const CR0: usize = 60;
const CR3: usize = 62;

#[test]
fn registers_are_read_and_written() {
    let (machine, _) = Machine::looping(1);
    let mut gdb = machine.attach();
    assert_eq!((gdb.rip(), gdb.register(RSP), gdb.register(CR3)), (CODE, STACK, 0x1_0000));
    assert_eq!(gdb.ask(&format!("P{RBX:x}=efcdab8967452301")), "OK");
    assert_eq!(gdb.ask(&format!("P{FS_BASE:x}=0010000000000000")), "OK");
    let value: Vec<u8> = (1..=16).collect();
    assert_eq!(gdb.ask(&format!("P{XMM3:x}={}", hex(&value))), "OK");
    assert_eq!(gdb.ask(&format!("p{XMM3:x}")), hex(&value));

    // All at once: the same bytes, with another RAX.
    let mut all = unhex(&gdb.ask("g"));
    assert_eq!(all.len(), 608);
    assert_eq!(all[8 * RBX..8 * RBX + 8], 0x0123_4567_89ab_cdef_u64.to_le_bytes());
    all[0] = 0x77;
    assert_eq!(gdb.ask(&format!("G{}", hex(&all))), "OK");
    assert_eq!(unhex(&gdb.ask("g")), all);

    let state = machine.with(0, |vcpu| vcpu.save().unwrap());
    assert_eq!((state.general.rax, state.general.rbx), (0x77, 0x0123_4567_89ab_cdef));
    assert_eq!(state.system.fs.base, 0x1000);
    assert_eq!(state.xsave.xmm(3).unwrap().to_le_bytes(), *value);
}

#[test]
fn registers_that_no_processor_has_are_refused() {
    let (machine, _) = Machine::looping(1);
    let mut gdb = machine.attach();
    let before = gdb.ask("g");
    // Another code segment, paging without protection, a value of the wrong size, too few registers.
    assert_eq!(gdb.ask("P12=33000000"), "E16");
    assert_eq!(gdb.ask(&format!("P{CR0:x}=0000008000000000")), "E16");
    assert_eq!(gdb.ask(&format!("P{RBX:x}=0000")), "E16");
    assert_eq!(gdb.ask("g"), before);
    assert_eq!(gdb.ask("p42"), "", "there is no register 66");
}

#[test]
fn memory_is_reached_through_the_guests_page_tables() {
    let (machine, _) = Machine::looping(1);
    let mut gdb = machine.attach();
    // Across two pages that do not lie side by side.
    let boundary = WINDOW + 0xffe;
    assert_eq!(gdb.ask(&format!("M{boundary:x},4:01020304")), "OK");
    assert_eq!(machine.bytes(WINDOW_PAGES[0] + 0xffe), [1, 2]);
    assert_eq!(machine.bytes(WINDOW_PAGES[1]), [3, 4]);
    assert_eq!(gdb.ask(&format!("m{boundary:x},4")), "01020304");
    assert_eq!(gdb.ask(&format!("X{boundary:x},2:\u{5}\u{6}")), "OK");
    assert_eq!(machine.bytes(WINDOW_PAGES[0] + 0xffe), [5, 6]);

    // As far as there is something.
    assert_eq!(gdb.ask(&format!("m{:x},10", UNMAPPED - 4)), "00000000");
    for address in [UNMAPPED, NO_MEMORY, 0x1000_0000_0000_0000, u64::MAX] {
        assert_eq!(gdb.ask(&format!("m{address:x},4")), "E0e", "{address:#x}");
        assert_eq!(gdb.ask(&format!("M{address:x},1:00")), "E0e", "{address:#x}");
    }
    // All or nothing.
    assert_eq!(gdb.ask(&format!("M{:x},8:ffffffffffffffff", UNMAPPED - 4)), "E0e");
    assert_eq!(machine.bytes(WINDOW_PAGES[1] + 0xffc), [0; 4]);
}

#[test]
fn code_that_the_debugger_writes_is_what_runs() {
    let (machine, places) = Machine::looping(1);
    let mut gdb = machine.attach();
    assert_eq!(gdb.ask(&format!("Z1,{:x},1", places.called)), "OK");
    gdb.stop("c");
    assert_eq!(gdb.register(RBX), 1);
    assert_eq!(gdb.ask(&format!("z1,{:x},1", places.called)), "OK");
    gdb.stop("vCont;s:p1.1");
    assert_eq!(gdb.ask(&format!("Z1,{:x},1", places.called)), "OK");
    // The block has run, and is kept. Now `inc rbx` becomes `dec rbx`.
    assert_eq!(gdb.ask(&format!("m{:x},3", places.top)), "48ffc3");
    assert_eq!(gdb.ask(&format!("M{:x},3:48ffcb", places.top)), "OK");
    gdb.stop("c");
    assert_eq!(gdb.register(RBX), 0);
}

#[test]
fn vcpus_are_threads() {
    let (machine, _) = Machine::looping(2);
    let mut gdb = machine.attach();
    assert_eq!(gdb.ask("qfThreadInfo"), "m01,02");
    assert_eq!(gdb.ask("qsThreadInfo"), "l");
    assert_eq!((gdb.ask("T1"), gdb.ask("T2")), ("OK".to_owned(), "OK".to_owned()));
    assert_ne!(gdb.ask("T3"), "OK");
    assert_eq!(gdb.ask("Hg2"), "OK");
    assert_eq!(gdb.register(RSP), STACK - 0x1000);
    assert_eq!(gdb.ask(&format!("P{RBX:x}=0900000000000000")), "OK");
    assert_eq!(machine.with(1, |vcpu| vcpu.registers().unwrap().rbx), 9);
    let said = unhex(&gdb.ask("qThreadExtraInfo,2"));
    assert_eq!(String::from_utf8(said).unwrap(), "vCPU 1: Running, privilege level 0");
    assert_eq!(gdb.ask("Hg3"), "OK");
    assert_eq!(gdb.ask("g"), "E16", "there is no third vCPU");
}

#[test]
fn monitor_shows_page_tables_registers_and_interrupts() {
    let (machine, _) = Machine::looping(2);
    let mut gdb = machine.attach();
    let help = gdb.monitor("help");
    for name in ["translate", "registers", "interrupts", "echo         says it again"] {
        assert!(help.contains(name), "{help}");
    }
    let walk = gdb.monitor(&format!("translate {WINDOW:#x}"));
    assert_eq!(
        walk,
        "CR3 0x10000, 4 levels\n\
         PML4E[0] at 0x10000: 0x0000000000011003 writable\n\
         PDPTE[0] at 0x11000: 0x0000000000012003 writable\n\
         PDE[1] at 0x12008: 0x0000000000013003 writable\n\
         PTE[0] at 0x13000: 0x0000000000050003 writable\n\
         0x200000 is guest-physical 0x50000, in a page of 4 KiB\n"
    );
    assert!(gdb.monitor(&format!("translate {DATA:#x} 1")).ends_with("in a page of 2 MiB\n"));
    assert!(gdb.monitor(&format!("translate {UNMAPPED:#x}")).ends_with("not present\n"));
    assert!(gdb.monitor("translate 0x8000000000000000").contains("not canonical"));
    let registers = gdb.monitor("registers");
    assert!(
        registers.contains("IDTR base 0x0000000000002000") && registers.contains("CR3 0x10000"),
        "{registers}"
    );
    let interrupts = gdb.monitor("interrupts 1");
    assert!(interrupts.starts_with("vCPU 1: Running, RFLAGS.IF 0\n"), "{interrupts}");
    assert!(interrupts.contains("no local APIC"), "{interrupts}");

    assert_eq!(gdb.monitor("echo a  b "), "echo: a  b\n");
    for (wrong, reason) in [
        ("dance", "is no command"),
        ("translate", "an address is missing"),
        ("translate 0xyz", "is no number"),
        ("registers 7", "vCPU index is 7"),
        ("registers 4294967296", "is no number"),
    ] {
        let said = gdb.monitor(wrong);
        assert!(said.contains(reason), "{wrong}: {said}");
    }
}

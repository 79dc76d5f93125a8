//! Guests in ring 3, on every backend that is there.

mod shim;

use std::sync::Arc;
use std::time::Duration;

use iced_x86::code_asm::*;
use vmm_memory::vm_memory::{Bytes as _, GuestAddress};
use vmm_memory::{GuestRam, RegionConfig};

use super::native::XCR0_KNOWN;
use super::private::{Private, VA_SYSCALL};
use super::shim::ShimPages;
use super::*;
use crate::cpuid::Feature;
use crate::state::rflags;

const RAM: u64 = 8 << 20;
const KERNEL_ROOT: u64 = 0x1000;
const USER_ROOT: u64 = 0x2000;
/// Lowest-level table of the kernel's code, which both halves of these guests share as far as they run it.
const LEAF: u64 = 0x5000;
const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;
const DATA: u64 = 0x30_0000;
/// Where guests see guest-physical 0.
const BASE: u64 = 0xffff_8800_0000_0000;

/// Present, writable, user, accessed, dirty.
const PAGE: u64 = 0x67;

/// A machine whose both roots map the first 2 MiB of its RAM at [`BASE`], in small pages, and what follows too.
struct Guest {
    machine: Ring3Machine,
    engine: Ring3,
}

impl Guest {
    fn write(&self, gpa: u64, value: u64) {
        self.machine.ram().memory().write_obj(value, GuestAddress(gpa)).unwrap();
    }

    fn read(&self, gpa: u64) -> u64 {
        self.machine.ram().memory().read_obj(GuestAddress(gpa)).unwrap()
    }

    fn new(backend: &dyn crate::Hypervisor, shim: bool) -> Self {
        let shadows = backend.capabilities().shadowed_page_tables;
        let layout = Layout::new(RAM).unwrap();
        let config = Ring3Config::new(layout).vcpus(2).store_in_guest(shadows).shim(shim);
        let ram = GuestRam::builder().region(RegionConfig::new(GuestAddress(0), RAM)).build().unwrap();
        let machine = Ring3Machine::new(backend, &config, &ram).unwrap();
        let engine = machine.create_engine(0).unwrap();
        let mut guest = Self { machine, engine };
        // One set of tables under both roots: 4 tables of 2 MiB at LEAF.
        for root in [KERNEL_ROOT, USER_ROOT] {
            guest.write(root + (BASE >> 39 & 0x1ff) * 8, 0x3000 | PAGE);
        }
        guest.write(0x3000, 0x4000 | PAGE);
        for table in 0..4 {
            guest.write(0x4000 + table * 8, (LEAF + table * 0x1000) | PAGE);
        }
        for page in 0..RAM >> 12 {
            guest.write(LEAF + page * 8, page << 12 | PAGE);
        }
        guest.engine.prepare_root(GuestAddress(KERNEL_ROOT), GuestMode::Kernel).unwrap();
        guest.engine.prepare_root(GuestAddress(USER_ROOT), GuestMode::User).unwrap();
        guest.engine.set_kernel_root(GuestAddress(KERNEL_ROOT)).unwrap();
        guest.engine.set_user_root(Some(GuestAddress(USER_ROOT))).unwrap();
        let general = &mut guest.engine.context().general;
        (general.rip, general.rsp) = (BASE + CODE, BASE + STACK);
        guest
    }

    fn load(&mut self, assemble: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) {
        let mut a = CodeAssembler::new(64).unwrap();
        assemble(&mut a).unwrap();
        let code = a.assemble(BASE + CODE).unwrap();
        self.machine.ram().memory().write_slice(&code, GuestAddress(CODE)).unwrap();
    }

    fn has_shim(&self) -> bool {
        !self.engine.fast_counts().is_empty()
    }

    fn run(&mut self) -> EngineExit {
        self.engine.run().unwrap()
    }

    fn general(&mut self) -> &mut GeneralRegisters {
        &mut self.engine.context().general
    }
}

/// Runs a test on every backend.
fn everywhere(test: impl Fn(Guest)) {
    for name in crate::backend_names() {
        if *name == super::super::NAME {
            continue;
        }
        match crate::open_backend(name) {
            Ok(backend) => {
                for shim in [false, true] {
                    println!("on {name}, {}", if shim { "with shim" } else { "without shim" });
                    test(Guest::new(&*backend, shim));
                }
            }
            Err(error) => println!("skipped on {name}: {error}"),
        }
    }
}

fn page_fault(error_code: u32, address: u64) -> EngineExit {
    EngineExit::Exception { vector: 14, error_code, address }
}

fn exception(vector: u8, error_code: u32) -> EngineExit {
    EngineExit::Exception { vector, error_code, address: 0 }
}

#[test]
fn syscall_brings_the_registers_and_takes_them_back() {
    everywhere(|mut guest| {
        guest.load(|a| {
            a.mov(rax, 17_u64)?;
            a.mov(rdi, 0x1122_3344_5566_7788_u64)?;
            a.xor(ebx, ebx)?; // ZF and PF
            a.syscall()?;
            a.lea(rsi, ptr(rax + 1))?;
            a.syscall()?;
            Ok(())
        });
        assert_eq!(guest.run(), EngineExit::Syscall);
        let after = guest.engine.context().general;
        assert_eq!((after.rax, after.rdi), (17, 0x1122_3344_5566_7788));
        assert_eq!((after.rsp, after.rcx), (BASE + STACK, after.rip));
        assert_eq!(after.rflags & (rflags::ZF | rflags::IF | rflags::CF), rflags::ZF | rflags::IF);
        let context = guest.engine.context();
        assert_eq!((context.cs, context.ss, context.mode), (0xe033, 0xe02b, GuestMode::Kernel));
        context.general.rax = 99;
        assert_eq!(guest.run(), EngineExit::Syscall);
        assert_eq!(guest.general().rsi, 100);
        assert_eq!(guest.general().rdi, 0x1122_3344_5566_7788);
    });
}

#[test]
fn exceptions_say_vector_error_and_address() {
    everywhere(|mut guest| {
        let unmapped = BASE + RAM + 0x123;
        guest.load(|a| {
            a.mov(rax, unmapped)?;
            a.mov(qword_ptr(rax), rax)?; // #PF
            a.ud2()?;
            a.int3()?;
            a.hlt()?; // #GP
            a.int(0x80)?; // #GP with the vector
            a.xor(ecx, ecx)?;
            a.div(ecx)?; // #DE
            Ok(())
        });
        assert_eq!(guest.run(), page_fault(6, unmapped));
        assert_eq!(guest.general().rip, BASE + CODE + 10);
        guest.general().rip += 3;
        assert_eq!(guest.run(), exception(6, 0));
        guest.general().rip += 2;
        let int3 = guest.general().rip;
        assert_eq!(guest.run(), exception(3, 0));
        assert_eq!(guest.general().rip, int3 + 1, "a trap");
        assert_eq!(guest.run(), exception(13, 0));
        guest.general().rip += 1;
        // One kind of KVM makes another exception of it.
        let software = guest.run();
        assert!([exception(13, 0x80 << 3 | 2), exception(6, 0)].contains(&software), "{software:?}");
        guest.general().rip += 2;
        assert_eq!(guest.run(), exception(0, 0));
        assert_eq!(guest.general().rsp, BASE + STACK, "nothing was pushed to the guest's stack");
    });
}

#[test]
fn entries_that_are_written_take_effect_with_their_flush() {
    everywhere(|mut guest| {
        guest.load(|a| {
            let mut again = a.create_label();
            a.mov(rbx, BASE + DATA)?;
            a.set_label(&mut again)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.syscall()?;
            a.jmp(again)?;
            Ok(())
        });
        guest.write(DATA, 1);
        guest.write(DATA + 0x1000, 2);
        let entry = GuestAddress(LEAF + (DATA >> 12) * 8);
        assert_eq!(guest.run(), EngineExit::Syscall);
        assert_eq!(guest.general().rax, 1);
        guest.engine.write_entry(entry, (DATA + 0x1000) | PAGE).unwrap();
        assert_eq!(guest.read(entry.0), (DATA + 0x1000) | PAGE);
        guest.engine.flush_page(BASE + DATA);
        assert_eq!(guest.run(), EngineExit::Syscall);
        assert_eq!(guest.general().rax, 2);
        guest.engine.write_entry(entry, 0).unwrap();
        guest.engine.flush_all();
        assert_eq!(guest.run(), page_fault(4, BASE + DATA));
        // From not present to present takes no flush.
        guest.engine.write_entry(entry, DATA | PAGE).unwrap();
        assert_eq!(guest.run(), EngineExit::Syscall);
        assert_eq!(guest.general().rax, 1);
        // More pages than are flushed one by one.
        guest.engine.write_entry(entry, (DATA + 0x1000) | PAGE).unwrap();
        for page in 0..20 {
            guest.engine.flush_page(BASE + DATA - page * 0x1000);
        }
        assert_eq!(guest.run(), EngineExit::Syscall);
        assert_eq!(guest.general().rax, 2);
    });
}

/// A processor that sets accessed and dirty bits while an entry is replaced loses none.
#[test]
fn accessed_and_dirty_bits_are_kept() {
    const ACCESSED_AND_DIRTY: u64 = 0x60;
    everywhere(|mut guest| {
        guest.load(|a| {
            a.mov(qword_ptr(rbx), rax)?;
            a.syscall()?;
            Ok(())
        });
        let entry = GuestAddress(LEAF + (DATA >> 12) * 8);
        guest.engine.write_entry(entry, DATA | PAGE & !ACCESSED_AND_DIRTY).unwrap();
        guest.engine.flush_page(BASE + DATA);
        guest.general().rbx = BASE + DATA;
        assert_eq!(guest.run(), EngineExit::Syscall);
        assert_eq!(guest.read(entry.0) & 0xfff, PAGE, "set by the processor");
        // Read-only from here on, and still known to be dirty.
        let read_only = DATA | PAGE & !ACCESSED_AND_DIRTY & !2;
        guest.engine.write_entry_keeping(entry, read_only, ACCESSED_AND_DIRTY).unwrap();
        assert_eq!(guest.read(entry.0), read_only | ACCESSED_AND_DIRTY);
        guest.engine.write_entry_keeping(entry, read_only, 0x20).unwrap();
        assert_eq!(guest.read(entry.0), read_only | 0x20);
        guest.engine.flush_page(BASE + DATA);
        guest.general().rip = BASE + CODE;
        assert_eq!(guest.run(), page_fault(7, BASE + DATA));
        assert!(guest.engine.write_entry_keeping(GuestAddress(RAM), 0, 0).is_err());
    });
}

#[test]
fn entries_outside_of_the_ram_are_refused() {
    everywhere(|mut guest| {
        let private = guest.machine.layout().private().0;
        for gpa in [RAM, RAM - 4, 1, private, u64::MAX, u64::MAX - 7] {
            assert!(guest.engine.write_entry(GuestAddress(gpa), 0).is_err(), "{gpa:#x}");
            assert!(guest.engine.set_kernel_root(GuestAddress(gpa)).is_err(), "{gpa:#x}");
            assert!(guest.engine.prepare_root(GuestAddress(gpa), GuestMode::User).is_err(), "{gpa:#x}");
        }
        guest.engine.write_entry(GuestAddress(RAM - 8), 5).unwrap();
        assert_eq!(guest.read(RAM - 8), 5);
    });
}

#[test]
fn modes_run_on_their_roots() {
    everywhere(|mut guest| {
        guest.load(|a| {
            a.mov(rbx, BASE + DATA)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.syscall()?;
            Ok(())
        });
        // The user root gets tables of its own above the page of DATA.
        for (table, copy) in [(0x3000, 0xa000), (0x4000, 0xb000), (LEAF + 0x1000, 0xc000)] {
            for entry in 0..512 {
                let value = guest.read(table + entry * 8);
                guest.write(copy + entry * 8, value);
            }
        }
        guest.write(USER_ROOT + (BASE >> 39 & 0x1ff) * 8, 0xa000 | PAGE);
        guest.write(0xa000, 0xb000 | PAGE);
        guest.write(0xb008, 0xc000 | PAGE);
        guest.write(0xc000 + (DATA >> 12 & 0x1ff) * 8, (DATA + 0x1000) | PAGE);
        guest.write(DATA, 0x6b);
        guest.write(DATA + 0x1000, 0x75);
        for (mode, expected) in
            [(GuestMode::Kernel, 0x6b), (GuestMode::User, 0x75), (GuestMode::Kernel, 0x6b)]
        {
            guest.engine.context().switch_mode(mode);
            guest.general().rip = BASE + CODE;
            assert_eq!(guest.run(), EngineExit::Syscall);
            assert_eq!((guest.general().rax, guest.engine.context().mode), (expected, mode));
        }
        guest.engine.set_user_root(None).unwrap();
        guest.engine.context().switch_mode(GuestMode::User);
        assert_eq!(guest.run(), exception(13, 0));
    });
}

#[test]
fn the_engines_memory_is_out_of_reach() {
    everywhere(|mut guest| {
        guest.load(|a| {
            a.mov(al, byte_ptr(rbx))?;
            a.mov(byte_ptr(rbx), al)?;
            a.syscall()?;
            Ok(())
        });
        guest.write(guest.machine.layout().m2p().0, 0x77);
        let shadows = guest.engine.store_in_guest_for_tests();
        for mode in [GuestMode::Kernel, GuestMode::User] {
            guest.engine.context().switch_mode(mode);
            for (name, va, read, write) in [
                ("entry page", PRIVATE_VA, true, false),
                ("interrupt table", PRIVATE_VA + 0x1000, false, false),
                ("task state", PRIVATE_VA + 0x2000, false, false),
                ("stack", PRIVATE_VA + 0x3000, false, false),
                ("descriptors", PRIVATE_VA + 0x4000, false, false),
                ("machine-to-physical table", M2P_VA, mode == GuestMode::Kernel, false),
                ("the same where Xen has it", XEN_M2P_VA, mode == GuestMode::Kernel && !shadows, false),
            ] {
                guest.general().rip = BASE + CODE;
                guest.general().rbx = va;
                let exit = guest.run();
                let EngineExit::Exception { vector: 14, error_code, address } = exit else {
                    panic!("{name} in {mode:?}: {exit:?}")
                };
                assert_eq!(address, va, "{name} in {mode:?}");
                assert_eq!(error_code & 2 != 0, read && !write, "{name} in {mode:?}: {error_code:#x}");
            }
        }
    });
}

#[test]
fn a_jump_to_a_stub_is_a_syscall_or_a_fault_and_nothing_else() {
    everywhere(|mut guest| {
        for vector in 0..32 {
            let stub =
                (PRIVATE_VA..PRIVATE_VA + 0x1000).find(|rip| Private::exception_of(*rip) == Some(vector));
            guest.general().rip = stub.unwrap();
            assert_eq!(guest.run(), exception(13, 0), "stub {vector}");
            assert_eq!(guest.general().rip, stub.unwrap());
        }
        guest.general().rip = if guest.has_shim() { ShimPages::entry(0) } else { VA_SYSCALL };
        guest.general().rcx = 0x1234;
        guest.general().r11 = u64::MAX;
        assert_eq!(guest.run(), EngineExit::Syscall);
        assert_eq!(guest.general().rip, 0x1234);
    });
}

#[test]
fn privileged_instructions_fault_in_ring_3() {
    everywhere(|mut guest| {
        guest.load(|a| {
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)?;
            a.cli()?;
            a.rdmsr()?;
            a.wrmsr()?;
            a.out(0x20, al)?;
            a.invlpg(ptr(rax))?;
            a.swapgs()?;
            Ok(())
        });
        for length in [3, 3, 1, 2, 2, 2, 3, 3] {
            let rip = guest.general().rip;
            assert_eq!(guest.run(), exception(13, 0), "{:#x}", rip - BASE - CODE);
            assert_eq!(guest.general().rip, rip);
            guest.general().rip += length;
        }
    });
}

#[test]
fn flags_that_the_guest_may_not_choose_are_forced() {
    everywhere(|mut guest| {
        guest.load(|a| {
            a.pushfq()?;
            a.pop(rax)?;
            a.syscall()?;
            Ok(())
        });
        // All but TF and AC, which stop or restrict this program itself.
        guest.general().rflags = !(1 << 8 | 1 << 18);
        assert_eq!(guest.run(), EngineExit::Syscall);
        let seen = guest.general().rax;
        assert_eq!(seen & (3 << 12 | 1 << 14 | 1 << 17 | 3 << 19), 0, "{seen:#x}");
        assert_ne!(seen & rflags::IF, 0);
        assert_ne!(seen & rflags::CF, 0);
    });
}

#[test]
fn bad_contexts_fault_and_leave_the_registers() {
    everywhere(|mut guest| {
        guest.load(|a| a.syscall());
        for (code, stack, rip, expected) in [
            (0x33, 0xe02b, BASE + CODE, exception(13, 0x30)),
            (0xe008, 0xe02b, BASE + CODE, exception(13, 0xe008)),
            (0xe033, 0xe010, BASE + CODE, exception(13, 0xe010)),
            (0xe033, 0xe02b, 0x8000_0000_0000, exception(13, 0)),
        ] {
            let context = guest.engine.context();
            (context.cs, context.ss, context.general.rip) = (code, stack, rip);
            let before = *context;
            assert_eq!(guest.run(), expected);
            assert_eq!(*guest.engine.context(), before);
        }
        let context = guest.engine.context();
        (context.cs, context.ss, context.general.rip) = (0xe033, 0xe02b, BASE + CODE);
        assert_eq!(guest.run(), EngineExit::Syscall);
    });
}

#[test]
fn segments_and_their_bases_come_and_go() {
    everywhere(|mut guest| {
        // A data segment at DATA's address below 4 GiB does not exist; its base shows in GS all the same.
        assert!(guest.engine.set_descriptor(12, 0x00cf_f230_0000_ffff | 0x12 << 56));
        guest.load(|a| {
            a.mov(rax, qword_ptr(0).fs())?;
            a.mov(rbx, qword_ptr(8).gs())?;
            a.mov(edx, 12 << 3 | 3)?;
            a.mov(gs, edx)?;
            a.syscall()?;
            Ok(())
        });
        guest.write(DATA, 0xf5);
        guest.write(DATA + 8, 0x65);
        let context = guest.engine.context();
        (context.fs_base, context.gs_base, context.other_gs_base) = (BASE + DATA, BASE + DATA, 7);
        assert_eq!(guest.run(), EngineExit::Syscall);
        let context = *guest.engine.context();
        assert_eq!((context.general.rax, context.general.rbx), (0xf5, 0x65));
        assert_eq!((context.gs, context.gs_base), (0x63, 0x1230_0000));
        assert_eq!((context.fs_base, context.other_gs_base), (BASE + DATA, 7));
        guest.engine.context().switch_mode(GuestMode::User);
        assert_eq!(guest.engine.context().gs_base, 7);
        assert_eq!(guest.engine.context().other_gs_base, 0x1230_0000);
        guest.engine.context().switch_mode(GuestMode::User);
        assert_eq!(guest.engine.context().gs_base, 7, "already in that mode");
    });
}

#[test]
fn a_kick_ends_an_endless_loop_and_none_is_lost() {
    everywhere(|mut guest| {
        guest.load(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.inc(rax)?;
            a.jmp(again)?;
            Ok(())
        });
        let handle = guest.engine.handle();
        handle.kick();
        handle.kick();
        assert_eq!(guest.run(), EngineExit::Interrupted, "before the run");
        let kicker = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(5));
            handle.kick();
        });
        assert_eq!(guest.run(), EngineExit::Interrupted);
        kicker.join().unwrap();
        let context = guest.engine.context();
        assert_eq!((context.cs, context.mode), (0xe033, GuestMode::Kernel));
        assert!((BASE + CODE..BASE + CODE + 8).contains(&context.general.rip));
    });
}

/// A kick, or a flush, that comes while the engine flushes by itself, before the guest's own code runs, is not forgotten.
#[test]
fn a_kick_during_the_engines_own_operations_is_not_lost() {
    everywhere(|mut guest| {
        guest.load(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.jmp(again)
        });
        let handle = guest.engine.handle();
        let (start, started) = std::sync::mpsc::channel::<u32>();
        let (answer, answered) = std::sync::mpsc::channel();
        let kicker = std::thread::spawn(move || {
            let mut lost = 0;
            for delay in started {
                for _ in 0..delay {
                    std::hint::spin_loop();
                }
                if delay % 3 == 0 {
                    handle.flush();
                }
                handle.kick();
                while answered.recv_timeout(Duration::from_secs(5)).is_err() {
                    lost += 1;
                    handle.kick();
                    // One that merged with the lost one.
                    handle.flush();
                }
            }
            lost
        });
        for round in 0..600 {
            for page in 0..6 {
                guest.engine.flush_page(BASE + DATA + page * 0x1000);
            }
            start.send(round % 97 * 40).unwrap();
            assert_eq!(guest.run(), EngineExit::Interrupted);
            answer.send(()).unwrap();
        }
        drop(start);
        assert_eq!(kicker.join().unwrap(), 0, "kicks were lost");
    });
}

/// Kicks and flushes from another thread never disturb a guest that calls and faults all the time.
#[test]
fn kicks_and_flushes_at_any_moment() {
    everywhere(|mut guest| {
        guest.load(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.inc(rax)?;
            a.syscall()?;
            a.inc(rax)?;
            a.ud2()?;
            a.jmp(again)?;
            Ok(())
        });
        let (handle, stop) = (guest.engine.handle(), Arc::new(std::sync::atomic::AtomicBool::new(false)));
        let stopping = Arc::clone(&stop);
        let kicker = std::thread::spawn(move || {
            let mut kicks = 0;
            while !stopping.load(std::sync::atomic::Ordering::SeqCst) {
                handle.kick();
                handle.flush();
                kicks += 1;
                std::thread::yield_now();
            }
            kicks
        });
        let (mut steps, mut interrupted) = (0, 0);
        while steps < 400 || interrupted == 0 {
            match guest.run() {
                EngineExit::Syscall => steps += 1,
                EngineExit::Exception { vector: 6, .. } => {
                    steps += 1;
                    guest.general().rip += 2;
                }
                EngineExit::Interrupted => interrupted += 1,
                other => panic!("{other:?} after {steps} steps"),
            }
            if interrupted > 0 {
                continue;
            }
        }
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        assert!(kicker.join().unwrap() > 0);
        // Interrupted between an increment and what follows it, at most.
        let counted = guest.general().rax;
        assert!((steps..=steps + 1).contains(&counted), "{counted} of {steps}");
    });
}

/// A trap, with RIP behind its instruction, that comes at the moment of a kick is delivered.
#[test]
fn no_trap_is_lost_to_kicks_and_flushes() {
    everywhere(|mut guest| {
        guest.load(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            for _ in 0..8 {
                a.int3()?;
                a.inc(rax)?;
            }
            a.jmp(again)
        });
        let (handle, stop) = (guest.engine.handle(), Arc::new(std::sync::atomic::AtomicBool::new(false)));
        let stopping = Arc::clone(&stop);
        let kicker = std::thread::spawn(move || {
            for round in 0_u32.. {
                if stopping.load(std::sync::atomic::Ordering::SeqCst) {
                    return;
                }
                handle.kick();
                if round % 3 == 0 {
                    handle.flush();
                }
                for _ in 0..round % 61 * 20 {
                    std::hint::spin_loop();
                }
            }
        });
        let (mut traps, mut interrupted) = (0, 0);
        while traps < 4000 || interrupted < 20 {
            match guest.run() {
                EngineExit::Exception { vector: 3, .. } => {
                    assert_eq!(guest.general().rax, traps, "after {interrupted} kicks");
                    traps += 1;
                }
                EngineExit::Interrupted => interrupted += 1,
                other => panic!("{other:?} after {traps} traps"),
            }
        }
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        kicker.join().unwrap();
    });
}

#[test]
fn a_flush_waits_for_the_guest_to_let_go() {
    everywhere(|mut guest| {
        guest.load(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.cmp(rax, 1)?;
            a.je(again)?;
            a.syscall()?;
            Ok(())
        });
        if guest.engine.store_in_guest_for_tests() {
            // The other thread would have to be an engine itself.
            return;
        }
        guest.write(DATA, 1);
        guest.write(DATA + 0x1000, 2);
        guest.general().rbx = BASE + DATA;
        let (handle, ram) = (guest.engine.handle(), guest.machine.ram().clone());
        let other = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(5));
            let entry = GuestAddress(LEAF + (DATA >> 12) * 8);
            ram.memory().store((DATA + 0x1000) | PAGE, entry, std::sync::atomic::Ordering::SeqCst).unwrap();
            handle.flush();
        });
        assert_eq!(guest.run(), EngineExit::Syscall);
        assert_eq!(guest.general().rax, 2);
        other.join().unwrap();
    });
}

/// However many there are, and with what order of numbers.
#[test]
fn all_entries_that_were_written_take_effect() {
    const FIRST: u64 = DATA >> 12;
    everywhere(|mut guest| {
        guest.load(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.syscall()?;
            a.jmp(again)
        });
        let at = |guest: &mut Guest, page: u64| {
            (guest.general().rbx, guest.general().rip) = (BASE + page * 0x1000, BASE + CODE);
            assert_eq!(guest.run(), EngineExit::Syscall);
            guest.general().rax
        };
        let room = (RAM >> 12) - FIRST;
        for page in FIRST..FIRST + room {
            guest.write(page * 0x1000, page);
        }
        for count in [1, 2, 11, 12, 13, 24, 95, 96, 97, 150].into_iter().filter(|count| *count <= room) {
            // Each page's entry is used, so that it may be cached, before it changes; then all change places.
            for page in FIRST..FIRST + count {
                assert_eq!(at(&mut guest, page), page, "of {count}");
            }
            let turned = |page: u64| FIRST + count - 1 - (page - FIRST);
            for page in FIRST..FIRST + count {
                guest.engine.write_entry(GuestAddress(LEAF + page * 8), turned(page) << 12 | PAGE).unwrap();
            }
            guest.engine.flush_all();
            for page in FIRST..FIRST + count {
                assert_eq!(at(&mut guest, page), turned(page), "of {count}");
            }
            for page in FIRST..FIRST + count {
                let gpa = GuestAddress(LEAF + page * 8);
                guest.engine.write_entry_keeping(gpa, page << 12 | 7, 0x60).unwrap();
            }
            guest.engine.flush_all();
            assert_eq!(guest.read(LEAF + FIRST * 8) & 0x60, 0x60, "kept");
        }
    });
}

/// The same, where only code in the guest may write entries: the other thread runs an engine too.
#[test]
fn entries_that_another_engine_writes_take_effect_with_the_flush() {
    const ROUNDS: u64 = 100;
    everywhere(|mut guest| {
        guest.load(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.cmp(rax, rcx)?;
            a.je(again)?;
            a.syscall()?;
            a.mov(rcx, rax)?;
            a.jmp(again)
        });
        let mut other = guest.machine.create_engine(1).unwrap();
        let handle = guest.engine.handle();
        let frame = |round: u64| DATA + round % 2 * 0x1000;
        guest.write(frame(0), 10);
        guest.write(frame(1), 11);
        let (seen, sees) = std::sync::mpsc::channel();
        let writer = std::thread::spawn(move || {
            for round in 1..=ROUNDS {
                other.write_entry(GuestAddress(LEAF + (DATA >> 12) * 8), frame(round) | PAGE).unwrap();
                other.publish_entries().unwrap();
                handle.flush();
                sees.recv().unwrap();
            }
        });
        (guest.general().rbx, guest.general().rcx) = (BASE + DATA, 10);
        guest.engine.context().switch_mode(GuestMode::User);
        for round in 1..=ROUNDS {
            assert_eq!(guest.run(), EngineExit::Syscall);
            assert_eq!(guest.general().rax, 10 + round % 2);
            seen.send(()).unwrap();
        }
        writer.join().unwrap();
    });
}

/// Both roots share tables, as in Linux, whose kernel flushes addresses of programs while the kernel's root is active.
#[test]
fn a_flush_in_one_mode_counts_for_the_other() {
    everywhere(|mut guest| {
        guest.load(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.syscall()?;
            a.jmp(again)
        });
        guest.write(DATA, 0);
        guest.write(DATA + 0x1000, 1);
        let entry = GuestAddress(LEAF + (DATA >> 12) * 8);
        guest.general().rbx = BASE + DATA;
        let read = |guest: &mut Guest, mode| {
            guest.engine.context().switch_mode(mode);
            assert_eq!(guest.run(), EngineExit::Syscall);
            guest.general().rax
        };
        for round in 0..32_u64 {
            let (new, all, runs_between, kernel_first) =
                (round % 2, round & 2 != 0, round & 4 != 0, round & 8 != 0);
            let (here, there) = if kernel_first {
                (GuestMode::Kernel, GuestMode::User)
            } else {
                (GuestMode::User, GuestMode::Kernel)
            };
            // Both have it cached.
            assert_eq!(read(&mut guest, there), read(&mut guest, here));
            guest.engine.write_entry(entry, (DATA + new * 0x1000) | PAGE).unwrap();
            if all {
                guest.engine.flush_all();
            } else {
                guest.engine.flush_page(BASE + DATA);
            }
            if runs_between {
                assert_eq!(read(&mut guest, here), new, "round {round}");
            }
            assert_eq!(read(&mut guest, there), new, "round {round}");
        }
    });
}

#[test]
fn a_guest_that_destroys_the_engines_slot_crashes_and_stays_so() {
    everywhere(|mut guest| {
        guest.load(|a| {
            a.syscall()?;
            a.ud2()?;
            Ok(())
        });
        assert_eq!(guest.run(), EngineExit::Syscall);
        guest.engine.write_entry(GuestAddress(KERNEL_ROOT + PRIVATE_SLOT as u64 * 8), 0).unwrap();
        guest.engine.set_kernel_root(GuestAddress(KERNEL_ROOT)).unwrap();
        assert_eq!(guest.run(), EngineExit::Crashed);
        assert_eq!(guest.run(), EngineExit::Crashed);
        let handle = guest.engine.handle();
        handle.kick();
        handle.flush();
        assert_eq!(guest.run(), EngineExit::Crashed);
    });
}

#[test]
fn single_step_and_breakpoints_trap() {
    everywhere(|mut guest| {
        if guest.machine.vm().clock().is_some() && guest.engine.store_in_guest_for_tests() {
            // KVM with shadowed tables reports them by itself; covered where it is hardware-assisted.
            return;
        }
        guest.load(|a| {
            a.nop()?;
            a.nop()?;
            a.mov(rax, qword_ptr(rbx))?;
            a.syscall()?;
            Ok(())
        });
        guest.general().rflags |= rflags::TF;
        assert_eq!(guest.run(), exception(1, 0));
        assert_eq!(guest.general().rip, BASE + CODE + 1);
        assert_ne!(guest.engine.debug_register(6) & 1 << 14, 0);
        guest.general().rflags &= !rflags::TF;
        guest.general().rbx = BASE + DATA;
        guest.engine.set_debug_register(0, BASE + DATA).unwrap();
        guest.engine.set_debug_register(7, 0x000f_0003).unwrap();
        assert_eq!(guest.run(), exception(1, 0));
        assert_eq!(guest.engine.debug_register(6) & 0xf, 1);
        assert!(guest.engine.set_debug_register(0, PRIVATE_VA).is_err());
        assert!(guest.engine.set_debug_register(4, 0).is_err());
        assert_eq!(guest.run(), EngineExit::Syscall);
    });
}

/// SYSCALL in the shadow of a MOV SS that hit a breakpoint: the debug exception comes in the stub.
#[test]
fn debug_exceptions_in_the_stubs_lose_nothing() {
    everywhere(|mut guest| {
        if guest.engine.store_in_guest_for_tests() {
            return;
        }
        guest.load(|a| {
            a.mov(ss, word_ptr(rbx))?;
            a.syscall()?;
            a.mov(ss, word_ptr(rbx))?;
            a.int3()?;
            a.ud2()?;
            Ok(())
        });
        guest.write(DATA, 0xe02b);
        guest.general().rbx = BASE + DATA;
        guest.engine.set_debug_register(0, BASE + DATA).unwrap();
        guest.engine.set_debug_register(7, 0x0007_0003).unwrap();
        assert_eq!(guest.run(), EngineExit::Syscall);
        assert_eq!(guest.general().rip, BASE + CODE + 4);
        assert_eq!(guest.general().rsp, BASE + STACK);
        assert_eq!(guest.run(), exception(3, 0));
        assert_eq!(guest.general().rip, BASE + CODE + 7);
        assert_eq!(guest.general().rsp, BASE + STACK);
    });
}

#[test]
fn floating_point_traps_while_the_task_is_switched() {
    everywhere(|mut guest| {
        if guest.engine.store_in_guest_for_tests() {
            // KVM without hardware assistance lets ring 3 use the floating-point unit whatever CR0 says.
            return;
        }
        guest.load(|a| {
            a.fninit()?;
            a.syscall()?;
            Ok(())
        });
        guest.engine.set_task_switched(true);
        assert_eq!(guest.run(), exception(7, 0));
        guest.engine.set_task_switched(false);
        assert_eq!(guest.run(), EngineExit::Syscall);
    });
}

#[test]
fn programs_of_32_bits_run() {
    everywhere(|mut guest| {
        if !guest.engine.capabilities().compatibility_mode {
            println!("skipped: the backend has no 32-bit code of ring 3 that it could be trusted with");
            return;
        }
        // The code, at an address of 32 bits.
        guest.write(USER_ROOT, 0x3000 | PAGE);
        let mut a = CodeAssembler::new(32).unwrap();
        a.inc(eax).unwrap();
        a.ud2().unwrap();
        let code = a.assemble(CODE).unwrap();
        guest.machine.ram().memory().write_slice(&code, GuestAddress(CODE)).unwrap();
        let context = guest.engine.context();
        context.switch_mode(GuestMode::User);
        context.cs = 0xe023;
        (context.ds, context.es) = (0xe02b, 0xe02b);
        (context.general.rip, context.general.rsp, context.general.rax) = (1 << 32 | CODE, STACK, 41);
        assert_eq!(guest.run(), exception(6, 0));
        let context = guest.engine.context();
        assert_eq!((context.cs, context.general.rip, context.general.rax), (0xe023, CODE + 1, 42));
        assert_eq!(context.ds, 0xe02b);
    });
}

#[test]
fn time_goes_on() {
    everywhere(|mut guest| {
        guest.load(|a| {
            a.rdtsc()?;
            a.shl(rdx, 32)?;
            a.or(rax, rdx)?;
            a.syscall()?;
            Ok(())
        });
        let before = guest.engine.time_stamp().unwrap();
        assert_eq!(guest.run(), EngineExit::Syscall);
        let inside = guest.general().rax;
        let after = guest.engine.time_stamp().unwrap();
        assert!(before <= inside && inside <= after, "{before} {inside} {after}");
        assert!(guest.engine.capabilities().tsc_khz > 0);
    });
}

/// What the engine says of XCR0 is what programs find, before and after it is set.
#[test]
fn programs_find_no_registers_that_the_engine_does_not_tell_of() {
    const OSXSAVE: u32 = 1 << 27;
    everywhere(|mut guest| {
        guest.load(|a| {
            let (mut again, mut without) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.mov(rax, 1_u64)?;
            a.cpuid()?;
            a.xor(rbx, rbx)?;
            a.and(ecx, OSXSAVE)?;
            a.jz(without)?;
            a.xor(ecx, ecx)?;
            a.xgetbv()?;
            a.mov(rbx, rax)?;
            a.set_label(&mut without)?;
            a.syscall()?;
            a.jmp(again)
        });
        guest.engine.context().switch_mode(GuestMode::User);
        let told = guest.engine.capabilities().xcr0;
        assert_eq!(guest.run(), EngineExit::Syscall);
        let found = guest.general().rbx;
        assert_eq!(found & XCR0_KNOWN & !told, 0, "{found:#x}, told {told:#x}");
        assert_eq!(found == 0, told == 0);
        // Where it is not the engine's to choose, CPUID tells of it too.
        match guest.machine.cpuid_in_ring_3() {
            Some(table) => {
                assert_eq!(found & XCR0_KNOWN, told);
                let [legacy, state] = [0, 1].map(|subleaf| table.get(0xd, subleaf).unwrap());
                assert_eq!(u64::from(legacy.eax), told);
                assert_eq!(state.eax & Feature::XSAVES.mask(), 0);
                for feature in [Feature::XSAVE, Feature::SSE3, Feature::POPCNT] {
                    assert!(table.has(feature), "{feature}");
                }
            }
            None => assert!(found <= 1, "not set yet: {found:#x}"),
        }
        for value in [0, 5, 0x21, 0x67, 1 << 9 | 3, u64::MAX] {
            assert!(guest.engine.set_xcr0(value).is_err(), "{value:#x}");
        }
        if told != 0 {
            guest.engine.set_xcr0(told).unwrap();
            assert_eq!(guest.run(), EngineExit::Syscall);
            assert_eq!(guest.general().rbx & XCR0_KNOWN, told);
        }
    });
}

/// A kernel that is told so does not clear bases itself.
#[test]
fn null_selectors_clear_bases_where_that_is_told() {
    everywhere(|mut guest| {
        let Some(table) = guest.machine.cpuid_in_ring_3() else {
            println!("skipped: CPUID is what the backend was told");
            return;
        };
        let told = table.has(Feature::NULL_SEL_CLR_BASE);
        guest.load(|a| {
            a.mov(eax, u32::from(FLAT_SS))?;
            a.mov(fs, eax)?;
            a.mov(rax, 0x5000_u64)?;
            a.wrfsbase(rax)?;
            a.xor(ecx, ecx)?;
            a.mov(fs, ecx)?;
            a.rdfsbase(rbx)?;
            a.syscall()
        });
        guest.engine.context().switch_mode(GuestMode::User);
        match guest.run() {
            EngineExit::Syscall => assert_eq!(guest.general().rbx == 0, told),
            exit => assert_eq!((exit, told), (exception(6, 0), false)),
        }
    });
}

/// A kernel loads the selectors of a 32-bit program before it lets that run.
#[test]
fn selectors_that_64_bit_code_loads_serve_32_bit_programs() {
    everywhere(|mut guest| {
        if !guest.engine.capabilities().compatibility_mode {
            println!("skipped: the backend has no 32-bit code of ring 3 that it could be trusted with");
            return;
        }
        // Flat data, and the same from 0x100 on.
        assert!(guest.engine.set_descriptor(5, 0x00cf_f300_0000_ffff));
        assert!(guest.engine.set_descriptor(6, 0x00cf_f300_0100_ffff));
        guest.write(USER_ROOT, 0x3000 | PAGE);
        guest.write(DATA, 0x1111);
        guest.write(DATA + 0x100, 0x2222);
        guest.load(|a| {
            a.mov(eax, 0x2b)?;
            a.mov(ds, eax)?;
            a.mov(eax, 0x33)?;
            a.mov(es, eax)?;
            a.syscall()
        });
        let mut a = CodeAssembler::new(32).unwrap();
        a.mov(ebx, u32::try_from(DATA).unwrap()).unwrap();
        a.mov(ecx, dword_ptr(ebx)).unwrap();
        a.mov(edx, dword_ptr(ebx).es()).unwrap();
        a.mov(esi, ds).unwrap();
        a.mov(edi, es).unwrap();
        a.ud2().unwrap();
        let code = a.assemble(CODE + 0x1000).unwrap();
        guest.machine.ram().memory().write_slice(&code, GuestAddress(CODE + 0x1000)).unwrap();
        for _ in 0..3 {
            let context = guest.engine.context();
            context.switch_mode(GuestMode::Kernel);
            (context.cs, context.ss, context.ds, context.es) = (FLAT_CS64, FLAT_SS, 0, 0);
            (context.general.rip, context.general.rsp) = (BASE + CODE, BASE + STACK);
            assert_eq!(guest.run(), EngineExit::Syscall);
            let context = guest.engine.context();
            context.switch_mode(GuestMode::User);
            (context.cs, context.general.rip, context.general.rsp) = (FLAT_CS32, CODE + 0x1000, STACK);
            assert_eq!(guest.run(), exception(6, 0));
            let context = guest.engine.context();
            assert_eq!((context.general.rcx, context.general.rdx), (0x1111, 0x2222));
            assert_eq!((context.general.rsi, context.general.rdi), (0x2b, 0x33));
            assert_eq!((context.ds, context.es), (0x2b, 0x33));
        }
    });
}

/// KVM without hardware assistance would enter ring 0 at the lower half of CSTAR, where the program may have code.
#[test]
fn a_system_call_of_32_bit_code_runs_nothing_of_the_programs() {
    everywhere(|mut guest| {
        let offered = guest.engine.capabilities().compatibility_mode;
        assert_eq!(guest.engine.set_descriptor(4, 0x00cf_fb00_0000_ffff), offered);
        guest.write(USER_ROOT, 0x3000 | PAGE);
        // Page 0: OUT to the port of a breakpoint's stub, all over.
        let trap = [0xe6, 0x43].repeat(2048);
        guest.machine.ram().memory().write_slice(&trap, GuestAddress(0)).unwrap();
        let system_call = CODE + 0x1000;
        guest.machine.ram().memory().write_slice(&[0x0f, 0x05], GuestAddress(system_call)).unwrap();
        for selector in [0x23, FLAT_CS32] {
            // By IRET, and by a far return of the program's own.
            let mut a = CodeAssembler::new(64).unwrap();
            a.push(i32::from(selector)).unwrap();
            a.push(i32::try_from(system_call).unwrap()).unwrap();
            a.db(&[0x48, 0xcb]).unwrap();
            let code = a.assemble(CODE).unwrap();
            guest.machine.ram().memory().write_slice(&code, GuestAddress(CODE)).unwrap();
            for (loaded, rip) in [(selector, system_call), (FLAT_CS64, CODE)] {
                let context = guest.engine.context();
                context.switch_mode(GuestMode::User);
                (context.cs, context.ss, context.ds, context.es) = (loaded, FLAT_SS, FLAT_SS, FLAT_SS);
                (context.general.rip, context.general.rsp) = (rip, STACK);
                let exit = guest.run();
                if offered {
                    let context = guest.engine.context();
                    let seen = (exit, context.general.rip, context.cs);
                    assert_eq!(seen, (EngineExit::Syscall, system_call + 2, FLAT_CS32), "{selector:#x}");
                } else {
                    assert_eq!(exit, exception(13, (selector & !3).into()), "{selector:#x} at {rip:#x}");
                }
            }
        }
    });
}

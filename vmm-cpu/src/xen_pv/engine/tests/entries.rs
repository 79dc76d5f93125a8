//! Page tables: entries, roots, flushes, and what of the engine's own is in them.

use super::*;

/// A guest that tells what is at RBX, again and again.
fn load_reader(guest: &mut Guest) {
    guest.load(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.syscall()?;
        a.jmp(again)
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
        load_reader(&mut guest);
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
        load_reader(&mut guest);
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

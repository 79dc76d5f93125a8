//! Kicks and flushes from other threads, at any moment.

use super::*;

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

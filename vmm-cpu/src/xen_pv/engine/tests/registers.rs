//! Registers: flags, segments, vector state, 32-bit programs, time.

use super::*;

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

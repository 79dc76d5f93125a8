//! The in-guest fast path, with a guest kernel of a few instructions: the same program runs with the shim's help, without it,
//! and with kicks that interrupt the shim anywhere, and must not notice.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

/// The guest kernel's entries and data, from guest-physical 0 (kernel: from [`BASE`]; programs: from 0 as well).
const SYSCALL_ENTRY: u64 = CODE + 0x1000;
const FAULT_ENTRY: u64 = CODE + 0x2000;
const PROGRAM: u64 = CODE + 0x3000;
const KERNEL_STACK: u64 = 0x21_0000;
const PROGRAM_STACK: u64 = 0x22_0000;
/// How often each entry was taken.
const SYSTEM_CALLS: u64 = DATA;
const FAULTS: u64 = DATA + 8;
const INFO: u64 = DATA + 0x800;
/// Not mapped for anybody.
const NOWHERE: u64 = 0x50_0000_0000;

const IN_SYSCALL: u64 = 0x100;
const IRET: u64 = 23;

const CALLER_SAVED: u64 = 0x1122_3344_5566_7788;

fn fast_path() -> FastPath {
    FastPath {
        enabled: true,
        syscall: BASE + SYSCALL_ENTRY,
        syscall_masks: true,
        page_fault: BASE + FAULT_ENTRY,
        page_fault_masks: true,
        vcpu_info: GuestAddress(INFO),
    }
}

impl Guest {
    fn load_at(
        &self,
        at: u64,
        base: u64,
        assemble: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    ) {
        let mut a = CodeAssembler::new(64).unwrap();
        assemble(&mut a).unwrap();
        let code = a.assemble(base + at).unwrap();
        self.machine.ram().memory().write_slice(&code, GuestAddress(at)).unwrap();
    }

    /// A kernel that counts and goes back, from system calls with `return_flags`, and a program that makes `rounds` rounds of system call and page fault, checks
    /// what comes back, and ends with a #GP.
    fn with_kernel(mut self, rounds: u64, return_flags: u64) -> Self {
        for root in [KERNEL_ROOT, USER_ROOT] {
            self.write(root, 0x3000 | PAGE);
        }
        let iret = |a: &mut CodeAssembler, flags: u64| {
            // RCX, R11 are what they were; above them lie RIP, CS and the rest.
            a.mov(dword_ptr(rsp + 12), 0)?;
            a.push(i32::try_from(flags).unwrap())?;
            a.push(rcx)?;
            a.push(r11)?;
            a.push(rax)?;
            a.mov(eax, u32::try_from(IRET).unwrap())?;
            a.syscall()
        };
        self.load_at(SYSCALL_ENTRY, BASE, |a| {
            a.pop(rcx)?;
            a.pop(r11)?;
            a.push(rdx)?;
            a.mov(rdx, BASE + SYSTEM_CALLS)?;
            a.inc(qword_ptr(rdx))?;
            a.mov(rax, qword_ptr(rdx))?;
            a.pop(rdx)?;
            iret(a, return_flags)
        });
        self.load_at(FAULT_ENTRY, BASE, |a| {
            a.pop(rcx)?;
            a.pop(r11)?;
            // The error code goes; the faulting instruction has three bytes.
            a.add(rsp, 8)?;
            a.add(qword_ptr(rsp), 3)?;
            a.push(rdx)?;
            a.mov(rdx, BASE + FAULTS)?;
            a.inc(qword_ptr(rdx))?;
            a.pop(rdx)?;
            iret(a, 0)
        });
        self.load_at(PROGRAM, 0, |a| {
            let (mut again, mut wrong) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.inc(rbx)?;
            a.stc()?;
            a.syscall()?;
            // Flags, and the answer.
            a.jnc(wrong)?;
            a.cmp(rax, rbx)?;
            a.jne(wrong)?;
            a.mov(rcx, r12)?;
            a.mov(r11, r12)?;
            a.mov(rdi, NOWHERE)?;
            a.mov(rsi, qword_ptr(rdi))?;
            // A fault changes nothing.
            a.cmp(rcx, r12)?;
            a.jne(wrong)?;
            a.cmp(r11, r12)?;
            a.jne(wrong)?;
            a.dec(r13)?;
            a.jne(again)?;
            a.hlt()?;
            a.set_label(&mut wrong)?;
            a.ud2()
        });
        for (gpa, value) in [(SYSTEM_CALLS, 0), (FAULTS, 0), (INFO, 0)] {
            self.write(gpa, value);
        }
        let context = self.engine.context();
        context.kernel_sp = BASE + KERNEL_STACK;
        context.switch_mode(GuestMode::User);
        let general = &mut context.general;
        (general.rip, general.rsp) = (PROGRAM, PROGRAM_STACK);
        (general.rbx, general.r12, general.r13) = (0, CALLER_SAVED, rounds);
        (general.rbp, general.r8, general.r9, general.r10) = (1, 2, 3, 4);
        (general.r14, general.r15, general.rdx) = (5, 6, 7);
        self
    }

    /// What the ABI does with exits of this guest, in as few words as possible. `false` for one that ends it.
    fn serve(&mut self, exit: EngineExit) -> bool {
        let context = *self.engine.context();
        match (exit, context.mode) {
            (EngineExit::Interrupted, _) => true,
            (EngineExit::Syscall, GuestMode::User) => {
                let general = self.general();
                (general.rcx, general.r11) = (general.rip, general.rflags);
                self.enter(BASE + SYSCALL_ENTRY, None);
                true
            }
            (EngineExit::Exception { vector: 14, error_code, .. }, GuestMode::User) => {
                self.enter(BASE + FAULT_ENTRY, Some(u64::from(error_code | 4)));
                true
            }
            (EngineExit::Syscall, GuestMode::Kernel) if context.general.rax == IRET => {
                let frame = context.general.rsp - BASE;
                let word = |index: u64| self.read(frame + index * 8);
                let [answer, flags_was, count, flags, to] = [0, 1, 2, 3, 4].map(word);
                let [of_program, stack] = [6, 7].map(word);
                let context = self.engine.context();
                context.switch_mode(GuestMode::User);
                let general = &mut context.general;
                (general.rax, general.rip, general.rsp, general.rflags) = (answer, to, stack, of_program);
                let by_syscall = flags & IN_SYSCALL != 0;
                (general.rcx, general.r11) = if by_syscall { (to, of_program) } else { (count, flags_was) };
                self.machine.ram().memory().write_obj(0_u8, GuestAddress(INFO + 1)).unwrap();
                true
            }
            _ => false,
        }
    }

    /// Enters the guest kernel as the ABI does.
    fn enter(&mut self, at: u64, error: Option<u64>) {
        let context = *self.engine.context();
        let g = context.general;
        let mut frame = vec![g.rcx, g.r11];
        frame.extend(error);
        frame.extend([g.rip, context.cs.into(), g.rflags | rflags::IF, g.rsp, context.ss.into()]);
        let top = BASE + KERNEL_STACK - frame.len() as u64 * 8;
        for (index, word) in (0..).zip(frame) {
            self.write(top - BASE + index * 8, word);
        }
        self.machine.ram().memory().write_obj(1_u8, GuestAddress(INFO + 1)).unwrap();
        let context = self.engine.context();
        context.switch_mode(GuestMode::Kernel);
        (context.general.rip, context.general.rsp) = (at, top);
    }

    /// Runs to the end and says how often the guest left.
    fn run_to_the_end(&mut self) -> u64 {
        let mut exits = 0;
        loop {
            let exit = self.run();
            if !self.serve(exit) {
                assert_eq!((exit, self.engine.context().mode), (exception(13, 0), GuestMode::User));
                return exits;
            }
            exits += 1;
        }
    }

    fn assert_done(&mut self, rounds: u64) {
        assert_eq!([SYSTEM_CALLS, FAULTS].map(|count| self.read(count)), [rounds; 2]);
        let context = *self.engine.context();
        let g = context.general;
        assert_eq!((g.rbx, g.r12, g.r13, g.rsp), (rounds, CALLER_SAVED, 0, PROGRAM_STACK));
        assert_eq!((g.rbp, g.r8, g.r9, g.r10, g.r14, g.r15, g.rdx), (1, 2, 3, 4, 5, 6, 7));
        assert_eq!(context.kernel_sp, BASE + KERNEL_STACK);
        assert_eq!((context.gs_base, context.other_gs_base), (0x1000, BASE + 0x2000));
        assert_eq!(self.read(INFO) >> 8 & 0xff, 0, "events are not masked in the program");
    }

    fn count(&self, of: &str) -> u64 {
        self.engine.fast_counts().into_iter().find(|(kind, _)| *kind == of).map_or(0, |(_, count)| count)
    }
}

/// Runs a test on every backend, with the shim.
fn with_shim(test: impl Fn(Guest)) {
    everywhere(|guest| {
        if guest.has_shim() {
            test(guest);
        }
    });
}

#[test]
fn system_calls_and_faults_reach_the_kernel_and_come_back() {
    for return_flags in [0, IN_SYSCALL] {
        everywhere(|guest| {
            const ROUNDS: u64 = 50;
            let mut guest = guest.with_kernel(ROUNDS, return_flags);
            (guest.engine.context().gs_base, guest.engine.context().other_gs_base) = (0x1000, BASE + 0x2000);
            guest.engine.set_fast_path(&fast_path());
            let exits = guest.run_to_the_end();
            guest.assert_done(ROUNDS);
            if guest.has_shim() {
                assert!(exits < ROUNDS, "the kernel was reached without leaving the guest: {exits}");
                assert_eq!(guest.count("fast system call"), ROUNDS);
                assert_eq!(guest.count("fast page fault"), ROUNDS);
                assert_eq!(guest.count("fast return"), 2 * ROUNDS);
            } else {
                assert_eq!(exits, 4 * ROUNDS);
            }
        });
    }
}

#[test]
fn kicks_in_the_middle_of_the_shim_change_nothing() {
    for return_flags in [0, IN_SYSCALL] {
        everywhere(|guest| {
            const ROUNDS: u64 = 4000;
            let mut guest = guest.with_kernel(ROUNDS, return_flags);
            (guest.engine.context().gs_base, guest.engine.context().other_gs_base) = (0x1000, BASE + 0x2000);
            guest.engine.set_fast_path(&fast_path());
            let (handle, done) = (guest.engine.handle(), AtomicBool::new(false));
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        handle.kick();
                        // Varied, so that the kicks find the guest everywhere.
                        for _ in 0..std::process::id() % 7 + 40 {
                            std::thread::yield_now();
                        }
                    }
                });
                guest.run_to_the_end();
                done.store(true, Ordering::Relaxed);
            });
            guest.assert_done(ROUNDS);
        });
    }
}

#[test]
fn nothing_is_done_without_leave() {
    everywhere(|guest| {
        const ROUNDS: u64 = 5;
        let mut guest = guest.with_kernel(ROUNDS, IN_SYSCALL);
        (guest.engine.context().gs_base, guest.engine.context().other_gs_base) = (0x1000, BASE + 0x2000);
        guest.engine.set_fast_path(&FastPath { enabled: false, syscall: 0, page_fault: 0, ..fast_path() });
        assert_eq!(guest.run_to_the_end(), 4 * ROUNDS);
        guest.assert_done(ROUNDS);
    });
}

/// A guest kernel's hypercalls, by a shim that may do them.
struct Hypercalls(Guest);

impl Hypercalls {
    const LIST: u64 = DATA + 0x1000;
    const DONE: u64 = DATA + 0x2000;
    const SELF: u64 = 0x7ff0;

    fn new(guest: Guest) -> Self {
        let mut guest = guest;
        guest.load(|a| {
            a.syscall()?;
            a.hlt()?;
            Ok(())
        });
        // As the ABI has them known: the lowest tables, the one above, and a root.
        let layout = guest.machine.layout();
        let marks = (0..4).map(|table| ((LEAF >> 12) + table, 1));
        for (frame, mark) in
            marks.chain([(4, 2), (3, 3), (KERNEL_ROOT >> 12, 4 | 0x40), (USER_ROOT >> 12, 4 | 0x20)])
        {
            let place = layout.mark(frame).unwrap();
            guest.machine.ram().memory().write_obj::<u8>(mark, place).unwrap();
        }
        guest.engine.set_fast_path(&fast_path());
        Self(guest)
    }

    fn list(&self, words: &[u64]) {
        for (index, word) in (0..).zip(words) {
            self.0.write(Self::LIST + index * 8, *word);
        }
    }

    /// Makes one; RAX if the shim did it, `None` if it left it to the ABI, with the registers as they were.
    fn call(&mut self, nr: u64, [a, b, c, d]: [u64; 4]) -> Option<u64> {
        let before = *self.0.engine.context();
        let general = self.0.general();
        (general.rip, general.rax) = (BASE + CODE, nr);
        (general.rdi, general.rsi, general.rdx, general.r10) = (a, b, c, d);
        (general.rbx, general.r12, general.r15) = (CALLER_SAVED, 12, 15);
        match self.0.run() {
            EngineExit::Exception { vector: 13, .. } => {
                let after = *self.0.general();
                assert_eq!((after.rip, after.rsp), (BASE + CODE + 2, before.general.rsp));
                assert_eq!((after.rbx, after.r12, after.r15), (CALLER_SAVED, 12, 15));
                Some(after.rax)
            }
            EngineExit::Syscall => {
                let after = *self.0.general();
                assert_eq!((after.rip, after.rax, after.rsp), (BASE + CODE + 2, nr, before.general.rsp));
                assert_eq!((after.rdi, after.rsi, after.rdx, after.r10), (a, b, c, d));
                None
            }
            other => panic!("hypercall {nr}: {other:?}"),
        }
    }
}

#[test]
fn hypercalls_are_done_as_the_abi_does_them() {
    with_shim(|guest| {
        const MMU_UPDATE: u64 = 1;
        let mut h = Hypercalls::new(guest);
        let list = BASE + Hypercalls::LIST;
        // The page at 1 MiB + 512 KiB of the window that BASE is.
        let (entry, va) = (LEAF + 0x180 * 8, BASE + 0x18_0000);
        h.0.write(0x19_0000, 0x1919);

        // An entry without the user bit and with the global one, then one that keeps accessed and dirty.
        h.list(&[entry, 0x19_0103, (0x30_0000 >> 12 << 12) | 1, 0x77]);
        let before = h.0.read(entry);
        assert_eq!(before, 0x18_0000 | PAGE);
        assert_eq!(h.call(MMU_UPDATE, [list, 2, BASE + Hypercalls::DONE, Hypercalls::SELF]), Some(0));
        assert_eq!(h.0.read(entry), 0x19_0007);
        assert_eq!(h.0.read(Hypercalls::DONE) & 0xffff_ffff, 2);
        let m2p = h.0.machine.layout().m2p_entry(0x300).unwrap();
        assert_eq!(h.0.read(m2p.0), 0x77);
        h.0.write(entry, 0x19_0067);
        h.list(&[entry | 2, 0x19_0003]);
        assert_eq!(h.call(MMU_UPDATE, [list, 1, 0, Hypercalls::SELF]), Some(0));
        assert_eq!(h.0.read(entry), 0x19_0067);

        // With a flush of the page, what is read there is the new frame's.
        h.list(&[7, va, 0]);
        assert_eq!(h.call(26, [list, 1, 0, Hypercalls::SELF]), Some(0));
        h.0.load(|a| {
            a.mov(rax, va)?;
            a.mov(rax, qword_ptr(rax))?;
            a.hlt()
        });
        h.0.general().rip = BASE + CODE;
        assert_eq!(h.0.run(), exception(13, 0));
        assert_eq!(h.0.general().rax, 0x1919);
        h.0.load(|a| {
            a.syscall()?;
            a.hlt()
        });

        // update_va_mapping, back, with a flush.
        assert_eq!(h.call(14, [va, 0x18_0001, 2, 0]), Some(0));
        assert_eq!(h.0.read(entry), 0x18_0005);
        // Stack, bases.
        assert_eq!(h.call(3, [0xe02b, BASE + 0x1230, 0, 0]), Some(0));
        assert_eq!(h.0.engine.context().kernel_sp, BASE + 0x1230);
        for (which, base) in [(0, 0x1000), (1, BASE + 8), (2, BASE + 16)] {
            assert!(matches!(h.call(25, [which, base, 0, 0]), Some(0) | None), "some processors cannot");
        }
        // The selector that programs have, which takes their base away, not the kernel's.
        assert!(h.0.engine.set_descriptor(5, 0x00cf_f300_0000_ffff));
        assert!(h.0.engine.set_descriptor(6, 0x00af_fb00_0000_ffff));
        for selector in [0x2b, 0] {
            h.0.engine.context().gs_base = BASE + 24;
            h.0.engine.context().other_gs_base = BASE + 32;
            if h.call(25, [3, selector, 0, 0]) == Some(0) {
                let context = h.0.engine.context();
                assert_eq!((context.gs_base, context.other_gs_base), (BASE + 24, 0), "{selector:#x}");
            }
        }
        // A virtual processor that is not there: ENOENT.
        assert_eq!(h.call(24, [3, 2, 0, 0]), Some(2_u64.wrapping_neg()));
        assert_eq!(h.call(24, [3, u64::from(u32::MAX), 0, 0]), Some(2_u64.wrapping_neg()));
        // Roots.
        h.list(&[5, KERNEL_ROOT >> 12, 0, 15, USER_ROOT >> 12, 0]);
        assert_eq!(h.call(26, [list, 2, 0, Hypercalls::SELF]), Some(0));
        assert_eq!(h.0.engine.kernel_root(), GuestAddress(KERNEL_ROOT));
        // Several at once: each has its result.
        h.list(&[3, 9, 0xe02b, BASE + 0x4560, 0, 0, 0, 0, 24, 9, 3, 77, 0, 0, 0, 0]);
        assert_eq!(h.call(13, [list, 2, 0, 0]), Some(0));
        assert_eq!(h.0.engine.context().kernel_sp, BASE + 0x4560);
        let results = [1, 9].map(|word: u64| h.0.read(Hypercalls::LIST + word * 8));
        assert_eq!(results, [0, 2_u64.wrapping_neg()]);
    });
}

#[test]
fn what_is_unusual_is_left_to_the_abi() {
    with_shim(|guest| {
        let mut h = Hypercalls::new(guest);
        let list = BASE + Hypercalls::LIST;
        let frames = h.0.machine.layout().frames();
        let end = h.0.machine.layout().abi_frames().end;
        let own = Hypercalls::SELF;
        for (what, nr, list_words, arguments) in [
            ("no such call", 63, vec![], [0; 4]),
            ("a number of 64 bits", 1 << 32 | 3, vec![], [0; 4]),
            ("another domain", 1, vec![LEAF, 0], [list, 1, 0, 1]),
            ("tables of another domain", 1, vec![LEAF, 0], [list, 1, 0, own | 2 << 16]),
            ("many updates", 1, vec![LEAF, 0], [list, 513, 0, own]),
            ("a list nowhere", 1, vec![], [NOWHERE, 1, 0, own]),
            ("a list at no address", 1, vec![], [1 << 50, 1, 0, own]),
            ("a table beyond RAM", 1, vec![frames << 12, 0], [list, 1, 0, own]),
            ("a frame that is not the guest's", 1, vec![LEAF, end << 12 | 3], [list, 1, 0, own]),
            ("an entry that maps a table writable", 1, vec![LEAF, 0x4000 | 3], [list, 1, 0, own]),
            ("an upper entry that is no table's", 1, vec![0x4000, 0x20_0000 | 3], [list, 1, 0, own]),
            ("an upper entry of another level", 1, vec![0x3000, LEAF | 3], [list, 1, 0, own]),
            ("a large page", 1, vec![0x4000, LEAF | 0x83], [list, 1, 0, own]),
            ("a slot of Xen's", 1, vec![KERNEL_ROOT + 258 * 8, 0], [list, 1, 0, own]),
            ("machine-to-physical of no frame", 1, vec![frames << 12 | 1, 0], [list, 1, 0, own]),
            ("a root that is none", 26, vec![5, 0x100, 0], [list, 1, 0, own]),
            ("a user root that is the kernel's", 26, vec![15, KERNEL_ROOT >> 12, 0], [list, 1, 0, own]),
            ("no user root", 26, vec![15, 0, 0], [list, 1, 0, own]),
            ("a pin", 26, vec![3, 3, 0], [list, 1, 0, own]),
            ("a multicall in a multicall", 13, vec![13, 0, list, 1], [list, 1, 0, 0]),
            ("a return in a multicall", 13, vec![23, 0, 0, 0], [list, 1, 0, 0]),
            ("an address that is not canonical", 14, vec![], [1 << 47, 0, 0, 0]),
            ("an address in Xen's range", 14, vec![], [PRIVATE_VA, 0, 0, 0]),
            ("a base that is not canonical", 25, vec![], [2, 1 << 47, 0, 0]),
            ("no such base", 25, vec![], [4, 0, 0, 0]),
            ("a selector that is none", 25, vec![], [3, 0x2b, 0, 0]),
            ("another selector", 25, vec![], [3, 0x33, 0, 0]),
            ("a virtual processor that is there", 24, vec![], [3, 1, 0, 0]),
            ("a flush elsewhere", 26, vec![11, BASE, 0], [list, 1, 0, own]),
            ("another command of one that is not", 24, vec![], [1, 9, 0, 0]),
        ] {
            h.list(&list_words);
            assert_eq!(h.call(nr, arguments), None, "{what}");
        }
        // IRET with an event that waits, to no program, with flags that need more.
        for (what, pending, words) in [
            ("an event", 1, [0; 9]),
            ("no canonical address", 0, [0, 0, 0, 0, 1 << 47, 0x33, 0x202, 0, 0x2b]),
            ("single step", 0, [0, 0, 0, 0, CODE, 0xe033, 0x302, 0, 0xe02b]),
            ("level 1", 0, [0, 0, 0, 0, CODE, 0xe031, 0x202, 0, 0xe02b]),
            ("32 bits", 0, [0, 0, 0, 0, CODE, 0xe023, 0x202, 0, 0xe02b]),
        ] {
            h.list(&words);
            h.0.write(INFO, pending);
            if pending != 0 {
                h.list(&[0, 0, 0, 0, CODE, 0xe033, 0x202, 0, 0xe02b]);
            }
            h.0.general().rsp = list;
            assert_eq!(h.call(IRET, [0; 4]), None, "{what}");
            assert_eq!(h.0.read(INFO), pending, "{what}: the mask is untouched");
        }
    });
}

#[test]
fn a_kernel_stack_that_is_not_there_is_left_to_the_abi() {
    with_shim(|guest| {
        let mut guest = guest.with_kernel(1, 0);
        guest.engine.set_fast_path(&fast_path());
        for stack in [NOWHERE, 1 << 50, ShimPages::entry(0)] {
            let context = guest.engine.context();
            context.kernel_sp = stack;
            let before = *context;
            assert_eq!(guest.run(), EngineExit::Syscall, "{stack:#x}");
            let after = *guest.engine.context();
            assert_eq!(after.mode, GuestMode::User);
            assert_eq!(
                (after.general.rsp, after.gs_base, after.kernel_sp),
                (before.general.rsp, before.gs_base, stack)
            );
            *guest.engine.context() = before;
        }
    });
}

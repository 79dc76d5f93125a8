//! What a window needs of the process: signals, mappings, threads. Most of these tests change what belongs to all of the
//! process, so they run in one of their own.
#![allow(unsafe_code, reason = "signals and mappings are the process's")]

use std::os::unix::process::ExitStatusExt as _;
use std::process::Output;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use iced_x86::code_asm::*;
use vmm_cpu::{GuestAccess, Halt, Vcpu};
use vmm_memory::vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
use vmm_memory::{Backing, GuestRam, RegionConfig};

use crate::machine::{Call, DATA, EXTRA, SPACE, Setup, Tier, build, call, figure, page, run};
use crate::own_process;

const PLACE: u64 = 0x1234_5678_0000;

/// Runs a test in a process of its own; what became of that.
fn alone(name: &str, test: impl FnOnce()) -> Option<Output> {
    let output = own_process::run(&format!("process::{name}"));
    if output.is_none() {
        test();
    }
    output
}

/// The same for a test that must pass.
fn passes_alone(name: &str, test: impl FnOnce()) {
    if own_process::is_it(&format!("process::{name}")) {
        test();
    }
}

/// Where the number is that the second half counts to.
const END: u64 = page(2) + 0x808;

/// A program that counts to `end` in memory and in RBP, and reaches the test half way. It uses two pages, and then a third.
fn counting(setup: &mut Setup, end: u64) {
    setup.word(END - 8, end / 2);
    setup.word(END, end);
    setup.map(SPACE, PLACE, page(1), DATA);
    setup.map(SPACE, PLACE + 0x1000, page(2), DATA);
    setup.map(SPACE, PLACE + 0x2000, page(3), DATA);
    let mut a = CodeAssembler::new(64).unwrap();
    let mut emit = || -> Result<(), IcedError> {
        a.mov(rbx, PLACE)?;
        a.xor(ebp, ebp)?;
        for half in 0..2 {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.lock().inc(qword_ptr(rbx))?;
            a.inc(rbp)?;
            a.add(qword_ptr(rbx + 0x1000), rbp)?;
            a.cmp(rbp, qword_ptr(rbx + (0x1800 + 8 * half)))?;
            a.jb(again)?;
            if half == 0 {
                call(&mut a, Call::Tell(0));
                a.mov(qword_ptr(rbx + 0x2000), 1)?;
            }
        }
        call(&mut a, Call::Exit);
        Ok(())
    };
    emit().unwrap();
    setup.program(&mut a);
}

fn has_counted(setup: &Setup, vcpu: &mut dyn Vcpu, end: u64) {
    assert_eq!((setup.read(page(1)), vcpu.registers().unwrap().rbp), (end, end));
    let sum = u128::from(end) * u128::from(end + 1) / 2;
    assert_eq!(setup.read(page(2)), sum as u64);
}

/// A machine that has counted half way, with a window.
fn half_way(tier: Tier, end: u64) -> (Setup, Box<dyn Vcpu>) {
    let (mut setup, mut vcpu) = build(tier);
    counting(&mut setup, end);
    let handle = vcpu.handle();
    let halt = run(&mut setup, &mut *vcpu, |_, _| handle.kick());
    assert_eq!((halt, figure(&*vcpu, "window-pages-mapped")), (Halt::Interrupted, 2));
    (setup, vcpu)
}

fn block(how: libc::c_int) {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: the set is this function's.
    unsafe { libc::sigfillset(set.as_mut_ptr()) };
    // SAFETY: it was just filled, and the call changes nothing but this thread's mask.
    assert_eq!(unsafe { libc::pthread_sigmask(how, set.as_ptr(), ptr::null_mut()) }, 0);
}

#[test]
fn a_thread_that_blocks_signals_needs_none() {
    passes_alone("a_thread_that_blocks_signals_needs_none", || {
        // With a window from another thread, and without.
        let (mut setup, mut vcpu) = half_way(Tier::Window(false), 1000);
        let thread = std::thread::spawn(move || {
            block(libc::SIG_BLOCK);
            let (mut other, mut second) = build(Tier::Window(true));
            counting(&mut other, 1000);
            assert_eq!(run(&mut other, &mut *second, |_, _| {}), Halt::Halted);
            has_counted(&other, &mut *second, 1000);
            assert_eq!(figure(&*second, "window-pages-mapped"), 0);

            assert_eq!(run(&mut setup, &mut *vcpu, |_, _| {}), Halt::Halted);
            has_counted(&setup, &mut *vcpu, 1000);
            assert_eq!(figure(&*vcpu, "window-pages-mapped"), 2);
        });
        thread.join().unwrap();
    });
}

static CAUGHT: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: libc::c_int) {
    CAUGHT.fetch_add(1, Ordering::SeqCst);
}

fn install(signal: libc::c_int, handler: libc::sighandler_t) {
    // SAFETY: the handler does only what is allowed in one.
    assert_ne!(unsafe { libc::signal(signal, handler) }, libc::SIG_ERR);
}

fn counter() -> libc::sighandler_t {
    (count as *const ()).expose_provenance()
}

/// Sends signals to the vCPU's thread while it counts.
fn count_under_signals(signal: libc::c_int) {
    let (mut setup, mut vcpu) = half_way(Tier::Window(false), 1 << 9);
    // SAFETY: the call has no pointer.
    let thread = unsafe { libc::pthread_self() };
    setup.word(END, 1 << 60);
    let ram = Arc::clone(&setup.ram);
    let sender = std::thread::spawn(move || {
        for _ in 0..300 {
            // SAFETY: the thread waits for this one before it ends.
            unsafe { libc::pthread_kill(thread, signal) };
            std::thread::sleep(Duration::from_micros(50));
        }
        ram.store(0_u64, MemoryRegionAddress(END), Ordering::Release).unwrap();
    });
    assert_eq!(run(&mut setup, &mut *vcpu, |_, _| {}), Halt::Halted);
    sender.join().unwrap();
    let count = vcpu.registers().unwrap().rbp;
    has_counted(&setup, &mut *vcpu, count);
    assert_eq!(figure(&*vcpu, "window-pages-mapped"), 3);
}

#[test]
fn signals_that_somebody_sends_are_no_faults() {
    passes_alone("signals_that_somebody_sends_are_no_faults", || {
        install(libc::SIGSEGV, counter());
        install(libc::SIGBUS, libc::SIG_IGN);
        count_under_signals(libc::SIGSEGV);
        // Equal ones may have become one.
        let caught = CAUGHT.load(Ordering::SeqCst);
        assert!((1..=300).contains(&caught), "{caught} of 300");
        count_under_signals(libc::SIGBUS);
        assert_eq!(CAUGHT.load(Ordering::SeqCst), caught);
    });
}

#[test]
fn a_signal_that_somebody_sends_can_end_the_process() {
    let output = alone("a_signal_that_somebody_sends_can_end_the_process", || {
        install(libc::SIGSEGV, libc::SIG_DFL);
        half_way(Tier::Window(true), 10);
        // SAFETY: the call has no pointer.
        unsafe { libc::raise(libc::SIGSEGV) };
    });
    assert!(output.is_none_or(|output| output.status.signal() == Some(libc::SIGSEGV)));
}

#[test]
fn a_handler_of_later_is_nobodys_loss() {
    passes_alone("a_handler_of_later_is_nobodys_loss", || {
        let (mut setup, mut vcpu) = half_way(Tier::Window(true), 1000);
        install(libc::SIGSEGV, counter());
        assert_eq!(run(&mut setup, &mut *vcpu, |_, _| {}), Halt::Halted);
        has_counted(&setup, &mut *vcpu, 1000);
        assert_eq!((figure(&*vcpu, "window-pages-mapped"), CAUGHT.load(Ordering::SeqCst)), (2, 0));
    });
}

#[test]
#[allow(unconditional_recursion, reason = "the stack is to overflow")]
fn a_stack_that_overflows_is_still_reported() {
    fn deeper(depth: u64) -> u64 {
        let place = std::hint::black_box([depth; 512]);
        deeper(place[7] + 1) + place[3]
    }
    let output = alone("a_stack_that_overflows_is_still_reported", || {
        half_way(Tier::Window(true), 10);
        std::hint::black_box(deeper(0));
    });
    let Some(output) = output else { return };
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.signal() == Some(libc::SIGABRT) && text.contains("has overflowed its stack"),
        "{text}"
    );
}

#[test]
fn a_handler_of_before_keeps_its_stack_and_its_mask() {
    passes_alone("a_handler_of_before_keeps_its_stack_and_its_mask", || {
        let action = || {
            let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
            // SAFETY: the kernel writes an action there.
            assert_eq!(unsafe { libc::sigaction(libc::SIGSEGV, ptr::null(), action.as_mut_ptr()) }, 0);
            // SAFETY: it did.
            unsafe { action.assume_init() }
        };
        let mut before = action();
        (before.sa_sigaction, before.sa_flags) = (counter(), libc::SA_RESTART);
        // SAFETY: the set is this function's.
        unsafe { libc::sigaddset(&raw mut before.sa_mask, libc::SIGUSR1) };
        // SAFETY: the handler does only what is allowed in one.
        assert_eq!(unsafe { libc::sigaction(libc::SIGSEGV, &raw const before, ptr::null_mut()) }, 0);
        half_way(Tier::Window(true), 10);
        let now = action();
        let flags = libc::SA_ONSTACK | libc::SA_SIGINFO | libc::SA_RESTART;
        assert_eq!(now.sa_flags & flags, libc::SA_SIGINFO | libc::SA_RESTART);
        // SAFETY: the set is this function's.
        assert_eq!(unsafe { libc::sigismember(&raw const now.sa_mask, libc::SIGUSR1) }, 1);
        // SAFETY: the call has no pointer.
        unsafe { libc::raise(libc::SIGSEGV) };
        assert_eq!(CAUGHT.load(Ordering::SeqCst), 1);
    });
}

#[test]
fn memory_that_the_host_has_lost_is_no_fault_of_the_guest() {
    // Compare-and-exchange goes through the TLB: its page is gone, and what came before it is not done again.
    let output = alone("memory_that_the_host_has_lost_is_no_fault_of_the_guest", || {
        let (mut setup, mut vcpu) = build(Tier::Window(true));
        let file = Arc::new(tempfile());
        file.set_len(0x1_0000).unwrap();
        let backing = Backing::File { file: Arc::clone(&file), offset: 0 };
        let config = RegionConfig::new(GuestAddress(EXTRA), 0x1_0000).backing(backing);
        let region = GuestRam::builder().region(config).build().unwrap().regions().remove(0);
        setup.vm.map_memory(region, GuestAccess::ReadWrite).unwrap();
        setup.map(SPACE, PLACE, page(1), DATA);
        setup.map(SPACE, PLACE + 0x1000, EXTRA, DATA);
        let mut a = CodeAssembler::new(64).unwrap();
        let mut emit = || -> Result<(), IcedError> {
            let mut again = a.create_label();
            a.mov(rbx, PLACE)?;
            a.set_label(&mut again)?;
            a.inc(qword_ptr(rbx))?;
            a.lock().cmpxchg(qword_ptr(rbx + 0x1000), rax)?;
            a.cmp(qword_ptr(rbx), 2)?;
            let mut end = a.create_label();
            a.ja(end)?;
            a.jb(again)?;
            call(&mut a, Call::Tell(0));
            a.jmp(again)?;
            a.set_label(&mut end)?;
            call(&mut a, Call::Exit);
            Ok(())
        };
        emit().unwrap();
        setup.program(&mut a);
        run(&mut setup, &mut *vcpu, |_, _| file.set_len(0).unwrap());
    });
    let Some(output) = output else { return };
    assert!(matches!(output.status.signal(), Some(libc::SIGABRT | libc::SIGBUS)), "{}", output.status);
}

/// A file that nobody else finds.
fn tempfile() -> std::fs::File {
    // SAFETY: the name is a string of C, and the call has no other pointer.
    let descriptor = unsafe { libc::memfd_create(c"region".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(descriptor >= 0);
    // SAFETY: the descriptor is new, and nobody else has it.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(descriptor) }
}

/// Takes all mappings that the process may have.
fn take_all_mappings() -> (*mut libc::c_void, usize) {
    let (len, flags) = (1 << 30, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: a new mapping replaces nothing.
    let memory = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
    assert_ne!(memory, libc::MAP_FAILED);
    // Every second page is unlike its neighbours.
    for place in (0..len).step_by(8192) {
        let page = memory.wrapping_byte_add(place);
        // SAFETY: the page is of what was just mapped.
        if unsafe { libc::mprotect(page, 4096, libc::PROT_READ) } != 0 {
            return (memory, len);
        }
    }
    panic!("there is no limit");
}

#[test]
fn a_page_can_go_also_where_no_mapping_is_left() {
    passes_alone("a_page_can_go_also_where_no_mapping_is_left", || {
        let (mut setup, mut vcpu) = build(Tier::Window(false));
        // Neighbours at neighbours: the host has one mapping for all of them.
        let entries: Vec<u64> =
            (0..8).map(|n| setup.map(SPACE, PLACE + n * 0x1000, page(1 + n), DATA)).collect();
        for n in 0..8 {
            setup.word(page(1 + n), 100 + n);
        }
        let mut a = CodeAssembler::new(64).unwrap();
        let sum = |a: &mut CodeAssembler, to| -> Result<(), IcedError> {
            a.mov(rbx, PLACE)?;
            a.xor(to, to)?;
            for n in 0..8 {
                a.add(qword_ptr(rbx + n * 0x1000 + 8), 1)?;
                a.add(to, qword_ptr(rbx + n * 0x1000))?;
            }
            Ok(())
        };
        sum(&mut a, r12).unwrap();
        sum(&mut a, r12).unwrap();
        call(&mut a, Call::Tell(0));
        call(&mut a, Call::Store(entries[3], page(20) | DATA));
        call(&mut a, Call::Invalidate(PLACE + 0x3000));
        call(&mut a, Call::Tell(1));
        sum(&mut a, r13).unwrap();
        sum(&mut a, r14).unwrap();
        call(&mut a, Call::Exit);
        setup.program(&mut a);
        let mut taken = None;
        let halt = run(&mut setup, &mut *vcpu, |_, what| {
            if what == 0 {
                taken = Some(take_all_mappings());
            } else if let Some((memory, len)) = taken.take() {
                // SAFETY: nobody uses it.
                assert_eq!(unsafe { libc::munmap(memory, len) }, 0);
            }
        });
        assert_eq!(halt, Halt::Halted);
        let registers = vcpu.registers().unwrap();
        assert_eq!((registers.r12, registers.r13, registers.r14), (828, 725, 725));
        assert_eq!((setup.read(page(4) + 8), setup.read(page(20) + 8)), (2, 2));
        assert!(figure(&*vcpu, "window-pages-mapped") >= 16);
    });
}

extern "C" fn in_thread(argument: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: the argument is a sender that the test has leaked for this thread.
    let sender = unsafe { Box::from_raw(argument.cast::<mpsc::Sender<u64>>()) };
    let (mut setup, mut vcpu) = half_way(Tier::Window(true), 1000);
    run(&mut setup, &mut *vcpu, |_, _| {});
    sender.send(setup.read(page(2))).unwrap();
    ptr::null_mut()
}

#[test]
fn a_thread_needs_no_stack_for_signals() {
    // One that Rust has not made has none.
    let (sender, receiver) = mpsc::channel::<u64>();
    let sender = Box::into_raw(Box::new(sender)).cast();
    let mut thread = std::mem::MaybeUninit::uninit();
    // SAFETY: the function takes what it is given.
    let made = unsafe { libc::pthread_create(thread.as_mut_ptr(), ptr::null(), in_thread, sender) };
    assert_eq!(made, 0);
    // SAFETY: the thread was made.
    let thread = unsafe { thread.assume_init() };
    // SAFETY: nobody else waits for it.
    assert_eq!(unsafe { libc::pthread_join(thread, ptr::null_mut()) }, 0);
    assert_eq!(receiver.recv().unwrap(), 500_500);
}

#[test]
fn machines_come_and_go_beside_each_other() {
    let threads: Vec<_> = (0..4)
        .map(|n| {
            std::thread::spawn(move || {
                for round in 0..10 {
                    let end = 2000 + 200 * n + 2 * round;
                    let (mut setup, mut vcpu) = half_way(Tier::Window(round % 2 == 0), end);
                    if round % 3 != 0 {
                        assert_eq!(run(&mut setup, &mut *vcpu, |_, _| {}), Halt::Halted);
                        has_counted(&setup, &mut *vcpu, end);
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn what_others_write_is_seen() {
    // The program waits for the host, and answers.
    let (mut setup, mut vcpu) = build(Tier::Window(false));
    setup.map(SPACE, PLACE, page(1), DATA);
    let mut a = CodeAssembler::new(64).unwrap();
    let mut emit = || -> Result<(), IcedError> {
        a.mov(rbx, PLACE)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.mov(qword_ptr(rbx + 8), rax)?;
        a.cmp(rax, 1000)?;
        a.jb(again)?;
        call(&mut a, Call::Exit);
        Ok(())
    };
    emit().unwrap();
    setup.program(&mut a);
    let ram = Arc::clone(&setup.ram);
    let host = std::thread::spawn(move || {
        for value in 1..=1000_u64 {
            let at = |word: u64| MemoryRegionAddress(page(1) + 8 * word);
            ram.store(value, at(0), Ordering::Release).unwrap();
            while ram.load::<u64>(at(1), Ordering::Acquire).unwrap() < value {
                std::thread::yield_now();
            }
        }
    });
    assert_eq!(run(&mut setup, &mut *vcpu, |_, _| {}), Halt::Halted);
    host.join().unwrap();
    assert_eq!(figure(&*vcpu, "window-pages-mapped"), 1);
}

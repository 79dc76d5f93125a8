//! Kicks: none is lost, whatever the vCPU is doing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::code_asm::{al, dword_ptr};
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_cpu::vmm_sys_util::signal::{SIGRTMAX, SIGRTMIN, block_signal};
use vmm_cpu::{EmptyBus, Halt, InterruptMode, VcpuHandle};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::{Image, Program};
use crate::suite::recorder::Access;

cases![
    kick_before_run_is_remembered_once,
    hundred_thousand_kicks_of_a_running_vcpu,
    hundred_thousand_kicks_of_a_halted_vcpu,
    hundred_thousand_kicks_of_a_vcpu_that_waits_in_run,
    bursts_of_kicks_without_waiting,
    kick_during_a_callback_that_blocks,
    kick_reaches_a_thread_that_blocks_all_signals,
    handle_outlives_its_vcpu,
];

const KICKS: u64 = 100_000;

/// Where others want the processors too, each kick and each answer waits for its turn, milliseconds instead of microseconds.
/// There are fewer kicks then: as many as fit in this time, and never less than that.
const TIME: Duration = Duration::from_secs(40);
const LEAST_KICKS: u64 = 1000;

/// After this, a vCPU that went to run or to wait is most likely there.
const SETTLED: Duration = Duration::from_micros(100);

/// Longest that the answer to one kick may take on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(10);

/// A guest that counts until it is told to end.
fn busy_guest() -> Outcome<Image> {
    let mut p = Program::new()?;
    let again = p.here()?;
    p.inc(dword_ptr(COUNTER))?;
    p.cmp(dword_ptr(layout::DATA), 0)?;
    p.je(again)?;
    p.hlt()?;
    p.assemble()
}

/// Where the busy guest counts.
const COUNTER: u64 = layout::DATA + 8;

/// A guest that halts until it is told to end.
fn halting_guest() -> Outcome<Image> {
    let mut p = Program::new()?;
    p.cli()?;
    let again = p.here()?;
    p.hlt()?;
    p.jmp(again)?;
    p.assemble()
}

/// Programs that take signals by a descriptor block them in every thread.
fn kick_reaches_a_thread_that_blocks_all_signals(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &busy_guest()?)?;
    let handle = machine.vcpu.handle();
    let (sender, ended) = mpsc::channel();
    thread::Builder::new().spawn(move || {
        for signal in SIGRTMIN()..=SIGRTMAX() {
            block_signal(signal).expect("a real-time signal can be blocked");
        }
        sender.send(machine.vcpu.run(&mut EmptyBus)).ok();
    })?;
    thread::sleep(Duration::from_millis(50));
    handle.kick();
    let halt = ended.recv_timeout(DEADLINE)??;
    assert_eq!(halt, Halt::Interrupted);
    Ok(())
}

/// A vCPU on a thread of its own that answers kicks, seen from the thread that kicks.
struct Kicked {
    handle: Arc<dyn VcpuHandle>,
    /// How often `run` has returned for a kick.
    answers: Arc<AtomicU64>,
    /// The value of `sent` at the last answer.
    seen: Arc<AtomicU64>,
    sent: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    ended: mpsc::Receiver<Outcome>,
}

impl Kicked {
    fn start(mut machine: Machine) -> Outcome<Self> {
        let (sender, ended) = mpsc::channel();
        let kicked = Self {
            handle: machine.vcpu.handle(),
            answers: Arc::default(),
            seen: Arc::default(),
            sent: Arc::default(),
            stop: Arc::default(),
            ended,
        };
        let (answers, seen, sent) = (kicked.answers.clone(), kicked.seen.clone(), kicked.sent.clone());
        let stop = Arc::clone(&kicked.stop);
        thread::Builder::new().spawn(move || {
            let mut serve = || -> Outcome {
                loop {
                    match machine.vcpu.run(&mut EmptyBus)? {
                        Halt::Interrupted if stop.load(Ordering::SeqCst) => return Ok(()),
                        Halt::Interrupted => {
                            seen.store(sent.load(Ordering::SeqCst), Ordering::SeqCst);
                            answers.fetch_add(1, Ordering::SeqCst);
                            // Where both threads share a processor, the guest would take whole time slices.
                            thread::yield_now();
                        }
                        Halt::Halted => {
                            machine.vcpu.wait(None);
                        }
                        other => return Err(Stop::failed(format!("{other:?}"))),
                    }
                }
            };
            sender.send(serve()).ok();
        })?;
        Ok(kicked)
    }

    fn kick(&self) {
        self.sent.fetch_add(1, Ordering::SeqCst);
        self.handle.kick();
    }

    /// Waits until `done`, and says at which kick it never came.
    fn until(&self, done: impl Fn() -> bool) -> Outcome {
        let deadline = Instant::now() + DEADLINE;
        let mut turns = 0_u32;
        while !done() {
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(64) {
                if let Ok(outcome) = self.ended.try_recv() {
                    outcome?;
                    return Err(Stop::failed("the vCPU's thread ended by itself"));
                }
                if Instant::now() > deadline {
                    let sent = self.sent.load(Ordering::SeqCst);
                    return Err(Stop::failed(format!("no answer to kick {sent}")));
                }
                thread::yield_now();
            }
            std::hint::spin_loop();
        }
        Ok(())
    }

    fn stop(self) -> Outcome {
        self.stop.store(true, Ordering::SeqCst);
        self.handle.kick();
        self.ended.recv_timeout(DEADLINE).map_err(|_| Stop::failed("the last kick was lost"))?
    }
}

/// Every kick waits for the answer to the one before. Most of them find the vCPU on its way into the guest; some wait
/// until it has settled there, and until a guest that is `busy` counts again.
fn lockstep(machine: Machine, busy: bool) -> Outcome {
    let ram = machine.ram.clone();
    let count = || ram.memory().read_obj::<u32>(GuestAddress(COUNTER)).unwrap_or(0);
    let kicked = Kicked::start(machine)?;
    let (start, mut kicks) = (Instant::now(), KICKS);
    for kick in 1..=KICKS {
        if kick > LEAST_KICKS && kick % 64 == 0 && start.elapsed() > TIME {
            kicks = kick - 1;
            println!("{kicks} kicks in {} s: the machine has other work", TIME.as_secs());
            break;
        }
        if kick % 64 == 0 {
            let before = count();
            thread::sleep(SETTLED);
            kicked.until(|| !busy || count() != before)?;
        }
        kicked.kick();
        kicked.until(|| kicked.answers.load(Ordering::SeqCst) >= kick)?;
    }
    let answers = Arc::clone(&kicked.answers);
    kicked.stop()?;
    assert_eq!(answers.load(Ordering::SeqCst), kicks, "one answer for each kick");
    Ok(())
}

fn kick_before_run_is_remembered_once(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.report(0x10, 1)?;
    p.hlt()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    let handle = machine.vcpu.handle();
    handle.kick();
    handle.clone().kick();
    machine.run_until(&Halt::Interrupted)?;
    assert_eq!(machine.bus.log, [], "not one instruction");
    machine.run_until(&Halt::Halted)?;
    assert_eq!(machine.bus.output(0x10), [1]);
    Ok(())
}

fn hundred_thousand_kicks_of_a_running_vcpu(backend: &Backend) -> Outcome {
    lockstep(Machine::new(backend, &busy_guest()?)?, true)
}

fn hundred_thousand_kicks_of_a_halted_vcpu(backend: &Backend) -> Outcome {
    lockstep(Machine::new(backend, &halting_guest()?)?, false)
}

fn hundred_thousand_kicks_of_a_vcpu_that_waits_in_run(backend: &Backend) -> Outcome {
    lockstep(Machine::in_mode(backend, InterruptMode::Platform, &halting_guest()?)?, false)
}

/// Kicks at random moments, several before one answer; the last one of each burst is always seen.
fn bursts_of_kicks_without_waiting(backend: &Backend) -> Outcome {
    for image in [busy_guest()?, halting_guest()?] {
        let kicked = Kicked::start(Machine::new(backend, &image)?)?;
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        for burst in 0..3000 {
            if burst % 16 == 0 {
                thread::sleep(SETTLED);
            }
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            for kick in 0..random % 8 + 1 {
                kicked.kick();
                for _ in 0..(random >> (8 + kick)) % 512 {
                    std::hint::spin_loop();
                }
            }
            kicked.until(|| kicked.seen.load(Ordering::SeqCst) == kicked.sent.load(Ordering::SeqCst))?;
        }
        kicked.stop()?;
    }
    Ok(())
}

fn kick_during_a_callback_that_blocks(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.in_(al, 0x10)?;
    p.report(0x11, 1)?;
    p.hlt()?;
    let mut machine = Machine::new(backend, &p.assemble()?)?;
    machine.bus.input.push_back(0x5a);
    let handle = machine.vcpu.handle();
    let (blocked, is_blocked) = mpsc::channel();
    let (release, released) = mpsc::channel();
    machine.bus.hook = Some(Box::new(move |access| {
        if matches!(access, Access::In { .. }) {
            blocked.send(()).ok();
            released.recv_timeout(DEADLINE).ok();
        }
    }));
    let kicker = thread::spawn(move || {
        is_blocked.recv_timeout(DEADLINE).ok();
        handle.kick();
        release.send(()).ok();
    });
    machine.run_until(&Halt::Interrupted)?;
    kicker.join().expect("the kicking thread ends");
    assert_eq!(machine.bus.output(0x11), []);
    assert_eq!(machine.vcpu.save()?.general.rax & 0xff, 0x5a, "the instruction is complete");
    machine.run_until(&Halt::Halted)?;
    assert_eq!(machine.bus.log.len(), 2, "{:?}", machine.bus.log);
    Ok(())
}

fn handle_outlives_its_vcpu(backend: &Backend) -> Outcome {
    let machine = Machine::new(backend, &halting_guest()?)?;
    let handle = machine.vcpu.handle();
    machine.ram.memory().write_obj(1_u64, GuestAddress(layout::DATA))?;
    drop(machine);
    handle.kick();
    handle.nmi()?;
    handle.set_intr(true)?;
    Ok(())
}

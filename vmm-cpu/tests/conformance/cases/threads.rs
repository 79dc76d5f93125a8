//! vCPU threads: run, pause all, look inside, resume, stop.

use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::code_asm::{al, ptr, rax, rbx};
use vmm_cpu::state::rflags;
use vmm_cpu::vmm_memory::GuestRam;
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_cpu::{
    EmptyBus, Error, Halt, InterruptMode, Notifier, Vcpu, VcpuEvents, VcpuExit, VcpuIo, VcpuThreads, Vm,
};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, layout};
use crate::suite::program::{Image, Program};

cases![
    paused_vcpus_stand_still,
    vcpus_can_be_looked_into_before_they_run,
    only_the_chosen_vcpus_run,
    notifier_tells_of_exits_and_pauses,
    vcpu_can_be_looked_into_only_while_paused,
    shutdown_of_one_leaves_the_others_running,
    panic_in_a_callback_is_an_error,
    observer_hears_of_a_stop_before_it_is_told,
    halted_vcpu_wakes_by_an_interrupt,
    pausing_halted_vcpus,
    stop_gives_the_vcpus_back,
    dropping_stops_the_threads,
    callback_pauses_all,
    pause_handle_ends_a_wait,
];

const DEADLINE: Duration = Duration::from_secs(10);
const COUNTERS: [u64; 2] = [layout::DATA, layout::DATA + 8];

type WithBus = (Box<dyn Vcpu>, Box<dyn VcpuIo + Send>);

/// A program that counts in the word that RBX points at, for ever.
fn counting() -> Outcome<Image> {
    let mut p = Program::new()?;
    let again = p.here()?;
    p.inc(rax)?;
    p.mov(ptr(rbx), rax)?;
    p.jmp(again)?;
    p.assemble()
}

/// What threads and the test share.
struct Guest {
    ram: GuestRam,
    // Holds the machine's memory.
    _vm: Arc<dyn Vm>,
}

impl Guest {
    fn counter(&self, index: usize) -> Outcome<u64> {
        Ok(self.ram.memory().read_obj(GuestAddress(COUNTERS[index]))?)
    }

    /// Waits until a counter moves.
    fn counts(&self, index: usize) -> Outcome {
        let (before, deadline) = (self.counter(index)?, Instant::now() + DEADLINE);
        while self.counter(index)? == before {
            if Instant::now() > deadline {
                return Err(Stop::failed(format!("vCPU {index} does not run")));
            }
            thread::yield_now();
        }
        Ok(())
    }
}

/// Two vCPUs of one machine that run `images`, each with the address of its counter in RBX.
fn two_vcpus(
    backend: &Backend,
    images: [&Image; 2],
    buses: [Box<dyn VcpuIo + Send>; 2],
) -> Outcome<(Vec<WithBus>, Guest)> {
    let config = backend.config(InterruptMode::External)?.vcpus(2);
    let mut machine = Machine::with_config(backend, &config, images[0])?;
    machine.write(images[1].base, images[1].bytes())?;
    let mut second = machine.vm.create_vcpu(1)?;
    second.set_system_registers(&machine.vcpu.system_registers()?)?;
    let mut registers = machine.vcpu.registers()?;
    registers.rbx = COUNTERS[0];
    machine.vcpu.set_registers(&registers)?;
    (registers.rip, registers.rbx, registers.rsp) = (images[1].base, COUNTERS[1], layout::STACK_TOP - 0x1000);
    second.set_registers(&registers)?;
    let guest = Guest { ram: machine.ram, _vm: machine.vm };
    let vcpus = [machine.vcpu, second].into_iter().zip(buses).collect();
    Ok((vcpus, guest))
}

fn two_counting(backend: &Backend) -> Outcome<(VcpuThreads, Guest)> {
    let image = counting()?;
    let (vcpus, guest) = two_vcpus(backend, [&image, &image], [Box::new(EmptyBus), Box::new(EmptyBus)])?;
    Ok((VcpuThreads::spawn(vcpus)?, guest))
}

fn vcpus_can_be_looked_into_before_they_run(backend: &Backend) -> Outcome {
    let (threads, _guest) = two_counting(backend)?;
    for (index, counter) in (0..).zip(COUNTERS) {
        assert_eq!(threads.with_vcpu(index, |vcpu| vcpu.registers())??.rbx, counter);
    }
    Ok(())
}

fn only_the_chosen_vcpus_run(backend: &Backend) -> Outcome {
    let (threads, guest) = two_counting(backend)?;
    for (runs, stands) in [(0, 1), (1, 0), (0, 1)] {
        let before = guest.counter(stands)?;
        threads.resume_only(&[u32::try_from(runs)?]);
        guest.counts(runs)?;
        assert!(threads.is_running());
        threads.pause();
        assert!(!threads.is_running());
        assert_eq!(guest.counter(stands)?, before);
    }
    threads.resume();
    guest.counts(0)?;
    guest.counts(1)
}

fn notifier_tells_of_exits_and_pauses(backend: &Backend) -> Outcome {
    let (threads, guest) = two_counting(backend)?;
    let notifier = Notifier::new()?;
    threads.notify(notifier.try_clone()?);
    assert_eq!(notifier.wait(DEADLINE)?, 1, "there may have been something before");
    threads.resume();
    guest.counts(0)?;
    assert_eq!(notifier.take()?, 0);
    threads.pause_handle().pause();
    assert_eq!(notifier.wait(DEADLINE)?, 1, "all stand still");
    assert!(threads.wait(Some(Duration::ZERO)).is_none());
    // Again, although nothing moves.
    threads.pause_handle().pause();
    assert_eq!(notifier.wait(DEADLINE)?, 1);

    let mut p = Program::new()?;
    // No handlers: a triple fault.
    p.ud2()?;
    let image = p.assemble()?;
    guest.ram.memory().write_slice(image.bytes(), GuestAddress(layout::CODE))?;
    threads.with_vcpu(0, |vcpu| {
        let registers = vcpu.registers()?;
        vcpu.set_registers(&vmm_cpu::state::GeneralRegisters { rip: layout::CODE, ..registers })
    })??;
    threads.resume_only(&[0]);
    assert_eq!(notifier.wait(DEADLINE)?, 1);
    let exit = threads.wait(Some(Duration::ZERO));
    assert!(matches!(exit, Some(VcpuExit { index: 0, reason: Ok(Halt::Shutdown) })), "{exit:?}");
    Ok(())
}

fn paused_vcpus_stand_still(backend: &Backend) -> Outcome {
    let (threads, guest) = two_counting(backend)?;
    assert_eq!((guest.counter(0)?, guest.counter(1)?), (0, 0), "they begin paused");
    for round in 0..100 {
        threads.resume();
        if round % 10 == 0 {
            guest.counts(0)?;
            guest.counts(1)?;
        }
        threads.pause();
        let before = (guest.counter(0)?, guest.counter(1)?);
        if round % 10 == 0 {
            thread::sleep(Duration::from_millis(2));
        }
        assert_eq!((guest.counter(0)?, guest.counter(1)?), before, "round {round}");
    }
    Ok(())
}

fn vcpu_can_be_looked_into_only_while_paused(backend: &Backend) -> Outcome {
    let (threads, guest) = two_counting(backend)?;
    threads.resume();
    guest.counts(1)?;
    let error = threads.with_vcpu(1, |vcpu| vcpu.index());
    assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{error:?}");
    threads.pause();
    let registers = threads.with_vcpu(1, |vcpu| vcpu.registers())??;
    assert!(registers.rax.abs_diff(guest.counter(1)?) <= 1, "the counter is in RAX and in memory");
    threads.with_vcpu(1, |vcpu| {
        let mut registers = vcpu.registers()?;
        registers.rax = 1 << 40;
        vcpu.set_registers(&registers)
    })??;
    threads.resume();
    guest.counts(1)?;
    threads.pause();
    assert!(guest.counter(1)? >= 1 << 40);
    let error = threads.with_vcpu(2, |vcpu| vcpu.index());
    assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{error:?}");
    assert_eq!(threads.indices(), [0, 1]);
    assert!(threads.handle(1).is_some() && threads.handle(2).is_none());
    Ok(())
}

fn shutdown_of_one_leaves_the_others_running(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.ud2()?;
    let dying = p.assemble_at(layout::CODE + 0x1000)?;
    let (vcpus, guest) =
        two_vcpus(backend, [&counting()?, &dying], [Box::new(EmptyBus), Box::new(EmptyBus)])?;
    let threads = VcpuThreads::spawn(vcpus)?;
    threads.resume();
    match threads.wait(Some(DEADLINE)) {
        Some(VcpuExit { index: 1, reason: Ok(Halt::Shutdown) }) => {}
        other => return Err(Stop::failed(format!("{other:?}"))),
    }
    guest.counts(0)?;
    assert!(threads.wait(Some(Duration::ZERO)).is_none(), "told once");
    threads.pause();
    Ok(())
}

/// Panics at the first access.
struct Broken;

impl VcpuIo for Broken {
    fn pio_write(&mut self, port: u16, _size: usize, _data: &[u8]) {
        panic!("no device at port {port:#x}");
    }
}

fn panic_in_a_callback_is_an_error(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.out(0x44, al)?;
    p.end()?;
    let calling = p.assemble_at(layout::CODE + 0x1000)?;
    let (vcpus, guest) =
        two_vcpus(backend, [&counting()?, &calling], [Box::new(EmptyBus), Box::new(Broken)])?;
    let threads = VcpuThreads::spawn(vcpus)?;
    threads.resume();
    match threads.wait(Some(DEADLINE)) {
        Some(VcpuExit { index: 1, reason: Err(Error::ThreadPanicked { index: 1, message }) }) => {
            assert!(message.contains("no device at port 0x44"), "{message}");
        }
        other => return Err(Stop::failed(format!("{other:?}"))),
    }
    guest.counts(0)?;
    threads.pause();
    // The vCPU stands behind or at the instruction, and can still be looked at and saved.
    threads.with_vcpu(1, |vcpu| vcpu.save().map(drop))??;
    assert_eq!(threads.stop().len(), 2);
    Ok(())
}

/// Writes down what it hears, and uses the threads meanwhile.
#[derive(Debug, Default)]
struct Observer {
    threads: OnceLock<Weak<VcpuThreads>>,
    heard: Mutex<Vec<String>>,
}

impl VcpuEvents for Observer {
    fn stopped(&self, exit: &VcpuExit) {
        if let Some(threads) = self.threads.get().and_then(Weak::upgrade) {
            // It would wait for ever for a lock that its caller holds.
            assert!(threads.is_running());
        }
        // Whoever is told first by the other way would look before this.
        thread::sleep(Duration::from_millis(20));
        self.heard.lock().unwrap().push(format!("{}: {:?}", exit.index, exit.reason));
    }
}

fn observer_hears_of_a_stop_before_it_is_told(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.ud2()?;
    let dying = p.assemble_at(layout::CODE + 0x1000)?;
    let (vcpus, _guest) =
        two_vcpus(backend, [&counting()?, &dying], [Box::new(EmptyBus), Box::new(EmptyBus)])?;
    let threads = Arc::new(VcpuThreads::spawn(vcpus)?);
    let [replaced, observer] = [(); 2].map(|()| Arc::new(Observer::default()));
    observer.threads.set(Arc::downgrade(&threads)).expect("it is new");
    threads.observe(Arc::clone(&replaced) as _);
    threads.observe(Arc::clone(&observer) as _);
    threads.resume();
    match threads.wait(Some(DEADLINE)) {
        Some(VcpuExit { index: 1, reason: Ok(Halt::Shutdown) }) => {}
        other => return Err(Stop::failed(format!("{other:?}"))),
    }
    assert_eq!(*observer.heard.lock().unwrap(), ["1: Ok(Shutdown)"]);
    assert!(replaced.heard.lock().unwrap().is_empty());
    threads.pause();
    Ok(())
}

/// Answers each acknowledge with one vector and lowers the pin.
struct Controller {
    vcpu: Arc<dyn vmm_cpu::VcpuHandle>,
}

impl VcpuIo for Controller {
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.vcpu.set_intr(false).expect("the pin is the VMM's");
        Some(0x21)
    }
}

/// A program that halts with interrupts on, for ever, and counts interrupts where RBX points.
fn halting() -> Outcome<Image> {
    let mut p = Program::new()?;
    p.sti()?;
    let again = p.here()?;
    p.hlt()?;
    p.jmp(again)?;
    p.handler(0x21)?;
    p.inc(rax)?;
    p.mov(ptr(rbx), rax)?;
    p.iretq()?;
    p.assemble()
}

fn halted_vcpu_wakes_by_an_interrupt(backend: &Backend) -> Outcome {
    let mut machine = Machine::new(backend, &halting()?)?;
    let mut registers = machine.vcpu.registers()?;
    registers.rbx = COUNTERS[0];
    machine.vcpu.set_registers(&registers)?;
    let handle = machine.vcpu.handle();
    let guest = Guest { ram: machine.ram, _vm: machine.vm };
    let bus = Box::new(Controller { vcpu: Arc::clone(&handle) });
    let threads = VcpuThreads::spawn(vec![(machine.vcpu, bus)])?;
    threads.resume();
    for interrupts in 1..=100 {
        handle.set_intr(true)?;
        let deadline = Instant::now() + DEADLINE;
        while guest.counter(0)? < interrupts {
            if Instant::now() > deadline {
                return Err(Stop::failed(format!("interrupt {interrupts} does not arrive")));
            }
            thread::yield_now();
        }
    }
    threads.pause();
    assert_eq!(guest.counter(0)?, 100);
    let flags = threads.with_vcpu(0, |vcpu| vcpu.registers())??.rflags;
    assert_ne!(flags & rflags::IF, 0);
    Ok(())
}

fn pausing_halted_vcpus(backend: &Backend) -> Outcome {
    let image = halting()?;
    let (vcpus, _guest) = two_vcpus(backend, [&image, &image], [Box::new(EmptyBus), Box::new(EmptyBus)])?;
    let threads = VcpuThreads::spawn(vcpus)?;
    for _ in 0..50 {
        threads.resume();
        threads.pause();
    }
    assert!(threads.wait(Some(Duration::ZERO)).is_none(), "a kick is no exit");
    Ok(())
}

fn stop_gives_the_vcpus_back(backend: &Backend) -> Outcome {
    let (threads, guest) = two_counting(backend)?;
    threads.resume();
    guest.counts(0)?;
    let mut vcpus = threads.stop();
    let before = (guest.counter(0)?, guest.counter(1)?);
    assert_eq!(vcpus.iter().map(|vcpu| vcpu.index()).collect::<Vec<_>>(), [0, 1]);
    for vcpu in &mut vcpus {
        vcpu.save()?;
    }
    assert_eq!((guest.counter(0)?, guest.counter(1)?), before);
    // They can go on elsewhere.
    let threads =
        VcpuThreads::spawn(vcpus.into_iter().map(|vcpu| (vcpu, Box::new(EmptyBus) as _)).collect())?;
    threads.resume();
    guest.counts(0)?;
    guest.counts(1)
}

/// Pauses all vCPUs from the callback of one, as a debug port might.
struct PausePort {
    threads: Arc<OnceLock<VcpuThreads>>,
}

impl VcpuIo for PausePort {
    fn pio_write(&mut self, _port: u16, _size: usize, _data: &[u8]) {
        self.threads.get().expect("the threads are there before they run").pause();
    }
}

fn callback_pauses_all(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.out(0x44, al)?;
    let again = p.here()?;
    p.inc(rax)?;
    p.mov(ptr(rbx), rax)?;
    p.jmp(again)?;
    let pausing = p.assemble_at(layout::CODE + 0x1000)?;
    let shared = Arc::new(OnceLock::new());
    let port = PausePort { threads: Arc::clone(&shared) };
    let (vcpus, guest) = two_vcpus(backend, [&counting()?, &pausing], [Box::new(EmptyBus), Box::new(port)])?;
    let threads = shared.get_or_init(|| VcpuThreads::spawn(vcpus).expect("threads start"));
    threads.resume();
    let deadline = Instant::now() + DEADLINE;
    // Both stand still: only then can one be looked into.
    while threads.with_vcpu(0, |_| ()).is_err() {
        if Instant::now() > deadline {
            return Err(Stop::failed("the vCPUs did not pause"));
        }
        thread::yield_now();
    }
    threads.with_vcpu(1, |_| ())?;
    threads.resume();
    guest.counts(0)?;
    guest.counts(1)?;
    threads.pause();
    Ok(())
}

fn pause_handle_ends_a_wait(backend: &Backend) -> Outcome {
    let (threads, guest) = two_counting(backend)?;
    assert!(threads.wait(None).is_none(), "nothing can happen before they run");
    let handle = threads.pause_handle();
    for _ in 0..20 {
        threads.resume();
        guest.counts(0)?;
        let pausing = thread::spawn({
            let handle = handle.clone();
            move || handle.pause()
        });
        assert!(threads.wait(None).is_none());
        threads.with_vcpu(1, |_| ())?;
        pausing.join().expect("pausing does not panic");
    }
    drop(threads);
    // Nobody is left to pause.
    handle.pause();
    Ok(())
}

fn dropping_stops_the_threads(backend: &Backend) -> Outcome {
    let (threads, guest) = two_counting(backend)?;
    threads.resume();
    guest.counts(1)?;
    drop(threads);
    let before = (guest.counter(0)?, guest.counter(1)?);
    thread::sleep(Duration::from_millis(2));
    assert_eq!((guest.counter(0)?, guest.counter(1)?), before);
    // Never resumed at all.
    drop(two_counting(backend)?);
    Ok(())
}

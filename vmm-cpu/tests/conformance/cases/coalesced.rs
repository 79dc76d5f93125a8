//! Gathered writes: none is lost, and all come in the order in which they were written.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::code_asm::{al, ax, byte_ptr, dword_ptr, dx, eax, ecx, qword_ptr, rax, rbx, word_ptr};
use vmm_cpu::state::{GeneralRegisters, SystemRegisters};
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_cpu::{CoalescedWrites, CoalescedZone, Error, Halt, InterruptMode, VcpuHandle, VcpuIo};

use crate::suite::backend::Backend;
use crate::suite::case::{Outcome, Stop, cases};
use crate::suite::machine::{Machine, flat_system_registers, layout};
use crate::suite::program::{Image, Program};
use crate::suite::recorder::Access;

cases![
    writes_come_before_the_next_exit,
    writes_come_before_a_halt,
    writes_come_before_the_answer_to_a_kick,
    more_writes_than_fit,
    random_programs_are_seen_as_without_zones,
    writes_of_two_vcpus_keep_their_order,
    waiting_writes_can_be_fetched,
    without_its_zone_a_write_does_not_wait,
    impossible_zones_are_refused,
];

const PORT: u16 = 0x5658;

/// Longest that one thread waits for another on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(10);

fn mmio(offset: u64, len: u32) -> CoalescedZone {
    CoalescedZone::Mmio { gpa: GuestAddress(layout::MMIO + offset), len }
}

fn machine(
    backend: &Backend,
    image: &Image,
    zones: &[CoalescedZone],
) -> Outcome<(Machine, Arc<dyn CoalescedWrites>)> {
    let machine = Machine::new(backend, image)?;
    let writes = machine.vm.coalesced_writes().ok_or_else(|| Stop::skipped("no gathered writes"))?;
    for zone in zones {
        writes.add_zone(*zone)?;
    }
    Ok((machine, writes))
}

fn store(gpa: u64, data: &[u8]) -> Access {
    Access::Store { gpa, data: data.to_vec() }
}

/// Exits by that name since the vCPU was made.
fn exits(machine: &Machine, name: &str) -> u64 {
    machine.vcpu.exit_counts().iter().find(|(known, _)| *known == name).map_or(0, |(_, count)| *count)
}

fn writes_come_before_the_next_exit(backend: &Backend) -> Outcome {
    let gpa = layout::MMIO;
    let mut p = Program::new()?;
    p.mov(rbx, gpa)?;
    p.mov(byte_ptr(rbx), 1)?;
    p.mov(dword_ptr(rbx + 4), 2)?;
    p.mov(eax, 3)?;
    p.mov(dx, u32::from(PORT))?;
    p.out(dx, al)?;
    p.mov(eax, dword_ptr(rbx + 8))?;
    p.mov(byte_ptr(rbx + 1), 4)?;
    p.mov(byte_ptr(rbx + 0x1000), 5)?;
    p.mov(byte_ptr(rbx + 2), 6)?;
    p.end()?;
    let zones = [mmio(0, 0x100), CoalescedZone::Pio { port: PORT, len: 1 }];
    let (mut machine, _) = machine(backend, &p.assemble()?, &zones)?;
    machine.run_to_end()?;
    let expected = [
        store(gpa, &[1]),
        store(gpa + 4, &[2, 0, 0, 0]),
        Access::Out { port: PORT, size: 1, data: vec![3] },
        Access::Load { gpa: gpa + 8, bytes: 4 },
        store(gpa + 1, &[4]),
        store(gpa + 0x1000, &[5]),
        store(gpa + 2, &[6]),
    ];
    assert_eq!(machine.bus.log, expected);
    // The one outside of the zone, and the OUT that ends the guest.
    assert_eq!((exits(&machine, "mmio-write"), exits(&machine, "pio-out")), (1, 1));
    Ok(())
}

fn writes_come_before_a_halt(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rbx, layout::MMIO)?;
    p.mov(byte_ptr(rbx), 1)?;
    p.hlt()?;
    let (mut machine, _) = machine(backend, &p.assemble()?, &[mmio(0, 1)])?;
    machine.run_until(&Halt::Halted)?;
    assert_eq!(machine.bus.log, [store(layout::MMIO, &[1])]);
    Ok(())
}

fn writes_come_before_the_answer_to_a_kick(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rbx, layout::MMIO)?;
    p.mov(byte_ptr(rbx), 2)?;
    p.mov(dword_ptr(layout::DATA), 1)?;
    let again = p.here()?;
    p.jmp(again)?;
    let (mut machine, _) = machine(backend, &p.assemble()?, &[mmio(0, 1)])?;
    let (ram, handle) = (machine.ram.clone(), machine.vcpu.handle());
    let kicker = thread::spawn(move || {
        let deadline = Instant::now() + DEADLINE;
        let written = || ram.memory().read_obj::<u32>(GuestAddress(layout::DATA)).is_ok_and(|flag| flag != 0);
        while !written() && Instant::now() < deadline {
            thread::yield_now();
        }
        handle.kick();
    });
    machine.run_until(&Halt::Interrupted)?;
    kicker.join().expect("the kicking thread ends");
    assert_eq!(machine.bus.log, [store(layout::MMIO, &[2])]);
    Ok(())
}

fn more_writes_than_fit(backend: &Backend) -> Outcome {
    const WRITES: u32 = 1000;
    let mut p = Program::new()?;
    p.mov(rbx, layout::MMIO)?;
    p.xor(ecx, ecx)?;
    let again = p.here()?;
    p.mov(dword_ptr(rbx), ecx)?;
    p.inc(ecx)?;
    p.cmp(ecx, WRITES)?;
    p.jne(again)?;
    p.end()?;
    let (mut machine, _) = machine(backend, &p.assemble()?, &[mmio(0, 4)])?;
    machine.run_to_end()?;
    let expected: Vec<_> = (0..WRITES).map(|n| store(layout::MMIO, &n.to_le_bytes())).collect();
    assert!(machine.bus.log == expected, "{} of {WRITES}", machine.bus.log.len());
    let exits = exits(&machine, "mmio-write");
    assert!((1..WRITES as u64 / 10).contains(&exits), "{exits} exits for {WRITES} writes");
    Ok(())
}

/// What a vCPU may do at a device, in all orders, in and out of zones and across their ends.
fn random_program(mut random: u64) -> Outcome<Image> {
    let mut p = Program::new()?;
    p.mov(rbx, layout::MMIO)?;
    for _ in 0..300 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let offset = (random >> 8) % 0x40;
        let at = rbx + offset;
        p.mov(rax, random)?;
        p.mov(dx, u32::from(PORT) + u32::try_from(offset % 8)?)?;
        match random % 14 {
            0 | 1 => p.mov(byte_ptr(at), al)?,
            2 | 3 => p.mov(word_ptr(at), ax)?,
            4 | 5 => p.mov(dword_ptr(at), eax)?,
            6 => p.mov(qword_ptr(at), rax)?,
            7 => p.out(dx, al)?,
            8 => p.out(dx, ax)?,
            9 => p.out(dx, eax)?,
            10 => p.in_(al, dx)?,
            11 => p.mov(eax, dword_ptr(at))?,
            // Across a page, but for the last.
            12 => p.mov(qword_ptr(rbx + (0xff9 + offset % 8)), rax)?,
            _ => p.mov(qword_ptr(rbx + (0x1ff9 + offset % 8)), rax)?,
        }
    }
    p.end()?;
    p.assemble()
}

fn random_programs_are_seen_as_without_zones(backend: &Backend) -> Outcome {
    let zones = [
        mmio(0, 0x10),
        mmio(0x18, 3),
        mmio(0x20, 0x11),
        // Both parts of a store across the border of pages, and the first one alone.
        mmio(0xff0, 0x20),
        mmio(0x1ff0, 0x10),
        CoalescedZone::Pio { port: PORT, len: 2 },
        CoalescedZone::Pio { port: PORT + 4, len: 3 },
    ];
    for seed in 1..=20 {
        let image = random_program(0x2545_f491_4f6c_dd1d_u64.wrapping_mul(seed))?;
        let (mut with, _) = machine(backend, &image, &zones)?;
        let mut without = Machine::new(backend, &image)?;
        with.run_to_end()?;
        without.run_to_end()?;
        assert!(with.bus.log.len() >= 300, "{}", with.bus.log.len());
        let differ = with.bus.log.iter().zip(&without.bus.log).position(|(with, without)| with != without);
        if let Some(at) = differ {
            let around = |log: &[Access]| {
                format!("{:?}", log.iter().skip(at.saturating_sub(2)).take(5).collect::<Vec<_>>())
            };
            let (with, without) = (around(&with.bus.log), around(&without.bus.log));
            return Err(Stop::failed(format!("seed {seed}, access {at}: {with} instead of {without}")));
        }
        assert_eq!(with.bus.log.len(), without.bus.log.len(), "seed {seed}");
        let (waited, did_not) = (exits(&with, "mmio-write"), exits(&without, "mmio-write"));
        assert!(waited < did_not, "{waited} exits, {did_not} without zones");
    }
    Ok(())
}

/// What has arrived: place and value.
type Log = Arc<Mutex<Vec<(u64, u32)>>>;

/// Notes what arrives on whichever vCPU, in the order in which it does.
struct Line {
    log: Log,
    handle: Arc<dyn VcpuHandle>,
    ended: bool,
}

impl Line {
    fn new(handle: Arc<dyn VcpuHandle>, log: &Log) -> Self {
        Self { log: Arc::clone(log), handle, ended: false }
    }
}

impl VcpuIo for Line {
    fn mmio_write(&mut self, gpa: GuestAddress, data: &[u8]) {
        let value = data.try_into().map_or(u32::MAX, u32::from_le_bytes);
        self.log.lock().unwrap().push((gpa.0 - layout::MMIO, value));
    }

    fn pio_write(&mut self, _port: u16, _size: usize, _data: &[u8]) {
        self.ended = true;
        self.handle.kick();
    }
}

fn writes_of_two_vcpus_keep_their_order(backend: &Backend) -> Outcome {
    const WRITES: u32 = 2000;
    // Each vCPU writes to a place of its own, RBX, and every 64th time to one that is in no zone.
    let mut p = Program::new()?;
    p.xor(ecx, ecx)?;
    let again = p.here()?;
    let mut inside = p.create_label();
    p.mov(rax, rbx)?;
    p.test(ecx, 0x3f)?;
    p.jnz(inside)?;
    p.add(rax, 0x1000)?;
    p.set_label(&mut inside)?;
    p.mov(dword_ptr(rax), ecx)?;
    p.inc(ecx)?;
    p.cmp(ecx, WRITES)?;
    p.jne(again)?;
    p.end()?;
    let config = backend.config(InterruptMode::External)?.vcpus(2);
    let machine = Machine::with_config(backend, &config, &p.assemble()?)?;
    let writes = machine.vm.coalesced_writes().ok_or_else(|| Stop::skipped("no gathered writes"))?;
    writes.add_zone(mmio(0, 0x100))?;
    let Machine { vcpu: first, vm, ram: _ram, .. } = machine;
    let mut second = vm.create_vcpu(1)?;
    let apic_base = second.system_registers()?.apic_base;
    second.set_system_registers(&SystemRegisters { apic_base, ..flat_system_registers() })?;
    let log = Arc::default();
    let mut vcpus = [(first, 0), (second, 0x80)];
    let entry = vcpus[0].0.registers()?;
    for (vcpu, place) in &mut vcpus {
        vcpu.set_registers(&GeneralRegisters { rbx: layout::MMIO + *place, ..entry })?;
    }
    thread::scope(|scope| {
        let running = vcpus.each_mut().map(|(vcpu, _)| {
            let mut line = Line::new(vcpu.handle(), &log);
            scope.spawn(move || -> Outcome {
                while !line.ended {
                    vcpu.run(&mut line)?;
                }
                Ok(())
            })
        });
        running.into_iter().try_for_each(|thread| thread.join().expect("a vCPU's thread ends"))
    })?;
    let log = log.lock().unwrap();
    for place in [0, 0x80] {
        let own: Vec<u32> =
            log.iter().filter(|(at, _)| at & 0xfff == place).map(|(_, value)| *value).collect();
        assert!(own.iter().copied().eq(0..WRITES), "{} writes at {place:#x}", own.len());
    }
    assert_eq!(log.len(), 2 * WRITES as usize);
    Ok(())
}

fn waiting_writes_can_be_fetched(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rbx, layout::MMIO)?;
    p.mov(dword_ptr(rbx), 7)?;
    let again = p.here()?;
    p.cmp(dword_ptr(layout::DATA), 0)?;
    p.je(again)?;
    p.end()?;
    let (mut machine, writes) = machine(backend, &p.assemble()?, &[mmio(0, 4)])?;
    let (ram, log) = (machine.ram.clone(), Log::default());
    let mut line = Line::new(machine.vcpu.handle(), &log);
    let fetcher = thread::spawn(move || -> Result<usize, Error> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let fetched = writes.deliver(&mut line)?;
            if fetched > 0 || Instant::now() > deadline {
                ram.memory().write_obj(1_u32, GuestAddress(layout::DATA)).ok();
                return Ok(fetched);
            }
            thread::yield_now();
        }
    });
    machine.run_to_end()?;
    let fetched = fetcher.join().expect("the fetching thread ends")?;
    assert_eq!((fetched, &*log.lock().unwrap()), (1, &vec![(0, 7)]));
    assert_eq!(machine.bus.log, []);
    Ok(())
}

fn without_its_zone_a_write_does_not_wait(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.mov(rbx, layout::MMIO)?;
    for value in [1, 2] {
        p.mov(byte_ptr(rbx), value)?;
        p.checkpoint()?;
    }
    let (mut machine, writes) = machine(backend, &p.assemble()?, &[mmio(0, 1), mmio(0x10, 1)])?;
    machine.run_to_end()?;
    assert_eq!(exits(&machine, "mmio-write"), 0);
    writes.remove_zone(mmio(0, 1))?;
    machine.run_to_end()?;
    assert_eq!(exits(&machine, "mmio-write"), 1);
    assert_eq!(machine.bus.log, [store(layout::MMIO, &[1]), store(layout::MMIO, &[2])]);
    Ok(())
}

fn impossible_zones_are_refused(backend: &Backend) -> Outcome {
    let mut p = Program::new()?;
    p.end()?;
    let (_machine, writes) = machine(backend, &p.assemble()?, &[mmio(0x10, 0x10)])?;
    let ports = |port, len| CoalescedZone::Pio { port, len };
    writes.add_zone(ports(0x10, 0x10))?;
    let far = CoalescedZone::Mmio { gpa: GuestAddress(u64::MAX), len: 2 };
    for zone in [mmio(0, 0), far, ports(0xffff, 2), ports(0, 0), mmio(0x1f, 1), mmio(0, 0x11), ports(0x1f, 9)]
    {
        let error = writes.add_zone(zone);
        assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{zone:?}: {error:?}");
    }
    for zone in [mmio(0x10, 0xf), mmio(0x11, 0x10), ports(0x10, 1), mmio(0, 0x10)] {
        let error = writes.remove_zone(zone);
        assert!(matches!(error, Err(Error::InvalidArgument { .. })), "{zone:?}: {error:?}");
    }
    writes.remove_zone(mmio(0x10, 0x10))?;
    writes.add_zone(mmio(0x1f, 1))?;
    Ok(())
}

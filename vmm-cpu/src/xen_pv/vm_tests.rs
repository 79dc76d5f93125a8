//! Small paravirtual kernels through the common traits, on every engine that is there.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vmm_memory::boot::KernelImage;
use vmm_memory::{Backing, RegionConfig};

use super::*;
use crate::state::GeneralRegisters;
use crate::vcpu::{EmptyBus, Halt};
use crate::xen_pv::builder::tests::{ENTRY, Kernel};
use crate::xen_pv::{ConsoleSink, ConsoleSource, XenPvHypervisor};

const RAM: u64 = 32 << 20;
/// Hypercalls and their commands (Xen public/xen.h, sched.h, vcpu.h, event_channel.h).
const CONSOLE_IO: u64 = 18;
const VCPU_OP: u64 = 24;
const SCHED_OP: u64 = 29;
const EVENT_CHANNEL_OP: u64 = 32;
const SCHED_BLOCK: u64 = 1;
const SCHED_SHUTDOWN: u64 = 2;
const VCPU_SET_SINGLESHOT: u64 = 8;
const BIND_VIRQ: u64 = 1;
/// Data of the guests, in the page behind the code, which is zero in the file.
const DATA: u64 = ENTRY + 0x1000;

/// Assembles a guest.
type Program = dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;

#[derive(Debug)]
struct Printed(Sender<Vec<u8>>);

impl ConsoleSink for Printed {
    fn write(&mut self, _: ConsoleSource, bytes: &[u8]) {
        self.0.send(bytes.to_vec()).unwrap();
    }
}

/// SYSCALL with number and arguments.
fn call(a: &mut CodeAssembler, nr: u64, args: &[u64]) -> Result<(), IcedError> {
    a.mov(rax, nr)?;
    for (register, value) in [rdi, rsi, rdx].into_iter().zip(args) {
        a.mov(register, *value)?;
    }
    a.syscall()
}

/// Stores `value` at `DATA + offset`.
fn put(a: &mut CodeAssembler, offset: u64, value: u64) -> Result<(), IcedError> {
    a.mov(rbx, DATA + offset)?;
    a.mov(rcx, value)?;
    a.mov(qword_ptr(rbx), rcx)
}

fn shut_down(a: &mut CodeAssembler, reason: u64) -> Result<(), IcedError> {
    put(a, 0, reason)?;
    call(a, SCHED_OP, &[SCHED_SHUTDOWN, DATA])?;
    a.ud2()
}

fn ram() -> GuestRam {
    GuestRam::builder().region(RegionConfig::new(GuestAddress(0), RAM)).build().unwrap()
}

struct Guest {
    vm: Arc<XenPvVm>,
    vcpu: Box<dyn Vcpu>,
    printed: Receiver<Vec<u8>>,
}

impl Guest {
    fn new(
        below: Arc<dyn Hypervisor>,
        assemble: &dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Self {
        let mut a = CodeAssembler::new(64).unwrap();
        assemble(&mut a).unwrap();
        let elf = Kernel::with_code(a.assemble(ENTRY).unwrap()).elf();
        let image = KernelImage::parse(&elf).unwrap();
        Self::on(&ram(), below, &image)
    }

    fn on(ram: &GuestRam, below: Arc<dyn Hypervisor>, image: &KernelImage<'_>) -> Self {
        let (sender, printed) = channel();
        let hypervisor = XenPvHypervisor::new(below).unwrap();
        let config = VmConfig::new(CpuModel::Host);
        let devices = DomainDevices::default().console(Printed(sender));
        let vm = hypervisor.create_domain(&config, ram, devices).unwrap();
        vm.boot(&PvBoot::new(image).unwrap()).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        Self { vm, vcpu, printed }
    }

    fn run(&mut self) -> Halt {
        self.vcpu.run(&mut EmptyBus).unwrap()
    }
}

fn everywhere(assemble: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>, test: impl Fn(Guest)) {
    for name in crate::backend_names().iter().filter(|name| **name != NAME) {
        match crate::open_backend(name) {
            Ok(backend) => {
                println!("on {name}");
                test(Guest::new(Arc::from(backend), &assemble));
            }
            Err(error) => println!("skipped on {name}: {error}"),
        }
    }
}

#[test]
fn a_kernel_prints_and_switches_off() {
    let program = |a: &mut CodeAssembler| {
        put(a, 8, u64::from_le_bytes(*b"hello\nxx"))?;
        call(a, CONSOLE_IO, &[0, 6, DATA + 8])?;
        shut_down(a, 0)
    };
    everywhere(program, |mut guest| {
        assert_eq!(guest.vm.shutdown_reason(), None);
        assert_eq!(guest.run(), Halt::Shutdown);
        assert_eq!(guest.printed.try_recv().unwrap(), b"hello\n");
        assert_eq!(guest.vm.shutdown_reason(), Some(ShutdownReason::PowerOff));
        assert_eq!(guest.run(), Halt::Shutdown, "it stays so");
        let counts = guest.vcpu.exit_counts();
        assert_eq!(counts.iter().find(|(kind, _)| *kind == "hypercall").unwrap().1, 2);
    });
}

#[test]
fn reboots_and_crashes_are_told_apart() {
    everywhere(
        |a| shut_down(a, 1),
        |mut guest| {
            assert_eq!(guest.run(), Halt::Reset);
            assert_eq!(guest.vm.shutdown_reason(), Some(ShutdownReason::Reboot));
        },
    );
    // An exception before there is a trap table.
    everywhere(CodeAssembler::ud2, |mut guest| {
        assert_eq!(guest.run(), Halt::Shutdown);
        assert_eq!(guest.vm.shutdown_reason(), Some(ShutdownReason::Crash));
    });
}

#[test]
fn kicks_end_loops_and_sleeps() {
    let spin = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.jmp(again)
    };
    let sleep = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        call(a, SCHED_OP, &[SCHED_BLOCK, 0])?;
        a.jmp(again)
    };
    let programs: [&Program; 2] = [&spin, &sleep];
    for program in programs {
        everywhere(program, |mut guest| {
            let handle = guest.vcpu.handle();
            handle.kick();
            assert_eq!(guest.run(), Halt::Interrupted, "a kick from before");
            let kicker = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(5));
                handle.kick();
            });
            assert_eq!(guest.run(), Halt::Interrupted);
            kicker.join().unwrap();
            guest.vm.domain().unwrap().shut_down(ShutdownReason::PowerOff);
            guest.vcpu.handle().kick();
            assert_eq!(guest.run(), Halt::Shutdown);
        });
    }
}

/// The alarm interrupts a guest that computes, and ends the sleep of one that blocks.
#[test]
fn timers_reach_guests_that_run_and_that_sleep() {
    for sleeps in [false, true] {
        let program = move |a: &mut CodeAssembler| {
            // VIRQ_TIMER on vCPU 0, then a single shot at system time 3 ms, maybe in the past.
            put(a, 16, 0)?;
            call(a, EVENT_CHANNEL_OP, &[BIND_VIRQ, DATA + 16])?;
            put(a, 32, 3_000_000)?;
            put(a, 40, 0)?;
            call(a, VCPU_OP, &[VCPU_SET_SINGLESHOT, 0, DATA + 32])?;
            // All channels are masked, so the guest is told nothing; the pending bit shows that the timer ran out.
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            if sleeps {
                call(a, SCHED_OP, &[SCHED_BLOCK, 0])?;
            }
            a.jmp(again)
        };
        everywhere(program, |mut guest| {
            let (domain, handle) = (Arc::clone(guest.vm.domain().unwrap()), guest.vcpu.handle());
            let page = domain.shared_info_frame() * vmm_memory::PAGE_SIZE;
            let watched = Arc::clone(&domain);
            let watcher = std::thread::spawn(move || {
                let pending = || watched.memory.load(page + 2048).unwrap() != 0;
                for _ in 0..2000 {
                    if pending() {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                handle.kick();
                pending()
            });
            assert_eq!(guest.run(), Halt::Interrupted);
            assert!(watcher.join().unwrap(), "the timer's event is pending, sleeps: {sleeps}");
        });
    }
}

#[test]
fn registers_show_where_the_guest_is() {
    everywhere(
        |a| shut_down(a, 0),
        |mut guest| {
            assert_eq!(guest.vcpu.registers().unwrap().rip, ENTRY);
            let system = guest.vcpu.system_registers().unwrap();
            assert_eq!((system.cs.selector, system.cs.long, system.cs.dpl), (0xe033, true, 3));
            assert_ne!(system.cr3, 0);
            assert_eq!(guest.vcpu.translate(ENTRY + 5).unwrap(), Some(GuestAddress(0x100_0005)));
            assert_eq!(guest.vcpu.translate(0).unwrap(), None);
            assert_eq!(guest.vcpu.translate(1 << 63).unwrap(), None);
            guest.vcpu.set_msr(0xc000_0100, 0x1234).unwrap();
            assert_eq!(guest.vcpu.msr(0xc000_0100).unwrap(), 0x1234);
            assert!(guest.vcpu.set_msr(0xc000_0100, 1 << 63).is_err());
            assert!(guest.vcpu.msr(0x1b).is_err());
            assert!(guest.vcpu.handle().set_intr(true).is_err());
            assert_eq!(guest.vcpu.save().is_ok(), cfg!(feature = "snapshot"));
        },
    );
}

#[test]
fn what_a_domain_cannot_be_is_refused() {
    let hypervisor = crate::open_backend(NAME).unwrap();
    let create = |config: &VmConfig| hypervisor.create_vm(config).map(|_| ());
    let config = || VmConfig::new(CpuModel::Host);
    assert!(create(&config()).is_ok());
    assert!(create(&config().interrupts(crate::InterruptMode::LocalApic)).is_err());
    assert!(create(&config().vcpus(1000)).is_err());

    let vm = hypervisor.create_vm(&config()).unwrap();
    assert!(vm.create_vcpu(0).is_err(), "no memory");
    let region = |gpa, size| {
        let ram =
            GuestRam::builder().region(RegionConfig::new(gpa, size).backing(Backing::Anonymous)).build();
        ram.unwrap().regions().pop().unwrap()
    };
    vm.map_memory(region(GuestAddress(0x1000), 8 << 20), GuestAccess::ReadWrite).unwrap();
    assert!(vm.create_vcpu(0).is_err(), "a gap at 0");
    vm.unmap_memory(GuestAddress(0x1000)).unwrap();
    vm.map_memory(region(GuestAddress(0), 8 << 20), GuestAccess::ReadWrite).unwrap();
    let overlap = vm.map_memory(region(GuestAddress(0x1000), 0x1000), GuestAccess::ReadWrite);
    assert!(matches!(overlap, Err(Error::RegionOverlap { .. })), "{overlap:?}");
    assert!(vm.map_memory(region(GuestAddress(8 << 20), 4096), GuestAccess::ReadOnly).is_err());
    assert!(vm.create_vcpu(1).is_err());
    let vcpu = vm.create_vcpu(0).unwrap();
    assert!(matches!(vm.create_vcpu(0), Err(Error::VcpuExists { index: 0 })));
    assert!(vm.unmap_memory(GuestAddress(0)).is_err(), "in use");
    assert_eq!(vcpu.index(), 0);
}

/// Programs use every register that the processor lets them use, so a kernel has to be told of all of them: what it does
/// not know of it does not save when it switches tasks.
#[test]
fn a_kernel_is_told_of_all_registers_that_programs_find() {
    const OSXSAVE: u32 = 1 << 27;
    const XSAVE_AND_OSXSAVE: u64 = 3 << 26;
    let program = |a: &mut CodeAssembler| {
        let mut without = a.create_label();
        for leaf in [1_u64, 0xd] {
            a.mov(rax, leaf)?;
            a.xor(ecx, ecx)?;
            a.db(b"\x0f\x0bxen")?;
            a.cpuid()?;
            a.mov(r12, r13)?;
            a.mov(r13, if leaf == 1 { rcx } else { rax })?;
        }
        // As a program would, which cannot ask Xen.
        a.mov(rax, 1_u64)?;
        a.cpuid()?;
        a.xor(r14, r14)?;
        a.and(ecx, OSXSAVE)?;
        a.jz(without)?;
        a.xor(ecx, ecx)?;
        a.xgetbv()?;
        a.mov(r14, rax)?;
        a.set_label(&mut without)?;
        shut_down(a, 0)
    };
    everywhere(program, |mut guest| {
        assert_eq!(guest.run(), Halt::Shutdown);
        let GeneralRegisters { r12: told, r13: components, r14: xcr0, .. } = guest.vcpu.registers().unwrap();
        if xcr0 != 0 {
            assert_eq!(told & XSAVE_AND_OSXSAVE, XSAVE_AND_OSXSAVE, "{told:#x}");
        }
        const KNOWN: u64 = 0xe7;
        assert_eq!(xcr0 & KNOWN & !components, 0, "XCR0 {xcr0:#x}, told {components:#x}");
    });
}

/// Another backend, whose first virtual machine has something where the engine's memory is to go.
#[derive(Debug)]
struct Occupied(Box<dyn Hypervisor>, std::sync::atomic::AtomicBool);

impl Hypervisor for Occupied {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn capabilities(&self) -> &crate::Capabilities {
        self.0.capabilities()
    }

    fn supported_cpuid(&self) -> &CpuidTable {
        self.0.supported_cpuid()
    }

    fn create_vm(&self, config: &VmConfig) -> Result<Arc<dyn Vm>> {
        let vm = self.0.create_vm(config)?;
        if !self.1.swap(true, std::sync::atomic::Ordering::SeqCst) {
            let m2p = Layout::new(RAM)?.m2p();
            let other = GuestRam::builder().region(RegionConfig::new(m2p, 4096)).build().unwrap();
            vm.map_ram(&other)?;
        }
        Ok(vm)
    }

    fn restore_vm(&self, config: &VmConfig, state: &VmState) -> Result<Arc<dyn Vm>> {
        self.0.restore_vm(config, state)
    }
}

#[test]
fn memory_serves_again_after_a_failure_and_after_a_domain() {
    let mut a = CodeAssembler::new(64).unwrap();
    shut_down(&mut a, 1).unwrap();
    let elf = Kernel::with_code(a.assemble(ENTRY).unwrap()).elf();
    let image = KernelImage::parse(&elf).unwrap();
    for name in crate::backend_names().iter().filter(|name| **name != NAME) {
        let Ok(backend) = crate::open_backend(name) else {
            println!("skipped on {name}");
            continue;
        };
        let below: Arc<dyn Hypervisor> = Arc::new(Occupied(backend, false.into()));
        let ram = ram();
        let hypervisor = XenPvHypervisor::new(Arc::clone(&below)).unwrap();
        let config = VmConfig::new(CpuModel::Host);
        let failed = hypervisor.create_domain(&config, &ram, DomainDevices::default());
        assert!(matches!(failed, Err(Error::RegionOverlap { .. })), "on {name}: {failed:?}");
        assert_eq!(ram.size(), RAM, "on {name}");
        // The same twice: a domain that reboots.
        for _ in 0..2 {
            let mut guest = Guest::on(&ram, Arc::clone(&below), &image);
            assert_eq!(guest.run(), Halt::Reset, "on {name}");
            // Whoever comes last takes the rest along.
            drop(guest.vm);
            assert_eq!(guest.vcpu.run(&mut EmptyBus).unwrap(), Halt::Reset, "on {name}");
            drop(guest.vcpu);
            assert_eq!(ram.size(), RAM, "on {name}");
        }
    }
}

#[test]
fn a_kernel_that_cannot_be_loaded_leaves_room_for_another() {
    let below: Arc<dyn Hypervisor> = Arc::from(crate::open_backend("translate").unwrap());
    let hypervisor = XenPvHypervisor::new(below).unwrap();
    let config = VmConfig::new(CpuModel::Host);
    let vm = hypervisor.create_domain(&config, &ram(), DomainDevices::default()).unwrap();
    let whole = Kernel::with_code(vec![0x90; 64]).elf();
    let mut broken = whole.clone();
    // p_filesz of the segment, beyond the end of the file, with p_memsz.
    for place in [64 + 32, 64 + 40] {
        broken[place..place + 8].copy_from_slice(&0x10_0000_u64.to_le_bytes());
    }
    match KernelImage::parse(&broken) {
        Ok(image) => assert!(vm.boot(&PvBoot::new(&image).unwrap()).is_err()),
        Err(error) => println!("found earlier: {error}"),
    }
    let huge = "x".repeat(5000);
    let image = KernelImage::parse(&whole).unwrap();
    assert!(vm.boot(&PvBoot::new(&image).unwrap().command_line(huge)).is_err());
    assert!(vm.boot(&PvBoot::new(&image).unwrap()).is_ok());
    assert!(vm.boot(&PvBoot::new(&image).unwrap()).is_err(), "one kernel a domain");
}

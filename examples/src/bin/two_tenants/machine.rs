//! One of the virtual machines: Debian's kernel, and a program of ours that does what it is told on the console.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use vmm_audit::Digest;
use vmm_audit::event::{Launch, Outcome};
use vmm_cpu::entry::entry_state;
use vmm_cpu::{CpuModel, Hypervisor, InterruptMode, VcpuIo, VcpuThreads, VmConfig};
use vmm_examples::audit::MachineLog;
use vmm_examples::guest_command::{GuestRun, SerialPort, Wiring};
use vmm_examples::pc::{Buses, Clocks, Output, Pc};
use vmm_examples::virtio::{Served, VirtioDevices};
use vmm_memory::boot::{Boot, BootProtocol, KernelImage};
use vmm_memory::{Backing, GuestRam};
use vmm_policy::Policy;

use crate::guest::Image;

/// Rate of the guest's time-stamp counter, of which its kernel is told, so that it need not measure it.
const TSC_KHZ: u32 = 1_000_000;

/// RAM in bytes.
const RAM: u64 = 96 << 20;

/// Nothing that the guest is asked takes so long, on a host that has much else to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of the kernel's log that are kept to be shown if something fails.
const LOG: usize = 16 << 10;

/// What a guest answers.
pub(crate) type Answer = std::result::Result<String, String>;

/// A line of the guest's, and when it came.
type Line = (Instant, String);

pub(crate) struct Machine {
    pub(crate) name: &'static str,
    pc: Arc<Pc>,
    threads: VcpuThreads,
    said: Receiver<Line>,
    events: VecDeque<Line>,
    console: Arc<Mutex<VecDeque<u8>>>,
    log: MachineLog,
    // Its devices are served as long as it is there.
    _served: Served,
}

/// Cuts what the guest's program prints into lines.
struct Lines {
    line: Vec<u8>,
    tell: Sender<Line>,
}

/// The longest line that is kept; the rest of a longer one is forgotten.
const LONGEST: usize = 1024;

impl Write for Lines {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        for byte in data {
            if *byte == b'\n' {
                let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
                // At the end nobody listens.
                drop(self.tell.send((Instant::now(), line)));
            } else if self.line.len() < LONGEST {
                self.line.push(*byte);
            }
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The end of what is written.
struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Write for Tail {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        log.extend(data);
        let over = log.len().saturating_sub(LOG);
        log.drain(..over);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// RAM for a machine of that hypervisor: what the translator maps a second time has to be shared.
fn ram(hypervisor: &dyn Hypervisor) -> Result<GuestRam> {
    let translates = hypervisor.name() == vmm_cpu::translate::NAME;
    let backing = if translates { Backing::Memfd } else { Backing::Anonymous };
    Ok(GuestRam::builder().ram(RAM).backing(backing).build()?)
}

/// What a machine is started from.
pub(crate) struct Recipe<'a> {
    image: &'a Image,
    run: GuestRun,
    command_line: String,
    config: VmConfig,
}

impl<'a> Recipe<'a> {
    /// For a guest that does `setup` first.
    pub(crate) fn new(hypervisor: &dyn Hypervisor, image: &'a Image, setup: &str) -> Result<Self> {
        let run = image.run(setup)?;
        let command_line = format!("{} tsc_early_khz={TSC_KHZ} ipv6.disable=1", run.command_line);
        let mut config = VmConfig::new(CpuModel::Host).interrupts(InterruptMode::LocalApic).vcpus(1);
        if hypervisor.capabilities().tsc_scaling {
            config.clock.tsc_khz = Some(TSC_KHZ);
        }
        Ok(Self { image, run, command_line: command_line.trim().to_owned(), config })
    }

    /// Its measurement, with the policy that is in force then.
    pub(crate) fn launch(&self, hypervisor: &dyn Hypervisor, policy: &Policy) -> Result<Launch> {
        let cpuid = self.config.cpu.resolve(hypervisor.supported_cpuid())?;
        let cpu = format!("{:x?}", cpuid.entries());
        let launch = Launch::new().kernel(&self.image.kernel).initrd(&self.run.initrd);
        let launch = launch.command_line(&self.command_line).cpu_model(cpu.as_bytes());
        Ok(launch.policy(Digest::from_bytes(policy.digest())).vmm()?)
    }
}

impl Machine {
    /// Builds it, with these devices. Its guest does not run yet.
    pub(crate) fn new(
        hypervisor: &dyn Hypervisor,
        name: &'static str,
        recipe: &Recipe<'_>,
        devices: VirtioDevices,
        log: MachineLog,
    ) -> Result<Self> {
        let ram = ram(hypervisor)?;
        let kernel = KernelImage::parse(&recipe.image.kernel)?;
        let tables = Pc::write_tables(&ram, 1, |tables| devices.describe(tables))?;
        let boot = Boot::new(&kernel).command_line(&recipe.command_line).initrd(&recipe.run.initrd);
        let entry = boot.protocol(BootProtocol::Pvh).rsdp(tables).load(&*ram.memory())?;

        let vm = hypervisor.create_vm(&recipe.config)?;
        vm.map_ram(&ram)?;
        let mut vcpu = vm.create_vcpu(0)?;
        entry_state(&entry)?.apply(&mut *vcpu)?;
        let bootstrap = vcpu.handle();
        let messages = vm.msi().context("the backend takes no interrupt messages")?;

        let (tell, said) = channel();
        let console = Arc::<Mutex<VecDeque<u8>>>::default();
        let output = |port| -> Output {
            match port {
                SerialPort::Output => Box::new(Lines { line: Vec::new(), tell: tell.clone() }),
                SerialPort::Console | SerialPort::Errors => Box::new(Tail(Arc::clone(&console))),
                SerialPort::Control => Box::new(io::sink()),
            }
        };
        let pc = Arc::new(Pc::with_clocks(Clocks::host(), messages, output, || {})?);
        let served = devices.attach(&pc, &vm, &ram, None)?;
        let threads =
            VcpuThreads::spawn(vec![(vcpu, Box::new(Buses(Arc::clone(&pc))) as Box<dyn VcpuIo + Send>)])?;
        threads.observe(Arc::new(log.machine().clone()));
        pc.start(bootstrap);
        Ok(Self { name, pc, threads, said, events: VecDeque::new(), console, log, _served: served })
    }

    /// Lets the guest run.
    pub(crate) fn start(&self) {
        self.threads.resume();
    }

    /// The answer to what was said last.
    pub(crate) fn answer(&mut self) -> Result<Answer> {
        let until = Instant::now() + PATIENCE;
        loop {
            let line = self.line(until)?;
            match line.1.split_once(' ') {
                Some(("!", _)) => self.events.push_back(line),
                Some(("=", answer)) => {
                    let (word, rest) = answer.split_once(' ').unwrap_or((answer, ""));
                    return match word {
                        "yes" => Ok(Ok(rest.to_owned())),
                        "no" => Ok(Err(rest.to_owned())),
                        _ => bail!("{} says {:?}", self.name, line.1),
                    };
                }
                _ => bail!("{} says {:?}", self.name, line.1),
            }
        }
    }

    /// Tells the guest's program to do something.
    pub(crate) fn tell(&self, order: &str) {
        self.pc.type_in(format!("{order}\n").as_bytes());
    }

    /// Has it do something, and hears what came of it.
    pub(crate) fn ask(&mut self, order: &str) -> Result<Answer> {
        self.tell(order);
        self.answer().with_context(|| format!("{}: {order}", self.name))
    }

    /// As `ask`, for what has to go well.
    pub(crate) fn must(&mut self, order: &str) -> Result<String> {
        let answer = self.ask(order)?;
        answer.map_err(|reason| anyhow::anyhow!("{}: {order}: {reason}", self.name))
    }

    /// What it says without being asked, and when, if that comes in time.
    pub(crate) fn event(&mut self, patience: Duration) -> Result<Option<Line>> {
        if let Some(line) = self.events.pop_front() {
            return Ok(Some(line));
        }
        match self.said.recv_timeout(patience) {
            Ok(line) => {
                ensure!(line.1.starts_with("! "), "{} says {:?}", self.name, line.1);
                Ok(Some(line))
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("{} says nothing any more", self.name),
        }
    }

    fn line(&self, until: Instant) -> Result<Line> {
        let left = until.saturating_duration_since(Instant::now());
        self.said.recv_timeout(left).map_err(|_| {
            let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
            let (first, second) = console.as_slices();
            let text = String::from_utf8_lossy(&[first, second].concat()).into_owned();
            anyhow::anyhow!("{} has said nothing for {PATIENCE:?}; its console:\n{text}", self.name)
        })
    }

    /// Ends it.
    pub(crate) fn stop(self) {
        self.threads.pause_handle().pause();
        drop(self.threads.stop());
        self.log.ended(Outcome::Killed, "the host stopped it");
    }
}

/// What connects the program with the guests.
pub(crate) const WIRING: Wiring = Wiring::SerialPorts;

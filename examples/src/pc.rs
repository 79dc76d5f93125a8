//! The PC around the vCPUs: interrupt controllers, timers, serial ports, power management, on two buses.
//!
//! Every device comes from `vmm-devices`; this file says where each one is and which wire leads where. It asks of a
//! backend just local APICs and a sink for messages.

use std::fmt;
use std::fs::File;
use std::io::{Read as _, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use vmm_cpu::{MsiMessage, MsiSink, VcpuHandle, VcpuIo};
use vmm_devices::acpi::{AcpiBuilder, AcpiDevice, BIOS_AREA};
use vmm_devices::pci::{HostBridge, PciLayout};
use vmm_devices::platform::{
    AcpiPm, DebugExit, I8042, IoApic, Pic, Pit, PlatformEvent, Rtc, Uart16550, VM_GENERATION_SIZE,
    VmGeneration, ports,
};
use vmm_devices::{BusDevice, BusRange, Clock, InterruptLine, MmioBus, PioBus, Timed};
use vmm_memory::GuestRam;
use vmm_memory::vm_memory::{Bytes as _, GuestAddress};

use crate::guest_command::SerialPort;
use crate::pc_state::Still;

/// Where the generation of the machine is: at the end of what a BIOS has, which no kernel takes for RAM.
const GENERATION: GuestAddress = GuestAddress(BIOS_AREA.end - VM_GENERATION_SIZE);
/// The input of the I/O APIC by which the guest hears of another one; no device of a PC here has it.
const GENERATION_INPUT: u32 = 10;

/// How a guest ended its machine.
pub type End = PlatformEvent;

/// The devices of a machine.
pub struct Pc {
    pio: Arc<PioBus>,
    mmio: Arc<MmioBus>,
    /// Where messages of devices go.
    messages: Arc<dyn MsiSink>,
    pub(crate) io_apic: Arc<IoApic>,
    pub(crate) pic: Arc<Pic>,
    pub(crate) pit: Arc<Timed<Pit>>,
    pub(crate) rtc: Arc<Timed<Rtc>>,
    pub(crate) acpi: Arc<Timed<AcpiPm>>,
    pub(crate) keyboard: Arc<Mutex<I8042>>,
    pub(crate) serial: Vec<Arc<Mutex<Uart16550>>>,
    console: Arc<Mutex<Uart16550>>,
    /// The guest has read what was typed.
    drained: Arc<Drained>,
    state: Arc<State>,
    /// Each with what its clock is ahead of the uptime, in nanoseconds.
    timed: Vec<(Arc<dyn Service>, u64)>,
    /// Held while they fire.
    timers: Mutex<()>,
}

/// Where the devices have the time from. Nothing else of them knows any.
pub struct Clocks {
    /// Counts nanoseconds from any moment on.
    pub uptime: Arc<dyn Clock>,
    /// Nanoseconds from 1970-01-01 UTC to when the uptime was zero.
    pub boot: u64,
}

impl Clocks {
    /// The host's.
    #[must_use]
    pub fn host() -> Self {
        let start = Instant::now();
        let uptime = move || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Self { uptime: Arc::new(uptime), boot: date() }
    }
}

/// Nanoseconds since 1970-01-01 UTC.
#[must_use]
pub fn date() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// What devices and vCPUs tell each other.
#[derive(Default)]
struct State {
    /// The vCPU that the PIC's output leads to.
    bootstrap: OnceLock<Arc<dyn VcpuHandle>>,
    end: OnceLock<End>,
    /// A deadline changed.
    changed: Mutex<bool>,
    wakeup: Condvar,
    /// The vCPU's own loop services the timers and gives the input.
    led: AtomicBool,
}

impl State {
    fn wake_timers(&self) {
        if self.led.load(Ordering::SeqCst) {
            self.wake_leader();
            return;
        }
        *self.changed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.wakeup.notify_one();
    }

    /// Called by an access of the guest: `run` comes back after its instruction.
    fn wake_leader(&self) {
        if let Some(vcpu) = self.bootstrap.get() {
            vcpu.kick();
        }
    }
}

/// A device that does something at times of its own.
trait Service: Send + Sync {
    fn service(&self) -> Option<u64>;

    /// Writes the device's state, as text.
    fn show(&self, out: &mut dyn fmt::Write) -> fmt::Result;
}

impl Service for Timed<Pit> {
    fn service(&self) -> Option<u64> {
        Timed::service(self)
    }

    fn show(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{:?}", self.lock().state())
    }
}

impl Service for Timed<Rtc> {
    fn service(&self) -> Option<u64> {
        Timed::service(self)
    }

    fn show(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{:?}", self.lock().state())
    }
}

impl Service for Timed<AcpiPm> {
    fn service(&self) -> Option<u64> {
        Timed::service(self)
    }

    fn show(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{:?}", self.lock().state())
    }
}

/// Told when a console has room for input.
#[derive(Default)]
pub(crate) struct Drained {
    room: Mutex<bool>,
    wakeup: Condvar,
}

impl Drained {
    /// Has `offer` take all of `input`, which it takes as much of as finds room.
    pub(crate) fn give(&self, input: &[u8], offer: impl Fn(&[u8]) -> usize) {
        let mut left = input;
        loop {
            left = left.get(offer(left)..).unwrap_or_default();
            if left.is_empty() {
                return;
            }
            self.wait();
        }
    }

    pub(crate) fn notify(&self) {
        *self.room.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.wakeup.notify_one();
    }

    fn wait(&self) {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        while !std::mem::take(&mut *room) {
            room = self.wakeup.wait(room).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Where the output of a serial port goes.
pub type Output = Box<dyn Write + Send>;

impl Pc {
    /// Builds the devices, with the host's clocks. See [`Pc::with_clocks`].
    ///
    /// # Errors
    /// None that depends on the guest.
    pub fn new(
        messages: Arc<dyn MsiSink>,
        output: impl Fn(SerialPort) -> Output,
        ended: impl Fn() + Clone + Send + Sync + 'static,
    ) -> Result<Self> {
        Self::with_clocks(Clocks::host(), messages, output, ended)
    }

    /// Builds the devices. Interrupt messages go to `messages`, the output of each serial port to what `output` makes
    /// for it, and `ended` is called, maybe in a callback of a vCPU, when [`Pc::end`] has something to tell.
    ///
    /// # Errors
    /// None that depends on the guest.
    pub fn with_clocks(
        clocks: Clocks,
        messages: Arc<dyn MsiSink>,
        output: impl Fn(SerialPort) -> Output,
        ended: impl Fn() + Clone + Send + Sync + 'static,
    ) -> Result<Self> {
        let state = Arc::new(State::default());
        let io_apic = Arc::new(IoApic::new(sender(Arc::clone(&messages))));
        let intr = Arc::clone(&state);
        let pic = Arc::new(Pic::new(move |asserted: bool| {
            if let Some(vcpu) = intr.bootstrap.get()
                && let Err(error) = vcpu.set_intr(asserted)
            {
                tracing::warn!(%error, "INTR");
            }
        }));
        let line = |irq: u32, gsi: u32| -> Result<_> { Ok((pic.line(irq)?, io_apic.line(gsi)?)) };

        let Clocks { uptime, boot } = clocks;
        let passed = Arc::clone(&uptime);
        let wall = move || boot.saturating_add(passed.now_ns());
        let wake = |state: &Arc<State>| {
            let state = Arc::clone(state);
            move |_: Option<u64>| state.wake_timers()
        };
        let ended = |state: &Arc<State>| {
            let (state, ended) = (Arc::clone(state), ended.clone());
            move |event: PlatformEvent| {
                // The first one counts.
                state.end.get_or_init(|| event);
                ended();
            }
        };

        let pit = Pit::new(Arc::clone(&uptime), line(ports::PIT_IRQ, ports::PIT_GSI)?);
        let pit = Arc::new(Timed::new(pit, wake(&state)));
        let rtc = Arc::new(Timed::new(Rtc::new(wall, line(ports::RTC_IRQ, ports::RTC_IRQ)?), wake(&state)));
        let sci = line(ports::ACPI_SCI, ports::ACPI_SCI)?;
        let acpi = Arc::new(Timed::new(AcpiPm::new(uptime, sci, ended(&state)), wake(&state)));
        let keyboard = Arc::new(Mutex::new(I8042::new(ended(&state))));
        let debug_exit = Arc::new(DebugExit::new(ended(&state)));

        let (pio, mmio) = (Arc::new(PioBus::new()), Arc::new(MmioBus::new()));
        let attach = |name: &str, ranges: &[BusRange], device: Arc<dyn BusDevice>| -> Result<()> {
            for range in ranges {
                pio.insert(name, *range, Arc::clone(&device))?;
            }
            Ok(())
        };
        attach("PIC", &ports::PIC, pic.clone())?;
        attach("PIT", &ports::PIT, pit.clone())?;
        attach("i8042", &ports::I8042, keyboard.clone())?;
        attach("RTC", &[ports::RTC], rtc.clone())?;
        attach("debug exit", &[ports::DEBUG_EXIT], debug_exit)?;
        attach("ACPI", &[ports::ACPI_PM], acpi.clone())?;
        mmio.insert("I/O APIC", ports::IO_APIC, io_apic.clone())?;

        let drained = Arc::new(Drained::default());
        let mut console = None;
        let mut serial = Vec::new();
        for port in SerialPort::ALL {
            let irq = port.irq().into();
            let (notify, leader) = (Arc::clone(&drained), Arc::clone(&state));
            let is_console = port == SerialPort::Console;
            let uart = Uart16550::with_drained(line(irq, irq)?, output(port), move || {
                if is_console && leader.led.load(Ordering::SeqCst) {
                    leader.wake_leader();
                } else if is_console {
                    notify.notify();
                }
            });
            let uart = Arc::new(Mutex::new(uart));
            pio.insert(port.device(), BusRange::new(port.io_base().into(), 8), uart.clone())?;
            serial.push(Arc::clone(&uart));
            if is_console {
                console = Some(uart);
            }
        }
        let console = console.context("a PC has a console")?;
        let timed: Vec<(Arc<dyn Service>, u64)> =
            vec![(pit.clone(), 0), (rtc.clone(), boot), (acpi.clone(), 0)];
        let timers = Mutex::default();
        Ok(Self {
            pio,
            mmio,
            messages,
            io_apic,
            pic,
            pit,
            rtc,
            acpi,
            keyboard,
            serial,
            console,
            drained,
            state,
            timed,
            timers,
        })
    }

    /// An input of the I/O APIC, for a device that is added.
    ///
    /// # Errors
    /// If there is no such input.
    pub fn io_apic_line(&self, input: u32) -> Result<impl InterruptLine + 'static> {
        Ok(self.io_apic.line(input)?)
    }

    /// Adds a device with registers in memory.
    ///
    /// # Errors
    /// If the range is taken.
    pub fn attach_mmio(&self, name: &str, range: BusRange, device: Arc<dyn BusDevice>) -> Result<()> {
        Ok(self.mmio.insert(name, range, device)?)
    }

    /// Where messages of devices go.
    pub fn message_sink(&self) -> impl vmm_devices::MsiSink + Clone + 'static {
        sender(Arc::clone(&self.messages))
    }

    /// Adds a PCI host bridge, whose lines lead to those inputs of the I/O APIC.
    ///
    /// # Errors
    /// If a range is taken, or there is no such input.
    pub fn add_pci(&self, layout: PciLayout, [a, b, c, d]: [u32; 4]) -> Result<HostBridge> {
        let line = |input| self.io_apic.line(input);
        let lines = [line(a)?, line(b)?, line(c)?, line(d)?];
        Ok(HostBridge::builder(layout, &self.mmio, &self.pio).interrupts(lines).build()?)
    }

    /// Gives the machine another generation: it goes on from a state that others may go on from, too.
    ///
    /// # Errors
    /// If `ram` has no memory where it is.
    pub fn renew_generation(&self, ram: &GuestRam) -> Result<()> {
        let mut number = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut number).context("/dev/urandom")?;
        let line = self.io_apic.line(GENERATION_INPUT)?;
        Ok(VmGeneration::new(ram.address_space(), GENERATION, line)?.renew(u128::from_ne_bytes(number))?)
    }

    /// Writes the ACPI tables that describe the machine, with what `further` adds; where the root pointer is.
    ///
    /// # Errors
    /// If `ram` has no memory where the tables go.
    pub fn write_tables(
        ram: &GuestRam,
        vcpus: u32,
        further: impl FnOnce(AcpiBuilder) -> AcpiBuilder,
    ) -> Result<GuestAddress> {
        let builder = AcpiBuilder::new(0..vcpus)
            .vm_generation(GENERATION, GENERATION_INPUT)
            .device(AcpiDevice::serial("COM1", 0, ports::COM1, ports::COM1_IRQ))
            .device(AcpiDevice::serial("COM2", 1, ports::COM2, ports::COM2_IRQ))
            .device(AcpiDevice::rtc());
        let tables = further(builder).build(BIOS_AREA.start..GENERATION.0).context("ACPI tables")?;
        tables.write_to(ram)?;
        // The first generation. A page of zeros would be none that a snapshot has, and another generation is what a machine that goes on
        // writes before anything else.
        ram.memory().write_slice(&1_u128.to_le_bytes(), GENERATION)?;
        Ok(tables.rsdp())
    }

    /// Tells the devices which vCPU boots, for a loop of its own that calls [`Pc::service`] and [`Pc::offer`]. When an
    /// access of the guest changes what they would say, the vCPU is kicked.
    pub fn follow(&self, bootstrap: Arc<dyn VcpuHandle>) {
        self.state.led.store(true, Ordering::SeqCst);
        self.state.bootstrap.get_or_init(|| bootstrap);
        self.pic_line_again();
    }

    /// Keeps the timers from firing, from when none does.
    pub fn still(&self) -> Still<'_> {
        Still::new(lock(&self.timers))
    }

    /// Signals what has become due. When there is more to do, in nanoseconds of the uptime.
    pub fn service(&self) -> Option<u64> {
        let _fires = lock(&self.timers);
        let next = |(device, ahead): &(Arc<dyn Service>, u64)| Some(device.service()?.saturating_sub(*ahead));
        self.timed.iter().filter_map(next).min()
    }

    /// Types as much of `input` at the console as finds room; how many bytes that is.
    pub fn offer(&self, input: &[u8]) -> usize {
        self.console.lock().unwrap_or_else(PoisonError::into_inner).enqueue(input)
    }

    /// Sends as much of `line` to the guest through a serial port as finds room.
    pub fn say(&self, port: SerialPort, line: &[u8]) {
        let ports = SerialPort::ALL.into_iter().zip(&self.serial);
        if let Some((_, uart)) = ports.into_iter().find(|(other, _)| *other == port) {
            lock(uart).enqueue(line);
        }
    }

    /// How many bytes find room at the console.
    pub fn room(&self) -> usize {
        self.console.lock().unwrap_or_else(PoisonError::into_inner).input_capacity()
    }

    /// Writes the states of all devices, as text in which every field has its name.
    ///
    /// # Errors
    /// What `out` says.
    pub fn show(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{:?}{:?}", self.pic.state(), self.io_apic.state())?;
        write!(out, "{:?}", self.keyboard.lock().unwrap_or_else(PoisonError::into_inner).state())?;
        for (device, _) in &self.timed {
            device.show(out)?;
        }
        for port in &self.serial {
            write!(out, "{:?}", port.lock().unwrap_or_else(PoisonError::into_inner).state())?;
        }
        Ok(())
    }

    /// Writes the states of the interrupt controllers, for people to read.
    ///
    /// # Errors
    /// What `out` says.
    pub fn show_controllers(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        writeln!(out, "{:#x?}", self.pic.state())?;
        writeln!(out, "{:#x?}", self.io_apic.state())
    }

    /// Tells the devices which vCPU boots, and starts their timers.
    pub fn start(self: &Arc<Self>, bootstrap: Arc<dyn VcpuHandle>) {
        // Nobody sets it but this.
        self.state.bootstrap.get_or_init(|| bootstrap);
        self.pic_line_again();
        let pc = Arc::clone(self);
        let timers = move || loop {
            let next = pc.service();
            let mut changed = pc.state.changed.lock().unwrap_or_else(PoisonError::into_inner);
            while !*changed {
                // Deadlines are in the time of their clocks, so they are only looked at again, not computed with: often
                // enough for the fastest of the timers.
                let timeout =
                    if next.is_some() { Duration::from_millis(1) } else { Duration::from_secs(3600) };
                let (guard, result) =
                    pc.state.wakeup.wait_timeout(changed, timeout).unwrap_or_else(PoisonError::into_inner);
                changed = guard;
                if result.timed_out() {
                    break;
                }
            }
            *changed = false;
        };
        std::thread::Builder::new().name("timers".to_owned()).spawn(timers).map(|_| ()).unwrap_or_else(
            |error| {
                tracing::error!(%error, "no timers");
            },
        );
    }

    /// The PIC may have asked for an interrupt before anybody could hear it.
    fn pic_line_again(&self) {
        if self.pic.is_pending()
            && let Some(vcpu) = self.state.bootstrap.get()
            && let Err(error) = vcpu.set_intr(true)
        {
            tracing::warn!(%error, "INTR");
        }
    }

    /// Types `input` at the console, and waits until all of it has found room there.
    pub fn type_in(&self, input: &[u8]) {
        self.drained.give(input, |left| self.offer(left));
    }

    /// How the guest ended the machine, if it has.
    pub fn end(&self) -> Option<End> {
        self.state.end.get().copied()
    }
}

/// A panic elsewhere leaves a device as it was after an access.
pub(crate) fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What sends a device's messages.
fn sender(messages: Arc<dyn MsiSink>) -> impl Fn(u64, u32) + Clone + Send + Sync + 'static {
    move |address, data| {
        if let Err(error) = messages.send(MsiMessage { address, data }) {
            tracing::warn!(%error, "an interrupt message went nowhere");
        }
    }
}

/// The buses, as a vCPU sees them.
#[derive(Clone)]
pub struct Buses(pub Arc<Pc>);

impl VcpuIo for Buses {
    fn pio_read(&mut self, port: u16, size: usize, data: &mut [u8]) {
        self.0.pio.read(port, size, data);
    }

    fn pio_write(&mut self, port: u16, size: usize, data: &[u8]) {
        self.0.pio.write(port, size, data);
    }

    fn mmio_read(&mut self, gpa: GuestAddress, data: &mut [u8]) {
        if !self.0.mmio.read(gpa, data) {
            data.fill(0xff);
        }
    }

    fn mmio_write(&mut self, gpa: GuestAddress, data: &[u8]) {
        self.0.mmio.write(gpa, data);
    }

    fn eoi(&mut self, vector: u8) {
        self.0.io_apic.end_of_interrupt(vector);
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.0.pic.is_pending().then(|| self.0.pic.acknowledge())
    }
}

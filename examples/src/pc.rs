//! The PC around the vCPUs: interrupt controllers, timers, serial ports, power management, on two buses.
//!
//! Every device comes from `vmm-devices`; this file says where each one is and which wire leads where. It asks of a
//! backend just local APICs and a sink for messages.

use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use vmm_cpu::{MsiMessage, MsiSink, VcpuHandle, VcpuIo};
use vmm_devices::acpi::{AcpiBuilder, AcpiDevice, BIOS_AREA};
use vmm_devices::platform::{
    AcpiPm, DebugExit, I8042, IoApic, Pic, Pit, PlatformEvent, Rtc, Uart16550, ports,
};
use vmm_devices::{BusDevice, BusRange, MmioBus, PioBus, Timed, TimedDevice};
use vmm_memory::GuestRam;
use vmm_memory::vm_memory::GuestAddress;

use crate::guest_command::SerialPort;

/// How a guest ended its machine.
pub type End = PlatformEvent;

/// The devices of a machine.
pub struct Pc {
    pio: PioBus,
    mmio: MmioBus,
    io_apic: Arc<IoApic>,
    pic: Arc<Pic>,
    console: Arc<Mutex<Uart16550>>,
    /// The guest has read what was typed.
    drained: Arc<Drained>,
    state: Arc<State>,
    timed: Vec<Arc<dyn Service>>,
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
}

impl State {
    fn wake_timers(&self) {
        *self.changed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.wakeup.notify_one();
    }
}

/// A device that does something at times of its own.
trait Service: Send + Sync {
    fn service(&self) -> Option<u64>;
}

impl<D: TimedDevice + Send> Service for Timed<D> {
    fn service(&self) -> Option<u64> {
        Timed::service(self)
    }
}

/// Told when the console has room for input.
#[derive(Default)]
struct Drained {
    room: Mutex<bool>,
    wakeup: Condvar,
}

impl Drained {
    fn notify(&self) {
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
    /// Builds the devices. Interrupt messages go to `messages`, the output of each serial port to what `output` makes
    /// for it, and `ended` is called, maybe in a callback of a vCPU, when [`Pc::end`] has something to tell.
    ///
    /// # Errors
    /// None that depends on the guest.
    pub fn new(
        messages: Arc<dyn MsiSink>,
        output: impl Fn(SerialPort) -> Output,
        ended: impl Fn() + Clone + Send + Sync + 'static,
    ) -> Result<Self> {
        let state = Arc::new(State::default());
        let io_apic = Arc::new(IoApic::new(move |address, data| {
            if let Err(error) = messages.send(MsiMessage { address, data }) {
                tracing::warn!(%error, "an interrupt message went nowhere");
            }
        }));
        let intr = Arc::clone(&state);
        let pic = Arc::new(Pic::new(move |asserted: bool| {
            if let Some(vcpu) = intr.bootstrap.get()
                && let Err(error) = vcpu.set_intr(asserted)
            {
                tracing::warn!(%error, "INTR");
            }
        }));
        let line = |irq: u32, gsi: u32| -> Result<_> { Ok((pic.line(irq)?, io_apic.line(gsi)?)) };

        let start = Instant::now();
        let uptime = move || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let wall = || {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        };
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

        let pit = Pit::new(uptime, line(ports::PIT_IRQ, ports::PIT_GSI)?);
        let pit = Arc::new(Timed::new(pit, wake(&state)));
        let rtc = Arc::new(Timed::new(Rtc::new(wall, line(ports::RTC_IRQ, ports::RTC_IRQ)?), wake(&state)));
        let sci = line(ports::ACPI_SCI, ports::ACPI_SCI)?;
        let acpi = Arc::new(Timed::new(AcpiPm::new(uptime, sci, ended(&state)), wake(&state)));
        let keyboard = Arc::new(Mutex::new(I8042::new(ended(&state))));
        let debug_exit = Arc::new(DebugExit::new(ended(&state)));

        let (pio, mmio) = (PioBus::new(), MmioBus::new());
        let attach = |name: &str, ranges: &[BusRange], device: Arc<dyn BusDevice>| -> Result<()> {
            for range in ranges {
                pio.insert(name, *range, Arc::clone(&device))?;
            }
            Ok(())
        };
        attach("PIC", &ports::PIC, pic.clone())?;
        attach("PIT", &ports::PIT, pit.clone())?;
        attach("i8042", &ports::I8042, keyboard)?;
        attach("RTC", &[ports::RTC], rtc.clone())?;
        attach("debug exit", &[ports::DEBUG_EXIT], debug_exit)?;
        attach("ACPI", &[ports::ACPI_PM], acpi.clone())?;
        mmio.insert("I/O APIC", ports::IO_APIC, io_apic.clone())?;

        let drained = Arc::new(Drained::default());
        let mut console = None;
        for port in SerialPort::ALL {
            let irq = port.irq().into();
            let notify = Arc::clone(&drained);
            let is_console = port == SerialPort::Console;
            let uart = Uart16550::with_drained(line(irq, irq)?, output(port), move || {
                if is_console {
                    notify.notify();
                }
            });
            let uart = Arc::new(Mutex::new(uart));
            pio.insert(port.device(), BusRange::new(port.io_base().into(), 8), uart.clone())?;
            if is_console {
                console = Some(uart);
            }
        }
        let console = console.context("a PC has a console")?;
        Ok(Self { pio, mmio, io_apic, pic, console, drained, state, timed: vec![pit, rtc, acpi] })
    }

    /// Writes the ACPI tables that describe the machine; where the root pointer is.
    ///
    /// # Errors
    /// If `ram` has no memory where the tables go.
    pub fn write_tables(ram: &GuestRam, vcpus: u32) -> Result<GuestAddress> {
        let tables = AcpiBuilder::new(0..vcpus)
            .device(AcpiDevice::serial("COM1", 0, ports::COM1, ports::COM1_IRQ))
            .device(AcpiDevice::serial("COM2", 1, ports::COM2, ports::COM2_IRQ))
            .device(AcpiDevice::rtc())
            .build(BIOS_AREA)
            .context("ACPI tables")?;
        tables.write_to(ram)?;
        Ok(tables.rsdp())
    }

    /// Tells the devices which vCPU boots, and starts their timers.
    pub fn start(self: &Arc<Self>, bootstrap: Arc<dyn VcpuHandle>) {
        // Nobody sets it but this.
        self.state.bootstrap.get_or_init(|| bootstrap);
        self.pic_line_again();
        let pc = Arc::clone(self);
        let timers = move || loop {
            let next = pc.timed.iter().filter_map(|device| device.service()).min();
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
        let mut left = input;
        loop {
            let taken = self.console.lock().unwrap_or_else(PoisonError::into_inner).enqueue(left);
            left = left.get(taken..).unwrap_or_default();
            if left.is_empty() {
                return;
            }
            self.drained.wait();
        }
    }

    /// How the guest ended the machine, if it has.
    pub fn end(&self) -> Option<End> {
        self.state.end.get().copied()
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

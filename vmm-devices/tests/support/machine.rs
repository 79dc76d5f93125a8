//! A machine with every device, and what a guest and its surroundings can do to it. The random test runs it
//! here, the fuzz target runs it with inputs that it finds.

use std::io;
use std::sync::{Arc, Mutex};

use vmm_devices::interrupt::InterruptLine;
use vmm_devices::platform::{
    AcpiPm, DebugExit, I8042, IoApic, Pic, PicLine, Pit, PlatformEvent, Rtc, Uart16550, ports,
};
use vmm_devices::vmm_memory::vm_memory::GuestAddress;
use vmm_devices::{BusDevice, Clock as _, ManualClock, MmioBus, PioBus, TimedDevice as _};

/// Something that happens to the machine.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    /// IN, or INS if `count` is more than 1.
    In { port: u16, size: u8, count: u8 },
    /// OUT.
    Out { port: u16, size: u8, value: u32 },
    /// A load of memory, `offset` from a little before the I/O APIC.
    Load { offset: u16, size: u8 },
    /// A store there.
    Store { offset: u16, size: u8, value: u64 },
    /// Time passes.
    Pass { ns: u64 },
    /// A device changes the level of an interrupt.
    Line { irq: u8, asserted: bool },
    /// The processor takes an interrupt from the PICs.
    Acknowledge,
    /// A local APIC ends an interrupt.
    EndOfInterrupt { vector: u8 },
    /// The terminal has input.
    Input { count: u8 },
    /// The user wants an end.
    PowerButton,
    /// A snapshot is taken and restored.
    SaveAndRestore,
}

/// Every device of the crate at its usual place.
pub(crate) struct Machine {
    pub(crate) pio: PioBus,
    pub(crate) mmio: MmioBus,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) io_apic: Arc<IoApic>,
    pub(crate) pic: Arc<Pic>,
    pub(crate) uart: Arc<Mutex<Uart16550>>,
    pub(crate) pit: Arc<Mutex<Pit>>,
    pub(crate) rtc: Arc<Mutex<Rtc>>,
    pub(crate) i8042: Arc<Mutex<I8042>>,
    pub(crate) pm: Arc<Mutex<AcpiPm>>,
    pub(crate) events: Arc<Mutex<Vec<PlatformEvent>>>,
}

/// A message of the I/O APIC names a local APIC and nothing else.
fn check_message(address: u64, data: u32) {
    assert_eq!(address & !0xf_f00c, 0xfee0_0000);
    assert_eq!(data & !0xc7ff, 0);
}

impl Machine {
    pub(crate) fn new() -> Self {
        let clock = Arc::new(ManualClock::new(1_700_000_000_000_000_000));
        let events: Arc<Mutex<Vec<PlatformEvent>>> = Arc::default();
        let io_apic = Arc::new(IoApic::new(check_message));
        let pic = Arc::new(Pic::new(|_: bool| ()));
        let isa = |irq: u32, gsi: u32| (pic.line(irq).unwrap(), io_apic.line(gsi).unwrap());
        let heard = |events: &Arc<Mutex<Vec<PlatformEvent>>>| {
            let events = Arc::clone(events);
            move |event: PlatformEvent| {
                let mut events = events.lock().unwrap();
                events.clear();
                events.push(event);
            }
        };

        let uart = Uart16550::new(isa(ports::COM1_IRQ, ports::COM1_IRQ), io::sink());
        let pit = Pit::new(Arc::clone(&clock), isa(ports::PIT_IRQ, ports::PIT_GSI));
        let rtc = Rtc::new(Arc::clone(&clock), isa(ports::RTC_IRQ, ports::RTC_IRQ));
        let pm = AcpiPm::new(Arc::clone(&clock), isa(ports::ACPI_SCI, ports::ACPI_SCI), heard(&events));
        let machine = Self {
            pio: PioBus::new(),
            mmio: MmioBus::new(),
            uart: Arc::new(Mutex::new(uart)),
            pit: Arc::new(Mutex::new(pit)),
            rtc: Arc::new(Mutex::new(rtc)),
            i8042: Arc::new(Mutex::new(I8042::new(heard(&events)))),
            pm: Arc::new(Mutex::new(pm)),
            clock,
            io_apic,
            pic,
            events,
        };
        let put = |name: &str, ranges: &[_], device: Arc<dyn BusDevice>| {
            for range in ranges {
                machine.pio.insert(name, *range, Arc::clone(&device)).unwrap();
            }
        };
        put("COM1", &[ports::COM1], machine.uart.clone());
        put("PIC", &ports::PIC, machine.pic.clone());
        put("PIT", &ports::PIT, machine.pit.clone());
        put("RTC", &[ports::RTC], machine.rtc.clone());
        put("i8042", &ports::I8042, machine.i8042.clone());
        put("ACPI PM", &[ports::ACPI_PM], machine.pm.clone());
        put("debug exit", &[ports::DEBUG_EXIT], Arc::new(DebugExit::new(heard(&machine.events))));
        machine.mmio.insert("I/O APIC", ports::IO_APIC, machine.io_apic.clone()).unwrap();
        machine
    }

    /// Ports that a device has, and those one before and after. Anything else is unclaimed.
    pub(crate) fn ports() -> Vec<u16> {
        let single = [ports::COM1, ports::RTC, ports::ACPI_PM, ports::DEBUG_EXIT];
        let ranges = ports::PIC.iter().chain(&ports::PIT).chain(&ports::I8042).chain(&single);
        ranges.flat_map(|range| range.base - 1..=range.base + range.size).map(|port| port as u16).collect()
    }

    /// Whether the registers of the I/O APIC begin so many bytes after the place that offsets count from.
    pub(crate) const BEFORE_IO_APIC: u64 = 16;

    pub(crate) fn perform(&self, action: &Action) {
        let gpa = |offset: u16| GuestAddress(ports::IO_APIC.base - Self::BEFORE_IO_APIC + u64::from(offset));
        match *action {
            Action::In { port, size, count } => {
                let mut data = vec![0; usize::from(size) * usize::from(count)];
                self.pio.read(port, size.into(), &mut data);
            }
            Action::Out { port, size, value } => {
                let bytes = value.to_le_bytes();
                self.pio.write(port, size.into(), bytes.get(..size.into()).unwrap_or(&bytes));
            }
            Action::Load { offset, size } => {
                self.mmio.read(gpa(offset), &mut vec![0; size.into()]);
            }
            Action::Store { offset, size, value } => {
                let bytes = value.to_le_bytes();
                self.mmio.write(gpa(offset), bytes.get(..size.into()).unwrap_or(&bytes));
            }
            Action::Pass { ns } => {
                self.clock.advance(ns);
                self.pit.lock().unwrap().service();
                self.rtc.lock().unwrap().service();
                self.pm.lock().unwrap().service();
                // What is due later than now is not due before now.
                let now = self.clock.now_ns();
                for deadline in [
                    self.pit.lock().unwrap().next_deadline(),
                    self.rtc.lock().unwrap().next_deadline(),
                    self.pm.lock().unwrap().next_deadline(),
                ] {
                    assert!(deadline.is_none_or(|deadline| deadline > now || now == u64::MAX));
                }
            }
            Action::Line { irq, asserted } => {
                // Numbers that a controller does not have are refused.
                let pic: Option<PicLine> = self.pic.line(irq.into()).ok();
                if let Some(line) = pic {
                    line.set_level(asserted);
                }
                assert_eq!(self.io_apic.set_line(irq.into(), asserted).is_ok(), irq < 24);
            }
            Action::Acknowledge => {
                self.pic.acknowledge();
            }
            Action::EndOfInterrupt { vector } => self.io_apic.end_of_interrupt(vector),
            Action::Input { count } => {
                let mut uart = self.uart.lock().unwrap();
                let room = uart.input_capacity();
                let taken = uart.enqueue(&vec![b'x'; count.into()]);
                assert!(taken <= room && uart.input_capacity() == room - taken);
            }
            Action::PowerButton => self.pm.lock().unwrap().press_power_button(),
            Action::SaveAndRestore => self.save_and_restore(),
        }
    }

    /// A state that a device gives is one that it takes, and is the same afterwards.
    fn save_and_restore(&self) {
        macro_rules! plain {
            ($($device:expr),*) => {$({
                let mut device = $device.lock().unwrap();
                let state = device.state();
                device.restore(&state).unwrap();
                assert_eq!(device.state(), state);
            })*};
        }
        plain!(self.uart, self.pit, self.rtc, self.i8042, self.pm);
        let state = self.io_apic.state();
        self.io_apic.restore(&state).unwrap();
        assert_eq!(self.io_apic.state(), state);
        let state = self.pic.state();
        self.pic.restore(&state).unwrap();
        assert_eq!(self.pic.state(), state);
    }
}

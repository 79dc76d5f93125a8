//! A PCI host bridge with three functions and a device that is none, and what a guest and its surroundings can do to them. The
//! random test runs it here, the fuzz target runs it with inputs that it finds.

use std::sync::{Arc, Mutex};

use vmm_devices::interrupt::InterruptLine;
use vmm_devices::pci::{
    Bar, BarKind, BarMapping, BarStatus, Capability, ConfigBuilder, ConfigSpace, FunctionAddress, HostBridge,
    Identity, InterruptPin, Msix, MsixPlace, PciFunction, PciLayout, SharedFunction, capability,
};
use vmm_devices::vmm_memory::vm_memory::GuestAddress;
use vmm_devices::{BusDevice, BusRange, MmioBus, PioBus};

/// Something that happens to the machine. Functions are 0 to 2, larger numbers wrap.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    /// A load of configuration space, whose window `offset` counts from.
    LoadConfig {
        offset: u32,
        size: u8,
    },
    /// A store there.
    StoreConfig {
        offset: u32,
        size: u8,
        value: u64,
    },
    /// IN of one of the eight configuration ports.
    In {
        port: u8,
        size: u8,
    },
    /// OUT there.
    Out {
        port: u8,
        size: u8,
        value: u32,
    },
    /// The whole of a register of a function.
    Configure {
        function: u8,
        register: u8,
        value: u32,
    },
    /// A BAR is moved to one of a few places that are good or nearly so.
    Move {
        function: u8,
        bar: u8,
        place: u8,
    },
    /// Memory and I/O decoding, bus mastering, and whether the pin is disabled.
    Command {
        function: u8,
        value: u16,
    },
    /// A load of a BAR, wherever it is.
    Load {
        function: u8,
        bar: u8,
        offset: u16,
        size: u8,
    },
    /// A store there.
    Store {
        function: u8,
        bar: u8,
        offset: u16,
        size: u8,
        value: u64,
    },
    /// A function signals a vector, or drives its pin.
    Notify {
        vector: u16,
    },
    Pin {
        function: u8,
        asserted: bool,
    },
    /// A function is taken out, or put in where it was.
    Plug {
        function: u8,
        present: bool,
    },
    /// The machine is reset.
    Reset,
    /// A snapshot is taken and restored.
    SaveAndRestore,
}

/// A function that answers with its number and its BAR's, but for MSI-X.
pub(crate) struct Probe {
    config: ConfigSpace,
    msix: Option<Msix>,
    number: u8,
    /// Where it was told that its BARs are.
    told: [Option<u64>; 6],
}

impl Probe {
    fn signature(&self, bar: usize) -> u8 {
        signature(self.number, bar)
    }
}

fn signature(number: u8, bar: usize) -> u8 {
    0x80 | number << 4 | bar as u8
}

impl PciFunction for Probe {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        assert!(self.config.bar(bar).is_some_and(|kind| offset < kind.size()));
        if self.msix.as_ref().is_none_or(|msix| !msix.read(bar, offset, data)) {
            data.fill(self.signature(bar));
        }
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        assert!(self.config.bar(bar).is_some_and(|kind| offset < kind.size()));
        if let Some(msix) = &self.msix {
            msix.write(bar, offset, data);
        }
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        assert!((1..=4).contains(&data.len()) && usize::from(offset & 3) + data.len() <= 4);
        self.config.write(offset, data);
        if let Some(msix) = &self.msix {
            msix.config_written(&self.config);
        }
    }

    fn bar_moved(&mut self, bar: usize, at: Option<u64>) {
        assert_ne!(self.told[bar], at, "told twice");
        self.told[bar] = at;
    }

    fn reset(&mut self) {
        if let Some(msix) = &self.msix {
            msix.reset();
        }
    }
}

/// A line that is told each level once.
#[derive(Default)]
struct Wire(Mutex<bool>);

impl InterruptLine for Wire {
    fn set_level(&self, asserted: bool) {
        let before = std::mem::replace(&mut *self.0.lock().unwrap(), asserted);
        assert_ne!(before, asserted);
    }
}

struct Rom;

impl BusDevice for Rom {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0x55);
    }

    fn write(&self, _: u64, _: &[u8]) {}
}

pub(crate) struct Machine {
    pub(crate) mmio: Arc<MmioBus>,
    pub(crate) pio: Arc<PioBus>,
    pub(crate) bridge: HostBridge,
    pub(crate) layout: PciLayout,
    lines: [Arc<Wire>; 4],
    functions: [Arc<Mutex<Probe>>; 3],
}

/// In the window, where the monitor should not have put it.
pub(crate) const ROM: BusRange = BusRange::new(0xe900_0800, 0x100);
const MSIX: MsixPlace = MsixPlace { bar: 0, table: 0x800, pending: 0xc00 };

fn identity(number: u8) -> Identity {
    Identity::new(0x1234, 0x1000 + u16::from(number), [0xff, 0, number]).subsystem(7, number.into())
}

fn address(number: u8) -> FunctionAddress {
    let (device, function) = [(1, 0), (2, 0), (2, 3)][usize::from(number)];
    FunctionAddress::new(device, function).unwrap()
}

fn probe(number: u8, bars: &[(usize, Bar)]) -> Arc<Mutex<Probe>> {
    let mut config = ConfigBuilder::new(identity(number));
    for &(index, bar) in bars {
        config.bar(index, bar).unwrap();
    }
    config.interrupt_pin([InterruptPin::A, InterruptPin::B, InterruptPin::D][usize::from(number)]);
    let msix = (number == 0).then(|| Msix::new(&mut config, 33, MSIX, |_: u64, _: u32| ()).unwrap());
    let vendor = Capability::new(capability::id::VENDOR, [16, 0, 0, 0, 0, 0, 0xf0, 0xf0, 1, 2]);
    config.capability(vendor.writable([0, 0, 0xff, 0xff, 0x0f]).cleared_by_one([0; 8])).unwrap();
    config.capability(Capability::extended(0xb, 1, [0; 8]).cleared_by_one([0xff; 2])).unwrap();
    Arc::new(Mutex::new(Probe { config: config.build(), msix, number, told: [None; 6] }))
}

impl Machine {
    pub(crate) fn new() -> Self {
        let (mmio, pio): (Arc<MmioBus>, Arc<PioBus>) = Default::default();
        let layout = PciLayout::default().memory64(Some(BusRange::new(1 << 40, 1 << 30)));
        let lines: [Arc<Wire>; 4] = Default::default();
        let bridge = HostBridge::builder(layout, &mmio, &pio).interrupts(lines.clone()).build().unwrap();
        mmio.insert("ROM", ROM, Arc::new(Rom)).unwrap();
        let functions = [
            probe(
                0,
                &[(0, Bar::memory32(0x1000)), (1, Bar::io(0x40)), (2, Bar::memory64(0x4000).prefetchable())],
            ),
            probe(1, &[(0, Bar::memory64(0x1000)), (3, Bar::memory32(0x10)), (4, Bar::memory64(1 << 28))]),
            probe(2, &[(5, Bar::io(4)), (0, Bar::memory32(0x2000))]),
        ];
        let machine = Self { mmio, pio, bridge, layout, lines, functions };
        for number in [0, 1, 2] {
            machine.perform(&Action::Plug { function: number, present: true });
        }
        machine
    }

    fn mapping(&self, function: u8, bar: u8) -> Option<BarMapping> {
        let mine = |mapping: &BarMapping| {
            mapping.function == address(function % 3) && mapping.bar == usize::from(bar)
        };
        self.bridge.mappings().into_iter().find(mine)
    }

    fn window(&self, offset: u32) -> GuestAddress {
        // Some of it before the window and behind.
        GuestAddress(self.layout.ecam.0 - 0x10 + u64::from(offset) % ((1 << 20) + 0x20))
    }

    fn register(&self, function: u8, register: u64) -> GuestAddress {
        let address = address(function % 3);
        let devfn = u64::from(address.device()) << 3 | u64::from(address.function());
        GuestAddress(self.layout.ecam.0 + (devfn << 12) + register)
    }

    fn load_register(&self, function: u8, register: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(self.register(function, register), &mut data);
        u32::from_le_bytes(data)
    }

    fn store(&self, gpa: GuestAddress, size: u8, value: u64) {
        let bytes = value.to_le_bytes();
        self.mmio.write(gpa, bytes.get(..size.into()).unwrap_or(&bytes));
    }

    /// What of the action was done leaves a machine that is whole.
    pub(crate) fn perform(&self, action: &Action) {
        self.act(action);
        self.check();
    }

    fn act(&self, action: &Action) {
        match *action {
            Action::LoadConfig { offset, size } => {
                self.mmio.read(self.window(offset), &mut vec![0; size.into()]);
            }
            Action::StoreConfig { offset, size, value } => self.store(self.window(offset), size, value),
            Action::In { port, size } => {
                self.pio.read(0xcf8 + u16::from(port % 8), size.into(), &mut vec![0; size.into()]);
            }
            Action::Out { port, size, value } => {
                let bytes = value.to_le_bytes();
                let data = bytes.get(..size.into()).unwrap_or(&bytes);
                self.pio.write(0xcf8 + u16::from(port % 8), size.into(), data);
            }
            Action::Configure { function, register, value } => {
                self.store(self.register(function, u64::from(register) & 0xfc), 4, value.into());
            }
            Action::Move { function, bar, place } => {
                let places = [
                    0xe900_0000,
                    0xe900_1000,
                    0xe900_0040,
                    0xe900_2000,
                    0xfdff_f000,
                    0xfe00_0000,
                    0xe7ff_f000,
                    0xe000_0000,
                    0x1000,
                    0x1004,
                    0x1040,
                    0xffc0,
                    0xcf8,
                    0,
                    0xf000_0000,
                    0xffff_ffff,
                ];
                let value = places[usize::from(place & 15)];
                let register = 0x10 + 4 * u64::from(bar % 6);
                self.store(self.register(function, register), 4, value);
                if place & 0x30 == 0 {
                    // A 64-bit one from one window into the other.
                    self.store(self.register(function, register + 4), 4, u64::from(place >> 6) << 8);
                }
            }
            Action::Command { function, value } => self.store(self.register(function, 4), 2, value.into()),
            Action::Load { function, bar, offset, size } => {
                let Some(mapping) = self.mapping(function, bar) else { return };
                let (at, mut data) = (mapping.range.base.wrapping_add(offset.into()), vec![0; size.into()]);
                match u16::try_from(at) {
                    Ok(port) => self.pio.read(port, size.into(), &mut data),
                    Err(_) => self.mmio.read(GuestAddress(at), &mut data),
                };
            }
            Action::Store { function, bar, offset, size, value } => {
                let Some(mapping) = self.mapping(function, bar) else { return };
                let at = mapping.range.base.wrapping_add(offset.into());
                self.store(GuestAddress(at), size, value);
            }
            Action::Notify { vector } => {
                let msix = self.functions[0].lock().unwrap().msix.clone().unwrap();
                assert_eq!(msix.notify(vector), msix.is_enabled());
            }
            Action::Pin { function, asserted } => {
                let intx = self.functions[usize::from(function % 3)].lock().unwrap().config.intx().cloned();
                intx.unwrap().set_level(asserted);
            }
            Action::Plug { function, present } => self.plug(function % 3, present),
            Action::Reset => self.bridge.reset(),
            Action::SaveAndRestore => self.save_and_restore(),
        }
    }

    fn plug(&self, number: u8, present: bool) {
        let function = &self.functions[usize::from(number)];
        let there = self.bridge.function(address(number)).is_some();
        if present {
            let shared: SharedFunction = Arc::clone(function) as SharedFunction;
            let added = self.bridge.add_at(address(number), shared);
            // The third one needs the second one beside it.
            let alone = number == 2 && self.bridge.function(address(1)).is_none();
            assert_eq!(added.is_ok(), !there && !alone, "{added:?}");
        } else {
            assert_eq!(self.bridge.remove(address(number)).is_ok(), there);
            let probe = function.lock().unwrap();
            assert_eq!(probe.told, [None; 6]);
        }
    }

    /// A state that the machine gives is one that it takes, and is the same afterwards.
    fn save_and_restore(&self) {
        let (bridge, mappings) = (self.bridge.state(), self.bridge.mappings());
        for function in &self.functions {
            let mut probe = function.lock().unwrap();
            let config = probe.config.state();
            probe.config.restore(&config).unwrap();
            assert_eq!(probe.config.state(), config);
            if let Some(msix) = probe.msix.clone() {
                let state = msix.state();
                msix.restore(&state, &probe.config).unwrap();
                assert_eq!(msix.state(), state);
            }
        }
        self.bridge.restore(&bridge).unwrap();
        assert_eq!((self.bridge.state(), self.bridge.mappings()), (bridge, mappings));
    }

    fn check(&self) {
        // Who is there is who was there.
        for number in 0..3 {
            let there = self.bridge.function(address(number)).is_some();
            let Identity { vendor, device, class: [base, sub, interface], .. } = identity(number);
            let expected = [
                u32::from(device) << 16 | u32::from(vendor),
                u32::from_le_bytes([0, interface, sub, base]),
                u32::from(number) << 16 | 7,
            ];
            for (register, expected) in [0, 8, 0x2c].into_iter().zip(expected) {
                let expected = if there { expected } else { u32::MAX };
                assert_eq!(self.load_register(number, register), expected);
            }
        }
        // What answers lies in a window, touches nobody, and is the function's; and what does not, does not.
        let mappings = self.bridge.mappings();
        let mut spans = vec![(false, ROM.base, ROM.base + ROM.size - 1)];
        for mapping in &mappings {
            let (range, kind) = (mapping.range, mapping.kind);
            let number = (0..3).find(|number| address(*number) == mapping.function).unwrap();
            let told = self.functions[usize::from(number)].lock().unwrap().told[mapping.bar];
            let mapped = mapping.status == BarStatus::Mapped;
            assert_eq!(told, mapped.then_some(range.base));
            if !mapped {
                continue;
            }
            let last = range.base + (range.size - 1);
            let io = kind == BarKind::Io;
            let windows =
                if io { [self.layout.io, None] } else { [Some(self.layout.memory32), self.layout.memory64] };
            let inside = |window: BusRange| window.base <= range.base && last < window.base + window.size;
            assert!(windows.into_iter().flatten().any(inside), "{mapping:?}");
            for &(other_io, other, other_last) in &spans {
                assert!(io != other_io || last < other || other_last < range.base, "{mapping:?}");
            }
            spans.push((io, range.base, last));
            let mut data = [0];
            let claimed = match u16::try_from(range.base) {
                Ok(port) => self.pio.read(port, 1, &mut data),
                Err(_) => self.mmio.read(GuestAddress(range.base), &mut data),
            };
            assert_eq!((claimed, data[0]), (true, signature(number, mapping.bar)));
        }
        let mut data = [0; 4];
        assert!(self.mmio.read(GuestAddress(ROM.base), &mut data) && data == [0x55; 4]);
        self.check_lines();
    }

    /// A line is asserted if any pin that leads to it is, and may be.
    fn check_lines(&self) {
        let mut expected = [false; 4];
        for number in 0..3_u8 {
            if self.bridge.function(address(number)).is_some() {
                let register = self.load_register(number, 4);
                let pin = [0, 1, 3][usize::from(number)];
                let line = usize::from((address(number).device() + pin) % 4);
                expected[line] |= register & (1 << 19) != 0 && register & (1 << 10) == 0;
            }
        }
        assert_eq!(self.lines.each_ref().map(|line| *line.0.lock().unwrap()), expected);
    }
}

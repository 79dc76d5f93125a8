use std::sync::atomic::AtomicBool;

use vmm_memory::vm_memory::GuestAddress;

use super::*;
use crate::bus::BusRange;
use crate::interrupt::testing::Recorder;
use crate::pci::{Bar, BarRefusal, BarStatus, ConfigBuilder, InterruptPin, Intx};

/// A function whose BARs read as its number and the BAR's.
struct Probe {
    config: ConfigSpace,
    number: u8,
    writes: Vec<(usize, u64, Vec<u8>)>,
    moves: Vec<(usize, Option<u64>)>,
    resets: usize,
}

impl PciFunction for Probe {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn bar_read(&mut self, bar: usize, _: u64, data: &mut [u8]) {
        assert!(data.iter().all(|&byte| byte == 0xff));
        data.fill(self.number << 4 | u8::try_from(bar).unwrap());
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        self.writes.push((bar, offset, data.to_vec()));
    }

    fn bar_moved(&mut self, bar: usize, at: Option<u64>) {
        self.moves.push((bar, at));
    }

    fn reset(&mut self) {
        self.resets += 1;
    }
}

fn probe_with(number: u8, bars: &[(usize, Bar)], pin: Option<InterruptPin>) -> Arc<Mutex<Probe>> {
    let mut config = ConfigBuilder::new(Identity::new(0x1234, number.into(), [0xff, 0, 0]));
    for &(index, bar) in bars {
        config.bar(index, bar).unwrap();
    }
    if let Some(pin) = pin {
        config.interrupt_pin(pin);
    }
    let config = config.build();
    Arc::new(Mutex::new(Probe { config, number, writes: vec![], moves: vec![], resets: 0 }))
}

/// One with a BAR of each kind.
fn probe(number: u8) -> Arc<Mutex<Probe>> {
    let bars = [(0, Bar::memory32(0x1000)), (1, Bar::io(0x20)), (2, Bar::memory64(0x4000).prefetchable())];
    probe_with(number, &bars, Some(InterruptPin::A))
}

const ECAM: u64 = 0xe000_0000;
const LOW: u64 = 0xe800_0000;
const HIGH: u64 = 0x40_0000_0000;

struct Machine {
    mmio: Arc<MmioBus>,
    pio: Arc<PioBus>,
    bridge: HostBridge,
    lines: [Recorder<bool>; 4],
}

fn layout() -> PciLayout {
    PciLayout::default().memory64(Some(BusRange::new(HIGH, 1 << 30)))
}

fn machine() -> Machine {
    let (mmio, pio): (Arc<MmioBus>, Arc<PioBus>) = Default::default();
    let lines = [(); 4].map(|()| Recorder::default());
    let bridge = HostBridge::builder(layout(), &mmio, &pio).interrupts(lines.clone()).build().unwrap();
    Machine { mmio, pio, bridge, lines }
}

fn at(device: u8, function: u8) -> FunctionAddress {
    FunctionAddress::new(device, function).unwrap()
}

impl Machine {
    fn ecam(address: FunctionAddress, offset: u64) -> GuestAddress {
        let [device, function] = [address.device(), address.function()].map(u64::from);
        GuestAddress(ECAM + (device << 15) + (function << 12) + offset)
    }

    fn read(&self, address: FunctionAddress, offset: u64) -> u32 {
        let mut data = [0; 4];
        assert!(self.mmio.read(Self::ecam(address, offset), &mut data));
        u32::from_le_bytes(data)
    }

    fn write(&self, address: FunctionAddress, offset: u64, value: u32) {
        assert!(self.mmio.write(Self::ecam(address, offset), &value.to_le_bytes()));
    }

    fn bar(&self, address: FunctionAddress, bar: u64) -> u64 {
        u64::from(self.read(address, 0x10 + 4 * bar) & !0xf)
    }

    /// The byte of device memory at an address, if there is a device.
    fn load(&self, gpa: u64) -> Option<u8> {
        let mut data = [0];
        self.mmio.read(GuestAddress(gpa), &mut data).then_some(data[0])
    }

    fn load_port(&self, port: u16) -> Option<u8> {
        let mut data = [0];
        self.pio.read(port, 1, &mut data).then_some(data[0])
    }

    fn status(&self, address: FunctionAddress, bar: usize) -> BarStatus {
        let mappings = self.bridge.mappings();
        mappings.into_iter().find(|mapping| (mapping.function, mapping.bar) == (address, bar)).unwrap().status
    }
}

#[test]
fn a_guest_finds_what_there_is() {
    let m = machine();
    assert_eq!(m.bridge.add(probe(7)), Ok(at(1, 0)));
    m.bridge.add_at(at(4, 0), probe(8)).unwrap();
    m.bridge.add_at(at(4, 5), probe(9)).unwrap();
    assert_eq!(m.bridge.add(probe(10)), Ok(at(2, 0)));
    let mut found = Vec::new();
    for device in 0..32 {
        for function in 0..8 {
            let ids = m.read(at(device, function), 0);
            if ids != u32::MAX {
                let multi = m.read(at(device, function), 0xc) >> 23 & 1;
                found.push((device, function, ids >> 16, multi));
            }
        }
    }
    assert_eq!(found, [(0, 0, 8, 0), (1, 0, 7, 0), (2, 0, 10, 0), (4, 0, 8, 1), (4, 5, 9, 0)]);
    assert_eq!(m.read(at(0, 0), 8), 0x0600_0000);
    assert_eq!(m.bridge.functions(), [at(0, 0), at(1, 0), at(2, 0), at(4, 0), at(4, 5)]);
    // The header type alone, and a piece that ends before it.
    let mut data = [0; 2];
    m.mmio.read(Machine::ecam(at(4, 0), 0xe), &mut data[..1]);
    assert_eq!(data[0], 0x80);
    m.mmio.read(Machine::ecam(at(4, 0), 0xc), &mut data);
    assert_eq!(data, [0, 0]);
    m.bridge.remove(at(4, 5)).unwrap();
    assert_eq!(m.read(at(4, 0), 0xc), 0);
}

#[test]
fn both_ways_to_configuration_space_agree() {
    let m = machine();
    let address = m.bridge.add(probe(7)).unwrap();
    let select = |value: u32| assert!(m.pio.write(0xcf8, 4, &value.to_le_bytes()));
    let mut data = [0; 8];
    for device in 0..3 {
        for register in (0..0x100).step_by(4) {
            select(1 << 31 | u32::from(device) << 11 | register);
            for (offset, size) in [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (2, 2), (0, 4)] {
                let (mut a, mut b) = ([0; 4], [0; 4]);
                m.pio.read(0xcfc + offset, size, &mut a[..size]);
                let gpa = Machine::ecam(at(device, 0), u64::from(register) + u64::from(offset));
                m.mmio.read(gpa, &mut b[..size]);
                assert_eq!(a, b, "{device} {register:#x} + {offset}, {size}");
            }
        }
    }
    // What one writes, the other reads.
    select(1 << 31 | 1 << 11 | 0x3c);
    m.pio.write(0xcfc, 1, &[11]);
    assert_eq!(m.read(address, 0x3c), 0x10b);
    m.write(address, 0x3c, 5);
    m.pio.read(0xcfc, 4, &mut data[..4]);
    assert_eq!(data[..4], [5, 1, 0, 0]);
    m.pio.read(0xcf8, 4, &mut data[..4]);
    assert_eq!(u32::from_le_bytes(data[..4].try_into().unwrap()), 1 << 31 | 1 << 11 | 0x3c);

    // Reserved bits read as zero; only the whole register is one, and other buses are empty.
    select(u32::MAX);
    m.pio.write(0xcfb, 1, &[1]);
    m.pio.write(0xcf9, 1, &[6]);
    m.pio.write(0xcf8, 2, &[0, 0]);
    m.pio.read(0xcf8, 4, &mut data[..4]);
    assert_eq!(data[..4], [0xfc, 0xff, 0xff, 0x80]);
    m.pio.read(0xcf9, 1, &mut data[..1]);
    assert_eq!(data[0], 0xff);
    for nowhere in [1 << 31 | 1 << 16, 1 << 11] {
        select(nowhere);
        m.pio.read(0xcfc, 4, &mut data[..4]);
        assert_eq!(data[..4], [0xff; 4], "{nowhere:#x}");
        m.pio.write(0xcfc, 4, &[0; 4]);
    }
    // Across registers: each part is its register's.
    m.mmio.read(Machine::ecam(address, 0), &mut data);
    assert_eq!(data, [0x34, 0x12, 7, 0, 0, 0, 0, 0]);
    m.mmio.read(Machine::ecam(address, 2), &mut data[..4]);
    assert_eq!(data[..4], [7, 0, 0, 0]);
    m.mmio.write(Machine::ecam(address, 0x39), &[0xee; 4]);
    assert_eq!(m.read(address, 0x3c), 0x1ee);
    // The end of the window, where the last function is not there.
    m.mmio.read(GuestAddress(ECAM + (1 << 20) - 8), &mut data);
    assert_eq!(data, [0xff; 8]);
}

#[test]
fn bars_are_placed_and_answer_when_they_are_decoded() {
    let m = machine();
    let (a, b) = (probe(1), probe(2));
    let (first, second) = (m.bridge.add(a.clone()).unwrap(), m.bridge.add(b).unwrap());
    assert_eq!([first, second].map(|function| m.bar(function, 0)), [LOW, LOW + 0x1000]);
    assert_eq!([first, second].map(|function| m.read(function, 0x14)), [0x1001, 0x1021]);
    assert_eq!(m.read(second, 0x1c), 0x40);
    assert_eq!((m.load(LOW), m.load_port(0x1000)), (None, None));
    m.write(first, 4, 2);
    assert_eq!((m.load(LOW), m.load(LOW + 0xfff), m.load(LOW + 0x1000)), (Some(0x10), Some(0x10), None));
    assert_eq!((m.load(HIGH), m.load_port(0x1000)), (Some(0x12), None));
    m.write(second, 4, 3);
    assert_eq!((m.load(LOW + 0x1000), m.load_port(0x103f)), (Some(0x20), Some(0x21)));
    m.mmio.write(GuestAddress(HIGH + 8), &[1, 2]);
    m.write(first, 4, 0);
    assert_eq!((m.load(LOW), m.load(HIGH)), (None, None));
    let a = lock(&a);
    assert_eq!(a.writes, [(2, 8, vec![1, 2])]);
    assert_eq!(a.moves, [(0, Some(LOW)), (2, Some(HIGH)), (0, None), (2, None)]);
    assert_eq!(m.bridge.refusals(), 0);
}

#[test]
fn the_guest_moves_a_bar() {
    let m = machine();
    let function = m.bridge.add(probe(1)).unwrap();
    m.write(function, 4, 3);
    m.write(function, 0x10, 0xe900_0000);
    assert_eq!((m.load(LOW), m.load(0xe900_0000)), (None, Some(0x10)));
    m.write(function, 0x14, 0x2000);
    assert_eq!((m.load_port(0x1000), m.load_port(0x201f)), (None, Some(0x11)));
    // Half by half; the first half alone leads into the other window.
    m.write(function, 0x18, 0xea00_0000);
    assert_eq!(m.load(HIGH), None);
    m.write(function, 0x1c, 0);
    assert_eq!(m.load(0xea00_0000), Some(0x12));
    m.bridge.reset();
    assert_eq!((m.load(0xea00_0000), m.bar(function, 0), m.read(function, 4)), (None, LOW, 0));
    m.write(function, 4, 2);
    assert_eq!(m.load(LOW), Some(0x10));
}

#[test]
fn a_bar_in_the_way_or_outside_answers_nowhere() {
    let m = machine();
    let (first, second) = (m.bridge.add(probe(1)).unwrap(), m.bridge.add(probe(2)).unwrap());
    m.write(first, 4, 3);
    m.write(second, 4, 3);
    m.write(second, 0x10, u32::try_from(LOW).unwrap());
    assert_eq!((m.load(LOW), m.load(LOW + 0x1000)), (Some(0x10), None));
    assert_eq!(m.bridge.refusals(), 1);
    let BarStatus::Refused(BarRefusal::Taken(error)) = m.status(second, 0) else { panic!("not refused") };
    assert!(
        error.to_string().contains("PCI 00:02.0 BAR 0") && error.to_string().contains("PCI 00:01.0 BAR 0")
    );
    assert_eq!(m.status(second, 1), BarStatus::Mapped);

    // Who waits gets the place when it is free: moved away, or switched off.
    m.write(first, 0x10, 0xe900_0000);
    assert_eq!((m.load(LOW), m.load(0xe900_0000)), (Some(0x20), Some(0x10)));
    assert_eq!((m.status(second, 0), m.bridge.refusals()), (BarStatus::Mapped, 1));
    m.write(first, 0x10, u32::try_from(LOW).unwrap());
    m.write(second, 4, 0);
    assert_eq!((m.load(LOW), m.status(second, 0)), (Some(0x10), BarStatus::Off));

    // Outside of the windows: RAM, the ECAM window, the other window, ports below, nowhere at all.
    m.write(second, 4, 3);
    let refusals = m.bridge.refusals();
    for (bar, base) in
        [(0x10, 0x1000), (0x10, 0xe000_0000), (0x10, u32::MAX), (0x10, 0), (0x14, 0xcf8), (0x14, u32::MAX)]
    {
        m.write(second, bar, base);
        let index = usize::from(bar == 0x14);
        assert_eq!(m.status(second, index), BarStatus::Refused(BarRefusal::OutsideWindows), "{base:#x}");
    }
    assert_eq!(m.bridge.refusals() - refusals, 6);
    assert_eq!((m.load(0x1000), m.read(second, 0)), (None, 0x2_1234));
    m.write(second, 0x10, 0xe800_8000);
    assert_eq!(m.load(0xe800_8000), Some(0x20));
}

#[test]
fn other_devices_keep_their_addresses() {
    struct Rom;
    impl BusDevice for Rom {
        fn read(&self, _: u64, data: &mut [u8]) {
            data.fill(0x99);
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }
    let m = machine();
    m.mmio.insert("rom", BusRange::new(LOW + 0x1800, 0x10), Arc::new(Rom)).unwrap();
    let (first, second) = (m.bridge.add(probe(1)).unwrap(), m.bridge.add(probe(2)).unwrap());
    m.write(first, 4, 2);
    m.write(second, 4, 2);
    assert_eq!((m.load(LOW + 0x1000), m.load(LOW + 0x1800)), (None, Some(0x99)));
    m.write(second, 0x10, 0xe900_0000);
    m.write(first, 0x10, u32::try_from(LOW).unwrap() + 0x1000);
    assert_eq!((m.load(LOW + 0x1000), m.load(LOW + 0x1800)), (None, Some(0x99)));
    // What the monitor took from the bridge is not the bridge's to complain about.
    m.mmio.remove(GuestAddress(0xe900_0000)).unwrap();
    m.write(second, 4, 0);
    assert_eq!(m.load(0xe900_0000), None);
}

#[test]
fn functions_come_and_go() {
    let m = machine();
    let (a, b) = (probe(1), probe(2));
    let first = m.bridge.add(a.clone()).unwrap();
    m.write(first, 4, 3);
    m.write(first, 0x10, 0xe900_0000);
    // Neither where another one is nor where it returns to.
    let second = m.bridge.add(b.clone()).unwrap();
    assert_eq!(m.bar(second, 0), LOW + 0x1000);
    m.write(second, 4, 2);
    m.write(second, 0x10, 0xe900_0000);
    assert_eq!(m.load(0xe900_0000), Some(0x10));
    let gone = m.bridge.remove(first).unwrap();
    assert_eq!(m.load(0xe900_0000), Some(0x20), "who waited for the place has it");
    assert_eq!((m.load_port(0x1000), m.load(HIGH), m.read(first, 0)), (None, None, u32::MAX));
    assert_eq!(lock(&a).resets, 1);
    assert!(Arc::ptr_eq(&(a as SharedFunction), &gone));
    assert_eq!(m.bridge.add(gone), Ok(first));
    assert_eq!((m.bar(first, 0), m.read(first, 4)), (LOW, 0));
    for nobody in [at(0, 0), at(9, 0)] {
        assert!(matches!(m.bridge.remove(nobody), Err(PciError::NoFunction { .. })));
    }
    assert!(m.bridge.function(first).is_some() && m.bridge.function(at(9, 0)).is_none());
}

/// A vCPU that found a function just before it was removed: its write comes too late to put BARs on the bus.
#[test]
fn a_write_that_comes_too_late_maps_nothing() {
    let m = machine();
    let a = probe(1);
    let function = m.bridge.add(a.clone()).unwrap();
    let slot = m.bridge.0.slot(function).unwrap();
    m.bridge.remove(function).unwrap();
    let second = m.bridge.add(probe(2)).unwrap();
    assert_eq!(second, function);
    m.bridge.0.change(function, &slot, |probe| probe.write_config(4, &[3]));
    assert_eq!((m.load(LOW), m.load_port(0x1000)), (None, None));
    assert_eq!(lock(&a).config.register(4), 0);
}

#[test]
fn what_cannot_be_added_leaves_the_bus_as_it_was() {
    let m = machine();
    assert_eq!(m.bridge.add_at(at(0, 0), probe(1)), Err(PciError::Occupied { address: at(0, 0) }));
    let lone = m.bridge.add_at(at(3, 1), probe(1));
    assert_eq!(lone, Err(PciError::WithoutFunctionZero { address: at(3, 1) }));
    let large = probe_with(1, &[(0, Bar::memory32(0x1000)), (1, Bar::memory32(1 << 31))], None);
    let error = m.bridge.add(large).unwrap_err();
    assert_eq!(
        error.to_string(),
        "00:01.0 BAR 1: no 0x80000000 free bytes, aligned, in the windows for 32-bit memory"
    );
    assert_eq!((m.bridge.functions().len(), m.bridge.mappings().len()), (1, 0));
    let small = probe(1);
    let first = m.bridge.add(small).unwrap();
    assert_eq!(m.bar(first, 0), LOW, "nothing is left of the one that was refused");
    for number in 2..32 {
        m.bridge.add(probe(number)).unwrap();
    }
    assert_eq!(m.bridge.add(probe(0)), Err(PciError::Full));
}

#[test]
fn a_bridge_that_cannot_be_leaves_the_buses_as_they_were() {
    let m = machine();
    let second = HostBridge::new(layout(), &m.mmio, &m.pio).unwrap_err();
    assert!(matches!(second, PciError::Bus(_)), "{second}");
    let pio = Arc::new(PioBus::new());
    let second = HostBridge::new(layout(), &m.mmio, &pio).unwrap_err();
    assert!(second.to_string().contains("PCI ECAM at 0xe0000000..=0xe00fffff overlaps PCI ECAM"), "{second}");
    assert_eq!(format!("{pio:?}"), "PioBus({})");
    let window = layout().memory32(BusRange::new(0, 0));
    assert!(matches!(HostBridge::new(window, &m.mmio, &pio), Err(PciError::Window { .. })));
}

#[test]
fn pins_are_shared_and_rotated() {
    let m = machine();
    let pins: Vec<Intx> = [(1, InterruptPin::A), (5, InterruptPin::A), (3, InterruptPin::D)]
        .into_iter()
        .map(|(device, pin)| {
            let function = probe_with(device, &[], Some(pin));
            let intx = lock(&function).config.intx().unwrap().clone();
            m.bridge.add_at(at(device, 0), function).unwrap();
            intx
        })
        .collect();
    pins[0].set_level(true);
    pins[1].set_level(true);
    pins[0].set_level(false);
    assert_eq!(m.lines[1].take(), [true], "devices 1 and 5 share a line");
    pins[2].set_level(true);
    assert_eq!(m.lines[2].take(), [true]);
    m.write(at(5, 0), 4, 1 << 10);
    assert_eq!(m.lines[1].take(), [false]);
    assert_eq!(m.read(at(5, 0), 4), 1 << 19 | 1 << 10);
    m.write(at(5, 0), 4, 0);
    m.bridge.remove(at(5, 0)).unwrap();
    assert_eq!(m.lines[1].take(), [true, false], "unplugged");
    assert!(m.lines[0].take().is_empty() && m.lines[3].take().is_empty());
}

#[test]
fn a_snapshot_is_taken_up_by_another_machine() {
    let m = machine();
    let function = m.bridge.add(probe(1)).unwrap();
    m.write(function, 4, 3);
    m.write(function, 0x10, 0xe900_0000);
    m.write(at(0, 0), 4, 4);
    m.pio.write(0xcf8, 4, &0x8000_0810_u32.to_le_bytes());
    let shared = m.bridge.function(function).unwrap();
    let (bridge, config) = (m.bridge.state(), lock(&shared).config().state());

    let other = machine();
    let (probe, taken) = (probe(1), probe(2));
    other.bridge.add(probe.clone()).unwrap();
    lock(&probe).config.restore(&config).unwrap();
    other.bridge.restore(&bridge).unwrap();
    assert_eq!(
        (other.load(0xe900_0000), other.load(LOW), other.load_port(0x1000)),
        (Some(0x10), None, Some(0x11))
    );
    assert_eq!(other.bridge.state(), bridge);
    let mut data = [0; 4];
    other.pio.read(0xcfc, 4, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0xe900_0000);

    let bad = HostBridgeState { config_address: 1, ..bridge.clone() };
    assert_eq!(other.bridge.restore(&bad).unwrap_err().field, "config_address");
    let mut bad = HostBridgeState { config_address: 0, ..bridge.clone() };
    bad.config.ids = 0;
    assert_eq!(other.bridge.restore(&bad).unwrap_err().field, "ids");
    assert_eq!(other.bridge.state(), bridge);

    // A function that changes by itself says so.
    let second = other.bridge.add(taken.clone()).unwrap();
    lock(&taken).config.write(4, &[2]);
    assert_eq!(other.load(LOW + 0x1000), None);
    other.bridge.refresh(second).unwrap();
    assert_eq!(other.load(LOW + 0x1000), Some(0x20));
    assert!(other.bridge.refresh(at(9, 0)).is_err());
}

/// One vCPU accesses the BAR, one moves it, one switches it, one looks at another function: all come to an end, and whoever
/// answers is the function that is there.
#[test]
fn bars_move_while_other_vcpus_access_them() {
    let m = machine();
    let (first, second) = (m.bridge.add(probe(1)).unwrap(), m.bridge.add(probe(2)).unwrap());
    m.write(first, 4, 2);
    m.write(second, 4, 2);
    let stop = AtomicBool::new(false);
    let places = [0xe900_0000_u32, 0xe900_1000, 0xe900_0800, 0xe801_0000];
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    for place in places {
                        let seen = m.load(place.into());
                        assert!(matches!(seen, None | Some(0x10 | 0x20)), "{seen:?}");
                        m.mmio.write(GuestAddress(place.into()), &[1]);
                    }
                }
            });
        }
        let movers = [(first, 0), (second, 1), (first, 2)].map(|(function, step)| {
            let m = &m;
            scope.spawn(move || {
                for round in 0..1000 {
                    m.write(function, 0x10, places[(round + step) % 4]);
                    if round % 16 == step {
                        m.write(function, 4, 0);
                        m.write(function, 4, 2);
                    }
                    m.bridge.mappings();
                }
            })
        });
        let comer = scope.spawn(|| {
            for _ in 0..200 {
                let third = m.bridge.add(probe(3)).unwrap();
                m.write(third, 4, 3);
                m.bridge.remove(third).unwrap();
            }
        });
        for thread in movers.into_iter().chain([comer]) {
            thread.join().unwrap();
        }
        stop.store(true, Ordering::SeqCst);
    });
    m.write(first, 0x10, 0xe900_0000);
    m.write(second, 0x10, 0xe801_0000);
    assert_eq!((m.load(0xe900_0000), m.load(0xe801_0000)), (Some(0x10), Some(0x20)));
    assert_eq!(m.bridge.mappings().len(), 6);
}

/// A guest that has an access of a function hang (a slow device) can still move its BARs' neighbours, and configure others.
#[test]
fn a_slow_access_stops_nobody_else() {
    let m = machine();
    let (a, b) = (probe(1), probe(2));
    let (first, second) = (m.bridge.add(a.clone()).unwrap(), m.bridge.add(b).unwrap());
    m.write(first, 4, 2);
    let held = lock(&a);
    m.write(second, 4, 2);
    m.write(second, 0x10, 0xe900_0000);
    assert_eq!((m.load(0xe900_0000), m.load(HIGH + 0x4000)), (Some(0x20), Some(0x22)));
    m.bridge.add(probe(3)).unwrap();
    drop(held);
    assert_eq!(m.load(LOW), Some(0x10));
}

#[test]
fn a_bridge_ends_with_its_buses() {
    let m = machine();
    let (a, b) = (probe(1), Arc::downgrade(&m.mmio));
    let function = m.bridge.add(a.clone()).unwrap();
    m.write(function, 4, 3);
    let Machine { mmio, pio, bridge, .. } = m;
    drop(mmio);
    assert!(b.upgrade().is_none(), "the bridge does not keep its bus");
    pio.write(0xcf8, 4, &0x8000_0810_u32.to_le_bytes());
    pio.write(0xcfc, 4, &0xe900_0000_u32.to_le_bytes());
    assert_eq!(bridge.mappings()[0].status, BarStatus::Refused(BarRefusal::NoBus));
    drop((pio, bridge));
    assert_eq!(Arc::strong_count(&a), 1, "nothing keeps the function");
}

use super::*;

/// Remembers writes; reads give the low byte of each offset.
#[derive(Default)]
struct Probe {
    writes: Vec<(u64, Vec<u8>)>,
    reads: Vec<(u64, usize)>,
}

impl BusDeviceMut for Probe {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        assert!(data.iter().all(|&byte| byte == 0xff));
        self.reads.push((offset, data.len()));
        read_bytes(offset, data, |offset| (offset & 0xff) as u8);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.writes.push((offset, data.to_vec()));
    }
}

fn probe() -> Arc<Mutex<Probe>> {
    Arc::default()
}

#[test]
fn an_access_reaches_its_device_with_its_offset() {
    let (bus, device) = (MmioBus::new(), probe());
    bus.insert("probe", BusRange::new(0x1000, 0x100).at_offset(0x20), device.clone()).unwrap();
    let mut data = [0; 8];
    assert!(bus.read(GuestAddress(0x10f8), &mut data));
    assert_eq!(data, [0x18, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f]);
    assert!(bus.write(GuestAddress(0x1004), &[1, 2]));
    let device = lock(&device);
    assert_eq!(device.reads, [(0x118, 8)]);
    assert_eq!(device.writes, [(0x24, vec![1, 2])]);
}

#[test]
fn overlaps_name_both_ranges() {
    let bus = PioBus::new();
    bus.insert("uart", BusRange::new(0x3f8, 8), probe()).unwrap();
    for (base, size) in [(0x3f8, 8), (0x3ff, 1), (0x3f0, 9), (0x300, 0x200), (0x3fa, 1)] {
        let error = bus.insert("late", BusRange::new(base, size), probe()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("late at") && text.contains("uart at 0x3f8..=0x3ff"), "{text}");
    }
    bus.insert("below", BusRange::new(0x3f0, 8), probe()).unwrap();
    bus.insert("above", BusRange::new(0x400, 1), probe()).unwrap();
    let insert = |base, size| bus.insert("x", BusRange::new(base, size), probe());
    assert!(matches!(insert(0, 0), Err(BusError::Empty { base: 0, .. })));
    assert!(matches!(insert(0xffff, 2), Err(BusError::Beyond { last: 0xffff, .. })));
    let far = BusRange::new(0, 2).at_offset(u64::MAX);
    assert!(matches!(bus.insert("x", far, probe()), Err(BusError::Beyond { offset: u64::MAX, .. })));
    assert!(matches!(insert(u64::MAX, 2), Err(BusError::Beyond { .. })));
    insert(0xffff, 1).unwrap();
}

#[test]
fn removed_ranges_are_free_again() {
    let (bus, device) = (PioBus::new(), probe());
    bus.insert("probe", BusRange::new(0x80, 4), device.clone()).unwrap();
    assert_eq!(bus.remove(0x81).err(), Some(BusError::NoRange { base: 0x81 }));
    assert!(bus.remove(0x80).is_ok());
    assert!(!bus.write(0x80, 1, &[1]));
    assert_eq!(Arc::strong_count(&device), 1);
    bus.insert("probe", BusRange::new(0x82, 4), device).unwrap();
}

#[test]
fn unclaimed_reads_all_ones() {
    let (pio, mmio) = (PioBus::new(), MmioBus::new());
    let mut data = [0; 4];
    assert!(!pio.read(0x1234, 4, &mut data));
    assert_eq!(data, [0xff; 4]);
    let mut data = [0; 8];
    assert!(!mmio.read(GuestAddress(u64::MAX), &mut data));
    assert_eq!(data, [0xff; 8]);
    assert!(!mmio.write(GuestAddress(5), &[1]));
}

#[test]
fn an_access_across_an_end_goes_byte_by_byte() {
    let (bus, low, high) = (MmioBus::new(), probe(), probe());
    bus.insert("low", BusRange::new(0x1000, 2), low.clone()).unwrap();
    bus.insert("high", BusRange::new(0x1003, 2), high.clone()).unwrap();
    let mut data = [0; 8];
    assert!(!bus.read(GuestAddress(0xfff), &mut data));
    assert_eq!(data, [0xff, 0, 1, 0xff, 0, 1, 0xff, 0xff]);
    assert!(!bus.write(GuestAddress(0x1001), &[7, 8, 9]));
    assert_eq!(lock(&low).writes, [(1, vec![7])]);
    assert_eq!(lock(&high).writes, [(0, vec![9])]);
}

#[test]
fn the_last_port_and_the_last_address_do_not_wrap() {
    let (pio, mmio, first, last) = (PioBus::new(), MmioBus::new(), probe(), probe());
    pio.insert("first", BusRange::new(0, 1), first.clone()).unwrap();
    pio.insert("last", BusRange::new(0xffff, 1), last.clone()).unwrap();
    assert!(!pio.write(0xffff, 4, &[1, 2, 3, 4]));
    assert_eq!(lock(&last).writes, [(0, vec![1])]);
    mmio.insert("first", BusRange::new(0, 1), first.clone()).unwrap();
    mmio.insert("last", BusRange::new(u64::MAX, 1), last.clone()).unwrap();
    assert!(!mmio.write(GuestAddress(u64::MAX), &[5, 6]));
    assert_eq!(lock(&last).writes.last(), Some(&(0, vec![5])));
    assert!(lock(&first).writes.is_empty());
}

#[test]
fn strings_go_element_by_element() {
    let (bus, device) = (PioBus::new(), probe());
    bus.insert("probe", BusRange::new(0x10, 2), device.clone()).unwrap();
    assert!(bus.write(0x10, 2, &[1, 2, 3, 4, 5, 6]));
    let mut data = [0; 3];
    assert!(bus.read(0x11, 1, &mut data));
    assert_eq!(data, [1; 3]);
    let device = lock(&device);
    assert_eq!(device.writes, [(0, vec![1, 2]), (0, vec![3, 4]), (0, vec![5, 6])]);
    assert_eq!(device.reads, [(1, 1); 3]);
}

#[test]
fn what_is_no_access_reaches_nobody() {
    let (pio, mmio, device) = (PioBus::new(), MmioBus::new(), probe());
    pio.insert("probe", BusRange::new(0, 16), device.clone()).unwrap();
    mmio.insert("probe", BusRange::new(0, 64), device.clone()).unwrap();
    for (size, length) in [(0, 0), (0, 4), (3, 3), (8, 8), (2, 3), (usize::MAX, 1)] {
        let mut data = vec![0; length];
        assert!(!pio.read(0, size, &mut data));
        assert_eq!(data, vec![0xff; length]);
        assert!(!pio.write(0, size, &data));
    }
    for length in [0, 9, 64] {
        assert!(!mmio.read(GuestAddress(0), &mut vec![0; length]));
        assert!(!mmio.write(GuestAddress(0), &vec![0; length]));
    }
    let device = lock(&device);
    assert!(device.reads.is_empty() && device.writes.is_empty());
}

#[test]
fn a_device_may_change_the_bus_that_calls_it() {
    struct Mover(Arc<MmioBus>);
    impl BusDevice for Mover {
        fn read(&self, _: u64, _: &mut [u8]) {}
        fn write(&self, _: u64, data: &[u8]) {
            let device = self.0.remove(GuestAddress(0)).unwrap();
            self.0.insert("moved", BusRange::new(u64::from(data[0]), 1), device).unwrap();
        }
    }
    let bus = Arc::new(MmioBus::new());
    bus.insert("mover", BusRange::new(0, 1), Arc::new(Mover(bus.clone()))).unwrap();
    assert!(bus.write(GuestAddress(0), &[9]));
    assert!(bus.read(GuestAddress(9), &mut [0]));
    let device = bus.remove(GuestAddress(9)).unwrap();
    drop(device);
}

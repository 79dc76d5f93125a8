use super::*;
use crate::interrupt::testing::Recorder;
use crate::pci::bar::Bar;
use crate::pci::config::Identity;

const PLACE: MsixPlace = MsixPlace { bar: 1, table: 0x100, pending: 0x800 };

struct Fixture {
    config: ConfigSpace,
    msix: Msix,
    sent: Recorder<(u64, u32)>,
}

fn config() -> ConfigBuilder {
    let mut config = ConfigBuilder::new(Identity::new(0x1af4, 0x1041, [2, 0, 0]));
    config.bar(0, Bar::io(0x20)).unwrap();
    config.bar(1, Bar::memory32(0x1000)).unwrap();
    config
}

impl Fixture {
    fn new(vectors: u16) -> Self {
        let (mut config, sent) = (config(), Recorder::default());
        let msix = Msix::new(&mut config, vectors, PLACE, sent.clone()).unwrap();
        Self { config: config.build(), msix, sent }
    }

    /// Message control's upper byte, with bus mastering on.
    fn control(&mut self, control: u8) {
        self.config.write(4, &[4]);
        self.config.write(0x43, &[control]);
        self.msix.config_written(&self.config);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        assert!(self.msix.write(1, offset, data));
    }

    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        assert!(self.msix.read(1, offset, &mut data));
        data
    }

    /// Vector `n` is message 0xfee0_n000, n.
    fn set_up(&self, vector: u8, masked: bool) {
        let at = 0x100 + 16 * u64::from(vector);
        self.write(at, &(0xfee0_0000 | u64::from(vector) << 12).to_le_bytes());
        self.write(at + 8, &u32::from(vector).to_le_bytes());
        self.write(at + 12, &[masked.into(), 0, 0, 0]);
    }
}

#[test]
fn the_capability_says_where_things_are() {
    let f = Fixture::new(33);
    assert_eq!(f.config.register(0x34), 0x40);
    assert_eq!([0x40, 0x44, 0x48].map(|at| f.config.register(at)), [32 << 16 | 0x11, 0x101, 0x801]);
    assert_eq!(f.msix.vectors(), 33);
}

#[test]
fn messages_are_those_of_the_table() {
    let mut f = Fixture::new(3);
    assert!(!f.msix.notify(0), "off");
    f.set_up(0, false);
    f.set_up(2, false);
    f.control(ENABLE);
    assert!(f.msix.is_enabled() && f.sent.take().is_empty(), "what was signalled before is not kept");
    for vector in [2, 0, 1, 3, 0xffff] {
        assert!(f.msix.notify(vector));
    }
    assert_eq!(f.sent.take(), [(0xfee0_2000, 2), (0xfee0_0000, 0)], "1 is masked, the others are none");
    f.control(0);
    assert!(!f.msix.notify(0) && f.sent.take().is_empty());
}

#[test]
fn what_is_masked_is_pending_and_sent_once() {
    let mut f = Fixture::new(70);
    f.control(ENABLE);
    f.set_up(65, true);
    for _ in 0..3 {
        f.msix.notify(65);
    }
    assert_eq!(f.read(0x800), [0; 8]);
    assert_eq!(f.read(0x808), [2, 0, 0, 0, 0, 0, 0, 0]);
    assert!(f.sent.take().is_empty());
    f.set_up(65, false);
    assert_eq!(f.sent.take(), [(0xfee4_1000, 65)]);
    assert_eq!(f.read(0x808), [0]);

    // The function mask, and the bus master bit, hold back all.
    f.control(ENABLE | FUNCTION_MASK);
    f.msix.notify(65);
    assert_eq!((f.sent.take(), f.read(0x808)), (vec![], [2]));
    f.control(ENABLE);
    assert_eq!((f.sent.take(), f.read(0x808)), (vec![(0xfee4_1000, 65)], [0]));
    f.config.write(4, &[0]);
    f.msix.config_written(&f.config);
    f.msix.notify(65);
    assert!(f.sent.take().is_empty());
    f.config.write(4, &[4]);
    f.msix.config_written(&f.config);
    assert_eq!(f.sent.take(), [(0xfee4_1000, 65)]);
}

#[test]
fn what_is_forgotten_is_not_sent() {
    let mut f = Fixture::new(70);
    f.control(ENABLE);
    f.set_up(65, true);
    f.msix.notify(65);
    f.msix.forget_pending();
    assert_eq!(f.read(0x808), [0; 8]);
    f.set_up(65, false);
    assert!(f.sent.take().is_empty());
    f.msix.notify(65);
    assert_eq!(f.sent.take(), [(0xfee4_1000, 65)], "the vector is as it was");
}

#[test]
fn pending_bits_and_reserved_ones_are_read_only() {
    let f = Fixture::new(64);
    f.write(0x800, &[0xff; 8]);
    assert_eq!(f.read(0x800), [0; 8]);
    f.write(0x100, &[0xff; 16]);
    assert_eq!(f.read(0x100), [0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(f.read(0x108), [0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
}

/// crosvm 002cd87a0: reads beyond table and pending bits. Every offset of the BAR and around it, with each access size.
#[test]
fn crosvm_002cd87a0_the_whole_bar_is_swept() {
    for vectors in [1, 2, 33, 64, 65] {
        let f = Fixture::new(vectors);
        let table = 0x100..0x100 + 16 * u64::from(vectors);
        let pending = 0x800..0x800 + 8 * u64::from(vectors.div_ceil(64));
        for offset in (0..0x1010).chain(u64::MAX - 16..=u64::MAX) {
            for size in [1, 2, 3, 4, 8, 16, 64] {
                let mut data = vec![0xff; size];
                let claimed = table.contains(&offset) || pending.contains(&offset);
                assert_eq!(f.msix.read(1, offset, &mut data), claimed);
                for (at, byte) in (0..).map(|i| offset.wrapping_add(i)).zip(&data) {
                    let known = table.contains(&at) || pending.contains(&at);
                    assert!(!(claimed && known) || *byte <= 1, "{at:#x} of {vectors}: {byte:#x}");
                    assert!(claimed && known || *byte == 0xff, "{at:#x} of {vectors}: left alone");
                }
                assert_eq!(f.msix.write(1, offset, &data), claimed);
                assert!(!f.msix.read(0, offset, &mut data) && !f.msix.write(2, offset, &data));
                if claimed {
                    f.msix.reset();
                }
            }
        }
    }
}

#[test]
fn narrow_writes_merge() {
    let f = Fixture::new(2);
    f.write(0x11e, &[0x34]);
    f.write(0x11b, &[0x12, 0]);
    f.write(0x110, &[0x57, 0xe0]);
    assert_eq!(f.read(0x110), [0x54, 0xe0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x12, 0, 0, 0, 0]);
    // Over the border of two entries.
    f.write(0x10e, &[1, 2, 3, 4]);
    assert_eq!(
        f.read(0x10c),
        [1, 0, 0, 0, 0, 4, 0, 0],
        "reserved bits of control, then bits 1:0 of the address"
    );
}

#[test]
fn places_are_checked() {
    let at = |table, pending| MsixPlace { bar: 1, table, pending };
    let refused = |vectors, place| {
        let error = Msix::new(&mut config(), vectors, place, |_, _| ()).unwrap_err();
        assert_eq!(error, PciError::MsixPlace { place, vectors });
    };
    refused(1, at(4, 0x800));
    refused(1, at(0, 0x804));
    refused(1, at(0, 8));
    refused(65, at(8, 0));
    refused(64, at(7, 0x800));
    refused(1, at(0xff8, 0));
    refused(65, at(0, 0xff8));
    refused(1, at(u64::MAX - 7, 0));
    refused(1, MsixPlace { bar: 0, ..PLACE });
    refused(1, MsixPlace { bar: 7, ..PLACE });
    for vectors in [0, 2049] {
        let error = Msix::new(&mut config(), vectors, PLACE, |_, _| ()).unwrap_err();
        assert_eq!(error, PciError::MsixVectors { vectors, max: 2048 });
    }
    Msix::new(&mut config(), 64, at(8, 0x408), |_, _| ()).unwrap();
    Msix::new(&mut config(), 65, at(0, 0xff0), |_, _| ()).unwrap();
}

#[test]
fn a_state_holds_what_is_pending() {
    let mut f = Fixture::new(3);
    f.control(ENABLE);
    f.set_up(1, false);
    f.set_up(2, true);
    f.msix.notify(2);
    let (state, config) = (f.msix.state(), f.config.state());

    let mut other = Fixture::new(3);
    other.config.restore(&config).unwrap();
    other.msix.restore(&state, &other.config).unwrap();
    assert_eq!((other.msix.state(), other.sent.take()), (state.clone(), vec![]));
    other.set_up(2, false);
    other.msix.notify(1);
    assert_eq!(other.sent.take(), [(0xfee0_2000, 2), (0xfee0_1000, 1)]);

    let before = other.msix.state();
    let mut bad = state.clone();
    bad.entries[2].address = 0xfee0_0002;
    assert_eq!(other.msix.restore(&bad, &f.config).unwrap_err().field, "address");
    bad.entries.pop();
    assert_eq!(other.msix.restore(&bad, &f.config).unwrap_err().field, "number of vectors");
    assert_eq!(other.msix.state(), before);
    f.msix.reset();
    assert_eq!(f.msix.state(), Fixture::new(3).msix.state());
    assert!(!f.msix.is_enabled());
}

/// Once a mask is written, no message of the vector is still on its way; and none that was signalled is lost.
#[test]
fn a_mask_holds_while_other_threads_signal() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU32};

    let (mut space, masked) = (config(), Arc::new(AtomicBool::new(true)));
    let (seen, count) = (Arc::clone(&masked), Arc::new(AtomicU32::new(0)));
    let counted = Arc::clone(&count);
    let sink = move |_: u64, _: u32| {
        assert!(!seen.load(Ordering::SeqCst), "a message after the mask was written");
        counted.fetch_add(1, Ordering::SeqCst);
    };
    let msix = Msix::new(&mut space, 1, PLACE, sink).unwrap();
    let mut space = space.build();
    space.write(4, &[4]);
    space.write(0x43, &[ENABLE]);
    msix.config_written(&space);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    msix.notify(0);
                }
            });
        }
        for round in 0..500 {
            masked.store(false, Ordering::SeqCst);
            let before = count.load(Ordering::SeqCst);
            if round % 2 == 0 {
                msix.write(1, 0x10c, &[0]);
            } else {
                space.write(0x43, &[ENABLE]);
                msix.config_written(&space);
            }
            while count.load(Ordering::SeqCst) == before {
                std::thread::yield_now();
            }
            if round % 2 == 0 {
                space.write(0x43, &[ENABLE | FUNCTION_MASK]);
                msix.config_written(&space);
            } else {
                msix.write(1, 0x10c, &[1]);
            }
            masked.store(true, Ordering::SeqCst);
        }
        stop.store(true, Ordering::SeqCst);
    });
    let before = count.load(Ordering::SeqCst);
    masked.store(false, Ordering::SeqCst);
    msix.notify(0);
    assert_eq!(count.load(Ordering::SeqCst), before);
    msix.write(1, 0x10c, &[0]);
    assert_eq!(count.load(Ordering::SeqCst), before + 1, "what is pending is sent");
}

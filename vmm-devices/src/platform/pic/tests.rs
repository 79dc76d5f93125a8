use super::*;
use crate::interrupt::testing::Recorder;

struct Bench {
    pic: Arc<Pic>,
    intr: Recorder<bool>,
}

impl Bench {
    /// As Linux sets it up: vectors 0x30 and 0x38, nothing masked.
    fn new() -> Self {
        Self::with_modes(1)
    }

    fn with_modes(icw4: u8) -> Self {
        let intr = Recorder::default();
        let bench = Self { pic: Arc::new(Pic::new(intr.clone())), intr };
        for (offset, value) in
            [(0, 0x11), (1, 0x30), (1, 4), (1, icw4), (2, 0x11), (3, 0x38), (3, 2), (3, icw4)]
        {
            bench.write(offset, value);
        }
        bench
    }

    fn write(&self, offset: u64, value: u8) {
        self.pic.write(offset, &[value]);
    }

    fn read(&self, offset: u64) -> u8 {
        let mut data = [0];
        self.pic.read(offset, &mut data);
        data[0]
    }

    fn set(&self, irq: u32, asserted: bool) {
        self.pic.line(irq).unwrap().set_level(asserted);
    }

    fn pulse(&self, irq: u32) {
        self.set(irq, true);
        self.set(irq, false);
    }
}

#[test]
fn an_edge_is_requested_taken_and_ended() {
    let bench = Bench::new();
    bench.pulse(4);
    assert_eq!(bench.intr.take(), [true]);
    assert_eq!(bench.read(0), 0x10);
    assert_eq!(bench.pic.acknowledge(), 0x34);
    assert_eq!(bench.intr.take(), [false]);
    assert_eq!(bench.read(0), 0);
    bench.write(0, 0x0b);
    assert_eq!(bench.read(0), 0x10, "in service");
    bench.pulse(4);
    bench.pulse(5);
    assert!(bench.intr.take().is_empty(), "blocked by itself and by a lower one");
    bench.pulse(3);
    assert_eq!(bench.pic.acknowledge(), 0x33);
    bench.write(0, 0x20);
    bench.write(0, 0x20);
    assert_eq!(bench.pic.acknowledge(), 0x34);
    bench.write(0, 0x64);
    assert_eq!(bench.pic.acknowledge(), 0x35);
}

#[test]
fn a_level_asks_again_until_it_is_let_go() {
    let bench = Bench::new();
    bench.write(4, 0xff);
    bench.write(5, 0xff);
    assert_eq!((bench.read(4), bench.read(5)), (0xf8, 0xde));
    bench.set(11, true);
    assert_eq!(bench.pic.acknowledge(), 0x3b);
    bench.write(2, 0x20);
    bench.write(0, 0x20);
    assert!(bench.pic.is_pending());
    bench.set(11, false);
    assert!(!bench.pic.is_pending());
    assert_eq!(bench.pic.acknowledge(), 0x37, "spurious");
    assert_eq!(bench.pic.state().first.in_service, 0);
}

#[test]
fn the_second_controller_comes_through_the_first() {
    let bench = Bench::new();
    bench.pulse(8);
    assert_eq!(bench.pic.acknowledge(), 0x38);
    let state = bench.pic.state();
    assert_eq!((state.first.in_service, state.second.in_service), (4, 1));
    bench.pulse(9);
    bench.pulse(3);
    assert!(!bench.pic.is_pending(), "both are below what is in service");
    bench.write(2, 0x20);
    bench.write(0, 0x20);
    assert_eq!(bench.pic.acknowledge(), 0x39, "above input 3");
}

#[test]
fn a_masked_cascade_masks_the_second_controller() {
    let bench = Bench::new();
    bench.write(1, 4);
    bench.pulse(12);
    assert!(!bench.pic.is_pending());
    bench.write(1, 0);
    assert_eq!(bench.intr.take(), [true]);
}

#[test]
fn masks_hold_requests_back() {
    let bench = Bench::new();
    bench.write(1, 0xff);
    assert_eq!(bench.read(1), 0xff);
    bench.pulse(0);
    assert!(bench.intr.take().is_empty());
    bench.write(1, 0xfe);
    assert_eq!(bench.pic.acknowledge(), 0x30);
}

#[test]
fn automatic_ends_and_rotation() {
    let bench = Bench::with_modes(3);
    bench.pulse(0);
    bench.pulse(1);
    assert_eq!(bench.pic.acknowledge(), 0x30);
    assert_eq!(bench.pic.acknowledge(), 0x31);
    assert_eq!(bench.pic.state().first.in_service, 0);
    bench.write(0, 0x80);
    bench.pulse(3);
    assert_eq!(bench.pic.acknowledge(), 0x33);
    bench.pulse(3);
    bench.pulse(4);
    assert_eq!(bench.pic.acknowledge(), 0x34, "3 has become the lowest");
}

#[test]
fn priorities_rotate_on_command() {
    let bench = Bench::new();
    bench.write(0, 0xc4);
    bench.pulse(0);
    bench.pulse(5);
    assert_eq!(bench.pic.acknowledge(), 0x35);
    bench.write(0, 0xa0);
    bench.pulse(5);
    assert_eq!(bench.pic.acknowledge(), 0x30, "5 has become the lowest");
    bench.write(0, 0xe0);
    assert_eq!(bench.pic.state().first.top, 1);
}

#[test]
fn the_special_mask_lets_lower_ones_through() {
    let bench = Bench::new();
    bench.pulse(3);
    bench.pic.acknowledge();
    bench.pulse(6);
    assert!(!bench.pic.is_pending());
    bench.write(1, 1 << 3);
    bench.write(0, 0x68);
    assert_eq!(bench.pic.acknowledge(), 0x36);
    bench.write(0, 0x48);
    assert!(!bench.pic.state().first.special_mask);
}

#[test]
fn fully_nested_mode_admits_the_cascade_again() {
    let bench = Bench::with_modes(0x11);
    bench.pulse(12);
    assert_eq!(bench.pic.acknowledge(), 0x3c);
    bench.pulse(8);
    assert_eq!(bench.pic.acknowledge(), 0x38);
    // The third input of the second controller is an ordinary one, which blocks itself.
    bench.write(2, 0x20);
    bench.write(2, 0x20);
    bench.pulse(10);
    assert_eq!(bench.pic.acknowledge(), 0x3a);
    bench.pulse(10);
    assert!(!bench.pic.is_pending());
}

#[test]
fn a_poll_acknowledges() {
    let bench = Bench::new();
    bench.write(0, 0x0c);
    assert_eq!(bench.read(0), 0);
    bench.pulse(6);
    bench.write(0, 0x0c);
    assert_eq!(bench.read(1), 0x86);
    assert_eq!(bench.pic.state().first.in_service, 0x40);
    assert_eq!(bench.read(1), 0, "polled once");
}

#[test]
fn nothing_interrupts_an_initialization() {
    let bench = Bench::new();
    bench.pulse(5);
    bench.write(0, 0x11);
    assert_eq!(bench.intr.take(), [true, false]);
    bench.pulse(6);
    bench.write(1, 0x48);
    bench.write(1, 4);
    bench.write(1, 1);
    assert_eq!(bench.pic.acknowledge(), 0x4e, "the edge of 5 was forgotten");
    // Single, without ICW4: ready after ICW2.
    bench.write(0, 0x12);
    bench.write(1, 0x50);
    assert_eq!(bench.pic.state().first.phase, PicPhase::Ready);
}

#[test]
fn the_cascade_is_no_input() {
    let bench = Bench::new();
    for irq in [2, 16, u32::MAX] {
        assert_eq!(bench.pic.line(irq).unwrap_err().input, irq);
    }
}

#[test]
fn saved_states_are_checked() {
    let bench = Bench::new();
    bench.pulse(4);
    bench.pulse(9);
    let state = bench.pic.state();
    let other = Bench::new();
    other.pic.restore(&state).unwrap();
    assert_eq!(other.intr.take(), [true]);
    assert_eq!(other.pic.state(), state);
    assert_eq!(other.pic.acknowledge(), 0x39);

    let kept = other.pic.state();
    let first = |chip| PicState { first: chip, ..state.clone() };
    for bad in [
        first(PicChipState { top: 8, ..state.first.clone() }),
        first(PicChipState { vector_base: 0x31, ..state.first.clone() }),
        first(PicChipState { level_triggered: 1, ..state.first.clone() }),
        PicState { second: PicChipState { level_triggered: 1, ..state.second.clone() }, ..state.clone() },
    ] {
        assert!(other.pic.restore(&bad).is_err(), "{bad:?}");
        assert_eq!(other.pic.state(), kept);
    }
}

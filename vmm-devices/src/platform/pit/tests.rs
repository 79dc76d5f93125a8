use std::sync::Arc;

use super::channel::{Bytes, Run};
use super::*;
use crate::clock::{ManualClock, NANOSECONDS};
use crate::interrupt::testing::Recorder;

struct Bench {
    pit: Pit,
    clock: Arc<ManualClock>,
    line: Recorder<bool>,
}

impl Bench {
    fn new() -> Self {
        let (clock, line) = (Arc::new(ManualClock::new(12_345)), Recorder::default());
        Self { pit: Pit::new(Arc::clone(&clock), line.clone()), clock, line }
    }

    fn write(&mut self, offset: u64, value: u8) {
        self.pit.write(offset, &[value]);
    }

    fn read(&mut self, offset: u64) -> u8 {
        let mut data = [0];
        self.pit.read(offset, &mut data);
        data[0]
    }

    /// Control word and count, low byte first.
    fn start(&mut self, channel: u8, control: u8, count: u16) {
        self.write(3, channel << 6 | 0x30 | control);
        for byte in count.to_le_bytes() {
            self.write(channel.into(), byte);
        }
    }

    fn count(&mut self, channel: u8) -> u16 {
        self.write(3, channel << 6);
        u16::from_le_bytes([self.read(channel.into()), self.read(channel.into())])
    }

    /// Goes on to the moment `ticks` ticks from the present one.
    fn pass(&mut self, ticks: u64) {
        let to = ticks_at(self.clock.now_ns(), PIT_HERTZ) + ticks;
        self.clock.set(ns_of_tick(to, PIT_HERTZ));
    }

    fn output_2(&mut self) -> bool {
        self.read(4) & CONTROL_OUTPUT != 0
    }
}

#[test]
fn the_rate_generator_interrupts_once_a_period() {
    let mut bench = Bench::new();
    bench.start(0, 4, 1000);
    bench.pit.service();
    bench.line.take();
    for _ in 0..5 {
        let deadline = bench.pit.next_deadline().unwrap();
        bench.clock.set(deadline - 1);
        bench.pit.service();
        bench.line.take();
        bench.clock.set(deadline);
        bench.pit.service();
        assert_eq!(bench.line.take(), [true]);
    }
    // Late by many periods: one edge.
    bench.clock.advance(NANOSECONDS);
    bench.pit.service();
    assert_eq!(bench.line.take().iter().filter(|&&level| level).count(), 1);
}

#[test]
fn periods_do_not_drift() {
    let mut bench = Bench::new();
    bench.start(0, 4, 11932);
    let begin = bench.clock.now_ns();
    for _ in 0..1000 {
        let deadline = bench.pit.next_deadline().unwrap();
        bench.clock.set(deadline);
        bench.pit.service();
    }
    let expected = 1000 * 11932 * NANOSECONDS / PIT_HERTZ;
    assert!((bench.clock.now_ns() - begin).abs_diff(expected) < 2000);
}

#[test]
fn terminal_count_interrupts_once() {
    let mut bench = Bench::new();
    bench.start(0, 0, 100);
    // The output was high before any mode was set? It is low in mode 0 from the control word on.
    assert_eq!(bench.line.take(), Vec::<bool>::new());
    bench.pass(99);
    bench.pit.service();
    assert!(bench.line.take().is_empty());
    bench.pass(1);
    bench.pit.service();
    assert_eq!(bench.line.take(), [true]);
    assert_eq!(bench.pit.next_deadline(), None);
    assert_eq!(bench.count(0), 0);
    bench.pass(3);
    assert_eq!(bench.count(0), 0xfffd);
}

#[test]
fn half_a_count_stops_terminal_count() {
    let mut bench = Bench::new();
    bench.start(0, 0, 100);
    bench.write(0, 50);
    assert_eq!(bench.pit.next_deadline(), None);
    bench.pass(1000);
    bench.write(0, 0);
    bench.pass(50);
    bench.pit.service();
    assert_eq!(bench.line.take(), [true]);
}

#[test]
fn a_strobe_is_one_tick_long() {
    let mut bench = Bench::new();
    bench.write(4, 1);
    bench.start(2, 8, 10);
    for (ticks, level) in [(0, true), (9, true), (1, false), (1, true), (50, true)] {
        bench.pass(ticks);
        assert_eq!(bench.output_2(), level, "{ticks}");
    }
}

#[test]
fn a_square_wave_has_the_longer_half_high() {
    let mut bench = Bench::new();
    bench.write(4, 1);
    bench.start(2, 6, 5);
    let mut seen = Vec::new();
    for _ in 0..10 {
        seen.push(bench.output_2());
        bench.pass(1);
    }
    let period = [true, true, true, false, false];
    assert_eq!(seen, [period, period].concat());
}

#[test]
fn the_gate_pauses_and_triggers() {
    let mut bench = Bench::new();
    // Mode 0: the gate pauses.
    bench.start(2, 0, 100);
    bench.pass(500);
    assert!(!bench.output_2());
    assert_eq!(bench.count(2), 100);
    bench.write(4, 1);
    bench.pass(60);
    bench.write(4, 0);
    bench.pass(500);
    assert_eq!(bench.count(2), 40);
    bench.write(4, 1);
    bench.pass(40);
    assert!(bench.output_2());
    // Mode 1: its rise starts a pulse, and another one makes it longer.
    bench.write(4, 0);
    bench.start(2, 2, 10);
    bench.pass(50);
    assert!(bench.output_2());
    bench.write(4, 1);
    assert!(!bench.output_2());
    bench.pass(9);
    bench.write(4, 0);
    bench.write(4, 1);
    bench.pass(9);
    assert!(!bench.output_2());
    bench.pass(1);
    assert!(bench.output_2());
    // Mode 2: low holds the output high, a rise begins anew.
    bench.start(2, 4, 10);
    bench.pass(7);
    bench.write(4, 0);
    bench.pass(2);
    assert!(bench.output_2());
    bench.write(4, 1);
    assert_eq!(bench.count(2), 10);
}

#[test]
fn a_new_period_waits_for_the_end_of_the_old_one() {
    let mut bench = Bench::new();
    bench.start(0, 4, 1000);
    bench.pass(1);
    bench.write(0, 100);
    bench.write(0, 0);
    assert_eq!(bench.count(0), 999);
    bench.pass(998);
    assert_eq!(bench.count(0), 1);
    bench.pass(1);
    assert_eq!(bench.count(0), 100);
    bench.pass(100);
    assert_eq!(bench.count(0), 100);
    // Looked at late: the old period ended 100 ticks after the write, the new ones are of 30.
    bench.write(0, 30);
    bench.write(0, 0);
    bench.pass(100 + 30 * 5 + 7);
    assert_eq!(bench.count(0), 23);
}

#[test]
fn counts_are_latched_whole() {
    let mut bench = Bench::new();
    bench.start(0, 4, 0x1001);
    bench.write(3, 0);
    bench.pass(2);
    bench.write(3, 0);
    assert_eq!((bench.read(0), bench.read(0)), (1, 0x10), "the first latch counts");
    assert_eq!((bench.read(0), bench.read(0)), (0xff, 0x0f), "no latch: as it is");
}

#[test]
fn read_back_gives_status_then_count() {
    let mut bench = Bench::new();
    bench.write(3, 0x76);
    bench.write(3, 0xe4);
    assert_eq!(bench.read(1), 0xf6, "no count yet, output high");
    bench.start(1, 6, 8);
    bench.write(3, 0xc4);
    bench.write(3, 0xc4);
    assert_eq!(bench.read(1), 0xb6);
    assert_eq!((bench.read(1), bench.read(1)), (8, 0));
}

#[test]
fn decimal_counts() {
    let mut bench = Bench::new();
    bench.start(1, 1, 0x1000);
    assert_eq!(bench.count(1), 0x1000);
    bench.pass(1);
    assert_eq!(bench.count(1), 0x0999);
    bench.start(1, 1, 0);
    bench.pass(1);
    assert_eq!(bench.count(1), 0x9999);
    bench.start(1, 5, 0xffff);
    bench.pass(3);
    assert_eq!(bench.count(1), 0x9996);
}

#[test]
fn single_bytes_of_a_count() {
    let mut bench = Bench::new();
    bench.write(3, 0x54);
    bench.write(1, 0x12);
    assert_eq!((bench.read(1), bench.read(1)), (0x12, 0x12));
    bench.write(3, 0x64);
    bench.write(1, 0x12);
    assert_eq!((bench.read(1), bench.read(1)), (0x12, 0x12));
    assert_eq!(bench.pit.state().channels[1].count, 0x1200);
    assert_eq!(bench.pit.state().channels[1].bytes, Bytes::High);
}

#[test]
fn zero_counts_65536() {
    let mut bench = Bench::new();
    bench.start(0, 4, 0);
    let ticks = ticks_at(bench.pit.next_deadline().unwrap(), PIT_HERTZ) - ticks_at(12_345, PIT_HERTZ);
    assert_eq!(ticks, 0x1_0000);
}

#[test]
fn port_61_has_gate_output_and_refresh() {
    let mut bench = Bench::new();
    bench.write(4, 0xff);
    assert_eq!(bench.read(4) & 0x0f, 0x0f);
    let before = bench.read(4) & CONTROL_REFRESH;
    bench.pass(REFRESH_TICKS);
    assert_ne!(bench.read(4) & CONTROL_REFRESH, before);
}

#[test]
fn saved_states_go_on_and_are_checked() {
    let mut bench = Bench::new();
    bench.write(4, 1);
    bench.start(0, 4, 1000);
    bench.start(2, 0, 500);
    bench.pass(300);
    let state = bench.pit.state();
    let mut other = Bench::new();
    other.clock.set(7);
    other.pit.restore(&state).unwrap();
    assert_eq!((other.count(0), other.count(2)), (700, 200));
    let ticks = ticks_at(other.pit.next_deadline().unwrap(), PIT_HERTZ) - ticks_at(7, PIT_HERTZ);
    assert_eq!(ticks, 700);
    other.pass(200);
    assert!(other.output_2());

    let kept = other.pit.state();
    let with = |change: &dyn Fn(&mut PitState)| {
        let mut bad = state.clone();
        change(&mut bad);
        bad
    };
    for bad in [
        with(&|bad| bad.control = 0x10),
        with(&|bad| bad.channels[0].count = 0x1_0001),
        with(&|bad| bad.channels[1].next_count = Some(0)),
        with(&|bad| bad.channels[1].run = Run::Paused(5)),
        with(&|bad| bad.channels[0].run = Run::Since(u64::MAX)),
        with(&|bad| {
            bad.channels[0].bcd = true;
            bad.channels[0].count = 10_001;
        }),
        with(&|bad| bad.now = 1 << 62),
    ] {
        assert!(other.pit.restore(&bad).is_err(), "{bad:?}");
        assert_eq!(other.pit.state(), kept);
    }
}

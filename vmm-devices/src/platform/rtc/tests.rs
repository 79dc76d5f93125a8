use std::sync::Arc;

use super::*;
use crate::clock::ManualClock;
use crate::interrupt::testing::Recorder;

/// 2024-02-28 23:59:58 UTC, a Wednesday.
const START: u64 = 1_709_164_798 * NANOSECONDS;

struct Bench {
    rtc: Rtc,
    clock: Arc<ManualClock>,
    line: Recorder<bool>,
}

impl Bench {
    fn new() -> Self {
        let (clock, line) = (Arc::new(ManualClock::new(START)), Recorder::default());
        Self { rtc: Rtc::new(Arc::clone(&clock), line.clone()), clock, line }
    }

    fn get(&mut self, register: u8) -> u8 {
        self.rtc.write(0, &[register]);
        let mut data = [0];
        self.rtc.read(1, &mut data);
        data[0]
    }

    fn set(&mut self, register: u8, value: u8) {
        self.rtc.write(0, &[register]);
        self.rtc.write(1, &[value]);
    }

    /// Century, year, month, day, hour, minute, second.
    fn time(&mut self) -> [u8; 7] {
        [CENTURY_REGISTER, 9, 8, 7, 4, 2, 0].map(|register| self.get(register))
    }

    fn set_time(&mut self, time: [u8; 7]) {
        for (register, value) in [CENTURY_REGISTER, 9, 8, 7, 4, 2, 0].into_iter().zip(time) {
            self.set(register, value);
        }
    }
}

#[test]
fn it_shows_the_clocks_time() {
    let mut bench = Bench::new();
    assert_eq!(bench.time(), [0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x58]);
    assert_eq!((bench.get(6), bench.get(REGISTER_D)), (4, 0x80));
    bench.clock.advance(2 * NANOSECONDS);
    assert_eq!(bench.time(), [0x20, 0x24, 0x02, 0x29, 0, 0, 0]);
    bench.set(REGISTER_B, B_BINARY);
    assert_eq!(bench.time(), [20, 24, 2, 29, 12, 0, 0]);
    bench.clock.set(u64::MAX);
    bench.time();
}

#[test]
fn the_update_is_announced_before_it_happens() {
    let mut bench = Bench::new();
    let announced = |bench: &mut Bench| bench.get(REGISTER_A) & A_UPDATING != 0;
    assert!(!announced(&mut bench));
    bench.clock.advance(NANOSECONDS - 2_228_001);
    assert!(!announced(&mut bench));
    bench.clock.advance(1);
    assert!(announced(&mut bench));
    assert_eq!(bench.get(0), 0x58);
    bench.clock.advance(2_228_000);
    assert!(!announced(&mut bench));
    assert_eq!(bench.get(0), 0x59);
    bench.clock.advance(NANOSECONDS - 1);
    bench.set(REGISTER_B, B_SET);
    assert!(!announced(&mut bench), "no update while SET");
}

#[test]
fn the_guest_sets_the_time_as_linux_does() {
    let mut bench = Bench::new();
    bench.clock.advance(300_000_000);
    bench.set(REGISTER_B, B_24_HOURS | B_SET);
    bench.set(REGISTER_A, 0x70);
    bench.set_time([0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]);
    bench.clock.advance(10 * NANOSECONDS);
    assert_eq!(bench.time(), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59], "it stands still");
    bench.set(REGISTER_B, B_24_HOURS);
    bench.set(REGISTER_A, 0x26);
    bench.clock.advance(499_999_999);
    assert_eq!(bench.get(0), 0x59);
    bench.clock.advance(1);
    assert_eq!(bench.time(), [0x20, 0, 1, 1, 0, 0, 0]);
    assert_eq!(bench.get(6), 5, "the weekday was not set: it goes on from Wednesday");
}

#[test]
fn set_alone_keeps_the_phase_of_the_second() {
    let mut bench = Bench::new();
    bench.clock.advance(300_000_000);
    bench.set(REGISTER_B, B_24_HOURS | B_SET);
    bench.set(0, 0x10);
    bench.clock.advance(5 * NANOSECONDS);
    bench.set(REGISTER_B, B_24_HOURS);
    bench.clock.advance(699_999_999);
    assert_eq!(bench.get(0), 0x10);
    bench.clock.advance(1);
    assert_eq!(bench.get(0), 0x11);
}

#[test]
fn single_registers_may_be_written_while_it_runs() {
    let mut bench = Bench::new();
    bench.set(2, 0x30);
    bench.set(6, 1);
    assert_eq!(bench.time(), [0x20, 0x24, 0x02, 0x28, 0x23, 0x30, 0x58]);
    assert_eq!(bench.get(6), 1);
    bench.clock.advance(86_400 * NANOSECONDS);
    assert_eq!(bench.get(6), 2);
    bench.set(8, 0xff);
    bench.set(7, 0xff);
    assert_eq!(bench.time()[2..4], [0x12, 0x31]);
}

#[test]
fn ram_is_ram_and_the_rest_is_not() {
    let mut bench = Bench::new();
    for register in 0x0e..0x80 {
        if register != CENTURY_REGISTER {
            bench.set(register, register ^ 0x5a);
        }
    }
    for register in 0x0e..0x80 {
        if register != CENTURY_REGISTER {
            assert_eq!(bench.get(register), register ^ 0x5a);
        }
    }
    assert_eq!(bench.get(0x8e), 0x0e ^ 0x5a, "bit 7 is that of the NMI");
    assert!(bench.rtc.set_ram(0x17, 1) && !bench.rtc.set_ram(0, 1) && !bench.rtc.set_ram(0x80, 1));
    assert_eq!(bench.get(0x17), 1);
    bench.set(REGISTER_D, 0);
    bench.set(REGISTER_C, 0xff);
    assert_eq!((bench.get(REGISTER_D), bench.get(REGISTER_C)), (0x80, 0));
}

#[test]
fn updates_interrupt_once_a_second() {
    let mut bench = Bench::new();
    assert_eq!(bench.rtc.next_deadline(), None);
    bench.set(REGISTER_B, B_24_HOURS | UPDATE);
    assert_eq!(bench.rtc.next_deadline(), Some(START + NANOSECONDS));
    bench.clock.set(START + NANOSECONDS - 1);
    bench.rtc.service();
    assert!(bench.line.take().is_empty());
    bench.clock.advance(1);
    bench.rtc.service();
    assert_eq!(bench.line.take(), [true]);
    assert_eq!(bench.rtc.next_deadline(), None, "until it is acknowledged");
    assert_eq!(bench.get(REGISTER_C) & !PERIODIC, C_INTERRUPT | UPDATE);
    assert_eq!(bench.line.take(), [false]);
    assert_eq!(bench.get(REGISTER_C), 0);
}

#[test]
fn the_alarm_comes_at_its_time() {
    let mut bench = Bench::new();
    for (register, value) in [(1, 0x01), (3, 0x00), (5, 0xff)] {
        bench.set(register, value);
        assert_eq!(bench.get(register), value);
    }
    bench.set(REGISTER_B, B_24_HOURS | ALARM);
    bench.clock.advance(2 * NANOSECONDS);
    bench.rtc.service();
    assert!(bench.line.take().is_empty());
    bench.clock.advance(NANOSECONDS);
    bench.rtc.service();
    assert_eq!(bench.line.take(), [true]);
    assert_eq!(bench.get(REGISTER_C) & !PERIODIC, C_INTERRUPT | ALARM | UPDATE);
    // Found though nobody looked for years.
    bench.clock.advance(100_000 * 86_400 * NANOSECONDS);
    bench.rtc.service();
    assert_ne!(bench.get(REGISTER_C) & ALARM, 0);
    // One that never comes.
    bench.set(1, 0x77);
    bench.clock.advance(100 * 86_400 * NANOSECONDS);
    assert_eq!(bench.get(REGISTER_C) & ALARM, 0);
}

#[test]
fn an_alarm_is_found_as_if_every_second_were_looked_at() {
    let mut bench = Bench::new();
    let alarms =
        [[0x00, 0x00, 0x00], [0x59, 0xff, 0x23], [0xff, 0x30, 0xff], [0x17, 0x17, 0xc0], [0x61, 0xff, 0xff]];
    for alarm in alarms {
        for (register, value) in [1, 3, 5].into_iter().zip(alarm) {
            bench.set(register, value);
        }
        for step in [1, 7, 61, 3599, 3601, 50_000, 86_399, 86_400, 90_000] {
            bench.get(REGISTER_C);
            let first = i128::from(bench.clock.now_ns()) / SECOND + 1;
            bench.clock.advance(step * NANOSECONDS);
            let expected = (first..first + i128::from(step)).any(|second| {
                let time =
                    DateTime::from_seconds(second.try_into().unwrap()).to_registers(bench.rtc.format());
                time.iter().zip(alarm).all(|(now, alarm)| alarm >= 0xc0 || *now == alarm)
            });
            assert_eq!(bench.get(REGISTER_C) & ALARM != 0, expected, "{alarm:x?} within {step} s");
        }
    }
}

#[test]
fn periodic_interrupts_have_the_rate_of_register_a() {
    let mut bench = Bench::new();
    bench.set(REGISTER_B, B_24_HOURS | PERIODIC);
    bench.get(REGISTER_C);
    let mut times = Vec::new();
    for _ in 0..1024 {
        let deadline = bench.rtc.next_deadline().unwrap();
        assert!(deadline > bench.clock.now_ns());
        bench.clock.set(deadline - 1);
        assert_eq!(bench.get(REGISTER_C) & PERIODIC, 0);
        bench.clock.set(deadline);
        assert_ne!(bench.get(REGISTER_C) & PERIODIC, 0);
        times.push(deadline);
    }
    assert_eq!(times.last(), Some(&(START + NANOSECONDS)), "1024 Hz");
    bench.set(REGISTER_A, 0x20);
    assert_eq!(bench.rtc.next_deadline(), None);
    bench.set(REGISTER_A, 0x21);
    let deadline = bench.rtc.next_deadline().unwrap();
    assert_eq!(deadline - bench.clock.now_ns(), 3_906_250);
}

#[test]
fn saved_states_go_on_and_are_checked() {
    let mut bench = Bench::new();
    bench.set(4, 0x05);
    bench.set(0x40, 7);
    bench.set(REGISTER_B, B_24_HOURS | UPDATE);
    bench.clock.advance(NANOSECONDS);
    let state = bench.rtc.state();
    let mut other = Bench::new();
    other.clock.advance(3 * NANOSECONDS);
    other.rtc.restore(&state).unwrap();
    assert_eq!(other.line.take(), [true]);
    assert_eq!(other.time(), [0x20, 0x24, 0x02, 0x28, 0x06, 0, 0x01]);
    assert_eq!(other.get(0x40), 7);

    let kept = other.rtc.state();
    for bad in [
        RtcState { index: 128, ..state.clone() },
        RtcState { a: 0x80, ..state.clone() },
        RtcState { c: 1, ..state.clone() },
        RtcState { weekday_shift: 7, ..state.clone() },
        RtcState { offset_ns: i128::MAX, ..state.clone() },
        RtcState { offset_ns: i128::MIN, ..state.clone() },
        RtcState { frozen: Some([0; 8]), ..state.clone() },
        RtcState { b: B_SET, ..state.clone() },
    ] {
        assert!(other.rtc.restore(&bad).is_err(), "{bad:?}");
        assert_eq!(other.rtc.state(), kept);
    }
}

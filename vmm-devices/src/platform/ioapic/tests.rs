use super::*;
use crate::interrupt::testing::Recorder;

struct Bench {
    io_apic: Arc<IoApic>,
    sent: Recorder<Message>,
}

impl Bench {
    fn new() -> Self {
        let sent = Recorder::default();
        Self { io_apic: Arc::new(IoApic::new(sent.clone())), sent }
    }

    fn register(&self, index: u8) -> u32 {
        self.io_apic.write(SELECT, &u32::from(index).to_le_bytes());
        let mut data = [0; 4];
        self.io_apic.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_register(&self, index: u8, value: u32) {
        self.io_apic.write(SELECT, &u32::from(index).to_le_bytes());
        self.io_apic.write(WINDOW, &value.to_le_bytes());
    }

    fn route(&self, pin: u8, entry: u64) {
        self.set_register(0x11 + 2 * pin, low_half(entry >> 32));
        self.set_register(0x10 + 2 * pin, low_half(entry));
    }

    fn line(&self, pin: u32, asserted: bool) {
        self.io_apic.set_line(pin, asserted).unwrap();
    }
}

const LEVEL_33: u64 = LEVEL | 0x33;

#[test]
fn it_looks_like_a_version_20_io_apic() {
    let bench = Bench::new();
    assert_eq!(bench.register(1), 0x0017_0020);
    bench.set_register(0, 0xffff_ffff);
    assert_eq!((bench.register(0), bench.register(2)), (0x0f00_0000, 0x0f00_0000));
    bench.set_register(1, 0);
    assert_eq!(bench.register(1), 0x0017_0020);
    for pin in 0..24 {
        assert_eq!((bench.register(0x10 + 2 * pin), bench.register(0x11 + 2 * pin)), (0x1_0000, 0));
    }
    for index in [3, 0xf, 0x40, 0xff] {
        bench.set_register(index, u32::MAX);
        assert_eq!(bench.register(index), 0, "register {index:#x}");
    }
}

#[test]
fn reserved_and_read_only_bits_stay_clear() {
    let bench = Bench::new();
    bench.route(3, u64::MAX);
    assert_eq!((bench.register(0x16), bench.register(0x17)), (0x0001_afff, 0xff00_0000));
}

#[test]
fn edges_are_sent_once_each() {
    let bench = Bench::new();
    bench.route(4, 0x0500_0000_0000_0031);
    bench.line(4, true);
    bench.line(4, true);
    bench.line(4, false);
    bench.line(4, true);
    assert_eq!(bench.sent.take(), [(0xfee0_5000, 0x31); 2]);
    assert_eq!(bench.register(0x18), 0x31, "no remote IRR");
}

#[test]
fn an_edge_at_a_masked_input_is_gone() {
    let bench = Bench::new();
    bench.route(4, MASKED | 0x31);
    bench.line(4, true);
    bench.route(4, 0x31);
    assert!(bench.sent.take().is_empty());
    bench.line(4, false);
    bench.line(4, true);
    assert_eq!(bench.sent.take().len(), 1);
}

#[test]
fn a_level_is_sent_again_after_the_end_of_interrupt() {
    let bench = Bench::new();
    bench.route(9, LEVEL_33);
    bench.line(9, true);
    assert_eq!(bench.sent.take(), [(0xfee0_0000, 0xc033)]);
    assert_eq!(bench.register(0x22), 0xc033, "remote IRR");
    bench.line(9, false);
    bench.line(9, true);
    bench.io_apic.end_of_interrupt(0x34);
    assert!(bench.sent.take().is_empty(), "held by remote IRR");
    bench.io_apic.end_of_interrupt(0x33);
    assert_eq!(bench.sent.take().len(), 1);
    bench.line(9, false);
    bench.io_apic.end_of_interrupt(0x33);
    assert!(bench.sent.take().is_empty());
    assert_eq!(bench.register(0x22), 0x8033);
    // The EOI register does the same.
    bench.line(9, true);
    bench.io_apic.write(EOI, &0x33_u32.to_le_bytes());
    assert_eq!(bench.sent.take().len(), 2);
}

#[test]
fn an_end_of_interrupt_while_masked_waits_for_the_unmasking() {
    let bench = Bench::new();
    bench.route(9, LEVEL_33);
    bench.line(9, true);
    bench.route(9, MASKED | LEVEL_33);
    bench.io_apic.end_of_interrupt(0x33);
    assert_eq!(bench.sent.take().len(), 1);
    bench.route(9, LEVEL_33);
    assert_eq!(bench.sent.take().len(), 1);
    // Once more: nothing new, the interrupt is under way.
    bench.route(9, LEVEL_33);
    assert!(bench.sent.take().is_empty());
}

#[test]
fn writing_the_high_half_alone_keeps_the_rest() {
    let bench = Bench::new();
    bench.route(9, LEVEL_33);
    bench.line(9, true);
    bench.set_register(0x23, 0x0700_0000);
    assert_eq!(bench.register(0x22), 0xc033, "remote IRR survives");
    bench.io_apic.end_of_interrupt(0x33);
    assert_eq!(bench.sent.take().last(), Some(&(0xfee0_7000, 0xc033)));
}

#[test]
fn turning_an_input_to_edge_clears_remote_irr() {
    let bench = Bench::new();
    bench.route(9, LEVEL_33);
    bench.line(9, true);
    bench.route(9, MASKED | 0x33);
    bench.route(9, MASKED | LEVEL_33);
    assert_eq!(bench.register(0x22), 0x1_8033);
}

#[test]
fn one_vector_for_two_inputs_ends_both() {
    let bench = Bench::new();
    bench.route(10, LEVEL_33);
    bench.route(11, LEVEL_33);
    bench.line(10, true);
    bench.line(11, true);
    bench.line(10, false);
    bench.sent.take();
    bench.io_apic.end_of_interrupt(0x33);
    assert_eq!(bench.sent.take().len(), 1);
}

#[test]
fn messages_follow_the_entry() {
    let bench = Bench::new();
    let cases = [
        (0xff00_0000_0000_0841, 0xfeef_f004, 0x41),
        (0x0300_0000_0000_0942, 0xfee0_300c, 0x142),
        // NMI and ExtINT are edges whatever the entry says.
        (LEVEL | 0x400, 0xfee0_0000, 0x400),
        (LEVEL | 0x700, 0xfee0_0000, 0x700),
        (0x2000 | LEVEL_33, 0xfee0_0000, 0xc033),
    ];
    for (entry, address, data) in cases {
        bench.route(7, entry);
        bench.line(7, true);
        bench.line(7, false);
        assert_eq!(bench.sent.take(), [(address, data)], "{entry:#x}");
    }
}

#[test]
fn odd_accesses_are_harmless() {
    let bench = Bench::new();
    bench.io_apic.write(SELECT, &[1]);
    let mut data = [0xff; 8];
    bench.io_apic.read(WINDOW + 2, &mut data);
    assert_eq!(data, [0x17, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    bench.io_apic.write(SELECT, &[0x10]);
    bench.io_apic.write(WINDOW, &[0, 0]);
    bench.io_apic.write(WINDOW + 1, &[0; 4]);
    bench.io_apic.write(WINDOW, &[]);
    assert_eq!(bench.register(0x10), 0x1_0000);
    for offset in [0x20, 0x44, 0xffc, u64::MAX] {
        bench.io_apic.write(offset, &[0; 8]);
        bench.io_apic.read(offset, &mut data);
    }
}

#[test]
fn inputs_that_do_not_exist_are_refused() {
    let bench = Bench::new();
    let text = bench.io_apic.line(24).unwrap_err().to_string();
    assert_eq!(text, "I/O APIC has no input 24; allowed are 0 to 23");
    assert!(bench.io_apic.set_line(u32::MAX, true).is_err());
    bench.io_apic.line(23).unwrap().set_level(true);
    assert_eq!(bench.io_apic.state().asserted, 1 << 23);
}

#[test]
fn a_sink_may_end_the_interrupt_it_takes() {
    // What a guest does that ends an interrupt without serving its device, twice.
    use std::sync::OnceLock;
    let target: Arc<OnceLock<Arc<IoApic>>> = Arc::default();
    let (seen, back) = (Recorder::default(), Arc::clone(&target));
    let log = seen.clone();
    let io_apic = Arc::new(IoApic::new(move |_: u64, data: u32| {
        log.record(data);
        if log.take().len() < 2 {
            back.get().unwrap().set_line(9, false).unwrap();
            back.get().unwrap().end_of_interrupt(0x33);
        }
    }));
    target.set(Arc::clone(&io_apic)).unwrap();
    let mut state = IoApicState::default();
    state.entries[9] = LEVEL_33;
    io_apic.restore(&state).unwrap();
    io_apic.set_line(9, true).unwrap();
    assert_eq!(io_apic.state(), state);
}

#[test]
fn saved_states_are_checked() {
    let bench = Bench::new();
    bench.route(9, LEVEL_33);
    bench.line(9, true);
    let state = bench.io_apic.state();
    let other = Bench::new();
    other.io_apic.restore(&state).unwrap();
    assert_eq!(other.io_apic.state(), state);
    assert!(other.sent.take().is_empty());
    other.io_apic.end_of_interrupt(0x33);
    assert_eq!(other.sent.take().len(), 1);

    let kept = other.io_apic.state();
    let with_entry = |entry| {
        let mut entries = state.entries;
        entries[23] = entry;
        IoApicState { entries, ..state.clone() }
    };
    for bad in [
        IoApicState { id: 16, ..state.clone() },
        IoApicState { asserted: 1 << 24, ..state.clone() },
        with_entry(1 << 17),
        with_entry(1 << 12),
        with_entry(REMOTE_IRR),
    ] {
        assert!(other.io_apic.restore(&bad).is_err(), "{bad:?}");
        assert_eq!(other.io_apic.state(), kept);
    }
}

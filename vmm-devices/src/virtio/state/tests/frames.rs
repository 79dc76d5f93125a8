//! Frames that have come and wait when a network device is saved.

use super::*;
use crate::ManualClock;
use crate::net::{Checksum, Gso, GsoKind, HEADER, MAX_FRAME, MacAddr, Offloads, PacketInfo};
use crate::testkit::{DriverQueue, TestFrame, TestNetwork};
use crate::virtio::net::{NetFrameState, NetState, feature};
use crate::virtio::rate::{Limits, Rate, RateLimiter};
use crate::virtio::{DeviceState, Net};

const FEATURES: u64 =
    feature::MRG_RXBUF | feature::CSUM | feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::MTU;

/// Bytes of a driver's buffer.
const BUFFER: u32 = 1600;

fn network() -> TestNetwork {
    TestNetwork::new(1, Offloads::ALL, Offloads::ALL).of_mtu(1500)
}

fn device(network: &TestNetwork, rate: Option<&RateLimiter>) -> Net {
    let builder = Net::builder(Arc::new(network.clone()), MacAddr([0x52, 0x54, 0, 0, 0, 1]));
    match rate {
        Some(rate) => builder.receive_rate(rate.clone()).build(),
        None => builder.build(),
    }
    .unwrap()
}

/// What is to be cut into frames that fit the MTU.
fn segmented() -> PacketInfo {
    PacketInfo {
        checksum: Some(Checksum { start: 34, offset: 16 }),
        gso: Some(Gso { kind: GsoKind::Tcp4, size: 1448, ecn: false }),
        header_len: 54,
        ..PacketInfo::default()
    }
}

fn bytes(len: u16) -> Vec<u8> {
    (0..len).map(|at| at.to_le_bytes()[0] ^ 0x5a).collect()
}

struct Guest {
    machine: Machine,
    rx: DriverQueue<Memory>,
    network: TestNetwork,
}

impl Guest {
    fn new(bus: Bus, rate: Option<&RateLimiter>) -> Self {
        let network = network();
        let machine = Machine::new(bus, device(&network, rate));
        let [rx, tx] = [0x1000, 0x2000].map(|at| DriverQueue::new(machine.memory.clone(), at, 16).unwrap());
        machine.driver.start(FEATURES, &[(0, &rx), (1, &tx)]).unwrap();
        Self { machine, rx, network }
    }

    /// Makes a buffer available, at a place of its own for each of 16.
    fn offer(&mut self, place: u64) {
        self.rx.chain().writable(0x8000 + 0x800 * place, BUFFER).submit().unwrap();
        self.machine.driver.notify(0);
    }

    /// The next frame that the driver has got, header and all.
    fn received(&mut self) -> Option<Vec<u8>> {
        let mut frame = Vec::new();
        let (head, len) = self.rx.take_used().unwrap()?;
        frame.extend(self.rx.get(0x8000 + 0x800 * u64::from(head), usize::try_from(len).unwrap()).unwrap());
        let [.., low, high] = frame[..HEADER] else { panic!("it has a header") };
        for _ in 1..u16::from_le_bytes([low, high]) {
            let (head, len) = self.rx.take_used().unwrap().unwrap();
            frame.extend(
                self.rx.get(0x8000 + 0x800 * u64::from(head), usize::try_from(len).unwrap()).unwrap(),
            );
        }
        Some(frame)
    }

    fn waiting(&self) -> Vec<NetFrameState> {
        net(&mut self.machine.save()).waiting.clone()
    }

    /// The same guest, there or here.
    fn go_on(self, elsewhere: bool) -> Self {
        let Self { machine, rx, network: here } = self;
        if !elsewhere {
            machine.resume();
            return Self { machine, rx, network: here };
        }
        let there = network();
        let machine = machine.moved_paused(device(&there, None), Arc::new(Inline));
        let rx = rx.moved_to(machine.memory.clone());
        let guest = Self { machine, rx, network: there };
        assert_eq!(guest.waiting().len(), 1, "it can be saved again");
        guest.machine.resume();
        guest
    }
}

fn net(saved: &mut Saved) -> &mut NetState {
    match &mut saved.device().device {
        DeviceState::Net(state) => state,
        other => panic!("{other:?}"),
    }
}

#[test]
fn one_that_waits_for_more_buffers_comes_there_or_here() {
    for (bus, elsewhere) in BUSES.into_iter().flat_map(|bus| [(bus, false), (bus, true)]) {
        let mut guest = Guest::new(bus, None);
        guest.offer(0);
        guest.network.give(TestFrame::new(bytes(4000)).with_info(segmented()));
        guest.network.give(TestFrame::new(bytes(100)));
        assert_eq!((guest.received(), guest.network.coming()), (None, 1));
        guest.machine.pause();
        let frame = NetFrameState { pair: 0, header: segmented().to_bytes(0), bytes: bytes(4000) };
        assert_eq!(guest.waiting(), [frame]);
        // The one behind it is the network's.
        let mut guest = guest.go_on(elsewhere);
        guest.offer(1);
        assert_eq!(guest.received(), None);
        guest.offer(2);
        let expected = [&segmented().to_bytes(3)[..], &bytes(4000)].concat();
        assert_eq!(guest.received().unwrap(), expected, "{bus:?} {elsewhere}");
        guest.offer(3);
        assert_eq!(guest.received().is_some(), !elsewhere);
        guest.machine.pause();
        assert_eq!(guest.waiting(), []);
    }
}

/// It lies in a buffer that is in flight.
#[test]
fn one_that_waits_for_its_rate_comes_there_or_here() {
    for (bus, elsewhere) in BUSES.into_iter().flat_map(|bus| [(bus, false), (bus, true)]) {
        let clock = Arc::new(ManualClock::new(0));
        let limits = Limits { bytes: Rate::new(1 << 20, 10), ..Limits::default() };
        let limiter = RateLimiter::new(Arc::clone(&clock), limits);
        let mut guest = Guest::new(bus, Some(&limiter));
        (0..2).for_each(|place| guest.offer(place));
        [900, 901].into_iter().for_each(|len| guest.network.give(TestFrame::new(bytes(len))));
        assert_eq!(guest.received().unwrap()[HEADER..], bytes(900));
        assert_eq!((guest.received(), guest.network.coming()), (None, 0));
        guest.machine.pause();
        let frame = NetFrameState { pair: 0, header: [0; HEADER], bytes: bytes(901) };
        assert_eq!(guest.waiting(), [frame]);
        let mut guest = guest.go_on(elsewhere);
        if !elsewhere {
            assert_eq!(guest.received(), None);
            clock.advance(1_000_000_000);
            guest.machine.driver.notify(0);
        }
        assert_eq!(guest.received().unwrap()[HEADER..], bytes(901), "{bus:?} {elsewhere}");
    }
}

#[test]
fn one_that_waits_is_gone_with_its_driver() {
    for bus in BUSES {
        let mut guest = Guest::new(bus, None);
        guest.offer(0);
        guest.network.give(TestFrame::new(bytes(4000)).with_info(segmented()));
        guest.machine.pause();
        assert_eq!(guest.waiting().len(), 1);
        guest.machine.driver.set_status(0);
        assert_eq!(guest.waiting(), []);
        // Nor does the next driver get it.
        let [rx, tx] =
            [0x1000, 0x2000].map(|at| DriverQueue::new(guest.machine.memory.clone(), at, 16).unwrap());
        guest.machine.driver.start(FEATURES, &[(0, &rx), (1, &tx)]).unwrap();
        guest.rx = rx;
        (0..8).for_each(|place| guest.offer(place));
        assert_eq!(guest.received(), None);
    }
}

type Change = fn(&mut NetState);

fn frame(info: PacketInfo, len: usize) -> NetFrameState {
    NetFrameState { pair: 0, header: info.to_bytes(0), bytes: vec![1; len] }
}

const CHANGES: [(Change, &str); 10] = [
    (|state| state.waiting[0].pair = 1, "pair of a frame that waits is 0x1"),
    (|state| state.waiting.push(state.waiting[0].clone()), "pair of a frame that waits is 0x0"),
    (|state| state.waiting[0].header[1] = 2, "header of a frame that waits is"),
    (|state| state.waiting[0].header[10] = 1, "header of a frame that waits is"),
    (|state| state.waiting[0].header[1] = 4, "header of a frame that waits is"),
    (|state| state.waiting[0].bytes.truncate(51), "header of a frame that waits is"),
    (|state| state.waiting[0] = frame(PacketInfo::default(), 13), "length of a frame that waits is 0xd"),
    (|state| state.waiting[0] = frame(segmented(), MAX_FRAME + 1), "length of a frame that waits is 0x1003e"),
    (|state| state.waiting[0] = frame(PacketInfo::default(), 1515), "length of a frame that waits is 0x5eb"),
    (|state| state.waiting[0].bytes.clear(), "header of a frame that waits is"),
];

#[test]
fn one_that_cannot_wait_is_refused_and_changes_nothing() {
    for bus in BUSES {
        let mut guest = Guest::new(bus, None);
        guest.offer(0);
        guest.network.give(TestFrame::new(bytes(4000)).with_info(segmented()));
        guest.machine.pause();
        let saved = guest.machine.save();
        for (index, (change, problem)) in CHANGES.into_iter().enumerate() {
            let memory = copy_of(&guest.machine.memory);
            let there = Machine::with(bus, device(&network(), None), memory, Arc::new(Inline));
            let before = there.save();
            let mut bad = saved.clone();
            change(net(&mut bad));
            let error = there.restore(&bad).unwrap_err().to_string();
            assert!(error.contains(problem), "{index}: {error}");
            assert_eq!(there.save(), before, "{index}");
            there.restore(&saved).unwrap();
        }
        // As long as may be, where the MTU is no matter.
        let there =
            Machine::with(bus, device(&network(), None), copy_of(&guest.machine.memory), Arc::new(Inline));
        let mut longest = saved.clone();
        net(&mut longest).waiting[0] = frame(segmented(), MAX_FRAME);
        there.restore(&longest).unwrap();
    }
}

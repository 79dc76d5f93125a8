//! How fast frames go from port to port, beside a copy of the same bytes. The bench `switch` prints it, and so do the examples.
//!
//! Sender and receiver are the two ends of ports, with memory of 8 MiB each that they go through as guests go through theirs, and no virtual machines.
//! The peer copies the same bytes from the one memory to the other, on one thread. Both take turns; figures are medians.

use std::hint;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmm_devices::channel::{AllowAll, Gatekeeper, Grant, NetworkAttach, Party};
use vmm_devices::net::switch::broker::{ClientConfig, SwitchClient, SwitchServer};
use vmm_devices::net::switch::{Flow, PortConfig, Switch, Verdict};
use vmm_devices::net::{
    Agreed, MAX_FRAME, MacAddr, NetBackend, NetEvents, NetPort, Offloads, PacketInfo, Sent,
};
use vmm_devices::vmm_memory::vm_memory::{MmapRegion, VolatileMemory as _, VolatileSlice};

/// Memory of each side.
const MEMORY: usize = 8 << 20;

/// How long copies are measured at least.
const LEAST: Duration = Duration::from_millis(100);

/// Bytes that are on their way at most: less than a queue holds.
const WINDOW: u64 = 1 << 20;

/// How frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Sender and receiver take turns on one thread: both copies after each other.
    OneThread,
    /// Each has a thread.
    TwoThreads,
    /// The same, with a judge that looks at each frame and passes it.
    Judged,
    /// Between clients of a broker, which has a third thread.
    Broker,
}

/// What was measured.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    /// Bytes of a frame.
    pub(crate) len: usize,
    /// How they went.
    pub(crate) way: Way,
    /// Frames a second.
    pub(crate) frames: f64,
    /// Bytes a second.
    pub(crate) bytes: f64,
    /// Bytes that a copy moves a second.
    pub(crate) copied: f64,
    /// The median of what each round had of both: the first over the second.
    pub(crate) ratio: f64,
}

struct Quiet;

impl NetEvents for Quiet {
    fn ready(&self, _: u16) {}

    fn link_changed(&self) {}
}

struct Ends {
    _backends: [Box<dyn NetBackend>; 2],
    sender: Box<dyn NetPort>,
    receiver: Box<dyn NetPort>,
}

fn grant(gatekeeper: &Gatekeeper) -> Grant<NetworkAttach> {
    let channel = NetworkAttach { network: "lan".into() };
    gatekeeper.open(Party::Host("bench".into()), None, channel).unwrap()
}

fn ends(backends: [Box<dyn NetBackend>; 2]) -> Ends {
    let mut agreed = Agreed::new(1);
    (agreed.transmit, agreed.receive) = (Offloads::ALL, Offloads::ALL);
    let [sender, receiver] =
        backends.each_ref().map(|backend| backend.attach(&agreed, Arc::new(Quiet)).unwrap().remove(0));
    Ends { _backends: backends, sender, receiver }
}

fn mac(number: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, number])
}

fn switch(start: Instant) -> Switch {
    Switch::builder("lan", move || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)).build()
}

/// Memory with frames one after the other, each from the first to the second device.
fn frames(len: usize) -> MmapRegion<()> {
    let memory = MmapRegion::new(MEMORY).unwrap();
    let header = [&mac(2).0[..], &mac(1).0, &[0x88, 0xb5]].concat();
    for at in (0..MEMORY / len).map(|number| number * len) {
        memory.get_slice(at, len).unwrap().copy_from(&vec![7_u8; len]);
        memory.get_slice(at, header.len()).unwrap().copy_from(&header);
    }
    memory
}

/// Where the frame of that number lies.
fn place(memory: &MmapRegion<()>, len: usize, room: usize, number: u64) -> VolatileSlice<'_> {
    let slots = (MEMORY - room) / len + 1;
    let slot = usize::try_from(number % slots as u64).unwrap();
    memory.get_slice(slot * len, room).unwrap()
}

fn receive(port: &mut dyn NetPort, memory: &MmapRegion<()>, len: usize, number: u64) -> bool {
    let received = port.receive(&[place(memory, len, MAX_FRAME, number)]).unwrap();
    received.inspect(|received| assert_eq!(received.len, len)).is_some()
}

/// Seconds for so many frames.
fn run(ends: &mut Ends, way: Way, [from, to]: [&MmapRegion<()>; 2], len: usize, count: u64) -> f64 {
    let Ends { sender, receiver, .. } = ends;
    let start = Instant::now();
    if way == Way::OneThread {
        for number in 0..count {
            assert_eq!(
                sender.transmit(&PacketInfo::default(), &[place(from, len, len, number)]).unwrap(),
                Sent::Done
            );
            sender.flush();
            assert!(receive(&mut **receiver, to, len, number));
        }
        return start.elapsed().as_secs_f64();
    }
    let got = AtomicU64::new(0);
    let window = (WINDOW / (len as u64 + 16)).max(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 0;
            let mut idle = 0;
            while number < count {
                if receive(&mut **receiver, to, len, number) {
                    number += 1;
                    idle = 0;
                    got.store(number, Ordering::Release);
                } else {
                    rest(&mut idle);
                }
            }
        });
        let mut idle = 0;
        for number in 0..count {
            if number % 32 == 0 {
                sender.flush();
            }
            while number - got.load(Ordering::Acquire) >= window {
                sender.flush();
                rest(&mut idle);
            }
            while sender.transmit(&PacketInfo::default(), &[place(from, len, len, number)]).unwrap()
                == Sent::Full
            {
                rest(&mut idle);
            }
            idle = 0;
        }
        sender.flush();
    });
    start.elapsed().as_secs_f64()
}

/// Lets others have the processor where there are fewer than threads.
fn rest(idle: &mut u32) {
    *idle += 1;
    if idle.is_multiple_of(64) {
        std::thread::yield_now();
    } else {
        hint::spin_loop();
    }
}

/// Seconds for a copy of the same bytes. Copied again and again for a while: what takes a millisecond has a processor for itself even
/// where others want it, and would be compared with what does not.
fn copy([from, to]: [&MmapRegion<()>; 2], len: usize, count: u64) -> f64 {
    let start = Instant::now();
    let mut times = 0_u32;
    while times == 0 || start.elapsed() < LEAST {
        for number in 0..count {
            place(from, len, len, number).copy_to_volatile_slice(place(to, len, len, number));
        }
        times += 1;
    }
    start.elapsed().as_secs_f64() / f64::from(times)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Frames of each size each way, in so many rounds.
///
/// # Panics
/// If the host has no memory, sockets or threads for it.
#[must_use]
pub(crate) fn rows(rounds: NonZeroU64) -> Vec<Row> {
    let mut rows = Vec::new();
    for len in [64, 1514, 65536] {
        for way in [Way::OneThread, Way::TwoThreads, Way::Judged, Way::Broker] {
            rows.push(row(len, way, rounds));
        }
    }
    rows
}

/// Frames of `len` bytes that way.
///
/// # Panics
/// As [`rows`].
#[must_use]
pub(crate) fn row(len: usize, way: Way, rounds: NonZeroU64) -> Row {
    let gatekeeper = Gatekeeper::new(AllowAll);
    let switch = switch(Instant::now());
    if way == Way::Judged {
        switch.set_judge(Some(Arc::new(|flow: &Flow<'_>| {
            if flow.headers.transport.is_some() { Verdict::Drop } else { Verdict::Pass }
        })));
    }
    let directory = std::env::temp_dir().join(format!("switch-rates-{}", std::process::id()));
    let mut broker = None;
    let ends = if way == Way::Broker {
        let mut server = SwitchServer::builder(switch, gatekeeper.clone()).listen(&directory).unwrap();
        let stopper = server.stopper();
        broker = Some((stopper, std::thread::spawn(move || server.run().unwrap())));
        let client = |number: u8| -> Box<dyn NetBackend> {
            let config = ClientConfig::new(format!("c{number}")).mac(mac(number));
            Box::new(SwitchClient::connect(grant(&gatekeeper), &directory, config).unwrap())
        };
        ends([client(1), client(2)])
    } else {
        let port = |number: u8| -> Box<dyn NetBackend> {
            let config = PortConfig::new(format!("p{number}")).mac(mac(number));
            Box::new(switch.attach(grant(&gatekeeper), config).unwrap())
        };
        ends([port(1), port(2)])
    };
    let mut ends = ends;
    let (from, to) = (frames(len), frames(len));
    let memory = [&from, &to];
    if way == Way::Broker {
        // Until the broker knows of the receiver's driver, frames are lost.
        let mut idle = 0;
        loop {
            drop(ends.sender.transmit(&PacketInfo::default(), &[place(&from, len, len, 0)]));
            ends.sender.flush();
            std::thread::sleep(Duration::from_millis(5));
            if receive(&mut *ends.receiver, &to, len, 0) {
                break;
            }
            rest(&mut idle);
        }
        std::thread::sleep(Duration::from_millis(20));
        while receive(&mut *ends.receiver, &to, len, 0) {}
    }
    let count = ((128_u64 << 20) / len as u64).min(200_000);
    let (mut own, mut peer, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds.get() {
        let copied = copy(memory, len, count);
        let sent = run(&mut ends, way, memory, len, count);
        // The first one warms up.
        if round > 0 {
            own.push(sent / count as f64);
            peer.push(copied / count as f64);
            ratios.push(copied / sent);
        }
    }
    drop(ends);
    if let Some((stopper, thread)) = broker {
        stopper.stop();
        thread.join().unwrap();
        std::fs::remove_file(&directory).unwrap();
    }
    let (own, peer) = (median(own), median(peer));
    Row {
        len,
        way,
        frames: 1.0 / own,
        bytes: len as f64 / own,
        copied: len as f64 / peer,
        ratio: median(ratios),
    }
}

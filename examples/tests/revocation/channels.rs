//! A thousand channels in devices, all of them in use, and a policy that takes half of them back.

use std::io::Read as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};
use vmm_cpu::translate::TranslateHypervisor;
use vmm_devices::channel::{Object, VmIdentity};
use vmm_examples::policy::{Cut, Enforcement};
use vmm_policy::{Monitor, Policy};

use crate::regions::Machine;
use crate::sockets::{Connection, Guest, HOST};

/// Channels, of which so many are regions.
pub(crate) const CHANNELS: usize = 1000;
const MACHINES: usize = 2;
const REGIONS: usize = 24;
pub(crate) const ALL_REGIONS: usize = MACHINES * REGIONS;

/// Guests that share the sockets.
const GUESTS: usize = 2;

/// Ports from here on are those that are taken back.
const CUT: u32 = 10_000;

const BEFORE: &str = "
labels l
host backup {}
allow backup to connect vsock of l
allow l to map-ro region
";

const AFTER: &str = "
labels l
host backup {}
allow backup to connect vsock 1..9999 of l
allow l to map-ro region keep-*
";

/// All that is open.
pub(crate) struct Channels {
    enforcement: Enforcement,
    guests: Vec<(Guest, Vec<Connection>)>,
    machines: Vec<Machine>,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// What each socket and each region took, in order.
    pub(crate) sockets: Vec<Duration>,
    pub(crate) regions: Vec<Duration>,
    /// From the beginning of the reload until all of them were closed.
    pub(crate) all: Duration,
    /// From then until the guests' processors had seen it.
    pub(crate) seen: Vec<Duration>,
    /// Packets that the guests sent meanwhile.
    pub(crate) packets: u64,
}

impl Channels {
    pub(crate) fn open() -> Self {
        let mut limit = getrlimit(Resource::Nofile);
        limit.current = limit.maximum;
        setrlimit(Resource::Nofile, limit).unwrap();
        let enforcement = Enforcement::new(Monitor::new(Policy::parse(BEFORE).unwrap()));
        enforcement.register_host(HOST).unwrap();
        let mut next = 0;
        let mut who = || {
            next += 1;
            let vm = VmIdentity::new(next, 1);
            enforcement.register_as(vm, |spec| spec.label("l")).unwrap();
            vm
        };
        let hypervisor = TranslateHypervisor::default();
        let machines: Vec<_> = (0..MACHINES)
            .map(|machine| {
                let name = |region: usize| {
                    // The first, from which the processor loads, is one of those that go.
                    let kind = if region.is_multiple_of(2) { "cut" } else { "keep" };
                    format!("{kind}-{machine}-{region}")
                };
                let names: Vec<_> = (0..REGIONS).map(name).collect();
                Machine::new(&hypervisor, &enforcement, who(), &names)
            })
            .collect();
        let each = (CHANNELS - ALL_REGIONS) / GUESTS;
        let guests = (3..)
            .take(GUESTS)
            .map(|cid| {
                let mut guest = Guest::new(&enforcement, who(), cid);
                let ports = (0..u32::try_from(each).unwrap()).map(|port| 1 + port / 2 + port % 2 * CUT);
                let connections = ports.map(|port| guest.connect(&enforcement, port)).collect();
                (guest, connections)
            })
            .collect();
        Self { enforcement, guests, machines }
    }

    /// Takes half of them back. Processors load from memory meanwhile, and if `busy`, guests send through all sockets as fast as they can,
    /// which takes more threads than a small host has processors.
    ///
    /// # Panics
    /// If another half goes, or anything comes through what has gone.
    pub(crate) fn cut(self, busy: bool) -> Outcome {
        let Self { enforcement, guests, machines } = self;
        assert_eq!(enforcement.gatekeeper().open_channels().len(), CHANNELS);
        assert_eq!(enforcement.monitor().open_channels().len(), CHANNELS);
        let (stop, packets) = (AtomicBool::new(false), AtomicU64::new(0));
        let (begun, all, cut, guests) = thread::scope(|scope| {
            let users: Vec<_> = guests
                .into_iter()
                .map(|(mut guest, mut connections)| {
                    let (stop, packets) = (&stop, &packets);
                    scope.spawn(move || {
                        while !stop.load(Ordering::SeqCst) {
                            for (turn, connection) in connections.iter_mut().enumerate() {
                                guest.reaches_host(connection);
                                packets.fetch_add(1, Ordering::Relaxed);
                                // A guest that does not hear what it is told is not listened to after a while.
                                if turn % 64 == 0 {
                                    guest.resets();
                                }
                            }
                        }
                        (guest, connections)
                    })
                })
                .collect();
            while packets.load(Ordering::Relaxed) < 2 * CHANNELS as u64 {
                thread::sleep(Duration::from_millis(1));
            }
            if !busy {
                stop.store(true, Ordering::SeqCst);
                thread::sleep(Duration::from_millis(20));
            }
            let begun = Instant::now();
            let cut = enforcement.reload(Policy::parse(AFTER).unwrap()).unwrap();
            let all = begun.elapsed();
            stop.store(true, Ordering::SeqCst);
            let guests: Vec<_> = users.into_iter().map(|user| user.join().unwrap()).collect();
            (begun, all, cut, guests)
        });
        for (guest, connections) in guests {
            look_at_sockets(guest, connections);
        }
        let seen = machines.iter().map(|machine| look_at_regions(machine, begun)).collect();
        drop(machines);
        let (sockets, regions) = times(&cut);
        assert_eq!(sockets.len(), (CHANNELS - ALL_REGIONS) / 2);
        assert_eq!(regions.len(), ALL_REGIONS / 2);
        assert_eq!(enforcement.gatekeeper().open_channels(), [], "all guests are gone");
        assert_eq!(enforcement.monitor().open_channels(), []);
        Outcome { sockets, regions, all, seen, packets: packets.into_inner() }
    }
}

fn times(cut: &Cut) -> (Vec<Duration>, Vec<Duration>) {
    let is_socket = |object: &Object| matches!(object, Object::Vsock { .. });
    let (sockets, regions): (Vec<_>, Vec<_>) =
        cut.closed.iter().partition(|closed| is_socket(closed.channel.request.object()));
    let sorted = |closed: Vec<&vmm_devices::channel::ClosedChannel>| {
        let mut times: Vec<_> = closed.iter().map(|closed| closed.took).collect();
        times.sort();
        times
    };
    (sorted(sockets), sorted(regions))
}

/// What was cut is at its end on both sides, and nothing that its guest sends arrives; the others are as before.
fn look_at_sockets(mut guest: Guest, mut connections: Vec<Connection>) {
    // What was on its way when it was cut is there to be read, and then the end.
    for connection in &mut connections {
        connection.stream.set_nonblocking(true).unwrap();
        let mut room = [0; 4096];
        let end = loop {
            match connection.stream.read(&mut room) {
                Ok(1..) => {}
                end => break end,
            }
        };
        let ended =
            matches!(end, Ok(0)) || end.is_err_and(|error| error.kind() != std::io::ErrorKind::WouldBlock);
        assert_eq!(ended, connection.port >= CUT, "port {}", connection.port);
    }
    guest.resets();
    let cut = connections.iter().filter(|connection| connection.port >= CUT).count();
    assert_eq!(guest.open() as usize, connections.len() - cut);
    for connection in &mut connections {
        let arrives = guest.reaches_host(connection);
        assert_eq!(arrives, connection.port < CUT, "port {}", connection.port);
    }
    // Who sends into what was cut is told once more that it is no more.
    let resets = guest.resets();
    assert_eq!(resets, cut);
}

/// What was cut is mapped nowhere, and its guest's processor sees ones, whatever the host writes there; the others are as before. From the
/// reload's beginning until the processor has said so.
fn look_at_regions(machine: &Machine, begun: Instant) -> Duration {
    for (at, region) in machine.regions.iter().enumerate() {
        let device = region.device.lock().unwrap();
        let stays = region.name.starts_with("keep");
        assert_eq!(device.member().is_open(), stays, "{}", region.name);
        assert_eq!(device.mapped_at().is_some(), stays, "{}", region.name);
        drop(device);
        machine.write(at, 0x1234);
    }
    let patience = Instant::now();
    while machine.said_ns.load(Ordering::SeqCst) == 0 {
        assert!(patience.elapsed() < Duration::from_secs(30), "the processor has seen nothing");
        thread::sleep(Duration::from_millis(1));
    }
    // It loads all the time, and by the bus alone.
    thread::sleep(Duration::from_millis(10));
    assert_eq!(machine.wrong.load(Ordering::SeqCst), 0);
    let said = machine.start + Duration::from_nanos(machine.said_ns.load(Ordering::SeqCst));
    assert!(said >= begun, "before it was taken back");
    said - begun
}

/// The value below which so many hundredths of all are.
pub(crate) fn percentile(sorted: &[Duration], hundredths: usize) -> Duration {
    let at = (sorted.len() * hundredths).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied().unwrap_or_default()
}

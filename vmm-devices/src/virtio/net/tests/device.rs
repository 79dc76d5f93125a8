//! Features, configuration, queues, and what the monitor does.

use super::*;
use crate::channel::{AllowAll, Gatekeeper, NetworkAttach, Party, VmIdentity};
use crate::net::{FrameSocket, NetBackend as _};
use crate::testkit::StartError;
use crate::virtio::metrics::DeviceMetrics;

#[test]
fn what_is_offered_is_what_the_network_can_do() {
    let features = |network: TestNetwork| {
        let net = Net::builder(Arc::new(network), MAC).build().unwrap();
        VirtioDevice::<Memory>::features(&net)
    };
    let offloads = config::offered(Offloads::ALL, Offloads::ALL);
    assert_eq!(features(everything()), config::ALWAYS | offloads);
    assert_eq!(offloads & (feature::CSUM | feature::GUEST_USO4), feature::CSUM | feature::GUEST_USO4);
    let none = Offloads::NONE;
    assert_eq!(features(TestNetwork::new(1, none, none)), config::ALWAYS);
    assert_eq!(features(TestNetwork::with_mtu(9000)), config::ALWAYS | feature::MTU);
    // Without checksums the rest is nothing.
    assert_eq!(features(TestNetwork::new(1, Offloads::TSO4, none)), config::ALWAYS);
    let both = Offloads::CSUM | Offloads::TSO6;
    let expected = feature::CSUM | feature::HOST_TSO6;
    assert_eq!(features(TestNetwork::new(1, both, none)), config::ALWAYS | expected);
    let device = Net::builder(Arc::new(everything()), MAC).offloads(both, none).build().unwrap();
    assert_eq!(VirtioDevice::<Memory>::features(&device), config::ALWAYS | expected);
}

#[test]
fn features_that_need_others_are_refused_without() {
    let rig = Rig::new(0);
    let alone = [
        feature::GUEST_TSO4,
        feature::GUEST_CSUM | feature::GUEST_ECN,
        feature::HOST_TSO6,
        feature::CSUM | feature::HOST_ECN,
        feature::GUEST_USO4,
        feature::HOST_USO,
        feature::CTRL_RX,
        feature::CTRL_VLAN,
        feature::CTRL_MAC_ADDR,
        feature::GUEST_ANNOUNCE,
        feature::CTRL_GUEST_OFFLOADS,
    ];
    for features in alone {
        let started = rig.driver.start(features, &[(0, &rig.rx), (1, &rig.tx)]);
        assert!(matches!(started, Err(StartError::Features { .. })), "{features:#x}");
    }
    let started = rig.driver.start(feature::CSUM | feature::HOST_TSO4, &[(0, &rig.rx), (1, &rig.tx)]);
    assert_eq!(started, Ok(()));
    // Both of the first pair are needed, and the control queue where it was agreed upon.
    assert!(rig.driver.start(0, &[(0, &rig.rx)]).is_err());
    assert!(rig.driver.start(feature::CTRL_VQ, &[(0, &rig.rx), (1, &rig.tx)]).is_err());
}

#[test]
fn the_configuration_tells_address_link_queues_and_mtu() {
    let rig = Rig::new(ALL);
    let unknown = [0xff; 5];
    let config = |status: u8| [&MAC.0[..], &[status, 0, 1, 0, 0, 0], &unknown].concat();
    assert_eq!(rig.config()[..], config(1));
    let generation = rig.driver.config_generation();
    rig.line.take();
    rig.handle.set_link(false);
    assert_eq!(rig.config()[..], config(0));
    assert!(rig.driver.config_generation() != generation && rig.line.is_asserted());
    rig.handle.set_link(true);
    // A network with a speed, and without a link.
    rig.network.set_link(Link { up: true, speed: Some(10_000) });
    let config = rig.config();
    assert_eq!((config[6], &config[12..]), (1, &[0x10, 0x27, 0, 0, 1][..]));
    rig.network.set_link(Link::DOWN);
    assert_eq!(rig.config()[6], 0);
    assert!(!rig.handle.link().up);

    let rig = Rig::with(TestNetwork::with_mtu(0x2328), 0, |builder| builder);
    assert_eq!(rig.config()[10..12], [0x28, 0x23]);
    // Beyond it there is nothing, and nothing in it can be written.
    let mut beyond = [0xaa; 8];
    rig.driver.read_config(17, &mut beyond);
    rig.driver.write_config(0, &[0x55; 17]);
    assert_eq!((beyond, &rig.config()[..6]), ([0; 8], &MAC.0[..]));
}

#[test]
fn a_driver_that_can_is_asked_to_announce_itself() {
    let mut rig = Rig::new(ALL);
    assert!(rig.handle.announce());
    assert_eq!(rig.config()[6], 3);
    assert!(rig.command(3, 0, &[]));
    assert_eq!(rig.config()[6], 1);
    assert!(rig.handle.announce());
    rig.start(ALL);
    assert_eq!(rig.config()[6], 1, "a reset forgets it");
    for features in [ALL & !feature::GUEST_ANNOUNCE, ALL & !feature::STATUS] {
        rig.start(features);
        assert!(!rig.handle.announce());
    }
    rig.driver.set_status(0);
    assert!(!rig.handle.announce());
}

#[test]
fn what_no_device_can_be_is_refused() {
    let build = |network: TestNetwork| Net::builder(Arc::new(network), MAC);
    let message = |builder: NetBuilder| builder.build().unwrap_err().to_string();
    assert!(message(build(everything()).queue_size(3)).starts_with("a queue of 3 descriptors"));
    assert!(message(build(TestNetwork::with_mtu(67))).starts_with("an MTU of 67"));
    let two = NonZeroU16::new(2).unwrap();
    assert!(message(build(everything()).pairs(two)).starts_with("2 pairs of queues"));
    let broadcast = Net::builder(Arc::new(everything()), MacAddr::BROADCAST);
    assert!(message(broadcast).starts_with("ff:ff:ff:ff:ff:ff cannot be"));
    // One that cannot be attached stops the driver, and not the monitor.
    let mut rig = Rig::new(ALL);
    rig.network.set_failing(true);
    let queues = [(0, &rig.rx), (1, &rig.tx), (2, &rig.control)];
    assert!(matches!(rig.driver.start(ALL, &queues), Err(StartError::Status { .. })));
    rig.network.set_failing(false);
    rig.start(ALL);
}

/// Four pairs: frames go by the pair whose queue they were put into, and come by the one that they came for.
#[test]
fn each_pair_of_queues_has_a_port_of_its_own() {
    let network = TestNetwork::new(4, Offloads::NONE, Offloads::NONE);
    let net =
        Net::builder(Arc::new(network.clone()), MAC).pairs(NonZeroU16::new(4).unwrap()).build().unwrap();
    let memory = memory();
    let transport = VirtioMmio::new(net, memory.clone(), LineRecorder::default()).unwrap();
    let driver = MmioDriver::new(Arc::new(Mutex::new(transport)));
    for features in [feature::MQ | feature::CTRL_VQ | feature::MRG_RXBUF, feature::CTRL_VQ] {
        let several = features & feature::MQ != 0;
        let mut queues: Vec<_> = (0..9)
            .map(|queue| DriverQueue::new(memory.clone(), 0x1000 + queue * 0x400, 16).unwrap())
            .collect();
        let all: Vec<_> = (0..).zip(&queues).collect();
        driver.start(features, &all).unwrap();
        assert_eq!((network.agreed().unwrap().pairs, network.pairs()), (if several { 4 } else { 1 }, 1));
        // Without several, the control queue is that behind the first pair (5.1.2).
        let control = if several { 8 } else { 2 };
        for (pairs, obeyed) in [(4_u16, true), (0, false), (5, false), (0x8000, false)] {
            let chain = queues[control].put(COMMAND, &[&[4, 0][..], &pairs.to_le_bytes()].concat());
            chain.unwrap();
            queues[control].chain().readable(COMMAND, 4).writable(ANSWER, 1).submit().unwrap();
            driver.notify(u16::try_from(control).unwrap());
            assert_eq!(queues[control].take_used().unwrap().map(|(_, len)| len), Some(1));
            assert_eq!(queues[control].get(ANSWER, 1).unwrap() == [0], obeyed && several, "{pairs}");
        }
        assert_eq!(network.pairs(), if several { 4 } else { 1 });
        for pair in 0..if several { 4 } else { 1 } {
            let (rx, tx) = (usize::from(2 * pair), usize::from(2 * pair + 1));
            let sent = frame(PEER, 60 + usize::from(pair));
            queues[tx].put(SEND, &[&[0; HEADER][..], &sent].concat()).unwrap();
            queues[tx].chain().readable(SEND, 72 + u32::from(pair)).submit().unwrap();
            driver.notify(2 * pair + 1);
            assert_eq!(network.take_sent(), [TestFrame { pair, ..TestFrame::new(sent) }]);
            queues[rx].chain().writable(BUFFERS, BUFFER).submit().unwrap();
            network.give(TestFrame { pair, ..TestFrame::new(frame(MAC, 100)) });
            assert_eq!(queues[rx].take_used().unwrap().map(|(_, len)| len), Some(112), "{pair}");
        }
    }
}

/// Once the driver has been told that it uses fewer pairs, nothing comes by others, whatever waits there (5.1.6.5.6.2).
#[test]
fn nothing_comes_by_pairs_that_are_not_used() {
    let network = TestNetwork::new(2, Offloads::NONE, Offloads::NONE);
    let two = NonZeroU16::new(2).unwrap();
    let net = Net::builder(Arc::new(network.clone()), MAC).pairs(two).build().unwrap();
    let (memory, handle) = (memory(), net.handle());
    let transport = VirtioMmio::new(net, memory.clone(), LineRecorder::default()).unwrap();
    let driver = MmioDriver::new(Arc::new(Mutex::new(transport)));
    let mut queues: Vec<_> =
        (0..5).map(|queue| DriverQueue::new(memory.clone(), 0x1000 + queue * 0x400, 16).unwrap()).collect();
    let all: Vec<_> = (0..).zip(&queues).collect();
    driver.start(feature::MQ | feature::CTRL_VQ | feature::MRG_RXBUF, &all).unwrap();
    let use_pairs = |queues: &mut [DriverQueue<Memory>], pairs: u8| {
        queues[4].put(COMMAND, &[4, 0, pairs, 0]).unwrap();
        queues[4].chain().readable(COMMAND, 4).writable(ANSWER, 1).submit().unwrap();
        driver.notify(4);
        assert!(queues[4].take_used().unwrap().is_some() && queues[4].get(ANSWER, 1).unwrap() == [0]);
    };
    let offer = |queues: &mut [DriverQueue<Memory>]| {
        queues[2].chain().writable(BUFFERS, BUFFER).submit().unwrap();
        driver.notify(2);
    };
    let give = || network.give(TestFrame { pair: 1, ..TestFrame::new(frame(MAC, 100)) });
    // None is used but the first, until the driver says so.
    give();
    offer(&mut queues);
    assert_eq!(queues[2].take_used().unwrap(), None);
    use_pairs(&mut queues, 2);
    give();
    assert_eq!(queues[2].take_used().unwrap().map(|(_, len)| len), Some(112));
    // These find no buffers.
    (0..3).for_each(|_| give());
    assert_eq!(network.coming(), 3);
    use_pairs(&mut queues, 1);
    assert_eq!(network.coming(), 0, "they lead nowhere");
    offer(&mut queues);
    give();
    assert_eq!(queues[2].take_used().unwrap(), None);
    use_pairs(&mut queues, 2);
    assert_eq!(queues[2].take_used().unwrap(), None);
    give();
    assert!(queues[2].take_used().unwrap().is_some());
    assert_eq!((handle.counters().received, handle.counters().receive_dropped), (2, 5));
}

/// A backend that looks at the device when it hears what the driver wants.
struct Curious {
    network: TestNetwork,
    handle: Arc<std::sync::OnceLock<NetHandle>>,
    seen: Arc<Mutex<Vec<MacAddr>>>,
}

impl NetBackend for Curious {
    fn attach(
        &self,
        agreed: &Agreed,
        events: Arc<dyn crate::net::NetEvents>,
    ) -> Result<Vec<Box<dyn crate::net::NetPort>>, NetError> {
        self.network.attach(agreed, events)
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> Result<(), NetError> {
        self.network.set_receive_offloads(offloads)
    }

    fn set_filter(&self, filter: &RxFilter) {
        let now = self.handle.get().map(NetHandle::mac);
        assert!(now.is_none_or(|now| now == filter.mac));
        lock(&self.seen).extend(now);
    }
}

#[test]
fn a_backend_that_hears_of_wishes_may_look_at_the_device() {
    let (tell, told) = std::sync::mpsc::channel();
    // If it waits for itself, so does this thread, for ever.
    std::thread::spawn(move || {
        let (handle, seen) = (Arc::<std::sync::OnceLock<NetHandle>>::default(), Arc::default());
        let backend = Curious { network: everything(), handle: Arc::clone(&handle), seen: Arc::clone(&seen) };
        let net = Net::builder(Arc::new(backend), MAC).build().unwrap();
        handle.set(net.handle()).unwrap();
        let memory = memory();
        let transport = VirtioMmio::new(net, memory.clone(), LineRecorder::default()).unwrap();
        let driver = MmioDriver::new(Arc::new(Mutex::new(transport)));
        let [rx, tx, mut control] =
            [0x1000, 0x3000, 0x5000].map(|at| DriverQueue::new(memory.clone(), at, 16).unwrap());
        let features = feature::CTRL_VQ | feature::CTRL_MAC_ADDR;
        driver.start(features, &[(0, &rx), (1, &tx), (2, &control)]).unwrap();
        control.put(COMMAND, &[&[1, 1][..], &PEER.0].concat()).unwrap();
        control.chain().readable(COMMAND, 8).writable(ANSWER, 1).submit().unwrap();
        driver.notify(2);
        assert!(control.take_used().unwrap().is_some());
        driver.set_status(0);
        let seen = lock(&seen).clone();
        tell.send(seen).unwrap();
    });
    let seen = told.recv_timeout(std::time::Duration::from_secs(20)).unwrap();
    assert_eq!(seen.iter().filter(|mac| **mac == PEER).count(), 1, "{seen:?}");
    assert_eq!(seen.last(), Some(&MAC));
}

#[test]
fn frames_and_commands_are_counted() {
    let metrics = Arc::new(DeviceMetrics::default());
    let counted = Arc::clone(&metrics);
    let clock = Arc::new(ManualClock::new(0));
    let mut rig = Rig::with(everything(), ALL, |builder| builder.metrics(counted, Arc::clone(&clock)));
    rig.send(PacketInfo::default(), &frame(PEER, 100));
    rig.send_raw(&[0xff; HEADER], &frame(PEER, 100));
    rig.offer(BUFFER);
    rig.network.give(TestFrame::new(frame(MAC, 200)));
    rig.network.give(TestFrame::new(frame(MAC, 13)));
    rig.offer(BUFFER);
    assert!(rig.command(0, 0, &[1]) && !rig.command(9, 9, &[]));
    let taken = metrics.snapshot();
    let of = |totals: crate::virtio::metrics::Totals| (totals.requests, totals.bytes, totals.errors);
    assert_eq!([taken.write, taken.read, taken.other].map(of), [(2, 100, 1), (2, 200, 1), (2, 0, 1)]);
}

/// A right that is taken back while a driver is there: its cable is out, and no frame goes either way.
#[test]
fn a_network_that_is_no_longer_allowed_is_a_cable_that_is_out() {
    let gatekeeper = Gatekeeper::new(AllowAll);
    let vm = Party::Vm(VmIdentity::new(1, 1));
    let grant = gatekeeper.open(vm, None, NetworkAttach { network: "lan".into() }).unwrap();
    let id = grant.id();
    let (ours, theirs) = FrameSocket::pair().unwrap();
    let socket = Arc::new(FrameSocket::new(grant, ours, Offloads::NONE).unwrap());
    let net = Net::builder(socket.clone(), MAC).build().unwrap();
    let (memory, handle, line) = (memory(), net.handle(), LineRecorder::default());
    let transport = VirtioMmio::new(net, memory.clone(), line.clone()).unwrap();
    let driver = MmioDriver::new(Arc::new(Mutex::new(transport)));
    let [mut rx, mut tx] = [0x1000, 0x3000].map(|at| DriverQueue::new(memory.clone(), at, 16).unwrap());
    driver.start(feature::STATUS | feature::MRG_RXBUF, &[(0, &rx), (1, &tx)]).unwrap();
    let mut exchange = |sent: &[u8]| {
        tx.put(SEND, &[&[0; HEADER][..], sent].concat()).unwrap();
        tx.chain().readable(SEND, 112).submit().unwrap();
        driver.notify(1);
        assert!(tx.take_used().unwrap().is_some());
        let mut got = [0; 200];
        let out = rustix::io::read(&theirs, &mut got).map(|len| got[..len].to_vec());
        rustix::io::write(&theirs, &[&[0; HEADER][..], &frame(MAC, 50)].concat()).unwrap();
        rx.chain().writable(BUFFERS, BUFFER).submit().unwrap();
        driver.notify(0);
        (out.ok(), rx.take_used().unwrap().map(|(_, len)| len))
    };
    let sent = frame(PEER, 100);
    assert_eq!(exchange(&sent), (Some([&[0; HEADER][..], &sent].concat()), Some(62)));
    assert!(gatekeeper.revoke(id));
    assert!(!handle.link().up && !socket.link().up && line.is_asserted());
    assert_eq!(exchange(&sent), (None, None));
    assert_eq!(handle.counters().send_dropped, 1);
}

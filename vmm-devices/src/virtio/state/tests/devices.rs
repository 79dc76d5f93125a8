//! Devices other than disks, each in the middle of what it does.

use std::io::ErrorKind;
use std::num::NonZeroU16;

use super::*;
use crate::ManualClock;
use crate::channel::{AllowAll, Gatekeeper, Party, VmIdentity, VsockConnect};
use crate::net::{MacAddr, Offloads};
use crate::testkit::{DriverQueue, OutputRecorder, TestFrame, TestNetwork};
use crate::virtio::balloon::{self, Statistic};
use crate::virtio::console::{Console, PortConfig, PortEvent};
use crate::virtio::net::feature;
use crate::virtio::rate::{Limits, Rate, RateLimiter};
use crate::virtio::vsock::{Kind, Vsock};
use crate::virtio::{Balloon, Net, Rng};

fn queues<const N: usize>(machine: &Machine) -> [DriverQueue<Memory>; N] {
    let mut at = 0;
    [(); N].map(|()| {
        at += 0x1000;
        DriverQueue::new(machine.memory.clone(), at, 16).unwrap()
    })
}

fn start(machine: &Machine, features: u64, queues: &[&DriverQueue<Memory>]) {
    let queues: Vec<_> = (0..).zip(queues.iter().copied()).collect();
    machine.driver.start(features, &queues).unwrap();
}

#[test]
fn entropy_that_waits_for_a_limit_comes_elsewhere() {
    for bus in BUSES {
        let limits = Limits { bytes: Rate::new(1, 8), operations: None };
        let limiter = RateLimiter::new(ManualClock::new(0), limits);
        let machine = Machine::new(bus, Rng::new(std::io::repeat(1)).rate(limiter));
        let [mut queue] = queues(&machine);
        start(&machine, 0, &[&queue]);
        for place in 0..3 {
            queue.chain().writable(0x8000 + 16 * place, 8).submit().unwrap();
        }
        machine.driver.notify(0);
        assert_eq!(queue.take_used().unwrap(), Some((0, 8)));
        let machine = machine.moved(Rng::new(std::io::repeat(2)));
        let mut queue = queue.moved_to(machine.memory.clone());
        assert_eq!(queue.take_used().unwrap(), Some((1, 8)));
        assert_eq!(queue.take_used().unwrap(), Some((2, 8)));
        assert_eq!((queue.take_used().unwrap(), queue.used_index().unwrap()), (None, 3));
        let bytes = queue.get(0x8000, 40).unwrap();
        assert_eq!((&bytes[..8], &bytes[16..24], &bytes[32..]), (&[1; 8][..], &[2; 8][..], &[2; 8][..]));
    }
}

#[test]
fn what_was_signalled_is_so_elsewhere() {
    let machine = Machine::new(Bus::Mmio, Rng::new(std::io::repeat(1)));
    let [mut queue] = queues(&machine);
    start(&machine, 0, &[&queue]);
    queue.chain().writable(0x8000, 8).submit().unwrap();
    machine.driver.notify(0);
    assert!(machine.line.is_asserted());
    let machine = machine.moved_paused(Rng::new(std::io::repeat(1)), Arc::new(Inline));
    assert!(machine.line.is_asserted());

    // On PCI, a vector that is masked.
    let pci = Arc::new(Mutex::new(
        VirtioPci::new(Rng::new(std::io::repeat(1)), guest_memory(RAM).unwrap(), MsiRecorder::default())
            .unwrap(),
    ));
    let driver = PciDriver::new(pci.clone()).unwrap();
    let mut queue = DriverQueue::new(guest_memory(RAM).unwrap(), 0x1000, 16).unwrap();
    assert!(driver.start(0, &[(0, &queue)]).is_ok());
    assert!(driver.enable_messages());
    lock(&pci).pause();
    let mut state = lock(&pci).save().unwrap();
    let [.., vector] = &mut state.msix.entries[..] else { panic!("no vectors") };
    (vector.masked, vector.pending) = (true, true);
    let messages = MsiRecorder::default();
    let memory = guest_memory(RAM).unwrap();
    queue = queue.moved_to(memory.clone());
    let there =
        Arc::new(Mutex::new(VirtioPci::new(Rng::new(std::io::repeat(1)), memory, messages.clone()).unwrap()));
    let driver = PciDriver::new(there.clone()).unwrap();
    lock(&there).restore(&state).unwrap();
    lock(&there).resume().unwrap();
    assert!(messages.take().is_empty());
    // Who asks for the vectors again unmasks them.
    driver.enable_messages();
    assert_eq!(messages.take(), [(0xfee0_0000, 1)]);
    queue.chain().writable(0x8000, 8).submit().unwrap();
    driver.notify(0);
    assert_eq!((messages.take(), queue.take_used().unwrap()), (vec![(0xfee0_0000, 1)], Some((0, 8))));
}

#[test]
fn a_device_that_gave_up_stays_so_until_it_is_reset() {
    for bus in BUSES {
        let machine = Machine::new(bus, Rng::new(std::io::repeat(1)));
        let [mut queue] = queues(&machine);
        start(&machine, 0, &[&queue]);
        queue.chain().writable(0x8000, 8).submit().unwrap();
        queue.write_available_index(100).unwrap();
        machine.driver.notify(0);
        assert_eq!(machine.driver.status(), 0x4f);
        let machine = machine.moved(Rng::new(std::io::repeat(1)));
        assert_eq!(
            (machine.driver.status(), queue.moved_to(machine.memory.clone()).used_index().unwrap()),
            (0x4f, 0)
        );
        let [mut queue] = queues(&machine);
        start(&machine, 0, &[&queue]);
        queue.chain().writable(0x8000, 8).submit().unwrap();
        machine.driver.notify(0);
        assert_eq!(queue.take_used().unwrap(), Some((0, 8)));
    }
}

#[test]
fn a_driver_that_has_only_begun_goes_on() {
    for bus in BUSES {
        let machine = Machine::new(bus, Rng::new(std::io::repeat(1)));
        let queue = DriverQueue::new(machine.memory.clone(), 0x1000, 16).unwrap();
        machine.driver.set_status(3);
        machine.driver.set_driver_features(crate::virtio::feature::VERSION_1);
        machine.driver.set_status(11);
        machine.driver.set_queue(0, 16, queue.rings());
        let machine = machine.moved(Rng::new(std::io::repeat(1)));
        machine.driver.enable_queue(0);
        machine.driver.set_status(15);
        let mut queue = queue.moved_to(machine.memory.clone());
        queue.chain().writable(0x8000, 8).submit().unwrap();
        machine.driver.notify(0);
        assert_eq!((machine.driver.status(), queue.take_used().unwrap()), (15, Some((0, 8))));
    }
}

#[test]
fn output_of_which_a_part_was_written_and_input_that_waits() {
    for bus in BUSES {
        let screen = OutputRecorder::default();
        let (console, port) = Console::new(PortConfig::console(screen.clone()).size(80, 25)).unwrap();
        let machine = Machine::new(bus, console);
        let [rx, mut tx] = queues(&machine);
        start(&machine, 1, &[&rx, &tx]);
        screen.answer([Ok(3), Err(ErrorKind::WouldBlock)]);
        tx.put(0x8000, b"login: ").unwrap();
        tx.chain().readable(0x8000, 7).submit().unwrap();
        machine.driver.notify(1);
        assert_eq!((screen.take(), port.enqueue(b"root\n")), (b"log".to_vec(), 5));
        // Twice, the second time before anything was written.
        let blocked = OutputRecorder::default();
        blocked.block(true);
        let (console, _) = Console::new(PortConfig::console(blocked.clone()).size(80, 25)).unwrap();
        let machine = machine.moved_paused(console, Arc::new(Inline));
        let there = OutputRecorder::default();
        let (console, port) = Console::new(PortConfig::console(there.clone()).size(132, 50)).unwrap();
        let machine = machine.moved_paused(console, Arc::new(Inline));
        assert_eq!(port.enqueue(b"secret\n"), 7);
        machine.resume();
        let (mut rx, mut tx) = (rx.moved_to(machine.memory.clone()), tx.moved_to(machine.memory.clone()));
        assert_eq!((there.take(), tx.take_used().unwrap()), (b"in: ".to_vec(), Some((0, 0))));
        assert!(port.is_guest_open());
        rx.chain().writable(0x9000, 100).submit().unwrap();
        machine.driver.notify(0);
        assert_eq!(rx.take_used().unwrap(), Some((0, 12)));
        assert_eq!(rx.get(0x9000, 12).unwrap(), b"root\nsecret\n");
        let mut size = [0; 4];
        machine.driver.read_config(0, &mut size);
        assert_eq!(size, [132, 0, 50, 0]);
    }
}

#[test]
fn another_terminal_is_told_of_and_the_same_is_not() {
    for (columns, causes) in [(80, 0), (132, 2)] {
        let console =
            |columns| Console::new(PortConfig::console(std::io::sink()).size(columns, 25)).unwrap().0;
        let machine = Machine::new(Bus::Mmio, console(80));
        let [rx, tx] = queues(&machine);
        start(&machine, 1, &[&rx, &tx]);
        let Transport::Mmio(mmio) = &machine.transport else { panic!("which it is") };
        MmioDriver::new(mmio.clone()).acknowledge(3);
        let machine = machine.moved(console(columns));
        let Transport::Mmio(mmio) = &machine.transport else { panic!("which it is") };
        // The queues were looked at, where there was nothing.
        assert_eq!(MmioDriver::new(mmio.clone()).interrupt_status(), causes);
    }
}

#[test]
fn ports_that_the_driver_knows_are_not_announced_again() {
    for bus in BUSES {
        let device = || {
            let (console, ports) = Console::multiport(2).unwrap();
            let (opened, screen) = (Arc::<Mutex<Vec<bool>>>::default(), OutputRecorder::default());
            let heard = Arc::clone(&opened);
            let told = move |event: PortEvent<'_>| match event {
                PortEvent::GuestOpened => lock(&heard).push(true),
                PortEvent::GuestClosed => lock(&heard).push(false),
                _ => {}
            };
            let port = ports.add(1, PortConfig::channel("agent", screen.clone()).events(told)).unwrap();
            (console, port, screen, opened)
        };
        let (console, ..) = device();
        let machine = Machine::new(bus, console);
        let [rx0, tx0, mut control_rx, mut control_tx, mut rx1, mut tx1] = queues(&machine);
        start(&machine, 2, &[&rx0, &tx0, &control_rx, &control_tx, &rx1, &tx1]);
        for place in 0..8 {
            control_rx.chain().writable(0x1_0000 + 64 * place, 64).submit().unwrap();
        }
        let mut heard = 0;
        for (port, event) in [(0_u8, 0_u8), (1, 3), (1, 6)] {
            control_tx.put(0x9000, &[port, 0, 0, 0, event, 0, 1, 0]).unwrap();
            control_tx.chain().readable(0x9000, 8).submit().unwrap();
            machine.driver.notify(3);
        }
        while control_rx.take_used().unwrap().is_some() {
            heard += 1;
        }
        assert_eq!(heard, 3, "added, its name, open");
        let (console, port, screen, opened) = device();
        let machine = machine.moved(console);
        assert_eq!((&**lock(&opened), port.is_guest_open()), (&[true][..], true));
        let mut control_rx = control_rx.moved_to(machine.memory.clone());
        assert_eq!(control_rx.take_used().unwrap(), None);
        (rx1, tx1) = (rx1.moved_to(machine.memory.clone()), tx1.moved_to(machine.memory.clone()));
        tx1.put(0x8000, b"there").unwrap();
        tx1.chain().readable(0x8000, 5).submit().unwrap();
        machine.driver.notify(5);
        rx1.chain().writable(0x8100, 5).submit().unwrap();
        port.enqueue(b"here");
        assert_eq!((screen.take(), rx1.get(0x8100, 4).unwrap()), (b"there".to_vec(), b"here".to_vec()));
        // It hears of what is new.
        port.close();
        assert_eq!(control_rx.take_used().unwrap(), Some((3, 8)));
        assert_eq!(control_rx.get(0x1_0000 + 64 * 3, 8).unwrap(), [1, 0, 0, 0, 6, 0, 0, 0]);
    }
}

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 1]);

#[test]
fn what_a_driver_wants_of_frames_stays() {
    const FEATURES: u64 = feature::CSUM
        | feature::GUEST_CSUM
        | feature::GUEST_TSO4
        | feature::CTRL_GUEST_OFFLOADS
        | feature::STATUS
        | feature::MQ
        | feature::CTRL_VQ
        | feature::CTRL_RX
        | feature::CTRL_VLAN
        | feature::CTRL_MAC_ADDR
        | feature::GUEST_ANNOUNCE;
    for bus in BUSES {
        let network = || TestNetwork::new(2, Offloads::ALL, Offloads::ALL);
        let device = |network: &TestNetwork| {
            Net::builder(Arc::new(network.clone()), MAC).pairs(NonZeroU16::new(2).unwrap()).build().unwrap()
        };
        let here = network();
        let machine = Machine::new(bus, device(&here));
        let [rx0, mut tx0, rx1, tx1, mut control] = queues(&machine);
        start(&machine, FEATURES, &[&rx0, &tx0, &rx1, &tx1, &control]);
        let other = [0x52, 0x54, 0, 0, 0, 9];
        let table = [&[1, 0, 1, 0, 0, 0][..], &[2; 6], &[1, 0, 0, 0], &[3; 6]].concat();
        let commands: [&[u8]; 6] = [
            &[0, 0, 0],
            &table,
            &[&[1, 1][..], &other].concat(),
            &[2, 0, 7, 0],
            &[4, 0, 2, 0],
            &[5, 0, 2, 0, 0, 0, 0, 0, 0, 0],
        ];
        for (index, command) in commands.iter().enumerate() {
            // The table's class comes first, and it has two of one address each.
            let bytes = if index == 1 { [&[1, 0][..], &command[2..]].concat() } else { command.to_vec() };
            control.put(0x9000, &bytes).unwrap();
            let len = u32::try_from(bytes.len()).unwrap();
            control.chain().readable(0x9000, len).writable(0x9100, 1).submit().unwrap();
            machine.driver.notify(4);
            assert_eq!(control.get(0x9100, 1).unwrap(), [0], "command {index}");
        }
        // A frame for which there is no room.
        here.set_full(true);
        tx0.put(0xa000, &[0; 12]).unwrap();
        tx0.put(0xa00c, &[5; 60]).unwrap();
        tx0.chain().readable(0xa000, 72).submit().unwrap();
        machine.driver.notify(1);
        let wanted = here.filter().unwrap();
        let there = network();
        let machine = machine.moved_paused(device(&there), Arc::new(Inline));
        assert_eq!((there.filter().unwrap(), there.pairs()), (wanted.clone(), 2));
        assert_eq!(there.agreed().unwrap().receive, Offloads::CSUM);
        assert!(!wanted.promiscuous && wanted.mac == MacAddr(other) && wanted.vlans.is_some());
        assert!(there.take_sent().is_empty(), "it is paused");
        machine.resume();
        let sent: Vec<_> = there.take_sent().into_iter().map(|frame| frame.bytes).collect();
        assert_eq!((sent, here.take_sent()), (vec![vec![5; 60]], vec![]));
        let mut tx0 = tx0.moved_to(machine.memory.clone());
        assert_eq!((tx0.take_used().unwrap(), tx0.take_used().unwrap()), (Some((0, 0)), None));
        // Its network is to hear where it is.
        let mut config = [0; 8];
        machine.driver.read_config(0, &mut config);
        assert_eq!((&config[..6], config[6]), (&other[..], 3));
        let mut control = control.moved_to(machine.memory.clone());
        control.put(0x9000, &[3, 0]).unwrap();
        control.chain().readable(0x9000, 2).writable(0x9100, 1).submit().unwrap();
        machine.driver.notify(4);
        machine.driver.read_config(0, &mut config);
        assert_eq!(config[6], 1);
        // What is not wanted is not given, and what is, is.
        let mut rx0 = rx0.moved_to(machine.memory.clone());
        rx0.chain().writable(0xb000, 1600).submit().unwrap();
        machine.driver.notify(0);
        for address in [[8; 6], other] {
            there.give(TestFrame::new([&address[..], &[1; 54]].concat()));
        }
        assert_eq!(rx0.take_used().unwrap(), Some((0, 72)));
        assert_eq!(rx0.get(0xb00c, 6).unwrap(), other);
        // The next driver begins anew.
        machine.driver.set_status(0);
        machine.driver.read_config(0, &mut config);
        assert_eq!((&config[..6], there.filter().unwrap().promiscuous), (&MAC.0[..], true));
    }
}

#[test]
fn a_network_that_fails_there_leaves_a_new_device() {
    for bus in BUSES {
        let device = |network: &TestNetwork| Net::builder(Arc::new(network.clone()), MAC).build().unwrap();
        let network = || TestNetwork::new(1, Offloads::NONE, Offloads::NONE);
        let machine = Machine::new(bus, device(&network()));
        let [rx, tx] = queues(&machine);
        start(&machine, 0, &[&rx, &tx]);
        machine.pause();
        let saved = machine.save();
        let other = network();
        let there = Machine::with(bus, device(&other), copy_of(&machine.memory), Arc::new(Inline));
        let before = there.save();
        other.set_failing(true);
        assert!(matches!(there.restore(&saved), Err(VirtioStateError::Start(_))));
        assert_eq!((there.save(), there.driver.status()), (before, 0));
        other.set_failing(false);
        there.restore(&saved).unwrap();
        assert_eq!(there.driver.status(), 15);
    }
}

struct Nothing;

impl balloon::MemoryRelease for Nothing {
    fn release(&self, _gpa: GuestAddress, _len: u64) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_balloon_keeps_what_it_holds_and_what_was_asked_of_it() {
    for bus in BUSES {
        let balloon = Balloon::new(Nothing);
        let handle = balloon.handle();
        handle.set_target(500);
        let machine = Machine::new(bus, balloon);
        let [inflate, deflate, mut statistics] = queues(&machine);
        start(&machine, balloon::feature::STATS_VQ, &[&inflate, &deflate, &statistics]);
        machine.driver.write_config(4, &300_u32.to_le_bytes());
        statistics.put(0x8000, &[5, 0, 9, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        statistics.chain().readable(0x8000, 10).submit().unwrap();
        machine.driver.notify(2);
        assert_eq!(handle.statistics().unwrap().get(Statistic::MEMTOT), Some(9));
        let balloon = Balloon::new(Nothing);
        let handle = balloon.handle();
        let machine = machine.moved(balloon);
        assert_eq!((handle.target(), handle.actual()), (500, 300));
        assert_eq!(handle.statistics(), None, "these were heard elsewhere");
        let mut statistics = statistics.moved_to(machine.memory.clone());
        assert_eq!(statistics.take_used().unwrap(), None);
        assert!(handle.request_statistics());
        assert_eq!(statistics.take_used().unwrap(), Some((0, 0)));
        statistics.put(0x8000, &[5, 0, 8, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        statistics.chain().readable(0x8000, 10).submit().unwrap();
        machine.driver.notify(2);
        assert_eq!(handle.statistics().unwrap().get(Statistic::MEMTOT), Some(8));
    }
}

#[test]
fn sockets_end_and_the_driver_is_told() {
    for bus in BUSES {
        let gatekeeper = Gatekeeper::new(AllowAll);
        let guest = Party::Vm(VmIdentity::new(1, 1));
        let device =
            |cid| Vsock::builder(cid, || 0).gatekeeper(guest.clone(), gatekeeper.clone()).build().unwrap();
        let connect = |handle: &crate::virtio::vsock::VsockHandle| {
            let host = Party::Host("monitor".into());
            let grant = gatekeeper.open(host, Some(guest.clone()), VsockConnect { port: 52 }).unwrap();
            handle.connect(grant, Kind::Stream).unwrap()
        };
        let vsock = device(3);
        let handle = vsock.handle();
        let machine = Machine::new(bus, vsock);
        let [mut rx, tx, mut event] = queues(&machine);
        start(&machine, 1, &[&rx, &tx, &event]);
        rx.chain().writable(0x8000, 4096).submit().unwrap();
        event.chain().writable(0x9000, 8).submit().unwrap();
        let mut stream = std::os::unix::net::UnixStream::from(connect(&handle));
        assert!(rx.take_used().unwrap().is_some());
        machine.pause();
        machine.resume();
        assert_eq!(
            (handle.counters().connections, event.take_used().unwrap()),
            (1, None),
            "a pause ends nothing"
        );
        let vsock = device(4);
        let handle = vsock.handle();
        let machine = machine.moved(vsock);
        assert_eq!(std::io::Read::read(&mut stream, &mut [0; 8]).unwrap(), 0, "its end");
        let (mut rx, mut event) =
            (rx.moved_to(machine.memory.clone()), event.moved_to(machine.memory.clone()));
        assert_eq!(event.take_used().unwrap(), Some((0, 4)));
        assert_eq!(event.get(0x9000, 4).unwrap(), [0; 4], "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
        let mut cid = [0; 8];
        machine.driver.read_config(0, &mut cid);
        assert_eq!(u64::from_le_bytes(cid), 4);
        rx.chain().writable(0x8000, 4096).submit().unwrap();
        machine.driver.notify(0);
        let _stream = connect(&handle);
        assert!(rx.take_used().unwrap().is_some(), "it can be called here");
    }
}

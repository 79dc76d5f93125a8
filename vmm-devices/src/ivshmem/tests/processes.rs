//! Server and clients, by sockets, as between processes.

use std::os::unix::net::UnixStream;

use super::*;
use crate::ivshmem::server::{ClientConfig, Message, PeerInfo, Receiver};
use crate::virtio::rate::Rate;
use crate::virtio::{DoorbellHost, GuestDoorbell};

pub(super) fn server(name: &str, vectors: u16) -> Server {
    Server::builder(region(name), vectors, Gatekeeper::new(AllowAll)).unbound().unwrap()
}

pub(super) fn client(server: &Server, config: ClientConfig) -> Client {
    let (theirs, ours) = UnixStream::pair().unwrap();
    server.admit(theirs).unwrap();
    Client::over(ours, Arc::clone(server.region().name()), config).unwrap()
}

fn seat(client: Client, access: Access) -> Member {
    let (map, ring) = rights(&Gatekeeper::new(AllowAll), "r", access);
    client.join(map, Some(ring)).unwrap()
}

pub(super) fn machine(server: &Server, config: ClientConfig) -> Machine {
    let machine = Machine::ready(seat(client(server, config), Access::ReadWrite));
    let own = machine.register(2) as u16;
    holds("its own vectors", || lock(&machine.function).member().peers().contains(&own));
    machine
}

pub(super) fn sees(machine: &Machine, peers: &[u16]) {
    holds("peers", || lock(&machine.function).member().peers() == peers);
}

fn hears(machine: &Machine, vectors: &[u32]) {
    let mut heard = Vec::new();
    holds("rings", || {
        heard.extend(machine.heard());
        // Behind what was rung before.
        heard.ends_with(vectors)
    });
}

#[test]
fn devices_of_several_processes_meet() {
    let server = server("r", 2);
    for config in [ClientConfig::default(), ClientConfig::default().rings_directly(true)] {
        let config = config.vectors(2);
        let (a, b) = (machine(&server, config), machine(&server, config));
        let (one, two) = (a.register(2) as u16, b.register(2) as u16);
        sees(&a, &[one, two]);
        sees(&b, &[one, two]);
        a.write(2, 0x100, &[1, 2, 3, 4]);
        assert_eq!(b.read(2, 0x100), [1, 2, 3, 4]);
        // One ring that arrives: a second one could come behind what others ring later.
        holds("all vectors", || {
            let before = a.figures().no_vector;
            a.ring(two, 1);
            a.figures().no_vector == before
        });
        hears(&b, &[1]);
        b.ring(one, 0);
        hears(&a, &[0]);
        b.ring(two, 0);
        hears(&b, &[0]);
        drop(b);
        sees(&a, &[one]);
        a.ring(two, 0);
        assert_eq!(a.figures().no_peer, 1);
        drop(a);
        holds("that both are gone", || server.peers().is_empty());
    }
}

#[test]
fn the_server_says_what_the_protocol_has() {
    let server = server("r", 2);
    let first = machine(&server, ClientConfig::default().vectors(2));
    let (theirs, ours) = UnixStream::pair().unwrap();
    assert_eq!(server.admit(theirs).unwrap(), 1);
    let mut receiver = Receiver::new();
    let mut said = Vec::new();
    let mut next = || {
        let Message { number, descriptor } = eventually("a message", || receiver.receive(&ours).unwrap());
        (number, descriptor.is_some())
    };
    (0..7).for_each(|_| said.push(next()));
    // Version, position, memory, the vectors of the peer, its own.
    assert_eq!(said, [(0, false), (1, false), (-1, true), (0, true), (0, true), (1, true), (1, true)]);
    drop(first);
    assert_eq!(next(), (0, false), "a peer is gone");
    let PeerInfo { position, access, rings, .. } = server.peers().remove(0);
    assert_eq!((position, access, rings), (1, Access::ReadWrite, true));
}

#[test]
fn a_client_with_fewer_or_more_vectors_has_what_there_is() {
    let server = server("r", 2);
    let (few, many) =
        (machine(&server, ClientConfig::default()), machine(&server, ClientConfig::default().vectors(8)));
    sees(&few, &[0, 1]);
    sees(&many, &[0, 1]);
    holds("the surplus", || few.figures().beyond_limits >= 2);
    holds("both vectors of itself", || {
        many.ring(1, 1);
        many.heard().contains(&1)
    });
    let before = many.figures().no_vector;
    many.ring(1, 2);
    assert_eq!(many.figures().no_vector, before + 1);
    few.ring(0, 0);
    hears(&few, &[0]);
}

#[test]
fn who_may_only_read_cannot_write_in_any_way() {
    let wanted = |_: &Party| Access::ReadOnly;
    let server = Server::builder(region("r"), 1, Gatekeeper::new(AllowAll)).access(wanted).unbound().unwrap();
    let client = client(&server, ClientConfig::default());
    assert_eq!(client.access(), Access::ReadOnly);
    let (map, ring) = rights(&Gatekeeper::new(AllowAll), "r", Access::ReadWrite);
    assert!(matches!(client.join(map, Some(ring)), Err(IvshmemError::Access { .. })));
    // The descriptor itself.
    let (theirs, ours) = UnixStream::pair().unwrap();
    server.admit(theirs).unwrap();
    let mut receiver = Receiver::new();
    let memory =
        eventually("the memory", || receiver.receive(&ours).unwrap().and_then(|said| said.descriptor));
    rustix::io::write(&memory, b"x").unwrap_err();
    rustix::fs::ftruncate(&memory, 0).unwrap_err();
    let peer = vmm_memory::PeerMemory::from_fd(memory).unwrap();
    assert!(peer.map(GuestAddress(0), Access::ReadWrite).is_err());
}

#[test]
fn the_gate_of_the_server_decides() {
    use crate::channel::{Action, Refusal, Request};
    let refused = Arc::new(Mutex::new(vec![]));
    let rule = Arc::clone(&refused);
    let gatekeeper = Gatekeeper::new(move |request: &Request| {
        let refused: std::sync::MutexGuard<'_, Vec<Action>> = rule.lock().unwrap();
        if refused.contains(&request.action()) { Err(Refusal::new("no")) } else { Ok(()) }
    });
    let server = Server::builder(region("r"), 1, gatekeeper.clone()).unbound().unwrap();
    let (loud, quiet) = (machine(&server, ClientConfig::default()), {
        refused.lock().unwrap().push(Action::Notify);
        machine(&server, ClientConfig::default())
    });
    sees(&loud, &[0, 1]);
    loud.ring(1, 0);
    hears(&quiet, &[0]);
    quiet.ring(0, 0);
    assert_eq!(quiet.figures().no_peer, 1, "it was told of nobody");
    // What lost its right since is taken back, also that of the one that has it.
    gatekeeper.reconsider();
    sees(&loud, &[0]);
    refused.lock().unwrap().push(Action::MapReadWrite);
    let (theirs, ours) = UnixStream::pair().unwrap();
    assert!(matches!(server.admit(theirs), Err(IvshmemError::Revoked { .. })));
    assert!(Receiver::new().receive(&ours).is_err(), "the end is all that it hears");
    let begun = Instant::now();
    assert_eq!(gatekeeper.reconsider().len(), 2);
    holds("both to close", || !loud.is_open() && !quiet.is_open());
    println!("revoked at the server, unmapped at the clients: {} us", begun.elapsed().as_nanos() / 1000);
    assert_eq!((loud.read(2, 0), lock(&loud.guest.sees).len()), ([0xff; 4], 0));
    assert_eq!((server.peers().len(), gatekeeper.open_channels().len()), (0, 0));
}

#[test]
fn a_client_is_disconnected_and_the_others_hear_of_it() {
    let server = server("r", 1);
    let (a, b) = (machine(&server, ClientConfig::default()), machine(&server, ClientConfig::default()));
    sees(&b, &[0, 1]);
    assert!(server.disconnect(0) && !server.disconnect(0) && !server.disconnect(77));
    holds("it to close", || !a.is_open());
    sees(&b, &[1]);
}

#[test]
fn the_end_of_the_server_is_that_of_who_depends_on_it() {
    let server = server("r", 1);
    let config = ClientConfig::default();
    let (leaves, stays, other) = (
        machine(&server, config),
        machine(&server, config.outlives_server(true)),
        machine(&server, config.outlives_server(true)),
    );
    sees(&stays, &[0, 1, 2]);
    drop(server);
    holds("it to close", || !leaves.is_open());
    // They go on with each other.
    stays.write(2, 0, &[8]);
    assert_eq!(other.read(2, 0), [8]);
    stays.ring(2, 0);
    hears(&other, &[0]);
    assert!(stays.is_open());
}

#[test]
fn interrupts_beyond_the_rate_wait_and_are_one() {
    let server = server("r", 1);
    let rate = Rate::new(20, 1);
    let slow = machine(&server, ClientConfig::default().interrupt_rate(rate));
    let peer = machine(&server, ClientConfig::default().rings_directly(true));
    sees(&peer, &[0, 1]);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(200) {
        peer.ring(0, 0);
    }
    holds("the last of them", || slow.figures().received >= 2);
    let limit = 2 + begun.elapsed().as_millis() as u64 / 50;
    assert!(slow.figures().received <= limit, "{} of {limit}", slow.figures().received);
    assert!(peer.figures().rung > 100);
    drop(slow);
}

/// A kernel that keeps what it is asked.
#[derive(Clone, Default)]
struct Kernel(Arc<Mutex<Vec<GuestDoorbell>>>);

impl DoorbellHost for Kernel {
    fn attach(&mut self, doorbell: &GuestDoorbell) -> bool {
        lock(&self.0).push(doorbell.clone());
        true
    }

    fn detach(&mut self, doorbell: &GuestDoorbell) {
        let mut attached = lock(&self.0);
        let at = attached.iter().position(|other| (other.gpa, other.value) == (doorbell.gpa, doorbell.value));
        attached.remove(at.expect("what is attached"));
    }
}

#[test]
fn a_kernel_rings_where_the_registers_are() {
    let server = server("r", 2);
    let kernel = Kernel::default();
    let member = seat(client(&server, ClientConfig::default().vectors(2)), Access::ReadWrite);
    let machine = Machine::with(member, |builder| builder.doorbells(kernel.clone()));
    machine.start();
    let peer = self::machine(&server, ClientConfig::default().vectors(2));
    let values = || {
        let base = machine.bar(0) + 12;
        let mut values: Vec<u64> = lock(&kernel.0)
            .iter()
            .map(|doorbell| {
                assert_eq!((doorbell.gpa.0, doorbell.width), (base, 4));
                doorbell.value
            })
            .collect();
        values.sort_unstable();
        values
    };
    holds("four doorbells", || values() == [0, 1, 0x1_0000, 0x1_0001]);
    let fd = lock(&kernel.0).iter().find(|doorbell| doorbell.value == 0x1_0001).unwrap().fd.clone();
    super::super::eventfd::signal(&fd);
    hears(&peer, &[1]);
    let base = machine.bar(0);
    machine.configure(0x10, &((base + 0x20_0000) as u32).to_le_bytes());
    assert_eq!((values().len(), machine.bar(0)), (4, base + 0x20_0000));
    drop(peer);
    holds("two to be left", || values() == [0, 1]);
    lock(&machine.function).member().close();
    assert_eq!(values().len(), 0);
}

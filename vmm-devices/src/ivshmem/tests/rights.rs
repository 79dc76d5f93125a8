//! What a right opens, and what its revocation does while a guest runs.

use super::*;
use crate::channel::{Gate, GrantId, Refusal, Request};

#[test]
fn a_right_to_another_region_opens_nothing() {
    let hub = Hub::new(region("mine"), 1).unwrap();
    let gatekeeper = Gatekeeper::new(AllowAll);
    let (other, _) = rights(&gatekeeper, "theirs", Access::ReadWrite);
    let error = hub.join(other, None).unwrap_err();
    assert_eq!(error.to_string(), "a grant for region \"theirs\" opens no region \"mine\"");
    let (mine, _) = rights(&gatekeeper, "mine", Access::ReadWrite);
    let (_, ring) = rights(&gatekeeper, "theirs", Access::ReadWrite);
    assert!(matches!(hub.join(mine, Some(ring)), Err(IvshmemError::WrongRegion { .. })));
    let (late, _) = rights(&gatekeeper, "mine", Access::ReadWrite);
    gatekeeper.revoke(late.id());
    assert!(matches!(hub.join(late, None), Err(IvshmemError::Revoked { .. })));
    assert_eq!((hub.members(), gatekeeper.open_channels().len()), (vec![], 0), "all are given back");
}

#[test]
fn without_the_right_to_ring_others_ring() {
    let hub = Hub::new(region("quiet"), 1).unwrap();
    let (map, _) = rights(&Gatekeeper::new(AllowAll), "quiet", Access::ReadWrite);
    let quiet = Machine::ready(hub.join(map, None).unwrap());
    let other = Machine::ready(join(&hub));
    quiet.ring(1, 0);
    quiet.ring(0, 0);
    other.ring(0, 0);
    assert_eq!((quiet.figures().no_right, quiet.heard(), other.heard()), (2, vec![0], vec![]));
}

/// A gate that writes down when a channel is closed, beside what the guest's machine is told.
struct Diary(Recorder<String>);

impl Gate for Diary {
    fn decide(&self, _: GrantId, _: &Request) -> Result<(), Refusal> {
        Ok(())
    }

    fn closed(&self, _: GrantId, request: &Request) {
        self.0.record(request.action().to_string());
    }
}

#[test]
fn a_revocation_quiesces_unmaps_drains_and_closes() {
    let hub = Hub::new(region("revoked"), 2).unwrap();
    let told = Recorder::default();
    let gatekeeper = Gatekeeper::new(Diary(told.clone()));
    let (map, ring) = rights(&gatekeeper, "revoked", Access::ReadWrite);
    let id = map.id();
    let member = hub.join(map, Some(ring)).unwrap();
    let guest = Guest { told: told.clone(), ..Guest::default() };
    let machine = Machine::with(member, |builder| builder.mapper(guest.clone()));
    machine.start();
    let peer = Machine::ready(join(&hub));
    machine.write(2, 0, &[1; 8]);
    machine.set_vector(1, true);
    peer.ring(0, 1);
    let home = machine.bar(2);
    told.take();

    let begun = Instant::now();
    assert!(gatekeeper.revoke(id));
    let took = begun.elapsed();
    assert_eq!(told.take(), [format!("unmap {home:#x}"), "notify".to_owned(), "map-rw".to_owned()]);
    println!("revoked in {} us", took.as_nanos() / 1000);
    assert_eq!(guest.load(home), None);
    assert_eq!(machine.read(2, 0), [0xff; 8]);
    machine.write(2, 0, &[2; 8]);
    assert_eq!(peer.read(2, 0), [1; 8]);
    machine.ring(1, 0);
    machine.ring(0, 0);
    peer.ring(0, 0);
    assert_eq!((peer.heard(), peer.figures().no_peer, machine.figures().no_right), (vec![], 1, 2));
    machine.set_vector(1, false);
    assert_eq!(machine.heard(), Vec::<u32>::new(), "what was pending is forgotten");
    // The function stays where it is, and no move brings the memory back.
    machine.configure(COMMAND, &[0, 0]);
    machine.configure(COMMAND, &DECODE.to_le_bytes());
    assert_eq!((told.take(), machine.read(2, 8)), (vec![], [0xff; 8]));
    assert_eq!((hub.members(), machine.is_open()), (vec![1], false));
    assert_eq!(machine.register(2), 0, "registers answer");
}

#[test]
fn the_right_to_ring_is_taken_alone() {
    let hub = Hub::new(region("silenced"), 1).unwrap();
    let gatekeeper = Gatekeeper::new(AllowAll);
    let (map, ring) = rights(&gatekeeper, "silenced", Access::ReadWrite);
    let id = ring.id();
    let machine = Machine::ready(hub.join(map, Some(ring)).unwrap());
    let peer = Machine::ready(join(&hub));
    machine.ring(1, 0);
    assert_eq!(peer.heard(), [0]);
    gatekeeper.revoke(id);
    machine.ring(1, 0);
    peer.ring(0, 0);
    let third = Machine::ready(join(&hub));
    machine.ring(2, 0);
    assert_eq!((peer.heard(), machine.heard(), third.heard()), (vec![], vec![0], vec![]));
    machine.write(2, 0, &[4]);
    assert_eq!((peer.read(2, 0), gatekeeper.open_channels().len()), ([4], 1));
}

#[test]
fn memory_that_stays_in_reach_is_kept() {
    let hub = Hub::new(region("stuck"), 1).unwrap();
    let machine = Machine::ready(join(&hub));
    let home = machine.bar(2);
    *lock(&machine.guest.stuck) = true;
    lock(&machine.function).member().close();
    assert_eq!(machine.figures().map_failures, 1);
    assert_eq!(machine.guest.load(home), Some(0), "the mapping is still one");
    assert_eq!(machine.read(2, 0), [0xff; 4], "and the bus leads nowhere");
    *lock(&machine.guest.stuck) = false;
    lock(&machine.function).member().close();
    assert_eq!(machine.guest.load(home), None, "a second try");
}

#[test]
fn revocations_while_peers_ring_and_move_leave_nothing_behind() {
    let hub = Hub::new(region("busy"), 2).unwrap();
    let gatekeeper = Gatekeeper::new(AllowAll);
    let steady = Arc::new(Machine::ready(join(&hub)));
    for round in 0..50_u64 {
        let (map, ring) = rights(&gatekeeper, "busy", Access::ReadWrite);
        let id = map.id();
        let machine = Arc::new(Machine::ready(hub.join(map, Some(ring)).unwrap()));
        let position = machine.register(2) as u16;
        thread::scope(|scope| {
            scope.spawn(|| (0..200).for_each(|_| steady.ring(position, 1)));
            scope.spawn(|| (0..200).for_each(|_| machine.ring(0, 0)));
            scope.spawn(|| {
                for n in 0..50 {
                    machine.configure(COMMAND, &[n % 2 * 2, 0]);
                }
            });
            scope.spawn(|| {
                thread::sleep(Duration::from_micros(round * 20));
                assert!(gatekeeper.revoke(id));
                assert_eq!(lock(&machine.guest.sees).len(), 0, "when it returns");
            });
        });
        assert_eq!((lock(&machine.guest.sees).len(), gatekeeper.open_channels().len()), (0, 0));
    }
    assert_eq!(hub.members(), [0]);
}

#[test]
fn positions_are_not_used_again_at_once() {
    let hub = Hub::new(region("seats"), 1).unwrap();
    let first = join(&hub);
    drop(join(&hub));
    assert_eq!((first.position(), join(&hub).position()), (0, 2));
    assert_eq!(hub.members(), [0]);
    let (map, ring) = rights(&Gatekeeper::new(AllowAll), "seats", Access::ReadWrite);
    assert!(matches!(hub.join_at(0, map, Some(ring)), Err(IvshmemError::Taken { position: 0, .. })));
    let members: Vec<Member> = (1..MAX_PEERS).map(|_| join(&hub)).collect();
    let (map, ring) = rights(&Gatekeeper::new(AllowAll), "seats", Access::ReadWrite);
    assert!(matches!(hub.join(map, Some(ring)), Err(IvshmemError::Full { .. })));
    assert_eq!(members.len(), MAX_PEERS - 1);
    let figures = first.figures();
    assert_eq!((first.peers().len(), figures.rung), (MAX_PEERS, 0));
}

/// A gate that looks at the hub when it hears of an end, from a thread of its own, so that the test ends whatever is locked.
struct Looks {
    hub: Hub,
    found: std::sync::mpsc::Sender<Vec<u16>>,
}

impl Gate for Looks {
    fn decide(&self, _: GrantId, _: &Request) -> Result<(), Refusal> {
        Ok(())
    }

    fn closed(&self, _: GrantId, _: &Request) {
        let (hub, found) = (self.hub.clone(), self.found.clone());
        let (tell, told) = std::sync::mpsc::channel();
        thread::spawn(move || {
            let (Ok(()) | Err(_)) = found.send(hub.members());
            tell.send(())
        });
        // As if it had looked itself.
        let (Ok(()) | Err(_)) = told.recv_timeout(Duration::from_secs(2));
    }
}

/// The gate hears of the rights of who gets no seat, and may call the hub then.
#[test]
fn a_gate_that_hears_of_a_refused_seat_may_ask_the_hub() {
    let hub = Hub::new(region("asked"), 1).unwrap();
    let (found, finds) = std::sync::mpsc::channel();
    let gatekeeper = Gatekeeper::new(Looks { hub: hub.clone(), found });
    let expect = |members: &[u16], rights: usize| {
        for _ in 0..rights {
            // Sent by the time that `join` has returned, if the hub was not locked.
            assert_eq!(finds.try_recv().expect("the hub answers while it refuses"), members);
        }
    };
    let (_, ring) = rights(&gatekeeper, "asked", Access::ReadWrite);
    expect(&[], 1);
    let (other, mine) = rights(&gatekeeper, "theirs", Access::ReadWrite);
    drop(mine);
    expect(&[], 1);
    assert!(matches!(hub.join(other, Some(ring)), Err(IvshmemError::WrongRegion { .. })));
    expect(&[], 2);
    let members: Vec<Member> = (0..MAX_PEERS).map(|_| join(&hub)).collect();
    let all = hub.members();
    assert_eq!(all.len(), MAX_PEERS);
    let (map, ring) = rights(&gatekeeper, "asked", Access::ReadWrite);
    assert!(matches!(hub.join(map, Some(ring)), Err(IvshmemError::Full { .. })));
    expect(&all, 2);
    let (map, ring) = rights(&gatekeeper, "asked", Access::ReadWrite);
    assert!(matches!(hub.join_at(all[7], map, Some(ring)), Err(IvshmemError::Taken { .. })));
    expect(&all, 2);
    drop(members);
}

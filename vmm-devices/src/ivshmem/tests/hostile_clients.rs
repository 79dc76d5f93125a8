//! Clients that do not keep to the protocol, and their server.

use std::io::Write as _;
use std::os::unix::net::UnixStream;

use super::processes::{machine, sees, server};
use super::*;
use crate::ivshmem::server::ClientConfig;

#[test]
fn whoever_says_something_is_disconnected() {
    let server = server("r", 1);
    let good = machine(&server, ClientConfig::default());
    let (theirs, mut ours) = UnixStream::pair().unwrap();
    server.admit(theirs).unwrap();
    sees(&good, &[0, 1]);
    ours.write_all(b"0").unwrap();
    sees(&good, &[0]);
    assert_eq!(server.peers().len(), 1);
}

/// One that never reads, while others come and go: what is kept for it is bounded by who is there, and nobody waits for it.
#[test]
fn what_a_client_does_not_read_is_bounded() {
    let server = Server::builder(region("r"), 8, Gatekeeper::new(AllowAll)).max_peers(3).unbound().unwrap();
    let (theirs, _deaf) = UnixStream::pair().unwrap();
    assert_eq!(server.admit(theirs).unwrap(), 0);
    for _ in 0..400 {
        let (theirs, ours) = UnixStream::pair().unwrap();
        server.admit(theirs).unwrap();
        drop(ours);
        holds("it to be gone", || server.peers().len() < 2);
        let behind = server.peers().first().map_or(0, |peer| peer.behind);
        assert!(behind <= 2 * (8 + 1), "{behind} messages");
    }
    machine(&server, ClientConfig::default());
}

#[test]
fn more_than_there_is_room_for_are_refused() {
    let server = Server::builder(region("r"), 1, Gatekeeper::new(AllowAll)).max_peers(2).unbound().unwrap();
    let _kept = [machine(&server, ClientConfig::default()), machine(&server, ClientConfig::default())];
    let (theirs, _ours) = UnixStream::pair().unwrap();
    assert!(matches!(server.admit(theirs), Err(IvshmemError::Full { max: 2, .. })));
    assert_eq!(server.peers().len(), 2);
}

#[test]
fn a_storm_of_clients_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let gatekeeper = Gatekeeper::new(AllowAll);
    let server = Server::builder(region("r"), 2, gatekeeper.clone()).max_peers(8).bind(&path).unwrap();
    let steady = {
        let client = Client::connect(&path, "r", ClientConfig::default()).unwrap();
        let (map, ring) = rights(&Gatekeeper::new(AllowAll), "r", Access::ReadWrite);
        Machine::ready(client.join(map, Some(ring)).unwrap())
    };
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..100 {
                    drop(UnixStream::connect(&path));
                }
            });
        }
    });
    holds("all to be gone", || server.peers().len() == 1);
    sees(&steady, &[0]);
    holds("their rights as well", || gatekeeper.open_channels().len() == 2);
    assert!(steady.is_open());
    drop(server);
    assert!(!path.exists());
}

//! Both ends of the protocol by which processes share memory: a client of a hostile server, and a server of hostile clients.

#![no_main]

mod threads;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vmm_devices::channel::{AllowAll, DoorbellRing, Gatekeeper, Party, RegionMap};
use vmm_devices::ivshmem::server::{ClientConfig, Dialogue, Event, Receiver};
use vmm_devices::ivshmem::{Client, Ivshmem, Region, Server};
use vmm_devices::vmm_memory::{Access, SharedMemory};

#[derive(Debug, Arbitrary)]
enum Thing {
    Nothing,
    Eventfd,
    Memory,
    Pipe,
    Null,
    Several(u8),
}

#[derive(Debug, Arbitrary)]
enum Said {
    /// A small number, which is a position as a rule.
    Peer(u8, Thing),
    Number(i64, Thing),
    Bytes(Vec<u8>),
}

#[derive(Debug, Arbitrary)]
enum Act {
    Admit,
    Write(u8, u8),
    Leave(u8),
    Disconnect(u8),
    Revoke(u8),
    Listen(u8, u8),
}

#[derive(Debug, Arbitrary)]
enum Input {
    /// The dialogue alone, from the begin or after a good one.
    Dialogue {
        greeted: bool,
        said: Vec<Said>,
    },
    /// A device with its threads.
    Client {
        greeted: bool,
        said: Vec<Said>,
    },
    Server(Vec<Act>),
}

fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

fn say(socket: &UnixStream, said: &Said) {
    let (number, thing) = match said {
        Said::Peer(peer, thing) => (i64::from(*peer), thing),
        Said::Number(number, thing) => (*number, thing),
        Said::Bytes(bytes) => {
            let mut socket = socket;
            let (Ok(()) | Err(_)) = socket.write_all(&bytes[..bytes.len().min(64)]);
            return;
        }
    };
    let one: Option<OwnedFd> = match thing {
        Thing::Nothing => None,
        Thing::Eventfd | Thing::Several(_) => Some(bell()),
        Thing::Memory => Some(SharedMemory::create("said", 0x1000).unwrap().try_clone_fd().unwrap()),
        Thing::Pipe => Some(std::io::pipe().unwrap().1.into()),
        Thing::Null => Some(File::options().write(true).open("/dev/null").unwrap().into()),
    };
    let times = if let Thing::Several(times) = thing { usize::from(times % 16) } else { 1 };
    let descriptors: Vec<BorrowedFd<'_>> = one.iter().flat_map(|fd| vec![fd.as_fd(); times]).collect();
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut room);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    }
    let bytes = number.to_le_bytes();
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let (Ok(_) | Err(_)) = sendmsg(socket, &[std::io::IoSlice::new(&bytes)], &mut control, flags);
}

fn greet(socket: &UnixStream) {
    for said in
        [Said::Peer(0, Thing::Nothing), Said::Peer(7, Thing::Nothing), Said::Number(-1, Thing::Memory)]
    {
        say(socket, &said);
    }
}

fn dialogue(greeted: bool, said: &[Said]) {
    let (server, client) = UnixStream::pair().unwrap();
    if greeted {
        greet(&server);
    }
    let (mut receiver, mut dialogue) = (Receiver::new(), Dialogue::new(2, 4));
    let mut bells: BTreeMap<u16, usize> = BTreeMap::new();
    let mut told = said.iter();
    loop {
        while let Some(message) = match receiver.receive(&client) {
            Ok(message) => message,
            Err(_) => return,
        } {
            match dialogue.hear(message) {
                Ok(Event::Bell(peer, _)) => *bells.entry(peer).or_default() += 1,
                Ok(Event::Own(vector, _)) => assert!(vector < 2),
                Ok(Event::Gone(peer)) => drop(bells.remove(&peer)),
                Ok(_) => {}
                Err(_) => return,
            }
            assert!(dialogue.peers() <= 4 && bells.len() <= 4 && bells.values().all(|bells| *bells <= 2));
        }
        match told.next() {
            Some(said) => say(&server, said),
            None => return,
        }
    }
}

fn client(greeted: bool, said: &[Said]) {
    let (server, client) = UnixStream::pair().unwrap();
    if greeted {
        greet(&server);
    }
    said.iter().for_each(|said| say(&server, said));
    let config = ClientConfig::default().vectors(2).max_peers(4).patience(Duration::ZERO);
    let Ok(client) = Client::over(client, "r", config) else { return };
    let gatekeeper = Gatekeeper::new(AllowAll);
    let (region, host): (Arc<str>, _) = ("r".into(), Party::Host("fuzz".into()));
    let map = RegionMap { region: Arc::clone(&region), access: client.access() };
    let map = gatekeeper.open(host.clone(), None, map).unwrap();
    let ring = gatekeeper.open(host, None, DoorbellRing { region }).unwrap();
    let device =
        Ivshmem::builder(client.join(map, Some(ring)).unwrap(), |_: u64, _: u32| {}).build().unwrap();
    assert!(device.member().peers().len() <= 5);
    drop(device);
    assert!(gatekeeper.open_channels().is_empty());
}

fn server(acts: &[Act]) {
    let region = Region::new("r", SharedMemory::create("r", 0x1000).unwrap()).unwrap();
    let gatekeeper = Gatekeeper::new(AllowAll);
    let server = Server::builder(region, 2, gatekeeper.clone())
        .max_peers(4)
        .access(|_| Access::ReadOnly)
        .unbound()
        .unwrap();
    let mut clients: Vec<(UnixStream, Receiver)> = Vec::new();
    for act in acts.iter().take(64) {
        let count = clients.len().max(1);
        match *act {
            Act::Admit => {
                let (theirs, ours) = UnixStream::pair().unwrap();
                if server.admit(theirs).is_ok() {
                    clients.push((ours, Receiver::new()));
                }
            }
            Act::Write(who, length) => {
                if let Some((client, _)) = clients.get_mut(usize::from(who) % count) {
                    let (Ok(()) | Err(_)) = client.write_all(&[0; 16][..usize::from(length % 16)]);
                }
            }
            Act::Leave(who) if !clients.is_empty() => {
                clients.swap_remove(usize::from(who) % count);
            }
            Act::Listen(who, messages) => {
                if let Some((client, receiver)) = clients.get_mut(usize::from(who) % count) {
                    for _ in 0..messages {
                        if !matches!(receiver.receive(&*client), Ok(Some(_))) {
                            break;
                        }
                    }
                }
            }
            Act::Disconnect(position) => {
                server.disconnect(position.into());
            }
            Act::Revoke(which) => {
                let open = gatekeeper.open_channels();
                if let Some(channel) = open.get(usize::from(which) % open.len().max(1)) {
                    gatekeeper.revoke(channel.id);
                }
            }
            Act::Leave(_) => {}
        }
        assert!(server.peers().len() <= 4);
    }
    drop(server);
    assert!(gatekeeper.open_channels().is_empty());
}

fuzz_target!(|input: Input| {
    threads::settled(|| match input {
        Input::Dialogue { greeted, said } => dialogue(greeted, &said),
        Input::Client { greeted, said } => client(greeted, &said[..said.len().min(64)]),
        Input::Server(acts) => server(&acts),
    });
});

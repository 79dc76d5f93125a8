//! What taking a right back costs, with a thousand channels open: sockets, which are shut down, and memory, which is unmapped while threads
//! use it.
//!
//! `cargo bench -p vmm-policy --bench revoke`. The holder's sockets are sockets, with somebody who waits at the other end of each, and its memory is
//! mapped: `unmap` returns when the system has taken the pages away from all processors, and a thread that is reading them at the time is waited
//! for. What it takes to unmap memory from a guest in addition is its backend's. A socket's time ends when the other end has seen that it is
//! closed.

#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    missing_docs,
    reason = "a benchmark"
)]

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use memmap2::MmapMut;
use vmm_policy::channel::{Region, Vsock};
use vmm_policy::{
    Action, Ends, Grant, Monitor, Object, Policy, Request, Revocation, SubjectId, SubjectSpec, Uuid,
};

const CHANNELS: usize = 1000;

struct Socket(UnixStream);

impl Ends for Socket {
    fn quiesce(&mut self) {
        self.0.set_nonblocking(true).unwrap();
    }

    fn unmap(&mut self) {
        self.0.shutdown(Shutdown::Both).unwrap();
    }
}

/// 64 KiB that the system maps for the holder; `None` when they are gone.
type Pages = Arc<RwLock<Option<MmapMut>>>;

const BYTES: usize = 64 << 10;

struct Memory(Pages);

impl Ends for Memory {
    fn unmap(&mut self) {
        self.0.write().unwrap().take();
    }
}

fn setup() -> (Monitor, SubjectId, SubjectId) {
    let policy = "labels l\nallow l to connect vsock of l\nallow l to map-rw region of l";
    let monitor = Monitor::new(Policy::parse(policy).unwrap());
    let vm = |uuid| monitor.register(SubjectSpec::vm(Uuid::from_u128(uuid)).label("l")).unwrap();
    let (a, b) = (vm(1), vm(2));
    (monitor, a, b)
}

fn sockets(count: usize, monitor: &Monitor, a: SubjectId, b: SubjectId) -> Vec<(Grant<Vsock>, UnixStream)> {
    let open = |port| {
        let grant =
            monitor.open::<Vsock>(&Request::new(a, Action::Connect, Object::vsock(port)).of(b)).unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        grant.on_revoked(Socket(here));
        (grant, there)
    };
    (0..count as u32).map(open).collect()
}

/// A right, and the memory that it is to.
type Mapped = (Arc<Grant<Region>>, Pages);

fn regions(count: usize, monitor: &Monitor, a: SubjectId, b: SubjectId) -> Vec<Mapped> {
    let names: Vec<String> = (0..count).map(|at| format!("r{at}")).collect();
    let open = |name: &String| {
        let request = Request::new(a, Action::MapRw, Object::region(name)).of(b).bytes(BYTES as u64);
        let grant = monitor.open::<Region>(&request).unwrap();
        let mut memory = MmapMut::map_anon(BYTES).unwrap();
        // Each page is there.
        memory.fill(1);
        let pages = Arc::new(RwLock::new(Some(memory)));
        grant.on_revoked(Memory(Arc::clone(&pages)));
        (Arc::new(grant), pages)
    };
    names.iter().map(open).collect()
}

fn show(what: &str, mut times: Vec<Duration>, all: Option<Duration>) {
    times.sort_unstable();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    let all = all.map_or(String::new(), |all| format!("; all of them within {all:.2?} of the reload"));
    println!("{what}: p50: {:.2?} p99: {:.2?} max: {:.2?}{all}", at(0.5), at(0.99), at(1.0));
}

fn main() {
    let channels = if std::env::args().any(|argument| argument == "--test") { 10 } else { CHANNELS };
    let (monitor, a, b) = setup();

    let open = sockets(channels, &monitor, a, b);
    let one_by_one = open.iter().map(|(grant, there)| {
        let begin = Instant::now();
        assert!(monitor.revoke(grant.id()).unwrap().is_closed());
        // The end of what there is to read.
        assert_eq!((&*there).read(&mut [0]).unwrap(), 0);
        begin.elapsed()
    });
    show(&format!("one socket of {channels} open"), one_by_one.collect(), None);
    drop(open);

    let open = regions(channels, &monitor, a, b);
    let one_by_one = open.iter().map(|(grant, pages)| {
        let begin = Instant::now();
        assert!(monitor.revoke(grant.id()).unwrap().is_closed());
        let took = begin.elapsed();
        assert!(pages.read().unwrap().is_none());
        took
    });
    show(&format!("one region of {channels} mapped"), one_by_one.collect(), None);
    drop(open);

    let _open = sockets(channels, &monitor, a, b);
    let maps = regions(channels, &monitor, a, b);
    let done = Arc::new(AtomicBool::new(false));
    let users: Vec<_> = (0..2)
        .map(|_| {
            let (maps, done) = (maps.clone(), Arc::clone(&done));
            thread::spawn(move || {
                let mut used = 0_u64;
                while !done.load(Ordering::Relaxed) {
                    for (grant, pages) in &maps {
                        if let Some(_use) = grant.enter() {
                            // Revoked since, it may be gone already, and is not read then.
                            let pages = pages.read().unwrap();
                            let Some(memory) = &*pages else { continue };
                            used += u64::from(memory[used as usize * 4096 % BYTES]);
                        }
                    }
                    thread::yield_now();
                }
                used
            })
        })
        .collect();
    thread::sleep(Duration::from_millis(50));
    let begin = Instant::now();
    let reloaded = monitor.reload(Policy::deny_all()).unwrap();
    let all = begin.elapsed();
    done.store(true, Ordering::Relaxed);
    let used: u64 = users.into_iter().map(|user| user.join().unwrap()).sum();
    assert!(reloaded.revoked.len() == 2 * channels && reloaded.revoked.iter().all(Revocation::is_closed));
    let times = |kind| {
        let of_kind = reloaded.revoked.iter().filter(move |revocation| revocation.channel.kind() == kind);
        of_kind.map(|revocation| revocation.took).collect()
    };
    show(&format!("socket, of {channels} by a reload"), times(vmm_policy::Kind::Vsock), Some(all));
    show(&format!("region in use, of {channels} by a reload"), times(vmm_policy::Kind::Region), Some(all));
    println!("used {used} times meanwhile");
}

//! What a revocation does, and in which order.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::Duration;

use super::*;
use crate::channel::Vsock;
use crate::{Action, Monitor, Object, Policy, Request, SubjectId, SubjectSpec, Uuid};

fn setup(patience: Duration) -> (Monitor, SubjectId, SubjectId) {
    let policy = Policy::parse("labels l\nallow l to connect vsock of l").unwrap();
    let monitor = Monitor::builder(policy).patience(patience).build();
    let vm = |uuid| monitor.register(SubjectSpec::vm(Uuid::from_u128(uuid)).label("l")).unwrap();
    let (a, b) = (vm(1), vm(2));
    (monitor, a, b)
}

fn open(monitor: &Monitor, a: SubjectId, b: SubjectId) -> Grant<Vsock> {
    monitor.open(&Request::new(a, Action::Connect, Object::vsock(1)).of(b)).unwrap()
}

/// Writes down what it is told, and what it holds when it goes.
struct Recorder {
    log: Arc<Mutex<Vec<&'static str>>>,
}

impl Recorder {
    fn note(&self, what: &'static str) {
        self.log.lock().unwrap().push(what);
    }
}

impl Ends for Recorder {
    fn quiesce(&mut self) {
        self.note("quiesce");
    }

    fn unmap(&mut self) {
        self.note("unmap");
    }

    fn drain(&mut self) {
        self.note("drain");
    }

    fn close(&mut self) {
        self.note("close");
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.note("drop");
    }
}

#[test]
fn the_sequence_waits_for_who_uses_the_channel_and_lets_go_at_the_end() {
    let (monitor, a, b) = setup(Duration::from_secs(30));
    let grant = Arc::new(open(&monitor, a, b));
    let log = Arc::new(Mutex::new(Vec::new()));
    grant.on_revoked(Recorder { log: Arc::clone(&log) });
    let (inside, done) = (Arc::new(Barrier::new(2)), Arc::new(AtomicBool::new(false)));
    let user = {
        let (grant, inside, done, log) =
            (Arc::clone(&grant), Arc::clone(&inside), Arc::clone(&done), Arc::clone(&log));
        thread::spawn(move || {
            let used = grant.enter().unwrap();
            inside.wait();
            // The channel is out of the guest's reach, and what it is made of is there.
            while !log.lock().unwrap().contains(&"unmap") {
                thread::yield_now();
            }
            assert!(grant.enter().is_none(), "nobody begins to use it now");
            thread::sleep(Duration::from_millis(20));
            assert_eq!(*log.lock().unwrap(), ["quiesce", "unmap"]);
            done.store(true, Ordering::SeqCst);
            drop(used);
        })
    };
    inside.wait();
    let revocation = monitor.revoke(grant.id()).unwrap();
    assert!(revocation.is_closed() && done.load(Ordering::SeqCst));
    assert_eq!(*log.lock().unwrap(), ["quiesce", "unmap", "drain", "close", "drop"]);
    user.join().unwrap();
    assert!(monitor.revoke(grant.id()).is_none(), "a second time");
}

#[test]
fn who_does_not_let_go_keeps_it_open_and_unreachable() {
    let (monitor, a, b) = setup(Duration::from_millis(10));
    let grant = open(&monitor, a, b);
    let log = Arc::new(Mutex::new(Vec::new()));
    grant.on_revoked(Recorder { log: Arc::clone(&log) });
    let watch = grant.watch();
    let used = watch.enter().unwrap();
    let revocation = monitor.revoke(grant.id()).unwrap();
    assert_eq!(revocation.outcome, RevokeOutcome::InUse);
    assert_eq!(*log.lock().unwrap(), ["quiesce", "unmap"]);
    assert!(monitor.reap().iter().all(|revocation| !revocation.is_closed()));
    assert!(watch.enter().is_none() && !watch.is_live());
    drop(used);
    assert!(monitor.reap().iter().all(Revocation::is_closed));
    assert_eq!(*log.lock().unwrap(), ["quiesce", "unmap", "drain", "close", "drop"]);
}

#[test]
fn who_comes_late_is_told_at_once() {
    let (monitor, a, b) = setup(Duration::from_secs(1));
    let grant = open(&monitor, a, b);
    monitor.revoke(grant.id()).unwrap();
    let log = Arc::new(Mutex::new(Vec::new()));
    grant.on_revoked(Recorder { log: Arc::clone(&log) });
    assert_eq!(*log.lock().unwrap(), ["quiesce", "unmap", "drain", "close", "drop"]);
}

#[test]
fn a_channel_may_drop_its_grant_when_it_closes() {
    let (monitor, a, b) = setup(Duration::from_secs(1));
    let grant = open(&monitor, a, b);
    let (id, watch) = (grant.id(), grant.watch());
    let holder = Arc::new(Mutex::new(Some(grant)));
    let closing = Arc::clone(&holder);
    holder.lock().unwrap().as_ref().unwrap().on_revoked(move || drop(closing.lock().unwrap().take()));
    assert!(monitor.revoke(id).unwrap().is_closed());
    assert!(holder.lock().unwrap().is_none() && !watch.is_live());
    assert_eq!(monitor.open_channels(), []);
}

#[test]
fn a_grant_that_is_dropped_calls_nobody_and_leaves_nothing() {
    let (monitor, a, b) = setup(Duration::from_secs(1));
    let grant = open(&monitor, a, b);
    let called = Arc::new(AtomicUsize::new(0));
    let calls = Arc::clone(&called);
    grant.on_revoked(move || {
        calls.fetch_add(1, Ordering::SeqCst);
    });
    let watch = grant.watch();
    drop(grant);
    assert!(!watch.is_live() && watch.enter().is_none());
    assert_eq!((called.load(Ordering::SeqCst), Arc::strong_count(&called)), (0, 1));
    assert!(monitor.revoke_all(|_| true).is_empty());
}

#[test]
fn two_who_revoke_return_when_it_is_closed() {
    let (monitor, a, b) = setup(Duration::from_secs(30));
    for _ in 0..200 {
        let grant = open(&monitor, a, b);
        let closed = Arc::new(AtomicUsize::new(0));
        let closes = Arc::clone(&closed);
        grant.on_revoked(move || {
            thread::yield_now();
            closes.fetch_add(1, Ordering::SeqCst);
        });
        let other = {
            let monitor = monitor.clone();
            thread::spawn(move || monitor.revoke_all(|_| true))
        };
        monitor.revoke_all(|_| true);
        other.join().unwrap();
        assert_eq!(closed.load(Ordering::SeqCst), 1);
    }
}

//! What opens, what does not, and what a revocation does.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use vmm_memory::Access;

use super::*;

fn vm(uuid: u128) -> Party {
    Party::Vm(VmIdentity::new(uuid, 1))
}

fn connect(port: u32) -> VsockConnect {
    VsockConnect { port }
}

/// Allows while its switch is on, and writes down what it hears.
#[derive(Default)]
struct Recorder {
    refuses: AtomicBool,
    decided: Mutex<Vec<(GrantId, String)>>,
    closed: Mutex<Vec<GrantId>>,
}

impl Gate for Recorder {
    fn decide(&self, id: GrantId, request: &Request) -> Result<(), Refusal> {
        self.decided.lock().unwrap().push((id, request.to_string()));
        if self.refuses.load(Ordering::SeqCst) { Err(Refusal::new("switched off")) } else { Ok(()) }
    }

    fn closed(&self, id: GrantId, _: &Request) {
        self.closed.lock().unwrap().push(id);
    }
}

#[test]
fn the_default_refuses_every_kind() {
    let gatekeeper = Gatekeeper::default();
    let name: Arc<str> = "r".into();
    assert!(gatekeeper.open(vm(1), Some(vm(2)), connect(1)).is_err());
    assert!(gatekeeper.open(vm(1), None, VsockListen { port: 1 }).is_err());
    assert!(gatekeeper.open(vm(1), None, NetworkAttach { network: Arc::clone(&name) }).is_err());
    for access in [Access::ReadOnly, Access::ReadWrite] {
        assert!(gatekeeper.open(vm(1), None, RegionMap { region: Arc::clone(&name), access }).is_err());
    }
    let refusal = gatekeeper.open(vm(1), None, DoorbellRing { region: name }).unwrap_err();
    assert_eq!(refusal.to_string(), "refused: no policy allows it");
    assert_eq!(gatekeeper.open_channels(), []);
}

#[test]
fn the_gate_hears_who_what_and_which_way() {
    let gate = Arc::new(Recorder::default());
    let gatekeeper = Gatekeeper::new(Arc::clone(&gate));
    let name: Arc<str> = "frames".into();
    let _grants = (
        gatekeeper.open(vm(1), Some(Party::Host("ssh".into())), connect(22)).unwrap(),
        gatekeeper.open(vm(0xab), None, VsockListen { port: 80 }).unwrap(),
        gatekeeper.open(vm(1), None, NetworkAttach { network: "lan".into() }).unwrap(),
        gatekeeper
            .open(vm(1), Some(vm(2)), RegionMap { region: Arc::clone(&name), access: Access::ReadOnly })
            .unwrap(),
        gatekeeper.open(vm(1), Some(vm(2)), DoorbellRing { region: name }).unwrap(),
    );
    let heard: Vec<String> =
        gate.decided.lock().unwrap().iter().map(|(_, request)| request.clone()).collect();
    let one = "vm 00000000-0000-0000-0000-000000000001#1";
    let two = "vm 00000000-0000-0000-0000-000000000002#1";
    assert_eq!(
        heard,
        [
            format!("{one}: connect vsock port 22 of host ssh"),
            "vm 00000000-0000-0000-0000-0000000000ab#1: accept vsock port 80".to_owned(),
            format!("{one}: attach network \"lan\""),
            format!("{one}: map-ro region \"frames\" of {two}"),
            format!("{one}: notify doorbells of region \"frames\" of {two}"),
        ]
    );
}

#[test]
fn each_request_is_closed_once_however_it_ends() {
    let gate = Arc::new(Recorder::default());
    let gatekeeper = Gatekeeper::new(Arc::clone(&gate));
    let given_up = gatekeeper.open(vm(1), None, connect(1)).unwrap();
    let revoked = gatekeeper.open(vm(1), None, connect(2)).unwrap();
    let ids = [given_up.id(), revoked.id()];
    drop(given_up);
    assert!(gatekeeper.revoke(revoked.id()));
    assert!(!gatekeeper.revoke(revoked.id()), "a second time");
    assert_eq!(*gate.closed.lock().unwrap(), ids[..1], "its holder has not closed it yet");
    drop(revoked);
    gate.refuses.store(true, Ordering::SeqCst);
    gatekeeper.open(vm(1), None, connect(3)).unwrap_err();
    let closed = gate.closed.lock().unwrap();
    assert_eq!(closed[..2], ids);
    assert_eq!(closed.len(), 3);
    assert!(!gatekeeper.revoke(ids[0]));
}

#[test]
fn a_revocation_returns_when_the_channel_is_closed() {
    let gatekeeper = Gatekeeper::new(AllowAll);
    let grant = gatekeeper.open(vm(1), None, connect(1)).unwrap();
    let watch = grant.watch();
    let id = grant.id();
    let holder = Arc::new(Mutex::new(Some(grant)));
    let closing = Arc::clone(&holder);
    holder.lock().unwrap().as_ref().unwrap().on_revoked(move || {
        // The holder closes by dropping what it has.
        closing.lock().unwrap().take();
    });
    assert!(watch.is_live());
    assert!(gatekeeper.revoke(id));
    assert!(!watch.is_live());
    assert!(holder.lock().unwrap().is_none());
    assert_eq!(gatekeeper.open_channels(), []);
}

/// A holder takes its time, and two more revoke: whoever goes on after a revocation finds the channel closed.
#[test]
fn every_revocation_returns_when_the_channel_is_closed() {
    type Revoke = fn(&Gatekeeper, GrantId) -> bool;
    let others: [Revoke; 3] = [
        |gatekeeper, id| gatekeeper.revoke(id),
        |gatekeeper, _| gatekeeper.revoke_all(|_| true) > 0,
        |gatekeeper, _| !gatekeeper.reconsider().is_empty(),
    ];
    let wait = Duration::from_secs(20);
    // The holder has said what to do before the right ended, or comes late.
    for late in [false, true] {
        let gatekeeper = Gatekeeper::new(AllowAll);
        let grant = gatekeeper.open(vm(1), None, connect(1)).unwrap();
        let id = grant.id();
        let ((inside, is_inside), (go_on, goes_on)) = (mpsc::channel(), mpsc::channel::<()>());
        let close = move || {
            inside.send(()).unwrap();
            goes_on.recv().unwrap();
        };
        let (first, grant) = if late {
            assert!(gatekeeper.revoke(id));
            let holder = thread::spawn(move || {
                grant.on_revoked(close);
                (true, Some(grant))
            });
            (holder, None)
        } else {
            grant.on_revoked(close);
            let gatekeeper = gatekeeper.clone();
            (thread::spawn(move || (gatekeeper.revoke(id), None)), Some(grant))
        };
        is_inside.recv_timeout(wait).unwrap();
        let (tell, told) = mpsc::channel();
        for revoke in others {
            let (gatekeeper, tell) = (gatekeeper.clone(), tell.clone());
            thread::spawn(move || tell.send(revoke(&gatekeeper, id)));
        }
        assert!(told.recv_timeout(Duration::from_millis(100)).is_err(), "it is not closed yet");
        go_on.send(()).unwrap();
        assert!(first.join().unwrap().0);
        assert_eq!([(); 3].map(|()| told.recv_timeout(wait)), [Ok(false); 3], "there was none to take back");
        drop(grant);
    }
}

/// Two holders that each revoke all there is while they close: neither waits for itself or the other.
#[test]
fn holders_that_revoke_while_they_close_do_not_wait_for_each_other() {
    let gatekeeper = Gatekeeper::new(AllowAll);
    let both = Arc::new(Barrier::new(2));
    let grants = [1, 2].map(|port| gatekeeper.open(vm(1), None, connect(port)).unwrap());
    let (tell, told) = mpsc::channel();
    for grant in &grants {
        let (inside, both, id, tell) = (gatekeeper.clone(), Arc::clone(&both), grant.id(), tell.clone());
        grant.on_revoked(move || {
            both.wait();
            assert!(!inside.revoke(id));
            assert_eq!((inside.revoke_all(|_| true), inside.reconsider()), (0, vec![]));
            tell.send(()).unwrap();
        });
        let gatekeeper = gatekeeper.clone();
        thread::spawn(move || gatekeeper.revoke(id));
    }
    for _ in &grants {
        told.recv_timeout(Duration::from_secs(20)).expect("no one waits for another");
    }
}

/// What is replaced may hold what it was said of.
#[test]
fn a_closure_that_is_replaced_may_drop_a_grant() {
    let gatekeeper = Gatekeeper::new(AllowAll);
    let (one, other) = (
        Arc::new(gatekeeper.open(vm(1), None, connect(1)).unwrap()),
        gatekeeper.open(vm(1), None, connect(2)).unwrap(),
    );
    /// Asks for the right again as it goes.
    struct Asks(Arc<Grant<VsockConnect>>);
    impl Drop for Asks {
        fn drop(&mut self) {
            self.0.on_revoked(|| ());
        }
    }
    let held = (Asks(Arc::clone(&one)), other);
    one.on_revoked(move || drop(held));
    one.on_revoked(|| ());
    assert_eq!(gatekeeper.open_channels().len(), 1);
}

#[test]
fn who_comes_late_is_told_at_once() {
    let gatekeeper = Gatekeeper::new(AllowAll);
    let grant = gatekeeper.open(vm(1), None, connect(1)).unwrap();
    gatekeeper.revoke(grant.id());
    let told = Arc::new(AtomicBool::new(false));
    let hears = Arc::clone(&told);
    grant.on_revoked(move || hears.store(true, Ordering::SeqCst));
    assert!(told.load(Ordering::SeqCst));
}

#[test]
fn a_dropped_grant_calls_nobody() {
    let gatekeeper = Gatekeeper::new(AllowAll);
    let grant = gatekeeper.open(vm(1), None, connect(1)).unwrap();
    let (watch, id) = (grant.watch(), grant.id());
    let told = Arc::new(AtomicBool::new(false));
    let hears = Arc::clone(&told);
    grant.on_revoked(move || hears.store(true, Ordering::SeqCst));
    drop(grant);
    assert!(!watch.is_live());
    assert!(!gatekeeper.revoke(id));
    assert!(!told.load(Ordering::SeqCst));
    assert_eq!(Arc::strong_count(&told), 1, "the closure is gone");
}

#[test]
fn reconsidering_closes_what_lost_its_right_and_nothing_else() {
    let allowed = Arc::new(Mutex::new(vec![1, 2, 3]));
    let rule = Arc::clone(&allowed);
    let gatekeeper = Gatekeeper::new(move |request: &Request| {
        let allowed = rule.lock().unwrap();
        let port = request.object().port().unwrap();
        if allowed.contains(&port) { Ok(()) } else { Err(Refusal::new(format!("port {port} is closed"))) }
    });
    let grants: Vec<_> = (1..=3).map(|port| gatekeeper.open(vm(1), None, connect(port)).unwrap()).collect();
    assert_eq!(gatekeeper.reconsider(), []);
    allowed.lock().unwrap().retain(|&port| port == 2);
    let refused = gatekeeper.reconsider();
    let reasons: Vec<_> = refused.iter().map(|(_, refusal)| refusal.reason().to_owned()).collect();
    assert_eq!(reasons, ["port 1 is closed", "port 3 is closed"]);
    assert_eq!(grants.iter().map(Grant::is_live).collect::<Vec<_>>(), [false, true, false]);
    assert_eq!(gatekeeper.open_channels().len(), 1);
    assert_eq!(gatekeeper.revoke_all(|request| request.asker() == &vm(1)), 1);
}

/// The gate changes its mind while a request is with it: no channel opens by what it said before.
#[test]
fn a_request_in_the_air_is_decided_by_the_new_rules() {
    struct Slow {
        refuses: AtomicBool,
        asked: AtomicUsize,
        inside: Barrier,
        changed: Barrier,
    }
    impl Gate for Slow {
        fn decide(&self, _: GrantId, _: &Request) -> Result<(), Refusal> {
            let refuses = self.refuses.load(Ordering::SeqCst);
            if self.asked.fetch_add(1, Ordering::SeqCst) == 0 {
                self.inside.wait();
                self.changed.wait();
            }
            if refuses { Err(Refusal::new("no more")) } else { Ok(()) }
        }
    }
    let gate = Arc::new(Slow {
        refuses: AtomicBool::new(false),
        asked: AtomicUsize::new(0),
        inside: Barrier::new(2),
        changed: Barrier::new(2),
    });
    let gatekeeper = Gatekeeper::new(Arc::clone(&gate));
    let asking = {
        let gatekeeper = gatekeeper.clone();
        thread::spawn(move || gatekeeper.open(vm(1), None, connect(1)))
    };
    gate.inside.wait();
    gate.refuses.store(true, Ordering::SeqCst);
    assert_eq!(gatekeeper.reconsider(), []);
    gate.changed.wait();
    assert_eq!(asking.join().unwrap().unwrap_err(), Refusal::new("no more"));
    assert_eq!(gate.asked.load(Ordering::SeqCst), 2);
}

#[test]
fn revoking_while_others_open_use_and_close_leaves_nothing_behind() {
    let gatekeeper = Gatekeeper::new(AllowAll);
    let done = Arc::new(AtomicBool::new(false));
    let users: Vec<_> = (0..2)
        .map(|user| {
            let (gatekeeper, done) = (gatekeeper.clone(), Arc::clone(&done));
            thread::spawn(move || {
                let mut told = 0;
                for port in 0..2000 {
                    let grant = gatekeeper.open(vm(user), None, connect(port)).unwrap();
                    let heard = Arc::new(AtomicUsize::new(0));
                    let hears = Arc::clone(&heard);
                    grant.on_revoked(move || {
                        hears.fetch_add(1, Ordering::SeqCst);
                    });
                    drop(grant);
                    let heard = heard.load(Ordering::SeqCst);
                    assert!(heard <= 1);
                    told += heard;
                }
                done.store(true, Ordering::SeqCst);
                told
            })
        })
        .collect();
    let mut revoked = 0;
    while !done.load(Ordering::SeqCst) {
        revoked += gatekeeper.revoke_all(|_| true);
    }
    let told: usize = users.into_iter().map(|user| user.join().unwrap()).sum();
    assert!(told <= revoked, "{told} were told of {revoked}");
    assert_eq!(gatekeeper.open_channels(), []);
}

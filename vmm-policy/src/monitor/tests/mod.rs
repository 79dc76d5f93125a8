//! Who is there, what is open, what is used up, and what another policy does to it.

mod walls;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use super::*;
use crate::channel::{Disk, Region, Vsock};
use crate::{Action, Grant, Layer, Lifecycle, Object, OpenChannel, SubjectId, SubjectSpec, Uuid, Verdict};

/// A clock that is moved by hand.
#[derive(Clone, Default)]
pub(crate) struct Hand {
    ns: Arc<AtomicU64>,
    seconds: Arc<AtomicU64>,
}

impl Hand {
    pub(crate) fn pass(&self, seconds: u64) {
        self.ns.fetch_add(seconds * 1_000_000_000, Ordering::SeqCst);
        self.seconds.fetch_add(seconds, Ordering::SeqCst);
    }
}

impl Clock for Hand {
    fn monotonic(&self) -> u64 {
        self.ns.load(Ordering::SeqCst)
    }

    fn wall(&self) -> u64 {
        self.seconds.load(Ordering::SeqCst)
    }
}

fn monitor(text: &str) -> Monitor {
    Monitor::new(Policy::parse(text).unwrap())
}

fn vm(monitor: &Monitor, uuid: u128, labels: &[&str]) -> SubjectId {
    let spec = labels.iter().fold(SubjectSpec::vm(Uuid::from_u128(uuid)), |spec, label| spec.label(label));
    monitor.register(spec).unwrap()
}

fn connect(asker: SubjectId, peer: SubjectId, port: u32) -> Request<'static> {
    Request::new(asker, Action::Connect, Object::vsock(port)).of(peer)
}

#[test]
fn who_is_declared_has_the_policys_labels_and_others_have_those_that_are_given() {
    let monitor = monitor(
        "family tenant: red, blue\nlabels web, db\nvm shop { uuid 00000000-0000-0000-0000-000000000001 labels red, web }\n\
         allow web to connect vsock of db in same tenant",
    );
    let shop = vm(&monitor, 1, &[]);
    let orders = vm(&monitor, 2, &["db", "red"]);
    let other = vm(&monitor, 3, &["db", "blue"]);
    assert!(monitor.authorize(&connect(shop, orders, 1)).permits());
    assert!(!monitor.authorize(&connect(shop, other, 1)).permits());
    assert_eq!(monitor.subject("shop"), Some(shop));
    let register = |uuid: u128, labels: &[&str]| {
        let spec =
            labels.iter().fold(SubjectSpec::vm(Uuid::from_u128(uuid)), |spec, label| spec.label(label));
        monitor.register(spec).unwrap_err().to_string()
    };
    assert_eq!(register(1, &[]), "vm 00000000-0000-0000-0000-000000000001 is registered already");
    assert_eq!(register(4, &["dbb"]), "no label is called \"dbb\"; did you mean \"db\"?");
    assert_eq!(
        register(4, &["red", "blue"]),
        "\"red\" and \"blue\" are labels of one family, of which a subject has one at most"
    );
    assert!(register(4, &["shop"]).starts_with("no label is called \"shop\""), "a name is one's own");
    monitor.unregister(shop).unwrap();
    assert_eq!(register(1, &["db"]), "\"shop\" is declared by the policy, which says what its labels are");
}

#[test]
fn an_old_life_has_no_rights() {
    let monitor = monitor("labels l\nallow l to connect vsock of l");
    let (a, b) = (vm(&monitor, 1, &["l"]), vm(&monitor, 2, &["l"]));
    let grant = monitor.open::<Vsock>(&connect(a, b, 1)).unwrap();
    let revoked = monitor.unregister(b).unwrap();
    assert_eq!(revoked.len(), 1);
    assert!(!grant.is_live());
    let again = vm(&monitor, 2, &["l"]);
    assert_ne!(again, b);
    let decision = monitor.authorize(&connect(a, b, 1));
    assert_eq!((decision.verdict, decision.layer), (Verdict::Deny, Layer::Identity));
    assert!(monitor.authorize(&connect(a, again, 1)).permits());
    monitor.unregister(b).unwrap_err();
    let spec = || SubjectSpec::vm(Uuid::from_u128(9));
    let first = monitor.register(spec().incarnation(5)).unwrap();
    monitor.relabel(first, &["l"]).unwrap();
    monitor.reload(Policy::parse("labels m").unwrap()).unwrap();
    assert_eq!((monitor.incarnation(first), monitor.incarnation(again)), (Some(5), None));
    monitor.unregister(first).unwrap();
    assert_eq!(monitor.incarnation(first), None);
    let refused = monitor.register(spec().incarnation(5)).unwrap_err().to_string();
    assert_eq!(
        refused,
        "incarnation 5 of vm 00000000-0000-0000-0000-000000000009 is not above 5, which was registered before"
    );
    monitor.register(spec().incarnation(6)).unwrap();
}

#[test]
fn a_reload_closes_what_lost_its_right_and_nothing_else() {
    let monitor = monitor("labels l\nallow l to connect vsock 1..3 of l\nallow l to map-rw region of l");
    let (a, b) = (vm(&monitor, 1, &["l"]), vm(&monitor, 2, &["l"]));
    let grants: Vec<Grant<Vsock>> = (1..=3).map(|port| monitor.open(&connect(a, b, port)).unwrap()).collect();
    let region = Request::new(a, Action::MapRw, Object::region("frames")).of(b);
    let mapped = monitor.open::<Region>(&region).unwrap();
    let wrong = monitor.open::<Disk>(&region).unwrap_err();
    assert_eq!(wrong.to_string(), "deny (identity): region is asked for where disk is opened");
    let closed = Arc::new(AtomicUsize::new(0));
    for grant in &grants {
        let closed = Arc::clone(&closed);
        grant.on_revoked(move || {
            closed.fetch_add(1, Ordering::SeqCst);
        });
    }
    let next = Policy::parse("labels l\nallow l to connect vsock 2 of l").unwrap();
    let dry = monitor.dry_run(&next).unwrap();
    assert_eq!(dry.closes.len(), 3);
    assert!(grants[0].is_live() && mapped.is_live(), "nothing was done");
    let reloaded = monitor.reload(next).unwrap();
    assert_eq!((reloaded.epoch, reloaded.revoked.len()), (1, 3));
    assert!(
        reloaded
            .revoked
            .iter()
            .all(|revocation| revocation.is_closed() && revocation.decision.unwrap().epoch == 1)
    );
    assert_eq!(grants.iter().map(|grant| grant.is_live()).collect::<Vec<_>>(), [false, true, false]);
    assert_eq!(closed.load(Ordering::SeqCst), 2);
    assert!(mapped.enter().is_none());
    assert_eq!(monitor.open_channels().len(), 1);
    assert_eq!(monitor.reload(Policy::deny_all()).unwrap().forgotten.len(), 2, "both had a label");
}

#[test]
fn a_policy_that_who_is_there_contradicts_is_not_put_in_force() {
    let monitor = monitor("family t: red, blue\nlabels l");
    let _both = (vm(&monitor, 1, &["red"]), vm(&monitor, 2, &["blue"]));
    let next =
        "family t: red, blue\nallow red to connect vsock 1 of blue\nnever any to anything of any in other t";
    // It declares nobody, so it holds by itself.
    let refused = monitor.reload(Policy::parse(next).unwrap()).unwrap_err().to_string();
    assert!(
        refused.contains("policy:2:1: this opens what line 3 of policy says is never to be"),
        "{refused}"
    );
    assert_eq!(monitor.epoch(), 0);
}

#[test]
fn other_labels_are_other_rights() {
    let monitor =
        monitor("labels web, db, old\nallow web to connect vsock of db\nallow old to connect vsock 9 of db");
    let (a, b) = (vm(&monitor, 1, &["web"]), vm(&monitor, 2, &["db"]));
    let kept = monitor.open::<Vsock>(&connect(a, b, 9)).unwrap();
    let lost = monitor.open::<Vsock>(&connect(a, b, 8)).unwrap();
    let revoked = monitor.relabel(a, &["old"]).unwrap();
    assert_eq!(revoked.len(), 1);
    assert!(kept.is_live() && !lost.is_live());
    assert!(
        monitor.authorize(&connect(a, b, 9)).permits() && !monitor.authorize(&connect(a, b, 8)).permits()
    );
    monitor.relabel(a, &["web", "old", "db"]).unwrap();
    assert!(monitor.authorize(&connect(a, b, 8)).permits());
}

#[test]
fn conditions_are_about_now() {
    let hand = Hand::default();
    let policy = "labels l\n\
         allow l to attach disk when running and not flag upkeep\n\
         allow l to connect vsock of l when attested or measured ab12\n\
         allow l to use balloon when between 09:00 and 10:00";
    let monitor = Monitor::builder(Policy::parse(policy).unwrap()).clock(hand.clone()).build();
    let a = vm(&monitor, 1, &["l"]);
    let measured =
        monitor.register(SubjectSpec::vm(Uuid::from_u128(2)).label("l").digest(&[0xab, 0x12])).unwrap();
    let disk = Request::new(a, Action::Attach, Object::disk("d"));
    let early = monitor.check(&disk);
    assert_eq!((early.verdict, early.layer, early.rule.is_some()), (Verdict::Deny, Layer::Attribute, true));
    monitor.set_lifecycle(a, Lifecycle::Running).unwrap();
    let grant = monitor.open::<Disk>(&disk).unwrap();
    assert_eq!(monitor.set_flag("upkeep", true).unwrap().len(), 1);
    assert!(!grant.is_live());
    monitor.set_flag("upkeep", false).unwrap();
    assert!(monitor.check(&disk).permits());
    assert!(matches!(monitor.set_flag("nothing", true), Err(MonitorError::NoFlag(_))));

    assert!(!monitor.check(&connect(a, measured, 1)).permits());
    assert!(monitor.check(&connect(measured, a, 1)).permits());
    monitor.set_attested(a, true).unwrap();
    let grant = monitor.open::<Vsock>(&connect(a, measured, 1)).unwrap();
    assert_eq!(monitor.set_attested(a, false).unwrap().len(), 1);
    assert!(!grant.is_live());

    let balloon = Request::new(a, Action::Use, Object::balloon());
    assert!(!monitor.check(&balloon).permits());
    assert_eq!(monitor.next_tick(), Some(9 * 3600));
    hand.pass(9 * 3600);
    assert!(!monitor.check(&balloon).permits(), "nobody has looked at the clock");
    monitor.tick();
    let held = monitor.hold(&balloon, Honours::NONE).unwrap();
    assert_eq!(monitor.next_tick(), Some(3600));
    hand.pass(3600);
    assert_eq!(monitor.tick().len(), 1);
    assert!(!held.is_live());
}

#[test]
fn limits_are_each_ones_own_and_survive_a_reload() {
    let hand = Hand::default();
    let text = "labels l\nallow l to connect vsock of l\nallow l to use hypercall\nallow l to map-rw region\n\
         limit l to connect vsock of any at 2 open\nlimit l to use hypercall at 3 per second\nlimit l to map-rw region at 4 pages";
    let monitor = Monitor::builder(Policy::parse(text).unwrap()).clock(hand.clone()).build();
    let (a, b) = (vm(&monitor, 1, &["l"]), vm(&monitor, 2, &["l"]));
    let first = monitor.open::<Vsock>(&connect(a, b, 1)).unwrap();
    let _second = monitor.open::<Vsock>(&connect(a, b, 2)).unwrap();
    let refused = monitor.open::<Vsock>(&connect(a, b, 3)).unwrap_err();
    assert_eq!(refused.to_string(), "deny (quota): policy:5: limit l to connect vsock of any at 2 open");
    let _other = monitor.open::<Vsock>(&connect(b, a, 3)).unwrap();
    drop(first);
    let third = monitor.open::<Vsock>(&connect(a, b, 3)).unwrap();

    let call = Request::new(a, Action::Use, Object::hypercall(1));
    assert!((0..3).all(|_| monitor.authorize(&call).permits()));
    assert_eq!(monitor.authorize(&call).layer, Layer::Quota);
    assert!(monitor.check(&call).permits(), "nothing is taken by looking");
    let reloaded = monitor.reload(Policy::parse(&format!("{text}\n# the same\n")).unwrap()).unwrap();
    assert!(reloaded.revoked.is_empty());
    assert!(!monitor.authorize(&call).permits());
    monitor.open::<Vsock>(&connect(a, b, 3)).unwrap_err();
    drop(third);
    let _fourth = monitor.open::<Vsock>(&connect(a, b, 3)).unwrap();
    hand.pass(1);
    assert!((0..3).all(|_| monitor.authorize(&call).permits()));

    let region = |bytes| Request::new(a, Action::MapRw, Object::region("r")).bytes(bytes);
    let mapped = monitor.open::<Region>(&region(3 * 4096)).unwrap();
    monitor.open::<Region>(&region(2 * 4096)).unwrap_err();
    drop(mapped);
    let _mapped = monitor.open::<Region>(&region(4 * 4096)).unwrap();
}

#[test]
fn what_a_holder_cannot_act_on_is_refused() {
    let text = "labels l\nvm a { uuid 00000000-0000-0000-0000-00000000000a labels l }\n\
         throttle l to connect vsock 1 of l at 1 MiB per second\nquarantine l to connect vsock 2 of l\n\
         redirect l to connect vsock 3 of l onto a 30\nask l to connect vsock 4 of l by any within minute";
    let monitor = monitor(text);
    let (a, b) = (vm(&monitor, 10, &[]), vm(&monitor, 11, &["l"]));
    for (port, honours) in [(1, Honours::THROTTLE), (2, Honours::QUARANTINE), (3, Honours::REDIRECT)] {
        monitor.open::<Vsock>(&connect(a, b, port)).unwrap_err();
        let grant = monitor.open_with::<Vsock>(&connect(a, b, port), honours).unwrap();
        assert!(!grant.decision().verdict.permits() || port == 1);
    }
    let all = Honours::THROTTLE | Honours::QUARANTINE | Honours::REDIRECT;
    let refused = monitor.open_with::<Vsock>(&connect(a, b, 4), all).unwrap_err();
    assert_eq!(refused.decision.verdict, Verdict::Ask);
    let redirected = monitor.check(&connect(a, b, 3));
    assert_eq!(monitor.policy().redirection(redirected.rule.unwrap()), Some(("a", Some(30))));
}

#[test]
fn the_shadow_decides_nothing_and_is_heard() {
    #[derive(Default)]
    struct Heard {
        differences: AtomicUsize,
        decided: AtomicUsize,
        revoked: AtomicUsize,
    }
    impl Observer for Arc<Heard> {
        fn decided(&self, _: &Request<'_>, _: &Decision) {
            self.decided.fetch_add(1, Ordering::SeqCst);
        }

        fn shadow_differs(&self, _: &Request<'_>, difference: &ShadowDifference) {
            assert_eq!(difference.verdict, Verdict::Deny);
            self.differences.fetch_add(1, Ordering::SeqCst);
        }

        fn revoked(&self, _: &Revocation) {
            self.revoked.fetch_add(1, Ordering::SeqCst);
        }
    }
    let heard = Arc::new(Heard::default());
    let policy = Policy::parse("labels l\nallow l to connect vsock of l").unwrap();
    let monitor = Monitor::builder(policy).observer(Arc::clone(&heard)).build();
    let (a, b) = (vm(&monitor, 1, &["l"]), vm(&monitor, 2, &["l"]));
    monitor.set_shadow(Some(&Policy::parse("labels l\nallow l to connect vsock 1 of l").unwrap())).unwrap();
    let grant = monitor.open::<Vsock>(&connect(a, b, 2)).unwrap();
    assert!(monitor.authorize(&connect(a, b, 1)).permits());
    assert!(monitor.authorize(&connect(a, b, 3)).permits());
    assert_eq!((monitor.shadow_differences(), heard.differences.load(Ordering::SeqCst)), (2, 2));
    monitor.set_shadow(None).unwrap();
    assert!(monitor.authorize(&connect(a, b, 3)).permits());
    assert_eq!(heard.differences.load(Ordering::SeqCst), 2);
    assert_eq!(heard.decided.load(Ordering::SeqCst), 4);
    monitor.revoke(grant.id()).unwrap();
    assert_eq!(heard.revoked.load(Ordering::SeqCst), 1);
}

#[test]
fn a_judge_follows_the_policy() {
    let monitor = monitor("labels l\nallow l to connect vsock of l");
    let (a, b) = (vm(&monitor, 1, &["l"]), vm(&monitor, 2, &["l"]));
    let mut judge = monitor.judge();
    assert!(judge.authorize(&connect(a, b, 1)).permits() && judge.check(&connect(a, b, 1)).permits());
    monitor.reload(Policy::deny_all()).unwrap();
    assert!(!judge.authorize(&connect(a, b, 1)).permits());
}

/// Threads open, use and close while others change the policy and the labels: what is used is allowed, and nothing is left.
#[test]
fn nothing_is_used_after_it_was_revoked() {
    let on =
        Policy::parse("labels l\nallow l to connect vsock of l\nlimit l to connect vsock of l at 64 open")
            .unwrap();
    let off =
        Policy::parse("labels l\nallow l to use balloon\nlimit l to connect vsock of l at 64 open").unwrap();
    // A busy machine may keep a thread from ending its use for long.
    let monitor = Monitor::builder(on.clone()).patience(Duration::from_secs(60)).build();
    let (a, b) = (vm(&monitor, 1, &["l"]), vm(&monitor, 2, &["l"]));
    let running = Arc::new(AtomicUsize::new(3));
    let users: Vec<_> = (0..3)
        .map(|_| {
            let (monitor, running) = (monitor.clone(), Arc::clone(&running));
            thread::spawn(move || {
                let mut used = 0;
                for _ in 0..3000 {
                    let Ok(grant) = monitor.open::<Vsock>(&connect(a, b, 1)) else {
                        thread::yield_now();
                        continue;
                    };
                    let open = Arc::new(AtomicUsize::new(1));
                    let closes = Arc::clone(&open);
                    grant.on_revoked(move || closes.store(0, Ordering::SeqCst));
                    for _ in 0..20 {
                        if let Some(_use) = grant.enter() {
                            assert_eq!(open.load(Ordering::SeqCst), 1, "used after it was closed");
                            used += 1;
                        }
                    }
                }
                running.fetch_sub(1, Ordering::SeqCst);
                used
            })
        })
        .collect();
    let mut revoked = 0;
    while running.load(Ordering::SeqCst) > 0 {
        let closed = monitor.reload(off.clone()).unwrap().revoked;
        assert!(closed.iter().all(Revocation::is_closed));
        // Whoever is open now would have been allowed by a policy that is not in force.
        assert_eq!(monitor.open_channels().iter().map(OpenChannel::id).collect::<Vec<_>>(), []);
        revoked += closed.len();
        monitor.reload(on.clone()).unwrap();
        thread::yield_now();
    }
    let used: usize = users.into_iter().map(|user| user.join().unwrap()).sum();
    assert!(used > 0, "nothing was used, {revoked} revoked");
    assert_eq!(monitor.open_channels().len(), 0);
    // All that was taken of the limit has come back.
    let grants: Vec<_> = (0..64).map(|_| monitor.open::<Vsock>(&connect(a, b, 1)).unwrap()).collect();
    monitor.open::<Vsock>(&connect(a, b, 1)).unwrap_err();
    drop(grants);
}

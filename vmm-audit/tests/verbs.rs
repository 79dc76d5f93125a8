//! What managers ask for and do, as it comes into the log: with the policy's own desk, and no virtual machine.

// The lints spare test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[path = "support/written.rs"]
mod written;

use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm_audit::Digest;
use vmm_audit::event::{Action, Event, Kind, Object, ObjectClass, Outcome, Party, Verdict};
use vmm_audit::hooks::desk::{Asked, AuditedDesk, VerbRefused};
use vmm_audit::hooks::policy::PolicyLog;
use vmm_audit::pipeline::PipelineOptions;
use vmm_audit::query::Filter;
use vmm_audit::verb::{NotBegun, Verb, VerbError};
use vmm_policy::trust::{DeskError, TicketId};
use vmm_policy::{Clock, Monitor, Policy, Principal, SubjectSpec, Uuid};
use written::{LONG, Written, log};

/// Nanoseconds since some moment, as the test says.
#[derive(Clone, Default)]
struct Hand(Arc<AtomicU64>);

impl Clock for Hand {
    fn monotonic(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn wall(&self) -> u64 {
        self.monotonic() / 1_000_000_000
    }
}

const POLICY: &str = "\
labels operator
host alice { labels operator }
host bob { labels operator }
host eve
allow operator to administer pause of any vm
allow operator to administer reload
ask operator to administer destroy of any vm by operator within 10 minutes
deny operator to administer pause of any vm when flag freeze";

struct Host {
    written: Written,
    monitor: Monitor,
    desk: AuditedDesk,
    clock: Hand,
    policy: Digest,
}

/// The machine, in its third life.
const VM: u128 = 0x1234;

fn named(name: &str) -> Principal {
    Principal::Host(name.into())
}

fn guest() -> Principal {
    Principal::Vm(Uuid::from_u128(VM))
}

impl Host {
    fn new(options: PipelineOptions) -> Self {
        let written = log(options);
        let policy = Policy::parse(POLICY).unwrap();
        let digest = Digest::from_bytes(policy.digest());
        let told = PolicyLog::new(written.log.emitter(Party::host("manager")), &policy);
        let clock = Hand::default();
        let monitor = Monitor::builder(policy).clock(clock.clone()).observer(told.clone()).build();
        for name in ["alice", "bob", "eve"] {
            monitor.register(SubjectSpec::host(name)).unwrap();
        }
        let spec = SubjectSpec::vm(Uuid::from_u128(VM)).incarnation(3);
        monitor.register(spec).unwrap();
        let desk = AuditedDesk::new(&monitor, &told);
        Self { written, monitor, desk, clock, policy: digest }
    }

    fn grants(&self, who: &str, verb: &str) -> Verb {
        match self.desk.propose(&named(who), verb, Some(&guest())).unwrap() {
            Asked::Granted(verb) => verb,
            Asked::Waits(ticket) => panic!("{ticket:?}"),
        }
    }

    fn waits(&self, who: &str, verb: &str) -> TicketId {
        match self.desk.propose(&named(who), verb, Some(&guest())).unwrap() {
            Asked::Waits(ticket) => ticket.id,
            Asked::Granted(verb) => panic!("{verb:?}"),
        }
    }

    /// What is in the log, behind the policy that came into force.
    fn events(self) -> Vec<Event> {
        let Self { written, monitor, desk, .. } = self;
        drop((monitor, desk));
        let events = written.events();
        assert_eq!(events[0].kind, Kind::PolicyLoaded);
        events[1..].to_vec()
    }
}

type Told<'a> = (Kind, Option<Verdict>, Option<Outcome>, String, &'a str);

/// What happened, who asked, and the ticket.
fn told(event: &Event) -> Told<'_> {
    let who = event.subject.as_ref().unwrap().to_string();
    (event.kind, event.verdict, event.outcome, who, event.get("ticket").unwrap_or_default())
}

fn done() -> Result<(), Infallible> {
    Ok(())
}

#[test]
fn what_is_allowed_is_written_down_before_it_is_done_and_when_it_has_ended() {
    let host = Host::new(PipelineOptions::new());
    let pause = host.grants("alice", "pause").attribute("why", "backup");
    // So that nothing else gets to the disk meanwhile.
    host.written.log.flush(LONG).unwrap();
    let before = host.written.log.status().acknowledged;
    let seen = pause.carry_out(|| Ok::<_, Infallible>(host.written.log.status().acknowledged)).unwrap();
    assert!(seen > before, "the disk has it before it is done: {before}, {seen}");
    let failed = host.grants("bob", "pause").carry_out(|| Err::<(), _>(io::Error::other("no such thread")));
    assert_eq!(failed.unwrap_err().to_string(), "no such thread");
    // One that panics in the midst of it.
    drop(host.grants("bob", "pause").begin().unwrap());
    // And one that asks and does nothing.
    drop(host.grants("alice", "pause"));
    // Something that no machine is asked of.
    let reload = host.desk.propose(&named("alice"), "reload", None).unwrap();
    let Asked::Granted(reload) = reload else { panic!("{reload:?}") };
    reload.carry_out(done).unwrap();

    let policy = host.policy;
    let events = host.events();
    let (allow, success) = (Some(Verdict::Allow), Some(Outcome::Success));
    let (alice, bob) = (|| "host alice".to_owned(), || "host bob".to_owned());
    let begun = |who| (Kind::Administration, None, None, who, "");
    let ended = |who, outcome| (Kind::Administration, None, Some(outcome), who, "");
    let decided = |who| (Kind::Decision, allow, success, who, "");
    assert_eq!(
        events.iter().map(told).collect::<Vec<_>>(),
        [
            decided(alice()),
            begun(alice()),
            ended(alice(), Outcome::Success),
            decided(bob()),
            begun(bob()),
            ended(bob(), Outcome::Failed),
            decided(bob()),
            begun(bob()),
            ended(bob(), Outcome::Failed),
            decided(alice()),
            decided(alice()),
            begun(alice()),
            ended(alice(), Outcome::Success),
        ]
    );
    let verb = Some(Object::named(ObjectClass::Verb, "pause"));
    for event in &events[..3] {
        assert_eq!((&event.object, event.action), (&verb, Some(Action::Administer)));
        assert_eq!(event.peer, Some(Party::vm(VM, 3)));
    }
    for event in &events[..2] {
        assert_eq!((event.policy, event.rule_line), (Some(policy), 5));
        assert!(event.rule.as_ref().unwrap().as_str().starts_with("allow operator to administer pause"));
    }
    assert_eq!((events[1].get("why"), events[2].get("why")), (Some("backup"), Some("backup")));
    // The two of a verb have a number in common that no other has.
    let numbers: Vec<_> = events.iter().filter_map(|event| event.get("operation")).collect();
    assert_eq!(numbers.len(), 8);
    let pairs: std::collections::BTreeSet<_> = numbers.chunks(2).map(|two| (two[0], two[1])).collect();
    assert!(pairs.len() == 4 && pairs.iter().all(|(first, second)| first == second), "{numbers:?}");
    let reason = |event: &Event| event.reason.as_ref().unwrap().to_string();
    assert_eq!(reason(&events[5]), "no such thread");
    assert_eq!(reason(&events[8]), "given up in the midst of it");
    assert_eq!((&events[11].peer, events[11].rule_line), (&None, 6));
    // And who looks for what was done finds it.
    let mut filter = Filter::new();
    (filter.kinds, filter.vm) = (vec![Kind::Administration], Some(VM));
    assert_eq!(events.iter().filter(|event| filter.passes(0, 1, event)).count(), 6);
}

#[test]
fn what_is_refused_is_written_down_whoever_asks() {
    let host = Host::new(PipelineOptions::new());
    let ask =
        |who: &Principal, verb: &str, of: &Principal| host.desk.propose(who, verb, Some(of)).unwrap_err();
    let eve = named("eve");
    assert!(matches!(ask(&eve, "pause", &guest()), VerbRefused::Desk(DeskError::Refused(_))));
    // A guest that asks for something is one of the guests, and nobody of the host's by that name.
    assert!(matches!(ask(&guest(), "pause", &guest()), VerbRefused::Desk(DeskError::Refused(_))));
    let nobody = named("mallory");
    assert_eq!(ask(&nobody, "pause", &guest()).to_string(), "host mallory is not registered");
    let gone = Principal::Vm(Uuid::from_u128(0x99));
    let alice = named("alice");
    assert!(matches!(ask(&alice, "pause", &gone), VerbRefused::Unknown(of) if of == gone));
    let id = TicketId::from_number(7);
    assert!(matches!(host.desk.confirm(id, &nobody), Err(VerbRefused::Unknown(_))));
    assert!(matches!(host.desk.decline(id, &alice), Err(VerbRefused::Desk(DeskError::NoTicket(7)))));

    let policy = host.policy;
    let events = host.events();
    let vm = Party::vm(VM, 3).to_string();
    let deny = |who: &str, ticket| {
        (Kind::Decision, Some(Verdict::Deny), Some(Outcome::Refused), who.to_owned(), ticket)
    };
    assert_eq!(
        events.iter().map(told).collect::<Vec<_>>(),
        [
            deny("host eve", ""),
            deny(&vm, ""),
            deny("host mallory", ""),
            deny("host alice", ""),
            deny("host mallory", "7"),
            deny("host alice", "7"),
        ]
    );
    assert!(events.iter().all(|event| event.policy == Some(policy) && event.is_critical()));
    assert_eq!(events[2].peer, Some(Party::vm(VM, 3)));
    assert_eq!(events[2].object, Some(Object::named(ObjectClass::Verb, "pause")));
    assert_eq!(events[3].peer, Some(Party::vm(0x99, 0)));
}

#[test]
fn a_second_person_is_in_the_log_beside_the_first() {
    let host = Host::new(PipelineOptions::new());
    let (alice, bob, eve) = (named("alice"), named("bob"), named("eve"));
    let id = host.waits("alice", "destroy");
    assert!(matches!(host.desk.confirm(id, &alice), Err(VerbRefused::Desk(DeskError::Same(_)))));
    assert!(matches!(host.desk.confirm(id, &eve), Err(VerbRefused::Desk(DeskError::NotAsked(_)))));
    host.desk.confirm(id, &bob).unwrap().carry_out(done).unwrap();
    assert!(host.desk.confirm(id, &bob).is_err(), "once");
    let declined = host.waits("alice", "destroy");
    host.desk.decline(declined, &bob).unwrap();
    let lapsed = host.waits("bob", "destroy");
    host.clock.0.fetch_add(600_000_000_000, Ordering::SeqCst);
    assert!(host.desk.waiting().is_empty());
    assert!(host.desk.confirm(lapsed, &alice).is_err());

    let events = host.events();
    let (ask, deny) = (Some(Verdict::Ask), Some(Verdict::Deny));
    let (success, refused) = (Some(Outcome::Success), Some(Outcome::Refused));
    let (alice, bob, eve) = ("host alice", "host bob", "host eve");
    let decided =
        |verdict, outcome, who: &str, ticket| (Kind::Decision, verdict, outcome, who.to_owned(), ticket);
    let done = |outcome| (Kind::Administration, None, outcome, alice.to_owned(), "1");
    assert_eq!(
        events.iter().map(told).collect::<Vec<_>>(),
        [
            decided(ask, None, alice, "1"),
            decided(deny, refused, alice, "1"),
            decided(deny, refused, eve, "1"),
            decided(ask, success, alice, "1"),
            done(None),
            done(success),
            decided(deny, refused, bob, "1"),
            decided(ask, None, alice, "2"),
            decided(deny, refused, alice, "2"),
            decided(ask, None, bob, "3"),
            decided(deny, refused, bob, "3"),
            decided(deny, refused, alice, "3"),
        ]
    );
    for (at, event) in events.iter().enumerate() {
        assert_eq!(event.get("confirmed-by"), [3, 4, 5].contains(&at).then_some(bob), "{at}");
        assert_eq!(event.get("asked-by"), [1, 2].contains(&at).then_some(alice), "{at}");
        let is_about = event.peer == Some(Party::vm(VM, 3));
        assert_eq!(is_about, ![6, 11].contains(&at), "{at}: a ticket that is gone says nothing of a machine");
    }
    assert_eq!((events[0].rule_line, events[3].rule_line, events[4].rule_line), (7, 7, 7));
    let reason = |at: usize| events[at].reason.as_ref().unwrap().as_str();
    assert_eq!(reason(1), "host alice cannot confirm what host alice has asked for");
    assert_eq!(reason(2), "host eve is none of those who may confirm it");
    assert_eq!((reason(8), reason(10)), ("host bob has said no", "nobody has confirmed it in time"));
}

#[test]
fn what_the_log_does_not_take_is_not_done() {
    let deadline = Duration::from_millis(200);
    let host = Host::new(PipelineOptions::new().deadline(deadline));
    host.written.log.flush(LONG).unwrap();
    host.written.faults.stall(true);
    let is_done = Mutex::new(0);
    let act = || {
        *is_done.lock().unwrap() += 1;
        Ok::<_, Infallible>(())
    };
    // Admitted, but it does not get to the disk.
    let late = host.grants("alice", "pause").within(deadline).carry_out(act);
    assert!(matches!(late, Err(VerbError::NotBegun(NotBegun::NotDurable(_)))), "{late:?}");
    std::thread::sleep(deadline * 2);
    // Not even admitted.
    let refused = host.grants("bob", "pause").carry_out(act).unwrap_err();
    assert!(matches!(refused, VerbError::NotBegun(NotBegun::Refused(_))), "{refused:?}");
    assert!(refused.to_string().starts_with("not carried out: the audit log has written nothing for"));
    assert_eq!(*is_done.lock().unwrap(), 0);
    host.written.faults.stall(false);
    host.written.log.flush(LONG).unwrap();
    host.grants("alice", "pause").carry_out(act).unwrap();
    assert_eq!(*is_done.lock().unwrap(), 1);

    let events = host.events();
    let of: Vec<_> = events.iter().filter(|event| event.kind == Kind::Administration).map(told).collect();
    let done = |outcome| (Kind::Administration, None, outcome, "host alice".to_owned(), "");
    let (refused, success) = (Some(Outcome::Refused), Some(Outcome::Success));
    assert_eq!(of, [done(None), done(refused), done(None), done(success)], "bob's is counted");
    assert_eq!(events.last().unwrap().lost, 1);
}

#[test]
fn a_right_that_is_taken_back_before_it_is_begun_is_none() {
    let host = Host::new(PipelineOptions::new());
    let (early, late) = (host.grants("alice", "pause"), host.grants("bob", "pause"));
    let begun = late.begin().unwrap();
    assert!(!begun.is_taken_back());
    host.monitor.set_flag("freeze", true).unwrap();
    let refused = early.carry_out(|| -> Result<(), Infallible> { panic!("it is carried out") });
    assert_eq!(refused, Err(VerbError::NotBegun(NotBegun::TakenBack)));
    assert!(begun.is_taken_back());
    begun.done();
    let events = host.events();
    let outcomes: Vec<_> = events
        .iter()
        .filter(|event| event.kind == Kind::Administration)
        .map(|event| (event.subject.as_ref().unwrap().to_string(), event.outcome))
        .collect();
    let (alice, bob) = (|| "host alice".to_owned(), || "host bob".to_owned());
    let (refused, success) = (Some(Outcome::Refused), Some(Outcome::Success));
    assert_eq!(outcomes, [(bob(), None), (alice(), None), (alice(), refused), (bob(), success)]);
    assert_eq!(events.iter().filter(|event| event.kind == Kind::Revoked).count(), 2);
}

#[test]
fn a_program_with_one_user_needs_no_policy() {
    let written = log(PipelineOptions::new());
    let emitter = written.log.emitter(Party::host("vm"));
    let stop = Verb::new(emitter, Party::host("uid 1000"), "stop").of(Party::vm(VM, 1));
    stop.carry_out(done).unwrap();
    let events = written.events();
    let outcomes: Vec<_> = events.iter().map(|event| (event.kind, event.outcome)).collect();
    let kind = Kind::Administration;
    assert_eq!(outcomes, [(kind, None), (kind, Some(Outcome::Success))]);
    for event in &events {
        assert_eq!(event.subject, Some(Party::host("uid 1000")));
        assert_eq!((event.verdict, event.policy), (None, None));
        assert_eq!(event.peer, Some(Party::vm(VM, 1)));
    }
}

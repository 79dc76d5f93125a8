//! Requests that are not to be believed.

use std::cell::Cell;

use super::*;
use crate::monitor::Hand;
use crate::{Action, Monitor, Object, Policy, Request, SubjectId, SubjectSpec, Uuid, Verdict};

fn monitor(text: &str) -> (Monitor, Hand) {
    let hand = Hand::default();
    hand.pass(1000);
    (Monitor::builder(Policy::parse(text).unwrap()).clock(hand.clone()).build(), hand)
}

fn vm(monitor: &Monitor, uuid: u128) -> SubjectId {
    monitor.register(SubjectSpec::vm(Uuid::from_u128(uuid)).label("l")).unwrap()
}

#[test]
fn protocols_hold_together() {
    for protocol in [Protocol::virtio_device(), Protocol::vsock_stream()] {
        let mut session = Session::new(&protocol.unwrap());
        assert!(session.take("no such thing").is_err());
    }
    let twice = Protocol::builder("p", "a").step("a", "x", "b").step("a", "x", "a").build().unwrap_err();
    assert_eq!(twice.to_string(), "p: \"x\" leads from \"a\" to two states");
    let apart = Protocol::builder("p", "a").step("b", "x", "a").build().unwrap_err();
    assert_eq!(apart.to_string(), "p: nothing leads to \"b\"");
}

#[test]
fn a_virtio_driver_goes_through_the_states_of_the_specification() {
    let mut session = Session::new(&Protocol::virtio_device().unwrap());
    for request in ["acknowledge", "driver", "features-ok", "queue-setup", "driver-ok", "notify"] {
        session.take(request).unwrap();
    }
    let refused = session.take("queue-setup").unwrap_err();
    assert_eq!(refused.state, "live");
    assert_eq!(session.state(), "live", "nothing has changed");
    session.take("reset").unwrap();
    assert_eq!(session.state(), "reset");
}

#[test]
fn a_request_passes_all_or_has_no_effect() {
    let (monitor, _) =
        monitor("labels l\nallow l to use hypercall 1..3\nlimit l to use hypercall 3 at 1 per second");
    let guest = vm(&monitor, 1);
    let mediator = Mediator::new(&monitor);
    let protocol = Protocol::builder("p", "a").step("a", "go", "b").step("b", "back", "a").build().unwrap();
    let mut session = Session::new(&protocol);
    let fetched = Cell::new(0);
    let mut run = |step: &'static str,
                   number: u64,
                   fetch: Result<u64, &'static str>,
                   result: Result<u64, &'static str>| {
        let fetch = || {
            fetched.set(fetched.get() + 1);
            fetch
        };
        let asks = move |_: &u64| (step, Request::new(guest, Action::Use, Object::hypercall(number)));
        let outcome =
            mediator.mediate(guest, &mut session, fetch, asks, |decoded| result.map(|more| decoded + more));
        (outcome.map_err(|rejected| rejected.to_string()), session.state())
    };
    assert_eq!(run("go", 1, Err("short"), Ok(1)), (Err("malformed: short".into()), "a"));
    assert_eq!(run("back", 1, Ok(1), Ok(1)).1, "a");
    assert_eq!(run("go", 9, Ok(1), Ok(1)), (Err("deny (type)".into()), "a"));
    assert_eq!(run("go", 1, Ok(1), Err("broken")), (Err("failed: broken".into()), "a"));
    assert_eq!(run("go", 3, Ok(40), Ok(2)), (Ok(42), "b"));
    assert_eq!(run("back", 3, Ok(40), Ok(2)), (Err("deny (quota)".into()), "b"));
    assert_eq!(fetched.get(), 6, "once for each");
}

#[test]
fn who_says_that_another_asks_asks_for_itself() {
    let (monitor, _) = monitor("labels l, king\nallow king to use hypercall 1");
    let guest = vm(&monitor, 1);
    let king = monitor.register(SubjectSpec::vm(Uuid::from_u128(2)).label("king")).unwrap();
    let mut session = Session::new(&Protocol::builder("p", "a").step("a", "go", "a").build().unwrap());
    let claims = |(): &()| ("go", Request::new(king, Action::Use, Object::hypercall(1)));
    let outcome = Mediator::new(&monitor).mediate(guest, &mut session, || Ok::<(), ()>(()), claims, Ok);
    assert!(matches!(outcome, Err(Rejected::Refused { .. })));
}

#[test]
fn misbehaviour_has_consequences_that_grow_and_fade() {
    let text = "labels l\nescalate l: throttle after 3, pause after 5, kill after 8 per 10 seconds";
    let (monitor, hand) = monitor(text);
    let (guest, quiet) = (vm(&monitor, 1), vm(&monitor, 2));
    let standing = Standing::new(&monitor);
    let steps: Vec<_> = (0..9).map(|_| standing.violation(guest)).collect();
    let wanted =
        [None, None, Some(Step::Throttle), None, Some(Step::Pause), None, None, Some(Step::Kill), None];
    assert_eq!(steps, wanted);
    assert_eq!((standing.step(guest), standing.step(quiet)), (Some(Step::Kill), None));
    standing.forgive(guest);
    assert_eq!(standing.violation(guest), None);
    for _ in 0..50 {
        hand.pass(9);
        assert_eq!(standing.violation(guest), None, "one in nine seconds is less than three in ten");
    }
    hand.pass(60);
    assert!(standing.violation(guest).is_none() && standing.violation(guest).is_none());
    assert_eq!(standing.violation(guest), Some(Step::Throttle));
    let unknown = monitor.register(SubjectSpec::vm(Uuid::from_u128(9))).unwrap();
    assert!((0..100).all(|_| standing.violation(unknown).is_none()), "no rule is about it");
}

const DESK: &str = "labels l, operator\nhost alice { labels operator }\nhost bob { labels operator }\nhost eve\n\
     allow operator to administer pause of any vm\nask operator to administer destroy of any vm by operator within 10 minutes\n\
     deny operator to administer destroy of any vm when flag freeze";

#[test]
fn what_another_policy_decided_asks_nobody() {
    let (monitor, _) = monitor(DESK);
    let guest = vm(&monitor, 1);
    let alice = monitor.register(SubjectSpec::host("alice")).unwrap();
    let destroy =
        || monitor.check(&Request::new(alice, Action::Administer, Object::verb("destroy")).of(guest));
    let before = destroy();
    assert_eq!(monitor.asked(&before).map(|(_, seconds)| seconds), Some(600));
    monitor.reload(Policy::parse(&DESK.replace("10 minutes", "20 minutes")).unwrap()).unwrap();
    assert_eq!(monitor.asked(&before), None);
    assert_eq!(monitor.asked(&destroy()).map(|(_, seconds)| seconds), Some(1200));
}

#[test]
fn destruction_takes_two() {
    let (monitor, hand) = monitor(DESK);
    let guest = vm(&monitor, 1);
    let host = |name: &str| monitor.register(SubjectSpec::host(name)).unwrap();
    let (alice, bob, eve) = (host("alice"), host("bob"), host("eve"));
    let desk = Desk::new(&monitor);
    let verb = |who: SubjectId, verb: &'static str| {
        Request::new(who, Action::Administer, Object::verb(verb)).of(guest)
    };
    assert!(matches!(desk.propose(&verb(alice, "pause")).unwrap(), Proposal::Granted(_)));
    assert!(matches!(desk.propose(&verb(eve, "destroy")), Err(DeskError::Refused(_))));
    let ask = || match desk.propose(&verb(alice, "destroy")).unwrap() {
        Proposal::Waits(ticket) => ticket.id,
        Proposal::Granted(_) => panic!("it takes two"),
    };
    let ticket = ask();
    assert!(matches!(desk.confirm(ticket, alice), Err(DeskError::Same(_))));
    assert!(matches!(desk.confirm(ticket, eve), Err(DeskError::NotAsked(_))));
    let granted = desk.confirm(ticket, bob).unwrap();
    assert_eq!(granted.decision().verdict, Verdict::Ask);
    assert!(matches!(desk.confirm(ticket, bob), Err(DeskError::NoTicket(_))), "once");
    assert!(monitor.reconsider().is_empty(), "what is confirmed stays");

    let late = ask();
    hand.pass(600);
    assert!(desk.waiting().is_empty());
    assert!(matches!(desk.confirm(late, bob), Err(DeskError::NoTicket(_))));

    let overtaken = ask();
    assert_eq!(monitor.set_flag("freeze", true).unwrap().len(), 1, "the confirmed one");
    assert!(!granted.is_live());
    assert!(matches!(desk.confirm(overtaken, bob), Err(DeskError::Refused(_))), "the policy is asked again");

    monitor.set_flag("freeze", false).unwrap();
    let own: Vec<_> = (0..200).filter_map(|_| desk.propose(&verb(alice, "destroy")).ok()).collect();
    assert_eq!(own.len(), 128, "one cannot fill the desk");
    assert!(desk.propose(&verb(bob, "destroy")).is_ok());
    assert!(desk.withdraw(desk.waiting()[0].id));
}

/// Writes down what it hears, in words.
#[derive(Clone, Default)]
struct Heard(std::sync::Arc<std::sync::Mutex<Vec<String>>>);

impl crate::Observer for Heard {
    fn decided(&self, request: &Request<'_>, decision: &crate::Decision) {
        self.0.lock().unwrap().push(format!("{} {}", decision.verdict, request.object));
    }

    fn desk(&self, event: &DeskEvent<'_>) {
        let line = match event {
            DeskEvent::Waits { ticket, request, decision } => {
                format!(
                    "{} waits: {} for {} ({})",
                    ticket.id.get(),
                    ticket.asker,
                    request.object,
                    decision.layer
                )
            }
            DeskEvent::Confirmed { ticket, by, decision, .. } => {
                format!("{} confirmed by {}: {}", ticket.id.get(), by.life(), decision.verdict)
            }
            DeskEvent::Rejected { id, request, by, why } => {
                let (id, what) = (id.map(TicketId::get), request.map(|request| request.object.to_string()));
                format!("{id:?} {what:?} rejected of {}: {why}", by.life())
            }
            DeskEvent::Declined { ticket, by, .. } => {
                format!("{} declined by {:?}", ticket.id.get(), by.map(SubjectId::life))
            }
            DeskEvent::Lapsed { ticket, request } => {
                format!("{} lapsed: {}", ticket.id.get(), request.object)
            }
        };
        self.0.lock().unwrap().push(line);
    }
}

impl Heard {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

#[test]
fn the_observer_hears_of_whatever_happens_at_a_desk() {
    let (heard, hand) = (Heard::default(), Hand::default());
    hand.pass(1000);
    let builder = Monitor::builder(Policy::parse(DESK).unwrap()).clock(hand.clone());
    let monitor = builder.observer(heard.clone()).build();
    let guest = vm(&monitor, 1);
    let host = |name: &str| monitor.register(SubjectSpec::host(name)).unwrap();
    let (alice, bob, eve) = (host("alice"), host("bob"), host("eve"));
    assert_eq!([alice, bob, eve].map(SubjectId::life), [2, 3, 4]);
    let desk = Desk::new(&monitor);
    let verb = |who, verb: &'static str| Request::new(who, Action::Administer, Object::verb(verb)).of(guest);
    let ask = || match desk.propose(&verb(alice, "destroy")).unwrap() {
        Proposal::Waits(ticket) => ticket.id,
        Proposal::Granted(_) => panic!("it takes two"),
    };
    drop(desk.propose(&verb(alice, "pause")).unwrap());
    assert!(desk.propose(&verb(eve, "destroy")).is_err());
    assert_eq!(heard.take(), ["allow pause", "deny destroy"]);

    let id = ask();
    assert!(
        desk.confirm(id, alice).is_err() && desk.confirm(id, eve).is_err() && desk.decline(id, eve).is_err()
    );
    assert_eq!(desk.waiting().len(), 1, "those change nothing");
    let granted = desk.confirm(id, bob).unwrap();
    assert!(desk.confirm(id, bob).is_err());
    assert_eq!(
        heard.take(),
        [
            "1 waits: host alice for destroy (type)",
            "Some(1) Some(\"destroy\") rejected of 2: host alice cannot confirm what host alice has asked for",
            "Some(1) Some(\"destroy\") rejected of 4: host eve is none of those who may confirm it",
            "Some(1) Some(\"destroy\") rejected of 4: host eve is none of those who may confirm it",
            "1 confirmed by 3: ask",
            "Some(1) None rejected of 3: no proposal 1 waits: it has been answered, or its time is over",
        ]
    );
    drop(granted);

    // The asker takes it back, another says no, the monitor itself has it not be done, and time passes.
    for by in [Some(alice), Some(bob), None] {
        let id = ask();
        match by {
            Some(who) => desk.decline(id, who).unwrap(),
            None => assert!(desk.withdraw(id) && !desk.withdraw(id)),
        }
        assert!(desk.waiting().is_empty());
    }
    let late = ask();
    hand.pass(599);
    assert_eq!(desk.waiting().len(), 1);
    hand.pass(1);
    assert!(desk.decline(late, bob).is_err());
    let told: Vec<String> = heard.take().into_iter().filter(|line| !line.contains("waits: host")).collect();
    let rejected =
        "Some(5) None rejected of 3: no proposal 5 waits: it has been answered, or its time is over";
    let wanted = [
        "2 declined by Some(2)",
        "3 declined by Some(3)",
        "4 declined by None",
        "5 lapsed: destroy",
        rejected,
    ];
    assert_eq!(told, wanted);

    // The policy is asked again, and another one may ask somebody else.
    let id = ask();
    monitor.set_flag("freeze", true).unwrap();
    assert!(matches!(desk.confirm(id, bob), Err(DeskError::Refused(_))));
    let told = heard.take();
    assert_eq!(told[1], "deny destroy");
    assert!(told[2].starts_with("Some(6) Some(\"destroy\") rejected of 3: deny (attribute): "), "{told:?}");
    monitor.set_flag("freeze", false).unwrap();
    let id = ask();
    monitor.reload(Policy::parse(&DESK.replace("by operator within", "by eve within")).unwrap()).unwrap();
    assert!(matches!(desk.confirm(id, bob), Err(DeskError::NotAsked(_))));
    assert!(desk.confirm(id, eve).is_ok());

    // One who is gone answers nothing, and his desk was full.
    let many: Vec<_> = (0..129).map(|_| desk.propose(&verb(alice, "destroy"))).collect();
    assert!(matches!(many.last(), Some(Err(DeskError::Full(128)))));
    monitor.unregister(eve).unwrap();
    assert!(matches!(desk.confirm(desk.waiting()[0].id, eve), Err(DeskError::NoSubject(_))));
    let told = heard.take();
    let last = &told[told.len() - 2..];
    assert_eq!(
        last[0],
        "None Some(\"destroy\") rejected of 2: 128 proposals wait already, which is the most"
    );
    assert!(last[1].ends_with("rejected of 4: subject 4#4 is not registered"), "{last:?}");
}

#[test]
fn principals_are_found_while_they_are_registered() {
    let (monitor, _) = monitor(DESK);
    let guest = vm(&monitor, 1);
    let principal = crate::Principal::Vm(Uuid::from_u128(1));
    assert_eq!(monitor.subject_of(&principal), Some(guest));
    assert_eq!(monitor.subject_of(&crate::Principal::Host("alice".into())), None);
    let alice = monitor.register(SubjectSpec::host("alice")).unwrap();
    assert_eq!(monitor.subject_of(&crate::Principal::Host("alice".into())), Some(alice));
    monitor.unregister(guest).unwrap();
    assert_eq!(monitor.subject_of(&principal), None);
    assert_ne!(monitor.subject_of(&principal), Some(vm(&monitor, 1)));
}

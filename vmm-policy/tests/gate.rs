//! A policy behind the trait by which another crate asks: the shape of `vmm_devices::channel`, from which this crate takes nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "a test")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use vmm_policy::{Action, Hold, Honours, Monitor, Object, Policy, Principal, Request, SubjectSpec, Uuid};

/// What the other crate says.
mod channel {
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub(crate) struct GrantId(pub(crate) u64);

    #[derive(Clone, Debug)]
    pub(crate) enum Party {
        Vm { uuid: u128 },
        Host(String),
    }

    #[derive(Clone, Debug)]
    pub(crate) enum Asked {
        VsockConnect { port: u32 },
        RegionMap { name: String, writable: bool },
    }

    #[derive(Clone, Debug)]
    pub(crate) struct Request {
        pub(crate) asker: Party,
        pub(crate) peer: Option<Party>,
        pub(crate) asked: Asked,
    }

    #[derive(Clone, Debug, PartialEq, Eq)]
    pub(crate) struct Refusal(pub String);

    pub(crate) trait Gate: Send + Sync {
        fn decide(&self, id: GrantId, request: &Request) -> Result<(), Refusal>;
        fn closed(&self, id: GrantId, request: &Request);
    }
}

/// The adapter: a hold for each channel of the other's.
struct PolicyGate {
    monitor: Monitor,
    held: Mutex<BTreeMap<channel::GrantId, Hold>>,
}

impl PolicyGate {
    fn subject(&self, party: &channel::Party) -> Option<vmm_policy::SubjectId> {
        // Not by name, which a machine of the policy's may have as well.
        let wanted = match party {
            channel::Party::Host(name) => Principal::Host(name.as_str().into()),
            channel::Party::Vm { uuid } => Principal::Vm(Uuid::from_u128(*uuid)),
        };
        let subjects = self.monitor.subjects();
        subjects.into_iter().find(|(_, principal)| *principal == wanted).map(|(id, _)| id)
    }
}

impl channel::Gate for PolicyGate {
    fn decide(&self, id: channel::GrantId, request: &channel::Request) -> Result<(), channel::Refusal> {
        let unknown = || channel::Refusal("nobody such is registered".into());
        let asker = self.subject(&request.asker).ok_or_else(unknown)?;
        let peer = request.peer.as_ref().map(|peer| self.subject(peer).ok_or_else(unknown)).transpose()?;
        let (action, object) = match &request.asked {
            channel::Asked::VsockConnect { port } => (Action::Connect, Object::vsock(*port)),
            channel::Asked::RegionMap { name, writable } => {
                (if *writable { Action::MapRw } else { Action::MapRo }, Object::region(name))
            }
        };
        let mut asked = Request::new(asker, action, object);
        asked.peer = peer;
        // Asked again about what is open: the hold is there, and has been revoked if it has no right any more.
        if let Some(hold) = self.held.lock().unwrap().get(&id) {
            return if hold.is_live() { Ok(()) } else { Err(channel::Refusal("revoked".into())) };
        }
        let hold = self
            .monitor
            .hold(&asked, Honours::NONE)
            .map_err(|refused| channel::Refusal(refused.to_string()))?;
        self.held.lock().unwrap().insert(id, hold);
        Ok(())
    }

    fn closed(&self, id: channel::GrantId, _: &channel::Request) {
        self.held.lock().unwrap().remove(&id);
    }
}

#[test]
fn the_policy_decides_for_devices_that_do_not_know_it() {
    use channel::{Asked, Gate, GrantId, Party};
    let policy = "labels web, db\nallow web to connect vsock 5432 of db\nallow web to map-ro region frames of db\n\
         limit web to connect vsock of db at 1 open";
    let monitor = Monitor::new(Policy::parse(policy).unwrap());
    for (uuid, label) in [(1, "web"), (2, "db")] {
        monitor.register(SubjectSpec::vm(Uuid::from_u128(uuid)).label(label)).unwrap();
    }
    let gate: Arc<PolicyGate> = Arc::new(PolicyGate { monitor: monitor.clone(), held: Mutex::default() });
    let request =
        |asked| channel::Request { asker: Party::Vm { uuid: 1 }, peer: Some(Party::Vm { uuid: 2 }), asked };
    let connect = request(Asked::VsockConnect { port: 5432 });
    gate.decide(GrantId(1), &connect).unwrap();
    let refused = gate.decide(GrantId(2), &request(Asked::VsockConnect { port: 22 })).unwrap_err();
    assert_eq!(refused.0, "deny (type): no rule allows it");
    let refused = gate.decide(GrantId(3), &connect).unwrap_err();
    assert!(refused.0.contains("at 1 open"), "{refused:?}");
    gate.closed(GrantId(1), &connect);
    gate.decide(GrantId(4), &connect).unwrap();
    gate.decide(GrantId(5), &request(Asked::RegionMap { name: "frames".into(), writable: false })).unwrap();
    assert!(
        gate.decide(GrantId(6), &request(Asked::RegionMap { name: "frames".into(), writable: true }))
            .is_err()
    );
    let strangers =
        channel::Request { asker: Party::Host("nobody".into()), peer: None, asked: connect.asked.clone() };
    assert!(gate.decide(GrantId(7), &strangers).is_err());

    // After a reload the other crate's gatekeeper asks about all that is open, and closes what is refused.
    monitor
        .reload(Policy::parse("labels web, db\nallow web to map-ro region frames of db").unwrap())
        .unwrap();
    assert_eq!(gate.decide(GrantId(4), &connect), Err(channel::Refusal("revoked".into())));
    gate.decide(GrantId(5), &request(Asked::RegionMap { name: "frames".into(), writable: false })).unwrap();
}

//! Channels, the platform, requests, and guests that break the rules (feature `vmm-devices`).

use std::collections::BTreeSet;
use std::error::Error;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_devices::channel::{self, Gate, GrantId, Refusal, Request};
use vmm_devices::platform::{PlatformEvent, PlatformEvents};
use vmm_devices::virtio::metrics::{Activity, Ended, Metrics};

use super::emit;
use crate::event::{Action, Event, Kind, Object, ObjectClass, Outcome, Party, Verdict};
use crate::pipeline::Emitter;

fn party(party: &channel::Party) -> Party {
    match party {
        channel::Party::Vm(vm) => Party::vm(vm.uuid(), vm.incarnation()),
        other => {
            let text = other.to_string();
            Party::host(text.strip_prefix("host ").unwrap_or(&text))
        }
    }
}

fn object(object: &channel::Object) -> Object {
    match object {
        channel::Object::Vsock { port } => Object::numbered(ObjectClass::Vsock, (*port).into()),
        channel::Object::Network { name } => Object::named(ObjectClass::Network, &**name),
        channel::Object::Region { name } => Object::named(ObjectClass::Region, &**name),
        channel::Object::Doorbell { region } => Object::named(ObjectClass::Doorbell, &**region),
        other => Object::named(ObjectClass::Device, other.to_string()),
    }
}

fn action(action: channel::Action) -> Option<Action> {
    Some(match action {
        channel::Action::Connect => Action::Connect,
        channel::Action::Accept => Action::Accept,
        channel::Action::Attach => Action::Attach,
        channel::Action::MapReadOnly => Action::MapReadOnly,
        channel::Action::MapReadWrite => Action::MapReadWrite,
        channel::Action::Notify => Action::Notify,
        _ => return None,
    })
}

/// The event for a request.
fn event(kind: Kind, id: GrantId, request: &Request) -> Event {
    let mut event = Event::new(kind).subject(party(request.asker())).object(object(request.object()));
    event.peer = request.peer().map(party);
    event.action = action(request.action());
    event.attribute("grant", id.get().to_string())
}

/// A gate that asks another one, and writes down what is opened, refused, taken back and closed. A right that the monitor takes back by
/// itself, with no decision, is closed in the log and no more. What cannot be written down does not
/// open; what is open stays so while the log stands still.
#[derive(Debug)]
pub struct AuditedGate<G> {
    gate: G,
    emitter: Emitter,
    verdicts: bool,
    open: Mutex<BTreeSet<GrantId>>,
}

impl<G: Gate> AuditedGate<G> {
    /// `gate` decides; `emitter` is the source of all its events.
    pub fn new(gate: G, emitter: Emitter) -> Self {
        Self { gate, emitter, verdicts: true, open: Mutex::default() }
    }

    /// Writes down only what opens and closes, and no verdicts: for a gate with a policy that does so itself, by
    /// `hooks::policy` for instance. Each verdict is in the log once then.
    #[must_use]
    pub fn without_verdicts(mut self) -> Self {
        self.verdicts = false;
        self
    }

    fn open(&self) -> MutexGuard<'_, BTreeSet<GrantId>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<G: Gate> Gate for AuditedGate<G> {
    fn decide(&self, id: GrantId, request: &Request) -> Result<(), Refusal> {
        let decided = self.gate.decide(id, request);
        let is_open = self.open().contains(&id);
        match decided {
            // It was asked again, and stays.
            Ok(()) if is_open => Ok(()),
            Ok(()) => {
                let mut opened = event(Kind::Opened, id, request);
                opened.verdict = self.verdicts.then_some(Verdict::Allow);
                match self.emitter.admit(&opened.outcome(Outcome::Success)) {
                    // Who wants it on the disk first has a log of another kind.
                    Ok(_) => {
                        self.open().insert(id);
                        Ok(())
                    }
                    Err(refused) => Err(Refusal::new(refused.to_string())),
                }
            }
            Err(refusal) => {
                // What is open and is refused now is taken back; its holder closes it then.
                let kind = if is_open { Kind::Revoked } else { Kind::Decision };
                if self.verdicts {
                    let denied = event(kind, id, request).verdict(Verdict::Deny);
                    emit(&self.emitter, &denied.outcome(Outcome::Refused).reason(refusal.reason()));
                }
                Err(refusal)
            }
        }
    }

    fn closed(&self, id: GrantId, request: &Request) {
        self.gate.closed(id, request);
        if self.open().remove(&id) {
            emit(&self.emitter, &event(Kind::Closed, id, request).outcome(Outcome::Success));
        }
    }
}

/// Writes down what the guest asks of the platform, and passes it on.
#[derive(Debug)]
pub struct AuditedPlatform<P> {
    next: P,
    emitter: Emitter,
    vm: Party,
}

impl<P: PlatformEvents> AuditedPlatform<P> {
    /// `next` is told after the event is on its way; `vm` is whose platform it is.
    pub fn new(next: P, emitter: Emitter, vm: Party) -> Self {
        Self { next, emitter, vm }
    }
}

impl<P: PlatformEvents> PlatformEvents for AuditedPlatform<P> {
    fn event(&self, event: PlatformEvent) {
        let (kind, reason) = match event {
            PlatformEvent::Reset => (Kind::Reset, "the guest asked for it".to_owned()),
            PlatformEvent::PowerOff => (Kind::Shutdown, "the guest switched it off".to_owned()),
            PlatformEvent::DebugExit { status } => {
                (Kind::Shutdown, format!("debug exit with status {status}"))
            }
            other => (Kind::Administration, format!("{other:?}")),
        };
        let told = Event::new(kind).subject(self.vm.clone()).outcome(Outcome::Success);
        emit(&self.emitter, &told.object(Object::named(ObjectClass::Device, "platform")).reason(reason));
        self.next.event(event);
    }
}

/// Writes down each request that a device has served, as bulk events: those for which there is no room are counted. It never waits.
#[derive(Debug)]
pub struct TrafficLog {
    emitter: Emitter,
    /// An event for each [`Activity`], to which only the bytes are added.
    events: [Event; 3],
}

impl TrafficLog {
    /// For the device of `vm` that stands for `object`.
    pub fn new(emitter: Emitter, vm: &Party, object: &Object) -> Self {
        let event = |action| {
            let mut event = Event::new(Kind::Traffic).subject(vm.clone()).object(object.clone());
            event.action = action;
            event.verdict(Verdict::Allow)
        };
        Self { emitter, events: [Some(Action::Read), Some(Action::Write), None].map(event) }
    }
}

impl Metrics for TrafficLog {
    fn ended(&self, request: Ended) {
        let [read, write, other] = &self.events;
        let event = match request.activity {
            Activity::Read => read,
            Activity::Write => write,
            Activity::Other => other,
        };
        let outcome = if request.succeeded { Outcome::Success } else { Outcome::Failed };
        emit(&self.emitter, &event.clone().outcome(outcome).amount(1, request.bytes));
    }
}

/// Writes down that a driver has broken the rules so that its device needs a reset: for `on_failure` of a transport.
///
/// ```no_run
/// # fn f(emitter: vmm_audit::pipeline::Emitter) {
/// use vmm_audit::{event::Party, hooks::devices::misbehaviour};
///
/// let told = misbehaviour(emitter, Party::vm(0x1234, 1), "disk 0");
/// told(&std::io::Error::other("descriptor 9 of a queue of 8"));
/// # }
/// ```
pub fn misbehaviour(
    emitter: Emitter,
    vm: Party,
    device: &str,
) -> impl Fn(&dyn Error) + Send + Sync + 'static + use<> {
    let device = Object::named(ObjectClass::Device, device);
    move |why| {
        let event = Event::new(Kind::Misbehaviour).subject(vm.clone()).object(device.clone());
        emit(&emitter, &event.outcome(Outcome::NeedsReset).reason(why.to_string()));
    }
}

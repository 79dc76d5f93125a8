//! One right.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::channel::Channel;
use super::life::Life;
use super::registry::Registry;
use crate::model::{Action, Decision, Flow, Kind, Object, Request, SubjectId, Value};
use crate::monitor::{Charge, Honours};
use crate::sync::{Mutex, lock};

/// Which grant of a [`Monitor`](crate::Monitor)'s; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GrantId(pub(crate) u64);

impl GrantId {
    /// As a number, for logs.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for GrantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "grant {}", self.0)
    }
}

/// What ends a channel whose right has been taken back, in this order. They come from the thread that revokes, each once, with no
/// lock of the monitor's held. They may ask the monitor for anything but the revocation of the same grant.
pub trait Ends: Send {
    /// Takes nothing new: no request, no connection. Kicks out who might stay long.
    fn quiesce(&mut self) {}
    /// Takes the channel out of the guest's reach: unmaps memory, shuts a socket. What it is made of stays, as somebody may be using
    /// it still.
    fn unmap(&mut self) {}
    /// Nobody uses it any more: finishes or throws away what is queued.
    fn drain(&mut self) {}
    /// Gives up what it is made of. The value itself is dropped after that, and what it holds with it.
    fn close(&mut self) {}
}

/// A closure for channels that end in one go.
impl<F: FnMut() + Send> Ends for F {
    fn close(&mut self) {
        self();
    }
}

/// How far a revocation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum RevokeOutcome {
    /// The channel is closed.
    Closed,
    /// Somebody has been using it for longer than the monitor waits. Nobody can begin to, and it is out of the guest's reach;
    /// [`Monitor::reap`](crate::Monitor::reap) closes it once that has ended.
    InUse,
}

#[derive(Default)]
struct Sequence {
    ends: Option<Box<dyn Ends>>,
    /// Quiesced and unmapped.
    unmapped: bool,
    /// Closed.
    done: bool,
}

/// A request, with a copy of its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OwnedRequest {
    asker: SubjectId,
    peer: Option<SubjectId>,
    action: Action,
    kind: Kind,
    number: u64,
    name: Option<Box<str>>,
    bytes: u64,
}

impl OwnedRequest {
    pub(crate) fn new(request: &Request<'_>) -> Self {
        let (number, name) = match request.object.value() {
            Value::Number(number) => (number, None),
            Value::Name(name) => (0, Some(name.into())),
        };
        let kind = request.object.kind();
        let Request { asker, peer, action, bytes, .. } = *request;
        Self { asker, peer, action, kind, number, name, bytes }
    }

    /// `None` for what never was a request.
    pub(crate) fn get(&self) -> Option<Request<'_>> {
        let value = self.name.as_deref().map_or(Value::Number(self.number), Value::Name);
        let object = Object::new(self.kind, value)?;
        Some(Request { asker: self.asker, peer: self.peer, action: self.action, object, bytes: self.bytes })
    }

    pub(crate) fn is_about(&self, subject: SubjectId) -> bool {
        self.asker == subject || self.peer == Some(subject)
    }
}

/// What a grant, the registry and whoever revokes have in common.
pub(crate) struct Right {
    pub(crate) id: GrantId,
    pub(crate) request: OwnedRequest,
    pub(crate) honours: Honours,
    pub(crate) flow: Flow,
    decision: Mutex<Decision>,
    life: Life,
    sequence: Mutex<Sequence>,
    /// What it takes of limits, until it is dropped.
    charges: Mutex<Vec<Charge>>,
}

impl Right {
    pub(crate) fn new(
        id: GrantId,
        request: OwnedRequest,
        flow: Flow,
        honours: Honours,
        decision: Decision,
        charges: Vec<Charge>,
    ) -> Self {
        Self {
            id,
            request,
            honours,
            flow,
            decision: Mutex::new(decision),
            life: Life::new(),
            sequence: Mutex::default(),
            charges: Mutex::new(charges),
        }
    }

    pub(crate) fn is_live(&self) -> bool {
        self.life.is_live()
    }

    pub(crate) fn decision(&self) -> Decision {
        *lock(&self.decision)
    }

    pub(crate) fn decide_anew(&self, decision: Decision) {
        *lock(&self.decision) = decision;
    }

    /// Ends the right and the channel: quiesce, unmap, wait for those who use it, drain, close. Whoever comes second waits for the
    /// first.
    pub(crate) fn revoke(&self, most: Duration) -> RevokeOutcome {
        self.life.revoke();
        let mut sequence = lock(&self.sequence);
        if sequence.done {
            return RevokeOutcome::Closed;
        }
        if !sequence.unmapped {
            if let Some(ends) = &mut sequence.ends {
                ends.quiesce();
                ends.unmap();
            }
            sequence.unmapped = true;
        }
        if !self.life.wait_idle(Some(most)) {
            return RevokeOutcome::InUse;
        }
        sequence.done = true;
        // What it holds goes here, when nobody can be using it.
        if let Some(mut ends) = sequence.ends.take() {
            ends.drain();
            ends.close();
        }
        RevokeOutcome::Closed
    }

    fn on_revoked(&self, mut ends: Box<dyn Ends>) {
        let mut sequence = lock(&self.sequence);
        if !sequence.done && !sequence.unmapped {
            sequence.ends = Some(ends);
            return;
        }
        ends.quiesce();
        ends.unmap();
        if sequence.done {
            drop(sequence);
            ends.drain();
            ends.close();
        } else {
            sequence.ends = Some(ends);
        }
    }

    /// Gives back what it takes of limits.
    pub(crate) fn release(&self) {
        let charges = std::mem::take(&mut *lock(&self.charges));
        charges.iter().for_each(Charge::give_back);
    }
}

/// The right to a channel of whichever kind: what adapters for other crates' grants keep. Who has the channel keeps it, and drops it
/// once the channel is closed.
#[must_use = "a channel whose grant is dropped is closed"]
pub struct Hold {
    pub(crate) right: Arc<Right>,
    registry: Arc<Registry>,
}

impl Hold {
    pub(crate) fn new(right: Arc<Right>, registry: Arc<Registry>) -> Self {
        Self { right, registry }
    }

    /// Which it is.
    pub fn id(&self) -> GrantId {
        self.right.id
    }

    /// What was decided, by the policy that is in force: its [`Verdict::Throttle`](crate::Verdict::Throttle) says how fast, and
    /// [`Policy::redirection`](crate::Policy::redirection) of its rule where to.
    pub fn decision(&self) -> Decision {
        self.right.decision()
    }

    /// What was asked for.
    pub fn channel(&self) -> OpenChannel {
        OpenChannel { id: self.right.id, request: self.right.request.clone() }
    }

    /// Whether it has not been revoked. Just [`enter`](Self::enter) makes sure that it stays so.
    pub fn is_live(&self) -> bool {
        self.right.is_live()
    }

    /// Begins a use of the channel, or `None` if the right is gone. Until the use is dropped nobody closes the channel; a revocation waits
    /// for it, as long as the monitor allows. It costs two atomic operations and takes no lock.
    pub fn enter(&self) -> Option<Use<'_>> {
        self.right.life.enter().then(|| Use { right: &self.right })
    }

    /// Has `ends` called when the right is revoked, at once if it has been. They replace those before, and are forgotten when the
    /// grant is dropped.
    pub fn on_revoked(&self, ends: impl Ends + 'static) {
        self.right.on_revoked(Box::new(ends));
    }

    /// For those who use the channel while another holds the grant.
    pub fn watch(&self) -> Watch {
        Watch { right: Arc::clone(&self.right) }
    }

    /// As a grant of one kind.
    ///
    /// # Errors
    /// With the hold itself, if it is for another kind.
    pub fn into_grant<C: Channel>(self) -> Result<Grant<C>, Self> {
        if self.right.request.kind == C::KIND {
            Ok(Grant { hold: self, kind: PhantomData })
        } else {
            Err(self)
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Those who watch see that it is gone.
        self.right.life.revoke();
        self.registry.remove(self.right.id);
        self.right.release();
        // Whoever revokes is at the sequence now, perhaps in the very call that drops this.
        // What somebody who watches is using still goes with the last of them.
        if self.right.life.is_idle() {
            let ends = self.right.sequence.try_lock().ok().and_then(|mut sequence| sequence.ends.take());
            drop(ends);
        }
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hold")
            .field("id", &self.right.id)
            .field("request", &self.right.request)
            .field("live", &self.is_live())
            .finish_non_exhaustive()
    }
}

/// The right to one channel of one kind. [`Monitor::open`](crate::Monitor::open) makes it and nothing else does; it cannot be copied.
/// A device that opens a channel takes it by value, so that one which forgets to ask does not compile:
///
/// ```compile_fail,E0308
/// use vmm_policy::{Grant, channel::{Disk, Vsock}};
/// fn open_port(_: Grant<Vsock>) {}
/// fn wrong(disk: Grant<Disk>) { open_port(disk) }
/// ```
///
/// and nobody makes one up:
///
/// ```compile_fail,E0451
/// use std::marker::PhantomData;
/// use vmm_policy::{Grant, Hold, channel::Vsock};
/// fn forge(hold: Hold) -> Grant<Vsock> { Grant { hold, kind: PhantomData } }
/// ```
#[must_use = "a channel whose grant is dropped is closed"]
pub struct Grant<C: Channel> {
    hold: Hold,
    kind: PhantomData<C>,
}

impl<C: Channel> Deref for Grant<C> {
    type Target = Hold;

    fn deref(&self) -> &Hold {
        &self.hold
    }
}

impl<C: Channel> fmt::Debug for Grant<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.hold.fmt(f)
    }
}

/// A use of a channel; see [`Hold::enter`].
#[must_use = "the use ends when it is dropped"]
pub struct Use<'h> {
    right: &'h Right,
}

impl Drop for Use<'_> {
    fn drop(&mut self) {
        self.right.life.leave();
    }
}

impl fmt::Debug for Use<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Use").field(&self.right.id).finish()
    }
}

/// Uses a channel whose grant another holds.
#[derive(Clone)]
pub struct Watch {
    right: Arc<Right>,
}

impl Watch {
    /// Whether the grant is there and has not been revoked.
    pub fn is_live(&self) -> bool {
        self.right.is_live()
    }

    /// As [`Hold::enter`].
    pub fn enter(&self) -> Option<Use<'_>> {
        self.right.life.enter().then(|| Use { right: &self.right })
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("id", &self.right.id).field("live", &self.is_live()).finish()
    }
}

/// A channel that is or was open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenChannel {
    id: GrantId,
    request: OwnedRequest,
}

impl OpenChannel {
    pub(crate) fn new(right: &Right) -> Self {
        Self { id: right.id, request: right.request.clone() }
    }

    /// Its grant.
    pub fn id(&self) -> GrantId {
        self.id
    }

    /// Who has it.
    pub fn asker(&self) -> SubjectId {
        self.request.asker
    }

    /// Whom it leads to, if that is one.
    pub fn peer(&self) -> Option<SubjectId> {
        self.request.peer
    }

    /// What is done.
    pub fn action(&self) -> Action {
        self.request.action
    }

    /// What of.
    pub fn kind(&self) -> Kind {
        self.request.kind
    }

    /// Which one.
    pub fn value(&self) -> Value<'_> {
        self.request.name.as_deref().map_or(Value::Number(self.request.number), Value::Name)
    }

    /// The request for it.
    pub fn request(&self) -> Option<Request<'_>> {
        self.request.get()
    }
}

/// A channel that lost its right.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Revocation {
    /// Which.
    pub channel: OpenChannel,
    /// Why; `None` where somebody revoked it, or its asker or peer is gone.
    pub decision: Option<Decision>,
    /// How far it has come.
    pub outcome: RevokeOutcome,
    /// How long that took.
    pub took: Duration,
}

impl Revocation {
    pub(crate) fn of(right: &Right, decision: Option<Decision>, most: Duration) -> Self {
        let begin = Instant::now();
        let outcome = right.revoke(most);
        Self { channel: OpenChannel::new(right), decision, outcome, took: begin.elapsed() }
    }

    /// Whether the channel is closed.
    pub fn is_closed(&self) -> bool {
        self.outcome == RevokeOutcome::Closed
    }
}

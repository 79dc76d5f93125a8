//! The event itself.

use super::{Action, Kind, Launch, Measured, Object, Outcome, Party, Text, Verdict};
use crate::digest::Digest;

/// Attributes and measurements of an event at most, each.
pub const MAX_ATTRIBUTES: usize = 16;

/// What happened: see the [module](super) for the fields. Whoever emits it sets what he knows; times, `source_seq` and `lost` are set by the
/// [`Emitter`](crate::pipeline::Emitter).
///
/// ```
/// use vmm_audit::event::{Action, Event, Kind, Object, ObjectClass, Party, Verdict};
///
/// let event = Event::new(Kind::Decision)
///     .subject(Party::vm(0x1234, 1))
///     .peer(Party::vm(0x5678, 1))
///     .action(Action::Connect)
///     .object(Object::numbered(ObjectClass::Vsock, 5432))
///     .verdict(Verdict::Deny)
///     .rule("tenants-apart", 12);
/// assert!(event.is_critical());
/// assert_eq!(Event::decode(&event.encode()?)?, event);
/// # Ok::<(), vmm_audit::event::EventError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Event {
    /// What happened.
    pub kind: Kind,
    /// What was asked for or done.
    pub action: Option<Action>,
    /// What was decided.
    pub verdict: Option<Verdict>,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub monotonic: u64,
    /// Nanoseconds since 1970.
    pub wall: u64,
    /// Which event of its source, from 1; 0 where there is no count.
    pub source_seq: u64,
    /// Who asks.
    pub subject: Option<Party>,
    /// Of whom.
    pub peer: Option<Party>,
    /// What for.
    pub object: Option<Object>,
    /// The rule that decided.
    pub rule: Option<Text>,
    /// Its line, from 1; 0 where there is none.
    pub rule_line: u32,
    /// The policy in force.
    pub policy: Option<Digest>,
    /// The request as it came.
    pub request: Option<Digest>,
    /// Why, for people.
    pub reason: Option<Text>,
    /// How many.
    pub count: u64,
    /// Bytes that this is about.
    pub bytes: u64,
    /// Events of the source so far that were counted only.
    pub lost: u64,
    /// The host's boot identifier.
    pub boot: Option<u128>,
    /// Of a virtual machine's launch.
    pub launch_digest: Option<Digest>,
    /// What the launch was measured from.
    pub measured: Vec<Measured>,
    /// Whatever else: names and values.
    pub attributes: Vec<(Text, Text)>,
    /// The numbers of fields that this version does not know.
    pub unknown: Vec<u32>,
}

impl Event {
    /// One that says no more than what kind it is of.
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            action: None,
            verdict: None,
            outcome: None,
            monotonic: 0,
            wall: 0,
            source_seq: 0,
            subject: None,
            peer: None,
            object: None,
            rule: None,
            rule_line: 0,
            policy: None,
            request: None,
            reason: None,
            count: 0,
            bytes: 0,
            lost: 0,
            boot: None,
            launch_digest: None,
            measured: Vec::new(),
            attributes: Vec::new(),
            unknown: Vec::new(),
        }
    }

    /// The start of a virtual machine, with its measurement.
    pub fn launch(vm: Party, launch: &Launch) -> Self {
        let mut event = Self::new(Kind::Launch).subject(vm);
        event.launch_digest = Some(launch.digest());
        event.measured = launch.measured().to_vec();
        event
    }

    /// Whether its place is in the reserved ring.
    pub fn is_critical(&self) -> bool {
        self.kind.is_critical(self.verdict)
    }

    /// With who asks.
    #[must_use]
    pub fn subject(mut self, party: Party) -> Self {
        self.subject = Some(party);
        self
    }

    /// With whom it is asked of.
    #[must_use]
    pub fn peer(mut self, party: Party) -> Self {
        self.peer = Some(party);
        self
    }

    /// With what is asked for.
    #[must_use]
    pub fn object(mut self, object: Object) -> Self {
        self.object = Some(object);
        self
    }

    /// With what is to be done.
    #[must_use]
    pub fn action(mut self, action: Action) -> Self {
        self.action = Some(action);
        self
    }

    /// With what was decided.
    #[must_use]
    pub fn verdict(mut self, verdict: Verdict) -> Self {
        self.verdict = Some(verdict);
        self
    }

    /// With how it ended.
    #[must_use]
    pub fn outcome(mut self, outcome: Outcome) -> Self {
        self.outcome = Some(outcome);
        self
    }

    /// With the rule that decided, and its line in the policy, from 1; 0 if it has none.
    #[must_use]
    pub fn rule(mut self, rule: impl Into<Text>, line: u32) -> Self {
        self.rule = Some(rule.into());
        self.rule_line = line;
        self
    }

    /// With the digest of the policy in force.
    #[must_use]
    pub fn policy(mut self, policy: Digest) -> Self {
        self.policy = Some(policy);
        self
    }

    /// With the digest of the request as it came.
    #[must_use]
    pub fn request(mut self, request: Digest) -> Self {
        self.request = Some(request);
        self
    }

    /// With a reason for people.
    #[must_use]
    pub fn reason(mut self, reason: impl Into<Text>) -> Self {
        self.reason = Some(reason.into());
        self
    }

    /// With how many of it, and how many bytes.
    #[must_use]
    pub fn amount(mut self, count: u64, bytes: u64) -> Self {
        self.count = count;
        self.bytes = bytes;
        self
    }

    /// With one more attribute, of [`MAX_ATTRIBUTES`] at most: [`encode`](Self::encode) refuses more.
    #[must_use]
    pub fn attribute(mut self, name: impl Into<Text>, value: impl Into<Text>) -> Self {
        self.attributes.push((name.into(), value.into()));
        self
    }

    /// The value of an attribute.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(n, _)| n.as_str() == name).map(|(_, value)| value.as_str())
    }
}

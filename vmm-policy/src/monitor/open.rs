//! Rights to channels: given, asked about, taken back.

use std::fmt;
use std::ops::BitOr;
use std::sync::Arc;

use super::Monitor;
use super::authorize::Mode;
use super::view::Snapshot;
use crate::grant::channel::Channel;
use crate::grant::{Grant, GrantId, Hold, OpenChannel, OwnedRequest, Revocation, Right};
use crate::model::{Decision, Flow, Request, Verdict};
use crate::sync::lock;

/// Which answers beside `allow` the holder of a channel can act on. What it cannot is refused, so that a device which knows nothing of
/// redirection does not connect to where it must not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Honours(u8);

impl Honours {
    /// None: `allow` or nothing.
    pub const NONE: Self = Self(0);
    /// It keeps to a rate.
    pub const THROTTLE: Self = Self(1);
    /// It opens the channel where nobody else is.
    pub const QUARANTINE: Self = Self(2);
    /// It opens the channel to whom it is told.
    pub const REDIRECT: Self = Self(4);
    /// Somebody has been asked and has said yes ([`Desk`](crate::trust::Desk)).
    pub(crate) const CONFIRMED: Self = Self(8);

    /// Whether it can act on it.
    pub fn accepts(self, verdict: Verdict) -> bool {
        let needs = match verdict {
            Verdict::Deny => return false,
            Verdict::Allow => Self::NONE,
            Verdict::Throttle(_) => Self::THROTTLE,
            Verdict::Quarantine => Self::QUARANTINE,
            Verdict::Redirect => Self::REDIRECT,
            Verdict::Ask => Self::CONFIRMED,
        };
        self.0 & needs.0 == needs.0
    }
}

impl BitOr for Honours {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Why a channel does not open. The guest learns that it is refused, the monitor's log why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub struct Refused {
    /// What was decided.
    pub decision: Decision,
    /// The rule's place and text, or what there is instead.
    pub reason: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): {}", self.decision.verdict, self.decision.layer, self.reason)
    }
}

impl Monitor {
    /// Asks for a channel of a kind whose holder acts on `allow` alone.
    ///
    /// # Errors
    /// If the request is for another kind, or is refused.
    pub fn open<C: Channel>(&self, request: &Request<'_>) -> Result<Grant<C>, Refused> {
        self.open_with(request, Honours::NONE)
    }

    /// Asks for a channel of a kind.
    ///
    /// # Errors
    /// If the request is for another kind, is refused, or is answered with what the holder cannot act on.
    pub fn open_with<C: Channel>(
        &self,
        request: &Request<'_>,
        honours: Honours,
    ) -> Result<Grant<C>, Refused> {
        if request.object.kind() != C::KIND {
            let reason = format!("{} is asked for where {} is opened", request.object.kind(), C::KIND);
            let epoch = self.epoch();
            let decision =
                Decision { verdict: Verdict::Deny, layer: crate::Layer::Identity, rule: None, epoch };
            return Err(Refused { decision, reason });
        }
        let hold = self.hold(request, honours)?;
        hold.into_grant().map_err(|hold| self.refused(hold.decision()))
    }

    /// Asks for a channel of whichever kind, for adapters.
    ///
    /// # Errors
    /// If the request is refused, or answered with what the holder cannot act on.
    pub fn hold(&self, request: &Request<'_>, honours: Honours) -> Result<Hold, Refused> {
        self.hold_telling(request, honours, |now, decision| self.told(now, request, decision))
    }

    /// The same for what somebody has said yes to: whoever calls this tells of it, unless it is refused.
    pub(crate) fn hold_confirmed(&self, request: &Request<'_>) -> Result<Hold, Refused> {
        self.hold_telling(request, Honours::CONFIRMED, |now, decision| {
            if let Some(shadow) = &now.shadow {
                self.compare_shadow(shadow, request, decision);
            }
        })
    }

    fn hold_telling(
        &self,
        request: &Request<'_>,
        honours: Honours,
        given: impl FnOnce(&Snapshot, &Decision),
    ) -> Result<Hold, Refused> {
        let id = self.shared.registry.next_id();
        let flow = request.op().map_or(Flow::None, |op| op.flow());
        loop {
            let generation = self.shared.registry.generation();
            let now = self.shared.now.load_full();
            let mut charges = Vec::new();
            let decision = self.decide(&now, request, Mode::Open, Some(&mut charges));
            let right =
                Arc::new(Right::new(id, OwnedRequest::new(request), flow, honours, decision, charges));
            if !honours.accepts(decision.verdict) {
                right.release();
                self.told(&now, request, &decision);
                return Err(self.refused(decision));
            }
            // What was decided by what holds no more, and those who look at what is open have not seen, is decided again.
            if self.put(generation, &right) {
                given(&now, &decision);
                return Ok(Hold::new(right, Arc::clone(&self.shared.registry)));
            }
            right.release();
        }
    }

    /// Adds what was decided at a generation to what is open, unless something has changed since.
    fn put(&self, generation: u64, right: &Arc<Right>) -> bool {
        let registry = &self.shared.registry;
        if right.flow == Flow::None {
            return registry.insert(generation, right);
        }
        // What somebody learns goes on along what is open: so nobody learns meanwhile, and what was learned since it was decided is to go on first.
        let _wall = lock(&self.shared.wall);
        let now = self.shared.now.load();
        let resolved =
            right.request.get().and_then(|request| now.main.resolve(&request).map(|all| all.gained()));
        resolved == Some(0) && registry.insert(generation, right)
    }

    /// A decision as a refusal, with the rule's place and text, or what there is instead: for who asks and does not open.
    pub fn refused(&self, decision: Decision) -> Refused {
        let policy = self.policy();
        let text = decision.rule.and_then(|rule| policy.rule(rule)).map(|rule| rule.to_string());
        let reason = text.unwrap_or_else(|| {
            let reason = match decision.layer {
                crate::Layer::Identity => "nobody such is registered, or nothing such can be done",
                crate::Layer::Lattice => "levels or categories forbid that information goes so",
                crate::Layer::Wall => "one of the two has had to do with another side of a wall",
                _ => "no rule allows it",
            };
            reason.to_owned()
        });
        Refused { decision, reason }
    }

    /// What is open, in the order in which it was opened; what has been revoked and is not closed yet is not among it.
    pub fn open_channels(&self) -> Vec<OpenChannel> {
        let rights = self.shared.registry.all();
        rights.iter().filter(|right| right.is_live()).map(|right| OpenChannel::new(right)).collect()
    }

    /// Takes back one right, and returns when its channel is closed; `None` if there is none.
    pub fn revoke(&self, id: GrantId) -> Option<Revocation> {
        let right = self.shared.registry.get(id).filter(|right| right.is_live())?;
        Some(self.take_back(&right, None))
    }

    /// Takes back those that `which` says yes to.
    pub fn revoke_all(&self, mut which: impl FnMut(&OpenChannel) -> bool) -> Vec<Revocation> {
        let rights = self.shared.registry.all();
        let chosen = rights.iter().filter(|right| right.is_live() && which(&OpenChannel::new(right)));
        chosen.map(|right| self.take_back(right, None)).collect()
    }

    /// Asks again about all that is open, and takes back what would not be opened now. Whatever changes what conditions are about
    /// does so: it is for who changes something that this crate does not know of.
    pub fn reconsider(&self) -> Vec<Revocation> {
        self.reconsider_those(|_| true)
    }

    pub(super) fn reconsider_those(&self, mut which: impl FnMut(&Right) -> bool) -> Vec<Revocation> {
        let rights = self.shared.registry.changed();
        let now = self.shared.now.load_full();
        let mut revoked = Vec::new();
        for right in rights.iter().filter(|right| right.is_live() && which(right)) {
            let Some(request) = right.request.get() else { continue };
            let decision = self.decide(&now, &request, Mode::Look, None);
            if right.honours.accepts(decision.verdict) {
                right.decide_anew(decision);
            } else {
                revoked.push(self.take_back(right, Some(decision)));
            }
        }
        revoked
    }

    /// Closes the channels that have been revoked while somebody used them, as far as that has ended, without waiting.
    pub fn reap(&self) -> Vec<Revocation> {
        let rights = self.shared.registry.all();
        let stuck = rights.iter().filter(|right| !right.is_live());
        stuck.map(|right| Revocation::of(right, None, std::time::Duration::ZERO)).collect()
    }

    fn take_back(&self, right: &Arc<Right>, decision: Option<Decision>) -> Revocation {
        let revocation = Revocation::of(right, decision, self.shared.patience);
        self.observe(|observer| observer.revoked(&revocation));
        revocation
    }
}

//! Management verbs, which are written down before they are carried out.
//!
//! What an operator does to a machine (launch, pause, destroy) is two events of kind `administration`: one before it is done, without an
//! outcome, and one with how it ended. Both have the same number as attribute `operation`. A first one alone is a verb in the midst of which the
//! monitor, or its host, has ended. What the log does not take is not done.
//!
//! Whether somebody may do it is for a policy to say: `hooks::desk` makes a [`Verb`] of what one has granted. A program with one user makes them itself:
//!
//! ```no_run
//! # fn f(emitter: vmm_audit::pipeline::Emitter) -> Result<(), Box<dyn std::error::Error>> {
//! use vmm_audit::event::Party;
//! use vmm_audit::verb::Verb;
//!
//! let pause = Verb::new(emitter, Party::host("uid 1000"), "pause").of(Party::vm(0x1234, 1));
//! pause.carry_out(|| std::fs::write("/run/vm/paused", "1"))?;
//! # Ok(()) }
//! ```

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::event::{Action, Event, Kind, Object, ObjectClass, Outcome, Party, Text};
use crate::pipeline::{Emitter, NotDurable, Refused};

/// How long the disk may take to have it, if nothing is said.
const WITHIN: Duration = Duration::from_secs(10);

/// Counts the verbs of this process.
static OPERATIONS: AtomicU64 = AtomicU64::new(0);

/// Why a verb is not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotBegun {
    /// The log does not take it.
    #[error("not carried out: {0}")]
    Refused(#[from] Refused),
    /// The disk has not got it in time, or will not.
    #[error("not carried out: {0}")]
    NotDurable(#[from] NotDurable),
    /// The policy has taken back the right to it while it was written down.
    #[error("not carried out: the right to it has been taken back")]
    TakenBack,
}

/// Why a verb was not carried out, or did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VerbError<E> {
    /// Nothing has been done.
    #[error(transparent)]
    NotBegun(#[from] NotBegun),
    /// It was tried.
    #[error("{0:#}")]
    Failed(E),
}

/// Whether somebody still has the right to it. What it owns is kept until the verb has ended.
type Right = Box<dyn Fn() -> bool + Send + Sync>;

/// Something that somebody may do, and has not begun.
#[must_use = "nothing is done yet"]
pub struct Verb {
    emitter: Emitter,
    event: Box<Event>,
    within: Duration,
    right: Option<Right>,
}

impl Verb {
    /// For `who`, who needs no leave.
    pub fn new(emitter: Emitter, who: Party, verb: &str) -> Self {
        let event = Event::new(Kind::Administration).subject(who).action(Action::Administer);
        Self::with(emitter, event.object(Object::named(ObjectClass::Verb, verb)))
    }

    /// From an event that says who, what and of whom.
    pub(crate) fn with(emitter: Emitter, event: Event) -> Self {
        let operation = OPERATIONS.fetch_add(1, Ordering::Relaxed) + 1;
        let event = event.attribute("operation", operation.to_string());
        Self { emitter, event: Box::new(event), within: WITHIN, right: None }
    }

    /// Begins only while there is that right.
    #[cfg(feature = "vmm-policy")]
    pub(crate) fn under(mut self, right: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        self.right = Some(Box::new(right));
        self
    }

    /// What it is done to.
    pub fn of(mut self, vm: Party) -> Self {
        self.event.peer = Some(vm);
        self
    }

    /// Says more of it, in both events: which host a machine goes to, which policy comes into force.
    pub fn attribute(mut self, name: impl Into<Text>, value: impl Into<Text>) -> Self {
        self.event.attributes.push((name.into(), value.into()));
        self
    }

    /// How long the disk may take to have the first event; 10 seconds if nothing is said.
    pub fn within(mut self, within: Duration) -> Self {
        self.within = within;
        self
    }

    /// Writes down that it is about to be done, and waits until the disk has that.
    ///
    /// # Errors
    /// If that cannot be, or its right has been taken back meanwhile: it must not be done then.
    pub fn begin(self) -> Result<Begun, NotBegun> {
        let Self { emitter, event, within, right } = self;
        let receipt = emitter.admit(&event)?;
        // What is left of the event is for the other one.
        let ended = Event { rule: None, rule_line: 0, policy: None, ..*event };
        let begun = Begun { emitter, event: ended, right, is_told: false };
        let not_begun = match receipt.wait(within) {
            Err(why) => NotBegun::from(why),
            Ok(_) if begun.is_taken_back() => NotBegun::TakenBack,
            Ok(_) => return Ok(begun),
        };
        // Should the disk have it after all, it has this as well.
        begun.ended(Outcome::Refused, not_begun.to_string());
        Err(not_begun)
    }

    /// The same, does it, and writes down how it ended. A revocation of the right in the midst of it does not stop it.
    ///
    /// # Errors
    /// As [`begin`](Self::begin), or those of `act`.
    pub fn carry_out<T, E: fmt::Display>(
        self,
        act: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, VerbError<E>> {
        let begun = self.begin()?;
        match act() {
            Ok(done) => {
                begun.done();
                Ok(done)
            }
            Err(error) => {
                begun.failed(format!("{error:#}"));
                Err(VerbError::Failed(error))
            }
        }
    }
}

impl fmt::Debug for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verb").field("event", &self.event).finish_non_exhaustive()
    }
}

/// A verb that is being carried out. Dropped without a word, as by a panic, it is in the log as one that failed.
#[must_use = "how it ends is to be said"]
pub struct Begun {
    emitter: Emitter,
    event: Event,
    right: Option<Right>,
    is_told: bool,
}

impl Begun {
    /// Whether the right to it has been taken back since; a verb that takes long asks now and then.
    pub fn is_taken_back(&self) -> bool {
        self.right.as_ref().is_some_and(|right| !right())
    }

    /// It is done.
    pub fn done(mut self) {
        self.tell(Outcome::Success, None);
    }

    /// It has failed.
    pub fn failed(self, reason: impl Into<Text>) {
        self.ended(Outcome::Failed, reason);
    }

    /// It has ended so.
    pub fn ended(mut self, outcome: Outcome, reason: impl Into<Text>) {
        self.tell(outcome, Some(reason.into()));
    }

    fn tell(&mut self, outcome: Outcome, reason: Option<Text>) {
        self.is_told = true;
        let event = Event { outcome: Some(outcome), reason, ..self.event.clone() };
        if let Err(error) = self.emitter.emit(&event) {
            // The first event had no fewer fields, but perhaps no reason.
            tracing::error!(error = %error, "the end of a verb is counted and not written");
        }
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if !self.is_told {
            self.tell(Outcome::Failed, Some(Text::new("given up in the midst of it")));
        }
    }
}

impl fmt::Debug for Begun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Begun").field("event", &self.event).finish_non_exhaustive()
    }
}

//! A right in the hands of who has the channel.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;

use super::channel::Channel;
use super::open::OpenChannel;
use super::registry::Registry;
use super::right::{Ends, GrantId, Right};
use crate::model::Decision;

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
        OpenChannel::new(&self.right)
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

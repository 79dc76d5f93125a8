//! Who keeps account of what is open.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::gate::{DenyAll, Gate, Refusal};
use super::grant::{Grant, GrantId, Right};
use super::request::{Channel, Party, Request};

/// What is open.
#[derive(Default)]
struct Open {
    rights: BTreeMap<GrantId, Arc<Right>>,
    /// How often everything has been reconsidered.
    epoch: u64,
}

/// What a gatekeeper and its grants have in common.
pub(super) struct Account {
    gate: Box<dyn Gate>,
    next: AtomicU64,
    open: Mutex<Open>,
}

impl Account {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn closed(&self, id: GrantId, request: &Request) {
        // The guard goes before the gate is called.
        drop(self.open().rights.remove(&id));
        self.gate.closed(id, request);
    }
}

/// Hands out [`Grant`]s, after asking a [`Gate`], and takes them back. Its clones are the same one. The default refuses
/// everything ([`DenyAll`]).
#[derive(Clone)]
pub struct Gatekeeper {
    account: Arc<Account>,
}

/// A channel that is open.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpenChannel {
    /// Its grant.
    pub id: GrantId,
    /// What was asked for.
    pub request: Request,
}

/// A channel that lost its right.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClosedChannel {
    /// Which.
    pub channel: OpenChannel,
    /// Why.
    pub why: Refusal,
    /// From when its right was taken back to when its holder had closed it.
    pub took: Duration,
}

impl Gatekeeper {
    /// One that asks `gate`.
    pub fn new(gate: impl Gate + 'static) -> Self {
        let account = Account { gate: Box::new(gate), next: AtomicU64::new(1), open: Mutex::default() };
        Self { account: Arc::new(account) }
    }

    /// Asks for a channel: `asker` wants `channel` of `peer`.
    ///
    /// # Errors
    /// If the gate refuses.
    pub fn open<C: Channel>(
        &self,
        asker: Party,
        peer: Option<Party>,
        channel: C,
    ) -> Result<Grant<C>, Refusal> {
        let account = &self.account;
        let id = GrantId(account.next.fetch_add(1, Ordering::Relaxed));
        let right = Arc::new(Right::new(Request::new(asker, peer, &channel)));
        loop {
            let epoch = account.open().epoch;
            // No lock is held here.
            if let Err(refusal) = account.gate.decide(id, &right.request) {
                account.gate.closed(id, &right.request);
                return Err(refusal);
            }
            let mut open = account.open();
            // Else it was decided by what may hold no more, and `reconsider` has not seen it.
            if open.epoch == epoch {
                open.rights.insert(id, Arc::clone(&right));
                break;
            }
        }
        Ok(Grant::new(channel, id, right, Arc::clone(account)))
    }

    /// Takes back the right of `id`, and returns when its holder has closed the channel, as far as it has said how
    /// ([`Grant::on_revoked`]). Whether there was one to take back: if another thread has done so and the holder still closes it,
    /// this waits for that too. Only where it is called by such a closure itself, or by a gate that one has led to, it waits for no
    /// other one.
    pub fn revoke(&self, id: GrantId) -> bool {
        let right = self.account.open().rights.get(&id).map(Arc::clone);
        right.is_some_and(|right| right.revoke())
    }

    /// Takes back all that `which` says yes to, and returns how many that were. It waits as [`revoke`](Self::revoke) does.
    pub fn revoke_all(&self, mut which: impl FnMut(&Request) -> bool) -> usize {
        let chosen = self.rights().into_iter().filter(|(_, right)| which(&right.request));
        chosen.filter(|(_, right)| right.revoke()).count()
    }

    /// Asks the gate about all that is open and takes back what it refuses. Those channels, with the reasons, when their
    /// holders have closed them. It waits as well for what another thread has taken back and the holder still closes.
    pub fn reconsider(&self) -> Vec<(OpenChannel, Refusal)> {
        self.reconsider_timed().into_iter().map(|closed| (closed.channel, closed.why)).collect()
    }

    /// The same, with how long each took.
    pub fn reconsider_timed(&self) -> Vec<ClosedChannel> {
        self.account.open().epoch += 1;
        let mut closed = Vec::new();
        for (id, right) in self.rights() {
            let decided =
                if right.is_live() { self.account.gate.decide(id, &right.request).err() } else { None };
            if decided.is_none() && right.is_live() {
                continue;
            }
            // What lost its right before is waited for.
            let begun = Instant::now();
            let was_live = right.revoke();
            if let Some(why) = decided.filter(|_| was_live) {
                let channel = OpenChannel { id, request: right.request.clone() };
                closed.push(ClosedChannel { channel, why, took: begun.elapsed() });
            }
        }
        closed
    }

    /// All that there are, also those that have been taken back and are not closed yet.
    fn rights(&self) -> Vec<(GrantId, Arc<Right>)> {
        self.account.open().rights.iter().map(|(id, right)| (*id, Arc::clone(right))).collect()
    }

    /// What is open, in the order in which it was opened; what has been revoked and is not closed yet is not among it.
    pub fn open_channels(&self) -> Vec<OpenChannel> {
        let open = self.account.open();
        let live = open.rights.iter().filter(|(_, right)| right.is_live());
        live.map(|(id, right)| OpenChannel { id: *id, request: right.request.clone() }).collect()
    }
}

impl Default for Gatekeeper {
    fn default() -> Self {
        Self::new(DenyAll)
    }
}

impl fmt::Debug for Gatekeeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gatekeeper").field("open", &self.account.open().rights.len()).finish_non_exhaustive()
    }
}

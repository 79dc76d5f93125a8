//! Decisions.

use std::sync::Arc;

use arc_swap::{ArcSwap, Cache};

use super::Monitor;
use super::meter::Charge;
use super::view::{Glance, Resolved, Seat, Snapshot, View};
use crate::compile::Limits;
use crate::model::{Decision, Layer, Request, RuleId, Verdict};

/// What a decision may do beside deciding.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Nothing.
    Look,
    /// Takes rates and writes down histories.
    Once,
    /// Takes what is open, too.
    Open,
}

impl Monitor {
    /// Decides a request that is over when it has been decided: a hypercall, a packet, a verb. It takes what limits on rates it falls under,
    /// and writes down whom the two have had to do with. [`open`](Self::open) is for channels.
    ///
    /// Where no limit and no wall is asked, it allocates nothing, takes no lock and reads no clock.
    pub fn authorize(&self, request: &Request<'_>) -> Decision {
        let now = self.shared.now.load();
        self.authorize_in(&now, request)
    }

    /// What [`authorize`](Self::authorize) would say, with nothing taken and nothing written down: limits are not looked at.
    pub fn check(&self, request: &Request<'_>) -> Decision {
        self.decide(&self.shared.now.load(), request, Mode::Look, None)
    }

    /// For a thread that decides often: it looks whether the policy has changed with a load, and not with the two atomic
    /// operations that [`authorize`](Self::authorize) takes.
    pub fn judge(&self) -> Judge {
        Judge { monitor: self.clone(), cache: Cache::new(Arc::clone(&self.shared.now)) }
    }

    #[inline]
    fn authorize_in(&self, now: &Arc<Snapshot>, request: &Request<'_>) -> Decision {
        let decision = self.decide(now, request, Mode::Once, None);
        self.told(now, request, &decision);
        decision
    }

    /// Tells those who listen.
    #[inline(always)]
    pub(super) fn told(&self, now: &Snapshot, request: &Request<'_>, decision: &Decision) {
        if self.shared.observer.is_some() || now.shadow.is_some() {
            self.tell(now, request, decision);
        }
    }

    #[cold]
    fn tell(&self, now: &Snapshot, request: &Request<'_>, decision: &Decision) {
        self.observe(|observer| observer.decided(request, decision));
        if let Some(shadow) = &now.shadow {
            self.compare_shadow(shadow, request, decision);
        }
    }

    /// The decision; what a channel takes for as long as it is open is added to `charges`.
    #[inline]
    pub(super) fn decide(
        &self,
        now: &Arc<Snapshot>,
        request: &Request<'_>,
        mode: Mode,
        charges: Option<&mut Vec<Charge>>,
    ) -> Decision {
        // Nothing that is worked out at a glance is kept for what takes longer, so that it stays in registers.
        match now.main.glance(request) {
            Some(Glance::Said(ruling)) => ruling.decision(now.epoch),
            Some(Glance::Limited { ruling, .. }) if mode == Mode::Look => ruling.decision(now.epoch),
            Some(Glance::Limited { ruling, asker, list }) => self
                .take_listed(now, asker, list, request.bytes, mode, charges)
                .unwrap_or_else(|| ruling.decision(now.epoch)),
            None => self.decide_closely(now, request, mode, charges),
        }
    }

    /// Takes what a request needs of a list of limits; nothing, or what is said if that cannot be.
    #[inline(never)]
    fn take_listed(
        &self,
        now: &Snapshot,
        asker: &Seat,
        list: u32,
        bytes: u64,
        mode: Mode,
        charges: Option<&mut Vec<Charge>>,
    ) -> Option<Decision> {
        let view = &now.main;
        let (Mode::Once, [limit]) = (mode, view.table.limits(list)) else {
            return self.charge(now, asker, &[list], bytes, mode, charges);
        };
        let meter = asker.meter(*limit).filter(|meter| !meter.is_of_channels())?;
        let taken = meter.take(bytes, || self.shared.clock.monotonic());
        (!taken).then(|| exceeded(view, *limit, now.epoch))
    }

    /// The same, where there is more to do than to say so, or it cannot be told at a glance.
    #[inline(never)]
    fn decide_closely(
        &self,
        now: &Arc<Snapshot>,
        request: &Request<'_>,
        mode: Mode,
        charges: Option<&mut Vec<Charge>>,
    ) -> Decision {
        let (epoch, view) = (now.epoch, &now.main);
        let Some(resolved) = view.resolve(request) else {
            return denied(Layer::Identity, None, epoch);
        };
        let (ruling, limits) = view.look(&resolved);
        let more = ruling.limited || resolved.gained() != 0;
        if !ruling.denies()
            && more
            && mode != Mode::Look
            && let Some(refused) = self.take(now, request, &resolved, &limits, mode, charges)
        {
            return refused;
        }
        let verdict = ruling.verdict(&view.policy.model);
        Decision { verdict, ..ruling.decision(epoch) }
    }

    /// Histories grow and limits are taken; nothing, or what is said if that cannot be.
    fn take(
        &self,
        now: &Arc<Snapshot>,
        request: &Request<'_>,
        resolved: &Resolved<'_>,
        limits: &Limits,
        mode: Mode,
        charges: Option<&mut Vec<Charge>>,
    ) -> Option<Decision> {
        if resolved.gained() != 0 && !self.learn(now, resolved) {
            // Histories are those of the policy in force; once for each that was put in force meanwhile.
            let current = self.shared.now.load_full();
            if current.epoch != now.epoch {
                return Some(self.decide(&current, request, mode, charges));
            }
            return Some(denied(Layer::Wall, None, now.epoch));
        }
        self.charge(now, resolved.asker, limits.lists(), request.bytes, mode, charges)
    }

    /// Takes what the request needs of all limits that it falls under, or nothing where one has not enough, and says so. What is
    /// given back when the channel closes is added to `charges`; a rate is taken for good.
    fn charge(
        &self,
        now: &Snapshot,
        asker: &Seat,
        lists: &[u32],
        bytes: u64,
        mode: Mode,
        charges: Option<&mut Vec<Charge>>,
    ) -> Option<Decision> {
        let view = &now.main;
        let all = || {
            let limits = lists.iter().flat_map(|list| view.table.limits(*list));
            limits.filter_map(|limit| {
                let meter = asker.meter(*limit)?;
                (mode == Mode::Open || !meter.is_of_channels()).then_some((*limit, meter))
            })
        };
        let mut time = None;
        for (at, (limit, meter)) in all().enumerate() {
            if !meter.take(bytes, || *time.get_or_insert_with(|| self.shared.clock.monotonic())) {
                all().take(at).for_each(|(_, meter)| meter.give_back(bytes));
                return Some(exceeded(view, limit, now.epoch));
            }
        }
        if let (Some(charges), Mode::Open) = (charges, mode) {
            let of_channels = all().filter(|(_, meter)| meter.is_of_channels());
            charges.extend(of_channels.map(|(_, meter)| Charge::new(meter, bytes)));
        }
        None
    }
}

#[inline(always)]
fn denied(layer: Layer, rule: Option<RuleId>, epoch: u64) -> Decision {
    Decision { verdict: Verdict::Deny, layer, rule, epoch }
}

/// What is said where a limit has been used up.
#[cold]
fn exceeded(view: &View, limit: u32, epoch: u64) -> Decision {
    denied(Layer::Quota, Some(view.policy.model.limit_id(limit as usize)), epoch)
}

/// Decides for one thread; see [`Monitor::judge`]. What it says is that of the policy in force when it is asked.
pub struct Judge {
    monitor: Monitor,
    cache: Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>,
}

impl Judge {
    /// As [`Monitor::authorize`].
    #[inline]
    pub fn authorize(&mut self, request: &Request<'_>) -> Decision {
        let now = self.cache.load();
        self.monitor.authorize_in(now, request)
    }

    /// As [`Monitor::check`].
    #[inline]
    pub fn check(&mut self, request: &Request<'_>) -> Decision {
        let now = self.cache.load();
        self.monitor.decide(now, request, Mode::Look, None)
    }
}

impl std::fmt::Debug for Judge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Judge").field("monitor", &self.monitor).finish_non_exhaustive()
    }
}

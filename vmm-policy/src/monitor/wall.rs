//! Histories at walls (Brewer and Nash, The Chinese Wall Security Policy, 1989), of subjects that hand on what they learn.
//!
//! Each subject has a history: the labels at walls that it has, and those of all that information has come from. When two
//! communicate, the one's history becomes part of the other's, and of all that the other has channels to; a request after which
//! somebody's history had two labels of one wall is refused.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Monitor;
use super::view::{Resolved, Seat, Snapshot, View};
use crate::model::{Flow, SubjectId};
use crate::sync::lock;

/// What the history of one of two gains, of histories with those of the object.
#[inline(always)]
pub(super) fn gained(flow: Flow, asker: &Seat, peer: &Seat, (of_asker, of_peer): (u64, u64)) -> u64 {
    let all_if = |so: bool| u64::from(so).wrapping_neg();
    let guarded = asker.guard() | (peer.is_subject() & peer.guard());
    let read = of_peer & !of_asker & all_if(flow.reads() & !guarded);
    let written = of_asker & !of_peer & all_if(flow.writes() & peer.is_subject() & !guarded);
    read | written
}

impl Resolved<'_> {
    /// What somebody's history gains, if this is allowed. That no wall is between the two has been seen to; guards have no history, and
    /// learn none.
    pub(super) fn gained(&self) -> u64 {
        gained(self.op.flow(), self.asker, self.peer, self.histories())
    }
}

impl Monitor {
    /// Has both learn of each other as the request says, and all that are behind them; whether no wall is hit. What is new in a history
    /// is kept before this says that it may be.
    #[cold]
    pub(super) fn learn(&self, now: &Arc<Snapshot>, resolved: &Resolved<'_>) -> bool {
        let flow = resolved.op.flow();
        let _guard = lock(&self.shared.wall);
        // A policy that was put in force meanwhile has histories of its own, and asks again about what is open.
        let current = self.shared.now.load_full();
        let view = &current.main;
        // The histories of now, which may be those of another snapshot.
        let of = |seat: &Seat| view.seat(seat.subject().id).unwrap_or(seat).history();
        let both = of(resolved.asker) | of(resolved.peer) | resolved.object.wall;
        let mut gained: BTreeMap<SubjectId, u64> = BTreeMap::new();
        if flow.reads() {
            gained.insert(resolved.asker.subject().id, both);
        }
        if flow.writes() && resolved.is_of_subject() {
            gained.insert(resolved.peer.subject().id, both);
        }
        current.epoch == now.epoch && self.spread(view, &mut gained) && self.keep(view, &gained)
    }

    /// Adds to `gained` what others learn of it by the channels that are open; whether no wall is hit.
    fn spread(&self, view: &View, gained: &mut BTreeMap<SubjectId, u64>) -> bool {
        let open: Vec<_> = self.shared.registry.all().into_iter().filter(|right| right.is_live()).collect();
        let mut work: Vec<SubjectId> = gained.keys().copied().collect();
        let whole = |view: &View, gained: &BTreeMap<SubjectId, u64>, id: SubjectId| {
            let own = view.seat(id).map_or(0, Seat::history);
            own | gained.get(&id).copied().unwrap_or(0)
        };
        // Each round adds a bit to somebody, and there are 64 of them.
        while let Some(id) = work.pop() {
            let history = whole(view, gained, id);
            if view.table.wall_is_hit(history) {
                return false;
            }
            for right in &open {
                let Some(request) = right.request.get() else { continue };
                let Some(peer) = request.peer else { continue };
                let learner = match request.asker {
                    asker if asker == id && right.flow.writes() => peer,
                    asker if peer == id && right.flow.reads() => asker,
                    _ => continue,
                };
                if view.seat(learner).is_none_or(Seat::guard) {
                    continue;
                }
                let before = whole(view, gained, learner);
                if before | history != before {
                    gained.insert(learner, before | history);
                    work.push(learner);
                }
            }
        }
        true
    }

    /// Writes down what has been gained; whether it is kept.
    fn keep(&self, view: &View, gained: &BTreeMap<SubjectId, u64>) -> bool {
        let model = &*view.policy.model;
        for (id, history) in gained {
            let Some(seat) = view.seat(*id) else { continue };
            let before = seat.history();
            for (bit, label) in model.wall_labels.iter().enumerate() {
                if (history & !before) >> bit & 1 == 0 {
                    continue;
                }
                let Some(name) = model.labels.get(*label as usize) else { return false };
                if self.shared.history.record(&seat.subject().principal, name).is_err() {
                    return false;
                }
            }
        }
        // All of it is kept; what is kept and not done does no harm.
        for (id, history) in gained {
            if let Some(seat) = view.seat(*id) {
                seat.learn(&view.table, *history);
            }
        }
        true
    }
}

//! All that a decision reads: it does not change but for a few words, and is replaced as a whole.

use std::sync::Arc;

use super::clock::Clock;
use super::meter::Meter;
use crate::compile::{
    Class, ClassKey, Facts, Limits, NOBODY, Ruling, Table, environment_bits, subject_facts,
};
use crate::model::{Flow, Layer, Lifecycle, Op, Principal, Request, SubjectId};
use crate::policy::Policy;
use crate::sync::{AtomicU64, Mutex, Ordering, lock};

/// What is known of a subject, whatever the policy.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) id: SubjectId,
    pub(super) principal: Principal,
    pub(super) incarnation: Option<u64>,
    /// The labels that it was given, if they are not the policy's.
    pub(super) labels: Option<Vec<String>>,
    pub(super) digest: Option<Vec<u8>>,
    pub(super) state: Mutex<State>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct State {
    pub(super) lifecycle: Lifecycle,
    pub(super) attested: bool,
}

/// What a policy makes of a subject: what a decision reads of it lies in one line of the processor's cache.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Seat {
    /// The life of the subject's [`SubjectId`].
    life: u64,
    pub(super) class: Class,
    /// The bits that conditions ask for.
    pub(super) facts: AtomicU64,
    /// Its history at walls.
    pub(super) history: AtomicU64,
    behind: Box<Behind>,
}

const _: () = assert!(size_of::<Seat>() == 64, "a line of the cache");

/// What most decisions do not need.
#[derive(Debug)]
struct Behind {
    subject: Arc<Subject>,
    /// What it has used of each limit, by the limit's number; `None` where it falls under none of it.
    meters: Vec<Option<Arc<Meter>>>,
}

impl Seat {
    pub(super) fn new(
        subject: Arc<Subject>,
        class: Class,
        facts: u64,
        history: u64,
        meters: Vec<Option<Arc<Meter>>>,
    ) -> Self {
        Self {
            life: subject.id.life,
            class,
            facts: AtomicU64::new(facts),
            history: AtomicU64::new(history),
            behind: Box::new(Behind { subject, meters }),
        }
    }

    /// Nobody's, which is asked for where a request leads to nobody.
    pub(super) fn nobody() -> Arc<Self> {
        let subject = Subject {
            id: SubjectId::NOBODY,
            principal: Principal::Host("".into()),
            incarnation: None,
            labels: None,
            digest: None,
            state: Mutex::new(State { lifecycle: Lifecycle::default(), attested: false }),
        };
        Arc::new(Self::new(Arc::new(subject), Class::from(&ClassKey::default()), 0, 0, Vec::new()))
    }

    pub(super) fn subject(&self) -> &Arc<Subject> {
        &self.behind.subject
    }

    pub(super) fn meters(&self) -> &[Option<Arc<Meter>>] {
        &self.behind.meters
    }

    /// Whether levels and walls are not asked about it: it has no history then.
    pub(super) fn guard(&self) -> bool {
        self.class.exempt
    }
}

/// A policy, and what it makes of who is there.
pub(super) struct View {
    pub(super) policy: Policy,
    pub(super) table: Arc<Table>,
    /// By [`SubjectId`]'s slot; in the first is nobody.
    pub(super) seats: Vec<Option<Arc<Seat>>>,
    pub(super) environment: AtomicU64,
}

/// What is in force, and what is looked at beside it.
pub(super) struct Snapshot {
    pub(super) epoch: u64,
    pub(super) main: View,
    pub(super) shadow: Option<View>,
}

/// A request whose names have become numbers.
#[derive(Clone, Copy)]
pub(super) struct Resolved<'s> {
    pub(super) op: Op,
    pub(super) asker: &'s Seat,
    /// A subject, or nobody.
    pub(super) peer: &'s Seat,
    /// The class that the object has if it was declared.
    object: &'s Class,
    /// The object's number.
    value: u64,
}

impl<'s> Resolved<'s> {
    /// The class of the subject, or of the object that stands for itself.
    #[inline(always)]
    pub(super) fn peer_class(&self) -> &'s Class {
        // Which of them nobody can foresee: no branch.
        let either = [self.object, &self.peer.class];
        either.get(usize::from(self.is_of_subject())).copied().unwrap_or(self.object)
    }

    /// Whether it leads to a subject.
    #[inline(always)]
    pub(super) fn is_of_subject(&self) -> bool {
        self.peer.class.id != NOBODY
    }

    /// The histories at walls of the asker, and of the peer and the object together.
    #[inline(always)]
    pub(super) fn histories(&self) -> (u64, u64) {
        let of = |seat: &Seat| seat.history.load(Ordering::Acquire);
        // Nobody has none, and what is not declared has none.
        (of(self.asker), of(self.peer) | self.object.wall)
    }
}

impl Snapshot {
    pub(super) fn empty(policy: Policy, clock: &dyn Clock) -> Self {
        let table = Arc::clone(&policy.table);
        let environment = AtomicU64::new(environment_bits(&policy.model.conditions, clock.wall(), []));
        Self {
            epoch: 0,
            main: View { policy, table, seats: vec![Some(Seat::nobody())], environment },
            shadow: None,
        }
    }
}

impl View {
    #[inline(always)]
    pub(super) fn seat(&self, id: SubjectId) -> Option<&Seat> {
        let seat = self.seats.get(id.slot as usize)?.as_ref()?;
        (seat.life == id.life).then_some(seat)
    }

    pub(super) fn subjects(&self) -> impl Iterator<Item = &Seat> {
        self.seats.iter().skip(1).flatten().map(|seat| &**seat)
    }

    /// Who and what is meant; nothing if there is no such subject, or such an object knows no such action.
    #[inline(always)]
    pub(super) fn resolve(&self, request: &Request<'_>) -> Option<Resolved<'_>> {
        let op = request.op()?;
        let (asker, peer) =
            (self.seat(request.asker)?, self.seat(request.peer.unwrap_or(SubjectId::NOBODY))?);
        let (value, class) = self.table.object(&self.policy.model, &request.object);
        Some(Resolved { op, asker, peer, object: self.table.class(class)?, value })
    }

    /// What the policy says where asker and peer have these histories at walls, and which limits it falls under.
    #[inline(always)]
    pub(super) fn judge(
        &self,
        resolved: &Resolved<'_>,
        (of_asker, of_peer): (u64, u64),
        limits: &mut Limits,
    ) -> Ruling {
        let Resolved { op, asker, peer, object, value } = *resolved;
        let peer_class = resolved.peer_class();
        if let Some(layer) = self.table.barrier_at(op, &asker.class, of_asker, peer_class, of_peer) {
            return Ruling::denied(layer);
        }
        let facts = || Facts {
            asker: asker.facts.load(Ordering::Relaxed),
            peer: peer.facts.load(Ordering::Relaxed),
            environment: self.environment.load(Ordering::Relaxed),
        };
        let model = &self.policy.model;
        let ruling = self.table.judge(model, op, &asker.class, peer_class, value, facts, limits);
        if (object.id != NOBODY) & resolved.is_of_subject() {
            return self.beside(resolved, &facts(), (of_asker, of_peer), ruling);
        }
        ruling
    }

    /// What is said of a declared object that is named beside its peer, if that is what is said of the peer.
    #[inline(never)]
    fn beside(
        &self,
        resolved: &Resolved<'_>,
        facts: &Facts,
        (of_asker, of_peer): (u64, u64),
        ruling: Ruling,
    ) -> Ruling {
        let Resolved { op, asker, peer, object, value } = *resolved;
        // The peer's is together with the object's.
        let met = self.table.walls_meet(of_asker, object.wall) || self.table.wall_is_hit(of_peer);
        if op.flow() != Flow::None && met {
            return Ruling::denied(Layer::Wall);
        }
        let model = &self.policy.model;
        self.table.decide_beside(model, op, &asker.class, &peer.class, object, value, facts, ruling)
    }

    /// The meters of a subject of `class`; those of `before` whose limits say the same go on.
    pub(super) fn meters(
        policy: &Policy,
        table: &Table,
        class: u32,
        before: &[(String, Arc<Meter>)],
    ) -> Vec<Option<Arc<Meter>>> {
        let model = &*policy.model;
        let meter = |(at, limit): (usize, &crate::compile::LimitDef)| {
            if !table.is_member(limit.targets.asker, class) {
                return None;
            }
            let text = limit_text(policy, at);
            let same =
                before.iter().find(|(known, meter)| *known == text && meter.quantity() == limit.quantity);
            Some(same.map_or_else(|| Arc::new(Meter::new(limit.quantity)), |(_, meter)| Arc::clone(meter)))
        };
        model.limits.iter().enumerate().map(meter).collect()
    }

    /// The meters of a subject, by what their limits say.
    pub(super) fn meters_of(&self, id: SubjectId) -> Vec<(String, Arc<Meter>)> {
        let meters = self.seat(id).map_or(&[][..], Seat::meters);
        let named = |(at, meter): (usize, &Option<Arc<Meter>>)| {
            Some((limit_text(&self.policy, at), Arc::clone(meter.as_ref()?)))
        };
        meters.iter().enumerate().filter_map(named).collect()
    }

    pub(super) fn facts_of(policy: &Policy, subject: &Subject) -> u64 {
        let state = *lock(&subject.state);
        subject_facts(&policy.model.conditions, state.lifecycle, state.attested, subject.digest.as_deref())
    }
}

fn limit_text(policy: &Policy, at: usize) -> String {
    let text = policy.rule(policy.model.limit_id(at)).map_or("", |rule| rule.text);
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

//! All that a decision reads: it does not change but for a few words, and is replaced as a whole.

use std::hint::select_unpredictable;
use std::num::NonZeroU64;
use std::sync::Arc;

use super::clock::Clock;
use super::meter::Meter;
use super::wall::gained;
use crate::compile::{
    Asked, Brief, Class, Conditions, Facts, Limits, NOBODY, Row, Ruling, Table, environment_bits,
    subject_facts,
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

/// What a subject has used of each limit, by the limit's number; `None` where it does not fall under it.
pub(super) type Meters = Vec<Option<Arc<Meter>>>;

/// In the place of nobody's life.
const NO_LIFE: u64 = 0;

/// What a policy makes of a subject: what a decision reads of it lies in one line of the processor's cache.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Seat {
    /// The life of the subject's [`SubjectId`]; [`NO_LIFE`] is nobody's.
    life: u64,
    pub(super) class: Brief,
    /// Which terms of conditions hold as far as they are about the asker, if that is who asks, and about the peer, if it is asked.
    terms: [AtomicU64; 2],
    history: AtomicU64,
    /// What the history keeps apart from it.
    forbidden: AtomicU64,
    /// Of the first limit: few policies have another one.
    first_meter: Option<Arc<Meter>>,
    behind: Arc<Behind>,
}

const _: () = assert!(size_of::<Option<Seat>>() == 64, "a line of the cache");

/// What most decisions do not need.
#[derive(Debug)]
struct Behind {
    subject: Arc<Subject>,
    /// The bits that conditions ask for.
    facts: AtomicU64,
    /// Of all limits but the first.
    meters: Box<[Option<Arc<Meter>>]>,
}

impl Seat {
    pub(super) fn new(
        policy: &Policy,
        table: &Table,
        subject: Arc<Subject>,
        class: u32,
        history: u64,
        meters: Meters,
    ) -> Self {
        let mut meters = meters.into_iter();
        let seat = Self {
            life: subject.id.life.get(),
            class: table.brief(class),
            terms: Default::default(),
            history: AtomicU64::new(history),
            forbidden: AtomicU64::new(table.forbidden_by(history)),
            first_meter: meters.next().flatten(),
            behind: Arc::new(Behind { facts: AtomicU64::new(0), subject, meters: meters.collect() }),
        };
        seat.look_at_state(policy);
        seat
    }

    /// Nobody's, which is asked for where a request leads to nobody.
    pub(super) fn nobody(policy: &Policy) -> Self {
        let subject = Subject {
            // No subject has that slot or that life.
            id: SubjectId { slot: 0, life: NonZeroU64::MAX },
            principal: Principal::Host("".into()),
            incarnation: None,
            labels: None,
            digest: None,
            state: Mutex::new(State { lifecycle: Lifecycle::default(), attested: false }),
        };
        let mut seat = Self::new(policy, &policy.table, Arc::new(subject), NOBODY, 0, Meters::new());
        seat.life = NO_LIFE;
        // It is in no state.
        seat.set_facts(&policy.model.conditions, 0);
        seat
    }

    /// The same with another state, which is in use from then on.
    pub(super) fn copy(&self) -> Self {
        let of = |word: &AtomicU64| AtomicU64::new(word.load(Ordering::Acquire));
        Self {
            life: self.life,
            class: self.class,
            terms: self.terms.each_ref().map(of),
            history: of(&self.history),
            forbidden: of(&self.forbidden),
            first_meter: self.first_meter.clone(),
            behind: Arc::clone(&self.behind),
        }
    }

    /// Takes over what the subject's state is.
    pub(super) fn look_at_state(&self, policy: &Policy) {
        let Subject { state, digest, .. } = &**self.subject();
        let State { lifecycle, attested } = *lock(state);
        let conditions = &policy.model.conditions;
        self.set_facts(conditions, subject_facts(conditions, lifecycle, attested, digest.as_deref()));
    }

    fn set_facts(&self, conditions: &Conditions, facts: u64) {
        let [as_asker, as_peer] = &self.terms;
        self.behind.facts.store(facts, Ordering::Release);
        as_asker.store(conditions.asker_terms(facts), Ordering::Release);
        as_peer.store(conditions.peer_terms(facts), Ordering::Release);
    }

    /// Its history at walls.
    #[inline(always)]
    pub(super) fn history(&self) -> u64 {
        self.history.load(Ordering::Acquire)
    }

    /// Adds to its history. Just one at a time does.
    pub(super) fn learn(&self, table: &Table, history: u64) {
        let history = self.history() | history;
        // Whoever sees the history sees what it forbids.
        self.forbidden.store(table.forbidden_by(history), Ordering::Release);
        self.history.store(history, Ordering::Release);
    }

    pub(super) fn subject(&self) -> &Arc<Subject> {
        &self.behind.subject
    }

    /// What it has used of a limit, if it falls under it.
    #[inline]
    pub(super) fn meter(&self, limit: u32) -> Option<&Arc<Meter>> {
        match limit.checked_sub(1) {
            None => self.first_meter.as_ref(),
            Some(other) => self.behind.meters.get(other as usize)?.as_ref(),
        }
    }

    /// Whether it is a subject's, and not nobody's.
    #[inline(always)]
    pub(super) fn is_subject(&self) -> bool {
        self.class.id() != NOBODY
    }

    /// Whether levels and walls are not asked about it: it has no history then.
    #[inline(always)]
    pub(super) fn guard(&self) -> bool {
        self.class.exempt
    }
}

/// A policy, and what it makes of who is there.
pub(super) struct View {
    pub(super) policy: Policy,
    pub(super) table: Arc<Table>,
    /// By [`SubjectId`]'s slot; in the first is nobody.
    pub(super) seats: Vec<Option<Seat>>,
    pub(super) environment: Environment,
}

/// What conditions ask about the host: the bits, and which terms hold as far as they are about it.
pub(super) struct Environment {
    bits: AtomicU64,
    terms: AtomicU64,
}

impl Environment {
    pub(super) fn new(policy: &Policy, bits: u64) -> Self {
        let terms = policy.model.conditions.environment_terms(bits);
        Self { bits: AtomicU64::new(bits), terms: AtomicU64::new(terms) }
    }

    pub(super) fn copy(&self) -> Self {
        let of = |word: &AtomicU64| AtomicU64::new(word.load(Ordering::Acquire));
        Self { bits: of(&self.bits), terms: of(&self.terms) }
    }

    /// Puts other bits in; whether they were others.
    pub(super) fn set(&self, policy: &Policy, bits: u64) -> bool {
        self.terms.store(policy.model.conditions.environment_terms(bits), Ordering::Release);
        self.bits.swap(bits, Ordering::AcqRel) != bits
    }
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
    pub(super) object: &'s Class,
    /// The object's number.
    value: u64,
}

/// What there is to do once it is known what the rules say.
pub(super) enum Glance<'s> {
    /// Nothing.
    Said(Ruling),
    /// To take these limits.
    Limited { ruling: Ruling, asker: &'s Seat, list: u32 },
}

impl<'s> Resolved<'s> {
    /// Whether it leads to a subject.
    #[inline(always)]
    pub(super) fn is_of_subject(&self) -> bool {
        self.peer.is_subject()
    }

    /// The histories at walls of the asker, and of the peer and the object together.
    #[inline(always)]
    pub(super) fn histories(&self) -> (u64, u64) {
        // Nobody has none, and what is not declared has none.
        (self.asker.history(), self.peer.history() | self.object.wall)
    }
}

impl Snapshot {
    pub(super) fn empty(policy: Policy, clock: &dyn Clock) -> Self {
        let table = Arc::clone(&policy.table);
        let bits = environment_bits(&policy.model.conditions, clock.wall(), []);
        let environment = Environment::new(&policy, bits);
        let seats = vec![Some(Seat::nobody(&policy))];
        Self { epoch: 0, main: View { policy, table, seats, environment }, shadow: None }
    }
}

impl View {
    #[inline(always)]
    pub(super) fn seat(&self, id: SubjectId) -> Option<&Seat> {
        self.seat_of(id.slot, id.life.get())
    }

    #[inline(always)]
    fn seat_of(&self, slot: u32, life: u64) -> Option<&Seat> {
        let seat = self.seats.get(slot as usize)?.as_ref()?;
        (seat.life == life).then_some(seat)
    }

    /// The seats of asker and peer, which is nobody where there is none.
    #[inline(always)]
    fn both_seats(&self, request: &Request<'_>) -> Option<(&Seat, &Seat)> {
        let (slot, life) = request.peer.map_or((0, NO_LIFE), |peer| (peer.slot, peer.life.get()));
        // Whether it leads to somebody nobody can foresee: no branch.
        let slot = select_unpredictable(life == NO_LIFE, 0, slot);
        Some((self.seat(request.asker)?, self.seat_of(slot, life)?))
    }

    pub(super) fn subjects(&self) -> impl Iterator<Item = &Seat> {
        self.seats.iter().skip(1).flatten()
    }

    /// Who and what is meant; nothing if there is no such subject, or such an object knows no such action.
    pub(super) fn resolve(&self, request: &Request<'_>) -> Option<Resolved<'_>> {
        let op = request.op()?;
        let (asker, peer) = self.both_seats(request)?;
        let (value, class) = self.table.object(&self.policy.model, &request.object);
        Some(Resolved { op, asker, peer, object: self.table.class(class)?, value })
    }

    /// What is said, where the table's front tells and no history grows.
    #[inline(always)]
    pub(super) fn glance(&self, request: &Request<'_>) -> Option<Glance<'_>> {
        let row = self.table.row(request.object.kind(), request.action)?;
        let (asker, peer) = self.both_seats(request)?;
        let near = self.table.near(row, &asker.class, &peer.class)?;
        let (value, class) = self.table.object(&self.policy.model, &request.object);
        if class != NOBODY {
            return None;
        }
        let asked = self.asked(row, asker, peer, value);
        let ruling = self.table.glance(near, asked)?;
        let gained = gained(row.flow, asker, peer, (asker.history(), peer.history()));
        // Whether it is allowed nobody can foresee; whether there is more to do then, one can.
        let more = (gained | u64::from(ruling.limited)) & ruling.all_if_opens();
        if more == 0 && !ruling.is_throttled() {
            return Some(Glance::Said(ruling));
        }
        if gained != 0 || ruling.is_throttled() {
            return None;
        }
        Some(Glance::Limited { ruling, asker, list: self.table.list_at(near, asked)? })
    }

    #[inline(always)]
    fn asked<'s>(&self, row: Row, asker: &'s Seat, peer: &'s Seat, value: u64) -> Asked<'s> {
        let ([as_asker, _], [_, as_peer]) = (&asker.terms, &peer.terms);
        let terms = as_asker.load(Ordering::Acquire)
            & as_peer.load(Ordering::Acquire)
            & self.environment.terms.load(Ordering::Acquire);
        let walled = peer.history() & asker.forbidden.load(Ordering::Acquire) != 0;
        Asked { row, asker: &asker.class, peer: &peer.class, value, terms, walled }
    }

    /// What the policy says, and the limits that the request falls under.
    pub(super) fn look(&self, resolved: &Resolved<'_>) -> (Ruling, Limits) {
        let Resolved { op, asker, peer, object, value } = *resolved;
        // The front knows no declared objects.
        let row = self.table.row(op.kind(), op.action()).filter(|_| object.id == NOBODY);
        let of_front = row.and_then(|row| self.table.look(self.asked(row, asker, peer, value)));
        of_front.unwrap_or_else(|| {
            let ruling = self.judge(resolved, resolved.histories());
            let classes = self.classes(resolved).filter(|_| ruling.limited);
            let limits = classes.map(|(asker, peer)| self.table.limits_of(op, asker, peer, value));
            (ruling, limits.unwrap_or_default())
        })
    }

    /// The classes of the asker, and of the subject or of the object that stands for itself.
    pub(super) fn classes<'v>(&'v self, resolved: &Resolved<'v>) -> Option<(&'v Class, &'v Class)> {
        let peer = self.table.class(resolved.peer.class.id())?;
        let peer = if resolved.is_of_subject() { peer } else { resolved.object };
        Some((self.table.class(resolved.asker.class.id())?, peer))
    }

    /// What the policy says where asker and peer have these histories at walls.
    #[inline(never)]
    pub(super) fn judge(&self, resolved: &Resolved<'_>, histories: (u64, u64)) -> Ruling {
        let Resolved { op, asker, peer, object, value } = *resolved;
        let Some((asker_class, peer_class)) = self.classes(resolved) else {
            return Ruling::denied(Layer::Identity);
        };
        let (of_asker, of_peer) = histories;
        if let Some(layer) = self.table.barrier_at(op, asker_class, of_asker, peer_class, of_peer) {
            return Ruling::denied(layer);
        }
        let facts = Facts {
            asker: asker.behind.facts.load(Ordering::Relaxed),
            peer: peer.behind.facts.load(Ordering::Relaxed),
            environment: self.environment.bits.load(Ordering::Relaxed),
        };
        let model = &self.policy.model;
        let ruling = self.table.judge(model, op, asker_class, peer_class, value, &facts);
        if object.id == NOBODY || !resolved.is_of_subject() {
            return ruling;
        }
        // What is said of a declared object that is named beside its peer, if that is what is said of the peer, whose history is together
        // with the object's.
        let met = self.table.walls_meet(of_asker, object.wall) || self.table.wall_is_hit(of_peer);
        if op.flow() != Flow::None && met {
            return Ruling::denied(Layer::Wall);
        }
        self.table.decide_beside(model, op, asker_class, peer_class, object, value, &facts, ruling)
    }

    /// The meters of a subject of `class`; those of `before` whose limits say the same go on.
    pub(super) fn meters(
        policy: &Policy,
        table: &Table,
        class: u32,
        before: &[(String, Arc<Meter>)],
    ) -> Meters {
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
        let Some(seat) = self.seat(id) else { return Vec::new() };
        let named = |at: usize| Some((limit_text(&self.policy, at), Arc::clone(seat.meter(at as u32)?)));
        (0..self.policy.model.limits.len()).filter_map(named).collect()
    }
}

fn limit_text(policy: &Policy, at: usize) -> String {
    let text = policy.rule(policy.model.limit_id(at)).map_or("", |rule| rule.text);
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

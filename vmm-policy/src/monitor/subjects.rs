//! Who is there.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::Arc;

use super::view::{Seat, Snapshot, State, Subject, View};
use super::{Monitor, MonitorError};
use crate::compile::{ClassKey, ClassKind, Model, NOBODY, PartyDef};
use crate::grant::Revocation;
use crate::model::{Lifecycle, Principal, SubjectId, SubjectSpec};
use crate::policy::Policy;
use crate::sync::{Mutex, lock};
use crate::syntax::{PolicyError, did_you_mean};

impl Monitor {
    /// Lets a subject take part. It gets an identifier that nobody has had before.
    ///
    /// # Errors
    /// If it is there already, its labels are unknown or contradict each other or what it has had to do with, if its incarnation is not a
    /// new one, or if a rule of the policy says that one with such labels is never to be.
    pub fn register(&self, spec: SubjectSpec) -> Result<SubjectId, MonitorError> {
        let mut writer = lock(&self.shared.writer);
        let _wall = lock(&self.shared.wall);
        let before = self.shared.now.load_full();
        let SubjectSpec { principal, labels, incarnation, digest, attested } = spec;
        if before.main.subjects().any(|seat| seat.subject().principal == principal) {
            return Err(MonitorError::Registered(principal));
        }
        if let Some(given) = incarnation {
            let last = writer.incarnations.get(&principal).copied();
            if let Some(last) = last.filter(|last| given <= *last) {
                return Err(MonitorError::Incarnation { principal, given, last });
            }
        }
        let free = before.main.seats.iter().position(Option::is_none);
        let slot = free.unwrap_or(before.main.seats.len());
        let id = SubjectId { slot: slot as u32, life: NonZeroU64::MIN.saturating_add(writer.lives) };
        let declared = party(&before.main.policy.model, &principal);
        if let (Some(party), false) = (declared, labels.is_empty()) {
            return Err(MonitorError::Declared(party.name.to_string()));
        }
        let labels = if declared.is_some() { None } else { Some(labels) };
        let lifecycle =
            if matches!(principal, Principal::Host(_)) { Lifecycle::Running } else { Lifecycle::default() };
        let state = Mutex::new(State { lifecycle, attested });
        let subject = Arc::new(Subject { id, principal, incarnation, labels, digest, state });
        let main = self.with_seat(&before.main, slot, &subject)?;
        let shadow =
            before.shadow.as_ref().map(|shadow| self.with_seat(shadow, slot, &subject)).transpose()?;
        writer.lives += 1;
        if let Some(given) = incarnation {
            writer.incarnations.insert(subject.principal.clone(), given);
        }
        self.shared.now.store(Arc::new(Snapshot { epoch: before.epoch, main, shadow }));
        Ok(id)
    }

    /// Ends a subject's part: all rights that it has or that lead to it are taken back.
    ///
    /// # Errors
    /// If it is not registered.
    pub fn unregister(&self, id: SubjectId) -> Result<Vec<Revocation>, MonitorError> {
        {
            let _writer = lock(&self.shared.writer);
            // Histories are copied.
            let _wall = lock(&self.shared.wall);
            let before = self.shared.now.load_full();
            before.main.seat(id).ok_or(MonitorError::NoSubject(id))?;
            let without = |view: &View| {
                let mut view = view.clone_view();
                if let Some(seat) = view.seats.get_mut(id.slot as usize) {
                    *seat = None;
                }
                view
            };
            let (main, shadow) = (without(&before.main), before.shadow.as_ref().map(without));
            self.shared.now.store(Arc::new(Snapshot { epoch: before.epoch, main, shadow }));
        }
        // Rights that lead to nobody are refused from here on.
        Ok(self.reconsider_those(|right| right.request.is_about(id)))
    }

    /// Gives a running subject other labels in place of those that it has, and takes back what it has no right to with them. The table
    /// is extended, not made anew, if nobody has had such labels before.
    ///
    /// # Errors
    /// As [`register`](Self::register). A machine that the policy declares may be relabelled, until it is registered again.
    pub fn relabel(&self, id: SubjectId, labels: &[&str]) -> Result<Vec<Revocation>, MonitorError> {
        {
            let _writer = lock(&self.shared.writer);
            let _wall = lock(&self.shared.wall);
            let before = self.shared.now.load_full();
            let seat = before.main.seat(id).ok_or(MonitorError::NoSubject(id))?;
            let old = seat.subject();
            let subject = Arc::new(Subject {
                id,
                principal: old.principal.clone(),
                incarnation: old.incarnation,
                labels: Some(labels.iter().map(|label| (*label).to_owned()).collect()),
                digest: old.digest.clone(),
                state: Mutex::new(*lock(&old.state)),
            });
            let slot = id.slot as usize;
            let main = self.with_seat(&before.main, slot, &subject)?;
            let shadow =
                before.shadow.as_ref().map(|shadow| self.with_seat(shadow, slot, &subject)).transpose()?;
            self.shared.now.store(Arc::new(Snapshot { epoch: before.epoch, main, shadow }));
        }
        Ok(self.reconsider_those(|right| right.request.is_about(id)))
    }

    /// Says where a subject is in its life, and takes back what depends on another state.
    ///
    /// # Errors
    /// If it is not registered.
    pub fn set_lifecycle(
        &self,
        id: SubjectId,
        lifecycle: Lifecycle,
    ) -> Result<Vec<Revocation>, MonitorError> {
        self.change(id, |state| state.lifecycle = lifecycle)
    }

    /// Says whether what a subject was launched from has been verified, and takes back what depends on that.
    ///
    /// # Errors
    /// If it is not registered.
    pub fn set_attested(&self, id: SubjectId, attested: bool) -> Result<Vec<Revocation>, MonitorError> {
        self.change(id, |state| state.attested = attested)
    }

    fn change(
        &self,
        id: SubjectId,
        change: impl FnOnce(&mut State),
    ) -> Result<Vec<Revocation>, MonitorError> {
        {
            let _writer = lock(&self.shared.writer);
            let now = self.shared.now.load_full();
            let seat = now.main.seat(id).ok_or(MonitorError::NoSubject(id))?;
            change(&mut lock(&seat.subject().state));
            for view in std::iter::once(&now.main).chain(&now.shadow) {
                if let Some(seat) = view.seat(id) {
                    seat.look_at_state(&view.policy);
                }
            }
        }
        Ok(self.reconsider_those(|right| right.request.is_about(id)))
    }

    /// Who is registered, in no order.
    pub fn subjects(&self) -> Vec<(SubjectId, Principal)> {
        let now = self.shared.now.load();
        now.main.subjects().map(|seat| (seat.subject().id, seat.subject().principal.clone())).collect()
    }

    /// The incarnation that a subject was registered with, if it was and is there.
    pub fn incarnation(&self, id: SubjectId) -> Option<u64> {
        self.shared.now.load().main.seat(id)?.subject().incarnation
    }

    /// The life of a principal that is registered now.
    pub fn subject_of(&self, principal: &Principal) -> Option<SubjectId> {
        let now = self.shared.now.load();
        let mut subjects = now.main.subjects().map(Seat::subject);
        subjects.find(|subject| subject.principal == *principal).map(|subject| subject.id)
    }

    /// The registered subject of that name: of a machine or host principal that the policy declares, or a host principal's own.
    pub fn subject(&self, name: &str) -> Option<SubjectId> {
        let now = self.shared.now.load();
        let model = &now.main.policy.model;
        let named = |subject: &&Arc<Subject>| match party(model, &subject.principal) {
            Some(party) => &*party.name == name,
            None => matches!(&subject.principal, Principal::Host(host) if **host == *name),
        };
        now.main.subjects().map(Seat::subject).find(named).map(|subject| subject.id)
    }

    /// A view with one subject more, or with another one in its place. The wall's lock is held.
    pub(super) fn with_seat(
        &self,
        view: &View,
        slot: usize,
        subject: &Arc<Subject>,
    ) -> Result<View, MonitorError> {
        let key = class_key(&view.policy, subject)?;
        let table = view.policy.extended(&view.table, &key)?;
        let mut wider = view.clone_view();
        wider.table = table;
        let seat = self.seat(&wider, &key, subject, &view.meters_of(subject.id))?;
        wider.seats.resize_with(wider.seats.len().max(slot + 1), || None);
        if let Some(free) = wider.seats.get_mut(slot) {
            *free = Some(seat);
        }
        Ok(wider)
    }

    /// What a view's policy makes of a subject of a class that its table has.
    pub(super) fn seat(
        &self,
        view: &View,
        key: &ClassKey,
        subject: &Arc<Subject>,
        meters: &[(String, Arc<super::meter::Meter>)],
    ) -> Result<Seat, MonitorError> {
        let model = &*view.policy.model;
        // The table was extended by the key.
        let class = view.table.class_of(key).unwrap_or(NOBODY);
        let mut history = 0;
        if !key.guard {
            let kept = self.shared.history.load(&subject.principal)?;
            let labels: Vec<u32> =
                kept.iter().filter_map(|label| model.label_index.get(label.as_str()).copied()).collect();
            history = key.wall | model.wall_mask(&labels);
        }
        if let Some(wall) = model.wall_conflict(history) {
            return Err(MonitorError::Wall { principal: subject.principal.clone(), wall: wall.to_owned() });
        }
        let meters = View::meters(&view.policy, &view.table, class, meters);
        Ok(Seat::new(&view.policy, &view.table, Arc::clone(subject), class, history, meters))
    }
}

impl View {
    /// Nobody changes states or histories meanwhile: they go on in the copy.
    pub(super) fn clone_view(&self) -> Self {
        Self {
            policy: self.policy.clone(),
            table: Arc::clone(&self.table),
            seats: self.seats.iter().map(|seat| seat.as_ref().map(Seat::copy)).collect(),
            environment: self.environment.copy(),
        }
    }
}

/// What the policy declares of a principal.
fn party<'m>(model: &'m Model, principal: &Principal) -> Option<&'m PartyDef> {
    let at = match principal {
        Principal::Vm(uuid) => model.uuid_index.get(uuid),
        Principal::Host(name) => model.party_index.get(&**name),
    };
    let party = model.parties.get(*at? as usize)?;
    let wanted = if matches!(principal, Principal::Vm(_)) { ClassKind::Vm } else { ClassKind::Host };
    (party.class.kind == wanted).then_some(party)
}

/// What tells a subject from others: by its declaration, or by the labels that it was given.
pub(super) fn class_key(policy: &Policy, subject: &Subject) -> Result<ClassKey, MonitorError> {
    let model = &*policy.model;
    let declared = party(model, &subject.principal);
    let Some(given) = &subject.labels else {
        // Declared when it was registered, and by this policy perhaps not.
        return Ok(declared.map_or_else(|| bare_key(&subject.principal), |party| party.class.clone()));
    };
    let mut key = declared.map_or_else(
        || bare_key(&subject.principal),
        |party| ClassKey { labels: Vec::new(), ..party.class.clone() },
    );
    let mut labels = Vec::new();
    let mut families: BTreeMap<u32, &str> = BTreeMap::new();
    for name in given {
        let known = model.label_index.get(name.as_str()).copied();
        let label = known.filter(|_| !model.party_index.contains_key(name.as_str())).ok_or_else(|| {
            let free = model.labels.iter().filter(|label| !model.party_index.contains_key(*label));
            let hint = did_you_mean(name, free.map(|label| &**label))
                .map_or(String::new(), |hint| format!("; {hint}"));
            PolicyError::UnknownLabel { label: name.clone(), hint }
        })?;
        if let Some(family) = model.family(label)
            && let Some(first) = families.insert(family, name)
            && first != name
        {
            return Err(MonitorError::Family { first: first.to_owned(), second: name.clone() });
        }
        labels.push(label);
    }
    // Its name stays its own.
    labels.extend(declared.and_then(|party| model.label_index.get(&party.name)));
    key.wall = model.wall_mask(&labels);
    labels.retain(|label| model.label_used.get(*label as usize).copied().unwrap_or(false));
    labels.sort_unstable();
    labels.dedup();
    key.labels = labels;
    Ok(key)
}

fn bare_key(principal: &Principal) -> ClassKey {
    let kind = if matches!(principal, Principal::Vm(_)) { ClassKind::Vm } else { ClassKind::Host };
    ClassKey { kind, ..ClassKey::default() }
}

/// What [`trust`](crate::trust) asks.
impl Monitor {
    /// What is to be done if the subject misbehaves, by the first `escalate` that is about it.
    pub(crate) fn escalation(&self, id: SubjectId) -> Option<crate::syntax::Escalation> {
        let now = self.shared.now.load();
        let class = now.main.seat(id)?.class.id();
        let escalations = &now.main.policy.model.escalations;
        let about = escalations.iter().find(|(who, ..)| now.main.table.is_member(*who, class));
        about.map(|(_, escalation, _)| escalation.clone())
    }

    pub(crate) fn subject_count(&self) -> usize {
        self.shared.now.load().main.subjects().count()
    }

    pub(crate) fn is_registered(&self, id: SubjectId) -> bool {
        self.shared.now.load().main.seat(id).is_some()
    }

    pub(crate) fn principal(&self, id: SubjectId) -> Option<Principal> {
        self.shared.now.load().main.seat(id).map(|seat| seat.subject().principal.clone())
    }

    pub(crate) fn monotonic(&self) -> u64 {
        self.shared.clock.monotonic()
    }

    /// Who may say yes to what was decided so, and within how many seconds.
    pub(crate) fn asked(&self, decision: &crate::Decision) -> Option<(u32, u32)> {
        ask_of(&self.shared.now.load(), decision)
    }

    /// Whether a subject may say yes to what was decided so.
    pub(crate) fn may_confirm(&self, decision: &crate::Decision, id: SubjectId) -> bool {
        let now = self.shared.now.load();
        match (ask_of(&now, decision), now.main.seat(id)) {
            (Some((by, _)), Some(seat)) => now.main.table.is_member(by, seat.class.id()),
            _ => false,
        }
    }
}

/// What the rule of a decision asks for; nothing where it was decided under another policy, whose rules have other numbers.
fn ask_of(now: &Snapshot, decision: &crate::Decision) -> Option<(u32, u32)> {
    let rule = decision.rule.filter(|_| decision.epoch == now.epoch)?;
    now.main.policy.model.rule(rule)?.ask
}

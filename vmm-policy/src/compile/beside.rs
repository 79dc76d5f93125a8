//! Declared objects that are named beside a peer.
//!
//! Who asks says whose an object is. Where the policy says so as well, what it says counts: it is nobody's who has another label of a family than
//! the object has; levels and walls are asked about the object, too; and what rules say of the object itself overrides what they say of
//! the peer where it is stronger. `allow db to attach disk of any in same tenant` opens no disk of another tenant to who names a machine
//! of its own tenant as the owner.

use super::classes::{Class, ClassKey};
use super::conditions::Facts;
use super::lookup::Ruling;
use super::model::{Model, Strength};
use super::table::Table;
use crate::model::{Flow, Layer, Op};

/// A family of which the two have different labels: the label of the one, and of the other.
pub(crate) fn contradiction(model: &Model, one: &ClassKey, other: &ClassKey) -> Option<(u32, u32)> {
    one.labels.iter().find_map(|label| {
        let of_other = model.label_of(&other.labels, model.family(*label)?)?;
        (of_other != *label).then_some((*label, of_other))
    })
}

impl Table {
    /// What is said of a request for `object`, declared, of `peer`, a subject, if it is `of_peer` by rules about the peer.
    #[allow(clippy::too_many_arguments, reason = "what a request is takes so many")]
    pub(crate) fn decide_beside(
        &self,
        model: &Model,
        op: Op,
        asker: &Class,
        peer: &Class,
        object: &Class,
        value: u64,
        facts: &Facts,
        of_peer: Ruling,
    ) -> Ruling {
        if let Some(layer) = self.barrier(op, asker, object) {
            return Ruling::denied(layer);
        }
        if op.flow() != Flow::None && self.walls_meet(peer.wall, object.wall) {
            return Ruling::denied(Layer::Wall);
        }
        if matches!(of_peer.layer, Layer::Lattice | Layer::Wall) {
            return of_peer;
        }
        if self.is_contradiction(model, peer.id, object.id) {
            return Ruling::denied(Layer::Identity);
        }
        // An object has no state.
        let facts = Facts { peer: 0, ..*facts };
        let of_object = self.judge(model, op, asker, object, value, &facts);
        if of_object.is_by_rule(model) && of_object.strength() < of_peer.strength() {
            // Limits are those of the peer.
            Ruling { limited: of_peer.limited, ..of_object }
        } else {
            of_peer
        }
    }

    pub(crate) fn is_contradiction(&self, model: &Model, peer: u32, object: u32) -> bool {
        let key = |class: u32| self.keys.get(class as usize);
        key(peer).zip(key(object)).is_some_and(|(one, other)| contradiction(model, one, other).is_some())
    }

    /// Whether a wall is between a peer and an object.
    pub(crate) fn is_walled_off(&self, peer: u32, object: u32) -> bool {
        let both = self.class(peer).zip(self.class(object));
        both.is_some_and(|(peer, object)| self.walls_meet(peer.wall, object.wall))
    }

    /// Whether a rule without a condition denies what is asked about an object itself.
    pub(crate) fn is_denied(&self, op: Op, asker: u32, object: u32, value: u64) -> bool {
        let mut denied = false;
        self.ranges(op, asker, object, |first, last, entries| {
            let denies = |strength| matches!(strength, Strength::Never | Strength::Deny);
            denied |= (first..=last).contains(&value)
                && entries.iter().any(|entry| entry.condition == 0 && denies(entry.strength()));
        });
        denied
    }
}

//! Rules to cells.

use super::cells::{ANY, Cell, cell_key, related, split_key, split_related};
use super::classes::NOBODY;
use super::front::Origin;
use super::model::{Model, Strength, TargetsDef};
use super::ranges::LIMIT;
use super::table::Table;
use super::who::Who;
use crate::limits;
use crate::model::{Kind, ValueKind};
use crate::syntax::{PolicyError, Span};

/// A `never` that is about more pairs than this is not in the table: it holds, since [`check`](super::check) has seen to it, and
/// [`explain`](crate::Policy::explain) shows it.
const NEVER_PAIRS: usize = 1 << 16;

/// The bit of a shape: whether any asker, and a peer, any peer or none; or what they have to do with each other.
fn shape(asker: u32, peer: u32) -> u16 {
    if let Some((slot, same)) = split_related(asker) {
        return 1 << (6 + slot * 2 + usize::from(same));
    }
    let peer = match peer {
        NOBODY => 2,
        ANY => 1,
        _ => 0,
    };
    1 << (peer + if asker == ANY { 3 } else { 0 })
}

/// Whether numbers of the kind need more than 32 bits.
fn is_wide(kind: Kind) -> bool {
    matches!(kind.value_kind(), ValueKind::Number(most) if most > u64::from(u32::MAX))
}

impl Table {
    /// Makes the cells of all pairs with a class from `first` on.
    pub(super) fn fill(&mut self, model: &Model, first: u32) -> Result<(), PolicyError> {
        let mut pairs: Vec<(u64, u32)> = Vec::new();
        for (at, rule) in model.rules.iter().enumerate() {
            self.pairs_of(model, &rule.targets, at as u32, first, &mut pairs)
                .map_err(|TooWide| too_wide(model, rule.span))?;
        }
        for (at, limit) in model.limits.iter().enumerate() {
            self.pairs_of(model, &limit.targets, at as u32 | LIMIT, first, &mut pairs)
                .map_err(|TooWide| too_wide(model, limit.span))?;
        }
        // Rules are in the order of their ranks, so each cell's list is.
        pairs.sort_unstable();
        let groups = pairs.chunk_by(|(key, _), (other, _)| key == other);
        let wide: Vec<bool> = Kind::ALL.iter().map(|kind| is_wide(*kind)).collect();
        let mut fresh = Vec::new();
        let mut list = Vec::new();
        for group in groups {
            let Some((key, _)) = group.first() else { continue };
            list.clear();
            list.extend(group.iter().map(|(_, rule)| *rule));
            let (op, asker, peer) = split_key(*key);
            let kind = op / crate::Action::ALL.len();
            let body = self.ranges.body(model, wide.get(kind).copied().unwrap_or(true), &list)?;
            fresh.push(Cell::new(*key, body));
            if let Some(shapes) = self.shapes.get_mut(op) {
                *shapes |= shape(asker, peer);
            }
        }
        self.cells.extend(fresh.clone());
        let Self { cells, ranges, objects, keys, .. } = self;
        let origin = Origin { cells, ranges, objects, classes: keys.len() };
        self.front.extend(model, &origin, &fresh);
        Ok(())
    }

    /// The keys of the cells that a rule is in.
    fn pairs_of(
        &self,
        model: &Model,
        targets: &TargetsDef,
        rule: u32,
        first: u32,
        pairs: &mut Vec<(u64, u32)>,
    ) -> Result<(), TooWide> {
        let is_any = |who: u32| model.who.get(who as usize) == Some(&Who::Any);
        let any_peer = targets.peer.is_some_and(is_any);
        let slot = targets
            .relation
            .and_then(|(_, family)| model.wide_families.iter().position(|wide| *wide == family));
        if let (Some((same, _)), Some(slot), true, true) =
            (targets.relation, slot, is_any(targets.asker), any_peer)
        {
            if first == 0 {
                pairs.extend(targets.ops.iter().map(|op| (cell_key(*op, related(slot, same), ANY), rule)));
            }
            return Ok(());
        }
        let whole = targets.relation.is_none();
        let askers = if whole && is_any(targets.asker) { vec![ANY] } else { self.subjects(targets.asker) };
        let peers: Vec<u32> = match targets.peer {
            None => vec![NOBODY],
            Some(_) if whole && any_peer => vec![ANY],
            Some(peer) => {
                let members = self.members.get(peer as usize);
                members.map_or(Vec::new(), |members| members.ones().map(|class| class as u32).collect())
            }
        };
        let never = model.rules.get(rule as usize).is_some_and(|rule| rule.strength == Strength::Never);
        if never && askers.len() * peers.len() * targets.ops.len() > NEVER_PAIRS {
            return Ok(());
        }
        // Those that `any` asks for are there since the table is.
        let is_new = |class: u32| first == 0 || (class != ANY && class >= first);
        for asker in &askers {
            for peer in &peers {
                let wanted = is_new(*asker) || is_new(*peer);
                if wanted && self.is_related(model, targets.relation, *asker, *peer) {
                    pairs.extend(targets.ops.iter().map(|op| (cell_key(*op, *asker, *peer), rule)));
                }
            }
            if pairs.len() > limits::CELL_RULES {
                return Err(TooWide);
            }
        }
        Ok(())
    }

    /// The classes of subjects among those that an expression is about: objects ask for nothing.
    fn subjects(&self, who: u32) -> Vec<u32> {
        let members = self.members.get(who as usize);
        members.map_or(Vec::new(), |members| {
            members.difference(&self.objects).map(|class| class as u32).collect()
        })
    }
}

/// That a rule is about more than there is room for.
struct TooWide;

fn too_wide(model: &Model, span: Span) -> PolicyError {
    let (line, _) = model.sources.place(span);
    let hint = format!(": line {line} of {} is one too many", model.sources.name(span));
    PolicyError::TooLarge {
        what: "pairs of asker and peer that rules are about",
        allowed: limits::CELL_RULES,
        hint,
    }
}

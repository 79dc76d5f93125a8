//! What `never` says holds, or the policy is none.

use super::classes::NOBODY;
use super::model::{Model, Strength};
use super::pairs::Steps;
use super::table::Table;
use crate::analysis::{Reach, describe_pair};
use crate::syntax::{PolicyError, Report};

/// Reports each rule that opens what another one says is never to be, and each path that is never to be. Of pairs of classes,
/// just those with one from `first` on.
pub(crate) fn check(
    model: &Model,
    table: &Table,
    first: u32,
    report: &mut Report,
) -> Result<(), PolicyError> {
    let mut steps = Steps::default();
    let nevers = model.rules.iter().take_while(|rule| rule.strength == Strength::Never);
    let nevers: Vec<_> = nevers.collect();
    if !nevers.is_empty() {
        let mut reported = std::collections::BTreeSet::new();
        for op in crate::Op::all() {
            let about: Vec<_> = nevers
                .iter()
                .enumerate()
                .filter(|(_, rule)| rule.targets.ops.binary_search(&op).is_ok())
                .collect();
            if about.is_empty() {
                continue;
            }
            for (asker, peer) in table.pairs(op, &mut steps)? {
                if asker < first && peer < first {
                    continue;
                }
                for (at, never) in &about {
                    let targets = &never.targets;
                    let of_peer = targets
                        .peer
                        .map_or(peer == NOBODY || is_object(table, peer), |who| table.is_member(who, peer));
                    if !of_peer
                        || !table.is_member(targets.asker, asker)
                        || !table.is_related(model, targets.relation, asker, peer)
                    {
                        continue;
                    }
                    steps.take(1)?;
                    table.opened_despite(op, asker, peer, |rule, low, high| {
                        let all: &[(u64, u64)] = &[(0, u64::MAX)];
                        let ranges = if targets.ranges.is_empty() { all } else { &targets.ranges };
                        let both = |(first, last): &(u64, u64)| (low.max(*first), high.min(*last));
                        let hit = ranges
                            .iter()
                            .map(both)
                            .filter(|(first, last)| first <= last)
                            .find_map(|range| table.first_object(op, peer, range));
                        let (Some(value), Some(opening)) = (hit, model.rules.get(rule as usize)) else {
                            return;
                        };
                        if reported.insert((*at, rule)) {
                            let (line, _) = model.sources.place(never.span);
                            let message = format!(
                                "this opens what line {line} of {} says is never to be",
                                model.sources.name(never.span)
                            );
                            let shown = describe_pair(model, table, op, asker, peer, value);
                            report.add(opening.span, message, Some(format!("for example {shown}")));
                        }
                    });
                }
            }
        }
    }
    if !model.never_reach.is_empty() {
        let reach = Reach::new(model, table)?;
        for (asker, peer, span) in &model.never_reach {
            if let Some(witness) = reach.path(model, table, *asker, *peer, true) {
                report.add(*span, "there is a path", Some(witness.to_string()));
            }
        }
    }
    Ok(())
}

fn is_object(table: &Table, class: u32) -> bool {
    table.class(class).is_some_and(|class| class.is_object)
}

impl Table {
    /// The rules that open something between two classes, `never` apart.
    fn opened_despite(&self, op: crate::Op, asker: u32, peer: u32, mut each: impl FnMut(u32, u64, u64)) {
        if self.is_barred(op, asker, peer) {
            return;
        }
        self.ranges(op, asker, peer, |first, last, entries| {
            let denied =
                entries.iter().position(|entry| entry.condition == 0 && entry.strength() == Strength::Deny);
            let open = entries.get(..denied.unwrap_or(entries.len())).unwrap_or(&[]);
            if let Some(entry) = open.iter().find(|entry| entry.strength().opens()) {
                each(entry.rule(), first, last);
            }
        });
    }
}

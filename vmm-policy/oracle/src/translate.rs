//! A policy in Cedar's language: the part that both can say, which is labels, families, levels, walls between labels that machines have, ranges,
//! names, and conditions; not verdicts beside allow and deny, limits, and what depends on what was before.
//!
//! Principals are `Party`s, resources `Party`s or `Nobody::"nobody"`, with a parent `Label` for each label. The context has the object and what
//! conditions ask for.

use std::fmt::Write;

use anyhow::{Result, bail};
use vmm_policy::syntax::{
    Condition, Document, Effect, Expr, Fact, Item, Relation, Rule, Targets, ValuePattern,
};
use vmm_policy::{Action, Kind, Op, ValueKind};

/// The id of an action in Cedar.
pub(crate) fn action_id(kind: Kind, action: Action) -> String {
    format!("{action} {kind}")
}

fn expr(expr: &Expr, side: &str) -> Result<String> {
    let joined = |all: &[Expr], by: &str| -> Result<String> {
        Ok(format!("({})", all.iter().map(|one| self::expr(one, side)).collect::<Result<Vec<_>>>()?.join(by)))
    };
    Ok(match expr {
        // Nobody is not anybody.
        Expr::Any => format!("{side} is Party"),
        Expr::AnyVm => format!("({side} is Party && {side}.vm)"),
        Expr::AnyHost => format!("({side} is Party && !{side}.vm)"),
        Expr::Label(label) => format!("{side} in Label::{:?}", &*label.text),
        Expr::Not(inner) => format!("({side} is Party && !({}))", self::expr(inner, side)?),
        Expr::And(all) => joined(all, " && ")?,
        Expr::Or(all) => joined(all, " || ")?,
        _ => bail!("an expression that Cedar is not told of"),
    })
}

fn condition(condition: &Condition) -> Result<String> {
    let joined = |all: &[Condition], by: &str| -> Result<String> {
        Ok(format!("({})", all.iter().map(self::condition).collect::<Result<Vec<_>>>()?.join(by)))
    };
    Ok(match condition {
        Condition::Is { fact, peer } => {
            let side = if *peer { "peer" } else { "asker" };
            match fact {
                Fact::Lifecycle(state) => format!("context.{side}_state == {:?}", state.word()),
                Fact::Attested => format!("context.{side}_attested"),
                Fact::Flag(name) => format!("context.flags.contains({:?})", &*name.text),
                _ => bail!("a condition that Cedar is not told of"),
            }
        }
        Condition::Not(inner) => format!("!({})", self::condition(inner)?),
        Condition::And(all) => joined(all, " && ")?,
        Condition::Or(all) => joined(all, " || ")?,
        _ => bail!("a condition that Cedar is not told of"),
    })
}

fn values(kind: Kind, values: &[ValuePattern]) -> Result<String> {
    let one = |value: &ValuePattern| {
        Ok(match value {
            ValuePattern::Range(first, last) => {
                format!("(context.number >= {first} && context.number <= {last})")
            }
            ValuePattern::Name(name) => format!("context.name == {:?}", &*name.text),
            ValuePattern::Prefix(prefix) => format!("context.name like {:?}", format!("{}*", prefix.text)),
            _ => bail!("a value that Cedar is not told of"),
        })
    };
    let all = values.iter().map(one).collect::<Result<Vec<_>>>()?;
    debug_assert!(kind.value_kind() != ValueKind::Nothing);
    Ok(format!("({})", all.join(" || ")))
}

fn ops(targets: &Targets) -> Vec<Op> {
    let access = &targets.access;
    let wanted = |op: &Op| {
        access.kind.is_none_or(|kind| op.kind() == kind)
            && (access.actions.is_empty() || access.actions.contains(&op.action()))
    };
    Op::all().filter(wanted).collect()
}

fn actions(ops: &[Op]) -> String {
    let all: Vec<String> =
        ops.iter().map(|op| format!("Action::{:?}", action_id(op.kind(), op.action()))).collect();
    format!("action in [{}]", all.join(", "))
}

/// What a document's rules are in Cedar.
pub(crate) fn translate(document: &Document) -> Result<String> {
    let mut text = String::new();
    let mut families: Vec<(&str, Vec<&str>)> = Vec::new();
    for statement in &document.statements {
        if let Item::Family { name, labels } = &statement.item {
            families.push((&name.text, labels.iter().map(|label| &*label.text).collect()));
        }
    }
    // Levels: a subject writes up and reads down, in integrity the other way; guards and nobody are exempt.
    let may = |from: &str, to: &str| {
        format!(
            "({from}.secrecy <= {to}.secrecy && {from}.integrity >= {to}.integrity && {to}.categories.containsAll({from}.categories))"
        )
    };
    let both = "principal is Party && resource is Party && !principal.guard && !resource.guard";
    let flows: Vec<(Vec<Op>, String)> = vec![
        (Op::all().filter(|op| op.flow().writes()).collect(), may("principal", "resource")),
        (Op::all().filter(|op| op.flow().reads()).collect(), may("resource", "principal")),
    ];
    for (ops, may) in &flows {
        writeln!(text, "forbid(principal, {}, resource) when {{ {both} && !{may} }};", actions(ops))?;
    }
    let flowing: Vec<Op> = Op::all().filter(|op| op.flow().writes() || op.flow().reads()).collect();
    for statement in &document.statements {
        match &statement.item {
            Item::Wall { labels, .. } => {
                for one in labels {
                    for other in labels.iter().filter(|other| *other != one) {
                        writeln!(
                            text,
                            "forbid(principal, {}, resource) when {{ {both} && principal in Label::{:?} && resource in Label::{:?} }};",
                            actions(&flowing),
                            &*one.text,
                            &*other.text
                        )?;
                    }
                }
            }
            Item::Rule(rule) => writeln!(text, "{}", self::rule(rule, &families)?)?,
            _ => (),
        }
    }
    Ok(text)
}

fn rule(rule: &Rule, families: &[(&str, Vec<&str>)]) -> Result<String> {
    let effect = match rule.effect {
        Effect::Allow => "permit",
        Effect::Deny => "forbid",
        _ => bail!("a rule that Cedar is not told of"),
    };
    let targets = &rule.targets;
    let mut parts = vec![expr(&targets.asker, "principal")?];
    parts.push(match &targets.peer {
        Some(peer) => expr(peer, "resource")?,
        None => "resource is Nobody".to_owned(),
    });
    if let Some(Relation { same, family }) = &targets.relation {
        let labels =
            families.iter().find(|(name, _)| *name == &*family.text).map_or(&[][..], |(_, labels)| labels);
        let of = |side: &str| {
            labels.iter().map(|label| format!("{side} in Label::{label:?}")).collect::<Vec<_>>().join(" || ")
        };
        let alike = labels
            .iter()
            .map(|label| format!("(principal in Label::{label:?} && resource in Label::{label:?})"));
        let alike = alike.collect::<Vec<_>>().join(" || ");
        parts.push(if *same {
            format!("({alike})")
        } else {
            format!("(({}) && ({}) && !({alike}))", of("principal"), of("resource"))
        });
    }
    if let (Some(kind), false) = (targets.access.kind, targets.access.values.is_empty()) {
        parts.push(values(kind, &targets.access.values)?);
    }
    if let Some(when) = &rule.when {
        parts.push(format!("({})", condition(when)?));
    }
    Ok(format!(
        "{effect}(principal, {}, resource) when {{ {} }};",
        actions(&ops(targets)),
        parts.join(" && ")
    ))
}

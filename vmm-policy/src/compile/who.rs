//! Whom a rule is about, as labels' numbers.

use super::classes::ClassKind;
use crate::syntax::{Expr, Word};
use std::collections::HashMap;

/// [`Expr`] with numbers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Who {
    Any,
    Vm,
    Host,
    Object,
    Label(u32),
    Not(Box<Who>),
    And(Vec<Who>),
    Or(Vec<Who>),
}

impl Who {
    /// Whether it is about one with these labels. As deep as the text was, which has a bound.
    pub(crate) fn matches(&self, kind: ClassKind, labels: &[u32]) -> bool {
        match self {
            Self::Any => true,
            Self::Vm => kind == ClassKind::Vm,
            Self::Host => kind == ClassKind::Host,
            Self::Object => kind == ClassKind::Object,
            Self::Label(label) => labels.binary_search(label).is_ok(),
            Self::Not(inner) => !inner.matches(kind, labels),
            Self::And(all) => all.iter().all(|one| one.matches(kind, labels)),
            Self::Or(all) => all.iter().any(|one| one.matches(kind, labels)),
        }
    }

    pub(crate) fn each_label(&self, each: &mut impl FnMut(u32)) {
        match self {
            Self::Any | Self::Vm | Self::Host | Self::Object => (),
            Self::Label(label) => each(*label),
            Self::Not(inner) => inner.each_label(each),
            Self::And(all) | Self::Or(all) => all.iter().for_each(|one| one.each_label(each)),
        }
    }
}

/// `expr` with the numbers of `labels`; what is none goes to `unknown`.
pub(crate) fn resolve_who(
    expr: &Expr,
    labels: &HashMap<Box<str>, u32>,
    unknown: &mut impl FnMut(&Word),
) -> Who {
    let mut all = |exprs: &[Expr]| exprs.iter().map(|expr| resolve_who(expr, labels, unknown)).collect();
    match expr {
        Expr::Any => Who::Any,
        Expr::AnyVm => Who::Vm,
        Expr::AnyHost => Who::Host,
        Expr::AnyObject => Who::Object,
        Expr::And(exprs) => Who::And(all(exprs)),
        Expr::Or(exprs) => Who::Or(all(exprs)),
        Expr::Not(inner) => Who::Not(Box::new(resolve_who(inner, labels, unknown))),
        Expr::Label(word) => Who::Label(labels.get(&word.text).copied().unwrap_or_else(|| {
            unknown(word);
            u32::MAX
        })),
    }
}

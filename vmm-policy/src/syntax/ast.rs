//! A policy as a tree. Equality and hashes of it are blind for where things stand.

use std::fmt;
use std::hash::{Hash, Hasher};

pub use super::facts::{Clock, Condition, Fact, Weekdays};
use super::source::Span;
use crate::model::{Action, Kind, Rate};

/// A whole policy: what [`Policy::from_document`](crate::Policy::from_document) takes, for programs that write one. Its text is
/// its `Display`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Document {
    /// In order.
    pub statements: Vec<Statement>,
    /// Comments after the last one.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Vec::is_empty"))]
    pub comments: Vec<String>,
}

/// One sentence of a policy, and the comments at it. Where it stands is no part of what it says: sentences elsewhere can be equal.
#[derive(Clone, Debug, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Statement {
    /// The lines of comment before it, without their `#`; an empty line is one without text.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Vec::is_empty"))]
    pub comments: Vec<String>,
    /// The comment behind it.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
    pub trailing: Option<String>,
    /// Whether a line is left empty before it.
    #[cfg_attr(feature = "serde", serde(default))]
    pub apart: bool,
    /// What it says.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub item: Item,
    /// Where.
    #[cfg_attr(feature = "serde", serde(skip))]
    pub span: Span,
}

impl PartialEq for Statement {
    fn eq(&self, other: &Self) -> bool {
        let Self { comments, trailing, apart, item, span: _ } = self;
        (comments, trailing, apart, item) == (&other.comments, &other.trailing, &other.apart, &other.item)
    }
}

/// What a statement says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Item {
    /// `policy "TITLE"`.
    Policy(String),
    /// `include "FILE"`.
    Include(Word),
    /// `labels A, B`.
    Labels(Vec<Word>),
    /// `family NAME: A, B`: labels of which a subject has one at most.
    Family {
        /// What they are.
        name: Word,
        /// The labels.
        labels: Vec<Word>,
    },
    /// `secrecy LOW < HIGH`.
    Secrecy(Vec<Word>),
    /// `integrity LOW < HIGH`.
    Integrity(Vec<Word>),
    /// `categories A, B`.
    Categories(Vec<Word>),
    /// `wall NAME: A, B`: who has had to do with one of them has not with another, ever.
    Wall {
        /// What it is about.
        name: Word,
        /// Labels.
        labels: Vec<Word>,
    },
    /// `vm`, `host`, or an object that has a name.
    Party(Party),
    /// `allow` and its like.
    Rule(Rule),
    /// `limit`.
    Limit(Limit),
    /// `escalate`.
    Escalate(Escalation),
}

/// What stands for something else.
#[derive(Clone, Default, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(transparent))]
pub struct Word {
    /// The word.
    pub text: Box<str>,
    /// Where it stands.
    #[cfg_attr(feature = "serde", serde(skip))]
    pub span: Span,
}

impl Word {
    pub(crate) fn new(text: &str, span: Span) -> Self {
        Self { text: text.into(), span }
    }
}

impl From<&str> for Word {
    fn from(text: &str) -> Self {
        Self::new(text, Span::default())
    }
}

impl PartialEq for Word {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Hash for Word {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(f)
    }
}

/// A level, with categories.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Level {
    /// The level.
    pub level: Word,
    /// The categories.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Vec::is_empty"))]
    pub categories: Vec<Word>,
}

/// What a [`Party`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum PartyKind {
    /// A virtual machine.
    Vm,
    /// A program or user of the host.
    Host,
    /// An object of a kind that has names.
    Object(Kind),
}

/// A virtual machine, a host principal, or an object that has labels. Its name is a label that nobody else has.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Party {
    /// What it is.
    pub kind: PartyKind,
    /// Its name.
    pub name: Word,
    /// A virtual machine's identifier.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
    pub uuid: Option<Word>,
    /// Its labels.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Vec::is_empty"))]
    pub labels: Vec<Word>,
    /// How secret what it has is.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
    pub secrecy: Option<Level>,
    /// How far it is relied on.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
    pub integrity: Option<Word>,
    /// Trusted not to hand on what it learns: exempt from levels and walls, and the end of every path.
    #[cfg_attr(feature = "serde", serde(default))]
    pub guard: bool,
    /// A network whose switch judges each frame by `send` and `connect` rules, so that being on it alone reaches nobody.
    #[cfg_attr(feature = "serde", serde(default))]
    pub filtered: bool,
}

/// Whom a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Expr {
    /// Everybody.
    Any,
    /// Every virtual machine.
    AnyVm,
    /// Every host principal.
    AnyHost,
    /// Every object that the policy declares, asked for itself.
    AnyObject,
    /// Who has the label, or the name.
    Label(Word),
    /// Everybody else.
    Not(Box<Expr>),
    /// Who is all of them.
    And(Vec<Expr>),
    /// Who is one of them.
    Or(Vec<Expr>),
}

/// Which objects of a kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum ValuePattern {
    /// From the first to the second, both included.
    Range(u64, u64),
    /// The one of this name.
    Name(Word),
    /// Those whose names begin so.
    Prefix(Word),
}

/// What a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Access {
    /// What is done; empty for anything.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Vec::is_empty"))]
    pub actions: Vec<Action>,
    /// With what; `None` for anything.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
    pub kind: Option<Kind>,
    /// Which of them; empty for all.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Vec::is_empty"))]
    pub values: Vec<ValuePattern>,
}

/// What asker and peer have to do with each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Relation {
    /// Whether they have the same label of the family; else, whether each has one and they differ.
    pub same: bool,
    /// The family.
    pub family: Word,
}

/// Who, what, of whom.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Targets {
    /// Who asks.
    pub asker: Expr,
    /// For what.
    pub access: Access,
    /// Of whom; `None` where it leads to nobody.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
    pub peer: Option<Expr>,
    /// What the two have to do with each other.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
    pub relation: Option<Relation>,
}

/// What a rule says to those it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Effect {
    /// `allow`.
    Allow,
    /// `deny`: whatever is allowed.
    Deny,
    /// `throttle`.
    Throttle(Rate),
    /// `quarantine`.
    Quarantine,
    /// `redirect .. onto PARTY [NUMBER]`.
    Redirect {
        /// To whom.
        onto: Word,
        /// Another port there.
        #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
        number: Option<u64>,
    },
    /// `ask .. by EXPR within TIME`.
    Ask {
        /// Who may say yes, beside who asks.
        by: Expr,
        /// Within so many seconds.
        seconds: u32,
    },
    /// `never`: no rule may allow it, or the policy is none.
    Never,
    /// `never .. reach`: no path, through whomever.
    NeverReach,
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Rule {
    /// What it says.
    pub effect: Effect,
    /// To whom, about what. Of `never .. reach` just asker and peer count.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub targets: Targets,
    /// When.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
    pub when: Option<Condition>,
}

/// How much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Quantity {
    /// `N per TIME burst M`: requests.
    Requests {
        /// So many.
        count: u64,
        /// In so many seconds.
        seconds: u32,
        /// So many at once.
        burst: u64,
    },
    /// `SIZE per TIME burst SIZE`: bytes.
    Bytes {
        /// So many.
        count: u64,
        /// In so many seconds.
        seconds: u32,
        /// So many at once.
        burst: u64,
    },
    /// `N open`: channels at a time.
    Open(u64),
    /// `N pages`: mapped at a time, of 4096 bytes.
    Pages(u64),
}

/// A limit: for each asker of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Limit {
    /// Whose, on what.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub targets: Targets,
    /// How much.
    pub quantity: Quantity,
}

/// What is done to a guest that misbehaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum Step {
    /// Its requests are slowed down.
    Throttle,
    /// The device says that it needs a reset (Virtio 1.3, 2.1.2).
    Reset,
    /// It is stopped until somebody has looked.
    Pause,
    /// It is ended.
    Kill,
}

/// `escalate WHO: STEP after N, .. per TIME`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Escalation {
    /// Whom it is about.
    pub asker: Expr,
    /// What, after how many violations.
    pub steps: Vec<(Step, u32)>,
    /// Within so many seconds.
    pub seconds: u32,
}

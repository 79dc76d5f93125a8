//! Subjects and objects that the policy does not tell apart.

use crate::model::Flow;

/// The class of nobody: the peer of a request that leads to none.
pub(crate) const NOBODY: u32 = 0;

/// What members of a class are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum ClassKind {
    #[default]
    Nobody,
    Vm,
    Host,
    Object,
}

/// What tells classes apart.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct ClassKey {
    pub(crate) kind: ClassKind,
    /// Those that rules ask for, in ascending order.
    pub(crate) labels: Vec<u32>,
    pub(crate) secrecy: u8,
    pub(crate) integrity: u8,
    pub(crate) categories: u64,
    pub(crate) guard: bool,
    /// The history that it begins with.
    pub(crate) wall: u64,
}

/// What a decision needs to know of a class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Class {
    pub(crate) categories: u64,
    pub(crate) wall: u64,
    pub(crate) id: u32,
    /// Of [`Ways`](super::ways::Ways).
    pub(super) level: u8,
    pub(crate) secrecy: u8,
    pub(crate) integrity: u8,
    /// Neither levels nor walls are asked about it: a guard, or nobody.
    pub(crate) exempt: bool,
    pub(crate) is_object: bool,
}

/// What most decisions need to know of a class.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Brief {
    pub(super) id: u16,
    /// One more than its label of the first family of [`Model::wide_families`](super::Model::wide_families); 0 for none.
    pub(super) family: u32,
    /// Of [`Ways`](super::ways::Ways).
    pub(super) level: u8,
    pub(crate) exempt: bool,
}

impl Brief {
    #[inline(always)]
    pub(crate) fn id(&self) -> u32 {
        self.id.into()
    }
}

/// What there is to ask of it without a table, in which it would have a number.
impl From<&ClassKey> for Class {
    fn from(key: &ClassKey) -> Self {
        Self::new(NOBODY, key)
    }
}

impl Class {
    pub(super) fn new(id: u32, key: &ClassKey) -> Self {
        Self {
            id,
            level: 0,
            categories: key.categories,
            wall: if key.guard { 0 } else { key.wall },
            secrecy: key.secrecy,
            integrity: key.integrity,
            exempt: key.guard || key.kind == ClassKind::Nobody,
            is_object: key.kind == ClassKind::Object,
        }
    }

    /// Whether information may go from `self` to `to`: up in secrecy, with no category lost (Bell and LaPadula), and down in
    /// integrity (Biba).
    pub(crate) fn may_flow(&self, to: &Self) -> bool {
        self.exempt
            || to.exempt
            || (self.secrecy <= to.secrecy
                && self.categories & !to.categories == 0
                && self.integrity >= to.integrity)
    }

    /// Whether it may go as `flow` says between an asker and its peer.
    pub(crate) fn permits(&self, peer: &Self, flow: Flow) -> bool {
        (!flow.writes() || self.may_flow(peer)) && (!flow.reads() || peer.may_flow(self))
    }
}

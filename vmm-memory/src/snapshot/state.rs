//! States: what a snapshot holds beside RAM.

use super::error::StateError;

/// A family of states whose versions go together: those of one crate.
///
/// The version is raised by a release that adds a field to a state, or a state. Whoever reads knows the versions up to its own; whoever
/// writes may choose an older one, for an older release to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateFormat {
    /// Whose states: the name of the crate, at most 64 letters, digits, `-`, `_`, `/` and `.`.
    pub name: &'static str,
    /// The newest version, which is written unless another is asked for.
    pub newest: u16,
    /// The oldest version that can still be read and written.
    pub oldest: u16,
}

/// A state that a snapshot can hold: plain data, which a device or a backend is asked for, and made from.
///
/// For those who implement it: a state comes from a file, which is hostile as far as this is concerned. Its bytes are those that were
/// written, whoever wrote them; what they say has to be checked where it is taken over.
pub trait SnapshotState: Sized {
    /// The family that the state belongs to.
    const FORMAT: StateFormat;

    /// The state in a version of [`FORMAT`](Self::FORMAT), which is one of those known.
    ///
    /// # Errors
    /// If that version cannot express it: something would be lost. The error says what.
    fn encode(&self, version: u16) -> Result<Vec<u8>, StateError>;

    /// The state that bytes of a version are, all of them.
    ///
    /// # Errors
    /// If they are none: too few, too many, or of no meaning.
    fn decode(bytes: &[u8], version: u16) -> Result<Self, StateError>;
}

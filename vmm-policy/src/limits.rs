//! How much a policy may ask for. What goes beyond is refused with an error that says so; nothing is cut.

/// Bytes of text, all files together.
pub const POLICY_BYTES: usize = 64 << 20;
/// Words and comments of one file.
pub const WORDS: usize = 4_000_000;
/// Statements.
pub const STATEMENTS: usize = 250_000;
/// Files that include each other, one inside the other.
pub const INCLUDE_DEPTH: usize = 16;
/// Files.
pub const FILES: usize = 256;
/// Parentheses and `not`, one inside the other.
pub const DEPTH: usize = 32;
/// Things in one list.
pub const LIST: usize = 4096;
/// Bytes of a name.
pub const NAME_BYTES: usize = 255;
/// Labels, names of machines and objects among them.
pub const LABELS: usize = 1 << 16;
/// Sets of labels that something has.
pub const CLASSES: usize = 1 << 16;
/// Labels that rules name, times sets of labels.
pub const MATCHES: usize = 1 << 28;
/// Levels of secrecy, and of integrity.
pub const LEVELS: usize = 64;
/// Categories.
pub const CATEGORIES: usize = 64;
/// Labels at walls.
pub const WALL_LABELS: usize = 64;
/// Limits.
pub const LIMITS: usize = 4096;
/// Limits that one request falls under, by each of the ten ways to name asker and peer.
pub const LIMITS_AT_ONCE: usize = 16;
/// Flags that the monitor sets, and spans of time.
pub const ENVIRONMENT: usize = 32;
/// Digests that conditions name.
pub const DIGESTS: usize = 32;
/// Ways in which one condition can hold.
pub const CLAUSES: usize = 16;
/// Rules with conditions that one request falls under, by each of the ten ways to name asker and peer.
pub const CONDITIONS_AT_ONCE: usize = 64;
/// Pairs of a rule and of who it is about, all rules together.
pub const CELL_RULES: usize = 1 << 23;
/// Ranges of objects, all cells together.
pub const SEGMENTS: usize = 1 << 22;
/// Steps of an analysis that looks at pairs of subjects: a proof, a difference, a picture.
pub const ANALYSIS_STEPS: usize = 1 << 28;
/// Problems that are shown.
pub const PROBLEMS: usize = 20;
/// Characters that are shown of a line.
pub const SHOWN_CHARACTERS: usize = 200;
/// Bytes of a word for which another one is suggested.
pub const SUGGESTED_BYTES: usize = 64;
/// Words among which one is suggested.
pub const SUGGESTED_FROM: usize = 1024;

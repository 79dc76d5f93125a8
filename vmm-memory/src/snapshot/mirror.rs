//! States in bytes, by `versionize`: the one place in the family of crates that knows of it, and a short way to implement
//! [`SnapshotState`](super::SnapshotState).
//!
//! `versionize` writes plain data without tags or lengths, and accepts what follows it. So each state has a mirror, a structure whose fields are
//! in the order of the bytes, and what is read has to end where its bytes do. A [`Family`] tells which versions there are.
//!
//! ```
//! use vmm_memory::snapshot::mirror::{Family, VersionMap, Versionize, VersionizeError, VersionizeResult};
//! use vmm_memory::snapshot::{SnapshotState, StateFormat};
//!
//! /// What a timer is, as its device knows it.
//! pub struct TimerState {
//!     pub count: u32,
//!     pub mode: Mode,
//!     pub prescaler: u16,
//! }
//!
//! #[derive(PartialEq, Debug)]
//! pub enum Mode {
//!     Once,
//!     Periodic,
//! }
//!
//! vmm_memory::snapshot_numbered!(Mode { Once = 0, Periodic = 1 });
//! vmm_memory::snapshot_mirror!(Timer of TimerState {
//!     count: u32,
//!     mode: Mode,
//!     // Since version 2. Timers of before had none.
//!     #[version(start = 2, default_fn = "no_prescaler", ser_fn = "has_no_prescaler")]
//!     prescaler: u16,
//! });
//!
//! impl Timer {
//!     fn no_prescaler(_: u16) -> u16 {
//!         1
//!     }
//!
//!     fn has_no_prescaler(&mut self, version: u16) -> VersionizeResult<()> {
//!         match self.prescaler {
//!             1 => Ok(()),
//!             other => Err(VersionizeError::Semantic(format!("version {version} has no prescaler, and it is {other}"))),
//!         }
//!     }
//! }
//!
//! struct Timers;
//!
//! impl Family for Timers {
//!     const FORMAT: StateFormat = StateFormat { name: "timers", newest: 2, oldest: 1 };
//!
//!     fn versions() -> VersionMap {
//!         let mut versions = VersionMap::new();
//!         versions.new_version().set_type_version(Timer::type_id(), 2);
//!         versions
//!     }
//! }
//!
//! vmm_memory::snapshot_states!(Timers: TimerState);
//!
//! let timer = TimerState { count: 5, mode: Mode::Periodic, prescaler: 1 };
//! let old = TimerState::decode(&timer.encode(1)?, 1)?;
//! assert_eq!((old.count, old.mode, old.prescaler), (5, Mode::Periodic, 1));
//! let error = TimerState { prescaler: 3, ..timer }.encode(1).unwrap_err();
//! assert!(error.to_string().ends_with("version 1 has no prescaler, and it is 3"));
//! # Ok::<(), vmm_memory::snapshot::StateError>(())
//! ```

pub use versionize::{VersionMap, Versionize, VersionizeError, VersionizeResult};
#[doc(hidden)]
pub use versionize_derive;

use super::error::StateError;
use super::state::StateFormat;

/// States whose versions go together.
pub trait Family {
    /// Which versions there are.
    const FORMAT: StateFormat;

    /// Which version each mirror has in each of them.
    fn versions() -> VersionMap;
}

/// What has a mirror: structures by [`snapshot_mirror!`](crate::snapshot_mirror), enums by [`snapshot_numbered!`](crate::snapshot_numbered), and what
/// they are made of.
pub trait Mirrored: Sized {
    /// The mirror.
    type Mirror: Versionize;

    /// The mirror of this.
    fn mirror(&self) -> Self::Mirror;

    /// What it is the mirror of.
    ///
    /// # Errors
    /// If it is of nothing.
    fn from_mirror(mirror: Self::Mirror) -> Result<Self, StateError>;
}

/// A state in a version of its family.
///
/// # Errors
/// If the version cannot express it.
pub fn encode<F: Family, S: Mirrored>(state: &S, version: u16) -> Result<Vec<u8>, StateError> {
    let mut bytes = Vec::new();
    state.mirror().serialize(&mut bytes, &F::versions(), version).map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// The state that these bytes are, all of them.
///
/// # Errors
/// If they are none.
pub fn decode<F: Family, S: Mirrored>(mut bytes: &[u8], version: u16) -> Result<S, StateError> {
    let mirror =
        S::Mirror::deserialize(&mut bytes, &F::versions(), version).map_err(|error| error.to_string())?;
    if !bytes.is_empty() {
        return Err(format!("{} bytes follow its end", bytes.len()).into());
    }
    S::from_mirror(mirror)
}

/// A field, whose error says which one it is.
///
/// # Errors
/// As [`Mirrored::from_mirror`].
pub fn named<T: Mirrored>(field: &str, mirror: T::Mirror) -> Result<T, StateError> {
    T::from_mirror(mirror).map_err(|error| format!("{field}: {error}").into())
}

/// Makes the mirror of a structure, with the same fields, in this order; one that is forgotten does not compile. `versionize`'s attributes may stand
/// before fields. In scope there have to be `VersionMap`, `Versionize` and `VersionizeResult`, see [`mirror`](crate::snapshot::mirror).
#[macro_export]
macro_rules! snapshot_mirror {
    ($mirror:ident of $state:ty { $($(#[$version:meta])* $field:ident: $type:ty),* $(,)? }) => {
        // As public as what it is the mirror of, which the compiler asks for.
        #[doc(hidden)]
        #[allow(missing_docs, unreachable_pub)]
        #[derive(Clone, $crate::snapshot::mirror::versionize_derive::Versionize)]
        pub struct $mirror {
            $($(#[$version])* pub $field: <$type as $crate::snapshot::mirror::Mirrored>::Mirror),*
        }

        impl $crate::snapshot::mirror::Mirrored for $state {
            type Mirror = $mirror;

            fn mirror(&self) -> $mirror {
                let Self { $($field),* } = self;
                $mirror { $($field: $crate::snapshot::mirror::Mirrored::mirror($field)),* }
            }

            fn from_mirror(mirror: $mirror) -> Result<Self, $crate::snapshot::StateError> {
                Ok(Self { $($field: $crate::snapshot::mirror::named(stringify!($field), mirror.$field)?),* })
            }
        }
    };
}

/// Makes an enum without fields its own numbers' mirror.
#[macro_export]
macro_rules! snapshot_numbered {
    ($state:ty { $($variant:ident = $number:literal),* $(,)? }) => {
        impl $crate::snapshot::mirror::Mirrored for $state {
            type Mirror = u8;

            fn mirror(&self) -> u8 {
                match self {
                    $(Self::$variant => $number),*
                }
            }

            fn from_mirror(mirror: u8) -> Result<Self, $crate::snapshot::StateError> {
                match mirror {
                    $($number => Ok(Self::$variant),)*
                    other => Err(format!("{other} is none of {:?}", [$($number),*]).into()),
                }
            }
        }
    };
}

/// Makes what has a mirror states of a [`Family`].
#[macro_export]
macro_rules! snapshot_states {
    ($family:ty: $($state:ty),* $(,)?) => {
        $(impl $crate::snapshot::SnapshotState for $state {
            const FORMAT: $crate::snapshot::StateFormat = <$family as $crate::snapshot::mirror::Family>::FORMAT;

            fn encode(&self, version: u16) -> Result<Vec<u8>, $crate::snapshot::StateError> {
                $crate::snapshot::mirror::encode::<$family, Self>(self, version)
            }

            fn decode(bytes: &[u8], version: u16) -> Result<Self, $crate::snapshot::StateError> {
                $crate::snapshot::mirror::decode::<$family, Self>(bytes, version)
            }
        })*
    };
}

/// What is its own mirror.
macro_rules! plain {
    ($($type:ty),*) => {
        $(impl Mirrored for $type {
            type Mirror = Self;

            fn mirror(&self) -> Self {
                self.clone()
            }

            fn from_mirror(mirror: Self) -> Result<Self, StateError> {
                Ok(mirror)
            }
        })*
    };
}
plain!(bool, u8, u16, u32, u64, i8, i16, i32, i64, String);

impl<T: Mirrored> Mirrored for Option<T> {
    type Mirror = Option<T::Mirror>;

    fn mirror(&self) -> Self::Mirror {
        self.as_ref().map(T::mirror)
    }

    fn from_mirror(mirror: Self::Mirror) -> Result<Self, StateError> {
        mirror.map(T::from_mirror).transpose()
    }
}

impl<T: Mirrored> Mirrored for Vec<T> {
    type Mirror = Vec<T::Mirror>;

    fn mirror(&self) -> Self::Mirror {
        self.iter().map(T::mirror).collect()
    }

    fn from_mirror(mirror: Self::Mirror) -> Result<Self, StateError> {
        mirror.into_iter().map(T::from_mirror).collect()
    }
}

/// As a list, whose length is checked.
impl<T: Mirrored, const N: usize> Mirrored for [T; N] {
    type Mirror = Vec<T::Mirror>;

    fn mirror(&self) -> Self::Mirror {
        self.iter().map(T::mirror).collect()
    }

    fn from_mirror(mirror: Self::Mirror) -> Result<Self, StateError> {
        let count = mirror.len();
        let all: Vec<T> = Mirrored::from_mirror(mirror)?;
        all.try_into().map_err(|_| format!("there are {count}; {N} are expected").into())
    }
}

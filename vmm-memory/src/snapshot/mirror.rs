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

use smallvec::{Array, SmallVec};
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

/// What has a mirror: structures and enums by [`snapshot_mirror!`](crate::snapshot_mirror), enums of numbers by
/// [`snapshot_numbered!`](crate::snapshot_numbered), and what they are made of.
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
///
/// Likewise that of an enum whose variants hold something, or nothing: each has a number, as in [`snapshot_numbered!`](crate::snapshot_numbered), and
/// a name for what is in it.
///
/// ```
/// use vmm_memory::snapshot::{StateFormat, mirror};
///
/// #[derive(PartialEq, Debug)]
/// pub enum Timer {
///     Stopped,
///     Since(u64),
/// }
///
/// vmm_memory::snapshot_mirror!(Saved of enum Timer { Stopped = 0, Since(tick: u64) = 1 });
///
/// # struct Timers;
/// # impl mirror::Family for Timers {
/// #     const FORMAT: StateFormat = StateFormat { name: "timers", newest: 1, oldest: 1 };
/// #     fn versions() -> mirror::VersionMap {
/// #         mirror::VersionMap::new()
/// #     }
/// # }
/// # // `Timers` is a family.
/// let bytes = mirror::encode::<Timers, _>(&Timer::Since(7), 1)?;
/// assert_eq!(bytes, [1, 7, 0, 0, 0, 0, 0, 0, 0]);
/// assert_eq!(mirror::decode::<Timers, Timer>(&bytes, 1)?, Timer::Since(7));
/// let error = mirror::decode::<Timers, Timer>(&[2], 1).unwrap_err();
/// assert!(error.to_string().contains("Timer: 2 is none of [0, 1]"), "{error}");
/// # Ok::<(), vmm_memory::snapshot::StateError>(())
/// ```
#[macro_export]
macro_rules! snapshot_mirror {
    ($mirror:ident of enum $state:ident { $($variant:ident $(($inner:ident: $type:ty))? = $number:literal),* $(,)? }) => {
        #[doc(hidden)]
        #[allow(missing_docs, unreachable_pub)]
        #[derive(Clone)]
        pub enum $mirror {
            $($variant $((<$type as $crate::snapshot::mirror::Mirrored>::Mirror))?),*
        }

        // What `versionize` derives says of a number that it is unknown, and not which there are; and numbers go by the places of variants.
        impl $crate::snapshot::mirror::Versionize for $mirror {
            fn serialize<W: std::io::Write>(
                &self,
                writer: &mut W,
                versions: &$crate::snapshot::mirror::VersionMap,
                version: u16,
            ) -> $crate::snapshot::mirror::VersionizeResult<()> {
                use $crate::snapshot::mirror::Versionize;
                match self {
                    $(Self::$variant $(($inner))? => {
                        <u8 as Versionize>::serialize(&$number, writer, versions, version)?;
                        $(Versionize::serialize($inner, writer, versions, version)?;)?
                    })*
                }
                Ok(())
            }

            fn deserialize<R: std::io::Read>(
                reader: &mut R,
                versions: &$crate::snapshot::mirror::VersionMap,
                version: u16,
            ) -> $crate::snapshot::mirror::VersionizeResult<Self> {
                use $crate::snapshot::mirror::{Mirrored, Versionize, VersionizeError};
                Ok(match <u8 as Versionize>::deserialize(reader, versions, version)? {
                    $($number => Self::$variant $((
                        <<$type as Mirrored>::Mirror as Versionize>::deserialize(reader, versions, version)?
                    ))?,)*
                    other => {
                        let all = [$($number),*];
                        let problem = format!("{}: {other} is none of {all:?}", stringify!($state));
                        return Err(VersionizeError::Deserialize(problem));
                    }
                })
            }

            fn version() -> u16 {
                1
            }
        }

        impl $crate::snapshot::mirror::Mirrored for $state {
            type Mirror = $mirror;

            fn mirror(&self) -> $mirror {
                match self {
                    $(Self::$variant $(($inner))? => {
                        $mirror::$variant $(($crate::snapshot::mirror::Mirrored::mirror($inner)))?
                    })*
                }
            }

            fn from_mirror(mirror: $mirror) -> Result<Self, $crate::snapshot::StateError> {
                Ok(match mirror {
                    $($mirror::$variant $(($inner))? => {
                        Self::$variant $(($crate::snapshot::mirror::named(stringify!($inner), $inner)?))?
                    })*
                })
            }
        }
    };
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
plain!(bool, u8, u16, u32, u64, i8, i16, i32, i64, i128, String);

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

/// As what is in it.
impl<T: Mirrored> Mirrored for Box<T> {
    type Mirror = T::Mirror;

    fn mirror(&self) -> Self::Mirror {
        T::mirror(self)
    }

    fn from_mirror(mirror: Self::Mirror) -> Result<Self, StateError> {
        T::from_mirror(mirror).map(Self::new)
    }
}

impl<A: Mirrored, B: Mirrored> Mirrored for (A, B) {
    type Mirror = (A::Mirror, B::Mirror);

    fn mirror(&self) -> Self::Mirror {
        (self.0.mirror(), self.1.mirror())
    }

    fn from_mirror((a, b): Self::Mirror) -> Result<Self, StateError> {
        Ok((A::from_mirror(a)?, B::from_mirror(b)?))
    }
}

impl<A: Array<Item: Mirrored>> Mirrored for SmallVec<A> {
    type Mirror = Vec<<A::Item as Mirrored>::Mirror>;

    fn mirror(&self) -> Self::Mirror {
        self.iter().map(A::Item::mirror).collect()
    }

    fn from_mirror(mirror: Self::Mirror) -> Result<Self, StateError> {
        mirror.into_iter().map(A::Item::from_mirror).collect()
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

//! Mirrors: structures that `versionize` can write, each as a state of a device is.
//!
//! A mirror is written out, as its fields are the format. What goes from one to the other is listed by [`mirror!`], which does not compile
//! if a field of either is left out.

use versionize::{VersionMap, Versionize};
use vmm_memory::snapshot::StateError;

/// A structure that stands for a `T`.
pub(super) trait Mirror<T>: Sized {
    /// What stands for `state`.
    fn of(state: &T) -> Self;

    /// The state that it stands for.
    ///
    /// # Errors
    /// If there is none.
    fn back(self) -> Result<T, StateError>;
}

/// What `versionize` can write as it is.
macro_rules! plain {
    ($($kind:ty),*) => {
        $(impl Mirror<$kind> for $kind {
            fn of(state: &$kind) -> Self {
                state.clone()
            }

            fn back(self) -> Result<$kind, StateError> {
                Ok(self)
            }
        })*
    };
}

plain!(bool, u8, u16, u32, u64, i128, String);

impl<T: Copy, const N: usize> Mirror<[T; N]> for [T; N] {
    fn of(state: &[T; N]) -> Self {
        *state
    }

    fn back(self) -> Result<[T; N], StateError> {
        Ok(self)
    }
}

impl<T, M: Mirror<T>> Mirror<Vec<T>> for Vec<M> {
    fn of(state: &Vec<T>) -> Self {
        state.iter().map(M::of).collect()
    }

    fn back(self) -> Result<Vec<T>, StateError> {
        self.into_iter().map(M::back).collect()
    }
}

impl<T, M: Mirror<T>> Mirror<Option<T>> for Option<M> {
    fn of(state: &Option<T>) -> Self {
        state.as_ref().map(M::of)
    }

    fn back(self) -> Result<Option<T>, StateError> {
        self.map(M::back).transpose()
    }
}

impl<A, B, M: Mirror<A>, N: Mirror<B>> Mirror<(A, B)> for (M, N) {
    fn of((a, b): &(A, B)) -> Self {
        (M::of(a), N::of(b))
    }

    fn back(self) -> Result<(A, B), StateError> {
        Ok((self.0.back()?, self.1.back()?))
    }
}

/// Which state a mirror stands for, and the fields that both have; or the variants, with names for what is in them.
macro_rules! mirror {
    (struct $mirror:ident = $state:ident { $($field:ident),* $(,)? }) => {
        impl $crate::snapshot::mirror::Mirror<$state> for $mirror {
            fn of(state: &$state) -> Self {
                let $state { $($field),* } = state;
                Self { $($field: $crate::snapshot::mirror::Mirror::of($field)),* }
            }

            fn back(self) -> Result<$state, vmm_memory::snapshot::StateError> {
                let Self { $($field),* } = self;
                Ok($state { $($field: $crate::snapshot::mirror::Mirror::back($field)?),* })
            }
        }
    };
    (enum $mirror:ident = $state:ident { $($variant:ident $(($inner:ident))?),* $(,)? }) => {
        impl $crate::snapshot::mirror::Mirror<$state> for $mirror {
            fn of(state: &$state) -> Self {
                match state {
                    $($state::$variant $(($inner))? => {
                        Self::$variant $(($crate::snapshot::mirror::Mirror::of($inner)))?
                    })*
                }
            }

            fn back(self) -> Result<$state, vmm_memory::snapshot::StateError> {
                Ok(match self {
                    $(Self::$variant $(($inner))? => {
                        $state::$variant $(($crate::snapshot::mirror::Mirror::back($inner)?))?
                    })*
                })
            }
        }
    };
}

/// States that a snapshot holds, each by its mirror.
macro_rules! states {
    ($($state:ident: $mirror:ident),* $(,)?) => {
        $(impl vmm_memory::snapshot::SnapshotState for $state {
            const FORMAT: vmm_memory::snapshot::StateFormat = $crate::snapshot::FORMAT;

            fn encode(&self, version: u16) -> Result<Vec<u8>, vmm_memory::snapshot::StateError> {
                $crate::snapshot::mirror::encode::<$state, $mirror>(self, &$crate::snapshot::versions(), version)
            }

            fn decode(bytes: &[u8], version: u16) -> Result<Self, vmm_memory::snapshot::StateError> {
                $crate::snapshot::mirror::decode::<$state, $mirror>(bytes, &$crate::snapshot::versions(), version)
            }
        })*
    };
}

pub(super) use {mirror, states};

/// The bytes of a state.
pub(super) fn encode<T, M: Mirror<T> + Versionize>(
    state: &T,
    versions: &VersionMap,
    version: u16,
) -> Result<Vec<u8>, StateError> {
    let mut bytes = Vec::new();
    M::of(state).serialize(&mut bytes, versions, version).map_err(text)?;
    Ok(bytes)
}

/// The state that bytes are, all of them.
pub(super) fn decode<T, M: Mirror<T> + Versionize>(
    mut bytes: &[u8],
    versions: &VersionMap,
    version: u16,
) -> Result<T, StateError> {
    let mirror = M::deserialize(&mut bytes, versions, version).map_err(text)?;
    if !bytes.is_empty() {
        return Err(format!("{} bytes follow its end", bytes.len()).into());
    }
    mirror.back()
}

fn text(error: versionize::VersionizeError) -> StateError {
    error.to_string().into()
}

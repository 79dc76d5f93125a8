//! Registers as lanes: the few shapes in which lane operations combine their operands.
//!
//! A register image is a `u64` (MM) or a `u128` (XMM), its lanes are arrays in ascending order. Everything here
//! is inlined into the operation that asks for it, where the optimiser turns it back into vector instructions.

/// An array as large as the register image `R`, its lanes from the least significant up.
pub(super) trait Lanes<R> {
    /// The lanes of a register.
    fn split(register: R) -> Self;

    /// The register with these lanes.
    fn join(self) -> R;
}

/// The lanes of a register, as many as the array that the caller names.
#[inline(always)]
pub(super) fn split<R, L: Lanes<R>>(register: R) -> L {
    L::split(register)
}

/// The register with these lanes.
#[inline(always)]
pub(super) fn join<R, L: Lanes<R>>(lanes: L) -> R {
    lanes.join()
}

/// A register image that splits into lanes of type `T`.
pub(super) trait Packed<T: Copy>: Copy {
    /// As many `T` as fit.
    type Lanes: Lanes<Self> + AsRef<[T]> + AsMut<[T]> + Default;

    /// The lanes, the least significant first.
    #[inline(always)]
    fn lanes(self) -> Self::Lanes {
        split(self)
    }
}

/// A register image that splits into lanes of every integer type up to 64 bits.
pub(super) trait Register:
    Packed<u8> + Packed<i8> + Packed<u16> + Packed<i16> + Packed<u32> + Packed<i32> + Packed<u64>
{
}

impl Register for u64 {}
impl Register for u128 {}

macro_rules! packed {
    ($register:ty: $($lane:ty),*) => {$(
        impl Packed<$lane> for $register {
            type Lanes = [$lane; size_of::<$register>() / size_of::<$lane>()];
        }

        impl Lanes<$register> for [$lane; size_of::<$register>() / size_of::<$lane>()] {
            #[inline(always)]
            fn split(register: $register) -> Self {
                let mut lanes = Self::default();
                let bytes = register.to_le_bytes();
                for (lane, chunk) in lanes.iter_mut().zip(bytes.as_chunks().0) {
                    *lane = <$lane>::from_le_bytes(*chunk);
                }
                lanes
            }

            #[inline(always)]
            fn join(self) -> $register {
                let mut bytes = <$register>::default().to_le_bytes();
                for (chunk, lane) in bytes.as_chunks_mut().0.iter_mut().zip(self) {
                    *chunk = lane.to_le_bytes();
                }
                <$register>::from_le_bytes(bytes)
            }
        }
    )*};
}

packed!(u64: u8, i8, u16, i16, u32, i32, u64);
packed!(u128: u8, i8, u16, i16, u32, i32, u64, i64);

/// Each lane of the result from the same lane of one operand.
#[inline(always)]
pub(super) fn map<T: Copy, R: Packed<T>>(a: R, f: impl Fn(T) -> T) -> R {
    let mut lanes = a.lanes();
    for x in lanes.as_mut() {
        *x = f(*x);
    }
    lanes.join()
}

/// Each lane of the result from the same lane of both operands.
#[inline(always)]
pub(super) fn zip<T: Copy, R: Packed<T>>(a: R, b: R, f: impl Fn(T, T) -> T) -> R {
    let mut lanes = a.lanes();
    for (x, y) in lanes.as_mut().iter_mut().zip(b.lanes().as_ref()) {
        *x = f(*x, *y);
    }
    lanes.join()
}

/// All ones in each lane where `holds`, else zeros.
#[inline(always)]
pub(super) fn compare<T: Copy + From<bool> + std::ops::Neg<Output = T>, R: Packed<T>>(
    a: R,
    b: R,
    holds: impl Fn(T, T) -> bool,
) -> R {
    zip(a, b, |x, y| -T::from(holds(x, y)))
}

/// Each lane `T` of the result from the `N` lanes `S` in the same place of both operands.
#[inline(always)]
pub(super) fn reduce<const N: usize, S: Copy, T: Copy, R: Packed<S> + Packed<T>>(
    a: R,
    b: R,
    f: impl Fn(&[S; N], &[S; N]) -> T,
) -> R {
    let (a, b) = (Packed::<S>::lanes(a), Packed::<S>::lanes(b));
    let groups = a.as_ref().as_chunks().0.iter().zip(b.as_ref().as_chunks().0);
    let mut lanes = <R as Packed<T>>::Lanes::default();
    for (lane, (x, y)) in lanes.as_mut().iter_mut().zip(groups) {
        *lane = f(x, y);
    }
    lanes.join()
}

/// The lower half of the result from neighbouring lanes of `a`, the upper half from those of `b`.
#[inline(always)]
pub(super) fn horizontal<T: Copy, R: Packed<T>>(a: R, b: R, f: impl Fn(T, T) -> T) -> R {
    let (a, b) = (a.lanes(), b.lanes());
    let pairs = a.as_ref().as_chunks().0.iter().chain(b.as_ref().as_chunks().0);
    let mut lanes = R::Lanes::default();
    for (lane, [x, y]) in lanes.as_mut().iter_mut().zip(pairs) {
        *lane = f(*x, *y);
    }
    lanes.join()
}

/// The lower half of the result from the lanes of `a`, the upper half from those of `b`, each made half as wide.
#[inline(always)]
pub(super) fn narrow<S: Copy, T: Copy, R: Packed<S> + Packed<T>>(a: R, b: R, f: impl Fn(S) -> T) -> R {
    let (a, b) = (Packed::<S>::lanes(a), Packed::<S>::lanes(b));
    let mut lanes = <R as Packed<T>>::Lanes::default();
    for (lane, x) in lanes.as_mut().iter_mut().zip(a.as_ref().iter().chain(b.as_ref())) {
        *lane = f(*x);
    }
    lanes.join()
}

/// The lower lanes `S` of `a`, each made as wide as `T`.
#[inline(always)]
pub(super) fn widen<S: Copy, T: Copy + From<S>, R: Packed<S> + Packed<T>>(a: R) -> R {
    let a = Packed::<S>::lanes(a);
    let mut lanes = <R as Packed<T>>::Lanes::default();
    for (lane, x) in lanes.as_mut().iter_mut().zip(a.as_ref()) {
        *lane = T::from(*x);
    }
    lanes.join()
}

/// Lanes of `a` and `b` in turn, from their lower or upper half.
#[inline(always)]
pub(super) fn interleave<T: Copy, R: Packed<T>>(a: R, b: R, upper: bool) -> R {
    let (a, b) = (a.lanes(), b.lanes());
    let mut lanes = R::Lanes::default();
    let skip = if upper { a.as_ref().len() / 2 } else { 0 };
    let halves = a.as_ref().iter().zip(b.as_ref()).skip(skip);
    for (pair, (x, y)) in lanes.as_mut().as_chunks_mut().0.iter_mut().zip(halves) {
        *pair = [*x, *y];
    }
    lanes.join()
}

/// Each lane from `b` where its bit in `mask` is set, else from `a`. Bits beyond the lanes are ignored.
#[inline(always)]
pub(super) fn blend<T: Copy, R: Packed<T>>(a: R, b: R, mask: u8) -> R {
    let mut lanes = a.lanes();
    for (bit, (x, y)) in lanes.as_mut().iter_mut().zip(b.lanes().as_ref()).enumerate() {
        if mask >> bit & 1 != 0 {
            *x = *y;
        }
    }
    lanes.join()
}

/// The lane that the low bits of `index` name; `lanes` are a power of two.
#[inline(always)]
pub(super) fn pick<T: Copy + Default>(lanes: &[T], index: u8) -> T {
    let index = usize::from(index) & lanes.len().wrapping_sub(1);
    lanes.get(index).copied().unwrap_or_default()
}

/// The low 64 bits of an XMM register.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
pub(super) const fn low(x: u128) -> u64 {
    x as u64
}

/// The high 64 bits of an XMM register.
#[inline(always)]
pub(super) const fn high(x: u128) -> u64 {
    low(x >> 64)
}

/// An XMM register from its halves.
#[inline(always)]
pub(super) const fn halves(low: u64, high: u64) -> u128 {
    (high as u128) << 64 | low as u128
}

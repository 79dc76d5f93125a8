//! The four operand widths of integer instructions.

/// An unsigned integer of an operand's width. Handlers of instructions are generic over it.
pub(crate) trait Word: Copy + Eq + Default + 'static {
    /// Width in bits.
    const BITS: u32;
    /// Width in bytes.
    const BYTES: usize = Self::BITS as usize / 8;
    /// The most significant bit.
    const SIGN: u64 = 1 << (Self::BITS - 1);
    /// All bits.
    const MASK: u64 = u64::MAX >> (64 - Self::BITS);

    /// The low bits of `value`.
    fn truncate(value: u64) -> Self;

    /// Zero-extended.
    fn extend(self) -> u64;

    /// Sign-extended.
    fn sign_extend(self) -> u64 {
        sign_extend::<Self>(self.extend())
    }
}

/// Sign-extends the low bits of `value`, whose high bits are zero.
pub(crate) fn sign_extend<W: Word>(value: u64) -> u64 {
    let unused = 64 - W::BITS;
    ((value << unused).cast_signed() >> unused).cast_unsigned()
}

/// Low and high half.
#[allow(clippy::cast_possible_truncation, reason = "truncation is what is asked for")]
pub(crate) fn halves(value: u128) -> [u64; 2] {
    [value as u64, (value >> 64) as u64]
}

macro_rules! word {
    ($($type:ty),*) => {$(
        impl Word for $type {
            const BITS: u32 = <$type>::BITS;

            #[allow(clippy::cast_possible_truncation, trivial_numeric_casts, reason = "truncation is what is asked for")]
            #[inline(always)]
            fn truncate(value: u64) -> Self {
                value as $type
            }

            #[allow(clippy::cast_lossless, trivial_numeric_casts, reason = "one text for four types")]
            #[inline(always)]
            fn extend(self) -> u64 {
                self as u64
            }
        }
    )*};
}

word!(u8, u16, u32, u64);

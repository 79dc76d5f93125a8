//! RFLAGS with lazily evaluated status flags.
//!
//! Most instructions set the six status flags and hardly any reads them. So an instruction leaves behind its result and
//! the vector of carries out of each bit, from which every flag follows in a few operations when somebody asks.

use super::word::{Word, sign_extend};

/// Bits of RFLAGS (Intel SDM 1 3.4.3) that the interpreter names.
pub(crate) mod bits {
    pub(crate) const CF: u64 = 1 << 0;
    pub(crate) const FIXED: u64 = 1 << 1;
    pub(crate) const PF: u64 = 1 << 2;
    pub(crate) const AF: u64 = 1 << 4;
    pub(crate) const ZF: u64 = 1 << 6;
    pub(crate) const SF: u64 = 1 << 7;
    pub(crate) const TF: u64 = 1 << 8;
    pub(crate) const IF: u64 = 1 << 9;
    pub(crate) const DF: u64 = 1 << 10;
    pub(crate) const OF: u64 = 1 << 11;
    pub(crate) const IOPL: u64 = 3 << 12;
    pub(crate) const NT: u64 = 1 << 14;
    pub(crate) const RF: u64 = 1 << 16;
    pub(crate) const VM: u64 = 1 << 17;
    pub(crate) const AC: u64 = 1 << 18;
    pub(crate) const VIF: u64 = 1 << 19;
    pub(crate) const VIP: u64 = 1 << 20;
    pub(crate) const ID: u64 = 1 << 21;
    /// The status flags of arithmetic.
    pub(crate) const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
    /// `flag` if it is on.
    pub(crate) const fn of(on: bool, flag: u64) -> u64 {
        if on { flag } else { 0 }
    }

    /// All that can be set.
    pub(crate) const ALL: u64 = STATUS | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID | FIXED;
}

/// RFLAGS. In the carry vector, the carry out of the most significant bit is bit 63 and that into it bit 62.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flags {
    /// Sign-extended result, valid if `width` is not zero.
    result: u64,
    /// Carries, shifted to the top, valid if `width` is not zero.
    carries: u64,
    /// All flags; the status flags among them are valid only if `width` is zero.
    word: u64,
    /// Width of the result in bits; zero: the status flags are in `word`.
    width: u32,
}

impl Flags {
    pub(crate) fn new(rflags: u64) -> Self {
        Self { result: 0, carries: 0, word: rflags & bits::ALL | bits::FIXED, width: 0 }
    }

    /// The whole register.
    pub(crate) fn get(&self) -> u64 {
        if self.width == 0 { self.word } else { self.word & !bits::STATUS | self.status() }
    }

    /// Replaces the whole register. Bits that do not exist are dropped.
    pub(crate) fn set(&mut self, rflags: u64) {
        *self = Self::new(rflags);
    }

    /// Flags that are not status flags, without evaluating those.
    #[inline(always)]
    pub(crate) fn control(&self, mask: u64) -> bool {
        self.word & mask != 0
    }

    /// Sets or clears flags that are not status flags.
    #[inline(always)]
    pub(crate) fn set_control(&mut self, mask: u64, on: bool) {
        if on {
            self.word |= mask;
        } else {
            self.word &= !mask;
        }
    }

    /// Replaces the status flags in `mask`.
    pub(crate) fn replace_status(&mut self, mask: u64, value: u64) {
        let status = self.status() & !mask | value & mask;
        self.word = self.word & !bits::STATUS | status;
        self.width = 0;
    }

    /// The status flags of a result with its carries, both of width `W` with zeros above.
    #[inline(always)]
    pub(crate) fn set_result<W: Word>(&mut self, result: u64, carries: u64) {
        self.result = sign_extend::<W>(result);
        self.carries = carries << (64 - W::BITS);
        self.width = W::BITS;
    }

    /// The status flags of a logical result: no carry, no overflow.
    #[inline(always)]
    pub(crate) fn set_logic<W: Word>(&mut self, result: u64) {
        self.result = sign_extend::<W>(result);
        self.carries = 0;
        self.width = W::BITS;
    }

    /// The status flags of a result whose carry and overflow flags are given; the adjust flag is cleared.
    #[inline(always)]
    pub(crate) fn set_result_cf_of<W: Word>(&mut self, result: u64, carry: bool, overflow: bool) {
        self.result = sign_extend::<W>(result);
        self.carries = u64::from(carry) << 63 | u64::from(carry != overflow) << 62;
        self.width = W::BITS;
    }

    /// The same with the adjust flag set.
    #[inline(always)]
    pub(crate) fn set_shifted<W: Word>(&mut self, result: u64, carry: bool, overflow: bool) {
        self.set_result_cf_of::<W>(result, carry, overflow);
        self.carries |= 8 << (64 - W::BITS);
    }

    /// As [`Flags::set_result`], but the carry flag stays as it is (INC, DEC).
    #[inline(always)]
    pub(crate) fn set_result_keep_carry<W: Word>(&mut self, result: u64, carries: u64) {
        let carry = self.cf();
        let carries = carries << (64 - W::BITS);
        let overflow = (carries >> 63) != (carries >> 62 & 1);
        self.result = sign_extend::<W>(result);
        self.carries =
            carries & (u64::MAX >> 2) | u64::from(carry) << 63 | u64::from(carry != overflow) << 62;
        self.width = W::BITS;
    }

    /// Replaces the carry and the overflow flag.
    #[inline(always)]
    pub(crate) fn set_cf_of(&mut self, carry: bool, overflow: bool) {
        if self.width == 0 {
            let value = bits::of(carry, bits::CF) | bits::of(overflow, bits::OF);
            self.word = self.word & !(bits::CF | bits::OF) | value;
        } else {
            self.carries =
                self.carries & (u64::MAX >> 2) | u64::from(carry) << 63 | u64::from(carry != overflow) << 62;
        }
    }

    #[inline(always)]
    pub(crate) fn cf(&self) -> bool {
        if self.width == 0 { self.word & bits::CF != 0 } else { self.carries >> 63 != 0 }
    }

    #[inline(always)]
    pub(crate) fn zf(&self) -> bool {
        if self.width == 0 { self.word & bits::ZF != 0 } else { self.result == 0 }
    }

    #[inline(always)]
    pub(crate) fn sf(&self) -> bool {
        if self.width == 0 { self.word & bits::SF != 0 } else { self.result >> 63 != 0 }
    }

    #[inline(always)]
    pub(crate) fn of(&self) -> bool {
        if self.width == 0 {
            self.word & bits::OF != 0
        } else {
            (self.carries ^ self.carries << 1) >> 63 != 0
        }
    }

    pub(crate) fn pf(&self) -> bool {
        if self.width == 0 {
            self.word & bits::PF != 0
        } else {
            (self.result & 0xff).count_ones().is_multiple_of(2)
        }
    }

    fn af(&self) -> bool {
        if self.width == 0 { self.word & bits::AF != 0 } else { self.carries >> (64 - self.width) & 8 != 0 }
    }

    fn status(&self) -> u64 {
        if self.width == 0 {
            return self.word & bits::STATUS;
        }
        bits::of(self.cf(), bits::CF)
            | bits::of(self.pf(), bits::PF)
            | bits::of(self.af(), bits::AF)
            | bits::of(self.zf(), bits::ZF)
            | bits::of(self.sf(), bits::SF)
            | bits::of(self.of(), bits::OF)
    }

    /// Evaluates a condition code by the low four bits of Jcc's opcode (Intel SDM 1 appendix B).
    #[inline(always)]
    pub(crate) fn condition<const CC: u8>(&self) -> bool {
        let positive = match CC >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() || self.sf() != self.of(),
        };
        positive != (CC & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add<W: Word>(a: u64, b: u64) -> u64 {
        let result = a.wrapping_add(b) & W::MASK;
        let mut flags = Flags::new(0);
        flags.set_result::<W>(result, a & b | (a | b) & !result);
        flags.get() & bits::STATUS
    }

    #[test]
    fn addition_sets_all_six() {
        use bits::{AF, CF, OF, PF, SF, ZF};
        assert_eq!(add::<u8>(0xff, 1), CF | AF | ZF | PF);
        assert_eq!(add::<u8>(0x7f, 1), AF | SF | OF);
        assert_eq!(add::<u16>(0x8000, 0x8000), CF | OF | ZF | PF);
        assert_eq!(add::<u32>(8, 8), AF);
        assert_eq!(add::<u64>(u64::MAX, u64::MAX), CF | AF | SF);
    }

    #[test]
    fn increment_keeps_carry() {
        let mut flags = Flags::new(bits::CF);
        let (a, result) = (0x7fff_u64, 0x8000_u64);
        flags.set_result_keep_carry::<u16>(result, a & 1 | (a | 1) & !result);
        assert_eq!(flags.get() & bits::STATUS, bits::CF | bits::OF | bits::SF | bits::AF | bits::PF);
    }

    #[test]
    fn replaced_flags_need_not_fit_a_result() {
        let mut flags = Flags::new(0);
        flags.set_logic::<u32>(0);
        flags.replace_status(bits::SF | bits::OF, bits::SF | bits::OF);
        assert!(flags.zf() && flags.sf() && flags.of() && flags.pf() && !flags.cf());
        assert!(!flags.condition::<0xc>() && flags.condition::<0xe>());
    }
}

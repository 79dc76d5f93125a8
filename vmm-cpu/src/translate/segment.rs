//! Segment registers with their hidden parts, in the layout of descriptors.

use crate::state::Segment;

/// Index of a segment register, in the order of its encoding in instructions.
pub(crate) mod index {
    pub(crate) const ES: usize = 0;
    pub(crate) const CS: usize = 1;
    pub(crate) const SS: usize = 2;
    pub(crate) const DS: usize = 3;
    pub(crate) const FS: usize = 4;
    pub(crate) const GS: usize = 5;
}

/// A segment register. `attributes` holds bits 8 to 23 of a descriptor's second doubleword: type, S, DPL, P, then AVL,
/// L, D/B, G from bit 12.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SegmentRegister {
    pub(crate) base: u64,
    /// In bytes.
    pub(crate) limit: u32,
    pub(crate) selector: u16,
    pub(crate) attributes: u16,
}

/// Bits of `attributes` (Intel SDM 3A 3.4.5).
pub(crate) mod attribute {
    pub(crate) const ACCESSED: u16 = 1;
    /// Writable data, readable code.
    pub(crate) const WRITABLE_READABLE: u16 = 1 << 1;
    /// Expand-down data, conforming code.
    pub(crate) const DOWN_CONFORMING: u16 = 1 << 2;
    pub(crate) const CODE: u16 = 1 << 3;
    pub(crate) const CODE_OR_DATA: u16 = 1 << 4;
    pub(crate) const PRESENT: u16 = 1 << 7;
    pub(crate) const AVAILABLE: u16 = 1 << 12;
    pub(crate) const LONG: u16 = 1 << 13;
    pub(crate) const BIG: u16 = 1 << 14;
    pub(crate) const GRANULARITY: u16 = 1 << 15;
}

impl SegmentRegister {
    /// What a descriptor says.
    pub(crate) fn from_descriptor(selector: u16, descriptor: u64) -> Self {
        let base = descriptor >> 16 & 0xff_ffff | descriptor >> 32 & 0xff00_0000;
        let attributes = low16(descriptor >> 40) & 0xf0ff;
        let limit = low32(descriptor & 0xffff | descriptor >> 32 & 0xf_0000);
        let limit = if attributes & attribute::GRANULARITY != 0 { limit << 12 | 0xfff } else { limit };
        Self { base, limit, selector, attributes }
    }

    /// As loading a segment register in real mode leaves it: base and selector change.
    pub(crate) fn load_real(&mut self, selector: u16) {
        self.selector = selector;
        self.base = u64::from(selector) << 4;
    }

    /// A segment register in virtual-8086 mode.
    pub(crate) fn virtual_8086(selector: u16) -> Self {
        Self { base: u64::from(selector) << 4, limit: 0xffff, selector, attributes: 0xf3 }
    }

    pub(crate) fn has(&self, attributes: u16) -> bool {
        self.attributes & attributes == attributes
    }

    pub(crate) fn dpl(&self) -> u8 {
        low8(u64::from(self.attributes) >> 5) & 3
    }

    /// The type field: 4 bits.
    pub(crate) fn kind(&self) -> u8 {
        low8(u64::from(self.attributes)) & 0xf
    }

    pub(crate) fn set_kind(&mut self, kind: u8) {
        self.attributes = self.attributes & !0xf | u16::from(kind & 0xf);
    }

    /// Holds nothing: a null selector was loaded.
    pub(crate) fn is_unusable(&self) -> bool {
        self.attributes & attribute::PRESENT == 0
    }

    /// Offsets `first..=last` are within the limit (Intel SDM 3A 6.3).
    pub(crate) fn contains(&self, first: u64, last: u64) -> bool {
        let is_data =
            self.attributes & (attribute::CODE_OR_DATA | attribute::CODE) == attribute::CODE_OR_DATA;
        if is_data && self.has(attribute::DOWN_CONFORMING) {
            let top = if self.has(attribute::BIG) { 0xffff_ffff } else { 0xffff };
            first > u64::from(self.limit) && last <= top && first <= last
        } else {
            last <= u64::from(self.limit) && first <= last
        }
    }
}

/// Truncations, spelled out.
#[allow(clippy::cast_possible_truncation, reason = "truncation is what is asked for")]
pub(crate) const fn low8(value: u64) -> u8 {
    value as u8
}

#[allow(clippy::cast_possible_truncation, reason = "truncation is what is asked for")]
pub(crate) const fn low16(value: u64) -> u16 {
    value as u16
}

#[allow(clippy::cast_possible_truncation, reason = "truncation is what is asked for")]
pub(crate) const fn low32(value: u64) -> u32 {
    value as u32
}

impl From<&Segment> for SegmentRegister {
    fn from(segment: &Segment) -> Self {
        let flag = |on: bool, bit: u16| if on { bit } else { 0 };
        let attributes = u16::from(segment.kind & 0xf)
            | flag(segment.code_or_data, attribute::CODE_OR_DATA)
            | u16::from(segment.dpl & 3) << 5
            | flag(segment.present && !segment.unusable, attribute::PRESENT)
            | flag(segment.available, attribute::AVAILABLE)
            | flag(segment.long, attribute::LONG)
            | flag(segment.big, attribute::BIG)
            | flag(segment.granularity, attribute::GRANULARITY);
        Self { base: segment.base, limit: segment.limit, selector: segment.selector, attributes }
    }
}

impl From<&SegmentRegister> for Segment {
    fn from(register: &SegmentRegister) -> Self {
        Self {
            selector: register.selector,
            base: register.base,
            limit: register.limit,
            kind: register.kind(),
            code_or_data: register.has(attribute::CODE_OR_DATA),
            dpl: register.dpl(),
            present: register.has(attribute::PRESENT),
            available: register.has(attribute::AVAILABLE),
            long: register.has(attribute::LONG),
            big: register.has(attribute::BIG),
            granularity: register.has(attribute::GRANULARITY),
            unusable: register.is_unusable(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_taken_apart() {
        let code = SegmentRegister::from_descriptor(0x10, 0x00af_9b00_0000_ffff);
        assert_eq!((code.base, code.limit, code.dpl(), code.kind()), (0, u32::MAX, 0, 0xb));
        assert!(
            code.has(attribute::LONG | attribute::CODE | attribute::PRESENT) && !code.has(attribute::BIG)
        );
        let data = SegmentRegister::from_descriptor(0x2b, 0x12c3_f334_5678_9abc);
        assert_eq!((data.base, data.limit, data.dpl()), (0x1234_5678, 0x39ab_cfff, 3));
        assert_eq!(SegmentRegister::from(&Segment::from(&data)), data);
    }

    #[test]
    fn limits_go_both_ways() {
        let mut segment = SegmentRegister { limit: 0xff, attributes: 0x93, ..SegmentRegister::default() };
        assert!(segment.contains(0, 0xff) && !segment.contains(0xff, 0x100));
        segment.attributes |= attribute::DOWN_CONFORMING;
        assert!(!segment.contains(0xff, 0x100) && segment.contains(0x100, 0xffff));
        assert!(!segment.contains(0xffff, 0x1_0000));
    }
}

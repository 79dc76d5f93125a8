//! The descriptor table that selectors of the guest are looked up in.
//!
//! The table in guest memory is what the processor reads; this copy is what the engine believes. Only code and data
//! segments of privilege level 3 get in, so no selector of the guest leads anywhere else.

use crate::state::Segment;

/// First entry that is not the guest's: selector 0xe000, as in Xen's public/arch-x86/xen-x86_64.h.
pub(super) const FIRST_RESERVED: u16 = 7168;

/// Entries of the table.
pub(super) const ENTRIES: u16 = 8192;

/// Code of the engine's stubs at privilege level 0. SYSCALL takes the next one as its stack segment.
pub(super) const STUB_CS: u16 = 0xe008;

/// Data at privilege level 0.
pub(super) const STUB_SS: u16 = 0xe010;

/// The task-state segment, which takes two entries.
pub(super) const TASK_STATE: u16 = 0xe040;

/// 32-bit code of the guest (FLAT_RING3_CS32).
pub const FLAT_CS32: u16 = 0xe023;

/// Data and stack of the guest (FLAT_RING3_SS64 and its other names).
pub const FLAT_SS: u16 = 0xe02b;

/// 64-bit code of the guest (FLAT_RING3_CS64).
pub const FLAT_CS64: u16 = 0xe033;

/// The engine's own entries, the task state excepted, with the accessed bit set so that no load has to write it.
const OWN: [(u16, u64); 5] = [
    (STUB_CS, 0x00af_9b00_0000_ffff),
    (STUB_SS, 0x00cf_9300_0000_ffff),
    (FLAT_CS32, 0x00cf_fb00_0000_ffff),
    (FLAT_SS, 0x00cf_f300_0000_ffff),
    (FLAT_CS64, 0x00af_fb00_0000_ffff),
];

const ACCESSED: u64 = 1 << 40;
const CODE: u64 = 1 << 43;
/// The bit that makes a data segment writable and a code segment readable.
const WRITABLE: u64 = 1 << 41;
/// Of data: grows down. Of code: conforming.
const DOWN_OR_CONFORMING: u64 = 1 << 42;
const CODE_OR_DATA: u64 = 1 << 44;
const DPL: u64 = 3 << 45;
const PRESENT: u64 = 1 << 47;
const LONG: u64 = 1 << 53;
const BIG: u64 = 1 << 54;
const GRANULARITY: u64 = 1 << 55;

/// [`OWN`], without 32-bit code where there is none.
pub(super) fn own(compatibility_mode: bool) -> impl Iterator<Item = (u16, u64)> {
    OWN.into_iter().filter(move |(_, descriptor)| compatibility_mode || !is_compatibility_code(*descriptor))
}

/// Whether it is a segment of code that is not 64-bit code.
fn is_compatibility_code(descriptor: u64) -> bool {
    descriptor & (CODE_OR_DATA | CODE | LONG) == CODE_OR_DATA | CODE
}

/// The exception that loading a selector ends in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SelectorFault {
    pub(super) vector: u8,
    pub(super) error_code: u32,
}

const NOT_PRESENT: u8 = 11;
const STACK: u8 = 12;
const GENERAL_PROTECTION: u8 = 13;

/// The descriptor as a guest may have it: `None` if it may not.
pub(super) fn admit(descriptor: u64, compatibility_mode: bool) -> Option<u64> {
    if descriptor & PRESENT == 0 {
        // Whatever it holds, no load succeeds.
        return Some(descriptor & !(PRESENT | DPL) | DPL);
    }
    let wrong_mode = descriptor & (CODE | LONG | BIG) == CODE | LONG | BIG;
    let conforming = descriptor & (CODE | DOWN_OR_CONFORMING) == CODE | DOWN_OR_CONFORMING;
    let there = compatibility_mode || !is_compatibility_code(descriptor);
    let allowed =
        descriptor & CODE_OR_DATA != 0 && descriptor & DPL == DPL && !wrong_mode && !conforming && there;
    allowed.then_some(descriptor | ACCESSED)
}

/// The descriptors of one virtual processor.
#[derive(Debug)]
pub(super) struct Descriptors(Vec<u64>);

impl Descriptors {
    pub(super) fn new(compatibility_mode: bool) -> Self {
        let mut table = vec![0; usize::from(ENTRIES)];
        for (selector, descriptor) in own(compatibility_mode) {
            if let Some(entry) = table.get_mut(usize::from(selector >> 3)) {
                *entry = descriptor;
            }
        }
        Self(table)
    }

    pub(super) fn get(&self, index: u16) -> u64 {
        self.0.get(usize::from(index)).copied().unwrap_or(0)
    }

    /// Puts a descriptor that [`admit`] gave into an entry of the guest's; whether it is one.
    pub(super) fn set(&mut self, index: u16, descriptor: u64) -> bool {
        match self.0.get_mut(usize::from(index)) {
            Some(entry) if index < FIRST_RESERVED => {
                *entry = descriptor;
                true
            }
            _ => false,
        }
    }

    /// Whether the selectors that Linux has for programs are those of flat 64-bit code and of data.
    pub(super) fn has_flat_user(&self) -> bool {
        self.code(0x33).is_ok_and(|code| code.long) && self.stack(0x2b).is_ok_and(|data| data.base == 0)
    }

    /// The descriptor that a selector of the guest names, if it can be loaded.
    fn look_up(&self, selector: u16, fault: u8) -> Result<u64, SelectorFault> {
        let error = |vector| SelectorFault { vector, error_code: u32::from(selector & !3) };
        // There is no local descriptor table, and what is not of privilege level 3 is the engine's.
        let descriptor = if selector & 4 == 0 { self.get(selector >> 3) } else { 0 };
        if descriptor & CODE_OR_DATA == 0 || descriptor & DPL != DPL {
            return Err(error(GENERAL_PROTECTION));
        }
        if descriptor & PRESENT == 0 {
            return Err(error(fault));
        }
        Ok(descriptor)
    }

    /// CS as IRET to privilege level 3 loads it.
    pub(super) fn code(&self, selector: u16) -> Result<Segment, SelectorFault> {
        let descriptor = self.look_up(selector, NOT_PRESENT)?;
        if descriptor & CODE == 0 || selector & 3 != 3 {
            return Err(SelectorFault { vector: GENERAL_PROTECTION, error_code: u32::from(selector & !3) });
        }
        Ok(segment(selector, descriptor))
    }

    /// SS as IRET to privilege level 3 loads it.
    pub(super) fn stack(&self, selector: u16) -> Result<Segment, SelectorFault> {
        let descriptor = self.look_up(selector, STACK)?;
        if descriptor & (CODE | WRITABLE) != WRITABLE || selector & 3 != 3 {
            return Err(SelectorFault { vector: GENERAL_PROTECTION, error_code: u32::from(selector & !3) });
        }
        Ok(segment(selector, descriptor))
    }

    /// DS, ES, FS or GS. A selector that cannot be loaded becomes null, as IRET does with those that the outer level
    /// may not use.
    pub(super) fn data(&self, selector: u16) -> Segment {
        let null = Segment { selector: selector & 3, ..Segment::null() };
        if selector & !3 == 0 {
            return null;
        }
        match self.look_up(selector, NOT_PRESENT) {
            Ok(descriptor) if descriptor & (CODE | WRITABLE) != CODE => segment(selector, descriptor),
            _ => Segment::null(),
        }
    }
}

/// Bits `from` up of `value`, as many as `mask` says.
fn field(value: u64, from: u32, mask: u32) -> u32 {
    u32::try_from(value >> from & u64::from(mask)).unwrap_or(0)
}

fn segment(selector: u16, descriptor: u64) -> Segment {
    let limit = field(descriptor, 0, 0xffff) | field(descriptor, 48, 0xf) << 16;
    let granularity = descriptor & GRANULARITY != 0;
    let base = field(descriptor, 16, 0xff_ffff) | field(descriptor, 56, 0xff) << 24;
    Segment {
        selector,
        base: base.into(),
        limit: if granularity { limit << 12 | 0xfff } else { limit },
        kind: u8::try_from(field(descriptor, 40, 0xf)).unwrap_or(0),
        code_or_data: true,
        dpl: 3,
        present: true,
        available: descriptor & 1 << 52 != 0,
        long: descriptor & LONG != 0,
        big: descriptor & BIG != 0,
        granularity,
        unusable: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_and_data_of_level_3_get_in() {
        for (name, descriptor) in [
            ("code of level 0", 0x00af_9b00_0000_ffff),
            ("data of level 2", 0x00cf_d300_0000_ffff),
            ("call gate of level 3", 0x0000_ec00_0008_0000),
            ("task state", 0x0000_e900_0000_0067),
            ("conforming code", 0x00af_ff00_0000_ffff),
            ("code both long and big", 0x00ef_fb00_0000_ffff),
        ] {
            assert_eq!(admit(descriptor, true), None, "{name}");
        }
        let tls = 0x12cf_f234_5678_ffff;
        assert_eq!(admit(tls, true), Some(tls | ACCESSED));
        // A system descriptor that is not present stays so.
        assert_eq!(admit(0x0000_6900_0000_0067, true).unwrap() & PRESENT, 0);
    }

    #[test]
    fn code_of_other_modes_gets_in_where_they_are() {
        for (name, descriptor, is_other) in [
            ("64-bit code", 0x00af_fb00_0000_ffff, false),
            ("32-bit code", 0x00cf_fb00_0000_ffff, true),
            ("16-bit code", 0x008f_fb00_0000_ffff, true),
            ("execute-only", 0x00cf_f900_0000_ffff, true),
            ("data", 0x00cf_f300_0000_ffff, false),
        ] {
            assert!(admit(descriptor, true).is_some(), "{name}");
            assert_eq!(admit(descriptor, false).is_none(), is_other, "{name}");
        }
        assert_eq!(Descriptors::new(false).code(FLAT_CS32).unwrap_err().error_code, 0xe020);
        assert!(Descriptors::new(false).code(FLAT_CS64).is_ok());
    }

    #[test]
    fn base_and_limit_are_put_together() {
        let mut table = Descriptors::new(true);
        assert!(table.set(12, admit(0x12cf_f234_5678_ffff, true).unwrap()));
        let tls = table.data(12 << 3 | 3);
        assert_eq!((tls.base, tls.limit, tls.kind, tls.dpl), (0x1234_5678, u32::MAX, 3, 3));
    }

    #[test]
    fn selectors_fault_as_iret_says() {
        let table = Descriptors::new(true);
        let fault = |vector, error_code| Err(SelectorFault { vector, error_code });
        assert!(table.code(FLAT_CS64).unwrap().long);
        assert!(table.code(FLAT_CS32).unwrap().big);
        assert_eq!(table.code(STUB_CS), fault(13, 0xe008), "the engine's code");
        assert_eq!(table.code(FLAT_CS64 & !3), fault(13, 0xe030), "level 0");
        assert_eq!(table.code(FLAT_SS), fault(13, 0xe028), "data");
        assert_eq!(table.code(0x33), fault(13, 0x30), "empty");
        assert_eq!(table.code(FLAT_CS64 | 4), fault(13, 0xe034), "local table");
        assert_eq!(table.stack(FLAT_CS64), fault(13, 0xe030), "code");
        assert_eq!(table.stack(0), fault(13, 0));
        assert_eq!(table.stack(FLAT_SS).unwrap().selector, FLAT_SS);
    }

    #[test]
    fn what_cannot_be_loaded_as_data_becomes_null() {
        let table = Descriptors::new(true);
        for selector in [0, 3, STUB_SS, TASK_STATE, 0x2b, FLAT_SS | 4, u16::MAX] {
            assert!(table.data(selector).unusable, "{selector:#x}");
        }
        assert!(!table.data(FLAT_SS).unusable);
    }

    #[test]
    fn the_guest_cannot_set_the_engines_entries() {
        let mut table = Descriptors::new(true);
        assert!(table.set(FIRST_RESERVED - 1, 0));
        assert!(!table.set(FIRST_RESERVED, 0));
        assert!(!table.set(u16::MAX, 0));
        assert_ne!(table.get(FLAT_CS64 >> 3), 0);
    }
}

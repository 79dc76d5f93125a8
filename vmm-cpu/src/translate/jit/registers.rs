//! Which host register holds which of the guest's.

use iced_x86::Register;

/// Where a general register of the guest is while translated code runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Home {
    /// The host's register of that number.
    Host(u8),
    /// Its place in the frame.
    Frame,
}

/// The host register with the guest's RAX: translated code has RAX to itself, for LAHF and SAHF.
pub(super) const GUEST_RAX: u8 = 10;
/// That with RCX: translated code has RCX to itself, for JRCXZ, which changes no flag.
pub(super) const GUEST_RCX: u8 = 11;
/// That with RSP: the host's stack stays.
pub(super) const GUEST_RSP: u8 = 15;

/// Where the guest's register of that number is.
pub(super) fn home(number: u8) -> Home {
    match number {
        0 => Home::Host(GUEST_RAX),
        1 => Home::Host(GUEST_RCX),
        4 => Home::Host(GUEST_RSP),
        10 | 11 | 15 => Home::Frame,
        same => Home::Host(same),
    }
}

/// Number of a general register, whatever its width.
pub(super) fn number(register: Register) -> u8 {
    crate::translate::segment::low8(register.full_register().number() as u64)
}

/// Whether it is AH, CH, DH or BH.
pub(super) fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// The register of that number with the width of `like`.
pub(super) fn with_width(number: u8, like: Register) -> Register {
    let first = match like.size() {
        1 => return byte_register(number),
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    first + u32::from(number)
}

fn byte_register(number: u8) -> Register {
    match number {
        0..=3 => Register::AL + u32::from(number),
        // Behind AH, CH, DH and BH.
        _ => Register::SPL + u32::from(number - 4),
    }
}

#[cfg(test)]
mod tests {
    use super::super::emit::{RAX, RCX};
    use super::*;

    #[test]
    fn homes_are_distinct_and_none_is_taken() {
        let mut seen = Vec::new();
        for register in 0..16 {
            match home(register) {
                Home::Host(host) => {
                    assert!(!seen.contains(&host) && ![RAX, RCX, 4].contains(&host), "{register}");
                    seen.push(host);
                }
                Home::Frame => assert!([10, 11, 15].contains(&register)),
            }
        }
        assert_eq!(seen.len(), 13);
    }

    #[test]
    fn widths_are_kept() {
        assert_eq!(with_width(15, Register::CL), Register::R15L);
        assert_eq!(with_width(5, Register::DIL), Register::BPL);
        assert_eq!(with_width(3, Register::AL), Register::BL);
        assert_eq!(with_width(10, Register::AX), Register::R10W);
        assert_eq!(with_width(10, Register::EAX), Register::R10D);
        assert_eq!(with_width(7, Register::R8), Register::RDI);
    }
}

//! Text of the instruction that a backend could not execute.

use crate::state::{GeneralRegisters, SystemRegisters};

/// The first instruction of `bytes` in Intel syntax; `None` if it is incomplete or invalid.
#[cfg(feature = "decode")]
pub(crate) fn instruction_text(
    bytes: &[u8],
    registers: &GeneralRegisters,
    system: &SystemRegisters,
) -> Option<String> {
    use iced_x86::{Decoder, DecoderOptions, Formatter as _, IntelFormatter};

    let mut decoder = Decoder::with_ip(system.code_bits(), bytes, registers.rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    if instruction.is_invalid() {
        return None;
    }
    let mut text = String::new();
    IntelFormatter::new().format(&instruction, &mut text);
    Some(text)
}

/// Without feature `decode` there is no text.
#[cfg(not(feature = "decode"))]
pub(crate) fn instruction_text(_: &[u8], _: &GeneralRegisters, _: &SystemRegisters) -> Option<String> {
    None
}

#[cfg(all(test, feature = "decode"))]
mod tests {
    use super::*;
    use crate::state::Segment;

    #[test]
    fn width_follows_the_mode() {
        let registers = GeneralRegisters::default();
        let mut system = SystemRegisters { cs: Segment::real_mode(0, true), ..SystemRegisters::default() };
        let bytes = [0x48, 0x0f, 0xc7, 0x0e];
        assert_eq!(instruction_text(&bytes, &registers, &system).as_deref(), Some("dec ax"));
        system.cs = Segment::code64(8);
        system.efer = SystemRegisters::EFER_LMA;
        assert_eq!(instruction_text(&bytes, &registers, &system).as_deref(), Some("cmpxchg16b [rsi]"));
    }

    #[test]
    fn nothing_for_cut_or_invalid_bytes() {
        let (registers, system) = (GeneralRegisters::default(), SystemRegisters::default());
        for bytes in [&[][..], &[0xe8, 0x00], &[0x0f, 0xff]] {
            assert_eq!(instruction_text(bytes, &registers, &system), None, "{bytes:x?}");
        }
    }
}

//! The length of what is no instruction, as far as the processor looks before it says so: more than 15 bytes are #GP
//! even of an undefined instruction (AMD APM 2 8.2.14).

use iced_x86::{Decoder, DecoderError};

use super::build::DECODING;

/// Longest instruction in bytes (Intel SDM 2A 2.3.11).
pub(super) const MAX_INSTRUCTION: usize = 15;

/// Whether the instruction that `code` begins with, which the decoder takes for undefined, has more than
/// [`MAX_INSTRUCTION`] bytes. `code` has that many.
pub(super) fn is_too_long(code: &[u8], code_bits: u32) -> bool {
    measured(code, code_bits).is_none_or(|length| length > MAX_INSTRUCTION)
}

/// Whether some of the undefined instruction that `code` begins with lies behind `code`.
pub(super) fn is_cut_off(code: &[u8], code_bits: u32) -> bool {
    code.len() < MAX_INSTRUCTION && measured(code, code_bits).is_none_or(|length| length > code.len())
}

/// Its length. None where that lies beyond all bytes.
fn measured(code: &[u8], code_bits: u32) -> Option<usize> {
    if is_ud1(code, code_bits) {
        return length(code, code_bits);
    }
    // But for its length or for LOCK it may be defined: so it is without prefixes that need not be.
    let short = shortened(code, code_bits);
    let removed = code.len() - short.len();
    let mut decoder = Decoder::with_ip(code_bits, &short, 0, DECODING);
    let instruction = decoder.decode();
    match decoder.last_error() {
        DecoderError::None => Some(removed + instruction.len()),
        DecoderError::NoMoreBytes => None,
        _ => length(code, code_bits),
    }
}

/// `code` with the last prefix alone of each group that can change which instruction it is.
fn shortened(code: &[u8], code_bits: u32) -> Vec<u8> {
    let groups: [fn(&u8) -> bool; 3] =
        [|byte| *byte == 0x66, |byte| *byte == 0x67, |byte| matches!(byte, 0xf2 | 0xf3)];
    let is_other = |byte: &u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0xf0);
    let is_rex = |byte: &u8| code_bits == 64 && matches!(byte, 0x40..=0x4f);
    let is_prefix = |byte: &u8| is_rex(byte) || is_other(byte) || groups.iter().any(|holds| holds(byte));
    let (prefixes, rest) = code.split_at(code.iter().take_while(|byte| is_prefix(byte)).count());
    let mut short: Vec<u8> =
        groups.iter().filter_map(|holds| prefixes.iter().rev().find(|byte| holds(byte)).copied()).collect();
    short.extend(prefixes.last().filter(|byte| is_rex(byte)));
    short.extend(rest);
    short
}

/// Whether `code` begins with UD1, which has no operands on AMD's processors.
pub(super) fn is_ud1(code: &[u8], code_bits: u32) -> bool {
    length(code, code_bits)
        .and_then(|length| code.get(..length))
        .is_some_and(|code| code.ends_with(&[0x0f, 0xb9]))
}

/// Bytes of prefixes, opcode, addressing and immediate. None where the opcode lies beyond all bytes.
fn length(code: &[u8], code_bits: u32) -> Option<usize> {
    let is_long = code_bits == 64;
    let mut narrow_addresses = false;
    let mut at = 0;
    loop {
        match code.get(at)? {
            0x67 => narrow_addresses = true,
            0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x66 | 0xf0 | 0xf2 | 0xf3 => {}
            0x40..=0x4f if is_long => {}
            _ => break,
        }
        at += 1;
    }
    let opcode = *code.get(at)?;
    at += 1;
    // VEX, EVEX and XOP are undefined by what comes before or in them.
    let vector = match opcode {
        0xc5 => Some(1),
        0xc4 => Some(2),
        0x62 => Some(3),
        _ => None,
    };
    if let Some(payload) = vector.filter(|_| is_long || code.get(at).is_some_and(|modrm| *modrm >= 0xc0)) {
        return Some(at + payload);
    }
    if opcode != 0x0f {
        // Few others of one byte are undefined, and those have no operands but 0x82 and the memory forms of groups.
        let has_operands = matches!(opcode, 0x82 | 0x8d | 0xc6 | 0xc7 | 0xfe | 0xff | 0xd8..=0xdf);
        let immediate = usize::from(matches!(opcode, 0x82 | 0xc6));
        return if has_operands {
            Some(at + addressing(code, at, code_bits, narrow_addresses)? + immediate)
        } else {
            Some(at)
        };
    }
    let second = *code.get(at)?;
    at += 1;
    let immediate = match second {
        0x38 | 0x3a => {
            at += 1;
            usize::from(second == 0x3a)
        }
        // Undefined without operands; UD1 of AMD has none.
        0x04..=0x0b
        | 0x0e
        | 0x24..=0x27
        | 0x30..=0x37
        | 0x39
        | 0x3b..=0x3f
        | 0x77
        | 0xa2
        | 0xaa
        | 0xb9
        | 0xff => {
            return Some(at);
        }
        0x0f | 0x70..=0x73 | 0xa4 | 0xac | 0xba | 0xc2 | 0xc4..=0xc6 => 1,
        _ => 0,
    };
    Some(at + addressing(code, at, code_bits, narrow_addresses)? + immediate)
}

/// Bytes of ModRM, SIB and displacement, the first of which lies at `at`.
fn addressing(code: &[u8], at: usize, code_bits: u32, narrow: bool) -> Option<usize> {
    let modrm = *code.get(at)?;
    let (mode, memory) = (modrm >> 6, modrm & 7);
    if mode == 3 {
        return Some(1);
    }
    if code_bits == 16 || code_bits == 32 && narrow {
        let displacement = match (mode, memory) {
            (0, 6) | (2, _) => 2,
            (1, _) => 1,
            _ => 0,
        };
        return Some(1 + displacement);
    }
    let (base, sib) = if memory == 4 { (*code.get(at + 1)? & 7, 1) } else { (memory, 0) };
    let displacement = match (mode, base) {
        (0, 5) | (2, _) => 4,
        (1, _) => 1,
        _ => 0,
    };
    Some(1 + sib + displacement)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn undefined_instructions_have_a_length() {
        let lengths: [(&[u8], usize); 7] = [
            // LOCK MOVNTDQ [ES:RDX+RSI+disp32], XMM8.
            (&[0x66, 0xf0, 0x26, 0x26, 0x66, 0x44, 0x43, 0x0f, 0xe7, 0x8c, 0x32, 0x79, 0xf8, 0xff, 0xff], 15),
            // A MOVNTI with F2, RIP-relative.
            (&[0x36, 0x66, 0x66, 0x2e, 0xf2, 0x65, 0x40, 0x26, 0x64, 0x0f, 0xc3, 0x0d, 0x33, 0x08, 0x10], 16),
            (&[0x0f, 0x0b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 2),
            (&[0x0f, 0xb9, 0x60, 0x71, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 2),
            (&[0x0f, 0x3a, 0x00, 0x04, 0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 10),
            (&[0x67, 0x0f, 0x3a, 0x00, 0x44, 0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8),
            (&[0xc4, 0x63, 0x7b, 0xf0, 0x8c, 0x2a, 0xf1, 0x07, 0, 0, 0, 0, 0, 0, 0], 3),
        ];
        for (code, expected) in lengths {
            assert_eq!(length(code, 64), Some(expected), "{code:x?}");
        }
        assert_eq!(length(&[0x0f, 0x38, 0x01, 0x06, 0, 0], 16), Some(6));
        assert!(is_too_long(&[0x66; 15], 64));
        // ADD with 13 prefixes and REX, with 12.
        let long =
            [0x3e, 0x3e, 0x3e, 0x3e, 0x3e, 0x3e, 0x3e, 0x3e, 0x3e, 0x3e, 0x3e, 0x64, 0x45, 0x02, 0x58, 0x71];
        assert!(is_too_long(&long[..15], 64) && !is_too_long(&long[1..], 64));
        // LOCK OR QWORD [RDI*8+disp32], imm32 with F3, 67 and a segment; the F3 keeps UD1 from nothing.
        let locked = [0xf3, 0x67, 0x2e, 0xf0, 0x48, 0x81, 0x0c, 0xfd, 0x3c, 0, 0, 0, 0x53, 0x6a, 0xff, 0xff];
        assert!(is_too_long(&locked, 64));
        assert!(!is_too_long(
            &[0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x3e, 0x0f, 0xb9, 0x84, 0, 0, 0],
            64
        ));
        assert!(is_ud1(&[0x44, 0x0f, 0xb9], 64) && !is_ud1(&[0x0f, 0x0b], 64));
        assert!(is_cut_off(&[0xf0, 0x0f, 0xe7], 64) && !is_cut_off(&[0x66, 0x0f, 0x0b], 64));
    }
}

//! x87 and SSE registers: between the XSAVE area (Intel SDM 1 13.4) and the debugger's layout.

use gdbstub_arch::x86::reg::X86_64CoreRegs;

use crate::state::XsaveArea;

/// Offsets in the legacy region, as FXSAVE64 writes it.
mod at {
    pub(super) const FCW: usize = 0;
    pub(super) const FSW: usize = 2;
    pub(super) const TAGS: usize = 4;
    pub(super) const FOP: usize = 6;
    pub(super) const FIP: usize = 8;
    pub(super) const FDP: usize = 16;
    pub(super) const MXCSR: usize = 24;
    pub(super) const ST: usize = 32;
    pub(super) const XMM: usize = 160;
    pub(super) const XSTATE_BV: usize = 512;
}

/// Components in XSTATE_BV.
const X87: u64 = 1;
const SSE: u64 = 2;

/// Tags of the full tag word (Intel SDM 1 8.1.7).
const ZERO: u32 = 1;
const SPECIAL: u32 = 2;
const EMPTY: u32 = 3;

/// The bytes of `area` without what XSTATE_BV says to be initial.
fn effective(area: &XsaveArea) -> Vec<u8> {
    let mut bytes = area.bytes().to_vec();
    let present = area.xstate_bv();
    if present & X87 == 0 {
        bytes.iter_mut().take(at::MXCSR).for_each(|byte| *byte = 0);
        bytes.iter_mut().take(at::XMM).skip(at::ST).for_each(|byte| *byte = 0);
        put(&mut bytes, at::FCW, 0x37f_u16.to_le_bytes());
    }
    if present & SSE == 0 {
        bytes.iter_mut().take(at::XMM + 256).skip(at::XMM).for_each(|byte| *byte = 0);
    }
    bytes
}

/// Shows what is in `area`.
pub(super) fn show(area: &XsaveArea, core: &mut X86_64CoreRegs) {
    let bytes = effective(area);
    core.mxcsr = u32::from_le_bytes(get(&bytes, at::MXCSR));
    for (n, xmm) in core.xmm.iter_mut().enumerate() {
        *xmm = u128::from_le_bytes(get(&bytes, at::XMM + 16 * n));
    }
    for (n, st) in core.st.iter_mut().enumerate() {
        *st = get(&bytes, at::ST + 16 * n);
    }
    let word = |offset| u32::from(u16::from_le_bytes(get(&bytes, offset)));
    core.fpu.fctrl = word(at::FCW);
    core.fpu.fstat = word(at::FSW);
    core.fpu.fop = word(at::FOP);
    core.fpu.fioff = u32::from_le_bytes(get(&bytes, at::FIP));
    core.fpu.fiseg = word(at::FIP + 4);
    core.fpu.fooff = u32::from_le_bytes(get(&bytes, at::FDP));
    core.fpu.foseg = word(at::FDP + 4);
    let [kept] = get(&bytes, at::TAGS);
    core.fpu.ftag = full_tags(kept, core.fpu.fstat, &core.st);
}

/// `area` with the x87 and SSE registers of `core`.
pub(super) fn changed(area: &XsaveArea, core: &X86_64CoreRegs) -> Vec<u8> {
    let mut bytes = effective(area);
    put(&mut bytes, at::MXCSR, core.mxcsr.to_le_bytes());
    for (n, xmm) in core.xmm.iter().enumerate() {
        put(&mut bytes, at::XMM + 16 * n, xmm.to_le_bytes());
    }
    for (n, st) in core.st.iter().enumerate() {
        put(&mut bytes, at::ST + 16 * n, *st);
    }
    let fpu = &core.fpu;
    for (offset, value) in [(at::FCW, fpu.fctrl), (at::FSW, fpu.fstat), (at::FOP, fpu.fop)] {
        put(&mut bytes, offset, low16(value));
    }
    put(&mut bytes, at::FIP, fpu.fioff.to_le_bytes());
    put(&mut bytes, at::FIP + 4, low16(fpu.fiseg));
    put(&mut bytes, at::FDP, fpu.fooff.to_le_bytes());
    put(&mut bytes, at::FDP + 4, low16(fpu.foseg));
    let tags = (0..8).filter(|n| fpu.ftag >> (2 * n) & 3 != EMPTY).fold(0_u8, |tags, n| tags | 1 << n);
    put(&mut bytes, at::TAGS, [tags]);
    put(&mut bytes, at::XSTATE_BV, (area.xstate_bv() | X87 | SSE).to_le_bytes());
    bytes
}

/// The full tag word: two bits a register, by what the register holds.
fn full_tags(kept: u8, status: u32, st: &[[u8; 10]; 8]) -> u32 {
    let top = status >> 11 & 7;
    let tag = |n: u32| {
        if kept >> n & 1 == 0 {
            return EMPTY;
        }
        let of_stack = usize::try_from(n.wrapping_sub(top) & 7).unwrap_or(0);
        let Some([mantissa @ .., low, high]) = st.get(of_stack) else { return EMPTY };
        let exponent = u16::from_le_bytes([*low, *high]) & 0x7fff;
        let mantissa = u64::from_le_bytes(*mantissa);
        match (exponent, mantissa) {
            (0, 0) => ZERO,
            (1..=0x7ffe, 0x8000_0000_0000_0000..) => 0,
            _ => SPECIAL,
        }
    };
    (0..8).fold(0, |tags, n| tags | tag(n) << (2 * n))
}

fn get<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn put<const N: usize>(bytes: &mut [u8], offset: usize, value: [u8; N]) {
    if let Some(place) = bytes.get_mut(offset..).and_then(|rest| rest.first_chunk_mut()) {
        *place = value;
    }
}

fn low16(value: u32) -> [u8; 2] {
    let [a, b, ..] = value.to_le_bytes();
    [a, b]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1.0 as an 80-bit value.
    const ONE: [u8; 10] = [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f];

    #[test]
    fn what_is_written_is_shown() {
        let mut core = X86_64CoreRegs::default();
        show(&XsaveArea::at_reset(), &mut core);
        assert_eq!((core.fpu.fctrl, core.fpu.ftag, core.mxcsr), (0x37f, 0xffff, 0x1f80));
        // TOP is 7: ST0 is register 7.
        core.fpu.fstat = 7 << 11;
        core.st[0] = ONE;
        core.fpu.ftag = 0x3fff;
        core.xmm[9] = 77;
        core.fpu.fop = 0x1c7;
        let area = XsaveArea::from_bytes(changed(&XsaveArea::at_reset(), &core)).unwrap();
        assert_eq!(area.xmm(9), Some(77));
        let mut again = X86_64CoreRegs::default();
        show(&area, &mut again);
        assert_eq!(again, core);
    }

    #[test]
    fn tags_tell_zero_special_and_empty_apart() {
        let mut st = [ONE; 8];
        st[1] = [0; 10];
        st[2][8..].copy_from_slice(&[0xff, 0x7f]);
        st[3][7] = 0;
        // TOP is 0 and register 4 is empty.
        assert_eq!(full_tags(0b1110_1111, 0, &st), 0b00_00_00_11_10_10_01_00);
    }

    #[test]
    fn what_is_initial_is_not_shown_as_what_the_area_holds() {
        let mut bytes = XsaveArea::at_reset().bytes().to_vec();
        bytes[32] = 9;
        bytes[160] = 9;
        bytes[512] = 0;
        let area = XsaveArea::from_bytes(bytes).unwrap();
        let mut core = X86_64CoreRegs::default();
        show(&area, &mut core);
        assert_eq!((core.st[0], core.xmm[0], core.fpu.fctrl), ([0; 10], 0, 0x37f));
    }
}

//! The extended register state in the standard (non-compacted) XSAVE format.

/// End of the legacy region and the XSAVE header: the smallest area (Intel SDM 1 13.4).
pub const XSAVE_HEADER_END: usize = 576;

/// Largest area accepted from a snapshot, in bytes. AMX, the largest component defined so far, ends below.
pub const XSAVE_MAX: usize = 16 * 1024;

/// An XSAVE area in standard format (Intel SDM 1 13.4): 512 bytes as FXSAVE writes them, a 64-byte header
/// whose first 8 bytes are XSTATE_BV, then the extended components at the offsets of CPUID leaf 0xd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XsaveArea {
    bytes: Vec<u8>,
}

impl Default for XsaveArea {
    fn default() -> Self {
        Self::at_reset()
    }
}

impl XsaveArea {
    /// x87 and SSE as after FNINIT and RESET: FCW 0x37f, MXCSR 0x1f80, all else zero.
    pub fn at_reset() -> Self {
        let mut area = Self { bytes: vec![0; XSAVE_HEADER_END] };
        area.put(0, &0x37f_u16.to_le_bytes());
        area.put(24, &0x1f80_u32.to_le_bytes());
        area.put(512, &3_u64.to_le_bytes());
        area
    }

    /// Takes over an area; `None` if it is shorter than [`XSAVE_HEADER_END`] or longer than
    /// [`XSAVE_MAX`] bytes.
    pub fn from_bytes(bytes: Vec<u8>) -> Option<Self> {
        (XSAVE_HEADER_END..=XSAVE_MAX).contains(&bytes.len()).then_some(Self { bytes })
    }

    /// The area.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// XSTATE_BV: which components hold something else than their initial state.
    pub fn xstate_bv(&self) -> u64 {
        self.get(512)
    }

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        // MXCSR_MASK is the high half.
        let [a, b, c, d, ..] = self.get(24).to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }

    /// XMM register `index` (0 to 15), `None` beyond.
    pub fn xmm(&self, index: usize) -> Option<u128> {
        let start = 160 + index.checked_mul(16)?;
        (index < 16).then(|| {
            let low = self.get(start);
            let high = self.get(start + 8);
            u128::from(high) << 64 | u128::from(low)
        })
    }

    /// Puts the components beyond x87 and SSE that are not in `components` into their initial state.
    #[cfg(any(
        all(feature = "kvm", feature = "translate", target_os = "linux", target_arch = "x86_64"),
        all(feature = "xen-pv", feature = "snapshot")
    ))]
    pub(crate) fn retain(&mut self, components: u64) {
        let in_use = self.xstate_bv() & (components | 3);
        self.put(512, &in_use.to_le_bytes());
    }

    fn get(&self, offset: usize) -> u64 {
        let mut value = [0; 8];
        if let Some(bytes) = self.bytes.get(offset..offset + 8) {
            value.copy_from_slice(bytes);
        }
        u64::from_le_bytes(value)
    }

    fn put(&mut self, offset: usize, value: &[u8]) {
        if let Some(bytes) = self.bytes.get_mut(offset..offset + value.len()) {
            bytes.copy_from_slice(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_state_is_fninit() {
        let area = XsaveArea::at_reset();
        assert_eq!(area.bytes()[..2], 0x37f_u16.to_le_bytes());
        assert_eq!((area.mxcsr(), area.xstate_bv()), (0x1f80, 3));
        assert_eq!((area.xmm(15), area.xmm(16)), (Some(0), None));
    }

    #[test]
    fn size_is_bounded_both_ways() {
        assert!(XsaveArea::from_bytes(vec![0; XSAVE_HEADER_END - 1]).is_none());
        assert!(XsaveArea::from_bytes(vec![0; XSAVE_HEADER_END]).is_some());
        assert!(XsaveArea::from_bytes(vec![0; XSAVE_MAX + 1]).is_none());
    }
}

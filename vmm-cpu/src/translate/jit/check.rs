//! Translations that compare the code that they were made from with memory whenever they are entered.

use super::builder::{Builder, NOT_EQUAL};
use super::emit::{RAX, RCX, Rm};
use super::site::Kind;

impl Builder<'_> {
    /// Goes on if each part of the code, at a host address, is what it was. RAX, RCX and the processor's flags change.
    pub(super) fn check(&mut self, code: &[(u64, &[u8])]) {
        let mut from = Vec::new();
        for (address, bytes) in code {
            self.e.constant(RAX, *address);
            for (at, len) in pieces(bytes.len()) {
                let mut word = [0; 8];
                for (to, byte) in word.iter_mut().zip(bytes.iter().skip(at).take(len)) {
                    *to = *byte;
                }
                let place = Rm::At(RAX, i32::try_from(at).unwrap_or(i32::MAX));
                self.e.constant(RCX, u64::from_le_bytes(word));
                // CMP of the piece
                match len {
                    8 => self.e.op(true, &[0x3b], RCX, place),
                    4 => self.e.op(false, &[0x3b], RCX, place),
                    2 => {
                        self.e.bytes(&[0x66]);
                        self.e.op(false, &[0x3b], RCX, place);
                    }
                    _ => self.e.op(false, &[0x3a], RCX, place),
                }
                from.push(self.e.jump_if(NOT_EQUAL));
            }
        }
        self.leave_from(from, Kind::Changed);
    }
}

/// The fewest pieces of 8, 4, 2 or 1 bytes that cover that many: offsets and sizes. They may overlap.
fn pieces(len: usize) -> Vec<(usize, usize)> {
    let Some(log) = len.checked_ilog2() else { return Vec::new() };
    let size = 1_usize << log.min(3);
    let last = len - size;
    (0..last).step_by(size).chain([last]).map(|at| (at, size)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_all_and_nothing_else() {
        for len in 1..70 {
            let mut covered = vec![false; len];
            let pieces = pieces(len);
            for (at, size) in &pieces {
                assert!([1, 2, 4, 8].contains(size));
                covered[*at..at + size].fill(true);
            }
            assert!(covered.iter().all(|covered| *covered), "{len}: {pieces:?}");
            assert!(pieces.len() <= len.div_ceil(8).max(2), "{len}: {pieces:?}");
        }
        assert!(pieces(0).is_empty());
    }
}

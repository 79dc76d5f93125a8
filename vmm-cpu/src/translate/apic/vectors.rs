//! A set of interrupt vectors, as IRR, ISR and TMR are (Intel SDM 3A 12.8.4).

use super::low_byte;

/// Vectors below are reserved; a local APIC accepts none of them (Intel SDM 3A 12.5.2).
pub(super) const FIRST_LEGAL: u8 = 16;

/// The bits of a set's first word that stand for reserved vectors.
pub(super) const ILLEGAL_BITS: u32 = (1 << FIRST_LEGAL) - 1;

/// Priority class of a vector, or of TPR and PPR: bits 4 to 7.
pub(super) fn class(value: u8) -> u8 {
    value >> 4
}

/// A set of vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Vectors([u32; 8]);

/// Where `vector` stands: number of the 32-bit word, below 8, and bit in it.
pub(super) fn position(vector: u8) -> (usize, u32) {
    (usize::from(vector >> 5), 1 << (vector & 31))
}

impl Vectors {
    /// The set with the 32-bit words of the register page, vectors 0 to 31 first.
    pub(super) fn from_words(words: [u32; 8]) -> Self {
        Self(words)
    }

    /// Word `index` modulo 8.
    #[allow(clippy::indexing_slicing, reason = "the index is masked to the length of the array")]
    pub(super) fn word(&self, index: usize) -> u32 {
        self.0[index & 7]
    }

    /// Whether `vector` is in the set.
    pub(super) fn contains(&self, vector: u8) -> bool {
        let (index, bit) = position(vector);
        self.word(index) & bit != 0
    }

    /// Adds `vector`.
    pub(super) fn insert(&mut self, vector: u8) {
        let (index, bit) = position(vector);
        *self.word_mut(index) |= bit;
    }

    /// Takes `vector` out.
    pub(super) fn remove(&mut self, vector: u8) {
        let (index, bit) = position(vector);
        *self.word_mut(index) &= !bit;
    }

    /// Adds all of `others`.
    pub(super) fn insert_all(&mut self, others: &Self) {
        for (word, other) in self.0.iter_mut().zip(&others.0) {
            *word |= other;
        }
    }

    /// Takes all of `others` out.
    pub(super) fn remove_all(&mut self, others: &Self) {
        for (word, other) in self.0.iter_mut().zip(&others.0) {
            *word &= !other;
        }
    }

    /// The highest vector in the set, which is the one of highest priority.
    pub(super) fn highest(&self) -> Option<u8> {
        let words = (0_u8..8).zip(&self.0);
        let (index, word) = words.rev().find(|(_, word)| **word != 0)?;
        Some(index << 5 | low_byte(word.ilog2()))
    }

    #[allow(clippy::indexing_slicing, reason = "the index is masked to the length of the array")]
    fn word_mut(&mut self, index: usize) -> &mut u32 {
        &mut self.0[index & 7]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vector_comes_and_goes_alone() {
        for vector in 0..=u8::MAX {
            let mut set = Vectors::default();
            assert_eq!(set.highest(), None);
            set.insert(vector);
            assert_eq!(set.highest(), Some(vector));
            assert_eq!((0..=u8::MAX).filter(|v| set.contains(*v)).collect::<Vec<_>>(), [vector]);
            set.remove(vector);
            assert_eq!(set, Vectors::default());
        }
    }

    #[test]
    fn highest_wins_within_and_across_words() {
        let mut set = Vectors::default();
        for vector in [0x20, 0x3f, 0x31, 0xff, 0xe0] {
            set.insert(vector);
        }
        let mut order = Vec::new();
        while let Some(vector) = set.highest() {
            order.push(vector);
            set.remove(vector);
        }
        assert_eq!(order, [0xff, 0xe0, 0x3f, 0x31, 0x20]);
    }

    #[test]
    fn words_are_those_of_the_register_page() {
        let mut set = Vectors::default();
        set.insert(0x21);
        set.insert(0xff);
        assert_eq!(set, Vectors::from_words([0, 2, 0, 0, 0, 0, 0, 1 << 31]));
        let mut other = Vectors::from_words([0, 3, 0, 0, 0, 0, 0, 0]);
        other.insert_all(&set);
        assert_eq!(other, Vectors::from_words([0, 3, 0, 0, 0, 0, 0, 1 << 31]));
        other.remove_all(&set);
        assert_eq!(other, Vectors::from_words([0, 1, 0, 0, 0, 0, 0, 0]));
    }
}

//! Random numbers that a seed fixes for good.

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of the given words together.
    pub fn new(words: &[u64]) -> Self {
        let mut this = Self(0);
        for word in words {
            this.0 ^= *word;
            this.0 = this.next();
        }
        this
    }

    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// True and false, equally.
    pub fn flip(&mut self) -> bool {
        self.one_in(2)
    }

    /// One of `values`; the default of an empty list.
    pub fn pick<T: Clone + Default>(&mut self, values: &[T]) -> T {
        let index = usize::try_from(self.below(values.len() as u64)).unwrap_or(0);
        values.get(index).cloned().unwrap_or_default()
    }

    /// Some of the bits of `mask`, each equally often set and clear.
    pub fn bits(&mut self, mask: u64) -> u64 {
        self.next() & mask
    }

    /// `value` once in `n`, 0 otherwise.
    pub fn rarely(&mut self, n: u64, value: u64) -> u64 {
        if self.one_in(n) { value } else { 0 }
    }

    /// Once in `n` one of the `count` bits from `first` on.
    pub fn bit_rarely(&mut self, n: u64, first: u64, count: u64) -> u64 {
        let bit = 1 << (first + self.below(count));
        self.rarely(n, bit)
    }
}

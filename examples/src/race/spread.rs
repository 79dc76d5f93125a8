//! Figures of one thing that was measured several times.

/// Least, median and most of some figures.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Spread {
    /// The least.
    pub least: f64,
    /// The median; of an even number, the upper of the two in the middle.
    pub median: f64,
    /// The most.
    pub most: f64,
}

impl Spread {
    /// Of these; zeros if there are none.
    pub fn of(mut figures: Vec<f64>) -> Self {
        figures.sort_by(f64::total_cmp);
        let at = |index: usize| figures.get(index).copied().unwrap_or(0.0);
        Self { least: at(0), median: at(figures.len() / 2), most: at(figures.len().saturating_sub(1)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Spread { least: 1.0, median: 2.0, most: 3.0 });
        assert_eq!(Spread::of(vec![4.0, 1.0]).median, 4.0);
        assert_eq!(Spread::of(Vec::new()), Spread::default());
    }
}

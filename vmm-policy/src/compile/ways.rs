//! Which way information may go between levels, worked out before it is asked.

use super::classes::Class;
use crate::model::Flow;

/// Levels that have a row: as many as policies have that people write. What is on others is compared each time.
const LEVELS: usize = 64;
const ROW: usize = LEVELS + 1;
/// That it is to be compared.
const COMPARE: u8 = 1 << 7;

/// For two levels with their categories, the bits of [`Flow`] that may be.
#[derive(Clone, Debug)]
pub(super) struct Ways {
    /// One of each level.
    levels: Vec<Class>,
    /// Row by row; the last row and the last of each row are those of levels that have none.
    bits: Vec<u8>,
}

impl Ways {
    pub(super) fn new() -> Self {
        Self { levels: Vec::new(), bits: vec![COMPARE; ROW * ROW] }
    }

    /// The number of a class's level.
    pub(super) fn level(&mut self, class: &Class) -> u8 {
        let of = |class: &Class| (class.secrecy, class.integrity, class.categories, class.exempt);
        if let Some(known) = self.levels.iter().position(|known| of(known) == of(class)) {
            return known as u8;
        }
        let next = self.levels.len();
        if next == LEVELS {
            return LEVELS as u8;
        }
        self.levels.push(*class);
        for (at, other) in self.levels.iter().enumerate() {
            let bits = |one: &Class, two: &Class| {
                let all = [Flow::In, Flow::Out].into_iter().filter(|flow| one.permits(two, *flow));
                all.fold(0, |bits, flow| bits | flow as u8)
            };
            for (one, two) in [(next, at), (at, next)] {
                let (from, to) = if one == next { (class, other) } else { (other, class) };
                if let Some(place) = self.bits.get_mut(one * ROW + two) {
                    *place = bits(from, to);
                }
            }
        }
        next as u8
    }

    /// Whether information may go so between levels; nothing if classes are to be compared.
    #[inline(always)]
    pub(super) fn known(&self, asker: u8, peer: u8, flow: Flow) -> Option<bool> {
        let bits = self.bits.get(usize::from(asker) * ROW + usize::from(peer)).copied().unwrap_or(COMPARE);
        (bits & COMPARE == 0).then_some(bits & flow as u8 == flow as u8)
    }

    /// As [`Class::permits`].
    pub(super) fn permit(&self, asker: &Class, peer: &Class, flow: Flow) -> bool {
        self.known(asker.level, peer.level, flow).unwrap_or_else(|| asker.permits(peer, flow))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_as_if_compared() {
        let mut rng = fastrand::Rng::with_seed(1);
        for levels in [3, 40, 200] {
            let mut ways = Ways::new();
            let mut classes: Vec<Class> = (0..levels)
                .map(|at| Class {
                    categories: rng.u64(..4),
                    secrecy: rng.u8(..4) + (at / 50) as u8,
                    integrity: rng.u8(..3),
                    exempt: rng.u8(..10) == 0,
                    ..Class::default()
                })
                .collect();
            classes.iter_mut().for_each(|class| class.level = ways.level(class));
            let listed = classes.iter().filter(|class| (class.level as usize) < LEVELS).count();
            assert!(listed > 0 && (levels < 200 || listed < levels), "both ways are tried");
            for one in &classes {
                for two in &classes {
                    for flow in [Flow::None, Flow::In, Flow::Out, Flow::Both] {
                        assert_eq!(
                            ways.permit(one, two, flow),
                            one.permits(two, flow),
                            "{one:?} {two:?} {flow:?}"
                        );
                    }
                }
            }
        }
    }
}

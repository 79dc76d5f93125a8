//! Which address spaces get an address window: those whose programs run long.

use std::time::{Duration, Instant};

/// Address spaces that are remembered.
const KNOWN: usize = 8;

/// A sample stands for as much time, at most: that between two ticks of a guest.
const LONGEST: Duration = Duration::from_millis(4);
/// Samples are so far apart, at least.
const SHORTEST: Duration = Duration::from_millis(1);

/// What a program must have run.
const NEEDED: Duration = Duration::from_millis(6);
/// What an address space must have run whose window did not pay again and again.
const MOST_NEEDED: Duration = Duration::from_secs(16);

#[derive(Clone, Copy, Debug)]
struct Known {
    root: u64,
    ran: Duration,
    needed: Duration,
    used: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Merits {
    known: Vec<Known>,
    last: Option<Instant>,
    uses: u64,
}

impl Merits {
    /// Notes that the program with that CR3 runs now.
    pub(super) fn sample(&mut self, root: u64) {
        let now = Instant::now();
        let passed = self.last.map_or(SHORTEST, |last| now.duration_since(last));
        if passed < SHORTEST {
            return;
        }
        self.last = Some(now);
        self.uses += 1;
        let uses = self.uses;
        let at = match self.known.iter().position(|known| known.root == root) {
            Some(at) => at,
            None => {
                if self.known.len() >= KNOWN {
                    let oldest = (0..).zip(&self.known).min_by_key(|(_, known)| known.used);
                    if let Some((oldest, _)) = oldest {
                        self.known.swap_remove(oldest);
                    }
                }
                self.known.push(Known { root, ran: Duration::ZERO, needed: NEEDED, used: 0 });
                self.known.len() - 1
            }
        };
        if let Some(known) = self.known.get_mut(at) {
            known.ran = known.ran.saturating_add(passed.min(LONGEST));
            known.used = uses;
        }
    }

    /// How long the program with that CR3 ran, if that is long enough.
    pub(super) fn merited(&self, root: u64) -> Option<Duration> {
        let known = self.known.iter().find(|known| known.root == root)?;
        (known.ran >= known.needed).then_some(known.ran)
    }

    /// The window did not pay.
    pub(super) fn disappoint(&mut self, root: u64) {
        if let Some(known) = self.known.iter_mut().find(|known| known.root == root) {
            known.ran = Duration::ZERO;
            known.needed = (known.needed * 4).min(MOST_NEEDED);
        }
    }
}

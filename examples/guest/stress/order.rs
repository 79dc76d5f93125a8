//! The order in which stores and loads of several processors happen (Intel SDM 3A 9.2.3): small programs of two to four
//! processors each, with the outcomes that the manual excludes.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::Crew;

/// Words, each in a cache line of its own.
#[repr(align(128))]
#[derive(Default)]
struct Word(AtomicU64);

impl Word {
    /// A plain load on this processor.
    fn load(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// A plain store on this processor.
    fn store(&self, value: u64) {
        self.0.store(value, Ordering::Release);
    }
}

/// Runs `step` of each processor for many rounds, all beginning a round together, and checks what they loaded.
fn rounds<const N: usize>(
    crew: &Crew,
    step: impl Fn(usize, u64) -> [u64; 2] + Sync,
    is_allowed: impl Fn(u64, [[u64; 2]; N]) -> bool,
) {
    let progress: [Word; N] = std::array::from_fn(|_| Word::default());
    let count = 500 * crew.rounds as u64;
    let seen = crew.each(|cpu| {
        let mut seen = Vec::with_capacity(count as usize);
        for round in (1..=count).filter(|_| cpu < N) {
            progress[cpu].store(round);
            while progress.iter().any(|other| other.load() < round) {
                std::hint::spin_loop();
            }
            seen.push(step(cpu, round));
        }
        seen
    });
    for round in 1..=count {
        let seen = std::array::from_fn(|cpu| seen[cpu][round as usize - 1]);
        assert!(is_allowed(round, seen), "round {round}: {seen:?}");
    }
}

pub(crate) fn all(crew: &Crew) {
    let words: [Word; 2] = std::array::from_fn(|_| Word::default());
    let reset = || words.iter().for_each(|word| word.store(0));
    if crew.threads < 2 {
        return;
    }
    // 9.2.3.2: stores are seen in order, and loads happen in order.
    reset();
    rounds::<2>(
        crew,
        |cpu, round| match cpu {
            0 => {
                words[0].store(round);
                words[1].store(round);
                [0; 2]
            }
            _ => [words[1].load(), words[0].load()],
        },
        |_, [_, [flag, data]]| data >= flag,
    );
    // 9.2.3.3: no load is later than a store behind it.
    reset();
    rounds::<2>(
        crew,
        |cpu, round| {
            let seen = words[cpu].load();
            words[1 - cpu].store(round);
            [seen, 0]
        },
        |round, [[a, _], [b, _]]| a < round || b < round,
    );
    // 9.2.3.4 with MFENCE, and 9.2.3.9 with a locked instruction: then no load is earlier than a store before it.
    for locked in [false, true] {
        reset();
        let other = Word::default();
        rounds::<2>(
            crew,
            |cpu, round| {
                words[cpu].store(round);
                if locked {
                    other.0.fetch_add(1, Ordering::SeqCst);
                } else {
                    fence(Ordering::SeqCst);
                }
                [words[1 - cpu].load(), 0]
            },
            |round, [[a, _], [b, _]]| a >= round || b >= round,
        );
    }
    if crew.threads < 4 {
        return;
    }
    // 9.2.3.7: two stores are seen in one order by all others.
    reset();
    rounds::<4>(
        crew,
        |cpu, round| match cpu {
            0 | 1 => {
                words[cpu].store(round);
                [0; 2]
            }
            2 => [words[0].load(), words[1].load()],
            _ => [words[1].load(), words[0].load()],
        },
        |round, [_, _, [a, b], [c, d]]| !(a >= round && b < round && c >= round && d < round),
    );
}

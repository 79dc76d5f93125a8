//! Locks of several kinds around data that nothing else protects.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Barrier, Condvar, Mutex};

use crate::Crew;

/// Data behind a lock of the program's own.
struct Plain<T>(UnsafeCell<T>);

// SAFETY: those who access it hold the lock under test.
unsafe impl<T: Send> Sync for Plain<T> {}

impl Plain<[u64; 4]> {
    /// Counts in words that have to stay equal.
    fn count(&self) {
        // SAFETY: the caller holds the lock.
        let words = unsafe { &mut *self.0.get() };
        let before = *words;
        for (word, before) in words.iter_mut().zip(before) {
            assert_eq!(before, std::hint::black_box(before));
            *word = before + 1;
        }
        assert!(words.iter().all(|word| *word == words[0]), "{words:?}");
    }
}

fn counter() -> Plain<[u64; 4]> {
    Plain(UnsafeCell::new([0; 4]))
}

fn check(counter: Plain<[u64; 4]>, crew: &Crew, times: usize) {
    assert_eq!(counter.0.into_inner(), [(crew.threads * times) as u64; 4]);
}

pub(crate) fn spin(crew: &Crew) {
    let (lock, counter, times) = (AtomicBool::new(false), counter(), 2000 * crew.rounds);
    crew.each(|_| {
        for _ in 0..times {
            while lock.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
                while lock.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            }
            counter.count();
            // A plain store on this processor.
            lock.store(false, Ordering::Release);
        }
    });
    check(counter, crew, times);
}

pub(crate) fn ticket(crew: &Crew) {
    let (next, serving, counter, times) =
        (AtomicU64::new(0), AtomicU64::new(0), counter(), 200 * crew.rounds);
    crew.each(|_| {
        for _ in 0..times {
            let ticket = next.fetch_add(1, Ordering::Relaxed);
            while serving.load(Ordering::Acquire) != ticket {
                std::hint::spin_loop();
            }
            counter.count();
            serving.store(ticket + 1, Ordering::Release);
        }
    });
    check(counter, crew, times);
}

pub(crate) fn mutexes(crew: &Crew) {
    let (turn, changed, counter) = (Mutex::new(0_usize), Condvar::new(), counter());
    let times = 100 * crew.rounds;
    crew.each(|cpu| {
        for _ in 0..times {
            // Each in its turn: a wake-up that is lost ends it all.
            let mut guard = changed.wait_while(turn.lock().unwrap(), |turn| *turn != cpu).unwrap();
            counter.count();
            *guard = (*guard + 1) % crew.threads;
            drop(guard);
            changed.notify_all();
        }
    });
    check(counter, crew, times);
    let (mutex, times) = (Mutex::new(0_u64), 2000 * crew.rounds);
    crew.each(|_| (0..times).for_each(|_| *mutex.lock().unwrap() += 1));
    assert_eq!(mutex.into_inner().unwrap(), (times * crew.threads) as u64);
}

pub(crate) fn barriers(crew: &Crew) {
    let barrier = Barrier::new(crew.threads);
    let progress: Vec<AtomicU64> = (0..crew.threads).map(|_| AtomicU64::new(0)).collect();
    let leaders = crew.each(|cpu| {
        let mut leader = 0;
        for round in 1..=(100 * crew.rounds) as u64 {
            progress[cpu].store(round, Ordering::Relaxed);
            leader += usize::from(barrier.wait().is_leader());
            for (other, progress) in progress.iter().enumerate() {
                let there = progress.load(Ordering::Relaxed);
                assert_eq!(there, round, "processor {other} as {cpu} sees it behind the barrier");
            }
            barrier.wait();
        }
        leader
    });
    assert_eq!(leaders.iter().sum::<usize>(), 100 * crew.rounds);
}

/// One writes pairs, the others read them without a lock and read again if they met the writer.
pub(crate) fn sequence(crew: &Crew) {
    let (sequence, pair) = (AtomicU64::new(0), [AtomicU64::new(0), AtomicU64::new(0)]);
    let last = 2000 * crew.rounds as u64;
    crew.each(|cpu| {
        if cpu == 0 {
            for n in 1..=last {
                sequence.store(2 * n - 1, Ordering::Relaxed);
                fence(Ordering::Release);
                pair[0].store(n, Ordering::Relaxed);
                pair[1].store(!n, Ordering::Relaxed);
                sequence.store(2 * n, Ordering::Release);
            }
            return;
        }
        loop {
            let before = sequence.load(Ordering::Acquire);
            let (a, b) = (pair[0].load(Ordering::Relaxed), pair[1].load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            if before % 2 == 0 && sequence.load(Ordering::Relaxed) == before && before > 0 {
                assert_eq!((a, b), (before / 2, !(before / 2)));
                if a == last {
                    return;
                }
            }
            std::hint::spin_loop();
        }
    });
}

#[repr(align(16))]
struct Top(UnsafeCell<u128>);

// SAFETY: it is accessed by CMPXCHG16B only.
unsafe impl Sync for Top {}

impl Top {
    fn compare_exchange(&self, old: u128, new: u128) -> u128 {
        let (order, failure) = (Ordering::SeqCst, Ordering::SeqCst);
        // SAFETY: aligned and alive; the program is built for processors with the instruction.
        unsafe { std::arch::x86_64::cmpxchg16b(self.0.get(), old, new, order, failure) }
    }
}

/// A stack without locks: numbers of nodes, with a count against ABA in the upper half.
pub(crate) fn stack(crew: &Crew) {
    const NODES: usize = 16;
    let next: Vec<AtomicU64> = (0..=NODES).map(|_| AtomicU64::new(0)).collect();
    let taken: Vec<AtomicBool> = (0..=NODES).map(|_| AtomicBool::new(false)).collect();
    let top = Top(UnsafeCell::new(0));
    let push = |node: u64| {
        let mut old = top.compare_exchange(0, 0);
        loop {
            next[node as usize].store(old as u64, Ordering::Relaxed);
            let new = ((old >> 64) + 1) << 64 | u128::from(node);
            match top.compare_exchange(old, new) {
                seen if seen == old => return,
                seen => old = seen,
            }
        }
    };
    let pop = || {
        let mut old = top.compare_exchange(0, 0);
        loop {
            let node = old as u64;
            if node == 0 {
                return None;
            }
            let new = ((old >> 64) + 1) << 64 | u128::from(next[node as usize].load(Ordering::Relaxed));
            match top.compare_exchange(old, new) {
                seen if seen == old => return Some(node),
                seen => old = seen,
            }
        }
    };
    (1..=NODES as u64).for_each(push);
    crew.each(|_| {
        for _ in 0..1000 * crew.rounds {
            let Some(node) = pop() else { continue };
            assert!(!taken[node as usize].swap(true, Ordering::SeqCst), "node {node} was taken twice");
            taken[node as usize].store(false, Ordering::SeqCst);
            push(node);
        }
    });
    let mut left: Vec<u64> = std::iter::from_fn(pop).collect();
    left.sort_unstable();
    assert!(left.into_iter().eq(1..=NODES as u64));
}

/// Locked additions to words that lie in two cache lines, and in two pages.
pub(crate) fn split(crew: &Crew) {
    let pages = crate::system::Pages::new(2, crate::system::READ | crate::system::WRITE);
    let times = 200 * crew.rounds;
    let places = [60, 4092].map(|offset| pages.base().wrapping_add(offset).expose_provenance());
    crew.each(|_| {
        for _ in 0..times {
            for place in places {
                // SAFETY: eight bytes within the two pages, that nobody accesses otherwise.
                unsafe { std::arch::asm!("lock inc qword ptr [{}]", in(reg) place, options(nostack)) };
            }
        }
    });
    for place in places {
        // SAFETY: as above, and the threads have ended.
        let count = unsafe { std::ptr::with_exposed_provenance::<u64>(place).read_unaligned() };
        assert_eq!(count, (times * crew.threads) as u64, "at {place:#x}");
    }
}

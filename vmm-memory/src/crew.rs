//! Threads that share a count of things to do.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// More threads than this wait for each other in the host's page allocator, or for its disk.
const MAX_THREADS: usize = 64;

/// Does `work` for each number below `count`, once, on at most so many threads of that name, the calling one included. Each has what `make`
/// makes. The first failure ends it; numbers that others have begun are finished.
pub(crate) fn share<S, E: Send>(
    name: &str,
    threads: NonZeroUsize,
    count: usize,
    make: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
    let run = || {
        let mut own = make();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return;
            }
            if let Err(error) = work(&mut own, number) {
                next.store(count, Ordering::Relaxed);
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                return;
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads.get().min(MAX_THREADS).min(count) {
            // Without a further thread, those that run, at least this one, do its share.
            if thread::Builder::new().name(name.into()).spawn_scoped(scope, run).is_err() {
                break;
            }
        }
        run();
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_done_once_and_a_failure_ends_it() {
        let threads = NonZeroUsize::new(4).unwrap();
        let done: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
        share(
            "crew",
            threads,
            done.len(),
            || (),
            |(), at| {
                done[at].fetch_add(1, Ordering::Relaxed);
                Ok::<_, ()>(())
            },
        )
        .unwrap();
        assert!(done.iter().all(|times| times.load(Ordering::Relaxed) == 1));
        let fails = |own: &mut usize, at: usize| {
            *own += 1;
            if at == 500 { Err(at) } else { Ok(()) }
        };
        assert_eq!(share("crew", threads, 1 << 40, || 0, fails), Err(500));
    }
}

//! All interleavings of those who use a channel and those who take it away.
//!
//! The source of the word that they share is the crate's own file; loom's atomics and locks stand where the crate has the
//! standard library's.

#![allow(clippy::unwrap_used, dead_code, missing_docs, reason = "a test")]

mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
    pub(crate) use std::sync::PoisonError;

    pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap()
    }
}

#[path = "../src/grant/life.rs"]
mod life;

use std::sync::atomic::Ordering::Relaxed;

use life::Life;
use loom::sync::Arc;
use loom::sync::atomic::AtomicBool;
use loom::thread;

/// A channel, and whether it is there: relaxed, so that nothing but the word orders who sees what.
struct Channel {
    life: Life,
    there: AtomicBool,
    written: AtomicBool,
}

impl Channel {
    fn new() -> Arc<Self> {
        Arc::new(Self { life: Life::new(), there: AtomicBool::new(true), written: AtomicBool::new(false) })
    }

    fn use_it(&self) -> bool {
        let entered = self.life.enter();
        if entered {
            assert!(self.there.load(Relaxed), "used after it was taken away");
            self.written.store(true, Relaxed);
            self.life.leave();
        }
        entered
    }
}

#[test]
fn nobody_uses_what_was_taken_away() {
    // Three threads take minutes without a bound; with two, as below, all are tried.
    let mut some = loom::model::Builder::new();
    some.preemption_bound = Some(3);
    some.check(two_users_and_one_who_revokes);
}

#[test]
#[ignore = "takes minutes"]
fn nobody_uses_what_was_taken_away_whatever_the_order() {
    loom::model(two_users_and_one_who_revokes);
}

#[test]
fn one_user_does_not_use_what_was_taken_away() {
    loom::model(|| use_and_revoke(1));
}

fn two_users_and_one_who_revokes() {
    use_and_revoke(2);
}

fn use_and_revoke(count: usize) {
    let channel = Channel::new();
    let users: Vec<_> = (0..count)
        .map(|_| {
            let channel = Arc::clone(&channel);
            thread::spawn(move || channel.use_it())
        })
        .collect();
    assert!(channel.life.revoke());
    assert!(channel.life.wait_idle(None));
    channel.there.store(false, Relaxed);
    // Whoever comes from here on is too late.
    assert!(!channel.use_it());
    let used = users.into_iter().map(|user| user.join().unwrap()).filter(|used| *used).count();
    // What they did has been done before it was taken away.
    assert_eq!(channel.written.load(Relaxed), used > 0);
}

#[test]
fn what_a_use_wrote_is_seen_when_it_is_idle() {
    loom::model(|| {
        let channel = Channel::new();
        let user = {
            let channel = Arc::clone(&channel);
            thread::spawn(move || channel.use_it())
        };
        channel.life.revoke();
        assert!(channel.life.wait_idle(None));
        let seen = channel.written.load(Relaxed);
        let used = user.join().unwrap();
        assert_eq!(seen, used, "the use has ended, and what it wrote was not there");
    });
}

#[test]
fn one_of_two_who_revoke_is_the_first() {
    loom::model(|| {
        let channel = Channel::new();
        let other = {
            let channel = Arc::clone(&channel);
            thread::spawn(move || {
                let first = channel.life.revoke();
                assert!(channel.life.wait_idle(None));
                first
            })
        };
        let user = {
            let channel = Arc::clone(&channel);
            thread::spawn(move || channel.use_it())
        };
        let first = channel.life.revoke();
        assert!(channel.life.wait_idle(None));
        assert_ne!(first, other.join().unwrap());
        user.join().unwrap();
        assert!(!channel.life.is_live());
    });
}

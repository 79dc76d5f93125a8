//! Posts from many threads: none lost, none twice, trigger modes kept.
//!
//! Each test goes on for a while, not for a number of rounds, since a busy machine may need a time slice for
//! each. A lost post shows as a stand-still: its sender waits for it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::*;

const SENDERS: u8 = 4;
const VECTORS_EACH: u8 = 16;

type Post = fn(&Inbox);

/// Time and progress that all threads of a test share.
struct Watch {
    end: Instant,
    progress: AtomicU32,
    finished: AtomicU32,
}

impl Watch {
    fn new() -> Self {
        let end = Instant::now() + Duration::from_millis(700);
        Self { end, progress: AtomicU32::new(0), finished: AtomicU32::new(0) }
    }

    /// Rounds as long as there is time.
    fn rounds(&self) -> impl Iterator<Item = u32> {
        (0..).take_while(|_| Instant::now() < self.end)
    }

    /// Waits until `done`, by doing `step` again and again, which says whether it did something.
    fn until(&self, done: impl Fn() -> bool, mut step: impl FnMut() -> bool) {
        let mut last = (self.progress.load(Ordering::SeqCst), Instant::now());
        while !done() {
            if step() {
                self.progress.fetch_add(1, Ordering::SeqCst);
                continue;
            }
            let now = self.progress.load(Ordering::SeqCst);
            if now != last.0 {
                last = (now, Instant::now());
            }
            assert!(last.1.elapsed() < Duration::from_secs(30), "no progress: a post was lost");
            thread::yield_now();
        }
    }

    fn wait(&self, done: impl Fn() -> bool) {
        self.until(done, || false);
    }

    fn finish(&self) {
        self.finished.fetch_add(1, Ordering::SeqCst);
    }

    fn finished(&self, threads: u32) -> bool {
        self.finished.load(Ordering::SeqCst) == threads
    }
}

/// Vector `nth` of sender `sender`; odd senders post level-triggered.
fn vector(sender: u8, nth: u8) -> u8 {
    0x20 + sender + nth * SENDERS
}

/// Each sender posts a vector only after the one before it with that vector has been serviced, so there are as many
/// services as posts, unless one is lost or comes twice.
#[test]
fn every_post_is_serviced_once() {
    let mut guest = Guest::xapic();
    let inbox = Arc::clone(&guest.apic.inbox);
    let served: Vec<AtomicU32> = (0..256).map(|_| AtomicU32::new(0)).collect();
    let watch = Watch::new();
    thread::scope(|scope| {
        for sender in 0..SENDERS {
            let (inbox, served, watch) = (&inbox, &served, &watch);
            scope.spawn(move || {
                let vectors = || (0..VECTORS_EACH).map(|nth| vector(sender, nth));
                let served = |vector| served[usize::from(vector)].load(Ordering::SeqCst);
                let mut posted = 0;
                for round in watch.rounds() {
                    for vector in vectors() {
                        watch.wait(|| served(vector) >= round);
                        assert_eq!(served(vector), round, "{vector:#x} came twice");
                        inbox.post_interrupt(vector, sender & 1 != 0);
                    }
                    posted = round + 1;
                }
                for vector in vectors() {
                    watch.wait(|| served(vector) >= posted);
                    assert_eq!(served(vector), posted, "{vector:#x} came twice");
                }
                watch.finish();
            });
        }
        watch.until(
            || watch.finished(SENDERS.into()),
            || {
                guest.apic.drain();
                if guest.apic.pending().is_none() {
                    return false;
                }
                let vector = guest.apic.acknowledge();
                let level = (vector - 0x20) & 1 != 0;
                assert_eq!(guest.apic.eoi(), level.then_some(vector), "{vector:#x}");
                served[usize::from(vector)].fetch_add(1, Ordering::SeqCst);
                true
            },
        );
    });
    assert_eq!((guest.apic.drain(), guest.apic.pending()), (Events::default(), None), "nothing comes twice");
    assert!(served[usize::from(vector(0, 0))].load(Ordering::SeqCst) > 0);
}

/// NMI, ExtINT, INIT and SIPI, each kind from a thread of its own, under the same hand-shake.
#[test]
fn every_event_is_taken_once() {
    let posts: [Post; 3] = [Inbox::post_nmi, Inbox::post_ext_int, |inbox| {
        inbox.post_init();
        inbox.post_start_up(0x9a);
    }];
    let mut guest = Guest::xapic();
    let inbox = Arc::clone(&guest.apic.inbox);
    let taken: [AtomicU32; 3] = Default::default();
    let watch = Watch::new();
    let mut inits = 0;
    thread::scope(|scope| {
        for (post, taken) in posts.into_iter().zip(&taken) {
            let (inbox, watch) = (&inbox, &watch);
            scope.spawn(move || {
                for round in watch.rounds() {
                    post(inbox);
                    watch.wait(|| taken.load(Ordering::SeqCst) > round);
                    assert_eq!(taken.load(Ordering::SeqCst), round + 1, "one came twice");
                }
                watch.finish();
            });
        }
        watch.until(
            || watch.finished(3),
            || {
                let events = guest.apic.drain();
                inits += u32::from(events.init);
                if let Some(page) = events.start_up {
                    assert_eq!(
                        (page, inits),
                        (0x9a, taken[2].load(Ordering::SeqCst) + 1),
                        "INIT before SIPI"
                    );
                }
                let happened = [events.nmi, events.ext_int, events.start_up.is_some()];
                for (happened, taken) in happened.into_iter().zip(&taken) {
                    taken.fetch_add(happened.into(), Ordering::SeqCst);
                }
                happened.contains(&true)
            },
        );
    });
    assert_eq!(guest.apic.drain(), Events::default());
    assert_eq!(inits, taken[2].load(Ordering::SeqCst));
}

/// The second of two posts arrives while the first is being taken, again and again: the worst moment to clear the
/// announcement.
#[test]
fn a_post_during_a_drain_is_not_lost() {
    let posts: [(Post, Post); 3] = [
        (Inbox::post_ext_int, Inbox::post_nmi),
        (Inbox::post_ext_int, |inbox| inbox.post_interrupt(0xf1, false)),
        (|inbox| inbox.post_interrupt(0x21, true), |inbox| inbox.post_interrupt(0x22, false)),
    ];
    for (first, second) in posts {
        let mut guest = Guest::xapic();
        let inbox = Arc::clone(&guest.apic.inbox);
        let taken = AtomicU32::new(0);
        let watch = Watch::new();
        thread::scope(|scope| {
            scope.spawn(|| {
                for round in watch.rounds() {
                    first(&inbox);
                    // A changing delay meets every point of the drain.
                    (0..round % 64).for_each(|_| std::hint::spin_loop());
                    second(&inbox);
                    watch.wait(|| taken.load(Ordering::SeqCst) > round);
                }
                watch.finish();
            });
            watch.until(
                || watch.finished(1),
                || {
                    let mut seen = guest.apic.drain().nmi;
                    while guest.apic.pending().is_some() {
                        seen |= guest.apic.acknowledge() != 0x21;
                        guest.apic.eoi();
                    }
                    taken.fetch_add(seen.into(), Ordering::SeqCst);
                    seen
                },
            );
        });
    }
}

/// Changes of an address are seen whole and in order.
#[test]
fn addresses_are_never_half_a_change() {
    let mut guest = Guest::xapic();
    let inbox = Arc::clone(&guest.apic.inbox);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let seen = inbox.address();
                // LDR is written after ID with the same value, and before the next ID.
                let ahead = seen.xapic_id.wrapping_sub(seen.logical_id);
                assert!(ahead <= 1, "{seen:?}");
            }
        });
        for id in (0..=u8::MAX).cycle().take(20_000) {
            guest.store(ID, u32::from(id) << 24);
            guest.store(LDR, u32::from(id) << 24);
        }
        done.store(true, Ordering::Relaxed);
    });
}

/// A ring of local APICs, each on its own thread: each sends IPIs to the next one, which must have had the last
/// before it gets another.
#[test]
fn ipis_between_threads_all_arrive() {
    const VCPUS: u8 = 4;
    const IPIS: u32 = 200;
    let inboxes: Vec<_> = (0..VCPUS).map(|id| Arc::new(Inbox::new(id.into()))).collect();
    let received: Vec<AtomicU32> = (0..VCPUS).map(|_| AtomicU32::new(0)).collect();
    let guests: Vec<_> = inboxes
        .iter()
        .map(|inbox| {
            let apic = LocalApic::new(Arc::clone(inbox), FEATURES, false);
            let mut guest = Guest { apic, now: 0, tsc: 0 };
            guest.store(SVR, 0x1ff);
            guest
        })
        .collect();
    let watch = Watch::new();
    thread::scope(|scope| {
        for (index, mut guest) in guests.into_iter().enumerate() {
            let (inboxes, received, watch) = (&inboxes, &received, &watch);
            scope.spawn(move || {
                let next = (index + 1) % inboxes.len();
                let id = inboxes[next].x2apic_id();
                let sent = std::cell::Cell::new(0);
                watch.until(
                    || sent.get() == IPIS && received[index].load(Ordering::SeqCst) == IPIS,
                    || {
                        if sent.get() < IPIS && received[next].load(Ordering::SeqCst) == sent.get() {
                            guest.store(ICR_HIGH, id << 24);
                            let ApicAction::Ipi(message) = guest.act(ICR_LOW, 0x4041) else {
                                panic!("a command sends");
                            };
                            let took = deliver(inboxes, Some(index), message);
                            assert_eq!(took.iter().collect::<Vec<_>>(), [next]);
                            sent.set(sent.get() + 1);
                        }
                        guest.apic.drain();
                        let arrived = guest.apic.pending().is_some();
                        if arrived {
                            assert_eq!(guest.apic.acknowledge(), 0x41);
                            guest.store(EOI, 0);
                            received[index].fetch_add(1, Ordering::SeqCst);
                        }
                        arrived
                    },
                );
            });
        }
    });
}

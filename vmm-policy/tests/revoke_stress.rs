//! Threads that use channels as fast as they can while others take them away: nobody finds what is gone. `revoke_loom.rs` tries all
//! interleavings of the word that this rests on; here are the real ones, with the whole monitor around it.

#![allow(clippy::indexing_slicing, clippy::unwrap_used, missing_docs, reason = "a test")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vmm_policy::channel::Region;
use vmm_policy::{Action, Ends, Grant, Monitor, Object, Policy, Request, SubjectSpec, Uuid};

const ALIVE: u64 = 1;
const GONE: u64 = 2;

/// What a channel leads to. It says itself when it is used after it has been closed.
struct Thing {
    state: AtomicU64,
    /// How many are in it, by their own count.
    inside: AtomicU64,
}

struct Closes(Arc<Thing>);

impl Ends for Closes {
    fn close(&mut self) {
        assert_eq!(self.0.inside.load(Ordering::SeqCst), 0, "it is closed under somebody's hands");
        assert_eq!(self.0.state.swap(GONE, Ordering::SeqCst), ALIVE, "it is closed twice");
    }
}

type Slot = Mutex<Option<(Arc<Grant<Region>>, Arc<Thing>)>>;

#[test]
fn nobody_uses_what_was_taken_away() {
    let open = "labels l\nallow l to map-rw region of l";
    // On a busy machine, a thread may be away for long in the middle of a use.
    let patience = Duration::from_secs(60);
    let monitor = Monitor::builder(Policy::parse(open).unwrap()).patience(patience).build();
    let vm = |uuid| monitor.register(SubjectSpec::vm(Uuid::from_u128(uuid)).label("l")).unwrap();
    let (a, b) = (vm(1), vm(2));
    let slots: Arc<Vec<Slot>> = Arc::new((0..32).map(|_| Mutex::new(None)).collect());
    let done = Arc::new(AtomicBool::new(false));
    let used = Arc::new(AtomicU64::new(0));

    let users: Vec<_> = (0..3)
        .map(|seed| {
            let (slots, done, used) = (Arc::clone(&slots), Arc::clone(&done), Arc::clone(&used));
            thread::spawn(move || {
                let mut rng = fastrand::Rng::with_seed(seed);
                while !done.load(Ordering::Relaxed) {
                    let found = slots[rng.usize(..slots.len())].lock().unwrap().clone();
                    let Some((grant, thing)) = found else { continue };
                    for _ in 0..rng.usize(..20) {
                        let Some(_use) = grant.enter() else { break };
                        thing.inside.fetch_add(1, Ordering::SeqCst);
                        assert_eq!(thing.state.load(Ordering::SeqCst), ALIVE, "used after it was taken away");
                        if rng.u8(..) == 0 {
                            thread::yield_now();
                        }
                        assert_eq!(thing.state.load(Ordering::SeqCst), ALIVE, "taken away while it was used");
                        thing.inside.fetch_sub(1, Ordering::SeqCst);
                        used.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        })
        .collect();
    let opener = {
        let (slots, done, monitor) = (Arc::clone(&slots), Arc::clone(&done), monitor.clone());
        thread::spawn(move || {
            let mut rng = fastrand::Rng::with_seed(9);
            while !done.load(Ordering::Relaxed) {
                let request = Request::new(a, Action::MapRw, Object::region("r")).of(b);
                // Between two policies it is refused.
                let Ok(grant) = monitor.open::<Region>(&request) else { continue };
                let thing = Arc::new(Thing { state: AtomicU64::new(ALIVE), inside: AtomicU64::new(0) });
                grant.on_revoked(Closes(Arc::clone(&thing)));
                let place = &slots[rng.usize(..slots.len())];
                let before = place.lock().unwrap().replace((Arc::new(grant), thing));
                drop(before);
            }
        })
    };

    let (begin, mut revoked) = (Instant::now(), 0);
    let mut rng = fastrand::Rng::with_seed(5);
    while begin.elapsed() < Duration::from_secs(2) {
        let gone = match rng.u8(..4) {
            0 => monitor.reload(Policy::deny_all()).unwrap().revoked,
            1 => monitor.reload(Policy::parse(open).unwrap()).unwrap().revoked,
            2 => monitor.revoke_all(|_| true),
            _ => monitor.relabel(b, if rng.bool() { &["l"] } else { &[] }).unwrap_or_default(),
        };
        assert!(gone.iter().all(vmm_policy::Revocation::is_closed));
        revoked += gone.len();
        if rng.bool() {
            // Labels go with the policy that knows them.
            monitor.reload(Policy::parse(open).unwrap()).unwrap();
            monitor.relabel(a, &["l"]).unwrap();
            monitor.relabel(b, &["l"]).unwrap();
        }
        thread::yield_now();
    }
    done.store(true, Ordering::Relaxed);
    users.into_iter().for_each(|user| user.join().unwrap());
    opener.join().unwrap();
    let used = used.load(Ordering::Relaxed);
    assert!(revoked > 100 && used > 1000, "{revoked} taken away, {used} uses: that tests little");
}

//! Asks the processors of a guest for what several of them owe each other: work in parallel, locks, barriers, the order
//! of stores and loads, translations that are dropped everywhere, code that another one has written.
//!
//! A static program on std alone, which also runs on the host. `stress [ROUNDS]` ends with 0 and a line for each subject,
//! or with a panic that says what was wrong.

mod code;
mod locks;
mod order;
mod paging;
mod system;

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

/// What a subject is given.
struct Crew {
    /// Threads, each on a processor of its own.
    threads: usize,
    /// How often, relative to a short run.
    rounds: usize,
}

impl Crew {
    /// Runs `work` on every processor at once, and returns what each thread did, by processor.
    fn each<T: Send>(&self, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
        let (start, work) = (Barrier::new(self.threads), &work);
        thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads)
                .map(|cpu| {
                    let start = &start;
                    scope.spawn(move || {
                        system::stay_on(cpu);
                        start.wait();
                        work(cpu)
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("a thread of the crew")).collect()
        })
    }
}

/// Every thread waits, without giving up its processor, for all others: that ends only if all processors run.
fn parallel(crew: &Crew) {
    let arrived = AtomicUsize::new(0);
    let done = crew.each(|cpu| {
        for round in 1..=50 * crew.rounds {
            arrived.fetch_add(1, Ordering::SeqCst);
            while arrived.load(Ordering::SeqCst) < round * crew.threads {
                std::hint::spin_loop();
            }
            assert_eq!(system::current_cpu(), cpu);
        }
        // Some work whose result is known.
        (1..=20_000_u64 * crew.rounds as u64).fold(cpu as u64, |sum, n| sum.wrapping_mul(31).wrapping_add(n))
    });
    for (cpu, sum) in done.into_iter().enumerate() {
        let expected = (1..=20_000_u64 * crew.rounds as u64)
            .fold(cpu as u64, |sum, n| sum.wrapping_mul(31).wrapping_add(n));
        assert_eq!(sum, expected, "work of processor {cpu}");
    }
}

fn main() {
    let rounds = std::env::args().nth(1).map_or(1, |text| text.parse().expect("a number of rounds"));
    let crew =
        Crew { threads: thread::available_parallelism().expect("a number of processors").get(), rounds };
    let subjects: [(&str, fn(&Crew)); 12] = [
        ("all processors run at once", parallel),
        ("spin locks", locks::spin),
        ("ticket locks", locks::ticket),
        ("mutexes and conditions", locks::mutexes),
        ("barriers", locks::barriers),
        ("sequence locks", locks::sequence),
        ("stacks by CMPXCHG16B", locks::stack),
        ("locked accesses across cache lines", locks::split),
        ("stores and loads in order", order::all),
        ("pages that are replaced", paging::replaced),
        ("pages that lose their rights", paging::protected),
        ("code that is written", code::written),
    ];
    for (name, subject) in subjects {
        let start = Instant::now();
        subject(&crew);
        println!("{name}: ok, {} processors, {} ms", crew.threads, start.elapsed().as_millis());
    }
    println!("stress: ok");
}

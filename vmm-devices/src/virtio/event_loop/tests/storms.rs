//! Many threads at once.

use super::*;

/// Rings of a queue, by whatever way.
type Ring = Box<dyn Fn() + Send + Sync>;

fn clock() -> impl Clock {
    || 0
}

fn executors() -> Vec<(&'static str, Arc<dyn Executor>, Option<LoopThread>)> {
    let thread = EventLoop::new(clock()).unwrap().spawn("storm").unwrap();
    vec![
        ("EventLoop", thread.executor(), Some(thread)),
        ("ThreadPerQueue", Arc::new(ThreadPerQueue::new(clock())), None),
    ]
}

/// A worker does what lies on the pile, a few pieces in a call, and tells when `total` are done.
fn labourer(queue: u16, pile: Arc<AtomicU64>, total: u64, done: Sender<u64>) -> Box<dyn Worker> {
    let mut sum = 0;
    let (worker, _) = Probe::new(&[queue], move || {
        let (mut taken, mut progress) = (0, Progress::Idle);
        while pile.load(Ordering::SeqCst) > 0 {
            if taken == 7 {
                progress = Progress::More;
                break;
            }
            pile.fetch_sub(1, Ordering::SeqCst);
            taken += 1;
        }
        sum += taken;
        if sum == total && taken > 0 {
            done.send(sum).unwrap();
        }
        Ok(progress)
    });
    worker
}

/// A ring that is lost leaves work undone: the test then waits for ever.
#[test]
fn no_ring_of_a_storm_is_lost() {
    const EACH: u64 = 20_000;
    const QUEUES: u16 = 2;
    for (name, executor, _thread) in executors() {
        for by_kernel in [false, true] {
            println!("{name}, {}", if by_kernel { "by eventfd" } else { "by call" });
            let notifiers = executor.notifiers(usize::from(QUEUES)).unwrap();
            let doorbells = Arc::new(Doorbells::with_notifiers(usize::from(QUEUES), notifiers.into()));
            let piles = [0, 1].map(|_| Arc::new(AtomicU64::new(0)));
            let (done, all) = channel();
            let workers = (0..QUEUES)
                .zip(&piles)
                .map(|(queue, pile)| labourer(queue, Arc::clone(pile), 4 * EACH, done.clone()))
                .collect();
            let running = executor.start(Arc::new(LinkRecorder::default()), &doorbells, workers).unwrap();
            let rings = (0..QUEUES).map(|queue| -> Ring {
                let doorbells = Arc::clone(&doorbells);
                if !by_kernel {
                    return Box::new(move || doorbells.ring(queue));
                }
                let notifier = Arc::clone(doorbells.notifier(queue).unwrap());
                Box::new(move || poller::signal(&notifier))
            });
            let rings = Vec::from_iter(rings);
            thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        for _ in 0..EACH {
                            for (pile, ring) in piles.iter().zip(&rings) {
                                pile.fetch_add(1, Ordering::SeqCst);
                                ring();
                            }
                        }
                    });
                }
            });
            for _ in 0..QUEUES {
                assert_eq!(all.recv().unwrap(), 4 * EACH);
            }
            assert_eq!(running.stop().len(), usize::from(QUEUES));
        }
    }
}

/// One ring at a time, each answered before the next: there is no other ring to make up for one that is lost.
#[test]
fn no_single_ring_is_lost() {
    for (name, executor, _thread) in executors() {
        println!("{name}");
        let (asked, answers) = (Arc::new(AtomicU64::new(0)), channel());
        let (theirs, mut answered) = (Arc::clone(&asked), 0);
        let (worker, _) = Probe::new(&[0], move || {
            let asked = theirs.load(Ordering::SeqCst);
            if asked > answered {
                answered = asked;
                answers.0.send(asked).unwrap();
            }
            Ok(Progress::Idle)
        });
        let doorbells = Arc::new(Doorbells::new(1));
        let _running = executor.start(Arc::new(LinkRecorder::default()), &doorbells, vec![worker]).unwrap();
        for round in 1..=20_000 {
            asked.store(round, Ordering::SeqCst);
            doorbells.ring(0);
            assert_eq!(answers.1.recv().unwrap(), round);
        }
    }
}

/// Workers check that they are not called after a stop, nor by two threads, while devices come and go and everybody rings.
#[test]
fn devices_come_and_go_while_everybody_rings() {
    for (name, executor, _thread) in executors() {
        println!("{name}");
        let bells: Mutex<Arc<Doorbells>> = Mutex::new(Arc::new(Doorbells::new(2)));
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !over.load(Ordering::SeqCst) {
                        let current = Arc::clone(&lock(&bells));
                        (0..2).for_each(|queue| current.ring(queue));
                    }
                });
            }
            for round in 0..500 {
                let busy = Arc::new(AtomicBool::new(false));
                let link = LinkRecorder::default();
                let told = [0, 1].map(|queue| {
                    let (busy, mut calls) = (Arc::clone(&busy), 0);
                    Probe::new(&[queue], move || {
                        busy.store(true, Ordering::SeqCst);
                        calls += 1;
                        busy.store(false, Ordering::SeqCst);
                        Ok(if calls % 3 == 0 { Progress::Idle } else { Progress::More })
                    })
                });
                let ((a, of_a), (b, of_b)) = told.into();
                *lock(&of_a.deadline) = (round % 3 == 0).then_some(0);
                *lock(&of_b.deadline) = (round % 2 == 0).then_some(u64::MAX);
                let doorbells = Arc::new(Doorbells::new(2));
                let running = executor.start(Arc::new(link.clone()), &doorbells, vec![a, b]).unwrap();
                *lock(&bells) = Arc::clone(&doorbells);
                while round % 4 == 0 && of_b.calls() == 0 {
                    thread::yield_now();
                }
                let workers = running.stop();
                assert!(!busy.load(Ordering::SeqCst), "no call is under way");
                assert_eq!((workers.len(), of_a.stops(), of_b.stops()), (2, 1, 1));
                assert!(link.failures().is_empty(), "{:?}", link.failures());
            }
            over.store(true, Ordering::SeqCst);
        });
    }
}

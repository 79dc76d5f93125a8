//! A thread for each worker.

use super::*;

#[test]
fn each_worker_has_a_thread_of_its_own_with_a_name() {
    let (tell, told) = channel();
    let hooked = tell.clone();
    let executor = ThreadPerQueue::new(|| 0).name("disk").on_start(move |queues| {
        hooked.send((format!("hook {queues:?}"), thread::current().name().map(str::to_owned))).unwrap();
        Ok(())
    });
    let worker = |queues: &[u16]| {
        let (tell, text) = (tell.clone(), format!("call {queues:?}"));
        let mut first = true;
        let (worker, _) = Probe::new(queues, move || {
            if std::mem::take(&mut first) {
                tell.send((text.clone(), thread::current().name().map(str::to_owned))).unwrap();
            }
            Ok(Progress::Idle)
        });
        worker as Box<dyn Worker>
    };
    let (doorbells, workers) =
        (Arc::new(Doorbells::new(4)), vec![worker(&[0]), worker(&[2, 1]), worker(&[])]);
    let running = executor.start(Arc::new(LinkRecorder::default()), &doorbells, workers).unwrap();
    let mut heard = Vec::from_iter(told.iter().take(6).map(|(text, name)| (text, name.unwrap())));
    heard.sort();
    let expected = [
        ("call [0]", "disk-q0"),
        ("call [2, 1]", "disk-q2"),
        ("call []", "disk-w2"),
        ("hook [0]", "disk-q0"),
        ("hook [2, 1]", "disk-q2"),
        ("hook []", "disk-w2"),
    ];
    assert_eq!(heard, expected.map(|(text, name)| (text.to_owned(), name.to_owned())));
    assert_eq!(running.stop().len(), 3);
}

#[test]
fn a_hook_that_fails_refuses_the_start() {
    let panics = |queues: &[u16]| if queues == [1] { panic!("no such processor") } else { Ok(()) };
    let fails =
        |queues: &[u16]| if queues == [1] { Err(io::Error::other("no such processor")) } else { Ok(()) };
    let executors = [ThreadPerQueue::new(|| 0).on_start(panics), ThreadPerQueue::new(|| 0).on_start(fails)];
    for executor in executors {
        let ((a, of_a), (b, of_b)) = (Probe::idle(&[0]), Probe::idle(&[1]));
        let doorbells = Arc::new(Doorbells::new(2));
        let refused = executor.start(Arc::new(LinkRecorder::default()), &doorbells, vec![a, b]);
        let text = refused.err().unwrap().to_string();
        assert!(["no such processor", "the thread's start hook panicked"].contains(&&*text), "{text}");
        assert_eq!((of_a.calls(), of_b.calls()), (0, 0));
        assert!(of_a.dropped.load(Ordering::SeqCst) && of_b.dropped.load(Ordering::SeqCst));
    }
    let (worker, _) = Probe::idle(&[0]);
    let executor = ThreadPerQueue::new(|| 0).name("a\0b");
    let refused =
        executor.start(Arc::new(LinkRecorder::default()), &Arc::new(Doorbells::new(1)), vec![worker]);
    assert_eq!(refused.err().unwrap().to_string(), r#"thread name "a\0b-q0" contains a byte of 0"#);
}

#[test]
fn a_clock_that_is_set_is_told_to_all() {
    let clock = Arc::new(ManualClock::default());
    let executor = ThreadPerQueue::new(Arc::clone(&clock));
    let (called, calls) = channel();
    let worker = |queue| {
        let (called, clock) = (called.clone(), Arc::clone(&clock));
        let (worker, told) = Probe::new(&[queue], move || {
            called.send(clock.now_ns()).unwrap();
            Ok(Progress::Idle)
        });
        *lock(&told.deadline) = Some(u64::MAX - 1);
        worker as Box<dyn Worker>
    };
    let (doorbells, workers) = (Arc::new(Doorbells::new(2)), vec![worker(0), worker(1)]);
    let running = executor.start(Arc::new(LinkRecorder::default()), &doorbells, workers).unwrap();
    for _ in 0..2 {
        assert_eq!(calls.recv().unwrap(), 0, "the call at the start");
    }
    clock.set(u64::MAX);
    executor.wake();
    for _ in 0..2 {
        while calls.recv().unwrap() == 0 {}
    }
    drop(running.stop());
    executor.wake();
}

thread_local! {
    static LAST: std::cell::RefCell<Option<Last>> = const { std::cell::RefCell::new(None) };
}

/// Goes with its thread.
struct Last(Arc<AtomicBool>);

impl Drop for Last {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn threads_have_ended_when_what_they_served_is_stopped() {
    for round in 0..100 {
        let ended = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&ended);
        let remember = move || LAST.set(Some(Last(Arc::clone(&theirs))));
        let doorbells = Arc::new(Doorbells::new(1));
        if round % 2 == 0 {
            let (worker, _) = Probe::idle(&[0]);
            let executor = ThreadPerQueue::new(|| 0).on_start(move |_| {
                remember();
                Ok(())
            });
            let link = Arc::new(LinkRecorder::default());
            drop(executor.start(link, &doorbells, vec![worker]).unwrap().stop());
        } else {
            let (tell, told) = channel();
            let (worker, _) = Probe::new(&[0], move || {
                remember();
                tell.send(()).unwrap();
                Ok(Progress::Idle)
            });
            let thread = EventLoop::new(|| 0).unwrap().spawn("last").unwrap();
            let link = Arc::new(LinkRecorder::default());
            let running = thread.executor().start(link, &doorbells, vec![worker]).unwrap();
            told.recv().unwrap();
            drop(thread);
            drop(running);
        }
        assert!(ended.load(Ordering::SeqCst));
    }
}

/// The thread cannot wait for its own end either.
#[test]
fn a_worker_that_stops_its_own_device_ends_its_thread() {
    let executor = ThreadPerQueue::new(|| 0);
    let running: Arc<Mutex<Option<Box<dyn Running>>>> = Arc::default();
    let (theirs, (tell, told)) = (Arc::clone(&running), channel());
    let (worker, of_worker) = Probe::new(&[0], move || {
        if let Some(running) = lock(&theirs).take() {
            tell.send(running.stop().len()).unwrap();
        }
        Ok(Progress::More)
    });
    let link = LinkRecorder::default();
    let doorbells = Arc::new(Doorbells::new(1));
    *lock(&running) = Some(executor.start(Arc::new(link.clone()), &doorbells, vec![worker]).unwrap());
    assert_eq!(told.recv().unwrap(), 0);
    // The sender goes with the worker.
    assert!(told.recv().is_err());
    assert!(of_worker.dropped.load(Ordering::SeqCst));
    assert_eq!((of_worker.stops(), link.failures().len()), (1, 1));
}

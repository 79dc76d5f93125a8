use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::event::{Action, Kind, Object, ObjectClass, Verdict};
use crate::gaps::{Account, gaps};
use crate::keys::MemoryKeys;
use crate::storage::MemoryStorage;
use crate::storage::faulty::{Faults, FaultyStorage};
use crate::verify::{VerifyOptions, verify};

const LONG: Duration = Duration::from_secs(60);

/// When a test fails, the disk answers again, so that the log can end.
struct Disk(Faults);

impl Drop for Disk {
    fn drop(&mut self) {
        self.0.stall(false);
    }
}

impl std::ops::Deref for Disk {
    type Target = Faults;

    fn deref(&self) -> &Faults {
        &self.0
    }
}

struct Bench {
    memory: MemoryStorage,
    // Dropped before the log.
    faults: Disk,
    log: AuditLog,
}

fn bench(options: PipelineOptions) -> Bench {
    let memory = MemoryStorage::new();
    let (faulty, faults) = FaultyStorage::new(memory.clone());
    let keys = Box::new(MemoryKeys::new());
    // Publishing waits for the disk as well, which is not what stands still here.
    let published = LogOptions::new().publish_every(LONG * 60);
    let (log, _) = AuditLog::open(Arc::new(faulty), keys, "log.example", published, options).unwrap();
    log.flush(LONG).unwrap();
    Bench { memory, faults: Disk(faults), log }
}

impl Bench {
    /// Closes the log, and the accounts of it, after checking that it is intact and that they add up.
    fn close(self) -> Vec<Account> {
        let key = self.log.verifier().clone();
        self.log.close().unwrap();
        let result = verify(&self.memory, &VerifyOptions::new(key), &mut |_, _| ()).unwrap();
        assert!(result.intact && result.closed, "{:?}", result.findings);
        let gaps = gaps(Arc::new(self.memory)).unwrap();
        for account in &gaps.accounts {
            assert_eq!(account.issued, account.written + account.counted, "{account:?}");
            assert!(account.ended && account.missing == 0);
        }
        gaps.accounts
    }

    /// Has the disk stand still, and waits until a batch is on its way and the next one is full, so that the rings are not emptied
    /// any more. How many events that takes.
    fn stall(&self, emitter: &Emitter) -> u64 {
        // Else it may be that of what came before which stands still, and this stays in the ring.
        self.log.flush(LONG).unwrap();
        self.faults.stall(true);
        let syncs = self.faults.operations();
        self.emit_and_wait(emitter);
        let begun = Instant::now();
        while self.faults.operations() < syncs + 2 {
            assert!(begun.elapsed() < LONG);
            std::thread::sleep(Duration::from_millis(1));
        }
        let next = self.log.local.options.batch;
        (0..next).for_each(|_| self.emit_and_wait(emitter));
        next as u64 + 1
    }

    fn emit_and_wait(&self, emitter: &Emitter) {
        emitter.emit(&open()).unwrap();
        let begun = Instant::now();
        while self.log.status().waiting != (0, 0) {
            assert!(begun.elapsed() < LONG);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn open() -> Event {
    Event::new(Kind::Opened).action(Action::Connect).object(Object::numbered(ObjectClass::Vsock, 1))
}

fn bulk(bytes: u64) -> Event {
    Event::new(Kind::Traffic).action(Action::Send).verdict(Verdict::Allow).amount(0, bytes)
}

fn vm() -> Party {
    Party::vm(7, 1)
}

#[test]
fn what_is_emitted_is_in_the_log() {
    let bench = bench(PipelineOptions::new());
    let emitter = bench.log.emitter(vm());
    for n in 0..1000 {
        assert_eq!(emitter.emit(&bulk(n)), Ok(Emitted::Queued));
    }
    let receipt = emitter.admit(&open()).unwrap();
    let seq = receipt.wait(LONG).unwrap().unwrap();
    assert!(bench.log.status().acknowledged > seq);
    let accounts = bench.close();
    assert_eq!((accounts.len(), accounts[0].written, accounts[0].counted), (1, 1002, 0));
    assert_eq!(accounts[0].who.as_deref(), Some("vm 00000000-0000-0000-0000-000000000007#1"));
}

#[test]
fn a_full_ring_counts_bulk_events_exactly() {
    let bench = bench(PipelineOptions::new().rings(64, 16).batch(4));
    let emitter = bench.log.emitter(vm());
    let before = bench.stall(&emitter);
    let (mut queued, mut bytes) = (0, 0);
    for n in 0..100 {
        match emitter.emit(&bulk(n)).unwrap() {
            Emitted::Queued => queued += 1,
            Emitted::Counted => bytes += n,
        }
    }
    assert_eq!(queued, 16);
    assert_eq!(emitter.counted(), 84);
    // Bulk events have taken no place of critical ones.
    assert_eq!(emitter.emit(&open()), Ok(Emitted::Queued));
    bench.faults.stall(false);
    bench.log.flush(LONG).unwrap();
    let memory = bench.memory.clone();
    let accounts = bench.close();
    // And what introduced the emitter, and the critical one.
    assert_eq!((accounts[0].counted, accounts[0].written), (84, 16 + before + 2));
    let mut entries = crate::Entries::new(Arc::new(memory));
    let mut coalesced = Vec::new();
    while let Some(item) = entries.next().unwrap() {
        if let crate::Item::Entry(found) = item {
            coalesced.extend(found.event.ok().filter(|event| event.kind == Kind::Coalesced));
        }
    }
    let last = coalesced.last().unwrap();
    assert_eq!((last.count, last.bytes, last.get("of")), (84, bytes, Some("traffic")));
    assert_eq!((last.action, last.verdict), (Some(Action::Send), Some(Verdict::Allow)));
}

#[test]
fn a_full_reserved_ring_counts_what_has_happened() {
    let bench = bench(PipelineOptions::new().rings(8, 8).batch(4).deadline(LONG));
    let emitter = bench.log.emitter(vm());
    bench.stall(&emitter);
    let queued = (0..20).filter(|_| emitter.emit(&open()) == Ok(Emitted::Queued)).count();
    assert_eq!(queued, 8);
    bench.faults.stall(false);
    assert_eq!(bench.close()[0].counted, 12);
}

#[test]
fn what_cannot_be_written_within_the_deadline_is_refused() {
    let deadline = Duration::from_millis(200);
    let bench = bench(PipelineOptions::new().batch(4).deadline(deadline));
    let emitter = bench.log.emitter(vm());
    bench.stall(&emitter);
    // Within the deadline: it goes on.
    let receipt = emitter.admit(&open()).unwrap();
    assert_eq!(receipt.wait(Duration::from_millis(1)), Err(NotDurable::Timeout(Duration::from_millis(1))));
    std::thread::sleep(deadline);
    let begun = Instant::now();
    let refused = emitter.admit(&open()).unwrap_err();
    assert!(matches!(refused, Refused::Stalled(for_) if for_ >= deadline), "{refused}");
    assert!(begun.elapsed() < deadline, "it must not wait again");
    // What is established goes on.
    assert_eq!(emitter.emit(&bulk(1)), Ok(Emitted::Queued));
    bench.faults.stall(false);
    receipt.wait(LONG).unwrap();
    // And opens are admitted again once the disk answers.
    bench.log.flush(LONG).unwrap();
    emitter.admit(&open()).unwrap().wait(LONG).unwrap();
    assert_eq!(bench.close()[0].counted, 1);
}

#[test]
fn a_reserved_ring_that_stays_full_refuses_after_the_deadline() {
    let deadline = Duration::from_millis(300);
    let bench = bench(PipelineOptions::new().rings(4, 4).batch(4).deadline(deadline));
    let emitter = bench.log.emitter(vm());
    bench.stall(&emitter);
    (0..4).for_each(|_| assert_eq!(emitter.emit(&open()), Ok(Emitted::Queued)));
    let begun = Instant::now();
    assert!(emitter.admit(&open()).is_err());
    let waited = begun.elapsed();
    assert!(waited >= deadline / 4 && waited < deadline * 10, "{waited:?}");
    bench.faults.stall(false);
    assert_eq!(bench.close()[0].counted, 1);
}

#[test]
fn room_that_comes_within_the_deadline_admits() {
    let bench = bench(PipelineOptions::new().rings(4, 4).batch(4).deadline(LONG));
    let emitter = bench.log.emitter(vm());
    bench.stall(&emitter);
    (0..4).for_each(|_| assert_eq!(emitter.emit(&open()), Ok(Emitted::Queued)));
    let faults = bench.faults.0.clone();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        faults.stall(false);
    });
    emitter.admit(&open()).unwrap().wait(LONG).unwrap();
    thread.join().unwrap();
    assert_eq!(bench.close()[0].counted, 0);
}

#[test]
fn a_failed_synchronisation_refuses_everything_and_tells_who_waits() {
    let bench = bench(PipelineOptions::new());
    let emitter = bench.log.emitter(vm());
    bench.log.flush(LONG).unwrap();
    bench.faults.sync_fails(true);
    let receipt = emitter.admit(&open()).unwrap();
    assert!(
        matches!(receipt.wait(LONG), Err(NotDurable::Failed(why)) if why.contains("failed to reach the disk"))
    );
    assert!(bench.log.status().failed.is_some());
    assert!(matches!(emitter.admit(&open()), Err(Refused::Closed(_))));
    assert_eq!(emitter.emit(&open()), Ok(Emitted::Counted));
    assert!(bench.log.flush(LONG).is_err());
    assert!(bench.log.close().is_err());
}

#[test]
fn a_full_disk_is_surfaced_and_written_down_when_it_is_over() {
    let bench = bench(PipelineOptions::new().deadline(Duration::from_millis(100)));
    let emitter = bench.log.emitter(vm());
    bench.log.flush(LONG).unwrap();
    bench.faults.disk_has_room_for(Some(10));
    let receipt = emitter.admit(&open()).unwrap();
    let begun = Instant::now();
    while bench.log.status().stuck.is_none() {
        assert!(begun.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(150));
    assert!(matches!(emitter.admit(&open()), Err(Refused::Stalled(_))));
    bench.faults.disk_has_room_for(None);
    receipt.wait(LONG).unwrap();
    bench.log.flush(LONG).unwrap();
    assert_eq!(bench.log.status().stuck, None);
    let memory = bench.memory.clone();
    bench.close();
    let mut entries = crate::Entries::new(Arc::new(memory));
    let mut faults = 0;
    while let Some(item) = entries.next().unwrap() {
        if let crate::Item::Entry(found) = item {
            faults += usize::from(found.event.is_ok_and(|event| event.kind == Kind::StorageFault));
        }
    }
    assert_eq!(faults, 1);
}

/// Many threads, small rings, a disk that stops and goes: whatever happens, the numbers add up.
#[test]
fn counters_are_exact_under_load() {
    let bench = bench(PipelineOptions::new().rings(16, 32).batch(64));
    let emitters: Vec<_> = (0..3).map(|n| bench.log.emitter(Party::vm(n, 1))).collect();
    std::thread::scope(|scope| {
        for n in 0..6 {
            let emitter = emitters[n % 3].clone();
            scope.spawn(move || {
                for m in 0..3000u64 {
                    let event = if m % 10 == 0 { open() } else { bulk(m) };
                    emitter.emit(&event).unwrap();
                    if m % 50 == 0 {
                        drop(emitter.admit(&open()));
                    }
                }
            });
        }
        let faults = bench.faults.0.clone();
        scope.spawn(move || {
            for _ in 0..20 {
                faults.stall(true);
                std::thread::sleep(Duration::from_millis(3));
                faults.stall(false);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    });
    let accounts = bench.close();
    assert_eq!(accounts.len(), 3);
    for account in accounts {
        assert_eq!(account.issued, 2 * (3000 + 60) + 1);
    }
}

#[test]
fn an_emitter_that_is_gone_is_written_down() {
    let bench = bench(PipelineOptions::new());
    let emitter = bench.log.emitter(vm());
    emitter.emit(&bulk(1)).unwrap();
    drop(emitter);
    let begun = Instant::now();
    let gone = |bench: &Bench| gaps(Arc::new(bench.memory.clone())).unwrap().accounts.iter().all(|a| a.ended);
    bench.log.flush(LONG).unwrap();
    while !gone(&bench) {
        assert!(begun.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(bench.close()[0].written, 2);
}

#[test]
fn a_log_that_is_idle_says_that_it_is_alive() {
    let bench = bench(PipelineOptions::new().heartbeat(Duration::from_millis(20)));
    let before = bench.log.status().acknowledged;
    let begun = Instant::now();
    while bench.log.status().acknowledged < before + 3 {
        assert!(begun.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(5));
    }
    bench.close();
}

#[test]
fn an_event_that_is_too_long_is_accounted_for() {
    let bench = bench(PipelineOptions::new());
    let emitter = bench.log.emitter(vm());
    let mut event = open();
    for n in 0..20 {
        event = event.attribute(n.to_string(), "x");
    }
    assert!(emitter.emit(&event).is_err());
    assert!(matches!(emitter.admit(&event), Err(Refused::Event(_))));
    assert_eq!(bench.close()[0].counted, 2);
}

//! What the audit log costs. `cargo bench -p vmm-audit --bench pipeline`; with a directory as argument, on that disk.
//!
//! Each figure is one line, so that programs find them: `emit_p99: X ns`, `durable: N events/s`, `verify: G GB/s`.

#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

use std::hint::black_box;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_audit::Digest;
use vmm_audit::event::{Action, Event, Kind, Object, ObjectClass, Party, Verdict};
use vmm_audit::keys::MemoryKeys;
use vmm_audit::log::{LogOptions, LogWriter};
use vmm_audit::pipeline::{AuditLog, Emitted, Emitter, PipelineOptions};
use vmm_audit::sink::{Delivery, Journald, Sink as _};
use vmm_audit::storage::{FsStorage, Storage};
use vmm_audit::verify::{VerifyOptions, verify};

const ORIGIN: &str = "bench.example/audit";
const LONG: Duration = Duration::from_secs(300);

fn event(n: u64) -> Event {
    Event::new(Kind::Traffic)
        .subject(Party::vm(0x1111_2222_3333_4444_5555_6666_7777_8888, 3))
        .peer(Party::vm(0x9999_2222_3333_4444_5555_6666_7777_8888, 9))
        .action(Action::Connect)
        .object(Object::numbered(ObjectClass::Vsock, 5000 + n % 100))
        .verdict(Verdict::Allow)
        .rule("web-to-db", 120)
        .policy(Digest::of(b"policy"))
}

struct Place(PathBuf, Option<tempfile::TempDir>);

impl Place {
    fn storage(&self, name: &str) -> Arc<FsStorage> {
        let path = self.0.join(name);
        if path.exists() {
            std::fs::remove_dir_all(&path).expect("an old log can be removed");
        }
        Arc::new(FsStorage::create(path).expect("a directory"))
    }
}

fn open(storage: Arc<dyn Storage>, options: PipelineOptions) -> AuditLog {
    AuditLog::open(storage, Box::new(MemoryKeys::new()), ORIGIN, LogOptions::new(), options).expect("a log").0
}

/// Nanoseconds of single emits, sorted, at a rate that the log keeps up with; and how many were counted only.
fn emit_latencies(emitters: Vec<Emitter>, each: usize, rate: u64) -> (Vec<u64>, u64) {
    let threads: Vec<_> = emitters
        .into_iter()
        .map(|emitter| {
            std::thread::spawn(move || {
                let events: Vec<_> = (0..64).map(event).collect();
                let mut times = Vec::with_capacity(each);
                let (mut counted, begun) = (0, Instant::now());
                for n in 0..each {
                    let due = Duration::from_nanos(n as u64 * 1_000_000_000 / rate);
                    // In bursts of 64, as devices do.
                    if n % 64 == 0 {
                        while begun.elapsed() < due {
                            std::thread::sleep(Duration::from_micros(50));
                        }
                    }
                    let at = Instant::now();
                    let emitted = emitter.emit(black_box(&events[n % 64])).expect("an event");
                    times.push(u64::try_from(at.elapsed().as_nanos()).unwrap_or(u64::MAX));
                    counted += u64::from(emitted == Emitted::Counted);
                }
                (times, counted)
            })
        })
        .collect();
    let (mut all, mut counted) = (Vec::new(), 0);
    for thread in threads {
        let (times, count) = thread.join().expect("no panic");
        all.extend(times);
        counted += count;
    }
    all.sort_unstable();
    (all, counted)
}

fn clock_cost() -> u64 {
    let mut times: Vec<_> = (0..10_000).map(|_| Instant::now().elapsed().as_nanos()).collect();
    times.sort_unstable();
    u64::try_from(times[times.len() / 2]).unwrap_or(0)
}

fn emit(place: &Place) {
    println!("clock: {} ns, which is in each figure of emit", clock_cost());
    for producers in [1, 8] {
        let log = open(place.storage("emit"), PipelineOptions::new().rings(4096, 1 << 17));
        let emitters = (0..producers).map(|n| log.emitter(Party::vm(n, 1))).collect();
        let (times, counted) =
            emit_latencies(emitters, 400_000 / producers as usize, 200_000 / producers as u64);
        let at = |p: f64| times[((times.len() - 1) as f64 * p) as usize];
        let name = if producers == 1 { String::new() } else { format!("_{producers}") };
        println!("emit{name}_p50: {} ns", at(0.50));
        println!("emit{name}_p99: {} ns", at(0.99));
        println!("emit{name}_p999: {} ns ({counted} of {} counted only)", at(0.999), times.len());
        log.close().expect("closes");
    }
}

/// Events a second through the whole pipeline, from the first emit to the disk having the last.
fn durable(place: &Place) -> f64 {
    let storage = place.storage("durable");
    let log = open(storage.clone(), PipelineOptions::new().rings(4096, 1 << 16).batch(1 << 16));
    let emitter = log.emitter(Party::vm(1, 1));
    let events: Vec<_> = (0..64).map(event).collect();
    let (count, begun) = (2_000_000u64, Instant::now());
    for n in 0..count {
        // Waits for room: what is measured is what the log takes, not what it counts.
        while log.status().waiting.1 >= (1 << 16) - 1 {
            std::thread::sleep(Duration::from_micros(100));
        }
        emitter.emit(&events[n as usize % 64]).expect("an event");
    }
    log.flush(LONG).expect("the disk answers");
    let rate = count as f64 / begun.elapsed().as_secs_f64();
    println!("durable: {rate:.0} events/s");
    let counted = log.status().counted;
    log.close().expect("closes");
    // With what the emitter sets.
    let mut sent = events[0].clone();
    (sent.monotonic, sent.wall, sent.source_seq) = (1, 1, count);
    let payload = sent.encode().expect("an event").len() as u64 + 2;
    let files = total(&*storage, "");
    let written = count - counted;
    println!("durable_counted_only: {counted} events");
    println!(
        "bytes_per_event: {:.1}, of which {payload} are the entry and {:.1} overhead",
        files as f64 / written as f64,
        files as f64 / written as f64 - payload as f64
    );
    rate
}

fn total(storage: &dyn Storage, folder: &str) -> u64 {
    let listed = storage.list(folder).expect("a folder");
    let sizes = listed.iter().map(|listed| {
        let path = if folder.is_empty() { listed.name.clone() } else { format!("{folder}/{}", listed.name) };
        if listed.folder { total(storage, &path) } else { listed.length }
    });
    sizes.sum()
}

/// The same bytes, written and synchronised in the plainest way.
fn plain(place: &Place) {
    let bytes = event(1).encode().expect("an event");
    for batch in [1usize, 1024, 8192] {
        let mut file = std::fs::File::create(place.0.join("plain")).expect("a file");
        let block = bytes.repeat(batch);
        let (mut written, begun) = (0, Instant::now());
        while begun.elapsed() < Duration::from_secs(2) {
            file.write_all(&block).expect("room");
            file.sync_data().expect("a disk");
            written += batch;
        }
        let rate = written as f64 / begun.elapsed().as_secs_f64();
        println!("plain_write_fdatasync_{batch}: {rate:.0} events/s");
    }
    std::fs::remove_file(place.0.join("plain")).expect("it is there");
}

fn journald() {
    let Ok(mut journal) = Journald::new() else { return println!("journald: skipped, no socket") };
    let (mut sent, begun) = (0u64, Instant::now());
    while begun.elapsed() < Duration::from_secs(2) {
        let delivery = Delivery { seq: sent, source: 1, event: event(sent) };
        if let Err(error) = journal.send(&delivery) {
            return println!("journald: skipped, {error}");
        }
        sent += 1;
    }
    println!(
        "journald: {:.0} events/s, sent and not known to be on the disk",
        sent as f64 / begun.elapsed().as_secs_f64()
    );
}

fn verified(place: &Place) {
    let storage = FsStorage::existing(place.0.join("durable")).expect("the log of before");
    let note = storage.read("checkpoint", 1 << 14).expect("readable").expect("published");
    drop(note);
    // Another log, whose key is known, of the same events.
    let storage = place.storage("verify");
    let (mut log, _) =
        LogWriter::open(storage.clone(), Box::new(MemoryKeys::new()), ORIGIN, LogOptions::new())
            .expect("a log");
    let bytes: Vec<_> = (0..64).map(|n| event(n).encode().expect("an event")).collect();
    for n in 0..1_000_000usize {
        log.append(1, &bytes[n % 64]).expect("memory");
        if n % 8192 == 0 {
            log.commit().expect("a disk");
        }
    }
    let key = log.verifier().clone();
    log.close().expect("closes");
    let begun = Instant::now();
    let result = verify(&*storage, &VerifyOptions::new(key), &mut |_, _| ()).expect("readable");
    assert!(result.intact, "{:?}", result.findings);
    let seconds = begun.elapsed().as_secs_f64();
    println!("verify: {:.2} GB/s", result.bytes as f64 / 1e9 / seconds);
    println!(
        "verify_entries: {:.0} entries/s, chain, tree, tiles and signatures, on one core",
        result.size as f64 / seconds
    );
    // What of that the hash chain by itself is.
    let block = vec![0u8; 1 << 20];
    let begun = Instant::now();
    for _ in 0..512 {
        black_box(Digest::of(black_box(&block)));
    }
    println!(
        "chain: {:.2} GB/s, which is SHA-256 and nothing else",
        512.0 * f64::from(1 << 20) / 1e9 / begun.elapsed().as_secs_f64()
    );
}

fn main() {
    // Cargo passes `--bench`.
    let place = match std::env::args().skip(1).find(|argument| !argument.starts_with('-')) {
        Some(path) => Place(PathBuf::from(path), None),
        None => {
            let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
            Place(folder.path().to_owned(), Some(folder))
        }
    };
    emit(&place);
    durable(&place);
    plain(&place);
    journald();
    verified(&place);
    drop(place.1);
}

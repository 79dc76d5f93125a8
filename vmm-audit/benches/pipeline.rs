//! What the audit log costs. `cargo bench -p vmm-audit --bench pipeline`; with a directory as argument, on that disk; with
//! `emit`, `durable`, `plain`, `journald` or `verify`, those only.
//!
//! Each figure is one line, so that programs find them: `emit_p99: X ns`, `durable: N events/s`, `verify: G GB/s`. What is about a core is
//! by the time that the thread had one; what is about time that passes is by the wall clock, with the share of it that it ran.
//! A machine with less processors than threads preempts some of them within an emit: then the last percent is the scheduler's.

#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

use std::hint::black_box;
use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
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

/// A new directory, which is removed at the end: ext4 looks for a free inode past all that were freed in the last seconds, so that
/// removing in between would be measured.
struct Place(tempfile::TempDir);

impl Place {
    fn storage(&self, name: &str) -> Arc<FsStorage> {
        Arc::new(FsStorage::create(self.0.path().join(name)).expect("a directory"))
    }
}

/// Seconds that passed, and seconds that this thread and this process had a processor.
struct Clocks(Instant, Duration, Duration);

impl Clocks {
    fn start() -> Self {
        Self(Instant::now(), cpu(ClockId::ThreadCPUTime), cpu(ClockId::ProcessCPUTime))
    }

    fn stop(&self) -> (f64, f64, f64) {
        let thread = cpu(ClockId::ThreadCPUTime) - self.1;
        let process = cpu(ClockId::ProcessCPUTime) - self.2;
        (self.0.elapsed().as_secs_f64(), thread.as_secs_f64(), process.as_secs_f64())
    }
}

fn cpu(clock: ClockId) -> Duration {
    let now = clock_gettime(clock);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
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
        let log =
            open(place.storage(&format!("emit-{producers}")), PipelineOptions::new().rings(4096, 1 << 15));
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
fn durable(place: &Place) {
    const RING: usize = 1 << 16;
    let storage = place.storage("durable");
    let log = open(storage.clone(), PipelineOptions::new().rings(4096, RING).batch(1 << 15));
    let emitter = log.emitter(Party::vm(1, 1));
    let events: Vec<_> = (0..64).map(event).collect();
    let (count, clocks) = (3_000_000u64, Clocks::start());
    let mut room = RING;
    for n in 0..count {
        // Waits for room: what is measured is what the log takes, not what it counts.
        while room == 0 {
            room = (RING - 1).saturating_sub(log.status().waiting.1);
            if room < RING / 4 {
                room = 0;
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        room -= 1;
        emitter.emit(&events[n as usize % 64]).expect("an event");
    }
    log.flush(LONG).expect("the disk answers");
    let (seconds, thread, process) = clocks.stop();
    println!("durable: {:.0} events/s", count as f64 / seconds);
    println!(
        "durable_cpu: {:.0} ns an event to emit it, {:.0} ns to write it down; {:.0} events for each second of a processor",
        thread * 1e9 / count as f64,
        (process - thread) * 1e9 / count as f64,
        count as f64 / process
    );
    println!(
        "durable_share: {:.2} of the processors that it would have taken, had they been free",
        process / seconds
    );
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
        let mut file = std::fs::File::create(place.0.path().join("plain")).expect("a file");
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
    std::fs::remove_file(place.0.path().join("plain")).expect("it is there");
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

/// A gigabyte a second of a core of `f`, which does `bytes`.
fn rate(bytes: usize, mut f: impl FnMut()) -> f64 {
    let (clocks, mut done) = (Clocks::start(), 0);
    while clocks.0.elapsed() < Duration::from_millis(700) {
        f();
        done += bytes;
    }
    done as f64 / 1e9 / clocks.stop().1
}

fn verified(place: &Place) {
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
    // What it rests on: the hash and the checksum by themselves.
    let block = vec![0u8; 1 << 20];
    let sha = rate(block.len(), || {
        black_box(Digest::of(black_box(&block)));
    });
    let crc = rate(block.len(), || {
        black_box(crc32c::crc32c(black_box(&block)));
    });
    println!("sha256: {sha:.2} GB/s, crc32c: {crc:.2} GB/s, a core, nothing else");
    for (name, tree) in [("verify", true), ("verify_chain", false)] {
        let clocks = Clocks::start();
        let options = VerifyOptions::new(key.clone()).tree(tree);
        let result = verify(&*storage, &options, &mut |_, _| ()).expect("readable");
        let (seconds, thread, _) = clocks.stop();
        assert!(result.intact, "{:?}", result.findings);
        let (entries, size) = (result.size as f64, result.bytes as f64);
        println!("{name}: {:.2} GB/s", size / 1e9 / thread);
        println!(
            "{name}_entries: {:.0} entries/s a core; {:.2} GB/s by the wall clock",
            entries / thread,
            size / 1e9 / seconds
        );
        // In blocks of 64 bytes with the padding: the chain over all; a leaf of a byte and the entry; a node of 65 bytes.
        let leaf = (bytes[0].len() + 3 + 9).div_ceil(64) * 64;
        let hashed = size + if tree { entries * (leaf as f64 + 128.0) } else { 0.0 };
        let ceiling = sha * size / hashed;
        println!(
            "{name}_ceiling: {ceiling:.2} GB/s at that rate of SHA-256, which is over {:.2} bytes for each of the log; {:.0} % of it",
            hashed / size,
            size / 1e9 / thread / ceiling * 100.0
        );
    }
}

fn main() {
    // Cargo passes `--bench`.
    let parts = ["emit", "durable", "plain", "journald", "verify"];
    let arguments: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let folder = arguments.iter().find(|argument| !parts.contains(&argument.as_str()));
    let folder = folder.map_or(env!("CARGO_TARGET_TMPDIR"), String::as_str);
    let place = Place(tempfile::tempdir_in(folder).expect("a directory"));
    let asked = |part: &str| {
        let none = !arguments.iter().any(|argument| parts.contains(&argument.as_str()));
        none || arguments.iter().any(|argument| argument == part)
    };
    println!("processors: {}", std::thread::available_parallelism().map_or(0, usize::from));
    if asked("emit") {
        emit(&place);
    }
    if asked("durable") {
        durable(&place);
    }
    if asked("plain") {
        plain(&place);
    }
    if asked("journald") {
        journald();
    }
    if asked("verify") {
        verified(&place);
    }
}

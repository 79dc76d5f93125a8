//! Snapshots of which bytes were changed, also by somebody who makes their digests right again: reading one ends, in an error or in a state and
//! in RAM that are what the file says. As long as the digests are those that were written, they are what was saved. There are small snapshots
//! and some of megabytes, in place and packed, whole ones and such that are based on another.
#![no_main]

use std::fs;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use vmm_cpu::state::{CpuState, VmState};
use vmm_cpu::{ClockConfig, CpuModel, CpuidTable, VmConfig};
use vmm_memory::snapshot::{RamOptions, Snapshot, SnapshotDigest, SnapshotError, SnapshotWriter};
use vmm_memory::vm_memory::{Bytes as _, GuestAddress};
use vmm_memory::{DirtyTracker, GuestRam, RegionConfig};

/// Of the header: where the parts begin and their digests are, and its own.
const PARTS: [usize; 4] = [16, 24, 32, 40];
const CHUNKS: usize = 48;
const TABLE: usize = 80;
const OWN: usize = 144;

#[derive(arbitrary::Arbitrary, Clone, Copy, Debug)]
struct Kind {
    large: bool,
    packed: bool,
    /// Based on another one, which is as it was written.
    incremental: bool,
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    kind: Kind,
    /// Makes the digests of table, records and header right again.
    sealed: bool,
    /// Where, counted from the end if so, and what is written there.
    changes: Vec<(bool, u32, u8)>,
    /// The same of several bytes.
    blocks: Vec<(bool, u32, Vec<u8>)>,
    /// How much is cut off.
    cut: Option<u32>,
}

struct Saved {
    bytes: Vec<u8>,
    digest: SnapshotDigest,
    contents: Vec<u8>,
}

/// Bytes of the two regions.
fn sizes(large: bool) -> [usize; 2] {
    if large { [0x20_1000, 0x8_2000] } else { [0x5_1000, 0x2000] }
}

/// Where the second one is.
const SECOND: GuestAddress = GuestAddress(1 << 24);

fn ram(large: bool) -> GuestRam {
    let [first, second] = sizes(large).map(|size| size as u64);
    let region = |gpa, size| RegionConfig::new(gpa, size);
    let ram = GuestRam::builder().region(region(GuestAddress(0), first)).region(region(SECOND, second));
    ram.track_dirty(true).build().expect("RAM")
}

fn contents(ram: &GuestRam, large: bool) -> Vec<u8> {
    let [first, second] = sizes(large);
    let mut bytes = vec![0; first + second];
    let (here, there) = bytes.split_at_mut(first);
    ram.memory().read_slice(here, GuestAddress(0)).expect("it is there");
    ram.memory().read_slice(there, SECOND).expect("it is there");
    bytes
}

/// Few pages, and in a large one many: some that LZ4 makes smaller, and some that it cannot.
fn fill(ram: &GuestRam, large: bool) {
    let write = |bytes: &[u8], gpa| ram.memory().write_slice(bytes, gpa).expect("it is there");
    write(&[7; 0x3000], GuestAddress(0x3f000));
    write(b"last", GuestAddress(SECOND.0 + sizes(large)[1] as u64 - 4));
    if large {
        let mut noise = vec![0; 0x6_0000];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        write(&noise, GuestAddress(0x8_0000));
        for page in (0..0x80).step_by(3) {
            write(b"somewhere", GuestAddress(0x10_0000 + page * 0x1000));
        }
    }
}

/// What has changed since the one below.
fn change(ram: &GuestRam) {
    ram.memory().write_slice(&[0; 0x1000], GuestAddress(0x3f000)).expect("it is there");
    ram.memory().write_slice(&[9; 0x2000], GuestAddress(0x1000)).expect("it is there");
}

fn place(name: &str) -> PathBuf {
    // Memory, where there is such.
    let directory =
        if fs::exists("/dev/shm").unwrap_or(false) { "/dev/shm".into() } else { std::env::temp_dir() };
    directory.join(format!("snapshot-fuzz-{}{name}", std::process::id()))
}

fn options() -> RamOptions<'static> {
    RamOptions::new().threads(NonZeroUsize::MIN)
}

/// What others are based on.
fn base(large: bool) -> &'static Arc<Snapshot> {
    static BASE: [OnceLock<Arc<Snapshot>>; 2] = [OnceLock::new(), OnceLock::new()];
    BASE[usize::from(large)].get_or_init(|| {
        let path = place("-base");
        fs::write(&path, &saved(Kind { large, packed: false, incremental: false }).bytes).expect("room");
        let base = Snapshot::open(&path).expect("as it was written");
        // It stays open.
        fs::remove_file(path).expect("it is there");
        Arc::new(base)
    })
}

fn saved(kind: Kind) -> &'static Saved {
    static SAVED: [OnceLock<Saved>; 8] = [const { OnceLock::new() }; 8];
    let Kind { large, packed, incremental } = kind;
    let index = usize::from(large) + 2 * usize::from(packed) + 4 * usize::from(incremental);
    SAVED[index].get_or_init(|| {
        let path = place("-saved");
        let mut writer = SnapshotWriter::create(&path).expect("a place");
        let config = VmConfig::new(CpuModel::Exact(CpuidTable::default())).clock(ClockConfig::host_at_khz(5));
        writer.put("vm/config", &config).expect("a configuration");
        writer.put("cpu/0", &CpuState::at_reset()).expect("a state");
        let ram = ram(large);
        fill(&ram, large);
        let options = options().packed(packed);
        if incremental {
            let tracker = DirtyTracker::new(&ram);
            drop(tracker.harvest().expect("pages"));
            change(&ram);
            let changed = tracker.harvest().expect("pages");
            writer.put_ram(&ram, &options.since(base(large), &changed)).expect("RAM");
        } else {
            writer.put_ram(&ram, &options).expect("RAM");
        }
        writer.put("vm", &VmState::default()).expect("a state");
        let digest = writer.finish().expect("a snapshot");
        let bytes = fs::read(&path).expect("it is there");
        fs::remove_file(path).expect("it is there");
        Saved { bytes, digest, contents: contents(&ram, large) }
    })
}

/// Makes digests right again, as somebody who knows the format can.
fn seal(bytes: &mut [u8]) {
    if bytes.len() < 4096 {
        return;
    }
    let word = |bytes: &[u8], at: usize| {
        usize::try_from(u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes")))
            .unwrap_or(usize::MAX)
    };
    let [_, chunks, table, end] = PARTS.map(|at| word(bytes, at));
    for (from, to, digest) in [(chunks, table, CHUNKS), (table, end, TABLE)] {
        if let Some(part) = bytes.get(from..to).map(blake3::hash) {
            bytes[digest..digest + 32].copy_from_slice(part.as_bytes());
        }
    }
    bytes[OWN..OWN + 32].fill(0);
    let own = blake3::hash(&bytes[..4096]);
    bytes[OWN..OWN + 32].copy_from_slice(own.as_bytes());
}

fn changed(input: &Input) -> Vec<u8> {
    let mut changed = saved(input.kind).bytes.clone();
    let len = changed.len();
    let place = |from_end: bool, at: u32| {
        let at = at as usize % len;
        if from_end { len - 1 - at } else { at }
    };
    for (from_end, at, value) in &input.changes {
        changed[place(*from_end, *at)] = *value;
    }
    for (from_end, at, block) in &input.blocks {
        changed[place(*from_end, *at)..].iter_mut().zip(block).for_each(|(byte, new)| *byte = *new);
    }
    if let Some(cut) = input.cut {
        changed.truncate(len - cut as usize % len);
    }
    if input.sealed {
        seal(&mut changed);
    }
    changed
}

/// An error says of which file it is, or of what in it.
fn located<T>(result: Result<T, SnapshotError>) -> Option<T> {
    result.map_err(|error| assert!(!error.to_string().is_empty())).ok()
}

fuzz_target!(|input: Input| {
    let Saved { digest, contents: expected, .. } = saved(input.kind);
    let Kind { large, incremental, .. } = input.kind;
    let path = place("");
    fs::write(&path, changed(&input)).expect("room");
    let opened = if incremental { Snapshot::open_on(base(large), &path) } else { Snapshot::open(&path) };
    // What is open stays.
    fs::remove_file(&path).expect("it is there");
    let Some(snapshot) = located(opened) else { return };
    let states = (
        located(snapshot.get::<VmConfig>("vm/config")).is_some(),
        located(snapshot.get::<CpuState>("cpu/0")),
        located(snapshot.get::<VmState>("vm")),
        located(snapshot.finish()).is_some(),
    );
    let verified = located(snapshot.verify_ram(&options())).is_some();
    // What it says may be terabytes.
    let mapped = snapshot.ram_layout().is_some_and(|layout| layout.size() < 1 << 24);
    let mapped = mapped.then(|| located(snapshot.map_ram(false, &options()))).flatten();
    let loaded = ram(large);
    let is_loaded = located(snapshot.load_ram(&loaded, &options())).is_some();
    if snapshot.digest() == *digest {
        // The same header, so all that it covers is the same, or was found not to be.
        assert!(states.0 && states.3);
        assert_eq!(states.1.expect("a state"), CpuState::at_reset());
        assert_eq!(states.2.expect("a state"), VmState::default());
        if verified || is_loaded {
            assert!(is_loaded && contents(&loaded, large) == *expected, "other RAM than was saved");
        }
        if verified && let Some(mapped) = mapped {
            assert!(contents(&mapped, large) == *expected, "other RAM is mapped than was saved");
        }
    }
});

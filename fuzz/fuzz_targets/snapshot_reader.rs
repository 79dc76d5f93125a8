//! Snapshots of which bytes were changed, also by somebody who makes their digests right again: reading one ends, in an error or in a state and
//! in RAM that are what the file says. As long as the digests are those that were written, they are what was saved.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use vmm_cpu::state::{CpuState, VmState};
use vmm_cpu::{ClockConfig, CpuModel, CpuidTable, VmConfig};
use vmm_memory::snapshot::{RamOptions, Snapshot, SnapshotDigest, SnapshotWriter};
use vmm_memory::vm_memory::{Bytes as _, GuestAddress};
use vmm_memory::{GuestRam, RegionConfig};

/// Of the header: where the parts begin and their digests are, and its own.
const PARTS: [usize; 4] = [16, 24, 32, 40];
const CHUNKS: usize = 48;
const TABLE: usize = 80;
const OWN: usize = 144;

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    packed: bool,
    /// Makes the digests of table, records and header right again.
    sealed: bool,
    /// Where, counted from the end if so, and what is written there.
    changes: Vec<(bool, u32, u8)>,
    /// How much is cut off.
    cut: Option<u16>,
}

struct Saved {
    bytes: Vec<u8>,
    digest: SnapshotDigest,
}

fn ram() -> GuestRam {
    let region = |gpa, size| RegionConfig::new(GuestAddress(gpa), size);
    GuestRam::builder().region(region(0, 0x5_1000)).region(region(1 << 20, 0x2000)).build().expect("RAM")
}

fn contents(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; 0x5_1000];
    ram.memory().read_slice(&mut bytes, GuestAddress(0)).expect("it is there");
    bytes
}

fn filled() -> GuestRam {
    let ram = ram();
    ram.memory().write_slice(&[7; 0x3000], GuestAddress(0x3f000)).expect("it is there");
    ram.memory().write_slice(b"last", GuestAddress(0x10_1ffc)).expect("it is there");
    ram
}

fn place() -> PathBuf {
    // Memory, where there is such.
    let directory =
        if fs::exists("/dev/shm").unwrap_or(false) { "/dev/shm".into() } else { std::env::temp_dir() };
    directory.join(format!("snapshot-fuzz-{}", std::process::id()))
}

fn saved(packed: bool) -> &'static Saved {
    static SAVED: [OnceLock<Saved>; 2] = [OnceLock::new(), OnceLock::new()];
    SAVED[usize::from(packed)].get_or_init(|| {
        let mut writer = SnapshotWriter::create(place()).expect("a place");
        let config = VmConfig::new(CpuModel::Exact(CpuidTable::default())).clock(ClockConfig::host_at_khz(5));
        writer.put("vm/config", &config).expect("a configuration");
        writer.put("cpu/0", &CpuState::at_reset()).expect("a state");
        writer.put_ram(&filled(), &RamOptions::new().packed(packed)).expect("RAM");
        writer.put("vm", &VmState::default()).expect("a state");
        let digest = writer.finish().expect("a snapshot");
        Saved { bytes: fs::read(place()).expect("it is there"), digest }
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

fuzz_target!(|input: Input| {
    let Saved { bytes, digest } = saved(input.packed);
    let mut changed = bytes.clone();
    for (from_end, at, value) in &input.changes {
        let at = *at as usize % changed.len();
        let at = if *from_end { changed.len() - 1 - at } else { at };
        changed[at] = *value;
    }
    if let Some(cut) = input.cut {
        let len = changed.len();
        changed.truncate(len - usize::from(cut) % len);
    }
    if input.sealed {
        seal(&mut changed);
    }
    let path = place();
    fs::write(&path, &changed).expect("room");
    let Ok(snapshot) = Snapshot::open(&path) else { return };
    let states = (
        snapshot.get::<VmConfig>("vm/config").is_ok(),
        snapshot.get::<CpuState>("cpu/0"),
        snapshot.get::<VmState>("vm"),
        snapshot.finish().is_ok(),
    );
    let options = RamOptions::new().threads(std::num::NonZeroUsize::MIN);
    let verified = snapshot.verify_ram(&options).is_ok();
    // What it says may be terabytes.
    if snapshot.ram_layout().is_some_and(|layout| layout.size() < 1 << 24) {
        drop(snapshot.map_ram(false, &options));
    }
    let loaded = ram();
    let is_loaded = snapshot.load_ram(&loaded, &options).is_ok();
    if snapshot.digest() == *digest {
        // The same header, so all that it covers is the same, or was found not to be.
        assert!(states.0 && states.3);
        assert_eq!(states.1.expect("a state"), CpuState::at_reset());
        assert_eq!(states.2.expect("a state"), VmState::default());
        if verified || is_loaded {
            assert!(is_loaded && contents(&loaded) == contents(&filled()), "other RAM than was saved");
        }
    }
});

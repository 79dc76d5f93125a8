//! States in bytes: what was written comes back, what was damaged is found out or harmless, and what older releases wrote is read.

mod samples;

use std::path::PathBuf;

use vmm_memory::snapshot::SnapshotState;

use self::samples::{Sample, samples};
use crate::virtio::VirtioMmioState;

/// Where snapshots of each version are kept: this release reads them all.
fn kept(name: &str, version: u16) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/snapshots/{name}.v{version}"))
}

/// To make the files for a version that is new: `VMM_WRITE_SNAPSHOTS=1 cargo test -p vmm-devices --features snapshot kept`.
/// Those of a version that was released are never made anew.
#[test]
fn states_that_were_kept_are_read() {
    let write = std::env::var_os("VMM_WRITE_SNAPSHOTS").is_some();
    for sample in samples() {
        let path = kept(sample.name, sample.version);
        if write {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &sample.bytes).unwrap();
        }
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!((sample.is_it)(&bytes), "{}", sample.name);
        assert_eq!(bytes, sample.bytes, "{} is written in other bytes", sample.name);
        assert!((sample.comes_to_the_newest)(&bytes), "{}", sample.name);
    }
}

#[test]
fn what_was_written_comes_back_and_is_taken_over() {
    for Sample { name, bytes, is_it, restore, .. } in samples() {
        assert!(is_it(&bytes), "{name}");
        assert!(restore(&bytes), "{name}");
    }
}

#[test]
fn what_is_cut_off_or_too_long_is_none() {
    for Sample { name, bytes, restore, .. } in samples() {
        for len in 0..bytes.len() {
            assert!(!restore(&bytes[..len]), "{name}, {len} bytes of {}", bytes.len());
        }
        assert!(!restore(&[&bytes[..], &[0]].concat()), "{name}, a byte more");
    }
}

/// Each byte, one after the other: a device takes the state over or refuses it, and is never half of one and half of the other. That is
/// for `restore` to see.
#[test]
fn what_was_changed_is_refused_or_taken_over() {
    let (mut refused, mut taken) = (0, 0);
    for Sample { bytes, restore, .. } in samples() {
        for at in 0..bytes.len() {
            for change in [0x01, 0x02, 0x80, 0xff] {
                let mut changed = bytes.clone();
                changed[at] ^= change;
                *if restore(&changed) { &mut taken } else { &mut refused } += 1;
            }
        }
    }
    assert!(refused > 1000 && taken > 1000, "{refused} were refused, {taken} taken over");
}

#[test]
fn lists_take_no_more_memory_than_their_bytes() {
    use crate::pci::MsixState;
    for count in [3_u64, 1 << 20, 1 << 40, u64::MAX] {
        let error = MsixState::decode(&count.to_le_bytes(), 1).unwrap_err();
        let problem = if count == 3 { "UnexpectedEof" } else { "exceeded maximum size" };
        assert!(error.to_string().contains(problem), "{count}: {error}");
    }
    // Truth is 0 or 1, and nothing else.
    let mut bytes = MsixState { entries: vec![crate::pci::MsixEntry::default()] }.encode(1).unwrap();
    let masked = bytes.len() - 2;
    assert_eq!(bytes[masked], 1);
    bytes[masked] = 2;
    MsixState::decode(&bytes, 1).unwrap_err();
}

#[test]
fn numbers_of_nothing_are_named() {
    use vmm_memory::snapshot::mirror::Mirrored as _;

    use crate::platform::{I8042State, PitState};
    let mut mirror = I8042State::default().mirror();
    mirror.argument = 5;
    let error = I8042State::from_mirror(mirror).unwrap_err().to_string();
    assert_eq!(error, "argument: 5 is none of [0, 1, 2, 3, 4]");
    let mut mirror = PitState::default().mirror();
    mirror.channels[2].mode = 6;
    let error = PitState::from_mirror(mirror).unwrap_err().to_string();
    assert_eq!(error, "channels: mode: 6 is none of [0, 1, 2, 3, 4, 5]");
    let mut mirror = PitState::default().mirror();
    mirror.channels.truncate(2);
    let error = PitState::from_mirror(mirror).unwrap_err().to_string();
    assert_eq!(error, "channels: there are 2; 3 are expected");
    // The kind of device is the first byte behind those of its queues.
    let bytes = samples().into_iter().find(|sample| sample.name == "virtio-rng").unwrap().bytes;
    let [before @ .., kind] = &bytes[..] else { panic!("it has none") };
    assert_eq!(*kind, 0);
    let error = VirtioMmioState::decode(&[before, &[6]].concat(), 1).unwrap_err().to_string();
    assert!(error.contains("DeviceState: 6 is none of [0, 1, 2, 3, 4, 5]"), "{error}");
}

//! A state of which a release to come knows more: it is read by both, and written for the older one as long as nothing gets lost.

use vmm_memory::snapshot::mirror::{Family, VersionMap, Versionize, VersionizeError, VersionizeResult};
use vmm_memory::snapshot::{SnapshotState, StateFormat};

use crate::platform::AcpiPmState;
use crate::snapshot::DeviceStates;

/// [`AcpiPmState`] with a lid.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct WithLid {
    status: u16,
    enable: u16,
    control_low: u8,
    sleep_type: u8,
    timer: u32,
    lid_closed: bool,
}

vmm_memory::snapshot_mirror!(Next of WithLid {
    status: u16,
    enable: u16,
    control_low: u8,
    sleep_type: u8,
    timer: u32,
    #[version(start = 2, ser_fn = "lid_is_open")]
    lid_closed: bool,
});

impl Next {
    /// Version 1 has no lid, which is as if it were open.
    fn lid_is_open(&mut self, _version: u16) -> VersionizeResult<()> {
        if self.lid_closed {
            return Err(VersionizeError::Semantic("version 1 has no lid, and it is closed".to_owned()));
        }
        Ok(())
    }
}

struct NextStates;

impl Family for NextStates {
    const FORMAT: StateFormat = StateFormat { newest: 2, ..DeviceStates::FORMAT };

    fn versions() -> VersionMap {
        let mut versions = VersionMap::new();
        versions.new_version().set_type_version(Next::type_id(), 2);
        versions
    }
}

vmm_memory::snapshot_states!(NextStates: WithLid);

#[test]
fn a_state_goes_to_the_next_version_and_back() {
    let old = AcpiPmState { status: 0x20, enable: 0x100, sleep_type: 3, timer: 77, ..AcpiPmState::default() };
    let bytes = old.encode(1).unwrap();
    let mut new = WithLid::decode(&bytes, 1).unwrap();
    assert_eq!((new.timer, new.lid_closed), (77, false));
    assert_eq!(AcpiPmState::decode(&new.encode(1).unwrap(), 1).unwrap(), old);
    // What only the new one can say is lost in no silence.
    new.lid_closed = true;
    let bytes = new.encode(2).unwrap();
    assert_eq!(WithLid::decode(&bytes, 2).unwrap(), new);
    let error = new.encode(1).unwrap_err().to_string();
    assert!(error.contains("version 1 has no lid, and it is closed"), "{error}");
    // The one is not taken for the other.
    AcpiPmState::decode(&bytes, 1).unwrap_err();
    WithLid::decode(&bytes, 1).unwrap_err();
    WithLid::decode(&old.encode(1).unwrap(), 2).unwrap_err();
}

#[test]
fn the_envelope_says_which_version_it_is() {
    use vmm_memory::snapshot::{Snapshot, SnapshotWriter};
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("vm");
    let mut writer = SnapshotWriter::create(&path).unwrap();
    writer.put("pm", &WithLid { lid_closed: true, ..WithLid::default() }).unwrap();
    writer.finish().unwrap();
    let error = Snapshot::open(&path).unwrap().get::<AcpiPmState>("pm").unwrap_err().to_string();
    assert!(
        error.ends_with("the state \"pm\" of vmm-devices is of version 2; this release knows 1 to 1"),
        "{error}"
    );
}

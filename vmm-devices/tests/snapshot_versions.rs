//! A state that has got a field. Since version 2 a network device carries frames that have come and wait for its driver's buffers. A file of
//! version 1 is read, and is written for releases that know no other as long as nothing waits; what would be lost is said.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::error::Error;
use std::num::NonZeroU16;
use std::path::Path;
use std::sync::{Arc, Mutex};

use vmm_devices::net::{MacAddr, Offloads};
use vmm_devices::snapshot::{SnapshotState, StateFormat};
use vmm_devices::testkit::{
    Driver as _, DriverQueue, LineRecorder, Memory, MmioDriver, TestFrame, TestNetwork, guest_memory,
};
use vmm_devices::virtio::net::{NetState, feature};
use vmm_devices::virtio::{DeviceState, Net, VirtioMmio, VirtioMmioState};
use vmm_memory::snapshot::{Snapshot, SnapshotError, SnapshotWriter, StateError};

const RAM: u64 = 1 << 20;

/// The same state, as a release reads and writes it that knows version 1 alone.
#[derive(Debug)]
struct OfRelease1(VirtioMmioState);

impl SnapshotState for OfRelease1 {
    const FORMAT: StateFormat = StateFormat { newest: 1, ..VirtioMmioState::FORMAT };

    fn encode(&self, version: u16) -> Result<Vec<u8>, StateError> {
        assert_eq!(version, 1);
        self.0.encode(1)
    }

    fn decode(bytes: &[u8], version: u16) -> Result<Self, StateError> {
        assert_eq!(version, 1);
        VirtioMmioState::decode(bytes, 1).map(Self)
    }
}

struct Machine {
    device: Arc<Mutex<VirtioMmio<Memory>>>,
    driver: MmioDriver,
    memory: Memory,
    network: TestNetwork,
}

fn machine(memory: Memory) -> Machine {
    let network = TestNetwork::new(1, Offloads::NONE, Offloads::NONE);
    let net = Net::builder(Arc::new(network.clone()), MacAddr([0x52, 0x54, 0, 0, 0, 1]));
    let net = net.pairs(NonZeroU16::MIN).build().unwrap();
    let device = VirtioMmio::new(net, memory.clone(), LineRecorder::default()).unwrap();
    let device = Arc::new(Mutex::new(device));
    Machine { driver: MmioDriver::new(device.clone()), device, memory, network }
}

impl Machine {
    fn paused(&self) -> VirtioMmioState {
        let mut device = self.device.lock().unwrap();
        device.pause();
        device.save().unwrap()
    }

    /// Another one in that state, over the same memory, at work.
    fn goes_on(self, state: &VirtioMmioState) -> Self {
        let there = machine(self.memory.clone());
        there.device.lock().unwrap().restore(state).unwrap();
        there.device.lock().unwrap().resume().unwrap();
        there
    }
}

fn net(state: &mut VirtioMmioState) -> &mut NetState {
    match &mut state.device.device {
        DeviceState::Net(net) => net,
        other => panic!("{other:?}"),
    }
}

/// Writes a snapshot of it, in the newest version or another.
fn write(path: &Path, state: &VirtioMmioState, version: Option<u16>) -> Result<(), SnapshotError> {
    let mut writer = SnapshotWriter::create(path)?;
    if let Some(version) = version {
        writer.version(VirtioMmioState::FORMAT, version)?;
    }
    writer.put("net", state)?;
    writer.finish()?;
    Ok(())
}

fn messages(error: &dyn Error) -> String {
    let source = error.source().map(messages).unwrap_or_default();
    format!("{error}: {source}")
}

#[test]
fn a_frame_that_waits_goes_with_version_2_and_not_with_version_1() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("vm.snapshot");
    let here = machine(guest_memory(RAM).unwrap());
    let [mut rx, tx] = [0x1000, 0x2000].map(|at| DriverQueue::new(here.memory.clone(), at, 16).unwrap());
    here.driver.start(feature::MRG_RXBUF, &[(0, &rx), (1, &tx)]).unwrap();

    // Nothing waits: version 1 says everything, and this release reads it as well as that one.
    let state = here.paused();
    write(&path, &state, Some(1)).unwrap();
    let snapshot = Snapshot::open(&path).unwrap();
    assert_eq!(snapshot.versions().collect::<Vec<_>>(), [("vmm-devices", 1)]);
    assert_eq!(snapshot.get::<OfRelease1>("net").unwrap().0, state);
    let read: VirtioMmioState = snapshot.get("net").unwrap();
    assert_eq!(read, state);
    // That release's own file comes to version 2.
    let here = here.goes_on(&read);

    // A frame of 3000 bytes for a buffer of 2000.
    rx.chain().writable(0x8000, 2000).submit().unwrap();
    here.driver.notify(0);
    let frame: Vec<u8> = (0..3000_u32).map(|at| at.to_le_bytes()[0]).collect();
    here.network.give(TestFrame::new(frame.clone()));
    assert_eq!((rx.take_used().unwrap(), here.network.coming()), (None, 0), "it waits in the device");
    let mut state = here.paused();
    assert_eq!(net(&mut state).waiting.len(), 1);
    let error = write(&path, &state, Some(1)).unwrap_err();
    assert!(matches!(error, SnapshotError::Encode { version: 1, .. }), "{error:?}");
    let problem = messages(&error);
    let reason =
        "version 1 has no frames that wait, and one of 3000 bytes waits for buffers or a rate of pair 0";
    assert!(problem.contains("\"net\"") && problem.contains(reason), "{problem}");
    // What was there before is there.
    assert_eq!(Snapshot::open(&path).unwrap().versions().next(), Some(("vmm-devices", 1)));

    write(&path, &state, None).unwrap();
    let snapshot = Snapshot::open(&path).unwrap();
    assert_eq!(snapshot.versions().collect::<Vec<_>>(), [("vmm-devices", 2)]);
    let problem = messages(&snapshot.get::<OfRelease1>("net").unwrap_err());
    let reason = "the state \"net\" of vmm-devices is of version 2; this release knows 1 to 1";
    assert!(problem.contains(reason), "{problem}");
    let read: VirtioMmioState = snapshot.get("net").unwrap();
    assert_eq!(read, state);

    // It comes to its driver where the device goes on, and then version 1 is enough again.
    let there = here.goes_on(&read);
    rx.chain().writable(0x9000, 2000).submit().unwrap();
    there.driver.notify(0);
    assert_eq!((rx.take_used().unwrap(), rx.take_used().unwrap()), (Some((0, 2000)), Some((1, 1012))));
    let received = [rx.get(0x8000 + 12, 1988).unwrap(), rx.get(0x9000, 1012).unwrap()].concat();
    assert!(received == frame);
    let state = there.paused();
    write(&path, &state, Some(1)).unwrap();
    assert_eq!(Snapshot::open(&path).unwrap().get::<OfRelease1>("net").unwrap().0, state);
}

/// Those of each version that are kept.
const V1: &[u8] = include_bytes!("snapshots/virtio-net.v1");
const V2: &[u8] = include_bytes!("snapshots/virtio-net.v2");

#[test]
fn states_that_were_kept_go_to_the_next_version_and_back() {
    let mut old = VirtioMmioState::decode(V1, 1).unwrap();
    assert_eq!(net(&mut old).waiting, []);
    let bytes = old.encode(2).unwrap();
    let new = VirtioMmioState::decode(&bytes, 2).unwrap();
    assert_eq!(new, old);
    assert_eq!(new.encode(1).unwrap(), V1);

    let mut new = VirtioMmioState::decode(V2, 2).unwrap();
    let lens: Vec<_> = net(&mut new).waiting.iter().map(|frame| (frame.pair, frame.bytes.len())).collect();
    assert_eq!(lens, [(0, 90), (1, 14)]);
    let problem = new.encode(1).unwrap_err().to_string();
    assert!(problem.contains("version 1 has no frames that wait, and one of 90 bytes"), "{problem}");
    // Whoever may lose them says so.
    net(&mut new).waiting.clear();
    assert_eq!(new.encode(1).unwrap(), V1);
}

#[test]
fn one_version_is_not_taken_for_the_other() {
    VirtioMmioState::decode(V1, 2).unwrap_err();
    let problem = VirtioMmioState::decode(V2, 1).unwrap_err().to_string();
    assert!(problem.contains("bytes follow its end"), "{problem}");
}

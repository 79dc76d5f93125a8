//! A disk of a guest whose requests are all written down, while the disk under the log stands still: the guest's requests take no
//! longer, new channels are refused once the deadline is over, and the log accounts for each request afterwards.
//!
//! The guest's side is the driver of `vmm_devices::testkit`; the device is the one that guests have.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_audit::event::{Kind, Object, ObjectClass, Party};
use vmm_audit::gaps::gaps;
use vmm_audit::hooks::devices::{AuditedGate, TrafficLog};
use vmm_audit::keys::MemoryKeys;
use vmm_audit::log::LogOptions;
use vmm_audit::pipeline::{AuditLog, PipelineOptions};
use vmm_audit::storage::MemoryStorage;
use vmm_audit::storage::faulty::FaultyStorage;
use vmm_audit::verify::{VerifyOptions, verify};
use vmm_audit::{Entries, Item};
use vmm_devices::channel::{AllowAll, Gatekeeper, VmIdentity, VsockConnect};
use vmm_devices::testkit::{DriverQueue, Memory, guest_memory};
use vmm_devices::virtio::block::{Block, MemoryDisk, feature as block_feature};
use vmm_devices::virtio::{
    Activation, Doorbells, DriverLink, Progress, VirtioDevice as _, Virtqueue, Worker, feature,
};
use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

const LONG: Duration = Duration::from_secs(60);
const DEADLINE: Duration = Duration::from_secs(2);
const RINGS: u64 = 0x1000;
const HEADER: u64 = 0x10000;
const STATUS: u64 = 0x20000;
const DATA: u64 = 0x10_0000;
/// Bytes of a request.
const LEN: u32 = 4096;

struct NoDriver;

impl DriverLink for NoDriver {
    fn used(&self, _: u16) {}
    fn config_changed(&self) {}
    fn needs_reset(&self, why: &dyn Error) {
        panic!("{why}");
    }
}

struct Guest {
    memory: Memory,
    queue: DriverQueue<Memory>,
    worker: Box<dyn Worker>,
    requests: u64,
}

impl Guest {
    fn new(traffic: TrafficLog) -> Self {
        let memory = guest_memory(16 << 20).unwrap();
        let queue = DriverQueue::new(memory.clone(), RINGS, 128).unwrap();
        let link = Arc::new(NoDriver);
        let own = queue.device_side().unwrap();
        let own = Virtqueue::new(own, 0, memory.clone(), link.clone()).unwrap();
        let begun = Instant::now();
        let clock = move || u64::try_from(begun.elapsed().as_nanos()).unwrap();
        let block = Block::builder(Arc::new(MemoryDisk::new(8 << 20))).metrics(Arc::new(traffic), clock);
        let features = feature::VERSION_1 | block_feature::FLUSH;
        let doorbells = Arc::new(Doorbells::new(1));
        let activation = Activation { features, queues: vec![Some(own)], link, doorbells };
        let worker = block.build().unwrap().activate(activation).unwrap().remove(0);
        Self { memory, queue, worker, requests: 0 }
    }

    /// Writes or reads 4 KiB: the nanoseconds until the device had done it.
    fn request(&mut self) -> u64 {
        let writes = self.requests.is_multiple_of(2);
        let header = [u64::from(writes), self.requests / 2 % 1000 * 8];
        self.memory.memory().write_obj(header, GuestAddress(HEADER)).unwrap();
        let chain = self.queue.chain().readable(HEADER, 16);
        let chain = if writes { chain.readable(DATA, LEN) } else { chain.writable(DATA, LEN) };
        chain.writable(STATUS, 1).submit().unwrap();
        let begun = Instant::now();
        assert_eq!(self.worker.process().unwrap(), Progress::Idle);
        let took = begun.elapsed();
        self.queue.take_used().unwrap().unwrap();
        assert_eq!(self.memory.memory().read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 0);
        self.requests += 1;
        u64::try_from(took.as_nanos()).unwrap()
    }

    /// Requests for a time, as a guest with pauses makes them: the latencies, sorted.
    fn requests_for(&mut self, time: Duration) -> Vec<u64> {
        let begun = Instant::now();
        let mut times = Vec::new();
        while begun.elapsed() < time {
            times.extend((0..200).map(|_| self.request()));
            std::thread::sleep(Duration::from_millis(1));
        }
        times.sort_unstable();
        times
    }
}

fn at(times: &[u64], percent: usize) -> u64 {
    *times.get(times.len() * percent / 100).unwrap()
}

#[test]
fn a_guest_does_not_notice_that_the_logs_disk_stands_still() {
    let _alone = crate::alone();
    let memory = MemoryStorage::new();
    let (storage, faults) = FaultyStorage::new(memory.clone());
    let options = PipelineOptions::new().deadline(DEADLINE);
    let keys = Box::new(MemoryKeys::new());
    let (log, _) =
        AuditLog::open(Arc::new(storage), keys, "log.example", LogOptions::new(), options).unwrap();
    let (vm, object) = (Party::vm(7, 1), Object::named(ObjectClass::Block, "disk"));
    let mut guest = Guest::new(TrafficLog::new(log.emitter(vm.clone()), &vm, &object));
    let keeper = Gatekeeper::new(AuditedGate::new(AllowAll, log.emitter(Party::host("keeper"))));
    let open = |port| keeper.open(VmIdentity::new(7, 1).into(), None, VsockConnect { port });

    let established = open(1).unwrap();
    guest.requests_for(Duration::from_millis(200));
    let before = guest.requests_for(DEADLINE);
    faults.stall(true);
    let stalled = Instant::now();
    let during = guest.requests_for(DEADLINE);
    // The deadline is that of the batch which is being written: that began a little later than the disk stood still.
    while let Ok(grant) = open(2) {
        drop(grant);
        assert!(stalled.elapsed() < DEADLINE * 3, "new channels open though the log stands still");
        std::thread::sleep(Duration::from_millis(10));
    }
    let asked = Instant::now();
    let refusal = open(3).unwrap_err();
    assert!(asked.elapsed() < DEADLINE / 2, "it is refused at once");
    assert!(refusal.reason().contains("audit log"), "{refusal}");
    assert!(established.is_live());
    let after = guest.requests_for(DEADLINE / 4);
    let counted = log.status().counted;
    faults.stall(false);
    log.flush(LONG).unwrap();
    drop(open(4).unwrap());
    for (name, times) in [("before", &before), ("during", &during), ("behind the deadline", &after)] {
        println!(
            "{name}: {} requests, p50 {} ns, p90 {} ns, p99 {} ns",
            times.len(),
            at(times, 50),
            at(times, 90),
            at(times, 99)
        );
    }
    println!("{counted} of {} requests were counted and not written one by one", guest.requests);
    assert!(counted > 0, "the ring has to have been full for this to say anything");
    for percent in [50, 90] {
        for (name, times) in [("during", &during), ("after", &after)] {
            let (old, new) = (at(&before, percent), at(times, percent));
            assert!(new <= old * 2, "{name}: p{percent} {new} ns instead of {old} ns");
        }
    }

    // Each request is in the log, by itself or in a counter.
    let (requests, key) = (guest.requests, log.verifier().clone());
    drop((guest, established, keeper));
    log.close().unwrap();
    let result = verify(&memory, &VerifyOptions::new(key), &mut |_, _| ()).unwrap();
    assert!(result.intact && result.closed, "{:?}", result.findings);
    let accounts = gaps(Arc::new(memory.clone())).unwrap().accounts;
    for account in &accounts {
        assert_eq!((account.issued, account.missing), (account.written + account.counted, 0), "{account:?}");
    }
    let mut entries = Entries::new(Arc::new(memory));
    let (mut single, mut bytes) = (0, 0);
    let mut counters = std::collections::BTreeMap::new();
    while let Some(item) = entries.next().unwrap() {
        let Item::Entry(found) = item else { continue };
        let event = found.event.unwrap();
        match event.kind {
            Kind::Traffic => (single, bytes) = (single + event.count, bytes + event.bytes),
            Kind::Coalesced if event.get("of") == Some("traffic") => {
                counters.insert(event.action, (event.count, event.bytes));
            }
            _ => {}
        }
    }
    let coalesced = counters.values().fold((0, 0), |sum, more| (sum.0 + more.0, sum.1 + more.1));
    assert_eq!(single + coalesced.0, requests);
    assert_eq!(bytes + coalesced.1, requests * u64::from(LEN));
}

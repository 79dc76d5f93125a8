//! A network device on an event loop, whose switch is a broker's.

use super::*;
use crate::net::HEADER;
use crate::testkit::{Driver as _, DriverQueue, LineRecorder, MmioDriver, guest_memory};
use crate::virtio::net::feature;
use crate::virtio::{EventLoop, Net, VirtioMmio};

const FRAMES: u32 = 20_000;
const OUTSTANDING: u32 = 16;
const SEND: u64 = 0x10_000;
const BUFFERS: u64 = 0x10_0000;

/// A driver that sends and gets nothing, faster than the broker takes it: each chain comes back, though nothing else wakes the device.
#[test]
fn a_flood_in_one_direction_does_not_come_to_rest() {
    let (_directory, path) = place();
    let _broker = Broker::start(&path);
    let config = ClientConfig::new("a").mac(mac(1)).queue_bytes(256 << 10);
    let client = SwitchClient::connect(grant(), &path, config).unwrap();
    let net = Net::builder(Arc::new(client), mac(1)).build().unwrap();
    let thread = EventLoop::new(|| 0).unwrap().spawn("net").unwrap();
    let memory = guest_memory(4 << 20).unwrap();
    let builder = VirtioMmio::builder(net, memory.clone(), LineRecorder::default());
    let transport = builder.executor(thread.executor()).build().unwrap();
    let driver = MmioDriver::new(Arc::new(Mutex::new(transport)));
    let [mut rx, mut tx] = [0x1000, 0x3000].map(|at| DriverQueue::new(memory.clone(), at, 64).unwrap());
    driver.start(feature::MRG_RXBUF | feature::STATUS, &[(0, &rx), (1, &tx)]).unwrap();
    for buffer in 0..32 {
        rx.chain().writable(BUFFERS + buffer * 4096, 4096).submit().unwrap();
    }
    driver.notify(0);
    tx.put(SEND, &[&[0; HEADER][..], &frame(2, 1, &[7; 40_000])].concat()).unwrap();
    let len = u32::try_from(HEADER + 14 + 40_000).unwrap();
    for number in 0..FRAMES + OUTSTANDING {
        if number < FRAMES {
            tx.chain().readable(SEND, len).submit().unwrap();
            driver.notify(1);
        }
        if number >= OUTSTANDING {
            assert!(tx.await_used(LONGEST).unwrap().is_some(), "frame {number}");
        }
    }
    assert_eq!(driver.status(), 0xf);
}

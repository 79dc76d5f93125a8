//! Memory that is exchanged, as where some is plugged in: what waits for long holds none of the old.

use vmm_memory::GuestMemoryMap;

use super::*;

/// Puts an equal map in the place of the guest's; the old one, which nobody else is to have.
fn exchange(guest: &Guest) -> Arc<GuestMemoryMap> {
    let old = guest.memory.memory().into_inner();
    let new = GuestMemoryMap::clone(&old);
    guest.memory.lock().unwrap().replace(new);
    old
}

#[test]
fn output_that_waits_holds_no_memory() {
    let (mut guest, port, screen, _) = single(|port| port);
    let text: Vec<u8> = (0..=255).cycle().take(10_000).collect();
    screen.answer([Ok(4096), Ok(3), Err(std::io::ErrorKind::WouldBlock)]);
    assert!(!guest.send(1, &text));
    let old = exchange(&guest);
    assert_eq!(Arc::strong_count(&old), 1);
    port.resume();
    assert_eq!(screen.take(), text);
    assert_eq!(guest.queues[1].take_used().unwrap(), Some((0, 0)));
}

#[test]
fn a_spare_buffer_for_input_holds_no_memory() {
    let spoilt = Arc::new(Mutex::new(None::<Port>));
    let theirs = Arc::clone(&spoilt);
    /// Somebody forgets the input after it was seen and before it is delivered: whenever the worker asks for the time.
    struct Forgetful(Arc<Mutex<Option<Port>>>);
    impl crate::Clock for Forgetful {
        fn now_ns(&self) -> u64 {
            if let Some(port) = &*self.0.lock().unwrap() {
                port.discard_input();
            }
            0
        }
    }
    let (console, port) = Console::new(PortConfig::console(std::io::sink())).unwrap();
    let metrics = Arc::new(crate::virtio::metrics::DeviceMetrics::default());
    let mut guest = Guest::new(console.metrics(metrics, Forgetful(theirs)));
    guest.start(0);
    guest.give(0, 64);
    *spoilt.lock().unwrap() = Some(port.clone());
    port.enqueue(b"forgotten");
    *spoilt.lock().unwrap() = None;
    assert_eq!((guest.taken(0), port.counters().input_discarded), (None, 9));
    let old = exchange(&guest);
    assert_eq!(Arc::strong_count(&old), 1);
    port.enqueue(b"kept");
    assert_eq!(guest.taken(0).unwrap(), b"kept");
}

//! A console between a hostile driver and a monitor that does anything at every doorbell, and what must hold all the same.

use std::cell::RefCell;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use vmm_devices::testkit::{
    Action, Interposed, MIN_MEMORY, MmioDriver, Place, Replayed, guest_memory_of, replay,
};
use vmm_devices::virtio::console::{Console, ControlCounters, Port, PortConfig, Ports, WhenFull};

/// Ports of the device: with those for control, as many queues as a replay uses.
const PORTS: u32 = 3;

/// Bytes of input that a port keeps.
const CAPACITY: usize = 300;

/// Every control message that makes sense, and some that do not, for chains at [`Place::Data`]: 8 bytes each.
pub(crate) fn messages() -> Action {
    let ids = [0, 1, 2, PORTS, u32::MAX].into_iter();
    let messages = ids.flat_map(|id| {
        [(0_u16, 1_u16), (3, 1), (6, 1), (6, 0), (3, 0), (0, 0), (7, 1), (1, 0)].map(|(event, value)| {
            let mut message = id.to_le_bytes().to_vec();
            message.extend(event.to_le_bytes());
            message.extend(value.to_le_bytes());
            message
        })
    });
    Action::Memory { at: Place::Data(0), bytes: messages.flatten().collect() }
}

/// What there is of [`messages`].
#[allow(dead_code, reason = "a fuzzer finds them by itself")]
pub(crate) const MESSAGES: u16 = 40;

/// A writer that takes a part, nothing, or fails, in turn.
struct Moody {
    mood: u64,
    written: Arc<Mutex<u64>>,
}

impl Write for Moody {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.mood = self.mood.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let len = match self.mood >> 59 {
            0..16 => data.len(),
            16..28 => data.len().min(1),
            28 | 29 => return Err(io::ErrorKind::WouldBlock.into()),
            30 => return Err(io::ErrorKind::Interrupted.into()),
            _ => return Err(io::ErrorKind::BrokenPipe.into()),
        };
        *self.written.lock().unwrap() += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A port, and what it was given.
struct Known {
    port: Port,
    enqueued: u64,
    written: Arc<Mutex<u64>>,
}

/// The monitor. Each of its steps is a number: what to do with which port, and how much of it.
struct Monitor {
    ports: Ports,
    known: Vec<Known>,
    /// Where each is in `known`.
    present: [Option<usize>; PORTS as usize],
    steps: std::vec::IntoIter<u16>,
}

impl Monitor {
    fn add(&mut self, id: u32, kind: u16) {
        let written = Arc::<Mutex<u64>>::default();
        let output = Moody { mood: kind.into(), written: Arc::clone(&written) };
        let config =
            if kind & 1 == 0 { PortConfig::console(output) } else { PortConfig::channel("c", output) };
        let config = config.input_capacity(CAPACITY).size(kind, 25);
        let config = if kind & 2 == 0 { config } else { config.when_full(WhenFull::Discard) };
        let config = if kind & 4 == 0 { config } else { config.closed() };
        let place = &mut self.present[id as usize];
        match self.ports.add(id, config) {
            Ok(port) => {
                assert_eq!(*place, None);
                *place = Some(self.known.len());
                self.known.push(Known { port, enqueued: 0, written });
            }
            Err(_) => assert!(place.is_some()),
        }
    }

    fn step(&mut self) {
        let Some(step) = self.steps.next() else { return };
        let (what, id, much) = (step % 10, u32::from(step / 10) % PORTS, step / 30);
        let at = self.present[id as usize];
        match what {
            0 | 1 => self.add(id, much),
            2 if at.is_some() => {
                self.ports.remove(id).unwrap();
                self.present[id as usize] = None;
            }
            _ => {}
        }
        // A handle of a port that is gone is as good as any.
        let last = self.known.len();
        let Some(known) = at.or_else(|| last.checked_sub(1)).and_then(|at| self.known.get_mut(at)) else {
            return;
        };
        let port = &known.port;
        match what {
            3..=5 => {
                let room = port.room();
                let taken = port.enqueue(&vec![b'i'; usize::from(much)]);
                assert!(taken <= room.min(much.into()));
                known.enqueued += taken as u64;
            }
            6 => port.open(),
            7 => port.close(),
            8 => port.resize(much, much),
            9 if much & 7 == 0 => {
                let writer = Moody { mood: much.into(), written: Arc::clone(&known.written) };
                port.replace_output(writer);
            }
            9 if much & 7 == 1 => {
                port.discard_input();
            }
            _ => port.resume(),
        }
    }

    /// Nothing is lost that is not counted.
    fn check(&self) {
        for (at, Known { port, enqueued, written }) in self.known.iter().enumerate() {
            let counters = port.counters();
            assert_eq!(counters.output, *written.lock().unwrap());
            // A port that is gone has no room, and nothing that waits.
            let waiting = if self.present.contains(&Some(at)) { CAPACITY - port.room() } else { 0 };
            assert_eq!(counters.input + counters.input_discarded + waiting as u64, *enqueued);
        }
    }
}

/// Runs a driver's actions and a monitor's steps against each other.
pub(crate) fn run(actions: &[Action], steps: Vec<u16>) -> (Replayed, ControlCounters) {
    let regions = [(0, MIN_MEMORY), (MIN_MEMORY, 0x3000), (2 * MIN_MEMORY, 0x1000)];
    let memory = guest_memory_of(&regions).unwrap();
    let (console, ports) = Console::multiport(PORTS).unwrap();
    let mut monitor =
        Monitor { ports: ports.clone(), known: Vec::new(), present: [None; 3], steps: steps.into_iter() };
    (0..PORTS).for_each(|id| monitor.add(id, u16::try_from(id).unwrap()));
    let (driver, _) = MmioDriver::of(console, &memory).unwrap();
    let monitor = RefCell::new(monitor);
    let watched = Interposed::new(driver).around_doorbells(|| {
        let mut monitor = monitor.borrow_mut();
        monitor.step();
        monitor.check();
    });
    let replayed = match replay(&watched, &memory, actions) {
        Ok(replayed) => replayed,
        Err(violation) => panic!("{violation}: {violation:?}"),
    };
    let monitor = monitor.borrow();
    monitor.check();
    assert!(monitor.known.iter().all(|known| !known.port.is_guest_open()));
    (replayed, ports.counters())
}

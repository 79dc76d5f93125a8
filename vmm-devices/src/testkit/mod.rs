//! A kit to test a virtio device with no virtual machine: the driver's side of queues and transports, guest memory of any shape,
//! recorders of what a device does to others, a hostile driver, and one that races.
//!
//! | to | there is |
//! |---|---|
//! | have guest memory, of regions that touch, or with holes between | [`guest_memory`], [`guest_memory_of`] |
//! | put a device on a transport and drive it, step by step or [all at once](Driver::start) | [`MmioDriver::of`], [`PciDriver::of`] |
//! | have an executor, a bus or a host bridge between | [`MmioDriver::new`], [`PciDriver::new`] |
//! | make chains, good ones and all others, and see what came back | [`DriverQueue`] |
//! | hear interrupts | [`LineRecorder`], [`MsiRecorder`] |
//! | call a worker with no transport | [`DriverQueue::device_side`], [`LinkRecorder`] |
//! | make memory fail, or come in small pieces | [`FaultyMemory`] |
//! | know each access to memory: what is read twice, or touched too late | [`MemoryRecorder`] |
//! | make the outside fail: a writer that takes a part, is full, or breaks | [`OutputRecorder`] |
//! | make a disk fail, wait, or come back short, and know what it was asked for | [`FaultyDisk`] |
//! | have a network in hand: see what is sent, give frames, be full, fail, pull the cable | [`TestNetwork`] |
//! | do something in the middle of what a driver does | [`Interposed`] |
//! | have another processor change memory while the device works | [`Racer`] |
//! | be a hostile driver, drawn at random, and know what no device may do | [`hostile_queue`], [`replay`] |
//!
//! The driver is as well-behaved or as hostile as the test wants: each step of [`DriverQueue`] and [`Driver`] can be made
//! alone, in any order, with any value. Nothing here panics: what is not as it should be is an error, for the test to unwrap. What
//! is written over MMIO can be written over PCI as well: both are a [`Driver`], and so is a `Box<dyn Driver>`.
//!
//! # A device of your own
//! One that answers in capitals, and its test:
//! ```
//! use vmm_devices::testkit::{Driver, DriverQueue, MmioDriver, guest_memory};
//! use vmm_devices::virtio::*;
//!
//! struct Capitals;
//!
//! impl<M: DeviceMemory> VirtioDevice<M> for Capitals {
//!     fn device_type(&self) -> DeviceType { DeviceType(42) }
//!     fn features(&self) -> u64 { 0 }
//!     fn queue_sizes(&self) -> &[u16] { &[16] }
//!     fn activate(&mut self, mut driver: Activation<M>) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
//!         Ok(vec![Box::new(Server(driver.take_queue(0)?))])
//!     }
//! }
//!
//! struct Server<M: DeviceMemory>(Virtqueue<M>);
//!
//! impl<M: DeviceMemory> Worker for Server<M> {
//!     fn queues(&self) -> Vec<u16> { vec![0] }
//!     fn process(&mut self) -> Result<Progress, QueueError> {
//!         let memory = self.0.memory();
//!         for _ in 0..self.0.size() { // and no more at once, whatever the driver adds meanwhile
//!             let Some(chain) = self.0.pop(&*memory)? else { break };
//!             let mut text = [0; 64];
//!             let len = chain.read_some(0, &mut text);
//!             text.make_ascii_uppercase();
//!             let written = chain.write_some(0, &text[..len]);
//!             self.0.complete(chain.head(), written as u32)?;
//!         }
//!         self.0.rest()
//!     }
//! }
//!
//! let memory = guest_memory(1 << 20)?;
//! let (driver, line) = MmioDriver::of(Capitals, &memory)?; // or PciDriver
//! let mut queue = DriverQueue::new(memory, 0x1000, 8)?;
//! driver.start(0, &[(0, &queue)])?;
//!
//! queue.put(0x8000, b"hello")?;
//! let head = queue.chain().readable(0x8000, 5).writable(0x9000, 64).submit()?;
//! driver.notify(0);
//! assert_eq!(queue.take_used()?, Some((head.into(), 5))); // which chain, and how much was written
//! assert_eq!(queue.get(0x9000, 5)?, b"HELLO");
//! assert!(line.is_asserted());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! With an executor of threads, ask for what was used with [`DriverQueue::await_used`].
//!
//! # Faults
//! Memory that was there when the device looked, and fails when it is used. A request that lies there fails alone; rings that do
//! stop the device until it is reset.
//! ```
//! use vmm_devices::testkit::{Driver, DriverQueue, FaultyMemory, MmioDriver, guest_memory};
//! use vmm_devices::virtio::Rng;
//!
//! let good = guest_memory(1 << 20)?;
//! // The page of a buffer, and the used ring of the second queue.
//! let used = DriverQueue::new(good.clone(), 0x2000, 8)?.rings()[2];
//! let bad = FaultyMemory::new(good.clone()).in_pieces_of(16).failing_at(0x9000..0xa000).failing_at(used..used + 1);
//! let (driver, _) = MmioDriver::of(Rng::new(std::io::repeat(7)), &bad)?;
//!
//! let mut queue = DriverQueue::new(good.clone(), 0x1000, 8)?; // the driver's memory is good
//! driver.start(0, &[(0, &queue)])?;
//! let head = queue.chain().writable(0x8ff0, 100).submit()?;
//! driver.notify(0);
//! assert_eq!(queue.take_used()?, Some((head.into(), 16))); // what comes before the fault, in spite of the pieces
//!
//! let mut queue = DriverQueue::new(good, 0x2000, 8)?;
//! driver.start(0, &[(0, &queue)])?;
//! queue.chain().writable(0x8000, 100).submit()?;
//! driver.notify(0);
//! assert_eq!(driver.status(), 0x40 | 0xf); // DEVICE_NEEDS_RESET
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! A device whose outside fails: here a console whose writer takes three bytes, then is full.
//! ```
//! use std::io::ErrorKind;
//! use vmm_devices::testkit::{Driver, DriverQueue, MmioDriver, OutputRecorder, guest_memory};
//! use vmm_devices::virtio::console::{Console, PortConfig};
//!
//! let (memory, screen) = (guest_memory(1 << 20)?, OutputRecorder::default());
//! let (console, port) = Console::new(PortConfig::console(screen.clone()))?;
//! let (driver, _) = MmioDriver::of(console, &memory)?;
//! let (rx, mut tx) = (DriverQueue::new(memory.clone(), 0x1000, 8)?, DriverQueue::new(memory, 0x2000, 8)?);
//! driver.start(0, &[(0, &rx), (1, &tx)])?;
//!
//! screen.answer([Ok(3), Err(ErrorKind::WouldBlock)]);
//! tx.put(0x8000, b"login: ")?;
//! tx.chain().readable(0x8000, 7).submit()?;
//! driver.notify(1);
//! assert_eq!((screen.take(), tx.take_used()?), (b"log".to_vec(), None)); // it waits
//! port.resume();
//! assert_eq!((screen.take(), tx.take_used()?), (b"in: ".to_vec(), Some((0, 0))));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is read once, and what is not touched any more
//! ```
//! use vmm_devices::testkit::{Driver, DriverQueue, MemoryRecorder, MmioDriver, guest_memory};
//! use vmm_devices::virtio::Rng;
//!
//! let memory = MemoryRecorder::new(guest_memory(1 << 20)?);
//! let (driver, _) = MmioDriver::of(Rng::new(std::io::repeat(7)), &memory)?;
//! let mut queue = DriverQueue::new(memory.unrecorded().clone(), 0x1000, 8)?;
//! driver.start(0, &[(0, &queue)])?;
//! queue.chain().writable(0x8000, 64).submit()?;
//! memory.take();
//! driver.notify(0);
//! let [descriptors, ..] = queue.rings();
//! assert_eq!(memory.read_again(descriptors..descriptors + 8 * 16), None); // CVE-2015-8550
//!
//! driver.set_status(0);
//! memory.take();
//! queue.chain().writable(0x8000, 64).submit()?;
//! driver.notify(0);
//! assert_eq!(memory.take(), []); // after a reset the memory is the driver's
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # A hostile driver
//! A property of a device, which shrinks to the few actions that matter; `arbitrary` makes the same actions of a fuzzer's bytes.
//! ```
//! use proptest::prelude::*;
//! use vmm_devices::testkit::{MmioDriver, guest_memory, hostile_queue, replay};
//! use vmm_devices::virtio::Rng;
//!
//! proptest!(ProptestConfig::with_cases(16), |(actions in hostile_queue(16))| {
//!     let memory = guest_memory(0x2_0000).unwrap();
//!     let (driver, _) = MmioDriver::of(Rng::new(std::io::repeat(7)), &memory).unwrap();
//!     replay(&driver, &memory, &actions).unwrap();
//! });
//! ```

mod accesses;
mod disk;
mod driver;
mod faulty;
mod hostile;
mod interposed;
mod memory;
mod mmio;
mod network;
mod output;
mod pci;
mod queue;
mod racer;
mod recorder;

pub use accesses::{Access, MemoryRecorder, RecordedMap};
pub use disk::{BlockedDisk, DiskCall, FaultyDisk};
pub use driver::{Driver, StartError};
pub use faulty::{FaultyMap, FaultyMemory};
pub use hostile::{Action, Buffer, Entry, MIN_MEMORY, Place, Replayed, Violation, hostile_queue, replay};
pub use interposed::Interposed;
pub use memory::{Memory, guest_memory, guest_memory_of};
pub use mmio::MmioDriver;
pub use network::{TestFrame, TestNetwork};
pub use output::OutputRecorder;
pub use pci::{MissingStructure, PciDriver};
pub use queue::{ChainBuilder, DriverQueue};
pub use racer::Racer;
pub use recorder::{LineRecorder, LinkRecorder, MsiRecorder};

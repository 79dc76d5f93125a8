//! A kit to test a virtio device with no virtual machine: the driver's side of queues and transports, guest memory of any shape,
//! recorders of what a device does to others, a hostile driver, and one that races.
//!
//! | part | what |
//! |---|---|
//! | [`guest_memory`], [`guest_memory_of`] | guest memory; of regions that touch, and with holes between them |
//! | [`FaultyMemory`] | guest memory in small pieces, and that fails where it said that it would not |
//! | [`MemoryRecorder`] | guest memory that writes down each access: what was read twice, or touched too late |
//! | [`Driver`], [`MmioDriver`] | the driver's side of a transport, step by step or [all at once](Driver::start) |
//! | [`DriverQueue`] | the driver's side of a queue: good chains, and everything else |
//! | [`LineRecorder`], [`LinkRecorder`] | who was interrupted, and how often |
//! | [`FaultyDisk`] | a disk that remembers what it was asked for, and fails, waits, or comes back short, as it is told |
//! | [`OutputRecorder`] | a writer that remembers, takes a part, blocks, or fails, as it is told |
//! | [`hostile_queue`], [`replay`] | what a hostile driver does, drawn at random, and the rules that hold for every device |
//! | [`Racer`] | a driver that changes its memory while the device works |
//!
//! The driver is as well-behaved or as hostile as the test wants: each step of [`DriverQueue`] and [`Driver`] can be made
//! alone, in any order, with any value. Nothing here panics: what is not as it should be is an error, for the test to unwrap.
//!
//! # A device on its own
//! ```
//! use std::sync::{Arc, Mutex};
//! use vmm_devices::testkit::{Driver, DriverQueue, LineRecorder, MmioDriver, guest_memory};
//! use vmm_devices::virtio::{Rng, VirtioMmio};
//!
//! let memory = guest_memory(1 << 20)?;
//! let line = LineRecorder::default();
//! let device = VirtioMmio::new(Rng::new(std::io::repeat(7)), memory.clone(), line.clone())?;
//! let driver = MmioDriver::new(Arc::new(Mutex::new(device)));
//!
//! let mut queue = DriverQueue::new(memory, 0x1000, 8)?;
//! driver.start(0, &[(0, &queue)])?;
//! let head = queue.chain().writable(0x8000, 5).submit()?;
//! driver.notify(0);
//! assert_eq!(queue.take_used()?, Some((head.into(), 5)));
//! assert!(line.is_asserted());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # A hostile driver
//! A test of a device of your own, which shrinks to the few actions that matter; `arbitrary` makes the same actions of a
//! fuzzer's bytes.
//! ```
//! use std::sync::{Arc, Mutex};
//! use proptest::prelude::*;
//! use vmm_devices::testkit::{LineRecorder, MmioDriver, guest_memory, hostile_queue, replay};
//! use vmm_devices::virtio::{Rng, VirtioMmio};
//!
//! proptest!(ProptestConfig::with_cases(16), |(actions in hostile_queue(16))| {
//!     let memory = guest_memory(0x2_0000).unwrap();
//!     let device = Rng::new(std::io::repeat(7));
//!     let device = VirtioMmio::new(device, memory.clone(), LineRecorder::default()).unwrap();
//!     replay(&MmioDriver::new(Arc::new(Mutex::new(device))), &memory, &actions).unwrap();
//! });
//! ```

mod accesses;
mod disk;
mod driver;
mod faulty;
mod hostile;
mod interposed;
mod memory;
mod output;
mod queue;
mod racer;
mod recorder;

pub use accesses::{Access, MemoryRecorder, RecordedMap};
pub use disk::{BlockedDisk, DiskCall, FaultyDisk};
pub use driver::{Driver, MmioDriver, PciDriver, StartError};
pub use faulty::{FaultyMap, FaultyMemory};
pub use hostile::{Action, Buffer, Entry, MIN_MEMORY, Place, Replayed, Violation, hostile_queue, replay};
pub use interposed::Interposed;
pub use memory::{Memory, guest_memory, guest_memory_of};
pub use output::OutputRecorder;
pub use queue::{ChainBuilder, DriverQueue};
pub use racer::Racer;
pub use recorder::{LineRecorder, LinkRecorder};

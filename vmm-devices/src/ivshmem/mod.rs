//! Memory that virtual machines have in common, and doorbells between them: a PCI device that is compatible with QEMU's `ivshmem-plain`
//! and `ivshmem-doorbell` (1af4:1110 revision 1; QEMU docs/specs/ivshmem-spec).
//!
//! | part | what |
//! |---|---|
//! | [`Region`] | the memory, with a name by which grants mean it |
//! | [`Hub`] | brings devices of one process together at a region |
//! | [`Server`], [`Client`] | bring those of several processes together, by QEMU's protocol |
//! | [`Member`] | a device's seat at a region, however it got there |
//! | [`Ivshmem`] | the PCI function |
//! | [`RegionMapper`] | how the memory gets into a guest's address space: BAR 2 is not registers but the memory itself |
//!
//! ```
//! use std::sync::{Arc, Mutex};
//! use vmm_devices::channel::{AllowAll, DoorbellRing, Gatekeeper, Party, RegionMap, VmIdentity};
//! use vmm_devices::ivshmem::{Hub, Ivshmem, Region};
//! use vmm_devices::vmm_memory::{Access, SharedMemory};
//!
//! let hub = Hub::new(Region::new("frames", SharedMemory::create("frames", 1 << 20)?)?, 2)?;
//! let gatekeeper = Gatekeeper::new(AllowAll);
//! let device = |uuid| -> Result<Ivshmem, Box<dyn std::error::Error>> {
//!     let vm = Party::Vm(VmIdentity::new(uuid, 1));
//!     let region = Arc::clone(hub.region().name());
//!     let map = RegionMap { region: Arc::clone(&region), access: Access::ReadWrite };
//!     let map = gatekeeper.open(vm.clone(), None, map)?;
//!     let ring = gatekeeper.open(vm, None, DoorbellRing { region })?;
//!     let send = |address: u64, data: u32| println!("MSI {address:#x} {data:#x}");
//!     Ok(Ivshmem::builder(hub.join(map, Some(ring))?, send).build()?)
//! };
//! // Each goes to the host bridge of a machine of its own.
//! let functions = [Mutex::new(device(1)?), Mutex::new(device(2)?)];
//! assert_eq!(hub.members(), [0, 1]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Rights
//! A seat takes a `Grant<RegionMap>`, which says whether the guest reads or writes as well, and one that rings takes a
//! `Grant<DoorbellRing>`. When the gatekeeper takes the first one back, the device is quiesced, unmapped, drained and closed, in this
//! order, before `revoke` returns: loads give all ones, stores and rings do nothing, peers and server see it leave. Without the second one the
//! guest rings nobody, and is still rung for.
//!
//! Between processes a right binds whoever keeps to it. A [`Server`] that takes one back disconnects the peer, tells it, and a [`Client`] then
//! does all of the above; a process that is hostile keeps the mappings and eventfds that it was given, since a descriptor cannot be
//! called back. What it cannot do is more than it was given: a right to read comes with a descriptor for reading.
//!
//! # Interrupts
//! By MSI-X, a vector for each that peers ring. While the guest has that off, a ring sets bit 0 of Interrupt Status, and asserts INTA# if
//! Interrupt Mask has it, as the device's revision 0 did: so a driver without MSI-X (Linux's `uio_pci_generic`) gets interrupts as well. To
//! drivers that go by revision 1, where both registers are reserved, nothing of this is visible.
//!
//! # Threat model
//! The guest is hostile: it stores any value at any register, moves and switches BARs while its vCPUs use them, and rings as often as it
//! can. Peers and vectors that are not there are counted and nothing else; rings are counted, and limited if the monitor says so; BAR 2
//! is where the host bridge lets it be, never over RAM or another device. Peers are hostile as well: what they write into
//! the memory is theirs to choose, at any moment, also between two loads of the guest. In another process they cannot make this one
//! end (the memory's size is sealed, or it is refused), wait, or take descriptors without bound.
//!
//! # What there is not
//! * **Revision 0** with its legacy options, and migration of the memory (`master`): its owner saves it.
//! * **Huge pages** for regions: what `SharedMemory` is made of.

mod bellhop;
mod bells;
mod device;
mod error;
mod eventfd;
mod hub;
mod metrics;
mod pacer;
mod port;
mod region;
mod registers;
pub mod server;
#[cfg(test)]
mod tests;
mod window;

pub use device::{Ivshmem, IvshmemBuilder, IvshmemState};
pub use error::IvshmemError;
pub use hub::Hub;
pub use metrics::{IvshmemFigures, IvshmemMetrics};
pub use pacer::Pacer;
pub use region::{Member, Region};
pub use server::{Client, Server};
pub use window::RegionMapper;

/// Vectors that a peer has at most: for each pair of peers, each is a descriptor in both of their processes.
pub const MAX_VECTORS: u16 = 64;

/// Peers that a region has at most.
pub const MAX_PEERS: usize = 256;

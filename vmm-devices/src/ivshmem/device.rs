//! The PCI function.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use super::error::IvshmemError;
use super::metrics::IvshmemFigures;
use super::pacer::Pacer;
use super::region::Member;
use super::registers::{Interrupts, register};
use super::window::{Failed, RegionMapper};
use crate::clock::Clock;
use crate::error::StateError;
use crate::interrupt::{MsiSink, lock};
use crate::pci::{
    Bar, ConfigBuilder, ConfigSpace, ConfigState, Identity, InterruptPin, Msix, MsixPlace, MsixState,
    PciFunction,
};
use crate::virtio::DoorbellHost;
use crate::virtio::rate::Rate;

const DEVICE: &str = "ivshmem";

/// What it is known as (QEMU docs/specs/ivshmem-spec).
const IDENTITY: Identity = Identity::new(0x1af4, 0x1110, [0x05, 0, 0]).revision(1).subsystem(0x1af4, 0x1100);

const REGISTERS: usize = 0;
const REGISTERS_SIZE: u64 = 0x100;
const VECTORS: usize = 1;
const VECTORS_SIZE: u64 = 0x1000;
const PENDING: u64 = 0x800;
const MEMORY: usize = 2;

/// Shared memory and doorbells as a PCI function. In a `Mutex` it goes to a [`HostBridge`](crate::pci::HostBridge).
pub struct Ivshmem {
    config: ConfigSpace,
    member: Member,
}

/// What of an [`Ivshmem`] a guest can change, but for the memory, which is not the device's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct IvshmemState {
    /// Which one its peers took it for. It goes on at the same position ([`Hub::join_at`](super::Hub::join_at)).
    pub position: u16,
    /// Interrupt Mask.
    pub mask: u32,
    /// Interrupt Status.
    pub status: u32,
    /// Configuration space: BARs among others.
    pub config: ConfigState,
    /// The vectors, where there are doorbells.
    pub msix: Option<MsixState>,
}

impl Ivshmem {
    /// A function for a seat at shared memory, whose messages go to `sink`. It has MSI-X and a pin if the seat has vectors, and
    /// neither if not.
    pub fn builder(member: Member, sink: impl MsiSink + 'static) -> IvshmemBuilder {
        IvshmemBuilder {
            member,
            sink: Arc::new(sink),
            mapper: None,
            doorbells: None,
            pace: None,
            failed: None,
        }
    }

    /// The seat.
    pub fn member(&self) -> &Member {
        &self.member
    }

    /// What the device has done.
    pub fn figures(&self) -> IvshmemFigures {
        self.member.figures()
    }

    /// What rings that wait need, if there is a limit.
    pub fn pacer(&self) -> Option<Arc<Pacer>> {
        self.member.port.pacer().cloned()
    }

    /// Where the guest sees the memory without the bus.
    pub fn mapped_at(&self) -> Option<u64> {
        lock(&self.member.port.window).mapped().map(|gpa| gpa.0)
    }

    /// What a guest can change.
    pub fn state(&self) -> IvshmemState {
        let (mask, status, msix) = self.member.port.interrupts().map(Interrupts::state).unwrap_or_default();
        IvshmemState { position: self.member.position(), mask, status, config: self.config.state(), msix }
    }

    /// Goes on from a saved state. The bridge does not know before it is told:
    /// [`HostBridge::restore`](crate::pci::HostBridge::restore), or [`refresh`](crate::pci::HostBridge::refresh).
    ///
    /// # Errors
    /// [`StateError`] if it is another device's: another position, or other vectors; nothing has changed.
    pub fn restore(&mut self, state: &IvshmemState) -> Result<(), StateError> {
        let ours = self.state();
        let same = state.position == ours.position;
        StateError::check(same, DEVICE, "position", state.position, "that of the seat")?;
        let same = state.msix.is_some() == ours.msix.is_some();
        StateError::check(same, DEVICE, "MSI-X", u64::from(state.msix.is_some()), "as the seat has it")?;
        self.config.restore(&state.config)?;
        let restored = self.member.port.interrupts().map_or(Ok(()), |interrupts| {
            interrupts.restore((state.mask, state.status, state.msix.as_ref()), &self.config)
        });
        if restored.is_err() {
            // What was there a moment ago can be.
            self.config.restore(&ours.config)?;
        }
        restored
    }

    /// A register as the guest loads it.
    fn load(&self, register: u64) -> u32 {
        let port = &self.member.port;
        match register {
            register::POSITION => u32::from(port.position()),
            register::MASK | register::STATUS => {
                port.interrupts().map_or(0, |interrupts| interrupts.load(register))
            }
            _ => 0,
        }
    }

    fn store(&self, register: u64, value: u32) {
        let port = &self.member.port;
        match register {
            register::DOORBELL => {
                let [vector_low, vector_high, peer_low, peer_high] = value.to_le_bytes();
                let peer = u16::from_le_bytes([peer_low, peer_high]);
                port.ring(peer, u16::from_le_bytes([vector_low, vector_high]));
            }
            register::MASK | register::STATUS => {
                if let Some(interrupts) = port.interrupts() {
                    interrupts.store(register, value);
                }
            }
            _ => {}
        }
    }

    /// Loads of any width and place: of each register that they touch, once, their bytes.
    fn load_registers(&self, offset: u64, data: &mut [u8]) {
        let mut held: Option<(u64, [u8; 4])> = None;
        for (at, byte) in (offset..).zip(data) {
            let register = at / 4;
            let bytes = match held {
                Some((of, bytes)) if of == register => bytes,
                _ => self.load(register).to_le_bytes(),
            };
            held = Some((register, bytes));
            *byte = usize::try_from(at % 4).ok().and_then(|into| bytes.get(into)).copied().unwrap_or(0);
        }
    }

    /// Stores of whole registers; others are none.
    fn store_registers(&self, offset: u64, data: &[u8]) {
        let (words, rest) = data.as_chunks::<4>();
        if !offset.is_multiple_of(4) || !rest.is_empty() || words.is_empty() {
            self.member.port.metrics.malformed.one();
            return;
        }
        for (register, word) in (offset / 4..).zip(words) {
            self.store(register, u32::from_le_bytes(*word));
        }
    }
}

impl PciFunction for Ivshmem {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        let port = &self.member.port;
        match bar {
            REGISTERS => self.load_registers(offset, data),
            VECTORS => {
                let msix = port.interrupts().and_then(Interrupts::msix);
                if !msix.is_some_and(|msix| msix.read(bar, offset, data)) {
                    data.fill(0);
                }
            }
            MEMORY => lock(&port.window).load(offset, data, &port.metrics),
            _ => {}
        }
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        let port = &self.member.port;
        match bar {
            REGISTERS => self.store_registers(offset, data),
            VECTORS => {
                // What is neither table nor pending bits is nothing.
                port.interrupts().and_then(Interrupts::msix).map(|msix| msix.write(bar, offset, data));
            }
            MEMORY => lock(&port.window).store(offset, data, &port.metrics),
            _ => {}
        }
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        if let Some(interrupts) = self.member.port.interrupts() {
            interrupts.config_written(&self.config);
        }
    }

    fn bar_moved(&mut self, bar: usize, at: Option<u64>) {
        let port = &self.member.port;
        match bar {
            REGISTERS => lock(&port.bells).moved(at),
            MEMORY => lock(&port.window).moved(at, &port.metrics),
            _ => {}
        }
    }

    fn reset(&mut self) {
        if let Some(interrupts) = self.member.port.interrupts() {
            interrupts.reset();
        }
    }
}

impl fmt::Debug for Ivshmem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ivshmem").field("member", &self.member).finish_non_exhaustive()
    }
}

/// What a limit needs.
struct Pace {
    rate: Rate,
    clock: Arc<dyn Clock>,
    wake: Box<dyn Fn(u64) + Send + Sync>,
}

/// See [`Ivshmem::builder`].
pub struct IvshmemBuilder {
    member: Member,
    sink: Arc<dyn MsiSink>,
    mapper: Option<Box<dyn RegionMapper>>,
    doorbells: Option<Box<dyn DoorbellHost>>,
    pace: Option<Pace>,
    failed: Option<Failed>,
}

impl fmt::Debug for IvshmemBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IvshmemBuilder").field("member", &self.member).finish_non_exhaustive()
    }
}

impl IvshmemBuilder {
    /// Shows the memory to the guest without the bus.
    #[must_use]
    pub fn mapper(mut self, mapper: impl RegionMapper + 'static) -> Self {
        self.mapper = Some(Box::new(mapper));
        self
    }

    /// Has a kernel ring for peers of other processes, so that a ring does not come to the monitor; not with a
    /// [limit](Self::ring_rate), which it would not keep.
    #[must_use]
    pub fn doorbells(mut self, host: impl DoorbellHost + 'static) -> Self {
        self.doorbells = Some(Box::new(host));
        self
    }

    /// Limits how often the guest rings. What is beyond waits: `wake` is called with the time of `clock` at which
    /// [`Pacer::service`] is due, on the thread of the vCPU; it must not call the device.
    #[must_use]
    pub fn ring_rate(
        mut self,
        rate: Rate,
        clock: Arc<dyn Clock>,
        wake: impl Fn(u64) + Send + Sync + 'static,
    ) -> Self {
        self.pace = Some(Pace { rate, clock, wake: Box::new(wake) });
        self
    }

    /// Called when the memory could not be mapped where the guest wants it, or not be unmapped. It must not call the device.
    #[must_use]
    pub fn on_failure(mut self, failed: impl Fn(&dyn Error) + Send + 'static) -> Self {
        self.failed = Some(Box::new(failed));
        self
    }

    /// # Errors
    /// [`IvshmemError::Pci`] if the seat has more memory or vectors than its BARs can have.
    pub fn build(self) -> Result<Ivshmem, IvshmemError> {
        let Self { member, sink, mapper, doorbells, pace, failed } = self;
        let mut config = ConfigBuilder::new(IDENTITY);
        config.bar(REGISTERS, Bar::memory32(REGISTERS_SIZE))?;
        let mut msix = None;
        if member.vectors() > 0 {
            config.bar(VECTORS, Bar::memory32(VECTORS_SIZE))?;
            config.interrupt_pin(InterruptPin::A);
            let place = MsixPlace { bar: VECTORS, table: 0, pending: PENDING };
            msix = Some(Msix::new(&mut config, member.vectors(), place, sink)?);
        }
        config.bar(MEMORY, Bar::memory64(member.size()).prefetchable())?;
        let config = config.build();
        let port = &member.port;
        port.connect(Interrupts::new(msix, config.intx().cloned()));
        lock(&port.window).connect(mapper, failed);
        match (pace, doorbells) {
            (Some(Pace { rate, clock, wake }), _) => {
                port.pace(Arc::new(Pacer::new(rate, clock, wake, Arc::downgrade(port))));
            }
            (None, Some(host)) => lock(&port.bells).connect_kernel(host),
            (None, None) => {}
        }
        Ok(Ivshmem { config, member })
    }
}

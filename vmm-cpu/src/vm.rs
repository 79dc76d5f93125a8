//! [`Vm`] and the optional capabilities that a virtual machine may show.
//!
//! Each capability is a trait of its own behind `Option<Arc<dyn Trait>>`, so device threads can
//! keep what they need and a caller sees what is absent.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use vmm_memory::vm_memory::{GuestAddress, GuestMemoryRegion as _};
use vmm_memory::{DirtyLog, GuestRam, GuestRegion, is_read_only};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::coalesced::CoalescedWrites;
use crate::error::{Error, Result};
use crate::private_memory::{GuestMemfds, PrivateMemory};
use crate::state::{CpuState, VmState};
use crate::vcpu::Vcpu;

/// What a guest may do with a memory region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GuestAccess {
    /// Read, write, execute.
    ReadWrite,
    /// Read and execute; a write becomes [`VcpuIo::mmio_write`](crate::VcpuIo::mmio_write).
    ReadOnly,
}

/// One virtual machine: guest-physical memory, vCPUs, and optional capabilities.
///
/// Shared between threads; every method may be called while vCPUs run.
pub trait Vm: fmt::Debug + Send + Sync {
    /// Lets the guest see `region` at its guest-physical base. The virtual machine holds the region
    /// (and so its host mapping) until [`Vm::unmap_memory`] or its own end.
    ///
    /// # Errors
    /// [`Error::RegionOverlap`](crate::Error::RegionOverlap) if another region is in the way.
    fn map_memory(&self, region: Arc<GuestRegion>, access: GuestAccess) -> Result<()>;

    /// Takes the region that starts at `gpa` away from the guest and gives it back. When this
    /// returns, no vCPU can reach the region any more.
    ///
    /// # Errors
    /// [`Error::NoSuchRegion`](crate::Error::NoSuchRegion).
    fn unmap_memory(&self, gpa: GuestAddress) -> Result<Arc<GuestRegion>>;

    /// Creates vCPU `index` in its state after RESET (Intel SDM 3A 11.1.1). Where the backend has local
    /// APICs, vCPU 0 is the bootstrap processor and the others wait for INIT and SIPI.
    ///
    /// An index may be used up for good (it is on `kvm`), also by a vCPU that was dropped and by one that could not be
    /// restored: to try again, create the virtual machine anew.
    ///
    /// # Errors
    /// [`Error::TooManyVcpus`](crate::Error::TooManyVcpus),
    /// [`Error::VcpuExists`](crate::Error::VcpuExists).
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>>;

    /// Creates vCPU `index` with a saved state.
    ///
    /// # Errors
    /// As [`Vm::create_vcpu`], and [`Error::InvalidState`](crate::Error::InvalidState).
    fn restore_vcpu(&self, index: u32, state: &CpuState) -> Result<Box<dyn Vcpu>> {
        let mut vcpu = self.create_vcpu(index)?;
        vcpu.restore(state)?;
        Ok(vcpu)
    }

    /// State of what belongs to no single vCPU: interrupt controllers, timer, clock. Meaningful
    /// while no vCPU runs.
    ///
    /// # Errors
    /// Whatever the backend's host says.
    fn save(&self) -> Result<VmState>;

    /// Numbered interrupt lines ([`InterruptMode::Platform`](crate::InterruptMode::Platform)).
    fn interrupt_lines(&self) -> Option<Arc<dyn InterruptLines>> {
        None
    }

    /// Message-signalled interrupts (backends with local APICs).
    fn msi(&self) -> Option<Arc<dyn MsiSink>> {
        None
    }

    /// Notifiers that raise interrupt lines, without a detour through the VMM's threads.
    fn interrupt_notifiers(&self) -> Option<Arc<dyn InterruptNotifiers>> {
        None
    }

    /// Guest writes that signal notifiers instead of calling [`VcpuIo`](crate::VcpuIo).
    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        None
    }

    /// Pages written by the guest.
    fn dirty_log(&self) -> Option<Arc<dyn GuestDirtyLog>> {
        None
    }

    /// Guest writes that are gathered and handed over together.
    fn coalesced_writes(&self) -> Option<Arc<dyn CoalescedWrites>> {
        None
    }

    /// Guest memory in guest_memfds.
    fn guest_memfds(&self) -> Option<Arc<dyn GuestMemfds>> {
        None
    }

    /// Guest memory that the monitor cannot reach.
    fn private_memory(&self) -> Option<Arc<dyn PrivateMemory>> {
        None
    }

    /// Which model-specific registers are passed on to [`VcpuIo`](crate::VcpuIo).
    fn msr_filter(&self) -> Option<Arc<dyn MsrFilter>> {
        None
    }

    /// Which hypercalls are passed on to [`VcpuIo`](crate::VcpuIo).
    fn hypercalls(&self) -> Option<Arc<dyn Hypercalls>> {
        None
    }

    /// The virtual machine's one clock.
    fn clock(&self) -> Option<Arc<dyn VmClock>> {
        None
    }
}

impl dyn Vm {
    /// Maps every region of `ram`; regions whose host mapping is read-only become
    /// [`GuestAccess::ReadOnly`]. Regions that are in a guest_memfd are mapped with that.
    ///
    /// # Errors
    /// As [`Vm::map_memory`] and [`GuestMemfds::map`], and [`Error::Unsupported`](crate::Error::Unsupported) for a region in
    /// a guest_memfd where the backend has none; the regions mapped so far stay mapped.
    pub fn map_ram(&self, ram: &GuestRam) -> Result<()> {
        for region in ram.regions() {
            let access = if is_read_only(&region) { GuestAccess::ReadOnly } else { GuestAccess::ReadWrite };
            match ram.guest_memfd(region.start_addr()) {
                None => self.map_memory(region, access)?,
                Some(range) => match self.guest_memfds() {
                    Some(memfds) => memfds.map(region, access, &range)?,
                    None => return Err(Error::unsupported("guest_memfd", "the backend has none")),
                },
            }
        }
        Ok(())
    }
}

/// A region that the guest sees for as long as this value lives: dropping it revokes the guest's
/// access, then releases the mapping. Made for regions shared between virtual machines.
#[derive(Debug)]
pub struct MappedRegion {
    vm: Arc<dyn Vm>,
    gpa: GuestAddress,
    mapped: bool,
}

impl MappedRegion {
    /// Maps `region` into `vm`.
    ///
    /// # Errors
    /// As [`Vm::map_memory`].
    pub fn new(vm: Arc<dyn Vm>, region: Arc<GuestRegion>, access: GuestAccess) -> Result<Self> {
        let gpa = region.start_addr();
        vm.map_memory(region, access)?;
        Ok(Self { vm, gpa, mapped: true })
    }

    /// Where the guest sees it.
    pub fn gpa(&self) -> GuestAddress {
        self.gpa
    }

    /// Revokes the guest's access now and reports a failure, which dropping can only log.
    ///
    /// # Errors
    /// As [`Vm::unmap_memory`].
    pub fn revoke(mut self) -> Result<Arc<GuestRegion>> {
        self.mapped = false;
        self.vm.unmap_memory(self.gpa)
    }
}

impl Drop for MappedRegion {
    fn drop(&mut self) {
        if self.mapped
            && let Err(error) = self.vm.unmap_memory(self.gpa)
        {
            tracing::error!(gpa = self.gpa.0, %error, "a region could not be revoked");
        }
    }
}

/// Numbered interrupt lines (global system interrupts, ACPI 6.5 5.2.13).
pub trait InterruptLines: fmt::Debug + Send + Sync {
    /// Drives line `gsi`. Level-triggered lines stay asserted until driven low; for edge-triggered
    /// ones the rising edge counts. A line without a route leads nowhere.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if there is no such line.
    fn set_level(&self, gsi: u32, asserted: bool) -> Result<()>;

    /// Says where the lines lead, replacing all routes. The initial routes are those of a PC: lines
    /// 0 to 15 to PIC and I/O APIC, 16 to 23 to the I/O APIC, except in
    /// [`InterruptMode::LocalApic`](crate::InterruptMode::LocalApic), where there are none.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) naming the route that is wrong.
    fn set_routes(&self, routes: &[GsiRoute]) -> Result<()>;
}

/// Where one interrupt line leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GsiRoute {
    /// The line.
    pub gsi: u32,
    /// Its end. A line with several ends has several routes.
    pub target: GsiTarget,
}

impl GsiRoute {
    /// Line `gsi` leads to `target`.
    pub fn new(gsi: u32, target: GsiTarget) -> Self {
        Self { gsi, target }
    }
}

/// The end of an interrupt line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GsiTarget {
    /// Input `pin` (0 to 23) of the I/O APIC.
    IoApic {
        /// The input pin.
        pin: u8,
    },
    /// Input `pin` (0 to 15, those of the slave from 8) of the pair of 8259A PICs.
    Pic {
        /// The input pin.
        pin: u8,
    },
    /// A message.
    Msi(MsiMessage),
}

/// A message-signalled interrupt (PCI 3.0 6.8; Intel SDM 3A 12.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Message address: `0xfee0_0000` and its destination fields.
    pub address: u64,
    /// Message data: vector, delivery mode, trigger mode.
    pub data: u32,
}

/// Delivers message-signalled interrupts.
pub trait MsiSink: fmt::Debug + Send + Sync {
    /// Delivers `message` now. Returns whether some vCPU's local APIC took it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the low half of the address is outside of
    /// `0xfee0_0000..=0xfeef_ffff` or the high half holds more than bits 8 to 31 of a 32-bit destination.
    fn send(&self, message: MsiMessage) -> Result<bool>;
}

/// A counter that one side signals and another waits for. On Linux an eventfd.
#[derive(Debug)]
pub struct Notifier {
    event_fd: EventFd,
    identity: Arc<NotifierIdentity>,
}

/// What all handles to one [`Notifier`] share, so that a backend can tell whether two are the same.
#[derive(Debug)]
pub(crate) struct NotifierIdentity;

impl Notifier {
    /// A notifier with no signal pending.
    ///
    /// # Errors
    /// If the host has no more descriptors.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Self::from)
    }

    /// Another handle to the same notifier: what was attached with one can be detached with the other.
    ///
    /// # Errors
    /// If the host has no more descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { event_fd: self.event_fd.try_clone()?, identity: Arc::clone(&self.identity) })
    }

    #[cfg_attr(not(feature = "kvm"), allow(dead_code, reason = "for backends that are compiled in"))]
    pub(crate) fn identity(&self) -> &Arc<NotifierIdentity> {
        &self.identity
    }

    /// Signals.
    ///
    /// # Errors
    /// Only if the host's descriptor is broken.
    pub fn notify(&self) -> io::Result<()> {
        match self.event_fd.write(1) {
            // A full counter is a pending signal already.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }

    /// Takes the signals since the last call, without waiting: how many there were.
    ///
    /// # Errors
    /// Only if the host's descriptor is broken.
    pub fn take(&self) -> io::Result<u64> {
        match self.event_fd.read() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            result => result,
        }
    }

    /// Waits at most `timeout` for a signal and takes it: how many there were, 0 on time-out.
    ///
    /// # Errors
    /// Only if the host's descriptor is broken.
    pub fn wait(&self, timeout: Duration) -> io::Result<u64> {
        use vmm_sys_util::poll::{PollContext, WatchingEvents};
        let context = PollContext::<u64>::new().map_err(io::Error::from)?;
        context
            .add_fd_with_events(&self.event_fd, WatchingEvents::empty().set_read(), 0)
            .map_err(io::Error::from)?;
        context.wait_timeout(timeout).map_err(io::Error::from)?;
        self.take()
    }

    /// The eventfd, for event loops and for backends.
    pub fn event_fd(&self) -> &EventFd {
        &self.event_fd
    }
}

impl From<EventFd> for Notifier {
    /// Takes over an eventfd, which should be non-blocking, as a notifier of its own.
    fn from(event_fd: EventFd) -> Self {
        Self { event_fd, identity: Arc::new(NotifierIdentity) }
    }
}

/// Where a doorbell rings: a guest write there is consumed and signals a notifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DoorbellAddress {
    /// OUT to this port.
    Pio(u16),
    /// A store to this guest-physical address.
    Mmio(GuestAddress),
}

/// A doorbell: address, width and value of the guest write that rings it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Doorbell {
    /// Where.
    pub address: DoorbellAddress,
    /// Width of the write in bytes: 1, 2, 4 or 8 (at most 4 for a port).
    pub width: u8,
    /// The value that rings; `None`: any. Other values go to [`VcpuIo`](crate::VcpuIo).
    pub value: Option<u64>,
}

impl Doorbell {
    /// A write of `width` bytes of any value at `address`.
    pub fn new(address: DoorbellAddress, width: u8) -> Self {
        Self { address, width, value: None }
    }

    /// Only writes of `value` ring.
    #[must_use]
    pub fn matching(mut self, value: u64) -> Self {
        self.value = Some(value);
        self
    }
}

/// Connects notifiers with interrupt lines.
pub trait InterruptNotifiers: fmt::Debug + Send + Sync {
    /// Each signal of `notifier` raises line `gsi`: an edge, or, with `resample`, a level that stays
    /// until the guest's end of interrupt, which signals `resample`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the notifier is attached already.
    fn attach_interrupt(&self, gsi: u32, notifier: &Notifier, resample: Option<&Notifier>) -> Result<()>;

    /// Undoes [`InterruptNotifiers::attach_interrupt`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if it is not attached.
    fn detach_interrupt(&self, gsi: u32, notifier: &Notifier) -> Result<()>;
}

/// Connects notifiers with guest writes.
pub trait Doorbells: fmt::Debug + Send + Sync {
    /// Each matching guest write signals `notifier`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a width that does not exist or a
    /// doorbell that is attached already.
    fn attach_doorbell(&self, doorbell: &Doorbell, notifier: &Notifier) -> Result<()>;

    /// Undoes [`Doorbells::attach_doorbell`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if it is not attached.
    fn detach_doorbell(&self, doorbell: &Doorbell, notifier: &Notifier) -> Result<()>;
}

/// The backend's log of pages that the guest wrote, as a source for
/// [`DirtyTracker`](vmm_memory::DirtyTracker).
pub trait GuestDirtyLog: DirtyLog {
    /// Starts logging for the region that starts at `gpa`; its log begins empty.
    ///
    /// # Errors
    /// [`Error::NoSuchRegion`](crate::Error::NoSuchRegion).
    fn start(&self, gpa: GuestAddress) -> Result<()>;

    /// Stops logging for the region that starts at `gpa` and forgets its log.
    ///
    /// # Errors
    /// [`Error::NoSuchRegion`](crate::Error::NoSuchRegion).
    fn stop(&self, gpa: GuestAddress) -> Result<()>;
}

/// A range of model-specific registers to pass on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct MsrRange {
    /// First register.
    pub first: u32,
    /// How many, at least 1.
    pub count: u32,
    /// Whether reads are passed on.
    pub reads: bool,
    /// Whether writes are passed on.
    pub writes: bool,
}

impl MsrRange {
    /// Reads and writes of `count` registers from `first`.
    pub fn new(first: u32, count: u32) -> Self {
        Self { first, count, reads: true, writes: true }
    }

    /// Only reads.
    #[must_use]
    pub fn reads_only(mut self) -> Self {
        (self.reads, self.writes) = (true, false);
        self
    }

    /// Only writes.
    #[must_use]
    pub fn writes_only(mut self) -> Self {
        (self.reads, self.writes) = (false, true);
        self
    }
}

/// Chooses the model-specific registers whose access becomes a call on
/// [`VcpuIo`](crate::VcpuIo) instead of being served by the backend.
pub trait MsrFilter: fmt::Debug + Send + Sync {
    /// Passes on `ranges` (replacing the previous choice) and, if `unknown`, whatever the backend
    /// does not implement.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for an empty range or more ranges than
    /// the backend can hold.
    fn pass_on(&self, ranges: &[MsrRange], unknown: bool) -> Result<()>;
}

/// Chooses the hypercalls that become a call on [`VcpuIo::hypercall`](crate::VcpuIo::hypercall).
pub trait Hypercalls: fmt::Debug + Send + Sync {
    /// Passes on hypercall `nr`.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) if the backend cannot forward that number.
    fn pass_on(&self, nr: u64) -> Result<()>;
}

/// The clock that all vCPUs of a virtual machine share.
pub trait VmClock: fmt::Debug + Send + Sync {
    /// Guest time-stamp-counter frequency in kHz.
    fn tsc_khz(&self) -> u32;

    /// Guest time in nanoseconds since the virtual machine was created, pauses not counted.
    ///
    /// # Errors
    /// Whatever the backend's host says.
    fn now(&self) -> Result<u64>;

    /// Stops the clock. No vCPU may run until [`VmClock::resume`]. Pausing twice is pausing once.
    ///
    /// # Errors
    /// Whatever the backend's host says.
    fn pause(&self) -> Result<()>;

    /// Lets guest time and the time-stamp counters go on where they stopped.
    ///
    /// # Errors
    /// Whatever the backend's host says.
    fn resume(&self) -> Result<()>;

    /// Whether the time-stamp counters are the host's own ([`ClockSource::HostTsc`](crate::ClockSource::HostTsc)).
    fn is_host_tsc(&self) -> bool {
        false
    }
}

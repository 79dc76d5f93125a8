//! What the virtual processors of a domain have in common.
//!
//! Locks are leaves: none is held while another is taken or while anything outside is called.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use vmm_memory::GuestRam;
use vmm_memory::vm_memory::GuestAddress;

use super::abi::errno::Errno;
use super::abi::event::PORTS;
use super::abi::sched::ShutdownReason;
use super::abi::{PAGE_BYTES, PAGE_SIZE, domid, shared_info};
use super::console::{Console, ConsoleSink, NoConsole};
use super::engine::{EngineHandle, Layout};
use super::event_channels::EventChannels;
use super::events::{Ports, Target};
use super::gate::{BackendsOnly, EventSink, Gate};
use super::grants::Grants;
use super::memory::DomainMemory;
use super::processor::Processor;
use super::tables::Tables;
use super::time::Clock;
use crate::cpuid::CpuidTable;
use crate::error::{Error, Result};

/// What a domain is made from.
#[derive(Debug)]
#[non_exhaustive]
pub struct DomainConfig {
    /// Guest-physical memory, with all parts of `layout`.
    pub ram: GuestRam,
    /// Where they are.
    pub layout: Layout,
    /// Virtual processors, 1 to 32.
    pub vcpus: u32,
    /// Rate of the time-stamp counter that the guest reads.
    pub tsc_khz: u32,
    /// What the guest's CPUID gives, Xen's own leaves included (see [`pv_cpuid`](super::pv_cpuid)).
    pub cpuid: CpuidTable,
    /// Where the console goes.
    pub console: Box<dyn ConsoleSink>,
    /// Whom the domain may talk to.
    pub gate: Box<dyn Gate>,
    /// Wall-clock time of the start, since the Unix epoch; `None` takes the host's.
    pub boot_time: Option<Duration>,
}

impl DomainConfig {
    /// A domain of one virtual processor, without console, that may talk to back ends only.
    pub fn new(ram: GuestRam, layout: Layout, tsc_khz: u32) -> Self {
        Self {
            ram,
            layout,
            vcpus: 1,
            tsc_khz,
            cpuid: CpuidTable::default(),
            console: Box::new(NoConsole),
            gate: Box::new(BackendsOnly),
            boot_time: None,
        }
    }
}

/// Hypercalls by number, for those that no table is long enough for a last entry.
const COUNTED: usize = 64;

/// A paravirtual domain.
#[derive(Debug)]
pub struct Domain {
    pub(crate) memory: DomainMemory,
    pub(crate) tables: Tables,
    pub(crate) ports: Ports,
    pub(crate) grants: Grants,
    pub(crate) console: Console,
    pub(crate) console_port: OnceLock<u32>,
    /// The guest has closed it: what has that number now is something else.
    console_closed: AtomicBool,
    pub(crate) clock: Clock,
    pub(crate) cpuid: CpuidTable,
    pub(crate) gate: Box<dyn Gate>,
    pub(crate) processors: Box<[Processor]>,
    pub(crate) assists: AtomicU64,
    shutdown: Mutex<Option<ShutdownReason>>,
    /// Hypercalls that do not exist, by number.
    unknown: [AtomicU64; COUNTED],
    shutdown_code: AtomicU8,
    /// Whether the times were written again, of a restored domain.
    pub(super) republished: Option<OnceLock<()>>,
}

/// What new domains have empty, and restored ones do not.
pub(super) struct Parts {
    pub(super) memory: DomainMemory,
    pub(super) tables: Tables,
    pub(super) ports: Ports,
    pub(super) grants: Grants,
    pub(super) processors: Box<[Processor]>,
    pub(super) restored: bool,
}

impl Domain {
    /// Makes the domain's state and writes the shared information; everything else of guest memory is left as it is.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for memory that does not fit the layout, no or too many virtual processors, or a rate of 0.
    pub fn new(config: DomainConfig) -> Result<Arc<Self>> {
        if !(1..=shared_info::LEGACY_VCPUS).contains(&config.vcpus) {
            return Err(Error::invalid(
                "virtual processors of a paravirtual domain",
                config.vcpus,
                "1 to 32",
            ));
        }
        let memory = DomainMemory::new(&config.ram, config.layout)?;
        let parts = Parts {
            tables: Tables::shown(memory.map(), config.layout),
            ports: Ports::new(config.vcpus),
            grants: Grants::new(),
            processors: (0..config.vcpus).map(|index| Processor::new(memory.legacy_info(index))).collect(),
            memory,
            restored: false,
        };
        let domain = Self::assemble(config, parts)?;
        domain.initialise_shared_info().map_err(|_| {
            Error::invalid("guest memory", "no shared information page", "all parts of the layout")
        })?;
        Ok(Arc::new(domain))
    }

    pub(super) fn assemble(config: DomainConfig, parts: Parts) -> Result<Self> {
        Ok(Self {
            memory: parts.memory,
            tables: parts.tables,
            ports: parts.ports,
            grants: parts.grants,
            console: Console::new(config.console),
            console_port: OnceLock::new(),
            console_closed: AtomicBool::new(false),
            clock: Clock::new(config.tsc_khz, config.boot_time)?,
            cpuid: config.cpuid,
            gate: config.gate,
            processors: parts.processors,
            assists: AtomicU64::new(0),
            shutdown: Mutex::new(None),
            unknown: [const { AtomicU64::new(0) }; COUNTED],
            shutdown_code: AtomicU8::new(u8::MAX),
            republished: parts.restored.then(OnceLock::new),
        })
    }

    fn initialise_shared_info(&self) -> Result<(), Errno> {
        let page = self.memory.shared_info();
        self.memory.write(page, &[0; PAGE_BYTES])?;
        // All channels start masked, as do the virtual processors themselves.
        self.memory.write(page + shared_info::EVTCHN_MASK, &[0xff; 512])?;
        for processor in &self.processors {
            self.memory.swap_byte(processor.info() + shared_info::UPCALL_MASK, 1)?;
        }
        Ok(())
    }

    /// Writes the wall-clock time of system time 0, which begins with the first virtual processor's first entry. The version is
    /// odd meanwhile, and another one after, for who reads on another processor, or was saved in the middle of that.
    pub(crate) fn publish_wall_clock(&self) -> Result<(), Errno> {
        let page = self.memory.shared_info();
        let boot = self.clock.boot_time();
        let [low, high] = split(boot.as_secs());
        let odd = self.memory.load_u32(page + shared_info::WC_VERSION)? | 1;
        self.memory.store_u32(page + shared_info::WC_VERSION, odd)?;
        self.memory.store_u32(page + shared_info::WC_SEC, low)?;
        self.memory.store_u32(page + shared_info::WC_SEC_HI, high)?;
        self.memory.store_u32(page + shared_info::WC_NSEC, boot.subsec_nanos())?;
        self.memory.store_u32(page + shared_info::WC_VERSION, odd.wrapping_add(1))
    }

    /// Frame of the shared information.
    pub fn shared_info_frame(&self) -> u64 {
        self.memory.shared_info() / PAGE_SIZE
    }

    /// The domain's clock.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// How many virtual processors there are.
    pub fn vcpus(&self) -> u32 {
        u32::try_from(self.processors.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn processor(&self, index: u32) -> Option<&Processor> {
        self.processors.get(index as usize)
    }

    /// Says how virtual processor `index` is reached while it runs. A second call changes nothing.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is no such virtual processor.
    pub fn set_handle(&self, index: u32, handle: Arc<dyn EngineHandle>) -> Result<()> {
        let processor = self.processor(index).ok_or_else(|| {
            Error::invalid("virtual processor", index, format_args!("less than {}", self.vcpus()))
        })?;
        processor.set_handle(handle);
        Ok(())
    }

    /// Takes the console's ring into service: creates its port, which the guest finds in its start information.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `frame` is not RAM of the domain or there is a ring already.
    pub fn attach_console(self: &Arc<Self>, frame: u64) -> Result<u32> {
        if !self.memory.is_ram(frame) {
            let allowed = format!("less than {}", self.memory.layout().frames());
            return Err(Error::invalid("frame of the console's ring", frame, allowed));
        }
        let second = || Error::invalid("console rings", 2, "one a domain");
        if self.console_port.get().is_some() {
            return Err(second());
        }
        let sink = Arc::new(ConsoleChannel(Arc::downgrade(self)));
        let port = self
            .ports
            .allocate_outside(domid::BACKEND, 1, false, sink)
            .map_err(|_| Error::invalid("event channels", PORTS, "a free one for the console"))?;
        if self.console_port.set(port).is_err() {
            // Another thread was faster. Nobody knows of this port.
            return self.events().close(port).and(Err(second()));
        }
        self.console.set_ring(frame);
        Ok(port)
    }

    /// Gives the guest input on its console. What it does not take in time is dropped, beyond 64 KiB.
    pub fn console_input(&self, bytes: &[u8]) {
        self.console.input(bytes);
        self.service_console();
    }

    pub(crate) fn service_console(&self) {
        if self.console.service(&self.memory) == Ok(true)
            && let Some(port) = self.open_console_port()
        {
            self.set_pending(port);
        }
    }

    /// The console's port, as long as the guest has it open.
    pub(crate) fn open_console_port(&self) -> Option<u32> {
        self.console_port.get().copied().filter(|_| !self.console_closed.load(Ordering::SeqCst))
    }

    /// The event channels, for back ends.
    pub fn events(self: &Arc<Self>) -> EventChannels {
        EventChannels(Arc::clone(self))
    }

    /// The machine-to-physical entry of every frame becomes the frame itself: the table of a domain whose machine frames
    /// are its physical ones.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the memory does not hold the table.
    pub fn identity_m2p(&self) -> Result<()> {
        for frame in 0..self.memory.layout().frames() {
            self.memory.set_m2p(frame, frame).map_err(|_| {
                Error::invalid("guest memory", "no machine-to-physical table", "all parts of the layout")
            })?;
        }
        Ok(())
    }

    /// Why the domain shut down, once it has.
    pub fn shutdown_reason(&self) -> Option<ShutdownReason> {
        *self.shutdown_lock()
    }

    fn shutdown_lock(&self) -> MutexGuard<'_, Option<ShutdownReason>> {
        self.shutdown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shuts the domain down: all virtual processors come back. The first reason stays.
    pub fn shut_down(&self, reason: ShutdownReason) {
        let latched = ShutdownReason::from_number(self.shutdown_code.load(Ordering::Acquire).into());
        self.shutdown_lock().get_or_insert(latched.unwrap_or(reason));
        for processor in &self.processors {
            processor.kick();
        }
    }

    /// The reason that a later shutdown reports, whatever it says.
    pub(crate) fn latch_shutdown(&self, number: u8) {
        let old = self.shutdown_code.load(Ordering::Acquire);
        if old == u8::MAX {
            self.shutdown_code.store(number, Ordering::Release);
        }
    }

    /// How often the guest called hypercall `nr` although there is none, or a command that there is not; numbers from 63
    /// up count together.
    pub fn unknown_hypercalls(&self, nr: u64) -> u64 {
        self.counter(nr).map_or(0, |counter| counter.load(Ordering::Relaxed))
    }

    pub(crate) fn count_unknown(&self, nr: u64) {
        if let Some(counter) = self.counter(nr) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The reason that [`Domain::latch_shutdown`] was told.
    #[cfg(feature = "snapshot")]
    pub(super) fn latched_shutdown(&self) -> Option<ShutdownReason> {
        ShutdownReason::from_number(self.shutdown_code.load(Ordering::Acquire).into())
    }

    #[cfg(feature = "snapshot")]
    pub(super) fn set_shutdown(&self, reason: Option<ShutdownReason>, latched: Option<ShutdownReason>) {
        *self.shutdown_lock() = reason;
        self.shutdown_code.store(latched.map_or(u8::MAX, ShutdownReason::number), Ordering::Release);
    }

    fn counter(&self, nr: u64) -> Option<&AtomicU64> {
        let index = usize::try_from(nr).map_or(COUNTED - 1, |nr| nr.min(COUNTED - 1));
        self.unknown.get(index)
    }

    pub(crate) fn has_assist(&self, kind: u64) -> bool {
        self.assists.load(Ordering::Relaxed) & (1 << kind) != 0
    }

    /// Makes a port pending and tells its virtual processor (Xen's two-level protocol). Called from any thread.
    pub(crate) fn set_pending(&self, port: u32) {
        if port == 0 || port >= PORTS {
            return;
        }
        let Some(vcpu) = self.ports.vcpu(port) else { return };
        let Some(processor) = self.processor(vcpu) else { return };
        let page = self.memory.shared_info();
        let (word, bit) = (u64::from(port / 64), 1_u64 << (port % 64));
        let Ok(old) = self.memory.set_bits(page + shared_info::EVTCHN_PENDING + word * 8, bit) else {
            return;
        };
        if old & bit != 0 {
            return;
        }
        let masked = self.memory.load(page + shared_info::EVTCHN_MASK + word * 8).unwrap_or(u64::MAX);
        if masked & bit == 0 {
            self.select(processor, word);
        }
        for processor in &self.processors {
            processor.wake_poller();
        }
    }

    /// Tells a virtual processor that word `word` of the bitmap holds something for it.
    fn select(&self, processor: &Processor, word: u64) {
        let info = processor.info();
        let Ok(old) = self.memory.set_bits(info + shared_info::PENDING_SEL, 1 << word) else { return };
        if old & (1 << word) == 0 && self.memory.swap_byte(info + shared_info::UPCALL_PENDING, 1) == Ok(0) {
            processor.notify();
        }
    }

    /// `EVTCHNOP_unmask`.
    pub(crate) fn unmask(&self, port: u32) -> Result<(), Errno> {
        let vcpu = self.ports.vcpu(port).ok_or(Errno::EINVAL)?;
        let processor = self.processor(vcpu).ok_or(Errno::EINVAL)?;
        let page = self.memory.shared_info();
        let (word, bit) = (u64::from(port / 64), 1_u64 << (port % 64));
        let old = self.memory.clear_bits(page + shared_info::EVTCHN_MASK + word * 8, bit)?;
        if old & bit != 0 && self.is_pending(port)? {
            self.select(processor, word);
        }
        Ok(())
    }

    pub(crate) fn is_pending(&self, port: u32) -> Result<bool, Errno> {
        if port >= PORTS {
            return Err(Errno::EINVAL);
        }
        let word = self.memory.shared_info() + shared_info::EVTCHN_PENDING + u64::from(port / 64) * 8;
        Ok(self.memory.load(word)? & (1 << (port % 64)) != 0)
    }

    pub(crate) fn clear_pending(&self, port: u32) {
        let word = self.memory.shared_info() + shared_info::EVTCHN_PENDING + u64::from(port / 64) * 8;
        if self.memory.clear_bits(word, 1 << (port % 64)).is_err() {
            // The shared page is part of the memory that was checked when the domain was made.
            tracing::debug!(port, "no such bit");
        }
    }

    /// `EVTCHNOP_close`, also for back ends.
    pub(crate) fn close_port(&self, port: u32) -> Result<(), Errno> {
        self.ports.close(port)?;
        self.port_closed(port);
        Ok(())
    }

    /// What a port that was closed leaves behind.
    pub(crate) fn port_closed(&self, port: u32) {
        if self.console_port.get() == Some(&port) {
            self.console_closed.store(true, Ordering::SeqCst);
        }
        self.clear_pending(port);
    }

    /// `EVTCHNOP_send`.
    pub(crate) fn send(&self, port: u32) -> Result<(), Errno> {
        match self.ports.target(port)? {
            Target::Port(port) => self.set_pending(port),
            Target::Outside(sink) => sink.notify(),
            Target::Nobody => {}
        }
        Ok(())
    }

    /// Raises a virtual interrupt, if the guest bound it.
    pub(crate) fn raise_virq(&self, vcpu: u32, virq: u32) {
        if let Some(port) = self.ports.virq_port(vcpu, virq) {
            self.set_pending(port);
        }
    }

    /// Flushes what virtual processors other than `but` cached of page tables; `mask` names them.
    pub(crate) fn flush(&self, mask: u64, but: u32) {
        for (index, processor) in (0..).zip(&self.processors) {
            if index != but && mask & (1_u64 << index) != 0 {
                processor.flush();
            }
        }
    }

    /// Address of a frame of the domain's RAM.
    pub(crate) fn frame_address(&self, frame: u64) -> Result<GuestAddress, Errno> {
        if self.memory.is_ram(frame) { Ok(GuestAddress(frame * PAGE_SIZE)) } else { Err(Errno::EINVAL) }
    }
}

fn split(value: u64) -> [u32; 2] {
    let bytes = value.to_le_bytes();
    let [a, b, c, d, e, f, g, h] = bytes;
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

/// The host's end of the console's channel.
#[derive(Debug)]
pub(super) struct ConsoleChannel(pub(super) std::sync::Weak<Domain>);

impl EventSink for ConsoleChannel {
    fn notify(&self) {
        if let Some(domain) = self.0.upgrade() {
            domain.service_console();
        }
    }
}

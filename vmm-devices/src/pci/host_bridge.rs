//! The host bridge: bus 0 with its functions, and the ways on which a guest reaches them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::bus::{BusDevice, MmioBus, PioBus};
use crate::error::StateError;
use crate::interrupt::{InterruptLine, Unconnected, WiredOr, lock};
use crate::pci::PciError;
use crate::pci::address::{FunctionAddress, read_registers, write_registers};
use crate::pci::config::{ConfigBuilder, ConfigSpace, ConfigState, HEADER_TYPE, Identity};
use crate::pci::function::PciFunction;
use crate::pci::intx::line_of;
use crate::pci::layout::{CONFIG_PORTS, PciLayout};
use crate::pci::mapping::{BarMapping, Decoding, Mappings, decoding};

const DEVICE: &str = "PCI host bridge";

/// The generic PCI Express host bridge of Red Hat's numbers, which drivers know as nothing special.
const IDENTITY: Identity = Identity::new(0x1b36, 0x0008, [0x06, 0x00, 0x00]);

// The address port (PCI 3.0, 3.2.2.3.2).
const ENABLE: u32 = 1 << 31;
/// The enable bit, bus, device, function and register.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

/// Bit 7 of the header type, in bits 23:16 of its register: there are more functions than 0.
const MULTI_FUNCTION: u8 = 0x80;

/// A function as the bridge takes and gives it.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

struct Slot {
    function: SharedFunction,
    /// Held by one write of configuration space at a time, until the buses have followed it. Locked before the
    /// function.
    attachment: Mutex<Attachment>,
}

struct Attachment {
    /// A write that found the slot just before it was removed comes too late.
    present: bool,
    /// What the buses follow.
    decoding: Decoding,
}

struct Bridge {
    slots: RwLock<BTreeMap<FunctionAddress, Arc<Slot>>>,
    mappings: Mappings,
    lines: [WiredOr; 4],
    /// The address port.
    config_address: AtomicU32,
    root: Arc<Mutex<Root>>,
}

/// The function at 00:00.0: a bridge that has nothing to set.
struct Root(ConfigSpace);

impl PciFunction for Root {
    fn config(&self) -> &ConfigSpace {
        &self.0
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.0
    }

    fn bar_read(&mut self, _: usize, _: u64, _: &mut [u8]) {}

    fn bar_write(&mut self, _: usize, _: u64, _: &[u8]) {}
}

impl Bridge {
    fn slot(&self, address: FunctionAddress) -> Option<Arc<Slot>> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner).get(&address).cloned()
    }

    fn is_multi_function(&self, device: u8) -> bool {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.keys().any(|address| address.device() == device && address.function() != 0)
    }

    /// 1 to 4 bytes within a register.
    fn read_config(&self, address: FunctionAddress, offset: u16, data: &mut [u8]) {
        let Some(slot) = self.slot(address) else { return };
        lock(&slot.function).read_config(offset, data);
        let header_type =
            (HEADER_TYPE + 2).checked_sub(offset).and_then(|into| data.get_mut(usize::from(into)));
        if let Some(header_type) = header_type
            && address.function() == 0
            && self.is_multi_function(address.device())
        {
            *header_type |= MULTI_FUNCTION;
        }
    }

    fn write_config(&self, address: FunctionAddress, offset: u16, data: &[u8]) {
        if let Some(slot) = self.slot(address) {
            self.change(address, &slot, |function| function.write_config(offset, data));
        }
    }

    /// Does something to a function after which its BARs may be elsewhere. While the buses follow, the function is not locked, so
    /// accesses under way on other vCPUs can end.
    fn change(&self, address: FunctionAddress, slot: &Slot, change: impl FnOnce(&mut dyn PciFunction)) {
        let mut attachment = lock(&slot.attachment);
        if !attachment.present {
            return;
        }
        let now = {
            let mut function = lock(&slot.function);
            change(&mut *function);
            decoding(function.config())
        };
        if now != attachment.decoding {
            self.mappings.follow(address, &now);
            attachment.decoding = now;
        }
    }
}

/// Configuration space in memory: device, function and register are in the address (PCIe 7.2.2).
struct Ecam(Arc<Bridge>);

impl Ecam {
    fn decode(offset: u64) -> (FunctionAddress, u16) {
        let [low, high, top, ..] = offset.to_le_bytes();
        // The window has one bus, so nothing of the offset is above.
        let devfn = top << 4 | high >> 4;
        (FunctionAddress::from_devfn(devfn), u16::from_le_bytes([low, high & 0xf]))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_registers(offset, data, |offset, piece| {
            let (address, register) = Self::decode(offset);
            self.0.read_config(address, register, piece);
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        write_registers(offset, data, |offset, piece| {
            let (address, register) = Self::decode(offset);
            self.0.write_config(address, register, piece);
        });
    }
}

/// Configuration space by ports: an address port of 32 bits, then a data port of any width.
struct Ports(Arc<Bridge>);

const ADDRESS_PORT: u64 = 0;
const DATA_PORT: u64 = 4;

impl Ports {
    /// What the address port selects, and where in its register the access is.
    fn selected(&self, offset: u64) -> Option<(FunctionAddress, u16)> {
        let into = u16::try_from(offset.checked_sub(DATA_PORT)?).ok().filter(|into| *into < 4)?;
        let address = self.0.config_address.load(Ordering::SeqCst);
        let [register, devfn, bus, _] = address.to_le_bytes();
        (address & ENABLE != 0 && bus == 0)
            .then(|| (FunctionAddress::from_devfn(devfn), u16::from(register) | into))
    }
}

impl BusDevice for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_registers(offset, data, |offset, piece| {
            if let Some((address, register)) = self.selected(offset) {
                self.0.read_config(address, register, piece);
            } else if offset == ADDRESS_PORT
                && let Ok(word) = <&mut [u8; 4]>::try_from(piece)
            {
                *word = self.0.config_address.load(Ordering::SeqCst).to_le_bytes();
            }
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        write_registers(offset, data, |offset, piece| {
            if let Some((address, register)) = self.selected(offset) {
                self.0.write_config(address, register, piece);
            } else if offset == ADDRESS_PORT
                && let Ok(word) = <[u8; 4]>::try_from(piece)
            {
                // Narrower ones are for what else PCs have there, such as the reset register at 0xcf9, and here is not.
                self.0.config_address.store(u32::from_le_bytes(word) & ADDRESS_BITS, Ordering::SeqCst);
            }
        });
    }
}

/// What of a [`HostBridge`] itself a guest can change. Functions have states of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostBridgeState {
    /// The address port at 0xcf8.
    pub config_address: u32,
    /// Configuration space of the function at 00:00.0.
    pub config: ConfigState,
}

/// Bus 0 and its functions. Clones are the same bridge; what it has put on the buses keeps it alive.
///
/// Locks are taken in this order: the list of functions, a write of configuration space to the same function, the table of
/// mappings, the function, a line. No bus is locked while a device is called. So a write that moves a BAR waits for an access
/// of that function to end, and an access never waits for the move. Who has a function locked must not call the bridge.
#[derive(Clone)]
pub struct HostBridge(Arc<Bridge>);

impl HostBridge {
    /// A bridge with no functions but its own, on two buses: the ECAM window, and the configuration ports. Pins lead nowhere.
    ///
    /// # Errors
    /// As [`HostBridgeBuilder::build`].
    pub fn new(layout: PciLayout, mmio: &Arc<MmioBus>, pio: &Arc<PioBus>) -> Result<Self, PciError> {
        Self::builder(layout, mmio, pio).build()
    }

    /// The same with more to say.
    pub fn builder<'a>(
        layout: PciLayout,
        mmio: &'a Arc<MmioBus>,
        pio: &'a Arc<PioBus>,
    ) -> HostBridgeBuilder<'a> {
        let lines = [(); 4].map(|()| WiredOr::new(Unconnected));
        HostBridgeBuilder { layout, mmio, pio, lines, identity: IDENTITY }
    }

    /// Puts a function on the bus: function 0 of the first device number that is free. Its BARs get addresses, which
    /// the guest may change; it answers there when the guest has switched that on.
    ///
    /// # Errors
    /// [`PciError::Full`], and as [`add_at`](Self::add_at).
    pub fn add(&self, function: SharedFunction) -> Result<FunctionAddress, PciError> {
        let mut slots = self.0.slots.write().unwrap_or_else(PoisonError::into_inner);
        let free = (0..32)
            .filter_map(|device| FunctionAddress::new(device, 0).ok())
            .find(|address| slots.keys().all(|other| other.device() != address.device()));
        let address = free.ok_or(PciError::Full)?;
        self.attach(&mut slots, address, function)?;
        Ok(address)
    }

    /// Puts a function at `address`. Guests look for functions 1 to 7 where there is a function 0.
    ///
    /// # Errors
    /// [`PciError::Occupied`], [`PciError::WithoutFunctionZero`], and [`PciError::NoRoom`] if a window is full. The bus is
    /// as it was.
    pub fn add_at(&self, address: FunctionAddress, function: SharedFunction) -> Result<(), PciError> {
        let mut slots = self.0.slots.write().unwrap_or_else(PoisonError::into_inner);
        self.attach(&mut slots, address, function)
    }

    fn attach(
        &self,
        slots: &mut BTreeMap<FunctionAddress, Arc<Slot>>,
        address: FunctionAddress,
        function: SharedFunction,
    ) -> Result<(), PciError> {
        if slots.contains_key(&address) {
            return Err(PciError::Occupied { address });
        }
        let zero = |other: &FunctionAddress| other.device() == address.device() && other.function() == 0;
        if address.function() != 0 && !slots.keys().any(zero) {
            return Err(PciError::WithoutFunctionZero { address });
        }
        self.0.mappings.place(address, &function)?;
        let now = {
            let guard = lock(&function);
            let config = guard.config();
            if let (Some(intx), Some(line)) = (config.intx(), self.line(address, config.pin())) {
                intx.connect(Some(line.input()));
            }
            decoding(config)
        };
        self.0.mappings.follow(address, &now);
        let attachment = Mutex::new(Attachment { present: true, decoding: now });
        slots.insert(address, Arc::new(Slot { function, attachment }));
        Ok(())
    }

    fn line(&self, address: FunctionAddress, pin: u8) -> Option<&WiredOr> {
        self.0.lines.get(usize::from(line_of(address.device(), pin)))
    }

    /// Takes a function away, which resets it. An access under way ends first or afterwards. That the guest agrees is not
    /// asked: there are no hot-plug slots.
    ///
    /// # Errors
    /// [`PciError::NoFunction`], also for the bridge's own.
    pub fn remove(&self, address: FunctionAddress) -> Result<SharedFunction, PciError> {
        if address == FunctionAddress::HOST_BRIDGE {
            return Err(PciError::NoFunction { address });
        }
        let slot = self.0.slot(address).ok_or(PciError::NoFunction { address })?;
        let mut attachment = lock(&slot.attachment);
        if !std::mem::take(&mut attachment.present) {
            return Err(PciError::NoFunction { address });
        }
        self.0.mappings.remove(address);
        let mut function = lock(&slot.function);
        if let Some(intx) = function.config().intx() {
            intx.connect(None);
        }
        function.reset();
        function.config_mut().reset();
        drop((function, attachment));
        // Last: until all of it is gone, nobody puts another one there. A reset may take its time, for which others do not wait.
        self.0.slots.write().unwrap_or_else(PoisonError::into_inner).remove(&address);
        Ok(Arc::clone(&slot.function))
    }

    /// The function at `address`, if there is one.
    pub fn function(&self, address: FunctionAddress) -> Option<SharedFunction> {
        self.0.slot(address).map(|slot| Arc::clone(&slot.function))
    }

    /// Where there are functions, ascending, the bridge's own first.
    pub fn functions(&self) -> Vec<FunctionAddress> {
        self.0.slots.read().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }

    /// All BARs, by function and number, and whether they answer.
    pub fn mappings(&self) -> Vec<BarMapping> {
        self.0.mappings.list()
    }

    /// How often so far the guest wanted a BAR to answer where it could not. [`mappings`](Self::mappings) has those of now.
    /// A guest that sizes a BAR without switching it off is counted too, and does no harm.
    pub fn refusals(&self) -> u64 {
        self.0.mappings.refusals()
    }

    /// Looks at the registers of a function that has changed them by itself, and makes the buses follow.
    ///
    /// # Errors
    /// [`PciError::NoFunction`].
    pub fn refresh(&self, address: FunctionAddress) -> Result<(), PciError> {
        let slot = self.0.slot(address).ok_or(PciError::NoFunction { address })?;
        self.0.change(address, &slot, |_| ());
        Ok(())
    }

    fn change_all(&self, mut change: impl FnMut(&mut dyn PciFunction)) {
        for address in self.functions() {
            if let Some(slot) = self.0.slot(address) {
                self.0.change(address, &slot, &mut change);
            }
        }
    }

    /// The machine is reset: every function is, and its BARs are where the bridge put them.
    pub fn reset(&self) {
        self.0.config_address.store(0, Ordering::SeqCst);
        self.change_all(|function| {
            function.reset();
            function.config_mut().reset();
        });
    }

    /// The bridge's own state.
    pub fn state(&self) -> HostBridgeState {
        let config = lock(&self.0.root).0.state();
        HostBridgeState { config_address: self.0.config_address.load(Ordering::SeqCst), config }
    }

    /// Goes on from a saved state: the functions are to be there again, and restored before. BARs answer where they did.
    ///
    /// # Errors
    /// [`StateError`] if reserved bits are set; nothing has changed.
    pub fn restore(&self, state: &HostBridgeState) -> Result<(), StateError> {
        let (address, allowed) = (state.config_address, "bits 0x80ff_fffc");
        StateError::check(address & !ADDRESS_BITS == 0, DEVICE, "config_address", address, allowed)?;
        lock(&self.0.root).0.restore(&state.config)?;
        self.0.config_address.store(address, Ordering::SeqCst);
        self.change_all(|_| ());
        Ok(())
    }
}

impl fmt::Debug for HostBridge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostBridge")
            .field("functions", &self.functions())
            .field("mappings", &self.mappings())
            .finish_non_exhaustive()
    }
}

/// See [`HostBridge::builder`].
#[derive(Debug)]
pub struct HostBridgeBuilder<'a> {
    layout: PciLayout,
    mmio: &'a Arc<MmioBus>,
    pio: &'a Arc<PioBus>,
    lines: [WiredOr; 4],
    identity: Identity,
}

impl HostBridgeBuilder<'_> {
    /// The level-triggered lines that pins lead to: INTA# of device 0, 4 and so on to the first, and each device's to
    /// the one after. They are shared, and the bridge drives each as one. What `acpi::AcpiPci` tells the
    /// guest is to be the same.
    #[must_use]
    pub fn interrupts(mut self, lines: [impl InterruptLine + 'static; 4]) -> Self {
        self.lines = lines.map(WiredOr::new);
        self
    }

    /// What the function at 00:00.0 says that it is.
    #[must_use]
    pub fn identity(mut self, identity: Identity) -> Self {
        self.identity = identity;
        self
    }

    /// Puts the bridge on its buses.
    ///
    /// # Errors
    /// [`PciError::Window`] and [`PciError::WindowOverlap`] if the layout cannot be, [`PciError::Bus`] if something
    /// else is where the bridge is to be; the buses are as they were.
    pub fn build(self) -> Result<HostBridge, PciError> {
        self.layout.check()?;
        let root = Arc::new(Mutex::new(Root(ConfigBuilder::new(self.identity).build())));
        let bridge = HostBridge(Arc::new(Bridge {
            slots: RwLock::default(),
            mappings: Mappings::new(self.layout, self.mmio, self.pio),
            lines: self.lines,
            config_address: AtomicU32::new(0),
            root: Arc::clone(&root),
        }));
        bridge.add_at(FunctionAddress::HOST_BRIDGE, root)?;
        self.pio.insert("PCI configuration ports", CONFIG_PORTS, Arc::new(Ports(Arc::clone(&bridge.0))))?;
        let ecam = Arc::new(Ecam(Arc::clone(&bridge.0)));
        if let Err(error) = self.mmio.insert("PCI ECAM", self.layout.ecam_range(), ecam) {
            // It was inserted two lines above.
            drop(self.pio.remove(0xcf8));
            return Err(error.into());
        }
        Ok(bridge)
    }
}

#[cfg(test)]
mod tests;

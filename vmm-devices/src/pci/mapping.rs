//! Which BAR answers where: what the guest has asked for, and what it got.
//!
//! There is one table for the bridge. A BAR gets what it asks for if that lies in a window and nobody else is there; else it waits,
//! answers nowhere, and gets it when whoever is in the way has moved.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use vmm_memory::vm_memory::GuestAddress;

use crate::bus::{BusDevice, BusRange, MmioBus, PioBus};
use crate::error::BusError;
use crate::interrupt::lock;
use crate::pci::PciError;
use crate::pci::address::FunctionAddress;
use crate::pci::bar::{BARS, Bar, BarKind};
use crate::pci::config::ConfigSpace;
use crate::pci::function::PciFunction;
use crate::pci::layout::{PciLayout, Span};

/// A BAR and whether it answers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BarMapping {
    /// Whose it is.
    pub function: FunctionAddress,
    /// Its number.
    pub bar: usize,
    /// Which addresses it is for.
    pub kind: BarKind,
    /// The addresses that its register holds.
    pub range: BusRange,
    /// Whether it answers there.
    pub status: BarStatus,
}

/// Whether a BAR answers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BarStatus {
    /// The guest has not switched decoding on.
    Off,
    /// It does.
    Mapped,
    /// The guest wants it to, where it cannot.
    Refused(BarRefusal),
}

/// Why a BAR does not answer where the guest wants it to.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BarRefusal {
    /// It does not lie in a window as a whole.
    OutsideWindows,
    /// Something else answers there, which the error names.
    Taken(BusError),
    /// The bus is gone.
    NoBus,
}

/// What the registers of a function say: for each BAR, its address and whether it is decoded.
pub(super) type Decoding = [Option<(u64, bool)>; BARS];

pub(super) fn decoding(config: &ConfigSpace) -> Decoding {
    std::array::from_fn(|bar| Some((config.bar_base(bar)?, config.decoded(bar).is_some())))
}

/// A function as the bus knows it: one BAR.
struct BarWindow {
    function: Arc<Mutex<dyn PciFunction>>,
    bar: usize,
}

impl BusDevice for BarWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.function).bar_read(self.bar, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        lock(&self.function).bar_write(self.bar, offset, data);
    }
}

struct Entry {
    window: Arc<BarWindow>,
    bar: Bar,
    /// Where it is after a reset. Nobody is placed there, even while it is elsewhere.
    home: u64,
    /// What the registers say.
    base: u64,
    decoded: bool,
    status: BarStatus,
}

impl Entry {
    fn moved(&self, at: Option<u64>) {
        lock(&self.window.function).bar_moved(self.window.bar, at);
    }
}

#[derive(Default)]
struct Table {
    entries: BTreeMap<(FunctionAddress, usize), Entry>,
    refusals: u64,
}

/// The table is locked before a function or a bus is; nobody who holds one of those locks waits for it.
pub(super) struct Mappings {
    layout: PciLayout,
    /// The buses own the bridge, by what it has put there.
    mmio: Weak<MmioBus>,
    pio: Weak<PioBus>,
    table: Mutex<Table>,
}

impl Mappings {
    pub(super) fn new(layout: PciLayout, mmio: &Arc<MmioBus>, pio: &Arc<PioBus>) -> Self {
        Self { layout, mmio: Arc::downgrade(mmio), pio: Arc::downgrade(pio), table: Mutex::default() }
    }

    /// Gives the BARs of a new function addresses, all or none.
    pub(super) fn place(
        &self,
        address: FunctionAddress,
        function: &Arc<Mutex<dyn PciFunction>>,
    ) -> Result<(), PciError> {
        let mut table = lock(&self.table);
        let mut guard = lock(function);
        let config = guard.config_mut();
        let mut taken = [table.taken(false), table.taken(true)];
        let mut placed = Vec::new();
        for index in 0..BARS {
            let Some(bar) = config.bar(index) else { continue };
            let [memory, ports] = &mut taken;
            let taken = if bar.kind().is_io() { ports } else { memory };
            let Some(base) = self.layout.first_fit(bar, taken) else {
                return Err(PciError::NoRoom { address, bar: index, size: bar.size(), kind: bar.kind() });
            };
            taken.push((base, bar.last(base)));
            placed.push((index, bar, base));
        }
        for (index, bar, base) in placed {
            config.place_bar(index, base);
            let window = Arc::new(BarWindow { function: Arc::clone(function), bar: index });
            let entry = Entry { window, bar, home: base, base, decoded: false, status: BarStatus::Off };
            table.entries.insert((address, index), entry);
        }
        Ok(())
    }

    /// Makes the buses follow what the registers of a function say now.
    pub(super) fn follow(&self, address: FunctionAddress, now: &Decoding) {
        let mut table = lock(&self.table);
        let mut changed = false;
        for (index, now) in now.iter().enumerate() {
            let (Some(now), Some(entry)) = (*now, table.entries.get_mut(&(address, index))) else { continue };
            if now != (entry.base, entry.decoded) {
                self.unmap(entry);
                (entry.base, entry.decoded) = now;
                changed = true;
            }
        }
        if changed {
            self.map_wanted(&mut table);
        }
    }

    /// Forgets a function.
    pub(super) fn remove(&self, address: FunctionAddress) {
        let mut table = lock(&self.table);
        for index in 0..BARS {
            if let Some(mut entry) = table.entries.remove(&(address, index)) {
                self.unmap(&mut entry);
            }
        }
        self.map_wanted(&mut table);
    }

    fn unmap(&self, entry: &mut Entry) {
        if std::mem::replace(&mut entry.status, BarStatus::Off) != BarStatus::Mapped {
            return;
        }
        // The range may be gone together with its bus, or because the monitor took it away.
        if entry.bar.kind().is_io() {
            if let (Some(pio), Ok(base)) = (self.pio.upgrade(), u16::try_from(entry.base)) {
                drop(pio.remove(base));
            }
        } else if let Some(mmio) = self.mmio.upgrade() {
            drop(mmio.remove(GuestAddress(entry.base)));
        }
        entry.moved(None);
    }

    /// Tries all that wait: who was in the way may have moved.
    fn map_wanted(&self, table: &mut Table) {
        for (&(address, index), entry) in &mut table.entries {
            if !entry.decoded || entry.status == BarStatus::Mapped {
                continue;
            }
            match self.map(address, index, entry) {
                Ok(()) => {
                    entry.status = BarStatus::Mapped;
                    entry.moved(Some(entry.base));
                }
                Err(refusal) => {
                    if entry.status == BarStatus::Off {
                        table.refusals = table.refusals.saturating_add(1);
                    }
                    entry.status = BarStatus::Refused(refusal);
                }
            }
        }
    }

    fn map(&self, address: FunctionAddress, index: usize, entry: &Entry) -> Result<(), BarRefusal> {
        if !self.layout.admits(entry.bar, entry.base) {
            return Err(BarRefusal::OutsideWindows);
        }
        let name = format!("PCI {address} BAR {index}");
        let range = BusRange::new(entry.base, entry.bar.size());
        let device = Arc::clone(&entry.window);
        if entry.bar.kind().is_io() {
            self.pio.upgrade().ok_or(BarRefusal::NoBus)?.insert(name, range, device)
        } else {
            self.mmio.upgrade().ok_or(BarRefusal::NoBus)?.insert(name, range, device)
        }
        .map_err(BarRefusal::Taken)
    }

    /// All BARs, by function and number.
    pub(super) fn list(&self) -> Vec<BarMapping> {
        let table = lock(&self.table);
        let mapping = |(&(function, bar), entry): (&(FunctionAddress, usize), &Entry)| BarMapping {
            function,
            bar,
            kind: entry.bar.kind(),
            range: BusRange::new(entry.base, entry.bar.size()),
            status: entry.status.clone(),
        };
        table.entries.iter().map(mapping).collect()
    }

    pub(super) fn refusals(&self) -> u64 {
        lock(&self.table).refusals
    }
}

impl Table {
    /// Ports, or memory, where no new BAR is to be placed.
    fn taken(&self, io: bool) -> Vec<Span> {
        let entries = self.entries.values().filter(|entry| entry.bar.kind().is_io() == io);
        let spans =
            entries.flat_map(|entry| [entry.home, entry.base].map(|base| (base, entry.bar.last(base))));
        spans.collect()
    }
}

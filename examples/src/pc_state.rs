//! What a PC's devices are, in a snapshot.

use std::sync::MutexGuard;

use anyhow::{Context as _, Result};
use vmm_devices::platform::{AcpiPmState, I8042State, IoApicState, PicState, PitState, RtcState, UartState};
use vmm_memory::snapshot::{Snapshot, SnapshotWriter};

use crate::guest_command::SerialPort;
use crate::pc::{Pc, lock};

/// What a PC's devices are.
#[derive(Debug)]
pub struct PcState {
    pit: PitState,
    rtc: RtcState,
    acpi: AcpiPmState,
    keyboard: I8042State,
    pic: PicState,
    io_apic: IoApicState,
    serial: Vec<UartState>,
}

fn serial(port: SerialPort) -> String {
    format!("pc/serial/{:x}", port.io_base())
}

impl PcState {
    /// Adds it to a snapshot.
    ///
    /// # Errors
    /// Those of [`SnapshotWriter::put`].
    pub fn put(&self, writer: &mut SnapshotWriter) -> Result<()> {
        writer.put("pc/pit", &self.pit)?;
        writer.put("pc/rtc", &self.rtc)?;
        writer.put("pc/acpi", &self.acpi)?;
        writer.put("pc/keyboard", &self.keyboard)?;
        writer.put("pc/pic", &self.pic)?;
        writer.put("pc/io-apic", &self.io_apic)?;
        for (port, state) in SerialPort::ALL.into_iter().zip(&self.serial) {
            writer.put(&serial(port), state)?;
        }
        Ok(())
    }

    /// Takes it from a snapshot.
    ///
    /// # Errors
    /// Those of [`Snapshot::get`].
    pub fn get(snapshot: &Snapshot) -> Result<Self> {
        let ports = SerialPort::ALL.into_iter().map(|port| snapshot.get(&serial(port)));
        Ok(Self {
            pit: snapshot.get("pc/pit")?,
            rtc: snapshot.get("pc/rtc")?,
            acpi: snapshot.get("pc/acpi")?,
            keyboard: snapshot.get("pc/keyboard")?,
            pic: snapshot.get("pc/pic")?,
            io_apic: snapshot.get("pc/io-apic")?,
            serial: ports.collect::<Result<_, _>>()?,
        })
    }
}

/// No timer of a PC fires while this is there.
pub struct Still<'a> {
    _timers: MutexGuard<'a, ()>,
}

impl<'a> Still<'a> {
    pub(crate) fn new(timers: MutexGuard<'a, ()>) -> Self {
        Self { _timers: timers }
    }
}

impl Pc {
    /// What the devices are, with their timers standing still and the vCPUs paused.
    #[must_use]
    pub fn state(&self, _: &Still<'_>) -> PcState {
        PcState {
            pit: self.pit.lock().state(),
            rtc: self.rtc.lock().state(),
            acpi: self.acpi.lock().state(),
            keyboard: lock(&self.keyboard).state(),
            pic: self.pic.state(),
            io_apic: self.io_apic.state(),
            serial: self.serial.iter().map(|port| lock(port).state()).collect(),
        }
    }

    /// Makes the devices, which are as they were built, what they were. Their time goes on from where it stood, and the date is the host's.
    ///
    /// # Errors
    /// For a state that no device can be in. The machine is useless then.
    pub fn restore(&self, state: &PcState) -> Result<()> {
        // Interrupt controllers first: what devices drive is as it was when they tell of it again.
        self.io_apic.restore(&state.io_apic).context("I/O APIC")?;
        self.pic.restore(&state.pic).context("PIC")?;
        self.pit.lock().restore(&state.pit).context("PIT")?;
        self.rtc.lock().restore(&state.rtc).context("RTC")?;
        self.acpi.lock().restore(&state.acpi).context("ACPI")?;
        lock(&self.keyboard).restore(&state.keyboard).context("i8042")?;
        for (port, state) in self.serial.iter().zip(&state.serial) {
            lock(port).restore(state).context("serial port")?;
        }
        Ok(())
    }
}

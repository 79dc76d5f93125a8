//! What a user says of debugging the guest, and what this machine adds to the debugger's commands.

use std::fmt::{self, Write};
use std::sync::Arc;

use anyhow::{Result, ensure};
use vmm_cpu::gdb::{Endpoint, Monitor, MonitorCommand};

use crate::pc::Pc;

/// What a user says of it.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct DebugOptions {
    /// Serves GDB (`target remote`) at HOST:PORT, at :PORT on the loopback interface, or at unix:PATH. vCPUs are its threads,
    /// and `monitor help` tells what else there is. Whoever can connect owns the guest.
    #[arg(long, value_name = "ADDRESS")]
    gdb: Option<String>,
    /// Starts no vCPU before the debugger lets them run.
    #[arg(long, requires = "gdb")]
    gdb_wait: bool,
}

impl DebugOptions {
    /// Whether a debugger is wanted.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.gdb.is_some()
    }

    /// Where debuggers are to connect, if they are. `deterministic` says that the run is one that can be had again.
    ///
    /// # Errors
    /// If nobody can connect there, or the run is deterministic.
    pub fn endpoint(&self, deterministic: bool) -> Result<Option<Endpoint>> {
        let Some(address) = &self.gdb else { return Ok(None) };
        ensure!(
            !deterministic,
            "--gdb goes with no deterministic run: what a debugger does is in no log, so leave --gdb or --deterministic, \
             --record, --replay and --state-hashes out"
        );
        let endpoint = Endpoint::listen(address)?;
        let address = endpoint.address();
        eprintln!("linux: gdb: target remote {}", address.strip_prefix("unix:").unwrap_or(address));
        Ok(Some(endpoint))
    }

    /// Whether the debugger starts the machine.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.gdb_wait
    }
}

/// The machine's devices, for a debugger's `monitor`.
pub struct Devices(pub Arc<Pc>);

impl Monitor for Devices {
    fn commands(&self) -> &[MonitorCommand] {
        &[
            MonitorCommand { name: "controllers", help: "PIC and I/O APIC" },
            MonitorCommand { name: "devices", help: "the state of every device" },
        ]
    }

    fn run(&mut self, name: &str, _: &str, out: &mut dyn Write) -> fmt::Result {
        if name == "controllers" { self.0.show_controllers(out) } else { self.0.show(out) }
    }
}

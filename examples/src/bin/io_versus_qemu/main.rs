//! Disks and networks of a guest on `translate`, the fastest backend that has them, beside QEMU's translator (TCG) with the same file and the
//! same tap device: one table.
//!
//! Both guests are Debian's cloud kernel with one initial RAM disk, 256 MiB and one vCPU, with virtio devices over PCI (QEMU's machine is
//! q35), and run by turns. Disks are raw files behind the host's cache, QEMU's served by an I/O thread, as ours is. What works in the guest is
//! `examples/guest/workload`, by the guest's own clock, past the guest's cache (`O_DIRECT`); TCP goes to this program in a network namespace
//! that it makes. Each piece of work is done for a second at least.
//!
//! The table informs and decides nothing: the status is 0 unless something failed to run.

mod guest;
mod row;
mod server;
mod virtio;

use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use vmm_examples::race::qemu_version;

use crate::guest::IoGuests;
use crate::row::{Row, table};

/// Compares what devices do here with their peers: virtio-blk and virtio-net with QEMU's, in a guest on either's translator.
#[derive(Parser)]
struct Options {
    /// How often each of them runs, by turns.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pairs: u32,
    /// Rows of the guests, by name; all unless given.
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
}

/// Says that this is the process in the namespace.
const INSIDE: &str = "IO_VERSUS_QEMU_INSIDE";

/// What makes the network there, in which nothing but the guest and this program is.
const NETWORK: &str = "ip link set lo up && ip tuntap add dev vmm0 mode tap && ip addr add 10.0.2.1/24 dev vmm0 && \
                       ip link set vmm0 up && exec \"$0\" \"$@\"";

fn main() -> ExitCode {
    let started = Instant::now();
    let options = Options::parse();
    let result = if std::env::var_os(INSIDE).is_some() { inside(&options) } else { outside(&options) };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("io_versus_qemu: {error:#} (after {} s)", started.elapsed().as_secs());
            ExitCode::FAILURE
        }
    }
}

/// Gets what is absent, for which it takes the world's network, and goes on in a namespace.
fn outside(options: &Options) -> Result<bool> {
    virtio::chosen(&options.rows)?;
    drop(IoGuests::get()?);
    let program = std::env::current_exe()?;
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", NETWORK]).arg(program).args(std::env::args_os().skip(1));
    let status = command.env(INSIDE, "1").env_remove("CARGO").status();
    let status = status.context("starting unshare (util-linux)")?;
    ensure!(
        status.code().is_some(),
        "it ended with {status}; it takes root, /dev/net/tun, and ip (iproute2)"
    );
    Ok(status.success())
}

/// Whether nothing failed.
fn inside(options: &Options) -> Result<bool> {
    // Each group of rows is a file of its own.
    let rows: Vec<Row> = [virtio::rows(options.pairs, &options.rows)?].concat();
    println!("{}", table(&rows));
    println!(
        "- Medians ± half the range of {} pairs by turns. Ours is `linux --backend translate --transport pci`; QEMU is {} -M q35, TCG.\n\
         - Ratio: ours to the peer, of what is done in a second: above 1 ours is faster.",
        options.pairs,
        qemu_version().unwrap_or_default(),
    );
    let failures = rows.iter().filter_map(|row| Some(format!("{}: {}", row.label, row.failure.as_ref()?)));
    let failures: Vec<String> = failures.collect();
    failures.iter().for_each(|failure| println!("- Failed: {failure}."));
    Ok(failures.is_empty())
}

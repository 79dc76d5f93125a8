//! What devices and channels do in a second, beside their peers: one table.
//!
//! | group | ours | peer |
//! |---|---|---|
//! | `virtio` | disk and network of a guest on `translate`, the fastest backend that has them | QEMU's translator (TCG), with the same file and tap device |
//! | `switch` | frames from port to port of the switch, without guests | memcpy of the same bytes |
//! | `tcp` | TCP between two guests that `net_switch` joins | memcpy; loopback |
//! | `memory` | memory that two guests share, and their doorbells | memcpy; eventfds of two threads |
//! | `vsock` | a guest's socket device | a pair of Unix sockets |
//!
//! Both guests of `virtio` are Debian's cloud kernel with one initial RAM disk, 256 MiB and one vCPU, with virtio devices over PCI (QEMU's
//! machine is q35), and run by turns. Disks are raw files behind the host's cache, QEMU's served by an I/O thread, as ours is. What works in
//! the guest is `examples/guest/workload`, by the guest's own clock, past the guest's cache (`O_DIRECT`); TCP goes to this program in a
//! network namespace that it makes. Each piece of work is done for a second at least.
//!
//! The table informs and decides nothing: the status is 0 unless something failed to run. What failed says so in the table, and the others
//! go on.

mod guest;
#[path = "../../../guest/workload/server.rs"]
mod server;
mod shared_memory;
mod switch;
mod tcp;
mod virtio;

use std::ffi::OsStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, ensure};
use clap::{Parser, ValueEnum};
use vmm_examples::race::qemu_version;
use vmm_examples::rates::{Row, join, remarks, table};
use vmm_examples::trial;
use vmm_examples::vsock_times::{self, Amounts};

use crate::guest::IoGuests;
use crate::virtio::Virtio;

/// Compares what devices and channels do here with their peers.
#[derive(Parser)]
struct Options {
    /// How often each of them runs, by turns.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pairs: u32,
    /// Groups of rows; all unless given.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Group>,
    /// Rows of the group `virtio`, by name; all unless given.
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
}

/// What is measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Group {
    Virtio,
    Switch,
    Tcp,
    Memory,
    Vsock,
}

impl Group {
    fn name(self) -> &'static str {
        match self {
            Self::Virtio => "virtio",
            Self::Switch => "switch",
            Self::Tcp => "tcp",
            Self::Memory => "memory",
            Self::Vsock => "vsock",
        }
    }
}

impl Options {
    fn groups(&self) -> impl Iterator<Item = Group> {
        let wanted = |group: &Group| self.only.is_empty() || self.only.contains(group);
        Group::value_variants().iter().copied().filter(wanted)
    }
}

/// Says that this is the process in the namespace, or that there is none.
const INSIDE: &str = "IO_VERSUS_QEMU_INSIDE";
const NAMESPACE: &str = "namespace";

/// What makes the network there, in which nothing but the guest and this program is.
const NETWORK: &str = "ip link set lo up && ip tuntap add dev vmm0 mode tap && ip addr add 10.0.2.1/24 dev vmm0 && \
                       ip link set vmm0 up && exec \"$0\" \"$@\"";

fn main() -> ExitCode {
    let options = Options::parse();
    let result = match std::env::var_os(INSIDE) {
        Some(place) => Ok(inside(&options, &place)),
        None => outside(&options),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("io_versus_qemu: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Gets what is absent, for which it takes the world's network, and goes on in a namespace if one is needed and to be had.
fn outside(options: &Options) -> Result<bool> {
    virtio::chosen(&options.rows)?;
    // The groups that need it will say that it is absent.
    let complain = |error: anyhow::Error| eprintln!("io_versus_qemu: {error:#}");
    for program in ["linux", "net_switch"] {
        trial::built(program).map(drop).unwrap_or_else(complain);
    }
    let mut namespace = false;
    if options.groups().any(|group| group == Group::Virtio) {
        IoGuests::get().map(drop).unwrap_or_else(complain);
        namespace = in_namespace("true".as_ref())
            .stderr(Stdio::inherit())
            .status()
            .is_ok_and(|status| status.success());
    }
    let program = std::env::current_exe()?;
    let mut command = if namespace { in_namespace(program.as_os_str()) } else { Command::new(&program) };
    command.args(std::env::args_os().skip(1));
    let status = command.env(INSIDE, if namespace { NAMESPACE } else { "none" }).env_remove("CARGO").status();
    Ok(status.context("starting this program again")?.success())
}

/// A program in a namespace of its own.
fn in_namespace(program: &OsStr) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", NETWORK]).arg(program);
    command
}

/// Whether nothing failed.
fn inside(options: &Options, place: &OsStr) -> bool {
    let begun = Instant::now();
    let mut rows = Vec::new();
    for group in options.groups() {
        let mut found = Vec::new();
        let measured = measure(group, options, place, |pair, rows| {
            join(&mut found, rows);
            let seconds = begun.elapsed().as_secs();
            eprintln!("{}: {} of {} measured, {seconds} s", group.name(), pair + 1, options.pairs);
        });
        rows.append(&mut found);
        if let Err(error) = measured {
            rows.push(Row::failed(group.name(), format!("{error:#}")));
        }
    }
    println!("{}", table(&rows));
    println!(
        "- Medians ± half the range of {} pairs by turns. Guests are of `linux --backend translate`; QEMU is {} -M q35, TCG.\n\
         - Ratio: ours to the peer, of what is done in a second: above 1 ours is faster.",
        options.pairs,
        qemu_version().unwrap_or_default(),
    );
    remarks(&rows).iter().for_each(|remark| println!("- {remark}."));
    let failures = rows.iter().filter_map(|row| Some(format!("{}: {}", row.label, row.failure.as_ref()?)));
    let failures: Vec<String> = failures.collect();
    failures.iter().for_each(|failure| println!("- Failed: {failure}."));
    failures.is_empty()
}

/// A group's rows, pair by pair.
fn measure(
    group: Group,
    options: &Options,
    place: &OsStr,
    mut found: impl FnMut(u32, Vec<Row>),
) -> Result<()> {
    let virtio = if group == Group::Virtio {
        ensure!(
            place == NAMESPACE,
            "there is no network for it; it takes root, /dev/net/tun, unshare (util-linux) and ip (iproute2)"
        );
        Some(Virtio::new(&options.rows)?)
    } else {
        None
    };
    for pair in 0..options.pairs {
        let rows = catch_unwind(AssertUnwindSafe(|| match group {
            Group::Virtio => Ok(virtio.as_ref().map(|virtio| virtio.pair(pair)).unwrap_or_default()),
            Group::Switch => Ok(switch::rows()),
            Group::Tcp => tcp::rows(&trial::linux()?, &trial::program("net_switch")?),
            Group::Memory => shared_memory::rows(&trial::linux()?),
            Group::Vsock => vsock_times::rows(&trial::linux()?, Amounts::default()),
        }));
        found(pair, rows.map_err(|panic| anyhow!("it panicked: {}", said(&*panic)))??);
    }
    Ok(())
}

/// What a panic said.
fn said(panic: &(dyn std::any::Any + Send)) -> &str {
    let formatted = panic.downcast_ref::<String>().map(String::as_str);
    formatted.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("nothing")
}

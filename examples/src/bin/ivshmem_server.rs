//! Brings guests of several processes together at memory that they have in common: monitors of this workspace (`linux --ivshmem`), and
//! QEMU's (`-device ivshmem-doorbell`).
//!
//! It serves until its standard input ends, from which it takes orders, a line each: `list` shows who is connected, `disconnect
//! POSITION` takes a client's right back.

use std::io::{self, BufRead as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result};
use clap::Parser;
use vmm_devices::channel::{AllowAll, Gatekeeper};
use vmm_devices::ivshmem::{Region, Server};
use vmm_memory::{Access, SharedMemory};

/// Brings guests of several processes together at memory that they have in common.
#[derive(Parser)]
struct Options {
    /// Where it listens: a path where nothing is yet.
    #[arg(long, value_name = "SOCKET")]
    path: PathBuf,
    /// KiB of memory, a power of two from 4 on.
    #[arg(long, value_name = "KIB", default_value_t = 4096, value_parser = clap::value_parser!(u64).range(4..=1 << 30))]
    size: u64,
    /// Vectors for which each guest can be rung.
    #[arg(long, default_value_t = 1)]
    vectors: u16,
    /// Guests at once.
    #[arg(long, default_value_t = 32)]
    max_peers: usize,
    /// Lets the first so many guests write; those that come later read. All write if not given.
    #[arg(long)]
    writers: Option<usize>,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ivshmem_server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let memory = SharedMemory::create("ivshmem", options.size << 10)?;
    let region = Region::new("ivshmem", memory)?;
    let (writers, came) = (options.writers.unwrap_or(usize::MAX), Arc::new(AtomicUsize::new(0)));
    // Who gets to the socket is said by the file system.
    let server = Server::builder(region, options.vectors, Gatekeeper::new(AllowAll))
        .max_peers(options.max_peers)
        .access(move |_| {
            if came.fetch_add(1, Ordering::SeqCst) < writers { Access::ReadWrite } else { Access::ReadOnly }
        })
        .bind(&options.path)
        .with_context(|| options.path.display().to_string())?;
    say("ready")?;
    for line in io::stdin().lock().lines() {
        let line = line?;
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["list"] => {
                for peer in server.peers() {
                    say(&format!(
                        "{} {} {:?}{}",
                        peer.position,
                        peer.party,
                        peer.access,
                        if peer.rings { "" } else { ", does not ring" }
                    ))?;
                }
                say("that is all")?;
            }
            ["disconnect", position] => {
                let there = position.parse().is_ok_and(|position| server.disconnect(position));
                say(if there { "disconnected" } else { "there is no such client" })?;
            }
            _ => say("orders are `list` and `disconnect POSITION`")?,
        }
    }
    Ok(())
}

fn say(line: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

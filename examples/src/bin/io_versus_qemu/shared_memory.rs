//! Between two guests by shared memory, beside the same on this machine: bytes that one writes and the other one reads beside memcpy,
//! and doorbells back and forth beside two threads with eventfds.

use std::hint::black_box;
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::{EventfdFlags, eventfd};
use vmm_devices::channel::{AllowAll, Gatekeeper};
use vmm_devices::ivshmem::{Region, Server};
use vmm_examples::rates::Row;
use vmm_memory::vm_memory::{Bytes as _, GuestAddress, MemoryRegionAddress};
use vmm_memory::{Access, SharedMemory};

const MIB: usize = 64;
const RINGS: u32 = 2000;

/// Those of threads here, who are fast: enough that they take turns with whatever else runs on the processors, as guests do.
const LOCAL_RINGS: u32 = 20_000;

/// Nothing of it takes so long.
const LIMIT: Duration = Duration::from_secs(240);

/// The program that uses the device, in the guest.
const PROGRAM: &str = env!("IVSHMEM_GUEST");

/// The rows, from guests of the program `linux`.
pub(crate) fn rows(linux: &Path) -> Result<Vec<Row>> {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("socket");
    let memory = SharedMemory::create("guests", (MIB as u64) << 20)?;
    let seen = memory.map(GuestAddress(0), Access::ReadOnly)?;
    let server =
        Server::builder(Region::new("guests", memory)?, 1, Gatekeeper::new(AllowAll)).bind(&socket)?;

    let guest = |line: &str| -> Result<Guest> {
        let option = format!("path={},direct", socket.display());
        let mut command = Command::new(linux);
        command.args(["--backend", "translate", "--memory", "512", "--seconds", "230", "--ivshmem", &option]);
        command.args(["--add", &format!("{PROGRAM}:/bin/ivshmem"), "--command", line]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        Ok(Guest(child.with_context(|| linux.display().to_string())?))
    };
    // One works while the other one waits: there may be no more than two processors. Word 63 MiB says whose turn it is; the
    // pattern is written over it.
    let first = guest(&format!(
        "set -e; ivshmem copy {MIB} to; ivshmem copy {MIB} own; ivshmem ring 1 0; ivshmem answer 1 {RINGS} 20"
    ))?;
    let begun = Instant::now();
    while server.peers().is_empty() {
        ensure!(begun.elapsed() < LIMIT, "the first guest does not join");
        std::thread::sleep(Duration::from_millis(5));
    }
    let second = guest(&format!(
        "set -e; ivshmem poll 120; ivshmem copy {MIB} from; until ivshmem call 0 1 1; do :; done; ivshmem call 0 {} 20",
        RINGS - 1
    ))?;
    let (second, first) = (second.numbers()?, first.numbers()?);
    let [to, own, ..] = first[..] else { bail!("the first guest said {first:?}") };
    let (Some(&from), Some(&trip)) = (second.first(), second.last()) else {
        bail!("the second guest said {second:?}")
    };
    // The host sees what was written, too.
    let mut bytes = vec![0; MIB << 20];
    seen.region().read_slice(&mut bytes, MemoryRegionAddress(0))?;
    ensure!(
        bytes.iter().enumerate().all(|(n, byte)| *byte == pattern(n)),
        "the memory is not what was written"
    );

    let native = memcpy();
    let through = 1.0 / (1.0 / to + 1.0 / from);
    let row = |label, ours, peer, theirs| Row::new(label, ours, peer, theirs);
    let sharing = format!(
        "shared memory: a guest's copy is translated code, which reaches {:.2} of memcpy in the guest's own memory, too",
        own / native
    );
    let doorbells = "doorbells: each way wakes two threads, the device's and the vCPU's, and the guest takes an interrupt and wakes its \
                     program; an eventfd wakes one thread";
    Ok(vec![
        row("shared memory, one guest writes, GB/s", to, "memcpy", native).remark(sharing),
        row("shared memory, another one reads, GB/s", from, "memcpy", native),
        row("shared memory, one writes, then another one reads, GB/s", through, "memcpy twice", native / 2.0),
        row("memcpy in the guest's own memory, GB/s", own, "memcpy", native),
        row("doorbells to another guest and back, /s", 1e6 / trip, "eventfds of two threads", eventfds()?)
            .remark(doorbells),
    ])
}

/// One that is killed when it is dropped.
pub(crate) struct Guest(pub(crate) Child);

impl Guest {
    /// What it has printed, when it has ended.
    pub(crate) fn output(mut self) -> Result<String> {
        let begun = Instant::now();
        while self.0.try_wait()?.is_none() {
            if begun.elapsed() > LIMIT {
                self.0.kill()?;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let (mut text, mut errors) = (String::new(), String::new());
        self.0.stdout.as_mut().context("its output")?.read_to_string(&mut text)?;
        self.0.stderr.as_mut().context("its errors")?.read_to_string(&mut errors)?;
        ensure!(self.0.wait()?.success(), "a guest has failed: {text}{errors}");
        Ok(text)
    }

    /// The first number of each line of that.
    fn numbers(self) -> Result<Vec<f64>> {
        let text = self.output()?;
        Ok(text.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // One that has ended is none to kill.
        let (Ok(()) | Err(_)) = self.0.kill();
        let (Ok(_) | Err(_)) = self.0.wait();
    }
}

/// What the guest's program writes.
fn pattern(n: usize) -> u8 {
    let [byte, ..] = ((n * 31) >> 3 ^ n >> 16).to_le_bytes();
    byte
}

/// GB/s, the best of five times.
pub(crate) fn memcpy() -> f64 {
    let from: Vec<u8> = (0..MIB << 20).map(pattern).collect();
    let mut to = from.clone();
    let mut best = f64::MAX;
    for _ in 0..5 {
        let begun = Instant::now();
        black_box(&mut to).copy_from_slice(black_box(&from));
        best = best.min(begun.elapsed().as_secs_f64());
    }
    from.len() as f64 / best / 1e9
}

/// Times a second there and back.
fn eventfds() -> Result<f64> {
    let (there, back) = (eventfd(0, EventfdFlags::CLOEXEC)?, eventfd(0, EventfdFlags::CLOEXEC)?);
    let ring = |fd: &_| rustix::io::write(fd, &1_u64.to_ne_bytes());
    let wait = |fd: &_| rustix::io::read(fd, &mut [0; 8]);
    std::thread::scope(|scope| {
        let answers = scope.spawn(|| {
            (0..LOCAL_RINGS).try_for_each(|_| {
                wait(&there)?;
                ring(&back).map(|_| ())
            })
        });
        let begun = Instant::now();
        for _ in 0..LOCAL_RINGS {
            ring(&there)?;
            wait(&back)?;
        }
        let rate = f64::from(LOCAL_RINGS) / begun.elapsed().as_secs_f64();
        match answers.join() {
            Ok(answered) => answered?,
            Err(_) => bail!("the thread that answers"),
        }
        Ok(rate)
    })
}

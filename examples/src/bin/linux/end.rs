//! How a run ended, and what the program says of it.

use std::fs::File;
use std::io::Read as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use vmm_cpu::{Halt, Vcpu, VcpuExit};
use vmm_devices::platform::PlatformEvent;
use vmm_examples::guest_command::Session;
use vmm_memory::GuestRam;
use vmm_memory::vm_memory::GuestMemoryRegion as _;

use crate::TIME_IS_UP;
use crate::options::Options;
use crate::watch::Watch;

/// What ended the run.
pub(crate) enum End {
    /// Power-off, reset, shutdown, or the end of the command.
    Guest,
    DebugExit(u8),
    User,
    TimeIsUp,
    /// It is to be saved.
    Snapshot,
}

impl End {
    /// The end by that event, or by none of the platform's.
    pub(crate) fn of(event: Option<PlatformEvent>) -> Result<Self> {
        Ok(match event {
            Some(PlatformEvent::DebugExit { status }) => Self::DebugExit(u8::try_from(status & 0xff)?),
            _ => Self::Guest,
        })
    }
}

/// What the end is that an exit of a vCPU, or a pause, stands for, and what the platform says of it. The first vCPU that
/// stops ends the machine.
pub(crate) fn end_by(
    exit: Option<VcpuExit>,
    platform: Option<PlatformEvent>,
    watch: &Watch,
    time_is_up: &AtomicBool,
    snapshot_is_due: &AtomicBool,
) -> Result<End> {
    if let Some(failure) = watch.failure() {
        bail!("{failure}");
    }
    if watch.broken.load(Ordering::SeqCst) {
        bail!("the guest's output cannot be written");
    }
    if let Some(end) = platform {
        return End::of(Some(end));
    }
    if watch.done.load(Ordering::SeqCst) {
        return Ok(End::Guest);
    }
    if watch.enough.load(Ordering::SeqCst) {
        return Ok(End::User);
    }
    if time_is_up.load(Ordering::SeqCst) {
        return Ok(End::TimeIsUp);
    }
    if snapshot_is_due.load(Ordering::SeqCst) || watch.snapshot.load(Ordering::SeqCst) {
        return Ok(End::Snapshot);
    }
    match exit {
        Some(VcpuExit { reason: Ok(Halt::Reset | Halt::Shutdown), .. }) => Ok(End::Guest),
        Some(VcpuExit { index, reason }) => bail!("vCPU {index} stopped: {:?}", reason?),
        None => bail!("the vCPUs were stopped by nobody"),
    }
}

/// Reports, and says with what status the program ends.
pub(crate) fn conclude(
    options: &Options,
    session: &Session,
    watch: &Watch,
    started: Instant,
    vcpus: &[Box<dyn Vcpu>],
    memory: Option<Memory>,
    end: Result<End>,
) -> Result<u8> {
    let ended = started.elapsed();
    let status = if matches!(end, Ok(End::Snapshot)) { watch.leave()? } else { watch.finish()? };
    if options.timings {
        report(watch, ended, vcpus, memory)?;
    }
    match end? {
        End::TimeIsUp => {
            match options.seconds {
                Some(seconds) => eprintln!("linux: the guest was still running after {seconds} s"),
                None => eprintln!("linux: the guest was still running when its time was up"),
            }
            Ok(TIME_IS_UP)
        }
        End::DebugExit(status) => Ok(status),
        End::User | End::Snapshot => Ok(0),
        End::Guest => match (session, status) {
            (_, Some(status)) => Ok(status),
            (Session::Command { .. }, None) => bail!("the guest ended before the command did"),
            (_, None) => Ok(0),
        },
    }
}

/// What tells the memory that the program uses, opened while it still may.
pub(crate) struct Memory {
    maps: File,
    guest: Vec<(usize, usize)>,
}

impl Memory {
    pub(crate) fn open(ram: &GuestRam) -> Result<Self> {
        let range = |region: &Arc<vmm_memory::GuestRegion>| {
            let start = region.as_ptr().addr();
            (start, start + usize::try_from(region.len()).unwrap_or(0))
        };
        let guest = ram.regions().iter().map(range).collect();
        Ok(Self { maps: File::open("/proc/self/smaps").context("/proc/self/smaps")?, guest })
    }

    /// Resident bytes of the guest's RAM, and of everything else.
    fn resident(mut self) -> Result<(u64, u64)> {
        let mut text = String::new();
        self.maps.read_to_string(&mut text).context("/proc/self/smaps")?;
        let (mut guest, mut other, mut is_guest) = (0, 0, false);
        for line in text.lines() {
            let word = line.split(' ').next().unwrap_or_default();
            if let Some((start, end)) = word.split_once('-') {
                let number = |text| usize::from_str_radix(text, 16).unwrap_or(0);
                let (start, end) = (number(start), number(end));
                is_guest = self.guest.iter().any(|range| start < range.1 && range.0 < end);
            } else if word == "Rss:" {
                let kib: u64 = line.split_whitespace().nth(1).and_then(|text| text.parse().ok()).unwrap_or(0);
                *(if is_guest { &mut guest } else { &mut other }) += kib << 10;
            }
        }
        Ok((guest, other))
    }
}

fn report(watch: &Watch, ended: Duration, vcpus: &[Box<dyn Vcpu>], memory: Option<Memory>) -> Result<()> {
    let at = |what: &str, time: Option<&Duration>| {
        if let Some(time) = time {
            eprintln!("{what}: {:.3} s", time.as_secs_f64());
        }
    };
    if let Some(begun) = watch.begun.get() {
        // A snapshot is there sooner than the other moments can tell.
        eprintln!("first instruction: {:.4} s", begun.as_secs_f64());
    }
    at("first line of the kernel", watch.first_output.get());
    at("init", watch.init.get());
    at("end", Some(&ended));
    for vcpu in vcpus {
        // With one vCPU there is no doubt whose they are.
        let whose = if vcpus.len() > 1 { format!("vCPU {}: ", vcpu.index()) } else { String::new() };
        for (kind, count) in vcpu.exit_counts().into_iter().filter(|(_, count)| *count > 0) {
            eprintln!("{whose}{kind}: {count}");
        }
    }
    if let Some(memory) = memory {
        let (guest, other) = memory.resident()?;
        eprintln!("guest memory in use: {:.1} MiB", guest as f64 / f64::from(1 << 20));
        eprintln!("host memory beyond that: {:.1} MiB", other as f64 / f64::from(1 << 20));
    }
    Ok(())
}

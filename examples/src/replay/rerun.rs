//! Deterministic runs as a program offers them: its options, and what they make of log, date and hashes.

use std::fs::File;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use vmm_cpu::{Hypervisor, Vm};
use vmm_memory::GuestRam;

use super::director::{Director, Inputs, Typist};
use super::hash::StateHash;
use super::log::{Header, Log, LogWriter, Record};
use crate::guest_command::Session;
use crate::pc::{Clocks, date};

/// What a user says of it.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct RerunOptions {
    /// A run that can be had again: one vCPU on one thread, and time that counts instructions. The options below imply it.
    #[arg(long)]
    deterministic: bool,
    /// Writes the inputs of the run to that file.
    #[arg(long, value_name = "FILE", conflicts_with = "replay")]
    record: Option<PathBuf>,
    /// Has the run again whose inputs are in that file; what the guest is to do is taken from there, other options are to be
    /// as when it was recorded. Ends with an error where the run differs.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["command", "stdin"])]
    replay: Option<PathBuf>,
    /// Writes a hash of the whole machine to that file every so many instructions. With --record they are recorded too, and
    /// compared with when the run is replayed.
    #[arg(long, value_name = "FILE")]
    state_hashes: Option<PathBuf>,
    /// How many instructions lie between two hashes.
    #[arg(long, value_name = "INSTRUCTIONS", default_value = "1000000", requires = "state_hashes")]
    hash_interval: Option<NonZeroU64>,
    /// Compares each hash with one from scratch, which takes long.
    #[arg(long, requires = "state_hashes")]
    hash_check: bool,
}

impl RerunOptions {
    /// Whether there is to be such a run.
    #[must_use]
    pub fn is_deterministic(&self) -> bool {
        self.deterministic || self.record.is_some() || self.replay.is_some() || self.state_hashes.is_some()
    }
}

/// What of a deterministic run comes from a log or goes to one.
pub struct Rerun {
    options: RerunOptions,
    log: Option<Log>,
    date: u64,
}

impl Rerun {
    /// Reads the log, if there is one.
    ///
    /// # Errors
    /// If that cannot be read, or if a deterministic run is to have several vCPUs.
    pub fn open(options: &RerunOptions, cpus: u32) -> Result<Self> {
        ensure!(!options.is_deterministic() || cpus == 1, "a deterministic run has one vCPU, not {cpus}");
        let log = options.replay.as_deref().map(Log::read).transpose()?;
        let date = log.as_ref().map_or_else(date, |log| log.header.date);
        Ok(Self { options: options.clone(), log, date })
    }

    /// What the guest was told to do when the run was recorded.
    #[must_use]
    pub fn session(&self) -> Option<Session> {
        Some(self.log.as_ref()?.header.session.clone())
    }

    /// Whether the state is going to be hashed.
    #[must_use]
    pub fn hashes(&self) -> bool {
        let mut records = self.log.iter().flat_map(|log| &log.records);
        self.options.state_hashes.is_some() || records.any(|record| matches!(record, Record::State { .. }))
    }

    /// The clocks of the devices: guest time, and the date that the run began at.
    ///
    /// # Errors
    /// If the backend has no clock that can be read.
    pub fn clocks(&self, vm: &dyn Vm) -> Result<Clocks> {
        let clock = vm.clock().context("the backend's clock cannot be read")?;
        // A counted clock always tells.
        let uptime = move || clock.now().unwrap_or(u64::MAX);
        Ok(Clocks { uptime: Arc::new(uptime), boot: self.date })
    }

    /// What a log of this run begins with. The guest is kernel, initial RAM disk and command line.
    #[must_use]
    pub fn header(
        &self,
        guest: (&[u8], Option<&[u8]>, &str),
        memory: u64,
        (hypervisor, vm): (&dyn Hypervisor, &dyn Vm),
        session: Session,
    ) -> Header {
        let cpu = format!("{} {:?}", hypervisor.name(), hypervisor.supported_cpuid());
        let tsc_khz = vm.clock().map_or(0, |clock| clock.tsc_khz());
        Header::new(guest, memory, (&cpu, tsc_khz), self.date, session)
    }

    /// What runs the machine, and what types if no log does.
    ///
    /// # Errors
    /// If the log is of another run, or a file cannot be written.
    pub fn director(
        self,
        header: &Header,
        ram: &GuestRam,
        vm: &dyn Vm,
    ) -> Result<(Director, Option<Typist>)> {
        let hashes = self.hashes();
        let (inputs, typist) = match self.log {
            Some(log) => {
                log.header.check(header)?;
                (Inputs::logged(log.records), None)
            }
            None => {
                let (inputs, typist) = Inputs::live();
                (inputs, Some(typist))
            }
        };
        let mut director = Director::new(inputs);
        let RerunOptions { record, state_hashes, hash_interval, hash_check, .. } = self.options;
        if let Some(path) = record {
            director = director.record(LogWriter::create(&path, header)?);
        }
        if hashes {
            let create =
                |path: &PathBuf| File::create(path).with_context(|| format!("creating {}", path.display()));
            let list = state_hashes.as_ref().map(create).transpose()?;
            // Without a list of their own, those of the log are all.
            let every = hash_interval.filter(|_| list.is_some()).map_or(u64::MAX, NonZeroU64::get);
            director = director.hash(StateHash::new(ram, vm, hash_check)?, every, list);
        }
        Ok((director, typist))
    }
}

//! Runs a machine with one vCPU so that the run can be had again.
//!
//! The loop comes back to where something is due: a timer of a device, a hash, an input of the log. What comes from outside
//! at any moment (a key, the time limit) ends the stay in the guest at a point that nobody can name; so it takes effect one
//! nanosecond of guest time later, at a stop that was asked for, and that point is what is logged.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, bail, ensure};
use vmm_cpu::{ExactStop, Halt, Vcpu, VcpuHandle, VcpuIo, Vm, VmClock};

use super::hash::StateHash;
use super::log::{EndReason, LogWriter, Point, Record};
use crate::pc::{Buses, Pc};

/// Chunks of input that wait to be typed; whoever has more waits too.
const WAITING: usize = 16;

/// What is run.
pub struct Machine<'a> {
    /// The virtual machine, whose clock counts instructions.
    pub vm: &'a dyn Vm,
    /// Its only vCPU.
    pub vcpu: &'a mut dyn Vcpu,
    /// Its devices, which follow that clock.
    pub pc: &'a Arc<Pc>,
}

/// Gives the run what is typed, from any thread.
#[derive(Clone)]
pub struct Typist {
    keys: SyncSender<Vec<u8>>,
    wake: Arc<OnceLock<Arc<dyn VcpuHandle>>>,
}

impl Typist {
    /// Types `input`; waits where there is no room. Nothing happens once the run has ended.
    pub fn type_in(&self, input: &[u8]) {
        if self.keys.send(input.to_vec()).is_ok()
            && let Some(vcpu) = self.wake.get()
        {
            vcpu.kick();
        }
    }
}

/// Where inputs come from.
pub enum Inputs {
    /// From a [`Typist`].
    Live(Keys),
    /// From a log: its records.
    Logged(VecDeque<Record>),
}

/// What a [`Typist`] types.
pub struct Keys {
    keys: Receiver<Vec<u8>>,
    waiting: VecDeque<u8>,
    wake: Arc<OnceLock<Arc<dyn VcpuHandle>>>,
}

impl Inputs {
    /// Inputs that come from outside, and what gives them.
    #[must_use]
    pub fn live() -> (Self, Typist) {
        let ((sender, keys), wake) = (sync_channel(WAITING), Arc::new(OnceLock::new()));
        let typist = Typist { keys: sender, wake: Arc::clone(&wake) };
        (Self::Live(Keys { keys, waiting: VecDeque::new(), wake }), typist)
    }

    /// The inputs of a log.
    #[must_use]
    pub fn logged(records: Vec<Record>) -> Self {
        Self::Logged(records.into())
    }
}

impl Keys {
    /// Whether there is something to type.
    fn collect(&mut self) -> bool {
        while self.waiting.is_empty() {
            match self.keys.try_recv() {
                Ok(chunk) => self.waiting.extend(chunk),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return false,
            }
        }
        true
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The guest ended it.
    Guest,
    /// The user did, now or when it was recorded.
    User,
    /// The time was up, now or when it was recorded.
    Time,
}

impl From<Finish> for EndReason {
    fn from(finish: Finish) -> Self {
        match finish {
            Finish::Guest => Self::Guest,
            Finish::User => Self::User,
            Finish::Time => Self::Time,
        }
    }
}

/// Runs a machine. See the module.
pub struct Director {
    inputs: Inputs,
    log: Option<LogWriter>,
    hashes: Option<Hashes>,
    /// Guest time of the stop at which what came from outside takes effect.
    asked: Option<u64>,
}

struct Hashes {
    state: StateHash,
    every: u64,
    list: Option<BufWriter<File>>,
    /// Where it was hashed last.
    last: Option<u64>,
}

impl Director {
    /// With inputs from there.
    #[must_use]
    pub fn new(inputs: Inputs) -> Self {
        Self { inputs, log: None, hashes: None, asked: None }
    }

    /// Records the run.
    #[must_use]
    pub fn record(mut self, log: LogWriter) -> Self {
        self.log = Some(log);
        self
    }

    /// Hashes the state after each `every` instructions, into `list` if there is one. Hashes of a log are compared with
    /// as soon as there is a `state`, whatever `every` is.
    #[must_use]
    pub fn hash(mut self, state: StateHash, every: u64, list: Option<File>) -> Self {
        let list = list.map(BufWriter::new);
        self.hashes = Some(Hashes { state, every: every.max(1), list, last: None });
        self
    }

    /// Runs the machine to its end. `guest_ended` is asked after each stay in the guest; `wanted` tells how somebody
    /// outside wants it to end, who kicks the vCPU too.
    ///
    /// # Errors
    /// If the machine cannot go on; if it is not where its log says it was, at the first point where that shows.
    pub fn run(
        mut self,
        machine: Machine<'_>,
        guest_ended: impl Fn() -> bool,
        wanted: impl Fn() -> Option<Finish>,
    ) -> Result<Finish> {
        let clock = machine.vm.clock().context("the backend's clock cannot be read")?;
        machine.pc.follow(machine.vcpu.handle());
        if let Inputs::Live(keys) = &self.inputs {
            keys.wake.get_or_init(|| machine.vcpu.handle());
        }
        let mut machine = Stage { vm: machine.vm, vcpu: machine.vcpu, pc: machine.pc, clock };
        let finish = self.go(&mut machine, &guest_ended, &wanted)?;
        let at = machine.point()?;
        self.ended(at, finish)?;
        Ok(finish)
    }

    fn go(
        &mut self,
        machine: &mut Stage<'_>,
        guest_ended: &dyn Fn() -> bool,
        wanted: &dyn Fn() -> Option<Finish>,
    ) -> Result<Finish> {
        let mut buses = Buses(Arc::clone(machine.pc));
        loop {
            let at = machine.point()?;
            if guest_ended() {
                return Ok(Finish::Guest);
            }
            self.look(machine, at)?;
            if let Some(finish) = self.outside(machine.pc, at, wanted())? {
                return Ok(finish);
            }
            let timer = machine.pc.service().map(|due| due.max(at.ns + 1));
            let time = timer.into_iter().chain(self.next_input()).chain(self.asked).min();
            let mut stop = ExactStop::none();
            (stop.guest_time, stop.instructions) = (time, self.next_hash());
            machine.exact()?.stop_at(stop);
            match machine.vcpu.run(&mut buses as &mut dyn VcpuIo)? {
                Halt::ExactStop | Halt::Interrupted => {}
                Halt::Shutdown | Halt::Reset => return Ok(Finish::Guest),
                other => bail!("the vCPU stopped: {other:?}"),
            }
        }
    }

    /// Guest time of the next record that changes something.
    fn next_input(&self) -> Option<u64> {
        let Inputs::Logged(records) = &self.inputs else { return None };
        let mut changes = records.iter().filter(|record| !matches!(record, Record::State { .. }));
        changes.next().map(|record| record.at().ns)
    }

    /// The instruction count at which to hash next.
    fn next_hash(&self) -> Option<u64> {
        let hashes = self.hashes.as_ref()?;
        let regular = hashes.last.map_or(0, |last| (last / hashes.every + 1).saturating_mul(hashes.every));
        Some(self.logged_hash().map_or(regular, |(count, _)| count.min(regular)))
    }

    /// The next hash of the log.
    fn logged_hash(&self) -> Option<(u64, &str)> {
        let Inputs::Logged(records) = &self.inputs else { return None };
        match records.iter().find(|record| matches!(record, Record::State { .. }))? {
            Record::State { at, hash } => Some((at.instructions, hash)),
            _ => None,
        }
    }

    /// Hashes the state if that is due at this point.
    fn look(&mut self, machine: &mut Stage<'_>, at: Point) -> Result<()> {
        if self.next_hash() != Some(at.instructions) {
            return Ok(());
        }
        let Some(hashes) = &mut self.hashes else { return Ok(()) };
        let hash = hashes.state.hash(machine.vcpu, machine.vm, machine.pc)?.to_hex();
        hashes.last = Some(at.instructions);
        if at.instructions.is_multiple_of(hashes.every) {
            if let Some(list) = &mut hashes.list {
                writeln!(list, "{} {hash}", at.instructions).context("writing the state hashes")?;
            }
            if let Some(log) = &mut self.log {
                log.write(&Record::State { at, hash: hash.to_string() })?;
            }
        }
        if let Some((count, logged)) = self.logged_hash()
            && count == at.instructions
        {
            let same = logged == hash.as_str();
            ensure!(same, "the state differs from the log's at instruction {count} ({} ns)", at.ns);
            if let Inputs::Logged(records) = &mut self.inputs
                && let Some(index) = records.iter().position(|record| matches!(record, Record::State { .. }))
            {
                records.remove(index);
            }
        }
        Ok(())
    }

    /// What happens from outside at this point; how the run ends, if it does.
    fn outside(&mut self, pc: &Pc, at: Point, wanted: Option<Finish>) -> Result<Option<Finish>> {
        let here = self.asked == Some(at.ns);
        if here {
            self.asked = None;
        }
        match (&mut self.inputs, wanted) {
            // One who replays a run may have enough of it, too.
            (_, Some(finish)) if here => return Ok(Some(finish)),
            (_, Some(_)) => self.asked = Some(at.ns + 1),
            (Inputs::Live(keys), None) => {
                if keys.collect() && pc.room() > 0 {
                    if here {
                        let bytes: Vec<u8> = keys.waiting.iter().copied().take(pc.room()).collect();
                        let taken = pc.offer(&bytes);
                        let bytes: Vec<u8> = keys.waiting.drain(..taken).collect();
                        if let Some(log) = self.log.as_mut().filter(|_| taken > 0) {
                            log.write(&Record::Console { at, bytes })?;
                        }
                    }
                    if keys.collect() && pc.room() > 0 {
                        self.asked = Some(at.ns + 1);
                    }
                }
            }
            (Inputs::Logged(records), None) => return replay(records, pc, at, &mut self.log),
        }
        Ok(None)
    }

    /// Completes log and list.
    fn ended(mut self, at: Point, finish: Finish) -> Result<()> {
        if let Some(log) = &mut self.log {
            log.write(&Record::End { at, reason: finish.into() })?;
        }
        if let Some(Hashes { list: Some(list), .. }) = &mut self.hashes {
            list.flush().context("writing the state hashes")?;
        }
        if let Inputs::Logged(records) = &self.inputs
            && finish == Finish::Guest
        {
            let rest = records.iter().find(|record| !matches!(record, Record::State { .. }));
            let expected = Record::End { at, reason: EndReason::Guest };
            ensure!(rest == Some(&expected), "the guest ended at {at:?}, where the log has {rest:?}");
        }
        Ok(())
    }
}

/// Does what the log has at this point; how the run ends, if it does.
fn replay(
    records: &mut VecDeque<Record>,
    pc: &Pc,
    at: Point,
    log: &mut Option<LogWriter>,
) -> Result<Option<Finish>> {
    loop {
        let next = records.iter().position(|record| !matches!(record, Record::State { .. }));
        let Some(index) = next.filter(|index| records.get(*index).is_some_and(|next| next.at().ns <= at.ns))
        else {
            return Ok(None);
        };
        let Some(record) = records.get(index).cloned() else { return Ok(None) };
        // The guest ends it by itself.
        let Record::End { reason: EndReason::Guest, .. } = record else {
            ensure!(record.at() == at, "the log has {record:?}, but the run has come to {at:?}");
            match &record {
                Record::Console { bytes, .. } => {
                    let taken = pc.offer(bytes);
                    ensure!(taken == bytes.len(), "the console takes {taken} bytes of {record:?}");
                }
                Record::End { reason, .. } => {
                    return Ok(Some(if *reason == EndReason::Time { Finish::Time } else { Finish::User }));
                }
                Record::State { .. } => {}
            }
            if let Some(log) = log {
                log.write(&record)?;
            }
            records.remove(index);
            continue;
        };
        ensure!(
            record.at() == at,
            "the guest ended at {:?} when it was recorded, but goes on here",
            record.at()
        );
        return Ok(None);
    }
}

/// A machine with what the loop needs of it.
struct Stage<'a> {
    vm: &'a dyn Vm,
    vcpu: &'a mut dyn Vcpu,
    pc: &'a Arc<Pc>,
    clock: Arc<dyn VmClock>,
}

impl Stage<'_> {
    fn exact(&mut self) -> Result<&mut dyn vmm_cpu::ExactStops> {
        self.vcpu.exact_stops().context("the backend cannot stop at exact points")
    }

    fn point(&mut self) -> Result<Point> {
        Ok(Point { ns: self.clock.now()?, instructions: self.exact()?.instructions() })
    }
}

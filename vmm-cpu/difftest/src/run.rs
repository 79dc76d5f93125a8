//! A run: cases by number, on several threads, each with a child and an interpreter of its own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, anyhow};
use iced_x86::Code;

use crate::backend::{Backend, Tier, Who};
use crate::case::{Case, Ending, Outcome};
use crate::forms;
use crate::generate::{Random, Shape, generate};
use crate::judge::{self, Difference};
use crate::native::{Answer, BATCH, Native};
use crate::plant;
use crate::start::{self, Prepared};
use crate::tally::Tally;

/// Mismatches of a form that are kept.
const KEPT: usize = 3;

/// What a run does.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// What all cases follow from.
    pub(crate) seed: u64,
    /// The numbers of the cases are from 0 to below this.
    pub(crate) cases: u64,
    /// Forms, which the cases take by turns.
    pub(crate) forms: Vec<Code>,
    /// Threads, each with a child.
    pub(crate) threads: usize,
    /// The form whose results of the interpreter's are corrupted.
    pub(crate) plant: Option<Code>,
    /// What executes them on our side.
    pub(crate) tier: Tier,
    pub(crate) shape: Shape,
}

/// A case with two outcomes.
#[derive(Clone)]
pub(crate) struct Mismatch {
    pub(crate) number: u64,
    pub(crate) target: Code,
    pub(crate) who: Who,
    pub(crate) case: Case,
    pub(crate) differences: Vec<Difference>,
}

/// What came of a run.
#[derive(Default)]
pub(crate) struct Summary {
    pub(crate) tally: Tally,
    pub(crate) mismatches: u64,
    /// How many there were of each form.
    pub(crate) by_form: std::collections::BTreeMap<Code, u64>,
    /// Some of each form, by number.
    pub(crate) kept: Vec<Mismatch>,
}

impl Summary {
    fn keep(&mut self, mismatch: Mismatch) {
        self.mismatches += 1;
        let count = self.by_form.entry(mismatch.target).or_default();
        *count += 1;
        if *count <= KEPT as u64 {
            self.kept.push(mismatch);
        }
    }

    fn add(&mut self, other: Self) {
        self.tally.add(&other.tally);
        self.mismatches += other.mismatches;
        for (code, count) in other.by_form {
            *self.by_form.entry(code).or_default() += count;
        }
        self.kept.extend(other.kept);
        self.kept.sort_by_key(|mismatch| mismatch.number);
    }
}

impl Plan {
    /// The form of a case by number.
    pub(crate) fn target(&self, number: u64) -> Code {
        let forms = self.forms.len().max(1) as u64;
        self.forms.get((number % forms) as usize).copied().unwrap_or_default()
    }

    /// The case of a number, ready for both sides; why there is none.
    pub(crate) fn case(&self, number: u64) -> Result<(Case, Prepared), &'static str> {
        // A seed for each case, so that one can be repeated alone.
        let seed = Random::with_seed(self.seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15)).u64(..);
        let mut case = generate(&mut Random::with_seed(seed), self.target(number), self.shape)
            .ok_or("no case can be made of the form")?;
        start::normalize(&mut case);
        let prepared = start::prepare(&case)?;
        Ok((case, prepared))
    }
}

/// Both sides.
pub(crate) struct Sides {
    native: Native,
    /// Who there is, with what.
    backends: Vec<(Who, Backend)>,
}

/// What came of a case on our side.
type Ours = Vec<(Who, Outcome)>;

struct Entry {
    number: u64,
    case: Case,
    prepared: Prepared,
    ours: Ours,
}

impl Sides {
    pub(crate) fn new(tier: Tier) -> Result<Self> {
        let all = match tier {
            Tier::Interpreter => &[Who::Interpreter][..],
            Tier::Translator => &[Who::Translator],
            Tier::Window => &[Who::Window],
            Tier::All => &[Who::Interpreter, Who::Translator, Who::Window],
        };
        let backends = all.iter().map(|who| Ok((*who, Backend::new(*who)?))).collect::<Result<_>>()?;
        Ok(Self { native: Native::new()?, backends })
    }

    /// Does the cases of these numbers.
    fn batch(&mut self, plan: &Plan, numbers: std::ops::Range<u64>, summary: &mut Summary) -> Result<()> {
        let mut entries = Vec::with_capacity(BATCH);
        for number in numbers {
            match plan.case(number) {
                Ok((case, prepared)) => {
                    entries.push(Entry { number, case, prepared, ours: Vec::new() });
                }
                Err(reason) => summary.tally.rejected(plan.target(number), reason),
            }
        }
        self.native.start(entries.iter().map(|entry| &entry.prepared))?;
        for entry in &mut entries {
            entry.ours = self.ours(plan, &entry.case, &entry.prepared)?;
        }
        let asked: Vec<(&Case, &Prepared)> =
            entries.iter().map(|entry| (&entry.case, &entry.prepared)).collect();
        let answers = self.native.finish(&asked)?;
        for (entry, answer) in entries.iter().zip(answers) {
            self.judge(plan, entry, answer, summary)?;
        }
        Ok(())
    }

    /// What comes of a case on our side. Sequences are run by translated code twice, the second time by linked code.
    fn ours(&mut self, plan: &Plan, case: &Case, prepared: &Prepared) -> Result<Ours> {
        let mut all = Vec::new();
        for (who, backend) in &mut self.backends {
            all.push((*who, backend.run(case, prepared)?));
            if let Some(again) = who.again().filter(|_| plan.shape == Shape::Sequence) {
                all.push((again, backend.run(case, prepared)?));
            }
        }
        if let Some(code) = plan.plant {
            all.iter_mut().for_each(|(_, outcome)| plant::corrupt(case, outcome, code));
        }
        Ok(all)
    }

    fn backend(&mut self, who: Who) -> Result<&mut Backend> {
        let found = self.backends.iter_mut().find(|(other, _)| *other == who.first());
        found.map(|(_, backend)| backend).with_context(|| format!("there is no {who}"))
    }

    fn judge(&mut self, plan: &Plan, entry: &Entry, answer: Answer, summary: &mut Summary) -> Result<()> {
        let target = plan.target(entry.number);
        let native = match answer {
            Ok(native) => native,
            Err(reason) => {
                summary.tally.rejected(target, reason);
                return Ok(());
            }
        };
        let case = &entry.case;
        let agrees = |(_, ours): &(Who, Outcome)| judge::differences(case, &native, ours).is_empty();
        if entry.ours.iter().all(agrees) && native.ending != Ending::TimedOut {
            summary.tally.compared(case, &native);
            return Ok(());
        }
        if entry.ours.iter().any(|(_, ours)| judge::is_rewritten(case, ours)) {
            summary.tally.rejected(target, "Linux has its own idea of SYSCALL in 32-bit code");
            return Ok(());
        }
        if entry.ours.iter().any(|(_, ours)| judge::is_unfiltered(ours)) {
            summary.tally.rejected(target, "Linux lets no filter have this system call");
            return Ok(());
        }
        // Once more, in a child that no case can have broken, and with the patience to see loops end.
        let native = match self.native.fresh(case, &entry.prepared)? {
            Ok(native) => native,
            Err(reason) => {
                summary.tally.rejected(target, reason);
                return Ok(());
            }
        };
        if native.ending == Ending::TimedOut {
            summary.tally.rejected(target, "it takes too long");
            return Ok(());
        }
        let mut ours = entry.ours.clone();
        for (who, ours) in &mut ours {
            if ours.ending == Ending::TimedOut {
                *ours = self.backend(*who)?.run_patiently(case, &entry.prepared)?;
            }
        }
        // What all tiers do in the same way may have an excuse; where they differ, one is wrong.
        let mut pairs = ours.iter().zip(ours.iter().skip(1));
        let is_one = pairs.all(|((_, one), (_, other))| judge::differences(case, one, other).is_empty());
        let mut excuse = None;
        for (_, ours) in &ours {
            excuse = excuse.or(self.excuse(entry, &native, ours)?);
        }
        if let Some(reason) = excuse.filter(|_| is_one) {
            summary.tally.rejected(target, reason);
            return Ok(());
        }
        for (who, ours) in ours {
            let differences = judge::differences(case, &native, &ours);
            if !differences.is_empty() {
                let (number, case) = (entry.number, case.clone());
                summary.keep(Mismatch { number, target, who, case, differences });
                return Ok(());
            }
        }
        summary.tally.unsteady += 1;
        summary.tally.compared(case, &native);
        Ok(())
    }

    /// Why two outcomes that differ cannot be compared.
    fn excuse(&mut self, entry: &Entry, native: &Outcome, ours: &Outcome) -> Result<Option<&'static str>> {
        let case = &entry.case;
        if judge::loads_misaligned_mode(case, native, ours) {
            return Ok(Some("MXCSR.MM is loaded, which the interpreter does not offer"));
        }
        if judge::is_answered(case, ours) {
            return Ok(Some("Linux answers for the processor where UMIP is on"));
        }
        if judge::is_beyond_by_accident(case, ours) {
            return Ok(Some("its bytes hold a form that the interpreter does not offer"));
        }
        if judge::went_astray(case, native, &judge::differences(case, native, ours)) {
            return Ok(Some("a branch led into the middle of an instruction"));
        }
        if judge::may_load_image(case) {
            return Ok(Some("it may have loaded what FXSAVE and its like leave open"));
        }
        let Some(memory) = &entry.prepared.native_memory else { return Ok(None) };
        // With the same code as the processor's.
        let same = Prepared { memory: memory.clone(), native_memory: None, ..entry.prepared.clone() };
        let Some((_, backend)) = self.backends.first_mut() else { return Ok(None) };
        let other = backend.run(case, &same)?;
        let reads_code = judge::reads_own_code(case, native, ours, &other);
        Ok(reads_code.then_some("it reads its own code"))
    }

    /// What differs in a case that was made by hand, for one of us.
    pub(crate) fn differences(&mut self, plan: &Plan, case: &Case, who: Who) -> Result<Vec<Difference>> {
        let Ok(prepared) = start::prepare(case) else { return Ok(Vec::new()) };
        let ours = self.ours(plan, case, &prepared)?;
        let Some((_, ours)) = ours.iter().find(|(other, _)| *other == who) else { return Ok(Vec::new()) };
        Ok(match self.native.again(case, &prepared)? {
            Ok(native) => judge::differences(case, &native, ours),
            Err(_) => Vec::new(),
        })
    }

    /// What comes of a case on both sides.
    pub(crate) fn outcomes(&mut self, plan: &Plan, case: &Case) -> Result<(Option<Outcome>, Ours)> {
        let prepared = start::prepare(case).map_err(|reason| anyhow!("the case cannot be run: {reason}"))?;
        let ours = self.ours(plan, case, &prepared)?;
        Ok((self.native.fresh(case, &prepared)?.ok(), ours))
    }

    /// Does the cases from `first` on; the summary.
    pub(crate) fn some(&mut self, plan: &Plan, first: u64, count: u64) -> Result<Summary> {
        let mut summary = Summary::default();
        let mut next = first;
        while next < first + count {
            let end = (next + BATCH as u64).min(first + count);
            self.batch(plan, next..end, &mut summary)?;
            next = end;
        }
        Ok(summary)
    }
}

/// Does all cases. `progress` is told now and then how many are done.
pub(crate) fn run(plan: &Plan, progress: &(dyn Fn(u64) + Sync)) -> Result<Summary> {
    let next = AtomicU64::new(0);
    let sum = Mutex::new(Summary::default());
    let work = || -> Result<()> {
        let mut sides = Sides::new(plan.tier)?;
        let mut summary = Summary::default();
        loop {
            let first = next.fetch_add(BATCH as u64, Ordering::Relaxed);
            if first >= plan.cases {
                break;
            }
            progress(first);
            sides.batch(plan, first..(first + BATCH as u64).min(plan.cases), &mut summary)?;
        }
        sum.lock().unwrap_or_else(PoisonError::into_inner).add(summary);
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..plan.threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| anyhow!("a thread panicked"))?)
    })?;
    let mut summary = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
    summary.kept.sort_by_key(|mismatch| mismatch.number);
    Ok(summary)
}

/// All forms.
pub(crate) fn all_forms() -> Vec<Code> {
    forms::forms().to_vec()
}

//! Batches of scenarios, run by all engines and compared: each tier of `translate` with QEMU.

use std::io::Write as _;

use anyhow::{Context, Result};

use crate::engines::{End, Engine};
use crate::known::known;
use crate::layout::*;
use crate::memory::Memory;
use crate::topics::{self, Scenario, TOPICS};
use crate::{elf, harness, outcome};

/// Scenarios of one boot.
const BATCH: u64 = 3000;

/// What to compare.
#[derive(Clone, Debug)]
pub struct Options {
    pub seed: u64,
    /// The first round.
    pub from: u64,
    /// Each has a scenario of each topic.
    pub rounds: u64,
    /// Only this topic.
    pub topic: Option<String>,
    /// How many mismatches are told in full.
    pub told: u64,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub scenarios: u64,
    pub mismatches: u64,
}

/// Compares.
pub fn compare(options: &Options) -> Result<Summary> {
    let mut image = tempfile::NamedTempFile::new().context("a file for the guest's image")?;
    image.write_all(&elf::image(u32::try_from(HARNESS)?, &harness::code()?))?;
    image.flush()?;
    let mut jobs = (options.from..options.from + options.rounds).flat_map(|round| {
        let topics = TOPICS.iter().enumerate();
        let wanted = topics.filter(|(_, (name, _))| options.topic.as_ref().is_none_or(|topic| topic == name));
        wanted.map(move |(topic, _)| (round, topic)).collect::<Vec<_>>()
    });
    let mut summary = Summary::default();
    loop {
        let mut batch = Vec::new();
        for (round, topic) in jobs.by_ref().take(usize::try_from(BATCH)?) {
            let base = ARENAS + batch.len() as u64 * ARENA;
            let scenario = topics::scenario(topic, options.seed, round, base)
                .with_context(|| format!("making round {round} of topic {topic}"))?;
            batch.extend(scenario.map(|scenario| (round, scenario)));
        }
        if batch.is_empty() {
            return Ok(summary);
        }
        run_batch(options, image.path(), &batch, &mut summary)?;
    }
}

fn run_batch(
    options: &Options,
    image: &std::path::Path,
    batch: &[(u64, Scenario)],
    summary: &mut Summary,
) -> Result<()> {
    let engines = [Engine::Interpreter, Engine::Translator, Engine::Qemu];
    let [interpreter, translator, qemu] = std::thread::scope(|scope| {
        engines
            .map(|engine| {
                scope.spawn(move || {
                    let memory = Memory::new(batch.len() as u64)?;
                    for (_, scenario) in batch {
                        memory.load(&scenario.arena)?;
                    }
                    let ends = engine.run(image, &memory)?;
                    Ok((memory, ends))
                })
            })
            .map(|thread| {
                thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("an engine's thread panicked")))
            })
    });
    let tiers = [("interpreted", interpreter?), ("translated", translator?)];
    let (their_memory, their_ends) = qemu?;
    let bytes = usize::try_from(ARENA)?;
    let (mut ours, mut theirs) = (vec![0; bytes], vec![0; bytes]);
    for ((round, scenario), n) in batch.iter().zip(0_u64..) {
        summary.scenarios += 1;
        for (tier, (our_memory, our_ends)) in &tiers {
            our_memory.arena(scenario.arena.base, &mut ours)?;
            their_memory.arena(scenario.arena.base, &mut theirs)?;
            let ends = (our_ends.get(&n).copied(), their_ends.get(&n).copied());
            if ours == theirs && ends.0 == ends.1 {
                continue;
            }
            for known in known() {
                (known.settle)(scenario, &ours, &mut theirs);
            }
            if ours == theirs && ends.0 == ends.1 {
                continue;
            }
            summary.mismatches += 1;
            if summary.mismatches <= options.told {
                tell(options.seed, *round, scenario, (tier, &ours, ends.0), (&theirs, ends.1));
            }
            break;
        }
    }
    Ok(())
}

fn tell(
    seed: u64,
    round: u64,
    scenario: &Scenario,
    (tier, ours, our_end): (&str, &[u8], Option<End>),
    theirs: (&[u8], Option<End>),
) {
    println!("mismatch, {tier}: --seed {seed} --from {round} --rounds 1 --topic {}", scenario.topic);
    let ours = (ours, our_end);
    println!("  {}", scenario.title);
    let (bits, address) = outcome::start(ours.0);
    print!("{}", outcome::disassembly(ours.0, bits, address));
    for (name, (bytes, end)) in [("translate", ours), ("QEMU", theirs)] {
        let end = end.map_or(String::new(), |end| format!(", then {end:?}"));
        println!("    {name}: {} events{end}", outcome::event_count(bytes));
        print!("{}", outcome::events(bytes));
    }
    for (offset, ours, theirs) in outcome::differences(ours.0, theirs.0).into_iter().take(12) {
        println!("    {}: translate {ours:#x}, QEMU {theirs:#x}", outcome::name(offset));
    }
}

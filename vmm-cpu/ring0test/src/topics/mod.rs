//! What scenarios are about. Each topic makes one from random numbers.

mod apic;
mod calls;
mod control;
mod debug;
mod exceptions;
mod msrs;
mod paging;
mod privileged;
mod returns;
mod segments;
mod setup;
mod transfers;

use anyhow::Result;

use crate::arena::Arena;
use crate::random::Random;

/// A scenario.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub topic: &'static str,
    /// What it tries, in words.
    pub title: String,
    pub arena: Arena,
}

/// Makes the arena at an address, and says what it is about.
type Make = fn(u64, &mut Random) -> Result<(String, Arena)>;

/// The topics by name.
pub const TOPICS: &[(&str, Make)] = &[
    ("paging", paging::make),
    ("segments", segments::make),
    ("transfers", transfers::make),
    ("returns", returns::make),
    ("exceptions", exceptions::make),
    ("calls", calls::make),
    ("msrs", msrs::make),
    ("control", control::make),
    ("privileged", privileged::make),
    ("apic", apic::make),
    ("debug", debug::make),
];

/// The scenario of a topic that `seed` and `round` stand for.
pub(crate) fn scenario(topic: usize, seed: u64, round: u64, base: u64) -> Result<Option<Scenario>> {
    let Some((name, make)) = TOPICS.get(topic) else { return Ok(None) };
    let words = name.bytes().map(u64::from).chain([seed, round]);
    let mut random = Random::new(&words.collect::<Vec<_>>());
    let (title, arena) = make(base, &mut random)?;
    Ok(Some(Scenario { topic: name, title, arena }))
}

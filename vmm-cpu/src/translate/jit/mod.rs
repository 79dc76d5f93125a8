//! Tier 1: blocks that run more than once or twice become code of the host's own instruction set.

mod access;
mod branch;
mod builder;
mod check;
mod effect;
mod emit;
mod entry;
mod fault;
mod host;
mod instruction;
mod memory;
mod merit;
mod pages;
mod region;
mod registers;
mod run;
mod site;
mod special;
mod string;
mod system;
#[cfg(test)]
mod tests;
mod translation;
mod translator;

pub(crate) use run::{Ran, Tier1};

//! The local APIC of a vCPU that is executed in software (Intel SDM 3A chapter 12): xAPIC registers in a page of
//! memory, x2APIC registers as MSRs, timer, interrupt priorities, and messages between vCPUs.
//!
//! It is plain state with time as a parameter: no host clock, no thread, no knowledge of who executes instructions.
//!
//! | module | holds |
//! |---|---|
//! | [`local`] | [`LocalApic`], owned by the thread of its vCPU: priorities, acceptance, EOI, pins, INIT and RESET |
//! | [`access`] | guest reads and writes: the page, MSRs 0x800 to 0x8ff, IA32_APIC_BASE, IA32_TSC_DEADLINE |
//! | [`register`] | which registers there are, and which bits of them may be written |
//! | [`base`] | IA32_APIC_BASE and the modes it switches between |
//! | [`lvt`] | the local vector table |
//! | [`timer`] | the timer |
//! | [`vectors`] | a set of vectors: IRR, ISR, TMR |
//! | [`message`] | interrupt messages, from the interrupt command register or a message-signalled interrupt |
//! | [`inbox`] | [`Inbox`], by which other threads reach a local APIC, and its mirrored address |
//! | [`route`] | which inboxes a message goes to |
//! | [`state`] | conversion to and from [`LocalApicState`](crate::state::LocalApicState) |
//!
//! # For the run loop
//! - Before an instruction at which an interrupt may be taken: if [`Inbox::has_posted`], [`LocalApic::drain`] and
//!   act on the [`Events`]; then [`LocalApic::pending`] and [`LocalApic::acknowledge`].
//! - After every access by the guest: act on the [`ApicAction`], and ask [`LocalApic::next_deadline`] again.
//! - When the deadline has come: [`LocalApic::expire`]. Being late is harmless, being early does nothing.
//! - [`deliver`] posts and says whom to kick; a vCPU about to sleep looks at [`Inbox::has_posted`] under the lock
//!   that the kick takes.
//! - CPUID.1:EDX.APIC follows [`LocalApic::mode`]: it is 0 while the APIC is disabled.
//!
//! # Threat model
//! Everything but time comes from the guest: addresses, widths, values, messages, also those of other vCPUs; a
//! saved state comes from a file. None of it panics, loops, or allocates.

mod access;
mod base;
mod inbox;
mod local;
mod lvt;
mod message;
mod register;
mod route;
mod state;
mod timer;
mod vectors;

#[cfg(test)]
mod tests;

pub(crate) use access::ApicAction;
pub(crate) use base::{MSR_APIC_BASE, Mode};
pub(crate) use inbox::{Events, Inbox};
pub(crate) use local::{ApicFeatures, LocalApic};
pub(crate) use message::Message;
pub(crate) use route::deliver;
pub(crate) use timer::{Deadline, MSR_TSC_DEADLINE};

/// Bits 0 to 7.
fn low_byte(value: u32) -> u8 {
    let [low, ..] = value.to_le_bytes();
    low
}

/// Bits 0 to 31 and 32 to 63.
fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

/// The value whose bits 0 to 31 are `low` and 32 to 63 `high`.
fn joined(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

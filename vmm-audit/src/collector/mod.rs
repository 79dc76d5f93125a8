//! The log in a process of its own (feature `collector`).
//!
//! A monitor that is taken over by its guest must not hold the log's key. So each monitor [connects](attach) to a [`Collector`] and gives it a
//! shared [`Ring`]: a sealed memfd with two rings and the counters. The monitor emits into it as it would into a log in its own
//! process, with the same [contract](crate::pipeline).
//!
//! | who dies | then |
//! |---|---|
//! | emitter | what it put into the ring is there, the collector takes it and says that the emitter is gone; an event that it was just writing is counted as torn |
//! | collector | what is in the ring stays until the next collector has it on the disk; the emitter connects to it again, or is refused from then on if it [attaches once](attach_once) |
//! | both | what was acknowledged is in the log |
//!
//! A place in the ring is given back when what was in it is on the disk. The checkpoint that acknowledges it says how far the ring has been
//! taken, so that a collector which died in between takes nothing twice.
//!
//! # Threat model
//! The emitter is hostile: it writes what it likes into the ring, when it likes. The collector copies each event once, checks
//! it, and writes down what is none; who the source is it decides itself, by the connection and the peer's credentials. Nothing in the ring
//! makes it panic, wait or read elsewhere: the memory cannot shrink (it is sealed), and all sizes are those of the time of attaching. An emitter
//! can spoil its own events only.

mod attach;
mod ring;
mod serve;
mod shape;
#[cfg(test)]
mod tests;

pub use attach::{AttachError, Attached, attach, attach_once};
pub use ring::Ring;
pub use serve::{Collector, CollectorError, CollectorOptions, Step};
pub use shape::{RingError, RingOptions};

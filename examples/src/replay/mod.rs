//! Deterministic runs: recorded, replayed, and compared by hashes of the whole machine.
//!
//! With one vCPU, a clock that counts instructions and devices that know no other, all that a guest sees follows from what
//! it was started with and from its inputs: the date, what is typed, and the end. [`log`] is the file that both go to.
//! [`director`] runs the vCPU, on one thread: it services timers at the nanosecond at which they are due, and gives inputs
//! at points that it has asked for, which is what makes them points to come back to. [`hash`] is the state as a number. [`rerun`] is what a
//! program offers of it all.
//!
//! Where nothing is due and nobody types, guest time stands still; where the guest sleeps until a timer, it skips there. So a
//! guest that waits for a user runs through its idle hours as fast as it can.

pub mod director;
pub mod hash;
pub mod log;
pub mod rerun;

pub use director::{Director, Finish, Inputs, Machine, Typist};
pub use hash::StateHash;
pub use log::{Header, Log, LogWriter, Record};
pub use rerun::{Rerun, RerunOptions};

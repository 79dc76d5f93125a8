//! Guests that run by turns here and on QEMU, and programs that run in them and natively: what each says, when, and how
//! long it took.

mod guests;
mod qemu;
mod runner;
mod spread;
mod work;

pub use guests::{BootTimes, Guests, Machine, by_turns, order};
pub use qemu::{QEMU, host_tsc_khz, install_qemu, microvm, qemu_version};
pub use runner::Runner;
pub use spread::Spread;
pub use work::{Report, clock};

//! Instructions executed one at a time in small guests.

mod flags;
mod segment;
mod syscall;
mod transfer;

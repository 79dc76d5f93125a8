//! The example programs as their users see them, with real guests.
//!
//! One binary for all of them: while one test waits for its guest another one has a processor, and there is one program to link where each
//! is dozens of megabytes.

mod deterministic;
mod doorbells;
mod gdb;
mod guest_session;
mod memory_options;
mod multiboot;
mod paravirtual;
mod paravirtual_32bit;
mod paravirtual_programs;
mod programs;
mod snapshot;
mod translated_programs;
mod two_tenants;
mod versus_qemu;

//! The operations against published vectors and, instruction by instruction, against the host's processor.

#![allow(clippy::cast_possible_truncation, reason = "operands are cut to the registers that they go to")]

mod coverage;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod differential;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod processor;
mod published;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod values;

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

#[cfg(not(target_os = "linux"))]
compile_error!("vmm-audit needs Linux: it is built on memfds, flock and syncfs");

pub mod checkpoint;
#[cfg(feature = "collector")]
pub mod collector;
mod digest;
pub mod event;
pub mod export;
pub mod gaps;
#[cfg(any(feature = "vmm-cpu", feature = "vmm-devices", feature = "vmm-policy"))]
pub mod hooks;
pub mod keys;
pub mod log;
pub mod merkle;
pub mod note;
pub mod pipeline;
pub mod proof;
pub mod query;
mod read;
pub mod report;
pub mod sink;
pub mod storage;
pub mod verb;
pub mod verify;

pub use digest::{Digest, DigestError};
pub use read::{Entries, Found, Item, Place};

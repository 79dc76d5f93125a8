#![doc = "draft"]
#![forbid(unsafe_code)]

pub mod checkpoint;
#[cfg(feature = "collector")]
pub mod collector;
mod digest;
pub mod export;
pub mod gaps;
pub mod log;
pub mod event;
pub mod keys;
pub mod merkle;
pub mod note;
pub mod pipeline;
pub mod proof;
pub mod query;
mod read;
pub mod report;
pub mod sink;
pub mod storage;
pub mod verify;

pub use read::{Entries, Found, Item, Place};
pub use digest::{Digest, DigestError};

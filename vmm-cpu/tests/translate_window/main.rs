//! User programs whose accesses go through the address window see the memory that they see without one: the same programs,
//! with a small kernel below them, interpreted, translated, and translated with a window. Hosts that translate nothing have
//! none.

#![cfg(all(feature = "translate", target_arch = "x86_64", target_os = "linux", not(vmm_portable)))]
// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

mod machine;
#[path = "../own_process/mod.rs"]
mod own_process;

mod faults;
mod huge_pages;
mod process;
mod random;
mod stale;

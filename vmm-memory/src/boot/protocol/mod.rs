//! One module a boot protocol: each turns a request into guest memory and a [`BootEntry`](super::BootEntry).

pub(super) mod flat64;
pub(super) mod linux64;
pub(super) mod multiboot1;
pub(super) mod pvh;

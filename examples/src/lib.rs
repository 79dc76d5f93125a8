//! What the example programs share: a kernel and a userspace to run, how a guest is told what to do and answers, the
//! PC around a vCPU, deterministic runs, figures for Prometheus, the user's terminal, and what the process gives up before a guest runs.

pub mod audit;
pub mod confine;
pub mod debian;
pub mod debug;
pub mod guest_command;
pub mod initramfs;
pub mod ivshmem;
pub mod metrics;
pub mod moment;
pub mod pc;
pub mod pc_state;
pub mod policy;
pub mod pv_console;
pub mod race;
pub mod rates;
pub mod replay;
pub mod soak;
pub mod socket;
pub mod terminal;
pub mod thread_times;
pub mod trial;
pub mod virtio;
pub mod vsock_times;

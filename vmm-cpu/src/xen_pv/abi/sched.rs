//! Scheduling (public/sched.h).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Commands of `sched_op`.
#[allow(missing_docs, reason = "each constant is the command of its name")]
pub mod schedop {
    pub const YIELD: u64 = 0;
    pub const BLOCK: u64 = 1;
    pub const SHUTDOWN: u64 = 2;
    pub const POLL: u64 = 3;
    pub const SHUTDOWN_CODE: u64 = 5;
    pub const WATCHDOG: u64 = 6;
}

/// Why a domain shuts down (`SHUTDOWN_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ShutdownReason {
    /// 0: switched off.
    PowerOff,
    /// 1: wants to be started again.
    Reboot,
    /// 2: wants to be saved.
    Suspend,
    /// 3: the guest crashed, by its own account or because it could not go on.
    Crash,
    /// 4: its watchdog ran out.
    Watchdog,
}

impl ShutdownReason {
    /// From Xen's number; soft reset (5) is not offered.
    pub fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::PowerOff,
            1 => Self::Reboot,
            2 => Self::Suspend,
            3 => Self::Crash,
            4 => Self::Watchdog,
            _ => return None,
        })
    }

    /// Xen's number.
    pub fn number(self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::Reboot => 1,
            Self::Suspend => 2,
            Self::Crash => 3,
            Self::Watchdog => 4,
        }
    }
}

/// `struct sched_poll`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct Poll {
    pub ports: u64,
    pub nr_ports: u32,
    pub pad: u32,
    pub timeout: u64,
}

/// Ports that one `SCHEDOP_poll` takes at most.
pub const MAX_POLL_PORTS: u32 = 128;

/// `struct sched_watchdog`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are those of Xen's header")]
pub struct Watchdog {
    pub id: u32,
    pub timeout: u32,
}

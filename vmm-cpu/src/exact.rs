//! Exact stops: `run` comes back at an instruction count or a guest time, for VMMs that record, replay or compare runs.

/// Where [`Vcpu::run`](crate::Vcpu::run) is to come back with [`Halt::ExactStop`](crate::Halt::ExactStop). What comes
/// first counts; one that lies behind is reached at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExactStop {
    /// When [`ExactStops::instructions`] is this.
    pub instructions: Option<u64>,
    /// When [`VmClock::now`](crate::VmClock::now) is this, in nanoseconds; also while the vCPU is halted.
    pub guest_time: Option<u64>,
}

impl ExactStop {
    /// Nowhere.
    pub fn none() -> Self {
        Self::default()
    }

    /// Sets [`ExactStop::instructions`].
    #[must_use]
    pub fn at_instructions(mut self, count: u64) -> Self {
        self.instructions = Some(count);
        self
    }

    /// Sets [`ExactStop::guest_time`].
    #[must_use]
    pub fn at_guest_time(mut self, nanoseconds: u64) -> Self {
        self.guest_time = Some(nanoseconds);
        self
    }
}

/// The exact stops of one vCPU. There are some where time is counted by instructions
/// ([`ClockSource::Deterministic`](crate::ClockSource::Deterministic)): one instruction is one nanosecond, and a halted vCPU
/// skips to what is due next.
///
/// With one vCPU, everything that the guest sees then follows from the state that it started with and from what the VMM does
/// in callbacks and at exact stops: run by run, on any host of the same kind, wherever kicks and other stops fall. Kicks
/// themselves arrive at points that differ.
///
/// Stops lie between two instructions. One is reported as soon as it is reached: before an interrupt that is due at the same
/// point is taken, and before the timer of the local APIC expires that is due at the same time. To do something at the same
/// point in each run, ask for that point in advance: between two instructions more can happen than one stop can tell apart.
///
/// What counts as an instruction is the backend's to say, but the same in each run. `translate` counts an instruction when
/// it completes. One with a REP prefix counts once at its end, and once whenever what is left of it becomes a multiple of
/// 4096 bytes, after which it goes on as another instruction. Where RFLAGS.TF is set or a debugger steps, each of its
/// iterations counts; so watching a guest with single steps or watchpoints may count differently from letting it run.
pub trait ExactStops {
    /// Instructions retired since the vCPU's creation. They are no part of saved state.
    fn instructions(&self) -> u64;

    /// Asks for a stop in place of the one asked for before. Each of its conditions is met once.
    fn stop_at(&mut self, stop: ExactStop);
}

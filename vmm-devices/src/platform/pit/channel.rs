//! One counter of an 8254: what its output and its count are at a tick, as functions of when it was started.
//!
//! Nothing counts here tick by tick, so a counter costs the same however long nobody looked.

use crate::error::StateError;

const DEVICE: &str = "8254";

/// How a counter goes (Intel 8254, "Mode Definitions").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// 0: the output rises at the end of the count.
    #[default]
    TerminalCount,
    /// 1: a rise of the gate starts a low pulse as long as the count.
    OneShot,
    /// 2: low for one tick in each period.
    RateGenerator,
    /// 3: low for the second half of each period.
    SquareWave,
    /// 4: low for one tick after the end of the count.
    SoftwareStrobe,
    /// 5: as 4, started by a rise of the gate.
    HardwareStrobe,
}

impl Mode {
    fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::TerminalCount,
            1 => Self::OneShot,
            // The top bit does not count for these two.
            2 | 6 => Self::RateGenerator,
            3 | 7 => Self::SquareWave,
            4 => Self::SoftwareStrobe,
            _ => Self::HardwareStrobe,
        }
    }

    fn bits(self) -> u8 {
        match self {
            Self::TerminalCount => 0,
            Self::OneShot => 1,
            Self::RateGenerator => 2,
            Self::SquareWave => 3,
            Self::SoftwareStrobe => 4,
            Self::HardwareStrobe => 5,
        }
    }

    fn is_periodic(self) -> bool {
        matches!(self, Self::RateGenerator | Self::SquareWave)
    }

    /// A rise of the gate starts it, not a write of the count.
    fn is_triggered(self) -> bool {
        matches!(self, Self::OneShot | Self::HardwareStrobe)
    }
}

/// Which bytes of a count an access carries: bits 5 and 4 of the control word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bytes {
    /// The low byte; the high one is zero.
    Low,
    /// The high byte; the low one is zero.
    High,
    /// The low byte, then the high one.
    #[default]
    Both,
}

/// Whether and since when a counter counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Run {
    /// No count was written, or the trigger has not come.
    #[default]
    Idle,
    /// Stopped by the gate after so many ticks.
    Paused(u64),
    /// Since this tick.
    Since(u64),
}

/// State of one counter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ChannelState {
    /// How it counts.
    pub mode: Mode,
    /// Which bytes accesses carry.
    pub bytes: Bytes,
    /// Whether it counts decimally, 4 digits, instead of 16 bits.
    pub bcd: bool,
    /// The count that is counted down, 1 to 65536 (10000 if `bcd`); 0 if none was loaded.
    pub count: u32,
    /// A count that is loaded at the end of the period, or by the trigger.
    pub next_count: Option<u32>,
    /// Whether and since when it counts.
    pub run: Run,
    /// The low byte of a count whose high byte is to come.
    pub written_low: Option<u8>,
    /// The next byte read of a count is the high one.
    pub read_high: bool,
    /// The count that was latched.
    pub latched_count: Option<u16>,
    /// The status that was latched.
    pub latched_status: Option<u8>,
}

/// One counter.
#[derive(Clone, Debug)]
pub struct Channel {
    state: ChannelState,
    gate: bool,
}

impl Default for Channel {
    fn default() -> Self {
        Self { state: ChannelState::default(), gate: true }
    }
}

impl Channel {
    /// Its state, but for the gate, which is a wire from elsewhere.
    pub fn state(&self) -> ChannelState {
        self.state.clone()
    }

    /// A counter as it was saved at tick `now`.
    ///
    /// # Errors
    /// [`StateError`] if an element cannot have its value.
    pub fn restored(state: &ChannelState, gate: bool, now: u64) -> Result<Self, StateError> {
        let max = if state.bcd { 10_000 } else { 0x1_0000 };
        let allowed = "1 to 65536 (10000 if BCD)";
        let counts = state.run != Run::Idle;
        let valid = state.count <= max && (state.count > 0 || !counts);
        StateError::check(valid, DEVICE, "count", state.count, allowed)?;
        if let Some(next) = state.next_count {
            StateError::check((1..=max).contains(&next), DEVICE, "next_count", next, allowed)?;
        }
        if let Run::Since(tick) | Run::Paused(tick) = state.run {
            StateError::check(tick <= now, DEVICE, "run", tick, "ticks up to now")?;
        }
        Ok(Self { state: state.clone(), gate })
    }

    /// Control word, without the bits that choose the channel.
    pub fn program(&mut self, control: u8) {
        self.state = ChannelState {
            mode: Mode::from_bits(control >> 1),
            bytes: match control >> 4 & 3 {
                1 => Bytes::Low,
                2 => Bytes::High,
                _ => Bytes::Both,
            },
            bcd: control & 1 != 0,
            ..ChannelState::default()
        };
    }

    /// A write to the counter's port.
    pub fn write(&mut self, value: u8, now: u64) {
        let count = match self.state.bytes {
            Bytes::Low => u16::from(value),
            Bytes::High => u16::from(value) << 8,
            Bytes::Both => match self.state.written_low.take() {
                Some(low) => u16::from_le_bytes([low, value]),
                None => {
                    self.state.written_low = Some(value);
                    if self.state.mode == Mode::TerminalCount {
                        // Half a count stops the counter, and the output goes low.
                        self.state.run = Run::Idle;
                    }
                    return;
                }
            },
        };
        self.load(count, now);
    }

    fn load(&mut self, written: u16, now: u64) {
        let count = if self.state.bcd { from_bcd(written) } else { u32::from(written) };
        let count = match (count, self.state.bcd) {
            (0, true) => 10_000,
            (0, false) => 0x1_0000,
            (count, _) => count,
        };
        let waits =
            self.state.mode.is_triggered() || self.state.mode.is_periodic() && self.state.run != Run::Idle;
        if waits {
            self.state.next_count = Some(count);
        } else {
            self.state.count = count;
            self.state.run = if self.gate { Run::Since(now) } else { Run::Paused(0) };
        }
    }

    /// The gate's level. Counters 0 and 1 have theirs high for good.
    pub fn set_gate(&mut self, gate: bool, now: u64) {
        if std::mem::replace(&mut self.gate, gate) == gate {
            return;
        }
        let mode = self.state.mode;
        if mode.is_triggered() {
            if gate && (self.state.next_count.is_some() || self.state.count > 0) {
                self.state.count = self.state.next_count.take().unwrap_or(self.state.count);
                self.state.run = Run::Since(now);
            }
            return;
        }
        self.state.run = match self.state.run {
            Run::Idle => Run::Idle,
            // A periodic counter begins anew, with the count that waits.
            _ if gate && mode.is_periodic() => {
                self.state.count = self.state.next_count.take().unwrap_or(self.state.count);
                Run::Since(now)
            }
            Run::Paused(elapsed) if gate => Run::Since(now.saturating_sub(elapsed)),
            Run::Since(start) if !gate => Run::Paused(now.saturating_sub(start)),
            run => run,
        };
    }

    /// Loads a count that waits for the end of a period, if that has passed. Call before anything at `now`: the
    /// period that is under way then is the one that a count written at `now` waits for.
    pub fn advance(&mut self, now: u64) {
        let Run::Since(start) = self.state.run else { return };
        if !self.state.mode.is_periodic() {
            return;
        }
        let period = u64::from(self.state.count.max(1));
        let (from, period) = match (self.state.next_count, start.checked_add(period)) {
            (Some(next), Some(end)) if end <= now => {
                self.state.count = next;
                self.state.next_count = None;
                (end, u64::from(next.max(1)))
            }
            _ => (start, period),
        };
        let passed = now.saturating_sub(from) % period;
        self.state.run = Run::Since(now.saturating_sub(passed));
    }

    fn elapsed(&self, now: u64) -> Option<u64> {
        match self.state.run {
            Run::Idle => None,
            Run::Paused(elapsed) => Some(elapsed),
            Run::Since(start) => Some(now.saturating_sub(start)),
        }
    }

    /// The output's level.
    pub fn output(&self, now: u64) -> bool {
        let count = u64::from(self.state.count.max(1));
        let Some(elapsed) = self.elapsed(now) else {
            return self.state.mode != Mode::TerminalCount;
        };
        match self.state.mode {
            Mode::TerminalCount | Mode::OneShot => elapsed >= count,
            Mode::RateGenerator => !self.gate || elapsed % count != count - 1 || count == 1,
            // The high half is the longer one.
            Mode::SquareWave => !self.gate || elapsed % count < count.div_ceil(2),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => elapsed != count,
        }
    }

    /// The first tick after `after` at which the output rises by itself.
    pub fn next_rise(&self, after: u64) -> Option<u64> {
        let Run::Since(start) = self.state.run else { return None };
        let count = u64::from(self.state.count.max(1));
        let rise = match self.state.mode {
            Mode::TerminalCount | Mode::OneShot => start.checked_add(count)?,
            Mode::SoftwareStrobe | Mode::HardwareStrobe => start.checked_add(count)?.checked_add(1)?,
            Mode::RateGenerator | Mode::SquareWave => {
                let periods = (after.saturating_sub(start) / count).checked_add(1)?;
                start.checked_add(periods.checked_mul(count)?)?
            }
        };
        (rise > after).then_some(rise)
    }

    /// The counting element as the guest reads it.
    fn present_count(&self, now: u64) -> u16 {
        let count = u64::from(self.state.count);
        let modulus = if self.state.bcd { 10_000 } else { 0x1_0000 };
        let elapsed = self.elapsed(now).unwrap_or(0);
        let left = match self.state.mode {
            Mode::RateGenerator => count - elapsed % count.max(1),
            // It goes down by two, once for each half.
            Mode::SquareWave => {
                let even = (count & !1).max(2);
                let passed = elapsed % count.max(1);
                if count == 0 { 0 } else { even - passed.wrapping_mul(2) % even }
            }
            // These go on below zero.
            _ => (count % modulus + modulus - elapsed % modulus) % modulus,
        };
        let left = u32::try_from(left % modulus).unwrap_or(0);
        if self.state.bcd { to_bcd(left) } else { u16::try_from(left).unwrap_or(0) }
    }

    /// Counter latch command: the first one counts until it is read.
    pub fn latch_count(&mut self, now: u64) {
        if self.state.latched_count.is_none() {
            self.state.latched_count = Some(self.present_count(now));
        }
    }

    /// Read-back command.
    pub fn read_back(&mut self, count: bool, status: bool, now: u64) {
        if count {
            self.latch_count(now);
        }
        if status && self.state.latched_status.is_none() {
            let output = if self.output(now) { 0x80 } else { 0 };
            let not_loaded = self.state.run == Run::Idle || self.state.next_count.is_some();
            let null_count = if not_loaded { 0x40 } else { 0 };
            let bytes = match self.state.bytes {
                Bytes::Low => 0x10,
                Bytes::High => 0x20,
                Bytes::Both => 0x30,
            };
            let bcd = u8::from(self.state.bcd);
            self.state.latched_status = Some(output | null_count | bytes | self.state.mode.bits() << 1 | bcd);
        }
    }

    /// A read of the counter's port: status, then count, as far as latched, else the count as it is.
    pub fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.state.latched_status.take() {
            return status;
        }
        let count = self.state.latched_count.unwrap_or_else(|| self.present_count(now));
        let [low, high] = count.to_le_bytes();
        let (byte, last) = match self.state.bytes {
            Bytes::Low => (low, true),
            Bytes::High => (high, true),
            Bytes::Both => {
                self.state.read_high = !self.state.read_high;
                if self.state.read_high { (low, false) } else { (high, true) }
            }
        };
        if last {
            self.state.latched_count = None;
        }
        byte
    }
}

/// Four digits; one above 9 counts as it stands.
fn from_bcd(value: u16) -> u32 {
    let digit = |shift: u32| u32::from(value >> shift & 0xf);
    (digit(12) * 1000 + digit(8) * 100 + digit(4) * 10 + digit(0)).min(9999)
}

fn to_bcd(value: u32) -> u16 {
    let digit = |power: u32| u16::try_from(value / power % 10).unwrap_or(0);
    digit(1000) << 12 | digit(100) << 8 | digit(10) << 4 | digit(1)
}

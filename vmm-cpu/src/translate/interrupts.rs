//! How the local APIC, the INTR pin and time meet the run loop.

use std::sync::Arc;
use std::time::Duration;

use super::apic::{ApicAction, Deadline, Events, Message, Mode, deliver};
use super::core::{Core, Machine};
use super::cpu::{Activity, Cpu, RDX};
use super::memory::PAGE_MASK;
use super::segment::{SegmentRegister, index};
use super::vm::Shared;
use crate::error::Result;
use crate::vcpu::VcpuIo;
use crate::vm::MsiMessage;

/// How many instructions a vCPU with a deterministic clock runs at most before it looks at the time.
const DETERMINISTIC_POLL: u64 = 1 << 20;

/// Sends a message to the local APICs of a virtual machine; whether one took it.
pub(crate) fn send(shared: &Shared, message: MsiMessage) -> Result<bool> {
    let Some(message) = Message::from_msi(message)? else { return Ok(false) };
    Ok(post(shared, None, message))
}

/// Posts a message and wakes who it is for.
fn post(shared: &Shared, sender: Option<u32>, message: Message) -> bool {
    let sender = sender.and_then(|index| usize::try_from(index).ok());
    let taken = deliver(&shared.inboxes, sender, message);
    for peer in shared.peers().iter() {
        if usize::try_from(peer.index).is_ok_and(|index| taken.contains(index)) {
            peer.signals.attract();
        }
    }
    !taken.is_empty()
}

impl Core {
    /// Time of the virtual machine in nanoseconds. Where it is counted, it is the time before the running instruction.
    pub(crate) fn now(&mut self) -> u64 {
        self.tell_time();
        self.shared.clock.nanoseconds()
    }

    /// Instructions retired so far.
    pub(crate) fn retired(&self) -> u64 {
        self.instructions + self.position as u64
    }

    /// Lets a clock that counts instructions know of those so far.
    pub(crate) fn tell_time(&mut self) {
        let retired = self.retired();
        let news = retired.saturating_sub(std::mem::replace(&mut self.told, retired));
        self.shared.clock.advance(news);
    }

    /// Whether `run` is to return here. What was reached is not waited for any more.
    pub(crate) fn reaches_stop(&mut self) -> bool {
        let retired = self.instructions;
        let by_count = self.stop.instructions.take_if(|instructions| *instructions <= retired).is_some();
        let mut by_time = false;
        if self.stop.guest_time.is_some() {
            let now = self.now();
            by_time = self.stop.guest_time.take_if(|time| *time <= now).is_some();
        }
        by_count || by_time
    }

    pub(crate) fn apic_disabled(&self) -> bool {
        self.apic.as_ref().is_none_or(|apic| apic.mode() == Mode::Disabled)
    }

    /// Whether `gpa` lies in the page of the local APIC.
    pub(crate) fn apic_page(&self, gpa: u64) -> bool {
        self.apic.as_ref().and_then(|apic| apic.page()) == Some(gpa & PAGE_MASK)
    }

    /// Looks again at when the timer of the local APIC is due.
    pub(crate) fn refresh_deadline(&mut self) {
        let deadline = self.apic.as_ref().map_or(Deadline::None, |apic| apic.next_deadline());
        self.deadline = match deadline {
            Deadline::None => None,
            Deadline::Ns(nanoseconds) => Some(nanoseconds),
            Deadline::Tsc(tsc) => {
                let now = self.now();
                let left = tsc.wrapping_sub(self.guest_tsc());
                let is_past = left.cast_signed() <= 0;
                let left = if is_past { 0 } else { self.shared.clock.nanoseconds_of(left) };
                Some(now.saturating_add(left))
            }
        };
        self.urgent = true;
    }

    /// Lets the timer of the local APIC expire if it is due.
    pub(crate) fn check_timer(&mut self) {
        let Some(deadline) = self.deadline else { return };
        let now = self.now();
        if now < deadline {
            return;
        }
        let tsc = self.guest_tsc();
        if let Some(apic) = &mut self.apic {
            apic.expire(now, tsc);
        }
        self.refresh_deadline();
    }

    /// How many instructions may run before time is looked at again.
    pub(crate) fn next_budget(&mut self) -> i64 {
        /// Some 50 microseconds.
        const POLL: i64 = 4096;
        if !self.shared.clock.is_deterministic() {
            return POLL;
        }
        // One instruction is one nanosecond: the timer fires at its very instruction.
        let now = self.now();
        let times =
            self.deadline.into_iter().chain(self.stop.guest_time).map(|time| time.saturating_sub(now));
        let count = self.stop.instructions.map(|count| count.saturating_sub(self.instructions));
        let left = times.chain(count).min().unwrap_or(u64::MAX);
        i64::try_from(left.min(DETERMINISTIC_POLL)).unwrap_or(i64::MAX).max(1)
    }

    /// What other threads posted to the local APIC.
    pub(crate) fn drain_inbox(&mut self) {
        let Some(apic) = &mut self.apic else { return };
        let events = apic.drain();
        self.take_events(events);
    }

    fn take_events(&mut self, events: Events) {
        if events.init {
            self.init();
        }
        if let Some(page) = events.start_up
            && self.cpu.activity == Activity::WaitForSipi
        {
            self.start_up(page);
        }
        self.cpu.nmi_pending |= events.nmi;
        self.ext_int |= events.ext_int;
    }

    /// INIT (Intel SDM 3A table 11-1): as RESET, but caches, x87, SSE and model-specific registers stay.
    fn init(&mut self) {
        let old = self.cpu.clone();
        let mut cpu = Cpu::at_reset();
        cpu.keep_over_init(&old);
        let [signature, ..] = self.guest_cpuid(1, 0);
        cpu.set_r(RDX, u64::from(signature));
        cpu.activity = if self.index == 0 { Activity::Running } else { Activity::WaitForSipi };
        self.cpu = cpu;
        self.injected = None;
        if let Some(apic) = &mut self.apic {
            apic.init();
        }
        self.update_debug();
        self.refresh_deadline();
        self.update_mode();
    }

    fn start_up(&mut self, page: u8) {
        let selector = u16::from(page) << 8;
        let cs: &mut SegmentRegister = self.cpu.segment_mut(index::CS);
        cs.load_real(selector);
        self.cpu.rip = 0;
        self.cpu.activity = Activity::Running;
        self.update_mode();
    }

    /// Whether something other than an interrupt at the INTR pin waits to be taken.
    pub(crate) fn pending_vector(&self) -> bool {
        self.apic.as_ref().is_some_and(|apic| apic.pending().is_some())
    }

    /// Whether an interrupt would be taken if interrupts were let in.
    pub(crate) fn has_interrupt(&self) -> bool {
        self.pending_vector() || self.ext_int || self.signals.intr.is_high() && self.takes_pin()
    }

    /// Whether the INTR pin reaches the processor.
    pub(crate) fn takes_pin(&self) -> bool {
        self.apic.as_ref().is_none_or(|apic| apic.takes_ext_int())
    }

    pub(crate) fn cr8(&self) -> u64 {
        self.apic.as_ref().map_or(self.cpu.cr8, |apic| u64::from(apic.cr8()))
    }

    pub(crate) fn set_cr8(&mut self, value: u8) {
        match &mut self.apic {
            Some(apic) => apic.set_cr8(value),
            None => self.cpu.cr8 = u64::from(value),
        }
        self.urgent = true;
    }

    /// Time until the timer is due, for a vCPU that waits.
    pub(crate) fn time_to_deadline(&mut self) -> Option<Duration> {
        let deadline = self.deadline?;
        let now = self.now();
        Some(Duration::from_nanos(deadline.saturating_sub(now)))
    }
}

impl Machine<'_> {
    /// Calls the VMM. Meanwhile the memory map may change under this vCPU.
    pub(crate) fn leave_guest<T>(&mut self, call: impl FnOnce(&mut dyn VcpuIo) -> T) -> T {
        // Devices have the time of the virtual machine.
        self.tell_time();
        let signals = Arc::clone(&self.signals);
        signals.leave_guest();
        let result = call(self.io);
        self.enter_guest();
        result
    }

    pub(crate) fn apic_read(&mut self, gpa: u64, bytes: &mut [u8]) {
        let (now, tsc) = (self.now(), self.guest_tsc());
        if let Some(apic) = &mut self.apic {
            apic.mmio_read(gpa & !PAGE_MASK, bytes, now, tsc);
        }
        self.refresh_deadline();
    }

    pub(crate) fn apic_write(&mut self, gpa: u64, bytes: &[u8]) {
        let (now, tsc) = (self.now(), self.guest_tsc());
        if let Some(apic) = &mut self.apic {
            let action = apic.mmio_write(gpa & !PAGE_MASK, bytes, now, tsc);
            self.act(action);
        }
    }

    /// Does what a write to the local APIC asks for.
    pub(crate) fn act(&mut self, action: ApicAction) {
        match action {
            ApicAction::None => {}
            ApicAction::Ipi(message) => {
                let (shared, own) = (Arc::clone(&self.shared), self.index);
                // One to itself is taken before the next instruction, as others are: INIT must not change what the
                // running one goes on with.
                post(&shared, Some(own), message);
            }
            ApicAction::Eoi(vector) => {
                self.counts.eoi += 1;
                self.leave_guest(|io| io.eoi(vector));
            }
            // The TLB may hold the page as RAM or the other way round.
            ApicAction::BaseChanged => self.tlb.flush_all(),
        }
        self.refresh_deadline();
        self.end_block();
    }
}

#[cfg(test)]
#[path = "interrupts_tests.rs"]
mod tests;

//! Debug registers of the guest and stops of a debugger (Intel SDM 3B chapter 19).

use super::core::{Core, Flow, Machine, Reason};
use super::exception::Exception;
use super::flags::bits;
use super::memory::PAGE_MASK;
use crate::debug::{DebugReason, DebugStop, HardwareStopKind};
use crate::vcpu::Halt;

/// Breakpoint registers.
const REGISTERS: u32 = 4;

/// What a breakpoint register waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Watch {
    Execute,
    Write(u64),
    Access(u64),
}

impl Core {
    /// What the guest's breakpoint register `n` waits for, if it is on.
    fn guest_watch(&self, n: u32) -> Option<(u64, Watch)> {
        let dr7 = self.cpu.dr7;
        if dr7 >> (2 * n) & 3 == 0 {
            return None;
        }
        let address = self.cpu.dr.get(usize::try_from(n).ok()?).copied()?;
        let length = match dr7 >> (18 + 4 * n) & 3 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        };
        let watch = match dr7 >> (16 + 4 * n) & 3 {
            0 => Watch::Execute,
            1 => Watch::Write(length),
            3 => Watch::Access(length),
            // Ports, with CR4.DE; there are none to watch here.
            _ => return None,
        };
        // Addresses are aligned to the length.
        let aligned = if let Watch::Write(length) | Watch::Access(length) = watch {
            address & !(length - 1)
        } else {
            address
        };
        Some((aligned, watch))
    }

    /// Stops of guest (bits 0 to 3) and debugger (bits 8 to 15) that `is_hit`.
    fn hits(&self, is_hit: impl Fn(u64, Watch) -> bool) -> u16 {
        let mut hits = 0;
        for n in 0..REGISTERS {
            if self.guest_watch(n).is_some_and(|(address, watch)| is_hit(address, watch)) {
                hits |= 1 << n;
            }
        }
        for (n, stop) in self.debug.hardware.iter().take(8).enumerate() {
            let watch = match stop.kind {
                HardwareStopKind::Execute => Watch::Execute,
                HardwareStopKind::Write { length } => Watch::Write(length.into()),
                HardwareStopKind::Access { length } => Watch::Access(length.into()),
            };
            if is_hit(stop.address, watch) {
                hits |= 1 << (8 + n);
            }
        }
        hits
    }

    /// Takes changed debug registers or requests over.
    pub(crate) fn update_debug(&mut self) {
        self.watching = self.hits(|_, watch| watch != Watch::Execute) != 0;
        self.urgent = true;
        self.end_block();
        // Accesses that are watched must miss the TLB.
        self.tlb.flush_all();
    }

    /// Whether instructions run one by one.
    pub(crate) fn is_careful(&self) -> bool {
        self.cpu.flags.control(bits::TF)
            || self.debug.single_step
            || self.watching
            || !self.debug.hardware.is_empty()
            || self.cpu.dr7 & 0xff != 0
    }

    /// Whether data in the page of `va` are watched.
    pub(crate) fn watches_page(&self, va: u64) -> bool {
        self.hits(|address, watch| watch != Watch::Execute && (address ^ va) & PAGE_MASK == 0) != 0
    }

    /// Notes a data access that missed the TLB.
    pub(crate) fn watch(&mut self, va: u64, bytes: usize, write: bool) {
        if !self.watching {
            return;
        }
        let end = va.wrapping_add(bytes as u64);
        self.watch_hits |= self.hits(|address, watch| match watch {
            Watch::Execute => false,
            Watch::Write(length) => write && address < end && va < address.wrapping_add(length),
            Watch::Access(length) => address < end && va < address.wrapping_add(length),
        });
    }

    fn linear_rip(&self) -> u64 {
        self.cpu.cs().base.wrapping_add(self.cpu.rip)
    }

    /// The stop that the debugger wants after an instruction with those hits.
    pub(crate) fn debugger_stop(&mut self, hits: u16) -> Option<Halt> {
        let hits = super::segment::low8(hits.into());
        let reason = if hits != 0 {
            DebugReason::Hardware { hits }
        } else if self.debug.single_step {
            DebugReason::SingleStep
        } else {
            return None;
        };
        self.counts.debug += 1;
        Some(Halt::Debug(DebugStop::new(self.linear_rip(), reason)))
    }
}

impl Machine<'_> {
    /// Execution breakpoints at the next instruction. MOV SS holds none off, on AMD's processors.
    pub(crate) fn before_instruction(&mut self) -> Flow<Option<Halt>> {
        self.trap_pending = self.cpu.flags.control(bits::TF);
        self.keeps_rf = false;
        let rip = self.linear_rip();
        let hits = self.hits(|address, watch| watch == Watch::Execute && address == rip);
        let debugger = super::segment::low8(u64::from(hits) >> 8);
        if debugger != 0 && self.reported.replace(rip) != Some(rip) {
            self.counts.debug += 1;
            return Ok(Some(Halt::Debug(DebugStop::new(rip, DebugReason::Hardware { hits: debugger }))));
        }
        self.reported = None;
        if hits & 0xf != 0 && !self.cpu.flags.control(bits::RF) {
            let exception = Exception::debug(u64::from(hits & 0xf));
            return Err(self.leave(Reason::Exception(exception)));
        }
        Ok(None)
    }
}

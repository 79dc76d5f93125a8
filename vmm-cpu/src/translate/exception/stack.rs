//! The stack that a handler or an inner procedure gets, before it becomes the running one.

use crate::translate::core::{Flow, Machine, Place};
use crate::translate::cpu::RSP;
use crate::translate::descriptor::{kind, stack_mask};
use crate::translate::exception::{Exception, vector};
use crate::translate::segment::{SegmentRegister, attribute, index, low16, low32};

/// Whether `cs` holds 64-bit code, in long mode.
pub(crate) fn is_64_bit(cs: &SegmentRegister) -> bool {
    cs.has(attribute::LONG)
}

/// A stack to push on that becomes the running one with [`Stack::enter`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stack {
    segment: SegmentRegister,
    pointer: u64,
    mask: u64,
    /// 64-bit code pushes: no segment.
    is_64: bool,
    /// With whose rights.
    cpl: u8,
    /// Error code of its stack faults.
    error: u16,
}

impl Stack {
    /// The running stack, onto which `is_64`-bit delivery or the running code pushes.
    pub(crate) fn current(m: &Machine<'_>, is_64: bool) -> Self {
        let segment = *m.cpu.segment(index::SS);
        let (pointer, cpl) = (m.cpu.r(RSP), m.mode.cpl);
        Self { segment, pointer, mask: stack_mask(&segment, is_64), is_64, cpl, error: 0 }
    }

    /// A stack for 64-bit code at level `cpl`, with a null SS.
    pub(crate) fn null(pointer: u64, cpl: u8) -> Self {
        let segment = SegmentRegister::null_stack(u16::from(cpl));
        Self { segment, pointer, mask: u64::MAX, is_64: true, cpl, error: 0 }
    }

    /// A stack in a segment of level `cpl`.
    pub(crate) fn inner(segment: SegmentRegister, pointer: u64, cpl: u8) -> Self {
        let mask = stack_mask(&segment, false);
        Self { segment, pointer, mask, is_64: false, cpl, error: segment.selector & !3 }
    }

    /// The same stack with its pointer at a multiple of 16, as 64-bit delivery has it.
    pub(crate) fn aligned(self) -> Self {
        Self { pointer: self.pointer & !15, ..self }
    }

    /// The same stack elsewhere.
    pub(super) fn at(self, pointer: u64) -> Self {
        Self { pointer, ..self }
    }

    /// Pushes a word of 2, 4 or 8 bytes.
    pub(crate) fn push(&mut self, m: &mut Machine<'_>, bytes: u64, value: u64) -> Flow {
        let pointer = self.pointer & !self.mask | self.pointer.wrapping_sub(bytes) & self.mask;
        let place = if self.is_64 {
            Place::stack(pointer)
        } else {
            let offset = pointer & self.mask;
            let is_usable = !m.cpu.protected() || !self.segment.is_unusable();
            if !is_usable || !self.segment.contains(offset, offset.wrapping_add(bytes - 1)) {
                return Err(m.raise(Exception::with_error(vector::SS, self.error)));
            }
            Place::stack(self.segment.base.wrapping_add(offset) & 0xffff_ffff)
        };
        if self.cpl == m.mode.cpl {
            m.store_sized(place, bytes, value)?;
        } else {
            m.with_cpl(self.cpl, |m| m.store_sized(place, bytes, value))?;
        }
        self.pointer = pointer;
        Ok(())
    }

    /// Makes it the running stack. `update_mode` is still due.
    pub(crate) fn enter(self, m: &mut Machine<'_>) {
        *m.cpu.segment_mut(index::SS) = self.segment;
        m.cpu.set_r(RSP, self.pointer);
    }
}

impl Machine<'_> {
    /// Stores the low 2, 4 or 8 bytes of `value`.
    pub(crate) fn store_sized(&mut self, place: Place, bytes: u64, value: u64) -> Flow {
        match bytes {
            2 => self.store(place, low16(value)),
            4 => self.store(place, low32(value)),
            _ => self.store(place, value),
        }
    }

    /// Loads 2, 4 or 8 bytes.
    pub(crate) fn load_sized(&mut self, place: Place, bytes: u64) -> Flow<u64> {
        match bytes {
            2 => Ok(u64::from(self.load::<u16>(place)?)),
            4 => Ok(u64::from(self.load::<u32>(place)?)),
            _ => self.load::<u64>(place),
        }
    }

    /// The word of 2, 4 or 8 bytes that lies `skip` bytes above the top of the stack. The stack pointer stays.
    pub(crate) fn peek_sized(&mut self, bytes: u64, skip: u64) -> Flow<u64> {
        match bytes {
            2 => self.peek::<u16>(skip),
            4 => self.peek::<u32>(skip),
            _ => self.peek::<u64>(skip),
        }
    }

    /// The stack that the TSS holds for the inner level `cpl`.
    pub(crate) fn inner_stack(&mut self, cpl: u8) -> Flow<Stack> {
        let level = u64::from(cpl);
        if self.cpu.long_mode() {
            return Ok(Stack::null(self.tss_quadword(4 + 8 * level)?, cpl));
        }
        let is_wide = matches!(self.cpu.tr.kind(), kind::TSS | kind::TSS_BUSY);
        let (offset, bytes) = if is_wide { (4 + 8 * level, 4) } else { (2 + 4 * level, 2) };
        // The whole of the two must lie within the limit, the unused half of the one with SS included.
        self.require_tss(offset, 2 * bytes)?;
        let pointer = self.tss_word(offset, bytes)?;
        let selector = low16(self.tss_word(offset + bytes, 2)?);
        let segment = self.stack_segment(selector, cpl, vector::TS)?;
        Ok(Stack::inner(segment, pointer, cpl))
    }

    /// An entry of the interrupt stack table, 1 to 7.
    pub(super) fn interrupt_stack(&mut self, ist: u64) -> Flow<u64> {
        self.tss_quadword(0x1c + 8 * ist)
    }

    /// The selector of the task that the running one is nested in.
    pub(crate) fn previous_task(&mut self) -> Flow<u16> {
        Ok(low16(self.tss_word(0, 2)?))
    }

    fn tss_quadword(&mut self, offset: u64) -> Flow<u64> {
        self.tss_word(offset, 8)
    }

    /// A word of the TSS, which must lie within its limit.
    fn tss_word(&mut self, offset: u64, bytes: u64) -> Flow<u64> {
        self.require_tss(offset, bytes)?;
        let tr = self.cpu.tr;
        let place = Place::data(self.system_address(tr.base.wrapping_add(offset)));
        self.as_system(|m| m.load_sized(place, bytes))
    }

    /// #TS unless that much of the TSS lies within its limit.
    fn require_tss(&mut self, offset: u64, bytes: u64) -> Flow {
        let tr = self.cpu.tr;
        if tr.is_unusable() || offset + bytes - 1 > u64::from(tr.limit) {
            return Err(self.selector_fault(vector::TS, tr.selector));
        }
        Ok(())
    }
}

//! `mmuext_op`: page tables as wholes, roots, flushes.

use super::super::abi::errno::Errno;
use super::super::abi::mmu::{MmuextOp, mmuext};
use super::super::abi::{PAGE_BYTES, nr};
use super::super::engine::GuestMode;
use super::super::memory::{element, may_access};
use super::{Call, Done, Failure, Outcome};

/// The count goes on from an earlier part of the same call.
const PREEMPTED: u64 = 1 << 31;

impl Call<'_> {
    /// Arguments: list, count, where the number of those done goes, foreign domain.
    pub(super) fn mmuext_op(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [list, count, done_at, foreign, ..] = *args;
        let count = count & u64::from(u32::MAX);
        let mut earlier = 0;
        if count & PREEMPTED != 0 && done_at != 0 {
            earlier = self.space().read::<u32>(done_at)?;
        }
        let count = count & !PREEMPTED;
        self.check_foreign(foreign)?;
        let mut done: u32 = 0;
        let mut result = Ok(Done::OK);
        for index in 0..count {
            let at = element::<MmuextOp>(list, index)?;
            if !self.step() {
                [args[0], args[1]] = [at, (count - index) | PREEMPTED];
                result = Ok(Done::Again);
                break;
            }
            let op = self.space().read::<MmuextOp>(at);
            match op.map_err(Failure::from).and_then(|op| self.mmuext_one(&op)) {
                Ok(()) => {}
                Err(Failure::Later) => {
                    [args[0], args[1]] = [at, (count - index) | PREEMPTED];
                    result = Ok(Done::Again);
                    break;
                }
                Err(failure) => {
                    result = Err(failure);
                    break;
                }
            }
            done += 1;
        }
        if done_at != 0 {
            self.space().write(done_at, &earlier.wrapping_add(done))?;
        }
        result
    }

    fn mmuext_one(&mut self, op: &MmuextOp) -> Result<(), Failure> {
        match op.cmd {
            mmuext::PIN_L1_TABLE..=mmuext::PIN_L4_TABLE => {
                let level = u8::try_from(op.cmd + 1).map_err(|_| Errno::EINVAL)?;
                self.pin(op.arg1, level)?;
            }
            mmuext::UNPIN_TABLE => self.domain.tables.unpin(op.arg1)?,
            mmuext::NEW_BASEPTR => self.new_root(op.arg1, GuestMode::Kernel)?,
            mmuext::NEW_USER_BASEPTR if op.arg1 == 0 => self.engine.set_user_root(None)?,
            mmuext::NEW_USER_BASEPTR => self.new_root(op.arg1, GuestMode::User)?,
            mmuext::TLB_FLUSH_LOCAL => self.flush_mask(1 << self.vcpu.index, None)?,
            mmuext::INVLPG_LOCAL => self.flush_mask(1 << self.vcpu.index, checked(op.arg1))?,
            mmuext::TLB_FLUSH_MULTI => {
                let mask = self.read_vcpu_mask(op.arg2)?;
                self.flush_mask(mask, None)?;
            }
            mmuext::INVLPG_MULTI => {
                let mask = self.read_vcpu_mask(op.arg2)?;
                self.flush_mask(mask, checked(op.arg1))?;
            }
            mmuext::TLB_FLUSH_ALL => self.flush_mask(u64::MAX, None)?,
            mmuext::INVLPG_ALL => self.flush_mask(u64::MAX, checked(op.arg1))?,
            // Only domains with devices of their own may.
            mmuext::FLUSH_CACHE | mmuext::FLUSH_CACHE_GLOBAL => {
                self.refused(nr::MMUEXT_OP, Errno::EACCES)?;
            }
            mmuext::SET_LDT => {
                let entries = op.arg2 & u64::from(u32::MAX);
                // There is no LDT; not to have one is all that can be asked for.
                if entries != 0 {
                    self.refused(nr::MMUEXT_OP, Errno::EOPNOTSUPP)?;
                }
            }
            mmuext::CLEAR_PAGE => {
                let to = self.ordinary(op.arg1)?;
                self.domain.memory.write(to, &[0; PAGE_BYTES])?;
            }
            mmuext::COPY_PAGE => {
                let (to, from) = (self.ordinary(op.arg1)?, self.domain.frame_address(op.arg2)?.0);
                let mut page = [0; PAGE_BYTES];
                self.domain.memory.read(from, &mut page)?;
                self.domain.memory.write(to, &page)?;
            }
            mmuext::MARK_SUPER | mmuext::UNMARK_SUPER => {
                self.refused(nr::MMUEXT_OP, Errno::EOPNOTSUPP)?;
            }
            _ => {
                self.unknown(nr::MMUEXT_OP)?;
            }
        }
        Ok(())
    }

    /// Address of a frame of RAM that is not known as a page table.
    fn ordinary(&self, frame: u64) -> Result<u64, Errno> {
        let address = self.domain.frame_address(frame)?;
        if self.domain.tables.level(frame) != 0 {
            return Err(Errno::EINVAL);
        }
        Ok(address.0)
    }

    pub(crate) fn pin(&mut self, frame: u64, level: u8) -> Result<(), Failure> {
        self.domain.frame_address(frame)?;
        self.adopt_anew(frame, level)?;
        self.domain.tables.pin(frame)?;
        if level == 4 {
            self.domain.tables.forget_root(frame);
        }
        Ok(())
    }

    pub(crate) fn new_root(&mut self, frame: u64, mode: GuestMode) -> Result<(), Failure> {
        let address = self.domain.frame_address(frame)?;
        self.adopt(frame, 4, true)?;
        if self.domain.tables.become_root(frame, mode == GuestMode::User) {
            self.engine.prepare_root(address, mode)?;
        }
        match mode {
            GuestMode::Kernel => self.engine.set_kernel_root(address)?,
            GuestMode::User => self.engine.set_user_root(Some(address))?,
        }
        Ok(())
    }
}

/// An address to flush: one that cannot be mapped flushes everything, which is never wrong.
fn checked(va: u64) -> Option<u64> {
    may_access(va).then_some(va)
}

#[cfg(test)]
mod tests;

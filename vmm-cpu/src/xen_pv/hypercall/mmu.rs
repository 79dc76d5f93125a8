//! `mmu_update` and `update_va_mapping`: stores to page-table entries.
//!
//! What is checked: the table is RAM of the domain, a present entry names a frame that the domain may map, entries of upper
//! levels name tables. What is changed: the user bit is set in present entries, since everything runs in ring 3, and the
//! global bit is taken away, since entries of the kernel must not outlive a switch to the user root.

use vmm_memory::vm_memory::GuestAddress;

use super::super::abi::errno::Errno;
use super::super::abi::mmu::{self, MmuUpdate, entry, uvmf};
use super::super::abi::{PAGE_SIZE, domid, nr};
use super::super::memory::{element, frame_of, may_access};
use super::{Call, Done, Failure, Outcome};

/// The count goes on from an earlier part of the same call.
const PREEMPTED: u64 = 1 << 31;

/// Slots of a top-level table that are Xen's.
const RESERVED_SLOTS: std::ops::Range<u64> = 256..272;

impl Call<'_> {
    /// Whether the guest means itself, in the low or the high half of a `foreigndom` argument.
    pub(super) fn check_foreign(&self, foreign: u64) -> Result<(), Errno> {
        let [a, b, c, d, ..] = foreign.to_le_bytes();
        let (owner, tables) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
        let own_tables = tables == 0 || tables == domid::SELF + 1;
        if !own_tables {
            return Err(Errno::ESRCH);
        }
        match owner {
            domid::SELF => Ok(()),
            // Memory of others would come by way of grants.
            domid::IO => Err(Errno::EPERM),
            _ => Err(Errno::ESRCH),
        }
    }

    /// Arguments: list, count, where the number of those done goes, foreign domain.
    pub(super) fn mmu_update(&mut self, args: &mut [u64; 6]) -> Outcome {
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
            let at = element::<MmuUpdate>(list, index)?;
            if !self.step() {
                [args[0], args[1]] = [at, (count - index) | PREEMPTED];
                result = Ok(Done::Again);
                break;
            }
            let update = self.space().read::<MmuUpdate>(at);
            match update.map_err(Failure::from).and_then(|update| self.update_one(update)) {
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

    fn update_one(&mut self, update: MmuUpdate) -> Result<(), Failure> {
        let (command, at) = (update.ptr & 3, update.ptr & !3);
        match command {
            mmu::MACHPHYS_UPDATE => Ok(self.domain.memory.set_m2p(at / PAGE_SIZE, update.val)?),
            _ => self.store_entry(at & !7, update.val, command == mmu::PT_UPDATE_PRESERVE_AD),
        }
    }

    /// Stores an entry of a page table at a guest-physical address.
    pub(super) fn store_entry(&mut self, at: u64, value: u64, keep_accessed: bool) -> Result<(), Failure> {
        let table = at / PAGE_SIZE;
        if !self.domain.memory.is_ram(table) {
            return Err(Errno::EINVAL.into());
        }
        let level = self.domain.tables.level(table);
        if level == 4 && RESERVED_SLOTS.contains(&(at % PAGE_SIZE / 8)) {
            return Err(Errno::EINVAL.into());
        }
        let mut new = self.checked_entry(level, value)?;
        if keep_accessed {
            let old = self.domain.memory.load(at)?;
            if level != 0 && old & new & entry::PRESENT != 0 {
                // Another processor may set them at this moment.
                return Ok(self.engine.write_entry_keeping(GuestAddress(at), new, entry::ACCESSED_DIRTY)?);
            }
            new |= old & entry::ACCESSED_DIRTY;
        }
        if level == 0 {
            // No live table, so there is nothing that the processor could have cached.
            self.domain.memory.store(at, new)?;
        } else {
            self.engine.write_entry(GuestAddress(at), new)?;
        }
        Ok(())
    }

    /// What becomes of an entry that the guest wants in a table of `level`; 0 for one that is not known as a table.
    fn checked_entry(&mut self, level: u8, value: u64) -> Result<u64, Failure> {
        if value & entry::PRESENT == 0 {
            return Ok(value);
        }
        let frame = frame_of(value);
        match level {
            0 | 1 => {
                if !self.domain.memory.may_map(frame) {
                    return Err(Errno::EINVAL.into());
                }
                if level == 1 && value & entry::WRITABLE != 0 {
                    // Writable memory is no page table any more.
                    self.domain.tables.release(frame)?;
                }
            }
            _ => {
                if level != 4 && value & entry::LARGE != 0 {
                    return Err(Errno::EINVAL.into());
                }
                self.adopt(frame, level - 1, true)?;
            }
        }
        Ok((value | entry::USER) & !entry::GLOBAL)
    }

    /// Makes a table and all below it known, and brings their entries into the form that the engine needs. A table that
    /// is known already is not read again, so a call that was ended by [`Failure::Later`] comes further the next time.
    pub(super) fn adopt(&mut self, frame: u64, level: u8, named: bool) -> Result<(), Failure> {
        let tables = &self.domain.tables;
        let new = if named { tables.claim_anew(frame, level)? } else { tables.claim(frame, level)? };
        if !new {
            return Ok(());
        }
        self.adopt_new(frame, level)
    }

    fn adopt_new(&mut self, frame: u64, level: u8) -> Result<(), Failure> {
        let result = self.adopt_entries(frame, level, false);
        if result.is_err() {
            // What is below stays known, which costs nothing; the table itself was refused, or is not through.
            self.domain.tables.release(frame)?;
        }
        result
    }

    /// As [`Call::adopt`] for a table that the guest pins: this one is read even if it was known before.
    pub(super) fn adopt_anew(&mut self, frame: u64, level: u8) -> Result<(), Failure> {
        if self.domain.tables.claim_anew(frame, level)? {
            self.adopt_new(frame, level)
        } else {
            self.adopt_entries(frame, level, true)
        }
    }

    fn adopt_entries(&mut self, frame: u64, level: u8, live: bool) -> Result<(), Failure> {
        self.tables = self.tables.checked_sub(1).ok_or(Failure::Later)?;
        let table = self.domain.memory.table(frame)?;
        for (index, value) in (0..).zip(table.iter()) {
            if value & entry::PRESENT == 0 || (level == 4 && RESERVED_SLOTS.contains(&index)) {
                continue;
            }
            let child = frame_of(*value);
            if level == 1 {
                if !self.domain.memory.may_map(child) {
                    return Err(Errno::EINVAL.into());
                }
            } else {
                if level != 4 && value & entry::LARGE != 0 {
                    return Err(Errno::EINVAL.into());
                }
                self.adopt(child, level - 1, false)?;
            }
            let new = (value | entry::USER) & !entry::GLOBAL;
            if new != *value {
                let at = frame * PAGE_SIZE + index * 8;
                if live {
                    self.engine.write_entry_keeping(GuestAddress(at), new, entry::ACCESSED_DIRTY)?;
                } else {
                    self.domain.memory.store(at, new)?;
                }
            }
        }
        Ok(())
    }

    /// Arguments: address, entry, flush flags.
    pub(super) fn update_va_mapping(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [va, value, flags, ..] = *args;
        if !may_access(va) {
            return Err(Errno::EINVAL.into());
        }
        let root = self.engine.kernel_root().0 / PAGE_SIZE;
        let (at, _) = self.domain.memory.walk(root, va).level1().ok_or(Errno::EINVAL)?;
        self.store_entry(at, value, false)?;
        self.flush_after_update(va, flags)?;
        Ok(Done::OK)
    }

    /// Arguments: as `update_va_mapping`, and the owner of the frame.
    pub(super) fn update_va_mapping_otherdomain(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [.., domain, _, _] = *args;
        if domain & 0xffff == u64::from(domid::SELF) {
            return self.update_va_mapping(args);
        }
        self.refused(nr::UPDATE_VA_MAPPING_OTHERDOMAIN, Errno::ESRCH)
    }

    fn flush_after_update(&mut self, va: u64, flags: u64) -> Result<(), Failure> {
        let one = match flags & uvmf::TYPE_MASK {
            uvmf::TLB_FLUSH => None,
            uvmf::INVLPG => Some(va),
            _ => return Ok(()),
        };
        match flags & !uvmf::TYPE_MASK {
            0 => self.flush_mask(1 << self.vcpu.index, one),
            uvmf::ALL => self.flush_mask(u64::MAX, one),
            bitmap => {
                let mask = self.read_vcpu_mask(bitmap)?;
                self.flush_mask(mask, one)
            }
        }
    }

    /// A bitmap of virtual processors: as many bytes as they need.
    pub(super) fn read_vcpu_mask(&self, at: u64) -> Result<u64, Errno> {
        let mut bytes = [0; 8];
        let len = (self.domain.vcpus() as usize).div_ceil(8);
        self.space().read_bytes(at, bytes.get_mut(..len).unwrap_or_default())?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Flushes one address or all, on the virtual processors of a mask.
    pub(super) fn flush_mask(&mut self, mask: u64, va: Option<u64>) -> Result<(), Failure> {
        let own = 1 << self.vcpu.index;
        if mask & own != 0 {
            match va {
                Some(va) => self.engine.flush_page(va),
                None => self.engine.flush_all(),
            }
        }
        if mask & !own != 0 {
            self.engine.publish_entries()?;
            self.domain.flush(mask, self.vcpu.index);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

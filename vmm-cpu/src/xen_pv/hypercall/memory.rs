//! `memory_op`: a domain has the memory that it was made with, and asks how much that is.

use super::super::abi::errno::Errno;
use super::super::abi::memory::{E820_RAM, E820Entry, MachphysMapping, MemoryMap, Reservation, memop};
use super::super::abi::{PAGE_SIZE, domid, nr};
use super::super::engine::M2P_VA;
use super::super::memory::element;
use super::{Call, Done, Outcome};

/// Largest extent that an unprivileged domain may name (2 MiB).
const MAX_ORDER: u32 = 9;

impl Call<'_> {
    /// Arguments: command, structure.
    pub(super) fn memory_op(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [command, at, ..] = *args;
        let frames = self.domain.memory.layout().frames();
        match command & memop::MASK {
            memop::MAXIMUM_RAM_PAGE => Ok(Done::Value(frames - 1)),
            memop::CURRENT_RESERVATION | memop::MAXIMUM_RESERVATION => {
                self.check_domid(at)?;
                Ok(Done::Value(frames))
            }
            memop::MAXIMUM_GPFN => {
                self.check_domid(at)?;
                Ok(Done::Value(frames - 1))
            }
            memop::MEMORY_MAP => self.memory_map(at, frames),
            memop::MACHPHYS_MAPPING => {
                let v_end = M2P_VA + self.domain.memory.layout().m2p_size();
                let mapping = MachphysMapping { v_start: M2P_VA, v_end, max_mfn: frames - 1 };
                self.space().write(at, &mapping)?;
                Ok(Done::OK)
            }
            memop::DECREASE_RESERVATION | memop::POPULATE_PHYSMAP => self.reservation(args),
            // There is no memory beyond what the domain has.
            memop::INCREASE_RESERVATION => {
                self.read_reservation(at)?;
                Ok(Done::Value(command >> memop::EXTENT_SHIFT))
            }
            // Frames for devices, which there are not.
            memop::EXCHANGE => self.refused(nr::MEMORY_OP, Errno::EPERM),
            _ => self.unknown(nr::MEMORY_OP),
        }
    }

    fn check_domid(&self, at: u64) -> Result<(), Errno> {
        let dom: u16 = self.space().read(at)?;
        if dom == domid::SELF { Ok(()) } else { Err(Errno::ESRCH) }
    }

    fn memory_map(&self, at: u64, frames: u64) -> Outcome {
        let mut map: MemoryMap = self.space().read(at)?;
        if map.nr_entries == 0 {
            return Err(Errno::EINVAL.into());
        }
        let ram = E820Entry { address: 0, size: frames * PAGE_SIZE, kind: E820_RAM };
        self.space().write(map.buffer, &ram)?;
        map.nr_entries = 1;
        self.space().write(at, &map)?;
        Ok(Done::OK)
    }

    fn read_reservation(&self, at: u64) -> Result<Reservation, Errno> {
        let reservation: Reservation = self.space().read(at)?;
        if reservation.domid != domid::SELF {
            return Err(Errno::ESRCH);
        }
        if reservation.extent_order > MAX_ORDER {
            return Err(Errno::EPERM);
        }
        Ok(reservation)
    }

    /// Giving back frames and taking them again, the balloon: the frame of number n is the only one that physical
    /// page n can have, so all there is to do is to note which are given back. They stay the guest's.
    fn reservation(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [command, at, ..] = *args;
        let reservation = self.read_reservation(at)?;
        let populate = command & memop::MASK == memop::POPULATE_PHYSMAP;
        let size = 1_u64 << reservation.extent_order;
        let start = command >> memop::EXTENT_SHIFT;
        if start > reservation.nr_extents {
            return Err(Errno::EINVAL.into());
        }
        for index in start..reservation.nr_extents {
            if !self.step() {
                args[0] = command & memop::MASK | index << memop::EXTENT_SHIFT;
                return Ok(Done::Again);
            }
            let place = element::<u64>(reservation.extent_start, index)?;
            // As Xen: what was done so far is the answer.
            let Ok(frame) = self.space().read::<u64>(place) else { return Ok(Done::Value(index)) };
            let Some(last) = frame.checked_add(size - 1) else { return Ok(Done::Value(index)) };
            if frame % size != 0 || !self.domain.memory.is_ram(last) {
                return Ok(Done::Value(index));
            }
            for frame in frame..=last {
                let physical = if populate { frame } else { u64::MAX };
                self.domain.memory.set_m2p(frame, physical)?;
            }
        }
        Ok(Done::Value(reservation.nr_extents))
    }
}

#[cfg(test)]
mod tests;

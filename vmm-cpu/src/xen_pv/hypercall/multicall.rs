//! `multicall`: a list of hypercalls, which may not contain another.

use super::super::abi::errno::Errno;
use super::super::abi::mmu::MulticallEntry;
use super::super::abi::nr;
use super::super::memory::element;
use super::{Call, Done, Failure, Outcome};

impl Call<'_> {
    /// Arguments: list, count.
    pub(super) fn multicall(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [list, count, ..] = *args;
        // The count is an unsigned int.
        let count = count & u64::from(u32::MAX);
        for index in 0..count {
            let at = element::<MulticallEntry>(list, index)?;
            let mut entry: MulticallEntry = self.space().read(at)?;
            let left = count - index;
            if !self.step() {
                [args[0], args[1]] = [at, left];
                return Ok(Done::Again);
            }
            let outcome = match entry.op {
                nr::MULTICALL => Err(Errno::EINVAL.into()),
                // It has no meaning for a call that returns.
                nr::IRET => Err(Errno::ENOSYS.into()),
                op => {
                    // Whom it tells of an entry before is to find that.
                    if !changes_tables(op) {
                        self.engine.publish_entries()?;
                    }
                    self.dispatch(op, &mut entry.args)
                }
            };
            let (result, then) = match outcome {
                Ok(Done::Value(value)) => (value, None),
                Ok(Done::Then(action) | Done::Registers(action)) => (0, Some(action)),
                Ok(Done::Again) | Err(Failure::Later) => {
                    // The entry goes on from where it is, in the guest's own list.
                    self.space().write(at, &entry)?;
                    [args[0], args[1]] = [at, left];
                    return Ok(Done::Again);
                }
                Err(Failure::Guest(errno)) => (errno.value(), None),
                Err(host @ Failure::Host(_)) => return Err(host),
            };
            self.space().write(element::<u64>(at, 1)?, &result)?;
            if let Some(action) = then {
                if left == 1 {
                    return Ok(Done::Then(action));
                }
                // The rest is called for once the virtual processor goes on.
                let next = element::<MulticallEntry>(at, 1)?;
                let general = &mut self.engine.context().general;
                general.rip = general.rip.wrapping_sub(2);
                [general.rdi, general.rsi] = [next, left - 1];
                return Ok(Done::Registers(action));
            }
        }
        Ok(Done::OK)
    }
}

/// Hypercalls that reach other virtual processors by flushes alone.
fn changes_tables(op: u64) -> bool {
    matches!(op, nr::MMU_UPDATE | nr::MMUEXT_OP | nr::UPDATE_VA_MAPPING | nr::UPDATE_VA_MAPPING_OTHERDOMAIN)
}

#[cfg(test)]
mod tests;

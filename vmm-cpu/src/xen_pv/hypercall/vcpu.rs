//! `vcpu_op`.

use super::super::abi::errno::Errno;
use super::super::abi::vcpu::{
    RegisterVcpuInfo, RunstateInfo, SINGLESHOT_FUTURE, SingleshotTimer, TimeInfo, VcpuGuestContext, runstate,
    vcpuop,
};
use super::super::abi::{PAGE_SIZE, nr, shared_info};
use super::super::start::check_start;
use super::super::vcpu_abi::Action;
use super::{Call, Done, Outcome};

/// The shortest period of a periodic timer, as Xen has it.
pub(crate) const MIN_PERIOD: u64 = 1_000_000;

/// The longest, as Xen has it: 5 years.
pub(crate) const MAX_PERIOD: u64 = 5 * 365 * 24 * 3600 * 1_000_000_000;

impl Call<'_> {
    /// Arguments: command, virtual processor, structure.
    pub(super) fn vcpu_op(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [command, index, at, ..] = *args;
        // The number is a signed int in Xen's interface; no negative one exists.
        let index = u32::try_from(index & u64::from(u32::MAX)).map_err(|_| Errno::ENOENT)?;
        let domain = std::sync::Arc::clone(&self.domain);
        let processor = domain.processor(index).ok_or(Errno::ENOENT)?;
        let own = index == self.vcpu.index;
        match command {
            vcpuop::INITIALISE => self.initialise(index, at),
            vcpuop::UP => {
                if !processor.is_initialised() {
                    return Err(Errno::EINVAL.into());
                }
                processor.set_up(true);
                Ok(Done::OK)
            }
            vcpuop::DOWN => {
                // Xen stops others too, with their registers where they are; every known guest stops itself.
                if !own {
                    return Err(Errno::EOPNOTSUPP.into());
                }
                processor.set_up(false);
                self.vcpu.online = false;
                Ok(Done::Then(Action::Offline))
            }
            vcpuop::IS_UP => Ok(Done::Value(processor.is_up().into())),
            vcpuop::GET_RUNSTATE_INFO => {
                let now = self.vcpu.now(self.engine)?;
                self.space().write(at, &processor.runstate(now))?;
                Ok(Done::OK)
            }
            vcpuop::REGISTER_VCPU_INFO => self.register_vcpu_info(index, at),
            vcpuop::SEND_NMI => {
                processor.send_nmi();
                Ok(Done::OK)
            }
            vcpuop::REGISTER_RUNSTATE_MEMORY_AREA => {
                let area: u64 = self.space().read(at)?;
                if area != 0 {
                    let now = self.vcpu.now(self.engine)?;
                    self.space().write::<RunstateInfo>(area, &processor.runstate(now))?;
                }
                processor.set_runstate_area(area);
                Ok(Done::OK)
            }
            vcpuop::REGISTER_VCPU_TIME_MEMORY_AREA => {
                let area: u64 = self.space().read(at)?;
                if area != 0 {
                    // It holds for all processors, and until the domain is restored elsewhere.
                    let info = self.domain.clock.info(self.engine.time_stamp()?);
                    self.space().write::<TimeInfo>(area, &info)?;
                }
                processor.set_time_area(area);
                Ok(Done::OK)
            }
            vcpuop::STOP_PERIODIC_TIMER if !own && !processor.is_up() => Ok(Done::OK),
            vcpuop::SET_PERIODIC_TIMER
            | vcpuop::STOP_PERIODIC_TIMER
            | vcpuop::SET_SINGLESHOT_TIMER
            | vcpuop::STOP_SINGLESHOT_TIMER => {
                // Timers of others belong to their threads; every known guest sets its own.
                if !own {
                    return Err(Errno::EINVAL.into());
                }
                self.own_vcpu_op(command, at)
            }
            _ => self.unknown(nr::VCPU_OP),
        }
    }

    fn own_vcpu_op(&mut self, command: u64, at: u64) -> Outcome {
        match command {
            vcpuop::SET_PERIODIC_TIMER => {
                let period: u64 = self.space().read(at)?;
                if !(MIN_PERIOD..=MAX_PERIOD).contains(&period) {
                    return Err(Errno::EINVAL.into());
                }
                let now = self.vcpu.now(self.engine)?;
                self.vcpu.periodic = Some((period, now.saturating_add(period)));
                self.vcpu.timers_due = true;
            }
            vcpuop::STOP_PERIODIC_TIMER => self.vcpu.periodic = None,
            vcpuop::SET_SINGLESHOT_TIMER => {
                let timer: SingleshotTimer = self.space().read(at)?;
                if timer.flags & SINGLESHOT_FUTURE != 0
                    && timer.timeout_abs_ns < self.vcpu.now(self.engine)?
                {
                    return Err(Errno::ETIME.into());
                }
                self.vcpu.singleshot = Some(timer.timeout_abs_ns);
                self.vcpu.timers_due = true;
            }
            vcpuop::STOP_SINGLESHOT_TIMER => self.vcpu.singleshot = None,
            _ => return self.unknown(nr::VCPU_OP),
        }
        Ok(Done::OK)
    }

    fn initialise(&mut self, index: u32, at: u64) -> Outcome {
        let context: Box<VcpuGuestContext> = Box::new(self.space().read(at)?);
        check_start(&self.domain.memory, &context)?;
        let processor = self.domain.processor(index).ok_or(Errno::ENOENT)?;
        if !processor.initialise(Some(context)) {
            return Err(Errno::EEXIST.into());
        }
        processor.set_runstate(runstate::OFFLINE, self.vcpu.now(self.engine)?);
        Ok(Done::OK)
    }

    fn register_vcpu_info(&mut self, index: u32, at: u64) -> Outcome {
        let request: RegisterVcpuInfo = self.space().read(at)?;
        let offset = u64::from(request.offset);
        if offset > PAGE_SIZE - shared_info::VCPU_INFO_SIZE || offset % 8 != 0 {
            return Err(Errno::EINVAL.into());
        }
        let address = self.domain.frame_address(request.mfn)?.0 + offset;
        let processor = self.domain.processor(index).ok_or(Errno::ENOENT)?;
        if processor.info_is_registered() {
            return Err(Errno::EINVAL.into());
        }
        let memory = &self.domain.memory;
        let mut info = [0; shared_info::VCPU_INFO_BYTES];
        memory.read(processor.info(), &mut info)?;
        memory.write(address, &info)?;
        if !processor.move_info(address) {
            return Err(Errno::EINVAL.into());
        }
        // Something may have come to the old place meanwhile: the guest shall look at everything.
        memory.set_bits(address + shared_info::PENDING_SEL, u64::MAX)?;
        memory.swap_byte(address + shared_info::UPCALL_PENDING, 1)?;
        processor.notify();
        Ok(Done::OK)
    }
}

#[cfg(test)]
mod tests;

//! `sched_op`, and `set_timer_op`, with which old kernels set their timer.

use super::super::abi::errno::Errno;
use super::super::abi::sched::{MAX_POLL_PORTS, Poll, ShutdownReason, Watchdog, schedop};
use super::super::abi::{nr, shared_info};
use super::super::memory::element;
use super::super::vcpu_abi::{Action, Polling};
use super::{Call, Done, Outcome};

impl Call<'_> {
    /// Arguments: command, structure.
    pub(super) fn sched_op(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [command, at, ..] = *args;
        match command {
            schedop::YIELD => Ok(Done::Then(Action::Yield)),
            schedop::BLOCK => self.block(),
            schedop::SHUTDOWN => {
                let reason: u32 = self.space().read(at)?;
                self.shutdown(reason)
            }
            schedop::POLL => self.poll(at),
            schedop::SHUTDOWN_CODE => {
                let reason: u32 = self.space().read(at)?;
                ShutdownReason::from_number(reason).ok_or(Errno::EINVAL)?;
                self.domain.latch_shutdown(u8::try_from(reason).map_err(|_| Errno::EINVAL)?);
                Ok(Done::OK)
            }
            schedop::WATCHDOG => {
                // Its arguments are looked at, so that a wrong call hears of it; there is no watchdog.
                let _: Watchdog = self.space().read(at)?;
                self.unknown(nr::SCHED_OP)
            }
            _ => self.unknown(nr::SCHED_OP),
        }
    }

    /// Arguments: command, reason of a shutdown.
    pub(super) fn sched_op_compat(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [command, reason, ..] = *args;
        match command {
            schedop::YIELD => Ok(Done::Then(Action::Yield)),
            schedop::BLOCK => self.block(),
            schedop::SHUTDOWN => self.shutdown(u32::try_from(reason).map_err(|_| Errno::EINVAL)?),
            _ => self.unknown(nr::SCHED_OP_COMPAT),
        }
    }

    /// Unmasks events and waits for one, in a way that none slips through between the two.
    fn block(&mut self) -> Outcome {
        self.domain.memory.swap_byte(self.vcpu.info() + shared_info::UPCALL_MASK, 0)?;
        let action = if self.vcpu.upcall_is_due() { Action::Continue } else { Action::Block };
        Ok(Done::Then(action))
    }

    fn shutdown(&mut self, reason: u32) -> Outcome {
        let reason = ShutdownReason::from_number(reason).ok_or(Errno::EINVAL)?;
        Ok(Done::Then(Action::Shutdown(reason)))
    }

    fn poll(&mut self, at: u64) -> Outcome {
        let request: Poll = self.space().read(at)?;
        if request.nr_ports > MAX_POLL_PORTS {
            return Err(Errno::EINVAL.into());
        }
        let mut ports = Vec::new();
        for index in 0..u64::from(request.nr_ports) {
            let port: u32 = self.space().read(element::<u32>(request.ports, index)?)?;
            if self.domain.ports.vcpu(port).is_none() {
                return Err(Errno::EINVAL.into());
            }
            if self.domain.is_pending(port)? {
                return Ok(Done::OK);
            }
            ports.push(port);
        }
        let until = (request.timeout != 0).then_some(request.timeout);
        self.vcpu.polling = Some(Polling { ports, until });
        Ok(Done::Then(Action::Block))
    }

    /// Arguments: system time; 0 stops the timer.
    pub(super) fn set_timer_op(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [at, ..] = *args;
        self.vcpu.singleshot = (at != 0).then_some(at);
        self.vcpu.timers_due = true;
        Ok(Done::OK)
    }
}

#[cfg(test)]
mod tests;

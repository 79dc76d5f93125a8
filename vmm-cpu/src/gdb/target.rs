//! What `gdbstub` asks of the inferior.

use std::num::NonZeroUsize;

use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};

use super::inferior::{Action, Inferior};
use super::memory;
use super::monitor;
use super::registers::{AllRegisters, RegisterNumber, X86_64};
use crate::error::Error;

/// EFAULT: no memory there. The protocol's errors are numbers that GDB shows.
const NO_MEMORY: u8 = 14;
/// EINVAL.
const REFUSED: u8 = 22;

/// Bytes that one `monitor` command's answer has in one packet.
const CONSOLE_CHUNK: usize = 1024;

/// The debugger's thread of a vCPU.
pub(super) fn thread_of(index: u32) -> Tid {
    let number = usize::try_from(index).unwrap_or(usize::MAX).saturating_add(1);
    NonZeroUsize::new(number).unwrap_or(NonZeroUsize::MIN)
}

/// The vCPU of a thread of the debugger's.
fn index_of(thread: Tid) -> u32 {
    u32::try_from(thread.get() - 1).unwrap_or(u32::MAX)
}

/// An error that the debugger is told, and that ends nothing.
fn told(error: Error) -> TargetError<Error> {
    tracing::debug!(%error, "gdb: refused");
    TargetError::Errno(REFUSED)
}

impl Target for Inferior {
    type Arch = X86_64;
    type Error = Error;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64, Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Inferior {
    fn read_registers(&mut self, registers: &mut AllRegisters, thread: Tid) -> TargetResult<(), Self> {
        *registers = self.with(index_of(thread), AllRegisters::read).map_err(told)?;
        Ok(())
    }

    fn write_registers(&mut self, registers: &AllRegisters, thread: Tid) -> TargetResult<(), Self> {
        self.with(index_of(thread), |vcpu| registers.write(vcpu)).map_err(told)
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], thread: Tid) -> TargetResult<usize, Self> {
        let pieces =
            self.with(index_of(thread), |vcpu| memory::pieces(vcpu, start, data.len())).map_err(told)?;
        let mut read = 0;
        for piece in pieces {
            let Some(bytes) = data.get_mut(piece.start..piece.start + piece.length) else { break };
            if !memory::read_physical(&self.ram, piece.gpa, bytes) {
                break;
            }
            self.stops.hide(piece, bytes);
            read += piece.length;
        }
        if read == 0 && !data.is_empty() { Err(TargetError::Errno(NO_MEMORY)) } else { Ok(read) }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], thread: Tid) -> TargetResult<(), Self> {
        let pieces =
            self.with(index_of(thread), |vcpu| memory::pieces(vcpu, start, data.len())).map_err(told)?;
        // All of it or nothing.
        let there: usize = pieces.iter().map(|piece| piece.length).sum();
        let writable = |piece: &memory::Piece| memory::is_writable(&self.ram, piece.gpa, piece.length);
        if there < data.len() || !pieces.iter().all(writable) {
            return Err(TargetError::Errno(NO_MEMORY));
        }
        for piece in pieces {
            let Some(bytes) = data.get(piece.start..piece.start + piece.length) else { continue };
            let mut bytes = bytes.to_vec();
            self.stops.keep(piece, &mut bytes);
            if !memory::write_physical(&self.ram, piece.gpa, &bytes) {
                return Err(TargetError::Errno(NO_MEMORY));
            }
        }
        Ok(())
    }

    fn list_active_threads(&mut self, is_active: &mut dyn FnMut(Tid)) -> Result<(), Error> {
        // The first is the one that an attaching debugger looks at.
        is_active(thread_of(self.current));
        for index in self.threads.indices().into_iter().filter(|index| *index != self.current) {
            is_active(thread_of(index));
        }
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for Inferior {
    fn read_register(
        &mut self,
        thread: Tid,
        register: RegisterNumber,
        buffer: &mut [u8],
    ) -> TargetResult<usize, Self> {
        let bytes = self.with(index_of(thread), AllRegisters::read).map_err(told)?.bytes();
        let value = register.place().and_then(|place| bytes.get(place)).ok_or(TargetError::Errno(REFUSED))?;
        let place = buffer.get_mut(..value.len()).ok_or(TargetError::Errno(REFUSED))?;
        place.copy_from_slice(value);
        Ok(value.len())
    }

    fn write_register(
        &mut self,
        thread: Tid,
        register: RegisterNumber,
        value: &[u8],
    ) -> TargetResult<(), Self> {
        use gdbstub::arch::Registers as _;
        let refused = || TargetError::Errno(REFUSED);
        let mut registers = self.with(index_of(thread), AllRegisters::read).map_err(told)?;
        let mut bytes = registers.bytes();
        let place = register.place().and_then(|place| bytes.get_mut(place)).ok_or_else(refused)?;
        if place.len() != value.len() {
            return Err(refused());
        }
        place.copy_from_slice(value);
        registers.gdb_deserialize(&bytes).map_err(|()| refused())?;
        self.write_registers(&registers, thread)
    }
}

impl ThreadExtraInfo for Inferior {
    fn thread_extra_info(&self, thread: Tid, buffer: &mut [u8]) -> Result<usize, Error> {
        let index = index_of(thread);
        let text =
            match self.with(index, |vcpu| Ok((vcpu.save()?.run_state, vcpu.system_registers()?.ss.dpl))) {
                Ok((state, level)) => format!("vCPU {index}: {state:?}, privilege level {level}"),
                // There may be no such thread.
                Err(error) => error.to_string(),
            };
        let length = text.len().min(buffer.len());
        if let (Some(place), Some(text)) = (buffer.get_mut(..length), text.as_bytes().get(..length)) {
            place.copy_from_slice(text);
        }
        Ok(length)
    }
}

impl MultiThreadResume for Inferior {
    fn resume(&mut self) -> Result<(), Error> {
        Inferior::resume(self)
    }

    fn clear_resume_actions(&mut self) -> Result<(), Error> {
        self.clear_actions();
        Ok(())
    }

    fn set_resume_action_continue(&mut self, thread: Tid, _: Option<Signal>) -> Result<(), Error> {
        self.set_action(index_of(thread), Action::Run);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Inferior {
    fn set_resume_action_step(&mut self, thread: Tid, _: Option<Signal>) -> Result<(), Error> {
        self.set_action(index_of(thread), Action::Step);
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Inferior {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Error> {
        self.lock_others();
        Ok(())
    }
}

impl Breakpoints for Inferior {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Inferior {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let (threads, current) = (std::sync::Arc::clone(&self.threads), self.current);
        let (stops, ram) = (&mut self.stops, &self.ram);
        threads.with_vcpu(current, |vcpu| stops.add_software(ram, vcpu, address)).flatten().map_err(told)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.stops.remove_software(&self.ram, address))
    }
}

impl HwBreakpoint for Inferior {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let max = self.max_hardware();
        Ok(self.stops.add_breakpoint(max, address))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.stops.remove_breakpoint(address))
    }
}

impl HwWatchpoint for Inferior {
    fn add_hw_watchpoint(&mut self, address: u64, length: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        let max = self.max_hardware();
        Ok(self.stops.add_watchpoint(max, address, length, kind))
    }

    fn remove_hw_watchpoint(
        &mut self,
        address: u64,
        length: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        Ok(self.stops.remove_watchpoint(address, length, kind))
    }
}

impl MonitorCmd for Inferior {
    fn handle_monitor_cmd(&mut self, command: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), Error> {
        let answer = monitor::answer(self, &String::from_utf8_lossy(command));
        for chunk in answer.as_bytes().chunks(CONSOLE_CHUNK) {
            out.write_raw(chunk);
            out.flush();
        }
        Ok(())
    }
}

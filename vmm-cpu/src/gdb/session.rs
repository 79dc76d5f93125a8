//! A debugger's connection, from the first packet to the last.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd, RawFd};

use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};

use super::debugger::{Order, Waiting, Wake};
use super::endpoint::Stream;
use super::inferior::{Inferior, Stop};
use super::packet::{Framer, PACKET_SIZE};
use super::stops::Hit;
use super::target::thread_of;
use crate::error::Error;
use crate::threads::VcpuExit;

/// Bytes of answers that are kept until a packet is complete.
const LONGEST_KEPT: usize = 64 * 1024;

/// How a session ended.
#[derive(Debug)]
pub(super) enum End {
    /// The debugger lets the machine go.
    Detached,
    /// The connection ended without a word.
    Lost,
    /// The debugger wants the machine to end.
    Killed,
    /// The VMM has ended the machine.
    Finished,
}

/// The connection, as `gdbstub` writes to it.
#[derive(Debug)]
struct Wire {
    stream: Stream,
    kept: Vec<u8>,
}

impl Connection for Wire {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.kept.push(byte);
        if self.kept.len() >= LONGEST_KEPT { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        let result = self.stream.write_all(&self.kept);
        self.kept.clear();
        result
    }
}

impl AsRawFd for Wire {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

type Machine = GdbStubStateMachine<'static, Inferior, Wire>;

/// Why a session ends early.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error("the connection: {0}")]
    Connection(#[from] io::Error),
    #[error("the protocol: {0}")]
    Protocol(String),
    #[error(transparent)]
    Vcpu(#[from] Error),
}

impl SessionError {
    fn protocol(error: impl std::fmt::Display) -> Self {
        Self::Protocol(error.to_string())
    }
}

/// Serves one debugger. The vCPUs stand still when it begins. `ended` is told what ended a vCPU for good, once the
/// debugger has seen it.
///
/// # Errors
/// What the debugger, its connection or the backend did not do as they should. The session is over then.
pub(super) fn serve(
    inferior: &mut Inferior,
    stream: Stream,
    waiting: &Waiting,
    ended: &dyn Fn(VcpuExit),
) -> Result<End, SessionError> {
    let wire = Wire { stream, kept: Vec::new() };
    let descriptor = wire.as_raw_fd();
    let _watched = waiting.watch(descriptor)?;
    let stub =
        GdbStub::builder(wire).packet_buffer_size(PACKET_SIZE).build().map_err(SessionError::protocol)?;
    let mut machine: Machine = stub.run_state_machine(inferior).map_err(SessionError::protocol)?;
    let mut framer = Framer::new();
    let mut is_asked_to_kill = false;
    loop {
        // Before anything is waited for: there may be something to tell at once.
        machine = match report(inferior, machine, ended)? {
            GdbStubStateMachine::Disconnected(mut machine) => {
                if machine.get_reason() != DisconnectReason::Kill {
                    return Ok(End::Detached);
                }
                if is_asked_to_kill {
                    // `k` has no answer, `vKill` has one.
                    machine.borrow_conn().write_all(b"$OK#9a")?;
                }
                machine.borrow_conn().flush()?;
                return Ok(End::Killed);
            }
            machine => machine,
        };
        match waiting.wait(Some(descriptor))? {
            Wake::Debugger => {
                let mut bytes = [0; 4096];
                let length = match &mut machine {
                    GdbStubStateMachine::Idle(machine) => machine.borrow_conn().stream.read(&mut bytes)?,
                    GdbStubStateMachine::Running(machine) => machine.borrow_conn().stream.read(&mut bytes)?,
                    _ => 0,
                };
                if length == 0 {
                    return Ok(End::Lost);
                }
                for byte in bytes.get(..length).unwrap_or_default() {
                    let Some(packet) = framer.take(*byte).map_err(SessionError::protocol)? else { continue };
                    is_asked_to_kill = packet.starts_with(b"$vKill");
                    machine = feed(inferior, machine, &packet)?;
                }
            }
            Wake::Vmm => {
                while let Some(order) = waiting.order() {
                    let Order::Finish(status) = order else {
                        inferior.let_go();
                        continue;
                    };
                    if let GdbStubStateMachine::Running(machine) = machine {
                        let exited = MultiThreadStopReason::<u64>::Exited(status);
                        machine.report_stop(inferior, exited).map_err(SessionError::protocol)?;
                    }
                    return Ok(End::Finished);
                }
            }
        }
    }
}

/// Gives the stub a packet, and does what an interrupt asks for.
fn feed(inferior: &mut Inferior, mut machine: Machine, packet: &[u8]) -> Result<Machine, SessionError> {
    for byte in packet {
        machine = match machine {
            GdbStubStateMachine::Idle(machine) => {
                machine.incoming_data(inferior, *byte).map_err(SessionError::protocol)?
            }
            GdbStubStateMachine::Running(machine) => {
                machine.incoming_data(inferior, *byte).map_err(SessionError::protocol)?
            }
            other => other,
        };
        if let GdbStubStateMachine::CtrlCInterrupt(interrupted) = machine {
            inferior.pause()?;
            let stop = MultiThreadStopReason::SignalWithThread {
                tid: thread_of(inferior.current),
                signal: Signal::SIGINT,
            };
            machine = interrupted.interrupt_handled(inferior, Some(stop)).map_err(SessionError::protocol)?;
        }
    }
    Ok(machine)
}

/// Tells the debugger what has stopped, if it waits for that.
fn report(
    inferior: &mut Inferior,
    machine: Machine,
    ended: &dyn Fn(VcpuExit),
) -> Result<Machine, SessionError> {
    let GdbStubStateMachine::Running(machine) = machine else { return Ok(machine) };
    if let Some(exit) = inferior.take_fate() {
        // The debugger has seen it and lets go: it is the VMM's turn, which ends the machine or goes on.
        ended(exit);
        return Ok(machine.into());
    }
    let Some((index, stop)) = inferior.next_stop()? else { return Ok(machine.into()) };
    let tid = thread_of(index);
    let reason: MultiThreadStopReason<u64> = match stop {
        Stop::Step => MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGTRAP },
        Stop::Software => MultiThreadStopReason::SwBreak(tid),
        Stop::Hardware(Hit::Breakpoint) => MultiThreadStopReason::HwBreak(tid),
        Stop::Hardware(Hit::Watchpoint { address, kind }) => {
            MultiThreadStopReason::Watch { tid, kind, addr: address }
        }
        Stop::Ended => MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGABRT },
    };
    machine.report_stop(inferior, reason).map_err(SessionError::protocol)
}

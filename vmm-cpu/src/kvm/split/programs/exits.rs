//! One stay of a program: what KVM's exits mean.
//!
//! Threat model: the program's registers are its own affair, flags aside. A guest that has bent the pages which it can write may
//! have its own code run here at privilege level 0, with the right to its own memory and to its own devices. A kick ends the
//! stay in any case.

use vmm_memory::vm_memory::GuestAddress;

use super::{CHOSEN, CR0_AM, Programs};
use crate::error::{Error, Result};
use crate::kvm::split::pages::{self, Door, Pages};
use crate::state::{GeneralRegisters, SystemRegisters, rflags};
use crate::translate::native::{Access, Event, Exception, InNative, Machine, Stay, vector};
use crate::vcpu::{Halt, Vcpu as _, VcpuHandle, VcpuIo};

/// Bits of a page fault's error code (Intel SDM 3A 5.7).
const WRITE: u64 = 1 << 1;
const FETCH: u64 = 1 << 4;

/// KVM_RUNs that a trap which KVM has kept may take. All but the last end early by a kick.
const MAX_RUNS: u32 = 1000;

/// How a KVM_RUN ended.
pub(super) enum End {
    Door(Door),
    /// By a kick, or for nothing.
    Interrupted,
    /// At an instruction that KVM cannot execute.
    Unable,
    /// The program cannot go on.
    Halt(Halt),
}

/// What the vCPU's exits are for.
struct Bus<'a, 'b> {
    m: &'a mut Machine<'b>,
    handle: &'a dyn VcpuHandle,
    pages: &'a Pages,
    door: Option<Door>,
}

impl Bus<'_, '_> {
    /// Whether somebody is at a door. Nobody goes on behind one.
    fn is_at_door(&mut self, gpa: u64, says: impl FnOnce(Door) -> Door) -> bool {
        let Some(door) = self.pages.door(gpa) else { return false };
        if self.door.is_none() {
            self.door = Some(says(door));
            self.handle.kick();
        }
        true
    }
}

impl VcpuIo for Bus<'_, '_> {
    fn mmio_read(&mut self, gpa: GuestAddress, data: &mut [u8]) {
        if self.is_at_door(gpa.0, |_| Door::Stray) {
            data.fill(0);
        } else if self.m.apic_page(gpa.0) {
            self.m.apic_read(gpa.0, data);
        } else {
            self.m.leave_guest(|io| io.mmio_read(gpa, data));
        }
    }

    fn mmio_write(&mut self, gpa: GuestAddress, data: &[u8]) {
        if self.is_at_door(gpa.0, |door| door) {
        } else if self.m.apic_page(gpa.0) {
            self.m.apic_write(gpa.0, data);
        } else {
            self.m.leave_guest(|io| io.mmio_write(gpa, data));
        }
    }
}

impl Programs {
    pub(super) fn run_once(&mut self, m: &mut Machine<'_>) -> Result<End> {
        let mut bus = Bus { m, handle: &*self.handle, pages: &self.split.pages, door: None };
        let halt = self.vcpu.enter(&mut bus);
        match (halt, bus.door) {
            (Ok(Halt::Interrupted), Some(door)) => Ok(End::Door(door)),
            (Ok(Halt::Interrupted), None) => Ok(End::Interrupted),
            (Ok(halt), _) => Ok(End::Halt(halt)),
            (Err(Error::Unhandled(instruction)), _) => {
                tracing::debug!(%instruction, "kvm: software executes an instruction of a program");
                Ok(End::Unable)
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Takes the program's registers back, of which these three are elsewhere.
    fn take(
        &mut self,
        m: &mut Machine<'_>,
        [rip, rsp, flags]: [u64; 3],
        general: &GeneralRegisters,
        system: &SystemRegisters,
    ) {
        let kept = m.cpu.flags.get() & !CHOSEN;
        let rflags = flags & CHOSEN | kept;
        m.take_program(&GeneralRegisters { rip, rsp, rflags, ..*general }, system);
    }

    /// SYSCALL at its stub, where RCX and R11 hold RIP and RFLAGS, or what a program put there that came by another way. Software
    /// executes it, from the program's own memory, or whatever else the program has there.
    fn system_call(
        &mut self,
        m: &mut Machine<'_>,
        rsp: u64,
        general: &GeneralRegisters,
        system: &SystemRegisters,
    ) -> Stay {
        self.counts.system_calls += 1;
        self.take(m, [general.rcx.wrapping_sub(2), rsp, general.r11], general, system);
        Stay::Instruction(None)
    }

    /// A program's access of a door of which no stub is the author. Its kernel has nothing there.
    fn stray(&mut self, m: &mut Machine<'_>, general: &GeneralRegisters, system: &SystemRegisters) -> Stay {
        self.take(m, [general.rip, general.rsp, general.rflags], general, system);
        self.page_fault(m, pages::VA_PROGRAMS_DOOR, WRITE)
    }

    /// An exception at its stub.
    fn exception(
        &mut self,
        m: &mut Machine<'_>,
        vector: u16,
        general: &GeneralRegisters,
        system: &SystemRegisters,
    ) -> Result<Stay> {
        let [error, rip, cs, flags, rsp, _] = self.split.pages.frame(self.vcpu.index(), vector)?;
        if cs & 3 == 0 {
            return Err(self.astray("a program"));
        }
        let number = u8::try_from(vector).unwrap_or(u8::MAX);
        if rip == pages::VA_SYSCALL && matches!(number, vector::GP | vector::UD | vector::DB) {
            return Ok(self.system_call(m, rsp, general, system));
        }
        self.take(m, [rip, rsp, flags], general, system);
        let native = if matches!(number, 8 | 10..=14 | 17 | 21) {
            Exception::with_error(number, u16::try_from(error & 0xffff).unwrap_or(0))
        } else {
            Exception::new(number)
        };
        Ok(match number {
            vector::PF => self.page_fault(m, system.cr2, error),
            // Whether they are due depends on what only software knows: descriptors, the map of ports.
            vector::GP | vector::NP | vector::SS | vector::UD => {
                self.counts.instructions += 1;
                Stay::Instruction(Some(native))
            }
            // KVM without virtualization hardware has the host's CR0.AM.
            vector::AC if m.cpu.cr0 & CR0_AM == 0 => {
                self.counts.instructions += 1;
                Stay::Instruction(None)
            }
            vector::DB => {
                self.counts.exceptions += 1;
                let dr6 = self.vcpu.system_registers()?.dr6;
                Stay::Event(Event::Exception(Exception::debug(dr6 & 0xe00f)))
            }
            vector::BP => {
                self.counts.exceptions += 1;
                Stay::Event(Event::Breakpoint)
            }
            _ => {
                self.counts.exceptions += 1;
                Stay::Event(Event::Exception(native))
            }
        })
    }

    /// A page fault, of which the guest's own tables decide.
    fn page_fault(&mut self, m: &mut Machine<'_>, va: u64, error: u64) -> Stay {
        let access = if error & FETCH != 0 {
            Access::Execute
        } else if error & WRITE != 0 {
            Access::Write
        } else {
            Access::Read
        };
        if let Some(exception) = m.program_fault(va, access) {
            self.counts.page_faults += 1;
            self.groundless = None;
            return Stay::Event(Event::Exception(exception));
        }
        // The tables have changed meanwhile, or KVM cannot do it.
        self.counts.groundless += 1;
        let place = Some((m.cpu.rip, va));
        if std::mem::replace(&mut self.groundless, place) == place {
            self.counts.instructions += 1;
            return Stay::Instruction(None);
        }
        Stay::Over
    }

    /// What a program that was interrupted at `general` comes back with.
    ///
    /// KVM keeps a trap to itself that it has not delivered yet, with RIP behind it already: setting registers would lose it. Then
    /// it gets a root without the program's code, on which nothing but such a trap is delivered.
    fn interrupted(
        &mut self,
        m: &mut Machine<'_>,
        general: &GeneralRegisters,
        system: &SystemRegisters,
    ) -> Result<Stay> {
        if self.keeps_trap(general)? {
            let own_root = self.split.pages.own_root();
            self.vcpu.set_segment_registers(&SystemRegisters { cr3: own_root, ..*system })?;
            for _ in 0..MAX_RUNS {
                match self.run_once(m)? {
                    End::Interrupted => {}
                    End::Door(Door::Exception(vector)) if matches!(vector, 1 | 3 | 4) => {
                        let general = self.vcpu.registers()?;
                        return self.exception(m, vector, &general, system);
                    }
                    End::Door(_) | End::Unable | End::Halt(_) => break,
                }
            }
        }
        self.counts.interrupted += 1;
        self.take(m, [general.rip, general.rsp, general.rflags], general, system);
        Ok(Stay::Over)
    }

    /// Whether KVM may have something to deliver.
    fn keeps_trap(&self, general: &GeneralRegisters) -> Result<bool> {
        let events = self.vcpu.events()?;
        let exception = events.exception.injected | events.exception.pending | events.interrupt.injected;
        Ok(exception != 0 || general.rflags & rflags::TF != 0)
    }

    /// One stay of the program, from its registers to its registers.
    pub(super) fn stay(&mut self, m: &mut Machine<'_>, inside: &InNative) -> Result<Stay> {
        let end = loop {
            let end = self.run_once(m)?;
            let is_wanted = m.signals.wants_attention() || !inside.stays();
            // Else a kick came late.
            if is_wanted || !matches!(end, End::Interrupted) {
                break end;
            }
        };
        let general = self.vcpu.registers()?;
        let system = self.vcpu.segment_registers()?;
        let (rip, is_program) = (general.rip, system.cs.dpl == 3);
        let door = match end {
            // Before the first instruction of a stub, or in the program.
            End::Interrupted if rip == pages::VA_SYSCALL => Door::SystemCall,
            End::Interrupted if is_program => return self.interrupted(m, &general, &system),
            End::Interrupted => pages::exception_at(rip).map_or(Door::Stray, Door::Exception),
            End::Door(Door::SystemCall) if !matches!(rip, pages::VA_SYSCALL | pages::VA_SYSCALL_END) => {
                Door::Stray
            }
            End::Door(door) => door,
            End::Unable if is_program => {
                self.counts.instructions += 1;
                self.take(m, [rip, general.rsp, general.rflags], &general, &system);
                return Ok(Stay::Instruction(None));
            }
            End::Unable => return Err(self.astray("a program")),
            End::Halt(halt) => return Ok(Stay::Halt(halt)),
        };
        match door {
            Door::SystemCall => Ok(self.system_call(m, general.rsp, &general, &system)),
            Door::Exception(vector) if !is_program => self.exception(m, vector, &general, &system),
            _ if is_program => Ok(self.stray(m, &general, &system)),
            _ => Err(self.astray("a program")),
        }
    }
}

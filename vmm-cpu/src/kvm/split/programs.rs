//! One vCPU's programs, on KVM.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Instant;

use vmm_memory::vm_memory::GuestAddress;

use super::Split;
use super::pace::{Pace, Space};
use super::pages;
use super::tables::{News, Tables};
use crate::error::{Error, Result};
use crate::kvm::vcpu::KvmVcpu;
use crate::kvm::{host, sys};
use crate::state::{DescriptorTable, GeneralRegisters, Segment, SystemRegisters, XsaveArea, rflags};
use crate::translate::native::{Access, Event, Exception, Invalidated, Machine, Native, Stay, vector};
use crate::vcpu::{Halt, Vcpu as _, VcpuHandle, VcpuIo};

/// PG, AM, WP, NE, ET, MP, PE.
const CR0: u64 = 0x8005_0033;
/// OSXMMEXCPT, OSFXSR, PAE; without global pages, which would outlive the change to another root.
const CR4: u64 = 0x620;
const CR4_FSGSBASE: u64 = 1 << 16;
/// LMA, LME, SCE.
const EFER: u64 = 0x501;
const EFER_NXE: u64 = 1 << 11;

/// TS and EM: x87 and vector instructions are not to run.
const CR0_UNAVAILABLE: u64 = 1 << 3 | 1 << 2;
/// LA57, and TSD, which KVM without virtualization hardware does not heed.
const CR4_UNKNOWN: u64 = 1 << 12 | 1 << 2;

/// Flags that a program chooses: CF, PF, AF, ZF, SF, TF, DF, OF, NT, AC, ID.
const CHOSEN: u64 = 0x0024_4dd5;
const IOPL: u64 = 3 << 12;

/// The address in CR3 and in an entry.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Bits of a page fault's error code (Intel SDM 3A 5.7).
const WRITE: u64 = 1 << 1;
const FETCH: u64 = 1 << 4;

mod msr {
    pub(super) const STAR: u32 = 0xc000_0081;
    pub(super) const LSTAR: u32 = 0xc000_0082;
    pub(super) const CSTAR: u32 = 0xc000_0083;
    pub(super) const FMASK: u32 = 0xc000_0084;
}

/// Flags that SYSCALL clears: TF, IF, DF, IOPL, NT, AC.
const SYSCALL_CLEARS: u64 = 0x0004_7700;

/// KVM_RUNs that one operation of the engine, or one stub, may take. Each ends early by a kick only.
const MAX_RUNS: u32 = 1000;

/// See the module.
#[derive(Debug)]
pub(super) struct Programs {
    vcpu: KvmVcpu,
    handle: Arc<dyn VcpuHandle>,
    split: Arc<Split>,
    /// What the vCPU has while a program runs, segments and root aside.
    system: SystemRegisters,
    /// The copy that it ran on last, and of which root that is.
    copy: Option<(u64, u64)>,
    pace: Pace,
    /// [`Split::stays`] when software last ran a program here.
    stays_seen: u64,
    /// Where a fault was that is none.
    groundless: Option<(u64, u64)>,
    counts: Counts,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    stays: u64,
    declined: u64,
    system_calls: u64,
    page_faults: u64,
    groundless: u64,
    exceptions: u64,
    interrupted: u64,
    instructions: u64,
    shown: u64,
    dropped: u64,
}

/// How a KVM_RUN ended.
enum End {
    /// By an OUT to this port.
    Port(u16),
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
    port: Option<u16>,
}

impl VcpuIo for Bus<'_, '_> {
    fn pio_write(&mut self, port: u16, _: usize, _: &[u8]) {
        if self.port.is_none() {
            self.port = Some(port);
            self.handle.kick();
        }
    }

    fn mmio_read(&mut self, gpa: GuestAddress, data: &mut [u8]) {
        if self.m.apic_page(gpa.0) {
            self.m.apic_read(gpa.0, data);
        } else {
            self.m.leave_guest(|io| io.mmio_read(gpa, data));
        }
    }

    fn mmio_write(&mut self, gpa: GuestAddress, data: &[u8]) {
        if self.m.apic_page(gpa.0) {
            self.m.apic_write(gpa.0, data);
        } else {
            self.m.leave_guest(|io| io.mmio_write(gpa, data));
        }
    }
}

impl Programs {
    pub(super) fn new(mut vcpu: KvmVcpu, split: Arc<Split>) -> Result<Self> {
        let index = vcpu.index();
        let pages = &split.pages;
        let ((gdt, gdt_limit), (idt, idt_limit)) = (pages.gdt(), pages.idt());
        let at_reset = vcpu.system_registers()?;
        let system = SystemRegisters {
            gdtr: DescriptorTable { base: gdt, limit: gdt_limit },
            idtr: DescriptorTable { base: idt, limit: idt_limit },
            tr: Segment::task_state(pages.task(index), pages.task_state(index)),
            ldtr: Segment::null(),
            cs: Segment::code64(pages::STUB_CS),
            ss: Segment::data32(pages::STUB_SS),
            cr0: CR0,
            cr3: pages.own_root(),
            cr4: CR4 | CR4_FSGSBASE,
            efer: EFER | EFER_NXE,
            ..at_reset
        };
        vcpu.set_system_registers(&system)?;
        for (register, value) in [
            (msr::STAR, u64::from(pages::STUB_CS) << 32),
            (msr::LSTAR, pages::VA_SYSCALL),
            (msr::CSTAR, pages::VA_SYSCALL),
            (msr::FMASK, SYSCALL_CLEARS),
        ] {
            vcpu.set_msr(register, value)?;
        }
        let handle = vcpu.handle();
        let pace = Pace::new(split.always);
        let counts = Counts::default();
        Ok(Self { vcpu, handle, split, system, copy: None, pace, stays_seen: 0, groundless: None, counts })
    }

    /// What ends a program's stay.
    pub(super) fn kick(&self) -> Arc<dyn VcpuHandle> {
        Arc::clone(&self.handle)
    }

    /// Vector registers as they are before anything ran.
    pub(super) fn vectors(&self) -> Result<XsaveArea> {
        let size = self.split.kvm.xsave_size;
        let bytes = sys::xsave(self.vcpu.fd(), size).map_err(|errno| host("KVM_GET_XSAVE", errno))?;
        XsaveArea::from_bytes(bytes).ok_or_else(|| Error::InvalidState {
            element: "xsave",
            problem: format!("KVM's area of {size} bytes is too large"),
        })
    }

    fn tables(split: &Split) -> MutexGuard<'_, Tables> {
        split.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the program is one that runs here as it would on its own processor.
    fn takes(&self, m: &Machine<'_>) -> bool {
        let flags = m.cpu.flags.get();
        self.split.sees_all()
            && m.cpu.cr0 & CR0_UNAVAILABLE == 0
            && m.cpu.cr4 & CR4_UNKNOWN == 0
            && flags & rflags::IF != 0
            && flags & IOPL != IOPL
    }

    fn run_once(&mut self, m: &mut Machine<'_>) -> Result<End> {
        let mut bus = Bus { m, handle: &*self.handle, port: None };
        let halt = self.vcpu.run(&mut bus);
        match (halt, bus.port) {
            (Ok(Halt::Interrupted), Some(port)) => Ok(End::Port(port)),
            (Ok(Halt::Interrupted), None) => Ok(End::Interrupted),
            (Ok(halt), _) => Ok(End::Halt(halt)),
            (Err(Error::Unhandled(instruction)), _) => {
                tracing::debug!(%instruction, "kvm: software executes an instruction of a program");
                Ok(End::Unable)
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Executes one of the engine's operations in the guest.
    fn operate(&mut self, m: &mut Machine<'_>, rip: u64, arguments: GeneralRegisters) -> Result<()> {
        let data = Segment::data32(pages::STUB_SS);
        self.vcpu.set_segment_registers(&SystemRegisters {
            cs: Segment::code64(pages::STUB_CS),
            ss: data,
            ds: data,
            es: data,
            fs: Segment::null(),
            gs: Segment::null(),
            cr3: self.split.pages.own_root(),
            ..self.system
        })?;
        self.vcpu.set_registers(&GeneralRegisters { rip, rflags: rflags::FIXED, ..arguments })?;
        for _ in 0..MAX_RUNS {
            match self.run_once(m)? {
                End::Port(pages::PORT_DONE) => return Ok(()),
                End::Interrupted => {}
                End::Port(_) | End::Unable | End::Halt(_) => break,
            }
        }
        Err(self.astray("an operation on page tables"))
    }

    fn astray(&self, what: &str) -> Error {
        Error::UnexpectedExit {
            index: self.vcpu.index(),
            exit: format!(
                "{what} does not come back: the guest has changed the pages that this engine keeps in it"
            ),
        }
    }

    /// Has KVM see what has changed.
    fn show(&mut self, m: &mut Machine<'_>, news: &News) -> Result<()> {
        if news.all {
            self.counts.dropped += 1;
            return self.split.kvm.drop_shadows(&self.split.spare);
        }
        if news.entries.is_empty() {
            return Ok(());
        }
        self.counts.shown += news.entries.len() as u64;
        let list = self.split.pages.set_list(self.vcpu.index(), &news.entries)?;
        let arguments = GeneralRegisters {
            rsi: list,
            rcx: news.entries.len() as u64,
            rbp: self.split.pages.own_root(),
            ..GeneralRegisters::default()
        };
        self.operate(m, pages::VA_SHOW, arguments)
    }

    /// Makes KVM's shadows and the root right for a stay; the root.
    fn prepare(&mut self, m: &mut Machine<'_>, root: u64) -> Result<u64> {
        let invalidated = m.tlb.invalidated.replace(Invalidated::default()).unwrap_or_default();
        let split = Arc::clone(&self.split);
        let mut tables = Self::tables(&split);
        let map = Arc::clone(m.map());
        let mut news = News::default();
        let held = self.copy.map(|(number, _)| number);
        let number = tables.before(&split.pages, &map, root, held, &mut news)?;
        if split.has_others {
            let is_same = self.copy.is_some_and(|(_, of)| of == root);
            Tables::invalidate(&map, root, &invalidated, is_same, &mut news);
        }
        self.copy = Some((number, root));
        // Others wait until KVM has seen what they might think it has.
        self.show(m, &news)?;
        Ok(split.pages.copy(number))
    }

    /// Gives the vCPU the program's registers.
    fn load(&mut self, m: &mut Machine<'_>, cr3: u64) -> Result<()> {
        let program = m.system_registers();
        let efer = if program.efer & EFER_NXE == 0 { EFER } else { EFER | EFER_NXE };
        self.vcpu.set_segment_registers(&SystemRegisters {
            cs: program.cs,
            ss: program.ss,
            ds: program.ds,
            es: program.es,
            fs: program.fs,
            gs: program.gs,
            cr3,
            efer,
            ..self.system
        })?;
        let general = m.general_registers();
        let flags = general.rflags & CHOSEN | rflags::FIXED | rflags::IF;
        self.vcpu.set_registers(&GeneralRegisters { rflags: flags, ..general })?;
        let area = m.program_vectors();
        sys::set_xsave(self.vcpu.fd(), self.split.kvm.xsave_size, area.bytes())
            .map_err(|errno| host("KVM_SET_XSAVE", errno))
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
    /// KVM keeps a trap to itself that it has not delivered yet, with RIP behind it already: setting registers would lose it. So
    /// it gets a root without the program's code, on which nothing but such a trap is delivered.
    fn interrupted(
        &mut self,
        m: &mut Machine<'_>,
        general: &GeneralRegisters,
        system: &SystemRegisters,
    ) -> Result<Stay> {
        self.vcpu.set_segment_registers(&SystemRegisters { cr3: self.split.pages.own_root(), ..*system })?;
        for _ in 0..MAX_RUNS {
            match self.run_once(m)? {
                End::Interrupted => {}
                End::Port(port) => {
                    let vector = port.wrapping_sub(pages::PORT_EXCEPTION);
                    if matches!(vector, 1 | 3 | 4) {
                        let general = self.vcpu.registers()?;
                        return self.exception(m, vector, &general, system);
                    }
                    break;
                }
                End::Unable | End::Halt(_) => break,
            }
        }
        self.counts.interrupted += 1;
        self.take(m, [general.rip, general.rsp, general.rflags], general, system);
        Ok(Stay::Over)
    }

    /// One stay of the program, from its registers to its registers.
    fn stay(&mut self, m: &mut Machine<'_>) -> Result<Stay> {
        for _ in 0..MAX_RUNS {
            let end = self.run_once(m)?;
            if matches!(end, End::Interrupted) && !m.signals.wants_attention() {
                // A kick that came late.
                continue;
            }
            let general = self.vcpu.registers()?;
            let system = self.vcpu.segment_registers()?;
            return match end {
                End::Port(port) => {
                    let vector = port.wrapping_sub(pages::PORT_EXCEPTION);
                    if vector < pages::EXCEPTIONS {
                        self.exception(m, vector, &general, &system)
                    } else if port == pages::PORT_SYSCALL {
                        Ok(self.system_call(m, general.rsp, &general, &system))
                    } else {
                        Err(self.astray("a program"))
                    }
                }
                // Between two instructions of a stub, the first of which is its last.
                End::Interrupted if system.cs.dpl == 0 => continue,
                End::Interrupted if general.rip == pages::VA_SYSCALL => {
                    Ok(self.system_call(m, general.rsp, &general, &system))
                }
                End::Interrupted => self.interrupted(m, &general, &system),
                End::Unable if system.cs.dpl == 3 => {
                    self.counts.instructions += 1;
                    self.take(m, [general.rip, general.rsp, general.rflags], &general, &system);
                    Ok(Stay::Instruction(None))
                }
                End::Unable => Err(self.astray("a program")),
                End::Halt(halt) => Ok(Stay::Halt(halt)),
            };
        }
        Err(self.astray("a stub"))
    }
}

/// What the program is known by.
fn space(m: &Machine<'_>) -> Space {
    let root = m.cpu.cr3 & FRAME;
    let top: u64 = m.map().load(root + 255 * 8).unwrap_or(0);
    Space { root, top: top & FRAME }
}

impl Native for Programs {
    fn run(&mut self, m: &mut Machine<'_>) -> Result<Stay> {
        let space = space(m);
        if !self.takes(m) || !self.pace.is_for_kvm(space) {
            self.counts.declined += 1;
            return Ok(Stay::Declined);
        }
        let cr3 = self.prepare(m, space.root)?;
        m.set_program_alarm();
        self.load(m, cr3)?;
        let signals = Arc::clone(&m.signals);
        let Some(inside) = signals.enter_native() else { return Ok(Stay::Over) };
        self.counts.stays += 1;
        let begun = Instant::now();
        self.split.stays.fetch_add(1, Ordering::SeqCst);
        let stay = self.stay(m);
        self.split.stays.fetch_add(1, Ordering::SeqCst);
        drop(inside);
        self.pace.stayed(space, begun.elapsed());
        if self.split.has_others
            && let Some((number, _)) = self.copy
        {
            let map = Arc::clone(m.map());
            Self::tables(&self.split).behind(&map, number);
        }
        let vectors = self.vectors()?;
        m.take_program_vectors(vectors)?;
        stay
    }

    fn may_have_changed_code(&mut self) -> bool {
        let stays = self.split.stays.load(Ordering::SeqCst);
        std::mem::replace(&mut self.stays_seen, stays) != stays
    }

    fn goes_on(&mut self, m: &Machine<'_>) {
        self.pace.goes_on(space(m));
    }

    fn has_it(&mut self, m: &Machine<'_>) -> bool {
        let takes = self.takes(m);
        if takes {
            self.pace.needs_kvm(space(m));
        }
        takes
    }

    fn counts(&self) -> Vec<(&'static str, u64)> {
        let counts = &self.counts;
        vec![
            ("program-stays", counts.stays),
            ("program-stays-in-software", counts.declined),
            ("program-system-calls", counts.system_calls),
            ("program-page-faults", counts.page_faults),
            ("program-faults-without-ground", counts.groundless),
            ("program-exceptions", counts.exceptions),
            ("program-interrupted", counts.interrupted),
            ("program-instructions-in-software", counts.instructions),
            ("entries-shown", counts.shown),
            ("shadows-dropped", counts.dropped),
        ]
    }
}

//! One vCPU's programs, on KVM: whether one goes there, with what, and what it comes back with.
//!
//! | module | holds |
//! |---|---|
//! | `exits` | one stay, from the program's registers to its registers |
//! | `operations` | what code of the engine's does in the guest |

mod exits;
mod operations;

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Instant;

use super::Split;
use super::pace::{Pace, Space};
use super::pages::{self, PRESENT, USER};
use super::tables::{News, Tables};
use crate::error::{Error, Result};
use crate::kvm::vcpu::KvmVcpu;
use crate::kvm::{host, sys};
use crate::state::{DescriptorTable, GeneralRegisters, Segment, SystemRegisters, XsaveArea, rflags};
use crate::translate::native::{Invalidated, Machine, Native, Stay};
use crate::vcpu::{Vcpu as _, VcpuHandle};

/// PG, WP, NE, ET, MP, PE.
const CR0: u64 = 0x8001_0033;
const CR0_AM: u64 = 1 << 18;
/// PAE; without global pages, which would outlive the change to another root.
const CR4: u64 = 1 << 5;
/// OSFXSR and OSXMMEXCPT.
const CR4_SSE: u64 = 3 << 9;
const CR4_FSGSBASE: u64 = 1 << 16;
/// LMA, LME, SCE.
const EFER: u64 = 0x501;
const EFER_NXE: u64 = 1 << 11;

/// TS and EM: x87 and vector instructions are not to run.
const CR0_UNAVAILABLE: u64 = 1 << 3 | 1 << 2;
/// NE: errors of x87 are exceptions.
const CR0_NEEDED: u64 = 1 << 5;
/// LA57, and TSD, which KVM without virtualization hardware does not heed.
const CR4_UNKNOWN: u64 = 1 << 12 | 1 << 2;

/// Flags that a program chooses: CF, PF, AF, ZF, SF, TF, DF, OF, NT, AC, ID.
const CHOSEN: u64 = 0x0024_4dd5;
const IOPL: u64 = 3 << 12;

/// The address in CR3 and in an entry.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// IA32_TIME_STAMP_COUNTER.
const TSC: u32 = 0x10;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const FMASK: u32 = 0xc000_0084;
const TSC_AUX: u32 = 0xc000_0103;

/// Flags that SYSCALL clears: TF, IF, DF, IOPL, NT, AC.
const SYSCALL_CLEARS: u64 = 0x0004_7700;

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
    /// IA32_TSC_AUX as KVM has it.
    tsc_aux: u64,
    /// The vector registers that KVM has, as they would be handed over.
    vectors: Option<XsaveArea>,
    pace: Pace,
    /// [`Split::begun`] and [`Split::ended`] when software last ran a program here.
    stays_seen: (u64, u64),
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
            cr4: CR4 | CR4_SSE,
            efer: EFER | EFER_NXE,
            ..at_reset
        };
        vcpu.set_system_registers(&system)?;
        for (register, value) in [
            (STAR, u64::from(pages::STUB_CS) << 32),
            (LSTAR, pages::VA_SYSCALL),
            (CSTAR, pages::VA_SYSCALL),
            (FMASK, SYSCALL_CLEARS),
        ] {
            vcpu.set_msr(register, value)?;
        }
        // Software's counter is the host's, so the program's is.
        if sys::set_tsc_offset(vcpu.fd(), 0).is_err() {
            vcpu.set_msr(TSC, crate::tsc::host_tsc())?;
        }
        Ok(Self {
            handle: vcpu.handle(),
            vcpu,
            system,
            copy: None,
            tsc_aux: 0,
            vectors: None,
            pace: Pace::new(split.always),
            split,
            stays_seen: (0, 0),
            groundless: None,
            counts: Counts::default(),
        })
    }

    /// What ends a program's stay.
    pub(super) fn kick(&self) -> Arc<dyn VcpuHandle> {
        Arc::clone(&self.handle)
    }

    /// Vector registers as KVM has them.
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
        let (flags, needed) = (m.cpu.flags.get(), self.split.vectors);
        let theirs = m.map().load::<u64>((m.cpu.cr3 & FRAME) + pages::SLOT * 8).unwrap_or(0);
        self.split.sees_all()
            && m.has_program_alarm()
            && m.cpu.cr0 & CR0_UNAVAILABLE == 0
            && m.cpu.cr0 & CR0_NEEDED == CR0_NEEDED
            && m.cpu.cr4 & CR4_UNKNOWN == 0
            && m.cpu.cr4 & CR4_SSE == CR4_SSE
            // The program finds all registers that there are, so its kernel has to keep them.
            && m.cpu.xcr0 & needed == needed
            && flags & rflags::IF != 0
            && flags & IOPL != IOPL
            // What the guest has where the engine's pages are is its kernel's own.
            && theirs & (PRESENT | USER) != PRESENT | USER
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
        self.vcpu.set_segment_registers(&SystemRegisters {
            cs: program.cs,
            ss: program.ss,
            ds: program.ds,
            es: program.es,
            fs: program.fs,
            gs: program.gs,
            cr0: CR0 | program.cr0 & CR0_AM,
            cr3,
            cr4: CR4 | CR4_SSE | program.cr4 & CR4_FSGSBASE,
            efer: EFER | program.efer & EFER_NXE,
            ..self.system
        })?;
        if self.tsc_aux != m.cpu.msr.tsc_aux {
            self.tsc_aux = m.cpu.msr.tsc_aux;
            self.vcpu.set_msr(TSC_AUX, self.tsc_aux)?;
        }
        let general = m.general_registers();
        let flags = general.rflags & CHOSEN | rflags::FIXED | rflags::IF;
        self.vcpu.set_registers(&GeneralRegisters { rflags: flags, ..general })?;
        let vectors = m.program_vectors();
        if self.vectors.as_ref() != Some(&vectors) {
            self.vectors = None;
            sys::set_xsave(self.vcpu.fd(), self.split.kvm.xsave_size, vectors.bytes())
                .map_err(|errno| host("KVM_SET_XSAVE", errno))?;
            // Also where the program does not come to run: somebody wants something before.
            self.vectors = Some(vectors);
        }
        Ok(())
    }

    /// Takes the vector registers back.
    fn take_vectors(&mut self, m: &mut Machine<'_>) -> Result<()> {
        self.vectors = None;
        m.take_program_vectors(self.vectors()?)?;
        self.vectors = Some(m.program_vectors());
        Ok(())
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
        let begun = Instant::now();
        let cr3 = self.prepare(m, space.root)?;
        m.set_program_alarm();
        self.load(m, cr3)?;
        let signals = Arc::clone(&m.signals);
        let Some(inside) = signals.enter_native() else { return Ok(Stay::Over) };
        self.counts.stays += 1;
        self.split.begun.fetch_add(1, Ordering::SeqCst);
        let stay = self.stay(m, &inside);
        self.split.ended.fetch_add(1, Ordering::SeqCst);
        drop(inside);
        if self.split.has_others
            && let Some((number, _)) = self.copy
        {
            let map = Arc::clone(m.map());
            Self::tables(&self.split).behind(&map, number);
        }
        self.take_vectors(m)?;
        self.pace.stayed(space, begun.elapsed(), !matches!(stay, Ok(Stay::Over)));
        stay
    }

    fn may_have_changed_code(&mut self) -> bool {
        let ended = self.split.ended.load(Ordering::SeqCst);
        let begun = self.split.begun.load(Ordering::SeqCst);
        // While one lasts, it may at any time.
        std::mem::replace(&mut self.stays_seen, (begun, ended)) != (begun, ended) || begun != ended
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

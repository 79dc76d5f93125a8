//! What code of the engine's does in the guest: stores that change nothing, which KVM sees, and loads of a root.
//!
//! It runs on tables, stubs and lists that the guest cannot write, and with registers that are set each time. So it comes to its
//! end, however a hostile guest has bent what it can bend of this vCPU; it does not listen to kicks meanwhile.

use super::Programs;
use super::exits::End;
use crate::error::{Error, Result};
use crate::kvm::split::pages::{self, Door};
use crate::kvm::split::tables::News;
use crate::state::{GeneralRegisters, Segment, SystemRegisters, rflags};
use crate::translate::native::Machine;
use crate::vcpu::Vcpu as _;

/// KVM_RUNs that one operation may take. All but the last end early by a kick that came late.
const MAX_RUNS: u32 = 1000;

impl Programs {
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
                End::Door(Door::Done) => return Ok(()),
                End::Interrupted => {}
                End::Door(_) | End::Unable | End::Halt(_) => break,
            }
        }
        Err(self.astray("an operation on page tables"))
    }

    pub(super) fn astray(&self, what: &str) -> Error {
        Error::UnexpectedExit {
            index: self.vcpu.index(),
            exit: format!(
                "{what} does not come back: the guest has changed the pages that this engine keeps in it"
            ),
        }
    }

    /// Has KVM see what has changed.
    pub(super) fn show(&mut self, m: &mut Machine<'_>, news: &News) -> Result<()> {
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
}

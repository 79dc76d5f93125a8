//! An engine that executes nothing. It holds the ABI to the contract of the engine's traits.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_cpu::vmm_memory::GuestRam;
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_cpu::xen_pv::abi::PAGE_SIZE;
use vmm_cpu::xen_pv::abi::mmu::entry;
use vmm_cpu::xen_pv::engine::{
    Context, Engine, EngineCapabilities, EngineExit, EngineHandle, GuestMode, Layout, Mmu,
};
use vmm_cpu::{Error, Result};

#[derive(Debug)]
struct NoHandle;

impl EngineHandle for NoHandle {
    fn kick(&self) {}
    fn flush(&self) {}
}

pub struct IdleEngine {
    ram: GuestRam,
    layout: Layout,
    pub context: Context,
    kernel_root: GuestAddress,
    user_root: Option<GuestAddress>,
    pub tsc: u64,
    pub live_stores: u64,
    pub prepared: u64,
    descriptors: Vec<u64>,
    debug: [u64; 8],
}

impl fmt::Debug for IdleEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdleEngine").field("context", &self.context).finish_non_exhaustive()
    }
}

impl IdleEngine {
    pub fn new(ram: GuestRam, layout: Layout) -> Self {
        Self {
            ram,
            layout,
            context: Context::default(),
            kernel_root: GuestAddress(0),
            user_root: None,
            tsc: 0,
            live_stores: 0,
            prepared: 0,
            descriptors: vec![0; 8192],
            debug: [0; 8],
        }
    }

    /// Roots are frames of the domain's RAM.
    fn check_root(&self, gpa: GuestAddress) {
        assert!(gpa.0.is_multiple_of(PAGE_SIZE) && gpa.0 < self.layout.ram(), "a root at {:#x}", gpa.0);
    }
}

impl Mmu for IdleEngine {
    fn write_entry_keeping(&mut self, gpa: GuestAddress, value: u64, keep: u64) -> Result<()> {
        let old: u64 = self.ram.memory().load(gpa, Ordering::Relaxed).unwrap_or(0);
        self.write_entry(gpa, value | old & keep)
    }

    fn write_entry(&mut self, gpa: GuestAddress, value: u64) -> Result<()> {
        assert!(gpa.0.is_multiple_of(8) && gpa.0 < self.layout.ram(), "an entry at {:#x}", gpa.0);
        let old: u64 = self.ram.memory().load(gpa, Ordering::Relaxed).unwrap();
        if value & entry::PRESENT != 0 {
            // What the guest stored itself may name anything; the ABI names no new frame outside.
            let frame = (value & entry::FRAME) / PAGE_SIZE;
            let kept = (value ^ old) & (entry::FRAME | entry::PRESENT) == 0;
            assert!(kept || frame < self.layout.abi_frames().end, "frame {frame:#x} at {:#x}", gpa.0);
            assert!(value & entry::USER != 0, "an entry for ring 0");
        }
        self.live_stores += 1;
        self.ram.memory().store(value, gpa, Ordering::Relaxed).unwrap();
        Ok(())
    }

    fn prepare_root(&mut self, gpa: GuestAddress, _: GuestMode) -> Result<()> {
        self.check_root(gpa);
        self.prepared += 1;
        Ok(())
    }

    fn set_kernel_root(&mut self, gpa: GuestAddress) -> Result<()> {
        self.check_root(gpa);
        self.kernel_root = gpa;
        Ok(())
    }

    fn set_user_root(&mut self, gpa: Option<GuestAddress>) -> Result<()> {
        if let Some(gpa) = gpa {
            self.check_root(gpa);
        }
        self.user_root = gpa;
        Ok(())
    }

    fn kernel_root(&self) -> GuestAddress {
        self.kernel_root
    }

    fn user_root(&self) -> Option<GuestAddress> {
        self.user_root
    }

    fn flush_all(&mut self) {}

    fn flush_page(&mut self, _: u64) {}
}

impl Engine for IdleEngine {
    fn run(&mut self) -> Result<EngineExit> {
        Ok(EngineExit::Interrupted)
    }

    fn context(&mut self) -> &mut Context {
        &mut self.context
    }

    fn handle(&self) -> Arc<dyn EngineHandle> {
        Arc::new(NoHandle)
    }

    fn capabilities(&self) -> EngineCapabilities {
        let mut capabilities = EngineCapabilities::new(1_000_000);
        capabilities.xcr0 = 7;
        capabilities
    }

    fn time_stamp(&mut self) -> Result<u64> {
        // Time passes, so that no wait is endless.
        self.tsc = self.tsc.saturating_add(100);
        Ok(self.tsc)
    }

    fn set_descriptor(&mut self, index: u16, descriptor: u64) -> bool {
        assert!(index < 7168, "descriptor {index} is the engine's own");
        let level_3 = descriptor & (1 << 47) == 0 || (descriptor >> 44) & 7 == 7;
        self.descriptors[usize::from(index)] = if level_3 { descriptor } else { 0 };
        level_3
    }

    fn descriptor(&self, index: u16) -> u64 {
        assert!(index < 8192, "descriptor {index} does not exist");
        self.descriptors[usize::from(index)]
    }

    fn set_task_switched(&mut self, _: bool) {}

    fn set_xcr0(&mut self, value: u64) -> Result<()> {
        if value & 1 == 0 || value & !7 != 0 {
            return Err(Error::invalid("XCR0", value, "1 to 7, odd"));
        }
        Ok(())
    }

    fn debug_register(&mut self, number: u8) -> u64 {
        assert!(matches!(number, 0..=3 | 6 | 7), "debug register {number}");
        self.debug[usize::from(number)]
    }

    fn set_debug_register(&mut self, number: u8, value: u64) -> Result<()> {
        assert!(matches!(number, 0..=3 | 6 | 7), "debug register {number}");
        self.debug[usize::from(number)] = value;
        Ok(())
    }
}

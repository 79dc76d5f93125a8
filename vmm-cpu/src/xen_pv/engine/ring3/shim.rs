//! The engine's side of the in-guest fast path: what it tells the shim before the guest runs, and what it finds after.

use vmm_memory::vm_memory::{Bytes as _, GuestAddress};
use zerocopy::{FromZeros as _, IntoBytes as _};

use super::context::{PAGE_FAULT, canonical};
use super::{Ring3, low16, memory_error};
use crate::error::Result;
use crate::state::{GeneralRegisters, SystemRegisters};
use crate::xen_pv::abi::shared_info;
use crate::xen_pv::engine::descriptors::{FLAT_CS64, FLAT_SS};
use crate::xen_pv::engine::shim::{Data, Outcome, Place, ShimPages};
use crate::xen_pv::engine::{EngineExit, FastPath, GuestMode, has_error_code};

/// The shim of one virtual processor.
#[derive(Debug)]
pub(super) struct Shim {
    pages: ShimPages,
    data: Data,
    path: FastPath,
}

impl Shim {
    pub(super) fn new(pages: ShimPages, vcpu: u32) -> Self {
        Self { pages, data: pages.initial_data(vcpu), path: FastPath::default() }
    }

    pub(super) fn pages(&self) -> &ShimPages {
        &self.pages
    }

    pub(super) fn set_path(&mut self, path: &FastPath) {
        self.path = *path;
    }

    /// What the guest claims to have done without leaving.
    pub(super) fn counts(&self) -> [(&'static str, u64); 4] {
        let data = &self.data;
        [
            ("fast hypercall", data.fast_hypercalls),
            ("fast system call", data.fast_system_calls),
            ("fast page fault", data.fast_faults),
            ("fast return", data.fast_returns),
        ]
    }
}

impl Ring3 {
    /// Tells the shim what it needs to know.
    pub(super) fn publish(&mut self) -> Result<()> {
        let Some(shim) = &mut self.shim else { return Ok(()) };
        let (c, path) = (&self.context, &shim.path);
        let user_root = self.user_root.map_or(0, |root| root.0);
        let initial = shim.pages.initial_data(self.index);
        shim.data = Data {
            kernel_root_slot: self.kernel_root.0,
            kernel_root: self.kernel_root.0,
            // One root for both would leave nothing to tell them apart by.
            user_root: if user_root == self.kernel_root.0 { 0 } else { user_root },
            kernel_sp: c.kernel_sp,
            mode: u64::from(c.mode == GuestMode::User),
            other_gs: canonical(c.other_gs_base),
            syscall_rip: path.syscall,
            fault_rip: path.page_fault,
            fault_masks: path.page_fault_masks.into(),
            info: ShimPages::window(path.vcpu_info.0),
            null_gs: u64::from(c.gs & !3 == 0),
            enabled: path.enabled.into(),
            syscall_masks: path.syscall_masks.into(),
            flat_user: u64::from(self.descriptors.has_flat_user()),
            fast_hypercalls: shim.data.fast_hypercalls,
            fast_system_calls: shim.data.fast_system_calls,
            fast_faults: shim.data.fast_faults,
            fast_returns: shim.data.fast_returns,
            ..initial
        };
        self.ram.memory().write_slice(shim.data.as_bytes(), shim.pages.data(self.index)).map_err(memory_error)
    }

    /// Takes over what the shim changed. `false` if the guest made nonsense of it.
    pub(super) fn take_shim(&mut self, system: &SystemRegisters) -> Result<bool> {
        let Some(shim) = &mut self.shim else { return Ok(true) };
        let mut data = Data::new_zeroed();
        let place = shim.pages.data(self.index);
        self.ram.memory().read_slice(data.as_mut_bytes(), place).map_err(memory_error)?;
        shim.data = data;
        let (kernel, user) = (GuestAddress(data.kernel_root), GuestAddress(data.user_root));
        if self.check_root(kernel).is_err() || self.check_root(user).is_err() {
            return Ok(false);
        }
        self.kernel_root = kernel;
        // 0 stands for none, and for one that the shim was not told.
        if user.0 != 0 {
            self.user_root = Some(user);
        }
        self.system.cr3 = system.cr3;
        let c = &mut self.context;
        c.mode = if data.mode == 0 { GuestMode::Kernel } else { GuestMode::User };
        c.kernel_sp = data.kernel_sp;
        c.other_gs_base = canonical(data.other_gs);
        Ok(true)
    }

    /// The exit of a guest that was found in the shim at `general`, if it was.
    pub(super) fn shim_exit(
        &mut self,
        general: &GeneralRegisters,
        ring0: bool,
        system: &SystemRegisters,
    ) -> Result<Option<EngineExit>> {
        let Some(shim) = &self.shim else { return Ok(None) };
        // The guest's; what the processor has may be the engine's own by now.
        let on_user_root = self.user_root.is_some_and(|root| root.0 == self.system.cr3);
        let place = shim.pages.place(self.index, general.rip, ring0, on_user_root);
        if place == Place::Outside {
            return Ok(None);
        }
        let frame = |vector| self.frame(vector).ok();
        let Some(outcome) = shim.pages.outcome(self.index, place, general, &shim.data, &frame) else {
            return Ok(None);
        };
        let (path, to) = (shim.path, shim.data.to);
        self.take_segments(system);
        let c = &mut self.context;
        (c.cs, c.ss) = (FLAT_CS64, FLAT_SS);
        Ok(Some(match outcome {
            Outcome::Hypercall(general) => {
                c.general = general;
                c.mode = GuestMode::Kernel;
                EngineExit::Syscall
            }
            Outcome::SystemCall(general) => {
                c.general = general;
                c.mode = GuestMode::User;
                EngineExit::Syscall
            }
            Outcome::Exception { vector, general, cs, ss, error, address } => {
                c.general = general;
                (c.cs, c.ss) = (low16(cs), low16(ss));
                let address = if vector == PAGE_FAULT { address.unwrap_or(system.cr2) } else { 0 };
                let error = if has_error_code(vector) { error & 0xffff_ffff } else { 0 };
                let error_code = u32::try_from(error).unwrap_or(0);
                EngineExit::Exception { vector, error_code, address }
            }
            Outcome::Done { general, mask, entered } => {
                c.general = general;
                if let Some(entered) = entered {
                    if entered.user {
                        (c.cs, c.ss) = (low16(to.cs), low16(to.ss));
                    }
                    c.mode = if entered.user { GuestMode::User } else { GuestMode::Kernel };
                    (c.gs_base, c.other_gs_base) = (canonical(entered.gs), canonical(entered.other_gs));
                }
                if let Some(mask) = mask {
                    let place = GuestAddress(path.vcpu_info.0 + shared_info::UPCALL_MASK);
                    self.ram.memory().write_obj(u8::from(mask != 0), place).map_err(memory_error)?;
                }
                EngineExit::Interrupted
            }
        }))
    }
}

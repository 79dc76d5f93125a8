//! The processor's tables and registers as a guest kernel sets them: traps, callbacks, descriptors, segment bases, debug
//! registers, stack, FPU, assists, I/O privilege.

use super::super::abi::errno::Errno;
use super::super::abi::vcpu::{CallbackRegister, TrapInfo, callback, segbase};
use super::super::abi::{FIRST_RESERVED_GDT_ENTRY, PAGE_SIZE, nr, vm_assist};
use super::super::engine::Engine;
use super::super::memory::{element, is_canonical};
use super::super::vcpu_abi::{Callback, VcpuAbi};
use super::{Call, Done, Failure, Outcome};
use std::sync::atomic::Ordering;

/// Descriptors of a frame.
const DESCRIPTORS: u64 = PAGE_SIZE / 8;

mod physdev {
    pub(super) const SET_IOPL: u64 = 6;
    pub(super) const SET_IOBITMAP: u64 = 7;
}

mod nmi {
    pub(super) const REGISTER: u64 = 0;
    pub(super) const UNREGISTER: u64 = 1;
}

impl Call<'_> {
    /// Arguments: table, which ends with an entry without address; none clears all.
    pub(super) fn set_trap_table(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [table, ..] = *args;
        if table == 0 {
            self.vcpu.traps.fill(TrapInfo::default());
            return Ok(Done::OK);
        }
        // Every vector may come once; a longer table is a guest that lost its way.
        for index in 0..=256 {
            let trap: TrapInfo = self.space().read(element::<TrapInfo>(table, index)?)?;
            if trap.address == 0 {
                return Ok(Done::OK);
            }
            if !is_canonical(trap.address) {
                return Err(Errno::EINVAL.into());
            }
            if let Some(entry) = self.vcpu.traps.get_mut(usize::from(trap.vector)) {
                *entry = trap;
            }
        }
        Err(Errno::EINVAL.into())
    }

    /// Arguments: event, failsafe and syscall entry.
    pub(super) fn set_callbacks(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [event, failsafe, syscall, ..] = *args;
        for (kind, address) in
            [(callback::EVENT, event), (callback::FAILSAFE, failsafe), (callback::SYSCALL, syscall)]
        {
            self.register(&CallbackRegister { kind, address, ..Default::default() })?;
        }
        Ok(Done::OK)
    }

    /// Arguments: command, structure.
    pub(super) fn callback_op(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [command, at, ..] = *args;
        match command {
            callback::OP_REGISTER => {
                let request: CallbackRegister = self.space().read(at)?;
                self.register(&request)?;
                Ok(Done::OK)
            }
            callback::OP_UNREGISTER => {
                let kind: u16 = self.space().read(at)?;
                if kind != callback::NMI {
                    return Err(Errno::EINVAL.into());
                }
                self.vcpu.nmi = Callback::default();
                Ok(Done::OK)
            }
            _ => self.unknown(nr::CALLBACK_OP),
        }
    }

    fn register(&mut self, request: &CallbackRegister) -> Result<(), Errno> {
        if !is_canonical(request.address) {
            return Err(Errno::EINVAL);
        }
        let vcpu = &mut *self.vcpu;
        let place = match request.kind {
            callback::EVENT => &mut vcpu.event,
            callback::FAILSAFE => &mut vcpu.failsafe,
            callback::SYSCALL => &mut vcpu.syscall,
            callback::SYSCALL32 => &mut vcpu.syscall32,
            callback::SYSENTER | callback::SYSENTER_DEPRECATED => &mut vcpu.sysenter,
            callback::NMI => &mut vcpu.nmi,
            _ => return Err(Errno::ENOSYS),
        };
        *place = Callback { rip: request.address, masks_events: request.flags & callback::MASK_EVENTS != 0 };
        Ok(())
    }

    /// Arguments: command, structure. An older way to register the NMI callback.
    pub(super) fn nmi_op(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [command, at, ..] = *args;
        match command {
            nmi::REGISTER => {
                let address: u64 = self.space().read(at)?;
                self.register(&CallbackRegister { kind: callback::NMI, address, ..Default::default() })?;
            }
            nmi::UNREGISTER => self.vcpu.nmi = Callback::default(),
            _ => return self.unknown(nr::NMI_OP),
        }
        Ok(Done::OK)
    }

    /// Arguments: list of frames, number of descriptors.
    pub(super) fn set_gdt(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [list, entries, ..] = *args;
        let entries = entries & u64::from(u32::MAX);
        if entries > FIRST_RESERVED_GDT_ENTRY {
            return Err(Errno::EINVAL.into());
        }
        let mut frames = Vec::new();
        for index in 0..entries.div_ceil(DESCRIPTORS) {
            frames.push(self.space().read::<u64>(element::<u64>(list, index)?)?);
        }
        self.vcpu.load_gdt(self.engine, frames, entries)?;
        Ok(Done::OK)
    }

    /// Arguments: guest-physical address, descriptor.
    pub(super) fn update_descriptor(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [at, descriptor, ..] = *args;
        let frame = at / PAGE_SIZE;
        if at % 8 != 0 || !self.domain.memory.is_ram(frame) || self.domain.tables.level(frame) != 0 {
            return Err(Errno::EINVAL.into());
        }
        let descriptor = for_ring3(descriptor).ok_or(Errno::EINVAL)?;
        self.domain.memory.store(at, descriptor)?;
        if let Some(position) =
            (0..).zip(&self.vcpu.gdt).find(|(_, used)| **used == frame).map(|(index, _)| index)
        {
            let index: u64 = position * DESCRIPTORS + at % PAGE_SIZE / 8;
            if index < self.vcpu.gdt_entries
                && let Ok(index) = u16::try_from(index)
            {
                self.engine.set_descriptor(index, descriptor);
            }
        }
        Ok(Done::OK)
    }

    /// Arguments: stack selector and pointer of the guest kernel.
    pub(super) fn stack_switch(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [ss, sp, ..] = *args;
        let [low, high, ..] = ss.to_le_bytes();
        self.vcpu.kernel_ss = u16::from_le_bytes([low, high]) | 3;
        self.engine.context().kernel_sp = sp;
        Ok(Done::OK)
    }

    /// Arguments: whether to set CR0.TS.
    pub(super) fn fpu_taskswitch(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [set, ..] = *args;
        self.vcpu.set_task_switched(self.engine, set != 0);
        Ok(Done::OK)
    }

    /// Arguments: register, value.
    pub(super) fn set_debugreg(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [register, value, ..] = *args;
        let number = match register {
            number @ 0..=3 => {
                // A breakpoint on what the guest cannot reach anyway.
                if !super::super::memory::may_access(value) {
                    return Err(Errno::EPERM.into());
                }
                number
            }
            4 | 6 => 6,
            5 | 7 => 7,
            _ => return Err(Errno::ENODEV.into()),
        };
        if number >= 6 && value > u64::from(u32::MAX) {
            return Err(Errno::EINVAL.into());
        }
        // DR7.GD would fault in the engine's own code.
        if number == 7 && value & (1 << 13) != 0 {
            return Err(Errno::EPERM.into());
        }
        let number = u8::try_from(number).map_err(|_| Errno::ENODEV)?;
        self.engine.set_debug_register(number, value).map_err(|_| Errno::EINVAL)?;
        Ok(Done::OK)
    }

    /// Arguments: register.
    pub(super) fn get_debugreg(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [register, ..] = *args;
        let number: u8 = match register {
            number @ 0..=3 => u8::try_from(number).map_err(|_| Errno::ENODEV)?,
            4 | 6 => 6,
            5 | 7 => 7,
            _ => return Err(Errno::ENODEV.into()),
        };
        Ok(Done::Value(self.engine.debug_register(number)))
    }

    /// Arguments: which, base.
    pub(super) fn set_segment_base(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [which, base, ..] = *args;
        if which == segbase::GS_USER_SEL {
            let [low, high, ..] = base.to_le_bytes();
            let selector = match u16::from_le_bytes([low, high]) {
                null @ 0..=3 => null,
                selector => selector | 3,
            };
            // As Xen: a selector that cannot be loaded becomes null, without an error.
            let descriptor = if selector & 4 == 0 { self.engine.descriptor(selector >> 3) } else { 0 };
            let loads = selector > 3 && is_loadable(descriptor);
            let context = self.engine.context();
            context.gs = if loads || selector <= 3 { selector } else { 0 };
            context.other_gs_base = if loads { base_of(descriptor) } else { 0 };
            return Ok(Done::OK);
        }
        if !is_canonical(base) {
            return Err(Errno::EINVAL.into());
        }
        let context = self.engine.context();
        match which {
            segbase::FS => context.fs_base = base,
            segbase::GS_USER => context.other_gs_base = base,
            segbase::GS_KERNEL => context.gs_base = base,
            _ => return Err(Errno::EINVAL.into()),
        }
        Ok(Done::OK)
    }

    /// Arguments: command, which assist.
    pub(super) fn vm_assist(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [command, kind, ..] = *args;
        let kind = kind & u64::from(u32::MAX);
        let offered = matches!(
            kind,
            vm_assist::FOUR_GB_SEGMENTS
                | vm_assist::FOUR_GB_SEGMENTS_NOTIFY
                | vm_assist::WRITABLE_PAGETABLES
                | vm_assist::ARCHITECTURAL_IOPL
                | vm_assist::RUNSTATE_UPDATE_FLAG
        );
        if !offered {
            return Err(Errno::EINVAL.into());
        }
        match command {
            vm_assist::ENABLE => self.domain.assists.fetch_or(1 << kind, Ordering::Relaxed),
            vm_assist::DISABLE => self.domain.assists.fetch_and(!(1 << kind), Ordering::Relaxed),
            _ => return self.unknown(nr::VM_ASSIST),
        };
        Ok(Done::OK)
    }

    /// Arguments: command, structure.
    pub(super) fn physdev_op(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [command, at, ..] = *args;
        match command {
            physdev::SET_IOPL => {
                let iopl: u32 = self.space().read(at)?;
                if iopl > 3 {
                    return Err(Errno::EINVAL.into());
                }
                self.vcpu.control.iopl = iopl.into();
                Ok(Done::OK)
            }
            physdev::SET_IOBITMAP => {
                // Buffer, then the number of ports. None of them leads anywhere, so the bitmap changes nothing.
                let ports: u32 = self.space().read(at.checked_add(8).ok_or(Errno::EFAULT)?)?;
                if ports > 1 << 16 {
                    return Err(Errno::EINVAL.into());
                }
                Ok(Done::OK)
            }
            _ => self.unknown(nr::PHYSDEV_OP),
        }
    }
}

impl VcpuAbi {
    /// Takes `entries` descriptors of `frames` as the guest's descriptor table.
    pub(crate) fn load_gdt(
        &mut self,
        engine: &mut dyn Engine,
        frames: Vec<u64>,
        entries: u64,
    ) -> Result<(), Failure> {
        for frame in &frames {
            if self.domain.tables.level(*frame) != 0 {
                return Err(Errno::EINVAL.into());
            }
            self.domain.frame_address(*frame)?;
        }
        let mut descriptors = Vec::with_capacity(frames.len() * 512);
        for frame in &frames {
            descriptors.extend_from_slice(self.domain.memory.table(*frame)?.as_slice());
        }
        let old = self.gdt_entries;
        for index in 0..entries.max(old) {
            let descriptor = usize::try_from(index)
                .ok()
                .filter(|_| index < entries)
                .and_then(|index| descriptors.get(index))
                .copied()
                .and_then(for_ring3)
                .unwrap_or(0);
            if let Ok(index) = u16::try_from(index) {
                engine.set_descriptor(index, descriptor);
            }
        }
        (self.gdt, self.gdt_entries) = (frames, entries);
        Ok(())
    }
}

/// A descriptor as Xen takes it: code and data get privilege level 3; system segments, which need ring 0, are refused.
fn for_ring3(descriptor: u64) -> Option<u64> {
    const PRESENT: u64 = 1 << 47;
    const LEVEL: u64 = 3 << 45;
    const CODE_OR_DATA: u64 = 1 << 44;
    const KIND: u64 = 0x1f << 40;
    if descriptor & PRESENT == 0 || descriptor & KIND == 0 {
        return Some(descriptor);
    }
    (descriptor & CODE_OR_DATA != 0).then_some(descriptor | LEVEL)
}

/// Whether a data segment register may hold this in ring 3: present, level 3, readable.
fn is_loadable(descriptor: u64) -> bool {
    let access = descriptor >> 40 & 0xff;
    let readable_code = access & 0x0a == 0x0a;
    let data = access & 0x08 == 0;
    access & 0xf0 == 0xf0 && (data || readable_code)
}

/// Base of a segment.
fn base_of(descriptor: u64) -> u64 {
    descriptor >> 16 & 0x00ff_ffff | descriptor >> 32 & 0xff00_0000
}

#[cfg(test)]
mod tests;

//! Where in the shim a virtual processor was found, and what its guest's registers are there.

use super::ShimPages;
use super::code::{self, Labels};
use super::data::{Data, KIND_FAULT, KIND_HYPERCALL, KIND_PROTECTION, KIND_TRAP};
use crate::state::GeneralRegisters;

/// A place in the shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Not in it, or where a program runs it as any other code.
    Outside,
    /// SYSCALL of the guest kernel, no register changed yet.
    Hypercall,
    /// SYSCALL of a program, no register changed yet.
    SystemCall,
    /// What it began with is saved.
    Begun,
    /// An exception of a program, its frame on the stack: nothing changed but RAX, which may be in the slot.
    Entering {
        vector: u8,
        rax: Rax,
    },
    /// The same with the general registers saved.
    Entered {
        vector: u8,
    },
    /// Ring 0 on the kernel root: what it does follows from the frame on the stack.
    Gate,
    /// On the way into a program, or into the guest kernel with more or less left to do.
    ToUser,
    ToKernelEntry,
    ToKernelMasking,
    ToKernel,
    /// A program's RAX is in R11 still, and goes on at RCX.
    Landing,
    /// The same with RAX in place; R11 is whatever it is.
    Landed,
}

/// Where RAX is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rax {
    Register,
    /// In the slot that had the kernel root.
    Slot,
    /// Put aside.
    Aside,
}

/// The guest's registers, and what else the shim was about to set.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Outcome {
    /// A hypercall that nobody has done.
    Hypercall(GeneralRegisters),
    /// A system call of a program, likewise.
    SystemCall(GeneralRegisters),
    /// An exception, likewise; without an address, it is the one that the processor has.
    Exception { vector: u8, general: GeneralRegisters, cs: u64, ss: u64, error: u64, address: Option<u64> },
    /// The shim is done: the guest goes on with these registers, and with these changes if they are there.
    Done { general: GeneralRegisters, mask: Option<u64>, entered: Option<Entered> },
}

/// A change of mode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entered {
    pub(crate) user: bool,
    pub(crate) gs: u64,
    pub(crate) other_gs: u64,
}

impl ShimPages {
    /// The place at `rip` in ring 0 or 3, on the user root or the kernel root.
    pub(crate) fn place(&self, vcpu: u32, rip: u64, ring0: bool, user_root: bool) -> Place {
        let l = &self.labels;
        let offset = rip.wrapping_sub(Self::entry(vcpu));
        let Some(at) = u32::try_from(offset).ok().filter(|_| offset < code::SIZE as u64) else {
            return Place::Outside;
        };
        match (ring0, user_root) {
            // SYSCALL has come so far. The address is this virtual processor's, so the program must not go on there.
            (false, true) if at == 0 => Place::SystemCall,
            (false, true) => match at.checked_sub(l.leave_user) {
                Some(0) => Place::Landing,
                // Behind MOV RAX, R11, and behind MOV R11D.
                Some(3 | 9) => Place::Landed,
                _ => Place::Outside,
            },
            (true, true) if at == 0 => Place::SystemCall,
            (true, _) if at >= l.user_trap && at < l.gates_end => Self::user_gate(l, at),
            (true, _) if at >= l.kernel_trap && at < l.leave_user => Place::Gate,
            (_, false) if at == 0 || (l.hypercall..l.hypercall_saved).contains(&at) => Place::Hypercall,
            (true, false) if (l.hypercall_saved..l.hypercall_ring3).contains(&at) => Place::Begun,
            (true, _) => Place::Outside,
            (false, false) => Self::body(l, at),
        }
    }

    fn user_gate(l: &Labels, at: u32) -> Place {
        let (vector, swapped) = match at {
            _ if at < l.user_fault => (0, l.user_trap_swapped),
            _ if at < l.kernel_protection => (14, l.user_fault_swapped),
            _ => (13, l.gates_end),
        };
        Place::Entering { vector, rax: if at >= swapped { Rax::Slot } else { Rax::Register } }
    }

    fn body(l: &Labels, at: u32) -> Place {
        match at {
            _ if at == l.leave_user || at == l.leave_user_whole => Place::ToUser,
            _ if at < l.go_on_user => Place::Begun,
            _ if at < l.go_on_entry => Place::ToUser,
            _ if at < l.go_on_masking => Place::ToKernelEntry,
            _ if at < l.go_on_kernel => Place::ToKernelMasking,
            _ if at < l.go_on_end => Place::ToKernel,
            _ if at < l.fault => Place::Begun,
            _ if at < l.fault_swapped => Place::Entering { vector: 14, rax: Rax::Slot },
            _ if at < l.fault_saved => Place::Entering { vector: 14, rax: Rax::Register },
            _ if at < l.trap => Place::Entered { vector: 14 },
            _ if at < l.trap_swapped => Place::Entering { vector: 0, rax: Rax::Slot },
            _ if at < l.trap_saved => Place::Entering { vector: 0, rax: Rax::Register },
            // The frame is copied in code that both share; the kind says which it is.
            _ if at < l.program_saved => Place::Entered { vector: u8::MAX },
            _ if at < l.protection => Place::Begun,
            _ if at < l.protection_kept => Place::Entering { vector: 13, rax: Rax::Register },
            _ if at < l.protection_checked => Place::Entering { vector: 13, rax: Rax::Aside },
            _ if at < l.protection_saved => Place::Entering { vector: 13, rax: Rax::Register },
            _ if at < l.protection_copied => Place::Entered { vector: 13 },
            _ => Place::Begun,
        }
    }

    /// What a place means. `general` are the registers there, `frame` reads what an exception pushed: error code, RIP,
    /// CS, RFLAGS, RSP, SS. `None` for a place outside, and for a guest that has destroyed its shim.
    pub(crate) fn outcome(
        &self,
        vcpu: u32,
        place: Place,
        general: &GeneralRegisters,
        data: &Data,
        frame: &dyn Fn(u8) -> Option<[u64; 6]>,
    ) -> Option<Outcome> {
        let entry = Self::entry(vcpu);
        let as_syscall =
            |general: GeneralRegisters| GeneralRegisters { rip: general.rcx, rflags: general.r11, ..general };
        let exception = |vector: u8, general: GeneralRegisters| {
            let [error, rip, cs, rflags, rsp, ss] = frame(vector)?;
            let general = GeneralRegisters { rsp, ..general };
            if vector == 0 && rip == entry {
                return Some(Outcome::SystemCall(as_syscall(general)));
            }
            let general = GeneralRegisters { rip, rflags, ..general };
            Some(Outcome::Exception { vector, general, cs, ss, error, address: None })
        };
        // One of the shim's own instructions, which used an address of the guest's.
        let inside = |vector: u8| {
            frame(vector).is_some_and(|[_, rip, ..]| rip.wrapping_sub(entry) < code::SIZE as u64)
        };
        let done = |mask: bool, user: Option<bool>| {
            let to = &data.to;
            let general = GeneralRegisters {
                rax: to.rax,
                rcx: to.rcx,
                r11: to.r11,
                rip: to.rip,
                rsp: to.rsp,
                rflags: to.rflags,
                ..saved(data)
            };
            let entered = user.map(|user| Entered { user, gs: to.gs, other_gs: to.other_gs });
            Some(Outcome::Done { general, mask: mask.then_some(to.mask), entered })
        };
        match place {
            Place::Outside => None,
            Place::Hypercall => Some(Outcome::Hypercall(as_syscall(*general))),
            Place::SystemCall => Some(Outcome::SystemCall(as_syscall(*general))),
            Place::Begun => match data.kind {
                KIND_HYPERCALL => Some(Outcome::Hypercall(as_syscall(saved(data)))),
                KIND_TRAP if data.saved.rip == entry => Some(Outcome::SystemCall(as_syscall(saved(data)))),
                KIND_TRAP | KIND_FAULT | KIND_PROTECTION => Some(Outcome::Exception {
                    vector: match data.kind {
                        KIND_TRAP => 0,
                        KIND_FAULT => 14,
                        _ => 13,
                    },
                    general: saved(data),
                    cs: data.saved.cs,
                    ss: data.saved.ss,
                    error: data.saved.error,
                    address: Some(data.saved.cr2),
                }),
                _ => None,
            },
            Place::Entering { vector: 13, .. } if inside(13) => {
                self.outcome(vcpu, Place::Begun, general, data, frame)
            }
            Place::Entering { vector, rax } => {
                let rax = match rax {
                    Rax::Register => general.rax,
                    Rax::Slot => data.kernel_root_slot,
                    Rax::Aside => data.protection_rax,
                };
                exception(vector, GeneralRegisters { rax, ..*general })
            }
            Place::Entered { vector } => {
                let by_kind = if data.kind == KIND_FAULT { 14 } else { 0 };
                exception(if vector == u8::MAX { by_kind } else { vector }, saved(data))
            }
            Place::Gate => {
                let [_, rip, ..] = frame(0)?;
                match self.place(vcpu, rip, false, false) {
                    place @ (Place::ToUser | Place::Begun) => self.outcome(vcpu, place, general, data, frame),
                    _ => None,
                }
            }
            Place::ToUser => done(true, Some(true)),
            Place::ToKernelEntry => done(true, Some(false)),
            Place::ToKernelMasking => done(true, None),
            Place::ToKernel => done(false, None),
            Place::Landing | Place::Landed => {
                let rax = if place == Place::Landing { general.r11 } else { general.rax };
                let general = GeneralRegisters { rax, r11: 0x246, rip: general.rcx, ..*general };
                Some(Outcome::Done { general, mask: None, entered: None })
            }
        }
    }
}

fn saved(data: &Data) -> GeneralRegisters {
    let s = &data.saved;
    GeneralRegisters {
        rax: s.rax,
        rbx: s.rbx,
        rcx: s.rcx,
        rdx: s.rdx,
        rsi: s.rsi,
        rdi: s.rdi,
        rbp: s.rbp,
        rsp: s.rsp,
        r8: s.r8,
        r9: s.r9,
        r10: s.r10,
        r11: s.r11,
        r12: s.r12,
        r13: s.r13,
        r14: s.r14,
        r15: s.r15,
        rip: s.rip,
        rflags: s.rflags,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xen_pv::engine::Layout;

    fn pages() -> ShimPages {
        ShimPages::new(Layout::new(8 << 20).unwrap(), 1 << 30, 2).unwrap()
    }

    /// A program that was on its way into its kernel may go on elsewhere, so it must not be left at an address that is one virtual
    /// processor's.
    #[test]
    fn a_program_at_the_entry_has_made_a_system_call() {
        let pages = pages();
        for vcpu in [0, 1] {
            let rip = ShimPages::entry(vcpu);
            let general = GeneralRegisters { rip, rcx: 0x1000, r11: 0x246, rax: 39, ..Default::default() };
            for ring0 in [false, true] {
                let place = pages.place(vcpu, rip, ring0, true);
                let outcome = pages.outcome(vcpu, place, &general, &Data::default(), &|_| None);
                let Some(Outcome::SystemCall(general)) = outcome else { panic!("{outcome:?}") };
                assert_eq!((general.rip, general.rflags, general.rax), (0x1000, 0x246, 39));
            }
            // The other one's is a page that it may execute, and no more.
            assert_eq!(pages.place(1 - vcpu, rip, false, true), Place::Outside);
        }
    }

    #[test]
    fn programs_are_nowhere_else_in_the_shim_but_where_they_land() {
        let pages = pages();
        let landing = u64::from(pages.labels.leave_user);
        for offset in 1..code::SIZE as u64 {
            let expected = match offset.checked_sub(landing) {
                Some(0) => Place::Landing,
                Some(3 | 9) => Place::Landed,
                _ => Place::Outside,
            };
            assert_eq!(pages.place(0, ShimPages::entry(0) + offset, false, true), expected, "{offset:#x}");
        }
        for rip in [0, ShimPages::entry(0) - 1, ShimPages::entry(0) + code::SIZE as u64, u64::MAX] {
            for (ring0, user_root) in [(false, false), (false, true), (true, false), (true, true)] {
                assert_eq!(pages.place(0, rip, ring0, user_root), Place::Outside, "{rip:#x}");
            }
        }
    }

    #[test]
    fn a_shim_that_began_with_nothing_has_no_outcome() {
        let pages = pages();
        let (general, data) = (GeneralRegisters::default(), Data::default());
        assert!(pages.outcome(0, Place::Begun, &general, &data, &|_| None).is_none());
        assert!(pages.outcome(0, Place::Gate, &general, &data, &|_| None).is_none());
    }

    /// The address of a fault may be 0, and is that one then.
    #[test]
    fn an_address_of_0_is_one() {
        let pages = pages();
        let mut data = Data { kind: KIND_FAULT, ..Data::default() };
        data.saved.error = 4;
        let outcome = pages.outcome(0, Place::Begun, &GeneralRegisters::default(), &data, &|_| None);
        let Some(Outcome::Exception { vector: 14, error: 4, address, .. }) = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(address, Some(0));
    }
}

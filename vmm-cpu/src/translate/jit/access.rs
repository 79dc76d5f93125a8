//! How translated code reaches memory: through the TLB's tables, or through the address window.
//!
//! Through the window an access is one instruction behind three that change no flag, and what it must not do the host
//! prevents: the instruction faults, and the interpreter executes the guest's. So the guest's state has to be complete
//! before it, and an access is the last thing that can fail in an instruction.

use std::mem::offset_of;

use iced_x86::{Instruction, Register};

use super::builder::{Builder, Flags, displacement};
use super::emit::{RAX, RCX, Rm};
use super::instruction::{Outcome, Untranslated, needs_alignment};
use super::registers::{GUEST_RSP, Home, home, number};
use crate::translate::memory::NEAR;
use crate::translate::memory::frame::Frame;

/// Whether a displacement may follow the lookup of a region: what lies beside each is that large. Where the region ends in
/// between, the access faults.
const fn is_guarded(disp: i32) -> bool {
    // Of i32::MIN there is no absolute value.
    (disp.unsigned_abs() as usize) < NEAR
}

impl Builder<'_> {
    /// Where the host finds the memory operand. RAX and RCX change, and are part of it; with the TLB, the status flags are in
    /// the frame afterwards.
    pub(super) fn operand_at(
        &mut self,
        instruction: &Instruction,
        bytes: usize,
        write: bool,
    ) -> Result<Rm, Untranslated> {
        if !self.mode.window || !Self::suits_window(instruction) {
            self.operand(instruction, bytes, write)?;
            return Ok(Rm::At(RAX, 0));
        }
        let base = instruction.memory_base();
        let disp = i32::try_from(instruction.memory_displacement64().cast_signed());
        let in_register = if base.is_gpr64() { home(number(base)) } else { Home::Frame };
        let has_segment = matches!(instruction.memory_segment(), Register::FS | Register::GS);
        match (in_register, disp) {
            (Home::Host(host), Ok(disp))
                if is_guarded(disp) && instruction.memory_index() == Register::None && !has_segment =>
            {
                Ok(self.in_window(host, disp))
            }
            _ => {
                self.address(instruction)?;
                Ok(self.in_window(RAX, 0))
            }
        }
    }

    /// Whether the address is computed without changing flags.
    fn suits_window(instruction: &Instruction) -> bool {
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let is_plain = base == Register::None && index == Register::None;
        is_plain || !matches!(instruction.memory_segment(), Register::FS | Register::GS)
    }

    /// The host address of the memory operand, in RAX, by the TLB.
    pub(super) fn operand(&mut self, instruction: &Instruction, bytes: usize, write: bool) -> Outcome {
        self.clobber_flags();
        self.address(instruction)?;
        self.lookup(bytes, write, bytes == 16 && needs_alignment(instruction));
        Ok(())
    }

    /// Where the window has what is at a linear address in a register and a displacement. RCX changes, and is part of it.
    pub(super) fn in_window(&mut self, register: u8, disp: i32) -> Rm {
        debug_assert!(is_guarded(disp), "a displacement out of the window");
        self.begin_access();
        // RORX RCX, register, 32
        let (r, b) = (0x80, if register >= 8 { 0 } else { 0x20 });
        self.e.bytes(&[0xc4, r | 0x40 | b | 0x03, 0xfb, 0xf0, 0xc0 | RCX << 3 | register & 7, 32]);
        // MOVZX ECX, CX
        self.e.bytes(&[0x0f, 0xb7, 0xc9]);
        self.e.load(RCX, Rm::FrameIndexed(RCX, displacement(offset_of!(Frame, regions))));
        Rm::Indexed(register, RCX, 0, disp)
    }

    /// Where the top of the stack is, or what is so far from it. RCX changes; with the TLB, RAX as well, and the flags are in
    /// the frame afterwards.
    pub(super) fn stack_at(&mut self, disp: i32, write: bool) -> Rm {
        if self.mode.window {
            return self.in_window(GUEST_RSP, disp);
        }
        self.lookup_stack(disp, write);
        Rm::At(RAX, 0)
    }

    /// The host address of the top of the stack, or what is so far from it, in RAX, by the TLB.
    pub(super) fn lookup_stack(&mut self, disp: i32, write: bool) {
        self.clobber_flags();
        self.e.lea(RAX, Rm::At(GUEST_RSP, disp));
        self.lookup(8, write, false);
    }

    /// From here on until the next access or instruction, a fault of the host's is one of the running instruction.
    fn begin_access(&mut self) {
        self.show_flags();
        let site = match self.resuming.last() {
            Some(site) => *site,
            None => self.instruction_site(),
        };
        let live = self.flags == Flags::Live;
        let at = self.e.len();
        self.accesses.push(Access { at, end: usize::MAX, site, live });
    }

    /// The instruction of the last accesses ends here: what faults from here on is none of them.
    pub(super) fn end_accesses(&mut self) {
        let end = self.e.len();
        self.accesses
            .iter_mut()
            .rev()
            .take_while(|access| access.end > end)
            .for_each(|access| access.end = end);
    }
}

/// An access through the window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    /// Offsets in the translation of where it begins and where its instruction ends.
    pub(super) at: usize,
    pub(super) end: usize,
    /// What to do if it faults.
    pub(super) site: u32,
    /// The status flags are in the processor alone.
    pub(super) live: bool,
}

/// Whether the window can be had: RORX is of BMI2.
pub(super) fn host_has_window() -> bool {
    std::arch::is_x86_feature_detected!("bmi2")
}

/// Makes the memory operand of an instruction that at `place`.
pub(super) fn use_host_place(instruction: &mut Instruction, place: Rm) {
    let (base, index, disp) = match place {
        Rm::At(base, disp) => (base, Register::None, disp),
        Rm::Indexed(base, index, _, disp) => (base, Register::RAX + u32::from(index), disp),
        _ => return,
    };
    instruction.set_segment_prefix(Register::None);
    instruction.set_memory_base(Register::RAX + u32::from(base));
    instruction.set_memory_index(index);
    instruction.set_memory_index_scale(1);
    instruction.set_memory_displacement64(i64::from(disp).cast_unsigned());
    instruction.set_memory_displ_size(u32::from(disp != 0));
    instruction.set_has_rep_prefix(false);
    instruction.set_has_repne_prefix(false);
}

//! The transcendental instructions, executed by the x86-64 host's own x87 unit.
//!
//! The guest's state goes in by FRSTOR and comes back by FNSAVE, which neither waits for an unmasked
//! exception nor leaves one behind, so no signal can come of it and the whole transition, exceptions and
//! stack faults included, is the processor's.
#![allow(unsafe_code, reason = "inline assembly: the host's own x87 instructions")]

use std::arch::asm;

use iced_x86::Mnemonic;

use super::image::Layout;
use super::state::X87State;

/// An FNSAVE image in the 32-bit format.
#[repr(align(16))]
struct Image([u8; 108]);

/// Runs one x87 instruction without memory operand on the state in an image.
macro_rules! run {
    ($instruction:literal, $image:expr) => {{
        // SAFETY: the pointer is to the 108 bytes that FRSTOR reads and FNSAVE writes. The block begins
        // and ends with an empty register stack: FNSAVE initializes the unit, control word included. An
        // exception that the instruction leaves pending is gone with that before any instruction looks.
        unsafe {
            asm!(
                "frstor [{image}]",
                $instruction,
                "fnsave [{image}]",
                image = in(reg) $image.0.as_mut_ptr(),
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                options(nostack),
            );
        }
    }};
}

/// Executes F2XM1 to FSINCOS on a state in which no exception is pending. Other mnemonics do nothing.
pub(super) fn transcendental(state: &mut X87State, mnemonic: Mnemonic) {
    let mut image = Image([0; 108]);
    state.write_environment(&mut image.0, Layout::Protected32);
    let (_, stack) = image.0.split_at_mut(Layout::Protected32.environment_bytes());
    state.write_stack(stack);
    match mnemonic {
        Mnemonic::F2xm1 => run!("f2xm1", image),
        Mnemonic::Fyl2x => run!("fyl2x", image),
        Mnemonic::Fyl2xp1 => run!("fyl2xp1", image),
        Mnemonic::Fptan => run!("fptan", image),
        Mnemonic::Fpatan => run!("fpatan", image),
        Mnemonic::Fsin => run!("fsin", image),
        Mnemonic::Fcos => run!("fcos", image),
        Mnemonic::Fsincos => run!("fsincos", image),
        _ => return,
    }
    let mut after = *state;
    after.read_environment(&image.0, Layout::Protected32);
    let (_, stack) = image.0.split_at(Layout::Protected32.environment_bytes());
    after.read_stack(stack);
    // The pointers are the guest's, not those of the host's instruction.
    *state = X87State {
        instruction_pointer: state.instruction_pointer,
        data_pointer: state.data_pointer,
        code_selector: state.code_selector,
        data_selector: state.data_selector,
        opcode: state.opcode,
        ..after
    };
}

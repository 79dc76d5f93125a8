//! x87: the operands. What is computed is the affair of [`x87`](crate::translate::x87).

use iced_x86::{Instruction, Mnemonic};

use super::op::{Handler, Op, operand_bytes};
use crate::translate::core::{Flow, Leave, Machine, Place};
use crate::translate::cpu::{BLOCK, RAX, cr0};
use crate::translate::exception::{Exception, vector};
use crate::translate::flags::bits;
use crate::translate::memory::{Access, PAGE, PAGE_MASK};
use crate::translate::x87::{X87Context, X87Machine, X87Stop, execute, waits};

/// The memory operand and the registers that x87 instructions touch.
struct Operands<'a, 'b> {
    m: &'a mut Machine<'b>,
    place: Option<Place>,
    written: bool,
}

impl X87Machine for Operands<'_, '_> {
    type Stop = Leave;

    fn read(&mut self, buffer: &mut [u8]) -> Flow {
        match self.place {
            Some(place) => {
                self.m.probe_pieces(place, buffer.len(), Access::Read)?;
                self.m.read(place, buffer)
            }
            None => Err(self.m.ud()),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Flow {
        self.written = true;
        match self.place {
            Some(place) => {
                self.m.probe_pieces(place, bytes.len(), Access::Write)?;
                self.m.write(place, bytes)
            }
            None => Err(self.m.ud()),
        }
    }

    fn set_ax(&mut self, value: u16) {
        self.m.cpu.set::<u16>(RAX, value.into());
    }

    fn set_compare_flags(&mut self, zf: bool, pf: bool, cf: bool) {
        let status = bits::of(zf, bits::ZF) | bits::of(pf, bits::PF) | bits::of(cf, bits::CF);
        self.m.cpu.flags.replace_status(bits::STATUS, status);
    }

    fn flags(&self) -> u64 {
        self.m.cpu.flags.get()
    }
}

/// The shortest environment.
const ENVIRONMENT: usize = 14;

impl Machine<'_> {
    /// AMD's processors look at the last byte of an environment when they have looked at the first: it is the one that
    /// a fault names.
    fn probe_pieces(&mut self, place: Place, bytes: usize, access: Access) -> Flow {
        if bytes == 10 && place.va & !PAGE_MASK > PAGE - 10 {
            // The significand comes first.
            self.require_aligned(place, bytes)?;
            self.probe_piece(place, 8, access)?;
        }
        if bytes >= ENVIRONMENT {
            let word = if matches!(bytes, 28 | 108) { 4 } else { 2 };
            self.require_canonical(place.plus(word - 1))?;
            self.require_aligned(place, bytes)?;
            self.translate(place, access)?;
            self.translate(place.plus(bytes as u64 - 1), access)?;
        }
        Ok(())
    }

    /// #MF if an unmasked x87 exception is pending. Without CR0.NE hardware would tell the PIC; that line has nobody
    /// at its end here, so it is #MF as well.
    pub(crate) fn check_x87_pending(&mut self) -> Flow {
        if self.cpu.x87.is_pending() { Err(self.raise(Exception::new(vector::MF))) } else { Ok(()) }
    }
}

fn run(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    if m.cpu.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(m.raise(Exception::new(vector::NM)));
    }
    if waits(&instruction) {
        // Before the operand is looked for.
        m.check_x87_pending()?;
    }
    let bytes = operand_bytes(&instruction, 0);
    let has_memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == iced_x86::OpKind::Memory);
    let place = if has_memory { Some(m.place(op, bytes, stores(&instruction))?) } else { None };
    let context = X87Context {
        instruction_pointer: m.cpu.r(BLOCK).wrapping_add(u64::from(op.start)) & m.mode.ip_mask,
        code_selector: m.cpu.cs().selector,
        data_pointer: if has_memory { m.effective_address(op) } else { 0 },
        data_selector: m.cpu.segment(op.segment()).selector,
        opcode: u16::from(op.a) << 8 | u16::from(op.b),
        real_mode: !m.cpu.protected() || m.cpu.virtual_8086(),
    };
    let mut state = m.cpu.x87;
    let mut operands = Operands { m, place, written: false };
    let result = execute(&mut state, &instruction, &context, &mut operands);
    let written = operands.written;
    match result {
        Ok(()) => {
            // Where an unmasked exception keeps the result from being stored, that it could be stored matters all the same.
            if let Some(place) = place.filter(|_| stores(&instruction) && !written) {
                m.require_aligned(place, bytes)?;
                m.probe_write(place, bytes as u64)?;
            }
            m.cpu.x87 = state;
            Ok(())
        }
        Err(X87Stop::Machine(leave)) => Err(leave),
        Err(X87Stop::Pending) => Err(m.raise(Exception::new(vector::MF))),
        Err(X87Stop::Invalid) => Err(m.ud()),
    }
}

/// Whether the operand in memory is written.
fn stores(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Fst
            | M::Fstp
            | M::Fist
            | M::Fistp
            | M::Fisttp
            | M::Fbstp
            | M::Fnstcw
            | M::Fnstsw
            | M::Fnstenv
            | M::Fnsave
    )
}

/// Notes what the opcode register gets of an instruction with these bytes: the low three bits of the first opcode byte in
/// `a`, the second byte in `b`. No prefix looks like an escape.
pub(super) fn note_opcode(instruction: &Instruction, bytes: &[u8], op: &mut Op) {
    let escape = bytes.iter().position(|byte| matches!(byte, 0xd8..=0xdf));
    if let Some([escape, second, ..]) = escape.and_then(|at| bytes.get(at..))
        && is_escape(instruction)
    {
        (op.a, op.b) = (escape & 7, *second);
    }
}

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    let is_x87 = is_escape(instruction);
    is_x87.then_some((run as Handler, false))
}

/// Whether the opcode is one of D8 to DF.
fn is_escape(instruction: &Instruction) -> bool {
    use iced_x86::CpuidFeature as F;
    let features = instruction.cpuid_features();
    features.iter().any(|feature| matches!(feature, F::FPU | F::FPU287 | F::FPU387))
        || instruction.mnemonic() == Mnemonic::Fisttp
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use crate::translate::core::Reason;
    use crate::translate::cpu::RAX;
    use crate::translate::ops::misc::bench::{Bench, HOLE};

    #[test]
    fn opcode_is_found_behind_prefixes() {
        for (bytes, opcode) in [(&[0xd9, 0xe8][..], 0x1e8), (&[0x65, 0x41, 0xdc, 0x4d, 0x10], 0x44d)] {
            let mut bench = Bench::new(64);
            let instruction = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
            let op = crate::translate::ops::lower(&mut bench.core, &instruction, bytes, 0, 64).op;
            assert_eq!(u16::from(op.a) << 8 | u16::from(op.b), opcode, "{instruction}");
        }
    }

    /// With this control word and an empty stack.
    fn with_control(control: u16) -> Bench {
        let mut bench = Bench::new(64);
        bench.core.cpu.x87.set_control(control);
        bench
    }

    const C0_C2_C3: u16 = 0x4500;
    const C1: u16 = 0x200;

    #[test]
    fn comparison_has_a_result_where_it_does_not_complete() {
        // FCOMPP of an empty stack, the invalid exception unmasked: nothing is popped.
        let mut bench = with_control(0x37e);
        bench.run(&[0xde, 0xd9]).unwrap();
        assert_eq!(bench.core.cpu.x87.status(), 0x8080 | C0_C2_C3 | 0x41);
        // FUCOMI: ZF, PF and CF.
        let mut bench = with_control(0x37e);
        bench.run(&[0xdb, 0xe9]).unwrap();
        assert_eq!(bench.core.cpu.flags.get() & 0x8d5, 0x45);
    }

    #[test]
    fn c1_is_as_it_was_after_a_comparison_into_flags_and_clear_after_ffree() {
        let mut bench = with_control(0x37f);
        // FLDZ, FLDZ, FCOMI.
        for code in [[0xd9, 0xee], [0xd9, 0xee]] {
            bench.run(&code).unwrap();
        }
        let status = bench.core.cpu.x87.status() | C1;
        bench.core.cpu.x87.set_status(status);
        bench.run(&[0xdb, 0xf1]).unwrap();
        assert_eq!(bench.core.cpu.x87.status(), status);
        // FFREE ST(1).
        bench.run(&[0xdd, 0xc1]).unwrap();
        assert_eq!(bench.core.cpu.x87.status(), status & !C1);
    }

    #[test]
    fn store_that_an_exception_prevents_faults_all_the_same() {
        // FSTP dword, FISTP word and FBSTP from an empty stack.
        for code in [[0xd9, 0x18], [0xdf, 0x18], [0xdf, 0x30]] {
            let mut bench = with_control(0x37e);
            bench.set(&[(RAX, HOLE)]);
            let Err(Reason::Exception(exception)) = bench.run(&code) else { panic!("{code:x?} completed") };
            assert_eq!(exception.cr2, Some(HOLE), "{code:x?}");
            assert_eq!(bench.core.cpu.x87.status(), 0, "{code:x?}");
        }
    }

    #[test]
    fn pending_exception_comes_before_a_bad_operand() {
        let mut bench = with_control(0x37e);
        bench.core.cpu.x87.set_status(1);
        // FLD dword [RAX], and FNSTSW word [RAX], which does not wait.
        bench.set(&[(RAX, 1 << 63)]);
        for (code, vector) in [([0xd9, 0x00], 16), ([0xdd, 0x38], 13)] {
            let Err(Reason::Exception(exception)) = bench.run(&code) else { panic!("{code:x?} completed") };
            assert_eq!(exception.vector, vector, "{code:x?}");
        }
    }
}

//! Translates one instruction that goes on with the next.
//!
//! Most keep their form: the guest's registers become those that hold them, a memory operand becomes the host address
//! that the lookup has left in RAX.

use iced_x86::{
    Code, ConditionCode, EncodingKind, FlowControl, Instruction, Mnemonic, OpAccess, OpKind, Register,
};

use super::access::use_host_place;
use super::builder::{Builder, Flags, NOT_EQUAL, SCRATCH, slot, state};
use super::effect::{Effect, accesses_memory, effect, is_prefetch, reads_status};
use super::emit::{RAX, RCX, RDX, Rm};
use super::host::host_has;
use super::registers::{GUEST_RAX, GUEST_RCX, GUEST_RSP, Home, home, is_high_byte, number, with_width};
use super::special::has_high_byte;

/// The instruction is not translated; the interpreter executes it.
pub(super) struct Untranslated;

pub(super) type Outcome = Result<(), Untranslated>;

impl Builder<'_> {
    /// Translates `instruction`; whether it ends the block.
    pub(super) fn instruction(&mut self, instruction: &Instruction) -> bool {
        if let Some(ended) = self.branch(instruction) {
            return ended;
        }
        let mark = self.mark();
        if self.plain(instruction).is_err() {
            self.back_to(mark);
            self.interpret();
        }
        false
    }

    fn plain(&mut self, instruction: &Instruction) -> Outcome {
        use Mnemonic as M;
        match instruction.mnemonic() {
            M::Nop | M::Endbr64 => Ok(()),
            _ if is_prefetch(instruction) => Ok(()),
            M::Push => self.push(instruction),
            M::Pop => self.pop(instruction),
            M::Leave => self.leave_frame(instruction),
            M::Lea => self.lea(instruction),
            M::Mul | M::Div => self.multiply_or_divide(instruction),
            M::Idiv => self.divide_signed(instruction),
            M::Imul if instruction.op_count() == 1 => self.multiply_or_divide(instruction),
            M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo => self.sign_extend(instruction),
            M::Cmpxchg => self.compare_exchange(instruction),
            M::Cmpxchg8b | M::Cmpxchg16b => self.compare_exchange_pair(instruction),
            M::Pushfq | M::Popfq | M::Cli | M::Sti | M::Swapgs | M::Rdtsc | M::Rdtscp | M::Pause => {
                self.system(instruction)
            }
            M::Mov if is_selector(instruction) => self.read_selector(instruction),
            _ if instruction.is_string_instruction() => self.string(instruction),
            M::Bt | M::Bts | M::Btr | M::Btc if is_bit_string(instruction) => self.bit_string(instruction),
            M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr
                if is_by_cl(instruction) =>
            {
                self.shift_by_cl(instruction)
            }
            _ if has_high_byte(instruction) && is_general(instruction) => self.high_byte(instruction),
            _ if is_general(instruction) || self.is_vector(instruction) => self.general(instruction),
            _ => Err(Untranslated),
        }
    }

    /// The linear address of the memory operand, in RAX. RCX changes, and the processor's flags with an operand in FS or GS.
    pub(super) fn address(&mut self, instruction: &Instruction) -> Outcome {
        self.address_in(instruction, RAX)
    }

    /// The same in host register `to`.
    fn address_in(&mut self, instruction: &Instruction, to: u8) -> Outcome {
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let displacement = instruction.memory_displacement64();
        let segment = match instruction.memory_segment() {
            Register::FS => Some(state!(fs_base)),
            Register::GS => Some(state!(gs_base)),
            _ => None,
        };
        if matches!(base, Register::RIP | Register::EIP) || base == Register::None && index == Register::None
        {
            self.e.constant(to, displacement);
        } else {
            let wide =
                [base, index].iter().all(|register| *register == Register::None || register.is_gpr64());
            if !wide && [base, index].iter().any(|r| *r != Register::None && !r.is_gpr32()) {
                return Err(Untranslated);
            }
            #[allow(clippy::cast_possible_truncation, reason = "of such an operand 32 bits are encoded")]
            let disp = displacement.cast_signed() as i32;
            let base = (base != Register::None).then(|| self.in_host(number(base), RAX));
            let index = (index != Register::None).then(|| self.in_host(number(index), RCX));
            let scale =
                crate::translate::segment::low8(instruction.memory_index_scale().trailing_zeros().into());
            let rm = match (base, index) {
                (Some(base), Some(index)) => Rm::Indexed(base, index, scale, disp),
                (None, Some(index)) => Rm::Scaled(index, scale, disp),
                (Some(base), None) => Rm::At(base, disp),
                (None, None) => return Err(Untranslated),
            };
            self.e.op(wide, &[0x8d], to, rm);
        }
        if let Some(segment) = segment {
            if base != Register::None || index != Register::None {
                // The offset alone must be canonical on AMD's processors.
                self.e.mov(RCX, to);
                self.e.op(true, &[0xc1], 4, Rm::Reg(RCX));
                self.e.bytes(&[16]);
                self.e.op(true, &[0xc1], 7, Rm::Reg(RCX));
                self.e.bytes(&[16]);
                self.e.op(true, &[0x3b], RCX, Rm::Reg(to));
                self.interpret_if(NOT_EQUAL);
            }
            self.e.load(RCX, Rm::Frame(segment));
            self.e.lea(to, Rm::Indexed(to, RCX, 0, 0));
        }
        Ok(())
    }

    /// The host register with the guest's register of that number, which is loaded into `temporary` if it is in the frame.
    pub(super) fn in_host(&mut self, register: u8, temporary: u8) -> u8 {
        match home(register) {
            Home::Host(host) => host,
            Home::Frame => {
                self.e.load(temporary, slot(register));
                temporary
            }
        }
    }

    /// Whether the guest's flags have to be in the processor when the host executes `instruction`.
    pub(super) fn uses_flags(&self, instruction: &Instruction) -> bool {
        effect(instruction) == Effect::Reads && (reads_status(instruction) || !self.flags_dead)
    }

    /// An instruction of explicit operands: registers, one in memory, immediates.
    fn general(&mut self, instruction: &Instruction) -> Outcome {
        let in_memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
        let reads_flags = self.uses_flags(instruction);
        let mut place = Rm::Reg(RAX);
        if in_memory {
            let bytes = instruction.memory_size().size();
            if !matches!(bytes, 1 | 2 | 4 | 8 | 16) {
                return Err(Untranslated);
            }
            if reads_flags && self.mode.window {
                self.need_flags();
            }
            place = self.operand_at(instruction, bytes, writes_memory(instruction))?;
            if reads_flags && self.flags == Flags::Saved {
                self.e.mov(RCX, RAX);
                place = Rm::At(RCX, 0);
            }
            let needs_register = (0..instruction.op_count()).any(|n| {
                let register = instruction.op_register(n);
                instruction.op_kind(n) == OpKind::Register
                    && register.is_gpr()
                    && home(number(register)) == Home::Frame
            });
            if needs_register && let Rm::Indexed(RAX, ..) = place {
                self.e.lea(RAX, place);
                place = Rm::At(RAX, 0);
            }
        }
        if reads_flags {
            self.need_flags();
        }
        // Of the two registers that translated code has to itself, those that are free.
        let mut free = match place {
            Rm::At(RCX, _) => [Some(RAX), None],
            Rm::At(..) => [Some(RCX), None],
            Rm::Indexed(RAX, ..) => [None, None],
            Rm::Indexed(..) => [Some(RAX), None],
            _ => [Some(RCX), Some(RAX)],
        };
        let mut rewritten = *instruction;
        rewritten.set_code(without_accumulator(instruction.code()));
        let mut moved: [Option<(u8, u8)>; 2] = [None; 2];
        let on_stack = if in_memory { None } else { self.take_from_stack(&mut rewritten) };
        for n in 0..instruction.op_count() {
            if instruction.op_kind(n) != OpKind::Register || on_stack == Some(n) {
                continue;
            }
            let register = instruction.op_register(n);
            if register.is_xmm() {
                continue;
            }
            if !register.is_gpr() || is_high_byte(register) {
                return Err(Untranslated);
            }
            let guest = number(register);
            let host = match home(guest) {
                Home::Host(host) => host,
                Home::Frame => match moved.iter().flatten().find(|(from, _)| *from == guest) {
                    Some((_, host)) => *host,
                    None => {
                        let place = moved.iter_mut().zip(&mut free).find(|(_, free)| free.is_some());
                        let Some((place, free)) = place else { return Err(Untranslated) };
                        let Some(host) = free.take() else { return Err(Untranslated) };
                        *place = Some((guest, host));
                        host
                    }
                },
            };
            if host != guest {
                rewritten.set_op_register(n, with_width(host, register));
            }
        }
        let (mut written, mut read) = ([false; 2], [false; 2]);
        if moved.iter().any(Option::is_some) {
            let info = self.info.info(instruction);
            for used in info.used_registers() {
                let access = used.access();
                let is_write = matches!(
                    access,
                    OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
                );
                // What is not wholly overwritten stays in part.
                let is_read = access != OpAccess::Write || used.register().size() < 4;
                for ((moved, written), read) in moved.iter().zip(&mut written).zip(&mut read) {
                    if let Some((guest, _)) = moved
                        && used.register().is_gpr()
                        && number(used.register()) == *guest
                    {
                        *written |= is_write;
                        *read |= is_read;
                    }
                }
            }
            for ((guest, host), _) in moved.iter().flatten().zip(read).filter(|(_, read)| *read) {
                self.e.load(*host, slot(*guest));
            }
        }
        if in_memory {
            use_host_place(&mut rewritten, place);
        }
        self.encode(&rewritten)?;
        self.note_flags(instruction);
        for (moved, written) in moved.iter().zip(written) {
            if let (Some((guest, host)), true) = (moved, written) {
                self.e.store(slot(*guest), *host);
            }
        }
        Ok(())
    }

    /// Lets an instruction of registers find one operand at its place on the stack, if it has such a form; which operand.
    fn take_from_stack(&self, instruction: &mut Instruction) -> Option<u32> {
        let in_frame = |n: u32| {
            let register = instruction.op_register(n);
            instruction.op_kind(n) == OpKind::Register
                && register.is_gpr()
                && !is_high_byte(register)
                && home(number(register)) == Home::Frame
        };
        let registers = (0..instruction.op_count()).filter(|n| instruction.op_kind(*n) == OpKind::Register);
        let is_one = registers.clone().count() == 2
            && number(instruction.op0_register()) == number(instruction.op1_register());
        let (n, code) = if in_frame(0) && !is_one {
            (0, with_destination_in_memory(instruction.code()))
        } else if instruction.op_count() == 2
            && in_frame(1)
            && !is_one
            && !is_high_byte(instruction.op0_register())
        {
            (1, with_source_in_memory(instruction.code()))
        } else {
            return None;
        };
        let code = code?;
        let Rm::At(_, place) = slot(number(instruction.op_register(n))) else { return None };
        instruction.set_code(code);
        instruction.set_op_kind(n, OpKind::Memory);
        // Prefixes that meant nothing.
        instruction.set_segment_prefix(Register::None);
        instruction.set_has_rep_prefix(false);
        instruction.set_has_repne_prefix(false);
        instruction.set_memory_base(Register::RSP);
        instruction.set_memory_index(Register::None);
        instruction.set_memory_displacement64(i64::from(place).cast_unsigned());
        instruction.set_memory_displ_size(u32::from(place != 0));
        Some(n)
    }

    /// Appends an instruction as the encoder has it.
    pub(super) fn encode(&mut self, instruction: &Instruction) -> Outcome {
        self.encoder.set_buffer(std::mem::take(&mut self.e.bytes));
        let result = self.encoder.encode(instruction, 0);
        self.e.bytes = self.encoder.take_buffer();
        result.map(drop).map_err(|_| Untranslated)
    }

    fn lea(&mut self, instruction: &Instruction) -> Outcome {
        let to = instruction.op0_register();
        if to.size() < 4 || instruction.memory_base() == Register::EIP {
            return Err(Untranslated);
        }
        // Segments have no part in it.
        let mut plain = *instruction;
        plain.set_segment_prefix(Register::None);
        let host = match home(number(to)) {
            Home::Host(host) => host,
            Home::Frame => RAX,
        };
        self.address_in(&plain, host)?;
        if to.size() == 4 {
            // MOV of the low half to itself
            self.e.op(false, &[0x8b], host, Rm::Reg(host));
        }
        if home(number(to)) == Home::Frame {
            self.e.store(slot(number(to)), RAX);
        }
        Ok(())
    }

    fn push(&mut self, instruction: &Instruction) -> Outcome {
        let value = match instruction.op0_kind() {
            OpKind::Register if instruction.op0_register().is_gpr64() => None,
            OpKind::Immediate8to64 | OpKind::Immediate32to64 => Some(instruction.immediate(0).cast_signed()),
            OpKind::Memory if instruction.memory_size().size() == 8 => {
                let from = self.operand_at(instruction, 8, false)?;
                self.e.load(RCX, from);
                self.e.store(SCRATCH[0], RCX);
                let to = self.stack_at(-8, true);
                let value = if let Rm::At(..) = to { RCX } else { RAX };
                self.e.load(value, SCRATCH[0]);
                self.e.store(to, value);
                self.move_stack(-8);
                return Ok(());
            }
            _ => return Err(Untranslated),
        };
        let value = value.map(i32::try_from);
        if let Some(Err(_)) = value {
            return Err(Untranslated);
        }
        let to = self.stack_at(-8, true);
        match value {
            Some(value) => {
                self.e.op(true, &[0xc7], 0, to);
                self.e.imm32(value.unwrap_or_default());
            }
            None => {
                let free = if let Rm::At(..) = to { RCX } else { RAX };
                let from = self.in_host(number(instruction.op0_register()), free);
                self.e.store(to, from);
            }
        }
        self.move_stack(-8);
        Ok(())
    }

    /// Moves the stack pointer. No flag changes.
    pub(super) fn move_stack(&mut self, bytes: i32) {
        self.e.lea(GUEST_RSP, Rm::At(GUEST_RSP, bytes));
    }

    fn pop(&mut self, instruction: &Instruction) -> Outcome {
        let register = instruction.op0_register();
        if instruction.op0_kind() != OpKind::Register || !register.is_gpr64() {
            return Err(Untranslated);
        }
        let from = self.stack_at(0, false);
        match home(number(register)) {
            Home::Host(GUEST_RSP) => {
                self.e.load(GUEST_RSP, from);
                return Ok(());
            }
            Home::Host(host) => self.e.load(host, from),
            Home::Frame => {
                self.e.load(RCX, from);
                self.e.store(slot(number(register)), RCX);
            }
        }
        self.move_stack(8);
        Ok(())
    }

    fn leave_frame(&mut self, instruction: &Instruction) -> Outcome {
        const RBP: u8 = 5;
        if instruction.code() != iced_x86::Code::Leaveq {
            return Err(Untranslated);
        }
        let from = if self.mode.window {
            self.in_window(RBP, 0)
        } else {
            self.clobber_flags();
            self.e.mov(RAX, RBP);
            self.lookup(8, false, false);
            Rm::At(RAX, 0)
        };
        self.e.load(RCX, from);
        self.e.lea(GUEST_RSP, Rm::At(RBP, 8));
        self.e.mov(RBP, RCX);
        Ok(())
    }

    /// The one explicit operand, zero-extended or not, in RCX.
    fn source(&mut self, instruction: &Instruction, bytes: usize) -> Outcome {
        match instruction.op0_kind() {
            OpKind::Memory => {
                let from = self.operand_at(instruction, bytes, false)?;
                self.e.op(bytes == 8, &[0x8b], RCX, from);
            }
            _ => {
                let register = instruction.op0_register();
                let from = self.in_host(number(register), RCX);
                if from != RCX {
                    self.e.op(bytes == 8, &[0x8b], RCX, Rm::Reg(from));
                }
            }
        }
        Ok(())
    }

    fn operand_bytes(instruction: &Instruction) -> Result<usize, Untranslated> {
        let bytes = match instruction.op0_kind() {
            OpKind::Register => instruction.op0_register().size(),
            OpKind::Memory => instruction.memory_size().size(),
            _ => 0,
        };
        if matches!(bytes, 4 | 8) { Ok(bytes) } else { Err(Untranslated) }
    }

    /// MUL, IMUL and DIV with the accumulator.
    fn multiply_or_divide(&mut self, instruction: &Instruction) -> Outcome {
        let bytes = Self::operand_bytes(instruction)?;
        let wide = bytes == 8;
        let extension = match instruction.mnemonic() {
            Mnemonic::Mul => 4,
            Mnemonic::Imul => 5,
            _ => 6,
        };
        let divides = extension == 6;
        if divides {
            self.clobber_flags();
        }
        self.source(instruction, bytes)?;
        if divides {
            // The quotient fits if the upper half is below the divisor, which then is not zero either.
            self.e.op(wide, &[0x3b], RDX, Rm::Reg(RCX));
            self.interpret_if(NOT_BELOW);
        }
        self.need_flags();
        self.e.mov(RAX, GUEST_RAX);
        self.e.op(wide, &[0xf7], extension, Rm::Reg(RCX));
        self.e.mov(GUEST_RAX, RAX);
        self.flags = Flags::Live;
        Ok(())
    }

    /// IDIV of a sign-extended dividend, by anything but 0 and -1.
    fn divide_signed(&mut self, instruction: &Instruction) -> Outcome {
        let bytes = Self::operand_bytes(instruction)?;
        let wide = bytes == 8;
        self.clobber_flags();
        self.source(instruction, bytes)?;
        self.e.op(wide, &[0x8b], RAX, Rm::Reg(GUEST_RAX));
        // SAR by all bits but one
        self.e.op(wide, &[0xc1], 7, Rm::Reg(RAX));
        self.e.bytes(&[if wide { 63 } else { 31 }]);
        self.e.op(wide, &[0x3b], RAX, Rm::Reg(RDX));
        self.interpret_if(NOT_EQUAL);
        self.e.op(wide, &[0x8d], RAX, Rm::At(RCX, 1));
        self.e.group1(wide, 7, Rm::Reg(RAX), 1);
        self.interpret_if(BELOW_OR_EQUAL);
        self.need_flags();
        self.e.mov(RAX, GUEST_RAX);
        self.e.op(wide, &[0xf7], 7, Rm::Reg(RCX));
        self.e.mov(GUEST_RAX, RAX);
        self.flags = Flags::Live;
        Ok(())
    }

    /// CBW to CQO.
    fn sign_extend(&mut self, instruction: &Instruction) -> Outcome {
        let code: &[u8] = match instruction.mnemonic() {
            Mnemonic::Cbw => &[0x66, 0x98],
            Mnemonic::Cwde => &[0x98],
            Mnemonic::Cdqe => &[0x48, 0x98],
            Mnemonic::Cwd => &[0x66, 0x99],
            Mnemonic::Cdq => &[0x99],
            _ => &[0x48, 0x99],
        };
        self.e.mov(RAX, GUEST_RAX);
        self.e.bytes(code);
        if matches!(instruction.mnemonic(), Mnemonic::Cbw | Mnemonic::Cwde | Mnemonic::Cdqe) {
            self.e.mov(GUEST_RAX, RAX);
        }
        Ok(())
    }

    fn compare_exchange(&mut self, instruction: &Instruction) -> Outcome {
        let register = instruction.op1_register();
        if instruction.op0_kind() != OpKind::Memory || is_high_byte(register) {
            return Err(Untranslated);
        }
        let bytes = instruction.memory_size().size();
        self.operand(instruction, bytes, true)?;
        // The address goes where no register has to be loaded afterwards.
        let guest = number(register);
        let mut rewritten = *instruction;
        match home(guest) {
            Home::Host(host) => {
                self.e.mov(RCX, RAX);
                rewritten.set_op1_register(with_width(host, register));
                use_host_address(&mut rewritten, RCX);
                self.e.mov(RAX, GUEST_RAX);
                self.encode(&rewritten)?;
            }
            Home::Frame => {
                // RDX lends itself.
                self.e.store(SCRATCH[0], RDX);
                self.e.mov(RDX, RAX);
                self.e.load(RCX, slot(guest));
                rewritten.set_op1_register(with_width(RCX, register));
                use_host_address(&mut rewritten, RDX);
                self.e.mov(RAX, GUEST_RAX);
                self.encode(&rewritten)?;
                self.e.load(RDX, SCRATCH[0]);
            }
        }
        self.e.mov(GUEST_RAX, RAX);
        self.flags = Flags::Live;
        Ok(())
    }

    /// An instruction of vectors that this host has.
    fn is_vector(&self, instruction: &Instruction) -> bool {
        use Mnemonic as M;
        let operands_fit = (0..instruction.op_count()).all(|n| {
            instruction.op_kind(n) != OpKind::Register
                || instruction.op_register(n).is_xmm()
                || instruction.op_register(n).is_gpr()
        });
        self.mode.sse
            && instruction.encoding() == EncodingKind::Legacy
            && operands_fit
            && (0..instruction.op_count())
                .any(|n| instruction.op_kind(n) == OpKind::Register && instruction.op_register(n).is_xmm())
            && !matches!(
                instruction.mnemonic(),
                // These have operands that are not written.
                M::Maskmovdqu
                    | M::Pcmpestri
                    | M::Pcmpestri64
                    | M::Pcmpestrm
                    | M::Pcmpestrm64
                    | M::Pcmpistri
                    | M::Pcmpistrm
            )
            && instruction.cpuid_features().iter().all(|feature| host_has(*feature))
    }
}

/// What the code was like before an instruction.
pub(super) struct Mark {
    len: usize,
    flags: Flags,
    sites: usize,
}

impl Builder<'_> {
    pub(super) fn mark(&self) -> Mark {
        Mark { len: self.e.len(), flags: self.flags, sites: self.site_count() }
    }

    pub(super) fn back_to(&mut self, mark: Mark) {
        self.e.bytes.truncate(mark.len);
        self.flags = mark.flags;
        self.forget_sites(mark.sites);
    }
}

/// Condition codes of Jcc.
const NOT_BELOW: u8 = 3;
const BELOW_OR_EQUAL: u8 = 6;

/// The form of an instruction with a register destination that may be in memory instead: of 64 bits, since others change the
/// rest of the register, or of what is only read.
fn with_destination_in_memory(code: Code) -> Option<Code> {
    use Code as C;
    Some(match code {
        C::Add_r64_rm64 => C::Add_rm64_r64,
        C::Or_r64_rm64 => C::Or_rm64_r64,
        C::Adc_r64_rm64 => C::Adc_rm64_r64,
        C::Sbb_r64_rm64 => C::Sbb_rm64_r64,
        C::And_r64_rm64 => C::And_rm64_r64,
        C::Sub_r64_rm64 => C::Sub_rm64_r64,
        C::Xor_r64_rm64 => C::Xor_rm64_r64,
        C::Mov_r64_rm64 => C::Mov_rm64_r64,
        C::Cmp_r64_rm64 => C::Cmp_rm64_r64,
        C::Cmp_r32_rm32 => C::Cmp_rm32_r32,
        C::Cmp_r8_rm8 => C::Cmp_rm8_r8,
        C::Add_rm64_r64
        | C::Or_rm64_r64
        | C::Adc_rm64_r64
        | C::Sbb_rm64_r64
        | C::And_rm64_r64
        | C::Sub_rm64_r64
        | C::Xor_rm64_r64
        | C::Mov_rm64_r64
        | C::Mov_rm64_imm32
        | C::Add_rm64_imm8
        | C::Or_rm64_imm8
        | C::Adc_rm64_imm8
        | C::Sbb_rm64_imm8
        | C::And_rm64_imm8
        | C::Sub_rm64_imm8
        | C::Xor_rm64_imm8
        | C::Add_rm64_imm32
        | C::Or_rm64_imm32
        | C::Adc_rm64_imm32
        | C::Sbb_rm64_imm32
        | C::And_rm64_imm32
        | C::Sub_rm64_imm32
        | C::Xor_rm64_imm32
        | C::Shl_rm64_imm8
        | C::Shr_rm64_imm8
        | C::Sar_rm64_imm8
        | C::Rol_rm64_imm8
        | C::Ror_rm64_imm8
        | C::Shl_rm64_1
        | C::Shr_rm64_1
        | C::Sar_rm64_1
        | C::Inc_rm64
        | C::Dec_rm64
        | C::Neg_rm64
        | C::Not_rm64
        | C::Cmp_rm64_r64
        | C::Cmp_rm32_r32
        | C::Cmp_rm8_r8
        | C::Cmp_rm64_imm8
        | C::Cmp_rm32_imm8
        | C::Cmp_rm8_imm8
        | C::Cmp_rm64_imm32
        | C::Cmp_rm32_imm32
        | C::Test_rm64_r64
        | C::Test_rm32_r32
        | C::Test_rm8_r8
        | C::Test_rm64_imm32
        | C::Test_rm32_imm32
        | C::Test_rm8_imm8 => code,
        _ => return None,
    })
}

/// The form of an instruction of two registers whose second operand may be in memory.
fn with_source_in_memory(code: Code) -> Option<Code> {
    use Code as C;
    Some(match code {
        C::Add_rm32_r32 => C::Add_r32_rm32,
        C::Add_rm64_r64 => C::Add_r64_rm64,
        C::Or_rm32_r32 => C::Or_r32_rm32,
        C::Or_rm64_r64 => C::Or_r64_rm64,
        C::Adc_rm32_r32 => C::Adc_r32_rm32,
        C::Adc_rm64_r64 => C::Adc_r64_rm64,
        C::Sbb_rm32_r32 => C::Sbb_r32_rm32,
        C::Sbb_rm64_r64 => C::Sbb_r64_rm64,
        C::And_rm32_r32 => C::And_r32_rm32,
        C::And_rm64_r64 => C::And_r64_rm64,
        C::Sub_rm32_r32 => C::Sub_r32_rm32,
        C::Sub_rm64_r64 => C::Sub_r64_rm64,
        C::Xor_rm32_r32 => C::Xor_r32_rm32,
        C::Xor_rm64_r64 => C::Xor_r64_rm64,
        C::Cmp_rm8_r8 => C::Cmp_r8_rm8,
        C::Cmp_rm32_r32 => C::Cmp_r32_rm32,
        C::Cmp_rm64_r64 => C::Cmp_r64_rm64,
        C::Mov_rm32_r32 => C::Mov_r32_rm32,
        C::Mov_rm64_r64 => C::Mov_r64_rm64,
        C::Add_r32_rm32
        | C::Add_r64_rm64
        | C::Or_r32_rm32
        | C::Or_r64_rm64
        | C::Adc_r32_rm32
        | C::Adc_r64_rm64
        | C::Sbb_r32_rm32
        | C::Sbb_r64_rm64
        | C::And_r32_rm32
        | C::And_r64_rm64
        | C::Sub_r32_rm32
        | C::Sub_r64_rm64
        | C::Xor_r32_rm32
        | C::Xor_r64_rm64
        | C::Cmp_r8_rm8
        | C::Cmp_r32_rm32
        | C::Cmp_r64_rm64
        | C::Mov_r32_rm32
        | C::Mov_r64_rm64
        | C::Imul_r32_rm32
        | C::Imul_r64_rm64
        | C::Movzx_r32_rm8
        | C::Movzx_r64_rm8
        | C::Movzx_r32_rm16
        | C::Movzx_r64_rm16
        | C::Movsx_r32_rm8
        | C::Movsx_r64_rm8
        | C::Movsx_r32_rm16
        | C::Movsx_r64_rm16
        | C::Movsxd_r64_rm32 => code,
        _ => return None,
    })
}

/// The form of an instruction that can have another register where `code` has the accumulator.
fn without_accumulator(code: Code) -> Code {
    use Code as C;
    match code {
        C::Add_AL_imm8 => C::Add_rm8_imm8,
        C::Add_AX_imm16 => C::Add_rm16_imm16,
        C::Add_EAX_imm32 => C::Add_rm32_imm32,
        C::Add_RAX_imm32 => C::Add_rm64_imm32,
        C::Or_AL_imm8 => C::Or_rm8_imm8,
        C::Or_AX_imm16 => C::Or_rm16_imm16,
        C::Or_EAX_imm32 => C::Or_rm32_imm32,
        C::Or_RAX_imm32 => C::Or_rm64_imm32,
        C::Adc_AL_imm8 => C::Adc_rm8_imm8,
        C::Adc_AX_imm16 => C::Adc_rm16_imm16,
        C::Adc_EAX_imm32 => C::Adc_rm32_imm32,
        C::Adc_RAX_imm32 => C::Adc_rm64_imm32,
        C::Sbb_AL_imm8 => C::Sbb_rm8_imm8,
        C::Sbb_AX_imm16 => C::Sbb_rm16_imm16,
        C::Sbb_EAX_imm32 => C::Sbb_rm32_imm32,
        C::Sbb_RAX_imm32 => C::Sbb_rm64_imm32,
        C::And_AL_imm8 => C::And_rm8_imm8,
        C::And_AX_imm16 => C::And_rm16_imm16,
        C::And_EAX_imm32 => C::And_rm32_imm32,
        C::And_RAX_imm32 => C::And_rm64_imm32,
        C::Sub_AL_imm8 => C::Sub_rm8_imm8,
        C::Sub_AX_imm16 => C::Sub_rm16_imm16,
        C::Sub_EAX_imm32 => C::Sub_rm32_imm32,
        C::Sub_RAX_imm32 => C::Sub_rm64_imm32,
        C::Xor_AL_imm8 => C::Xor_rm8_imm8,
        C::Xor_AX_imm16 => C::Xor_rm16_imm16,
        C::Xor_EAX_imm32 => C::Xor_rm32_imm32,
        C::Xor_RAX_imm32 => C::Xor_rm64_imm32,
        C::Cmp_AL_imm8 => C::Cmp_rm8_imm8,
        C::Cmp_AX_imm16 => C::Cmp_rm16_imm16,
        C::Cmp_EAX_imm32 => C::Cmp_rm32_imm32,
        C::Cmp_RAX_imm32 => C::Cmp_rm64_imm32,
        C::Test_AL_imm8 => C::Test_rm8_imm8,
        C::Test_AX_imm16 => C::Test_rm16_imm16,
        C::Test_EAX_imm32 => C::Test_rm32_imm32,
        C::Test_RAX_imm32 => C::Test_rm64_imm32,
        C::Xchg_r16_AX => C::Xchg_rm16_r16,
        C::Xchg_r32_EAX => C::Xchg_rm32_r32,
        C::Xchg_r64_RAX => C::Xchg_rm64_r64,
        C::Mov_AL_moffs8 => C::Mov_r8_rm8,
        C::Mov_AX_moffs16 => C::Mov_r16_rm16,
        C::Mov_EAX_moffs32 => C::Mov_r32_rm32,
        C::Mov_RAX_moffs64 => C::Mov_r64_rm64,
        C::Mov_moffs8_AL => C::Mov_rm8_r8,
        C::Mov_moffs16_AX => C::Mov_rm16_r16,
        C::Mov_moffs32_EAX => C::Mov_rm32_r32,
        C::Mov_moffs64_RAX => C::Mov_rm64_r64,
        other => other,
    }
}

/// Replaces the memory operand by that at the host address in `register`.
pub(super) fn use_host_address(instruction: &mut Instruction, register: u8) {
    use_host_place(instruction, Rm::At(register, 0));
}

/// Whether 16 bytes in memory must be aligned (Intel SDM 2A 2.4).
pub(super) fn needs_alignment(instruction: &Instruction) -> bool {
    !matches!(
        instruction.mnemonic(),
        Mnemonic::Movups | Mnemonic::Movupd | Mnemonic::Movdqu | Mnemonic::Lddqu
    )
}

/// Whether the operand in memory is written.
pub(super) fn writes_memory(instruction: &Instruction) -> bool {
    instruction.op0_kind() == OpKind::Memory
        && !matches!(instruction.mnemonic(), Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Bt)
        || instruction.mnemonic() == Mnemonic::Xchg
}

fn is_selector(instruction: &Instruction) -> bool {
    instruction.op1_kind() == OpKind::Register && instruction.op1_register().is_segment_register()
}

/// Whether a bit instruction has its bit anywhere from the operand in memory on.
fn is_bit_string(instruction: &Instruction) -> bool {
    instruction.op0_kind() == OpKind::Memory && instruction.op1_kind() == OpKind::Register
}

/// Whether a shift or rotation is by what is in CL.
fn is_by_cl(instruction: &Instruction) -> bool {
    instruction.op_kind(instruction.op_count() - 1) == OpKind::Register
}

/// Whether translated code executes `instruction`, which accesses no memory, for certain.
pub(super) fn stays_inside(instruction: &Instruction) -> bool {
    instruction.flow_control() == FlowControl::Next
        && !has_high_byte(instruction)
        && is_general(instruction)
        && (0..instruction.op_count())
            .all(|n| instruction.op_kind(n) != OpKind::Register || instruction.op_register(n).is_gpr())
        || instruction.mnemonic() == Mnemonic::Lea
}

/// Whether it is an instruction of general registers whose operands are all written.
fn is_general(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Mov
        | M::Movzx
        | M::Movsx
        | M::Add
        | M::Or
        | M::Adc
        | M::Sbb
        | M::And
        | M::Sub
        | M::Xor
        | M::Cmp
        | M::Test
        | M::Inc
        | M::Dec
        | M::Neg
        | M::Not
        | M::Imul
        | M::Bswap
        | M::Bsf
        | M::Bsr
        | M::Xadd
        | M::Xchg
        | M::Cmc
        | M::Clc
        | M::Stc => true,
        // With 16 bits, AMD's processors read more than they say.
        M::Movsxd => instruction.op0_register().size() > 2,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd => {
            !is_by_cl(instruction)
        }
        M::Bt | M::Bts | M::Btr | M::Btc => !is_bit_string(instruction),
        M::Movbe
        | M::Popcnt
        | M::Lzcnt
        | M::Tzcnt
        | M::Crc32
        | M::Andn
        | M::Bextr
        | M::Blsi
        | M::Blsmsk
        | M::Blsr
        | M::Bzhi
        | M::Pdep
        | M::Pext
        | M::Rorx
        | M::Sarx
        | M::Shlx
        | M::Shrx
        | M::Adcx
        | M::Adox
        | M::Movnti => instruction.cpuid_features().iter().all(|feature| host_has(*feature)),
        // SETcc and CMOVcc.
        _ => instruction.condition_code() != ConditionCode::None,
    }
}

impl Builder<'_> {
    /// A shift or rotation by CL, which is the guest's RCX.
    fn shift_by_cl(&mut self, instruction: &Instruction) -> Outcome {
        if accesses_memory(instruction) || is_high_byte(instruction.op0_register()) {
            return Err(Untranslated);
        }
        if reads_status(instruction) || !self.flags_dead {
            self.need_flags();
        }
        let register = instruction.op0_register();
        let mut rewritten = *instruction;
        let host = self.in_host(number(register), RAX);
        rewritten.set_op0_register(with_width(host, register));
        self.e.mov(RCX, GUEST_RCX);
        self.encode(&rewritten)?;
        if home(number(register)) == Home::Frame {
            self.e.store(slot(number(register)), host);
        }
        self.note_flags(instruction);
        Ok(())
    }
}

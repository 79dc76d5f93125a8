//! The x87 instructions.

use std::cmp::Ordering;

use iced_x86::{Instruction, MemorySize, Mnemonic, OpKind, Register};

use super::super::float::environment::{Environment, OVERFLOW, UNDERFLOW};
use super::arithmetic::{
    Kernel, Quotient, add, compare, divide, divide_reversed, extract, multiply, range, remainder,
    round_to_integer, scale, square_root, subtract, subtract_reversed,
};
use super::f80::{F80, Operand};
use super::state::{C0, C1, C2, C3};
use super::{X87Context, X87Machine, X87State, X87Stop};

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const ZF: u64 = 1 << 6;

/// One instruction under way. The state is a copy, which becomes the real one if nothing stops the
/// instruction.
pub(super) struct Unit<'a, M> {
    pub(super) state: X87State,
    pub(super) context: &'a X87Context,
    pub(super) machine: &'a mut M,
}

pub(super) type Step<M> = Result<(), X87Stop<<M as X87Machine>::Stop>>;

/// Executes an x87 instruction (WAIT is none: see [`X87State::is_pending`]).
///
/// An unmasked exception that this instruction causes is no error: it is pending afterwards, and stops
/// the next instruction that looks.
///
/// # Errors
/// [`X87Stop`]: `state` is unchanged and nothing was written.
pub(crate) fn execute<M: X87Machine>(
    state: &mut X87State,
    instruction: &Instruction,
    context: &X87Context,
    machine: &mut M,
) -> Step<M> {
    let mut unit = Unit { state: *state, context, machine };
    match unit.control(instruction)? {
        true => {}
        false => unit.data(instruction)?,
    }
    *state = unit.state;
    Ok(())
}

/// Whether a pending exception stops an instruction.
pub(crate) fn waits(instruction: &Instruction) -> bool {
    !matches!(
        instruction.mnemonic(),
        Mnemonic::Fninit
            | Mnemonic::Fnclex
            | Mnemonic::Fnstcw
            | Mnemonic::Fnstsw
            | Mnemonic::Fnstenv
            | Mnemonic::Fnsave
            | Mnemonic::Fneni
            | Mnemonic::Fndisi
            | Mnemonic::Fnsetpm
    )
}

/// The number of a stack register.
fn stack_index(register: Register) -> u8 {
    match register {
        Register::ST1 => 1,
        Register::ST2 => 2,
        Register::ST3 => 3,
        Register::ST4 => 4,
        Register::ST5 => 5,
        Register::ST6 => 6,
        Register::ST7 => 7,
        _ => 0,
    }
}

pub(super) fn has_memory(instruction: &Instruction) -> bool {
    instruction.op0_kind() == OpKind::Memory
}

impl<M: X87Machine> Unit<'_, M> {
    /// The instructions that leave the instruction pointer register alone. Whether `instruction` was one.
    fn control(&mut self, instruction: &Instruction) -> Result<bool, X87Stop<M::Stop>> {
        if waits(instruction) && self.state.is_pending() {
            return Err(X87Stop::Pending);
        }
        match instruction.mnemonic() {
            Mnemonic::Fninit | Mnemonic::Finit => self.state.initialize(),
            Mnemonic::Fnclex | Mnemonic::Fclex => self.state.clear_exceptions(),
            Mnemonic::Fldcw => {
                let control = u16::from_le_bytes(self.read()?);
                self.state.set_control(control);
            }
            Mnemonic::Fnstcw | Mnemonic::Fstcw => self.write(&self.state.control().to_le_bytes())?,
            Mnemonic::Fnstsw | Mnemonic::Fstsw if has_memory(instruction) => {
                self.write(&self.state.status().to_le_bytes())?;
            }
            Mnemonic::Fnstsw | Mnemonic::Fstsw => self.machine.set_ax(self.state.status()),
            Mnemonic::Fnstenv | Mnemonic::Fstenv => self.store_environment(instruction)?,
            Mnemonic::Fldenv => self.load_environment(instruction)?,
            Mnemonic::Fnsave | Mnemonic::Fsave => self.save(instruction)?,
            Mnemonic::Frstor => self.restore(instruction)?,
            // No effect since the 387.
            Mnemonic::Fneni
            | Mnemonic::Feni
            | Mnemonic::Fndisi
            | Mnemonic::Fdisi
            | Mnemonic::Fnsetpm
            | Mnemonic::Fsetpm => {}
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn data(&mut self, instruction: &Instruction) -> Step<M> {
        self.compute(instruction)?;
        self.state.instruction_pointer = self.context.instruction_pointer;
        self.state.code_selector = self.context.code_selector;
        self.state.opcode = self.context.opcode & 0x7ff;
        if has_memory(instruction) {
            self.state.data_pointer = self.context.data_pointer;
            self.state.data_selector = self.context.data_selector;
        }
        Ok(())
    }

    fn compute(&mut self, instruction: &Instruction) -> Step<M> {
        match instruction.mnemonic() {
            Mnemonic::Fadd | Mnemonic::Fiadd => self.arithmetic(instruction, add, false),
            Mnemonic::Faddp => self.arithmetic(instruction, add, true),
            Mnemonic::Fsub | Mnemonic::Fisub => self.arithmetic(instruction, subtract, false),
            Mnemonic::Fsubp => self.arithmetic(instruction, subtract, true),
            Mnemonic::Fsubr | Mnemonic::Fisubr => self.arithmetic(instruction, subtract_reversed, false),
            Mnemonic::Fsubrp => self.arithmetic(instruction, subtract_reversed, true),
            Mnemonic::Fmul | Mnemonic::Fimul => self.arithmetic(instruction, multiply, false),
            Mnemonic::Fmulp => self.arithmetic(instruction, multiply, true),
            Mnemonic::Fdiv | Mnemonic::Fidiv => self.arithmetic(instruction, divide, false),
            Mnemonic::Fdivp => self.arithmetic(instruction, divide, true),
            Mnemonic::Fdivr | Mnemonic::Fidivr => self.arithmetic(instruction, divide_reversed, false),
            Mnemonic::Fdivrp => self.arithmetic(instruction, divide_reversed, true),
            Mnemonic::Fcom | Mnemonic::Ficom => self.compare(instruction, false, 0),
            Mnemonic::Fcomp | Mnemonic::Ficomp => self.compare(instruction, false, 1),
            Mnemonic::Fcompp => self.compare(instruction, false, 2),
            Mnemonic::Fucom => self.compare(instruction, true, 0),
            Mnemonic::Fucomp => self.compare(instruction, true, 1),
            Mnemonic::Fucompp => self.compare(instruction, true, 2),
            Mnemonic::Fcomi => self.compare_into_flags(instruction, false, false),
            Mnemonic::Fcomip => self.compare_into_flags(instruction, false, true),
            Mnemonic::Fucomi => self.compare_into_flags(instruction, true, false),
            Mnemonic::Fucomip => self.compare_into_flags(instruction, true, true),
            Mnemonic::Fld | Mnemonic::Fild | Mnemonic::Fbld => self.load(instruction),
            Mnemonic::Fst => self.store(instruction, false),
            // Just pops, and raises nothing, where the top is empty.
            Mnemonic::Fstpnce if self.state.is_empty(0) => {
                self.state.set_condition(C1, 0);
                self.state.pop();
                Ok(())
            }
            Mnemonic::Fstp | Mnemonic::Fstpnce => self.store(instruction, true),
            Mnemonic::Fist => self.store_integer(instruction, false, false),
            Mnemonic::Fistp => self.store_integer(instruction, false, true),
            Mnemonic::Fisttp => self.store_integer(instruction, true, true),
            Mnemonic::Fbstp => self.store_decimal(),
            mnemonic => {
                if self.stack_operation(mnemonic, instruction) || self.unary(mnemonic) {
                    Ok(())
                } else {
                    Err(X87Stop::Invalid)
                }
            }
        }
    }

    /// Instructions that move within the stack or load constants. Whether `mnemonic` is one.
    fn stack_operation(&mut self, mnemonic: Mnemonic, instruction: &Instruction) -> bool {
        let flags = self.machine.flags();
        let (zf, pf, cf) = (flags & ZF != 0, flags & PF != 0, flags & CF != 0);
        match mnemonic {
            Mnemonic::Fld1
            | Mnemonic::Fldz
            | Mnemonic::Fldpi
            | Mnemonic::Fldl2t
            | Mnemonic::Fldl2e
            | Mnemonic::Fldlg2
            | Mnemonic::Fldln2 => self.load_constant(mnemonic),
            Mnemonic::Fxch => self.exchange(stack_index(instruction.op1_register())),
            Mnemonic::Fnop => {}
            Mnemonic::Fincstp => self.turn(1),
            Mnemonic::Fdecstp => self.turn(7),
            Mnemonic::Ffree => self.free(instruction),
            Mnemonic::Ffreep => {
                self.free(instruction);
                self.state.pop();
            }
            Mnemonic::Fcmovb => self.conditional_move(instruction, cf),
            Mnemonic::Fcmove => self.conditional_move(instruction, zf),
            Mnemonic::Fcmovbe => self.conditional_move(instruction, cf || zf),
            Mnemonic::Fcmovu => self.conditional_move(instruction, pf),
            Mnemonic::Fcmovnb => self.conditional_move(instruction, !cf),
            Mnemonic::Fcmovne => self.conditional_move(instruction, !zf),
            Mnemonic::Fcmovnbe => self.conditional_move(instruction, !(cf || zf)),
            Mnemonic::Fcmovnu => self.conditional_move(instruction, !pf),
            _ => return false,
        }
        true
    }

    /// Instructions with operands on the stack that are implied. Whether `mnemonic` is one.
    fn unary(&mut self, mnemonic: Mnemonic) -> bool {
        match mnemonic {
            Mnemonic::Fabs => self.change_sign(F80::absolute),
            Mnemonic::Fchs => self.change_sign(F80::negated),
            Mnemonic::Ftst => {
                let (order, _) = self.order(Some(F80::zero(false).into()), 0, false);
                self.set_condition_codes(order);
            }
            Mnemonic::Fxam => self.examine(),
            Mnemonic::Fsqrt => {
                let range = range(self.state.control());
                self.replace_top(|a, environment| square_root(a, &range, environment));
            }
            Mnemonic::Frndint => self.replace_top(round_to_integer),
            Mnemonic::Fscale => {
                let by = self.state.st(1);
                if self.state.is_empty(1) {
                    if self.state.stack_fault(false) {
                        self.state.set_st(0, F80::INDEFINITE);
                    }
                } else {
                    self.replace_top(|a, environment| scale(a, by.into(), environment));
                }
            }
            Mnemonic::Fprem => self.remainder(false),
            Mnemonic::Fprem1 => self.remainder(true),
            Mnemonic::Fxtract => self.extract(),
            Mnemonic::F2xm1
            | Mnemonic::Fyl2x
            | Mnemonic::Fyl2xp1
            | Mnemonic::Fptan
            | Mnemonic::Fpatan
            | Mnemonic::Fsin
            | Mnemonic::Fcos
            | Mnemonic::Fsincos => self.transcendental(mnemonic),
            _ => return false,
        }
        true
    }

    #[cfg(all(target_arch = "x86_64", not(vmm_portable)))]
    fn transcendental(&mut self, mnemonic: Mnemonic) {
        super::host::transcendental(&mut self.state, mnemonic);
    }

    #[cfg(not(all(target_arch = "x86_64", not(vmm_portable))))]
    fn transcendental(&mut self, mnemonic: Mnemonic) {
        super::transcendental::transcendental(&mut self.state, mnemonic);
    }

    pub(super) fn read<const N: usize>(&mut self) -> Result<[u8; N], X87Stop<M::Stop>> {
        let mut bytes = [0; N];
        self.machine.read(&mut bytes).map_err(X87Stop::Machine)?;
        Ok(bytes)
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Step<M> {
        self.machine.write(bytes).map_err(X87Stop::Machine)
    }

    pub(super) fn environment(&self) -> Environment {
        Environment::from_x87_control(self.state.control())
    }

    /// The second operand: in memory, or a stack register. `None` if that is empty.
    fn second_operand(&mut self, instruction: &Instruction) -> Result<Option<Operand>, X87Stop<M::Stop>> {
        if has_memory(instruction) {
            return self.memory_operand(instruction.memory_size()).map(Some);
        }
        let st = if instruction.op_count() < 2 { 1 } else { stack_index(instruction.op1_register()) };
        Ok((!self.state.is_empty(st)).then(|| self.state.st(st).into()))
    }

    /// As [`X87State::complete`] for a result that goes to memory: an unmasked overflow or underflow
    /// keeps that from being stored, and nothing is rounded then.
    pub(super) fn complete_store(&mut self, environment: &Environment) -> bool {
        let out_of_range = environment.post & (OVERFLOW | UNDERFLOW);
        if environment.stops_before() || !environment.is_unmasked(out_of_range) {
            return self.state.complete(environment);
        }
        let mut environment = *environment;
        (environment.post, environment.up) = (out_of_range, false);
        self.state.complete(&environment);
        false
    }

    fn arithmetic(&mut self, instruction: &Instruction, kernel: Kernel, pop: bool) -> Step<M> {
        let dst = if has_memory(instruction) { 0 } else { stack_index(instruction.op0_register()) };
        let second = self.second_operand(instruction)?;
        let result = match second {
            Some(second) if !self.state.is_empty(dst) => {
                let mut environment = self.environment();
                let range = range(self.state.control());
                let result = kernel(self.state.st(dst).into(), second, &range, &mut environment);
                self.state.complete(&environment).then_some(result)
            }
            _ => self.state.stack_fault(false).then_some(F80::INDEFINITE),
        };
        if let Some(result) = result {
            self.state.set_st(dst, result);
            if pop {
                self.state.pop();
            }
        }
        Ok(())
    }

    /// Compares ST(`st`) with `second`; whether the instruction completes. Without it, no register is popped, but
    /// the result, then unordered, is there: AMD's processors set it all the same (Intel's do not).
    fn order(&mut self, second: Option<Operand>, st: u8, quiet: bool) -> (Option<Ordering>, bool) {
        let Some(second) = second.filter(|_| !self.state.is_empty(st)) else {
            return (None, self.state.stack_fault(false));
        };
        let mut environment = self.environment();
        let order = compare(self.state.st(st).into(), second, quiet, &mut environment);
        (order, self.state.complete(&environment))
    }

    fn set_condition_codes(&mut self, order: Option<Ordering>) {
        let codes = match order {
            Some(Ordering::Greater) => 0,
            Some(Ordering::Less) => C0,
            Some(Ordering::Equal) => C3,
            None => C0 | C2 | C3,
        };
        self.state.set_condition(C0 | C2 | C3, codes);
    }

    fn compare(&mut self, instruction: &Instruction, quiet: bool, pops: u8) -> Step<M> {
        let second = self.second_operand(instruction)?;
        let (order, completes) = self.order(second, 0, quiet);
        self.set_condition_codes(order);
        for _ in 0..if completes { pops } else { 0 } {
            self.state.pop();
        }
        Ok(())
    }

    fn compare_into_flags(&mut self, instruction: &Instruction, quiet: bool, pop: bool) -> Step<M> {
        let second = self.second_operand(instruction)?;
        let (status, underflow) = (self.state.status(), second.is_none() || self.state.is_empty(0));
        let (order, completes) = self.order(second, 0, quiet);
        if !underflow {
            // AMD's processors leave C1 alone here.
            self.state.set_condition(C1, status);
        }
        let unordered = order.is_none();
        let (equal, less) = (order == Some(Ordering::Equal), order == Some(Ordering::Less));
        self.machine.set_compare_flags(equal || unordered, unordered, less || unordered);
        if pop && completes {
            self.state.pop();
        }
        Ok(())
    }

    fn turn(&mut self, by: u8) {
        self.state.turn(by);
        self.state.set_condition(C1, 0);
    }

    /// C1 is undefined then (Intel SDM 2A, FFREE); AMD's processors clear it.
    fn free(&mut self, instruction: &Instruction) {
        self.state.free(stack_index(instruction.op0_register()));
        self.state.set_condition(C1, 0);
    }

    fn exchange(&mut self, st: u8) {
        if (self.state.is_empty(0) || self.state.is_empty(st)) && !self.state.stack_fault(false) {
            return;
        }
        if !self.state.is_empty(0) && !self.state.is_empty(st) {
            self.state.set_condition(C1, 0);
        }
        let value = |st| if self.state.is_empty(st) { F80::INDEFINITE } else { self.state.st(st) };
        let (top, other) = (value(0), value(st));
        self.state.set_st(0, other);
        self.state.set_st(st, top);
    }

    fn conditional_move(&mut self, instruction: &Instruction, condition: bool) {
        let st = stack_index(instruction.op1_register());
        if self.state.is_empty(0) || self.state.is_empty(st) {
            if self.state.stack_fault(false) {
                self.state.set_st(0, F80::INDEFINITE);
            }
            return;
        }
        if condition {
            self.state.set_st(0, self.state.st(st));
        }
    }

    fn change_sign(&mut self, change: fn(F80) -> F80) {
        if self.state.is_empty(0) {
            if self.state.stack_fault(false) {
                self.state.set_st(0, F80::INDEFINITE);
            }
            return;
        }
        self.state.set_condition(C1, 0);
        self.state.set_st(0, change(self.state.st(0)));
    }

    fn replace_top(&mut self, kernel: impl FnOnce(Operand, &mut Environment) -> F80) {
        let result = if self.state.is_empty(0) {
            self.state.stack_fault(false).then_some(F80::INDEFINITE)
        } else {
            let mut environment = self.environment();
            let result = kernel(self.state.st(0).into(), &mut environment);
            self.state.complete(&environment).then_some(result)
        };
        if let Some(result) = result {
            self.state.set_st(0, result);
        }
    }

    fn examine(&mut self) {
        let value = self.state.st(0);
        let class = if self.state.is_empty(0) {
            C3 | C0
        } else if value.is_unsupported() {
            0
        } else if value.is_nan() {
            C0
        } else if value.is_infinity() {
            C2 | C0
        } else if value.is_zero() {
            C3
        } else if value.is_denormal() {
            C3 | C2
        } else {
            C2
        };
        self.state.set_condition(C0 | C1 | C2 | C3, class | if value.sign() { C1 } else { 0 });
    }

    fn remainder(&mut self, nearest: bool) {
        self.state.set_condition(C2, 0);
        if self.state.is_empty(0) || self.state.is_empty(1) {
            if self.state.stack_fault(false) {
                self.state.set_st(0, F80::INDEFINITE);
            }
            return;
        }
        let mut environment = self.environment();
        let result = remainder(self.state.st(0).into(), self.state.st(1).into(), nearest, &mut environment);
        if !self.state.complete(&environment) {
            return;
        }
        self.state.set_st(0, result.value);
        let bit = |quotient: u8, bit: u8, code: u16| if quotient >> bit & 1 != 0 { code } else { 0 };
        let codes = match result.quotient {
            Quotient::Undefined => return,
            Quotient::Incomplete => C2,
            Quotient::Low(quotient) => bit(quotient, 2, C0) | bit(quotient, 1, C3) | bit(quotient, 0, C1),
        };
        self.state.set_condition(C0 | C1 | C2 | C3, codes);
    }

    fn extract(&mut self) {
        let empty = self.state.is_empty(0);
        let overflow = !self.state.is_empty(7);
        if empty || overflow {
            if self.state.stack_fault(!empty) {
                self.state.set_st(0, F80::INDEFINITE);
                self.state.push(F80::INDEFINITE);
            }
            return;
        }
        let mut environment = self.environment();
        let (exponent, significand) = extract(self.state.st(0).into(), &mut environment);
        if self.state.complete(&environment) {
            self.state.set_st(0, exponent);
            self.state.push(significand);
        }
    }

    fn memory_operand(&mut self, size: MemorySize) -> Result<Operand, X87Stop<M::Stop>> {
        self.read_number(size)?.ok_or(X87Stop::Invalid)
    }
}

/// The stack register that is the instruction's first operand.
pub(super) fn first_register(instruction: &Instruction) -> u8 {
    stack_index(instruction.op0_register())
}

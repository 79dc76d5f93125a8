//! The x87 instructions that load and store.

use iced_x86::{Instruction, MemorySize, Mnemonic};

use super::super::float::environment::{DENORMAL, Environment, INVALID, PRECISION, Rounding};
use super::super::float::exact::Integer;
use super::super::float::lane::{Double, Lane, Single, Value, pack};
use super::X87Machine;
use super::execute::{Step, Unit, first_register, has_memory};
use super::f80::{F80, Operand};
use super::image::Layout;
use super::{X87Stop, state::C1};

/// The largest magnitude of FBSTP: eighteen digits.
const DECIMAL_MAX: u128 = 999_999_999_999_999_999;
/// What FBSTP stores for an invalid operand.
const DECIMAL_INDEFINITE: [u8; 10] = [0, 0, 0, 0, 0, 0, 0, 0xc0, 0xff, 0xff];
/// Bytes of the stack in an FNSAVE image.
const STACK_BYTES: usize = 80;

/// A packed decimal number (Intel SDM 1 4.7). A digit above nine, which is undefined, counts as its value.
fn from_decimal(bytes: [u8; 10]) -> F80 {
    let [digits @ .., sign] = bytes;
    let magnitude = digits
        .iter()
        .rev()
        .fold(0i64, |value, byte| value * 100 + i64::from(byte >> 4) * 10 + i64::from(byte & 0xf));
    let value = F80::from_integer(magnitude);
    if sign & 0x80 != 0 { value.negated() } else { value }
}

fn to_decimal(negative: bool, mut magnitude: u128) -> [u8; 10] {
    let mut bytes = [0; 10];
    let [digits @ .., sign] = &mut bytes;
    for byte in digits {
        let (tens, ones) = ((magnitude / 10 % 10) as u8, (magnitude % 10) as u8);
        *byte = tens << 4 | ones;
        magnitude /= 100;
    }
    *sign = if negative { 0x80 } else { 0 };
    bytes
}

/// FST to single or double precision.
fn narrow<L: Lane>(a: F80, environment: &mut Environment) -> u64 {
    if a.is_unsupported() {
        environment.pre |= INVALID;
        return L::INDEFINITE;
    }
    let sign = if a.sign() { L::SIGN } else { 0 };
    if a.is_nan() {
        if a.is_signalling() {
            environment.pre |= INVALID;
        }
        return a.narrow_nan::<L>();
    }
    match a.unpack() {
        Value::Zero(_) => sign,
        Value::Infinity(_) => sign | L::INFINITY,
        Value::Finite(exact) => pack::<L>(exact, environment),
    }
}

/// Rounds to an integer of at most `positive` or, below zero, `negative` in magnitude; `None` is invalid.
fn to_integer(
    a: F80,
    rounding: Rounding,
    positive: u128,
    negative: u128,
    environment: &mut Environment,
) -> Option<u128> {
    let zero = Integer { magnitude: 0, inexact: false, up: false };
    let integer = if a.is_unsupported() || a.is_nan() {
        None
    } else {
        match a.unpack() {
            Value::Zero(_) => Some(zero),
            Value::Infinity(_) => None,
            Value::Finite(exact) => exact.to_integer(rounding),
        }
    };
    let limit = if a.sign() { negative } else { positive };
    let Some(integer) = integer.filter(|integer| integer.magnitude <= limit) else {
        environment.pre |= INVALID;
        return None;
    };
    if integer.inexact {
        environment.post |= PRECISION;
        environment.up = integer.up;
    }
    Some(integer.magnitude)
}

impl<M: X87Machine> Unit<'_, M> {
    /// The memory operand as a number; `None` if its size is no number's.
    pub(super) fn read_number(&mut self, size: MemorySize) -> Result<Option<Operand>, X87Stop<M::Stop>> {
        let integer = |value: i64| Operand::from(F80::from_integer(value));
        Ok(Some(match size {
            MemorySize::Float32 => F80::widen::<Single>(u64::from(u32::from_le_bytes(self.read()?))),
            MemorySize::Float64 => F80::widen::<Double>(u64::from_le_bytes(self.read()?)),
            MemorySize::Float80 => F80::from_bytes(self.read()?).into(),
            MemorySize::Int16 => integer(i64::from(i16::from_le_bytes(self.read()?))),
            MemorySize::Int32 => integer(i64::from(i32::from_le_bytes(self.read()?))),
            MemorySize::Int64 => integer(i64::from_le_bytes(self.read()?)),
            MemorySize::Bcd => from_decimal(self.read()?).into(),
            _ => return Ok(None),
        }))
    }

    /// FLD, FILD, FBLD.
    pub(super) fn load(&mut self, instruction: &Instruction) -> Step<M> {
        if !has_memory(instruction) {
            let st = first_register(instruction);
            if self.state.is_empty(st) {
                if self.state.stack_fault(false) {
                    self.state.push(F80::INDEFINITE);
                }
            } else {
                let value = self.state.st(st);
                self.push(value);
            }
            return Ok(());
        }
        let size = instruction.memory_size();
        let operand = self.read_number(size)?.ok_or(X87Stop::Invalid)?;
        if size == MemorySize::Float80 || !self.state.is_empty(7) {
            self.push(operand.value);
            return Ok(());
        }
        let mut environment = self.environment();
        if operand.value.is_signalling() {
            environment.pre |= INVALID;
        }
        // A denormal is loaded even where the exception is not masked.
        if operand.denormal {
            environment.post |= DENORMAL;
        }
        if self.state.complete(&environment) {
            let value = operand.value;
            self.state.push(if value.is_nan() { value.quieted() } else { value });
        }
        Ok(())
    }

    /// Pushes a value that raises no exceptions of its own.
    fn push(&mut self, value: F80) {
        if self.state.is_empty(7) {
            self.state.set_condition(C1, 0);
            self.state.push(value);
        } else if self.state.stack_fault(true) {
            self.state.push(F80::INDEFINITE);
        }
    }

    /// FLD1 and kin. The constants are rounded as the control word says, and that rounding raises nothing.
    pub(super) fn load_constant(&mut self, mnemonic: Mnemonic) {
        let rounding = self.environment().rounding;
        // The significand rounded down, whether the nearest is the next, and the sign and exponent.
        let (significand, nearest_is_up, sign_exponent) = match mnemonic {
            Mnemonic::Fldpi => (0xc90f_daa2_2168_c234, true, 0x4000),
            Mnemonic::Fldl2t => (0xd49a_784b_cd1b_8afe, false, 0x4000),
            Mnemonic::Fldl2e => (0xb8aa_3b29_5c17_f0bb, true, 0x3fff),
            Mnemonic::Fldlg2 => (0x9a20_9a84_fbcf_f798, true, 0x3ffd),
            Mnemonic::Fldln2 => (0xb172_17f7_d1cf_79ab, true, 0x3ffe),
            Mnemonic::Fld1 => return self.push(F80::ONE),
            _ => return self.push(F80::zero(false)),
        };
        let up = match rounding {
            Rounding::Nearest => nearest_is_up,
            Rounding::Up => true,
            Rounding::Down | Rounding::Zero => false,
        };
        self.push(F80 { significand: significand + u64::from(up), sign_exponent });
    }

    /// FST and FSTP.
    pub(super) fn store(&mut self, instruction: &Instruction, pop: bool) -> Step<M> {
        let empty = self.state.is_empty(0);
        if empty && !self.state.stack_fault(false) {
            return Ok(());
        }
        let value = if empty { F80::INDEFINITE } else { self.state.st(0) };
        let mut environment = self.environment();
        if has_memory(instruction) {
            let narrowed = match instruction.memory_size() {
                MemorySize::Float32 => narrow::<Single>(value, &mut environment),
                MemorySize::Float64 => narrow::<Double>(value, &mut environment),
                _ => 0,
            };
            if !empty && !self.complete_store(&environment) {
                return Ok(());
            }
            match instruction.memory_size() {
                MemorySize::Float32 => self.write(&((narrowed & 0xffff_ffff) as u32).to_le_bytes())?,
                MemorySize::Float64 => self.write(&narrowed.to_le_bytes())?,
                MemorySize::Float80 => self.write(&value.to_bytes())?,
                _ => return Err(X87Stop::Invalid),
            }
        } else {
            self.state.set_condition(C1, 0);
            self.state.set_st(first_register(instruction), value);
        }
        if pop {
            self.state.pop();
        }
        Ok(())
    }

    /// FIST, FISTP, FISTTP.
    pub(super) fn store_integer(&mut self, instruction: &Instruction, truncate: bool, pop: bool) -> Step<M> {
        let size = instruction.memory_size();
        let bits = match size {
            MemorySize::Int16 => 16,
            MemorySize::Int32 => 32,
            MemorySize::Int64 => 64,
            _ => return Err(X87Stop::Invalid),
        };
        let indefinite = 1u128 << (bits - 1);
        let mut environment = self.environment();
        let rounding = if truncate { Rounding::Zero } else { environment.rounding };
        let value = self.state.st(0);
        let integer = if self.state.is_empty(0) {
            if !self.state.stack_fault(false) {
                return Ok(());
            }
            indefinite
        } else {
            let magnitude = to_integer(value, rounding, indefinite - 1, indefinite, &mut environment);
            if !self.complete_store(&environment) {
                return Ok(());
            }
            match magnitude {
                Some(magnitude) if value.sign() => magnitude.wrapping_neg(),
                Some(magnitude) => magnitude,
                None => indefinite,
            }
        };
        let [b0, b1, b2, b3, b4, b5, b6, b7, ..] = integer.to_le_bytes();
        match bits {
            16 => self.write(&[b0, b1])?,
            32 => self.write(&[b0, b1, b2, b3])?,
            _ => self.write(&[b0, b1, b2, b3, b4, b5, b6, b7])?,
        }
        if pop {
            self.state.pop();
        }
        Ok(())
    }

    /// FBSTP.
    pub(super) fn store_decimal(&mut self) -> Step<M> {
        let value = self.state.st(0);
        let bytes = if self.state.is_empty(0) {
            if !self.state.stack_fault(false) {
                return Ok(());
            }
            DECIMAL_INDEFINITE
        } else {
            let mut environment = self.environment();
            let rounding = environment.rounding;
            let magnitude = to_integer(value, rounding, DECIMAL_MAX, DECIMAL_MAX, &mut environment);
            if !self.complete_store(&environment) {
                return Ok(());
            }
            magnitude.map_or(DECIMAL_INDEFINITE, |magnitude| to_decimal(value.sign(), magnitude))
        };
        self.write(&bytes)?;
        self.state.pop();
        Ok(())
    }

    /// The layout that the instruction and the mode give; `None` if the memory operand is no environment.
    fn layout(&self, instruction: &Instruction) -> Result<Layout, X87Stop<M::Stop>> {
        match (instruction.memory_size(), self.context.real_mode) {
            (MemorySize::FpuEnv28 | MemorySize::FpuState108, false) => Ok(Layout::Protected32),
            (MemorySize::FpuEnv28 | MemorySize::FpuState108, true) => Ok(Layout::Real32),
            (MemorySize::FpuEnv14 | MemorySize::FpuState94, false) => Ok(Layout::Protected16),
            (MemorySize::FpuEnv14 | MemorySize::FpuState94, true) => Ok(Layout::Real16),
            _ => Err(X87Stop::Invalid),
        }
    }

    /// FNSTENV: masks all exceptions afterwards.
    pub(super) fn store_environment(&mut self, instruction: &Instruction) -> Step<M> {
        let layout = self.layout(instruction)?;
        let mut image = [0; 28];
        self.state.write_environment(&mut image, layout);
        let (environment, _) = image.split_at(layout.environment_bytes());
        self.write(environment)?;
        self.state.set_control(self.state.control() | 0x3f);
        Ok(())
    }

    /// FLDENV.
    pub(super) fn load_environment(&mut self, instruction: &Instruction) -> Step<M> {
        let layout = self.layout(instruction)?;
        let mut image = [0; 28];
        let (environment, _) = image.split_at_mut(layout.environment_bytes());
        self.machine.read(environment).map_err(X87Stop::Machine)?;
        self.state.read_environment(&image, layout);
        Ok(())
    }

    /// FNSAVE: as FNINIT afterwards.
    pub(super) fn save(&mut self, instruction: &Instruction) -> Step<M> {
        let layout = self.layout(instruction)?;
        let mut image = [0; 28 + STACK_BYTES];
        self.state.write_environment(&mut image, layout);
        let (_, stack) = image.split_at_mut(layout.environment_bytes());
        self.state.write_stack(stack);
        let (image, _) = image.split_at(layout.environment_bytes() + STACK_BYTES);
        self.write(image)?;
        self.state.initialize();
        Ok(())
    }

    /// FRSTOR.
    pub(super) fn restore(&mut self, instruction: &Instruction) -> Step<M> {
        let layout = self.layout(instruction)?;
        let mut image = [0; 28 + STACK_BYTES];
        let (bytes, _) = image.split_at_mut(layout.environment_bytes() + STACK_BYTES);
        self.machine.read(bytes).map_err(X87Stop::Machine)?;
        self.state.read_environment(&image, layout);
        let (_, stack) = image.split_at(layout.environment_bytes());
        self.state.read_stack(stack);
        Ok(())
    }
}

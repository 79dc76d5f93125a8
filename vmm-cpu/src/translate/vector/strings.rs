//! String comparisons: PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM (Intel SDM 1, 4.1, the imm8 control byte; 2B).

use super::lanes::{Packed, join};
use super::status::{CF, OF, SF, ZF, flag};

/// What the four instructions compute before they differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StringCompare {
    /// IntRes2, one bit an element.
    result: u16,
    /// Elements in a register, 8 or 16.
    elements: u8,
    /// imm8\[6\]: the most significant index, or a mask of whole elements.
    select: bool,
    /// The first operand's string ends within the register.
    first_ends: bool,
    /// The second operand's string ends within the register.
    second_ends: bool,
}

impl StringCompare {
    /// All six status flags, in their places in RFLAGS; AF and PF are always clear.
    pub(crate) const fn status(&self) -> u64 {
        flag(CF, self.result != 0)
            | flag(ZF, self.second_ends)
            | flag(SF, self.first_ends)
            | flag(OF, self.result & 1 != 0)
    }

    /// ECX of PCMPESTRI and PCMPISTRI: the position of the least or most significant bit, or the number of
    /// elements when there is none.
    pub(crate) const fn index(&self) -> u32 {
        if self.result == 0 {
            self.elements as u32
        } else if self.select {
            self.result.ilog2()
        } else {
            self.result.trailing_zeros()
        }
    }

    /// XMM0 of PCMPESTRM and PCMPISTRM: the bits, zero-extended, or each spread over its element.
    pub(crate) fn mask(&self) -> u128 {
        if !self.select {
            return u128::from(self.result);
        }
        let bits = (0..16).map(|bit| self.result >> bit & 1 != 0);
        if self.elements == 8 {
            let mut lanes = [0u16; 8];
            lanes.iter_mut().zip(bits).for_each(|(lane, set)| *lane = if set { !0 } else { 0 });
            join(lanes)
        } else {
            let mut lanes = [0u8; 16];
            lanes.iter_mut().zip(bits).for_each(|(lane, set)| *lane = if set { !0 } else { 0 });
            join(lanes)
        }
    }
}

/// PCMPESTRI and PCMPESTRM. `first_length` is RAX and `second_length` RDX under REX.W (the decoder's PCMPESTRI64 and
/// PCMPESTRM64), else EAX and EDX sign-extended; their absolute values saturate at the number of elements.
pub(crate) fn compare_explicit(
    first: u128,
    first_length: i64,
    second: u128,
    second_length: i64,
    imm: u8,
) -> StringCompare {
    let (first, second) = (Elements::split(first, imm), Elements::split(second, imm));
    let length = |length: i64| usize::try_from(length.unsigned_abs()).unwrap_or(usize::MAX).min(first.count);
    compare(&first, length(first_length), &second, length(second_length), imm)
}

/// PCMPISTRI and PCMPISTRM: a string ends before its first zero element.
pub(crate) fn compare_implicit(first: u128, second: u128, imm: u8) -> StringCompare {
    let (first, second) = (Elements::split(first, imm), Elements::split(second, imm));
    let length =
        |string: &Elements| string.values().iter().position(|value| *value == 0).unwrap_or(string.count);
    compare(&first, length(&first), &second, length(&second), imm)
}

/// A register as the elements that imm8\[1:0\] says: bytes or words, unsigned or signed.
struct Elements {
    values: [i32; 16],
    count: usize,
}

impl Elements {
    fn split(register: u128, imm: u8) -> Self {
        let mut values = [0; 16];
        let count = match imm & 3 {
            0 => fill::<u8>(&mut values, register),
            1 => fill::<u16>(&mut values, register),
            2 => fill::<i8>(&mut values, register),
            _ => fill::<i16>(&mut values, register),
        };
        Self { values, count }
    }

    fn values(&self) -> &[i32] {
        self.values.get(..self.count).unwrap_or_default()
    }

    fn string(&self, length: usize) -> &[i32] {
        self.values.get(..length).unwrap_or_default()
    }
}

fn fill<T: Copy + Into<i32>>(values: &mut [i32; 16], register: u128) -> usize
where
    u128: Packed<T>,
{
    let lanes = register.lanes();
    values.iter_mut().zip(lanes.as_ref()).for_each(|(value, lane)| *value = (*lane).into());
    lanes.as_ref().len()
}

fn compare(
    first: &Elements,
    first_length: usize,
    second: &Elements,
    second_length: usize,
    imm: u8,
) -> StringCompare {
    let count = first.count;
    let (first, second) = (first.string(first_length), second.string(second_length));
    let holds = |position: usize| match imm >> 2 & 3 {
        // Equal any: the second's element is one of the first's.
        0 => second.get(position).is_some_and(|y| first.contains(y)),
        // Ranges: it is within one of the first's pairs of bounds; an odd bound at the end counts for nothing.
        1 => second
            .get(position)
            .is_some_and(|y| first.as_chunks().0.iter().any(|[least, most]| (least..=most).contains(&y))),
        // Equal each: beyond the end of both strings they are equal.
        2 => first.get(position) == second.get(position),
        // Equal ordered: the first is found here, or as much of it as fits into the register.
        _ => {
            let sought = first.get(..count - position).unwrap_or(first);
            second.get(position..).unwrap_or_default().starts_with(sought)
        }
    };
    let bits = (0..count).map(|position| u16::from(holds(position)) << position);
    let found = bits.fold(0, std::ops::BitOr::bitor);
    let ones = |count: usize| if count < 16 { (1u16 << count) - 1 } else { !0 };
    let result = match imm >> 4 & 3 {
        1 => found ^ ones(count),
        3 => found ^ ones(second_length),
        _ => found,
    };
    StringCompare {
        result,
        elements: if count == 8 { 8 } else { 16 },
        select: imm & 0x40 != 0,
        first_ends: first_length < count,
        second_ends: second_length < count,
    }
}

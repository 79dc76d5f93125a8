//! Loads and stores through host addresses of guest memory, which other threads access at the same time.
//!
//! Each access is one machine access where the host can do that, with the ordering that x86 guests rely on: loads
//! acquire, stores release. Rust's atomics say so for aligned addresses; for the others an x86 host has plain
//! instructions that mean the same, and other hosts go byte by byte.
#![allow(unsafe_code, reason = "guest memory is reached through host addresses")]

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::translate::word::Word;

/// Integers that have an atomic type of their width.
pub(crate) trait HostWord: Word {
    /// # Safety
    /// `address` must be valid for reads of this width while other threads may write there atomically.
    unsafe fn load(address: *mut u8) -> Self;

    /// # Safety
    /// `address` must be valid for writes of this width.
    unsafe fn store(address: *mut u8, value: Self);

    /// Replaces `old` by `new` if it is still there; what was there.
    ///
    /// # Safety
    /// `address` must be valid for reads and writes of this width and aligned to it.
    unsafe fn compare_exchange(address: *mut u8, old: Self, new: Self) -> Result<Self, Self>;
}

macro_rules! host_word {
    ($($type:ident $atomic:ident $load:literal $store:literal $class:ident;)*) => {$(
        impl HostWord for $type {
            #[inline(always)]
            unsafe fn load(address: *mut u8) -> Self {
                #[cfg(all(target_arch = "x86_64", not(vmm_portable), not(miri)))]
                {
                    let value: $type;
                    // SAFETY: the caller vouches for the address; a load on x86 is atomic where it is aligned, acquires,
                    // and cannot be undefined by a racing store.
                    unsafe {
                        std::arch::asm!($load, out($class) value, in(reg) address,
                            options(nostack, preserves_flags, readonly));
                    }
                    value
                }
                #[cfg(not(all(target_arch = "x86_64", not(vmm_portable), not(miri))))]
                if address.cast::<$atomic>().is_aligned() {
                    // SAFETY: the caller vouches for the address, and it is aligned.
                    let atomic = unsafe { $atomic::from_ptr(address.cast()) };
                    atomic.load(Ordering::Acquire)
                } else {
                    let mut bytes = [0; size_of::<$type>()];
                    for (offset, byte) in bytes.iter_mut().enumerate() {
                        // SAFETY: within the bytes that the caller vouches for.
                        let address = unsafe { address.add(offset) };
                        // SAFETY: as above; a byte is always aligned.
                        *byte = unsafe { AtomicU8::from_ptr(address) }.load(Ordering::Acquire);
                    }
                    Self::from_le_bytes(bytes)
                }
            }

            #[inline(always)]
            unsafe fn store(address: *mut u8, value: Self) {
                #[cfg(all(target_arch = "x86_64", not(vmm_portable), not(miri)))]
                // SAFETY: the caller vouches for the address; a store on x86 is atomic where it is aligned and releases.
                unsafe {
                    std::arch::asm!($store, in(reg) address, in($class) value, options(nostack, preserves_flags));
                }
                #[cfg(not(all(target_arch = "x86_64", not(vmm_portable), not(miri))))]
                if address.cast::<$atomic>().is_aligned() {
                    // SAFETY: the caller vouches for the address, and it is aligned.
                    let atomic = unsafe { $atomic::from_ptr(address.cast()) };
                    atomic.store(value, Ordering::Release);
                } else {
                    for (offset, byte) in value.to_le_bytes().into_iter().enumerate() {
                        // SAFETY: within the bytes that the caller vouches for.
                        let address = unsafe { address.add(offset) };
                        // SAFETY: as above; a byte is always aligned.
                        unsafe { AtomicU8::from_ptr(address) }.store(byte, Ordering::Release);
                    }
                }
            }

            #[inline(always)]
            unsafe fn compare_exchange(address: *mut u8, old: Self, new: Self) -> Result<Self, Self> {
                // SAFETY: the caller vouches for address and alignment.
                let atomic = unsafe { $atomic::from_ptr(address.cast()) };
                atomic.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
            }
        }
    )*};
}

host_word! {
    u8 AtomicU8 "mov {}, byte ptr [{}]" "mov byte ptr [{}], {}" reg_byte;
    u16 AtomicU16 "mov {:x}, word ptr [{}]" "mov word ptr [{}], {:x}" reg;
    u32 AtomicU32 "mov {:e}, dword ptr [{}]" "mov dword ptr [{}], {:e}" reg;
    u64 AtomicU64 "mov {}, qword ptr [{}]" "mov qword ptr [{}], {}" reg;
}

/// Which end of a run of bytes is accessed first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Ascending,
    /// What string instructions do while RFLAGS.DF is set.
    Descending,
}

impl Order {
    pub(crate) fn backward(backward: bool) -> Self {
        if backward { Self::Descending } else { Self::Ascending }
    }
}

/// Bytes before the next address that is a multiple of 8, of a run of `len`.
fn head(address: *mut u8, len: usize) -> usize {
    (address.addr().wrapping_neg() & 7).min(len)
}

/// Calls `access` with offset and size of each piece of a run of less than 8 bytes at `address`: the fewest that are
/// aligned, so that what the guest sees as one aligned access is one.
fn small_pieces(address: *mut u8, len: usize, order: Order, mut access: impl FnMut(usize, usize)) {
    let (mut start, mut end) = (0, len);
    while start < end {
        let edge = if order == Order::Ascending { start } else { end };
        let aligned = address.addr().wrapping_add(edge).trailing_zeros();
        let size = 1 << aligned.min((end - start).ilog2());
        if order == Order::Ascending {
            access(start, size);
            start += size;
        } else {
            end -= size;
            access(end, size);
        }
    }
}

/// Reads less than 8 bytes.
///
/// # Safety
/// `address` must be valid for reads of `bytes.len()` bytes.
unsafe fn small_from(address: *mut u8, bytes: &mut [u8], order: Order) {
    small_pieces(address, bytes.len(), order, |offset, size| {
        let at = address.wrapping_add(offset);
        let value = match size {
            // SAFETY: the piece, of that size, is within the bytes that the caller vouches for.
            4 => u64::from(unsafe { u32::load(at) }),
            // SAFETY: as above.
            2 => u64::from(unsafe { u16::load(at) }),
            // SAFETY: as above.
            _ => u64::from(unsafe { u8::load(at) }),
        };
        for (byte, value) in bytes.iter_mut().skip(offset).take(size).zip(value.to_le_bytes()) {
            *byte = value;
        }
    });
}

/// Writes less than 8 bytes.
///
/// # Safety
/// `address` must be valid for writes of `bytes.len()` bytes.
unsafe fn small_to(address: *mut u8, bytes: &[u8], order: Order) {
    small_pieces(address, bytes.len(), order, |offset, size| {
        let at = address.wrapping_add(offset);
        match *bytes.get(offset..offset + size).unwrap_or_default() {
            // SAFETY: the piece, of that size, is within the bytes that the caller vouches for.
            [a, b, c, d] => unsafe { u32::store(at, u32::from_le_bytes([a, b, c, d])) },
            // SAFETY: as above.
            [a, b] => unsafe { u16::store(at, u16::from_le_bytes([a, b])) },
            // SAFETY: as above.
            [a] => unsafe { u8::store(at, a) },
            _ => {}
        }
    });
}

/// Copies guest memory to `bytes`, in pieces as large as alignment allows.
///
/// # Safety
/// `address` must be valid for reads of `bytes.len()` bytes.
pub(crate) unsafe fn copy_from(address: *mut u8, bytes: &mut [u8], order: Order) {
    let (first, rest) = bytes.split_at_mut(head(address, bytes.len()));
    let aligned = address.wrapping_add(first.len());
    let (words, last) = rest.as_chunks_mut::<8>();
    let end = aligned.wrapping_add(words.len() * 8);
    if order == Order::Ascending {
        // SAFETY: these are the first of the bytes that the caller vouches for.
        unsafe { small_from(address, first, order) };
        for (n, word) in words.iter_mut().enumerate() {
            // SAFETY: the words follow.
            *word = unsafe { u64::load(aligned.wrapping_add(n * 8)) }.to_le_bytes();
        }
        // SAFETY: these are the last.
        unsafe { small_from(end, last, order) };
    } else {
        // SAFETY: as above, the other way round.
        unsafe { small_from(end, last, order) };
        for (n, word) in words.iter_mut().enumerate().rev() {
            // SAFETY: as above.
            *word = unsafe { u64::load(aligned.wrapping_add(n * 8)) }.to_le_bytes();
        }
        // SAFETY: as above.
        unsafe { small_from(address, first, order) };
    }
}

/// Copies `bytes` to guest memory, in pieces as large as alignment allows.
///
/// # Safety
/// `address` must be valid for writes of `bytes.len()` bytes.
pub(crate) unsafe fn copy_to(address: *mut u8, bytes: &[u8], order: Order) {
    let (first, rest) = bytes.split_at(head(address, bytes.len()));
    let aligned = address.wrapping_add(first.len());
    let (words, last) = rest.as_chunks::<8>();
    let end = aligned.wrapping_add(words.len() * 8);
    if order == Order::Ascending {
        // SAFETY: these are the first of the bytes that the caller vouches for.
        unsafe { small_to(address, first, order) };
        for (n, word) in words.iter().enumerate() {
            // SAFETY: the words follow.
            unsafe { u64::store(aligned.wrapping_add(n * 8), u64::from_le_bytes(*word)) };
        }
        // SAFETY: these are the last.
        unsafe { small_to(end, last, order) };
    } else {
        // SAFETY: as above, the other way round.
        unsafe { small_to(end, last, order) };
        for (n, word) in words.iter().enumerate().rev() {
            // SAFETY: as above.
            unsafe { u64::store(aligned.wrapping_add(n * 8), u64::from_le_bytes(*word)) };
        }
        // SAFETY: as above.
        unsafe { small_to(address, first, order) };
    }
}

/// Compares and exchanges 16 bytes; what was there before. Atomic where the processor can do it.
///
/// # Safety
/// `address` must be valid for reads and writes of 16 bytes and aligned to 16.
pub(crate) unsafe fn compare_exchange_16(address: *mut u8, expected: u128, new: u128) -> u128 {
    #[cfg(all(target_arch = "x86_64", not(vmm_portable), not(miri)))]
    if std::arch::is_x86_feature_detected!("cmpxchg16b") {
        // SAFETY: the processor has it, and the caller vouches for address and alignment.
        return unsafe { compare_exchange_16_native(address, expected, new) };
    }
    // Atomic against other guests' 16-byte exchanges, which all come here then.
    static EXCHANGES: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _exchange = EXCHANGES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut bytes = [0; 16];
    // SAFETY: the caller vouches for the address.
    unsafe { copy_from(address, &mut bytes, Order::Ascending) };
    let old = u128::from_le_bytes(bytes);
    if old == expected {
        // SAFETY: as above.
        unsafe { copy_to(address, &new.to_le_bytes(), Order::Ascending) };
    }
    old
}

/// # Safety
/// As [`compare_exchange_16`], and the processor must have the instruction.
#[cfg(all(target_arch = "x86_64", not(vmm_portable), not(miri)))]
unsafe fn compare_exchange_16_native(address: *mut u8, expected: u128, new: u128) -> u128 {
    use crate::translate::word::halves;
    let ([mut low, mut high], [new_low, new_high]) = (halves(expected), halves(new));
    // SAFETY: the caller vouches for address, alignment and processor. RBX, which the compiler keeps for itself, is
    // put back; the operands have registers by name, since the compiler might give one RBX otherwise.
    unsafe {
        std::arch::asm!(
            "xchg rsi, rbx",
            "lock cmpxchg16b xmmword ptr [rdi]",
            "mov rbx, rsi",
            in("rdi") address,
            inout("rsi") new_low => _,
            in("rcx") new_high,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    u128::from(high) << 64 | u128::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_and_in_order() {
        #[repr(align(8))]
        struct Aligned([u8; 16]);
        let mut memory = Aligned([0; 16]);
        let pieces = |start: usize, len: usize, order: Order| {
            let mut pieces = Vec::new();
            small_pieces(memory.0.as_mut_ptr().wrapping_add(start), len, order, |offset, size| {
                pieces.push((start + offset, size));
            });
            pieces
        };
        let mut pieces = pieces;
        for (start, len, expected) in [
            (0, 7, &[(0, 4), (4, 2), (6, 1)][..]),
            (1, 7, &[(1, 1), (2, 2), (4, 4)]),
            (6, 2, &[(6, 2)]),
            (3, 2, &[(3, 1), (4, 1)]),
            (0, 6, &[(0, 4), (4, 2)]),
            (5, 0, &[]),
        ] {
            assert_eq!(pieces(start, len, Order::Ascending), expected, "{len} at {start}");
            let mut backward = expected.to_vec();
            backward.reverse();
            assert_eq!(pieces(start, len, Order::Descending), backward, "{len} at {start}");
        }
    }

    #[test]
    fn every_run_is_copied_whole_in_both_orders() {
        for order in [Order::Ascending, Order::Descending] {
            for start in 0..9 {
                for len in 0..30 {
                    let source: Vec<u8> = (1..=len).collect();
                    let mut memory = [0xee_u8; 48];
                    let address = memory.as_mut_ptr().wrapping_add(start);
                    let mut back = vec![0; source.len()];
                    // SAFETY: the array has that many bytes from there.
                    unsafe { copy_to(address, &source, order) };
                    // SAFETY: as above.
                    unsafe { copy_from(address, &mut back, order) };
                    assert_eq!(back, source);
                    let end = start + source.len();
                    assert_eq!(memory[start..end], source);
                    assert!(memory[..start].iter().chain(&memory[end..]).all(|byte| *byte == 0xee));
                }
            }
        }
    }
}

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

/// Copies guest memory to `bytes`, in pieces as large as alignment allows.
///
/// # Safety
/// `address` must be valid for reads of `bytes.len()` bytes.
pub(crate) unsafe fn copy_from(address: *mut u8, bytes: &mut [u8]) {
    let mut address = address;
    let (words, rest) = bytes.as_chunks_mut::<8>();
    for word in words {
        // SAFETY: within the bytes that the caller vouches for.
        *word = unsafe { u64::load(address) }.to_le_bytes();
        // SAFETY: as above.
        address = unsafe { address.add(8) };
    }
    let (words, rest) = rest.as_chunks_mut::<4>();
    for word in words {
        // SAFETY: within the bytes that the caller vouches for.
        *word = unsafe { u32::load(address) }.to_le_bytes();
        // SAFETY: as above.
        address = unsafe { address.add(4) };
    }
    for byte in rest {
        // SAFETY: as above.
        *byte = unsafe { u8::load(address) };
        // SAFETY: as above.
        address = unsafe { address.add(1) };
    }
}

/// Copies `bytes` to guest memory.
///
/// # Safety
/// `address` must be valid for writes of `bytes.len()` bytes.
pub(crate) unsafe fn copy_to(address: *mut u8, bytes: &[u8]) {
    let mut address = address;
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        // SAFETY: within the bytes that the caller vouches for.
        unsafe { u64::store(address, u64::from_le_bytes(*word)) };
        // SAFETY: as above.
        address = unsafe { address.add(8) };
    }
    let (words, rest) = rest.as_chunks::<4>();
    for word in words {
        // SAFETY: within the bytes that the caller vouches for.
        unsafe { u32::store(address, u32::from_le_bytes(*word)) };
        // SAFETY: as above.
        address = unsafe { address.add(4) };
    }
    for byte in rest {
        // SAFETY: as above.
        unsafe { u8::store(address, *byte) };
        // SAFETY: as above.
        address = unsafe { address.add(1) };
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
    unsafe { copy_from(address, &mut bytes) };
    let old = u128::from_le_bytes(bytes);
    if old == expected {
        // SAFETY: as above.
        unsafe { copy_to(address, &new.to_le_bytes()) };
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

//! What the hosted target expects of a runtime and a libc, for guests that have neither.

use core::arch::asm;

#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    // SAFETY: panics abort, so nothing unwinds; whoever comes here ends by an exception.
    unsafe { asm!("ud2", options(noreturn)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges, as for the C function of this name; DF is clear at entry.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") count => _, options(nostack))
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: ascending order is right here, and the caller vouches for both ranges.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: the caller vouches for both ranges, as for the C function of this name; DF is clear at entry.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rdi") to.add(count).sub(1) => _,
             inout("rsi") from.add(count).sub(1) => _, inout("rcx") count => _, options(nostack))
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges, as for the C function of this name; DF is clear at entry.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, in("al") value as u8, inout("rcx") count => _, options(nostack))
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    for index in 0..count {
        // SAFETY: `index` is below `count`, for which the caller vouches.
        let (a, b) = unsafe { (a.add(index).read_volatile(), b.add(index).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, count) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut length = 0;
    // SAFETY: the caller vouches for a NUL; every byte before it is readable.
    while unsafe { text.add(length).read_volatile() } != 0 {
        length += 1;
    }
    length
}

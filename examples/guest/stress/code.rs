//! Code that one processor writes and the others run (Intel SDM 3A 9.1.3).

use std::arch::x86_64::__cpuid;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use crate::Crew;
use crate::system::{EXECUTE, Pages, READ, WRITE};

pub(crate) fn written(crew: &Crew) {
    let pages = Pages::new(1, READ | WRITE | EXECUTE);
    // NOP NOP NOP; MOV EAX, n; RET: the number is aligned.
    let code = [0x90, 0x90, 0x90, 0xb8, 0, 0, 0, 0, 0xc3];
    // SAFETY: within the page, which nobody uses yet.
    unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), pages.base(), code.len()) };
    // SAFETY: within the page, aligned, and accessed atomically.
    let number = unsafe { AtomicU32::from_ptr(pages.base().wrapping_add(4).cast()) };
    // SAFETY: the page holds a function of this type.
    let function: extern "C" fn() -> u32 = unsafe { std::mem::transmute(pages.base()) };
    let (written, called) = (AtomicU64::new(0), AtomicUsize::new(0));
    let last = 200 * crew.rounds as u64;
    crew.each(|cpu| {
        for n in 1..=last {
            if cpu == 0 {
                number.store(n as u32, Ordering::Release);
                written.store(n, Ordering::Release);
            } else {
                while written.load(Ordering::Acquire) < n {
                    std::hint::spin_loop();
                }
                // Serializes.
                std::hint::black_box(__cpuid(0));
            }
            assert_eq!(function(), n as u32, "on processor {cpu}");
            called.fetch_add(1, Ordering::SeqCst);
            while called.load(Ordering::SeqCst) < n as usize * crew.threads {
                std::hint::spin_loop();
            }
        }
    });
}

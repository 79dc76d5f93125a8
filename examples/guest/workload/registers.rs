//! Vector registers, which several processes hold at once.

use std::arch::asm;
use std::thread;

use crate::system::{self, Pages};

pub(crate) fn kept(rounds: usize) {
    let avx = std::is_x86_feature_detected!("avx");
    let all: Vec<_> = (1..=3_u64)
        .map(|number| {
            system::child(|| {
                for round in 0..300 * rounds as u64 {
                    let value = number << 32 | round;
                    // With a switch to another process in between, and with a page fault.
                    let found = if avx { wide(value) } else { narrow(value) };
                    if found != [value; 4] {
                        eprintln!("process {number} found {found:x?} for {value:#x}, AVX: {avx}");
                        return 1;
                    }
                    if round % 16 == 0 {
                        thread::yield_now();
                    }
                }
                0
            })
        })
        .collect();
    for child in all {
        assert_eq!(system::wait(child), 0, "a process lost its vector registers");
    }
}

const YIELD: u64 = 24;

/// Puts the value into all of YMM15, yields, touches a new page, and stores it there.
fn wide(value: u64) -> [u64; 4] {
    let mut pages = Pages::new(1);
    let values = [value; 4];
    let place = pages.bytes().as_mut_ptr();
    // SAFETY: AVX is there, and the place is as long as a page.
    unsafe {
        asm!(
            "vmovdqu ymm15, [{from}]", "syscall", "vmovdqu [{to}], ymm15", "vzeroupper",
            from = in(reg) values.as_ptr(), to = in(reg) place, inlateout("rax") YIELD => _,
            lateout("rcx") _, lateout("r11") _, out("xmm15") _
        );
        place.cast::<[u64; 4]>().read()
    }
}

/// The same with XMM14 and XMM15.
fn narrow(value: u64) -> [u64; 4] {
    let mut pages = Pages::new(1);
    let values = [value; 4];
    let place = pages.bytes().as_mut_ptr();
    // SAFETY: the place is as long as a page.
    unsafe {
        asm!(
            "movdqu xmm14, [{from}]", "movdqu xmm15, [{from} + 16]", "syscall",
            "movdqu [{to}], xmm14", "movdqu [{to} + 16], xmm15",
            from = in(reg) values.as_ptr(), to = in(reg) place, inlateout("rax") YIELD => _,
            lateout("rcx") _, lateout("r11") _, out("xmm14") _, out("xmm15") _
        );
        place.cast::<[u64; 4]>().read()
    }
}

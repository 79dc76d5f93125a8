//! Pages: that fresh ones are zero, that rights hold, that children have their own.

use crate::system::{self, Pages, READ, SIGSEGV, WRITE};

pub(crate) fn rights(rounds: usize) {
    for round in 0..20 * rounds {
        let count = 1 + round % 40;
        let mut pages = Pages::new(count);
        assert!(pages.bytes().iter().all(|byte| *byte == 0), "a fresh page that is not zero");
        pages.bytes().fill(0xa5);
        pages.protect(READ);
        assert!(pages.bytes().iter().all(|byte| *byte == 0xa5));
        pages.protect(READ | WRITE);
        pages.bytes().fill(0x5a);
    }
    for _ in 0..5 * rounds {
        let mut pages = Pages::new(2);
        pages.bytes()[4096] = 1;
        for (prot, write) in [(READ, true), (0, false)] {
            pages.protect(prot);
            let child = system::child(|| {
                system::exit_by(SIGSEGV);
                if write {
                    // SAFETY: ends this process, as it is to.
                    unsafe { pages.bytes().as_mut_ptr().add(4096).write_volatile(2) };
                } else {
                    // SAFETY: as above.
                    std::hint::black_box(unsafe { pages.bytes().as_ptr().add(4096).read_volatile() });
                }
                0
            });
            assert_eq!(system::wait(child), SIGSEGV << 8, "a page that may not be used");
        }
    }
}

pub(crate) fn copies(rounds: usize) {
    for round in 0..5 * rounds {
        let mut pages = Pages::new(64);
        for (number, page) in pages.bytes().chunks_mut(4096).enumerate() {
            page.fill((number + round) as u8);
        }
        let all: Vec<_> = (0..3_u8)
            .map(|child| {
                system::child(|| {
                    // Every child changes each second page, and finds the others as they were.
                    for (number, page) in pages.bytes().chunks_mut(4096).enumerate() {
                        if number % 2 == 0 {
                            page.fill(child ^ 0x80);
                        }
                    }
                    let right = pages.bytes().chunks(4096).enumerate().all(|(number, page)| {
                        let value = if number % 2 == 0 { child ^ 0x80 } else { (number + round) as u8 };
                        page.iter().all(|byte| *byte == value)
                    });
                    i32::from(!right)
                })
            })
            .collect();
        for child in all {
            assert_eq!(system::wait(child), 0, "a child's pages");
        }
        for (number, page) in pages.bytes().chunks(4096).enumerate() {
            assert!(page.iter().all(|byte| *byte == (number + round) as u8), "page {number} of the parent");
        }
    }
}

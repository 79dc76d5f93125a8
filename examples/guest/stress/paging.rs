//! Translations that one processor changes and all others have to drop.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::Crew;
use crate::system::{Pages, READ, WRITE};

/// One puts new pages in the place of old ones, again and again; the others never read from the old ones what the new
/// ones do not hold.
pub(crate) fn replaced(crew: &Crew) {
    const COUNT: usize = 4;
    let (pages, generation) = (Pages::new(COUNT, READ | WRITE), AtomicU64::new(0));
    let word = |page: usize| {
        // SAFETY: within the pages, aligned, and accessed atomically by everybody.
        unsafe { AtomicU64::from_ptr(pages.base().wrapping_add(page * 4096).cast()) }
    };
    let last = 100 * crew.rounds as u64;
    crew.each(|cpu| {
        if cpu == 0 {
            for n in 1..=last {
                pages.replace();
                (0..COUNT).for_each(|page| word(page).store(n, Ordering::Relaxed));
                generation.store(n, Ordering::Release);
            }
            return;
        }
        loop {
            let before = generation.load(Ordering::Acquire);
            for page in 0..COUNT {
                let there = word(page).load(Ordering::Acquire);
                // It may have been replaced since, and not be written yet.
                assert!(there >= before || there == 0, "generation {there} after {before}");
            }
            if before == last {
                return;
            }
        }
    });
}

/// One takes the right to write away and gives it back; while it is away, nothing that the others store arrives.
pub(crate) fn protected(crew: &Crew) {
    let (pages, stop) = (Pages::new(1, READ | WRITE), AtomicBool::new(false));
    // SAFETY: within the page, aligned, and accessed atomically by everybody.
    let word = unsafe { AtomicU64::from_ptr(pages.base().cast()) };
    crew.each(|cpu| {
        if cpu == 0 {
            for _ in 0..50 * crew.rounds {
                pages.protect(READ);
                let before = word.load(Ordering::SeqCst);
                for _ in 0..100 {
                    assert_eq!(
                        word.load(Ordering::SeqCst),
                        before,
                        "a store arrived in a page that is read-only"
                    );
                }
                pages.protect(READ | WRITE);
            }
            stop.store(true, Ordering::SeqCst);
            return;
        }
        // The kernel's copy to the page fails where a store would be a fault.
        let (mut reader, mut writer) = std::io::pipe().expect("a pipe");
        for n in (1_u64..).take_while(|_| !stop.load(Ordering::SeqCst)) {
            writer.write_all(&n.to_ne_bytes()).expect("room in the pipe");
            if !pages.read_from(&reader) {
                // What was in the pipe still is.
                reader.read_exact(&mut [0; 8]).expect("what is in the pipe");
            }
        }
    });
}

//! For targets whose devices and servers leave threads behind that nobody waits for: descriptors that others have passed are closed there.

use std::time::{Duration, Instant};

/// Runs that, and waits until the threads that it began have ended: what such a thread still holds is no leak.
///
/// # Panics
/// If they go on.
pub fn settled<T>(run: impl FnOnce() -> T) -> T {
    let before = threads();
    let result = run();
    let begun = Instant::now();
    while threads() > before {
        assert!(begun.elapsed() < Duration::from_secs(20), "threads go on: {} of {before}", threads());
        std::thread::yield_now();
    }
    result
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

/// What LeakSanitizer is not to take for a leak: glibc's own list of a thread's destructors, which it finds without its thread where that is
/// just coming or going.
#[unsafe(no_mangle)]
pub extern "C" fn __lsan_default_suppressions() -> *const std::ffi::c_char {
    c"leak:__cxa_thread_atexit_impl\n".as_ptr()
}

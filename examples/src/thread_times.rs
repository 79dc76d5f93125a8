//! What the threads of another process have had of the processors: where time goes in a monitor, from outside of it.

use std::fs;
use std::time::Duration;

/// Processor time of a process's threads at one moment, by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ThreadTimes(Vec<(String, Duration)>);

impl ThreadTimes {
    /// Those of the process now; none if it is not there, or if the kernel keeps no account (CONFIG_SCHED_INFO).
    pub fn now(process: u32) -> Self {
        let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
        let time = |thread: fs::DirEntry| {
            let name = fs::read_to_string(thread.path().join("comm")).ok()?;
            // Nanoseconds on a processor, nanoseconds that it waited for one, turns.
            let account = fs::read_to_string(thread.path().join("schedstat")).ok()?;
            let time = account.split_whitespace().next()?.parse().ok()?;
            Some((name.trim_end().to_owned(), Duration::from_nanos(time)))
        };
        Self(threads.filter_map(time).collect())
    }

    /// Those of the threads whose name begins so, together.
    pub fn of(&self, name: &str) -> Duration {
        self.0.iter().filter(|(known, _)| known.starts_with(name)).map(|(_, time)| *time).sum()
    }

    /// How many hundredths of what threads of two names have had since then are the first one's; nothing if neither ran.
    pub fn share(&self, since: &Self, name: &str, other: &str) -> Option<f64> {
        let spent = |name| self.of(name).saturating_sub(since.of(name)).as_secs_f64();
        let (ours, theirs) = (spent(name), spent(other));
        (ours + theirs > 0.0).then(|| ours / (ours + theirs) * 100.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Instant;

    #[test]
    fn a_thread_that_works_is_seen_to() {
        let (begin, begun) = channel::<()>();
        let (end, ended) = channel();
        let worker = thread::Builder::new().name("works".to_owned()).spawn(move || {
            begun.recv().unwrap();
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(50) {
                std::hint::spin_loop();
            }
            end.send(()).unwrap();
            begun.recv().unwrap_err();
        });
        let process = std::process::id();
        let before = ThreadTimes::now(process);
        begin.send(()).unwrap();
        ended.recv().unwrap();
        let after = ThreadTimes::now(process);
        drop(begin);
        worker.unwrap().join().unwrap();
        assert!(after.of("works") > before.of("works"), "{before:?} {after:?}");
        assert_eq!(after.share(&before, "works", "nobody"), Some(100.0));
        assert_eq!(after.share(&after, "works", "nobody"), None);
    }

    #[test]
    fn a_process_that_is_not_has_had_nothing() {
        assert_eq!(ThreadTimes::now(0), ThreadTimes::default());
    }
}

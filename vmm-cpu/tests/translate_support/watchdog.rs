//! A thread that kicks a run after a while, and ends the process if the run does not return then.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use vmm_cpu::VcpuHandle;

/// How often the thread looks.
const TICK: Duration = Duration::from_micros(50);
/// How long a run lasts before it is kicked, unless it is told how long.
pub const KICK_AFTER: Duration = Duration::from_micros(300);

/// How long a kicked run may take to return, in milliseconds.
static PATIENCE_MS: AtomicU64 = AtomicU64::new(1000);

struct Run {
    handle: Arc<dyn VcpuHandle>,
    since: Instant,
    kick_after: Duration,
    kicked: bool,
    what: String,
}

static RUNNING: Mutex<Vec<(u64, Run)>> = Mutex::new(Vec::new());
static NEXT: AtomicU64 = AtomicU64::new(0);

/// Sets how long a kicked run may take: on a busy machine a thread may not get a processor for a while.
pub fn set_patience(patience: Duration) {
    PATIENCE_MS.store(patience.as_millis() as u64, Ordering::Relaxed);
}

/// Watches the run that follows, until dropped.
pub struct Watch(u64);

pub fn watch(handle: Arc<dyn VcpuHandle>, kick_after: Duration, what: impl FnOnce() -> String) -> Watch {
    static THREAD: OnceLock<()> = OnceLock::new();
    THREAD.get_or_init(|| {
        std::thread::Builder::new().name("watchdog".to_owned()).spawn(look).unwrap();
    });
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    let run = Run { handle, since: Instant::now(), kick_after, kicked: false, what: what() };
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner).push((id, run));
    Watch(id)
}

impl Watch {
    /// Ends it; whether the run was kicked, or the next one will be.
    pub fn end(self) -> bool {
        self.forget()
    }

    fn forget(&self) -> bool {
        let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let place = running.iter().position(|(id, _)| *id == self.0);
        place.is_some_and(|place| running.swap_remove(place).1.kicked)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.forget();
    }
}

fn look() {
    let mut last = Instant::now();
    let mut lost = Duration::ZERO;
    loop {
        std::thread::sleep(TICK);
        // While this thread got no processor, others may have got none either.
        let slept = std::mem::replace(&mut last, Instant::now()).elapsed();
        lost += slept.saturating_sub(Duration::from_millis(100));
        let patience = Duration::from_millis(PATIENCE_MS.load(Ordering::Relaxed));
        let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        if running.is_empty() {
            lost = Duration::ZERO;
        }
        for (_, run) in running.iter_mut() {
            let lasted = run.since.elapsed();
            if !run.kicked && lasted > run.kick_after {
                run.handle.kick();
                run.kicked = true;
            }
            if lasted > run.kick_after + patience + lost {
                eprintln!("a run did not answer a kick within {patience:?}: {}", run.what);
                std::process::abort();
            }
        }
    }
}

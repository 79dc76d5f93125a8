//! [`VcpuThreads`]: one thread per vCPU; run, pause all, look inside, resume, stop. [`PauseHandle`] reaches them from
//! anywhere.

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::events::VcpuEvents;
use crate::vcpu::{Halt, Vcpu, VcpuHandle, VcpuIo};
use crate::vm::Notifier;

/// A vCPU that stopped by itself: anything but a kick or an HLT that an event will end.
#[derive(Debug)]
pub struct VcpuExit {
    /// Index of the vCPU.
    pub index: u32,
    /// Why it stopped.
    pub reason: Result<Halt>,
}

/// What the threads are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Paused,
    Running,
    Stopping,
}

#[derive(Debug)]
struct Control {
    mode: Mode,
    /// Counts resumes: a vCPU that stopped by itself stays so until the next one.
    generation: u64,
    /// While running: just these vCPUs, `None` for all.
    only: Option<Vec<u32>>,
    /// Indices of the vCPUs that no thread is inside of.
    parked: Vec<u32>,
    exits: VecDeque<VcpuExit>,
    /// Signalled when [`VcpuThreads::wait`] has something to tell.
    notifier: Option<Notifier>,
    observer: Option<Arc<dyn VcpuEvents>>,
}

impl Control {
    fn may_run(&self, index: u32, stopped_in: Option<u64>) -> bool {
        let chosen = self.only.as_ref().is_none_or(|only| only.contains(&index));
        self.mode == Mode::Running && chosen && stopped_in != Some(self.generation)
    }

    fn notify(&self) {
        if let Some(notifier) = &self.notifier
            && let Err(error) = notifier.notify()
        {
            tracing::error!(%error, "nobody hears what the vCPUs have to tell");
        }
    }
}

#[derive(Debug)]
struct Shared {
    control: Mutex<Control>,
    changed: Condvar,
    handles: Vec<(u32, Arc<dyn VcpuHandle>)>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, Control>) -> MutexGuard<'a, Control> {
        self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that all are to pause, without waiting until they have; whether they may.
    fn request_pause(&self) -> bool {
        {
            let mut control = self.lock();
            if control.mode == Mode::Stopping {
                return false;
            }
            control.mode = Mode::Paused;
            // Whoever waits for an exit looks again.
            self.changed.notify_all();
            if control.parked.len() == self.handles.len() {
                control.notify();
            }
        }
        self.kick();
        true
    }

    /// Kicks those that run. A kick of one that is parked would only keep it from its next run.
    fn kick(&self) {
        let parked = self.lock().parked.clone();
        for (_, handle) in self.handles.iter().filter(|(index, _)| !parked.contains(index)) {
            handle.kick();
        }
    }

    /// Parks the calling thread until it may run (true) or must end (false).
    /// `stopped_in` is the generation in which the vCPU `index` stopped by itself.
    fn park(&self, index: u32, stopped_in: Option<u64>) -> bool {
        let mut control = self.lock();
        if !control.may_run(index, stopped_in) && control.mode != Mode::Stopping {
            control.parked.push(index);
            self.changed.notify_all();
            if control.mode == Mode::Paused && control.parked.len() == self.handles.len() {
                control.notify();
            }
            while !control.may_run(index, stopped_in) && control.mode != Mode::Stopping {
                control = self.wait(control);
            }
            control.parked.retain(|other| *other != index);
        }
        control.mode != Mode::Stopping
    }
}

type SharedVcpu = Arc<Mutex<Box<dyn Vcpu>>>;

/// Pauses the vCPUs of a [`VcpuThreads`] from anywhere: from callbacks, device threads, timers. Cheap to clone; does
/// nothing once they have ended.
#[derive(Clone, Debug)]
pub struct PauseHandle(Weak<Shared>);

impl PauseHandle {
    /// Asks all vCPUs to pause, and does not wait for it: each stops once its current callback is done. A
    /// [`VcpuThreads::wait`] ends when all stand still.
    pub fn pause(&self) {
        if let Some(shared) = self.0.upgrade() {
            shared.request_pause();
        }
    }
}

struct Thread {
    index: u32,
    vcpu: SharedVcpu,
    handle: Arc<dyn VcpuHandle>,
    join: JoinHandle<()>,
}

/// Runs vCPUs, each on a thread of its own.
///
/// A halted vCPU waits; a kicked one goes on. Whatever else ends [`Vcpu::run`] is an exit that
/// [`VcpuThreads::wait`] tells; that vCPU stands still until the next [`VcpuThreads::resume`], the others
/// go on. Dropping the value stops all threads and waits for them (for all but its own, if a callback drops it).
pub struct VcpuThreads {
    shared: Arc<Shared>,
    threads: Vec<Thread>,
}

impl fmt::Debug for VcpuThreads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuThreads")
            .field("control", &*self.shared.lock())
            .field("vcpus", &self.threads.len())
            .finish()
    }
}

impl VcpuThreads {
    /// Starts one thread for each vCPU, paused. The [`VcpuIo`] beside it answers its accesses.
    ///
    /// # Errors
    /// [`Error::Host`] if the host refuses a thread; those started so far end.
    pub fn spawn(vcpus: Vec<(Box<dyn Vcpu>, Box<dyn VcpuIo + Send>)>) -> Result<Self> {
        let shared = Arc::new(Shared {
            control: Mutex::new(Control {
                mode: Mode::Paused,
                generation: 0,
                only: None,
                parked: Vec::new(),
                exits: VecDeque::new(),
                notifier: None,
                observer: None,
            }),
            changed: Condvar::new(),
            handles: vcpus.iter().map(|(vcpu, _)| (vcpu.index(), vcpu.handle())).collect(),
        });
        let mut this = Self { shared, threads: Vec::with_capacity(vcpus.len()) };
        for (vcpu, mut io) in vcpus {
            let (index, handle) = (vcpu.index(), vcpu.handle());
            let vcpu = Arc::new(Mutex::new(vcpu));
            let (theirs, shared) = (Arc::clone(&vcpu), Arc::clone(&this.shared));
            let join = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || thread_main(index, &shared, &theirs, &mut *io))
                .map_err(|source| Error::Host {
                    backend: "vmm-cpu",
                    operation: "starting a vCPU thread",
                    source,
                })?;
            this.threads.push(Thread { index, vcpu, handle, join });
        }
        // From here on they can be looked at.
        let mut control = this.shared.lock();
        while control.parked.len() < this.threads.len() {
            control = this.shared.wait(control);
        }
        drop(control);
        Ok(this)
    }

    /// Lets all vCPUs run, those that stopped by themselves too.
    pub fn resume(&self) {
        self.run(None);
    }

    /// Lets the vCPUs with those indices run, if they stopped by themselves too, and no other: for debuggers that step
    /// one processor. To be called while the vCPUs are paused.
    pub fn resume_only(&self, indices: &[u32]) {
        self.run(Some(indices.to_vec()));
    }

    fn run(&self, only: Option<Vec<u32>>) {
        let mut control = self.shared.lock();
        tracing::debug!(?only, "vCPUs resumed");
        control.mode = Mode::Running;
        control.only = only;
        control.generation += 1;
        self.shared.changed.notify_all();
    }

    /// Whether the vCPUs were last told to run, not to pause.
    pub fn is_running(&self) -> bool {
        self.shared.lock().mode == Mode::Running
    }

    /// Signals `notifier` from now on whenever [`VcpuThreads::wait`] has something to tell: for event loops. It replaces
    /// the one from before.
    pub fn notify(&self, notifier: Notifier) {
        let mut control = self.shared.lock();
        control.notifier = Some(notifier);
        control.notify();
    }

    /// Tells `observer` from now on of each vCPU that stops by itself, before [`VcpuThreads::wait`] does. It replaces the one from
    /// before.
    pub fn observe(&self, observer: Arc<dyn VcpuEvents>) {
        self.shared.lock().observer = Some(observer);
    }

    /// Stops all vCPUs between two instructions and returns when the last one stands still. A callback
    /// that blocks is waited for (a kick interrupts its system call on Linux).
    ///
    /// Returns earlier if another thread resumes the vCPUs meanwhile. From a callback it returns at once, since it
    /// cannot wait for its own vCPU: all vCPUs pause once their callbacks are done.
    pub fn pause(&self) {
        if !self.shared.request_pause() || self.is_own_thread() {
            return;
        }
        let mut control = self.shared.lock();
        while control.mode == Mode::Paused && control.parked.len() < self.threads.len() {
            // A kick may have gone to a callback that blocks: kick again after a while.
            let (guard, timeout) = self
                .shared
                .changed
                .wait_timeout_while(control, Duration::from_millis(10), |control| {
                    control.mode == Mode::Paused && control.parked.len() < self.threads.len()
                })
                .unwrap_or_else(PoisonError::into_inner);
            control = guard;
            if timeout.timed_out() {
                drop(control);
                self.shared.kick();
                control = self.shared.lock();
            }
        }
        tracing::debug!("vCPUs paused");
    }

    /// What pauses the vCPUs from other threads and from callbacks.
    pub fn pause_handle(&self) -> PauseHandle {
        PauseHandle(Arc::downgrade(&self.shared))
    }

    /// Waits at most `timeout` (`None`: for ever) for a vCPU to stop by itself. `None` when the time is up, and when
    /// all vCPUs are paused and none has anything to tell.
    pub fn wait(&self, timeout: Option<Duration>) -> Option<VcpuExit> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut control = self.shared.lock();
        loop {
            if let Some(exit) = control.exits.pop_front() {
                return Some(exit);
            }
            if control.mode == Mode::Paused && control.parked.len() == self.threads.len() {
                return None;
            }
            control = match deadline {
                None => self.shared.wait(control),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    self.shared.changed.wait_timeout(control, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Calls `look` with the vCPU of that index while the vCPUs are paused: to save it, to set registers.
    /// `look` must not call methods of this value, which is locked meanwhile so that nobody resumes.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is no such vCPU or the vCPUs are not paused.
    pub fn with_vcpu<R>(&self, index: u32, look: impl FnOnce(&mut dyn Vcpu) -> R) -> Result<R> {
        let thread = self.threads.iter().find(|thread| thread.index == index).ok_or_else(|| {
            Error::invalid("vCPU index", index, format_args!("one of {:?}", self.indices()))
        })?;
        let control = self.shared.lock();
        if control.mode != Mode::Paused || control.parked.len() < self.threads.len() {
            return Err(Error::invalid(
                "state of the vCPU threads",
                "running",
                "paused; call VcpuThreads::pause",
            ));
        }
        let mut vcpu = thread.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(look(&mut **vcpu))
    }

    /// Indices of the vCPUs.
    pub fn indices(&self) -> Vec<u32> {
        self.threads.iter().map(|thread| thread.index).collect()
    }

    /// The handle of the vCPU of that index.
    pub fn handle(&self, index: u32) -> Option<Arc<dyn VcpuHandle>> {
        self.threads.iter().find(|thread| thread.index == index).map(|thread| Arc::clone(&thread.handle))
    }

    /// Ends all threads and gives back the vCPUs, in the order in which they came. From a callback its own vCPU
    /// is not among them.
    pub fn stop(mut self) -> Vec<Box<dyn Vcpu>> {
        self.join_all()
    }

    /// Whether the calling thread is one of those here, inside of a callback.
    fn is_own_thread(&self) -> bool {
        let current = std::thread::current().id();
        self.threads.iter().any(|thread| thread.join.thread().id() == current)
    }

    fn join_all(&mut self) -> Vec<Box<dyn Vcpu>> {
        self.shared.lock().mode = Mode::Stopping;
        self.shared.changed.notify_all();
        let mut vcpus = Vec::with_capacity(self.threads.len());
        let current = std::thread::current().id();
        for thread in self.threads.drain(..) {
            if thread.join.thread().id() == current {
                // Dropped by a callback: its thread ends when the callback is done.
                thread.handle.kick();
                continue;
            }
            while !thread.join.is_finished() {
                thread.handle.kick();
                std::thread::sleep(Duration::from_micros(200));
            }
            if let Err(panic) = thread.join.join() {
                tracing::error!(
                    vcpu = thread.index,
                    message = panic_message(&*panic),
                    "a vCPU thread panicked"
                );
            }
            // The thread has ended, so this is the last reference.
            if let Some(vcpu) = Arc::into_inner(thread.vcpu) {
                vcpus.push(vcpu.into_inner().unwrap_or_else(PoisonError::into_inner));
            }
        }
        vcpus
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.join_all();
    }
}

fn thread_main(index: u32, shared: &Shared, vcpu: &SharedVcpu, io: &mut (dyn VcpuIo + Send)) {
    let mut stopped_in = None;
    while shared.park(index, stopped_in) {
        let mut guard = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        let result = catch_unwind(AssertUnwindSafe(|| match guard.run(io) {
            Ok(Halt::Halted) => {
                guard.wait(None);
                Ok(Halt::Interrupted)
            }
            result => result,
        }))
        .unwrap_or_else(|panic| {
            Err(Error::ThreadPanicked { index, message: panic_message(&*panic).to_owned() })
        });
        drop(guard);
        if matches!(result, Ok(Halt::Interrupted)) {
            stopped_in = None;
            continue;
        }
        tracing::debug!(vcpu = index, ?result, "vCPU stopped by itself");
        let exit = VcpuExit { index, reason: result };
        let observer = shared.lock().observer.clone();
        if let Some(observer) = observer {
            observer.stopped(&exit);
        }
        let mut control = shared.lock();
        // That of now: a resume during the run does not count.
        stopped_in = Some(control.generation);
        control.exits.push_back(exit);
        shared.changed.notify_all();
        control.notify();
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a value that is no string")
}

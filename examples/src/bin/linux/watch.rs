//! What the program sees of the guest, and what may end the run from outside it: the user, and the time.

use std::io::{self, Read as _, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use vmm_examples::guest_command::{GuestStreams, Heard, SerialPort, Session};
use vmm_examples::pc::Output;
use vmm_examples::terminal::EscapeKeys;

/// Stops the vCPUs when there is a reason to look why; those who raise it say so first.
#[derive(Default)]
pub(crate) struct StopSign(OnceLock<Box<dyn Fn() + Send + Sync>>);

impl StopSign {
    pub(crate) fn reaches(&self, vcpus: impl Fn() + Send + Sync + 'static) {
        self.0.get_or_init(|| Box::new(vcpus));
    }

    pub(crate) fn raise(&self) {
        if let Some(stop) = self.0.get() {
            stop();
        }
    }
}

/// What the program sees of the guest: its output, and when which came.
pub(crate) struct Watch {
    streams: Mutex<Option<Streams>>,
    stop: Arc<StopSign>,
    started: Instant,
    /// The guest began to run here.
    pub(crate) begun: OnceLock<Duration>,
    pub(crate) first_output: OnceLock<Duration>,
    pub(crate) init: OnceLock<Duration>,
    /// The command has ended.
    pub(crate) done: AtomicBool,
    /// The user wants the machine to end.
    pub(crate) enough: AtomicBool,
    /// An output that cannot be written ends the machine.
    pub(crate) broken: AtomicBool,
    /// A program of the guest wants a snapshot.
    pub(crate) snapshot: AtomicBool,
    /// Whether there is to be one.
    takes_snapshots: AtomicBool,
    /// What else ends the machine.
    failure: OnceLock<String>,
}

type Streams = GuestStreams<io::BufWriter<io::Stdout>, io::Stderr>;

impl Watch {
    /// Of a machine that goes on from what was heard of it before, if there is such.
    pub(crate) fn new(
        session: &Session,
        stop: Arc<StopSign>,
        started: Instant,
        heard: Option<Heard>,
        takes_snapshots: bool,
    ) -> Self {
        let mut streams = GuestStreams::new(session, io::BufWriter::new(io::stdout()), io::stderr());
        if let Some(heard) = heard {
            streams.go_on(heard);
        }
        Self {
            streams: Mutex::new(Some(streams)),
            stop,
            started,
            begun: OnceLock::new(),
            first_output: OnceLock::new(),
            init: OnceLock::new(),
            done: AtomicBool::new(false),
            enough: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            snapshot: AtomicBool::new(false),
            takes_snapshots: takes_snapshots.into(),
            failure: OnceLock::new(),
        }
    }

    /// What takes the output of a serial port.
    pub(crate) fn port(watch: &Arc<Self>, port: SerialPort) -> Output {
        Box::new(PortWriter { watch: Arc::clone(watch), port })
    }

    fn receive(&self, port: SerialPort, bytes: &[u8]) -> io::Result<()> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(streams) = streams.as_mut() else { return Ok(()) };
        self.first_output.get_or_init(|| self.started.elapsed());
        let result = streams.receive(port, bytes).and_then(|()| {
            // A line that is complete is to be seen.
            if bytes.contains(&b'\n') { streams.flush() } else { Ok(()) }
        });
        if result.is_err() {
            self.broken.store(true, Ordering::SeqCst);
            self.stop.raise();
        }
        if streams.init_has_begun() {
            self.init.get_or_init(|| self.started.elapsed());
        }
        if self.takes_snapshots.load(Ordering::SeqCst)
            && streams.asks_for_snapshot()
            && !self.snapshot.swap(true, Ordering::SeqCst)
        {
            self.stop.raise();
        }
        if streams.status().is_some() && !self.done.swap(true, Ordering::SeqCst) {
            self.stop.raise();
        }
        result
    }

    /// The guest begins to run.
    pub(crate) fn begin(&self) {
        self.begun.get_or_init(|| self.started.elapsed());
    }

    /// What was heard of the guest, for another process.
    pub(crate) fn heard(&self) -> Heard {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.as_ref().map(GuestStreams::heard).unwrap_or_default()
    }

    /// There is no snapshot, though one was wanted, and will be none.
    pub(crate) fn give_up_snapshots(&self) {
        self.takes_snapshots.store(false, Ordering::SeqCst);
        self.snapshot.store(false, Ordering::SeqCst);
    }

    /// Ends the machine, for that reason.
    pub(crate) fn fail(&self, reason: String) {
        self.failure.get_or_init(|| reason);
        self.stop.raise();
    }

    pub(crate) fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    pub(crate) fn end_by_user(&self) {
        self.enough.store(true, Ordering::SeqCst);
        self.stop.raise();
    }

    /// Ends the streams of a guest that goes on elsewhere, which has no status yet.
    pub(crate) fn leave(&self) -> Result<Option<u8>> {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner).take();
        streams.map_or(Ok(()), |mut streams| streams.flush())?;
        Ok(None)
    }

    /// Ends the streams; the exit status, if the guest gave one.
    pub(crate) fn finish(&self) -> Result<Option<u8>> {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner).take();
        streams.map_or(Ok(None), GuestStreams::finish)
    }
}

/// One serial port's way to the streams.
struct PortWriter {
    watch: Arc<Watch>,
    port: SerialPort,
}

impl Write for PortWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.watch.receive(self.port, bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts the thread that types at the console what comes from standard input.
pub(crate) fn read_keys(
    type_in: impl Fn(&[u8]) + Send + 'static,
    watch: &Arc<Watch>,
    raw: bool,
) -> Result<()> {
    let watch = Arc::clone(watch);
    let keys = move || {
        let (mut escape, mut buffer) = (EscapeKeys::default(), [0; 256]);
        // An input that ends, or breaks, is one that nothing comes from any more.
        while let Ok(length @ 1..) = io::stdin().read(&mut buffer) {
            let typed = buffer.get(..length).unwrap_or_default();
            if !raw {
                type_in(typed);
                continue;
            }
            let mut for_guest = Vec::with_capacity(length);
            let ends = escape.take(typed, &mut for_guest);
            type_in(&for_guest);
            if ends {
                watch.end_by_user();
                return;
            }
        }
    };
    std::thread::Builder::new().name("keys".to_owned()).spawn(keys)?;
    Ok(())
}

/// Starts the thread that stops the vCPUs when the time is up; what tells that it is.
pub(crate) fn alarm(seconds: Option<u64>, stop: &Arc<StopSign>) -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    if let Some(seconds) = seconds {
        let (flag, stop) = (Arc::clone(&flag), Arc::clone(stop));
        let alarm = move || {
            std::thread::sleep(Duration::from_secs(seconds));
            flag.store(true, Ordering::SeqCst);
            stop.raise();
        };
        std::thread::Builder::new().name("alarm".to_owned()).spawn(alarm)?;
    }
    Ok(flag)
}

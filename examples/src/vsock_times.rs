//! How much goes through a socket device, beside a pair of Unix sockets that moves the same bytes in pieces of the same size, on this
//! machine, in the same run. The guest is Debian on the translator, and the programs are those of `guest/vsock`.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::rates::Row;
use crate::thread_times::ThreadTimes;

const PROGRAM: &str = env!("VSOCK_GUEST");

/// Bytes of one send of the guest's program.
const PIECE: usize = 60_000;

/// Whom it is beside.
const PEER: &str = "Unix socket pair";

/// How much there is of each.
#[derive(Clone, Copy, Debug)]
pub struct Amounts {
    /// Bytes in each direction.
    pub bytes: u32,
    /// Messages there and back.
    pub rounds: u32,
    /// Bytes of a message.
    pub message: usize,
}

impl Default for Amounts {
    fn default() -> Self {
        Self { bytes: 256 << 20, rounds: 5000, message: 64 }
    }
}

/// Times all with the program `linux`.
///
/// # Errors
/// If the guest cannot be run, or does not do what it is told.
pub fn rows(linux: &Path, amounts: Amounts) -> Result<Vec<Row>> {
    let Amounts { bytes, rounds, message } = amounts;
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("v");
    let service = |port: u32| UnixListener::bind(format!("{}_{port}", path.display()));
    let listeners = [service(5000)?, service(5001)?, service(5002)?];
    // Each serves one client, which the guest is.
    let [taker, giver, echo] = listeners;
    let monitor = Arc::new(OnceLock::new());
    let taken = timed(&monitor, move |stamp| {
        let mut client = taker.accept()?.0;
        stamp();
        take(&mut client)
    });
    let given = timed(&monitor, move |stamp| {
        let mut client = giver.accept()?.0;
        stamp();
        give(&mut client, bytes)
    });
    thread::spawn(move || send_back(&mut echo.accept()?.0, message));
    let line = format!(
        "cd /root; ./vsock pour 2 5000 {bytes} && ./vsock drain 2 5001 && ./vsock rounds 2 5002 {rounds} {message}"
    );
    let child = Command::new(linux)
        .args(["--backend", "translate", "--memory", "256", "--seconds", "600", "--transport", "pci"])
        .args(["--add", &format!("{PROGRAM}:/root/vsock"), "--vsock", &format!("3,{}", path.display())])
        .args(["--command", &line])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {}", linux.display()))?;
    monitor.get_or_init(|| child.id());
    let output = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let mut figures = text.lines().map(|line| {
        let (amount, ns) = line.split_once(' ')?;
        Some(amount.parse::<f64>().ok()? / (ns.parse::<f64>().ok()? / 1e9))
    });
    let mut figure = || figures.next().flatten().with_context(|| format!("the guest said {text:?}"));
    let mb = 1e6;
    let (there, back, rounds_a_second) = (figure()? / mb, figure()? / mb, figure()?);
    let pair = pair_bytes(bytes)? / mb;
    Ok(vec![
        explained(Row::new("vsock, guest to host, MB/s", there, PEER, pair), taken),
        explained(Row::new("vsock, host to guest, MB/s", back, PEER, pair), given),
        Row::new(
            format!("vsock, {message} bytes to the host and back, /s"),
            rounds_a_second,
            PEER,
            pair_rounds(rounds, message)?,
        ),
    ])
}

/// The monitor's threads before and after.
type Stamps = [ThreadTimes; 2];

/// Serves one client, on a thread, and notes what the monitor's threads have had when `serve` says so and when it is done.
fn timed(
    monitor: &Arc<OnceLock<u32>>,
    serve: impl FnOnce(&mut dyn FnMut()) -> std::io::Result<()> + Send + 'static,
) -> JoinHandle<std::io::Result<Stamps>> {
    let monitor = monitor.clone();
    let now = move || monitor.get().map_or_else(ThreadTimes::default, |process| ThreadTimes::now(*process));
    thread::spawn(move || {
        let mut before = ThreadTimes::default();
        serve(&mut || before = now())?;
        Ok([before, now()])
    })
}

/// A row with whose time it was.
fn explained(row: Row, stamps: JoinHandle<std::io::Result<Stamps>>) -> Row {
    let share = stamps
        .join()
        .ok()
        .and_then(Result::ok)
        .and_then(|[before, after]| after.share(&before, "virtio", "vcpu"));
    let Some(device) = share else { return row };
    let what = row.label.rsplit_once(',').map_or("vsock", |(what, _)| what).to_owned();
    row.remark(format!(
        "{what}: of the monitor's processor time {device:.0} % are the device's, the others the guest's, which is its kernel in translated code"
    ))
}

/// Reads to the end, and says so.
fn take(from: &mut UnixStream) -> std::io::Result<()> {
    let mut piece = vec![0; PIECE];
    while from.read(&mut piece)? > 0 {}
    from.write_all(&[1])
}

fn give(to: &mut UnixStream, bytes: u32) -> std::io::Result<()> {
    let piece = vec![0x5a; PIECE];
    let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
    while left > 0 {
        let part = piece.get(..left).unwrap_or(&piece);
        to.write_all(part)?;
        left -= part.len();
    }
    Ok(())
}

fn send_back(client: &mut UnixStream, size: usize) -> std::io::Result<()> {
    let mut message = vec![0; size];
    while client.read_exact(&mut message).is_ok() {
        client.write_all(&message)?;
    }
    Ok(())
}

/// Bytes a second.
fn pair_bytes(bytes: u32) -> Result<f64> {
    let (mut ours, mut theirs) = UnixStream::pair()?;
    let taker = thread::spawn(move || take(&mut theirs));
    let begun = Instant::now();
    give(&mut ours, bytes)?;
    ours.shutdown(std::net::Shutdown::Write)?;
    ours.read_exact(&mut [0])?;
    let time = begun.elapsed();
    taker.join().map_err(|_| anyhow::anyhow!("the taker panicked"))??;
    Ok(f64::from(bytes) / seconds(time))
}

/// Rounds a second.
fn pair_rounds(rounds: u32, size: usize) -> Result<f64> {
    let (mut ours, mut theirs) = UnixStream::pair()?;
    let echo = thread::spawn(move || send_back(&mut theirs, size));
    let mut message = vec![0x5a; size];
    let begun = Instant::now();
    for _ in 0..rounds {
        ours.write_all(&message)?;
        ours.read_exact(&mut message)?;
    }
    let time = begun.elapsed();
    drop(ours);
    echo.join().map_err(|_| anyhow::anyhow!("the echo panicked"))??;
    Ok(f64::from(rounds) / seconds(time))
}

fn seconds(time: Duration) -> f64 {
    time.as_secs_f64().max(1e-9)
}

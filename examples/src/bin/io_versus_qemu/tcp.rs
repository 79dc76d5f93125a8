//! TCP from guest to guest of `linux`, joined by `net_switch`: bytes beside memcpy, a byte there and back beside the host's loopback.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use vmm_examples::race::Report;
use vmm_examples::rates::Row;

use crate::guest::WORKLOAD;
use crate::server;
use crate::shared_memory::{Guest, memcpy};

/// Round trips on the host.
const ROUNDS: u32 = 5000;

const WORK: [&str; 2] = ["net-send", "net-ping-pong"];

/// Both rows, from guests of the program `linux` on a switch of the program `net_switch`.
///
/// # Errors
/// If one of the three cannot be run, or does not do what it is told.
pub(crate) fn rows(linux: &Path, net_switch: &Path) -> Result<Vec<Row>> {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("lan");
    let mut broker = Command::new(net_switch);
    broker.arg("--socket").arg(&socket).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut broker = Guest(broker.spawn().with_context(|| net_switch.display().to_string())?);
    let mut line = String::new();
    BufReader::new(broker.0.stdout.as_mut().context("its output")?).read_line(&mut line)?;
    ensure!(line.contains("listening"), "{} said {line:?}", net_switch.display());

    let guest = |number: u32, line: &str| -> Result<Guest> {
        let net = format!("switch={},name=g{number},mac=52:54:00:00:00:0{number}", socket.display());
        let line = format!("ip link set eth0 up; ip addr add 10.9.0.{number}/24 dev eth0; {line}");
        let mut command = Command::new(linux);
        command.args(["--backend", "translate", "--transport", "pci", "--memory", "256", "--seconds", "120"]);
        command.args(["--net", &net, "--add", &format!("{WORKLOAD}:/bin/workload"), "--command", &line]);
        command.env_remove("RUST_LOG").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(Guest(command.spawn().with_context(|| linux.display().to_string())?))
    };
    let _server = guest(2, "workload serve 10.9.0.2:7000")?;
    // A port that nobody listens at refuses a connection at once; one that sends nothing is let go.
    let client = guest(
        1,
        &format!(
            "until nc -w 1 10.9.0.2 7000 </dev/null >/dev/null 2>&1; do sleep 0.1; done; export server=10.9.0.2:7000; \
             workload time {}",
            WORK.join(" ")
        ),
    )?;
    let text = client.output()?;
    let mut report = Report::new(&WORK);
    for line in text.lines() {
        report.take(std::time::Duration::ZERO, line);
    }
    let figure = |name: &str| {
        let each = report.figures.get(name).copied();
        each.map(|nanoseconds| 1e9 / nanoseconds).with_context(|| format!("the guest said {text:?}"))
    };
    let [send, ping_pong] = WORK.map(figure);
    Ok(vec![
        Row::new("TCP from guest to guest, MB/s", send? * 1.048_576, "memcpy", memcpy() * 1e3),
        Row::new(
            "a byte from guest to guest and back by TCP, /s",
            ping_pong?,
            "TCP on loopback",
            loopback()?,
        ),
    ])
}

/// Times a second that a byte goes to a thread and back.
fn loopback() -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut stream = TcpStream::connect(listener.local_addr()?)?;
    thread::spawn(move || server::serve(&listener));
    stream.set_nodelay(true)?;
    stream.write_all(b"P")?;
    stream.write_all(&u64::from(ROUNDS).to_le_bytes())?;
    let begun = Instant::now();
    for _ in 0..ROUNDS {
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
    }
    Ok(f64::from(ROUNDS) / begun.elapsed().as_secs_f64())
}

//! A named port of a virtio console, joined to a Unix socket: bytes both ways between a program in the guest and one here.
//!
//! One client at a time. The guest sees the port open while there is one, reads the end of file when the client has
//! sent all it had to send, and waits in its writes for the next one. Nothing is lost where one side is slower than the other:
//! it waits. What the guest has written and nobody has read when the machine ends is lost.

use std::io::{self, Read as _, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, ensure};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use vmm_devices::virtio::console::{Port, PortConfig, PortEvent, Ports};

use crate::socket;

/// Bytes that wait for a guest that does not read.
const CAPACITY: usize = 64 << 10;

/// How often one looks whether the guest has read the last of what a client sent.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// A port that a user wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedPort {
    /// What it is called in the guest: `/dev/virtio-ports/NAME`.
    pub name: String,
    /// The socket here.
    pub path: PathBuf,
}

impl FromStr for NamedPort {
    type Err = anyhow::Error;

    /// `NAME,PATH`.
    fn from_str(text: &str) -> Result<Self> {
        let parts = text.split_once(',').filter(|(_, path)| !path.is_empty());
        let (name, path) = parts.with_context(|| format!("{text:?} is not NAME,PATH"))?;
        // It is the name of a file in the guest, and a word of its shell.
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        ensure!(
            (1..=64).contains(&name.len())
                && name.chars().all(plain)
                && name.starts_with(|c: char| c.is_ascii_alphanumeric()),
            "{name:?} is no name of a port: those have 1 to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
        );
        Ok(Self { name: name.to_owned(), path: path.into() })
    }
}

impl NamedPort {
    /// Makes it port `id` of a console, and starts the thread that serves its clients.
    pub(super) fn start(&self, ports: &Ports, id: u32) -> Result<Port> {
        let Self { name, path } = self;
        let listener = socket::listen(path).with_context(|| format!("port {name}"))?;
        let bell = Arc::new(Bell::new().context("an eventfd")?);
        let room = Arc::clone(&bell);
        let config = PortConfig::channel(name, io::sink()).closed().input_capacity(CAPACITY);
        let port = ports.add(
            id,
            config.events(move |event: PortEvent<'_>| {
                if matches!(event, PortEvent::InputRoom) {
                    room.ring();
                }
            }),
        )?;
        let (shown, served) = (name.clone(), port.clone());
        let clients = move || {
            if let Err(error) = serve(&listener, &served, &bell) {
                tracing::warn!(port = shown, %error, "no more clients");
            }
        };
        std::thread::Builder::new().name(format!("port {name}")).spawn(clients).context("a thread")?;
        Ok(port)
    }
}

/// Wakes the thread of a port.
struct Bell {
    event: OwnedFd,
    /// The client has no room for output.
    blocked: AtomicBool,
}

impl Bell {
    fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { event, blocked: AtomicBool::new(false) })
    }

    fn ring(&self) {
        // One that takes no more has rung already.
        let (Ok(_) | Err(_)) = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    fn silence(&self) {
        // One that gives nothing is silent.
        let (Ok(_) | Err(_)) = rustix::io::read(&self.event, &mut [0; 8]);
    }
}

/// What the guest sends goes to the client, if that has room.
struct ToClient {
    client: Arc<UnixStream>,
    bell: Arc<Bell>,
}

impl Write for ToClient {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        // All devices share the thread that calls this.
        let sent = send(&self.client, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        if sent == Err(Errno::AGAIN) {
            self.bell.blocked.store(true, Ordering::SeqCst);
            self.bell.ring();
        }
        Ok(sent?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Serves one client after another.
fn serve(listener: &UnixListener, port: &Port, bell: &Arc<Bell>) -> io::Result<()> {
    loop {
        let (client, _) = listener.accept()?;
        let client = Arc::new(client);
        port.replace_output(ToClient { client: Arc::clone(&client), bell: Arc::clone(bell) });
        port.open();
        let ended = converse(&client, port, bell);
        port.close();
        // The last that holds the connection.
        port.replace_output(io::sink());
        bell.blocked.store(false, Ordering::SeqCst);
        if let Err(error) = ended {
            tracing::debug!(%error, "a client is gone");
        }
    }
}

/// Until the client sends no more, and each has what the other sent.
fn converse(mut client: &UnixStream, port: &Port, bell: &Bell) -> io::Result<()> {
    let (mut buffer, mut pending, mut ended) = ([0; 16 << 10], 0..0, false);
    loop {
        pending.start += port.enqueue(buffer.get(pending.clone()).unwrap_or_default());
        let reads = pending.is_empty() && !ended;
        let blocked = bell.blocked.load(Ordering::SeqCst);
        if ended && pending.is_empty() && port.room() == CAPACITY && !blocked {
            return Ok(());
        }
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, reads);
        wanted.set(PollFlags::OUT, blocked);
        let mut polled = vec![PollFd::new(&bell.event, PollFlags::IN)];
        // One that nothing is wanted of would still say again and again that it has hung up.
        if !wanted.is_empty() {
            polled.push(PollFd::new(&client, wanted));
        }
        match poll(&mut polled, ended.then_some(&LOOK)) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let found: Vec<PollFlags> = polled.iter().map(PollFd::revents).collect();
        let is_found = |index: usize| found.get(index).is_some_and(|found| !found.is_empty());
        if is_found(0) {
            bell.silence();
        }
        if !is_found(1) {
            continue;
        }
        if found.get(1).is_some_and(|found| *found != PollFlags::IN)
            && bell.blocked.swap(false, Ordering::SeqCst)
        {
            port.resume();
        }
        if reads && found.get(1).is_some_and(|found| *found != PollFlags::OUT) {
            pending = 0..client.read(&mut buffer)?;
            ended = pending.is_empty();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;
    use std::time::{Duration, Instant};

    use vmm_devices::virtio::Console;

    use super::*;

    fn wait_until(is_so: impl Fn() -> bool) {
        let started = Instant::now();
        while !is_so() {
            assert!(started.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_client_is_there_until_the_guest_has_what_it_sent() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let (_console, ports) = Console::multiport(2).unwrap();
        let port = NamedPort { name: "talk".to_owned(), path: path.clone() }.start(&ports, 1).unwrap();
        assert!(!port.is_open(), "nobody is there");
        let mut client = UnixStream::connect(&path).unwrap();
        // More than waits for a guest, and less than the socket takes beside it.
        client.write_all(&vec![7; CAPACITY + 100]).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut next = UnixStream::connect(&path).unwrap();
        next.write_all(b"next").unwrap();
        wait_until(|| port.room() == 0);
        // The guest reads, here all at once.
        assert_eq!(port.discard_input(), CAPACITY);
        wait_until(|| port.room() == CAPACITY - 100);
        // Time for what must not be. The guest would take it for the end.
        std::thread::sleep(Duration::from_millis(50));
        assert!(port.is_open() && port.room() == CAPACITY - 100);
        assert_eq!(port.discard_input(), 100);
        assert_eq!(client.read(&mut [0]).unwrap(), 0, "its conversation has ended");
        wait_until(|| port.is_open() && port.room() == CAPACITY - 4);
        assert_eq!(port.discard_input(), 4);
        drop(next);
        wait_until(|| !port.is_open());
    }

    #[test]
    fn a_port_has_a_name_that_a_shell_and_a_directory_take() {
        let port: NamedPort = "org.qemu.guest_agent.0,/run/with,comma".parse().unwrap();
        assert_eq!((&*port.name, port.path.to_str()), ("org.qemu.guest_agent.0", Some("/run/with,comma")));
        let long = format!("{},path", "x".repeat(65));
        for text in [
            "name",
            "name,",
            ",path",
            "a/b,path",
            ".,path",
            "..,path",
            "-f,path",
            "a b,path",
            "a$(b),path",
            &long,
        ] {
            assert!(text.parse::<NamedPort>().is_err(), "{text}");
        }
    }
}

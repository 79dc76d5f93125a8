//! Syslog: RFC 5424 messages over a Unix socket or TCP (RFC 6587).

use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use super::{Delivery, Sink, SinkError, describe, severity};
use crate::event::rfc3339;

/// Where messages go.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SyslogTarget {
    /// A datagram socket of this host, such as `/dev/log`.
    Datagram(PathBuf),
    /// A stream socket of this host.
    Stream(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
}

/// How messages are told apart on a stream (RFC 6587, 3.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// Each begins with its length.
    OctetCounting,
    /// Each ends with a newline.
    Newline,
}

enum Connection {
    Datagram(UnixDatagram),
    Stream(UnixStream),
    Tcp(TcpStream),
}

/// Sends entries to a syslog daemon. It connects when there is something to send, and again after an error.
pub struct Syslog {
    target: SyslogTarget,
    framing: Framing,
    facility: u8,
    host: String,
    connection: Option<Connection>,
}

/// How long a daemon may take to take something.
const TIMEOUT: Duration = Duration::from_secs(5);

impl Syslog {
    /// To this daemon, with octet counting where messages have to be told apart, as facility 13 (log audit).
    pub fn new(target: SyslogTarget) -> Self {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let host: String = host.chars().filter(char::is_ascii_graphic).take(255).collect();
        let host = if host.is_empty() { "-".to_owned() } else { host };
        Self { target, framing: Framing::OctetCounting, facility: 13, host, connection: None }
    }

    /// With another framing.
    #[must_use]
    pub fn framing(mut self, framing: Framing) -> Self {
        self.framing = framing;
        self
    }

    /// With another facility (RFC 5424, table 1), 0 to 23.
    #[must_use]
    pub fn facility(mut self, facility: u8) -> Self {
        self.facility = facility.min(23);
        self
    }

    fn connect(&self) -> io::Result<Connection> {
        Ok(match &self.target {
            SyslogTarget::Datagram(path) => {
                let socket = UnixDatagram::unbound()?;
                socket.connect(path)?;
                socket.set_write_timeout(Some(TIMEOUT))?;
                Connection::Datagram(socket)
            }
            SyslogTarget::Stream(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_write_timeout(Some(TIMEOUT))?;
                Connection::Stream(stream)
            }
            SyslogTarget::Tcp(address) => {
                let stream = TcpStream::connect_timeout(address, TIMEOUT)?;
                stream.set_write_timeout(Some(TIMEOUT))?;
                stream.set_nodelay(true)?;
                Connection::Tcp(stream)
            }
        })
    }

    fn transmit(&mut self, message: &str) -> io::Result<()> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect()?,
        };
        let framed = match self.framing {
            Framing::OctetCounting => format!("{} {message}", message.len()),
            Framing::Newline => format!("{message}\n"),
        };
        let sent = match &connection {
            Connection::Datagram(socket) => socket.send(message.as_bytes()).map(drop),
            Connection::Stream(stream) => (&mut &*stream).write_all(framed.as_bytes()),
            Connection::Tcp(stream) => (&mut &*stream).write_all(framed.as_bytes()),
        };
        // After an error nobody knows how much of a message is on its way: a new connection begins anew.
        sent?;
        self.connection = Some(connection);
        Ok(())
    }

    /// The message of RFC 5424, 6.
    fn message(&self, delivery: &Delivery) -> String {
        let event = &delivery.event;
        let priority = self.facility * 8 + severity(event);
        // Six digits of a second are allowed (6.2.3).
        let time = rfc3339(event.wall);
        let time = time.get(..26).map_or_else(|| time.clone(), |time| format!("{time}Z"));
        let mut data = format!("[vmm-audit@32473 seq=\"{}\" source=\"{}\"", delivery.seq, delivery.source);
        let mut parameter = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                data += &format!(" {name}=\"{}\"", escape(&value));
            }
        };
        parameter("kind", Some(event.kind.to_string()));
        parameter("action", event.action.map(|action| action.to_string()));
        parameter("verdict", event.verdict.map(|verdict| verdict.to_string()));
        parameter("outcome", event.outcome.map(|outcome| outcome.to_string()));
        parameter("subject", event.subject.as_ref().map(ToString::to_string));
        parameter("peer", event.peer.as_ref().map(ToString::to_string));
        parameter("object", event.object.as_ref().map(ToString::to_string));
        parameter("rule", event.rule.as_ref().map(ToString::to_string));
        parameter("policy", event.policy.as_ref().map(ToString::to_string));
        parameter("request", event.request.as_ref().map(ToString::to_string));
        parameter("count", (event.count != 0).then(|| event.count.to_string()));
        parameter("lost", (event.lost != 0).then(|| event.lost.to_string()));
        data.push(']');
        let text = describe(event).replace(char::is_control, "\u{fffd}");
        format!("<{priority}>1 {time} {} vmm-audit - {} {data} {text}", self.host, event.kind)
    }
}

/// RFC 5424, 6.3.3; control characters would end a message on a stream of lines.
fn escape(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '"' | '\\' | ']' => escaped.extend(['\\', c]),
            c if c.is_control() => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

impl Sink for Syslog {
    fn send(&mut self, delivery: &Delivery) -> Result<(), SinkError> {
        let message = self.message(delivery);
        let name = || match &self.target {
            SyslogTarget::Datagram(path) | SyslogTarget::Stream(path) => {
                format!("syslog at {}", path.display())
            }
            SyslogTarget::Tcp(address) => format!("syslog at {address}"),
        };
        let name = name();
        self.transmit(&message).map_err(|source| SinkError::Io { sink: name, source })
    }
}

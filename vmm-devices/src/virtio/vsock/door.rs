//! Programs of the host that come in: they connect to the socket, and say which of the guest's ports they want. They may as well say
//! nothing, or nonsense; each has a place and a time.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketFlags, accept_with, recv};

use super::HOST_CID;
use super::far::again;
use super::host::HostSockets;
use super::packet::Kind;
use super::poll::Poll;
use super::slots::Tag;
use super::socket::{Socket, WHILE_FULL};
use crate::closer::Closer;

/// Programs that have not said what they want.
const MAX_WAITING: usize = 64;

/// `CONNECT 4294967295` and a line feed.
const LONGEST_LINE: usize = 32;

/// Nanoseconds until a host that has no descriptors is asked again.
const AFTER_FAILURE: u64 = 100_000_000;

const LISTENER: Tag = 1 << 63;
const WAITING: Tag = 1 << 62;

/// Who wants which port.
#[derive(Debug)]
pub(super) struct Knock {
    pub(super) socket: Socket,
    pub(super) kind: Kind,
    pub(super) port: u32,
}

#[derive(Debug)]
struct Waiting {
    socket: Socket,
    kind: Kind,
    deadline: u64,
    readable: bool,
    tag: Tag,
}

#[derive(Debug)]
struct Listener {
    socket: Arc<OwnedFd>,
    kind: Kind,
    /// Somebody may be there.
    ready: bool,
}

/// Those who come in.
pub(super) struct Door {
    listeners: Vec<Listener>,
    waiting: Vec<Waiting>,
    knocks: Vec<Knock>,
    /// Where the sockets of those who come in are closed.
    closer: Arc<Closer>,
    /// The kernel lets no descriptors into them.
    takes_none: bool,
    patience_ns: u64,
    retry: Option<u64>,
    next: u32,
}

impl Door {
    pub(super) fn open(host: &HostSockets, poll: &Poll, patience_ns: u64) -> std::io::Result<Self> {
        let mut listeners = Vec::new();
        for (tag, (socket, kind)) in (LISTENER..).zip(host.listeners()) {
            // One that an earlier driver's worker had left in its set is another set's.
            poll.add(socket.as_fd(), tag)?;
            listeners.push(Listener { socket: Arc::clone(socket), kind: *kind, ready: true });
        }
        let closer = Arc::clone(host.closer());
        let (waiting, knocks) = (Vec::new(), Vec::new());
        let takes_none = host.takes_none();
        Ok(Self { listeners, waiting, knocks, closer, takes_none, patience_ns, retry: None, next: 0 })
    }

    /// Whether that is for it to hear.
    pub(super) fn owns(tag: Tag) -> bool {
        tag & (LISTENER | WAITING) != 0
    }

    pub(super) fn hear(&mut self, tag: Tag) {
        if let Some(listener) = tag.checked_sub(LISTENER) {
            let listener = usize::try_from(listener).ok().and_then(|index| self.listeners.get_mut(index));
            if let Some(listener) = listener {
                listener.ready = true;
            }
        } else if let Some(waiting) = self.waiting.iter_mut().find(|waiting| waiting.tag == tag) {
            waiting.readable = true;
        }
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        self.waiting.iter().map(|waiting| waiting.deadline).chain(self.retry).min()
    }

    /// Looks at who came, and hears what they want. `true` if there is more.
    pub(super) fn work(&mut self, poll: &Poll, now: u64, most: usize) -> bool {
        if self.retry.is_some_and(|retry| retry <= now) {
            self.retry = None;
        }
        self.listen_to(poll, now);
        if self.retry.is_some() {
            return false;
        }
        for _ in 0..most {
            let full = self.waiting.len() >= MAX_WAITING;
            let Some(listener) = self.listeners.iter_mut().find(|listener| listener.ready && !full) else {
                // Who waits before a full door comes in when somebody leaves, by then at the latest.
                return false;
            };
            if self.closer.is_full() {
                self.retry = Some(now.saturating_add(WHILE_FULL));
                return false;
            }
            match again(|| accept_with(&listener.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)) {
                Ok(socket) => {
                    self.next = self.next.wrapping_add(1);
                    let socket = Socket::of(socket, &self.closer, HOST_CID).has_none(self.takes_none);
                    let tag = WAITING | Tag::from(self.next);
                    let (kind, deadline) = (listener.kind, now.saturating_add(self.patience_ns));
                    if poll.add(socket.as_fd(), tag).is_ok() {
                        self.waiting.push(Waiting { socket, kind, deadline, readable: true, tag });
                    }
                    self.listen_to(poll, now);
                }
                Err(Errno::AGAIN) => listener.ready = false,
                Err(Errno::CONNABORTED) => {}
                Err(_) => {
                    self.retry = Some(now.saturating_add(AFTER_FAILURE));
                    return false;
                }
            }
            // What is heard of one is told before the next.
            if self.knocks.len() >= MAX_WAITING {
                return true;
            }
        }
        true
    }

    fn listen_to(&mut self, poll: &Poll, now: u64) {
        let knocks = &mut self.knocks;
        let still = self.waiting.drain(..).filter_map(|mut waiting| {
            if std::mem::take(&mut waiting.readable) {
                match hear_line(&waiting.socket) {
                    Line::Wants(port) => {
                        // What comes from now on is the connection's.
                        poll.remove(waiting.socket.as_fd());
                        knocks.push(Knock { socket: waiting.socket, kind: waiting.kind, port });
                        return None;
                    }
                    Line::Nonsense => return None,
                    Line::Unfinished => {}
                }
            }
            (waiting.deadline > now).then_some(waiting)
        });
        self.waiting = still.collect();
    }

    /// Those who have said what they want. They are watched no more.
    pub(super) fn take(&mut self) -> Vec<Knock> {
        std::mem::take(&mut self.knocks)
    }
}

enum Line {
    Wants(u32),
    Unfinished,
    Nonsense,
}

/// Reads `CONNECT <port>` and a line feed, and nothing of what comes behind.
fn hear_line(socket: &Socket) -> Line {
    let mut line = [0; LONGEST_LINE];
    let len = match socket.look(&mut line) {
        Ok((len, false)) if len > 0 => len,
        Err(Errno::AGAIN) => return Line::Unfinished,
        _ => return Line::Nonsense,
    };
    let line = line.get(..len).unwrap_or_default();
    let Some(end) = line.iter().position(|byte| *byte == b'\n') else {
        return if len < LONGEST_LINE { Line::Unfinished } else { Line::Nonsense };
    };
    let (words, _) = line.split_at(end);
    let Some(port) = parse(words) else { return Line::Nonsense };
    let mut taken = vec![0; end + 1];
    match again(|| recv(socket, &mut taken, RecvFlags::DONTWAIT)) {
        Ok((len, _)) if len == end + 1 => Line::Wants(port),
        _ => Line::Nonsense,
    }
}

/// The port, decimal. All ones mean any port, which nobody can be at.
fn parse(words: &[u8]) -> Option<u32> {
    let words = words.strip_suffix(b"\r").unwrap_or(words);
    let digits = words.strip_prefix(b"CONNECT ").or_else(|| words.strip_prefix(b"connect "))?;
    let plain = (1..=10).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
    let port = std::str::from_utf8(digits).ok().filter(|_| plain)?.parse::<u32>().ok()?;
    (port != super::ANY_PORT).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn a_line_names_a_port() {
        assert_eq!(parse(b"CONNECT 52"), Some(52));
        assert_eq!(parse(b"connect 4294967294\r"), Some(u32::MAX - 1));
        for nonsense in [
            "",
            "CONNECT",
            "CONNECT ",
            "CONNECT x",
            "CONNECT -1",
            "CONNECT +1",
            "CONNECT 4294967295",
            "CONNECT 4294967296",
            "CONNECT 1 ",
            "CONNECT  1",
            "CONNECT 00000000001",
        ] {
            assert_eq!(parse(nonsense.as_bytes()), None, "{nonsense:?}");
        }
    }
}

//! Where descriptors that the other side has passed are closed, and what may have such under way.
//!
//! A close can wait for who has made the file: for the answer of a file system in user space to its flush, for a TCP socket's linger. The
//! close of a socket is that of all that its messages carry which nobody has read. So threads of this do it, for whose turn nobody
//! waits. They are there from the beginning: a process that has confined itself makes none.
//!
//! Whoever is stuck here has one thread. When all are, what is to be closed is kept, for it is not known what would be safe to close; it is
//! for the owner to let nobody else in while there is so much of it ([`Closer::is_full`]), which bounds it by those who are in.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

use crate::interrupt::lock;

/// What waits at most before nobody else is let in.
pub(crate) const MOST: usize = 64;

pub(crate) struct Closer {
    sender: Sender<Box<dyn Send>>,
    left: Arc<AtomicUsize>,
}

impl Closer {
    /// By so many threads of that name; `waker` is woken when there is room again.
    pub(crate) fn new(name: &str, threads: usize, waker: Option<&Arc<OwnedFd>>) -> io::Result<Self> {
        let (sender, receiver) = channel::<Box<dyn Send>>();
        let receiver = Arc::new(Mutex::new(receiver));
        let left = Arc::<AtomicUsize>::default();
        for _ in 0..threads {
            let (receiver, left, waker) = (Arc::clone(&receiver), Arc::clone(&left), waker.cloned());
            let serve = move || {
                loop {
                    let next = lock(&receiver).recv();
                    let Ok(what) = next else { return };
                    drop(what);
                    let was_full = left.fetch_sub(1, Ordering::SeqCst) == MOST;
                    if let Some(waker) = waker.as_ref().filter(|_| was_full) {
                        let (Ok(_) | Err(_)) = rustix::io::write(waker, &1_u64.to_ne_bytes());
                    }
                }
            };
            std::thread::Builder::new().name(name.to_owned()).spawn(serve)?;
        }
        Ok(Self { sender, left })
    }

    /// Closes that, some time.
    pub(crate) fn close(&self, what: impl Send + 'static) {
        self.left.fetch_add(1, Ordering::SeqCst);
        if let Err(kept) = self.sender.send(Box::new(what)) {
            // The threads are there as long as this is.
            std::mem::forget(kept);
        }
    }

    /// Whether nobody else is to be let in.
    pub(crate) fn is_full(&self) -> bool {
        self.left() >= MOST
    }

    /// How much is to be closed.
    pub(crate) fn left(&self) -> usize {
        self.left.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    /// A descriptor whose close waits for a minute, and what ends that when it is dropped: as of a file whose server is hostile (FUSE).
    /// Send it, and drop it.
    pub(crate) fn stubborn() -> (OwnedFd, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stubborn = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (other, _) = listener.accept().unwrap();
        stubborn.set_nonblocking(true).unwrap();
        while stubborn.write(&[0; 1 << 16]).is_ok() {}
        rustix::net::sockopt::set_socket_linger(&stubborn, Some(Duration::from_secs(60))).unwrap();
        // Lingering is for sockets that wait.
        stubborn.set_nonblocking(false).unwrap();
        (stubborn.into(), other)
    }

    /// What `f` makes, which it does not take long for.
    pub(crate) fn soon<T: Send + 'static>(what: &str, f: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || tell.send(f()));
        told.recv_timeout(Duration::from_secs(10)).unwrap_or_else(|_| panic!("it waits: {what}"))
    }
}

//! Where descriptors that the other side has passed are closed, and what may have such under way.
//!
//! A close can wait for who has made the file: for the answer of a file system in user space to its flush, for a TCP socket's linger. The
//! close of a socket is that of all that its messages carry which nobody has read. So threads of this do it, for whose turn nobody
//! waits. They are there from the beginning: a process that has confined itself makes none.
//!
//! What is stuck here has one thread, and so has all that is of one ([`Closer::close_of`]). When no thread is left, what is to be closed is
//! kept, for it is not known what would be safe to close; it is for the owner to let nobody else in while there is so much of it
//! ([`Closer::is_full`]), which bounds it by those who are in.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use rustix::net::{Shutdown, shutdown};

use crate::interrupt::lock;

/// What waits at most before nobody else is let in.
pub(crate) const MOST: usize = 64;

pub(crate) struct Closer(Arc<Work>);

#[derive(Default)]
struct Work {
    queue: Mutex<Queue>,
    more: Condvar,
}

#[derive(Default)]
struct Queue {
    /// For the next thread that is free, with whose it is.
    next: VecDeque<(Option<u32>, Box<dyn Send>)>,
    /// What waits for another of the same one's, which is in there or under way.
    behind: BTreeMap<u32, VecDeque<Box<dyn Send>>>,
    left: usize,
    ended: bool,
}

impl Closer {
    /// By so many threads of that name; `waker` is woken when there is room again.
    pub(crate) fn new(name: &str, threads: usize, waker: Option<&Arc<OwnedFd>>) -> io::Result<Self> {
        let closer = Self(Arc::default());
        for _ in 0..threads {
            let (work, waker) = (Arc::clone(&closer.0), waker.cloned());
            let serve = move || work.serve(waker.as_deref());
            std::thread::Builder::new().name(name.to_owned()).spawn(serve)?;
        }
        Ok(closer)
    }

    /// Closes that, some time.
    pub(crate) fn close(&self, what: impl Send + 'static) {
        self.put(None, Box::new(what));
    }

    /// The same, when nothing else of the same one's is under way.
    pub(crate) fn close_of(&self, whose: u32, what: impl Send + 'static) {
        self.put(Some(whose), Box::new(what));
    }

    /// Closes a socket that is listened at, where nobody gets in from now on. Who has, and was not accepted, may have sent something.
    pub(crate) fn close_listener(&self, listener: impl AsFd + Send + 'static) {
        // Who comes next to its path sees by that that nobody is there any more.
        let (Ok(()) | Err(_)) = shutdown(&listener, Shutdown::Both);
        self.close(listener);
    }

    fn put(&self, whose: Option<u32>, what: Box<dyn Send>) {
        let mut queue = lock(&self.0.queue);
        queue.left += 1;
        if let Some(whose) = whose {
            if let Some(behind) = queue.behind.get_mut(&whose) {
                behind.push_back(what);
                return;
            }
            queue.behind.insert(whose, VecDeque::new());
        }
        queue.next.push_back((whose, what));
        self.0.more.notify_one();
    }

    /// Whether nobody else is to be let in.
    pub(crate) fn is_full(&self) -> bool {
        self.left() >= MOST
    }

    /// How much is to be closed.
    pub(crate) fn left(&self) -> usize {
        lock(&self.0.queue).left
    }

    /// How much of that is of one.
    pub(crate) fn left_of(&self, whose: u32) -> usize {
        lock(&self.0.queue).behind.get(&whose).map_or(0, |behind| behind.len() + 1)
    }
}

impl Drop for Closer {
    fn drop(&mut self) {
        lock(&self.0.queue).ended = true;
        self.0.more.notify_all();
    }
}

impl Work {
    /// What there is, and what comes.
    fn serve(&self, waker: Option<&OwnedFd>) {
        let mut queue = lock(&self.queue);
        loop {
            let Some((whose, what)) = queue.next.pop_front() else {
                if queue.ended {
                    return;
                }
                queue = self.more.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(queue);
            drop(what);
            queue = lock(&self.queue);
            if let Some(whose) = whose {
                match queue.behind.get_mut(&whose).and_then(VecDeque::pop_front) {
                    // Behind those of others.
                    Some(what) => queue.next.push_back((Some(whose), what)),
                    None => drop(queue.behind.remove(&whose)),
                }
            }
            queue.left -= 1;
            if let Some(waker) = waker.filter(|_| queue.left + 1 == MOST) {
                let (Ok(_) | Err(_)) = rustix::io::write(waker, &1_u64.to_ne_bytes());
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::VecDeque;
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::OwnedFd;
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use super::{Closer, MOST};

    /// Half as long as what is stubborn.
    const LONGEST: Duration = Duration::from_secs(30);

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
        let (tell, told) = channel();
        std::thread::spawn(move || tell.send(f()));
        told.recv_timeout(LONGEST).unwrap_or_else(|_| panic!("it waits: {what}"))
    }

    /// Something whose close is told of by its number, and waits for the other half to be dropped.
    struct Slow(u32, Sender<u32>, Receiver<()>);

    impl Drop for Slow {
        fn drop(&mut self) {
            let (Ok(()) | Err(_)) = self.1.send(self.0);
            assert!(self.2.recv().is_err());
        }
    }

    #[test]
    fn one_has_one_thread_and_the_others_have_theirs() {
        let closer = Closer::new("close", 2, None).unwrap();
        let (tell, told) = channel();
        let mut holds = VecDeque::new();
        let mut slow = |number| {
            let (hold, held) = channel();
            holds.push_back(hold);
            Slow(number, tell.clone(), held)
        };
        for number in 0..3 {
            closer.close_of(7, slow(number));
        }
        assert_eq!(told.recv_timeout(LONGEST), Ok(0));
        // Another, and nobody's, have the other thread in turn.
        closer.close_of(8, slow(3));
        assert_eq!(told.recv_timeout(LONGEST), Ok(3));
        closer.close(slow(4));
        closer.close(slow(5));
        assert_eq!(told.try_recv().ok(), None);
        assert_eq!((closer.left_of(7), closer.left_of(8), closer.left_of(9), closer.left()), (3, 1, 0, 6));
        drop(holds.remove(3));
        assert_eq!(told.recv_timeout(LONGEST), Ok(4));
        // The next of its own comes behind the others'.
        drop(holds.pop_front());
        assert_eq!(told.recv_timeout(LONGEST), Ok(5));
        // What is left when this is dropped is closed as well.
        drop(closer);
        drop(holds);
        drop(tell);
        assert_eq!(told.into_iter().collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn who_waits_for_room_is_told_when_there_is_some() {
        let flags = rustix::event::EventfdFlags::NONBLOCK;
        let waker = Arc::new(rustix::event::eventfd(0, flags).unwrap());
        let closer = Closer::new("close", 1, Some(&waker)).unwrap();
        let (tell, told) = channel();
        let mut holds = Vec::new();
        for number in 0..=MOST {
            assert_eq!(closer.is_full(), number == MOST);
            let (hold, held) = channel();
            holds.push(hold);
            closer.close(Slow(0, tell.clone(), held));
        }
        let is_woken = || rustix::io::read(&waker, &mut [0; 8]).is_ok();
        assert_eq!(told.recv_timeout(LONGEST), Ok(0));
        let mut holds = holds.into_iter();
        for woken in [false, true] {
            drop(holds.next());
            // The next is under way.
            assert_eq!(told.recv_timeout(LONGEST), Ok(0));
            assert_eq!((closer.is_full(), is_woken()), (!woken, woken));
        }
    }
}

//! Doorbells: a driver, or another part of the monitor, says that a queue has something to be looked at.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

type Waker = Arc<dyn Fn(u16) + Send + Sync>;

/// The doorbells of one device, for one activation. Whoever rings early is not forgotten.
pub struct Doorbells {
    rung: Box<[AtomicBool]>,
    waker: RwLock<Option<Waker>>,
    notifiers: Notifiers,
}

/// An eventfd for each queue of a device, or none at all.
pub(crate) type Notifiers = Arc<[Arc<OwnedFd>]>;

impl fmt::Debug for Doorbells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doorbells").field("queues", &self.rung.len()).finish_non_exhaustive()
    }
}

impl Doorbells {
    /// Of `queues` queues. Nobody hears them yet.
    pub fn new(queues: usize) -> Self {
        Self::with_notifiers(queues, Notifiers::default())
    }

    /// The same, where the kernel rings by eventfds: those of [`Executor::notifiers`](super::Executor::notifiers).
    pub fn with_notifiers(queues: usize, notifiers: Arc<[Arc<OwnedFd>]>) -> Self {
        Self {
            rung: (0..queues).map(|_| AtomicBool::new(false)).collect(),
            waker: RwLock::default(),
            notifiers,
        }
    }

    /// The eventfd by which `queue` is rung as well, if there is one. Who hears the doorbells polls it, and does not read it.
    pub fn notifier(&self, queue: u16) -> Option<&Arc<OwnedFd>> {
        self.notifiers.get(usize::from(queue))
    }

    /// Says that `queue` is to be looked at. One that there is not does nothing.
    pub fn ring(&self, queue: u16) {
        let Some(rung) = self.rung.get(usize::from(queue)) else { return };
        if let Some(waker) = self.waker() {
            waker(queue);
            return;
        }
        rung.store(true, Ordering::SeqCst);
        // It may have been connected meanwhile, and have looked already.
        if let Some(waker) = self.waker()
            && rung.swap(false, Ordering::SeqCst)
        {
            waker(queue);
        }
    }

    /// Says so of all queues.
    pub(crate) fn ring_all(&self) {
        (0..=u16::MAX).zip(&self.rung).for_each(|(queue, _)| self.ring(queue));
    }

    /// Nobody is called with it locked: who is may ring.
    fn waker(&self) -> Option<Waker> {
        self.waker.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Nobody hears them from now on, until somebody [connects](Self::connect) again. One that rings just now may be heard by neither: who
    /// goes on looks at all queues.
    pub(crate) fn disconnect(&self) {
        *self.waker.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Lets `waker` hear them, those that were rung before as well. For the first executor that comes; later ones hear
    /// nothing, but for those that start a device which was paused.
    pub fn connect(&self, waker: impl Fn(u16) + Send + Sync + 'static) {
        {
            let mut place = self.waker.write().unwrap_or_else(PoisonError::into_inner);
            if place.is_some() {
                return;
            }
            *place = Some(Arc::new(waker));
        }
        for (queue, rung) in (0..=u16::MAX).zip(&self.rung) {
            if let Some(waker) = self.waker()
                && rung.swap(false, Ordering::SeqCst)
            {
                waker(queue);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn whoever_rings_early_is_heard_once() {
        let bells = Doorbells::new(3);
        bells.ring(2);
        bells.ring(2);
        bells.ring(3);
        let heard = Arc::new(Mutex::new(Vec::new()));
        let ears = Arc::clone(&heard);
        bells.connect(move |queue| ears.lock().unwrap().push(queue));
        bells.ring(0);
        bells.ring(u16::MAX);
        bells.connect(|_| panic!("the first one hears"));
        bells.ring(1);
        assert_eq!(*heard.lock().unwrap(), [2, 0, 1]);
        bells.disconnect();
        bells.ring(0);
        let ears = Arc::clone(&heard);
        bells.connect(move |queue| ears.lock().unwrap().push(10 + queue));
        bells.ring(1);
        assert_eq!(*heard.lock().unwrap(), [2, 0, 1, 10, 11]);
    }

    #[test]
    fn no_ring_is_lost_while_the_waker_is_connected() {
        for _ in 0..2000 {
            let bells = Arc::new(Doorbells::new(1));
            let heard = Arc::new(AtomicBool::new(false));
            let (theirs, ears) = (Arc::clone(&bells), Arc::clone(&heard));
            let ringer = std::thread::spawn(move || theirs.ring(0));
            bells.connect(move |_| ears.store(true, Ordering::SeqCst));
            ringer.join().unwrap();
            assert!(heard.load(Ordering::SeqCst));
        }
    }
}

//! How a virtio device interrupts over PCI (Virtio 1.3, 4.1.5): by a message of MSI-X where that is on, else by the function's
//! pin and the ISR status.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use crate::interrupt::{InterruptLine, lock};
use crate::virtio::control::Signal;

/// VIRTIO_MSI_NO_VECTOR.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Causes in the ISR status (4.1.4.5).
const USED: u8 = 1;
const CONFIG: u8 = 2;

/// The function's MSI-X, as an interrupt sees it.
pub(super) trait Messages: Send + Sync {
    /// Whether the driver has turned it on.
    fn is_enabled(&self) -> bool;

    /// How many vectors there are.
    fn count(&self) -> u16;

    /// Sends the message of a vector.
    fn send(&self, vector: u16);
}

/// Which vector each cause has, and the ISR status.
pub(super) struct Vectors {
    config: AtomicU16,
    queues: Box<[AtomicU16]>,
    isr: AtomicU8,
    messages: Arc<dyn Messages>,
    pin: Mutex<Box<dyn InterruptLine>>,
}

impl fmt::Debug for Vectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vectors")
            .field("config", &self.config)
            .field("queues", &self.queues)
            .field("isr", &self.isr)
            .finish_non_exhaustive()
    }
}

impl Vectors {
    pub(super) fn new(queues: usize, messages: Arc<dyn Messages>, pin: Box<dyn InterruptLine>) -> Self {
        Self {
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            messages,
            pin: Mutex::new(pin),
        }
    }

    pub(super) fn config(&self) -> u16 {
        self.config.load(Ordering::SeqCst)
    }

    pub(super) fn queue(&self, queue: u16) -> u16 {
        self.queues.get(usize::from(queue)).map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    pub(super) fn set_config(&self, vector: u16) {
        self.config.store(self.allowed(vector), Ordering::SeqCst);
    }

    pub(super) fn set_queue(&self, queue: u16, vector: u16) {
        if let Some(place) = self.queues.get(usize::from(queue)) {
            place.store(self.allowed(vector), Ordering::SeqCst);
        }
    }

    /// A driver that asks for a vector that there is not reads NO_VECTOR back (4.1.5.1.2.1).
    fn allowed(&self, vector: u16) -> u16 {
        if vector < self.messages.count() { vector } else { NO_VECTOR }
    }

    /// What a reset leaves.
    pub(super) fn reset(&self) {
        for vector in self.queues.iter().chain([&self.config]) {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.take_isr();
    }

    /// The causes so far; the driver has read them, which lets go of the pin.
    pub(super) fn take_isr(&self) -> u8 {
        // The level follows the causes in their order.
        let pin = lock(&self.pin);
        let causes = self.isr.swap(0, Ordering::SeqCst);
        if causes != 0 {
            pin.set_level(false);
        }
        causes
    }

    fn raise(&self, vector: u16, cause: u8) {
        if self.messages.is_enabled() {
            if vector != NO_VECTOR {
                self.messages.send(vector);
            }
            return;
        }
        let pin = lock(&self.pin);
        if self.isr.fetch_or(cause, Ordering::SeqCst) == 0 {
            pin.set_level(true);
        }
    }
}

impl Signal for Arc<Vectors> {
    fn used(&self, queue: u16) {
        self.raise(Vectors::queue(self, queue), USED);
    }

    fn config(&self) {
        self.raise(Vectors::config(self), CONFIG);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::testkit::LineRecorder;

    #[derive(Default)]
    struct Recorded {
        enabled: AtomicBool,
        sent: Mutex<Vec<u16>>,
    }

    impl Messages for Recorded {
        fn is_enabled(&self) -> bool {
            self.enabled.load(Ordering::SeqCst)
        }

        fn count(&self) -> u16 {
            3
        }

        fn send(&self, vector: u16) {
            lock(&self.sent).push(vector);
        }
    }

    fn vectors() -> (Arc<Vectors>, Arc<Recorded>, LineRecorder) {
        let (messages, line) = (Arc::<Recorded>::default(), LineRecorder::default());
        let theirs: Arc<Recorded> = Arc::clone(&messages);
        (Arc::new(Vectors::new(2, theirs, Box::new(line.clone()))), messages, line)
    }

    #[test]
    fn without_messages_it_is_the_pin() {
        let (vectors, messages, line) = vectors();
        vectors.used(0);
        Signal::config(&vectors);
        vectors.used(1);
        assert_eq!(line.take(), [true]);
        assert_eq!((vectors.take_isr(), line.take()), (3, vec![false]));
        assert_eq!((vectors.take_isr(), line.take()), (0, vec![]));
        assert!(lock(&messages.sent).is_empty());
        vectors.used(0);
        vectors.reset();
        assert_eq!((line.take(), vectors.take_isr()), (vec![true, false], 0));
    }

    #[test]
    fn each_cause_has_its_message() {
        let (vectors, messages, line) = vectors();
        messages.enabled.store(true, Ordering::SeqCst);
        vectors.set_config(2);
        vectors.set_queue(1, 0);
        vectors.set_queue(2, 1);
        vectors.used(0);
        vectors.used(1);
        Signal::config(&vectors);
        vectors.used(7);
        assert_eq!(*lock(&messages.sent), [0, 2], "no message for those without a vector");
        assert!(line.take().is_empty());
        assert_eq!(vectors.take_isr(), 0);
    }

    #[test]
    fn vectors_that_there_are_not_read_back_as_none() {
        let (vectors, ..) = vectors();
        for vector in [3, 0x7fff, NO_VECTOR] {
            vectors.set_config(2);
            vectors.set_config(vector);
            vectors.set_queue(0, 1);
            vectors.set_queue(0, vector);
            assert_eq!((Vectors::config(&vectors), Vectors::queue(&vectors, 0)), (NO_VECTOR, NO_VECTOR));
        }
        assert_eq!(Vectors::queue(&vectors, 9), NO_VECTOR);
    }
}

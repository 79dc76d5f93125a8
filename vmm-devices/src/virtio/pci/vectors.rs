//! How a virtio device interrupts over PCI (Virtio 1.3, 4.1.5): by a message of MSI-X where that is on, else by the function's
//! pin and the ISR status.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use crate::error::StateError;
use crate::interrupt::InterruptLine;
use crate::pci::{ConfigSpace, Msix};
use crate::virtio::control::{Causes, Signal};

const DEVICE: &str = "virtio over PCI";

/// VIRTIO_MSI_NO_VECTOR.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Which vector each cause has, and the ISR status (4.1.4.5), which asserts the pin while MSI-X is off.
pub(super) struct Vectors {
    config: AtomicU16,
    queues: Box<[AtomicU16]>,
    causes: Causes,
    msix: Msix,
}

impl fmt::Debug for Vectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vectors")
            .field("config", &self.config)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

impl Vectors {
    pub(super) fn new(queues: usize, msix: Msix, pin: Box<dyn InterruptLine>) -> Self {
        Self {
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            causes: Causes::new(pin),
            msix,
        }
    }

    /// The function is reset, and its configuration space with it.
    pub(super) fn reset_function(&self) {
        self.msix.reset();
        self.causes.mute(false);
    }

    /// The function's MSI-X.
    pub(super) fn msix(&self) -> &Msix {
        &self.msix
    }

    /// Configuration space was written: the driver may have turned MSI-X on or off, and the pin is none while it is on
    /// (PCI 3.0, 6.8.2.3).
    pub(super) fn config_written(&self, config: &ConfigSpace) {
        self.msix.config_written(config);
        self.causes.mute(self.msix.is_enabled());
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
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }

    /// The vectors of the configuration and of each queue, and the ISR status.
    pub(super) fn saved(&self) -> (u16, Vec<u16>, u8) {
        let queues = self.queues.iter().map(|vector| vector.load(Ordering::SeqCst));
        (self.config(), queues.collect(), self.causes.get())
    }

    /// Whether these can be restored.
    pub(super) fn check(&self, config: u16, queues: &[u16], isr: u8) -> Result<(), StateError> {
        let allowed = "those of the function's vectors, or 0xffff";
        for vector in queues.iter().chain([&config]) {
            let valid = self.allowed(*vector) == *vector;
            StateError::check(valid, DEVICE, "vector", *vector, allowed)?;
        }
        let same = queues.len() == self.queues.len();
        StateError::check(same, DEVICE, "number of queue_vectors", queues.len() as u64, "that of queues")?;
        let known = isr & !(Causes::USED | Causes::CONFIG) == 0;
        StateError::check(known, DEVICE, "isr", isr, "bits 0 and 1")
    }

    /// Goes on with those, which were checked; MSI-X was restored before.
    pub(super) fn restore(&self, config: u16, queues: &[u16], isr: u8) {
        self.set_config(config);
        for (place, vector) in self.queues.iter().zip(queues) {
            place.store(self.allowed(*vector), Ordering::SeqCst);
        }
        self.causes.mute(self.msix.is_enabled());
        self.causes.raise_if(isr, &|| true);
    }

    /// The causes so far; the driver has read them, which lets go of the pin.
    pub(super) fn take_isr(&self) -> u8 {
        self.causes.clear(u8::MAX)
    }
}

impl Signal for Arc<Vectors> {
    fn used(&self, queue: u16) {
        // It says so if MSI-X is off.
        if !self.msix.notify(Vectors::queue(self, queue)) {
            self.causes.raise_if(Causes::USED, &|| true);
        }
    }

    fn config(&self, wanted: &dyn Fn() -> bool) {
        // The status says so with MSI-X as well, and before the message is sent (4.1.4.5.1).
        if self.causes.raise_if(Causes::CONFIG, wanted) {
            self.msix.notify(Vectors::config(self));
        }
    }

    fn reset(&self) {
        for vector in self.queues.iter().chain([&self.config]) {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        // What was signalled and is masked is of a driver that has gone.
        self.msix.forget_pending();
        self.take_isr();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::interrupt::lock;
    use crate::pci::{Bar, ConfigBuilder, Identity, MsixPlace};
    use crate::testkit::LineRecorder;

    /// Of a function with MSI-X of three vectors, whose messages have their number as data.
    struct Function {
        config: ConfigSpace,
        vectors: Arc<Vectors>,
        sent: Arc<Mutex<Vec<u32>>>,
        line: LineRecorder,
    }

    impl Function {
        fn new() -> Self {
            let (sent, line) = (Arc::<Mutex<Vec<u32>>>::default(), LineRecorder::default());
            let theirs = Arc::clone(&sent);
            let mut config = ConfigBuilder::new(Identity::new(0x1af4, 0x1044, [0xff, 0, 0]));
            config.bar(0, Bar::memory32(0x2000)).unwrap();
            let place = MsixPlace { bar: 0, table: 0, pending: 0x1000 };
            let sink = move |_: u64, data: u32| lock(&theirs).push(data);
            let msix = Msix::new(&mut config, 3, place, sink).unwrap();
            for vector in 0..3_u32 {
                let entry = u64::from(vector) * 16;
                assert!(msix.write(0, entry + 8, &vector.to_le_bytes()), "its data");
                assert!(msix.write(0, entry + 12, &[0; 4]), "not masked");
            }
            let vectors = Arc::new(Vectors::new(2, msix, Box::new(line.clone())));
            Self { config: config.build(), vectors, sent, line }
        }

        /// The driver turns MSI-X on or off.
        fn enable(&mut self, enable: bool) {
            let mut capability = [0];
            self.config.read(0x34, &mut capability);
            self.config.write(0x04, &[0x04, 0]);
            self.config.write(u16::from(capability[0]) + 3, &[u8::from(enable) << 7]);
            self.vectors.config_written(&self.config);
            assert_eq!(self.vectors.msix().is_enabled(), enable);
        }
    }

    #[test]
    fn without_messages_it_is_the_pin() {
        let Function { vectors, sent, line, .. } = Function::new();
        vectors.used(0);
        Signal::config(&vectors, &|| true);
        vectors.used(1);
        assert_eq!(line.take(), [true]);
        assert_eq!((vectors.take_isr(), line.take()), (3, vec![false]));
        assert_eq!((vectors.take_isr(), line.take()), (0, vec![]));
        assert!(lock(&sent).is_empty());
        vectors.used(0);
        vectors.reset();
        assert_eq!((line.take(), vectors.take_isr()), (vec![true, false], 0));
    }

    #[test]
    fn each_cause_has_its_message() {
        let mut function = Function::new();
        function.enable(true);
        let Function { vectors, sent, line, .. } = function;
        vectors.set_config(2);
        vectors.set_queue(1, 0);
        vectors.set_queue(2, 1);
        vectors.used(0);
        vectors.used(1);
        Signal::config(&vectors, &|| true);
        vectors.used(7);
        assert_eq!(*lock(&sent), [0, 2], "no message for those without a vector");
        assert!(line.take().is_empty());
        assert_eq!(vectors.take_isr(), Causes::CONFIG, "for what has no ring to look at");
    }

    #[test]
    fn the_pin_is_none_while_there_are_messages() {
        let mut function = Function::new();
        function.vectors.used(0);
        assert_eq!(function.line.take(), [true]);
        function.enable(true);
        assert_eq!(function.line.take(), [false]);
        function.enable(false);
        assert_eq!(function.line.take(), [true], "the driver has not read the status yet");
        function.enable(true);
        assert_eq!((function.vectors.take_isr(), function.line.take()), (1, vec![false]));
        function.enable(false);
        assert!(function.line.take().is_empty());
        function.enable(true);
        function.vectors.reset_function();
        function.vectors.used(0);
        assert_eq!(function.line.take(), [true], "a reset turns MSI-X off");
    }

    #[test]
    fn a_reset_of_the_device_forgets_what_is_masked() {
        let mut function = Function::new();
        function.enable(true);
        let Function { vectors, sent, .. } = function;
        let mask = |masked: u8| assert!(vectors.msix().write(0, 16 + 12, &[masked, 0, 0, 0]));
        vectors.set_queue(0, 1);
        mask(1);
        vectors.used(0);
        vectors.reset();
        mask(0);
        assert!(lock(&sent).is_empty());
    }

    #[test]
    fn a_change_that_nobody_wants_is_not_signalled() {
        let mut function = Function::new();
        Signal::config(&function.vectors, &|| false);
        function.enable(true);
        function.vectors.set_config(0);
        Signal::config(&function.vectors, &|| false);
        assert!(function.line.take().is_empty() && lock(&function.sent).is_empty());
        assert_eq!(function.vectors.take_isr(), 0);
    }

    #[test]
    fn vectors_that_there_are_not_read_back_as_none() {
        let Function { vectors, .. } = Function::new();
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

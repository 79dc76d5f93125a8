//! 16550 UART: `vm-superio`'s model on a bus, with its input bounded.
//!
//! The guest reaches it through eight ports and chooses what it writes there; the monitor gives input with
//! [`Uart16550::enqueue`]. Memory does not grow with either: input waits in a FIFO of 64 bytes, what does not
//! fit stays with the caller; output goes to the writer at once. A writer that blocks blocks the vCPU.

use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vm_superio::serial::{Error, SerialEvents};
use vm_superio::{Serial, SerialState};

use crate::bus::{BusDeviceMut, read_bytes, write_bytes};
use crate::error::StateError;
use crate::interrupt::{EdgeTrigger, InterruptLine, lock};

/// Registers and unread input of a [`Uart16550`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct UartState {
    /// Divisor latch, low byte.
    pub divisor_low: u8,
    /// Divisor latch, high byte.
    pub divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Input that waits to be read, [`INPUT_CAPACITY`] bytes at most.
    pub input: Vec<u8>,
}

impl Default for UartState {
    fn default() -> Self {
        SerialState::default().into()
    }
}

impl From<SerialState> for UartState {
    fn from(state: SerialState) -> Self {
        Self {
            divisor_low: state.baud_divisor_low,
            divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }
}

impl From<&UartState> for SerialState {
    fn from(state: &UartState) -> Self {
        Self {
            baud_divisor_low: state.divisor_low,
            baud_divisor_high: state.divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input.clone(),
        }
    }
}

/// Bytes of input that wait for the guest at most.
pub const INPUT_CAPACITY: usize = 64;

/// What is to be known of the model's inside.
struct Events {
    lost: AtomicU64,
    drained: Option<Box<dyn Fn() + Send + Sync>>,
}

impl SerialEvents for Events {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
    }

    fn in_buffer_empty(&self) {
        if let Some(drained) = &self.drained {
            drained();
        }
    }
}

/// A writer that outlives the model around it, which a restore replaces.
#[derive(Clone)]
struct Output(Arc<Mutex<dyn Write + Send>>);

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        lock(&self.0).write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        lock(&self.0).flush()
    }
}

/// A serial port (National Semiconductor PC16550D, 8 registers). Baud rate and line format are stored and mean nothing:
/// output is written as it comes, and a full writer is the only thing that slows it.
///
/// The interrupt is a pulse for each new cause, so its input must be edge-triggered, as ISA inputs are.
pub struct Uart16550 {
    serial: Serial<EdgeTrigger, Arc<Events>, Output>,
    line: EdgeTrigger,
}

impl Uart16550 {
    /// A port whose output goes to `out`, which is flushed after each byte.
    pub fn new(line: impl InterruptLine + 'static, out: impl Write + Send + 'static) -> Self {
        Self::with_events(line, out, None)
    }

    /// As [`new`](Self::new), and `drained` is called whenever the guest has read all input: the moment to
    /// offer more. It is called with the device locked, and possibly when there was no input.
    pub fn with_drained(
        line: impl InterruptLine + 'static,
        out: impl Write + Send + 'static,
        drained: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        Self::with_events(line, out, Some(Box::new(drained)))
    }

    fn with_events(
        line: impl InterruptLine + 'static,
        out: impl Write + Send + 'static,
        drained: Option<Box<dyn Fn() + Send + Sync>>,
    ) -> Self {
        let events = Arc::new(Events { lost: AtomicU64::new(0), drained });
        let line = EdgeTrigger::new(line);
        let serial = Serial::with_events(line.clone(), events, Output(Arc::new(Mutex::new(out))));
        Self { serial, line }
    }

    /// Gives the guest input and returns how many bytes of it were taken. The caller keeps the rest until
    /// [`input_capacity`](Self::input_capacity) is more than zero: see [`with_drained`](Self::with_drained). In
    /// loopback mode nothing is taken.
    pub fn enqueue(&mut self, input: &[u8]) -> usize {
        // The one error that there can be is a full FIFO, since a pulse does not fail.
        self.serial.enqueue_raw_bytes(input).unwrap_or(0)
    }

    /// How many bytes of input can be taken now.
    pub fn input_capacity(&self) -> usize {
        self.serial.fifo_capacity()
    }

    /// Bytes of output that the writer refused. The guest is not told, as by a cable that is not plugged in.
    pub fn lost_output(&self) -> u64 {
        self.serial.events().lost.load(Ordering::Relaxed)
    }

    /// Registers and unread input.
    pub fn state(&self) -> UartState {
        self.serial.state().into()
    }

    /// Goes on from a saved state, with the same line and writer. A pending interrupt is signalled again.
    ///
    /// # Errors
    /// [`StateError`] if there is more input than [`INPUT_CAPACITY`]; the device is as it was.
    pub fn restore(&mut self, state: &UartState) -> Result<(), StateError> {
        let (events, out) = (Arc::clone(self.serial.events()), self.serial.writer().clone());
        let length = u64::try_from(state.input.len()).unwrap_or(u64::MAX);
        let too_long =
            |_| StateError { device: "16550", field: "length of input", value: length, allowed: "0 to 64" };
        self.serial = Serial::from_state(&state.into(), self.line.clone(), events, out).map_err(too_long)?;
        Ok(())
    }
}

impl fmt::Debug for Uart16550 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uart16550").field("state", &self.state()).finish_non_exhaustive()
    }
}

impl BusDeviceMut for Uart16550 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |offset| match u8::try_from(offset) {
            Ok(register @ 0..=7) => self.serial.read(register),
            _ => 0xff,
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| {
            if let Ok(register @ 0..=7) = u8::try_from(offset) {
                match self.serial.write(register, value) {
                    // The model has counted a byte that the writer refused.
                    Ok(()) | Err(Error::IOError(_) | Error::FullFifo) => (),
                    Err(Error::Trigger(never)) => match never {},
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::Unconnected;
    use crate::interrupt::testing::Recorder;

    const DATA: u64 = 0;
    const IER: u64 = 1;
    const MCR: u64 = 4;
    const LSR: u64 = 5;

    fn read(uart: &mut Uart16550, register: u64) -> u8 {
        let mut data = [0];
        uart.read(register, &mut data);
        data[0]
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            lock(&self.0).write(data)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_reaches_the_writer_and_pulses_the_line() {
        let (line, sink) = (Recorder::default(), Sink::default());
        let mut uart = Uart16550::new(line.clone(), sink.clone());
        uart.write(DATA, b"a");
        assert!(line.take().is_empty());
        uart.write(IER, &[2]);
        assert_eq!(line.take(), [true, false]);
        uart.write(DATA, b"b");
        assert_eq!(*lock(&sink.0), b"ab");
    }

    #[test]
    fn input_that_does_not_fit_stays_with_the_caller() {
        let drained = Recorder::default();
        let seen = drained.clone();
        let line = Recorder::default();
        let mut uart = Uart16550::with_drained(line.clone(), io::sink(), move || seen.record(()));
        uart.write(IER, &[1]);
        let input: Vec<u8> = (0..100).collect();
        assert_eq!(uart.enqueue(&input), INPUT_CAPACITY);
        assert_eq!(line.take(), [true, false]);
        assert_eq!((uart.enqueue(&input), uart.input_capacity()), (0, 0));
        assert_eq!(read(&mut uart, DATA), 0);
        assert_eq!(uart.enqueue(&input[64..]), 1);
        for byte in 1..=64 {
            assert!(drained.take().is_empty());
            assert_eq!(read(&mut uart, LSR) & 1, 1);
            assert_eq!(read(&mut uart, DATA), byte);
        }
        assert_eq!(drained.take().len(), 1);
        assert_eq!(read(&mut uart, LSR) & 1, 0);
    }

    #[test]
    fn refused_output_is_counted() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut uart = Uart16550::new(Unconnected, Closed);
        uart.write(DATA, b"x");
        uart.write(DATA, b"y");
        assert_eq!(uart.lost_output(), 2);
    }

    #[test]
    fn loopback_is_bounded_too() {
        let mut uart = Uart16550::new(Unconnected, io::sink());
        uart.write(MCR, &[0x10]);
        for _ in 0..1000 {
            uart.write(DATA, b"x");
        }
        assert_eq!(uart.input_capacity(), 0);
        assert_eq!(uart.enqueue(b"y"), 0);
    }

    #[test]
    fn a_wide_access_goes_register_by_register() {
        let mut uart = Uart16550::new(Unconnected, io::sink());
        uart.write(6, &[1, 0x5a, 3, 4]);
        let mut data = [0; 4];
        uart.read(7, &mut data);
        assert_eq!(data, [0x5a, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn a_saved_state_goes_on_and_a_bad_one_is_refused() {
        let mut uart = Uart16550::new(Unconnected, io::sink());
        uart.write(IER, &[1]);
        uart.enqueue(b"abc");
        let state = uart.state();
        let line = Recorder::default();
        let mut other = Uart16550::new(line.clone(), io::sink());
        other.restore(&state).unwrap();
        assert_eq!(other.state(), state);
        assert_eq!(line.take(), [true, false]);
        assert_eq!(read(&mut other, DATA), b'a');

        let kept = other.state();
        let bad = UartState { input: vec![0; 65], ..state };
        assert_eq!(other.restore(&bad).unwrap_err().value, 65);
        assert_eq!(other.state(), kept);
    }
}

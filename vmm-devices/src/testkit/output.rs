//! A writer that does as it is told.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use crate::interrupt::lock;

/// A writer that remembers what it was given, and takes as little of it, or fails as often, as a test wants. Clones are the same
/// writer.
#[derive(Clone, Debug, Default)]
pub struct OutputRecorder(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    answers: VecDeque<Result<usize, io::ErrorKind>>,
    blocked: bool,
    calls: usize,
    flushes: usize,
}

impl OutputRecorder {
    /// What was written since the last call.
    pub fn take(&self) -> Vec<u8> {
        std::mem::take(&mut lock(&self.0).bytes)
    }

    /// The next calls take that many bytes at most, or fail. Calls after these take everything.
    pub fn answer(&self, answers: impl IntoIterator<Item = Result<usize, io::ErrorKind>>) {
        lock(&self.0).answers.extend(answers);
    }

    /// Calls fail with [`io::ErrorKind::WouldBlock`] as long as that is so.
    pub fn block(&self, blocked: bool) {
        lock(&self.0).blocked = blocked;
    }

    /// How often it was written to since the last call.
    pub fn take_calls(&self) -> usize {
        std::mem::take(&mut lock(&self.0).calls)
    }

    /// How often it was flushed since the last call.
    pub fn take_flushes(&self) -> usize {
        std::mem::take(&mut lock(&self.0).flushes)
    }
}

impl Write for OutputRecorder {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut state = lock(&self.0);
        state.calls += 1;
        if state.blocked {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let len = state.answers.pop_front().unwrap_or(Ok(usize::MAX))?.min(data.len());
        state.bytes.extend_from_slice(data.get(..len).unwrap_or_default());
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        lock(&self.0).flushes += 1;
        Ok(())
    }
}

//! `console_io`.

use super::super::abi::errno::Errno;
use super::super::abi::nr;
use super::{Call, Done, Outcome};

const WRITE: u64 = 0;
const READ: u64 = 1;

/// Bytes of one step.
const CHUNK: usize = 256;

impl Call<'_> {
    /// Arguments: command, count, buffer.
    pub(super) fn console_io(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [command, count, buffer, ..] = *args;
        // The count is an unsigned int.
        let count = usize::try_from(count & u64::from(u32::MAX)).map_err(|_| Errno::E2BIG)?;
        match command {
            WRITE => self.console_write(args, buffer, count),
            // The answer is a signed one.
            READ if count >= 1 << 31 => Err(Errno::E2BIG.into()),
            READ => {
                let mut chunk = [0; CHUNK];
                let room = chunk.get_mut(..count.min(CHUNK)).unwrap_or_default();
                let got = self.domain.console.read(room);
                self.space().write_bytes(buffer, room.get(..got).unwrap_or_default())?;
                Ok(Done::Value(u64::try_from(got).unwrap_or(0)))
            }
            _ => self.unknown(nr::CONSOLE_IO),
        }
    }

    fn console_write(&mut self, args: &mut [u64; 6], buffer: u64, count: usize) -> Outcome {
        let mut done = 0;
        while done < count {
            let offset = u64::try_from(done).map_err(|_| Errno::EFAULT)?;
            let at = buffer.checked_add(offset).ok_or(Errno::EFAULT)?;
            if !self.step() {
                [args[1], args[2]] = [u64::try_from(count - done).unwrap_or(0), at];
                return Ok(Done::Again);
            }
            let mut chunk = [0; CHUNK];
            let part = chunk.get_mut(..CHUNK.min(count - done)).unwrap_or_default();
            self.space().read_bytes(at, part)?;
            self.domain.console.write(part);
            done += part.len();
        }
        Ok(Done::OK)
    }
}

#[cfg(test)]
mod tests;

//! Segments past their time.

use std::time::Duration;

use super::segment::path;
use super::{LogError, LogWriter, wall_clock};
use crate::event::{Event, Kind, Object, ObjectClass};

impl LogWriter {
    /// Finds segments past their time, and writes down that they go.
    pub(super) fn retire(&mut self) -> Result<(), LogError> {
        let by_count = self.options.keep_segments.map_or(0, |keep| (self.number + 1).saturating_sub(keep));
        let mut below = by_count.max(self.first);
        if let Some(age) = self.options.keep_for {
            while below + 1 < self.number && self.is_older(below, age)? {
                below += 1;
            }
        }
        if below <= self.first {
            return Ok(());
        }
        let base = self.base_of(below)?;
        let event = Event::new(Kind::Retention)
            .object(Object::numbered(ObjectClass::Log, base))
            .amount(below - self.first, 0)
            .attribute("first-segment", below.to_string());
        self.append_own(&event)?;
        self.remove_below = below;
        Ok(())
    }

    /// Whether the segment ended longer ago than `age`: the one after it has the time of its first checkpoint.
    fn is_older(&self, number: u64, age: Duration) -> Result<bool, LogError> {
        let name = path(number + 1);
        let file = self.storage.open_to_read(&name).map_err(LogError::io(name.clone()))?;
        let ended = super::load::first_time(file).map_err(LogError::io(name))?;
        Ok(ended.is_some_and(|ended| {
            wall_clock().saturating_sub(ended) > u64::try_from(age.as_nanos()).unwrap_or(u64::MAX)
        }))
    }

    fn base_of(&self, number: u64) -> Result<u64, LogError> {
        let name = path(number);
        let file = self.storage.open_to_read(&name).map_err(LogError::io(name.clone()))?;
        let header = super::load::read_header(&*file).map_err(LogError::io(name.clone()))?;
        let damaged =
            |why: super::segment::Damage| LogError::Damaged { path: name, offset: 0, why: why.to_string() };
        header.map(|header| header.base).map_err(damaged)
    }

    /// Removes the segments whose removal is acknowledged.
    pub(super) fn remove_old(&mut self) -> Result<(), LogError> {
        while self.first < self.remove_below {
            let name = path(self.first);
            match self.storage.remove(&name) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(LogError::io(name)(e)),
                _ => self.first += 1,
            }
        }
        Ok(())
    }
}

//! What of a saved domain's memory is not RAM: the frames that it shares with the ABI, and the machine-to-physical table.

use super::*;
use crate::xen_pv::abi::PAGE_BYTES;
use crate::xen_pv::saved::{M2pRun, SharedPage, invalid, runs_ascend};

/// Entries that are read at a time.
const CHUNK: usize = 4096;

impl DomainMemory {
    /// The frames that are not all zeroes, by their distance from the first one.
    pub(crate) fn save_shared(&self) -> Result<Vec<SharedPage>, Errno> {
        let frames = self.layout.abi_frames();
        let mut pages = Vec::new();
        for (index, frame) in (0..).zip(frames) {
            let mut bytes = vec![0; PAGE_BYTES];
            self.read(frame * PAGE_SIZE, &mut bytes)?;
            if bytes.iter().any(|byte| *byte != 0) {
                pages.push(SharedPage { index, bytes });
            }
        }
        Ok(pages)
    }

    pub(crate) fn check_shared(&self, pages: &[SharedPage]) -> Result<()> {
        let frames = self.layout.abi_frames();
        let count = frames.end - frames.start;
        runs_ascend("backend.shared", pages.iter().map(|page| (page.index, 1)), count)?;
        match pages.iter().find(|page| page.bytes.len() != PAGE_BYTES) {
            Some(page) => {
                let problem = format!("{} bytes of page {}, which has 4096", page.bytes.len(), page.index);
                Err(invalid("backend.shared", problem))
            }
            None => Ok(()),
        }
    }

    /// Writes frames that were checked; the others are zero.
    pub(crate) fn restore_shared(&self, pages: &[SharedPage]) -> Result<(), Errno> {
        let frames = self.layout.abi_frames();
        for frame in frames.clone() {
            self.write(frame * PAGE_SIZE, &[0; PAGE_BYTES])?;
        }
        pages.iter().try_for_each(|page| self.write((frames.start + page.index) * PAGE_SIZE, &page.bytes))
    }

    pub(crate) fn save_m2p(&self) -> Result<Vec<M2pRun>, Errno> {
        let mut runs: Vec<M2pRun> = Vec::new();
        let mut chunk = vec![0_u64; CHUNK];
        for start in (0..self.layout.frames()).step_by(CHUNK) {
            let left = usize::try_from(self.layout.frames() - start).unwrap_or(CHUNK);
            let entries = chunk.get_mut(..left.min(CHUNK)).unwrap_or_default();
            self.read_m2p(start * 8, entries.as_mut_bytes())?;
            for (frame, value) in (start..).zip(entries.iter()) {
                extend(&mut runs, frame, *value);
            }
        }
        Ok(runs)
    }

    pub(crate) fn check_m2p(&self, runs: &[M2pRun]) -> Result<()> {
        runs_ascend("backend.m2p", runs.iter().map(|run| (run.first, run.count)), self.layout.frames())
    }

    /// Writes entries that were checked; the others are 0.
    pub(crate) fn restore_m2p(&self, runs: &[M2pRun]) -> Result<(), Errno> {
        let mut runs = runs.iter().peekable();
        for frame in 0..self.layout.frames() {
            while runs.next_if(|run| frame - run.first.min(frame) >= run.count).is_some() {}
            let value = match runs.peek() {
                Some(run) if run.first <= frame => {
                    let step = if run.counts { frame - run.first } else { 0 };
                    run.value.wrapping_add(step)
                }
                _ => 0,
            };
            self.set_m2p(frame, value)?;
        }
        Ok(())
    }
}

/// Adds an entry to the last run, if that has one value for all, or counts; else to a new one.
fn extend(runs: &mut Vec<M2pRun>, frame: u64, value: u64) {
    if let Some(last) = runs.last_mut()
        && last.first + last.count == frame
    {
        let counts = value == last.value.wrapping_add(last.count);
        let fits = if last.count == 1 {
            counts || value == last.value
        } else {
            last.counts == counts && (counts || value == last.value)
        };
        if fits {
            last.counts = counts;
            last.count += 1;
            return;
        }
    }
    if value != 0 {
        runs.push(M2pRun { first: frame, count: 1, value, counts: false });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xen_pv::test_support::Guest;

    #[test]
    fn the_machine_to_physical_table_comes_back() {
        let guest = Guest::new();
        let memory = &guest.domain.memory;
        let values = [0, 0, 7, 7, 7, 8, 9, 10, 10, u64::MAX, 0, 1, 2, u64::MAX, u64::MAX, 5, 0, 0, 3];
        for (frame, value) in (0..).zip(values) {
            memory.set_m2p(frame, value).unwrap();
        }
        let all = |memory: &DomainMemory| {
            let mut entries = vec![0_u64; usize::try_from(memory.layout().frames()).unwrap()];
            memory.read_m2p(0, entries.as_mut_bytes()).unwrap();
            entries
        };
        let before = all(memory);
        let runs = memory.save_m2p().unwrap();
        assert!(runs.len() < values.len(), "{runs:?}");
        memory.check_m2p(&runs).unwrap();
        let other = Guest::new();
        other.domain.memory.restore_m2p(&runs).unwrap();
        assert!(all(&other.domain.memory) == before, "{runs:?}");
    }
}

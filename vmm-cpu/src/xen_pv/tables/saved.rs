//! The marks of a saved domain. Whether a root holds the engine's entries is not among them, since the next engine has others.

use super::*;
use crate::error::Result;
use crate::xen_pv::saved::{MarkRun, invalid, runs_ascend};

impl Tables {
    pub(crate) fn save(&self) -> Vec<MarkRun> {
        let mut runs: Vec<MarkRun> = Vec::new();
        for (frame, mark) in (0..).zip(&self.marks) {
            let mark = mark.load(Ordering::Acquire) & (LEVEL | PINNED);
            match runs.last_mut() {
                Some(last) if last.mark == mark && last.first + last.count == frame => last.count += 1,
                _ if mark == 0 => {}
                _ => runs.push(MarkRun { first: frame, count: 1, mark }),
            }
        }
        runs
    }

    /// Checks marks of a domain with so many frames.
    pub(crate) fn check(runs: &[MarkRun], frames: u64) -> Result<()> {
        runs_ascend("backend.marks", runs.iter().map(|run| (run.first, run.count)), frames)?;
        match runs
            .iter()
            .find(|run| run.mark == 0 || run.mark & !(LEVEL | PINNED) != 0 || run.mark & LEVEL > 4)
        {
            Some(run) => {
                let problem = format!("mark {:#x} of frame {}, which is none", run.mark, run.first);
                Err(invalid("backend.marks", problem))
            }
            None => Ok(()),
        }
    }

    /// Takes marks over, which were checked, for a table that has none.
    pub(crate) fn restore(&self, runs: &[MarkRun]) {
        for run in runs {
            for frame in run.first..run.first + run.count {
                if let Some(mark) = self.mark(frame) {
                    mark.store(run.mark, Ordering::Release);
                    self.show(frame, run.mark);
                }
            }
        }
    }
}

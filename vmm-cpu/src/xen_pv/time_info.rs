//! What a guest computes the time from, where it looks for it: `vcpu_time_info` in each `vcpu_info` and where the guest wants copies, and
//! the wall clock in the shared information.

use std::sync::Arc;

use vmm_memory::vm_memory::GuestAddress;
use zerocopy::IntoBytes as _;

use super::abi::errno::Errno;
use super::abi::shared_info;
use super::abi::vcpu::TimeInfo;
use super::domain::Domain;
use super::engine::Engine;
use super::processor::Processor;
use super::vcpu_abi::VcpuAbi;
use crate::error::Result;

impl VcpuAbi {
    /// Writes what the guest computes the time from. It holds until the domain is restored elsewhere.
    pub(crate) fn publish_time(&mut self, engine: &mut dyn Engine) -> Result<()> {
        self.time_published = true;
        let info = self.domain.clock.info(engine.time_stamp()?);
        let domain = Arc::clone(&self.domain);
        match &domain.republished {
            // A program on one processor may read the information of another one, so all of it has to be there before any
            // runs.
            Some(once) => once.get_or_init(|| {
                domain.processors.iter().for_each(|processor| domain.write_time(processor, &info));
                domain.write_time_areas(engine.kernel_root(), &info);
                domain.write_wall_clock();
            }),
            None => {
                if let Some(processor) = self.processor() {
                    domain.write_time(processor, &info);
                }
                if self.index == 0 {
                    domain.write_wall_clock();
                }
                &()
            }
        };
        Ok(())
    }
}

impl Domain {
    fn write_wall_clock(&self) {
        if self.publish_wall_clock().is_err() {
            tracing::debug!("no wall clock could be written");
        }
    }

    /// Writes the time information under an odd version, so that a reader on another processor takes it whole, and leaves another
    /// version than there was, for a reader that was saved in the middle.
    fn write_time(&self, processor: &Processor, info: &TimeInfo) {
        let (memory, gpa) = (&self.memory, processor.info() + shared_info::TIME);
        let bytes = info.as_bytes();
        // The place was checked when it was registered.
        let written = memory.load_u32(gpa).and_then(|version| {
            memory.store_u32(gpa, version | 1)?;
            memory.write(gpa + 4, bytes.get(4..).unwrap_or_default())?;
            memory.store_u32(gpa, (version | 1).wrapping_add(1))
        });
        if written.is_err() {
            tracing::debug!(gpa, "no time information could be written");
        }
    }

    /// The same where the guest wanted a copy of it.
    fn write_time_areas(&self, root: GuestAddress, info: &TimeInfo) {
        let space = self.memory.space(root);
        let bytes = info.as_bytes();
        for area in self.processors.iter().filter_map(Processor::time_area) {
            let written = space.read::<u32>(area).and_then(|version| {
                space.write(area, &(version | 1))?;
                let rest = area.checked_add(4).ok_or(Errno::EFAULT)?;
                space.write_bytes(rest, bytes.get(4..).unwrap_or_default())?;
                space.write(area, &(version | 1).wrapping_add(1))
            });
            // An area that the guest unmapped gets nothing.
            if written.is_err() {
                tracing::debug!(area, "no time information could be written");
            }
        }
    }
}

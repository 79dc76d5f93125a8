//! Without `translate` nothing is finished in software. See `finish/mod.rs`.

use std::error::Error as StdError;
use std::sync::Arc;

use vmm_memory::vm_memory::GuestAddress;
use vmm_memory::{GuestRegion, PageBitmap};

use super::vcpu::{KvmVcpu, Step};
use crate::error::Result;
use crate::vcpu::VcpuIo;
use crate::vm::{Doorbell, GuestAccess, Notifier};

/// There is none.
#[derive(Debug)]
pub(super) enum Finish {}

impl Finish {
    pub(super) fn map_memory(&self, _: &Arc<GuestRegion>, _: GuestAccess, _: bool) {
        match *self {}
    }

    pub(super) fn unmap_memory(&self, _: GuestAddress) {
        match *self {}
    }

    pub(super) fn log_writes(&self, _: GuestAddress, _: bool) {
        match *self {}
    }

    pub(super) fn harvest(
        &self,
        _: &GuestRegion,
        _: &mut PageBitmap,
    ) -> Result<(), Box<dyn StdError + Send + Sync>> {
        match *self {}
    }

    pub(super) fn set_doorbell(&self, _: &Doorbell, _: &Notifier, _: bool) {
        match *self {}
    }
}

impl KvmVcpu {
    #[cold]
    pub(super) fn finish(&mut self, _: &mut dyn VcpuIo) -> Result<Step> {
        self.counts.other += 1;
        Err(self.unhandled(None))
    }
}

//! Gathered writes: zones, and the ring that all vCPUs of a virtual machine share.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvm_ioctls::{IoEventAddress, VcpuFd};
use vmm_memory::vm_memory::GuestAddress;

use super::handle::Shared;
use super::rings::CoalescedRing;
use super::vm::VmInner;
use super::{NAME, host};
use crate::coalesced::{CoalescedWrites, CoalescedZone};
use crate::error::{Error, Result};
use crate::vcpu::VcpuIo;

/// What a VM's vCPUs look at when they leave the guest.
#[derive(Debug, Default)]
pub(super) struct Coalesced {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Mapped with the first vCPU.
    ring: Option<CoalescedRing>,
    zones: Vec<CoalescedZone>,
    /// There was a zone, so something may wait.
    used: bool,
    vcpus: Vec<Weak<Shared>>,
}

impl Coalesced {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps the ring, unless that is done, at the page where `vcpu` has it.
    pub(super) fn map(&self, vcpu: &VcpuFd, page: u32) -> Result<()> {
        let mut state = self.state();
        if state.ring.is_none() {
            let ring = CoalescedRing::map(vcpu, page).map_err(|source| Error::Host {
                backend: NAME,
                operation: "mapping the ring of gathered writes",
                source,
            })?;
            state.ring = Some(ring);
        }
        Ok(())
    }

    /// A vCPU that is to look for writes that wait once there are some.
    pub(super) fn add(&self, vcpu: &Arc<Shared>) {
        let mut state = self.state();
        if state.used {
            vcpu.gather();
        }
        state.vcpus.push(Arc::downgrade(vcpu));
    }

    /// Hands over what waits: at least all that was written before this was called. The lock is held to the end, or another
    /// vCPU could hand over something later first.
    #[cold]
    pub(super) fn deliver(&self, io: &mut dyn VcpuIo) -> Result<usize> {
        let mut state = self.state();
        let Some(ring) = &mut state.ring else { return Ok(0) };
        let mut delivered = 0;
        // Others may go on writing, so there is an end to it.
        for _ in 0..CoalescedRing::ENTRIES {
            let write = ring.take().map_err(|source| Error::Host {
                backend: NAME,
                operation: "reading the ring of gathered writes",
                source,
            })?;
            let Some(write) = write else { break };
            let data = write.data();
            if write.is_port {
                // Ports have 16 bits; KVM says no other.
                io.pio_write(u16::try_from(write.address).unwrap_or(u16::MAX), data.len(), data);
            } else {
                io.mmio_write(GuestAddress(write.address), data);
            }
            delivered += 1;
        }
        tracing::trace!(delivered, "kvm: gathered writes");
        Ok(delivered)
    }
}

/// The capability of one VM.
#[derive(Debug)]
pub(super) struct KvmCoalescedWrites {
    pub(super) vm: Arc<VmInner>,
    /// KVM_CAP_COALESCED_PIO.
    pub(super) ports: bool,
}

/// Whether ports are meant, and which addresses.
fn range(zone: CoalescedZone) -> Result<(bool, Range<u64>)> {
    let (is_port, start, len, limit) = match zone {
        CoalescedZone::Mmio { gpa, len } => (false, gpa.0, u64::from(len), u64::MAX),
        CoalescedZone::Pio { port, len } => (true, u64::from(port), u64::from(len), 1 << 16),
    };
    match start.checked_add(len) {
        Some(end) if len > 0 && end <= limit => Ok((is_port, start..end)),
        _ => Err(Error::invalid(
            "zone of gathered writes",
            format_args!("{len:#x} bytes at {start:#x}"),
            format_args!("at least one byte, and an end of {limit:#x} at most"),
        )),
    }
}

fn overlap(one: CoalescedZone, other: CoalescedZone) -> bool {
    match (range(one), range(other)) {
        (Ok((port, a)), Ok((other_port, b))) => port == other_port && a.start < b.end && b.start < a.end,
        _ => false,
    }
}

/// How `kvm-ioctls` names a zone.
fn to_kvm(zone: CoalescedZone) -> (IoEventAddress, u32) {
    match zone {
        CoalescedZone::Mmio { gpa, len } => (IoEventAddress::Mmio(gpa.0), len),
        CoalescedZone::Pio { port, len } => (IoEventAddress::Pio(u64::from(port)), u32::from(len)),
    }
}

impl CoalescedWrites for KvmCoalescedWrites {
    fn add_zone(&self, zone: CoalescedZone) -> Result<()> {
        let (is_port, _) = range(zone)?;
        if is_port && !self.ports {
            return Err(Error::unsupported("gathering writes to ports", "the host's KVM lacks it"));
        }
        let mut state = self.vm.coalesced.state();
        if let Some(other) = state.zones.iter().find(|other| overlap(**other, zone)) {
            return Err(Error::invalid(
                "zone of gathered writes",
                format_args!("{zone:?}"),
                format_args!("one that does not overlap {other:?}"),
            ));
        }
        // Before the first write can wait.
        state.used = true;
        state.vcpus.iter().filter_map(Weak::upgrade).for_each(|vcpu| vcpu.gather());
        let (address, len) = to_kvm(zone);
        self.vm
            .fd
            .register_coalesced_mmio(address, len)
            .map_err(|errno| host("KVM_REGISTER_COALESCED_MMIO", errno))?;
        state.zones.push(zone);
        Ok(())
    }

    fn remove_zone(&self, zone: CoalescedZone) -> Result<()> {
        let mut state = self.vm.coalesced.state();
        let at = state.zones.iter().position(|other| *other == zone).ok_or_else(|| {
            Error::invalid("zone of gathered writes", format_args!("{zone:?}"), "one that was added")
        })?;
        let (address, len) = to_kvm(zone);
        self.vm
            .fd
            .unregister_coalesced_mmio(address, len)
            .map_err(|errno| host("KVM_UNREGISTER_COALESCED_MMIO", errno))?;
        state.zones.swap_remove(at);
        Ok(())
    }

    fn deliver(&self, io: &mut dyn VcpuIo) -> Result<usize> {
        self.vm.coalesced.deliver(io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zones_have_an_end() {
        let mmio = |gpa, len| CoalescedZone::Mmio { gpa: GuestAddress(gpa), len };
        assert_eq!(range(mmio(u64::MAX - 1, 1)).unwrap(), (false, u64::MAX - 1..u64::MAX));
        assert_eq!(range(CoalescedZone::Pio { port: 0xffff, len: 1 }).unwrap(), (true, 0xffff..0x1_0000));
        for zone in [
            mmio(0, 0),
            mmio(u64::MAX, 1),
            CoalescedZone::Pio { port: 0xffff, len: 2 },
            CoalescedZone::Pio { port: 1, len: 0 },
        ] {
            assert!(matches!(range(zone), Err(Error::InvalidArgument { .. })), "{zone:?}");
        }
    }

    #[test]
    fn overlap_is_of_the_same_space() {
        let mmio = |gpa, len| CoalescedZone::Mmio { gpa: GuestAddress(gpa), len };
        assert!(overlap(mmio(0, 0x10), mmio(0xf, 1)) && overlap(mmio(4, 1), mmio(0, 8)));
        assert!(!overlap(mmio(0, 0x10), mmio(0x10, 1)));
        assert!(!overlap(mmio(0, 0x10), CoalescedZone::Pio { port: 0, len: 0x10 }));
    }
}

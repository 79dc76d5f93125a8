//! Memory in guest_memfds, and which of it is private.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MEMORY_ATTRIBUTES, KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_create_guest_memfd, kvm_memory_attributes,
};
use vmm_memory::vm_memory::{Address as _, GuestAddress, GuestMemoryRegion as _};
use vmm_memory::{GuestMemfd, GuestMemfdRange, GuestRegion, PAGE_SIZE};

use super::vm::VmInner;
use super::{NAME, host, sys};
use crate::error::{Error, Result};
use crate::private_memory::{GuestMemfdKind, GuestMemfds, PrivateMemory};
use crate::vm::GuestAccess;

// Linux 6.18, `include/uapi/linux/kvm.h`; not in `kvm-bindings` yet.
const KVM_CAP_GUEST_MEMFD_FLAGS: u64 = 244;
const GUEST_MEMFD_FLAG_MMAP: u64 = 1;
const GUEST_MEMFD_FLAG_INIT_SHARED: u64 = 2;

/// guest_memfds of one VM.
#[derive(Debug)]
pub(super) struct KvmGuestMemfds(pub(super) Arc<VmInner>);

impl GuestMemfds for KvmGuestMemfds {
    fn create(&self, size: u64, kind: GuestMemfdKind) -> Result<Arc<GuestMemfd>> {
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) || size > i64::MAX.cast_unsigned() {
            return Err(Error::invalid(
                "size of a guest_memfd",
                format_args!("{size:#x}"),
                format_args!("a multiple of {PAGE_SIZE:#x} from there to {:#x}", i64::MAX),
            ));
        }
        let flags = match kind {
            GuestMemfdKind::Private => 0,
            GuestMemfdKind::Mappable => GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED,
        };
        let offered = self.0.fd.check_extension_raw(KVM_CAP_GUEST_MEMFD_FLAGS);
        if flags & !u64::try_from(offered).unwrap_or(0) != 0 {
            return Err(Error::unsupported(
                "a guest_memfd that the host can map",
                "KVM_CAP_GUEST_MEMFD_FLAGS of this host lacks it; Linux has it from 6.18 on",
            ));
        }
        let fd =
            sys::create_guest_memfd(&self.0.fd, kvm_create_guest_memfd { size, flags, ..Default::default() })
                .map_err(|errno| host("KVM_CREATE_GUEST_MEMFD", errno))?;
        let memfd = GuestMemfd::new(fd, kind == GuestMemfdKind::Mappable);
        memfd.map(Arc::new).map_err(|error| Error::Backend { backend: NAME, source: error.into() })
    }

    fn map(&self, region: Arc<GuestRegion>, access: GuestAccess, range: &GuestMemfdRange) -> Result<()> {
        let (gpa, len) = (region.start_addr().raw_value(), region.len());
        if access != GuestAccess::ReadWrite {
            return Err(Error::invalid(
                "access to memory in a guest_memfd",
                format_args!("{access:?}"),
                "ReadWrite",
            ));
        }
        let end = range.offset.checked_add(len);
        if !range.offset.is_multiple_of(PAGE_SIZE) || end.is_none_or(|end| end > range.memfd.size()) {
            return Err(Error::invalid(
                "range of a guest_memfd",
                format_args!("{len:#x} bytes at offset {:#x} for the region at {gpa:#x}", range.offset),
                format_args!("whole pages below {:#x}", range.memfd.size()),
            ));
        }
        self.0.map_region(region, access, Some(range))
    }
}

/// Private memory of one VM.
#[derive(Debug)]
pub(super) struct KvmPrivateMemory(Arc<VmInner>);

impl KvmPrivateMemory {
    /// That of `vm`, where the kernel knows private memory for machines of its kind.
    pub(super) fn of(vm: &Arc<VmInner>) -> Option<Self> {
        let attributes = vm.fd.check_extension_raw(u64::from(KVM_CAP_MEMORY_ATTRIBUTES));
        let known = u32::try_from(attributes).is_ok_and(|known| known & KVM_MEMORY_ATTRIBUTE_PRIVATE != 0);
        known.then(|| Self(Arc::clone(vm)))
    }

    fn set(&self, gpa: GuestAddress, len: u64, attributes: u32) -> Result<()> {
        if !self.0.has_private_half(gpa, len) {
            return Err(Error::invalid(
                "range of private memory",
                format_args!("{len:#x} bytes at {:#x}", gpa.0),
                "whole pages of regions with a half in a guest_memfd",
            ));
        }
        let argument =
            kvm_memory_attributes { address: gpa.0, size: len, attributes: u64::from(attributes), flags: 0 };
        self.0.fd.set_memory_attributes(argument).map_err(|errno| host("KVM_SET_MEMORY_ATTRIBUTES", errno))
    }
}

impl PrivateMemory for KvmPrivateMemory {
    fn set_private(&self, gpa: GuestAddress, len: u64) -> Result<()> {
        self.set(gpa, len, KVM_MEMORY_ATTRIBUTE_PRIVATE)
    }

    fn set_shared(&self, gpa: GuestAddress, len: u64) -> Result<()> {
        self.set(gpa, len, 0)
    }
}

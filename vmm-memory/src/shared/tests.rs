#![allow(unsafe_code)] // mmap(2) and mprotect(2) as a hostile peer calls them

use std::ffi::c_void;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::Mode;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};

use super::*;
use crate::{GuestRam, PAGE_SIZE, is_read_only};

const SIZE: u64 = 4 * PAGE_SIZE;
const GPA: GuestAddress = GuestAddress(0x1_0000_0000);

fn memory() -> SharedMemory {
    SharedMemory::create("test", SIZE).unwrap()
}

/// A memfd as a peer may make it, seals and all.
fn memfd(size: u64, seals: SealFlags) -> OwnedFd {
    create_memfd("peer", size, None, seals).unwrap().into()
}

fn bytes() -> usize {
    usize::try_from(SIZE).unwrap()
}

fn map_writable(fd: impl AsFd, flags: MapFlags) -> Result<*mut c_void, Errno> {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses the place, so no other mapping is affected.
    unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes(), prot, flags, fd, 0) }
}

fn make_writable(region: &GuestRegion) -> Result<(), Errno> {
    // SAFETY: the range is the mapping of `region`, and more permission than it was made for breaks no
    // reference.
    unsafe {
        rustix::mm::mprotect(
            region.as_ptr().cast(),
            region.size(),
            MprotectFlags::READ | MprotectFlags::WRITE,
        )
    }
}

fn read(mapping: &SharedMapping, offset: u64) -> u64 {
    mapping.region().read_obj(MemoryRegionAddress(offset)).unwrap()
}

fn write(mapping: &SharedMapping, offset: u64, value: u64) {
    mapping.region().write_obj(value, MemoryRegionAddress(offset)).unwrap();
}

/// Whether a mapping of a memfd of this name exists. The name, unlike an address, is not used again
/// by another test.
fn is_mapped(name: &str) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().any(|line| line.contains(&format!("memfd:{name} ")))
}

#[test]
fn writers_and_readers_see_one_memory() {
    let memory = memory();
    let one = memory.map(GPA, Access::ReadWrite).unwrap();
    let other = memory.map(GuestAddress(0), Access::ReadWrite).unwrap();
    let memory = memory.into_read_only().unwrap();
    let reader = memory.map(GPA).unwrap();
    assert_eq!((memory.size(), reader.access(), one.access()), (SIZE, Access::ReadOnly, Access::ReadWrite));
    assert!(is_read_only(reader.region()) && !is_read_only(one.region()));
    assert_eq!((reader.region().start_addr(), reader.region().len()), (GPA, SIZE));
    // Those who mapped before the seal go on writing.
    write(&one, 8, 1);
    write(&other, SIZE - 8, 2);
    assert_eq!((read(&reader, 8), read(&reader, SIZE - 8), read(&one, SIZE - 8)), (1, 2, 2));
}

#[test]
fn the_size_is_fixed_from_the_start() {
    let memory = memory();
    let file = File::from(memory.try_clone_fd().unwrap());
    for size in [0, SIZE - PAGE_SIZE, 2 * SIZE] {
        assert_eq!(file.set_len(size).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
    assert!(file.write_at(&[0; 16], SIZE).is_err(), "writing beyond the end would grow the file");
}

#[test]
fn a_read_only_peer_is_refused_every_way_to_write() {
    let memory = memory();
    let writer = memory.map(GPA, Access::ReadWrite).unwrap();
    let memory = memory.into_read_only().unwrap();
    let fd = memory.try_clone_fd().unwrap();
    let reopened = rustix::fs::open(
        format!("/proc/self/fd/{}", fd.as_raw_fd()),
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .unwrap();
    for fd in [&fd, &reopened] {
        assert_eq!(map_writable(fd, MapFlags::SHARED), Err(Errno::PERM));
        assert_eq!(rustix::io::pwrite(fd, &[1], 0), Err(Errno::PERM));
        let hole = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        assert_eq!(rustix::fs::fallocate(fd, hole, 0, PAGE_SIZE), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(fd, 0), Err(Errno::PERM));
        assert_eq!(rustix::fs::fcntl_add_seals(fd, SealFlags::WRITE), Err(Errno::PERM));
    }
    let peer = ReadOnlySharedMemory::from_fd(reopened).unwrap();
    let reader = peer.map(GuestAddress(0)).unwrap();
    assert_eq!(make_writable(reader.region()), Err(Errno::ACCESS));
    write(&writer, 0, 5);
    assert_eq!(read(&reader, 0), 5);

    // A private mapping may be written and stays private.
    let private = map_writable(&fd, MapFlags::PRIVATE).unwrap();
    // SAFETY: the mapping is writable, page-aligned and known to nobody else.
    unsafe { private.cast::<u64>().write_volatile(6) };
    assert_eq!(read(&reader, 0), 5);
    // SAFETY: nothing refers to the mapping any more.
    unsafe { rustix::mm::munmap(private, bytes()) }.unwrap();
}

/// The module warns of this; should the kernel ever refuse it, the warning can go.
#[test]
fn mapping_made_before_the_seal_keeps_its_power() {
    let memory = memory();
    let early = memory.map(GPA, Access::ReadOnly).unwrap();
    let memory = memory.into_read_only().unwrap();
    let late = memory.map(GPA).unwrap();
    assert_eq!(make_writable(early.region()), Ok(()));
    assert_eq!(make_writable(late.region()), Err(Errno::ACCESS));
}

#[test]
fn mapping_is_gone_when_its_last_holder_is() {
    let memory = SharedMemory::create("gone-by-drop", SIZE).unwrap();
    let mapping = memory.map(GPA, Access::ReadWrite).unwrap();
    drop(memory);
    assert!(is_mapped("gone-by-drop"));
    let ram = GuestRam::builder().ram(1 << 20).build().unwrap();
    ram.insert(Arc::clone(mapping.region())).unwrap();
    let in_flight = ram.memory();
    drop(mapping);
    drop(ram.remove_region(GPA).unwrap());
    assert!(is_mapped("gone-by-drop"), "a snapshot holds it");
    in_flight.write_obj(1u8, GPA).unwrap();
    drop(in_flight);
    assert!(!is_mapped("gone-by-drop"));
}

#[test]
fn unmapping_reports_other_holders() {
    let memory = SharedMemory::create("gone-by-unmap", SIZE).unwrap();
    let mapping = memory.map(GPA, Access::ReadWrite).unwrap();
    let region = Arc::clone(mapping.region());
    let mapping = mapping.unmap().unwrap_err();
    let host = region.get_mmap();
    drop(region);
    let mapping = mapping.unmap().unwrap_err();
    assert!(is_mapped("gone-by-unmap"));
    drop(host);
    assert_eq!(mapping.region().start_addr(), GPA);
    mapping.unmap().unwrap();
    assert!(!is_mapped("gone-by-unmap"));
}

#[test]
fn devices_do_not_reach_a_read_only_mapping() {
    let memory = memory().into_read_only().unwrap();
    let mapping = memory.map(GPA).unwrap();
    let ram = GuestRam::builder().ram(1 << 20).track_dirty(true).build().unwrap();
    ram.insert(Arc::clone(mapping.region())).unwrap();
    ram.memory().write_obj(1u64, GPA).unwrap_err();
    assert!(ram.regions().iter().any(|region| Arc::ptr_eq(region, mapping.region())));
}

#[test]
fn received_descriptors_are_checked() {
    use SealFlags as F;
    let missing = |error: MemoryError| match error {
        MemoryError::MissingSeals { missing } => missing,
        other => panic!("{other:?}"),
    };
    let writable = |seals| SharedMemory::from_fd(memfd(SIZE, seals));
    assert_eq!(missing(writable(F::empty()).unwrap_err()), [Seal::Shrink, Seal::Grow]);
    assert_eq!(missing(writable(F::SHRINK).unwrap_err()), [Seal::Grow]);
    assert_eq!(missing(writable(F::GROW | F::SEAL).unwrap_err()), [Seal::Shrink]);
    assert_eq!(writable(F::SHRINK | F::GROW).unwrap().size(), SIZE);
    for (flag, seal) in [(F::WRITE, Seal::Write), (F::FUTURE_WRITE, Seal::FutureWrite)] {
        let error = writable(F::SHRINK | F::GROW | flag).unwrap_err();
        assert!(matches!(error, MemoryError::SealedAgainstWriting { seal: s } if s == seal), "{error}");
    }

    let read_only = |seals| ReadOnlySharedMemory::from_fd(memfd(SIZE, seals));
    assert_eq!(missing(read_only(F::SHRINK | F::GROW | F::SEAL).unwrap_err()), [Seal::FutureWrite]);
    let error = read_only(F::FUTURE_WRITE).unwrap_err();
    assert_eq!(error.to_string(), "the memfd lacks F_SEAL_SHRINK, F_SEAL_GROW");
    read_only(F::SHRINK | F::GROW | F::FUTURE_WRITE).unwrap();
    read_only(F::SHRINK | F::GROW | F::WRITE | F::SEAL).unwrap();
}

#[test]
fn received_descriptors_that_are_no_memory() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    // On tmpfs the answer is a set of seals that lacks what is needed.
    let refused = |error| matches!(error, MemoryError::NotMemfd { .. } | MemoryError::MissingSeals { .. });
    assert!(refused(SharedMemory::from_fd(file.try_clone().unwrap().into()).unwrap_err()));
    assert!(refused(ReadOnlySharedMemory::from_fd(file.into()).unwrap_err()));
    let null = OwnedFd::from(File::open("/dev/null").unwrap());
    assert!(matches!(SharedMemory::from_fd(null), Err(MemoryError::NotMemfd { .. })));

    let sized = |size| SharedMemory::from_fd(memfd(size, SIZE_SEALS)).unwrap_err();
    assert!(matches!(sized(0), MemoryError::ZeroSize { .. }));
    assert!(matches!(sized(PAGE_SIZE + 1), MemoryError::Unaligned { size: 4097, .. }));
    assert!(matches!(sized(32 << 40), MemoryError::TooLarge { .. }));
}

#[test]
fn received_descriptor_must_be_writable_to_write() {
    let memory = memory();
    let path = format!("/proc/self/fd/{}", memory.as_fd().as_raw_fd());
    let reading = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    assert!(matches!(SharedMemory::from_fd(reading), Err(MemoryError::DescriptorAccess)));
}

#[test]
fn a_peer_can_be_kept_from_sealing() {
    let memory = memory();
    let peer = SharedMemory::from_fd(memory.try_clone_fd().unwrap()).unwrap();
    memory.lock_seals().unwrap();
    memory.lock_seals().unwrap();
    let error = peer.into_read_only().unwrap_err();
    assert!(matches!(error, MemoryError::SealsLocked { wanted: Seal::FutureWrite }), "{error}");
    memory.map(GPA, Access::ReadWrite).unwrap();

    // A peer that sealed first has done what was wanted.
    let memory = self::memory();
    let peer = SharedMemory::from_fd(memory.try_clone_fd().unwrap()).unwrap();
    peer.into_read_only().unwrap();
    assert!(matches!(memory.map(GPA, Access::ReadWrite), Err(MemoryError::Map { .. })));
    memory.into_read_only().unwrap();
}

#[test]
fn sizes_and_places_are_checked() {
    assert!(matches!(SharedMemory::create("test", 0), Err(MemoryError::ZeroSize { .. })));
    assert!(matches!(SharedMemory::create("test", 100), Err(MemoryError::Unaligned { size: 100, .. })));
    assert!(matches!(SharedMemory::create("te\0st", SIZE), Err(MemoryError::File { .. })));
    let error = memory().map(GuestAddress(5), Access::ReadOnly).unwrap_err();
    assert!(matches!(error, MemoryError::Unaligned { gpa: 5, .. }), "{error}");
    let error = memory().map(GuestAddress(crate::layout::GPA_LIMIT), Access::ReadWrite).unwrap_err();
    assert!(matches!(error, MemoryError::BeyondAddressSpace { .. }), "{error}");
}

//! Shared memory handed to a process that is not trusted with it.
//!
//! The test starts itself again as the peer and passes the memfd as the peer's standard input.

#![allow(clippy::unwrap_used)] // the lint spares test functions only, not what they call

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use vmm_memory::vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
use vmm_memory::{Access, PAGE_SIZE, ReadOnlySharedMemory, SharedMemory};

const SIZE: u64 = 4 * PAGE_SIZE;
const GPA: GuestAddress = GuestAddress(1 << 32);
const START: MemoryRegionAddress = MemoryRegionAddress(0);
const ROLE: &str = "VMM_MEMORY_TEST_PEER";

fn run_peer(test: &str, memory: OwnedFd) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(ROLE, "1")
        .stdin(Stdio::from(memory))
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("1 passed"), "{told}{output:?}");
}

fn received() -> Option<OwnedFd> {
    std::env::var_os(ROLE).map(|_| io::stdin().as_fd().try_clone_to_owned().unwrap())
}

#[test]
fn reader_in_another_process() {
    if let Some(fd) = received() {
        SharedMemory::from_fd(fd.try_clone().unwrap()).unwrap_err();
        let file = File::from(fd.try_clone().unwrap());
        for refused in [file.set_len(0), file.set_len(2 * SIZE), file.write_all_at(&[1], 0)] {
            assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        }
        let memory = ReadOnlySharedMemory::from_fd(fd).unwrap();
        assert_eq!(memory.size(), SIZE);
        let mapping = memory.map(GPA).unwrap();
        assert_eq!(mapping.region().read_obj::<u64>(START).unwrap(), 0x1234);
        return;
    }
    let memory = SharedMemory::create("reader", SIZE).unwrap();
    let writer = memory.map(GPA, Access::ReadWrite).unwrap();
    writer.region().write_obj(0x1234u64, START).unwrap();
    let memory = memory.into_read_only().unwrap();
    run_peer("reader_in_another_process", memory.try_clone_fd().unwrap());
    assert_eq!(writer.region().read_obj::<u64>(START).unwrap(), 0x1234);
}

#[test]
fn writer_in_another_process() {
    if let Some(fd) = received() {
        ReadOnlySharedMemory::from_fd(fd.try_clone().unwrap()).unwrap_err();
        let memory = SharedMemory::from_fd(fd).unwrap();
        let mapping = memory.map(GPA, Access::ReadWrite).unwrap();
        mapping.region().write_obj(0x5678u64, START).unwrap();
        // Neither the size nor the right to write is the peer's to change.
        assert!(File::from(memory.try_clone_fd().unwrap()).set_len(0).is_err());
        memory.into_read_only().unwrap_err();
        return;
    }
    let memory = SharedMemory::create("writer", SIZE).unwrap();
    memory.lock_seals().unwrap();
    run_peer("writer_in_another_process", memory.try_clone_fd().unwrap());
    let mapping = memory.map(GPA, Access::ReadWrite).unwrap();
    assert_eq!(mapping.region().read_obj::<u64>(START).unwrap(), 0x5678);
}

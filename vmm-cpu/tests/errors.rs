//! Bad input that needs no virtual machine: hosts without what a backend needs, names, regions.

#![allow(missing_docs, reason = "a test has no interface")]

use vmm_cpu::vmm_memory::vm_memory::GuestAddress;
use vmm_cpu::vmm_memory::{GuestRam, MemoryError, RegionConfig};
use vmm_cpu::{Error, backend_names, open_backend};

#[test]
fn backend_that_is_not_compiled_in() {
    match open_backend("no such backend") {
        Err(Error::UnknownBackend { name, available }) => {
            assert_eq!(name, "no such backend");
            assert_eq!(available, backend_names().join(", "));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn region_of_no_bytes() {
    let region = RegionConfig::new(GuestAddress(0x1000), 0);
    let error = GuestRam::builder().region(region).build().unwrap_err();
    assert!(matches!(error, MemoryError::ZeroSize { gpa: 0x1000, .. }), "{error}");
}

#[test]
fn regions_that_overlap_in_ram() {
    let regions =
        [(0x1000, 0x3000), (0x3000, 0x1000)].map(|(gpa, size)| RegionConfig::new(GuestAddress(gpa), size));
    let [first, second] = regions;
    let error = GuestRam::builder().region(first).region(second).build().unwrap_err();
    assert!(matches!(error, MemoryError::Overlap { gpa: 0x3000, other_gpa: 0x1000, .. }), "{error}");
}

#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
mod kvm {
    use std::path::Path;

    use vmm_cpu::Error;
    use vmm_cpu::kvm::KvmHypervisor;

    #[test]
    fn host_without_the_device() {
        for missing in ["/nonexistent/kvm", "/dev/no-such-device"] {
            match KvmHypervisor::open_path(missing) {
                Err(Error::HostInterfaceAbsent { backend: "kvm", path, hint }) => {
                    assert_eq!(path, missing);
                    assert!(!hint.is_empty());
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn user_without_permission() {
        // sysfs refuses to open for writing what has no writer, whoever asks: a test that runs as root
        // gets no other file that it may not open.
        let read_only = "/sys/devices/system/cpu/possible";
        if !Path::new(read_only).exists() {
            eprintln!("skipped: no {read_only}");
            return;
        }
        match KvmHypervisor::open_path(read_only) {
            Err(error @ Error::PermissionDenied { .. }) => {
                let text = error.to_string();
                assert!(text.contains(read_only) && text.contains("permission"), "{text}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn device_that_is_not_kvm() {
        let error = KvmHypervisor::open_path("/dev/null").unwrap_err();
        assert!(matches!(error, Error::HostTooOld { .. }), "{error:?}");
        assert!(error.to_string().contains("/dev/null"), "{error}");
    }

    #[test]
    fn path_that_cannot_be_one() {
        let error = KvmHypervisor::open_path("/dev/kvm\0").unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error:?}");
    }
}

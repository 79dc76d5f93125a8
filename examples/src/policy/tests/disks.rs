//! Who has which disk.

use std::fs::{self, File};
use std::io;

use vmm_devices::channel::VmIdentity;
use vmm_devices::virtio::block::Backend as _;
use vmm_memory::vm_memory::VolatileSlice;
use vmm_policy::Policy;

use super::{DiskError, Disks, PolicedDisk, of};

const DISKS: &str = "labels l, reader\ndisk a.img {}\ndisk b.img {}\nallow l to attach, attach-ro disk\nallow reader to attach-ro disk a.img";

#[test]
fn an_image_has_one_writer_or_readers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a");
    File::create(&path).unwrap().set_len(4096).unwrap();
    let (enforcement, vms) = of(DISKS, &[(1, "l"), (2, "l"), (3, "reader")]);
    let disks = Disks::new(&enforcement);
    let error = disks.open(vms[2], "a.img", &path, false).unwrap_err();
    assert!(
        matches!(&error, DiskError::Refused { refused, .. } if refused.reason == "no rule allows it"),
        "{error}"
    );
    assert!(matches!(
        disks.open(VmIdentity::new(9, 1), "a.img", &path, true),
        Err(DiskError::Stranger { .. })
    ));

    let writer = disks.open(vms[0], "a.img", &path, false).unwrap();
    let error = disks.open(vms[1], "a.img", &path, false).unwrap_err().to_string();
    assert!(
        error.contains("is open by vm 00000000-0000-0000-0000-000000000001#1 as \"a.img\" for writing"),
        "{error}"
    );
    assert!(disks.open(vms[2], "a.img", &path, true).is_err(), "nor does one read what another writes");
    // Another name for it, in the policy and in the file system.
    let alias = directory.path().join("b");
    fs::hard_link(&path, &alias).unwrap();
    assert!(matches!(disks.open(vms[1], "b.img", &alias, false), Err(DiskError::InUse { .. })));
    drop(writer);

    let readers = [vms[0], vms[2]].map(|vm| disks.open(vm, "a.img", &path, true).unwrap());
    assert!(matches!(disks.open(vms[1], "a.img", &path, false), Err(DiskError::InUse { .. })));
    drop(readers);
    disks.open(vms[1], "a.img", &path, false).unwrap();
    assert_eq!(enforcement.monitor().open_channels(), []);

    // Another process, for which another description of the file stands.
    let other = File::open(&path).unwrap();
    other.try_lock_shared().unwrap();
    assert!(matches!(disks.open(vms[0], "a.img", &path, false), Err(DiskError::Locked { .. })));
    drop(disks.open(vms[0], "a.img", &path, true).unwrap());
    other.unlock().unwrap();
    let writer = disks.open(vms[0], "a.img", &path, false).unwrap();
    assert!(other.try_lock_shared().is_err(), "who keeps to locks is kept away");
    drop(writer);
    other.try_lock_shared().unwrap();
}

#[test]
fn a_disk_whose_right_is_gone_fails() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let (enforcement, vms) = of(DISKS, &[(1, "l")]);
    let disk = Disks::new(&enforcement).open(vms[0], "a.img", file.path(), false).unwrap();
    let mut sector = [7; 512];
    let write =
        |disk: &PolicedDisk, sector: &mut [u8]| disk.write_at(&[VolatileSlice::from(sector)], 0, false);
    assert_eq!(write(&disk, &mut sector).unwrap(), 512);
    let cut = enforcement
        .reload(Policy::parse("labels l\ndisk a.img {}\nallow l to attach-ro disk").unwrap())
        .unwrap();
    assert_eq!((cut.closed.len(), cut.revoked.len()), (0, 1));
    sector = [8; 512];
    assert_eq!(write(&disk, &mut sector).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    assert!(disk.flush().is_err() && disk.discard(0, 512).is_err());
    assert_eq!(fs::read(file.path()).unwrap()[..512], [7; 512]);
}

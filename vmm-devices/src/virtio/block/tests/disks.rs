//! Disks that misbehave, and files.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::*;

#[test]
fn a_disk_that_fails_fails_requests() {
    let (mut rig, probe) = probed(ALL);
    probe.fail(Some(io::ErrorKind::PermissionDenied));
    assert_eq!(rig.give(kind::OUT, 0, &[1; 512]), (IO_ERROR, 1));
    assert_eq!(rig.ask(kind::IN, 0, 512), (IO_ERROR, 0, vec![POISON; 512]));
    assert_eq!(rig.give(kind::FLUSH, 0, &[]), (IO_ERROR, 1));
    assert_eq!(rig.segment(kind::DISCARD, 0, 1, 0), (IO_ERROR, 1));
    assert_eq!(rig.segment(kind::WRITE_ZEROES, 0, 1, 0), (IO_ERROR, 1));
    probe.fail(Some(io::ErrorKind::Unsupported));
    assert_eq!(rig.segment(kind::DISCARD, 0, 1, 0), (UNSUPPORTED, 1));
    probe.fail(None);
    assert_eq!(rig.write(0, &[1; 512]), OK, "it goes on when the disk does");
}

#[test]
fn short_transfers_are_continued() {
    let (mut rig, probe) = probed(ALL);
    let data = pattern(2);
    probe.shorten(Some(300));
    assert_eq!(rig.write(1, &data), OK);
    assert_eq!(calls(&probe), ["write 512 1024", "write 812 724", "write 1112 424", "write 1412 124"]);
    assert_eq!(rig.read(1, 1024), data);
    // An end that comes early.
    probe.shorten(Some(0));
    assert_eq!(rig.write(1, &data), IO_ERROR);
    assert_eq!(rig.ask(kind::IN, 1, 512).0, IO_ERROR);
}

#[test]
fn interrupted_calls_are_made_again() {
    let (mut rig, probe) = probed(ALL);
    probe.interrupt(true);
    probe.shorten(Some(512));
    let data = pattern(3);
    assert_eq!(rig.write(0, &data), OK);
    assert_eq!(rig.read(0, data.len()), data);
}

#[test]
fn a_disk_without_zeros_of_its_own_writes_them() {
    struct Plain(Arc<FaultyDisk>);
    impl Backend for Plain {
        fn size(&self) -> io::Result<u64> {
            self.0.size()
        }
        fn read_at(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
            self.0.read_at(buffers, offset)
        }
        fn write_at(&self, buffers: &[VolatileSlice<'_>], offset: u64, durable: bool) -> io::Result<usize> {
            self.0.write_at(buffers, offset, durable)
        }
        fn flush(&self) -> io::Result<()> {
            self.0.flush()
        }
    }
    let probe = faulty(1 << 20);
    let mut rig = Rig::new(Block::builder(Arc::new(Plain(probe.clone()))), feature::WRITE_ZEROES);
    assert_eq!(rig.driver.device_features() & feature::DISCARD, 0);
    probe.contents().write(0, &vec![5; 1 << 20]).unwrap();
    assert_eq!(rig.segment(kind::WRITE_ZEROES, 1, 300, 1), (OK, 1));
    // It cannot ask for a flush, so there is one.
    assert_eq!(calls(&probe), ["write 512 65536", "write 66048 65536", "write 131584 22528", "flush"]);
    let mut bytes = vec![0; 302 * 512];
    probe.contents().read(0, &mut bytes).unwrap();
    assert!(bytes[..512].iter().chain(&bytes[301 * 512..]).all(|byte| *byte == 5));
    assert!(bytes[512..301 * 512].iter().all(|byte| *byte == 0));
}

fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_file_is_a_disk() {
    let mut expected = pattern(SECTORS);
    let file = file(&expected);
    let disk = Arc::new(RawFile::new(file.try_clone().unwrap(), false).unwrap());
    for features in [ALL, 0] {
        let mut rig = Rig::new(Block::builder(disk.clone()), features);
        assert_eq!(rig.read(0, expected.len()), expected);
        let data = vec![9; 1024];
        assert_eq!(rig.write(7, &data), OK);
        expected[7 * 512..9 * 512].copy_from_slice(&data);
        assert_eq!(rig.give(kind::FLUSH, 0, &[]), (OK, 1));
        if features == ALL {
            assert_eq!(rig.segment(kind::WRITE_ZEROES, 20, 4, 0), (OK, 1));
            assert_eq!(rig.segment(kind::WRITE_ZEROES, 30, 4, 1), (OK, 1));
            assert_eq!(rig.segment(kind::DISCARD, 40, 16, 0), (OK, 1));
            assert_eq!(rig.segment(kind::DISCARD, 40, 0, 0), (OK, 1));
            for sectors in [20..24, 30..34, 40..56] {
                expected[sectors.start * 512..sectors.end * 512].fill(0);
            }
        }
        assert_eq!(contents(&file), expected);
    }
}

#[test]
fn a_format_is_not_guessed() {
    // The header of a qcow2 image with a backing file: to this device it is two sectors of bytes.
    let mut bytes = vec![0; 1024];
    bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    bytes[8..16].copy_from_slice(&64u64.to_be_bytes());
    bytes[64..75].copy_from_slice(b"/etc/passwd");
    let disk = RawFile::new(file(&bytes), false).unwrap();
    let mut rig = Rig::new(Block::builder(Arc::new(disk)), ALL);
    assert_eq!(rig.handle.capacity(), 1024);
    assert_eq!(rig.read(0, 1024), bytes);
    // Nor does what a guest writes make it one.
    assert_eq!(rig.write(0, &bytes[..512]), OK);
    assert_eq!((rig.handle.resize().is_ok(), rig.handle.capacity()), (true, 1024));
}

#[test]
fn a_file_that_shrinks_fails_requests_and_does_not_grow_again() {
    let file = file(&pattern(SECTORS));
    let disk = RawFile::new(file.try_clone().unwrap(), false).unwrap();
    let mut rig = Rig::new(Block::builder(Arc::new(disk)), ALL);
    file.set_len(10 * 512).unwrap();
    assert_eq!(rig.read(9, 512), pattern(SECTORS)[9 * 512..10 * 512]);
    assert_eq!(rig.ask(kind::IN, 9, 1024).0, IO_ERROR);
    assert_eq!(rig.write(10, &[1; 512]), IO_ERROR);
    assert_eq!(rig.segment(kind::WRITE_ZEROES, 9, 2, 0), (IO_ERROR, 1));
    assert_eq!(rig.segment(kind::DISCARD, 9, 2, 0), (IO_ERROR, 1));
    assert_eq!(file.metadata().unwrap().len(), 10 * 512);
    rig.handle.resize().unwrap();
    assert_eq!(rig.handle.capacity(), 10 * 512);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, pattern(SECTORS)).unwrap();
    let disk = Arc::new(RawFile::open(&path, true).unwrap());
    // The descriptor itself cannot write.
    let access = rustix::fs::fcntl_getfl(disk.file()).unwrap() & rustix::fs::OFlags::ACCMODE;
    assert_eq!(access, rustix::fs::OFlags::RDONLY);
    assert!(matches!(Block::builder(disk.clone()).build(), Err(BlockError::ReadOnly)));
    let mut rig = Rig::new(Block::builder(disk).read_only(true), feature::RO | feature::FLUSH);
    assert_eq!(rig.driver.device_features() & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    assert_eq!(rig.give(kind::OUT, 0, &[1; 512]), (IO_ERROR, 1));
    assert_eq!(rig.segment(kind::DISCARD, 0, 1, 0), (UNSUPPORTED, 1));
    assert_eq!(rig.give(kind::FLUSH, 0, &[]), (OK, 1));
    assert_eq!(rig.read(0, 512), pattern(1));
    assert_eq!(std::fs::read(&path).unwrap(), pattern(SECTORS));
    // And a disk that could be written, for a device that may not.
    let probe = faulty(512);
    let mut rig = Rig::new(Block::builder(probe.clone()).read_only(true), 0);
    assert_eq!(rig.write(0, &[1; 512]), IO_ERROR);
    assert!(calls(&probe).is_empty());
}

#[test]
fn files_that_want_aligned_buffers_are_refused() {
    use std::os::unix::fs::OpenOptionsExt as _;
    let file = tempfile::NamedTempFile::new().unwrap();
    let direct = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(file.path());
    let Ok(direct) = direct else {
        println!("skipped: this file system has no O_DIRECT");
        return;
    };
    let refused = RawFile::new(direct, false).unwrap_err();
    assert!(matches!(refused, RawFileError::Direct) && refused.to_string().contains("O_DIRECT"));
}

/// CVE-2020-35517: only regular files and block devices are opened as disks.
#[test]
fn cve_2020_35517_special_files_are_no_disks() {
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(RawFile::open(directory.path(), true), Err(RawFileError::Kind)));
    assert!(matches!(RawFile::open("/dev/null", false), Err(RawFileError::Kind)));
    let fifo = directory.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    // Nobody is at the other end, and nobody is waited for.
    assert!(matches!(RawFile::open(&fifo, true), Err(RawFileError::Kind)));
    // Positions mean nothing to a file that is appended to.
    let appended = File::options().append(true).create(true).read(true).open(directory.path().join("log"));
    assert!(matches!(RawFile::new(appended.unwrap(), false), Err(RawFileError::Append)));
    let missing = RawFile::open(directory.path().join("missing"), false).unwrap_err().to_string();
    assert!(missing.contains("/missing: cannot be opened for reading and writing"), "{missing}");
    let odd = RawFile::new(file(&[0; 1000]), false).unwrap();
    let odd = Block::builder(Arc::new(odd)).build().unwrap_err().to_string();
    assert!(odd.contains("1000 bytes") && odd.contains("multiple of 512"), "{odd}");
}

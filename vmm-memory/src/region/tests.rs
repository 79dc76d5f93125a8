use std::fs::File;

use vm_memory::Bytes;

use super::*;

const BASE: GuestAddress = GuestAddress(0x10_0000);

fn file_of(size: u64) -> Arc<File> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    Arc::new(file)
}

#[test]
fn ranges_that_cannot_be() {
    type Refusal = fn(&MemoryError) -> bool;
    let cases: [(u64, u64, Refusal); 9] = [
        (0x1000, 0, |e| matches!(e, MemoryError::ZeroSize { gpa: 0x1000, .. })),
        (0x1001, 0x1000, |e| matches!(e, MemoryError::Unaligned { gpa: 0x1001, size: 0x1000, .. })),
        (0x1000, 0x1001, |e| matches!(e, MemoryError::Unaligned { gpa: 0x1000, size: 0x1001, .. })),
        (0x1000, 0xfff, |e| matches!(e, MemoryError::Unaligned { .. })),
        (GPA_LIMIT, 0x1000, |e| matches!(e, MemoryError::BeyondAddressSpace { size: 0x1000, .. })),
        (GPA_LIMIT - 0x1000, 0x2000, |e| matches!(e, MemoryError::BeyondAddressSpace { .. })),
        (!0xfff, 0x1000, |e| matches!(e, MemoryError::BeyondAddressSpace { .. })),
        (0x1000, !0xfff, |e| matches!(e, MemoryError::BeyondAddressSpace { .. })),
        (0x1000, MAX_RAM + 0x1000, |e| matches!(e, MemoryError::TooLarge { .. })),
    ];
    for (gpa, size, expected) in cases {
        let error = RegionConfig::new(GuestAddress(gpa), size).map(false).unwrap_err();
        assert!(expected(&error), "{gpa:#x} {size:#x}: {error}");
        assert!(error.to_string().contains(&format!("{gpa:#x}")), "{error}");
    }
    check_range(GuestAddress(GPA_LIMIT - PAGE_SIZE), PAGE_SIZE).unwrap();
    check_range(GuestAddress(0), MAX_RAM).unwrap();
}

#[test]
fn every_backing_is_zero_and_writable() {
    let file = file_of(0x5000);
    let backings =
        [Backing::Anonymous, Backing::Memfd, Backing::File { file: Arc::clone(&file), offset: 0x1000 }];
    for backing in backings {
        let region = RegionConfig::new(BASE, 0x4000).backing(backing.clone()).map(true).unwrap();
        assert_eq!((region.start_addr(), region.len()), (BASE, 0x4000));
        assert!(!is_read_only(&region));
        let last = vm_memory::MemoryRegionAddress(0x3ff8);
        assert_eq!(region.read_obj::<u64>(last).unwrap(), 0, "{backing:?}");
        region.write_obj(7u64, last).unwrap();
        assert_eq!(region.read_obj::<u64>(last).unwrap(), 7, "{backing:?}");
        assert_eq!(region.file_offset().is_some(), !matches!(backing, Backing::Anonymous));
    }
    let mut word = [0; 8];
    std::os::unix::fs::FileExt::read_exact_at(&*file, &mut word, 0x1000 + 0x3ff8).unwrap();
    assert_eq!(u64::from_ne_bytes(word), 7, "the mapping of a file is shared");
}

#[test]
fn memfd_cannot_change_size() {
    let region = RegionConfig::new(BASE, 0x4000).backing(Backing::Memfd).map(false).unwrap();
    let file = region.file_offset().unwrap().file();
    assert!(file.set_len(0).is_err() && file.set_len(0x8000).is_err());
    assert_eq!(file.metadata().unwrap().len(), 0x4000);
}

#[test]
fn short_file_is_refused_with_both_sizes() {
    let config = |offset| {
        RegionConfig::new(BASE, 0x3000).backing(Backing::File { file: file_of(0x4000), offset }).map(false)
    };
    config(0x1000).unwrap();
    let error = config(0x2000).unwrap_err();
    assert!(matches!(error, MemoryError::FileTooShort { size: 0x3000, file_size: 0x4000, .. }), "{error}");
    assert!(error.to_string().contains("0x3000") && error.to_string().contains("0x4000"), "{error}");
    assert!(matches!(config(!0xfff), Err(MemoryError::FileTooShort { .. })));
    assert!(matches!(config(0x10), Err(MemoryError::UnalignedOffset { offset: 0x10, .. })));
}

#[test]
fn read_only_needs_no_writable_file() {
    let mut image = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut image, &[0x55; 0x1000]).unwrap();
    let file = Arc::new(File::open(image.path()).unwrap());
    let config = RegionConfig::new(BASE, 0x1000).backing(Backing::File { file, offset: 0 });
    assert!(matches!(config.clone().map(false), Err(MemoryError::Map { .. })));
    let region = config.read_only(true).track_dirty(true).map(true).unwrap();
    assert!(is_read_only(&region));
    assert!(MmapRegion::bitmap(&region).is_none());
    let byte: u8 = region.read_obj(vm_memory::MemoryRegionAddress(0xfff)).unwrap();
    assert_eq!(byte, 0x55);
}

#[test]
fn dirty_bitmap_only_where_asked() {
    let tracked = |config: RegionConfig, default| {
        let region = config.map(default).unwrap();
        check_region(&region).unwrap();
        MmapRegion::bitmap(&region).is_some()
    };
    let config = RegionConfig::new(BASE, 0x1000);
    assert!(tracked(config.clone(), true) && !tracked(config.clone(), false));
    assert!(tracked(config.clone().track_dirty(true), false));
    assert!(!tracked(config.track_dirty(false), true));
}

#[test]
fn foreign_region_with_another_granule_is_refused() {
    let bitmap = AtomicBitmap::new(0x4000, NonZeroUsize::new(0x2000).unwrap());
    let mapping = MmapRegionBuilder::new_with_bitmap(0x4000, Some(bitmap))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .build()
        .unwrap();
    let error = check_region(&GuestRegion::new(mapping, BASE).unwrap()).unwrap_err();
    assert!(matches!(error, MemoryError::BitmapGranule { bits: 2, pages: 4, .. }), "{error}");
}

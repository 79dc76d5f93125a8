use super::super::test_support::{DIRECT, FRAMES, FREE, Guest, L1, L2, L3, L4, RAM};
use super::*;

fn space(guest: &Guest) -> AddressSpace<'_> {
    guest.domain.memory.space(GuestAddress(L4 * PAGE_SIZE))
}

#[test]
fn reads_and_writes_across_pages() {
    let guest = Guest::new();
    // Two pages that are neighbours in virtual memory only.
    guest.store(L1 + 2, 1, ((FREE + 7) * PAGE_SIZE) | 3);
    let va = DIRECT + FREE * PAGE_SIZE + PAGE_SIZE - 3;
    space(&guest).write_bytes(va, &[1, 2, 3, 4, 5, 6]).unwrap();
    let mut back = [0; 6];
    space(&guest).read_bytes(va, &mut back).unwrap();
    assert_eq!(back, [1, 2, 3, 4, 5, 6]);
    let mut low = [0; 3];
    guest.domain.memory.read((FREE + 7) * PAGE_SIZE, &mut low).unwrap();
    assert_eq!(low, [4, 5, 6]);
}

#[test]
fn bad_addresses_fault() {
    let guest = Guest::new();
    let end = DIRECT + guest.domain.memory.layout().abi_frames().end * PAGE_SIZE;
    let bad = [
        0,
        0x1000,
        0x0000_8000_0000_0000,
        0xffff_7fff_ffff_ffff,
        0xffff_8000_0000_0000,
        0xffff_8180_0000_0000,
        0xffff_87ff_ffff_fff8,
        end,
        end - 4,
        u64::MAX - 7,
        u64::MAX,
    ];
    for va in bad {
        assert_eq!(space(&guest).read::<u64>(va), Err(Errno::EFAULT), "{va:#x}");
        assert_eq!(space(&guest).write(va, &1_u64), Err(Errno::EFAULT), "{va:#x}");
    }
    assert!(space(&guest).read::<u64>(end - 8).is_ok());
}

#[test]
fn read_only_pages_refuse_writes() {
    let guest = Guest::new();
    let va = DIRECT + FREE * PAGE_SIZE;
    for (table, index) in [(L1 + 2, 0), (L2, 2), (L3, 0), (L4, (DIRECT >> 39) & 511)] {
        let old = guest.load(table, index);
        guest.store(table, index, old & !entry::WRITABLE);
        assert_eq!(space(&guest).write(va, &1_u64), Err(Errno::EFAULT), "level of table {table}");
        assert!(space(&guest).read::<u64>(va).is_ok());
        guest.store(table, index, old & !entry::PRESENT);
        assert_eq!(space(&guest).read::<u64>(va), Err(Errno::EFAULT));
        guest.store(table, index, old);
    }
}

#[test]
fn tables_outside_of_ram_lead_nowhere() {
    let guest = Guest::new();
    let va = DIRECT + FREE * PAGE_SIZE;
    let beyond = guest.domain.memory.layout().abi_frames().end;
    for frame in [FRAMES, beyond, 1 << 39, (1 << 40) - 1] {
        for (table, index) in [(L2, 2), (L3, 0), (L4, (DIRECT >> 39) & 511)] {
            let old = guest.load(table, index);
            guest.store(table, index, (frame * PAGE_SIZE) | 7);
            assert_eq!(
                space(&guest).read::<u64>(va),
                Err(Errno::EFAULT),
                "frame {frame:#x} in table {table}"
            );
            guest.store(table, index, old);
        }
    }
    // A last level may name shared frames, and nothing above.
    guest.store(L1 + 2, 0, (beyond * PAGE_SIZE) | 7);
    assert_eq!(space(&guest).read::<u64>(va), Err(Errno::EFAULT));
    guest.store(L1 + 2, 0, ((beyond - 1) * PAGE_SIZE) | 7);
    assert!(space(&guest).read::<u64>(va).is_ok());
    // So does a root that is no RAM.
    for root in [RAM, !0xfff] {
        assert_eq!(guest.domain.memory.space(GuestAddress(root)).read::<u64>(va), Err(Errno::EFAULT));
    }
}

#[test]
fn large_pages_are_not_followed() {
    let guest = Guest::new();
    let old = guest.load(L2, 2);
    guest.store(L2, 2, old | entry::LARGE);
    assert_eq!(space(&guest).read::<u64>(DIRECT + FREE * PAGE_SIZE), Err(Errno::EFAULT));
}

#[test]
fn unaligned_words_are_refused() {
    let guest = Guest::new();
    let memory = &guest.domain.memory;
    assert_eq!(memory.load(FREE * PAGE_SIZE + 4), Err(Errno::EFAULT));
    assert_eq!(memory.store(FREE * PAGE_SIZE + 1, 1), Err(Errno::EFAULT));
    assert_eq!(memory.load(u64::MAX - 7), Err(Errno::EFAULT));
    assert_eq!(memory.load(memory.layout().abi_frames().end * PAGE_SIZE), Err(Errno::EFAULT));
    assert_eq!(memory.load_u32(u64::MAX), Err(Errno::EFAULT));
}

#[test]
fn arrays_do_not_wrap() {
    assert_eq!(element::<u64>(u64::MAX - 8, 1), Ok(u64::MAX));
    assert_eq!(element::<u64>(u64::MAX - 7, 1), Err(Errno::EFAULT));
    assert_eq!(element::<u64>(0, u64::MAX), Err(Errno::EFAULT));
}

#[test]
fn memory_without_its_parts_is_refused() {
    use vmm_memory::RegionConfig;
    let layout = Layout::new(RAM).unwrap();
    for size in [RAM, layout.m2p().0] {
        let ram = GuestRam::builder().region(RegionConfig::new(GuestAddress(0), size)).build().unwrap();
        let error = DomainMemory::new(&ram, layout).unwrap_err().to_string();
        assert!(error.contains("missing"), "{error}");
    }
}

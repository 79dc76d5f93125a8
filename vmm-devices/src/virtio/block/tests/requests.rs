use super::*;

#[test]
fn what_is_written_is_read() {
    let (mut rig, probe) = probed(ALL);
    let data = pattern(8);
    assert_eq!(rig.give(kind::OUT, 3, &data), (OK, 1));
    assert_eq!(rig.read(3, data.len()), data);
    assert_eq!(rig.read(4, 512), data[512..1024]);
    assert_eq!(calls(&probe), ["write 1536 4096", "read 1536 4096", "read 2048 512"]);
    assert!(rig.line.is_asserted());
}

#[test]
fn a_driver_with_a_small_queue_may_have_as_many_segments_as_it_is_told() {
    let probe = faulty(1 << 20);
    let mut rig = Rig::new(Block::builder(probe.clone()).queue_size(256), ALL);
    assert_eq!(rig.queue.size(), 64);
    let mut told = [0; 4];
    rig.driver.read_config(12, &mut told);
    for (more, fails) in [(0, false), (1, true)] {
        rig.put_header(kind::IN, 0);
        let mut chain = rig.queue.chain().readable(HEADER, 16);
        for i in 0..u32::from_le_bytes(told) + more {
            chain = chain.writable(DATA + u64::from(i) * 512, 512);
        }
        chain.writable(STATUS, 1).submit_indirect(0x80000).unwrap();
        rig.driver.notify(0);
        assert_eq!(rig.driver.status() & 0x40 != 0, fails);
    }
    assert_eq!(rig.queue.used_index().unwrap(), 1);
    assert_eq!(calls(&probe), ["read 0 130048"]);
}

#[test]
fn a_request_of_no_data_moves_none() {
    let (mut rig, _) = probed(ALL);
    assert_eq!(rig.give(kind::OUT, 0, &[]), (OK, 1));
    assert_eq!(rig.ask(kind::IN, 0, 0), (OK, 1, Vec::new()));
    assert_eq!(rig.ask(kind::IN, SECTORS as u64, 0), (OK, 1, Vec::new()));
    assert_eq!(rig.ask(kind::IN, SECTORS as u64 + 1, 0), (IO_ERROR, 1, Vec::new()));
}

#[test]
fn pieces_may_be_any() {
    // Header and status in parts, data in parts that are no sectors, across the border of two regions.
    let (mut rig, _) = probed(ALL);
    let data = pattern(2);
    rig.put_header(kind::OUT, 5);
    rig.put(0x1fff0, &data);
    let chain = rig.queue.chain().readable(HEADER, 3).readable(HEADER + 3, 0).readable(HEADER + 3, 13);
    let chain = chain.readable(0x1fff0, 1).readable(0x1fff1, 700).readable(0x1fff1 + 700, 323);
    let head = chain.writable(STATUS, 1).submit().unwrap();
    assert_eq!(rig.ended(head), (OK, 1));
    // The header and the data in one buffer, and the status behind the data.
    rig.put(HEADER, &header(kind::OUT, 9));
    rig.put(HEADER + 16, &data);
    let head = rig.queue.chain().readable(HEADER, 16 + 1024).writable(STATUS, 1).submit().unwrap();
    assert_eq!(rig.ended(head), (OK, 1));
    for sector in [5, 9] {
        rig.put_header(kind::IN, sector);
        let chain = rig.queue.chain().readable(HEADER, 16).writable(DATA, 100).writable(DATA + 100, 925);
        let head = chain.submit_indirect(0xf000).unwrap();
        rig.driver.notify(0);
        assert_eq!(rig.queue.take_used().unwrap(), Some((head.into(), 1025)));
        assert_eq!((rig.get(DATA, 1024), rig.get(DATA + 1024, 1)), (data.clone(), vec![OK]));
    }
}

#[test]
fn requests_beyond_the_end_touch_nothing() {
    let (mut rig, probe) = probed(ALL);
    let end = SECTORS as u64;
    let two = vec![1; 1024];
    let wrapping = [u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, (u64::MAX >> 9) - 1, 1 << 55];
    for sector in wrapping.into_iter().chain([end - 1, end, end + 1]) {
        assert_eq!(rig.give(kind::OUT, sector, &two), (IO_ERROR, 1), "{sector:#x}");
        assert_eq!(rig.ask(kind::IN, sector, 1024), (IO_ERROR, 0, vec![POISON; 1024]), "{sector:#x}");
        assert_eq!(rig.segment(kind::DISCARD, sector, 2, 0), (IO_ERROR, 1), "{sector:#x}");
        assert_eq!(rig.segment(kind::WRITE_ZEROES, sector, 2, 0), (IO_ERROR, 1), "{sector:#x}");
    }
    assert!(calls(&probe).is_empty());
    assert_eq!(rig.give(kind::OUT, end - 2, &two), (OK, 1));
}

#[test]
fn lengths_are_whole_sectors() {
    let (mut rig, probe) = probed(ALL);
    for len in [1, 511, 513, 1025] {
        assert_eq!(rig.give(kind::OUT, 0, &vec![1; len]), (IO_ERROR, 1));
        assert_eq!(rig.ask(kind::IN, 0, len), (IO_ERROR, 0, vec![POISON; len]));
    }
    assert!(calls(&probe).is_empty());
}

#[test]
fn headers_that_are_cut_off_fail() {
    let (mut rig, probe) = probed(ALL);
    rig.put_header(kind::IN, 0);
    for len in [0, 1, 8, 15] {
        let head = rig.queue.chain().readable(HEADER, len).writable(STATUS, 1).submit().unwrap();
        assert_eq!(rig.ended(head), (IO_ERROR, 1));
    }
    let head = rig.queue.chain().writable(STATUS, 1).submit().unwrap();
    assert_eq!(rig.ended(head), (IO_ERROR, 1));
    let head = rig.queue.chain().readable(NOWHERE, 16).writable(STATUS, 1).submit().unwrap();
    assert_eq!(rig.ended(head), (IO_ERROR, 1));
    // No place for a status: nothing is done, and nothing written.
    rig.put(STATUS, &[POISON]);
    rig.put_header(kind::OUT, 0);
    for chain in [
        rig.queue.chain().readable(HEADER, 16).readable(DATA, 512).submit(),
        rig.queue.chain().readable(HEADER, 16).readable(DATA, 512).writable(STATUS, 0).submit(),
    ] {
        assert_eq!(rig.ended(chain.unwrap()), (POISON, 0));
    }
    assert!(calls(&probe).is_empty());
}

#[test]
fn a_status_that_is_not_in_ram_is_not_said_to_be_written() {
    let (mut rig, _) = probed(ALL);
    rig.put_header(kind::IN, 0);
    let chain = rig.queue.chain().readable(HEADER, 16).writable(DATA, 512).writable(NOWHERE, 1);
    let head = chain.submit().unwrap();
    assert_eq!(rig.ended(head).1, 0);
    assert_eq!(rig.driver.status() & 0x40, 0, "the device still works");
}

#[test]
fn types_that_there_are_not_are_unsupported() {
    let (mut rig, probe) = probed(ALL);
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 24, 26, 0x8000_0000, u32::MAX] {
        assert_eq!(rig.give(kind, 0, &[0; 512]), (UNSUPPORTED, 1), "{kind}");
        assert_eq!(rig.ask(kind, 0, 512), (UNSUPPORTED, 0, vec![POISON; 512]), "{kind}");
    }
    assert!(calls(&probe).is_empty());
}

#[test]
fn what_was_not_agreed_on_is_unsupported() {
    let (mut rig, probe) = probed(0);
    assert_eq!(rig.segment(kind::DISCARD, 0, 1, 0), (UNSUPPORTED, 1));
    assert_eq!(rig.segment(kind::WRITE_ZEROES, 0, 1, 0), (UNSUPPORTED, 1));
    assert!(calls(&probe).is_empty());
    assert_eq!(rig.give(kind::FLUSH, 0, &[]), (OK, 1), "it does no harm");
}

#[test]
fn discards_and_zeros() {
    let (mut rig, probe) = probed(ALL);
    let data = pattern(SECTORS);
    assert_eq!(rig.write(0, &data), OK);
    calls(&probe);
    assert_eq!(rig.segment(kind::DISCARD, 2, 3, 0), (OK, 1));
    assert_eq!(rig.segment(kind::WRITE_ZEROES, 8, 1, 0), (OK, 1));
    assert_eq!(rig.segment(kind::WRITE_ZEROES, 10, 2, 1), (OK, 1));
    assert_eq!(calls(&probe), ["discard 1024 1536", "zero 4096 512 false", "zero 5120 1024 true"]);
    let mut expected = data;
    for sectors in [2..5, 8..9, 10..12] {
        expected[sectors.start * 512..sectors.end * 512].fill(0);
    }
    assert_eq!(rig.read(0, expected.len()), expected);
    // Flags that there are not (5.2.6.2), and unmap for a discard.
    calls(&probe);
    for flags in [1, 2, 0x8000_0000] {
        assert_eq!(rig.segment(kind::DISCARD, 0, 1, flags), (UNSUPPORTED, 1));
    }
    for flags in [2, 3, 0x8000_0000] {
        assert_eq!(rig.segment(kind::WRITE_ZEROES, 0, 1, flags), (UNSUPPORTED, 1));
    }
    // More than the configuration allows: segments, or sectors.
    for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
        let one = segment(0, 1, 0);
        assert_eq!(rig.give(kind, 0, &[one.clone(), one.clone()].concat()), (IO_ERROR, 1));
        assert_eq!(rig.give(kind, 0, &one[..15]), (IO_ERROR, 1));
        assert_eq!(rig.give(kind, 0, &[]), (IO_ERROR, 1));
        assert_eq!(rig.segment(kind, 0, u32::MAX, 0), (IO_ERROR, 1));
        assert_eq!(rig.segment(kind, 0, 0, 0), (OK, 1));
    }
    assert_eq!(calls(&probe), ["discard 0 0", "zero 0 0 false"]);
}

#[test]
fn the_disk_says_its_name() {
    for (name, expected) in [
        (&b"vm-root"[..], *b"vm-root\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        (b"twenty-characters-xx", *b"twenty-characters-xx"),
        (b"", [0; 20]),
    ] {
        let builder = Block::builder(faulty(512)).serial(name);
        let mut rig = Rig::new(builder, ALL);
        assert_eq!(rig.ask(kind::GET_ID, 0, 20), (OK, 21, expected.to_vec()));
        let (status, used, data) = rig.ask(kind::GET_ID, 77, 40);
        assert_eq!((status, used, &data[..20], &data[20..]), (OK, 20, &expected[..], &[POISON; 20][..]));
        assert_eq!(rig.ask(kind::GET_ID, 0, 19), (IO_ERROR, 0, vec![POISON; 19]));
    }
}

#[test]
fn buffers_outside_of_ram_fail_their_request_alone() {
    let (mut rig, probe) = probed(ALL);
    let data = pattern(2);
    assert_eq!(rig.write(0, &data), OK);
    calls(&probe);
    for kind in [kind::IN, kind::OUT, kind::GET_ID, kind::DISCARD, kind::WRITE_ZEROES] {
        for place in [NOWHERE, u64::MAX - 100, 0xfff00] {
            rig.put_header(kind, 0);
            rig.put(STATUS, &[POISON]);
            let chain = rig.queue.chain().readable(HEADER, 16);
            let chain = match kind {
                kind::IN => chain.writable(DATA, 512).writable(place, 512),
                kind::GET_ID => chain.writable(NOWHERE, 20),
                kind::OUT => chain.readable(DATA, 512).readable(place, 512),
                _ => chain.readable(NOWHERE, 16),
            };
            let head = chain.writable(STATUS, 1).submit().unwrap();
            assert_eq!(rig.ended(head).0, IO_ERROR, "{kind} at {place:#x}");
        }
    }
    assert!(calls(&probe).is_empty());
    assert_eq!(rig.read(0, 1024), data);
}

#[test]
fn many_requests_are_served_at_one_doorbell() {
    let (mut rig, probe) = probed(ALL);
    rig.put_header(kind::OUT, 1);
    for _ in 0..21 {
        rig.queue.chain().readable(HEADER, 16).readable(DATA, 512).writable(STATUS, 1).submit().unwrap();
    }
    rig.driver.notify(0);
    assert_eq!(std::iter::from_fn(|| rig.queue.take_used().unwrap()).count(), 21);
    assert_eq!(calls(&probe).len(), 21);
    assert_eq!(rig.line.take(), [true]);
}

#[test]
fn others_have_their_turn_among_requests_of_all_kinds() {
    for (kind, most) in [(kind::FLUSH, 8), (kind::GET_ID, 256), (99, 256), (kind::DISCARD, 256)] {
        let disk = Block::builder(faulty(512));
        let (memory, mut queue, mut worker, _) = bare_in(memory(), 1024, disk, ALL);
        memory.memory().write_slice(&header(kind, 0), GuestAddress(0x20000)).unwrap();
        for _ in 0..500 {
            queue.chain().readable(0x20000, 16).writable(0x20100, 21).submit().unwrap();
        }
        assert_eq!(worker.process().unwrap(), crate::virtio::Progress::More);
        assert_eq!(queue.used_index().unwrap(), most, "{kind}");
        while worker.process().unwrap() == crate::virtio::Progress::More {}
        assert_eq!(queue.used_index().unwrap(), 500);
    }
}

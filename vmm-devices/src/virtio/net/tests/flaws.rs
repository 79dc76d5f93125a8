//! Public flaws of network devices (see also those of the queues, which every device stands on).

use super::*;
use crate::net::MAX_FRAME;

/// CVE-2024-8612, and the truncation that CVE-2021-3748 began with: what is said to be written is what was written, to the byte, in each
/// of the buffers that a frame needs.
#[test]
fn cve_2024_8612_the_used_length_is_what_was_written() {
    let mut rig = Rig::new(ALL);
    for lens in [vec![100, 100, 1600], vec![13, 14, 400, 12, 2000], vec![2000]] {
        lens.iter().for_each(|len| rig.offer(*len));
        rig.network.give(TestFrame::new(vec![0x11; 500]));
        let mut left = 500 + HEADER;
        for len in &lens {
            let written = left.min(*len as usize);
            if written == 0 {
                break;
            }
            left -= written;
            let (id, used) = rig.rx.take_used().unwrap().unwrap();
            let place = rig.buffers.iter().position(|(head, ..)| u32::from(*head) == id).unwrap();
            let (_, at, _) = rig.buffers.remove(place);
            assert_eq!(used as usize, written, "{lens:?}");
            let bytes = rig.get(at, written + 1);
            assert_eq!(bytes.iter().position(|byte| *byte == POISON), Some(written), "{lens:?}");
        }
        assert_eq!((left, rig.rx.take_used().unwrap()), (0, None));
        // Those that were left over.
        rig.start(ALL);
    }
}

/// CVE-2021-3748: the number of buffers was written into a header that had been let go of, where a buffer was no memory. Here a buffer that
/// is none is given back before a frame comes, and the frame lies in those that are.
#[test]
fn cve_2021_3748_a_buffer_in_the_middle_that_is_no_memory() {
    let mut rig = Rig::new(ALL);
    rig.offer(400);
    let wrong = rig.rx.chain().writable(0x4000_0000, 400).submit().unwrap();
    rig.offer(400);
    let across = rig.rx.chain().writable(0x20_0000 - 10, 400).submit().unwrap();
    rig.offer(400);
    rig.network.give(TestFrame::new(frame(MAC, 1000)));
    for head in [wrong, across] {
        assert_eq!(rig.rx.take_used().unwrap(), Some((head.into(), 0)));
    }
    assert_eq!(rig.received().unwrap().bytes, frame(MAC, 1000));
    assert_eq!((rig.handle.counters().bad_buffers, rig.driver.status()), (2, 0xf));
}

/// CVE-2015-7512 (pcnet), and the like of other devices: frames that are longer than the driver's buffers, and longer than any frame. None is
/// written beyond a buffer's end, and none is shown in part.
#[test]
fn cve_2015_7512_no_frame_is_written_beyond_its_buffers() {
    for features in [ALL, ALL & !feature::MRG_RXBUF] {
        for len in [1587, 1588, 1589, 20_000, MAX_FRAME, MAX_FRAME + 1, 2 * MAX_FRAME] {
            let mut rig = Rig::new(features);
            (0..3).for_each(|_| rig.offer(BUFFER));
            rig.network.give(TestFrame::new(frame(MAC, len)));
            let room = if features & feature::MRG_RXBUF == 0 { BUFFER } else { 3 * BUFFER } as usize;
            // Looks at the byte behind each.
            let came = rig.received();
            assert_eq!(came.is_some(), len + HEADER <= room, "{len}");
            assert!(came.is_none_or(|frame| frame.bytes.len() == len));
            for (_, at, len) in &rig.buffers {
                assert_eq!(rig.get(at + u64::from(*len), 1), [POISON]);
            }
        }
    }
}

/// CVE-2023-6693: a header that was copied to where a shorter one had room, since its size went by features that others did not. There is
/// one size here, whatever was agreed upon, and it is looked for in the frame's buffers, however short.
#[test]
fn cve_2023_6693_headers_have_one_size() {
    for features in [0, feature::MRG_RXBUF, ALL] {
        let mut rig = Rig::new(features);
        for len in 0..40_u32 {
            let whole = [&[0; HEADER][..], &frame(PEER, 28)].concat();
            rig.put(SEND, &whole);
            rig.tx.chain().readable(SEND, len).submit().unwrap();
            rig.driver.notify(1);
            assert!(rig.tx.take_used().unwrap().is_some());
            let sent = rig.network.take_sent();
            let expected = (len >= 26).then(|| TestFrame::new(&whole[HEADER..len as usize]));
            assert_eq!(sent, Vec::from_iter(expected), "{len}");
        }
    }
}

/// CVE-2024-6505: a table that the driver gives is as long as it says, whatever there is of it; indices into it lead nowhere. Of those that
/// this device has, each count is tried.
#[test]
fn cve_2024_6505_a_table_is_no_longer_than_its_command() {
    let mut rig = Rig::new(ALL);
    for entries in [1, 2, 63, 64, 65, 0xffff, 0x1_0000, 0x2aaa_aaab, 0x5555_5555, u32::MAX] {
        for have in [0, 5, 6, 12, 384, 390] {
            let data = [&entries.to_le_bytes()[..], &vec![2; have], &[0; 4]].concat();
            let fits = have == 6 * entries as usize;
            assert_eq!(rig.command(1, 0, &data), fits, "{entries} entries in {have} bytes");
        }
    }
    let kept = rig.network.filter().unwrap().unicast;
    assert!(kept.is_none_or(|table| table.len() <= crate::net::MAX_MAC_ENTRIES));
}

/// CVE-2016-6834 (vmxnet3): a frame without payload in fragments of nothing was cut for ever. What asks for segments of nothing, or of what is
/// not there, reaches nobody who cuts.
#[test]
fn cve_2016_6834_nothing_is_cut_into_segments_of_nothing() {
    let mut rig = Rig::new(ALL);
    for kind in [GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::Udp] {
        let header: u16 = if kind == GsoKind::Udp { 8 } else { 20 };
        for (size, len, passes) in [
            (0, 1000, false),
            (1, 34 + header - 1, false),
            (1, 34 + header, true),
            (u16::MAX, 34 + header, true),
        ] {
            let checksum = Some(Checksum { start: 34, offset: 2 });
            let gso = Some(Gso { kind, size, ecn: false });
            let info = PacketInfo { checksum, gso, ..PacketInfo::default() };
            let sent = rig.send(info, &frame(PEER, len.into()));
            assert_eq!(sent.len(), usize::from(passes), "{kind:?} {size} {len}");
        }
    }
}

/// CVE-2023-5088: a reset with frames on their way. None goes out, none comes in, and no buffer of the driver that has gone is touched.
#[test]
fn cve_2023_5088_a_reset_forgets_what_is_on_its_way() {
    let clock = Arc::new(ManualClock::new(0));
    let mut rig = Rig::with(everything(), ALL, |builder| builder.receive_rate(limiter(&clock, 10)));
    rig.network.set_full(true);
    rig.put(SEND, &[0; HEADER]);
    rig.tx.chain().readable(SEND, 12).readable(SEND + 0x100, 100).submit().unwrap();
    rig.driver.notify(1);
    (0..4).for_each(|_| rig.offer(BUFFER));
    // The first takes what the limit has, the second waits, and lies in a buffer already.
    (0..2).for_each(|_| rig.network.give(TestFrame::new(frame(MAC, 1000))));
    assert!(rig.received().is_some() && rig.received().is_none());
    rig.driver.set_status(0);
    let before = rig.get(0, 0x20_0000);
    rig.network.set_full(false);
    clock.advance(1_000_000_000);
    rig.network.give(TestFrame::new(frame(MAC, 1000)));
    rig.handle.set_link(false);
    rig.handle.set_link(true);
    (0..3).for_each(|queue| rig.driver.notify(queue));
    assert!(rig.get(0, 0x20_0000) == before && rig.network.take_sent().is_empty());
    // What came before the next driver is not for it.
    rig.start(ALL);
    rig.offer(BUFFER);
    assert!(rig.received().is_none());
    rig.network.give(TestFrame::new(frame(MAC, 77)));
    assert_eq!(rig.received().unwrap().bytes.len(), 77);
    assert_eq!(rig.tx.take_used().unwrap(), None);
}

/// CVE-2020-27174: frames for a driver that has no buffers stay with the network, but for one.
#[test]
fn cve_2020_27174_a_flood_for_a_driver_without_buffers_is_not_kept() {
    let mut rig = Rig::new(ALL);
    rig.offer(32);
    for _ in 0..1000 {
        rig.network.give(TestFrame::new(frame(MAC, 1000)));
    }
    assert_eq!((rig.received(), rig.network.coming()), (None, 999));
}

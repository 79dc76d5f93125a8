//! Segments beside what another implementation (etherparse) makes of the same headers, and frames that lie about themselves.

use etherparse::{LaxSlicedPacket, NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::*;

/// A frame of TCP, as a guest hands it over to be cut: with a sum of the pseudo-header alone, which nothing here relies on.
fn tcp(v6: bool, options: usize, payload: &[u8]) -> (Vec<u8>, Checksum) {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let ip = if v6 {
        ethernet.ipv6([1; 16], [2; 16], 64)
    } else {
        ethernet.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
    };
    let options = vec![1; options];
    let tcp = ip.tcp(4000, 80, 0xffff_f000, 1000).ack(7).psh().fin().options_raw(&options).unwrap();
    let mut frame = Vec::new();
    tcp.write(&mut frame, payload).unwrap();
    (frame, Checksum { start: if v6 { 54 } else { 34 }, offset: 16 })
}

fn udp(payload: &[u8]) -> (Vec<u8>, Checksum) {
    let ip = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64);
    let mut frame = Vec::new();
    ip.udp(53, 53).write(&mut frame, payload).unwrap();
    (frame, Checksum { start: 34, offset: 6 })
}

fn cut(frame: &[u8], kind: GsoKind, size: u16, sum: Checksum) -> Result<Vec<Vec<u8>>, OffloadError> {
    let mut pieces = Vec::new();
    let gso = Gso { kind, size, ecn: false };
    let count = segment(&mut frame.to_vec(), gso, sum, |headers, payload| {
        pieces.push([&*headers, &*payload].concat())
    })?;
    assert_eq!(count, pieces.len());
    Ok(pieces)
}

/// Whether each checksum and length is what etherparse computes.
fn check(piece: &[u8]) -> Vec<u8> {
    let parsed = SlicedPacket::from_ethernet(piece).unwrap();
    let transport = parsed.transport.unwrap();
    match (parsed.net.unwrap(), &transport) {
        (NetSlice::Ipv4(ip), transport) => {
            let header = ip.header();
            assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
            assert_eq!(usize::from(header.total_len()), piece.len() - 14);
            match transport {
                TransportSlice::Tcp(tcp) => assert_eq!(
                    tcp.checksum(),
                    tcp.calc_checksum_ipv4(header.source(), header.destination()).unwrap()
                ),
                TransportSlice::Udp(udp) => {
                    let sum = udp.to_header().calc_checksum_ipv4_raw(
                        header.source(),
                        header.destination(),
                        udp.payload(),
                    );
                    assert_eq!(udp.checksum(), sum.unwrap());
                }
                other => panic!("{other:?}"),
            }
        }
        (NetSlice::Ipv6(ip), TransportSlice::Tcp(tcp)) => {
            assert_eq!(usize::from(ip.header().payload_length()), piece.len() - 54);
            let (from, to) = (ip.header().source(), ip.header().destination());
            assert_eq!(tcp.checksum(), tcp.calc_checksum_ipv6(from, to).unwrap());
        }
        other => panic!("{other:?}"),
    }
    match transport {
        TransportSlice::Tcp(tcp) => tcp.payload().to_vec(),
        TransportSlice::Udp(udp) => udp.payload().to_vec(),
        other => panic!("{other:?}"),
    }
}

proptest! {
    #[test]
    fn segments_are_whole_packets_that_carry_the_stream(
        v6 in any::<bool>(),
        options in 0usize..10,
        payload in prop::collection::vec(any::<u8>(), 1..5000),
        size in 5u16..3000,
    ) {
        let (frame, sum) = tcp(v6, 4 * options, &payload);
        let pieces = cut(&frame, if v6 { GsoKind::Tcp6 } else { GsoKind::Tcp4 }, size, sum).unwrap();
        prop_assert_eq!(pieces.len(), payload.len().div_ceil(usize::from(size)));
        let (mut stream, mut id) = (Vec::new(), None);
        for (number, piece) in pieces.iter().enumerate() {
            let parsed = LaxSlicedPacket::from_ethernet(piece).unwrap();
            let Some(TransportSlice::Tcp(tcp)) = parsed.transport else { panic!("no TCP") };
            prop_assert_eq!(tcp.sequence_number(), 0xffff_f000_u32.wrapping_add(u32::try_from(stream.len()).unwrap()));
            let last = number + 1 == pieces.len();
            prop_assert_eq!((tcp.fin(), tcp.psh(), tcp.ack()), (last, last, true));
            if !v6 {
                let now = u16::from_be_bytes([piece[18], piece[19]]);
                prop_assert!(id.is_none_or(|id: u16| now == id.wrapping_add(1)));
                id = Some(now);
            }
            let part = check(piece);
            prop_assert!(last || part.len() == usize::from(size));
            stream.extend(part);
        }
        prop_assert_eq!(stream, payload);
    }

    #[test]
    fn datagrams_are_cut_too(payload in prop::collection::vec(any::<u8>(), 1..3000), size in 3u16..2000) {
        let (frame, sum) = udp(&payload);
        let pieces = cut(&frame, GsoKind::Udp, size, sum).unwrap();
        prop_assert_eq!(pieces.iter().flat_map(|piece| check(piece)).collect::<Vec<_>>(), payload);
    }

    /// Whatever is in a frame, and whatever is said of it, what comes out is bounded.
    #[test]
    fn frames_that_lie_are_bounded(
        mut frame in prop::collection::vec(any::<u8>(), 14..400),
        v4 in any::<bool>(), start in 0u16..420, offset in 0u16..40, size in any::<u16>(), kind in 0usize..3,
    ) {
        if v4 {
            frame[12..14].copy_from_slice(&IPV4);
        }
        let kind = [GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::Udp][kind];
        let info = PacketInfo {
            checksum: Some(Checksum { start, offset }),
            gso: (size % 5 != 0).then_some(Gso { kind, size, ecn: size % 2 == 0 }),
            ..PacketInfo::default()
        };
        let whole = frame.len();
        let (mut count, mut bytes) = (0, 0);
        let done = finish(&mut frame, &info, |headers, payload| {
            count += 1;
            bytes += headers.len() + payload.len();
        });
        prop_assert!(count <= MAX_SEGMENTS && bytes <= whole + count * MAX_HEADERS);
        prop_assert!(done.is_ok() || count == 0);
    }
}

#[test]
fn congestion_is_said_once() {
    let (mut frame, sum) = tcp(false, 0, &[5; 300]);
    frame[34 + 13] |= CWR;
    for (ecn, expected) in [(true, [true, false, false]), (false, [true; 3])] {
        let mut flags = Vec::new();
        let gso = Gso { kind: GsoKind::Tcp4, size: 100, ecn };
        segment(&mut frame.clone(), gso, sum, |headers, _| flags.push(headers[34 + 13] & CWR != 0)).unwrap();
        assert_eq!(flags, expected);
    }
}

/// CVE-2019-11477: segments of a few bytes each.
#[test]
fn cve_2019_11477_tiny_segments_are_refused() {
    let (frame, sum) = tcp(false, 0, &[1; 1025]);
    assert!(matches!(
        cut(&frame, GsoKind::Tcp4, 1, sum),
        Err(OffloadError::Segments { payload: 1025, size: 1 })
    ));
    let (frame, sum) = tcp(false, 0, &[1; 1024]);
    assert_eq!(cut(&frame, GsoKind::Tcp4, 1, sum).unwrap().len(), MAX_SEGMENTS);
}

#[test]
fn frames_that_are_something_else_are_refused() {
    let (frame, sum) = tcp(false, 0, &[1; 500]);
    let refused = |frame: &[u8], kind, sum| {
        let error = cut(frame, kind, 100, sum).unwrap_err();
        assert_eq!(error, OffloadError::Headers { kind: Some(kind) });
    };
    refused(&frame, GsoKind::Tcp6, sum);
    refused(&frame, GsoKind::Udp, sum);
    refused(&frame, GsoKind::Tcp4, Checksum { start: 35, ..sum });
    refused(&frame, GsoKind::Tcp4, Checksum { offset: 15, ..sum });
    refused(&frame[..54], GsoKind::Tcp4, sum);
    // A fragment, a header length of 4, one beyond the frame, no IP at all.
    for (at, value) in [(20, 0x20), (21, 1), (14, 0x44), (14, 0x4f), (46, 0x10), (14, 0x65), (12, 9)] {
        let mut wrong = frame.clone();
        wrong[at] = value;
        refused(&wrong, GsoKind::Tcp4, sum);
    }
}

#[test]
fn a_checksum_is_completed_where_it_is_said() {
    let (whole, sum) = tcp(false, 4, b"odd");
    let mut frame = whole.clone();
    // What a guest leaves there: the sum of the pseudo-header.
    let pseudo = Sum::default().word(6).word(27).add(&[10, 0, 0, 1, 10, 0, 0, 2]);
    put(&mut frame, 50, pseudo.finish().map(|byte| !byte)).unwrap();
    complete(&mut frame, sum).unwrap();
    assert_eq!(frame, whole);
    for wrong in [Checksum { start: 100, offset: 0 }, Checksum { start: 34, offset: 26 }] {
        assert!(complete(&mut frame, wrong).is_err());
    }
}

//! The beginning of a frame, read once: whatever is decided about a frame is decided about these bytes, and they are what is
//! delivered, whatever its sender does to its memory meanwhile.

use vmm_memory::vm_memory::VolatileSlice;

use super::vlan::TAGGED;
use crate::net::{ETHERNET_HEADER, MacAddr, PacketInfo};

/// Bytes that are read: Ethernet, a tag, IPv6 with some extensions, TCP with options.
pub(super) const HEAD: usize = 192;

/// Bytes of a tag.
pub(super) const TAG: usize = 4;
const TAG_16: u16 = 4;

/// Service tags (IEEE 802.1ad).
const SERVICE: [u8; 2] = [0x88, 0xa8];

/// The beginning of a frame, which is without the outermost tag from here on.
pub(super) struct Head {
    /// With room for a tag before a frame that came without.
    bytes: [u8; TAG + HEAD],
    /// Where the frame begins without a tag.
    start: usize,
    end: usize,
    macs: [u8; 12],
    /// Control information of the tag that it came with.
    tag: Option<u16>,
    /// Bytes that were read of what came.
    read: usize,
}

impl Head {
    pub(super) fn new() -> Self {
        Self { bytes: [0; TAG + HEAD], start: TAG, end: TAG, macs: [0; 12], tag: None, read: 0 }
    }

    /// Reads a frame's. `None` if it is too short to be one.
    pub(super) fn read(&mut self, frame: &[VolatileSlice<'_>]) -> Option<()> {
        let mut end = TAG;
        for slice in frame {
            let Some(room) = self.bytes.get_mut(end..).filter(|room| !room.is_empty()) else { break };
            end += slice.copy_to(room);
        }
        (self.start, self.end, self.tag, self.read) = (TAG, end, None, end - TAG);
        let came = self.bytes.get(TAG..end)?;
        let (macs, rest) = came.split_first_chunk::<12>()?;
        self.macs = *macs;
        let (kind, rest) = rest.split_first_chunk::<2>()?;
        if *kind == TAGGED {
            // The tag, and the type of what is in the frame.
            let &[high, low, _, _] = rest.first_chunk()?;
            self.tag = Some(u16::from_be_bytes([high, low]));
            self.start = 2 * TAG;
            self.bytes.get_mut(self.start..)?.first_chunk_mut::<12>()?.copy_from_slice(&self.macs);
        }
        Some(())
    }

    pub(super) fn destination(&self) -> MacAddr {
        let [a, b, c, d, e, f, ..] = self.macs;
        MacAddr([a, b, c, d, e, f])
    }

    pub(super) fn source(&self) -> MacAddr {
        let [.., a, b, c, d, e, f] = self.macs;
        MacAddr([a, b, c, d, e, f])
    }

    pub(super) fn tag(&self) -> Option<u16> {
        self.tag
    }

    /// Bytes of the frame that are not here, from this one of it on.
    pub(super) fn read_bytes(&self) -> usize {
        self.read
    }

    /// Type of what is in the frame.
    pub(super) fn ether_type(&self) -> u16 {
        let kind = self.bytes.get(self.start + 12..).and_then(<[u8]>::first_chunk);
        kind.map_or(0, |kind| u16::from_be_bytes(*kind))
    }

    pub(super) fn has_inner_tag(&self) -> bool {
        [TAGGED, SERVICE].contains(&self.ether_type().to_be_bytes())
    }

    /// What follows the Ethernet header, as far as it was read.
    pub(super) fn payload(&self) -> &[u8] {
        self.bytes.get(self.start + ETHERNET_HEADER..self.end).unwrap_or_default()
    }

    /// The beginning without a tag.
    pub(super) fn untagged(&mut self) -> &mut [u8] {
        let Some(bytes) = self.bytes.get_mut(self.start..self.end) else { return &mut [] };
        if let Some(macs) = bytes.first_chunk_mut() {
            *macs = self.macs;
        }
        bytes
    }

    /// The beginning with a tag of that control information.
    pub(super) fn tagged(&mut self, tag: u16) -> &mut [u8] {
        let Some(bytes) = self.bytes.get_mut(self.start - TAG..self.end) else { return &mut [] };
        if let Some((macs, rest)) = bytes.split_first_chunk_mut()
            && let Some(place) = rest.first_chunk_mut()
        {
            *macs = self.macs;
            let ([t0, t1], [c0, c1]) = (TAGGED, tag.to_be_bytes());
            *place = [t0, t1, c0, c1];
        }
        bytes
    }
}

/// What is left to do of a frame whose tag is gone; `None` if that lies within the tag.
pub(super) fn without_tag(info: PacketInfo) -> Option<PacketInfo> {
    let mut info = info;
    if let Some(sum) = &mut info.checksum {
        sum.start = sum.start.checked_sub(TAG_16).filter(|start| usize::from(*start) >= ETHERNET_HEADER)?;
    }
    info.header_len = info.header_len.saturating_sub(TAG_16);
    Some(info)
}

/// What is left to do of a frame that has got a tag; `None` if there is no saying it.
pub(super) fn with_tag(info: PacketInfo) -> Option<PacketInfo> {
    let mut info = info;
    if let Some(sum) = &mut info.checksum {
        sum.start = sum.start.checked_add(TAG_16)?;
    }
    if info.header_len > 0 {
        info.header_len = info.header_len.checked_add(TAG_16)?;
    }
    Some(info)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Checksum;

    fn read(mut frame: Vec<u8>) -> Option<Head> {
        let mut head = Head::new();
        let middle = frame.len() / 2;
        let (one, two) = frame.split_at_mut(middle);
        head.read(&[VolatileSlice::from(one), VolatileSlice::from(two)])?;
        Some(head)
    }

    #[test]
    fn tags_come_and_go() {
        let macs: Vec<u8> = (1..=12).collect();
        let with = |middle: &[u8]| [&macs[..], middle, &[8, 0, 0xaa, 0xbb]].concat();
        let (plain, tagged) = (with(&[]), with(&[0x81, 0, 0x60, 7]));
        for (frame, tag) in [(plain.clone(), None), (tagged.clone(), Some(0x6007))] {
            let mut head = read(frame.clone()).unwrap();
            assert_eq!((head.tag(), head.ether_type(), head.read_bytes()), (tag, 0x800, frame.len()));
            assert_eq!((head.destination().0, head.source().0), ([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]));
            for _ in 0..2 {
                assert_eq!(head.untagged(), plain);
                assert_eq!(head.tagged(0x6007), tagged);
            }
            assert_eq!(head.payload(), [0xaa, 0xbb]);
        }
        let mut twice = read(with(&[0x81, 0, 0, 1, 0x81, 0, 0, 2])).unwrap();
        assert!(twice.has_inner_tag());
        assert_eq!(twice.untagged(), with(&[0x81, 0, 0, 2]));
        assert!(!read(plain).unwrap().has_inner_tag());
    }

    #[test]
    fn what_is_too_short_is_no_frame() {
        for len in 0..14 {
            assert!(read(vec![0; len]).is_none());
        }
        let mut tagged = vec![0; 18];
        tagged[12] = 0x81;
        assert!(read(tagged.clone()).is_some());
        tagged.pop();
        assert!(read(tagged).is_none());
        let mut long = read((0..=255).collect()).unwrap();
        assert_eq!((long.read_bytes(), long.untagged().len()), (HEAD, HEAD));
    }

    #[test]
    fn what_is_left_to_do_moves_with_the_tag() {
        let info = |start, header_len| PacketInfo {
            checksum: Some(Checksum { start, offset: 16 }),
            header_len,
            ..PacketInfo::default()
        };
        assert_eq!(without_tag(info(38, 58)), Some(info(34, 54)));
        assert_eq!(with_tag(info(34, 54)), Some(info(38, 58)));
        assert_eq!(without_tag(info(17, 0)), None);
        assert_eq!(with_tag(info(u16::MAX, 0)), None);
        assert_eq!(with_tag(info(34, 0)), Some(info(38, 0)));
    }
}

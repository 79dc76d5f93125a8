//! What one side leaves to the other: the header before each frame (Virtio 1.3, 5.1.6), as it is laid out in memory, on tap devices and
//! on sockets.

use std::fmt;
use std::ops::{BitAnd, BitOr};

use super::ETHERNET_HEADER;

/// Bytes of the header, with the number of buffers in it.
pub const HEADER: usize = 12;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// What can be left to the other side. All but checksums are nothing without these.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Offloads(u8);

impl Offloads {
    /// Nothing: frames are as they are on a wire.
    pub const NONE: Self = Self(0);
    /// Checksums of TCP, UDP and the like.
    pub const CSUM: Self = Self(1);
    /// Segmentation of TCP over IPv4.
    pub const TSO4: Self = Self(1 << 1);
    /// Segmentation of TCP over IPv6.
    pub const TSO6: Self = Self(1 << 2);
    /// Segmentation of TCP with congestion notification; with one of both.
    pub const ECN: Self = Self(1 << 3);
    /// Segmentation of UDP over IPv4.
    pub const USO4: Self = Self(1 << 4);
    /// Segmentation of UDP over IPv6.
    pub const USO6: Self = Self(1 << 5);
    /// All that there is. The fragmentation of UDP of old (UFO), which kernels have given up, is none of it.
    pub const ALL: Self = Self((1 << 6) - 1);

    /// Those of both.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` is there.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The same, and `other` if `with`.
    #[must_use]
    pub fn with(self, other: Self, with: bool) -> Self {
        if with { self | other } else { self }
    }
}

impl BitOr for Offloads {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        self.union(other)
    }
}

impl BitAnd for Offloads {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl fmt::Debug for Offloads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Self::CSUM, "CSUM"),
            (Self::TSO4, "TSO4"),
            (Self::TSO6, "TSO6"),
            (Self::ECN, "ECN"),
            (Self::USO4, "USO4"),
            (Self::USO6, "USO6"),
        ];
        f.debug_set()
            .entries(names.iter().filter(|(bit, _)| self.contains(*bit)).map(|(_, name)| name))
            .finish()
    }
}

/// A checksum that is to be completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// The first byte of the frame that is summed up; all behind it are, too.
    pub start: u16,
    /// Where the sum goes, in bytes from `start`.
    pub offset: u16,
}

/// How a frame is to be cut into several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GsoKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over either.
    Udp,
}

/// A frame that is to be cut into several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// How.
    pub kind: GsoKind,
    /// Bytes of payload in each.
    pub size: u16,
    /// The first of them says that there was congestion (TCP's CWR), the others do not.
    pub ecn: bool,
}

/// What is left to the other side of one frame. The default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketInfo {
    /// A checksum.
    pub checksum: Option<Checksum>,
    /// Checksums were found right, or need not be looked at. Of received frames alone.
    pub data_valid: bool,
    /// Segmentation.
    pub gso: Option<Gso>,
    /// Bytes of the headers before the payload, as far as the sender knows; a hint.
    pub header_len: u16,
}

/// How a header breaks the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PacketError {
    /// A segmentation that there is not.
    #[error("gso_type {kind:#x}; there are 0 (none), 1, 4 and 5, and 0x80 beside 1 and 4")]
    GsoType {
        /// What it was.
        kind: u8,
    },
    /// Something was left to a side that does not take it.
    #[error("{wanted:?} is left to a side that takes {agreed:?}")]
    NotAgreed {
        /// What was left.
        wanted: Offloads,
        /// What was agreed upon.
        agreed: Offloads,
    },
    /// A checksum that does not lie in the frame.
    #[error(
        "a checksum from byte {start} on, at {offset} from there, in a frame of {len} bytes; it starts behind the Ethernet header, and lies within the frame"
    )]
    Checksum {
        /// Its first byte.
        start: u16,
        /// Where it goes.
        offset: u16,
        /// The frame's bytes.
        len: usize,
    },
    /// Segments of nothing, or of a frame that has no checksum to complete or no room for headers.
    #[error(
        "segments of {size} bytes, of a frame of {len}; each has 1 at least, and the frame a checksum left to do and its headers"
    )]
    Gso {
        /// Bytes of a segment.
        size: u16,
        /// The frame's bytes.
        len: usize,
    },
    /// Headers that are longer than the frame.
    #[error("headers of {header_len} bytes in a frame of {len}")]
    HeaderLen {
        /// Their bytes.
        header_len: u16,
        /// The frame's bytes.
        len: usize,
    },
}

impl PacketInfo {
    /// Reads a header. Bits that say nothing here are left alone, the number of buffers among them.
    ///
    /// # Errors
    /// If it asks for a segmentation that there is not.
    pub fn from_bytes(header: &[u8; HEADER]) -> Result<Self, PacketError> {
        let &[flags, kind, h0, h1, g0, g1, s0, s1, o0, o1, _, _] = header;
        let ecn = kind & GSO_ECN != 0;
        let size = u16::from_le_bytes([g0, g1]);
        let gso = match kind & !GSO_ECN {
            GSO_NONE if !ecn => None,
            GSO_TCPV4 => Some(Gso { kind: GsoKind::Tcp4, size, ecn }),
            GSO_TCPV6 => Some(Gso { kind: GsoKind::Tcp6, size, ecn }),
            GSO_UDP_L4 if !ecn => Some(Gso { kind: GsoKind::Udp, size, ecn }),
            _ => return Err(PacketError::GsoType { kind }),
        };
        let checksum = (flags & NEEDS_CSUM != 0)
            .then(|| Checksum { start: u16::from_le_bytes([s0, s1]), offset: u16::from_le_bytes([o0, o1]) });
        Ok(Self {
            checksum,
            // Both at once make no sense; a driver takes the first.
            data_valid: flags & DATA_VALID != 0 && checksum.is_none(),
            gso,
            header_len: u16::from_le_bytes([h0, h1]),
        })
    }

    /// The header, for a frame in `buffers` buffers (5.1.6.4): 1 where they are not merged, 0 for a frame that is sent.
    pub fn to_bytes(self, buffers: u16) -> [u8; HEADER] {
        let Self { checksum, data_valid, gso, header_len } = self;
        let flags = match checksum {
            Some(_) => NEEDS_CSUM,
            None if data_valid => DATA_VALID,
            None => 0,
        };
        let (kind, size) = gso.map_or((GSO_NONE, 0), |gso| {
            let kind = match gso.kind {
                GsoKind::Tcp4 => GSO_TCPV4,
                GsoKind::Tcp6 => GSO_TCPV6,
                GsoKind::Udp => GSO_UDP_L4,
            };
            (if gso.ecn { kind | GSO_ECN } else { kind }, gso.size)
        });
        let Checksum { start, offset } = checksum.unwrap_or(Checksum { start: 0, offset: 0 });
        let [[h0, h1], [g0, g1], [s0, s1], [o0, o1], [b0, b1]] =
            [header_len, size, start, offset, buffers].map(u16::to_le_bytes);
        [flags, kind, h0, h1, g0, g1, s0, s1, o0, o1, b0, b1]
    }

    /// What the other side has to be able to do. UDP's segments may be of either IP, so that is both.
    pub fn wants(&self) -> Offloads {
        let wants = Offloads::NONE.with(Offloads::CSUM, self.checksum.is_some());
        let Some(gso) = self.gso else { return wants };
        let wants = wants.with(Offloads::ECN, gso.ecn);
        match gso.kind {
            GsoKind::Tcp4 => wants | Offloads::TSO4,
            GsoKind::Tcp6 => wants | Offloads::TSO6,
            GsoKind::Udp => wants | Offloads::USO4 | Offloads::USO6,
        }
    }

    /// Whether a frame of `len` bytes, which is sent, can be as this says, to a side that takes `agreed`. Kernels look at headers, too,
    /// and not all of them well.
    ///
    /// # Errors
    /// If not: the frame is to be dropped.
    pub fn check(&self, len: usize, agreed: Offloads) -> Result<(), PacketError> {
        let wanted = self.wants();
        if !agreed.contains(wanted) {
            return Err(PacketError::NotAgreed { wanted, agreed });
        }
        if let Some(Checksum { start, offset }) = self.checksum
            && (usize::from(start) < ETHERNET_HEADER || usize::from(start) + usize::from(offset) + 2 > len)
        {
            return Err(PacketError::Checksum { start, offset, len });
        }
        if let Some(Gso { size, kind, .. }) = self.gso {
            let header: usize = if kind == GsoKind::Udp { 8 } else { 20 };
            let room = self.checksum.is_some_and(|sum| usize::from(sum.start) + header <= len);
            if size == 0 || !room {
                return Err(PacketError::Gso { size, len });
            }
        }
        if usize::from(self.header_len) > len {
            return Err(PacketError::HeaderLen { header_len: self.header_len, len });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SUM: Option<Checksum> = Some(Checksum { start: 34, offset: 16 });
    const TCP4: Option<Gso> = Some(Gso { kind: GsoKind::Tcp4, size: 1448, ecn: false });

    fn info(checksum: Option<Checksum>, gso: Option<Gso>) -> PacketInfo {
        PacketInfo { checksum, gso, ..PacketInfo::default() }
    }

    #[test]
    fn fields_are_where_the_standard_has_them() {
        let gso = Some(Gso { kind: GsoKind::Tcp6, size: 0x0102, ecn: true });
        let info = PacketInfo { checksum: SUM, data_valid: false, gso, header_len: 0x0304 };
        let header = [1, 0x84, 4, 3, 2, 1, 34, 0, 16, 0, 5, 0];
        assert_eq!(info.to_bytes(5), header);
        assert_eq!(PacketInfo::from_bytes(&header), Ok(info));
        assert_eq!(PacketInfo { data_valid: true, ..PacketInfo::default() }.to_bytes(0)[0], 2);
    }

    #[test]
    fn what_fits_passes_and_what_lies_a_byte_off_does_not() {
        let all = Offloads::ALL;
        assert_eq!(info(SUM, None).check(52, all), Ok(()));
        assert!(matches!(info(SUM, None).check(51, all), Err(PacketError::Checksum { len: 51, .. })));
        let sum = |start, offset| info(Some(Checksum { start, offset }), None);
        assert_eq!(sum(14, 0).check(16, all), Ok(()));
        assert!(sum(13, 0).check(16, all).is_err() && sum(14, 1).check(16, all).is_err());
        assert!(sum(u16::MAX, u16::MAX).check(crate::net::MAX_FRAME, all).is_err());
        assert_eq!(info(SUM, TCP4).check(54, all), Ok(()));
        assert!(matches!(info(SUM, TCP4).check(53, all), Err(PacketError::Gso { len: 53, .. })));
        assert!(matches!(info(None, TCP4).check(1000, all), Err(PacketError::Gso { .. })));
        let none = Some(Gso { kind: GsoKind::Udp, size: 0, ecn: false });
        assert!(matches!(info(SUM, none).check(1000, all), Err(PacketError::Gso { size: 0, .. })));
        let long = PacketInfo { header_len: 61, ..PacketInfo::default() };
        assert!(long.check(61, all).is_ok() && long.check(60, all).is_err());
    }

    #[test]
    fn nothing_is_left_to_a_side_that_does_not_take_it() {
        let kinds = [
            (GsoKind::Tcp4, Offloads::TSO4),
            (GsoKind::Tcp6, Offloads::TSO6),
            (GsoKind::Udp, Offloads::USO4 | Offloads::USO6),
        ];
        for (kind, needs) in kinds {
            let frame = info(SUM, Some(Gso { kind, size: 1, ecn: false }));
            assert_eq!(frame.check(1000, needs | Offloads::CSUM), Ok(()));
            for agreed in [Offloads::NONE, Offloads::CSUM, needs] {
                assert!(matches!(frame.check(1000, agreed), Err(PacketError::NotAgreed { .. })), "{kind:?}");
            }
        }
        let congested = info(SUM, Some(Gso { kind: GsoKind::Tcp4, size: 1, ecn: true }));
        assert!(congested.check(1000, Offloads::CSUM | Offloads::TSO4).is_err());
    }

    #[test]
    fn segmentations_that_there_are_not_are_refused() {
        let known = [0, 1, 4, 5, 0x81, 0x84];
        for kind in 0..=u8::MAX {
            let mut header = [0; HEADER];
            header[1] = kind;
            let read = PacketInfo::from_bytes(&header);
            assert_eq!(read.is_ok(), known.contains(&kind), "{kind:#x}");
            assert!(read.is_ok() || read == Err(PacketError::GsoType { kind }));
        }
    }

    proptest! {
        /// Whatever header is taken is written as it was read, and nothing that passes points beyond the frame.
        #[test]
        fn what_passes_lies_within(header in any::<[u8; HEADER]>(), len in 14usize..2000) {
            if let Ok(info) = PacketInfo::from_bytes(&header) {
                prop_assert_eq!(PacketInfo::from_bytes(&info.to_bytes(0)), Ok(info));
                if info.check(len, Offloads::ALL).is_ok() {
                    if let Some(sum) = info.checksum {
                        prop_assert!(usize::from(sum.start) + usize::from(sum.offset) + 2 <= len);
                    }
                    prop_assert!(info.gso.is_none_or(|gso| gso.size > 0 && info.checksum.is_some()));
                    prop_assert!(usize::from(info.header_len) <= len);
                }
            }
        }
    }
}

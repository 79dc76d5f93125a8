//! What senders leave to others to do, done here for receivers whose drivers cannot: checksums, and segmentation of TCP and UDP.
//!
//! # Threat model
//! Frames are the sender's, and so is what is said of them. Each length is checked against the frame; a frame is cut into
//! [`MAX_SEGMENTS`] at most, each with headers of [`MAX_HEADERS`] bytes at most, so that tiny segments (CVE-2019-11477) multiply
//! nothing without bound.

use crate::net::{Checksum, ETHERNET_HEADER, Gso, GsoKind, PacketInfo};

/// Pieces that a frame is cut into at most.
pub const MAX_SEGMENTS: usize = 1024;

/// Bytes of headers that a frame may have which is cut: Ethernet, two tags, IPv4 and TCP with all the options that there can be.
pub const MAX_HEADERS: usize = ETHERNET_HEADER + 8 + 60 + 60;

const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];

const TCP: u8 = 6;
const UDP: u8 = 17;

const FIN: u8 = 1;
const PSH: u8 = 8;
const CWR: u8 = 0x80;

/// Why a frame cannot be cut, or summed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OffloadError {
    /// It is not what its sender says that it is: there is no such header there.
    #[error("the frame's headers are not those of {kind:?}")]
    Headers {
        /// What it should be; nothing where a checksum alone is wanted.
        kind: Option<GsoKind>,
    },
    /// It would be cut into too many.
    #[error("{payload} bytes in segments of {size}; {MAX_SEGMENTS} segments are the most")]
    Segments {
        /// Bytes to be cut.
        payload: usize,
        /// Bytes of each.
        size: u16,
    },
}

/// A sum of 16-bit words in the order of the host, not yet folded (RFC 1071: the order does not matter as long as it is one).
#[derive(Clone, Copy, Debug, Default)]
struct Sum(u64);

impl Sum {
    /// Adds bytes, of an even number but for the last.
    fn add(self, bytes: &[u8]) -> Self {
        let mut sum = self.0;
        let (words, rest) = bytes.as_chunks::<4>();
        for word in words {
            sum += u64::from(u32::from_ne_bytes(*word));
        }
        let mut last = [0; 4];
        last.iter_mut().zip(rest).for_each(|(last, byte)| *last = *byte);
        // Below 2^16 words of 2^32 each: it does not overflow.
        Self(sum + u64::from(u32::from_ne_bytes(last)))
    }

    fn word(self, word: u16) -> Self {
        Self(self.0 + u64::from(u16::from_ne_bytes(word.to_be_bytes())))
    }

    /// The checksum, as it is in a header.
    fn finish(self) -> [u8; 2] {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        // Folded, it fits.
        let folded = u16::try_from(sum).unwrap_or(0);
        (!folded).to_ne_bytes()
    }

    /// The same for a header in which 0 means that there is none.
    fn finish_nonzero(self) -> [u8; 2] {
        match self.finish() {
            [0, 0] => [0xff, 0xff],
            sum => sum,
        }
    }
}

fn put(bytes: &mut [u8], at: usize, value: [u8; 2]) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value;
    Some(())
}

fn get<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// Completes a checksum.
///
/// # Errors
/// If it does not lie in the frame.
pub(super) fn complete(frame: &mut [u8], sum: Checksum) -> Result<(), OffloadError> {
    let wrong = OffloadError::Headers { kind: None };
    let (start, place) = (usize::from(sum.start), usize::from(sum.start) + usize::from(sum.offset));
    let value = Sum::default().add(frame.get(start..).ok_or(wrong)?).finish_nonzero();
    put(frame, place, value).ok_or(wrong)
}

/// Where the headers of a frame are that is to be cut.
#[derive(Clone, Copy, Debug)]
struct Layout {
    is_ipv4: bool,
    protocol: u8,
    network: usize,
    transport: usize,
    payload: usize,
}

impl Layout {
    /// `None` if it is not that kind, or has headers that nobody needs who sends honestly.
    fn find(frame: &[u8], kind: GsoKind, sum: Checksum) -> Option<Self> {
        let mut network = ETHERNET_HEADER;
        let mut ether_type: [u8; 2] = get(frame, network - 2)?;
        for _ in 0..2 {
            if TAGS.contains(&ether_type) {
                network += 4;
                ether_type = get(frame, network - 2)?;
            }
        }
        let transport = usize::from(sum.start);
        let (is_ipv4, protocol) = match ether_type {
            IPV4 if kind != GsoKind::Tcp6 => {
                let [version, ..]: [u8; 20] = get(frame, network)?;
                let [high, low]: [u8; 2] = get(frame, network + 6)?;
                let fragment = u16::from_be_bytes([high, low]) & 0x3fff;
                let has_length =
                    version >> 4 == 4 && usize::from(version & 15) * 4 == transport.checked_sub(network)?;
                let [protocol] = get(frame, network + 9)?;
                (has_length && fragment == 0).then_some((true, protocol))?
            }
            IPV6 if kind != GsoKind::Tcp4 => {
                let [version, _, _, _, _, _, protocol]: [u8; 7] = get(frame, network)?;
                (version >> 4 == 6 && transport == network + 40).then_some((false, protocol))?
            }
            _ => return None,
        };
        let (wanted, at, header) = match kind {
            GsoKind::Tcp4 | GsoKind::Tcp6 => {
                let [offset] = get(frame, transport + 12)?;
                (TCP, 16, usize::from(offset >> 4) * 4)
            }
            GsoKind::Udp => (UDP, 6, 8),
        };
        let least = if wanted == TCP { 20 } else { 8 };
        let payload = transport + header;
        let fits = protocol == wanted && usize::from(sum.offset) == at && header >= least;
        (fits && payload <= MAX_HEADERS && payload < frame.len()).then_some(Self {
            is_ipv4,
            protocol,
            network,
            transport,
            payload,
        })
    }

    /// The sum of the pseudo-header of a segment with `len` bytes from the transport header on.
    fn pseudo(&self, headers: &[u8], len: u16) -> Option<Sum> {
        let sum = Sum::default().word(u16::from(self.protocol)).word(len);
        Some(if self.is_ipv4 {
            sum.add(&get::<8>(headers, self.network + 12)?)
        } else {
            sum.add(&get::<32>(headers, self.network + 8)?)
        })
    }

    /// Makes `headers`, those of the whole frame, into those of the segment with that number, which has `payload`.
    fn write(&self, headers: &mut [u8], place: Segment, payload: &[u8]) -> Option<()> {
        let Segment { number, size, is_last, keeps_cwr } = place;
        let Self { is_ipv4, protocol, network, transport, .. } = *self;
        let length = u16::try_from(headers.len() - transport + payload.len()).ok()?;
        if is_ipv4 {
            let total = u16::try_from(headers.len() - network + payload.len()).ok()?;
            put(headers, network + 2, total.to_be_bytes())?;
            let id = u16::from_be_bytes(get(headers, network + 4)?).wrapping_add(number);
            put(headers, network + 4, id.to_be_bytes())?;
            put(headers, network + 10, [0, 0])?;
            let value = Sum::default().add(headers.get(network..transport)?).finish();
            put(headers, network + 10, value)?;
        } else {
            put(headers, network + 4, length.to_be_bytes())?;
        }
        let sum_at = if protocol == TCP {
            let before = u32::from(number) * u32::from(size);
            let sequence = u32::from_be_bytes(get(headers, transport + 4)?).wrapping_add(before);
            *headers.get_mut(transport + 4..)?.first_chunk_mut()? = sequence.to_be_bytes();
            let flags = headers.get_mut(transport + 13)?;
            if !is_last {
                *flags &= !(FIN | PSH);
            }
            if number > 0 && !keeps_cwr {
                *flags &= !CWR;
            }
            transport + 16
        } else {
            put(headers, transport + 4, length.to_be_bytes())?;
            transport + 6
        };
        put(headers, sum_at, [0, 0])?;
        let sum = self.pseudo(headers, length)?.add(headers.get(transport..)?).add(payload);
        put(headers, sum_at, if protocol == UDP { sum.finish_nonzero() } else { sum.finish() })
    }
}

/// Which segment it is.
#[derive(Clone, Copy, Debug)]
struct Segment {
    number: u16,
    size: u16,
    is_last: bool,
    keeps_cwr: bool,
}

/// Cuts `frame` as `info` says, and hands each piece to `each`: headers and payload. How many there were.
///
/// # Errors
/// If it cannot be cut: nothing was handed on.
pub(super) fn segment(
    frame: &mut [u8],
    gso: Gso,
    sum: Checksum,
    mut each: impl FnMut(&mut [u8], &mut [u8]),
) -> Result<usize, OffloadError> {
    let wrong = OffloadError::Headers { kind: Some(gso.kind) };
    let layout = Layout::find(frame, gso.kind, sum).ok_or(wrong)?;
    let (headers, payload) = frame.split_at_mut_checked(layout.payload).ok_or(wrong)?;
    let count = payload.len().div_ceil(usize::from(gso.size.max(1)));
    if count > MAX_SEGMENTS {
        return Err(OffloadError::Segments { payload: payload.len(), size: gso.size });
    }
    for (number, piece) in (0..).zip(payload.chunks_mut(usize::from(gso.size.max(1)))) {
        let mut own = [0; MAX_HEADERS];
        let own = own.get_mut(..headers.len()).ok_or(wrong)?;
        own.copy_from_slice(headers);
        let is_last = usize::from(number) + 1 == count;
        let place = Segment { number, size: gso.size, is_last, keeps_cwr: !gso.ecn };
        layout.write(own, place, piece).ok_or(wrong)?;
        each(own, piece);
    }
    Ok(count)
}

/// Does all that `info` leaves to do of `frame`, and hands what comes of it to `each`.
///
/// # Errors
/// If that cannot be done: nothing was handed on.
pub(super) fn finish(
    frame: &mut [u8],
    info: &PacketInfo,
    mut each: impl FnMut(&mut [u8], &mut [u8]),
) -> Result<(), OffloadError> {
    match (info.gso, info.checksum) {
        (Some(gso), Some(sum)) => segment(frame, gso, sum, each).map(drop),
        (Some(gso), None) => Err(OffloadError::Headers { kind: Some(gso.kind) }),
        (None, Some(sum)) => {
            complete(frame, sum)?;
            each(frame, &mut []);
            Ok(())
        }
        (None, None) => {
            each(frame, &mut []);
            Ok(())
        }
    }
}

#[cfg(test)]
#[path = "offload_tests.rs"]
mod tests;

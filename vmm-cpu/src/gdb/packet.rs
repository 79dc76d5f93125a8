//! Splits what a debugger sends into packets, before anything looks at what they say.
//!
//! Robustness: the bytes may be anybody's. A packet has at most [`PACKET_SIZE`] bytes and a right checksum; what stands
//! between packets is dropped; a read of memory never asks for more than fits into an answer.

/// Largest packet in bytes, as the debugger is told.
pub(super) const PACKET_SIZE: usize = 16 * 1024;

/// Most bytes of memory in one answer, as two hexadecimal digits each.
const MAX_READ: u64 = PACKET_SIZE as u64 / 4;

const ACK: u8 = b'+';
const NACK: u8 = b'-';
const INTERRUPT: u8 = 3;

/// Why a connection is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PacketError {
    #[error("a packet is longer than {PACKET_SIZE} bytes")]
    TooLong,
    #[error("a packet has a wrong checksum")]
    Checksum,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Between,
    Body,
    Checksum,
}

/// Takes bytes and gives packets.
#[derive(Debug)]
pub(super) struct Framer {
    state: State,
    /// From `$` on.
    packet: Vec<u8>,
}

impl Framer {
    pub(super) fn new() -> Self {
        Self { state: State::Between, packet: Vec::new() }
    }

    /// Takes a byte; the packet, acknowledgement or interrupt that it completes.
    pub(super) fn take(&mut self, byte: u8) -> Result<Option<Vec<u8>>, PacketError> {
        match self.state {
            State::Between => match byte {
                b'$' => {
                    self.packet = vec![byte];
                    self.state = State::Body;
                }
                ACK | NACK | INTERRUPT => return Ok(Some(vec![byte])),
                _ => {}
            },
            State::Body => {
                if self.packet.len() >= PACKET_SIZE - 3 {
                    return Err(PacketError::TooLong);
                }
                self.packet.push(byte);
                if byte == b'#' {
                    self.state = State::Checksum;
                }
            }
            State::Checksum => {
                self.packet.push(byte);
                if let [b'$', body @ .., b'#', high, low] = self.packet.as_slice() {
                    self.state = State::Between;
                    if !is_checksum_of(body, [*high, *low]) {
                        return Err(PacketError::Checksum);
                    }
                    return Ok(Some(bounded_read(body).unwrap_or_else(|| std::mem::take(&mut self.packet))));
                }
            }
        }
        Ok(None)
    }
}

fn checksum(body: &[u8]) -> u8 {
    body.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

fn is_checksum_of(body: &[u8], digits: [u8; 2]) -> bool {
    let digits = std::str::from_utf8(&digits).ok().filter(|digits| !digits.starts_with('+'));
    digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) == Some(checksum(body))
}

/// A read of memory (`m address,length`) in place of one that is too long or goes beyond the last address: an answer may
/// be shorter than what was asked for.
fn bounded_read(body: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(body).ok()?.strip_prefix('m')?;
    let (address, length) = text.split_once(',')?;
    let address = u64::from_str_radix(address, 16).ok()?;
    // One that is no number of 64 bits is too long too.
    let length = u64::from_str_radix(length, 16).unwrap_or(u64::MAX);
    let bounded = length.min(MAX_READ).min((u64::MAX - address).saturating_add(1));
    (bounded < length).then(|| packet(format!("m{address:x},{bounded:x}").as_bytes()))
}

/// A packet with that body.
fn packet(body: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(body.len() + 4);
    packet.push(b'$');
    packet.extend(body);
    packet.extend(format!("#{:02x}", checksum(body)).as_bytes());
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(bytes: &[u8]) -> Result<Vec<Vec<u8>>, PacketError> {
        let mut framer = Framer::new();
        let mut packets = Vec::new();
        for byte in bytes {
            packets.extend(framer.take(*byte)?);
        }
        Ok(packets)
    }

    #[test]
    fn packets_come_out_of_noise() {
        let packets = feed(b"GET /\r\n+$g#67\x03-$m10,4#2e").unwrap();
        assert_eq!(packets, [&b"+"[..], b"$g#67", b"\x03", b"-", &packet(b"m10,4")]);
    }

    #[test]
    fn a_wrong_checksum_and_an_endless_packet_are_errors() {
        assert_eq!(feed(b"$g#68"), Err(PacketError::Checksum));
        assert_eq!(feed(b"$g#+7"), Err(PacketError::Checksum));
        assert_eq!(feed(b"$g#zz"), Err(PacketError::Checksum));
        assert_eq!(feed(&[b'$'; PACKET_SIZE]), Err(PacketError::TooLong));
    }

    #[test]
    fn reads_are_bounded_in_length_and_by_the_last_address() {
        for (asked, got) in [
            ("m0,ffffffffffffffff", "m0,1000"),
            ("m0,fffffffffffffffff", "m0,1000"),
            ("mffffffffffffffff,2", "mffffffffffffffff,1"),
            ("m0,1000", "m0,1000"),
            ("m1,", "m1,1000"),
        ] {
            assert_eq!(feed(&packet(asked.as_bytes())).unwrap(), [packet(got.as_bytes())], "{asked}");
        }
        assert_eq!(bounded_read(b"mxyz,ffffffffffffffff"), None);
    }
}

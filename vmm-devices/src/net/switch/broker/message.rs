//! What broker and client say to each other: messages on a SEQPACKET socket, each of which begins with its kind.
//!
//! | kind | from | what follows |
//! |---|---|---|
//! | 1 hello | client | version, offloads that it may use, size of a ring (4 bytes), address (6; zeros for none), name, network and token, each behind its length (1) |
//! | 2 driver | client | whether there is one, what it takes |
//! | 3 bell | client | nothing: look at the ring |
//! | 16 welcome | broker | version, MTU (2; 0 for none), whether the link is up |
//! | 17 refused | broker | why, in UTF-8 |
//! | 18 link | broker | whether it is up |
//!
//! Numbers are little-endian. Descriptors go with the hello alone: the memory, and the socket that wakes the client.

use super::BrokerError;
use crate::net::{MacAddr, Offloads};

/// Of all this.
pub(super) const VERSION: u8 = 1;

/// Bytes of the longest message.
pub(super) const MOST: usize = 512;

/// Bytes of a name, a network's name, a token.
pub(super) const TEXT: usize = 96;

/// Characters of a reason that are looked at, of up to 4 bytes each.
const REASON: usize = 120;

const HELLO: u8 = 1;
const DRIVER: u8 = 2;
const BELL: u8 = 3;
const WELCOME: u8 = 16;
const REFUSED: u8 = 17;
const LINK: u8 = 18;

/// What a client says first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) transmit: Offloads,
    pub(super) ring: u32,
    pub(super) mac: Option<MacAddr>,
    pub(super) name: String,
    pub(super) network: String,
    pub(super) token: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    Hello(Hello),
    Driver { present: bool, receive: Offloads },
    Bell,
    Welcome { mtu: Option<u16>, up: bool },
    Refused { reason: String },
    Link { up: bool },
}

const OFFLOADS: [Offloads; 6] =
    [Offloads::CSUM, Offloads::TSO4, Offloads::TSO6, Offloads::ECN, Offloads::USO4, Offloads::USO6];

fn to_byte(offloads: Offloads) -> u8 {
    let bits = OFFLOADS.iter().enumerate();
    bits.fold(0, |byte, (bit, one)| byte | u8::from(offloads.contains(*one)) << bit)
}

/// Bits that say nothing here are left out.
fn from_byte(byte: u8) -> Offloads {
    let bits = OFFLOADS.iter().enumerate();
    bits.fold(Offloads::NONE, |all, (bit, one)| all.with(*one, byte >> bit & 1 != 0))
}

impl Message {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Hello(Hello { transmit, ring, mac, name, network, token }) => {
                let mut bytes = vec![HELLO, VERSION, to_byte(*transmit)];
                bytes.extend(ring.to_le_bytes());
                bytes.extend(mac.map_or([0; 6], |mac| mac.0));
                for text in [name.as_bytes(), network.as_bytes(), token] {
                    let text = text.get(..text.len().min(TEXT)).unwrap_or_default();
                    bytes.push(u8::try_from(text.len()).unwrap_or(0));
                    bytes.extend(text);
                }
                bytes
            }
            Self::Driver { present, receive } => vec![DRIVER, u8::from(*present), to_byte(*receive)],
            Self::Bell => vec![BELL],
            Self::Welcome { mtu, up } => {
                let [low, high] = mtu.unwrap_or(0).to_le_bytes();
                vec![WELCOME, VERSION, low, high, u8::from(*up)]
            }
            Self::Refused { reason } => {
                let mut bytes = vec![REFUSED];
                bytes.extend(reason.bytes().take(MOST - 1));
                bytes
            }
            Self::Link { up } => vec![LINK, u8::from(*up)],
        }
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, BrokerError> {
        let wrong = |what| BrokerError::Protocol { what };
        Ok(match bytes {
            [HELLO, version, rest @ ..] => {
                if *version != VERSION {
                    return Err(BrokerError::Version { theirs: *version });
                }
                hello(rest).ok_or(wrong("a hello that is cut off, or has a text that is none"))?.into()
            }
            [DRIVER, present, receive] => {
                Self::Driver { present: *present != 0, receive: from_byte(*receive) }
            }
            [BELL] => Self::Bell,
            [WELCOME, VERSION, low, high, up] => {
                let mtu = u16::from_le_bytes([*low, *high]);
                Self::Welcome { mtu: (mtu >= 68).then_some(mtu), up: *up != 0 }
            }
            [WELCOME, theirs, ..] if *theirs != VERSION => {
                return Err(BrokerError::Version { theirs: *theirs });
            }
            [REFUSED, reason @ ..] => {
                // For people; of a broker that may be anybody.
                let readable = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
                let reason = String::from_utf8_lossy(reason).chars().take(REASON).map(readable).collect();
                Self::Refused { reason }
            }
            [LINK, up] => Self::Link { up: *up != 0 },
            _ => return Err(wrong("what is no message")),
        })
    }
}

impl From<Hello> for Message {
    fn from(hello: Hello) -> Self {
        Self::Hello(hello)
    }
}

fn hello(bytes: &[u8]) -> Option<Hello> {
    let (&transmit, rest) = bytes.split_first()?;
    let (ring, rest) = rest.split_first_chunk::<4>()?;
    let (mac, mut rest) = rest.split_first_chunk::<6>()?;
    let mut text = || {
        let (&len, text) = rest.split_first()?;
        let (text, behind) = text.split_at_checked(usize::from(len)).filter(|_| usize::from(len) <= TEXT)?;
        rest = behind;
        Some(text)
    };
    let (name, network, token) = (text()?, text()?, text()?.to_vec());
    // Names go into logs, and each is one.
    let name_of = |bytes: &[u8]| {
        let name = std::str::from_utf8(bytes).ok()?;
        (!name.is_empty() && !name.chars().any(char::is_control)).then(|| name.to_owned())
    };
    let (name, network) = (name_of(name)?, name_of(network)?);
    rest.is_empty().then_some(())?;
    let mac = MacAddr(*mac);
    Some(Hello {
        transmit: from_byte(transmit),
        ring: u32::from_le_bytes(*ring),
        mac: (mac.0 != [0; 6]).then_some(mac),
        name,
        network,
        token,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello_of(name: &str) -> Hello {
        Hello {
            transmit: Offloads::CSUM | Offloads::TSO6,
            ring: 1 << 20,
            mac: Some(MacAddr::local(1)),
            name: name.to_owned(),
            network: "lan".to_owned(),
            token: vec![0, 1, 2],
        }
    }

    #[test]
    fn messages_are_read_as_they_were_written() {
        let long = "x".repeat(TEXT);
        for message in [
            Message::Hello(hello_of("web")),
            Message::Hello(Hello { mac: None, token: Vec::new(), ..hello_of(&long) }),
            Message::Driver { present: true, receive: Offloads::ALL },
            Message::Driver { present: false, receive: Offloads::NONE },
            Message::Bell,
            Message::Welcome { mtu: Some(1500), up: true },
            Message::Welcome { mtu: None, up: false },
            Message::Refused { reason: "no".to_owned() },
            Message::Link { up: true },
        ] {
            let bytes = message.to_bytes();
            assert!(bytes.len() <= MOST);
            assert_eq!(Message::from_bytes(&bytes).unwrap(), message);
        }
    }

    #[test]
    fn hellos_that_are_none_are_refused() {
        let whole = Message::Hello(hello_of("web")).to_bytes();
        for end in 0..whole.len() {
            assert!(Message::from_bytes(&whole[..end]).is_err(), "{end}");
        }
        assert!(Message::from_bytes(&[&whole[..], &[0]].concat()).is_err());
        for name in ["", "a\nb", "\u{7f}"] {
            assert!(Message::from_bytes(&Message::Hello(hello_of(name)).to_bytes()).is_err(), "{name:?}");
        }
        let mut other = whole;
        other[1] = 9;
        assert!(matches!(Message::from_bytes(&other), Err(BrokerError::Version { theirs: 9 })));
    }

    proptest! {
        #[test]
        fn whatever_is_read_is_written_so_again(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(message) = Message::from_bytes(&bytes) {
                prop_assert_eq!(Message::from_bytes(&message.to_bytes()).unwrap(), message);
            }
        }
    }
}

//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

/// An address of six bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddr(pub [u8; 6]);

/// What is no address, or none of a device's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MacAddrError {
    /// It is not written as addresses are.
    #[error(
        "{text:?} is no Ethernet address; they are six pairs of hexadecimal digits, as in 52:54:00:12:34:56"
    )]
    Text {
        /// What it was.
        text: String,
    },
    /// It belongs to a group, or is nobody's.
    #[error(
        "{address} cannot be a device's address: the first byte is even for those, and one byte is not 0"
    )]
    NotUnicast {
        /// Which one.
        address: MacAddr,
    },
}

impl MacAddr {
    /// Everybody's.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether it is a group's, as [`MacAddr::BROADCAST`] is.
    pub fn is_multicast(self) -> bool {
        let [first, ..] = self.0;
        first & 1 != 0
    }

    /// The address of a device.
    ///
    /// # Errors
    /// If it is a group's, or all zeros.
    pub fn unicast(self) -> Result<Self, MacAddrError> {
        if self.is_multicast() || self.0 == [0; 6] {
            return Err(MacAddrError::NotUnicast { address: self });
        }
        Ok(self)
    }

    /// An address that nobody has given away (locally administered), for the device of that number.
    pub fn local(number: u32) -> Self {
        let [a, b, c, d] = number.to_be_bytes();
        Self([0x52, 0x54, a, b, c, d])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = MacAddrError;

    fn from_str(text: &str) -> Result<Self, MacAddrError> {
        let wrong = || MacAddrError::Text { text: text.to_owned() };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            // `from_str_radix` would take a sign as well.
            let part =
                parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(part.ok_or_else(wrong)?, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() { Err(wrong()) } else { Ok(Self(bytes)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_they_are_read() {
        let address: MacAddr = "52:54:00:aB:01:ff".parse().unwrap();
        assert_eq!(address, MacAddr([0x52, 0x54, 0, 0xab, 1, 0xff]));
        assert_eq!(address.to_string(), "52:54:00:ab:01:ff");
        for wrong in [
            "",
            "52:54:00:ab:01",
            "52:54:00:ab:01:ff:00",
            "+2:54:00:ab:01:ff",
            "52-54-00-ab-01-ff",
            "5:54:0:ab:1:ff",
        ] {
            assert!(matches!(wrong.parse::<MacAddr>(), Err(MacAddrError::Text { text }) if text == wrong));
        }
    }

    #[test]
    fn a_group_is_no_device() {
        for group in [MacAddr::BROADCAST, MacAddr([0x33, 0x33, 0, 0, 0, 1]), MacAddr([0; 6])] {
            assert_eq!(group.unicast(), Err(MacAddrError::NotUnicast { address: group }));
        }
        assert_eq!(MacAddr::local(7).unicast(), Ok(MacAddr([0x52, 0x54, 0, 0, 0, 7])));
    }
}

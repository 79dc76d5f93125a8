//! Who takes part, and in what.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{EventError, ObjectClass, Text};

/// Which virtual machine, and which of its lives: a machine that starts again is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VmId {
    /// Its UUID as a number, most significant byte first.
    pub uuid: u128,
    /// Counts its lives, and is never used twice.
    pub incarnation: u64,
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", Uuid(self.uuid), self.incarnation)
    }
}

/// A 128-bit number as RFC 9562 writes it.
pub(crate) struct Uuid(pub(crate) u128);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let u = self.0;
        let (a, b, c, d, e) =
            (u >> 96, (u >> 80) & 0xffff, (u >> 64) & 0xffff, (u >> 48) & 0xffff, u & 0xffff_ffff_ffff);
        write!(f, "{a:08x}-{b:04x}-{c:04x}-{d:04x}-{e:012x}")
    }
}

pub(crate) fn parse_uuid(text: &str) -> Option<u128> {
    let grouped = text.len() == 36
        && text.bytes().enumerate().all(|(i, b)| matches!(i, 8 | 13 | 18 | 23) == (b == b'-'));
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let plain = digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    (grouped && plain).then(|| u128::from_str_radix(&digits, 16).ok()).flatten()
}

/// Who asks, or is asked for. As text: `vm UUID#INCARNATION` or `host NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Party {
    /// A virtual machine.
    Vm(VmId),
    /// A program or user of the host.
    Host(Text),
}

impl Party {
    /// A virtual machine.
    pub fn vm(uuid: u128, incarnation: u64) -> Self {
        Self::Vm(VmId { uuid, incarnation })
    }

    /// A program or user of the host.
    pub fn host(name: impl Into<Text>) -> Self {
        Self::Host(name.into())
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vm(vm) => write!(f, "vm {vm}"),
            Self::Host(name) => write!(f, "host {name}"),
        }
    }
}

impl FromStr for Party {
    type Err = EventError;

    fn from_str(text: &str) -> Result<Self, EventError> {
        let vm = |rest: &str| {
            let (uuid, incarnation) = rest.split_once('#')?;
            Some(Self::vm(parse_uuid(uuid)?, incarnation.parse().ok()?))
        };
        let party = match text.split_once(' ') {
            Some(("vm", rest)) => vm(rest),
            Some(("host", name)) => Some(Self::host(name)),
            _ => None,
        };
        party.ok_or_else(|| EventError::Name {
            what: "Party",
            name: Text::new(text),
            allowed: "vm UUID#INCARNATION, host NAME",
        })
    }
}

impl Serialize for Party {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Party {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What a request is for: a class, and a number, a name or both.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Object {
    /// What kind of thing.
    pub class: ObjectClass,
    /// Its number, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub number: Option<u64>,
    /// Its name, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Text>,
}

impl Object {
    /// One that has a number.
    pub fn numbered(class: ObjectClass, number: u64) -> Self {
        Self { class, number: Some(number), name: None }
    }

    /// One that has a name.
    pub fn named(class: ObjectClass, name: impl Into<Text>) -> Self {
        Self { class, number: None, name: Some(name.into()) }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.class)?;
        if let Some(number) = self.number {
            match self.class {
                ObjectClass::Pio | ObjectClass::Mmio | ObjectClass::Msr => write!(f, " {number:#x}")?,
                _ => write!(f, " {number}")?,
            }
        }
        self.name.as_ref().map_or(Ok(()), |name| write!(f, " {name}"))
    }
}

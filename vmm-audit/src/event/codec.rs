//! Events as bytes.

use smallvec::SmallVec;

use super::wire::{Reader, Value, Writer, put_varint};
use super::{
    Action, Event, EventError, Kind, MAX_ATTRIBUTES, Measured, Object, ObjectClass, Outcome, Party, Text,
    Verdict,
};
use crate::digest::Digest;

/// The version of the entries that are written.
pub const ENTRY_VERSION: u8 = 1;
/// Bytes of an encoded event at most.
pub const MAX_EVENT: usize = 8192;
/// Bytes of an entry at most: version, source and event.
pub const MAX_ENTRY: usize = MAX_EVENT + 8;

/// An encoded event: without an allocation unless it is unusually long.
pub(crate) type EventBytes = SmallVec<[u8; 256]>;

fn write_party(w: &mut Writer<'_>, field: u32, party: &Party) {
    w.message(field, |w| match party {
        Party::Vm(vm) => {
            w.bytes(1, &vm.uuid.to_be_bytes());
            w.varint(2, vm.incarnation);
        }
        Party::Host(name) => w.bytes(3, name.as_str().as_bytes()),
    });
}

fn read_party(bytes: &[u8], outer: u32) -> Result<Party, EventError> {
    let (mut uuid, mut incarnation, mut host) = (None, None, None);
    let mut reader = Reader::new(bytes);
    while let Some((field, value)) = reader.field()? {
        match field {
            1 => once(&mut uuid, field, u128::from_be_bytes(value.array(field)?))?,
            2 => once(&mut incarnation, field, value.varint(field)?)?,
            3 => once(&mut host, field, Party::host(value.text(field)?))?,
            _ => {}
        }
    }
    match (uuid, incarnation, host) {
        (Some(uuid), Some(incarnation), None) => Ok(Party::vm(uuid, incarnation)),
        (None, None, Some(host)) => Ok(host),
        _ => Err(EventError::Absent { field: outer }),
    }
}

fn read_object(bytes: &[u8]) -> Result<Object, EventError> {
    let (mut class, mut number, mut name) = (None, None, None);
    let mut reader = Reader::new(bytes);
    while let Some((field, value)) = reader.field()? {
        match field {
            1 => once(&mut class, field, ObjectClass::from_number(small(field, value)?))?,
            2 => once(&mut number, field, value.varint(field)?)?,
            3 => once(&mut name, field, Text::new(value.text(field)?))?,
            _ => {}
        }
    }
    Ok(Object { class: class.ok_or(EventError::Absent { field: 10 })?, number, name })
}

/// The two fields of a measurement or attribute.
fn read_pair(bytes: &[u8], outer: u32) -> Result<(Text, Value<'_>), EventError> {
    let (mut name, mut second) = (None, None);
    let mut reader = Reader::new(bytes);
    while let Some((field, value)) = reader.field()? {
        match field {
            1 => once(&mut name, field, Text::new(value.text(field)?))?,
            2 => once(&mut second, field, value)?,
            _ => {}
        }
    }
    name.zip(second).ok_or(EventError::Absent { field: outer })
}

fn once<T>(place: &mut Option<T>, field: u32, value: T) -> Result<(), EventError> {
    if place.replace(value).is_some() { Err(EventError::Twice { field }) } else { Ok(()) }
}

fn small(field: u32, value: Value<'_>) -> Result<u32, EventError> {
    let value = value.varint(field)?;
    u32::try_from(value).map_err(|_| EventError::Range { field, value, max: u32::MAX.into() })
}

fn room<T>(list: &[T], field: u32) -> Result<(), EventError> {
    if list.len() < MAX_ATTRIBUTES {
        return Ok(());
    }
    Err(EventError::Length { field, length: list.len() + 1, allowed: MAX_ATTRIBUTES })
}

impl Event {
    /// Its binary form.
    ///
    /// # Errors
    /// If it has more attributes or measurements than allowed, or is longer than [`MAX_EVENT`].
    pub fn encode(&self) -> Result<Vec<u8>, EventError> {
        let mut bytes = EventBytes::new();
        self.encode_into(&mut bytes, self.source_seq, self.lost, (self.monotonic, self.wall))?;
        Ok(bytes.into_vec())
    }

    /// Likewise, with what the emitter sets.
    pub(crate) fn encode_into(
        &self,
        bytes: &mut EventBytes,
        source_seq: u64,
        lost: u64,
        (monotonic, wall): (u64, u64),
    ) -> Result<(), EventError> {
        let mut w = Writer(bytes);
        w.varint(1, self.kind.number().into());
        let named = [
            (2, self.action.map(Action::number)),
            (3, self.verdict.map(Verdict::number)),
            (4, self.outcome.map(Outcome::number)),
        ];
        for (field, number) in named {
            if let Some(number) = number {
                w.varint(field, number.into());
            }
        }
        for (field, time) in [(5, monotonic), (6, wall)] {
            if time != 0 {
                w.fixed(field, time);
            }
        }
        if source_seq != 0 {
            w.varint(7, source_seq);
        }
        if let Some(party) = &self.subject {
            write_party(&mut w, 8, party);
        }
        if let Some(party) = &self.peer {
            write_party(&mut w, 9, party);
        }
        if let Some(object) = &self.object {
            w.message(10, |w| {
                w.varint(1, object.class.number().into());
                if let Some(number) = object.number {
                    w.varint(2, number);
                }
                if let Some(name) = &object.name {
                    w.bytes(3, name.as_str().as_bytes());
                }
            });
        }
        if let Some(rule) = &self.rule {
            w.bytes(11, rule.as_str().as_bytes());
        }
        if self.rule_line != 0 {
            w.varint(12, self.rule_line.into());
        }
        for (field, digest) in [(13, &self.policy), (14, &self.request)] {
            if let Some(digest) = digest {
                w.bytes(field, digest.as_bytes());
            }
        }
        if let Some(reason) = &self.reason {
            w.bytes(15, reason.as_str().as_bytes());
        }
        for (field, number) in [(16, self.count), (17, self.bytes), (18, lost)] {
            if number != 0 {
                w.varint(field, number);
            }
        }
        if let Some(boot) = self.boot {
            w.bytes(19, &boot.to_be_bytes());
        }
        if let Some(digest) = &self.launch_digest {
            w.bytes(20, digest.as_bytes());
        }
        self.encode_lists(w)
    }

    fn encode_lists(&self, mut w: Writer<'_>) -> Result<(), EventError> {
        for (field, length) in [(21, self.measured.len()), (22, self.attributes.len())] {
            if length > MAX_ATTRIBUTES {
                return Err(EventError::Length { field, length, allowed: MAX_ATTRIBUTES });
            }
        }
        for measured in &self.measured {
            w.message(21, |w| {
                w.bytes(1, measured.name.as_str().as_bytes());
                w.bytes(2, measured.digest.as_bytes());
            });
        }
        for (name, value) in &self.attributes {
            w.message(22, |w| {
                w.bytes(1, name.as_str().as_bytes());
                w.bytes(2, value.as_str().as_bytes());
            });
        }
        let length = w.0.len();
        if length > MAX_EVENT { Err(EventError::TooLong { length, max: MAX_EVENT }) } else { Ok(()) }
    }

    /// From its binary form, which may be anything.
    ///
    /// # Errors
    /// If it is no event. Fields that this version does not know are not an error: [`unknown`](Self::unknown).
    pub fn decode(bytes: &[u8]) -> Result<Self, EventError> {
        if bytes.len() > MAX_EVENT {
            return Err(EventError::TooLong { length: bytes.len(), max: MAX_EVENT });
        }
        let mut event = Self::new(Kind::Other(0));
        let mut seen = 0u32;
        let mut reader = Reader::new(bytes);
        while let Some((field, value)) = reader.field()? {
            if field <= 20 {
                let bit = 1u32 << field;
                if seen & bit != 0 {
                    return Err(EventError::Twice { field });
                }
                seen |= bit;
            }
            event.set(field, value)?;
        }
        if seen & 2 == 0 { Err(EventError::Absent { field: 1 }) } else { Ok(event) }
    }

    fn set(&mut self, field: u32, value: Value<'_>) -> Result<(), EventError> {
        let digest = |value: Value<'_>| value.array(field).map(Digest::from_bytes);
        match field {
            1 => self.kind = Kind::from_number(small(field, value)?),
            2 => self.action = Some(Action::from_number(small(field, value)?)),
            3 => self.verdict = Some(Verdict::from_number(small(field, value)?)),
            4 => self.outcome = Some(Outcome::from_number(small(field, value)?)),
            5 => self.monotonic = value.fixed(field)?,
            6 => self.wall = value.fixed(field)?,
            7 => self.source_seq = value.varint(field)?,
            8 => self.subject = Some(read_party(value.bytes(field)?, field)?),
            9 => self.peer = Some(read_party(value.bytes(field)?, field)?),
            10 => self.object = Some(read_object(value.bytes(field)?)?),
            11 => self.rule = Some(Text::new(value.text(field)?)),
            12 => self.rule_line = small(field, value)?,
            13 => self.policy = Some(digest(value)?),
            14 => self.request = Some(digest(value)?),
            15 => self.reason = Some(Text::new(value.text(field)?)),
            16 => self.count = value.varint(field)?,
            17 => self.bytes = value.varint(field)?,
            18 => self.lost = value.varint(field)?,
            19 => self.boot = Some(u128::from_be_bytes(value.array(field)?)),
            20 => self.launch_digest = Some(digest(value)?),
            21 => {
                room(&self.measured, field)?;
                let (name, value) = read_pair(value.bytes(field)?, field)?;
                self.measured.push(Measured { name, digest: digest(value)? });
            }
            22 => {
                room(&self.attributes, field)?;
                let (name, value) = read_pair(value.bytes(field)?, field)?;
                self.attributes.push((name, Text::new(value.text(field)?)));
            }
            _ => {
                room(&self.unknown, field)?;
                self.unknown.push(field);
            }
        }
        Ok(())
    }
}

/// What a leaf of the Merkle tree stands for: an event and the source that it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The number of the source; 0 is the log itself.
    pub source: u32,
    /// The event, encoded.
    pub event: &'a [u8],
}

impl<'a> Entry<'a> {
    /// Appends its bytes to `to`.
    pub fn encode(&self, to: &mut Vec<u8>) {
        to.push(ENTRY_VERSION);
        put_varint(self.source.into(), |byte| to.push(byte));
        to.extend_from_slice(self.event);
    }

    /// From the bytes of an entry.
    ///
    /// # Errors
    /// If it is of another version, or cut short.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, EventError> {
        let (&version, rest) = bytes.split_first().ok_or(EventError::CutShort)?;
        if version != ENTRY_VERSION {
            return Err(EventError::Version { version });
        }
        let mut reader = Reader::new(rest);
        let value = reader.raw_varint()?;
        let source =
            u32::try_from(value).map_err(|_| EventError::Range { field: 0, value, max: u32::MAX.into() })?;
        Ok(Self { source, event: reader.rest() })
    }
}

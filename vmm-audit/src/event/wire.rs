//! The Protocol Buffers wire format, as much of it as events use: varint, fixed64 and length-delimited fields in ascending order.
//! Written so, an event has one form only.

use super::{EventBytes, EventError};

pub(crate) const VARINT: u64 = 0;
pub(crate) const FIXED64: u64 = 1;
pub(crate) const BYTES: u64 = 2;

/// Appends a varint, byte by byte.
#[inline]
pub(crate) fn put_varint(mut value: u64, mut put: impl FnMut(u8)) {
    while value > 0x7f {
        put((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    put((value & 0x7f) as u8);
}

/// Appends fields to a buffer.
pub(crate) struct Writer<'a>(pub(crate) &'a mut EventBytes);

impl Writer<'_> {
    #[inline]
    fn raw_varint(&mut self, value: u64) {
        put_varint(value, |byte| self.0.push(byte));
    }

    #[inline]
    pub(crate) fn varint(&mut self, field: u32, value: u64) {
        self.raw_varint(u64::from(field) << 3 | VARINT);
        self.raw_varint(value);
    }

    #[inline]
    pub(crate) fn fixed(&mut self, field: u32, value: u64) {
        self.raw_varint(u64::from(field) << 3 | FIXED64);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    #[inline]
    pub(crate) fn bytes(&mut self, field: u32, value: &[u8]) {
        self.raw_varint(u64::from(field) << 3 | BYTES);
        self.raw_varint(value.len() as u64);
        self.0.extend_from_slice(value);
    }

    /// A message in the message.
    #[inline]
    pub(crate) fn message(&mut self, field: u32, fill: impl FnOnce(&mut Writer<'_>)) {
        self.raw_varint(u64::from(field) << 3 | BYTES);
        let start = self.0.len();
        // Nearly always its length is one byte.
        self.0.push(0);
        fill(&mut Writer(self.0));
        let length = (self.0.len() - start - 1) as u64;
        let mut place = start;
        put_varint(length, |byte| {
            match self.0.get_mut(start).filter(|_| place == start) {
                Some(first) => *first = byte,
                None => self.0.insert(place, byte),
            }
            place += 1;
        });
    }
}

/// The value of a field.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value<'a> {
    Varint(u64),
    Fixed(u64),
    Bytes(&'a [u8]),
}

impl<'a> Value<'a> {
    pub(crate) fn varint(self, field: u32) -> Result<u64, EventError> {
        if let Self::Varint(value) = self { Ok(value) } else { Err(EventError::WireType { field }) }
    }

    pub(crate) fn fixed(self, field: u32) -> Result<u64, EventError> {
        if let Self::Fixed(value) = self { Ok(value) } else { Err(EventError::WireType { field }) }
    }

    pub(crate) fn bytes(self, field: u32) -> Result<&'a [u8], EventError> {
        if let Self::Bytes(value) = self { Ok(value) } else { Err(EventError::WireType { field }) }
    }

    pub(crate) fn array<const N: usize>(self, field: u32) -> Result<[u8; N], EventError> {
        let bytes = self.bytes(field)?;
        bytes.try_into().map_err(|_| EventError::Length { field, length: bytes.len(), allowed: N })
    }

    pub(crate) fn text(self, field: u32) -> Result<&'a str, EventError> {
        let bytes = self.bytes(field)?;
        if bytes.len() > super::Text::MAX {
            return Err(EventError::Length { field, length: bytes.len(), allowed: super::Text::MAX });
        }
        std::str::from_utf8(bytes).map_err(|_| EventError::Utf8 { field })
    }
}

/// Takes fields from bytes that may be anything.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
    last: u32,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, last: 0 }
    }

    pub(crate) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// A varint in its shortest form.
    pub(crate) fn raw_varint(&mut self) -> Result<u64, EventError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.rest.split_first().ok_or(EventError::CutShort)?;
            self.rest = rest;
            let bits = u64::from(byte & 0x7f);
            if (shift == 63 && bits > 1) || (byte == 0 && shift > 0) {
                return Err(EventError::Varint);
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(EventError::Varint)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], EventError> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(EventError::CutShort)?;
        self.rest = rest;
        Ok(taken)
    }

    /// The next field; fields come in ascending order, and one may come again.
    pub(crate) fn field(&mut self) -> Result<Option<(u32, Value<'a>)>, EventError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let tag = self.raw_varint()?;
        let field = u32::try_from(tag >> 3).ok().filter(|field| *field > 0 && *field < 1 << 29);
        let field = field.ok_or(EventError::Field { number: tag >> 3 })?;
        if field < self.last {
            return Err(EventError::Order { field, last: self.last });
        }
        self.last = field;
        let value = match tag & 7 {
            VARINT => Value::Varint(self.raw_varint()?),
            FIXED64 => {
                Value::Fixed(u64::from_le_bytes(self.take(8)?.try_into().map_err(|_| EventError::CutShort)?))
            }
            BYTES => {
                let length = usize::try_from(self.raw_varint()?).map_err(|_| EventError::CutShort)?;
                Value::Bytes(self.take(length)?)
            }
            _ => return Err(EventError::WireType { field }),
        };
        Ok(Some((field, value)))
    }
}

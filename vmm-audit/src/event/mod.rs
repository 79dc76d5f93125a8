//! Events: what is written down.
//!
//! # Field dictionary
//! The binary form of an event is a Protocol Buffers message (proto3) with fields in ascending order, so that it has one form
//! only; a field with its default value is absent. The JSON form has the names of the table. Numbers and names keep their meaning for good:
//! a later version adds fields, and readers skip those they do not know.
//!
//! | no. | field | wire type | what | JSON |
//! |---|---|---|---|---|
//! | 1 | `kind` | varint | [`Kind`] | its name |
//! | 2 | `action` | varint | [`Action`] | its name |
//! | 3 | `verdict` | varint | [`Verdict`] | its name |
//! | 4 | `outcome` | varint | [`Outcome`] | its name |
//! | 5 | `monotonic` | fixed64 | nanoseconds of the emitter's `CLOCK_MONOTONIC` | number |
//! | 6 | `wall` | fixed64 | nanoseconds since 1970-01-01 UTC by the emitter's clock | RFC 3339 |
//! | 7 | `source_seq` | varint | counts the events of the source from 1, those that were counted only among them | number |
//! | 8 | `subject` | message [`Party`] | who asks | `vm UUID#INCARNATION` or `host NAME` |
//! | 9 | `peer` | message [`Party`] | of whom | likewise |
//! | 10 | `object` | message [`Object`] | what for | object of `class`, `number`, `name` |
//! | 11 | `rule` | string | the rule that decided | string |
//! | 12 | `rule_line` | varint | its line in the policy, from 1 | number |
//! | 13 | `policy` | 32 bytes | SHA-256 of the policy in force | 64 hexadecimal digits |
//! | 14 | `request` | 32 bytes | SHA-256 of the request as it came | likewise |
//! | 15 | `reason` | string | why, for people | string |
//! | 16 | `count` | varint | how many of them (`coalesced`, `recovery`, `retention`) | number |
//! | 17 | `bytes` | varint | bytes that this is about | number |
//! | 18 | `lost` | varint | events of the source so far that were counted and not written one by one | number |
//! | 19 | `boot` | 16 bytes | the host's boot identifier; in events that begin a source | UUID |
//! | 20 | `launch_digest` | 32 bytes | of a virtual machine's launch, see [`Launch`] | 64 hexadecimal digits |
//! | 21 | `measured` | repeated message: 1 name, 2 digest (32 bytes) | what the launch was measured from | object of names and digests |
//! | 22 | `attributes` | repeated message: 1 name, 2 value (strings) | whatever else | object |
//!
//! A [`Party`] has 1 `uuid` (16 bytes) and 2 `incarnation` (varint), or 3 `host` (string). An [`Object`] has 1 `class` (varint), 2
//! `number` (varint), 3 `name` (string). A string has at most [`Text::MAX`] bytes.
//!
//! Attributes that [`verb`](crate::verb) and the hooks give, beside what their authors add:
//!
//! | attribute | in | what |
//! |---|---|---|
//! | `grant` | `opened`, `closed` and the like of `hooks::devices` | which grant of the gatekeeper, from 1 |
//! | `operation` | `administration` | which verb of the process, from 1: the event before it is carried out has no outcome, the one behind it has |
//! | `ticket` | `decision`, `administration` | which proposal at the policy's desk, from 1: one for which a second person is asked |
//! | `confirmed-by` | `decision` with `ask` and `success`, `administration` | the second person, as a [`Party`]'s text; the subject is the first |
//! | `asked-by` | `decision` with `deny` | whose proposal it was that the subject wanted to confirm |
//! | `file` | what names a rule | the file of the rule, if the policy's rules are in several |
//!
//! The entry in the log, whose hash is the leaf of the Merkle tree, has a byte for the version ([`ENTRY_VERSION`]), the source as
//! a varint, and the event. The source is a number that the writer of the log gives to each emitter; an event cannot name another.
//! The sequence number of an entry is its index in the tree.

mod codec;
mod fields;
mod json;
mod launch;
mod names;
mod ocsf;
mod party;
#[cfg(test)]
mod tests;
mod text;
mod wire;

pub use codec::{ENTRY_VERSION, Entry, MAX_ENTRY, MAX_EVENT};
pub use fields::{Event, MAX_ATTRIBUTES};
pub use launch::{Launch, Measured};
pub use names::{Action, Kind, ObjectClass, Outcome, Verdict};
pub use ocsf::to_ocsf;
pub use party::{Object, Party, VmId};
pub use text::Text;

pub(crate) use codec::EventBytes;
pub(crate) use json::rfc3339;
pub(crate) use party::{Uuid, parse_uuid};

/// What is wrong with something that should be an event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EventError {
    /// It ends too early.
    #[error("the event ends within a field")]
    CutShort,
    /// A varint of more than 64 bits, or not in its shortest form.
    #[error("a varint has more than 64 bits or is longer than it has to be")]
    Varint,
    /// A field's number is none.
    #[error("field number {number}: allowed are 1 to 536870911")]
    Field {
        /// The number.
        number: u64,
    },
    /// A field stands behind one with a greater number.
    #[error("field {field} behind field {last}: fields are in ascending order")]
    Order {
        /// The field.
        field: u32,
        /// What is before it.
        last: u32,
    },
    /// A field comes twice.
    #[error("field {field} comes twice")]
    Twice {
        /// The field.
        field: u32,
    },
    /// A field that must be there is absent.
    #[error("field {field} is absent")]
    Absent {
        /// The field.
        field: u32,
    },
    /// A field has another wire type than it should.
    #[error("field {field} has another wire type than the field dictionary says")]
    WireType {
        /// The field.
        field: u32,
    },
    /// A field is too long, or not as long as it must be.
    #[error("field {field} has {length} bytes where {allowed} are allowed")]
    Length {
        /// The field.
        field: u32,
        /// Its length, in bytes or elements.
        length: usize,
        /// What is allowed.
        allowed: usize,
    },
    /// A string is not UTF-8.
    #[error("field {field} is not UTF-8")]
    Utf8 {
        /// The field.
        field: u32,
    },
    /// A number is greater than it can be.
    #[error("field {field} is {value}: at most {max} is allowed")]
    Range {
        /// The field.
        field: u32,
        /// Its value.
        value: u64,
        /// The greatest value.
        max: u64,
    },
    /// The whole is too long.
    #[error("{length} bytes: an event has at most {max}")]
    TooLong {
        /// Its length in bytes.
        length: usize,
        /// The greatest length in bytes.
        max: usize,
    },
    /// An entry of a version that this one cannot read.
    #[error("entry of version {version}: this is a reader of version {ENTRY_VERSION}")]
    Version {
        /// The version.
        version: u8,
    },
    /// A name that is none of those allowed.
    #[error("{what} {name:?}: allowed are {allowed}")]
    Name {
        /// What it should name.
        what: &'static str,
        /// The name.
        name: Text,
        /// What is allowed.
        allowed: &'static str,
    },
}

//! One object, and the request for it.

use std::fmt;

use super::op::{Action, Kind, Op, ValueKind};
use super::subject::SubjectId;

/// What tells an object from others of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Value<'a> {
    /// A port, a type, an address.
    Number(u64),
    /// A name.
    Name(&'a str),
}

/// What is asked for. Made by the constructor of its kind, or by [`new`](Self::new).
///
/// ```
/// use vmm_policy::{Kind, Object, Value};
/// assert_eq!(Object::vsock(5432).to_string(), "vsock 5432");
/// assert_eq!(Object::new(Kind::Tcp, Value::Number(70_000)), None, "there is no such port");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Object<'a> {
    kind: Kind,
    value: Value<'a>,
}

macro_rules! numbered {
    ($($(#[$doc:meta])* $name:ident($kind:ident, $type:ty);)*) => {$(
        $(#[$doc])*
        pub fn $name(number: $type) -> Self {
            Self { kind: Kind::$kind, value: Value::Number(number.into()) }
        }
    )*};
}

macro_rules! named {
    ($($(#[$doc:meta])* $name:ident($kind:ident);)*) => {$(
        $(#[$doc])*
        pub fn $name(name: &'a str) -> Self {
            Self { kind: Kind::$kind, value: Value::Name(name) }
        }
    )*};
}

impl<'a> Object<'a> {
    /// One of `kind`, if `value` is of the sort and the range that the kind has ([`Kind::value_kind`]); where the kind has
    /// none, the value is the number 0.
    pub fn new(kind: Kind, value: Value<'a>) -> Option<Self> {
        let fits = match (kind.value_kind(), value) {
            (ValueKind::Number(most), Value::Number(number)) => number <= most,
            (ValueKind::Name, Value::Name(_)) | (ValueKind::Nothing, Value::Number(0)) => true,
            _ => false,
        };
        fits.then_some(Self { kind, value })
    }

    numbered! {
        /// A vsock port.
        vsock(Vsock, u32);
        /// A TCP port.
        tcp(Tcp, u16);
        /// A UDP port.
        udp(Udp, u16);
        /// A type of ICMP message.
        icmp(Icmp, u8);
        /// An IP protocol.
        ip(Ip, u8);
        /// An ethertype.
        ethernet(Ethernet, u16);
        /// A Xen event channel's port.
        event_channel(EventChannel, u32);
        /// A hypercall.
        hypercall(Hypercall, u64);
        /// A port of I/O space.
        pio(Pio, u16);
        /// An address of memory-mapped I/O, in bytes.
        mmio(Mmio, u64);
        /// A model-specific register.
        msr(Msr, u32);
    }

    named! {
        /// A network.
        network(Network);
        /// Memory in common.
        region(Region);
        /// The doorbells of memory in common, by its name.
        doorbell(Doorbell);
        /// What a block device stores to.
        disk(Disk);
        /// A folder of the host.
        share(Share);
        /// A console.
        console(Console);
        /// A saved state.
        snapshot(Snapshot);
        /// A place to migrate to or from.
        migration(Migration);
        /// A management verb.
        verb(Verb);
        /// What is plugged: cpu, memory, device.
        hotplug(Hotplug);
    }

    /// Pages that the peer grants (Xen).
    pub fn grant() -> Self {
        Self { kind: Kind::Grant, value: Value::Number(0) }
    }

    /// Pages of a balloon.
    pub fn balloon() -> Self {
        Self { kind: Kind::Balloon, value: Value::Number(0) }
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What tells it from others.
    pub fn value(&self) -> Value<'a> {
        self.value
    }
}

impl fmt::Display for Object<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.kind != Kind::Verb {
            f.write_str(self.kind.word())?;
        }
        match (self.kind, self.value) {
            (Kind::Verb, Value::Name(name)) => f.write_str(name),
            (kind, Value::Number(_)) if kind.value_kind() == ValueKind::Nothing => Ok(()),
            (Kind::Mmio | Kind::Msr | Kind::Pio | Kind::Ethernet, Value::Number(number)) => {
                write!(f, " {number:#x}")
            }
            (_, Value::Number(number)) => write!(f, " {number}"),
            (_, Value::Name(name)) => write!(f, " {name:?}"),
        }
    }
}

/// Who wants what of whom. Copied freely; nothing in it is owned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Who asks.
    pub asker: SubjectId,
    /// Whom it leads to, if that is one.
    pub peer: Option<SubjectId>,
    /// What is to be done.
    pub action: Action,
    /// With what.
    pub object: Object<'a>,
    /// How much of it, for quotas: the bytes that are sent or mapped, or 0 where that is no question.
    pub bytes: u64,
}

impl<'a> Request<'a> {
    /// `asker` wants `action` on `object`, which leads to no other subject.
    pub fn new(asker: SubjectId, action: Action, object: Object<'a>) -> Self {
        Self { asker, peer: None, action, object, bytes: 0 }
    }

    /// It leads to `peer`.
    #[must_use]
    pub fn of(mut self, peer: SubjectId) -> Self {
        self.peer = Some(peer);
        self
    }

    /// It is for so many bytes.
    #[must_use]
    pub fn bytes(mut self, bytes: u64) -> Self {
        self.bytes = bytes;
        self
    }

    /// What is to be done, if that can be done with such an object.
    #[inline(always)]
    pub fn op(&self) -> Option<Op> {
        Op::new(self.object.kind(), self.action)
    }
}

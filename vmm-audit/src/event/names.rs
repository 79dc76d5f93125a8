//! What happened, what was asked, and how it ended: numbers with names. The numbers are the binary form and never change their
//! meaning; the names are the JSON form.

macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$item:meta])* $variant:ident = $number:literal $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$item])* $variant,)*
            /// A number that this version has no name for.
            Other(u32),
        }

        impl $name {
            /// Those with names.
            pub const NAMED: &[Self] = &[$(Self::$variant,)*];

            /// Its number, which is its binary form.
            pub fn number(self) -> u32 {
                match self {
                    $(Self::$variant => $number,)*
                    Self::Other(number) => number,
                }
            }

            /// The one with this number.
            pub fn from_number(number: u32) -> Self {
                match number {
                    $($number => Self::$variant,)*
                    other => Self::Other(other),
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self {
                    $(Self::$variant => f.pad($text),)*
                    Self::Other(number) => f.pad(&format!("other-{number}")),
                }
            }
        }

        impl std::str::FromStr for $name {
            type Err = super::EventError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                match text {
                    $($text => Ok(Self::$variant),)*
                    _ => text.strip_prefix("other-").and_then(|n| n.parse().ok()).map(Self::from_number).ok_or_else(
                        || super::EventError::Name {
                            what: stringify!($name),
                            name: super::Text::new(text),
                            allowed: concat!($($text, " ",)*),
                        },
                    ),
                }
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str> as serde::Deserialize>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

named! {
    /// What happened.
    Kind {
        /// A request was judged.
        Decision = 1 "decision",
        /// A channel, device or file opened.
        Opened = 2 "opened",
        /// It closed in the ordinary way.
        Closed = 3 "closed",
        /// A right was taken back.
        Revoked = 4 "revoked",
        /// A virtual machine starts; carries its measurement.
        Launch = 5 "launch",
        /// A virtual machine or device was reset.
        Reset = 6 "reset",
        /// A virtual machine ended.
        Shutdown = 7 "shutdown",
        /// A backend could not execute what the guest did.
        EmulationFailure = 8 "emulation-failure",
        /// A guest did what no driver of good will does.
        Misbehaviour = 9 "misbehaviour",
        /// A management verb is about to be carried out (without an outcome), or was (with one).
        Administration = 10 "administration",
        /// A policy came into force.
        PolicyLoaded = 11 "policy-loaded",
        /// Established traffic, for those who log it.
        Traffic = 12 "traffic",
        /// How many events of a source were counted and not written one by one.
        Coalesced = 32 "coalesced",
        /// The log was opened for writing.
        LogOpened = 33 "log-opened",
        /// The log was closed in the ordinary way.
        LogClosed = 34 "log-closed",
        /// What an interrupted writer left unacknowledged was cut off.
        Recovery = 35 "recovery",
        /// Segments past their time were removed.
        Retention = 36 "retention",
        /// The storage failed and works again.
        StorageFault = 37 "storage-fault",
        /// Nothing else happened.
        Heartbeat = 38 "heartbeat",
        /// A process that emits events connected.
        EmitterAttached = 39 "emitter-attached",
        /// It is gone.
        EmitterGone = 40 "emitter-gone",
        /// What an emitter sent is no event.
        Malformed = 41 "malformed",
    }
}

named! {
    /// What was asked for or done.
    Action {
        /// Make it.
        Create = 1 "create",
        /// Begin a connection.
        Connect = 2 "connect",
        /// Take connections.
        Accept = 3 "accept",
        /// Send to it.
        Send = 4 "send",
        /// See the memory.
        MapReadOnly = 5 "map-ro",
        /// See and change the memory.
        MapReadWrite = 6 "map-rw",
        /// Interrupt the other side.
        Notify = 7 "notify",
        /// Pass a right on.
        Delegate = 8 "delegate",
        /// Become part of it.
        Attach = 9 "attach",
        /// Take it out of the host.
        Export = 10 "export",
        /// Manage it.
        Administer = 11 "administer",
        /// Read it.
        Read = 12 "read",
        /// Write it.
        Write = 13 "write",
        /// Execute it: a hypercall, an instruction.
        Execute = 14 "execute",
    }
}

named! {
    /// What was decided.
    Verdict {
        /// No.
        Deny = 1 "deny",
        /// Yes.
        Allow = 2 "allow",
        /// Yes, so fast and no faster.
        Throttle = 3 "throttle",
        /// Cut off from the rest.
        Quarantine = 4 "quarantine",
        /// Elsewhere.
        Redirect = 5 "redirect",
        /// A person decides.
        Ask = 6 "ask",
    }
}

named! {
    /// How it ended.
    Outcome {
        /// Done.
        Success = 1 "success",
        /// Refused.
        Refused = 2 "refused",
        /// Tried, and failed.
        Failed = 3 "failed",
        /// The machine was paused for it.
        Paused = 4 "paused",
        /// The device asks for a reset for it.
        NeedsReset = 5 "needs-reset",
        /// The machine was ended for it.
        Killed = 6 "killed",
    }
}

named! {
    /// What kind of thing an object is.
    ObjectClass {
        /// A vsock port; `number` is the port (Virtio 1.3, 5.10).
        Vsock = 1 "vsock",
        /// A network or a flow in it.
        Network = 2 "network",
        /// Memory in common.
        Region = 3 "region",
        /// A doorbell or event channel.
        Doorbell = 4 "doorbell",
        /// What is behind a disk.
        Block = 5 "block",
        /// A file share.
        Share = 6 "share",
        /// A console.
        Console = 7 "console",
        /// A snapshot, or the target of a migration.
        Snapshot = 8 "snapshot",
        /// A management verb.
        Verb = 9 "verb",
        /// A hypercall; `number` is its number.
        Hypercall = 10 "hypercall",
        /// An I/O port; `number` is the port.
        Pio = 11 "pio",
        /// A guest-physical address.
        Mmio = 12 "mmio",
        /// A model-specific register.
        Msr = 13 "msr",
        /// A device.
        Device = 14 "device",
        /// A policy.
        Policy = 15 "policy",
        /// A virtual CPU; `number` is which.
        Vcpu = 16 "vcpu",
        /// A segment of the log, or a place in it.
        Log = 17 "log",
        /// A grant reference.
        Grant = 18 "grant",
    }
}

impl Kind {
    /// Whether an event of this kind, with this verdict, has its place in the reserved ring: what opens, refuses, takes back or
    /// manages, and what says something about the log.
    pub fn is_critical(self, verdict: Option<Verdict>) -> bool {
        match self {
            Self::Traffic => verdict.is_some_and(|verdict| verdict != Verdict::Allow),
            Self::Other(_) => false,
            _ => true,
        }
    }
}

//! Capabilities: structures of configuration space that say what a function can do (PCI 3.0, 6.7; PCIe 7.6).

/// Identifiers of capabilities that are of use here.
pub mod id {
    /// Vendor-specific (PCI 3.0, appendix H): the second byte of its body is up to the vendor.
    pub const VENDOR: u8 = 0x09;
    /// PCI Express (PCIe 7.5.3).
    pub const PCI_EXPRESS: u8 = 0x10;
    /// MSI-X (PCI 3.0, 6.8.2).
    pub const MSIX: u8 = 0x11;
}

/// Which list it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum List {
    /// That in the first 256 bytes, with an 8-bit identifier.
    Standard(u8),
    /// That of PCI Express behind them: identifier and version.
    Extended(u16, u8),
}

/// A capability to be: its contents and which of their bits the guest may write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    pub(super) list: List,
    pub(super) body: Vec<u8>,
    pub(super) writable: Vec<u8>,
    pub(super) cleared_by_one: Vec<u8>,
}

impl Capability {
    /// A capability in the first 256 bytes. `body` is what follows identifier and pointer, so it begins at offset 2.
    pub fn new(id: u8, body: impl Into<Vec<u8>>) -> Self {
        Self::of(List::Standard(id), body.into())
    }

    /// An extended capability of PCI Express. `body` follows its header, so it begins at offset 4. `version` has 4 bits.
    pub fn extended(id: u16, version: u8, body: impl Into<Vec<u8>>) -> Self {
        Self::of(List::Extended(id, version & 0xf), body.into())
    }

    fn of(list: List, body: Vec<u8>) -> Self {
        Self { list, body, writable: Vec::new(), cleared_by_one: Vec::new() }
    }

    /// The bits that the guest may write, as a mask of the body from its first byte on. What is not said is read-only.
    #[must_use]
    pub fn writable(mut self, mask: impl Into<Vec<u8>>) -> Self {
        self.writable = mask.into();
        self
    }

    /// The bits that the guest clears by writing ones, as a mask of the body.
    #[must_use]
    pub fn cleared_by_one(mut self, mask: impl Into<Vec<u8>>) -> Self {
        self.cleared_by_one = mask.into();
        self
    }

    /// Bytes before the body.
    pub(super) fn header(&self) -> usize {
        match self.list {
            List::Standard(_) => 2,
            List::Extended(..) => 4,
        }
    }

    /// Bytes that it takes, whole registers.
    pub(super) fn size(&self) -> usize {
        self.header().saturating_add(self.body.len()).next_multiple_of(4)
    }
}

/// Where a capability is, once it is there: the offset of its header in configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CapabilityOffset(pub(super) u16);

impl CapabilityOffset {
    /// The offset.
    pub const fn get(self) -> u16 {
        self.0
    }
}

/// The guest has written to a capability. The bits that it may write are as it wrote them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CapabilityWrite {
    /// Which one.
    pub capability: CapabilityOffset,
    /// The first byte written, counted from its header.
    pub offset: u16,
    /// How many bytes, 1 to 4.
    pub size: u16,
}

impl CapabilityWrite {
    /// Whether the byte at `offset` of `capability`, counted from its header, was written.
    pub fn reaches(self, capability: CapabilityOffset, offset: u16) -> bool {
        self.capability == capability && offset.checked_sub(self.offset).is_some_and(|into| into < self.size)
    }
}

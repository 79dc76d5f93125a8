//! [`Inbox`]: how other threads reach a local APIC. No call blocks; none allocates.
//!
//! # Orderings
//! A sender sets bits, then sets `posted` by a read-modify-write with `Release`; the receiver clears `posted`
//! by one with `Acquire`, then takes the bits. Say that a sender sets `posted` before the receiver clears it.
//! Then what the receiver reads comes from that sender or from one behind it; since all of them use
//! read-modify-writes, it belongs to the release sequence of the first, so the receiver sees the bits of both.
//! (With a plain store the second sender would cut the first one's sequence, and its bits could stay behind
//! with `posted` clear.) If a sender sets `posted` after the receiver cleared it, its bits are found by the
//! next call, or were found already, and then the next call finds nothing. So nothing is lost, and nothing is
//! taken twice.
//!
//! Waking the receiver is the caller's part: it posts, then kicks; see [`deliver`](super::deliver).
//!
//! The mirrored address is one word, so a sender never sees half a change. A sender may act on an address that
//! the receiver is about to change, as a message on a bus may arrive before or after. The owner publishes a
//! change before the guest's next instruction, so a guest that tells another vCPU about it through memory is
//! told in that order, provided that guest stores are ordered as x86 orders them.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

use super::base::Mode;
use super::low_byte;
use super::message::Destination;
use super::vectors::{Vectors, position};

const NMI: u32 = 1 << 0;
const INIT: u32 = 1 << 1;
const EXT_INT: u32 = 1 << 2;
const START_UP: u32 = 1 << 3;
const PAGE_SHIFT: u32 = 8;
const PAGE: u32 = 0xff << PAGE_SHIFT;

/// What arrived besides interrupts with a vector. INIT comes before the SIPI, if there are both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Events {
    /// INIT: [`LocalApic::init`](super::LocalApic::init) and the processor's own part of it.
    pub(crate) init: bool,
    /// SIPI with this page. Ignore it unless the vCPU waits for one.
    pub(crate) start_up: Option<u8>,
    /// A non-maskable interrupt.
    pub(crate) nmi: bool,
    /// An interrupt whose vector comes from the PIC.
    pub(crate) ext_int: bool,
}

impl Events {
    fn from_bits(bits: u32) -> Self {
        Self {
            init: bits & INIT != 0,
            start_up: (bits & START_UP != 0).then(|| low_byte(bits >> PAGE_SHIFT)),
            nmi: bits & NMI != 0,
            ext_int: bits & EXT_INT != 0,
        }
    }
}

/// Interrupts that arrived, by trigger mode. A vector in both is level-triggered: an I/O APIC waits for its EOI.
#[derive(Debug)]
pub(super) struct Interrupts {
    pub(super) edge: Vectors,
    pub(super) level: Vectors,
}

/// What decides whether a message is for a local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) mode: Mode,
    pub(super) software_enabled: bool,
    pub(super) xapic_id: u8,
    /// Bits 24 to 31 of LDR in xAPIC mode.
    pub(super) logical_id: u8,
    /// Bits 28 to 31 of DFR.
    pub(super) model: u8,
}

impl Address {
    /// Of a local APIC that is not there.
    const ABSENT: Self =
        Self { mode: Mode::Disabled, software_enabled: false, xapic_id: 0, logical_id: 0, model: 0xf };

    fn to_bits(self) -> u32 {
        let mode = match self.mode {
            Mode::Disabled => 0,
            Mode::Xapic => 1,
            Mode::X2apic => 2,
        };
        u32::from_le_bytes([
            self.xapic_id,
            self.logical_id,
            self.model,
            mode | u8::from(self.software_enabled) << 2,
        ])
    }

    fn from_bits(bits: u32) -> Self {
        let [xapic_id, logical_id, model, flags] = bits.to_le_bytes();
        let mode = match flags & 3 {
            0 => Mode::Disabled,
            1 => Mode::Xapic,
            _ => Mode::X2apic,
        };
        Self { mode, software_enabled: flags & 4 != 0, xapic_id, logical_id, model }
    }

    fn matches_physical(self, x2apic_id: u32, id: u32) -> bool {
        match self.mode {
            Mode::Disabled => false,
            Mode::Xapic => id == 0xff || id == u32::from(self.xapic_id) || id == u32::MAX,
            Mode::X2apic => id == x2apic_id || id == u32::MAX,
        }
    }

    /// Intel SDM 3A 12.6.2.2 and 12.12.10.2.
    fn matches_logical(self, x2apic_id: u32, id: u32) -> bool {
        match (self.mode, u8::try_from(id)) {
            (Mode::Disabled, _) => false,
            (_, Err(_)) if id == u32::MAX => true,
            (Mode::Xapic, Err(_)) => false,
            (Mode::Xapic, Ok(0xff)) => true,
            (Mode::Xapic, Ok(id)) => match self.model {
                0xf => id & self.logical_id != 0,
                0 => id >> 4 == self.logical_id >> 4 && id & self.logical_id & 0xf != 0,
                _ => false,
            },
            (Mode::X2apic, _) => {
                let own = logical_x2apic_id(x2apic_id);
                id >> 16 == own >> 16 && id & own & 0xffff != 0
            }
        }
    }
}

/// LDR in x2APIC mode: the cluster in bits 16 to 31, one of 16 bits in it (Intel SDM 3A 12.12.10.2).
pub(super) fn logical_x2apic_id(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 0xf)
}

/// What other threads have for a local APIC, and the address by which they find it. One exists for each vCPU
/// that a virtual machine may have, from its creation on; before its [`LocalApic`](super::LocalApic) exists, no
/// message matches.
#[derive(Debug)]
pub(crate) struct Inbox {
    x2apic_id: u32,
    address: AtomicU32,
    priority: AtomicU8,
    posted: AtomicBool,
    edge: [AtomicU32; 8],
    level: [AtomicU32; 8],
    events: AtomicU32,
}

impl Inbox {
    /// An empty inbox of the local APIC whose initial ID is `x2apic_id`.
    pub(crate) fn new(x2apic_id: u32) -> Self {
        Self {
            x2apic_id,
            address: AtomicU32::new(Address::ABSENT.to_bits()),
            priority: AtomicU8::new(0),
            posted: AtomicBool::new(false),
            edge: Default::default(),
            level: Default::default(),
            events: AtomicU32::new(0),
        }
    }

    /// The initial and x2APIC ID of the local APIC.
    pub(crate) fn x2apic_id(&self) -> u32 {
        self.x2apic_id
    }

    /// Whether there is something to [`drain`](super::LocalApic::drain). One load: cheap enough for every basic
    /// block.
    pub(crate) fn has_posted(&self) -> bool {
        // The read-modify-write of `take_events` orders; this only decides whether it is made.
        self.posted.load(Ordering::Relaxed)
    }

    /// Posts interrupt `vector`.
    #[allow(clippy::indexing_slicing, reason = "`position` returns less than 8")]
    pub(crate) fn post_interrupt(&self, vector: u8, level: bool) {
        let (index, bit) = position(vector);
        let words = if level { &self.level } else { &self.edge };
        words[index].fetch_or(bit, Ordering::Relaxed);
        self.announce();
    }

    /// Posts a non-maskable interrupt. Those that arrive before it is taken count as one, as they do on a
    /// processor.
    pub(crate) fn post_nmi(&self) {
        self.events.fetch_or(NMI, Ordering::Relaxed);
        self.announce();
    }

    /// Posts INIT. A SIPI that arrived before finds no processor that waits for one, so it is gone.
    pub(crate) fn post_init(&self) {
        self.update_events(|old| old & !(START_UP | PAGE) | INIT);
    }

    /// Posts SIPI. Of several the first one counts: it ends the wait for one.
    pub(crate) fn post_start_up(&self, page: u8) {
        self.update_events(|old| {
            if old & START_UP != 0 { old } else { old | START_UP | u32::from(page) << PAGE_SHIFT }
        });
    }

    /// Posts an interrupt whose vector comes from the PIC.
    pub(crate) fn post_ext_int(&self) {
        self.events.fetch_or(EXT_INT, Ordering::Relaxed);
        self.announce();
    }

    /// Takes the interrupts. Whoever wants the events too takes those first, so as to clear `posted`.
    pub(super) fn take_interrupts(&self) -> Interrupts {
        let take = |words: &[AtomicU32; 8]| {
            Vectors::from_words(words.each_ref().map(|word| {
                // Most are zero, and a load does not take the cache line away from senders.
                if word.load(Ordering::Relaxed) == 0 { 0 } else { word.swap(0, Ordering::Relaxed) }
            }))
        };
        Interrupts { edge: take(&self.edge), level: take(&self.level) }
    }

    /// Clears `posted` and takes the events.
    pub(super) fn take_events(&self) -> Events {
        self.posted.swap(false, Ordering::Acquire);
        Events::from_bits(self.events.swap(0, Ordering::Relaxed))
    }

    /// Publishes the address of the local APIC.
    pub(super) fn publish(&self, address: Address) {
        self.address.store(address.to_bits(), Ordering::Release);
    }

    /// Publishes its processor priority, a hint for lowest-priority delivery.
    pub(super) fn publish_priority(&self, priority: u8) {
        self.priority.store(priority, Ordering::Relaxed);
    }

    /// The published processor priority.
    pub(super) fn priority(&self) -> u8 {
        self.priority.load(Ordering::Relaxed)
    }

    /// The published address.
    pub(super) fn address(&self) -> Address {
        Address::from_bits(self.address.load(Ordering::Acquire))
    }

    /// Whether a message of any kind from `itself` (or another) to `destination` is for this local APIC, and
    /// whether it takes interrupts. One look at the address.
    pub(super) fn receives(&self, destination: Destination, itself: bool) -> Option<Receiver> {
        let address = self.address();
        let matches = match destination {
            Destination::Physical(id) => address.matches_physical(self.x2apic_id, id),
            Destination::Logical(id) => address.matches_logical(self.x2apic_id, id),
            Destination::Sender => itself,
            Destination::All => true,
            Destination::AllButSender => !itself,
        };
        (matches && address.mode != Mode::Disabled)
            .then_some(Receiver { takes_interrupts: address.software_enabled })
    }

    fn announce(&self) {
        self.posted.fetch_or(true, Ordering::Release);
    }

    fn update_events(&self, change: impl Fn(u32) -> u32) {
        let mut old = self.events.load(Ordering::Relaxed);
        while let Err(now) =
            self.events.compare_exchange_weak(old, change(old), Ordering::Relaxed, Ordering::Relaxed)
        {
            old = now;
        }
        self.announce();
    }
}

/// A local APIC that a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Receiver {
    /// Software-enabled. Otherwise just INIT, NMI, SMI and SIPI reach the processor (Intel SDM 3A 12.4.7.2).
    pub(super) takes_interrupts: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_fits_in_its_word() {
        for mode in [Mode::Disabled, Mode::Xapic, Mode::X2apic] {
            for software_enabled in [false, true] {
                let address =
                    Address { mode, software_enabled, xapic_id: 0xa5, logical_id: 0x5a, model: 0xf };
                assert_eq!(Address::from_bits(address.to_bits()), address);
            }
        }
    }

    #[test]
    fn sipi_waits_for_init_and_init_forgets_an_earlier_one() {
        let inbox = Inbox::new(0);
        inbox.post_start_up(0x11);
        inbox.post_init();
        assert_eq!(inbox.take_events(), Events { init: true, ..Events::default() });
        inbox.post_init();
        inbox.post_start_up(0x12);
        inbox.post_start_up(0x13);
        let expected = Events { init: true, start_up: Some(0x12), ..Events::default() };
        assert_eq!(inbox.take_events(), expected);
        assert_eq!(inbox.take_events(), Events::default());
    }

    #[test]
    fn every_kind_of_post_is_announced_and_taken_once() {
        type Post = fn(&Inbox);
        let posts: [(Post, Events); 4] = [
            (Inbox::post_nmi, Events { nmi: true, ..Events::default() }),
            (Inbox::post_init, Events { init: true, ..Events::default() }),
            (Inbox::post_ext_int, Events { ext_int: true, ..Events::default() }),
            (|inbox| inbox.post_start_up(0), Events { start_up: Some(0), ..Events::default() }),
        ];
        for (post, expected) in posts {
            let inbox = Inbox::new(0);
            assert!(!inbox.has_posted());
            post(&inbox);
            assert!(inbox.has_posted());
            assert_eq!(inbox.take_events(), expected);
            assert!(!inbox.has_posted());
        }
        let inbox = Inbox::new(0);
        inbox.post_interrupt(0x20, false);
        inbox.post_interrupt(0xff, true);
        assert!(inbox.has_posted());
        assert_eq!(inbox.take_events(), Events::default());
        let taken = inbox.take_interrupts();
        assert_eq!((taken.edge.highest(), taken.level.highest()), (Some(0x20), Some(0xff)));
        assert_eq!(inbox.take_interrupts().edge.highest(), None);
    }

    #[test]
    fn x2apic_clusters_hold_16() {
        assert_eq!(logical_x2apic_id(0), 1);
        assert_eq!(logical_x2apic_id(0x1f), 0x1_8000);
        assert_eq!(logical_x2apic_id(u32::MAX), 0xffff_8000);
    }
}

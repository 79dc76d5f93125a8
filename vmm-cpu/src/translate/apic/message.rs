//! Interrupt messages, as the interrupt command register sends them (Intel SDM 3A 12.6.1) and as devices write them
//! to memory (12.11).

use super::{halves, low_byte};
use crate::error::{Error, Result};
use crate::vm::MsiMessage;

/// Low halves of the addresses that reach local APICs (Intel SDM 3A 12.11.1).
const MSI_WINDOW: std::ops::RangeInclusive<u32> = 0xfee0_0000..=0xfeef_ffff;

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Destination {
    /// The APIC of this ID. All ones is everybody; so is 0xff to an APIC in xAPIC mode.
    Physical(u32),
    /// The APICs whose logical ID matches, by the rules of their mode.
    Logical(u32),
    /// The sender.
    Sender,
    /// Everybody.
    All,
    /// Everybody but the sender.
    AllButSender,
}

/// What a message does at its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// Interrupt `vector` at each destination.
    Fixed {
        /// Vector. One below 16 is an error at the destination.
        vector: u8,
        /// Level-triggered: its EOI is told to I/O APICs.
        level: bool,
    },
    /// Interrupt `vector` at that destination which runs at the lowest priority.
    LowestPriority {
        /// As in [`Delivery::Fixed`].
        vector: u8,
        /// As in [`Delivery::Fixed`].
        level: bool,
    },
    /// A system-management interrupt. It arrives and is dropped: there is no system-management mode.
    Smi,
    /// A non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// SIPI: a processor that waits for it starts in real mode at `page << 12`.
    StartUp {
        /// The page.
        page: u8,
    },
    /// An interrupt whose vector comes from the PIC.
    ExtInt,
}

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// Whom it is for.
    pub(crate) destination: Destination,
    /// What it does there.
    pub(crate) delivery: Delivery,
}

/// Fields that interrupt command register and message data have in common.
struct Fields(u32);

impl Fields {
    fn vector(&self) -> u8 {
        low_byte(self.0)
    }

    fn delivery_mode(&self) -> u32 {
        self.0 >> 8 & 7
    }

    fn asserted(&self) -> bool {
        self.0 & 1 << 14 != 0
    }

    fn level_triggered(&self) -> bool {
        self.0 & 1 << 15 != 0
    }

    /// INIT, unless this is "INIT level de-assert", which set arbitration IDs on the processors before the
    /// Pentium 4 and does nothing since.
    fn init(&self) -> Option<Delivery> {
        (self.asserted() || !self.level_triggered()).then_some(Delivery::Init)
    }
}

impl Message {
    /// The message that `low` of the interrupt command register sends to `destination`, 8 bits wide in xAPIC mode;
    /// `None` for reserved delivery modes and the combinations of Intel SDM 3A table 12-4 that do not exist.
    pub(super) fn from_command(low: u32, destination: u32) -> Option<Self> {
        let fields = Fields(low);
        let destination = match (low >> 18 & 3, low & 1 << 11 != 0) {
            (0, false) => Destination::Physical(destination),
            (0, true) => Destination::Logical(destination),
            (1, _) => Destination::Sender,
            (2, _) => Destination::All,
            _ => Destination::AllButSender,
        };
        // Whatever the trigger mode says: between processors it is edge.
        let (vector, level) = (fields.vector(), false);
        let delivery = match fields.delivery_mode() {
            0 => Delivery::Fixed { vector, level },
            1 => Delivery::LowestPriority { vector, level },
            2 => Delivery::Smi,
            4 => Delivery::Nmi,
            5 => fields.init()?,
            6 => Delivery::StartUp { page: vector },
            _ => return None,
        };
        let includes_sender = matches!(destination, Destination::Sender | Destination::All);
        let starts = matches!(delivery, Delivery::Init | Delivery::StartUp { .. });
        (!(includes_sender && starts)).then_some(Self { destination, delivery })
    }

    /// The message that a device writes; `None` for delivery modes that are reserved.
    ///
    /// With bits 8 to 31 of the address's high half, the destination has 32 bits (as [`MsiMessage`] says). The
    /// level bit of the data is looked at for INIT only: I/O APICs differ in whether they set it, and one that
    /// has nothing to assert sends nothing.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] as at [`MsiSink::send`](crate::MsiSink::send).
    pub(crate) fn from_msi(message: MsiMessage) -> Result<Option<Self>> {
        let (low, high) = halves(message.address);
        if !MSI_WINDOW.contains(&low) || high & 0xff != 0 {
            return Err(Error::invalid(
                "MSI address",
                format_args!("{:#x}", message.address),
                format_args!(
                    "{:#x} to {:#x}, with bits 8 to 31 of a destination in bits 40 to 63",
                    MSI_WINDOW.start(),
                    MSI_WINDOW.end()
                ),
            ));
        }
        let id = high | low >> 12 & 0xff;
        let (logical, redirected) = (low & 1 << 2 != 0, low & 1 << 3 != 0);
        let destination = if logical { Destination::Logical(id) } else { Destination::Physical(id) };
        let fields = Fields(message.data);
        let (vector, level) = (fields.vector(), fields.level_triggered());
        let delivery = match fields.delivery_mode() {
            0 if redirected => Delivery::LowestPriority { vector, level },
            0 => Delivery::Fixed { vector, level },
            1 => Delivery::LowestPriority { vector, level },
            2 => Delivery::Smi,
            4 => Delivery::Nmi,
            5 => match fields.init() {
                Some(init) => init,
                None => return Ok(None),
            },
            7 => Delivery::ExtInt,
            _ => return Ok(None),
        };
        Ok(Some(Self { destination, delivery }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msi(address: u64, data: u32) -> Option<Message> {
        Message::from_msi(MsiMessage { address, data }).expect("the address is one of a local APIC")
    }

    #[test]
    fn commands_have_every_mode_and_shorthand() {
        let modes = [
            Some(Delivery::Fixed { vector: 0x31, level: false }),
            Some(Delivery::LowestPriority { vector: 0x31, level: false }),
            Some(Delivery::Smi),
            None,
            Some(Delivery::Nmi),
            Some(Delivery::Init),
            Some(Delivery::StartUp { page: 0x31 }),
            None,
        ];
        let destinations = [
            (0, Destination::Physical(7)),
            (1 << 11, Destination::Logical(7)),
            (1 << 18, Destination::Sender),
            (2 << 18 | 1 << 11, Destination::All),
            (3 << 18, Destination::AllButSender),
        ];
        for (mode, delivery) in (0..).zip(modes) {
            for (bits, destination) in destinations {
                // Level-triggered and asserted: sent as edge all the same.
                let sent = Message::from_command(bits | mode << 8 | 0xc031, 7);
                let exists =
                    !(matches!(destination, Destination::Sender | Destination::All) && matches!(mode, 5 | 6));
                let expected = delivery.filter(|_| exists).map(|delivery| Message { destination, delivery });
                assert_eq!(sent, expected, "mode {mode} to {destination:?}");
            }
        }
    }

    #[test]
    fn init_level_deassert_is_nothing() {
        assert_eq!(Message::from_command(0x8500, 1), None);
        for low in [0x500, 0x4500, 0xc500] {
            assert!(Message::from_command(low, 1).is_some(), "{low:#x}");
        }
        assert_eq!(msi(0xfee0_1000, 0x8500), None);
        assert!(msi(0xfee0_1000, 0x500).is_some());
    }

    #[test]
    fn msi_destinations_are_8_or_32_bits_wide() {
        let destination = |address| msi(address, 0x40).map(|message| message.destination);
        assert_eq!(destination(0xfee0_0000), Some(Destination::Physical(0)));
        assert_eq!(destination(0xfeef_f000), Some(Destination::Physical(0xff)));
        assert_eq!(destination(0xfee0_3004), Some(Destination::Logical(3)));
        assert_eq!(destination(0x1234_5600_fee7_8000), Some(Destination::Physical(0x1234_5678)));
        assert_eq!(destination(0xffff_ff00_feef_f004), Some(Destination::Logical(u32::MAX)));
    }

    #[test]
    fn msi_delivery_modes_and_redirection() {
        let (vector, level) = (0x41, false);
        let modes = [
            Some(Delivery::Fixed { vector, level }),
            Some(Delivery::LowestPriority { vector, level }),
            Some(Delivery::Smi),
            None,
            Some(Delivery::Nmi),
            Some(Delivery::Init),
            None,
            Some(Delivery::ExtInt),
        ];
        for (mode, delivery) in (0..).zip(modes) {
            assert_eq!(msi(0xfee0_0000, mode << 8 | 0x41).map(|m| m.delivery), delivery, "mode {mode}");
        }
        assert_eq!(
            msi(0xfee0_000c, 0x41).map(|m| m.delivery),
            Some(Delivery::LowestPriority { vector, level })
        );
        for data in [0x8041, 0xc041] {
            let delivery = msi(0xfee0_0000, data).map(|m| m.delivery);
            assert_eq!(delivery, Some(Delivery::Fixed { vector, level: true }), "{data:#x}");
        }
    }

    #[test]
    fn addresses_of_no_local_apic_are_refused() {
        for address in [0, 0xfedf_ffff, 0xfef0_0000, 1 << 32 | 0xfee0_0000, 1 << 39 | 0xfee0_0000, 1 << 40] {
            let error = Message::from_msi(MsiMessage { address, data: 0x41 }).expect_err("not in the window");
            assert!(error.to_string().contains(&format!("{address:#x}")), "{error}");
        }
    }
}

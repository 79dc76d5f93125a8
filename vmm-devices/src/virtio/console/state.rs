//! What a console is beside its queues (see [`crate::virtio::VirtioState`]).

use std::sync::atomic::Ordering;

use super::Console;
use super::shared::Shared;
use crate::error::StateError;
use crate::interrupt::lock;
use crate::virtio::state::DeviceState;

const DEVICE: &str = "console";

/// A console's ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConsoleState {
    /// The driver wants to hear of ports (DEVICE_READY, 5.3.6.2).
    pub listening: bool,
    /// Each place for a port.
    pub places: Vec<ConsolePlaceState>,
}

/// A place for a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConsolePlaceState {
    /// The port that is there.
    pub port: Option<ConsolePortState>,
    /// What the driver was told.
    pub told: ConsoleTold,
    /// The head of the chain whose output is on its way, and how many bytes of that were written.
    pub sent: Option<(u16, u64)>,
}

/// A port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConsolePortState {
    /// It is a console.
    pub console: bool,
    /// Its name.
    pub name: Option<String>,
    /// Columns and rows.
    pub size: Option<(u16, u16)>,
    /// Somebody in the guest has it open.
    pub guest_open: bool,
    /// Input that the guest has not got.
    pub input: Vec<u8>,
}

/// What a driver knows of a place, and what it is still to be told (5.3.6.2).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConsoleTold {
    /// A port that is no more was announced.
    pub removal_due: bool,
    /// The port was announced.
    pub added: bool,
    /// The driver can serve it.
    pub ready: bool,
    /// It is to hear that the port is a console.
    pub console_due: bool,
    /// It is to hear of the size.
    pub size_due: bool,
    /// It is to hear of the name.
    pub name_due: bool,
    /// Whether the driver takes our side for open.
    pub open: bool,
    /// It was otherwise meanwhile: a program that waits for the end of a conversation must not miss it.
    pub blinked: bool,
}

impl Console {
    pub(super) fn saved(&self) -> ConsoleState {
        if let Some(state) = &self.resumed {
            let mut state = state.clone();
            for ((_, slot), place) in self.shared.slots().zip(&mut state.places) {
                if let Some((own, saved)) = lock(slot).port.as_ref().zip(place.port.as_mut()) {
                    saved.input.extend(own.waiting_input());
                }
            }
            return state;
        }
        let places = self.shared.slots().map(|(_, slot)| {
            let slot = lock(slot);
            let port = slot.port.as_ref().map(|port| ConsolePortState {
                console: port.console,
                name: port.name.clone(),
                size: slot.size,
                guest_open: port.guest_open.load(Ordering::SeqCst),
                input: port.waiting_input(),
            });
            ConsolePlaceState { port, told: slot.told.clone(), sent: slot.sent }
        });
        ConsoleState { listening: self.shared.listening.load(Ordering::SeqCst), places: places.collect() }
    }

    /// Checks a state, which counts from the activation on.
    pub(super) fn take_over(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Console(state) = state else { return Err(state.of_another(DEVICE)) };
        let check =
            |valid, field, value: u64, allowed| StateError::check(valid, DEVICE, field, value, allowed);
        let places = state.places.len() as u64;
        check(places == u64::from(self.shared.ports()), "places", places, "those of the device")?;
        for ((id, slot), place) in self.shared.slots().zip(&state.places) {
            let slot = lock(slot);
            let id = u64::from(id);
            let same = match (&slot.port, &place.port) {
                (Some(own), Some(saved)) => own.console == saved.console && own.name == saved.name,
                (None, None) => true,
                _ => false,
            };
            check(same, "port", id, "those that are there, each console or not, and of its name")?;
            let fits = slot.port.as_ref().zip(place.port.as_ref());
            let fits = fits.is_none_or(|(own, saved)| saved.input.len() <= own.input_capacity());
            let len = place.port.as_ref().map_or(0, |port| port.input.len() as u64);
            check(fits, "length of input", len, "the port's capacity, or less")?;
        }
        self.resumed = Some(state.clone());
        Ok(())
    }

    /// The driver is gone, and input waits for the next one.
    pub(super) fn forget_driver(&mut self) {
        for place in self.resumed.iter_mut().flat_map(|state| &mut state.places) {
            (place.told, place.sent) = (ConsoleTold::default(), None);
            if let Some(port) = &mut place.port {
                port.guest_open = false;
            }
        }
        if let Some(state) = &mut self.resumed {
            state.listening = false;
        }
    }
}

impl Shared {
    /// Everything is as that says, in places that were looked at.
    pub(super) fn go_on(&self, state: ConsoleState) {
        self.listening.store(state.listening, Ordering::SeqCst);
        for ((_, slot), place) in self.slots().zip(state.places) {
            let ConsolePlaceState { port: saved, told, sent } = place;
            let mut slot = lock(slot);
            (slot.told, slot.sent) = (told, sent);
            let Some((port, saved)) = slot.port.clone().zip(saved) else {
                // The port has gone since the state was looked at, or has come.
                slot.told.removal_due |= std::mem::take(&mut slot.told.added);
                continue;
            };
            slot.told.size_due |= slot.told.ready && port.console && slot.size != saved.size;
            drop(slot);
            port.put_input_back(&saved.input);
            if saved.guest_open && !port.guest_open.swap(true, Ordering::SeqCst) {
                port.tell_guest_open(true);
            }
        }
    }
}

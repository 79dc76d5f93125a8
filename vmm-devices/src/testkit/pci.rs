//! The driver's side of PCI.

use std::sync::{Arc, Mutex};

use super::driver::Driver;
use super::recorder::MsiRecorder;
use crate::interrupt::lock;
use crate::pci::PciFunction;
use crate::virtio::{DeviceMemory, VirtioDevice, VirtioPci, VirtioPciError};

/// Identifiers of capabilities (PCI 3.0, appendix H).
const VENDOR: u8 = 9;
const MSIX: u8 = 0x11;
/// Structures (4.1.4).
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const ISR: u8 = 3;
const DEVICE: u8 = 4;
/// In the order of [`PciDriver::read`].
const STRUCTURES: [u8; 4] = [COMMON, ISR, DEVICE, NOTIFY];

/// A function that is none of virtio, or not a whole one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the function has no capability for structure {kind} of Virtio 1.3, 4.1.4; drivers need 1 to 4")]
pub struct MissingStructure {
    /// The type of the structure.
    pub kind: u8,
}

/// A driver of a device on PCI (4.1), which finds its structures as the capabilities say.
pub struct PciDriver {
    function: Arc<Mutex<dyn PciFunction>>,
    /// BAR and offset of the common configuration, ISR status, device configuration and doorbells.
    structures: [(usize, u64); 4],
    /// Bytes from one doorbell to the next.
    multiplier: u64,
}

impl std::fmt::Debug for PciDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciDriver").field("structures", &self.structures).finish_non_exhaustive()
    }
}

impl PciDriver {
    /// Makes `device` a PCI function, served inline, and drives it; and what gets its messages, once they are
    /// [turned on](Self::enable_messages).
    ///
    /// # Errors
    /// As [`VirtioPci::new`].
    pub fn of<M: DeviceMemory>(
        device: impl VirtioDevice<M> + 'static,
        memory: &M,
    ) -> Result<(Self, MsiRecorder), VirtioPciError> {
        let messages = MsiRecorder::default();
        let function = VirtioPci::new(device, memory.clone(), messages.clone())?;
        // It has all structures.
        Ok((Self::find(Arc::new(Mutex::new(function))).0, messages))
    }

    /// Drives `function`, a [`VirtioPci`] as a rule. It may access memory from now on.
    ///
    /// # Errors
    /// If it lacks a structure that drivers need.
    pub fn new(function: Arc<Mutex<dyn PciFunction>>) -> Result<Self, MissingStructure> {
        let (driver, missing) = Self::find(function);
        missing.map_or(Ok(driver), |kind| Err(MissingStructure { kind }))
    }

    /// Also the first structure that is missing.
    fn find(function: Arc<Mutex<dyn PciFunction>>) -> (Self, Option<u8>) {
        let mut driver = Self { function, structures: [(0, 0); 4], multiplier: 0 };
        let mut missing = STRUCTURES.to_vec();
        let mut at = u16::from(driver.config_byte(0x34));
        // The list has no room for more.
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            let body = |offset| driver.config_word(at + offset);
            let [id, next, _, kind] = body(0).to_le_bytes();
            let [bar, ..] = body(4).to_le_bytes();
            let place = (usize::from(bar), u64::from(body(8)));
            let multiplier = u64::from(body(16));
            at = next.into();
            // Of several, the first is the one to use (4.1.4.1).
            let Some(which) = missing.iter().position(|wanted| (id, kind) == (VENDOR, *wanted)) else {
                continue;
            };
            missing.remove(which);
            let index = STRUCTURES.iter().position(|structure| *structure == kind).unwrap_or(0);
            if let Some(structure) = driver.structures.get_mut(index) {
                *structure = place;
            }
            if kind == NOTIFY {
                driver.multiplier = multiplier;
            }
        }
        // Memory and bus master.
        driver.write_config_space(4, &6_u16.to_le_bytes());
        (driver, missing.first().copied())
    }

    /// Turns MSI-X on, with a vector for the configuration and one for each queue: their messages have address
    /// 0xfee0_0000 and data 0, 1 for queue 0, and so on. After [`Driver::start`], which forgets the vectors of queues. `false` if
    /// the function has no MSI-X.
    pub fn enable_messages(&self) -> bool {
        let Some(at) = self.capability(MSIX) else { return false };
        let [_, _, low, high] = self.config_word(at).to_le_bytes();
        let place = self.config_word(at + 4);
        let (bar, table) = ((place & 7) as usize, u64::from(place & !7));
        for vector in 0..=u32::from(u16::from_le_bytes([low, high]) & 0x7ff) {
            for (register, value) in (0..).zip([0xfee0_0000_u32, 0, vector, 0]) {
                let offset = table + 16 * u64::from(vector) + 4 * register;
                lock(&self.function).bar_write(bar, offset, &value.to_le_bytes());
            }
        }
        self.write_config_space(at + 2, &0x8000_u16.to_le_bytes());
        self.write(0, 0x10, &0_u16.to_le_bytes());
        for queue in 0..u16::from_le_bytes(self.common(0x12)) {
            self.write(0, 0x16, &queue.to_le_bytes());
            self.write(0, 0x1a, &(queue + 1).to_le_bytes());
        }
        true
    }

    /// Where the first capability of an identifier is.
    fn capability(&self, wanted: u8) -> Option<u16> {
        let first = u16::from(self.config_byte(0x34));
        let next = |at: &u16| Some(u16::from(self.config_byte(at + 1)));
        let mut list = std::iter::successors(Some(first), next).take(48).take_while(|at| *at != 0);
        list.find(|at| self.config_byte(*at) == wanted)
    }

    /// Reads configuration space.
    pub fn read_config_space(&self, offset: u16, data: &mut [u8]) {
        lock(&self.function).read_config(offset, data);
    }

    /// Writes configuration space.
    pub fn write_config_space(&self, offset: u16, data: &[u8]) {
        lock(&self.function).write_config(offset, data);
    }

    fn config_byte(&self, offset: u16) -> u8 {
        let mut byte = [0];
        self.read_config_space(offset, &mut byte);
        byte[0]
    }

    fn config_word(&self, offset: u16) -> u32 {
        let mut word = [0; 4];
        self.read_config_space(offset, &mut word);
        u32::from_le_bytes(word)
    }

    /// Reads at `offset` of a structure: 0 for the common configuration, 1 for the ISR status, 2 for the device's
    /// configuration, 3 for the doorbells.
    pub fn read(&self, structure: usize, offset: u64, data: &mut [u8]) {
        if let Some((bar, base)) = self.structures.get(structure) {
            lock(&self.function).bar_read(*bar, base + offset, data);
        }
    }

    /// Writes there.
    pub fn write(&self, structure: usize, offset: u64, data: &[u8]) {
        if let Some((bar, base)) = self.structures.get(structure) {
            lock(&self.function).bar_write(*bar, base + offset, data);
        }
    }

    /// The causes of the interrupt by pin: 1 for used buffers, 2 for the configuration. Reading lets go of the pin.
    pub fn take_interrupt_status(&self) -> u8 {
        let mut status = [0];
        self.read(1, 0, &mut status);
        status[0]
    }

    fn common<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.read(0, offset, &mut data);
        data
    }
}

impl Driver for PciDriver {
    fn status(&self) -> u8 {
        let [status] = self.common(0x14);
        status
    }

    fn set_status(&self, status: u8) {
        self.write(0, 0x14, &[status]);
    }

    fn device_features(&self) -> u64 {
        let [low, high] = [0_u32, 1].map(|half| {
            self.write(0, 0, &half.to_le_bytes());
            u64::from(u32::from_le_bytes(self.common(4)))
        });
        high << 32 | low
    }

    fn set_driver_features(&self, features: u64) {
        let [a, b, c, d, e, f, g, h] = features.to_le_bytes();
        for (half, word) in (0_u32..).zip([[a, b, c, d], [e, f, g, h]]) {
            self.write(0, 8, &half.to_le_bytes());
            self.write(0, 0xc, &word);
        }
    }

    fn queue_max_size(&self, index: u16) -> u16 {
        self.write(0, 0x16, &index.to_le_bytes());
        u16::from_le_bytes(self.common(0x18))
    }

    fn set_queue(&self, index: u16, size: u16, rings: [u64; 3]) {
        self.write(0, 0x16, &index.to_le_bytes());
        self.write(0, 0x18, &size.to_le_bytes());
        for (register, address) in [0x20, 0x28, 0x30].into_iter().zip(rings) {
            let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
            self.write(0, register, &[a, b, c, d]);
            self.write(0, register + 4, &[e, f, g, h]);
        }
    }

    fn enable_queue(&self, index: u16) {
        self.write(0, 0x16, &index.to_le_bytes());
        self.write(0, 0x1c, &1_u16.to_le_bytes());
    }

    fn notify(&self, index: u16) {
        self.write(0, 0x16, &index.to_le_bytes());
        let place = u64::from(u16::from_le_bytes(self.common(0x1e)));
        self.write(3, place * self.multiplier, &index.to_le_bytes());
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.read(2, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        self.write(2, offset, data);
    }

    fn config_generation(&self) -> u32 {
        let [generation] = self.common(0x15);
        generation.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{Bar, Capability, ConfigBuilder, ConfigSpace, Identity, capability};
    use crate::testkit::{DriverQueue, guest_memory};
    use crate::virtio::Rng;

    #[test]
    fn each_queue_has_its_message() {
        let memory = guest_memory(1 << 20).unwrap();
        let (driver, messages) = PciDriver::of(Rng::new(std::io::repeat(7)), &memory).unwrap();
        let mut queue = DriverQueue::new(memory, 0x1000, 8).unwrap();
        driver.start(0, &[(0, &queue)]).unwrap();
        assert!(driver.enable_messages());
        queue.chain().writable(0x8000, 5).submit().unwrap();
        driver.notify(0);
        assert_eq!((messages.take(), driver.take_interrupt_status()), (vec![(0xfee0_0000, 1)], 0));
        assert_eq!(queue.get(0x8000, 6).unwrap(), [7, 7, 7, 7, 7, 0]);
    }

    /// A function of nothing but capabilities.
    struct Listed(ConfigSpace, Vec<u64>);

    impl PciFunction for Listed {
        fn config(&self) -> &ConfigSpace {
            &self.0
        }

        fn config_mut(&mut self) -> &mut ConfigSpace {
            &mut self.0
        }

        fn bar_read(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
            self.1.push(offset);
            data.fill(0);
        }

        fn bar_write(&mut self, _bar: usize, _offset: u64, _data: &[u8]) {}
    }

    fn listed(kinds: &[u8]) -> Arc<Mutex<Listed>> {
        let mut config = ConfigBuilder::new(Identity::new(0x1af4, 0x1042, [0xff, 0, 0]));
        config.bar(0, Bar::memory32(0x8000)).unwrap();
        for (at, kind) in (1..).zip(kinds) {
            let body = [16, *kind, 0, 0, 0, 0, 0, at, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
            config.capability(Capability::new(capability::id::VENDOR, body)).unwrap();
        }
        Arc::new(Mutex::new(Listed(config.build(), Vec::new())))
    }

    #[test]
    fn the_first_structure_of_a_type_is_used_and_none_may_be_missing() {
        for missing in STRUCTURES {
            let mut kinds = STRUCTURES.to_vec();
            kinds.retain(|kind| *kind != missing);
            // Another one of a type that is there makes it no better.
            kinds.push(kinds[0]);
            assert_eq!(PciDriver::new(listed(&kinds)).unwrap_err(), MissingStructure { kind: missing });
        }
        // The list begins with what was added last, or first: whichever it is, one of the two at its ends.
        let function = listed(&[COMMON, ISR, DEVICE, NOTIFY, COMMON]);
        let driver = PciDriver::new(function.clone()).unwrap();
        assert!(!driver.enable_messages());
        let mut first = [0];
        driver.read_config_space(0x34, &mut first);
        let mut offset = [0; 4];
        driver.read_config_space(u16::from(first[0]) + 8, &mut offset);
        driver.status();
        assert_eq!(lock(&function).1, [u64::from(u32::from_le_bytes(offset)) + 0x14]);
    }
}

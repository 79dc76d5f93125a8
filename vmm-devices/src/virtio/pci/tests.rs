use std::sync::Mutex;

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

use super::*;
use crate::interrupt::lock;
use crate::testkit::{Driver, DriverQueue, Memory, PciDriver, guest_memory};
use crate::virtio::Rng;

type Messages = Arc<Mutex<Vec<(u64, u32)>>>;

struct Test {
    driver: PciDriver,
    function: Arc<Mutex<VirtioPci<Memory>>>,
    messages: Messages,
    memory: Memory,
}

fn test() -> Test {
    let memory = guest_memory(1 << 20).unwrap();
    let messages = Messages::default();
    let sent = Arc::clone(&messages);
    let sink = move |address: u64, data: u32| lock(&sent).push((address, data));
    let function = VirtioPci::new(Rng::new(std::io::repeat(7)), memory.clone(), sink).unwrap();
    let function = Arc::new(Mutex::new(function));
    let driver = PciDriver::new(function.clone()).unwrap();
    Test { driver, function, messages, memory }
}

/// Where the capability of an identifier is.
fn capability_at(driver: &PciDriver, wanted: u8, kind: Option<u8>) -> u16 {
    let mut header = [0; 4];
    let mut at = [0];
    driver.read_config_space(0x34, &mut at);
    while at[0] != 0 {
        driver.read_config_space(at[0].into(), &mut header);
        if header[0] == wanted && kind.is_none_or(|kind| header[3] == kind) {
            return at[0].into();
        }
        at[0] = header[1];
    }
    panic!("no capability {wanted:#x}");
}

impl Test {
    fn queue(&self) -> DriverQueue<Memory> {
        DriverQueue::new(self.memory.clone(), 0x1000, 8).unwrap()
    }

    /// Turns MSI-X on, with vector `n` having address 0xfee00000 and data `n`, not masked.
    fn enable_msix(&self) {
        for vector in 0..2_u64 {
            let entry = [0xfee0_0000_u32, 0, u32::try_from(vector).unwrap(), 0];
            for (register, value) in (0..).zip(entry) {
                let offset = place::MSIX_TABLE + vector * 16 + register * 4;
                lock(&self.function).bar_write(BAR, offset, &value.to_le_bytes());
            }
        }
        let at = capability_at(&self.driver, 0x11, None);
        self.driver.write_config_space(at + 2, &0x8000_u16.to_le_bytes());
    }

    fn set_vectors(&self, config: u16, queue: u16) {
        self.driver.write(0, 0x10, &config.to_le_bytes());
        self.driver.write(0, 0x16, &0_u16.to_le_bytes());
        self.driver.write(0, 0x1a, &queue.to_le_bytes());
    }
}

#[test]
fn drivers_know_it_by_its_identity() {
    let t = test();
    let word = |offset| {
        let mut word = [0; 4];
        t.driver.read_config_space(offset, &mut word);
        u32::from_le_bytes(word)
    };
    assert_eq!(word(0), 0x1044_1af4);
    assert_eq!(word(8), 0xff00_0001);
    assert_eq!(word(0x2c), 0x1100_1af4);
    let mut queues = [0; 2];
    t.driver.read(0, 0x12, &mut queues);
    assert_eq!(u16::from_le_bytes(queues), 1);
    assert_eq!([0, 1, 0xffff].map(|queue| t.driver.queue_max_size(queue)), [64, 0, 0]);
}

#[test]
fn a_device_works_with_its_pin() {
    let t = test();
    let mut queue = t.queue();
    t.driver.start(0, &[(0, &queue)]).unwrap();
    let head = queue.chain().writable(0x8000, 5).submit().unwrap();
    t.driver.notify(0);
    assert_eq!(queue.take_used().unwrap(), Some((head.into(), 5)));
    let pin = lock(&t.function).config().intx().unwrap().clone();
    assert!(pin.is_asserted());
    assert_eq!((t.driver.take_interrupt_status(), pin.is_asserted()), (1, false));
    assert_eq!(t.driver.take_interrupt_status(), 0);
    let mut bytes = [0; 6];
    t.memory.memory().read_slice(&mut bytes, GuestAddress(0x8000)).unwrap();
    assert_eq!(bytes, [7, 7, 7, 7, 7, 0]);
    assert!(lock(&t.messages).is_empty());
}

#[test]
fn a_device_works_with_messages() {
    let t = test();
    let mut queue = t.queue();
    t.enable_msix();
    t.driver.start(0, &[(0, &queue)]).unwrap();
    t.set_vectors(0, 1);
    queue.chain().writable(0x8000, 5).submit().unwrap();
    t.driver.notify(0);
    assert_eq!(*lock(&t.messages), [(0xfee0_0000, 1)]);
    assert!(!lock(&t.function).config().intx().unwrap().is_asserted());
    // A reset forgets them, so nothing is sent until they are chosen again.
    t.driver.start(0, &[(0, &t.queue())]).unwrap();
    let mut queue = t.queue();
    queue.chain().writable(0x8000, 5).submit().unwrap();
    t.driver.notify(0);
    assert_eq!(lock(&t.messages).len(), 1);
}

/// What the driver chooses and cannot have reads back as none (4.1.5.1.2.1).
#[test]
fn vectors_are_as_many_as_there_are() {
    let t = test();
    t.set_vectors(1, 2);
    let read = |offset| {
        let mut vector = [0; 2];
        t.driver.read(0, offset, &mut vector);
        u16::from_le_bytes(vector)
    };
    assert_eq!((read(0x10), read(0x1a)), (1, 0xffff));
}

/// VIRTIO_PCI_CAP_PCI_CFG: the BAR by way of configuration space.
#[test]
fn the_window_of_configuration_space_reaches_the_bar() {
    let t = test();
    let at = capability_at(&t.driver, 9, Some(5));
    let mut data = [0; 4];
    let mut look = |bar: u8, offset: u32, length: u32| {
        t.driver.write_config_space(at + 4, &[bar]);
        t.driver.write_config_space(at + 8, &offset.to_le_bytes());
        t.driver.write_config_space(at + 12, &length.to_le_bytes());
        let len = usize::try_from(length).unwrap().clamp(1, 4);
        data.fill(0xee);
        t.driver.read_config_space(at + 16, &mut data[..len]);
        data
    };
    assert_eq!(look(0, 0x12, 2)[..2], [1, 0], "number of queues");
    t.driver.set_status(3);
    assert_eq!(look(0, 0x14, 1)[0], 3, "status");
    // The length that was set up counts, not the width of the access: what is behind stays as it was.
    look(0, 0, 0);
    t.driver.write_config_space(at + 16, &[0x55; 4]);
    t.driver.write_config_space(at + 8, &0x14_u32.to_le_bytes());
    t.driver.write_config_space(at + 12, &1_u32.to_le_bytes());
    let mut word = [0; 4];
    t.driver.read_config_space(at + 16, &mut word);
    assert_eq!(word, [3, 0x55, 0x55, 0x55]);
    t.driver.write_config_space(at + 16, &[0x83, 0, 0, 0]);
    assert_eq!(t.driver.status(), 0x83, "a narrow write by a wide one");
    t.driver.write_config_space(at + 17, &[0]);
    assert_eq!(t.driver.status(), 0x83, "data behind the first byte is no access yet");
    // BARs, lengths and offsets that cannot be read what is in the register.
    for (bar, offset, length) in [(1, 0, 4), (0xff, 0, 4), (0, 2, 4), (0, 0, 3), (0, u32::MAX, 4), (0, 0, 0)]
    {
        look(bar, offset, length);
    }
    t.driver.write_config_space(at + 4, &[0]);
    t.driver.write_config_space(at + 8, &0x14_u32.to_le_bytes());
    t.driver.write_config_space(at + 12, &1_u32.to_le_bytes());
    t.driver.write_config_space(at + 16, &[0]);
    assert_eq!(t.driver.status(), 0, "a reset by way of it");
}

/// crosvm 002cd87a0: every offset of the BAR, with each size, in every state.
#[test]
fn crosvm_002cd87a0_the_whole_bar_can_be_swept() {
    let t = test();
    for started in [false, true] {
        if started {
            t.driver.start(0, &[(0, &t.queue())]).unwrap();
        }
        for len in [1, 2, 4, 8] {
            for offset in (0..BAR_SIZE + 16).step_by(if len == 1 { 1 } else { 2 }) {
                let mut data = vec![0; len];
                let mut function = lock(&t.function);
                function.bar_read(BAR, offset, &mut data);
                function.bar_read(BAR + 1, offset, &mut data);
                // Not the status: it would start or end things.
                if !(0x10..0x18).contains(&offset) {
                    function.bar_write(BAR, offset, &vec![0xff; len]);
                }
            }
        }
    }
    assert_eq!(t.driver.status() & 0x40, 0);
    t.driver.start(0, &[(0, &t.queue())]).unwrap();
}

#[test]
fn more_queues_than_doorbells_are_refused() {
    struct Many(Vec<u16>);
    impl VirtioDevice<Memory> for Many {
        fn device_type(&self) -> DeviceType {
            DeviceType::CONSOLE
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_sizes(&self) -> &[u16] {
            &self.0
        }
        fn activate(
            &mut self,
            _: crate::virtio::Activation<Memory>,
        ) -> Result<Vec<Box<dyn crate::virtio::Worker>>, crate::virtio::ActivateError> {
            Ok(Vec::new())
        }
    }
    let memory = guest_memory(4096).unwrap();
    let make = |queues| VirtioPci::new(Many(vec![2; queues]), memory.clone(), |_: u64, _: u32| {});
    make(MAX_QUEUES).unwrap();
    assert!(matches!(make(MAX_QUEUES + 1), Err(VirtioPciError::Queues { .. })));
    assert!(matches!(
        VirtioPci::new(Many(vec![3]), memory.clone(), |_: u64, _: u32| {}),
        Err(VirtioPciError::Queue(_))
    ));
}

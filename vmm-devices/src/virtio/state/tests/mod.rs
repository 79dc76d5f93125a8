//! Devices that go on elsewhere: paused in the middle of something, saved, restored into another one over a copy of the guest's memory.

mod devices;
mod disks;
mod frames;
mod hostile;

use std::sync::{Arc, Mutex};

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

use super::*;
use crate::interrupt::lock;
use crate::testkit::{Driver, LineRecorder, Memory, MmioDriver, MsiRecorder, PciDriver, guest_memory};
use crate::virtio::{Executor, Inline, VirtioDevice, VirtioMmio, VirtioPci};

const RAM: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bus {
    Mmio,
    Pci,
}

const BUSES: [Bus; 2] = [Bus::Mmio, Bus::Pci];

#[derive(Clone)]
enum Transport {
    Mmio(Arc<Mutex<VirtioMmio<Memory>>>),
    Pci(Arc<Mutex<VirtioPci<Memory>>>),
}

impl Transport {
    fn pause(&self) {
        match self {
            Self::Mmio(device) => lock(device).pause(),
            Self::Pci(device) => lock(device).pause(),
        }
    }

    fn in_flight(&self) -> Vec<(u16, u16)> {
        match self {
            Self::Mmio(device) => lock(device).in_flight(),
            Self::Pci(device) => lock(device).in_flight(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Saved {
    Mmio(VirtioMmioState),
    Pci(VirtioPciState),
}

impl Saved {
    fn device(&mut self) -> &mut VirtioState {
        match self {
            Self::Mmio(state) => &mut state.device,
            Self::Pci(state) => &mut state.device,
        }
    }

    /// As it comes out of a snapshot.
    #[cfg(feature = "snapshot")]
    fn through_bytes(&self) -> Self {
        use crate::snapshot::SnapshotState;
        fn again<S: SnapshotState>(state: &S) -> S {
            let newest = S::FORMAT.newest;
            S::decode(&state.encode(newest).unwrap(), newest).unwrap()
        }
        match self {
            Self::Mmio(state) => Self::Mmio(again(state)),
            Self::Pci(state) => Self::Pci(again(state)),
        }
    }

    #[cfg(not(feature = "snapshot"))]
    fn through_bytes(&self) -> Self {
        self.clone()
    }
}

/// A machine as far as one device goes.
struct Machine {
    memory: Memory,
    transport: Transport,
    driver: Box<dyn Driver>,
    line: LineRecorder,
    messages: MsiRecorder,
}

impl Machine {
    fn new(bus: Bus, device: impl VirtioDevice<Memory> + 'static) -> Self {
        Self::with(bus, device, guest_memory(RAM).unwrap(), Arc::new(Inline))
    }

    fn with(
        bus: Bus,
        device: impl VirtioDevice<Memory> + 'static,
        memory: Memory,
        executor: Arc<dyn Executor>,
    ) -> Self {
        let (line, messages) = (LineRecorder::default(), MsiRecorder::default());
        let (transport, driver): (_, Box<dyn Driver>) = match bus {
            Bus::Mmio => {
                let mmio =
                    VirtioMmio::builder(device, memory.clone(), line.clone()).executor(executor).build();
                let mmio = Arc::new(Mutex::new(mmio.unwrap()));
                (Transport::Mmio(Arc::clone(&mmio)), Box::new(MmioDriver::new(mmio)))
            }
            Bus::Pci => {
                let pci = VirtioPci::builder(device, memory.clone(), messages.clone()).executor(executor);
                let pci = Arc::new(Mutex::new(pci.build().unwrap()));
                (Transport::Pci(Arc::clone(&pci)), Box::new(PciDriver::new(pci).unwrap()))
            }
        };
        Self { memory, transport, driver, line, messages }
    }

    fn pause(&self) {
        self.transport.pause();
    }

    fn resume(&self) {
        match &self.transport {
            Transport::Mmio(device) => lock(device).resume(),
            Transport::Pci(device) => lock(device).resume(),
        }
        .unwrap();
    }

    fn try_save(&self) -> Result<Saved, VirtioStateError> {
        Ok(match &self.transport {
            Transport::Mmio(device) => Saved::Mmio(lock(device).save()?),
            Transport::Pci(device) => Saved::Pci(lock(device).save()?),
        })
    }

    fn save(&self) -> Saved {
        self.try_save().unwrap()
    }

    fn restore(&self, state: &Saved) -> Result<(), VirtioStateError> {
        match (&self.transport, state) {
            (Transport::Mmio(device), Saved::Mmio(state)) => lock(device).restore(state),
            (Transport::Pci(device), Saved::Pci(state)) => lock(device).restore(state),
            _ => panic!("a state of the other transport"),
        }
    }

    fn bus(&self) -> Bus {
        match self.transport {
            Transport::Mmio(_) => Bus::Mmio,
            Transport::Pci(_) => Bus::Pci,
        }
    }

    /// The machine elsewhere, with `device`, not resumed yet. This one ends.
    fn moved_paused(self, device: impl VirtioDevice<Memory> + 'static, executor: Arc<dyn Executor>) -> Self {
        self.pause();
        let saved = self.save();
        let memory = copy_of(&self.memory);
        let there = Self::with(self.bus(), device, memory, executor);
        drop(self);
        there.restore(&saved.through_bytes()).unwrap();
        let mut again = there.save();
        // It counts on, so that a driver in the middle of reading notices.
        again.device().config_generation = again.device().config_generation.wrapping_sub(1);
        let mut saved = saved;
        // Of another host's is what it is.
        again.device().config.clone_from(&saved.device().config);
        again.device().device = saved.device().device.clone();
        assert_eq!(again, saved, "what was restored is what was saved");
        there
    }

    fn moved(self, device: impl VirtioDevice<Memory> + 'static) -> Self {
        let there = self.moved_paused(device, Arc::new(Inline));
        there.resume();
        there
    }
}

fn copy_of(memory: &Memory) -> Memory {
    let mut bytes = vec![0; usize::try_from(RAM).unwrap()];
    memory.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    let copy = guest_memory(RAM).unwrap();
    copy.memory().write_slice(&bytes, GuestAddress(0)).unwrap();
    copy
}

//! The VMM of a hostile guest: it answers with whatever the input has, and changes the machine from its callbacks.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use vmm_cpu::{Error, Hypercall, MsiMessage, MsrFault, VcpuHandle, VcpuIo, Vm};
use vmm_memory::PageBitmap;
use vmm_memory::vm_memory::GuestAddress;

use super::arena::{Arena, MOVABLE, RAM};
use super::compare::{Event, Record};
use super::guest::{Reaction, Value};

/// Callbacks of one run before it is kicked.
const CALLS: u32 = 48;

/// The dirty log of RAM as the VMM sees it: what RAM was when it began, and what was reported since.
pub struct Log {
    pub before: Vec<u8>,
    pub pages: PageBitmap,
}

/// What steps and callbacks work on.
pub struct Board {
    // The virtual machine must go before its memory.
    pub vm: Arc<dyn Vm>,
    pub log: RefCell<Option<Log>>,
    /// What the movable region held when it was taken away.
    pub taken: RefCell<Option<Vec<u8>>>,
    pub arena: Rc<Arena>,
}

impl Board {
    pub fn take_memory(&self) {
        if let Some(bytes) = self.arena.take_movable(&*self.vm) {
            *self.taken.borrow_mut() = Some(bytes);
        }
    }

    /// Gives the movable region back, which nobody may have touched meanwhile.
    pub fn put_memory(&self) {
        if let Some(bytes) = self.taken.borrow_mut().take() {
            assert!(self.arena.bytes(MOVABLE) == bytes, "memory was written after it was taken away");
            self.arena.put_movable(&*self.vm);
        }
    }

    pub fn harvest(&self) {
        if let Some(log) = &mut *self.log.borrow_mut()
            && let Some(dirty) = self.vm.dirty_log()
        {
            dirty.harvest(self.arena.region(RAM), &mut log.pages).unwrap();
        }
    }

    /// Begins a new log, or ends the one there is after a check.
    pub fn start_log(&self) {
        self.stop_log();
        self.vm.dirty_log().unwrap().start(GuestAddress(RAM.gpa)).unwrap();
        let pages = PageBitmap::for_region(self.arena.region(RAM));
        *self.log.borrow_mut() = Some(Log { before: self.arena.bytes(RAM), pages });
    }

    pub fn stop_log(&self) {
        self.harvest();
        if let Some(log) = self.log.borrow_mut().take() {
            self.arena.check_dirty(&log.before, &self.arena.bytes(RAM), &log.pages);
            self.vm.dirty_log().unwrap().stop(GuestAddress(RAM.gpa)).unwrap();
        }
    }

    pub fn message(&self, address: Value, data: u32) {
        if let Some(msi) = self.vm.msi() {
            let address = address.get();
            let address = if address >> 63 == 0 { 0xfee0_0000 | address & 0xf_ffff } else { address };
            match msi.send(MsiMessage { address, data }) {
                Ok(_) | Err(Error::InvalidArgument { .. }) => {}
                Err(error) => panic!("{error:?}"),
            }
        }
    }

    /// Writes guest memory as a device does, which a log of the guest's writes does not see.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        if !self.arena.is_memory(gpa, true) {
            return;
        }
        self.arena.write(gpa, bytes);
        if let Some(log) = &mut *self.log.borrow_mut()
            && RAM.contains(gpa)
        {
            log.pages.set(gpa / 4096);
            log.pages.set((gpa + bytes.len() as u64 - 1).min(RAM.size - 1) / 4096);
        }
    }
}

/// What the vCPUs of a board call.
pub struct Bus {
    pub board: Rc<Board>,
    pub handle: Arc<dyn VcpuHandle>,
    pub reactions: Vec<Reaction>,
    pub answers: Vec<Value>,
    pub calls: u32,
    /// Memory came back during this run.
    pub put: bool,
    pub next: usize,
    /// All that was seen, if that is to be compared.
    pub record: Option<Record>,
}

impl Bus {
    /// For another run.
    pub fn rewind(&mut self, handle: Arc<dyn VcpuHandle>) {
        self.handle = handle;
        (self.calls, self.put) = (0, false);
    }

    fn react(&mut self, name: &'static str, place: u64, data: &[u8]) -> u64 {
        if let Some(record) = &mut self.record {
            record.events.push(Event::Call { name, place, data: data.to_vec() });
        }
        self.calls += 1;
        self.next = self.next.wrapping_add(1);
        if self.calls >= CALLS {
            self.handle.kick();
        }
        let reaction = match self.reactions.len() {
            0 => Reaction::Nothing,
            count => self.reactions[self.next % count],
        };
        match reaction {
            Reaction::Nothing | Reaction::Answer | Reaction::Answer2 => {}
            Reaction::Kick => self.handle.kick(),
            Reaction::TakeMemory => self.board.take_memory(),
            Reaction::PutMemory => {
                self.board.put_memory();
                self.put = true;
            }
            Reaction::Nmi => self.handle.nmi().unwrap(),
            Reaction::Intr(asserted) => self.handle.set_intr(asserted).unwrap(),
            Reaction::Message(address, data) => self.board.message(address, data),
            Reaction::Harvest => self.board.harvest(),
            Reaction::Write(at, value) => self.board.write(at.get(), &value.to_le_bytes()),
        }
        match self.answers.len() {
            0 => u64::MAX,
            count => self.answers[self.next % count].get(),
        }
    }

    fn check_mmio(&self, gpa: GuestAddress, len: usize, write: bool) {
        assert!((1..=8).contains(&len), "an access of {len} bytes");
        assert!(gpa.0 % 4096 + len as u64 <= 4096, "{gpa:?}+{len} crosses a page");
        assert!(gpa.0 >> 52 == 0, "{gpa:?} is wider than any guest-physical address");
        // A long access is a device's or memory's as a whole, also if a callback for a part of it brings memory.
        let came_back = self.put && MOVABLE.contains(gpa.0);
        assert!(came_back || !self.board.arena.is_memory(gpa.0, write), "{gpa:?} is memory");
    }

    fn check_pio(size: usize, data: &[u8]) {
        assert!(matches!(size, 1 | 2 | 4), "an access of {size} bytes");
        assert!(!data.is_empty() && data.len().is_multiple_of(size) && data.len() <= 4096);
    }
}

fn fill(data: &mut [u8], answer: u64) {
    for (byte, answer) in data.iter_mut().zip(answer.to_le_bytes().into_iter().cycle()) {
        *byte = answer;
    }
}

impl VcpuIo for Bus {
    fn pio_read(&mut self, port: u16, size: usize, data: &mut [u8]) {
        Self::check_pio(size, data);
        fill(data, self.react("pio_read", port.into(), &[size as u8]));
    }

    fn pio_write(&mut self, port: u16, size: usize, data: &[u8]) {
        Self::check_pio(size, data);
        self.react("pio_write", port.into(), data);
    }

    fn mmio_read(&mut self, gpa: GuestAddress, data: &mut [u8]) {
        self.check_mmio(gpa, data.len(), false);
        fill(data, self.react("mmio_read", gpa.0, &[data.len() as u8]));
    }

    fn mmio_write(&mut self, gpa: GuestAddress, data: &[u8]) {
        self.check_mmio(gpa, data.len(), true);
        self.react("mmio_write", gpa.0, data);
    }

    fn msr_read(&mut self, index: u32) -> Result<u64, MsrFault> {
        let answer = self.react("msr_read", index.into(), &[]);
        if answer & 1 == 0 { Ok(answer) } else { Err(MsrFault) }
    }

    fn msr_write(&mut self, index: u32, value: u64) -> Result<(), MsrFault> {
        if self.react("msr_write", index.into(), &value.to_le_bytes()) & 1 == 0 {
            Ok(())
        } else {
            Err(MsrFault)
        }
    }

    fn eoi(&mut self, vector: u8) {
        self.react("eoi", vector.into(), &[]);
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        let answer = self.react("acknowledge_interrupt", 0, &[]);
        (answer & 0x100 == 0).then_some(answer as u8)
    }

    fn hypercall(&mut self, call: &Hypercall) -> u64 {
        self.react("hypercall", call.nr, &[])
    }
}

//! The VMM's side of a guest: records every access, answers with prepared data, and checks the contract of
//! [`VcpuIo`] on the way.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use vmm_cpu::vmm_memory::PAGE_SIZE;
use vmm_cpu::vmm_memory::vm_memory::GuestAddress;
use vmm_cpu::{Hypercall, MsrFault, VcpuHandle, VcpuIo};

use super::program::END_PORT;

/// One call on [`VcpuIo`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    In { port: u16, size: usize, bytes: usize },
    Out { port: u16, size: usize, data: Vec<u8> },
    Load { gpa: u64, bytes: usize },
    Store { gpa: u64, data: Vec<u8> },
    ReadMsr(u32),
    WriteMsr(u32, u64),
    EndOfInterrupt(u8),
    Acknowledge(Option<u8>),
    Hypercall(Hypercall),
}

/// Called with every access before it is answered.
pub(crate) type Hook = Box<dyn FnMut(&Access) + Send>;

/// See the module.
pub(crate) struct Recorder {
    /// All accesses but the one that ends the guest.
    pub(crate) log: Vec<Access>,
    /// Bytes that IN and INS get; zero once they are used up.
    pub(crate) input: VecDeque<u8>,
    /// What an MMIO load gets: the byte of each address.
    pub(crate) mmio: fn(u64) -> u8,
    /// Registers that the recorder serves; all others fault.
    pub(crate) msrs: BTreeMap<u32, u64>,
    /// Vectors of the interrupt controller, whose INTR output falls with the last one.
    pub(crate) vectors: VecDeque<u8>,
    /// What a hypercall returns.
    pub(crate) hypercall_result: u64,
    /// What else a case does during an access.
    pub(crate) hook: Option<Hook>,
    /// Whether the guest reached its end.
    pub(crate) ended: bool,
    /// Where the backend broke the contract.
    pub(crate) violations: Vec<String>,
    handle: Arc<dyn VcpuHandle>,
}

/// The default of [`Recorder::mmio`]: each address has a byte of its own within a page.
pub(crate) fn address_pattern(gpa: u64) -> u8 {
    let [low, high, ..] = gpa.to_le_bytes();
    low.wrapping_mul(7).wrapping_add(high) ^ 0x5a
}

impl Recorder {
    pub(crate) fn new(handle: Arc<dyn VcpuHandle>) -> Self {
        Self {
            log: Vec::new(),
            input: VecDeque::new(),
            mmio: address_pattern,
            msrs: BTreeMap::new(),
            vectors: VecDeque::new(),
            hypercall_result: 0,
            hook: None,
            ended: false,
            violations: Vec::new(),
            handle,
        }
    }

    /// Takes what has been recorded so far.
    pub(crate) fn take_log(&mut self) -> Vec<Access> {
        std::mem::take(&mut self.log)
    }

    /// Data of all OUTs to `port`, in order.
    pub(crate) fn output(&self, port: u16) -> Vec<u8> {
        let of_port = self.log.iter().filter_map(|access| match access {
            Access::Out { port: p, data, .. } if *p == port => Some(data.as_slice()),
            _ => None,
        });
        of_port.flatten().copied().collect()
    }

    fn record(&mut self, access: Access) {
        if let Some(hook) = &mut self.hook {
            hook(&access);
        }
        self.log.push(access);
    }

    fn check(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.violations.push(what());
        }
    }

    fn check_port(&mut self, size: usize, length: usize) {
        let holds = matches!(size, 1 | 2 | 4) && length != 0 && length.is_multiple_of(size);
        self.check(holds, || format!("port access of {length} bytes in elements of {size}"));
    }

    fn check_mmio(&mut self, gpa: u64, length: usize) {
        let last = gpa.wrapping_add(length as u64).wrapping_sub(1);
        let holds = (1..=8).contains(&length) && gpa / PAGE_SIZE == last / PAGE_SIZE;
        self.check(holds, || format!("MMIO access of {length} bytes at {gpa:#x}"));
    }
}

impl VcpuIo for Recorder {
    fn pio_read(&mut self, port: u16, size: usize, data: &mut [u8]) {
        self.check_port(size, data.len());
        self.record(Access::In { port, size, bytes: data.len() });
        data.fill_with(|| self.input.pop_front().unwrap_or(0));
    }

    fn pio_write(&mut self, port: u16, size: usize, data: &[u8]) {
        self.check_port(size, data.len());
        if port == END_PORT {
            self.ended = true;
            self.handle.kick();
            return;
        }
        self.record(Access::Out { port, size, data: data.to_vec() });
    }

    fn mmio_read(&mut self, gpa: GuestAddress, data: &mut [u8]) {
        self.check_mmio(gpa.0, data.len());
        self.record(Access::Load { gpa: gpa.0, bytes: data.len() });
        let mut address = gpa.0;
        data.fill_with(|| {
            address = address.wrapping_add(1);
            (self.mmio)(address.wrapping_sub(1))
        });
    }

    fn mmio_write(&mut self, gpa: GuestAddress, data: &[u8]) {
        self.check_mmio(gpa.0, data.len());
        self.record(Access::Store { gpa: gpa.0, data: data.to_vec() });
    }

    fn msr_read(&mut self, index: u32) -> Result<u64, MsrFault> {
        self.record(Access::ReadMsr(index));
        self.msrs.get(&index).copied().ok_or(MsrFault)
    }

    fn msr_write(&mut self, index: u32, value: u64) -> Result<(), MsrFault> {
        self.record(Access::WriteMsr(index, value));
        self.msrs.get_mut(&index).map(|register| *register = value).ok_or(MsrFault)
    }

    fn eoi(&mut self, vector: u8) {
        self.record(Access::EndOfInterrupt(vector));
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        let vector = self.vectors.pop_front();
        if self.vectors.is_empty()
            && let Err(error) = self.handle.set_intr(false)
        {
            self.violations.push(format!("INTR cannot be lowered: {error}"));
        }
        self.record(Access::Acknowledge(vector));
        vector
    }

    fn hypercall(&mut self, call: &Hypercall) -> u64 {
        self.record(Access::Hypercall(*call));
        self.hypercall_result
    }
}

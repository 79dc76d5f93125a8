//! Devices, as an instruction sees them that software executes: those of the VMM, its doorbells, and those of the kernel, which
//! software cannot reach.

use std::sync::PoisonError;

use vmm_memory::PAGE_SIZE;
use vmm_memory::vm_memory::GuestAddress;

use super::Finish;
use crate::hypervisor::InterruptMode;
use crate::state::SystemRegisters;
use crate::vcpu::{Hypercall, MsrFault, VcpuIo};
use crate::vm::DoorbellAddress;

/// IA32_APIC_BASE: the APIC is on, and in x2APIC mode (Intel SDM 3A 12.4.3, 12.12.1).
const APIC_ON: u64 = 1 << 11;
const X2APIC: u64 = 1 << 10;

/// Where KVM's I/O APIC is.
const IO_APIC: std::ops::Range<u64> = 0xfec0_0000..0xfec0_0100;

/// Ports of KVM's PICs and timer.
const KERNEL_PORTS: [std::ops::RangeInclusive<u16>; 5] =
    [0x20..=0x21, 0x40..=0x43, 0x61..=0x61, 0xa0..=0xa1, 0x4d0..=0x4d1];

/// See the module.
pub(super) struct Devices<'a> {
    io: &'a mut dyn VcpuIo,
    finish: &'a Finish,
    /// First address of the local APIC that KVM serves.
    apic: Option<u64>,
    /// One of the kernel's was meant.
    kernels: Option<&'static str>,
}

impl<'a> Devices<'a> {
    pub(super) fn new(io: &'a mut dyn VcpuIo, finish: &'a Finish, system: &SystemRegisters) -> Self {
        let serves = finish.interrupts != InterruptMode::External;
        let on = system.apic_base & (APIC_ON | X2APIC) == APIC_ON;
        let apic = (serves && on).then_some(system.apic_base & !(PAGE_SIZE - 1));
        Self { io, finish, apic, kernels: None }
    }

    /// Why the instruction cannot be finished, if it is for one of the kernel's devices.
    pub(super) fn kernels_own(&self) -> Option<&'static str> {
        self.kernels
    }

    /// Whether the kernel has a device at an address.
    fn is_kernels(&mut self, gpa: u64) -> bool {
        if self.apic == Some(gpa & !(PAGE_SIZE - 1)) {
            self.kernels = Some("it accesses the local APIC, which KVM has");
        } else if self.finish.interrupts == InterruptMode::Platform && IO_APIC.contains(&gpa) {
            self.kernels = Some("it accesses the I/O APIC, which KVM has");
        }
        self.kernels.is_some()
    }

    fn is_kernels_port(&mut self, port: u16) -> bool {
        if self.finish.interrupts == InterruptMode::Platform
            && KERNEL_PORTS.iter().any(|ports| ports.contains(&port))
        {
            self.kernels = Some("it accesses a port that KVM serves");
        }
        self.kernels.is_some()
    }

    /// Rings the doorbell that a store is for, as KVM does; whether there is one.
    fn rings(&self, address: DoorbellAddress, data: &[u8]) -> bool {
        let doorbells = self.finish.doorbells.lock().unwrap_or_else(PoisonError::into_inner);
        let value = data.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
        let found = doorbells.iter().find(|(doorbell, _)| {
            doorbell.address == address
                && usize::from(doorbell.width) == data.len()
                && doorbell.value.is_none_or(|wanted| wanted == value)
        });
        let Some((doorbell, notifier)) = found else { return false };
        if let Err(error) = notifier.notify() {
            tracing::debug!(%error, ?doorbell, "kvm: a doorbell does not ring");
        }
        true
    }
}

impl VcpuIo for Devices<'_> {
    fn pio_read(&mut self, port: u16, size: usize, data: &mut [u8]) {
        if !self.is_kernels_port(port) {
            self.io.pio_read(port, size, data);
        }
    }

    fn pio_write(&mut self, port: u16, size: usize, data: &[u8]) {
        if self.is_kernels_port(port) {
            return;
        }
        if size == 0 || data.len() == size {
            if !self.rings(DoorbellAddress::Pio(port), data) {
                self.io.pio_write(port, size, data);
            }
            return;
        }
        // Of a string, each element may be for a doorbell.
        for element in data.chunks(size) {
            if !self.rings(DoorbellAddress::Pio(port), element) {
                self.io.pio_write(port, size, element);
            }
        }
    }

    fn mmio_read(&mut self, gpa: GuestAddress, data: &mut [u8]) {
        if !self.is_kernels(gpa.0) {
            self.io.mmio_read(gpa, data);
        }
    }

    fn mmio_write(&mut self, gpa: GuestAddress, data: &[u8]) {
        if !self.is_kernels(gpa.0) && !self.rings(DoorbellAddress::Mmio(gpa), data) {
            self.io.mmio_write(gpa, data);
        }
    }

    fn msr_read(&mut self, index: u32) -> Result<u64, MsrFault> {
        self.io.msr_read(index)
    }

    fn msr_write(&mut self, index: u32, value: u64) -> Result<(), MsrFault> {
        self.io.msr_write(index, value)
    }

    fn hypercall(&mut self, call: &Hypercall) -> u64 {
        self.io.hypercall(call)
    }
}

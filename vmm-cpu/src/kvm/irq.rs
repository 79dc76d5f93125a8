//! Interrupt lines, messages, notifiers.

use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Weak};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_msi,
};

use super::vm::VmInner;
use super::{host, sys};
use crate::error::{Error, Result};
use crate::hypervisor::InterruptMode;
use crate::vm::{
    Doorbell, DoorbellAddress, Doorbells, GsiRoute, GsiTarget, InterruptLines, InterruptNotifiers,
    MsiMessage, MsiSink, Notifier, NotifierIdentity,
};

/// Inputs of the I/O APIC, and so the highest line that a PC routes to one, plus one.
const IO_APIC_PINS: u8 = 24;

/// Lines that KVM's routing table can name.
const MAX_GSI: u32 = 4096;

/// Where messages for local APICs go (Intel SDM 3A 12.11.1).
const MSI_WINDOW: std::ops::RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;

/// Interrupts of one VM.
#[derive(Debug)]
pub(super) struct KvmInterrupts(pub(super) Arc<VmInner>);

fn halves(address: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

fn check_message(message: MsiMessage) -> Result<()> {
    // Above 4 GiB stand bits 8 to 31 of a 32-bit destination (KVM_X2APIC_API_USE_32BIT_IDS).
    let (low, high) = halves(message.address);
    if MSI_WINDOW.contains(&u64::from(low)) && high & 0xff == 0 {
        return Ok(());
    }
    Err(Error::invalid(
        "MSI address",
        format_args!("{:#x}", message.address),
        format_args!("{:#x} to {:#x}", MSI_WINDOW.start(), MSI_WINDOW.end()),
    ))
}

fn check_gsi(gsi: u32) -> Result<()> {
    if gsi < MAX_GSI { Ok(()) } else { Err(Error::invalid("GSI", gsi, format_args!("0 to {}", MAX_GSI - 1))) }
}

fn check_pin(pin: u8, pins: u8) -> Result<()> {
    if pin < pins { Ok(()) } else { Err(Error::invalid("input pin", pin, format_args!("0 to {}", pins - 1))) }
}

fn route_to_kvm(route: &GsiRoute, mode: InterruptMode) -> Result<kvm_irq_routing_entry> {
    check_gsi(route.gsi)?;
    let irqchip = |irqchip, pin| {
        let irqchip = kvm_irq_routing_irqchip { irqchip, pin: u32::from(pin) };
        (KVM_IRQ_ROUTING_IRQCHIP, kvm_irq_routing_entry__bindgen_ty_1 { irqchip })
    };
    if !matches!(route.target, GsiTarget::Msi(_)) && mode != InterruptMode::Platform {
        return Err(Error::unsupported(
            "a route to I/O APIC or PIC",
            format!("with {mode:?} these belong to the VMM; route the line to a message"),
        ));
    }
    let (type_, u) = match route.target {
        GsiTarget::IoApic { pin } => {
            check_pin(pin, IO_APIC_PINS)?;
            irqchip(KVM_IRQCHIP_IOAPIC, pin)
        }
        GsiTarget::Pic { pin } => {
            check_pin(pin, 16)?;
            irqchip(if pin < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE }, pin % 8)
        }
        GsiTarget::Msi(message) => {
            check_message(message)?;
            let (address_lo, address_hi) = halves(message.address);
            let msi =
                kvm_irq_routing_msi { address_lo, address_hi, data: message.data, ..Default::default() };
            (KVM_IRQ_ROUTING_MSI, kvm_irq_routing_entry__bindgen_ty_1 { msi })
        }
    };
    Ok(kvm_irq_routing_entry { gsi: route.gsi, type_, u, ..Default::default() })
}

impl InterruptLines for KvmInterrupts {
    fn set_level(&self, gsi: u32, asserted: bool) -> Result<()> {
        check_gsi(gsi)?;
        self.0.fd.set_irq_line(gsi, asserted).map_err(|errno| host("KVM_IRQ_LINE", errno))
    }

    fn set_routes(&self, routes: &[GsiRoute]) -> Result<()> {
        let entries =
            routes.iter().map(|route| route_to_kvm(route, self.0.interrupts)).collect::<Result<Vec<_>>>()?;
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| Error::invalid("number of routes", entries.len(), format_args!("0 to {MAX_GSI}")))?;
        self.0.fd.set_gsi_routing(&table).map_err(|errno| host("KVM_SET_GSI_ROUTING", errno))
    }
}

impl MsiSink for KvmInterrupts {
    fn send(&self, message: MsiMessage) -> Result<bool> {
        check_message(message)?;
        let (address_lo, address_hi) = halves(message.address);
        let msi = kvm_msi { address_lo, address_hi, data: message.data, ..Default::default() };
        self.0.fd.signal_msi(msi).map(|taken| taken > 0).map_err(|errno| host("KVM_SIGNAL_MSI", errno))
    }
}

/// Notifiers of one VM.
#[derive(Debug)]
pub(super) struct KvmNotifiers(pub(super) Arc<VmInner>);

/// Says what EEXIST, EBUSY, ENOENT and EINVAL of the two notifier ioctls mean.
fn attach_error(
    operation: &'static str,
    what: &'static str,
    value: String,
    errno: kvm_ioctls::Error,
) -> Error {
    match errno.errno() {
        libc::EEXIST | libc::EBUSY => Error::invalid(what, value, "one that is not attached already"),
        libc::ENOENT => Error::invalid(what, value, "one that is attached"),
        libc::EINVAL => Error::invalid(what, value, "one that this virtual machine can serve"),
        _ => host(operation, errno),
    }
}

impl KvmNotifiers {
    fn ioeventfd(&self, doorbell: &Doorbell, notifier: &Notifier, deassign: bool) -> Result<()> {
        let (addr, port, widths): (_, _, &[u8]) = match doorbell.address {
            DoorbellAddress::Pio(port) => (u64::from(port), true, &[1, 2, 4]),
            DoorbellAddress::Mmio(gpa) => (gpa.0, false, &[1, 2, 4, 8]),
        };
        if !widths.contains(&doorbell.width) {
            return Err(Error::invalid(
                "width of a doorbell",
                doorbell.width,
                format_args!("one of {widths:?}"),
            ));
        }
        let bits = u32::from(doorbell.width) * 8;
        if let Some(value) = doorbell.value
            && bits < 64
            && value >> bits != 0
        {
            return Err(Error::invalid(
                "value of a doorbell",
                format_args!("{value:#x}"),
                format_args!("a number of {bits} bits"),
            ));
        }
        let mut flags = 0;
        for (set, bit) in [
            (doorbell.value.is_some(), kvm_ioeventfd_flag_nr_datamatch),
            (port, kvm_ioeventfd_flag_nr_pio),
            (deassign, kvm_ioeventfd_flag_nr_deassign),
        ] {
            if set {
                flags |= 1 << bit;
            }
        }
        let argument = kvm_ioeventfd {
            datamatch: doorbell.value.unwrap_or(0),
            addr,
            len: u32::from(doorbell.width),
            fd: notifier.event_fd().as_raw_fd(),
            flags,
            ..Default::default()
        };
        sys::ioeventfd(&self.0.fd, &argument)
            .map_err(|errno| attach_error("KVM_IOEVENTFD", "doorbell", format!("{doorbell:?}"), errno))
    }
}

/// The notifiers that are attached to interrupt lines, since KVM detaches what is not attached without a word.
#[derive(Debug, Default)]
pub(super) struct AttachedNotifiers(Vec<(u32, Weak<NotifierIdentity>)>);

impl AttachedNotifiers {
    fn insert(&mut self, gsi: u32, notifier: &Notifier) {
        // The kernel detaches a notifier whose last descriptor is closed.
        self.0.retain(|(_, identity)| identity.strong_count() > 0);
        self.0.push((gsi, Arc::downgrade(notifier.identity())));
    }

    /// Whether it was there.
    fn remove(&mut self, gsi: u32, notifier: &Notifier) -> bool {
        let identity = Arc::as_ptr(notifier.identity());
        let position = self.0.iter().position(|(line, other)| *line == gsi && other.as_ptr() == identity);
        position.map(|position| self.0.swap_remove(position)).is_some()
    }
}

impl InterruptNotifiers for KvmNotifiers {
    fn attach_interrupt(&self, gsi: u32, notifier: &Notifier, resample: Option<&Notifier>) -> Result<()> {
        check_gsi(gsi)?;
        let mut attached = self.0.attached_notifiers();
        match resample {
            None => self.0.fd.register_irqfd(notifier.event_fd(), gsi),
            Some(resample) => {
                self.0.fd.register_irqfd_with_resample(notifier.event_fd(), resample.event_fd(), gsi)
            }
        }
        .map_err(|errno| attach_error("KVM_IRQFD", "interrupt notifier", format!("on GSI {gsi}"), errno))?;
        attached.insert(gsi, notifier);
        Ok(())
    }

    fn detach_interrupt(&self, gsi: u32, notifier: &Notifier) -> Result<()> {
        check_gsi(gsi)?;
        let mut attached = self.0.attached_notifiers();
        if !attached.remove(gsi, notifier) {
            return Err(Error::invalid(
                "interrupt notifier",
                format_args!("on GSI {gsi}"),
                "one that is attached",
            ));
        }
        self.0
            .fd
            .unregister_irqfd(notifier.event_fd(), gsi)
            .map_err(|errno| attach_error("KVM_IRQFD", "interrupt notifier", format!("on GSI {gsi}"), errno))
    }
}

impl Doorbells for KvmNotifiers {
    fn attach_doorbell(&self, doorbell: &Doorbell, notifier: &Notifier) -> Result<()> {
        self.ioeventfd(doorbell, notifier, false)?;
        if let Some(finish) = &self.0.finish {
            finish.set_doorbell(doorbell, notifier, true);
        }
        Ok(())
    }

    fn detach_doorbell(&self, doorbell: &Doorbell, notifier: &Notifier) -> Result<()> {
        self.ioeventfd(doorbell, notifier, true)?;
        if let Some(finish) = &self.0.finish {
            finish.set_doorbell(doorbell, notifier, false);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_are_checked_before_the_kernel_sees_them() {
        let ok = GsiRoute::new(5, GsiTarget::Pic { pin: 9 });
        assert_eq!(route_to_kvm(&ok, InterruptMode::Platform).unwrap().type_, KVM_IRQ_ROUTING_IRQCHIP);
        for (route, mode) in [
            (GsiRoute::new(5, GsiTarget::IoApic { pin: 24 }), InterruptMode::Platform),
            (GsiRoute::new(5, GsiTarget::Pic { pin: 16 }), InterruptMode::Platform),
            (GsiRoute::new(4096, GsiTarget::IoApic { pin: 0 }), InterruptMode::Platform),
            (GsiRoute::new(5, GsiTarget::Pic { pin: 1 }), InterruptMode::LocalApic),
            (
                GsiRoute::new(5, GsiTarget::Msi(MsiMessage { address: 0x1000, data: 0 })),
                InterruptMode::LocalApic,
            ),
        ] {
            assert!(route_to_kvm(&route, mode).is_err(), "{route:?}");
        }
    }

    #[test]
    fn name_is_in_host_errors() {
        let error = attach_error("KVM_IRQFD", "x", String::new(), kvm_ioctls::Error::new(libc::EIO));
        assert!(error.to_string().starts_with(super::super::NAME));
    }
}

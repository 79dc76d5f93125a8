//! The breakpoints and watchpoints that the debugger has set.

use gdbstub::target::ext::breakpoints::WatchKind;
use vmm_memory::GuestRam;

use super::memory::{self, Piece};
use crate::debug::{DebugRequest, HardwareStop};
use crate::error::Result;
use crate::vcpu::Vcpu;

/// INT3.
const INT3: u8 = 0xcc;

/// Most software breakpoints; each is looked for at every access of the debugger to memory.
const MAX_SOFTWARE: usize = 4096;

/// An INT3 in the guest's memory.
#[derive(Clone, Copy, Debug)]
struct Patch {
    address: u64,
    gpa: u64,
    /// What the guest has there.
    original: u8,
}

/// What the debugger calls one hardware stop, or several that cover one watchpoint.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Hardware {
    address: u64,
    /// In bytes; 0 for breakpoints.
    length: u64,
    /// `None` for breakpoints.
    watch: Option<WatchKind>,
    stop: HardwareStop,
}

/// Why a vCPU stopped, in the debugger's terms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Hit {
    Breakpoint,
    Watchpoint { address: u64, kind: WatchKind },
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Stops {
    patches: Vec<Patch>,
    /// In the order of the backend's request.
    hardware: Vec<Hardware>,
}

impl Stops {
    /// Puts an INT3 at `address`, as `vcpu` sees memory; whether there is memory that can be written.
    pub(super) fn add_software(&mut self, ram: &GuestRam, vcpu: &mut dyn Vcpu, address: u64) -> Result<bool> {
        if self.patches.iter().any(|patch| patch.address == address) {
            return Ok(true);
        }
        let Some(gpa) = vcpu.translate(address)? else { return Ok(false) };
        let gpa = gpa.0;
        let mut original = [0];
        if self.patches.len() >= MAX_SOFTWARE || !memory::read_physical(ram, gpa, &mut original) {
            return Ok(false);
        }
        // Two addresses may lead to the same byte: the second finds what the first has replaced.
        let [original] = self.patch_at(gpa).map_or(original, |patch| [patch.original]);
        if !memory::write_physical(ram, gpa, &[INT3]) {
            return Ok(false);
        }
        self.patches.push(Patch { address, gpa, original });
        Ok(true)
    }

    /// Puts back what the guest had at `address`; whether there was a breakpoint.
    pub(super) fn remove_software(&mut self, ram: &GuestRam, address: u64) -> bool {
        let Some(at) = self.patches.iter().position(|patch| patch.address == address) else { return false };
        let patch = self.patches.remove(at);
        if self.patch_at(patch.gpa).is_none() {
            restore(ram, patch);
        }
        true
    }

    /// Whether the INT3 at a guest-physical address is the debugger's.
    pub(super) fn is_patched(&self, gpa: u64) -> bool {
        self.patch_at(gpa).is_some()
    }

    fn patch_at(&self, gpa: u64) -> Option<Patch> {
        self.patches.iter().find(|patch| patch.gpa == gpa).copied()
    }

    /// Makes `bytes`, read from `piece`, what the guest has there.
    pub(super) fn hide(&self, piece: Piece, bytes: &mut [u8]) {
        for patch in &self.patches {
            if let Some(byte) = within(piece, patch.gpa).and_then(|at| bytes.get_mut(at)) {
                *byte = patch.original;
            }
        }
    }

    /// Keeps breakpoints in `bytes`, which are about to be written to `piece`.
    pub(super) fn keep(&mut self, piece: Piece, bytes: &mut [u8]) {
        for patch in &mut self.patches {
            if let Some(byte) = within(piece, patch.gpa).and_then(|at| bytes.get_mut(at)) {
                patch.original = *byte;
            }
        }
        for patch in &self.patches {
            if let Some(byte) = within(piece, patch.gpa).and_then(|at| bytes.get_mut(at)) {
                *byte = INT3;
            }
        }
    }

    /// Adds a hardware breakpoint; whether one is left of the backend's `max`.
    pub(super) fn add_breakpoint(&mut self, max: usize, address: u64) -> bool {
        let stop = HardwareStop::execute(address);
        self.add(max, [Hardware { address, length: 0, watch: None, stop }])
    }

    /// Takes a hardware breakpoint away; whether there was one.
    pub(super) fn remove_breakpoint(&mut self, address: u64) -> bool {
        self.remove(|stop| stop.watch.is_none() && stop.address == address)
    }

    /// Adds a watchpoint over `length` bytes, of as many hardware stops as that takes; whether so many are left.
    ///
    /// Processors have none for reads alone: those stop at writes too, and the debugger finds out that the value changed.
    pub(super) fn add_watchpoint(&mut self, max: usize, address: u64, length: u64, kind: WatchKind) -> bool {
        let Some(parts) = aligned_parts(address, length, max) else { return false };
        let stop = |(address, length)| match kind {
            WatchKind::Write => HardwareStop::write(address, length),
            WatchKind::Read | WatchKind::ReadWrite => HardwareStop::access(address, length),
        };
        self.add(
            max,
            parts.into_iter().map(|part| Hardware { address, length, watch: Some(kind), stop: stop(part) }),
        )
    }

    /// Takes a watchpoint away; whether there was one.
    pub(super) fn remove_watchpoint(&mut self, address: u64, length: u64, kind: WatchKind) -> bool {
        self.remove(|stop| (stop.address, stop.length, stop.watch) == (address, length, Some(kind)))
    }

    fn add(&mut self, max: usize, stops: impl IntoIterator<Item = Hardware>) -> bool {
        let new: Vec<Hardware> = stops.into_iter().filter(|stop| !self.hardware.contains(stop)).collect();
        let fits = self.hardware.len() + new.len() <= max;
        if fits {
            self.hardware.extend(new);
        }
        fits
    }

    fn remove(&mut self, is_meant: impl Fn(&Hardware) -> bool) -> bool {
        let before = self.hardware.len();
        self.hardware.retain(|stop| !is_meant(stop));
        self.hardware.len() < before
    }

    /// What a backend is asked for.
    pub(super) fn request(&self) -> DebugRequest {
        let request = self.hardware.iter().fold(DebugRequest::none(), |all, hardware| all.at(hardware.stop));
        // Without breakpoints of the debugger, INT3 is the guest's alone.
        if self.patches.is_empty() { request } else { request.int3() }
    }

    /// Which stop the backend tells of by the bits of `hits`.
    pub(super) fn hit(&self, hits: u8) -> Option<Hit> {
        let stops = self.hardware.iter().enumerate().filter(|(n, _)| u32::from(hits) >> n & 1 != 0);
        // A breakpoint lies before the instruction, so it comes first.
        stops.map(|(_, stop)| stop).min_by_key(|stop| stop.watch.is_some()).map(|stop| match stop.watch {
            None => Hit::Breakpoint,
            Some(kind) => Hit::Watchpoint { address: stop.address, kind },
        })
    }

    /// Takes everything away.
    pub(super) fn clear(&mut self, ram: &GuestRam) {
        self.hardware.clear();
        for patch in std::mem::take(&mut self.patches) {
            restore(ram, patch);
        }
    }
}

/// Puts the guest's byte back, unless the guest has written there itself.
fn restore(ram: &GuestRam, patch: Patch) {
    let mut now = [0];
    if memory::read_physical(ram, patch.gpa, &mut now)
        && now == [INT3]
        && !memory::write_physical(ram, patch.gpa, &[patch.original])
    {
        tracing::warn!(gpa = patch.gpa, "gdb: a breakpoint could not be taken out of memory");
    }
}

/// Which byte of `piece` lies at a guest-physical address.
fn within(piece: Piece, gpa: u64) -> Option<usize> {
    let at = usize::try_from(gpa.checked_sub(piece.gpa)?).ok()?;
    (at < piece.length).then_some(at)
}

/// `length` bytes at `address` as aligned parts of 1, 2, 4 or 8 bytes; `None` if there are more than `max` or none.
fn aligned_parts(address: u64, length: u64, max: usize) -> Option<Vec<(u64, u8)>> {
    let end = address.checked_add(length)?;
    let (mut at, mut parts) = (address, Vec::new());
    while at < end && parts.len() <= max {
        let part = [8_u8, 4, 2].into_iter().find(|part| {
            let part = u64::from(*part);
            at.is_multiple_of(part) && end - at >= part
        });
        let part = part.unwrap_or(1);
        parts.push((at, part));
        at += u64::from(part);
    }
    (!parts.is_empty() && parts.len() <= max).then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watchpoints_are_made_of_aligned_parts() {
        assert_eq!(aligned_parts(0x1000, 8, 4).unwrap(), [(0x1000, 8)]);
        assert_eq!(
            aligned_parts(0x1001, 8, 4).unwrap(),
            [(0x1001, 1), (0x1002, 2), (0x1004, 4), (0x1008, 1)]
        );
        assert_eq!(aligned_parts(0x1004, 12, 4).unwrap(), [(0x1004, 4), (0x1008, 8)]);
        for (address, length) in [(0x1000, 0), (0x1001, 16), (0x1000, 64), (0, u64::MAX), (u64::MAX, 2)] {
            assert_eq!(aligned_parts(address, length, 4), None, "{address:#x}+{length:#x}");
        }
    }

    #[test]
    fn there_are_no_more_hardware_stops_than_the_backend_has() {
        let mut stops = Stops::default();
        assert!(stops.add_watchpoint(4, 0x1004, 12, WatchKind::Write));
        assert!(stops.add_breakpoint(4, 0x2000) && stops.add_breakpoint(4, 0x2001));
        assert!(!stops.add_breakpoint(4, 0x2002));
        assert!(stops.add_breakpoint(4, 0x2001), "one that is there is no further one");
        assert_eq!(stops.request().hardware.len(), 4);
        assert_eq!(stops.hit(0b10), Some(Hit::Watchpoint { address: 0x1004, kind: WatchKind::Write }));
        assert_eq!(stops.hit(0b110), Some(Hit::Breakpoint));
        assert_eq!(stops.hit(0b1_0000), None);
        assert!(!stops.remove_watchpoint(0x1004, 12, WatchKind::Read));
        assert!(stops.remove_watchpoint(0x1004, 12, WatchKind::Write));
        assert_eq!(stops.request().hardware.len(), 2);
    }
}

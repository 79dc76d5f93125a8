//! The registers with which a guest starts: the other half of what [`vmm_memory::boot`] writes into memory.
//!
//! Called once per guest, for its first vCPU, before it runs. The other vCPUs wait for INIT and SIPI.

use vmm_memory::boot::{BootEntry, BootProtocol, GdtLocation};
use vmm_memory::vm_memory::GuestAddress;

use crate::error::{Error, Result};
use crate::state::{DescriptorTable, GeneralRegisters, Segment, SystemRegisters, rflags};
use crate::vcpu::Vcpu;

/// What EAX holds when a multiboot kernel starts (Multiboot 0.6.96 3.2).
const MULTIBOOT_MAGIC: u64 = 0x2bad_b002;

/// Where the stack of a boot sector ends: below the sector itself.
const BOOT_SECTOR: u64 = 0x7c00;

/// Bits of CR3 that may hold the address of a page table: page-aligned, at most 52 bits
/// (Intel SDM 3A table 4-12).
const CR3_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The registers of the first vCPU at the guest's first instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EntryState {
    /// General registers, RIP, RFLAGS. Those that the protocol leaves open are zero.
    pub general: GeneralRegisters,
    /// Segment, table and control registers.
    pub system: SystemRegisters,
}

impl EntryState {
    /// Sets the registers of `vcpu`. It keeps those that no boot protocol knows of: CR2, CR8, the debug
    /// registers, APIC base and XCR0.
    ///
    /// # Errors
    /// What the vCPU says to [`Vcpu::set_system_registers`] and [`Vcpu::set_registers`].
    pub fn apply(&self, vcpu: &mut dyn Vcpu) -> Result<()> {
        let SystemRegisters { cr2, cr8, apic_base, dr, dr6, dr7, xcr0, .. } = vcpu.system_registers()?;
        let system = SystemRegisters { cr2, cr8, apic_base, dr, dr6, dr7, xcr0, ..self.system };
        vcpu.set_system_registers(&system)?;
        vcpu.set_registers(&self.general)
    }
}

/// The registers with which a loaded kernel is entered, by its protocol.
///
/// Interrupts and single step are off, segments are flat, and there is no interrupt table: an exception
/// before the guest loads its own shuts it down.
///
/// | protocol | mode | registers |
/// |---|---|---|
/// | PVH (Xen docs/misc/pvh.pandoc) | 32-bit, no paging | EBX: `hvm_start_info` |
/// | multiboot 1 (0.6.96, 3.2) | 32-bit, no paging | EAX: 0x2badb002, EBX: information |
/// | Linux 64-bit (Documentation/arch/x86/boot.rst) | long mode | RSI: `boot_params` |
/// | flat 64-bit | long mode | RDI: 0, RSP: as a CALL leaves it (System V psABI 3.2.2) |
///
/// # Errors
/// [`Error::InvalidArgument`] naming what `entry` lacks or holds beyond the protocol's range;
/// [`Error::Unsupported`] for a protocol that this version does not know.
pub fn entry_state(entry: &BootEntry) -> Result<EntryState> {
    let mut general = GeneralRegisters {
        rip: address_32("boot entry address", entry.entry)?,
        rflags: rflags::FIXED,
        ..GeneralRegisters::default()
    };
    let system = match entry.protocol {
        BootProtocol::Pvh => {
            general.rbx = address_32("address of hvm_start_info", entry.info)?;
            protected_mode(entry.gdt)
        }
        BootProtocol::Multiboot1 => {
            general.rax = MULTIBOOT_MAGIC;
            general.rbx = address_32("address of the multiboot information", entry.info)?;
            protected_mode(entry.gdt)
        }
        BootProtocol::Linux64 => {
            general.rsi = entry.info.0;
            long_mode(entry)?
        }
        BootProtocol::Flat64 => {
            general.rsp = flat_stack(entry.stack)?;
            long_mode(entry)?
        }
        other => return Err(Error::unsupported("the boot protocol", other.to_string())),
    };
    Ok(EntryState { general, system })
}

/// The registers with which 16-bit code at `cs`:`ip` is entered, as firmware enters a boot sector: data
/// segments 0, stack below 0x7c00, interrupts off, interrupt vectors at 0.
///
/// To start firmware itself, run a vCPU as [`Vm::create_vcpu`](crate::Vm::create_vcpu) makes it: RESET leads
/// to the reset vector, which lies where no real-mode segment reaches.
pub fn real_mode_entry(cs: u16, ip: u16) -> EntryState {
    EntryState {
        general: GeneralRegisters {
            rip: ip.into(),
            rsp: BOOT_SECTOR,
            rflags: rflags::FIXED,
            ..GeneralRegisters::default()
        },
        system: SystemRegisters {
            cs: Segment::real_mode(cs, true),
            // Firmware has switched the caches on.
            cr0: SystemRegisters::CR0_ET,
            ..SystemRegisters::at_reset()
        },
    }
}

/// 32-bit protected mode without paging. A guest may rely on the hidden parts of the segments; the
/// selectors mean something only if there is a GDT.
fn protected_mode(gdt: Option<GdtLocation>) -> SystemRegisters {
    let (gdtr, [code, data, tss]) = match gdt {
        Some(gdt) => (descriptor_table(gdt), [gdt.code, gdt.data, gdt.tss]),
        None => (DescriptorTable::default(), [0x8, 0x10, 0x18]),
    };
    SystemRegisters {
        gdtr,
        cr0: SystemRegisters::CR0_PE | SystemRegisters::CR0_ET,
        ..flat_segments(Segment::code32(code), data, tss)
    }
}

/// 64-bit mode on the tables that the loader wrote.
fn long_mode(entry: &BootEntry) -> Result<SystemRegisters> {
    let gdt = entry.gdt.ok_or_else(|| absent("boot GDT", "a table, for a protocol in long mode"))?;
    let page_tables = entry
        .page_tables
        .ok_or_else(|| absent("address of the boot page tables", "one, for a protocol in long mode"))?;
    if page_tables.0 & !CR3_ADDRESS != 0 {
        let value = format!("{:#x}", page_tables.0);
        return Err(Error::invalid(
            "address of the boot page tables",
            value,
            "a multiple of 0x1000 below 2^52",
        ));
    }
    Ok(SystemRegisters {
        gdtr: descriptor_table(gdt),
        cr0: SystemRegisters::CR0_PE | SystemRegisters::CR0_ET | SystemRegisters::CR0_PG,
        cr3: page_tables.0,
        cr4: SystemRegisters::CR4_PAE,
        efer: SystemRegisters::EFER_LME | SystemRegisters::EFER_LMA,
        ..flat_segments(Segment::code64(gdt.code), gdt.data, gdt.tss)
    })
}

/// `cs`, the other segments flat with selector `data`, and a busy TSS of the smallest size at 0. What is no
/// segment is as at RESET, but the descriptor tables are empty.
fn flat_segments(cs: Segment, data: u16, tss: u16) -> SystemRegisters {
    let data = Segment::data32(data);
    SystemRegisters {
        cs,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment::task_state(tss, 0),
        ldtr: Segment::null(),
        gdtr: DescriptorTable::default(),
        idtr: DescriptorTable::default(),
        ..SystemRegisters::at_reset()
    }
}

fn descriptor_table(gdt: GdtLocation) -> DescriptorTable {
    DescriptorTable { base: gdt.base.0, limit: gdt.limit }
}

/// RSP as a CALL would leave it on a stack that ends at `end`.
fn flat_stack(end: Option<GuestAddress>) -> Result<u64> {
    const ALLOWED: &str = "a multiple of 16 above 0, for a flat 64-bit guest";
    let end = end.ok_or_else(|| absent("boot stack", ALLOWED))?.0;
    match end.checked_sub(8) {
        Some(rsp) if end.is_multiple_of(16) => Ok(rsp),
        _ => Err(Error::invalid("boot stack", format_args!("{end:#x}"), ALLOWED)),
    }
}

/// An address that a 32-bit register holds.
fn address_32(what: &'static str, address: GuestAddress) -> Result<u64> {
    match u32::try_from(address.0) {
        Ok(address) => Ok(address.into()),
        Err(_) => Err(Error::invalid(what, format_args!("{:#x}", address.0), "below 4 GiB")),
    }
}

fn absent(what: &'static str, allowed: &'static str) -> Error {
    Error::invalid(what, "absent", allowed)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use vmm_memory::GuestRam;
    use vmm_memory::boot::{Boot, KernelImage};

    use super::*;
    use crate::state::CpuState;
    use crate::vcpu::{Halt, VcpuHandle, VcpuIo};

    /// Entry of the program in [`elf`].
    const ENTRY: u32 = 0x10_0000;

    /// An ELF64 program of one HLT at 1 MiB, with a PVH note that gives the same entry.
    fn elf() -> Vec<u8> {
        let mut note = [4_u32, 4, 18].map(u32::to_le_bytes).concat();
        note.extend(b"Xen\0");
        note.extend(ENTRY.to_le_bytes());

        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        elf.extend([u64::from(ENTRY), 64, 0].map(u64::to_le_bytes).concat());
        elf.extend([0; 4]);
        elf.extend([64_u16, 56, 2, 0, 0, 0].map(u16::to_le_bytes).concat());
        let code = 64 + 2 * 56;
        let notes = code + 8;
        for (kind, flags, offset, address, size) in
            [(1_u32, 5_u32, code, u64::from(ENTRY), 8), (4, 4, notes, 0, note.len() as u64)]
        {
            elf.extend([kind, flags].map(u32::to_le_bytes).concat());
            elf.extend([offset, address, address, size, size, 4].map(u64::to_le_bytes).concat());
        }
        elf.extend([0xf4; 8]);
        elf.extend(note);
        elf
    }

    fn load(protocol: BootProtocol) -> BootEntry {
        let elf = elf();
        let image = KernelImage::parse(&elf).unwrap();
        let ram = GuestRam::builder().ram(4 << 20).build().unwrap();
        let memory = ram.memory();
        Boot::new(&image).protocol(protocol).load(&*memory).unwrap()
    }

    /// A flat entry that claims to be of another protocol.
    fn pretend(protocol: BootProtocol, info: u64) -> BootEntry {
        let mut entry = load(BootProtocol::Flat64);
        entry.protocol = protocol;
        entry.info = GuestAddress(info);
        entry
    }

    /// All other registers are zero.
    fn general() -> GeneralRegisters {
        GeneralRegisters { rip: ENTRY.into(), rflags: 2, ..GeneralRegisters::default() }
    }

    fn is_flat(segment: &Segment, kind: u8) -> bool {
        (segment.base, segment.limit, segment.kind, segment.dpl) == (0, u32::MAX, kind, 0)
            && segment.code_or_data
            && segment.present
            && segment.granularity
            && !segment.unusable
    }

    fn assert_protected_mode(state: &EntryState) {
        let s = &state.system;
        assert_eq!((s.cr0, s.cr3, s.cr4, s.efer), (0x11, 0, 0, 0));
        assert!(is_flat(&s.cs, 0xb) && s.cs.big && !s.cs.long, "{:?}", s.cs);
        for data in [&s.ds, &s.es, &s.ss] {
            assert!(is_flat(data, 3) && data.big, "{data:?}");
        }
        assert_eq!((s.tr.base, s.tr.limit, s.tr.kind, s.tr.code_or_data), (0, 0x67, 0xb, false));
        assert!(s.tr.present && s.ldtr.unusable);
        assert_eq!((s.code_bits(), s.idtr.limit), (32, 0));
    }

    #[test]
    fn pvh() {
        let entry = load(BootProtocol::Pvh);
        let gdt = entry.gdt.unwrap();
        let state = entry_state(&entry).unwrap();
        assert_protected_mode(&state);
        assert_ne!(entry.info.0, 0);
        assert_eq!(state.general, GeneralRegisters { rbx: entry.info.0, ..general() });
        let s = state.system;
        assert_eq!((s.cs.selector, s.ds.selector, s.tr.selector), (gdt.code, gdt.data, gdt.tss));
        assert_eq!((s.gdtr.base, s.gdtr.limit), (gdt.base.0, gdt.limit));
    }

    #[test]
    fn multiboot() {
        let state = entry_state(&pretend(BootProtocol::Multiboot1, 0x6000)).unwrap();
        assert_protected_mode(&state);
        assert_eq!(state.general, GeneralRegisters { rax: 0x2bad_b002, rbx: 0x6000, ..general() });
    }

    #[test]
    fn the_32_bit_protocols_need_no_tables() {
        for protocol in [BootProtocol::Pvh, BootProtocol::Multiboot1] {
            let mut entry = pretend(protocol, 0x6000);
            (entry.gdt, entry.page_tables, entry.stack) = (None, None, None);
            let state = entry_state(&entry).unwrap();
            assert_protected_mode(&state);
            assert_eq!(state.system.gdtr, DescriptorTable::default());
            assert_ne!(state.system.cs.selector, 0, "a null selector would make CS unusable");
        }
    }

    fn assert_long_mode(state: &EntryState, entry: &BootEntry) {
        let s = &state.system;
        assert_eq!((s.cr0, s.cr4, s.efer), (0x8000_0011, 0x20, 0x500));
        assert_eq!(Some(GuestAddress(s.cr3)), entry.page_tables);
        assert!(is_flat(&s.cs, 0xb) && s.cs.long && !s.cs.big, "{:?}", s.cs);
        for data in [&s.ds, &s.es, &s.ss] {
            assert!(is_flat(data, 3), "{data:?}");
            assert_eq!(data.selector, 0x18);
        }
        assert_eq!((s.cs.selector, s.code_bits(), s.idtr.limit), (0x10, 64, 0));
        assert_eq!(Some(GuestAddress(s.gdtr.base)), entry.gdt.map(|gdt| gdt.base));
    }

    #[test]
    fn linux_64() {
        let entry = load(BootProtocol::Linux64);
        let state = entry_state(&entry).unwrap();
        assert_long_mode(&state, &entry);
        assert_ne!(entry.info.0, 0);
        assert_eq!(state.general, GeneralRegisters { rsi: entry.info.0, ..general() });
    }

    #[test]
    fn flat_64() {
        let entry = load(BootProtocol::Flat64);
        let state = entry_state(&entry).unwrap();
        assert_long_mode(&state, &entry);
        let rsp = entry.stack.unwrap().0 - 8;
        assert_eq!((rsp + 8) % 16, 0);
        assert_eq!(state.general, GeneralRegisters { rsp, ..general() });
    }

    #[test]
    fn what_is_absent_or_out_of_range_is_named() {
        type Spoil = fn(&mut BootEntry);
        let cases: [(BootProtocol, Spoil, &str); 9] = [
            (BootProtocol::Pvh, |e| e.info = GuestAddress(1 << 32), "hvm_start_info is 0x100000000"),
            (BootProtocol::Multiboot1, |e| e.info = GuestAddress(1 << 32), "information is 0x100000000"),
            (BootProtocol::Pvh, |e| e.entry = GuestAddress(1 << 32), "entry address is 0x100000000"),
            (BootProtocol::Linux64, |e| e.gdt = None, "GDT is absent"),
            (BootProtocol::Linux64, |e| e.page_tables = None, "page tables is absent"),
            (BootProtocol::Flat64, |e| e.page_tables = Some(GuestAddress(0x9008)), "page tables is 0x9008"),
            (BootProtocol::Flat64, |e| e.stack = None, "stack is absent"),
            (BootProtocol::Flat64, |e| e.stack = Some(GuestAddress(0)), "stack is 0x0"),
            (BootProtocol::Flat64, |e| e.stack = Some(GuestAddress(0x2_0008)), "stack is 0x20008"),
        ];
        for (protocol, spoil, expected) in cases {
            let mut entry = pretend(protocol, 0x6000);
            spoil(&mut entry);
            let error = entry_state(&entry).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { .. }), "{error:?}");
            assert!(error.to_string().contains(expected), "{error}: {expected}");
        }
    }

    #[test]
    fn real_mode() {
        let state = real_mode_entry(0xf000, 0xfff0);
        let s = &state.system;
        assert_eq!((s.cs.selector, s.cs.base, s.cs.limit), (0xf000, 0xf_0000, 0xffff));
        for data in [&s.ds, &s.es, &s.fs, &s.gs, &s.ss] {
            assert_eq!((data.selector, data.base, data.limit), (0, 0, 0xffff));
        }
        assert_eq!((s.cr0, s.cr4, s.efer, s.idtr.base), (0x10, 0, 0, 0));
        assert_eq!(s.code_bits(), 16);
        let expected = GeneralRegisters { rip: 0xfff0, rsp: 0x7c00, ..general() };
        assert_eq!(state.general, expected);
    }

    /// A vCPU that only holds registers.
    #[derive(Debug)]
    struct Registers(CpuState);

    #[derive(Debug)]
    struct Nobody;

    impl VcpuHandle for Nobody {
        fn kick(&self) {}

        fn nmi(&self) -> Result<()> {
            Ok(())
        }

        fn set_intr(&self, _: bool) -> Result<()> {
            Ok(())
        }
    }

    impl Vcpu for Registers {
        fn index(&self) -> u32 {
            0
        }

        fn run(&mut self, _: &mut dyn VcpuIo) -> Result<Halt> {
            Ok(Halt::Interrupted)
        }

        fn handle(&self) -> Arc<dyn VcpuHandle> {
            Arc::new(Nobody)
        }

        fn wait(&mut self, _: Option<Duration>) -> bool {
            false
        }

        fn registers(&mut self) -> Result<GeneralRegisters> {
            Ok(self.0.general)
        }

        fn set_registers(&mut self, registers: &GeneralRegisters) -> Result<()> {
            self.0.general = *registers;
            Ok(())
        }

        fn system_registers(&mut self) -> Result<SystemRegisters> {
            Ok(self.0.system)
        }

        fn set_system_registers(&mut self, registers: &SystemRegisters) -> Result<()> {
            self.0.system = *registers;
            Ok(())
        }

        fn msr(&mut self, _: u32) -> Result<u64> {
            Ok(0)
        }

        fn set_msr(&mut self, _: u32, _: u64) -> Result<()> {
            Ok(())
        }

        fn translate(&mut self, gva: u64) -> Result<Option<GuestAddress>> {
            Ok(Some(GuestAddress(gva)))
        }

        fn save(&mut self) -> Result<CpuState> {
            Ok(self.0.clone())
        }

        fn restore(&mut self, state: &CpuState) -> Result<()> {
            self.0 = state.clone();
            Ok(())
        }
    }

    #[test]
    fn apply_keeps_what_no_protocol_knows_of() {
        let mut vcpu = Registers(CpuState::at_reset());
        let own = SystemRegisters {
            cr2: 1,
            cr8: 2,
            apic_base: 0xfee0_0900,
            dr: [3, 4, 5, 6],
            dr6: 7,
            dr7: 8,
            xcr0: 9,
            ..vcpu.0.system
        };
        vcpu.0.system = own;
        vcpu.0.general.rdx = 0x00a1_0f11;

        let state = entry_state(&load(BootProtocol::Flat64)).unwrap();
        state.apply(&mut vcpu).unwrap();
        assert_eq!(vcpu.0.general, state.general);
        let SystemRegisters { cr2, cr8, apic_base, dr, dr6, dr7, xcr0, .. } = own;
        let expected = SystemRegisters { cr2, cr8, apic_base, dr, dr6, dr7, xcr0, ..state.system };
        assert_eq!(vcpu.0.system, expected);
    }
}

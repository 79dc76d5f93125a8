//! Domains of small kernels, looked at through their page tables.

use vmm_memory::vm_memory::{Bytes as _, GuestAddress};
use vmm_memory::{GuestRam, RegionConfig};

use super::*;

const RAM: u64 = 32 << 20;
const BASE: u64 = 0xffff_ffff_8000_0000;
/// Where the kernels start.
pub(in crate::xen_pv) const ENTRY: u64 = BASE + 0x100_0000;

/// What the kernel's notes say.
#[derive(Clone)]
pub(in crate::xen_pv) struct Kernel {
    notes: Vec<(u32, Vec<u8>)>,
    paddr: u64,
    memsz: u64,
    /// What the file supplies of the segment.
    code: Vec<u8>,
}

fn number(value: u64) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

impl Kernel {
    /// As Linux, with code at its entry, [`ENTRY`].
    pub(in crate::xen_pv) fn with_code(code: Vec<u8>) -> Self {
        Self { code, ..Self::linux() }
    }

    /// As Linux: entry at 16 MiB, table of frames at INIT_P2M, initrd unmapped.
    fn linux() -> Self {
        let notes = vec![
            (1, number(ENTRY)),
            (3, number(BASE)),
            (10, b"!writable_page_tables|pae_pgdir_above_4gb\0".to_vec()),
            (15, number(0x80_0000_0000)),
            (16, vec![1, 0, 0, 0]),
        ];
        Self { notes, paddr: 0x100_0000, memsz: 0x5000, code: vec![0xc0; 16] }
    }

    /// The same with so many bytes of memory from its entry on.
    #[cfg(feature = "snapshot")]
    pub(in crate::xen_pv) fn with_memory(self, memsz: u64) -> Self {
        Self { memsz, ..self }
    }

    fn with(mut self, kind: u32, desc: Vec<u8>) -> Self {
        self.notes.retain(|(other, _)| *other != kind);
        self.notes.push((kind, desc));
        self
    }

    fn without(mut self, kind: u32) -> Self {
        self.notes.retain(|(other, _)| *other != kind);
        self
    }

    /// An ELF of one segment.
    pub(in crate::xen_pv) fn elf(&self) -> Vec<u8> {
        let mut notes = Vec::new();
        for (kind, desc) in &self.notes {
            notes.extend([4, u32::try_from(desc.len()).unwrap(), *kind].map(u32::to_le_bytes).concat());
            notes.extend(b"Xen\0");
            notes.extend(desc);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        elf.extend([self.paddr, 64, 0].map(u64::to_le_bytes).concat());
        elf.extend([0; 4]);
        elf.extend([64_u16, 56, 2, 0, 0, 0].map(u16::to_le_bytes).concat());
        let (code, length) = (64 + 2 * 56, self.code.len() as u64);
        for (kind, offset, address, filesz, memsz) in [
            (1_u32, code, self.paddr, length, self.memsz),
            (4, code + length, 0, notes.len() as u64, notes.len() as u64),
        ] {
            elf.extend([kind, 7].map(u32::to_le_bytes).concat());
            elf.extend([offset, address, address, filesz, memsz, 4].map(u64::to_le_bytes).concat());
        }
        elf.extend(&self.code);
        elf.extend(notes);
        elf
    }
}

struct Built {
    ram: GuestRam,
    layout: Layout,
    entry: PvEntry,
}

impl Built {
    fn try_new(kernel: &Kernel, initrd: &[u8], ram: u64) -> Result<Self, BuildError> {
        let layout = Layout::new(ram).unwrap();
        let size = layout.private().0;
        let memory = GuestRam::builder().region(RegionConfig::new(GuestAddress(0), size)).build().unwrap();
        // What was there before must not shine through.
        memory.memory().write_slice(&vec![0xaa; usize::try_from(size).unwrap()], GuestAddress(0)).unwrap();
        let elf = kernel.elf();
        let image = KernelImage::parse(&elf).unwrap();
        let boot = PvBoot::new(&image)?.command_line("console=hvc0").initrd(initrd);
        let plan = boot.plan(layout)?;
        let entry = plan.write(&memory.memory(), Rings { console_port: 2, store_port: 1 })?;
        Ok(Self { ram: memory, layout, entry })
    }

    fn new(kernel: &Kernel, initrd: &[u8]) -> Self {
        Self::try_new(kernel, initrd, RAM).unwrap()
    }

    fn word(&self, gpa: u64) -> u64 {
        self.ram.memory().read_obj(GuestAddress(gpa)).unwrap()
    }

    /// Guest-physical address and the last entry, as the processor finds them.
    fn walk(&self, va: u64) -> Option<(u64, u64)> {
        let mut table = self.entry.root.0;
        for shift in [39, 30, 21, 12] {
            let entry = self.word(table + (va >> shift & 0x1ff) * 8);
            if entry & 1 == 0 {
                return None;
            }
            assert_eq!(entry & 0x25, 0x25, "present, user, accessed: {entry:#x} for {va:#x}");
            table = entry & 0x000f_ffff_ffff_f000;
            if shift == 12 {
                return Some((table | va & 0xfff, entry));
            }
        }
        None
    }

    fn info(&self, offset: u64) -> u64 {
        self.word(self.walk(self.entry.start_info).unwrap().0 + offset)
    }
}

#[test]
fn a_kernel_finds_what_the_protocol_promises() {
    let initrd = vec![0x1d; 5000];
    let built = Built::new(&Kernel::linux(), &initrd);
    assert_eq!(built.entry.rip, BASE + 0x100_0000);
    let (start, _) = built.walk(built.entry.rip).unwrap();
    assert_eq!(start, 0x100_0000);
    assert_eq!(built.word(start), 0xc0c0_c0c0_c0c0_c0c0);
    assert_eq!(built.word(start + 16), 0, "bss");
    assert_eq!(built.word(start + 0x4ff8), 0, "end of bss");

    let page = built.walk(built.entry.start_info).unwrap().0;
    let mut magic = [0; 14];
    built.ram.memory().read_slice(&mut magic, GuestAddress(page)).unwrap();
    assert_eq!(&magic, b"xen-3.0-x86_64");
    assert_eq!(built.info(32), RAM >> 12);
    assert_eq!(built.info(40), RAM, "shared information");
    assert_eq!(built.info(48) & 0xffff_ffff, 1 << 3 | 1 << 4);
    assert_eq!(built.info(64) & 0xffff_ffff, 1);
    assert_eq!(built.info(80) & 0xffff_ffff, 2);
    for (name, frame) in [("store", built.info(56)), ("console", built.info(72))] {
        assert_eq!(built.word(frame << 12), 0, "{name}");
        assert_eq!(built.walk(BASE + (frame << 12)).unwrap().0, frame << 12, "{name}");
    }
    let mut line = [0; 13];
    built.ram.memory().read_slice(&mut line, GuestAddress(page + 128)).unwrap();
    assert_eq!(&line, b"console=hvc0\0");

    let (frame, length) = (built.info(112), built.info(120));
    assert_eq!(length, 5000);
    let mut bytes = vec![0; 5000];
    built.ram.memory().read_slice(&mut bytes, GuestAddress(frame << 12)).unwrap();
    assert_eq!(bytes, initrd);
    assert_eq!(built.walk(BASE + (frame << 12)), None, "the initrd is not mapped");

    assert!(built.walk(built.entry.rsp - 8).is_some());
    assert!(built.walk(built.entry.rsp + (512 << 10) - 8).is_some(), "the padding");
}

#[test]
fn frame_tables_say_that_numbers_are_the_same() {
    let built = Built::new(&Kernel::linux(), &[]);
    let list = built.info(104);
    assert_eq!(list, 0x80_0000_0000);
    let frames = RAM >> 12;
    for frame in [0, 1, 511, 512, frames - 1] {
        assert_eq!(built.word(built.walk(list + frame * 8).unwrap().0), frame);
        assert_eq!(built.word(built.layout.m2p_entry(frame).unwrap().0), frame);
    }
    // The run that start_info names holds the list and its tables.
    let (first, count) = (built.info(1152), built.info(1160));
    let mut table = built.entry.root.0;
    for shift in [39, 30, 21] {
        table = built.word(table + (list >> shift & 0x1ff) * 8) & 0x000f_ffff_ffff_f000;
        assert!((first..first + count).contains(&(table >> 12)), "level of shift {shift}");
    }
}

#[test]
fn page_tables_are_mapped_read_only_and_the_rest_is_not() {
    let built = Built::new(&Kernel::linux(), &[]);
    let (base, count) = (built.info(88), built.info(96));
    assert_eq!(built.walk(base).unwrap().0, built.entry.root.0);
    for page in 0..count {
        assert_eq!(built.walk(base + page * 4096).unwrap().1 & 2, 0, "table {page}");
    }
    assert_ne!(built.walk(base - 4096).unwrap().1 & 2, 0);
    assert_ne!(built.walk(base + count * 4096).unwrap().1 & 2, 0);
    // All tables of the region are in the run.
    let tables = base - BASE..base - BASE + count * 4096;
    for va in (BASE..BASE + (20 << 20)).step_by(2 << 20) {
        let mut table = built.entry.root.0;
        for shift in [39, 30, 21] {
            table = built.word(table + (va >> shift & 0x1ff) * 8) & 0x000f_ffff_ffff_f000;
            assert!(tables.contains(&table), "{va:#x}");
        }
    }
}

#[test]
fn older_kernels_have_initrd_and_frame_table_mapped() {
    let kernel = Kernel::linux().without(15).without(16);
    let built = Built::new(&kernel, &[7; 4097]);
    assert_eq!(built.info(48) & 1 << 3, 0);
    let (start, list) = (built.info(112), built.info(104));
    assert_eq!(built.word(built.walk(start).unwrap().0), 0x0707_0707_0707_0707);
    assert_eq!(built.word(built.walk(list + 8 * 77).unwrap().0), 77);
    assert_eq!((built.info(1152), built.info(1160)), (0, 0));
}

#[test]
fn a_frame_table_in_the_kernels_own_slot_is_not_placed_there() {
    for va in [BASE - (1 << 30), 0xffff_8000_0000_0000, 0x80_0000_0001, u64::MAX - 4095] {
        let built = Built::new(&Kernel::linux().with(15, number(va)), &[]);
        assert_ne!(built.info(104), va, "{va:#x}");
        assert_eq!(built.word(built.walk(built.info(104) + 8).unwrap().0), 1);
    }
}

#[test]
fn the_hypercall_page_calls() {
    let built = Built::new(&Kernel::linux().with(2, number(BASE + 0x100_1000)), &[]);
    let page = built.walk(BASE + 0x100_1000).unwrap().0;
    let mut stub = [0; 14];
    built.ram.memory().read_slice(&mut stub, GuestAddress(page + 17 * 32)).unwrap();
    assert_eq!(stub, [0x51, 0x41, 0x53, 0xb8, 17, 0, 0, 0, 0x0f, 0x05, 0x41, 0x5b, 0x59, 0xc3]);
}

#[test]
fn images_that_ask_for_too_much_are_refused_by_name() {
    let kernel = Kernel::linux;
    let cases = [
        (kernel().without(1), "ENTRY"),
        (kernel().with(1, number(BASE + RAM)), "ENTRY"),
        (kernel().with(1, number(0)), "ENTRY"),
        (kernel().with(3, number(BASE + 0x1000)), "VIRT_BASE"),
        (kernel().with(3, number(0xffff_8000_0000_0000)), "VIRT_BASE"),
        (kernel().with(3, number(0x8000_0000_0000)), "VIRT_BASE"),
        (kernel().with(3, number(0xffff_ffff_ffc0_0000)).with(1, number(u64::MAX)), "VIRT_BASE"),
        (kernel().with(4, number(0x200_0000)), "p_paddr"),
        (kernel().with(2, number(BASE + 0x100_0800)), "HYPERCALL_PAGE"),
        (kernel().with(2, number(BASE + 0x200_0000)), "HYPERCALL_PAGE"),
        (kernel().with(10, b"!auto_translated_physmap".to_vec()), "auto_translated_physmap"),
        (Kernel { memsz: RAM, ..kernel() }, "RAM"),
        (Kernel { memsz: u64::MAX - 0x100_0000, ..kernel() }, "RAM"),
    ];
    for (kernel, name) in cases {
        let error = Built::try_new(&kernel, &[], RAM).err().unwrap_or_else(|| panic!("{name}")).to_string();
        assert!(error.contains(name), "{error}: {name}");
    }
}

#[test]
fn a_small_domain_says_what_does_not_fit() {
    let error = Built::try_new(&Kernel::linux(), &[], 20 << 20).err().unwrap().to_string();
    assert!(error.contains("give it more"), "{error}");
    let error = Built::try_new(&Kernel::linux(), &vec![0; 20 << 20], RAM).err().unwrap().to_string();
    assert!(error.contains("the initrd"), "{error}");
}

#[test]
fn command_lines_that_do_not_fit_are_refused() {
    let elf = Kernel::linux().elf();
    let image = KernelImage::parse(&elf).unwrap();
    let layout = Layout::new(RAM).unwrap();
    let plan = |text: String| PvBoot::new(&image).unwrap().command_line(text).plan(layout).map(|_| ());
    assert!(plan("x".repeat(MAX_COMMAND_LINE)).is_ok());
    assert!(matches!(
        plan("x".repeat(MAX_COMMAND_LINE + 1)),
        Err(BuildError::CommandLine { length: 1024, .. })
    ));
    assert!(matches!(plan("a\0b".to_owned()), Err(BuildError::Nul)));
}

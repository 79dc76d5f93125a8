//! The state that a case begins with, in the form in which the assembler code of both sides loads it.

use crate::case::{CODE, Case, Mode};
use crate::{judge, memory};

/// Selectors of Linux's user segments.
pub(crate) const USER32_CS: u16 = 0x23;
/// See [`USER32_CS`].
pub(crate) const USER_DS: u16 = 0x2b;
/// See [`USER32_CS`].
pub(crate) const USER64_CS: u16 = 0x33;

/// The most bytes of code.
pub(crate) const MOST_CODE: usize = 512;
/// The most bytes that [`Case::memory`] may have, headers of 16 bytes included.
pub(crate) const MOST_MEMORY: usize = 4096;

/// Flags of RFLAGS that a case chooses: CF PF AF ZF SF TF DF OF NT AC ID.
const CHOSEN_FLAGS: u64 = 0x24_4dd5;
/// Those that are always set: the fixed one and IF.
const SET_FLAGS: u64 = 0x202;

/// Where the fields of [`Start`] lie. The fields from `rip` to `ss` are what IRETQ pops.
pub(crate) mod at {
    pub(crate) const RIP: usize = 128;
    pub(crate) const FS_BASE: usize = 168;
    pub(crate) const GS_BASE: usize = 176;
    pub(crate) const DATA_SELECTOR: usize = 184;
    pub(crate) const FXSAVE: usize = 192;
}

/// See the module.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Start {
    pub(crate) general: [u64; 16],
    pub(crate) rip: u64,
    pub(crate) cs: u64,
    pub(crate) rflags: u64,
    pub(crate) rsp: u64,
    pub(crate) ss: u64,
    pub(crate) fs_base: u64,
    pub(crate) gs_base: u64,
    pub(crate) data_selector: u64,
    pub(crate) fxsave: [u8; 512],
}

/// Bytes of [`Start`].
pub(crate) const START: usize = 704;

const _: () = {
    assert!(size_of::<Start>() == START);
    assert!(std::mem::offset_of!(Start, rip) == at::RIP);
    assert!(std::mem::offset_of!(Start, fs_base) == at::FS_BASE);
    assert!(std::mem::offset_of!(Start, gs_base) == at::GS_BASE);
    assert!(std::mem::offset_of!(Start, data_selector) == at::DATA_SELECTOR);
    assert!(std::mem::offset_of!(Start, fxsave) == at::FXSAVE);
};

/// A case in the form in which it is handed to both sides.
#[derive(Clone)]
pub(crate) struct Prepared {
    pub(crate) start: Start,
    /// Runs that the areas hold at the start: the case's memory, then its code.
    pub(crate) memory: Vec<u8>,
    /// The same for the processor, where its code is another.
    pub(crate) native_memory: Option<Vec<u8>>,
}

/// Sign-extends bit 47: WRFSBASE takes no other addresses.
fn canonical(address: u64) -> u64 {
    (address.cast_signed() << 16 >> 16).cast_unsigned()
}

fn word16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u16::from_le_bytes(*bytes))
}

fn set<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    if let Some(place) = bytes.get_mut(at..at + N) {
        place.copy_from_slice(&value);
    }
}

/// An image that FXRSTOR takes and that every processor keeps as it is: no reserved bits, and the summary bits of the
/// status word as the exception flags say.
fn normal_fxsave(mut image: [u8; 512]) -> [u8; 512] {
    let control = word16(&image, 0) & 0x1f3f | 0x40;
    let mut status = word16(&image, 2) & 0x7f7f;
    if status & !control & 0x3f != 0 {
        status |= 0x8080;
    }
    let opcode = word16(&image, 6) & 0x7ff;
    let mxcsr = word16(&image, 24);
    set(&mut image, 0, control.to_le_bytes());
    set(&mut image, 2, status.to_le_bytes());
    set(&mut image, 5, [0]);
    set(&mut image, 6, opcode.to_le_bytes());
    set(&mut image, 24, u32::from(mxcsr).to_le_bytes());
    set(&mut image, 28, [0; 4]);
    for register in (32..160).step_by(16) {
        set(&mut image, register + 10, [0; 6]);
    }
    set(&mut image, 416, [0; 96]);
    image
}

/// What a case really begins with: its choice, less what no program can choose.
pub(crate) fn normalize(case: &mut Case) {
    let registers = &mut case.registers;
    registers.rflags = registers.rflags & CHOSEN_FLAGS | SET_FLAGS;
    registers.fs_base = canonical(registers.fs_base);
    registers.gs_base = canonical(registers.gs_base);
    registers.fxsave = normal_fxsave(registers.fxsave);
    if case.mode == Mode::Compatibility {
        (registers.fs_base, registers.gs_base) = (0, 0);
        let (low, high) = registers.general.split_at_mut(8);
        low.iter_mut().for_each(|register| *register &= 0xffff_ffff);
        high.fill(0);
    }
}

/// Brings a normalized case into form; why it cannot be done.
pub(crate) fn prepare(case: &Case) -> Result<Prepared, &'static str> {
    let registers = &case.registers;
    if case.code.len() > MOST_CODE || case.instructions.is_empty() {
        return Err("it has too much code or none");
    }
    if case.address < CODE.start || case.address + case.code.len() as u64 > CODE.start + CODE.size {
        return Err("its code does not lie in its area");
    }
    let memory = memory(case, &case.code)?;
    let native_memory = judge::code_with_rules(case).map(|code| self::memory(case, &code)).transpose()?;
    let (cs, data_selector) = match case.mode {
        Mode::Long => (USER64_CS, 0),
        Mode::Compatibility => (USER32_CS, USER_DS),
    };
    let [_, _, _, _, rsp, ..] = registers.general;
    let start = Start {
        general: registers.general,
        rip: case.address,
        cs: cs.into(),
        rflags: registers.rflags,
        rsp,
        ss: USER_DS.into(),
        fs_base: registers.fs_base,
        gs_base: registers.gs_base,
        data_selector: data_selector.into(),
        fxsave: registers.fxsave,
    };
    Ok(Prepared { start, memory, native_memory })
}

/// What the areas hold at the start.
fn memory(case: &Case, code: &[u8]) -> Result<Vec<u8>, &'static str> {
    let mut memory = vec![0; MOST_MEMORY + MOST_CODE];
    let mut used = 0;
    let runs = case.memory.iter().map(|(address, data)| (*address, data.as_slice()));
    for (address, data) in runs.chain([(case.address, code)]) {
        if memory::offset(address, data.len()).is_none() {
            return Err("its memory lies outside of all areas");
        }
        used = memory::push(&mut memory, used, address, data).ok_or("it has too much memory")?;
    }
    memory.truncate(used);
    Ok(memory)
}

impl Case {
    /// Whether an address is that of a byte of its code.
    pub(crate) fn owns(&self, address: u64) -> bool {
        address.wrapping_sub(self.address) < self.code.len() as u64
    }
}

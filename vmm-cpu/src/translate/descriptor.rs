//! Descriptors of the GDT and LDT, and how they get into segment registers (Intel SDM 3A chapters 3, 6 and 8).
//!
//! Threat model: the tables are guest memory that other processors write at the same time. A descriptor is read once
//! and judged by what was read.

use super::core::{Flow, Leave, Machine, Place};
use super::cpu::RSP;
use super::exception::{Exception, vector};
use super::segment::{SegmentRegister, attribute, index, low8, low16, low32};

/// The table indicator of a selector: LDT.
const LOCAL: u16 = 1 << 2;

/// Attributes of a data segment in real mode: present, writable, accessed.
const REAL: u16 = 0x93;

/// Types of system descriptors (Intel SDM 3A table 3-2).
pub(crate) mod kind {
    pub(crate) const TSS_16: u8 = 1;
    pub(crate) const LDT: u8 = 2;
    pub(crate) const TSS_16_BUSY: u8 = 3;
    pub(crate) const CALL_GATE_16: u8 = 4;
    pub(crate) const TASK_GATE: u8 = 5;
    pub(crate) const INTERRUPT_GATE_16: u8 = 6;
    pub(crate) const TRAP_GATE_16: u8 = 7;
    pub(crate) const TSS: u8 = 9;
    pub(crate) const TSS_BUSY: u8 = 0xb;
    pub(crate) const CALL_GATE: u8 = 0xc;
    pub(crate) const INTERRUPT_GATE: u8 = 0xe;
    pub(crate) const TRAP_GATE: u8 = 0xf;
    /// What distinguishes a busy TSS.
    pub(crate) const BUSY: u8 = 1 << 1;
}

/// Whether a selector is null.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// The requested privilege level of a selector.
pub(crate) fn rpl(selector: u16) -> u8 {
    low8(u64::from(selector)) & 3
}

/// A descriptor as it was read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    /// Linear address.
    address: u64,
    /// The first 8 bytes.
    pub(crate) raw: u64,
    /// Those bytes, taken for a segment.
    pub(crate) register: SegmentRegister,
}

impl Descriptor {
    pub(crate) fn selector(&self) -> u16 {
        self.register.selector
    }

    pub(crate) fn dpl(&self) -> u8 {
        self.register.dpl()
    }

    pub(crate) fn is_present(&self) -> bool {
        self.register.has(attribute::PRESENT)
    }

    /// The type of a system descriptor, `None` for code and data.
    pub(crate) fn system_kind(&self) -> Option<u8> {
        (!self.register.has(attribute::CODE_OR_DATA)).then(|| self.register.kind())
    }

    pub(crate) fn is_code(&self) -> bool {
        self.register.has(attribute::CODE_OR_DATA | attribute::CODE)
    }

    pub(crate) fn is_conforming(&self) -> bool {
        self.is_code() && self.register.has(attribute::DOWN_CONFORMING)
    }

    /// Data, or code that may be read.
    pub(crate) fn is_readable(&self) -> bool {
        self.system_kind().is_none() && (!self.is_code() || self.register.has(attribute::WRITABLE_READABLE))
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.system_kind().is_none() && !self.is_code() && self.register.has(attribute::WRITABLE_READABLE)
    }

    /// Privilege lets code at `cpl` address it as data with the selector that it was read by.
    pub(crate) fn is_reachable(&self, cpl: u8) -> bool {
        self.is_conforming() || self.dpl() >= cpl.max(rpl(self.selector()))
    }
}

impl SegmentRegister {
    /// SS in 64-bit code after a null selector, or for a stack switch there: its privilege level remains.
    pub(crate) fn null_stack(selector: u16) -> Self {
        Self { selector, attributes: u16::from(rpl(selector)) << 5, ..Self::default() }
    }

    /// A data segment register after a null selector.
    pub(crate) fn null_data(selector: u16) -> Self {
        Self { selector, ..Self::default() }
    }

    /// With another requested privilege level: that of CS is the current one.
    pub(crate) fn with_rpl(self, rpl: u8) -> Self {
        Self { selector: self.selector & !3 | u16::from(rpl & 3), ..self }
    }

    /// Whether code at the less privileged level `cpl` could not have loaded it.
    fn is_too_privileged(&self, cpl: u8) -> bool {
        let conforming = attribute::CODE | attribute::DOWN_CONFORMING;
        !self.is_unusable() && self.dpl() < cpl && !self.has(conforming)
    }
}

impl Machine<'_> {
    /// The exception of a bad selector.
    #[cold]
    pub(crate) fn selector_fault(&mut self, vector: u8, selector: u16) -> Leave {
        self.raise(Exception::with_error(vector, selector & !3))
    }

    /// A linear address of the processor's own, with as many bits as the mode gives it.
    pub(crate) fn system_address(&self, va: u64) -> u64 {
        if self.cpu.long_mode() { va } else { va & 0xffff_ffff }
    }

    /// Linear address of the descriptor, `bytes` long, that a selector stands for; `None` outside its table.
    fn descriptor_address(&self, selector: u16, bytes: u32) -> Option<u64> {
        let (base, limit) = if selector & LOCAL == 0 {
            (self.cpu.gdtr.base, u32::from(self.cpu.gdtr.limit))
        } else if self.cpu.ldtr.is_unusable() {
            return None;
        } else {
            (self.cpu.ldtr.base, self.cpu.ldtr.limit)
        };
        let offset = u32::from(selector & !7);
        (offset + bytes - 1 <= limit).then(|| self.system_address(base.wrapping_add(u64::from(offset))))
    }

    /// The descriptor of `selector`, `None` for null and outside the tables.
    pub(crate) fn find_descriptor(&mut self, selector: u16) -> Flow<Option<Descriptor>> {
        if is_null(selector) {
            return Ok(None);
        }
        let Some(address) = self.descriptor_address(selector, 8) else { return Ok(None) };
        let raw = self.load_system(address)?;
        let register = SegmentRegister::from_descriptor(selector, raw);
        Ok(Some(Descriptor { address, raw, register }))
    }

    /// The descriptor of `selector`. The exception is `vector` with error code 0 for null and the selector outside the
    /// tables.
    pub(crate) fn descriptor(&mut self, selector: u16, vector: u8) -> Flow<Descriptor> {
        match self.find_descriptor(selector)? {
            Some(descriptor) => Ok(descriptor),
            None => Err(self.selector_fault(vector, selector)),
        }
    }

    /// The second half of a system descriptor in long mode, whose type field must be zero.
    pub(crate) fn upper_half(&mut self, descriptor: &Descriptor, vector: u8) -> Flow<u64> {
        let selector = descriptor.selector();
        if self.descriptor_address(selector, 16).is_none() {
            return Err(self.selector_fault(vector, selector));
        }
        let upper: u64 = self.load_system(descriptor.address.wrapping_add(8))?;
        if upper >> 40 & 0x1f != 0 { Err(self.selector_fault(vector, selector)) } else { Ok(upper) }
    }

    /// Sets the accessed bit of a code or data descriptor.
    pub(crate) fn mark_accessed(&mut self, descriptor: &mut Descriptor) -> Flow {
        if !descriptor.register.has(attribute::ACCESSED) {
            self.change_kind(descriptor, |kind| kind | 1)?;
        }
        Ok(())
    }

    /// Changes the busy bit of a TSS descriptor.
    pub(crate) fn mark_busy(&mut self, descriptor: &mut Descriptor, busy: bool) -> Flow {
        self.change_kind(descriptor, |kind| if busy { kind | kind::BUSY } else { kind & !kind::BUSY })
    }

    fn change_kind(&mut self, descriptor: &mut Descriptor, f: impl Fn(u8) -> u8) -> Flow {
        let place = Place::data(self.system_address(descriptor.address.wrapping_add(5)));
        self.as_system(|machine| {
            machine.modify::<u8>(place, true, |byte| u64::from(f(low8(byte) & 0xf)) | byte & 0xf0)
        })?;
        descriptor.register.set_kind(f(descriptor.register.kind()));
        Ok(())
    }

    /// Loads a segment register that is not CS (MOV, POP, LDS, ...).
    pub(crate) fn load_segment(&mut self, segment: usize, selector: u16) -> Flow {
        let register = self.segment_to_load(segment, selector)?;
        *self.cpu.segment_mut(segment) = register;
        if segment == index::SS {
            self.update_mode();
        }
        Ok(())
    }

    /// What [`Machine::load_segment`] would load, after all checks.
    fn segment_to_load(&mut self, segment: usize, selector: u16) -> Flow<SegmentRegister> {
        let cpl = self.mode.cpl;
        if !self.cpu.protected() {
            let mut register = *self.cpu.segment(segment);
            if register.is_unusable() {
                // A null selector of protected mode leaves nothing that real mode could keep.
                register = SegmentRegister { limit: 0xffff, attributes: REAL, ..register };
            }
            register.load_real(selector);
            return Ok(register);
        }
        if self.cpu.virtual_8086() {
            return Ok(SegmentRegister::virtual_8086(selector));
        }
        if segment == index::SS {
            if is_null(selector) && self.is_64() && cpl < 3 && rpl(selector) == cpl {
                return Ok(SegmentRegister::null_stack(selector));
            }
            return self.stack_segment(selector, cpl, vector::GP);
        }
        self.data_segment(selector, cpl, vector::GP)
    }

    /// The contents of DS, ES, FS or GS for a selector, in protected mode. A bad selector is exception `vector`, a
    /// segment that is not present #NP.
    pub(crate) fn data_segment(&mut self, selector: u16, cpl: u8, vector: u8) -> Flow<SegmentRegister> {
        if is_null(selector) {
            return Ok(SegmentRegister::null_data(selector));
        }
        let mut descriptor = self.descriptor(selector, vector)?;
        if !descriptor.is_readable() || !descriptor.is_reachable(cpl) {
            return Err(self.selector_fault(vector, selector));
        }
        if !descriptor.is_present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.register)
    }

    /// The contents of SS at privilege level `cpl` for a selector, in protected mode. A bad selector is exception
    /// `vector`, a segment that is not present #SS.
    pub(crate) fn stack_segment(&mut self, selector: u16, cpl: u8, vector: u8) -> Flow<SegmentRegister> {
        let mut descriptor = self.descriptor(selector, vector)?;
        if rpl(selector) != cpl || descriptor.dpl() != cpl || !descriptor.is_writable() {
            return Err(self.selector_fault(vector, selector));
        }
        if !descriptor.is_present() {
            return Err(self.selector_fault(vector::SS, selector));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.register)
    }

    /// Makes the data segment registers unusable that code at the outer privilege level `cpl` could not have loaded.
    /// Their bases stay, which 64-bit code sees in those of FS and GS.
    pub(crate) fn drop_inner_segments(&mut self, cpl: u8) {
        for segment in [index::ES, index::DS, index::FS, index::GS] {
            let register = self.cpu.segment_mut(segment);
            if register.is_too_privileged(cpl) {
                (register.selector, register.attributes) = (0, 0);
            }
        }
    }

    /// Loads SS and the stack pointer, which the size of the new stack cuts to its width. `update_mode` is still due.
    pub(crate) fn set_stack(&mut self, segment: SegmentRegister, pointer: u64, is_64: bool) {
        let mask = stack_mask(&segment, is_64);
        let rsp = if mask == 0xffff { self.cpu.r(RSP) & !mask | pointer & mask } else { pointer & mask };
        *self.cpu.segment_mut(index::SS) = segment;
        self.cpu.set_r(RSP, rsp);
    }

    /// The contents of LDTR for a selector. The exception of a bad one is `vector`.
    pub(crate) fn local_table(&mut self, selector: u16, vector: u8) -> Flow<SegmentRegister> {
        if is_null(selector) {
            return Ok(SegmentRegister::null_data(selector));
        }
        let descriptor = self.global_descriptor(selector, vector)?;
        if descriptor.system_kind() != Some(kind::LDT) {
            return Err(self.selector_fault(vector, selector));
        }
        self.present_system_segment(&descriptor, vector)
    }

    /// LTR: loads the task register and marks the TSS busy.
    pub(crate) fn load_task_register(&mut self, selector: u16) -> Flow {
        let mut descriptor = self.global_descriptor(selector, vector::GP)?;
        let is_tss = match descriptor.system_kind() {
            Some(kind::TSS) => true,
            Some(kind::TSS_16) => !self.cpu.long_mode(),
            _ => false,
        };
        if !is_tss {
            return Err(self.selector_fault(vector::GP, selector));
        }
        let mut register = self.present_system_segment(&descriptor, vector::GP)?;
        self.mark_busy(&mut descriptor, true)?;
        register.set_kind(descriptor.register.kind());
        self.cpu.tr = register;
        Ok(())
    }

    /// The descriptor of a selector that must be one of the GDT.
    pub(crate) fn global_descriptor(&mut self, selector: u16, vector: u8) -> Flow<Descriptor> {
        if selector & LOCAL != 0 {
            return Err(self.selector_fault(vector, selector));
        }
        self.descriptor(selector, vector)
    }

    /// LDT or TSS with the whole base address, which takes a second half in long mode.
    fn present_system_segment(&mut self, descriptor: &Descriptor, vector: u8) -> Flow<SegmentRegister> {
        let selector = descriptor.selector();
        if !descriptor.is_present() {
            let vector = if vector == vector::TS { vector } else { vector::NP };
            return Err(self.selector_fault(vector, selector));
        }
        let mut register = descriptor.register;
        if self.cpu.long_mode() {
            register.base |= self.upper_half(descriptor, vector)? << 32;
            if !self.is_canonical(register.base) {
                return Err(self.selector_fault(vector, selector));
            }
        }
        Ok(register)
    }
}

/// What of a stack pointer counts.
pub(crate) fn stack_mask(segment: &SegmentRegister, is_64: bool) -> u64 {
    if is_64 {
        u64::MAX
    } else if segment.has(attribute::BIG) {
        0xffff_ffff
    } else {
        0xffff
    }
}

/// A gate of the IDT, GDT or LDT.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gate {
    /// Type, S included.
    pub(crate) kind: u8,
    pub(crate) dpl: u8,
    pub(crate) is_present: bool,
    /// Of the code segment or TSS.
    pub(crate) selector: u16,
    pub(crate) offset: u64,
    /// Parameters that a call gate copies, 0 to 31.
    pub(crate) parameters: u64,
    /// Interrupt stack table entry, 0 for none.
    pub(crate) ist: u64,
}

impl Gate {
    /// A gate of `low` and, in long mode, `high`.
    pub(crate) fn new(low: u64, high: u64) -> Self {
        Self {
            kind: low8(low >> 40) & 0x1f,
            dpl: low8(low >> 45) & 3,
            is_present: low >> 47 & 1 != 0,
            selector: low16(low >> 16),
            offset: low & 0xffff | low >> 32 & 0xffff_0000 | u64::from(low32(high)) << 32,
            parameters: low >> 32 & 0x1f,
            ist: low >> 32 & 7,
        }
    }

    /// Whether the gate is one of the 32- and 64-bit kinds.
    pub(crate) fn is_wide(&self) -> bool {
        self.kind & 8 != 0
    }

    /// The offset that a gate of this width holds.
    pub(crate) fn target(&self) -> u64 {
        if self.is_wide() { self.offset } else { self.offset & 0xffff }
    }
}

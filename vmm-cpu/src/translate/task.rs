//! Hardware task switches (Intel SDM 3A chapter 9), which legacy protected mode has.
//!
//! A switch has two halves. [`Machine::switch_task`] can fail in the old task and changes nothing of the processor then.
//! [`Machine::load_task`] loads the segments of the new one; what is wrong with those is the new task's exception.

use super::core::{Flow, Machine, Place, Reason};
use super::cpu::{RAX, cr0};
use super::descriptor::{Descriptor, kind, rpl};
use super::exception::{Event, Exception, Stack, dr6, vector};
use super::flags::bits;
use super::segment::{SegmentRegister, index, low16};

/// Why a task is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TaskSwitch {
    Jump,
    Call,
    /// IRET with NT set.
    Return,
    /// An interrupt or exception, with the RFLAGS that the old task shall be resumed with.
    Event {
        flags: u64,
        error: Option<u32>,
    },
}

impl TaskSwitch {
    /// The new task returns to the old one.
    fn nests(self) -> bool {
        matches!(self, TaskSwitch::Call | TaskSwitch::Event { .. })
    }
}

/// Breakpoints that last until the next task switch: L0 to L3 and LE of DR7.
const DR7_LOCAL: u64 = 0x155;

/// Where a TSS holds what.
#[derive(Debug)]
struct Layout {
    /// Size of a field in bytes.
    bytes: u64,
    /// Least limit of a TSS.
    limit: u32,
    cr3: Option<u64>,
    /// RIP, RFLAGS and the eight registers follow each other.
    rip: u64,
    /// ES, CS, SS, DS and so on.
    segments: u64,
    segment_count: usize,
    ldt: u64,
    /// Holds the debug trap flag.
    trap: Option<u64>,
}

static NARROW: Layout = Layout {
    bytes: 2,
    limit: 0x2b,
    cr3: None,
    rip: 0xe,
    segments: 0x22,
    segment_count: 4,
    ldt: 0x2a,
    trap: None,
};
static WIDE: Layout = Layout {
    bytes: 4,
    limit: 0x67,
    cr3: Some(0x1c),
    rip: 0x20,
    segments: 0x48,
    segment_count: 6,
    ldt: 0x60,
    trap: Some(0x64),
};

impl Layout {
    /// That of a TSS of the given type, and whether it is busy.
    fn of(tss_kind: u8) -> Option<(&'static Self, bool)> {
        match tss_kind {
            kind::TSS_16 => Some((&NARROW, false)),
            kind::TSS_16_BUSY => Some((&NARROW, true)),
            kind::TSS => Some((&WIDE, false)),
            kind::TSS_BUSY => Some((&WIDE, true)),
            _ => None,
        }
    }
}

/// A task whose registers are loaded, its segments not yet.
#[derive(Debug)]
pub(crate) struct Task {
    /// Selectors of the six segment registers.
    selectors: [u16; 6],
    ldt: u16,
    bytes: u64,
    error: Option<u32>,
    traps: bool,
}

/// What a TSS holds.
struct Saved {
    cr3: Option<u64>,
    rip: u64,
    flags: u64,
    registers: [u64; 8],
    task: Task,
}

impl Machine<'_> {
    /// A whole task switch by an instruction, which is over once it has left the old task: later exceptions are
    /// delivered in the new one.
    pub(crate) fn run_task(&mut self, selector: u16, how: TaskSwitch) -> Flow {
        let task = self.switch_task(selector, how)?;
        if self.load_task(&task).is_ok() {
            return Ok(());
        }
        match std::mem::take(&mut self.reason) {
            Reason::Exception(exception) => self.take(Event::Exception(exception)),
            other => Err(self.leave(other)),
        }
    }

    /// Saves the running task and loads the general registers of the one that `selector` stands for.
    pub(crate) fn switch_task(&mut self, selector: u16, how: TaskSwitch) -> Flow<Task> {
        let bad = if how == TaskSwitch::Return { vector::TS } else { vector::GP };
        let mut new = self.global_descriptor(selector, bad)?;
        let layout = new.system_kind().and_then(Layout::of);
        let Some((layout, _)) = layout.filter(|&(_, busy)| busy == (how == TaskSwitch::Return)) else {
            return Err(self.selector_fault(bad, selector));
        };
        if !new.is_present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        if new.register.limit < layout.limit {
            return Err(self.selector_fault(vector::TS, selector));
        }
        let old = self.cpu.tr;
        let Some((old_layout, _)) = Layout::of(old.kind()).filter(|(layout, _)| layout.limit <= old.limit)
        else {
            return Err(self.selector_fault(vector::TS, old.selector));
        };
        let flags = match how {
            TaskSwitch::Event { flags, .. } => flags,
            TaskSwitch::Return => self.flags() & !bits::NT,
            _ => self.flags(),
        };
        self.save_task(old_layout, flags)?;
        let saved = self.saved_task(layout, new.register.base)?;
        if how.nests() {
            self.store_tss(new.register.base, 0, 2, u64::from(old.selector))?;
        } else {
            self.release_task(old.selector)?;
        }
        self.occupy_task(&mut new, how)?;
        Ok(self.adopt_task(saved, new.register, how))
    }

    /// Stores the running task's registers into its TSS.
    fn save_task(&mut self, layout: &Layout, flags: u64) -> Flow {
        let (base, bytes) = (self.cpu.tr.base, layout.bytes);
        let rip = self.cpu.rip;
        self.store_tss(base, layout.rip, bytes, rip)?;
        self.store_tss(base, layout.rip + bytes, bytes, flags)?;
        for (register, slot) in (RAX..8).zip(2..) {
            let value = self.cpu.r(register);
            self.store_tss(base, layout.rip + slot * bytes, bytes, value)?;
        }
        for (segment, slot) in (0..layout.segment_count).zip(0..) {
            let selector = u64::from(self.cpu.segment(segment).selector);
            self.store_tss(base, layout.segments + slot * bytes, 2, selector)?;
        }
        Ok(())
    }

    /// Reads a TSS.
    fn saved_task(&mut self, layout: &Layout, base: u64) -> Flow<Saved> {
        let bytes = layout.bytes;
        let mut registers = [0; 8];
        for (register, slot) in registers.iter_mut().zip(2..) {
            *register = self.load_tss(base, layout.rip + slot * bytes, bytes)?;
        }
        let mut selectors = [0; 6];
        for (selector, slot) in selectors.iter_mut().take(layout.segment_count).zip(0..) {
            *selector = low16(self.load_tss(base, layout.segments + slot * bytes, 2)?);
        }
        let cr3 = match layout.cr3 {
            Some(offset) => Some(self.load_tss(base, offset, 4)?),
            None => None,
        };
        let traps = match layout.trap {
            Some(offset) => self.load_tss(base, offset, 2)? & 1 != 0,
            None => false,
        };
        let rip = self.load_tss(base, layout.rip, bytes)?;
        let flags = self.load_tss(base, layout.rip + bytes, bytes)?;
        let ldt = low16(self.load_tss(base, layout.ldt, 2)?);
        Ok(Saved { cr3, rip, flags, registers, task: Task { selectors, ldt, bytes, error: None, traps } })
    }

    /// Clears the busy bit of the old task, to which nothing returns.
    fn release_task(&mut self, selector: u16) -> Flow {
        let mut descriptor = self.global_descriptor(selector, vector::TS)?;
        self.mark_busy(&mut descriptor, false)
    }

    fn occupy_task(&mut self, descriptor: &mut Descriptor, how: TaskSwitch) -> Flow {
        if how == TaskSwitch::Return { Ok(()) } else { self.mark_busy(descriptor, true) }
    }

    /// Makes a task the running one; its segment registers hold selectors only.
    fn adopt_task(&mut self, saved: Saved, tr: SegmentRegister, how: TaskSwitch) -> Task {
        let Saved { cr3, rip, flags, registers, mut task } = saved;
        self.cpu.tr = tr;
        self.cpu.cr0 |= cr0::TS;
        self.cpu.dr7 &= !DR7_LOCAL;
        if let Some(cr3) = cr3.filter(|_| self.cpu.cr0 & cr0::PG != 0) {
            self.cpu.cr3 = cr3;
            self.tlb.flush_local();
        }
        self.cpu.rip = rip;
        self.cpu.flags.set(if how.nests() { flags | bits::NT } else { flags });
        // A 16-bit TSS has no upper halves.
        let upper = if task.bytes == 2 { 0xffff_0000 } else { 0 };
        for (register, value) in (RAX..8).zip(registers) {
            self.cpu.set_r(register, value | upper);
        }
        for (segment, selector) in task.selectors.into_iter().enumerate() {
            *self.cpu.segment_mut(segment) = SegmentRegister::null_data(selector);
        }
        self.cpu.ldtr = SegmentRegister::null_data(task.ldt);
        if let TaskSwitch::Event { error, .. } = how {
            task.error = error;
        }
        self.update_mode();
        task
    }

    /// Loads the segments of a task and completes its start. RIP is the task's, so exceptions are delivered in it.
    pub(crate) fn load_task(&mut self, task: &Task) -> Flow {
        let [es, cs, ss, ds, fs, gs] = task.selectors;
        self.cpu.ldtr = self.local_table(task.ldt, vector::TS)?;
        if self.cpu.virtual_8086() {
            for (segment, selector) in task.selectors.into_iter().enumerate() {
                *self.cpu.segment_mut(segment) = SegmentRegister::virtual_8086(selector);
            }
        } else {
            let cpl = rpl(cs);
            let code = self.task_code(cs)?;
            let stack = self.stack_segment(ss, cpl, vector::TS)?;
            *self.cpu.segment_mut(index::CS) = code;
            *self.cpu.segment_mut(index::SS) = stack;
            self.update_mode();
            for (segment, selector) in [(index::ES, es), (index::DS, ds), (index::FS, fs), (index::GS, gs)] {
                *self.cpu.segment_mut(segment) = self.data_segment(selector, cpl, vector::TS)?;
            }
        }
        self.update_mode();
        if self.cpu.rip > u64::from(self.cpu.cs().limit) {
            return Err(self.gp(0));
        }
        if let Some(error) = task.error {
            let mut stack = Stack::current(self, false);
            stack.push(self, task.bytes, u64::from(error))?;
            stack.enter(self);
        }
        if task.traps {
            return Err(self.raise(Exception::debug(dr6::BT)));
        }
        Ok(())
    }

    /// The contents of CS for a task's selector.
    fn task_code(&mut self, selector: u16) -> Flow<SegmentRegister> {
        let mut code = self.descriptor(selector, vector::TS)?;
        let fits =
            if code.is_conforming() { code.dpl() <= rpl(selector) } else { code.dpl() == rpl(selector) };
        if !code.is_code() || !fits {
            return Err(self.selector_fault(vector::TS, selector));
        }
        if !code.is_present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        self.mark_accessed(&mut code)?;
        Ok(code.register)
    }

    fn load_tss(&mut self, base: u64, offset: u64, bytes: u64) -> Flow<u64> {
        let place = Place::data(self.system_address(base.wrapping_add(offset)));
        self.as_system(|m| m.load_sized(place, bytes))
    }

    fn store_tss(&mut self, base: u64, offset: u64, bytes: u64, value: u64) -> Flow {
        let place = Place::data(self.system_address(base.wrapping_add(offset)));
        self.as_system(|m| m.store_sized(place, bytes, value))
    }
}

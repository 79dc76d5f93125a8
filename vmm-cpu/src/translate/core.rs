//! What the handlers of instructions work on: the vCPU with its TLB, and the memory accesses that they make.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use iced_x86::Instruction;
use rustc_hash::FxHashMap;
use vmm_memory::vm_memory::GuestAddress;

use super::apic::LocalApic;
use super::cpu::{Cpu, cr0, cr4};
use super::exception::{Event, Exception, vector};
use super::flags::bits;
use super::memory::{
    Access, HostWord, MemoryMap, Order, PAGE, PAGE_MASK, Paging, Reach, Slot, Tlb, Translation, walk,
};
use super::ops::Tables;
use super::segment::{attribute, index};
use super::signals::Signals;
use super::vm::Shared;
use crate::debug::DebugRequest;
use crate::exact::ExactStop;
use crate::state::XsaveArea;
use crate::vcpu::{Halt, VcpuIo};

/// The instruction did not complete; [`Core::reason`] says why. Its effects are undone or never happened.
#[derive(Debug)]
pub(crate) struct Leave;

/// What a handler returns.
pub(crate) type Flow<T = ()> = std::result::Result<T, Leave>;

/// Why an instruction did not complete.
#[derive(Debug, Default)]
pub(crate) enum Reason {
    /// It has done a part of its work, as its registers say, and goes on when the loop has looked around.
    #[default]
    None,
    /// It faulted.
    Exception(Exception),
    /// `run` returns. The instruction is executed again when it goes on.
    Halt(Halt),
    /// The interpreter does not know it.
    Unhandled(String),
}

/// A linear address and the segment that it came from, which decides the exception of a bad one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) va: u64,
    pub(crate) segment: u8,
}

impl Place {
    /// An address that is no offset in a segment that matters.
    pub(crate) fn data(va: u64) -> Self {
        Self { va, segment: 3 }
    }

    pub(crate) fn stack(va: u64) -> Self {
        Self { va, segment: 2 }
    }

    pub(crate) fn plus(self, bytes: u64) -> Self {
        Self { va: self.va.wrapping_add(bytes), ..self }
    }
}

/// What follows from control registers, CS and SS, kept at hand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mode {
    /// 16, 32 or 64.
    pub(crate) code_bits: u32,
    pub(crate) cpl: u8,
    /// What of RSP addresses the stack.
    pub(crate) stack_mask: u64,
    /// What of RIP addresses code.
    pub(crate) ip_mask: u64,
    pub(crate) reach: Reach,
    /// SSE instructions may run.
    pub(crate) sse: bool,
}

/// A store to a page that code was decoded from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodeStore {
    pub(crate) gpa: u64,
    pub(crate) bytes: u64,
}

/// A vCPU without its block cache.
pub(crate) struct Core {
    pub(crate) cpu: Cpu,
    /// It has a copy of the memory map.
    pub(crate) tlb: Tlb,
    /// What that is a copy of.
    pub(crate) shared_map: Arc<MemoryMap>,
    pub(crate) mode: Mode,
    pub(crate) reason: Reason,
    /// How many instructions of the running block may still start; handlers lower it to end the block after their
    /// own.
    pub(crate) limit: usize,
    /// Rarely executed instructions, which handlers take apart anew.
    pub(crate) rare: Vec<Instruction>,
    pub(crate) code_stores: Vec<CodeStore>,
    /// Pages with code whose stores other vCPUs may not notice yet, and the epoch from which on they do.
    pub(crate) unsettled: FxHashMap<u64, u64>,
    /// How often stores to pages with code were noticed.
    pub(crate) noticed: FxHashMap<u64, u32>,
    /// Pages of code that are stored to all the time are not watched, see `code_stores.rs`.
    pub(crate) checks_code: bool,
    pub(crate) tables: &'static Tables,
    /// Events that another backend was about to deliver when the state was saved.
    pub(crate) injected: Option<Event>,
    pub(crate) apic: Option<LocalApic>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) index: u32,
    pub(crate) cpuid: crate::cpuid::CpuidTable,
    /// CR4 bits that CPUID lets the guest set.
    pub(crate) cr4_allowed: u64,
    /// EFER bits, likewise.
    pub(crate) efer_allowed: u64,
    pub(crate) debug: DebugRequest,
    /// Data accesses are compared with watchpoints.
    pub(crate) watching: bool,
    /// Watchpoints of the guest (bits 0 to 3) and of the debugger (bits 8 to 15) that the instruction hit.
    pub(crate) watch_hits: u16,
    /// A single-step trap follows the running instruction, unless that goes through a gate.
    pub(crate) trap_pending: bool,
    /// RFLAGS.RF was loaded by the running instruction and is for the next.
    pub(crate) keeps_rf: bool,
    /// Value of `instructions` before the instruction that RFLAGS.RF was last loaded for.
    pub(crate) rf_loaded_at: Option<u64>,
    /// RFLAGS.RF is cleared by each instruction, as they run one by one; otherwise it holds as [`Core::flags`] says.
    pub(crate) rf_is_kept: bool,
    /// The debugger's breakpoint here was reported; the instruction is due.
    pub(crate) reported: Option<u64>,
    /// The loop looks at events before the next block.
    pub(crate) urgent: bool,
    /// The interrupt shadows, of STI and MOV SS, that the running instruction is in.
    pub(crate) held: (bool, bool),
    /// An interrupt whose vector the PIC knows was posted.
    pub(crate) ext_int: bool,
    /// Instructions left until time is looked at.
    pub(crate) budget: i64,
    /// When the timer of the local APIC is due, in nanoseconds.
    pub(crate) deadline: Option<u64>,
    /// Instructions executed before the running block.
    pub(crate) instructions: u64,
    /// Those of the running block before the running one.
    pub(crate) position: usize,
    /// How many instructions a deterministic clock has heard of.
    pub(crate) told: u64,
    /// Where `run` returns.
    pub(crate) stop: ExactStop,
    /// PAUSEs since another thread got its turn.
    pub(crate) pauses: u32,
    /// Base and limit of CS that remembered blocks were found with.
    code_segment: (u64, u32),
    /// See [`TranslateOptions::digest`](super::TranslateOptions::digest).
    pub(crate) digest: Option<u64>,
    /// Another engine runs the guest between two instructions: no translation of an address is kept, and what stores replace
    /// is looked at.
    pub(crate) keeps_nothing: bool,
    /// Then: a store has replaced what reads as a present entry of a page table.
    pub(crate) entries_replaced: bool,
    /// Another engine is asked to run programs before software does.
    pub(crate) asks_native: bool,
    /// Components of XCR0 beyond SSE, in the standard format of XSAVE, where there are any: what programs of another engine
    /// have in them. The first two there mean nothing.
    pub(crate) extended: Option<XsaveArea>,
    pub(crate) signals: Arc<Signals>,
    pub(crate) counts: super::vcpu::Counts,
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core").field("index", &self.index).field("cpu", &self.cpu).finish_non_exhaustive()
    }
}

/// A vCPU that runs, with what it calls for I/O.
pub(crate) struct Machine<'a> {
    core: &'a mut Core,
    pub(crate) io: &'a mut dyn VcpuIo,
}

impl Deref for Machine<'_> {
    type Target = Core;

    #[inline(always)]
    fn deref(&self) -> &Core {
        self.core
    }
}

impl DerefMut for Machine<'_> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut Core {
        self.core
    }
}

impl Core {
    pub(crate) fn new(
        index: u32,
        shared: Arc<Shared>,
        signals: Arc<Signals>,
        apic: Option<LocalApic>,
    ) -> Self {
        let cpuid = shared.cpuid.for_vcpu(index, shared.max_vcpus);
        let mode = Mode {
            code_bits: 16,
            cpl: 0,
            stack_mask: 0xffff,
            ip_mask: 0xffff_ffff,
            reach: Reach::SupervisorAll,
            sse: false,
        };
        let shared_map = shared.map();
        let mut core = Self {
            cpu: Cpu::at_reset(),
            tlb: Tlb::new(own_map(&shared_map)),
            shared_map,
            mode,
            reason: Reason::None,
            limit: 0,
            rare: Vec::new(),
            code_stores: Vec::new(),
            unsettled: FxHashMap::default(),
            noticed: FxHashMap::default(),
            checks_code: false,
            tables: Tables::get(),
            injected: None,
            apic,
            cr4_allowed: super::cpuid::cr4_allowed(&cpuid),
            efer_allowed: super::cpuid::efer_allowed(&cpuid),
            cpuid,
            index,
            debug: DebugRequest::none(),
            watching: false,
            watch_hits: 0,
            trap_pending: false,
            keeps_rf: false,
            rf_loaded_at: None,
            rf_is_kept: true,
            reported: None,
            urgent: true,
            held: (false, false),
            ext_int: false,
            budget: 0,
            deadline: None,
            instructions: 0,
            position: 0,
            told: 0,
            stop: ExactStop::none(),
            pauses: 0,
            code_segment: (0, 0),
            digest: shared.options.digest.then_some(0),
            keeps_nothing: false,
            asks_native: false,
            extended: None,
            entries_replaced: false,
            signals,
            counts: super::vcpu::Counts::default(),
            shared,
        };
        core.update_mode();
        core
    }

    /// Says why the instruction did not complete.
    #[cold]
    pub(crate) fn leave(&mut self, reason: Reason) -> Leave {
        self.reason = reason;
        Leave
    }

    #[cold]
    pub(crate) fn raise(&mut self, exception: Exception) -> Leave {
        self.leave(Reason::Exception(exception))
    }

    /// #GP.
    #[cold]
    pub(crate) fn gp(&mut self, error: u16) -> Leave {
        self.raise(Exception::with_error(vector::GP, error))
    }

    /// #UD.
    #[cold]
    pub(crate) fn ud(&mut self) -> Leave {
        self.raise(Exception::new(vector::UD))
    }

    #[cold]
    pub(crate) fn unhandled(&mut self, reason: impl Into<String>) -> Leave {
        self.leave(Reason::Unhandled(reason.into()))
    }

    /// What a serializing instruction owes to other vCPUs (Intel SDM 3A 9.3): its stores so far are visible before
    /// anything that follows is loaded, and what they wrote to code before is executed (9.1.3), also right behind it.
    pub(crate) fn serialize(&mut self) {
        fence(Ordering::SeqCst);
        self.end_block();
    }

    /// The block ends after the running instruction.
    #[inline(always)]
    pub(crate) fn end_block(&mut self) {
        self.limit = 0;
    }

    /// Recomputes what follows from registers that changed. The block ends.
    pub(crate) fn update_mode(&mut self) {
        let cpu = &self.cpu;
        let code_bits = cpu.code_bits();
        let cpl = cpu.cpl();
        let reach = cpu.reach(cpl);
        let stack_mask = if code_bits == 64 {
            u64::MAX
        } else if cpu.segment(index::SS).has(attribute::BIG) {
            0xffff_ffff
        } else {
            0xffff
        };
        let ip_mask = if code_bits == 64 { u64::MAX } else { 0xffff_ffff };
        let sse = cpu.cr0 & (cr0::EM | cr0::TS) == 0 && cpu.cr4 & cr4::OSFXSR != 0;
        self.mode = Mode { code_bits, cpl, stack_mask, ip_mask, reach, sse };
        self.tlb.set_reach(reach);
        let cs = self.cpu.cs();
        let code_segment = if code_bits == 64 { (0, u32::MAX) } else { (cs.base, cs.limit) };
        if code_segment != self.code_segment {
            self.code_segment = code_segment;
            self.tlb.forget_lookups();
        }
        self.urgent = true;
        self.end_block();
    }

    /// As [`Core::update_mode`], where nothing but RFLAGS.AC changed.
    pub(crate) fn update_reach(&mut self) {
        self.mode.reach = self.cpu.reach(self.mode.cpl);
        self.tlb.set_reach(self.mode.reach);
    }

    /// RFLAGS as the instruction at RIP finds it. Where instructions do not run one by one none clears RF, which then is
    /// for the instruction that it was loaded for.
    pub(crate) fn flags(&self) -> u64 {
        let now = self.instructions + self.position as u64;
        let has_run = !self.rf_is_kept && self.rf_loaded_at != Some(now);
        self.cpu.flags.get() & if has_run { !bits::RF } else { u64::MAX }
    }

    /// A block begins at RIP.
    #[cold]
    pub(crate) fn add_to_digest(&mut self) {
        let Some(mut digest) = self.digest else { return };
        let vectors = self.cpu.all_xmm();
        let words = (0..16)
            .map(|slot| self.cpu.r(slot))
            .chain([self.cpu.rip, self.cpu.flags.get()])
            .chain(vectors.into_iter().flat_map(super::word::halves));
        for word in words {
            digest = (digest.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
        }
        self.digest = Some(digest);
    }

    /// Whether addresses are those of 64-bit code.
    #[inline(always)]
    pub(crate) fn is_64(&self) -> bool {
        self.mode.code_bits == 64
    }

    pub(crate) fn paging(&self) -> Paging {
        let (user, smap_lifted) = match self.mode.reach {
            Reach::User | Reach::UserAligned => (true, true),
            Reach::Supervisor => (false, false),
            Reach::SupervisorAll => (false, true),
        };
        let cpu = &self.cpu;
        let (cr0, cr3, cr4, efer, pkru) = (cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer, cpu.pkru);
        Paging { cr0, cr3, cr4, efer, user, smap_lifted, pkru }
    }

    pub(crate) fn map(&self) -> &Arc<MemoryMap> {
        self.tlb.map()
    }

    /// Whether 4-level paging could translate `va`.
    pub(crate) fn is_canonical(&self, va: u64) -> bool {
        is_canonical(va)
    }

    /// #GP(0) or #SS(0) for an address that no page tables translate. What crosses from one page into the next is judged
    /// by that before either page is looked for.
    pub(crate) fn require_canonical(&mut self, place: Place) -> Flow {
        if !self.cpu.long_mode() || is_canonical(place.va) {
            return Ok(());
        }
        let vector = if usize::from(place.segment) == index::SS { vector::SS } else { vector::GP };
        Err(self.raise(Exception::with_error(vector, 0)))
    }

    /// #AC(0) for an access of that many bytes where alignment is checked and it has none (AMD APM 2 8.2.18). What is no
    /// power of two is a number of words, and bad addresses come first.
    pub(crate) fn require_aligned(&mut self, place: Place, bytes: usize) -> Flow {
        if self.mode.reach != Reach::UserAligned {
            return Ok(());
        }
        let word = match bytes {
            2 | 4 | 8 | 16 => bytes as u64,
            10 => 8,
            14 | 94 => 2,
            28 | 108 | 512 => 4,
            _ => 1,
        };
        if place.va.is_multiple_of(word) {
            return Ok(());
        }
        self.require_canonical(place)?;
        self.require_canonical(place.plus(word - 1))?;
        Err(self.raise(Exception::with_error(vector::AC, 0)))
    }

    /// Faults as an access does that comes in several pieces where that to the first, of that many bytes, does.
    pub(crate) fn probe_piece(&mut self, place: Place, bytes: u64, access: Access) -> Flow {
        self.require_canonical(place.plus(bytes - 1))?;
        self.translate(place, access).map(drop)
    }

    /// Asks the TLB, then the page tables.
    pub(crate) fn translate(&mut self, place: Place, access: Access) -> Flow<Translation> {
        self.require_canonical(place)?;
        let va = if self.cpu.long_mode() { place.va } else { place.va & 0xffff_ffff };
        if let Some(known) = self.tlb.translation(va, access) {
            return Ok(known);
        }
        match walk(self.tlb.map(), &self.paging(), va, access) {
            Ok(translation) => {
                if access == Access::Execute && !self.keeps_nothing {
                    self.tlb.fetched(va, &translation);
                }
                Ok(translation)
            }
            Err(fault) => {
                self.tlb.forget_data(va);
                Err(self.raise(Exception::page_fault(va, fault.error)))
            }
        }
    }

    /// A store to RAM that the TLB did not let through.
    fn note_store(&mut self, slot: &Slot, gpa: u64, bytes: u64) {
        slot.mark_dirty(gpa);
        if slot.code.is_watched(slot.page(gpa)) {
            self.code_stores.push(CodeStore { gpa, bytes });
            self.end_block();
        }
    }

    fn fill(&mut self, va: u64, translation: &Translation) {
        if self.keeps_nothing || self.watching && self.watches_page(va) {
            return;
        }
        let map = Arc::clone(self.tlb.map());
        if let Some(slot) = map.slot(translation.gpa) {
            let writes = !slot.must_notice_stores(translation.gpa);
            self.tlb.fill(va, translation, writes);
        }
    }
}

/// A copy for one vCPU: accesses that miss the TLB count references to it, and vCPUs would contend for the counter.
pub(crate) fn own_map(map: &MemoryMap) -> Arc<MemoryMap> {
    Arc::new(map.clone())
}

/// Whether an access of so many bytes, at least one, stays in the page where it begins.
fn is_within_page(va: u64, bytes: usize) -> bool {
    va & !PAGE_MASK <= PAGE - bytes as u64
}

/// Whether 4-level paging could translate `va`.
pub(crate) fn is_canonical(va: u64) -> bool {
    let sign = va.cast_signed() << 16 >> 16;
    sign.cast_unsigned() == va
}

impl<'a> Machine<'a> {
    pub(crate) fn new(core: &'a mut Core, io: &'a mut dyn VcpuIo) -> Self {
        Self { core, io }
    }

    #[inline(always)]
    pub(crate) fn load<W: HostWord>(&mut self, place: Place) -> Flow<W> {
        match self.core.tlb.load(place.va) {
            Some(value) => Ok(value),
            None => self.load_slow(place),
        }
    }

    #[inline(always)]
    pub(crate) fn store<W: HostWord>(&mut self, place: Place, value: W) -> Flow {
        if self.core.tlb.store(place.va, value) { Ok(()) } else { self.store_slow(place, value) }
    }

    #[cold]
    #[inline(never)]
    fn load_slow<W: HostWord>(&mut self, place: Place) -> Flow<W> {
        self.require_aligned(place, W::BYTES)?;
        if is_within_page(place.va, W::BYTES) {
            // At once, as the TLB's accesses are.
            let translation = self.translate(place, Access::Read)?;
            let gpa = translation.gpa | place.va & !PAGE_MASK;
            if let Some(value) = self.map().load(gpa) {
                self.watch(place.va, W::BYTES, false);
                self.fill(place.va, &translation);
                return Ok(value);
            }
        }
        let mut bytes = [0; 8];
        let (bytes_read, _) = bytes.split_at_mut(W::BYTES);
        self.read(place, bytes_read)?;
        Ok(W::truncate(u64::from_le_bytes(bytes)))
    }

    #[cold]
    #[inline(never)]
    fn store_slow<W: HostWord>(&mut self, place: Place, value: W) -> Flow {
        self.require_aligned(place, W::BYTES)?;
        if is_within_page(place.va, W::BYTES) {
            let translation = self.translate(place, Access::Write)?;
            let gpa = translation.gpa | place.va & !PAGE_MASK;
            let map = Arc::clone(self.map());
            if self.keeps_nothing {
                let bytes = value.extend().to_le_bytes();
                self.compare_entries(&map, gpa, bytes.get(..W::BYTES).unwrap_or_default());
            }
            if let Some(slot) = map.slot(gpa)
                && map.store(gpa, value)
            {
                self.watch(place.va, W::BYTES, true);
                self.note_store(slot, gpa, W::BYTES as u64);
                self.fill(place.va, &translation);
                return Ok(());
            }
        }
        let bytes = value.extend().to_le_bytes();
        let (bytes, _) = bytes.split_at(W::BYTES);
        self.write(place, bytes)
    }

    /// Reads bytes that may cross from one page into the next.
    pub(crate) fn read(&mut self, place: Place, bytes: &mut [u8]) -> Flow {
        if self.core.tlb.load_bytes(place.va, bytes, Order::Ascending) {
            return Ok(());
        }
        self.require_aligned(place, bytes.len())?;
        let here = usize::try_from(PAGE - (place.va & !PAGE_MASK)).unwrap_or(bytes.len()).min(bytes.len());
        let (first, second) = bytes.split_at_mut(here);
        let next = place.plus(here as u64);
        if !second.is_empty() {
            self.require_canonical(next)?;
        }
        let translation = self.translate(place, Access::Read)?;
        if !second.is_empty() {
            // A device is not read if the rest faults.
            let next_translation = self.translate(next, Access::Read)?;
            self.read_in_page(place.va, &translation, first);
            self.read_in_page(next.va, &next_translation, second);
            return Ok(());
        }
        self.read_in_page(place.va, &translation, first);
        Ok(())
    }

    fn read_in_page(&mut self, va: u64, translation: &Translation, bytes: &mut [u8]) {
        self.watch(va, bytes.len(), false);
        let gpa = translation.gpa | va & !PAGE_MASK;
        if self.map().read(gpa, bytes) {
            self.fill(va, translation);
        } else {
            self.mmio_read(gpa, bytes);
        }
    }

    /// Writes bytes that may cross from one page into the next. Nothing is written if any of it faults.
    pub(crate) fn write(&mut self, place: Place, bytes: &[u8]) -> Flow {
        if self.core.tlb.store_bytes(place.va, bytes, Order::Ascending) {
            return Ok(());
        }
        self.require_aligned(place, bytes.len())?;
        let here = usize::try_from(PAGE - (place.va & !PAGE_MASK)).unwrap_or(bytes.len()).min(bytes.len());
        let (first, second) = bytes.split_at(here);
        let next = place.plus(here as u64);
        if !second.is_empty() {
            self.require_canonical(next)?;
        }
        let translation = self.translate(place, Access::Write)?;
        if !second.is_empty() {
            let next_translation = self.translate(next, Access::Write)?;
            self.write_in_page(place.va, &translation, first);
            self.write_in_page(next.va, &next_translation, second);
            return Ok(());
        }
        self.write_in_page(place.va, &translation, first);
        Ok(())
    }

    fn write_in_page(&mut self, va: u64, translation: &Translation, bytes: &[u8]) {
        self.watch(va, bytes.len(), true);
        let gpa = translation.gpa | va & !PAGE_MASK;
        let map = Arc::clone(self.map());
        if self.keeps_nothing {
            self.compare_entries(&map, gpa, bytes);
        }
        match map.slot(gpa) {
            Some(slot) if slot.is_writable() && map.write(gpa, bytes) => {
                self.note_store(slot, gpa, bytes.len() as u64);
                self.fill(va, translation);
            }
            _ => self.mmio_write(gpa, bytes),
        }
    }

    /// Checks that a write of `len` bytes, at most a page, would not fault.
    pub(crate) fn probe_write(&mut self, place: Place, len: u64) -> Flow {
        let here = PAGE - (place.va & !PAGE_MASK);
        if here < len {
            self.require_canonical(place.plus(here))?;
        }
        self.translate(place, Access::Write)?;
        if here < len {
            // CR2 is the first address that faults.
            self.translate(place.plus(here), Access::Write)?;
        }
        Ok(())
    }

    /// Reads, changes and writes back a word, atomically if `lock`; what was there before.
    #[inline(always)]
    pub(crate) fn modify<W: HostWord>(
        &mut self,
        place: Place,
        lock: bool,
        mut f: impl FnMut(u64) -> u64,
    ) -> Flow<u64> {
        if let Some(mut old) = self.core.tlb.load::<W>(place.va) {
            if lock {
                loop {
                    match self.core.tlb.compare_exchange(place.va, old, W::truncate(f(old.extend()))) {
                        Some(Ok(_)) => return Ok(old.extend()),
                        Some(Err(changed)) => old = changed,
                        None => break,
                    }
                }
            } else {
                let new = W::truncate(f(old.extend()));
                if self.core.tlb.store(place.va, new) {
                    return Ok(old.extend());
                }
            }
        }
        self.modify_slow::<W>(place, lock, &mut f)
    }

    #[cold]
    #[inline(never)]
    fn modify_slow<W: HostWord>(
        &mut self,
        place: Place,
        lock: bool,
        f: &mut dyn FnMut(u64) -> u64,
    ) -> Flow<u64> {
        self.require_aligned(place, W::BYTES)?;
        // The page is made writable first: a page that cannot be written faults as a write.
        self.probe_write(place, W::BYTES as u64)?;
        let aligned = place.va.is_multiple_of(W::BYTES as u64);
        let translation = self.translate(place, Access::Write)?;
        // Of a page that could only be read, the TLB may know another one, and what is changed is what was read.
        self.fill(place.va, &translation);
        let last = place.plus(W::BYTES as u64 - 1);
        if !is_within_page(place.va, W::BYTES) {
            let second = self.translate(last, Access::Write)?;
            self.fill(last.va, &second);
        }
        let gpa = translation.gpa | place.va & !PAGE_MASK;
        let map = Arc::clone(self.map());
        let slot = map.slot(gpa).filter(|slot| slot.is_writable());
        if let (true, true, Some(slot)) = (lock, aligned, slot) {
            self.watch(place.va, W::BYTES, true);
            while let Some(old) = map.load::<W>(gpa) {
                let new = W::truncate(f(old.extend()));
                match map.compare_exchange(gpa, old, new) {
                    Some(true) => {
                        if self.keeps_nothing {
                            let [old, new] = [old, new].map(|word| word.extend().to_le_bytes());
                            let (old, new) = (old.split_at(W::BYTES).0, new.split_at(W::BYTES).0);
                            self.compare_replaced(&map, gpa, old, new);
                        }
                        self.note_store(slot, gpa, W::BYTES as u64);
                        self.fill(place.va, &translation);
                        return Ok(old.extend());
                    }
                    Some(false) => {}
                    None => break,
                }
            }
        }
        if lock
            && !aligned
            && let Some(old) = self.modify_alone::<W>(place, f)?
        {
            return Ok(old);
        }
        let old = self.load::<W>(place)?.extend();
        self.store(place, W::truncate(f(old)))?;
        Ok(old)
    }

    /// Changes a word of RAM that is not aligned while the other vCPUs are out of the guest: what a processor does with
    /// a locked bus. `None` where there is no RAM.
    fn modify_alone<W: HostWord>(
        &mut self,
        place: Place,
        f: &mut dyn FnMut(u64) -> u64,
    ) -> Flow<Option<u64>> {
        self.core.alone(|core| {
            let here = W::BYTES.min(usize::try_from(PAGE - (place.va & !PAGE_MASK)).unwrap_or(W::BYTES));
            let first = core.translate(place, Access::Write)?;
            let second =
                if here < W::BYTES { core.translate(place.plus(here as u64), Access::Write)? } else { first };
            let map = Arc::clone(core.map());
            let pieces = [(first.gpa | place.va & !PAGE_MASK, 0, here), (second.gpa, here, W::BYTES)];
            let mut bytes = [0; 8];
            for (gpa, start, end) in pieces {
                let Some(piece) = bytes.get_mut(start..end) else { return Ok(None) };
                let is_ram =
                    piece.is_empty() || map.slot(gpa).is_some_and(Slot::is_writable) && map.read(gpa, piece);
                if !is_ram {
                    return Ok(None);
                }
            }
            core.watch(place.va, W::BYTES, true);
            let old = W::truncate(u64::from_le_bytes(bytes)).extend();
            bytes = W::truncate(f(old)).extend().to_le_bytes();
            for (gpa, start, end) in pieces {
                let piece = bytes.get(start..end).unwrap_or_default();
                if let Some(slot) = map.slot(gpa).filter(|_| !piece.is_empty()) {
                    if core.keeps_nothing {
                        core.compare_entries(&map, gpa, piece);
                    }
                    map.write(gpa, piece);
                    core.note_store(slot, gpa, piece.len() as u64);
                }
            }
            Ok(Some(old))
        })
    }

    /// Compares and exchanges 16 aligned bytes of a page that can be written; what was there before.
    pub(crate) fn exchange_16(&mut self, place: Place, expected: u128, new: u128) -> Flow<u128> {
        let translation = self.translate(place, Access::Write)?;
        let gpa = translation.gpa | place.va & !PAGE_MASK;
        let map = Arc::clone(self.map());
        self.watch(place.va, 16, true);
        if let Some(slot) = map.slot(gpa).filter(|slot| slot.is_writable())
            && let Some(old) = slot.compare_exchange_16(gpa, expected, new)
        {
            if self.keeps_nothing && old == expected {
                self.compare_replaced(&map, gpa, &old.to_le_bytes(), &new.to_le_bytes());
            }
            self.note_store(slot, gpa, 16);
            return Ok(old);
        }
        let mut bytes = [0; 16];
        self.read(place, &mut bytes)?;
        let old = u128::from_le_bytes(bytes);
        let stored = if old == expected { new } else { old };
        self.write(place, &stored.to_le_bytes())?;
        Ok(old)
    }

    fn mmio_read(&mut self, gpa: u64, bytes: &mut [u8]) {
        self.end_block();
        if self.apic_page(gpa) {
            self.apic_read(gpa, bytes);
            return;
        }
        self.counts.mmio_read += 1;
        for (offset, piece) in bytes.chunks_mut(8).enumerate() {
            let gpa = GuestAddress(gpa.wrapping_add(offset as u64 * 8));
            self.leave_guest(|io| io.mmio_read(gpa, piece));
        }
    }

    fn mmio_write(&mut self, gpa: u64, bytes: &[u8]) {
        self.end_block();
        if self.apic_page(gpa) {
            self.apic_write(gpa, bytes);
            return;
        }
        self.counts.mmio_write += 1;
        for (offset, piece) in bytes.chunks(8).enumerate() {
            let gpa = GuestAddress(gpa.wrapping_add(offset as u64 * 8));
            self.leave_guest(|io| io.mmio_write(gpa, piece));
        }
    }

    /// Reads a word of a system structure (descriptor, TSS, IDT), as the processor itself does at any privilege level.
    pub(crate) fn load_system<W: HostWord>(&mut self, va: u64) -> Flow<W> {
        self.as_system(|machine| machine.load(Place::data(va)))
    }

    /// Accesses of the processor itself: those of the supervisor, SMAP never lifted.
    pub(crate) fn as_system<T>(&mut self, f: impl FnOnce(&mut Self) -> Flow<T>) -> Flow<T> {
        let reach = self.mode.reach;
        let system = if self.cpu.cr4 & cr4::SMAP != 0 { Reach::Supervisor } else { Reach::SupervisorAll };
        self.set_reach(system);
        let result = f(self);
        self.set_reach(reach);
        result
    }

    /// Accesses with the rights of another privilege level.
    pub(crate) fn with_cpl<T>(&mut self, cpl: u8, f: impl FnOnce(&mut Self) -> Flow<T>) -> Flow<T> {
        if cpl == 3 {
            let reach = self.mode.reach;
            self.set_reach(Reach::User);
            let result = f(self);
            self.set_reach(reach);
            result
        } else {
            self.as_system(f)
        }
    }

    fn set_reach(&mut self, reach: Reach) {
        self.mode.reach = reach;
        self.tlb.set_reach(reach);
    }

    /// The stack pointer moved down by `bytes`, as the stack segment's size has it.
    fn stack_pointer_minus(&self, bytes: u64) -> u64 {
        let (rsp, mask) = (self.cpu.r(super::cpu::RSP), self.mode.stack_mask);
        rsp & !mask | rsp.wrapping_sub(bytes) & mask
    }

    /// Where the stack segment puts offset `rsp`, with the segment checks of legacy modes.
    pub(crate) fn stack_place(&mut self, rsp: u64, bytes: u64, write: bool) -> Flow<Place> {
        if self.is_64() {
            return Ok(Place::stack(rsp));
        }
        let offset = rsp & self.mode.stack_mask;
        self.legacy_place(index::SS, offset, bytes, write)
    }

    /// Pushes a word of width `W`.
    #[inline(always)]
    pub(crate) fn push<W: HostWord>(&mut self, value: u64) -> Flow {
        let rsp = self.stack_pointer_minus(W::BYTES as u64);
        let place = self.stack_place(rsp, W::BYTES as u64, true)?;
        self.store(place, W::truncate(value))?;
        self.cpu.set_r(super::cpu::RSP, rsp);
        Ok(())
    }

    /// Checks that a push would not fault.
    pub(crate) fn probe_push<W: HostWord>(&mut self) -> Flow {
        let rsp = self.stack_pointer_minus(W::BYTES as u64);
        let place = self.stack_place(rsp, W::BYTES as u64, true)?;
        self.require_aligned(place, W::BYTES)?;
        self.probe_write(place, W::BYTES as u64)
    }

    /// The word of width `W` that lies `skip` bytes above the top of the stack. The stack pointer stays.
    #[inline(always)]
    pub(crate) fn peek<W: HostWord>(&mut self, skip: u64) -> Flow<u64> {
        let rsp = self.cpu.r(super::cpu::RSP).wrapping_add(skip);
        let place = self.stack_place(rsp, W::BYTES as u64, false)?;
        Ok(self.load::<W>(place)?.extend())
    }

    /// Moves the stack pointer up by `bytes`.
    #[inline(always)]
    pub(crate) fn drop_stack(&mut self, bytes: u64) {
        let (rsp, mask) = (self.cpu.r(super::cpu::RSP), self.mode.stack_mask);
        self.cpu.set_r(super::cpu::RSP, rsp & !mask | rsp.wrapping_add(bytes) & mask);
    }

    /// A linear address in legacy modes and compatibility mode, where segments have limits and rights.
    pub(crate) fn legacy_place(
        &mut self,
        segment: usize,
        offset: u64,
        bytes: u64,
        write: bool,
    ) -> Flow<Place> {
        let register = *self.cpu.segment(segment);
        let last = offset.wrapping_add(bytes.saturating_sub(1));
        let protected = self.cpu.protected() && !self.cpu.virtual_8086();
        let wrong_kind = protected
            && if write {
                register.attributes & (attribute::CODE | attribute::WRITABLE_READABLE)
                    != attribute::WRITABLE_READABLE
            } else {
                register.has(attribute::CODE) && !register.has(attribute::WRITABLE_READABLE)
            };
        let unusable = protected && register.is_unusable();
        if unusable || wrong_kind || !register.contains(offset, last) {
            let stack = segment == index::SS;
            let vector = if stack { vector::SS } else { vector::GP };
            return Err(self.raise(Exception::with_error(vector, 0)));
        }
        let va = register.base.wrapping_add(offset) & 0xffff_ffff;
        Ok(Place { va, segment: super::segment::low8(segment as u64) })
    }
}

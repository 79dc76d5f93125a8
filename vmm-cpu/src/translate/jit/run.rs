//! Runs translated code, and does what it is left for.

use std::sync::Arc;

use iced_x86::{Decoder, Mnemonic, OpKind, Register};

use super::access::host_has_window;
use super::builder::{FAULT, Mode};
use super::entry::{self, Gs};
use super::fault::{self, Guard, Running};
use super::merit::Merits;
use super::region::{MAX_CODE, MIN_CODE};
use super::registers::number;
use super::site::Kind;
use super::translation::branch_target;
use super::translator::{Found, Translator};
use crate::translate::block::{Block, BlockCache, DECODING};
use crate::translate::code_stores;
use crate::translate::core::{Flow, Machine};
use crate::translate::flags::bits;
use crate::translate::hypervisor::AddressWindow;
use crate::translate::memory::frame::Frame;
use crate::translate::memory::{PAGE_MASK, Reach, Tlb, WINDOW_PAGES, WindowFigures};
use crate::translate::run;
use crate::translate::segment::index;
use crate::translate::vm::Shared;

/// Masks of all exceptions in MXCSR.
const MASKS: u32 = 0x1f80;

/// What came of an attempt to run translated code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ran {
    /// There is none; the interpreter goes on.
    Nothing,
    /// Some ran. The loop has to look around.
    Something,
}

/// Figures of a vCPU's translated code.
#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    translations: u64,
    clears: u64,
    entries: u64,
    interpreted: u64,
    /// Instructions that were executed by translated code, where instructions are counted.
    native: u64,
    links: u64,
    faults: u64,
    closed: u64,
}

/// Translated code of one vCPU.
#[derive(Debug)]
pub(crate) struct Tier1 {
    translator: Translator,
    /// How often the interpreter runs a block before it is translated.
    threshold: u32,
    /// What the tables of branch targets are for.
    sse: bool,
    /// The budget when translated code was last entered.
    budget: i64,
    /// When the alarm is to call.
    alarm: Option<u64>,
    window: AddressWindow,
    /// Whether faults of translated code would come back to it, if that is known of this run.
    handled: Option<bool>,
    merits: Merits,
    /// Pages that a window may have.
    pages: usize,
    /// What it had done when it was last taken away.
    spent: WindowFigures,
    figures: Figures,
}

impl Tier1 {
    /// `None` where nothing is to be translated, or this host does not let anybody make code.
    pub(crate) fn new(shared: &Shared) -> Option<Self> {
        let threshold = shared.options.translate_after?;
        let counted = shared.clock.is_deterministic();
        if !counted && shared.alarm.is_none() {
            return None;
        }
        let traced = shared.options.digest;
        let ticking = counted && shared.clock.ticks(1_000_000) == 1_000_000;
        let alone = shared.max_vcpus == 1;
        let flavour = Mode { reach: Reach::User, sse: false, counted, ticking, traced, alone, window: false };
        let window = match shared.options.address_window {
            _ if !host_has_window() => AddressWindow::Never,
            // It depends on the time that passes.
            AddressWindow::Adaptive if counted => AddressWindow::Never,
            other => other,
        };
        let pages = WINDOW_PAGES / usize::try_from(shared.max_vcpus).unwrap_or(1).max(1);
        let bytes = shared.options.code_memory.clamp(MIN_CODE, MAX_CODE).next_multiple_of(MIN_CODE);
        match Translator::new(flavour, bytes) {
            Ok(translator) => {
                let figures = Figures::default();
                let merits = Merits::default();
                Some(Self {
                    translator,
                    threshold,
                    sse: false,
                    budget: 0,
                    alarm: None,
                    window,
                    handled: None,
                    merits,
                    pages,
                    spent: WindowFigures::default(),
                    figures,
                })
            }
            Err(error) => {
                tracing::warn!(%error, "translate: no memory for translated code, blocks are interpreted");
                None
            }
        }
    }

    /// Figures by name.
    pub(crate) fn counts(&self, tlb: &Tlb) -> Vec<(&'static str, u64)> {
        let (figures, window) = (&self.figures, tlb.window_figures());
        vec![
            ("translations", figures.translations),
            ("translations-dropped-all", figures.clears),
            ("translated-entries", figures.entries),
            ("translated-links", figures.links),
            ("translated-interpreted", figures.interpreted),
            ("translated-instructions", figures.native),
            ("translated-bytes", self.translator.used_bytes()),
            ("translated-pages", self.translator.page_count()),
            ("translated-parts-emptied", self.translator.emptied()),
            ("window-faults", figures.faults),
            ("window-pages-mapped", window.mapped),
            ("window-pages-unmapped", window.unmapped),
            ("window-activations", window.activations),
            ("windows-closed", figures.closed),
        ]
    }

    /// See [`Translator::verify`].
    #[cfg(test)]
    pub(super) fn verify(&self, m: &mut Machine<'_>) {
        self.translator.verify(m.tlb.frame());
    }

    /// Makes GS refer to the vCPU's frame while it runs.
    pub(crate) fn prepare(&mut self, m: &mut Machine<'_>) -> Gs {
        // It is another thread's now, or the program has changed its signals.
        self.handled = m.tlb.has_window().then(fault::are_handled);
        if self.handled == Some(false) {
            m.tlb.close_window();
        }
        let go = m.signals.go_address();
        let frame = m.tlb.frame();
        frame.state.leave = entry::leave_address();
        frame.state.go = go;
        Gs::set(frame)
    }

    /// Runs translated code from RIP on, if there is or comes to be some.
    pub(crate) fn run(&mut self, m: &mut Machine<'_>, cache: &mut BlockCache) -> Flow<Ran> {
        self.catch_up(m, cache);
        self.open_window(m);
        let Some(mut mode) = self.mode(m) else { return Ok(Ran::Nothing) };
        self.set_alarm(m);
        self.use_mode(m, mode);
        let Some(first) = self.find(m, cache, mode)? else { return Ok(Ran::Nothing) };
        let Some(mut code) = self.translator.entry(first) else { return Ok(Ran::Nothing) };
        let mut charged = 0;
        loop {
            let mut number = self.enter(m, code, charged, mode.window);
            charged = 0;
            let faulted = number == FAULT;
            if faulted {
                number = self.faulting_site(m);
            }
            let Some(site) = self.translator.site(number) else { return Ok(Ran::Nothing) };
            let Some((rip, block)) = self.translator.get(site.translation).map(|t| (t.rip, t.block)) else {
                return Ok(Ran::Nothing);
            };
            let mut link = None;
            let emptied = self.translator.emptied();
            match site.kind {
                Kind::Instruction { op, resume } => {
                    let Some(found) = cache.get(block) else { return Ok(Ran::Nothing) };
                    let op = usize::from(op);
                    self.count(m, found.ops.len() - op);
                    self.figures.interpreted += 1;
                    let places = if faulted { accessed(m, found, rip, op) } else { [None; 2] };
                    let is_last = op + 1 == found.ops.len();
                    let goes_on = run::execute_one(m, found, rip, op)?;
                    for (va, len) in places.into_iter().flatten() {
                        m.tlb.extend_window(va, len);
                    }
                    if faulted {
                        self.charge_window(m);
                    }
                    // What else ends a block is seen to where blocks end.
                    if !goes_on && (!is_last || !m.code_stores.is_empty()) {
                        return Ok(Ran::Something);
                    }
                    let is_same = self.mode(m) == Some(mode) && Self::is_current(m, cache);
                    if !is_last && (m.urgent || !is_same) {
                        // As the interpreter, which looks around between blocks.
                        run::execute_rest(m, found, rip, op + 1)?;
                        return Ok(Ran::Something);
                    }
                    if !is_last {
                        charged = found.ops.len() - op - 1;
                        code = self.translator.address(resume);
                        continue;
                    }
                }
                Kind::Trace { resume } => {
                    let Some(found) = cache.get(block) else { return Ok(Ran::Nothing) };
                    charged = found.ops.len();
                    self.count(m, charged);
                    m.cpu.rip = rip;
                    m.add_to_digest();
                    code = self.translator.address(resume);
                    continue;
                }
                Kind::Budget => {
                    let Some(found) = cache.get(block) else { return Ok(Ran::Nothing) };
                    self.count(m, found.ops.len());
                    m.cpu.rip = rip;
                    // A block that ends early, or none at all.
                    return Ok(if m.budget > 0 { Ran::Nothing } else { Ran::Something });
                }
                Kind::Jump(jump) => {
                    self.count(m, 0);
                    m.cpu.rip = jump.target;
                    m.cpu.shadow_sti |= jump.shadow;
                    link = Some(jump);
                }
                Kind::Poll { target } => {
                    self.count(m, 0);
                    m.cpu.rip = target;
                    self.look_at_window(m);
                    return Ok(Ran::Something);
                }
                Kind::Gate => {
                    self.count(m, 0);
                    m.cpu.rip = rip;
                }
                Kind::Changed => {
                    self.count(m, 0);
                    m.cpu.rip = rip;
                    self.translator.drop_translation(site.translation, m.tlb.frame());
                }
            }
            if m.urgent && run::may_go_on(m) {
                m.urgent = false;
            }
            self.open_window(m);
            mode = match self.mode(m) {
                Some(mode) if !m.urgent && m.budget > 0 && !m.signals.wants_attention() => mode,
                _ => {
                    m.urgent |= m.cpu.shadow_sti;
                    self.look_at_window(m);
                    return Ok(Ran::Something);
                }
            };
            self.set_alarm(m);
            self.catch_up(m, cache);
            self.use_mode(m, mode);
            if link.is_none()
                && !m.cpu.shadow_sti
                && let Some(entry) = branch_target(m.cpu.rip, mode, m.tlb.frame())
            {
                code = entry;
                continue;
            }
            let next = self.find(m, cache, mode)?;
            // Nothing comes between STI and the next instruction: the interpreter executes that where translated code may be
            // left before it does.
            let next = next.filter(|next| !m.cpu.shadow_sti || self.translator.runs_when_entered(*next));
            let Some(next) = next else {
                m.urgent |= m.cpu.shadow_sti;
                return Ok(Ran::Something);
            };
            m.cpu.shadow_sti = false;
            match link {
                Some(jump) if self.translator.emptied() == emptied => {
                    self.figures.links += 1;
                    self.translator.link(number, &jump, next);
                }
                _ => self.translator.remember_branch(next, m.tlb.frame()),
            }
            let Some(entry) = self.translator.entry(next) else { return Ok(Ran::Something) };
            code = entry;
        }
    }

    /// What code is to be translated for, if any is.
    fn mode(&self, m: &Machine<'_>) -> Option<Mode> {
        let reach = m.mode.reach;
        let fits = m.mode.code_bits == 64
            && matches!(m.mode.cpl, 0 | 3)
            && reach != Reach::UserAligned
            && m.cpu.mxcsr & MASKS == MASKS;
        let window = reach == Reach::User && m.tlb.has_window();
        fits.then_some(Mode { reach, sse: m.mode.sse, window, ..self.translator.flavour })
    }

    /// Lets the user program that runs have its window, if it has none and deserves one.
    fn open_window(&mut self, m: &mut Machine<'_>) {
        if m.mode.reach != Reach::User || m.tlb.has_window() {
            return;
        }
        let root = m.cpu.cr3;
        let deserves = match self.window {
            AddressWindow::Never => false,
            AddressWindow::Adaptive => self.merits.deserves(root),
            AddressWindow::Always => true,
        };
        if !deserves || !*self.handled.get_or_insert_with(fault::are_handled) {
            return;
        }
        let paging = m.paging();
        if !m.tlb.open_window(&paging, self.pages, self.translator.flavour.counted) {
            self.merits.forget(root);
        }
        self.charge_window(m);
    }

    /// Notes who runs.
    fn look_at_window(&mut self, m: &mut Machine<'_>) {
        if self.window == AddressWindow::Adaptive {
            self.merits.sample((m.mode.reach == Reach::User).then_some(m.cpu.cr3));
        }
    }

    /// Lets the program that has the window pay for it, or takes it away. Its pages wait for it to have saved more.
    fn charge_window(&mut self, m: &mut Machine<'_>) {
        let cost = m.tlb.take_window_cost();
        let root = m.cpu.cr3;
        if self.window != AddressWindow::Adaptive || self.merits.charge(root, cost) || !m.tlb.has_window() {
            return;
        }
        self.figures.closed += 1;
        m.tlb.close_window();
        let now = m.tlb.window_figures();
        let before = std::mem::replace(&mut self.spent, now);
        if (now.unmapped - before.unmapped) * 2 > now.mapped - before.mapped {
            self.merits.reproach(root);
        }
    }

    /// The number of the site for the access that has just faulted.
    fn faulting_site(&mut self, m: &mut Machine<'_>) -> u32 {
        self.figures.faults += 1;
        m.tlb.note_window_fault();
        let state = &m.tlb.frame().state;
        let (address, flags) = (state.fault, state.fault_flags);
        let Some(access) = self.translator.access(address) else {
            // Memory that the monitor itself cannot reach any more, for one.
            tracing::error!(address, "translated code faulted where it accesses nothing of the guest's");
            std::process::abort();
        };
        if access.live {
            m.cpu.flags.replace_status(bits::STATUS, status(flags));
        }
        access.site
    }

    /// The tables of branch targets do not tell whether SSE instructions may run: they are for one of the two.
    fn use_mode(&mut self, m: &mut Machine<'_>, mode: Mode) {
        if self.sse != mode.sse {
            self.sse = mode.sse;
            m.tlb.frame().forget_branches();
        }
    }

    /// Enters translated code; where it was left. `charged` instructions of the budget are those of the block that is gone
    /// on with.
    fn enter(&mut self, m: &mut Machine<'_>, code: u64, charged: usize, window: bool) -> u32 {
        load(m);
        self.budget = m.budget;
        m.tlb.frame().state.budget = m.budget - charged as i64;
        if self.translator.flavour.ticking {
            let end = m.guest_tsc().wrapping_add(m.budget.cast_unsigned());
            m.tlb.frame().state.tsc = end;
        }
        self.figures.entries += 1;
        if self.translator.take_patched() {
            entry::serialize();
        }
        let (start, len, landing) = self.translator.extent();
        let frame = &raw mut *m.tlb.frame();
        let _guard = window.then(|| Guard::set(Running { start, len, landing, frame }));
        // SAFETY: `prepare` has set GS and the frame; the address is that of code that holds.
        #[allow(unsafe_code, reason = "translated code is not Rust's")]
        let site = unsafe { entry::enter(code, &mut m.cpu) };
        store(m);
        if !self.translator.flavour.counted {
            // Nothing else tells that instructions have run.
            m.rf_loaded_at = None;
        }
        site
    }

    /// Accounts for what translated code has executed, all of it but `missing` instructions of its last block.
    fn count(&mut self, m: &mut Machine<'_>, missing: usize) {
        if self.translator.flavour.counted {
            let charged = self.budget - m.tlb.frame().state.budget;
            let done = usize::try_from(charged).unwrap_or(0).saturating_sub(missing);
            self.figures.native += done as u64;
            m.count(done);
        }
    }

    /// Lets the alarm call when the vCPU's timer is due.
    fn set_alarm(&mut self, m: &Machine<'_>) {
        if self.alarm != m.deadline
            && let Some(alarm) = &m.shared.alarm
        {
            alarm.set(m.index, m.deadline, &m.signals);
            self.alarm = m.deadline;
        }
    }

    /// Whether what holds has not changed.
    fn is_current(m: &Machine<'_>, cache: &BlockCache) -> bool {
        !m.tlb.has_forgotten() && !cache.has_dropped()
    }

    /// Does what changed blocks and translations of addresses ask for.
    fn catch_up(&mut self, m: &mut Machine<'_>, cache: &mut BlockCache) {
        if let Some(dropped) = cache.take_dropped() {
            match dropped {
                Some(blocks) => {
                    for block in blocks {
                        self.translator.drop_block(block, m.tlb.frame());
                    }
                }
                None => self.clear(m),
            }
        }
        if m.tlb.has_forgotten() {
            let forgotten = m.tlb.take_forgotten();
            self.translator.forget(&forgotten, m.tlb.frame());
        }
    }

    fn clear(&mut self, m: &mut Machine<'_>) {
        self.figures.clears += 1;
        self.translator.clear(m.tlb.frame());
    }

    /// The translation of what runs at RIP; it is made if the block has run often enough.
    fn find(&mut self, m: &mut Machine<'_>, cache: &mut BlockCache, mode: Mode) -> Flow<Option<u32>> {
        let rip = m.cpu.rip;
        if let Some(found) = self.translator.find(rip, mode) {
            return Ok(Some(found));
        }
        let Some(id) = run::lasting_block(m, cache, rip)? else { return Ok(None) };
        // Looking may have changed what there is.
        self.catch_up(m, cache);
        let map = Arc::clone(m.map());
        let runs = cache.count_run(id);
        let Some(block) = cache.get(id) else { return Ok(None) };
        let Some(fetched) = m.tlb.fetch_translation(rip) else { return Ok(None) };
        let mut second = None;
        if let Some(gpa) = block.second_page {
            let next = (rip | !PAGE_MASK).wrapping_add(1);
            second = m.tlb.fetch_translation(next).filter(|fetched| fetched.gpa == gpa);
            if second.is_none() {
                return Ok(None);
            }
        }
        let found = Found { rip, mode, id, block, fetched, second };
        let quiet = self.translator.take_up(&found, &map, m.tlb.frame(), cache);
        if quiet != [None; 2] {
            for gpa in quiet.into_iter().flatten() {
                code_stores::stop_checking(m, cache, gpa);
            }
            return Ok(None);
        }
        if let Some(known) = self.translator.find(rip, mode) {
            return Ok(Some(known));
        }
        if runs < self.threshold {
            return Ok(None);
        }
        self.figures.translations += 1;
        Ok(self.translator.translate(&found, &map, m.tlb.frame()))
    }
}

/// Tells translated code what else of the vCPU's state it works on.
fn load(m: &mut Machine<'_>) {
    let selectors: [u64; 6] = std::array::from_fn(|n| m.cpu.segment(n).selector.into());
    let (fs, gs) = (m.cpu.segment(index::FS).base, m.cpu.segment(index::GS).base);
    let flags = m.cpu.flags.get();
    let held = flags & bits::IF == 0 && m.has_interrupt();
    let (mxcsr, kernel_gs_base, tsc_aux) = (m.cpu.mxcsr, m.cpu.msr.kernel_gs_base, m.cpu.msr.tsc_aux);
    let state = &mut m.tlb.frame().state;
    state.selectors = selectors;
    (state.fs_base, state.gs_base, state.kernel_gs_base) = (fs, gs, kernel_gs_base);
    state.mxcsr = mxcsr;
    state.tsc_aux = tsc_aux;
    state.held = held.into();
    // As LAHF and SETO have them.
    state.flags = (flags & 0xff) << 8 | flags >> 11 & 1;
    // As PUSHF has it.
    state.control = flags & !(bits::STATUS | bits::RF | bits::VM);
}

/// Takes that over from translated code.
fn store(m: &mut Machine<'_>) {
    let frame: &Frame = m.tlb.frame();
    let state = &frame.state;
    let (mxcsr, flags) = (state.mxcsr, state.flags);
    let (gs_base, kernel_gs_base, control) = (state.gs_base, state.kernel_gs_base, state.control);
    m.cpu.mxcsr = mxcsr;
    m.cpu.segment_mut(index::GS).base = gs_base;
    m.cpu.msr.kernel_gs_base = kernel_gs_base;
    m.cpu.flags.replace_status(bits::STATUS, status(flags));
    m.cpu.flags.set_control(bits::IF, control & bits::IF != 0);
}

/// Status flags of RFLAGS from what LAHF and SETO have them in.
fn status(flags: u64) -> u64 {
    flags >> 8 & 0xff | (flags & 1) << 11
}

/// What instruction `at` of `block` is about to access, as far as translated code does so through the window: linear
/// addresses and bytes.
fn accessed(m: &Machine<'_>, block: &Block, rip: u64, at: usize) -> [Option<(u64, u64)>; 2] {
    let start = block.ops.get(at).map_or(0, |op| usize::from(op.start));
    let bytes = block.bytes.get(start..).unwrap_or_default();
    let instruction = Decoder::with_ip(64, bytes, rip.wrapping_add(start as u64), DECODING).decode();
    let register = |register: Register| match register {
        Register::FS => Some(m.cpu.segment(index::FS).base),
        Register::GS => Some(m.cpu.segment(index::GS).base),
        _ if register.is_segment_register() => Some(0),
        _ if register.is_gpr() => Some(m.cpu.r(number(register))),
        _ => None,
    };
    let operand = (0..instruction.op_count()).find(|n| instruction.op_kind(*n) == OpKind::Memory);
    let explicit = operand.and_then(|n| {
        let va = instruction.virtual_address(n, 0, |name, _, _| register(name))?;
        Some((va, instruction.memory_size().size() as u64))
    });
    let stack = match instruction.mnemonic() {
        Mnemonic::Push | Mnemonic::Call => register(Register::RSP).map(|rsp| rsp.wrapping_sub(8)),
        Mnemonic::Pop | Mnemonic::Ret => register(Register::RSP),
        Mnemonic::Leave => register(Register::RBP),
        _ => None,
    };
    [explicit, stack.map(|va| (va, 8))]
}

//! The run loop: from block to block, and what happens between two of them.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::block::{self, Block, BlockCache, Stamp};
use super::code_stores::{Watch, drop_changed_code, drop_code};
use super::core::{Core, Flow, Machine, Place, Reason, own_map};
use super::cpu::{Activity, BLOCK};
use super::exception::{Event, Exception, dr6};
use super::flags::bits;
use super::jit::{Ran, Tier1};
use super::memory::{Access, PAGE_MASK, Reach};
use super::native::Elsewhere;
use crate::error::{Error, Result};
use crate::hypervisor::InterruptMode;
use crate::vcpu::{Halt, UnhandledInstruction};

/// Longest instruction in bytes.
const MAX_INSTRUCTION: usize = 15;

/// Rarely executed instructions that are kept, those of dropped blocks included.
const MAX_RARE: usize = 1 << 20;

/// What the pause between two blocks comes to.
enum Next {
    /// Go on.
    Block,
    /// One instruction, then look again.
    Instruction,
    /// `run` returns.
    Return(Halt),
}

/// Runs until something ends the stay.
pub(crate) fn run(
    m: &mut Machine<'_>,
    cache: &mut BlockCache,
    tier1: &mut Option<Tier1>,
    elsewhere: &mut Elsewhere,
) -> Result<Halt> {
    // The VMM may have changed anything.
    m.tlb.forget_lookups();
    m.update_mode();
    let result = {
        let _prepared = tier1.as_mut().map(|tier1| tier1.prepare(m));
        run_blocks(m, cache, tier1, elsewhere)
    };
    // Other vCPUs go on, and the clock is looked at, also where this vCPU is not run again.
    drop_changed_code(m, cache);
    m.now();
    result
}

/// From block to block until something ends the stay.
fn run_blocks(
    m: &mut Machine<'_>,
    cache: &mut BlockCache,
    tier1: &mut Option<Tier1>,
    elsewhere: &mut Elsewhere,
) -> Result<Halt> {
    loop {
        let mut single = false;
        if m.asks_native && m.runs_program() {
            elsewhere.goes_on(m);
        }
        m.held = (false, false);
        if m.urgent || m.budget <= 0 || m.signals.wants_attention() {
            match between(m, cache) {
                Ok(Next::Block) => {}
                Ok(Next::Instruction) => single = true,
                Ok(Next::Return(halt)) => return Ok(halt),
                Err(_) => match leave(m)? {
                    Some(halt) => return Ok(halt),
                    None => continue,
                },
            }
        }
        if !m.code_stores.is_empty() {
            // Those of the last block, and of whatever was delivered since.
            drop_changed_code(m, cache);
        }
        if m.asks_native && m.mode.cpl == 3 {
            match elsewhere.run(m, single)? {
                ControlFlow::Continue(()) => {}
                ControlFlow::Break(None) => continue,
                ControlFlow::Break(Some(halt)) => return Ok(halt),
            }
        }
        let ran = match tier1 {
            Some(tier1) if !single => tier1.run(m, cache),
            _ => Ok(Ran::Nothing),
        };
        let left = match ran {
            Ok(Ran::Something) => continue,
            Ok(Ran::Nothing) => execute(m, cache, single).is_err(),
            Err(_) => true,
        };
        if left {
            if matches!(m.reason, Reason::None) {
                // It goes on: what was held off for this instruction still is.
                (m.cpu.shadow_sti, m.cpu.shadow_mov_ss) = m.held;
            }
            if m.asks_native && !single && m.runs_program() && elsewhere.has_it(m) {
                continue;
            }
            // What a debugger or the guest's debug registers wanted to see of the instruction is void: it did not
            // complete.
            m.watch_hits = 0;
            if let Some(halt) = leave(m)? {
                return Ok(halt);
            }
        } else if single && let Some(halt) = m.after_instruction()? {
            return Ok(halt);
        }
    }
}

/// Runs one block, or its first instruction.
#[inline(always)]
fn execute(m: &mut Machine<'_>, cache: &mut BlockCache, single: bool) -> Flow {
    let rip = m.cpu.rip;
    let stamp = m.stamp();
    let (id, cut) = match cache.find(rip, stamp) {
        Some(id) => (id, false),
        None => find(m, cache, rip)?,
    };
    let Some(block) = cache.get(id) else { return Ok(()) };
    if m.digest.is_some() {
        m.add_to_digest();
    }
    m.cpu.set_r(BLOCK, rip);
    m.cpu.rip = rip.wrapping_add(block.len()) & m.mode.ip_mask;
    m.limit = if single || cut { 1 } else { usize::try_from(m.budget).unwrap_or(1) };
    let mut done = 0;
    let mut left = None;
    for op in &block.ops {
        if done >= m.limit {
            // Something ended the block early.
            m.cpu.rip = rip.wrapping_add(u64::from(op.start)) & m.mode.ip_mask;
            break;
        }
        m.position = done;
        let unwinding = Unwinding { m: &mut *m, block, at: done };
        let result = (op.run)(unwinding.m, op);
        std::mem::forget(unwinding);
        if let Err(leave) = result {
            m.cpu.rip = rip.wrapping_add(u64::from(op.start)) & m.mode.ip_mask;
            left = Some(leave);
            break;
        }
        done += 1;
    }
    m.count(done);
    match left {
        None => Ok(()),
        Some(leave) => Err(leave),
    }
}

/// Whether a look around between two blocks would find nothing to do.
pub(super) fn may_go_on(m: &Machine<'_>) -> bool {
    let takes_interrupts = m.cpu.flags.control(bits::IF);
    m.cpu.activity == Activity::Running
        && !(m.asks_native && m.mode.cpl == 3)
        && !m.shared.clock.is_deterministic()
        && m.injected.is_none()
        && !m.cpu.nmi_pending
        && !(m.cpu.shadow_sti || m.cpu.shadow_mov_ss)
        && !(takes_interrupts && m.has_interrupt())
        && !m.is_careful()
        && m.code_stores.is_empty()
}

/// Executes instruction `at` of `block`, which runs at `rip`; whether the one behind it may follow at once. RIP is that of
/// the next instruction in any case.
pub(super) fn execute_one(m: &mut Machine<'_>, block: &Block, rip: u64, at: usize) -> Flow<bool> {
    let Some(op) = block.ops.get(at) else { return Ok(false) };
    m.cpu.set_r(BLOCK, rip);
    m.cpu.rip = rip.wrapping_add(block.len()) & m.mode.ip_mask;
    m.limit = usize::MAX;
    m.position = 0;
    let unwinding = Unwinding { m: &mut *m, block, at };
    let result = (op.run)(unwinding.m, op);
    std::mem::forget(unwinding);
    if let Err(leave) = result {
        m.cpu.rip = rip.wrapping_add(u64::from(op.start)) & m.mode.ip_mask;
        return Err(leave);
    }
    if let Some(next) = block.ops.get(at + 1) {
        m.cpu.rip = rip.wrapping_add(u64::from(next.start)) & m.mode.ip_mask;
    }
    m.count(1);
    Ok(m.limit != 0)
}

/// Executes the instructions of `block` from `at` on, as [`execute`] does.
pub(super) fn execute_rest(m: &mut Machine<'_>, block: &Block, rip: u64, at: usize) -> Flow {
    for at in at..block.ops.len() {
        if !execute_one(m, block, rip, at)? {
            break;
        }
    }
    Ok(())
}

/// The block at `rip`, if its code is safe from unseen stores, or is to be checked.
pub(super) fn lasting_block(m: &mut Machine<'_>, cache: &mut BlockCache, rip: u64) -> Flow<Option<u32>> {
    if let Some(id) = cache.find(rip, m.stamp()) {
        return Ok(Some(id));
    }
    let (id, _) = find(m, cache, rip)?;
    let is_checked = cache.get(id).is_some_and(|block| block.checked);
    Ok(cache.find(rip, m.stamp()).or(is_checked.then_some(id)))
}

/// Dropped only where a callback panics: RIP, which is that of the end of the block, becomes that of the next
/// instruction. The access is not repeated.
struct Unwinding<'m, 'a, 'b> {
    m: &'m mut Machine<'a>,
    block: &'b Block,
    /// Number of the instruction.
    at: usize,
}

impl Drop for Unwinding<'_, '_, '_> {
    #[cold]
    fn drop(&mut self) {
        let next = self.block.ops.get(self.at + 1).map_or(self.block.len(), |op| op.start.into());
        self.m.cpu.rip = self.m.cpu.r(BLOCK).wrapping_add(next) & self.m.mode.ip_mask;
        let done = self.m.position + 1;
        self.m.count(done);
    }
}

/// Finds or decodes the block at `rip`, and says whether the code segment ends within it: then only the first
/// instruction may run.
#[cold]
#[inline(never)]
fn find(m: &mut Machine<'_>, cache: &mut BlockCache, rip: u64) -> Flow<(u32, bool)> {
    let code_bits = m.mode.code_bits;
    let va = if code_bits == 64 {
        rip
    } else {
        let cs = *m.cpu.cs();
        if rip > u64::from(cs.limit) {
            return Err(m.gp(0));
        }
        cs.base.wrapping_add(rip) & 0xffff_ffff
    };
    let translation = m.translate(Place::data(va), Access::Execute)?;
    let gpa = translation.gpa | va & !PAGE_MASK;
    // Stores to the page are seen from before its bytes are looked at. A block that is known already may be of a region
    // that was mapped anew since.
    let mut watch = m.watch_code(gpa);
    let map = Arc::clone(m.map());
    let mut known = cache.lookup(gpa, code_bits, &map, || {
        let next = (va | !PAGE_MASK).wrapping_add(1);
        let page = m.translate(Place::data(next), Access::Execute).ok()?;
        watch = watch.max(m.watch_code(page.gpa));
        Some(page.gpa)
    });
    if let Some(id) = known
        && cache.get(id).is_some_and(|block| block.checked != (watch == Watch::Checked))
    {
        cache.remove(id);
        known = None;
    }
    if known.is_none() {
        if m.rare.len() >= MAX_RARE {
            cache.clear();
            m.rare.clear();
        }
        cache.make_room();
        let block = block::build(m, va, gpa, watch)?;
        if block.second_page.is_some() {
            // Its bytes may be older than what says now that all stores to the second page are seen.
            watch = watch.max(Watch::Unsettled);
        }
        known = Some(cache.insert(block));
    }
    let Some(id) = known else { return Err(m.gp(0)) };
    if code_bits != 64
        && let Some(block) = cache.get(id)
    {
        let left = u64::from(m.cpu.cs().limit).saturating_sub(rip).saturating_add(1);
        if block.first_len() > left {
            return Err(m.gp(0));
        }
        if block.len() > left {
            return Ok((id, true));
        }
    }
    if watch == Watch::Settled {
        cache.remember(rip, m.stamp(), id);
    }
    Ok((id, false))
}

/// Looks at everything that may want something of the vCPU.
#[cold]
#[inline(never)]
fn between(m: &mut Machine<'_>, cache: &mut BlockCache) -> Flow<Next> {
    loop {
        if !m.code_stores.is_empty() {
            // The VMM may be called, and this vCPU may sleep: what others execute does not wait for that.
            drop_changed_code(m, cache);
        }
        m.urgent = false;
        if m.signals.take_attention() {
            m.give_way();
            m.see_epoch();
            for store in m.signals.take_code_stores() {
                if store.bytes == u64::MAX {
                    cache.clear();
                    m.rare.clear();
                } else {
                    drop_code(m, cache, store);
                }
            }
            m.cpu.nmi_pending |= m.signals.take_nmi();
            m.drain_inbox();
            if m.signals.take_kick() {
                m.counts.interrupted += 1;
                // What else there is, is looked at when it goes on.
                m.urgent = true;
                return Ok(Next::Return(Halt::Interrupted));
            }
        }
        // Before anything that is due at this point happens, so that it does not matter what is.
        if m.reaches_stop() {
            m.urgent = true;
            return Ok(Next::Return(Halt::ExactStop));
        }
        if let Some(event) = m.injected.take() {
            m.take(event)?;
            if m.injected.is_some() {
                continue;
            }
        }
        m.check_timer();
        m.budget = m.next_budget();
        m.take_interrupt()?;
        if m.injected.is_some() {
            continue;
        }
        if m.cpu.activity == Activity::Running {
            break;
        }
        if let Some(halt) = m.rest() {
            return Ok(Next::Return(halt));
        }
    }
    if m.cpu.shadow_sti || m.cpu.shadow_mov_ss {
        m.urgent = true;
        m.held = (m.cpu.shadow_sti, m.cpu.shadow_mov_ss);
        (m.cpu.shadow_sti, m.cpu.shadow_mov_ss) = (false, false);
        if !m.is_careful() {
            return Ok(Next::Instruction);
        }
    }
    let is_careful = m.is_careful();
    if is_careful && !m.rf_is_kept {
        let is_set = m.flags() & bits::RF != 0;
        m.cpu.flags.set_control(bits::RF, is_set);
    }
    m.rf_is_kept = is_careful;
    if is_careful {
        m.urgent = true;
        return match m.before_instruction()? {
            Some(halt) => Ok(Next::Return(halt)),
            None => Ok(Next::Instruction),
        };
    }
    Ok(Next::Block)
}

/// Does what an instruction that did not complete asks for; the halt to return with.
#[cold]
#[inline(never)]
pub(super) fn leave(m: &mut Machine<'_>) -> Result<Option<Halt>> {
    match std::mem::take(&mut m.reason) {
        Reason::None => Ok(None),
        Reason::Halt(halt) => Ok(Some(halt)),
        Reason::Exception(exception) => Ok(m.deliver_exception(exception)),
        Reason::Unhandled(reason) => {
            let unhandled = m.describe(reason);
            tracing::warn!(vcpu = m.index, rip = m.cpu.rip, "translate: unhandled instruction");
            Err(Error::Unhandled(Box::new(unhandled)))
        }
    }
}

impl Core {
    /// What a remembered block depends on besides RIP.
    #[inline(always)]
    fn stamp(&self) -> Stamp {
        let user = u64::from(matches!(self.mode.reach, Reach::User | Reach::UserAligned));
        Stamp(self.tlb.generation() << 8 | u64::from(self.mode.code_bits) << 1 | user)
    }

    /// Accounts for executed instructions.
    #[inline(always)]
    pub(super) fn count(&mut self, done: usize) {
        self.instructions += done as u64;
        self.position = 0;
        self.budget -= done as i64;
    }

    /// Takes a new memory map over, if there is one.
    pub(crate) fn see_epoch(&mut self) {
        let epoch = self.shared.epoch();
        if epoch == self.signals.last_seen() {
            return;
        }
        let map = self.shared.map();
        if !Arc::ptr_eq(&map, &self.shared_map) {
            // Decoded code is compared with memory when it is next looked up.
            self.tlb.set_map(own_map(&map));
            self.shared_map = map;
            // What others have seen of the old one says nothing of the new.
            self.unsettled.clear();
        } else {
            self.tlb.watch_all_stores();
        }
        self.signals.saw(epoch);
    }

    /// Describes the instruction at RIP.
    fn describe(&mut self, reason: String) -> UnhandledInstruction {
        let (general, system) = (self.general_registers(), self.system_registers());
        let linear = self.cpu.cs().base.wrapping_add(self.cpu.rip);
        let mut bytes = Vec::with_capacity(MAX_INSTRUCTION);
        while bytes.len() < MAX_INSTRUCTION {
            let va = linear.wrapping_add(bytes.len() as u64);
            let mut byte = [0];
            let Ok(page) = self.translate(Place::data(va), Access::Execute) else { break };
            if !self.map().read(page.gpa | va & !PAGE_MASK, &mut byte) {
                break;
            }
            bytes.extend(byte);
        }
        self.reason = Reason::None;
        UnhandledInstruction::new(self.shared.backend, self.index, reason, bytes, general, system)
    }
}

impl Machine<'_> {
    /// Takes an NMI or an interrupt, if there is one and it is not held off.
    fn take_interrupt(&mut self) -> Flow {
        if matches!(self.cpu.activity, Activity::WaitForInit | Activity::WaitForSipi) {
            return Ok(());
        }
        let held = self.debug.single_step && self.debug.hold_interrupts;
        if held && self.cpu.activity == Activity::Running {
            return Ok(());
        }
        let shadow = self.cpu.shadow_sti || self.cpu.shadow_mov_ss;
        if self.cpu.nmi_pending && !self.cpu.nmi_masked && !shadow {
            self.cpu.nmi_pending = false;
            self.cpu.activity = Activity::Running;
            return self.take(Event::Nmi);
        }
        if shadow || !self.cpu.flags.control(bits::IF) {
            return Ok(());
        }
        if self.pending_vector() {
            let Some(vector) = self.apic.as_mut().map(super::apic::LocalApic::acknowledge) else {
                return Ok(());
            };
            self.cpu.activity = Activity::Running;
            return self.take(Event::External { vector });
        }
        let pin = self.signals.intr.is_high() && self.takes_pin();
        if pin || std::mem::take(&mut self.ext_int) {
            self.counts.interrupt += 1;
            // The callback may change the pin, and so may others meanwhile.
            let before = self.signals.intr.now();
            match self.leave_guest(|io| io.acknowledge_interrupt()) {
                Some(vector) => {
                    self.cpu.activity = Activity::Running;
                    self.urgent = true;
                    return self.take(Event::External { vector });
                }
                // Withdrawn: the pin is low until somebody asserts it again.
                None => {
                    self.signals.intr.withdraw(before);
                }
            }
        }
        Ok(())
    }

    /// A vCPU that executes nothing: waits, or returns where the VMM wants to wait itself.
    fn rest(&mut self) -> Option<Halt> {
        let waits_here = self.shared.interrupts != InterruptMode::External;
        if !waits_here {
            return Some(Halt::Halted);
        }
        if self.shared.clock.is_deterministic()
            && let Some(until) = self.deadline.into_iter().chain(self.stop.guest_time).min()
        {
            // Nothing else happens until then.
            let now = self.now();
            self.shared.clock.advance(until.saturating_sub(now));
            return None;
        }
        let timeout = self.time_to_deadline();
        let signals = Arc::clone(&self.signals);
        signals.leave_guest();
        signals.sleep(timeout, super::signals::Signals::wants_attention);
        self.enter_guest();
        None
    }

    /// Debug exceptions that come after an instruction, and the debugger's stops.
    fn after_instruction(&mut self) -> Result<Option<Halt>> {
        let hits = std::mem::take(&mut self.watch_hits);
        if !std::mem::take(&mut self.keeps_rf) {
            self.cpu.flags.set_control(bits::RF, false);
        }
        let mut causes = u64::from(hits & 0xf);
        if std::mem::take(&mut self.trap_pending) {
            causes |= dr6::BS;
        }
        if self.cpu.shadow_mov_ss {
            // The stack pointer comes first (Intel SDM 3A 7.8.3): what was hit is told after it, the step is not.
            self.watch_hits = hits & 0xf;
            causes = 0;
        }
        if causes != 0
            && let Some(halt) = self.deliver_exception(Exception::debug(causes))
        {
            return Ok(Some(halt));
        }
        Ok(self.debugger_stop(hits >> 8))
    }
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;

//! Translates one block.
//!
//! The code of a translation comes in this order: what enters it with status flags in the processor or in the frame,
//! the instructions, and behind them what is rarely executed. An instruction that accesses memory looks the page up in the
//! TLB's table first; where that has nothing, and for every instruction that has no translation, the interpreter
//! executes the instruction, and translated code goes on behind it.
//!
//! Status flags stay in the processor as long as they can. The lookup changes them, so they are saved before it, unless
//! they are saved already; whoever reads them restores them. So they are exact whenever translated code is left.

use std::hash::{Hash, Hasher};
use std::mem::offset_of;

use iced_x86::{Encoder, Instruction, InstructionInfoFactory};

use super::access::Access;
use super::effect::{Effect, accesses_memory, effect, reads_status};
use super::emit::{Emitter, RAX, RCX, Rm};
use super::entry;
use super::site::{Jump, Kind, Link, Site};
use crate::translate::memory::frame::{
    Branch, Entry, Frame, Gate, TRANSLATIONS, branch_table_offset, table_offset,
};
use crate::translate::memory::{PAGE, PAGE_MASK, Reach};

/// Where the status flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flags {
    /// In the processor alone.
    Live,
    /// In the processor and in the frame.
    Both,
    /// In the frame alone.
    Saved,
}

/// What code is translated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mode {
    pub(super) reach: Reach,
    /// SSE instructions may run.
    pub(super) sse: bool,
    /// Instructions are counted, and run only as long as the budget has some left.
    pub(super) counted: bool,
    /// The time-stamp counter goes up by one with each instruction.
    pub(super) ticking: bool,
    /// Translated code is left at the start of each block.
    pub(super) traced: bool,
    /// There is one vCPU.
    pub(super) alone: bool,
    /// Memory is accessed through the address window.
    pub(super) window: bool,
}

impl Hash for Mode {
    /// At once: translations are looked up all the time.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self { reach, sse, counted, ticking, traced, alone, window } = *self;
        let bits = [sse, counted, ticking, traced, alone, window];
        state.write_u8(bits.into_iter().fold(reach as u8, |sum, bit| sum << 1 | u8::from(bit)));
    }
}

impl Mode {
    /// Number of its table of branch targets.
    pub(super) fn branch_table(self) -> usize {
        if self.window { Reach::UserAligned as usize } else { self.reach as usize }
    }
}

/// Displacement of a field of the state.
macro_rules! state {
    ($field:ident) => {
        $crate::translate::jit::builder::displacement(
            std::mem::offset_of!($crate::translate::memory::frame::Frame, state)
                + std::mem::offset_of!($crate::translate::memory::frame::State, $field),
        )
    };
}
pub(super) use state;

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "a frame is smaller than 2 GiB"
)]
pub(super) const fn displacement(offset: usize) -> i32 {
    offset as i32
}

/// Number of the host's stack pointer.
const HOST_RSP: u8 = 4;

/// Place of a register of the guest's that no host register holds: on the host's stack, since processors treat what is
/// stored at fixed distances from the stack pointer almost as registers.
pub(super) fn slot(register: u8) -> Rm {
    Rm::At(HOST_RSP, entry::stack_place(register))
}

/// Where the status flags are saved, as LAHF and SETO leave them in AX.
pub(super) const SAVED_FLAGS: Rm = Rm::At(HOST_RSP, entry::FLAGS);
/// The second byte of that, which is as RFLAGS has it.
pub(super) const SAVED_FLAGS_HIGH: Rm = Rm::At(HOST_RSP, entry::FLAGS + 1);
/// Two places for the running instruction.
pub(super) const SCRATCH: [Rm; 2] = [Rm::At(HOST_RSP, entry::SCRATCH), Rm::At(HOST_RSP, entry::SCRATCH + 8)];

/// Offsets of code that all translations share.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Shared {
    /// Leaves translated code with the site's number in ECX and the flags in the processor.
    pub(super) leave_live: usize,
    /// The same with the flags in the frame.
    pub(super) leave_saved: usize,
    /// Leaves translated code because the host cannot execute an instruction of it.
    pub(super) leave_fault: usize,
}

/// The number of no site, where translated code is left because of a fault of the host's.
pub(super) const FAULT: u32 = u32::MAX;

/// A jump to what leaves translated code.
struct Stub {
    /// Offset of the distance, four bytes; `None`: it begins where the stub is.
    from: Vec<usize>,
    site: u32,
    live: bool,
}

/// Flags to be restored before code goes on at `to`, behind an instruction that the interpreter executed.
struct Landing {
    sites: Vec<u32>,
    to: usize,
}

/// A translation that is under construction.
pub(super) struct Builder<'a> {
    pub(super) e: Emitter,
    pub(super) encoder: &'a mut Encoder,
    pub(super) info: &'a mut InstructionInfoFactory,
    pub(super) mode: Mode,
    pub(super) flags: Flags,
    /// Where the code will lie in code memory.
    origin: usize,
    shared: Shared,
    translation: u32,
    sites: Vec<Site>,
    first_site: u32,
    stubs: Vec<Stub>,
    landings: Vec<Landing>,
    /// Sites of the running instruction that resume behind it.
    pub(super) resuming: Vec<u32>,
    pub(super) accesses: Vec<Access>,
    /// How many instructions there are, and the number of the running one.
    pub(super) count: usize,
    pub(super) op: u16,
    /// The flags that the running instruction keeps are overwritten before anybody can see them.
    pub(super) flags_dead: bool,
    /// The processor's flags are neither the guest's nor saved: some were kept that nobody will see.
    pub(super) flags_lost: bool,
    /// Somebody would have seen them. The block is translated again, more carefully.
    misjudged: bool,
    careful: bool,
    /// The block ends with STI.
    pub(super) shadow: bool,
    /// RIP of the page that the block begins in, and whether all of the block lies there.
    page: u64,
    whole: bool,
}

/// What came of it.
pub(super) struct Built {
    pub(super) bytes: Vec<u8>,
    pub(super) sites: Vec<Site>,
    /// Its accesses through the window, by where they begin.
    pub(super) accesses: Vec<Access>,
    /// Offsets in code memory of where it is entered, with flags in the processor and in the frame.
    pub(super) live: usize,
    pub(super) saved: usize,
    /// Where its gate leads while it is shut, likewise.
    pub(super) shut_live: usize,
    pub(super) shut_saved: usize,
}

/// Where a translation goes and what it is called.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) origin: usize,
    pub(super) translation: u32,
    pub(super) first_site: u32,
    /// RIP of the block.
    pub(super) rip: u64,
    /// It lies in one page.
    pub(super) whole: bool,
}

impl<'a> Builder<'a> {
    pub(super) fn new(
        encoder: &'a mut Encoder,
        info: &'a mut InstructionInfoFactory,
        shared: Shared,
        mode: Mode,
        place: Place,
        buffer: Vec<u8>,
    ) -> Self {
        let mut e = Emitter { bytes: buffer };
        e.bytes.clear();
        Self {
            e,
            encoder,
            info,
            mode,
            flags: Flags::Saved,
            origin: place.origin,
            shared,
            translation: place.translation,
            sites: Vec::new(),
            first_site: place.first_site,
            stubs: Vec::new(),
            landings: Vec::new(),
            resuming: Vec::new(),
            accesses: Vec::new(),
            count: 0,
            op: 0,
            flags_dead: false,
            flags_lost: false,
            misjudged: false,
            careful: false,
            shadow: false,
            page: place.rip & PAGE_MASK,
            whole: place.whole,
        }
    }

    /// Translates the instructions of a block; `None` if it must be done [`carefully`](Self::carefully). What is to be found
    /// at host addresses whenever the translation is entered is `checked`.
    pub(super) fn build(mut self, instructions: &[Instruction], checked: &[(u64, &[u8])]) -> Option<Built> {
        self.count = instructions.len();
        let (live, saved) = self.entries(instructions, checked);
        let mut ended = false;
        for (op, instruction) in (0..).zip(instructions) {
            self.op = op;
            self.flags_dead =
                !self.careful && flags_are_dead(instructions.get(usize::from(op) + 1..).unwrap_or_default());
            ended = self.instruction(instruction);
            self.end_instruction();
        }
        if !ended && let Some(last) = instructions.last() {
            self.jump_to(last.next_ip(), last.ip());
        }
        let shut_saved = self.gate(false);
        let shut_live = self.gate(true);
        self.finish();
        if self.misjudged {
            return None;
        }
        Some(Built {
            bytes: self.e.bytes,
            sites: self.sites,
            accesses: self.accesses,
            live: self.origin + live,
            saved: self.origin + saved,
            shut_live,
            shut_saved,
        })
    }

    /// Looks nowhere ahead.
    pub(super) fn carefully(mut self) -> Self {
        self.careful = true;
        self
    }

    /// The flags are needed as they are for the guest.
    pub(super) fn show_flags(&mut self) {
        self.misjudged |= self.flags_lost;
    }

    /// Emits what enters the translation; where, with flags in the processor and in the frame.
    fn entries(&mut self, instructions: &[Instruction], checked: &[(u64, &[u8])]) -> (usize, usize) {
        // The first that has to do with them says which of the two has less to do.
        let plain = !self.mode.counted && !self.mode.traced && checked.is_empty();
        let first =
            instructions.iter().filter(|_| plain).find(|i| accesses_memory(i) || effect(i) != Effect::None);
        if !self.careful && plain && flags_are_dead(instructions) {
            // Wherever they are, nobody sees them.
            self.flags = Flags::Live;
            self.flags_lost = true;
            return (self.e.len(), self.e.len());
        }
        if first.is_some_and(|i| !accesses_memory(i) && effect(i) == Effect::Reads) {
            let saved = self.e.len();
            self.restore_flags();
            self.flags = Flags::Live;
            return (self.e.len(), saved);
        }
        if self.mode.window && plain {
            // Accesses keep them where they are.
            let saved = self.e.len();
            self.restore_flags();
            self.flags = Flags::Live;
            return (self.e.len(), saved);
        }
        let live = self.e.len();
        self.flags = Flags::Live;
        self.save_flags();
        self.flags = Flags::Saved;
        let saved = self.e.len();
        if !checked.is_empty() {
            self.check(checked);
        }
        if self.mode.counted {
            let count = i32::try_from(instructions.len()).unwrap_or(i32::MAX);
            // SUB
            self.e.group1(true, 5, Rm::Frame(state!(budget)), count);
            let from = self.e.jump_if(LESS);
            self.leave_from(vec![from], Kind::Budget);
        }
        if self.mode.traced {
            let site = self.site(Kind::Trace { resume: 0 });
            self.leave(site, false);
            let at = self.e.len();
            self.resume(&[site], at);
        }
        (live, saved)
    }

    /// Lets jumps whose distances are there leave translated code, with the flags in the frame.
    pub(super) fn leave_from(&mut self, from: Vec<usize>, kind: Kind) {
        let site = self.site(kind);
        self.stubs.push(Stub { from, site, live: false });
    }

    /// What a shut gate leads to.
    fn gate(&mut self, live: bool) -> usize {
        let site = self.site(Kind::Gate);
        let at = self.e.len();
        self.leave(site, live);
        self.origin + at
    }

    pub(super) fn site_count(&self) -> usize {
        self.sites.len()
    }

    /// Takes back all sites but the first `count`.
    pub(super) fn forget_sites(&mut self, count: usize) {
        self.sites.truncate(count);
        let first = self.first_site;
        let is_kept = |site: u32| ((site - first) as usize) < count;
        self.accesses.retain(|access| is_kept(access.site));
        self.stubs.retain(|stub| is_kept(stub.site));
        self.resuming.retain(|site| is_kept(*site));
    }

    pub(super) fn site(&mut self, kind: Kind) -> u32 {
        self.sites.push(Site { translation: self.translation, kind });
        self.first_site + u32::try_from(self.sites.len() - 1).unwrap_or(u32::MAX)
    }

    /// Leaves translated code here.
    fn leave(&mut self, site: u32, live: bool) {
        self.e.constant(RCX, site.into());
        let at = self.e.jump();
        let target = if live { self.shared.leave_live } else { self.shared.leave_saved };
        // Common code lies in front of all translations.
        self.e.land(at, target.wrapping_sub(self.origin));
    }

    /// A site where the interpreter executes the running instruction.
    pub(super) fn instruction_site(&mut self) -> u32 {
        let site = self.site(Kind::Instruction { op: self.op, resume: 0 });
        self.resuming.push(site);
        site
    }

    /// Lets the interpreter execute the running instruction if the conditional jump with its distance at `from` is taken.
    /// The flags are in the frame.
    pub(super) fn interpret_if(&mut self, condition: u8) {
        debug_assert_ne!(self.flags, Flags::Live, "flags are saved before anything that may change them");
        let from = self.e.jump_if(condition);
        match self.stubs.last_mut() {
            Some(stub) if !stub.live && self.resuming.last() == Some(&stub.site) => stub.from.push(from),
            _ => {
                let site = self.instruction_site();
                self.stubs.push(Stub { from: vec![from], site, live: false });
            }
        }
    }

    /// Lets the interpreter execute the running instruction.
    pub(super) fn interpret(&mut self) {
        self.show_flags();
        let site = self.instruction_site();
        let live = self.flags == Flags::Live;
        self.leave(site, live);
        self.flags = Flags::Saved;
    }

    /// The code of the running instruction is complete.
    fn end_instruction(&mut self) {
        self.end_accesses();
        if self.resuming.is_empty() {
            return;
        }
        let sites = std::mem::take(&mut self.resuming);
        let here = self.e.len();
        if self.flags == Flags::Saved {
            self.resume(&sites, here);
        } else {
            self.landings.push(Landing { sites, to: here });
        }
    }

    fn resume(&mut self, sites: &[u32], at: usize) {
        let offset = u32::try_from(self.origin + at).unwrap_or(u32::MAX);
        for site in sites {
            let index = (site - self.first_site) as usize;
            let kind = self.sites.get_mut(index).map(|site| &mut site.kind);
            if let Some(Kind::Instruction { resume, .. } | Kind::Trace { resume }) = kind {
                *resume = offset;
            }
        }
    }

    /// Emits what is rarely executed.
    fn finish(&mut self) {
        for landing in std::mem::take(&mut self.landings) {
            let at = self.e.len();
            self.resume(&landing.sites, at);
            self.restore_flags();
            let jump = self.e.jump();
            self.e.land(jump, landing.to);
        }
        for stub in std::mem::take(&mut self.stubs) {
            for from in stub.from {
                self.e.land_here(from);
            }
            let at = u32::try_from(self.origin + self.e.len()).unwrap_or(u32::MAX);
            let index = (stub.site - self.first_site) as usize;
            if let Some(Site { kind: Kind::Jump(jump), .. }) = self.sites.get_mut(index) {
                jump.stub = at;
            }
            self.leave(stub.site, stub.live);
        }
    }

    /// Puts the flags into the frame too. RAX changes.
    pub(super) fn save_flags(&mut self) {
        self.show_flags();
        if self.flags == Flags::Live {
            // LAHF; SETO AL
            self.e.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
            self.e.op(false, &[0x89], RAX, SAVED_FLAGS);
            self.flags = Flags::Both;
        }
    }

    /// The code that follows changes the flags of the processor, not those of the guest. RAX changes.
    pub(super) fn clobber_flags(&mut self) {
        self.save_flags();
        self.flags = Flags::Saved;
    }

    /// Puts the flags into the processor too. RAX changes.
    pub(super) fn need_flags(&mut self) {
        self.show_flags();
        if self.flags == Flags::Saved {
            self.restore_flags();
            self.flags = Flags::Both;
        }
    }

    fn restore_flags(&mut self) {
        self.e.op(false, &[0x8b], RAX, SAVED_FLAGS);
        // ADD AL, 0x7F overflows if AL is one; SAHF
        self.e.bytes(&[0x04, 0x7f, 0x9e]);
    }

    /// Makes the linear address in RAX the host address of as many bytes, or lets the interpreter execute the instruction.
    /// RCX and the processor's flags change.
    pub(super) fn lookup(&mut self, bytes: usize, write: bool, aligned: bool) {
        debug_assert_eq!(self.flags, Flags::Saved, "the lookup changes flags");
        let table = table_offset(self.mode.reach);
        let tag = if write { offset_of!(Entry, write) } else { offset_of!(Entry, read) };
        // MOV ECX, EAX; SHR ECX, 7
        self.e.bytes(&[0x89, 0xc1, 0xc1, 0xe9, 7]);
        const { assert!(size_of::<Entry>() == 32 && PAGE == 4096) };
        self.e.group1(
            false,
            4,
            Rm::Reg(RCX),
            displacement((crate::translate::memory::frame::ENTRIES - 1) * 32),
        );
        self.e.op(true, &[0x2b], RAX, Rm::FrameAt(RCX, displacement(table + tag)));
        self.e.group1(true, 7, Rm::Reg(RAX), 4096 - displacement(bytes));
        self.interpret_if(ABOVE);
        if aligned {
            // TEST AL, bytes - 1
            self.e.bytes(&[0xa8, crate::translate::segment::low8(bytes as u64 - 1)]);
            self.interpret_if(NOT_EQUAL);
        }
        self.e.op(true, &[0x03], RAX, Rm::FrameAt(RCX, displacement(table + offset_of!(Entry, host))));
    }

    /// A direct branch from the instruction at `from`.
    pub(super) fn jump_to(&mut self, target: u64, from: u64) {
        let live = self.flags == Flags::Live;
        let near = self.is_near(target);
        if target <= from {
            // What GO points to; JRCXZ
            self.e.load(RCX, Rm::Frame(state!(go)));
            self.e.load(RCX, Rm::At(RCX, 0));
            let poll = self.e.jump_short(0xe3);
            self.jump(target, near, live);
            self.e.land_short(poll);
            let site = self.site(Kind::Poll { target });
            self.leave(site, live);
        } else {
            self.jump(target, near, live);
        }
    }

    /// A conditional branch forwards in the same page, which needs no code of its own.
    pub(super) fn jump_to_if(&mut self, condition: u8, target: u64) {
        let live = self.flags == Flags::Live;
        let at = self.e.len();
        let from = self.e.jump_if(condition);
        self.jump_site(target, at, Link::Near { length: 6 }, live, from);
    }

    pub(super) fn is_near(&self, target: u64) -> bool {
        self.whole && target & PAGE_MASK == self.page
    }

    fn jump(&mut self, target: u64, near: bool, live: bool) {
        let at = self.e.len();
        let from = self.e.jump();
        let link = if near {
            Link::Near { length: 5 }
        } else {
            // Room for a jump through the gate.
            self.e.bytes(&[0xcc; GATE_JUMP - 5]);
            Link::Gate
        };
        self.jump_site(target, at, link, live, from);
    }

    fn jump_site(&mut self, target: u64, at: usize, link: Link, live: bool, from: usize) {
        self.show_flags();
        let at = u32::try_from(self.origin + at).unwrap_or(u32::MAX);
        let site = self.site(Kind::Jump(Jump { target, at, stub: 0, link, live, shadow: self.shadow }));
        self.stubs.push(Stub { from: vec![from], site, live });
    }

    /// Looks the branch target in RCX up; RAX becomes the offset of its entry. Where it is not known, or something wants
    /// attention, the interpreter executes the branch.
    pub(super) fn lookup_branch(&mut self) {
        debug_assert_eq!(self.flags, Flags::Saved, "the lookup changes flags");
        self.e.load(RAX, Rm::Frame(state!(go)));
        self.e.group1(true, 7, Rm::At(RAX, 0), 0);
        self.interpret_if(EQUAL);
        // MOV EAX, ECX
        self.e.bytes(&[0x89, 0xc8]);
        const { assert!(size_of::<Branch>() == 16) };
        let mask = displacement(crate::translate::memory::frame::BRANCHES - 1);
        self.e.group1(false, 4, Rm::Reg(RAX), mask);
        // SHL EAX, 4
        self.e.bytes(&[0xc1, 0xe0, 4]);
        let table = branch_table_offset(self.mode.branch_table());
        let rip = displacement(table + offset_of!(Branch, rip));
        self.e.op(true, &[0x3b], RCX, Rm::FrameAt(RAX, rip));
        self.interpret_if(NOT_EQUAL);
    }

    /// Where the code of the entry is that [`Builder::lookup_branch`] found.
    pub(super) fn branch_code(&self) -> Rm {
        Rm::FrameAt(
            RAX,
            displacement(branch_table_offset(self.mode.branch_table()) + offset_of!(Branch, code)),
        )
    }

    /// JMP through memory.
    pub(super) fn jump_through(&mut self, place: Rm) {
        self.e.op(false, &[0xff], 4, place);
    }
}

/// Whether `instructions` overwrite all status flags before they use any, or may leave translated code.
fn flags_are_dead(instructions: &[Instruction]) -> bool {
    for instruction in instructions {
        if accesses_memory(instruction) || !super::instruction::stays_inside(instruction) {
            return false;
        }
        match effect(instruction) {
            Effect::None => {}
            Effect::Overwrites => return true,
            Effect::Reads if reads_status(instruction) => return false,
            Effect::Reads => {}
        }
    }
    false
}

/// Condition codes of Jcc.
pub(super) const EQUAL: u8 = 4;
pub(super) const NOT_EQUAL: u8 = 5;
pub(super) const ABOVE: u8 = 7;
pub(super) const LESS: u8 = 12;

/// Length of a jump through a gate.
pub(super) const GATE_JUMP: usize = 8;

/// The jump through the gate of a translation.
pub(super) fn gate_jump(translation: u32, live: bool) -> Vec<u8> {
    let field = if live { offset_of!(Gate, live) } else { offset_of!(Gate, saved) };
    let index = translation as usize % TRANSLATIONS;
    let offset = offset_of!(Frame, gates) + index * size_of::<Gate>() + field;
    let mut e = Emitter::default();
    e.op(false, &[0xff], 4, Rm::Frame(displacement(offset)));
    e.bytes
}

/// What leaves translated code, for code memory's start.
pub(super) fn shared_code() -> (Vec<u8>, Shared) {
    let mut e = Emitter::default();
    let leave_live = e.len();
    e.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
    e.op(false, &[0x89], RAX, SAVED_FLAGS);
    let leave_saved = e.len();
    e.op(false, &[0xff], 4, Rm::Frame(state!(leave)));
    let leave_fault = e.len();
    e.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
    e.op(false, &[0x89], RAX, Rm::Frame(state!(fault_flags)));
    e.constant(RCX, FAULT.into());
    let at = e.jump();
    e.land(at, leave_saved);
    (e.bytes, Shared { leave_live, leave_saved, leave_fault })
}

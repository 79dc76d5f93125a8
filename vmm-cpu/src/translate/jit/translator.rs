//! The translations of one vCPU: where they are, what leads to them, and when they hold.
//!
//! A translation belongs to a block, an RIP and a [`Mode`]. Translations of one page, that is of one linear page at one
//! guest-physical page, hold or do not hold together: whenever a translation of addresses may have changed, all pages are
//! suspended, and each is taken up again when the interpreter has found one of its blocks anew and the page's bytes are
//! those of before.
//!
//! Within a page, jumps go straight to their target. From other pages a translation is entered through its gate, which is
//! shut while its page is suspended.

use iced_x86::{Decoder, Encoder, Instruction, InstructionInfoFactory};
use rustc_hash::FxHashMap;

use super::access::Access;
use super::builder::{Builder, Mode, Place, Shared, gate_jump, shared_code};
use super::emit::distance;
use super::memory::CodeMemory;
use super::site::{Jump, Kind, Link, Site};
use crate::translate::block::{Block, BlockCache, DECODING};
use crate::translate::memory::frame::{BRANCHES, Branch, Frame, Gate, TRANSLATIONS};
use crate::translate::memory::{Fetched, Forgotten, MemoryMap, PAGE, PAGE_MASK, Reach};

/// Bytes of code memory.
const CODE_BYTES: usize = 64 << 20;

/// What one translation may need: 64 instructions.
const MAX_TRANSLATION: usize = 64 * 256;

/// Whom code of the guest's kernel runs for, and whether through the address window.
const KERNELS: [(Reach, bool); 2] = [(Reach::Supervisor, false), (Reach::SupervisorAll, false)];

/// Sites at one time, at most.
const MAX_SITES: usize = 1 << 22;

/// One page of code: a linear page at a guest-physical page.
#[derive(Debug)]
struct Page {
    va: u64,
    mode: Mode,
    gpa: u64,
    /// Its translations may be entered.
    holds: bool,
    /// Of what the page tables have there: whether it is global, and the binary logarithm of its size.
    global: bool,
    size: u32,
    translations: Vec<u32>,
    /// What it held when that was last compared.
    bytes: Box<[u8; PAGE_BYTES]>,
}

/// Bytes of a page.
const PAGE_BYTES: usize = 4096;
const _: () = assert!(PAGE_BYTES as u64 == PAGE);

/// Binary logarithm of the size of a small page.
const SMALL: u32 = PAGE.trailing_zeros();

/// Key of a page: linear page with the mode, guest-physical page.
type PageKey = (u64, Mode, u64);

#[derive(Debug)]
pub(super) struct Translation {
    pub(super) rip: u64,
    /// Its block in the interpreter's cache.
    pub(super) block: u32,
    page: u32,
    mode: Mode,
    /// Offset in code memory.
    start: usize,
    accesses: Box<[Access]>,
    live: u64,
    saved: u64,
    shut: Gate,
    /// Sites whose jumps lead here.
    incoming: Vec<u32>,
    dropped: bool,
}

/// A block that the interpreter has just found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found<'a> {
    pub(super) rip: u64,
    pub(super) mode: Mode,
    pub(super) block: &'a Block,
    /// The page that it was fetched from.
    pub(super) fetched: Fetched,
}

/// See the module.
pub(crate) struct Translator {
    memory: CodeMemory,
    used: usize,
    shared: Shared,
    encoder: Encoder,
    info: InstructionInfoFactory,
    buffer: Vec<u8>,
    instructions: Vec<Instruction>,
    sites: Vec<Site>,
    translations: Vec<Translation>,
    pages: Vec<Page>,
    by_page: FxHashMap<PageKey, u32>,
    /// Pages that hold, by linear page and mode.
    current: FxHashMap<(u64, Mode), u32>,
    /// Those that are not global, and maybe some that do not hold any more.
    local: Vec<u32>,
    /// What all modes of this vCPU have in common.
    pub(super) flavour: Mode,
    /// Some that hold may be parts of large pages.
    large: bool,
    /// By page and offset in it.
    by_place: FxHashMap<(u32, u16), u32>,
    /// Translations of each block.
    by_block: FxHashMap<u32, Vec<u32>>,
    /// Code memory was written since translated code was last entered.
    patched: bool,
}

impl std::fmt::Debug for Translator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Translator")
            .field("translations", &self.translations.len())
            .field("used", &self.used)
            .finish_non_exhaustive()
    }
}

impl Translator {
    pub(super) fn new(flavour: Mode) -> std::io::Result<Self> {
        let mut memory = CodeMemory::new(CODE_BYTES)?;
        let (code, shared) = shared_code();
        memory.write(0, &code);
        Ok(Self {
            memory,
            used: code.len().next_multiple_of(16),
            shared,
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
            buffer: Vec::new(),
            instructions: Vec::new(),
            sites: Vec::new(),
            translations: Vec::new(),
            pages: Vec::new(),
            by_page: FxHashMap::default(),
            current: FxHashMap::default(),
            local: Vec::new(),
            flavour,
            large: false,
            by_place: FxHashMap::default(),
            by_block: FxHashMap::default(),
            patched: false,
        })
    }

    /// Bytes of code memory that are in use.
    pub(super) fn used_bytes(&self) -> u64 {
        self.used as u64
    }

    /// Whether code memory was written since this was last asked.
    pub(super) fn take_patched(&mut self) -> bool {
        std::mem::take(&mut self.patched)
    }

    pub(super) fn site(&self, site: u32) -> Option<Site> {
        self.sites.get(site as usize).copied()
    }

    pub(super) fn get(&self, translation: u32) -> Option<&Translation> {
        self.translations.get(translation as usize)
    }

    /// Host address of an offset in code memory.
    pub(super) fn address(&self, offset: u32) -> u64 {
        self.memory.address(offset as usize)
    }

    /// Code memory and where translated code goes on after a fault: first address, bytes, address.
    pub(super) fn extent(&self) -> (u64, u64, u64) {
        (self.memory.address(0), self.memory.len() as u64, self.memory.address(self.shared.leave_fault))
    }

    /// The access through the window that the instruction at that host address is part of.
    pub(super) fn access(&self, address: u64) -> Option<Access> {
        let offset = usize::try_from(address.checked_sub(self.memory.address(0))?).ok()?;
        // Translations lie in the order of their numbers.
        let after = self.translations.partition_point(|translation| translation.start <= offset);
        let translation = self.translations.get(after.checked_sub(1)?)?;
        let after = translation.accesses.partition_point(|access| translation.start + access.at <= offset);
        let access = translation.accesses.get(after.checked_sub(1)?).copied();
        access.filter(|access| offset < translation.start + access.end)
    }

    /// The translation of what runs at `rip`, if it holds.
    pub(super) fn find(&self, rip: u64, mode: Mode) -> Option<u32> {
        let page = *self.current.get(&(rip & PAGE_MASK, mode))?;
        self.by_place.get(&(page, offset(rip))).copied()
    }

    /// The translation that the table of branch targets has for `rip`.
    pub(super) fn branch_target(rip: u64, mode: Mode, frame: &Frame) -> Option<u64> {
        let branch = frame.branches.get(mode.branch_table())?.get(branch_index(rip))?;
        (branch.rip == rip).then_some(branch.code)
    }

    /// Where a translation is entered with flags in the frame.
    pub(super) fn entry(&self, translation: u32) -> Option<u64> {
        self.get(translation).filter(|found| !found.dropped).map(|found| found.saved)
    }

    /// Lets no page be entered whose translation of addresses is forgotten, before it is looked at anew.
    pub(super) fn forget(&mut self, forgotten: &Forgotten, frame: &mut Frame) {
        if forgotten.all {
            self.local.clear();
            self.large = false;
            for page in std::mem::take(&mut self.current).into_values() {
                self.shut(page, frame);
            }
            return;
        }
        if forgotten.local {
            for page in std::mem::take(&mut self.local) {
                if self.pages.get(page as usize).is_some_and(|page| !page.global) {
                    self.suspend(page, frame);
                }
            }
        }
        for va in &forgotten.pages {
            let users = [(Reach::User, false), (Reach::User, true)];
            for (reach, window) in users.into_iter().chain(KERNELS) {
                for sse in [false, true] {
                    let mode = Mode { reach, sse, window, ..self.flavour };
                    if let Some(page) = self.current.get(&(va & PAGE_MASK, mode)) {
                        self.suspend(*page, frame);
                    }
                }
            }
            if self.large {
                let is_part = |page: &Page| page.size > SMALL && page.va >> page.size == va >> page.size;
                let is_part = |page: &u32| self.pages.get(*page as usize).is_some_and(is_part);
                let parts: Vec<u32> = self.current.values().copied().filter(is_part).collect();
                for page in parts {
                    self.suspend(page, frame);
                }
            }
        }
    }

    /// Lets a page not be entered.
    fn suspend(&mut self, page: u32, frame: &mut Frame) {
        let Some(found) = self.pages.get(page as usize).filter(|found| found.holds) else { return };
        self.current.remove(&(found.va, found.mode));
        self.shut(page, frame);
    }

    fn shut(&mut self, page: u32, frame: &mut Frame) {
        let Some(page) = self.pages.get_mut(page as usize) else { return };
        page.holds = false;
        for translation in &page.translations {
            if let Some(found) = self.translations.get(*translation as usize) {
                found.shut(*translation, frame);
            }
        }
    }

    /// Takes up the page of a block; the page.
    pub(super) fn take_up(
        &mut self,
        found: &Found<'_>,
        map: &MemoryMap,
        frame: &mut Frame,
        cache: &BlockCache,
    ) -> Option<u32> {
        let Found { rip, mode, block, fetched } = *found;
        let (va, gpa) = (rip & PAGE_MASK, block.gpa & PAGE_MASK);
        if let Some(page) = self.current.get(&(va, mode)) {
            if self.pages.get(*page as usize).is_some_and(|page| page.gpa == gpa) {
                return Some(*page);
            }
            let page = *page;
            self.suspend(page, frame);
        }
        let page = match self.by_page.get(&(va, mode, gpa)) {
            Some(page) => *page,
            None => {
                let page = u32::try_from(self.pages.len()).ok()?;
                let bytes = Box::new([0; PAGE_BYTES]);
                let (global, size) = (fetched.global, fetched.size);
                let translations = Vec::new();
                self.pages.push(Page { va, mode, gpa, holds: false, global, size, translations, bytes });
                self.by_page.insert((va, mode, gpa), page);
                page
            }
        };
        self.compare(page, map, frame, cache);
        self.current.insert((va, mode), page);
        if let Some(found) = self.pages.get_mut(page as usize) {
            found.holds = true;
            (found.global, found.size) = (fetched.global, fetched.size);
            self.large |= found.size > SMALL;
            if !found.global {
                self.local.push(page);
            }
            for translation in &found.translations {
                if let Some(open) = self.translations.get(*translation as usize) {
                    open.open(*translation, frame);
                }
            }
        }
        Some(page)
    }

    /// Drops the translations in `page` whose code is not what it was.
    fn compare(&mut self, page: u32, map: &MemoryMap, frame: &mut Frame, cache: &BlockCache) {
        let Some(found) = self.pages.get_mut(page as usize) else { return };
        let mut now = [0; PAGE_BYTES];
        let is_read = map.read(found.gpa, &mut now);
        if is_read && now == *found.bytes {
            return;
        }
        *found.bytes = now;
        let stale: Vec<u32> = found
            .translations
            .iter()
            .copied()
            .filter(|translation| {
                let block = self.translations.get(*translation as usize).and_then(|t| cache.get(t.block));
                !is_read
                    || block.is_none_or(|block| {
                        let start = usize::from(offset(block.gpa));
                        now.get(start..start + block.bytes.len()) != Some(&*block.bytes)
                    })
            })
            .collect();
        for translation in stale {
            self.drop_translation(translation, frame);
        }
    }

    /// Drops the translations of a block that is gone.
    pub(super) fn drop_block(&mut self, block: u32, frame: &mut Frame) {
        for translation in self.by_block.remove(&block).unwrap_or_default() {
            self.drop_translation(translation, frame);
        }
    }

    fn drop_translation(&mut self, number: u32, frame: &mut Frame) {
        let Some(translation) = self.translations.get_mut(number as usize) else { return };
        if std::mem::replace(&mut translation.dropped, true) {
            return;
        }
        let (incoming, page, rip) =
            (std::mem::take(&mut translation.incoming), translation.page, translation.rip);
        translation.shut(number, frame);
        let block = translation.block;
        for site in incoming {
            self.unlink(site);
        }
        self.by_place.remove(&(page, offset(rip)));
        if let Some(page) = self.pages.get_mut(page as usize) {
            page.translations.retain(|other| *other != number);
        }
        if let Some(others) = self.by_block.get_mut(&block) {
            others.retain(|other| *other != number);
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self, frame: &mut Frame) {
        self.forget(&Forgotten { all: true, ..Forgotten::default() }, frame);
        self.used = shared_code().0.len().next_multiple_of(16);
        self.sites.clear();
        self.translations.clear();
        self.pages.clear();
        self.by_page.clear();
        self.by_place.clear();
        self.by_block.clear();
    }

    pub(super) fn is_full(&self) -> bool {
        self.used + MAX_TRANSLATION > self.memory.len()
            || self.sites.len() >= MAX_SITES
            || self.translations.len() >= TRANSLATIONS
    }

    /// Translates `block`, number `id` of the interpreter's, at `rip`, whose page holds.
    pub(super) fn translate(
        &mut self,
        rip: u64,
        mode: Mode,
        id: u32,
        block: &Block,
        page: u32,
        frame: &mut Frame,
    ) -> Option<u32> {
        self.instructions.clear();
        let mut decoder = Decoder::with_ip(64, &block.bytes, rip, DECODING);
        while decoder.can_decode() && self.instructions.len() < block.ops.len() {
            self.instructions.push(decoder.decode());
        }
        if self.instructions.len() != block.ops.len() || block.second_page.is_some() {
            return None;
        }
        let number = u32::try_from(self.translations.len()).ok()?;
        let place = Place {
            origin: self.used,
            translation: number,
            first_site: u32::try_from(self.sites.len()).ok()?,
            rip,
            whole: true,
        };
        let buffer = std::mem::take(&mut self.buffer);
        let builder = Builder::new(&mut self.encoder, &mut self.info, self.shared, mode, place, buffer);
        let built = match builder.build(&self.instructions) {
            Some(built) => built,
            None => Builder::new(&mut self.encoder, &mut self.info, self.shared, mode, place, Vec::new())
                .carefully()
                .build(&self.instructions)?,
        };
        if self.used + built.bytes.len() > self.memory.len() {
            return None;
        }
        self.memory.write(self.used, &built.bytes);
        self.patched = true;
        let start = self.used;
        self.used = (self.used + built.bytes.len()).next_multiple_of(16);
        self.buffer = built.bytes;
        self.sites.extend_from_slice(&built.sites);
        let at = |offset| self.memory.address(offset);
        let translation = Translation {
            rip,
            block: id,
            page,
            mode,
            start,
            accesses: built.accesses.into(),
            live: at(built.live),
            saved: at(built.saved),
            shut: Gate { live: at(built.shut_live), saved: at(built.shut_saved) },
            incoming: Vec::new(),
            dropped: false,
        };
        translation.open(number, frame);
        self.translations.push(translation);
        self.by_place.insert((page, offset(rip)), number);
        self.by_block.entry(id).or_default().push(number);
        if let Some(page) = self.pages.get_mut(page as usize) {
            page.translations.push(number);
        }
        Some(number)
    }

    /// Lets the jump at `site` lead to `target`, if that is code of the same mode: what is ready for one is not for another.
    pub(super) fn link(&mut self, site: u32, jump: &Jump, target: u32) {
        let from = self.site(site).and_then(|site| self.get(site.translation)).map(|from| from.mode);
        let found = self.translations.get_mut(target as usize).filter(|found| from == Some(found.mode));
        let Some(found) = found else { return };
        let entry = if jump.live { found.live } else { found.saved };
        match jump.link {
            Link::Near { length } => {
                let at = jump.at as usize + usize::from(length) - 4;
                let origin = self.memory.address(0);
                let Ok(entry) = usize::try_from(entry.wrapping_sub(origin)) else { return };
                self.memory.write(at, &distance(at, entry).to_le_bytes());
            }
            Link::Gate => self.memory.write(jump.at as usize, &gate_jump(target, jump.live)),
        }
        found.incoming.push(site);
        self.patched = true;
    }

    fn unlink(&mut self, site: u32) {
        let Some(Site { kind: Kind::Jump(jump), .. }) = self.site(site) else { return };
        let (at, stub) = (jump.at as usize, jump.stub as usize);
        match jump.link {
            Link::Near { length } => {
                let at = at + usize::from(length) - 4;
                self.memory.write(at, &distance(at, stub).to_le_bytes());
            }
            Link::Gate => {
                let [a, b, c, d] = distance(at + 1, stub).to_le_bytes();
                self.memory.write(at, &[0xe9, a, b, c, d, 0xcc, 0xcc, 0xcc]);
            }
        }
        self.patched = true;
    }

    /// Lets indirect branches find a translation.
    pub(super) fn remember_branch(&self, translation: u32, frame: &mut Frame) {
        if let Some(found) = self.get(translation).filter(|found| !found.dropped)
            && let Some(branch) = branch(frame, found.mode, found.rip)
        {
            *branch = Branch { rip: found.rip, code: found.saved };
        }
    }
}

impl Translation {
    fn open(&self, number: u32, frame: &mut Frame) {
        if let Some(gate) = frame.gates.get_mut(number as usize) {
            *gate = Gate { live: self.live, saved: self.saved };
        }
    }

    fn shut(&self, number: u32, frame: &mut Frame) {
        if let Some(gate) = frame.gates.get_mut(number as usize) {
            *gate = self.shut;
        }
        if let Some(branch) = branch(frame, self.mode, self.rip)
            && branch.rip == self.rip
        {
            *branch = Branch::nothing(branch_index(self.rip));
        }
    }
}

/// The entry of the table of branch targets that `rip` uses.
fn branch(frame: &mut Frame, mode: Mode, rip: u64) -> Option<&mut Branch> {
    frame.branches.get_mut(mode.branch_table())?.get_mut(branch_index(rip))
}

fn branch_index(rip: u64) -> usize {
    usize::try_from(rip % BRANCHES as u64).unwrap_or(0)
}

fn offset(rip: u64) -> u16 {
    u16::try_from(rip & !PAGE_MASK).unwrap_or(0)
}

//! The translations of one vCPU: where they are, what leads to them, and when they hold.
//!
//! A translation belongs to a block, an RIP and a [`Mode`]. Translations of one page, that is of one linear page at one
//! guest-physical page, hold or do not hold together: whenever a translation of addresses may have changed, all pages are
//! suspended, and each is taken up again when the interpreter has found one of its blocks anew and the page's bytes are
//! those of before.
//!
//! Within a page, jumps go straight to their target. From other pages a translation is entered through its gate, which is
//! shut while its page is suspended. An instruction that crosses from one page into the next holds while both do, so it is
//! entered through its gate from everywhere.
//!
//! Where there is no room for more, the oldest translations go: see [`Regions`].

use std::collections::BTreeSet;

use iced_x86::{Decoder, Encoder, Instruction, InstructionInfoFactory};
use rustc_hash::FxHashMap;

use super::access::Access;
use super::builder::{Builder, Mode, Place, gate_jump};
use super::emit::distance;
use super::pages::{Content, PAGE_BYTES, PageKey, Pages, is_in, offset};
use super::region::Regions;
use super::site::{Jump, Kind, Link, Site};
use super::translation::Translation;
use crate::translate::block::{Block, BlockCache, DECODING};
use crate::translate::memory::frame::{Frame, Gate, TRANSLATIONS};
use crate::translate::memory::{Fetched, Forgotten, MemoryMap, PAGE, PAGE_MASK};

/// A block that the interpreter has just found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found<'a> {
    pub(super) rip: u64,
    pub(super) mode: Mode,
    /// Its number in the interpreter's cache.
    pub(super) id: u32,
    pub(super) block: &'a Block,
    /// The page that it was fetched from.
    pub(super) fetched: Fetched,
    /// That of its last bytes, if they come from another one.
    pub(super) second: Option<Fetched>,
}

impl Found<'_> {
    /// Its pages.
    fn keys(&self) -> impl Iterator<Item = (PageKey, Fetched)> + use<> {
        let (va, mode) = (self.rip & PAGE_MASK, self.mode);
        let second = self.second.map(|fetched| ((va.wrapping_add(PAGE), mode, fetched.gpa), fetched));
        [Some(((va, mode, self.block.gpa & PAGE_MASK), self.fetched)), second].into_iter().flatten()
    }
}

/// See the module.
pub(crate) struct Translator {
    code: Regions,
    pages: Pages,
    /// Those that are dropped are there until their numbers are used again.
    translations: Vec<Translation>,
    free: Vec<u32>,
    /// By page and offset in it.
    by_place: FxHashMap<(u32, u16), u32>,
    /// Each block with each of its translations, of which one whose page is mapped at many addresses has many.
    by_block: BTreeSet<(u32, u32)>,
    encoder: Encoder,
    info: InstructionInfoFactory,
    buffer: Vec<u8>,
    instructions: Vec<Instruction>,
    /// What all modes of this vCPU have in common.
    pub(super) flavour: Mode,
    /// Counts regions that were emptied. Where this has changed, a site's number may be that of another.
    emptied: u64,
}

impl std::fmt::Debug for Translator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Translator").field("code", &self.code).finish_non_exhaustive()
    }
}

impl Translator {
    /// With that many bytes of code memory.
    ///
    /// # Errors
    /// Those of the operating system, where it does not let anybody make code.
    pub(super) fn new(flavour: Mode, bytes: usize) -> std::io::Result<Self> {
        Ok(Self {
            code: Regions::new(bytes)?,
            pages: Pages::new(bytes),
            translations: Vec::new(),
            free: Vec::new(),
            by_place: FxHashMap::default(),
            by_block: BTreeSet::new(),
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
            buffer: Vec::new(),
            instructions: Vec::new(),
            flavour,
            emptied: 0,
        })
    }

    /// Bytes of code memory that are in use.
    pub(super) fn used_bytes(&self) -> u64 {
        self.code.used_bytes()
    }

    /// Pages that there are translations of.
    pub(super) fn page_count(&self) -> u64 {
        self.pages.len() as u64
    }

    /// How often a part of code memory was emptied.
    pub(super) fn emptied(&self) -> u64 {
        self.emptied
    }

    /// Whether code memory was written since this was last asked.
    pub(super) fn take_patched(&mut self) -> bool {
        self.code.take_patched()
    }

    pub(super) fn site(&self, site: u32) -> Option<Site> {
        self.code.site(site)
    }

    pub(super) fn get(&self, translation: u32) -> Option<&Translation> {
        self.translations.get(translation as usize).filter(|found| !found.dropped)
    }

    /// Host address of an offset in code memory.
    pub(super) fn address(&self, offset: u32) -> u64 {
        self.code.address(offset as usize)
    }

    /// Code memory and where translated code goes on after a fault: first address, bytes, address.
    pub(super) fn extent(&self) -> (u64, u64, u64) {
        let (start, bytes) = self.code.extent();
        (start, bytes, self.code.address(self.code.shared().leave_fault))
    }

    /// The access through the window that the instruction at that host address is part of.
    pub(super) fn access(&self, address: u64) -> Option<Access> {
        let offset = self.code.offset(address)?;
        let (start, number) = self.code.translation_at(offset)?;
        let translation = self.get(number).filter(|found| found.start == start)?;
        let after = translation.accesses.partition_point(|access| start + access.at <= offset);
        let access = translation.accesses.get(after.checked_sub(1)?).copied();
        access.filter(|access| offset < start + access.end)
    }

    /// The translation of what runs at `rip`, if it holds.
    pub(super) fn find(&self, rip: u64, mode: Mode) -> Option<u32> {
        let page = self.pages.current(rip & PAGE_MASK, mode)?;
        let number = *self.by_place.get(&(page, offset(rip)))?;
        self.get(number).is_some_and(|found| self.holds(found)).then_some(number)
    }

    /// Whether a translation may be entered.
    fn holds(&self, translation: &Translation) -> bool {
        self.pages.holds(translation.page) && translation.second.is_none_or(|page| self.pages.holds(page))
    }

    /// Whether a translation that is reached runs, whatever changed since it was linked.
    pub(super) fn runs_when_entered(&self, translation: u32) -> bool {
        self.get(translation).is_some_and(Translation::runs_when_entered)
    }

    /// Where a translation is entered with flags in the frame.
    pub(super) fn entry(&self, translation: u32) -> Option<u64> {
        self.get(translation).map(|found| found.open.saved)
    }

    /// Lets no page be entered whose translation of addresses is forgotten, before it is looked at anew.
    pub(super) fn forget(&mut self, forgotten: &Forgotten, frame: &mut Frame) {
        for page in self.pages.forget(forgotten, self.flavour) {
            self.shut(page, frame);
        }
    }

    fn shut(&self, page: u32, frame: &mut Frame) {
        for number in self.pages.get(page).into_iter().flat_map(|page| page.translations()) {
            if let Some(translation) = self.get(number) {
                translation.shut(number, frame);
            }
        }
    }

    /// Takes up the pages of a block as far as there are translations of them; the guest-physical pages that are checked in
    /// vain, since nothing was stored there.
    pub(super) fn take_up(
        &mut self,
        found: &Found<'_>,
        map: &MemoryMap,
        frame: &mut Frame,
        cache: &BlockCache,
    ) -> [Option<u64>; 2] {
        let mut quiet = [None; 2];
        for ((key, fetched), quiet) in found.keys().zip(&mut quiet) {
            let page = self.pages.find(&key);
            if page.is_some_and(|page| self.pages.holds(page)) {
                continue;
            }
            if let Some(page) = self.pages.current(key.0, key.1).and_then(|page| self.pages.suspend(page)) {
                self.shut(page, frame);
            }
            let Some(page) = page else { continue };
            let changed = self.compare(page, key.2, map, frame, cache);
            // It may have gone with the last of its translations.
            if self.pages.find(&key) == Some(page) {
                *quiet = (!changed && self.pages.is_checked(page)).then_some(key.2);
                self.hold(page, fetched, frame);
            }
        }
        quiet
    }

    fn hold(&mut self, page: u32, fetched: Fetched, frame: &mut Frame) {
        self.pages.hold(page, fetched);
        for number in self.pages.get(page).into_iter().flat_map(|page| page.translations()) {
            if let Some(translation) = self.get(number)
                && self.holds(translation)
            {
                translation.open(number, frame);
            }
        }
    }

    /// Drops the translations in `page`, which is at `gpa`, whose code is not what it was, or is elsewhere in this process than
    /// they look for it; whether the page has changed.
    fn compare(
        &mut self,
        page: u32,
        gpa: u64,
        map: &MemoryMap,
        frame: &mut Frame,
        cache: &BlockCache,
    ) -> bool {
        let mut now = [0; PAGE_BYTES];
        let is_there = map.read(gpa, &mut now) && map.host_page(gpa) == self.pages.host(page);
        if !self.pages.has_changed(page, &now) && is_there {
            return false;
        }
        let is_stale = |number: &u32| {
            let block = self.get(*number).and_then(|translation| cache.get(translation.block));
            !is_there || block.is_none_or(|block| !is_in(block, gpa, &now))
        };
        let stale: Vec<u32> =
            self.pages.get(page).into_iter().flat_map(|page| page.translations()).filter(is_stale).collect();
        for number in stale {
            self.drop_translation(number, frame);
        }
        true
    }

    /// Drops the translations of a block that is gone.
    pub(super) fn drop_block(&mut self, block: u32, frame: &mut Frame) {
        let translations: Vec<_> = self.by_block.range((block, 0)..=(block, u32::MAX)).copied().collect();
        for (_, translation) in translations {
            self.drop_translation(translation, frame);
        }
    }

    pub(super) fn drop_translation(&mut self, number: u32, frame: &mut Frame) {
        let Some(translation) = self.translations.get_mut(number as usize).filter(|found| !found.dropped)
        else {
            return;
        };
        translation.drop(number, frame);
        let incoming = std::mem::take(&mut translation.incoming);
        let Translation { page, second, rip, block, .. } = *translation;
        for site in incoming {
            self.unlink(site);
        }
        self.by_place.remove(&(page, offset(rip)));
        for page in [Some(page), second].into_iter().flatten() {
            self.pages.remove_translation(page, number);
        }
        self.by_block.remove(&(block, number));
        self.free.push(number);
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self, frame: &mut Frame) {
        for number in (0..).take(self.translations.len()) {
            if let Some(translation) = self.translations.get_mut(number as usize) {
                translation.drop(number, frame);
            }
        }
        self.code.clear();
        self.pages.clear();
        self.translations.clear();
        self.free.clear();
        self.by_place.clear();
        self.by_block.clear();
        self.emptied += 1;
    }

    /// Drops the oldest translations as far as another one needs their room.
    fn make_room(&mut self, frame: &mut Frame) {
        let has_number = |this: &Self| !this.free.is_empty() || this.translations.len() < TRANSLATIONS;
        while !(self.code.has_room() && has_number(self) && !self.pages.is_full()) {
            self.empty_region(frame);
        }
    }

    fn empty_region(&mut self, frame: &mut Frame) {
        let (region, translations) = self.code.advance();
        if translations.is_empty() {
            return;
        }
        self.emptied += 1;
        for (start, number) in translations {
            if self.get(number).is_some_and(|found| found.start == start) {
                self.drop_translation(number, frame);
            }
        }
        for translation in &mut self.translations {
            translation.incoming.retain(|site| !Regions::is_of(*site, region));
        }
    }

    /// Translates a block whose pages were taken up, as far as there were any.
    pub(super) fn translate(&mut self, found: &Found<'_>, map: &MemoryMap, frame: &mut Frame) -> Option<u32> {
        let Found { rip, mode, id, block, second, .. } = *found;
        self.instructions.clear();
        let mut decoder = Decoder::with_ip(64, &block.bytes, rip, DECODING);
        while decoder.can_decode() && self.instructions.len() < block.ops.len() {
            self.instructions.push(decoder.decode());
        }
        if self.instructions.len() != block.ops.len() {
            return None;
        }
        self.make_room(frame);
        let number = match self.free.last() {
            Some(number) => *number,
            None => u32::try_from(self.translations.len()).ok()?,
        };
        let mut checked = Vec::new();
        if block.checked {
            for (gpa, code) in block.parts() {
                checked.push((map.host_page(gpa)? | gpa & !PAGE_MASK, code));
            }
        }
        let (origin, first_site) = self.code.next_place()?;
        let place = Place { origin, translation: number, first_site, rip, whole: second.is_none() };
        let buffer = std::mem::take(&mut self.buffer);
        let shared = self.code.shared();
        let builder = Builder::new(&mut self.encoder, &mut self.info, shared, mode, place, buffer);
        let mut built = match builder.build(&self.instructions, &checked) {
            Some(built) => built,
            None => Builder::new(&mut self.encoder, &mut self.info, shared, mode, place, Vec::new())
                .carefully()
                .build(&self.instructions, &checked)?,
        };
        let mut near = (built.live, built.saved);
        if second.is_some() {
            // Whoever holds with the first page alone goes through the gate.
            near.0 = origin + built.bytes.len();
            built.bytes.extend(gate_jump(number, true));
            near.1 = origin + built.bytes.len();
            built.bytes.extend(gate_jump(number, false));
        }
        let contents = self.read_pages(found, map)?;
        let is_added = self.code.add(number, &built.bytes, &built.sites);
        self.buffer = built.bytes;
        if !is_added {
            // A very large one, which fits into an empty region.
            self.empty_region(frame);
            return None;
        }
        let pages = self.hold_pages(found, contents, frame)?;
        let gate = |(live, saved)| Gate { live: self.code.address(live), saved: self.code.address(saved) };
        let translation = Translation {
            rip,
            mode,
            block: id,
            page: pages.0,
            second: pages.1,
            checked: block.checked,
            start: origin,
            accesses: built.accesses.into(),
            open: gate((built.live, built.saved)),
            near: gate(near),
            shut: gate((built.shut_live, built.shut_saved)),
            incoming: Vec::new(),
            dropped: false,
        };
        translation.open(number, frame);
        for page in [Some(pages.0), pages.1].into_iter().flatten() {
            self.pages.add_translation(page, number, block, page == pages.0);
        }
        self.by_place.insert((pages.0, offset(rip)), number);
        self.by_block.insert((id, number));
        self.free.pop();
        match self.translations.get_mut(number as usize) {
            Some(place) => *place = translation,
            None => self.translations.push(translation),
        }
        Some(number)
    }

    /// What those pages of a block hold that are not known yet.
    fn read_pages(&self, found: &Found<'_>, map: &MemoryMap) -> Option<[Option<Content>; 2]> {
        let mut pages = [None, None];
        for ((key, _), page) in found.keys().zip(&mut pages) {
            if self.pages.find(&key).is_none() {
                let mut bytes = Box::new([0; PAGE_BYTES]);
                let host = map.host_page(key.2)?;
                if !map.read(key.2, &mut *bytes) {
                    return None;
                }
                *page = Some(Content { bytes, host });
            }
        }
        Some(pages)
    }

    /// The pages of a block, which hold from now on.
    fn hold_pages(
        &mut self,
        found: &Found<'_>,
        contents: [Option<Content>; 2],
        frame: &mut Frame,
    ) -> Option<(u32, Option<u32>)> {
        let mut pages = [None; 2];
        for (((key, fetched), content), page) in found.keys().zip(contents).zip(&mut pages) {
            *page = match content {
                Some(content) => {
                    let new = self.pages.add(key, content)?;
                    self.hold(new, fetched, frame);
                    Some(new)
                }
                None => self.pages.find(&key),
            };
        }
        let [first, second] = pages;
        Some((first?, second))
    }

    /// Lets the jump at `site` lead to `target`, if that is code of the same mode: what is ready for one is not for another.
    pub(super) fn link(&mut self, site: u32, jump: &Jump, target: u32) {
        let from = self.site(site).and_then(|site| self.get(site.translation)).map(|from| from.mode);
        let found = self.translations.get_mut(target as usize);
        let Some(found) = found.filter(|found| !found.dropped && from == Some(found.mode)) else { return };
        let entry = if jump.live { found.near.live } else { found.near.saved };
        match jump.link {
            Link::Near { length } => {
                let at = jump.at as usize + usize::from(length) - 4;
                let Some(entry) = self.code.offset(entry) else { return };
                self.code.write(at, &distance(at, entry).to_le_bytes());
            }
            Link::Gate => self.code.write(jump.at as usize, &gate_jump(target, jump.live)),
        }
        found.incoming.push(site);
    }

    fn unlink(&mut self, site: u32) {
        let Some(Site { kind: Kind::Jump(jump), .. }) = self.site(site) else { return };
        let (at, stub) = (jump.at as usize, jump.stub as usize);
        match jump.link {
            Link::Near { length } => {
                let at = at + usize::from(length) - 4;
                self.code.write(at, &distance(at, stub).to_le_bytes());
            }
            Link::Gate => {
                let [a, b, c, d] = distance(at + 1, stub).to_le_bytes();
                self.code.write(at, &[0xe9, a, b, c, d, 0xcc, 0xcc, 0xcc]);
            }
        }
    }

    /// Lets indirect branches find a translation.
    pub(super) fn remember_branch(&self, translation: u32, frame: &mut Frame) {
        if let Some(found) = self.get(translation) {
            found.remember(frame);
        }
    }
}

#[cfg(test)]
#[path = "verify.rs"]
mod verify;

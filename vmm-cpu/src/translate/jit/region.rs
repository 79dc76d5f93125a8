//! Code memory as a queue of regions: translations go to the newest, and where that is full the oldest is emptied and
//! becomes the newest.
//!
//! The sites of translations are numbered by region, so that they go with it.

use super::builder::{Shared, shared_code};
use super::memory::CodeMemory;
use super::site::Site;

/// Regions: what is emptied at a time is one part in so many.
const REGIONS: usize = 8;

/// What one translation may need: 64 instructions.
const MAX_TRANSLATION: usize = 64 * 256;

/// Bytes of the smallest code memory.
pub(crate) const MIN_CODE: usize = 2 * REGIONS * MAX_TRANSLATION;
/// Bytes of the largest: it is addressed by distances of 32 bits.
pub(crate) const MAX_CODE: usize = 1 << 30;

/// Bytes of code for each site, at least. On average there are half as many again.
const SITE_BYTES: usize = 24;

/// Numbers of the sites of a region, with those of one translation too many.
const SITES: usize = MAX_CODE / REGIONS / SITE_BYTES + MAX_TRANSLATION;
const _: () = assert!(SITES * REGIONS < u32::MAX as usize, "the last is no site");

#[derive(Debug)]
struct Region {
    start: usize,
    end: usize,
    /// Offset behind what is in use.
    used: usize,
    sites: Vec<Site>,
    /// Offsets of translations and their numbers.
    starts: Vec<(usize, u32)>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Regions {
    memory: CodeMemory,
    shared: Shared,
    regions: Vec<Region>,
    newest: usize,
    /// Code memory was written since somebody asked.
    patched: bool,
}

impl Regions {
    /// # Errors
    /// Those of [`CodeMemory::new`].
    pub(super) fn new(bytes: usize) -> std::io::Result<Self> {
        let mut memory = CodeMemory::new(bytes)?;
        let (code, shared) = shared_code();
        memory.write(0, &code);
        let first = code.len().next_multiple_of(16);
        let each = (bytes / REGIONS) & !15;
        let region = |n: usize| {
            let start = if n == 0 { first } else { n * each };
            Region { start, end: (n + 1) * each, used: start, sites: Vec::new(), starts: Vec::new() }
        };
        let regions = (0..REGIONS).map(region).collect();
        Ok(Self { memory, shared, regions, newest: 0, patched: true })
    }

    pub(super) fn shared(&self) -> Shared {
        self.shared
    }

    /// Bytes that are in use.
    pub(super) fn used_bytes(&self) -> u64 {
        self.regions.iter().map(|region| (region.used - region.start) as u64).sum()
    }

    /// Whether code memory was written since this was last asked.
    pub(super) fn take_patched(&mut self) -> bool {
        std::mem::take(&mut self.patched)
    }

    /// Host address of an offset.
    pub(super) fn address(&self, offset: usize) -> u64 {
        self.memory.address(offset)
    }

    /// Offset of a host address.
    pub(super) fn offset(&self, address: u64) -> Option<usize> {
        let offset = usize::try_from(address.checked_sub(self.memory.address(0))?).ok()?;
        (offset < self.memory.len()).then_some(offset)
    }

    /// First address and bytes.
    pub(super) fn extent(&self) -> (u64, u64) {
        (self.memory.address(0), self.memory.len() as u64)
    }

    /// Replaces code.
    pub(super) fn write(&mut self, offset: usize, bytes: &[u8]) {
        self.memory.write(offset, bytes);
        self.patched = true;
    }

    fn place_of(site: u32) -> (usize, usize) {
        (site as usize / SITES, site as usize % SITES)
    }

    pub(super) fn site(&self, site: u32) -> Option<Site> {
        let (region, at) = Self::place_of(site);
        self.regions.get(region)?.sites.get(at).copied()
    }

    /// Whether a site has a number of that region.
    pub(super) fn is_of(site: u32, region: usize) -> bool {
        Self::place_of(site).0 == region
    }

    /// Whether another translation fits in the newest region.
    pub(super) fn has_room(&self) -> bool {
        self.regions.get(self.newest).is_some_and(|region| {
            let sites = (region.end - region.start) / SITE_BYTES;
            region.end - region.used >= MAX_TRANSLATION && region.sites.len() < sites
        })
    }

    /// Where the next translation begins, and the number of its first site.
    pub(super) fn next_place(&self) -> Option<(usize, u32)> {
        let region = self.regions.get(self.newest)?;
        Some((region.used, u32::try_from(self.newest * SITES + region.sites.len()).ok()?))
    }

    /// Puts a translation there; whether it fits.
    pub(super) fn add(&mut self, number: u32, code: &[u8], sites: &[Site]) -> bool {
        let Some(region) = self.regions.get_mut(self.newest) else { return false };
        if region.end - region.used < code.len() || region.sites.len() + sites.len() > SITES {
            return false;
        }
        let start = region.used;
        region.starts.push((start, number));
        region.sites.extend_from_slice(sites);
        region.used = (start + code.len()).next_multiple_of(16).min(region.end);
        self.write(start, code);
        true
    }

    /// Empties the oldest region, which is the newest from now on; which that is, and the translations that were put there:
    /// offsets and numbers, which may have become those of others.
    pub(super) fn advance(&mut self) -> (usize, Vec<(usize, u32)>) {
        self.newest = (self.newest + 1) % REGIONS;
        (self.newest, self.empty(self.newest))
    }

    fn empty(&mut self, region: usize) -> Vec<(usize, u32)> {
        let Some(region) = self.regions.get_mut(region) else { return Vec::new() };
        region.sites.clear();
        region.used = region.start;
        std::mem::take(&mut region.starts)
    }

    /// Empties all.
    pub(super) fn clear(&mut self) {
        for region in 0..REGIONS {
            self.empty(region);
        }
        self.newest = 0;
    }

    /// What was put at the last offset that is not behind this one: its offset and number.
    pub(super) fn translation_at(&self, offset: usize) -> Option<(usize, u32)> {
        let region = self.regions.iter().find(|region| (region.start..region.used).contains(&offset))?;
        let after = region.starts.partition_point(|(start, _)| *start <= offset);
        region.starts.get(after.checked_sub(1)?).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::super::site::Kind;
    use super::*;

    const SITE: Site = Site { translation: 0, kind: Kind::Gate };

    #[test]
    fn the_oldest_goes_first_and_its_sites_with_it() {
        let mut regions = Regions::new(MIN_CODE).unwrap();
        let mut places = Vec::new();
        for number in 0..8 {
            places.push(regions.next_place().unwrap());
            assert!(regions.add(number, &[0xcc; 40], &[SITE; 3]));
            let start = places.last().unwrap().0;
            assert_eq!(regions.translation_at(start + 39), Some((start, number)));
            if number < 7 {
                assert_eq!(regions.advance().1, []);
            }
        }
        let (second, site) = places[1];
        assert!(regions.site(site + 2).is_some() && regions.site(site + 3).is_none());
        assert_eq!(regions.advance(), (0, vec![(places[0].0, 0)]));
        assert_eq!(regions.next_place(), Some(places[0]));
        assert_eq!(regions.advance(), (1, vec![(second, 1)]));
        assert!(regions.site(site).is_none() && regions.translation_at(second).is_none());
        assert!(regions.translation_at(places[2].0).is_some());
    }

    #[test]
    fn neither_bytes_nor_sites_are_unlimited() {
        let mut regions = Regions::new(MIN_CODE).unwrap();
        let mut count = 0;
        while regions.has_room() {
            assert!(regions.add(count, &[0xcc; 256], &[]));
            count += 1;
        }
        assert!(count > 50 && regions.used_bytes() <= (MIN_CODE / REGIONS) as u64);
        regions.advance();
        let mut count = 0;
        while regions.has_room() {
            assert!(regions.add(count, &[0xcc; 16], &[SITE; 8]));
            count += 1;
        }
        assert!(count < 200, "{count}");
        assert!(!regions.add(0, &vec![0; MIN_CODE], &[]));
    }
}

//! What must be true of the translations whenever no translated code runs, for tests.

use super::*;

impl Translator {
    /// Panics if something leads where it must not, or is kept that nothing refers to.
    pub(in super::super) fn verify(&self, frame: &Frame) {
        let mut live = 0;
        for (number, found) in (0..).zip(&self.translations) {
            let gate = frame.gates[number as usize];
            if found.dropped {
                assert!(self.free.contains(&number) && gate.live == 0 && gate.saved == 0);
                continue;
            }
            live += 1;
            let expected = if self.holds(found) { found.open } else { found.shut };
            assert_eq!((gate.live, gate.saved), (expected.live, expected.saved), "{:#x}", found.rip);
            assert_eq!(self.by_place[&(found.page, offset(found.rip))], number);
            assert!(self.by_block.contains(&(found.block, number)));
            for page in [Some(found.page), found.second].into_iter().flatten() {
                assert!(self.pages.get(page).unwrap().translations().any(|other| other == number));
            }
            for address in [found.open.live, found.open.saved, found.near.live, found.near.saved] {
                let offset = self.code.offset(address).unwrap();
                assert_eq!(self.code.translation_at(offset), Some((found.start, number)));
            }
            for site in &found.incoming {
                let Some(Site { kind: Kind::Jump(jump), .. }) = self.site(*site) else {
                    panic!("site {site} of {:#x} jumps nowhere", found.rip);
                };
                assert_eq!(jump.target, found.rip);
                assert!(!jump.shadow || found.runs_when_entered(), "{:#x}", found.rip);
            }
        }
        for table in &frame.branches {
            for branch in table.iter().filter(|branch| branch.code != 0) {
                let offset = self.code.offset(branch.code).unwrap();
                let (_, number) = self.code.translation_at(offset).unwrap();
                let found = self.get(number).unwrap();
                assert!(self.holds(found) && (found.rip, found.open.saved) == (branch.rip, branch.code));
            }
        }
        assert_eq!(live + self.free.len(), self.translations.len());
        assert_eq!((live, live), (self.by_place.len(), self.by_block.len()));
        self.pages.verify();
    }
}

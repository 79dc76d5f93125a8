//! Page tables and page faults.

use super::Known;
use super::settle::*;
use crate::arena::{Mode, entry};
use crate::layout::*;
use crate::outcome::word;
use crate::topics::Scenario;

pub(super) const KNOWN: &[Known] = &[
    Known {
        name: "P of reserved bits",
        reason: "A page fault for reserved bits is one of a present entry, so P is set too (Intel SDM 3A 5.7, AMD64 APM 2 \
                 8.4.2); QEMU 7.2 sets RSV alone",
        settle: present_with_reserved,
    },
    Known {
        name: "accessed bit of a large page that faults",
        reason: "An entry is accessed when it is used to translate; QEMU 7.2 sets the bit of a 2-MiB, 4-MiB or 1-GiB entry \
                 before it looks at rights and reserved bits of its address",
        settle: accessed_large,
    },
    Known {
        name: "accessed bit of PAE page-directory pointers",
        reason: "Bit 5 is reserved in these entries (Intel SDM 3A table 5-8, AMD64 APM 2 figure 5-9); QEMU 7.2 sets it",
        settle: accessed_pointers,
    },
    Known {
        name: "SS of another level is not read",
        reason: "The descriptor is read, then compared with the RPL (Intel SDM 2A, IRET); QEMU 7.2 looks at the RPL alone, so \
                 the page of the table is not accessed",
        settle: accessed_tables,
    },
    Known {
        name: "error code of a read-modify-write",
        reason: "An access that will write is a write from the start (Intel SDM 3A 5.7: W is about the access that caused \
                 the exception); QEMU 7.2 reads first, which also leaves accessed bits of pages that cannot be written and \
                 no dirty bit of the first of two pages",
        settle: modify,
    },
];

fn present_with_reserved(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    for event in shared_events(scenario, ours, theirs) {
        let at = event.at + event::FRAME;
        if event.vector == 14 && word(ours, at) & 9 == 9 && word(theirs, at) & 9 == 8 {
            event.copy(ours, theirs, 0, 1);
        }
    }
}

fn accessed_large(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let bytes = scenario.arena.mode.entry_bytes();
    for table in [page::ROOT, page::WINDOW_POINTERS, page::WINDOW_DIRECTORY] {
        if table == page::ROOT && scenario.arena.mode != Mode::Paged {
            continue;
        }
        for n in 0..8 / bytes * (PAGE / 8) {
            let (at, shift) = (table + n * bytes / 8 * 8, n * bytes % 8 * 8);
            let (our_entry, their_entry) = (word(ours, at) >> shift, word(theirs, at) >> shift);
            let is_large = our_entry & (entry::PS | entry::P) == entry::PS | entry::P;
            if is_large && our_entry & entry::A == 0 && their_entry & entry::A != 0 {
                copy(ours, theirs, at, entry::A << shift);
            }
        }
    }
}

fn accessed_pointers(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    if scenario.arena.mode == Mode::Pae {
        for n in 0..4 {
            copy(ours, theirs, page::ROOT + 8 * n, entry::A);
        }
    }
}

/// Entries of the pages of GDT and LDT that are accessed on our side alone.
fn accessed_tables(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    let arena = &scenario.arena;
    if !arena.mode.is_paged() || !matches!(scenario.topic, "returns" | "transfers" | "exceptions") {
        return;
    }
    for table in [page::GDT, page::LDT] {
        let bytes = arena.mode.entry_bytes();
        let entry = page::TABLE + arena.at(table) / PAGE % (PAGE / bytes) * bytes;
        let bit = entry::A << (entry % 8 * 8);
        if word(ours, entry & !7) & bit != 0 {
            copy(ours, theirs, entry & !7, bit);
        }
    }
}

fn modify(scenario: &Scenario, ours: &[u8], theirs: &mut [u8]) {
    const LOCK: u64 = 0xf0;
    for event in shared_events(scenario, ours, theirs) {
        let code = interrupted(scenario, ours, &event).map_or(0, |offset| word(ours, offset) & 0xff);
        if event.vector != 14 || code != LOCK {
            continue;
        }
        let at = event.at + event::FRAME;
        let cr2 = event.at + event::CR2;
        if word(theirs, cr2) == (word(ours, cr2) | (PAGE - 1)).wrapping_add(1) {
            // The read got as far as the second page.
            copy(ours, theirs, cr2, u64::MAX);
            event.copy(ours, theirs, 0, 0x1f);
        }
        if word(ours, at) & 2 != 0 && word(theirs, at) & 2 == 0 {
            event.copy(ours, theirs, 0, 2);
        }
        let narrow = scenario.arena.mode.entry_bytes() == 4;
        let bits = entry::A | entry::D;
        let mask = if narrow { bits | bits << 32 } else { bits };
        for n in 0..PAGE / 8 {
            copy(ours, theirs, page::WINDOW_TABLE + 8 * n, mask);
        }
    }
}

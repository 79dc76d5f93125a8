//! What lies in the areas: the image that every case starts from, and what a case has made of it.
//!
//! Nothing here allocates: a confined child uses it too.

use std::sync::LazyLock;

use crate::case::{AREAS, Area, CODE};

/// Bytes of all areas together, in the order of [`AREAS`].
pub(crate) const IMAGE: usize = {
    let mut sum = 0;
    let mut rest: &[Area] = &AREAS;
    while let [area, others @ ..] = rest {
        sum += area.size as usize;
        rest = others;
    }
    sum
};

/// What code is surrounded by: INT3, so that a case ends wherever in [`CODE`] it goes.
pub(crate) const FILLER: u8 = 0xcc;

/// Bytes before the data of a run in a list of runs: its address and its length.
const RUN_HEADER: usize = 16;

/// The most bytes that [`changes`] lists: every second word is a run of its own.
pub(crate) const MOST_CHANGES: usize = IMAGE / 16 * (RUN_HEADER + 8);

/// Areas with their first byte in the image.
fn placed() -> impl Iterator<Item = (usize, Area)> {
    AREAS.iter().scan(0, |next, area| {
        let at = *next;
        *next += area.size as usize;
        Some((at, *area))
    })
}

/// Where in the image `len` bytes from `address` lie, if one area has them all.
pub(crate) fn offset(address: u64, len: usize) -> Option<usize> {
    placed().find_map(|(at, area)| {
        let inside = address.checked_sub(area.start)?;
        let end = inside.checked_add(len as u64)?;
        (end <= area.size).then_some(at + inside as usize)
    })
}

/// Where in the image an area begins.
pub(crate) fn area_offset(area: &Area) -> usize {
    offset(area.start, 0).unwrap_or(0)
}

/// The image that all cases share: filler around code, and data in which small and random numbers, addresses and
/// floating-point numbers take turns.
pub(crate) fn pristine() -> &'static [u8; IMAGE] {
    static PRISTINE: LazyLock<Box<[u8; IMAGE]>> = LazyLock::new(|| {
        let mut image = Box::new([FILLER; IMAGE]);
        for (at, area) in placed().filter(|(_, area)| *area != CODE) {
            let bytes = image.get_mut(at..at + area.size as usize).unwrap_or_default();
            for (address, word) in (area.start..).step_by(8).zip(bytes.chunks_exact_mut(8)) {
                word.copy_from_slice(&datum(address, area).to_le_bytes());
            }
        }
        image
    });
    &PRISTINE
}

/// The word at an address, by splitmix64.
fn datum(address: u64, area: Area) -> u64 {
    let mut word = address.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^= word >> 31;
    match address >> 3 & 3 {
        0 => word,
        1 => area.start + ((word % area.size) & !7),
        2 => word >> (word & 63),
        _ => 0x3ff0_0000_0000_0000 ^ (word >> 8 & 0x807f_ffff_ffff_ffff),
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
}

/// The runs in a list of them.
pub(crate) fn runs(list: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let mut rest = list;
    std::iter::from_fn(move || {
        let (address, len) = (word(rest, 0)?, usize::try_from(word(rest, 8)?).ok()?);
        let data = rest.get(RUN_HEADER..RUN_HEADER.checked_add(len)?)?;
        rest = rest.get(RUN_HEADER + len.next_multiple_of(8)..).unwrap_or_default();
        Some((address, data))
    })
}

/// Puts a run at the end of a list that is `used` bytes long, and returns how long it is then; `None` if it is too long.
pub(crate) fn push(list: &mut [u8], used: usize, address: u64, data: &[u8]) -> Option<usize> {
    let end = used + RUN_HEADER + data.len().next_multiple_of(8);
    let place = list.get_mut(used..end)?;
    let (header, body) = place.split_at_mut(RUN_HEADER);
    let (first, second) = header.split_at_mut(8);
    first.copy_from_slice(&address.to_le_bytes());
    second.copy_from_slice(&(data.len() as u64).to_le_bytes());
    let (filled, padding) = body.split_at_mut(data.len());
    filled.copy_from_slice(data);
    padding.fill(0);
    Some(end)
}

/// Puts the runs of a list into an image; those outside of it are left out.
pub(crate) fn put(image: &mut [u8; IMAGE], list: &[u8]) {
    for (address, data) in runs(list) {
        if let Some(at) = offset(address, data.len())
            && let Some(place) = image.get_mut(at..at + data.len())
        {
            place.copy_from_slice(data);
        }
    }
}

/// Takes the runs of a list out of an image again.
pub(crate) fn take(image: &mut [u8; IMAGE], list: &[u8]) {
    let pristine = pristine();
    for (address, data) in runs(list) {
        if let Some(at) = offset(address, data.len())
            && let (Some(place), Some(old)) =
                (image.get_mut(at..at + data.len()), pristine.get(at..at + data.len()))
        {
            place.copy_from_slice(old);
        }
    }
}

/// Lists the words of writable areas that are not as expected, and returns the length of the list.
pub(crate) fn changes(now: &[u8; IMAGE], expected: &[u8; IMAGE], list: &mut [u8]) -> usize {
    const PIECE: usize = 512;
    let mut used = 0;
    for (at, area) in placed().filter(|(_, area)| area.writable) {
        let range = at..at + area.size as usize;
        let (Some(now), Some(expected)) = (now.get(range.clone()), expected.get(range)) else { continue };
        if now == expected {
            continue;
        }
        let pieces = now.chunks(PIECE).zip(expected.chunks(PIECE));
        for ((now, expected), address) in pieces.zip((area.start..).step_by(PIECE)) {
            if now != expected {
                used = changes_of_piece(now, expected, address, list, used);
            }
        }
    }
    used
}

fn changes_of_piece(now: &[u8], expected: &[u8], address: u64, list: &mut [u8], used: usize) -> usize {
    let differs = |word: usize| now.get(8 * word..8 * word + 8) != expected.get(8 * word..8 * word + 8);
    let (mut used, mut word, words) = (used, 0, now.len() / 8);
    while word < words {
        if !differs(word) {
            word += 1;
            continue;
        }
        let first = word;
        while word < words && differs(word) {
            word += 1;
        }
        let run = now.get(8 * first..8 * word).unwrap_or_default();
        // The list has room for as many as there can be.
        used = push(list, used, address + 8 * first as u64, run).unwrap_or(used);
    }
    used
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::{DATA, HIGH, READ_ONLY, STACK};

    #[test]
    fn changes_are_found_and_taken_back() {
        let mut now = Box::new(*pristine());
        let mut list = vec![0; MOST_CHANGES];
        assert_eq!(changes(&now, pristine(), &mut list), 0);
        for (address, bytes) in [(DATA.start + 3, 2), (DATA.start + 0x1ff8, 8), (HIGH.start + 0xff8, 8)] {
            let at = offset(address, bytes).unwrap();
            now[at..at + bytes].iter_mut().for_each(|byte| *byte = !*byte);
        }
        now[offset(READ_ONLY.start, 1).unwrap()] ^= 1;
        let used = changes(&now, pristine(), &mut list);
        let found: Vec<(u64, usize)> = runs(&list[..used]).map(|(at, data)| (at, data.len())).collect();
        assert_eq!(found, [(DATA.start, 8), (DATA.start + 0x1ff8, 8), (HIGH.start + 0xff8, 8)]);
        take(&mut now, &list[..used]);
        assert_eq!(changes(&now, pristine(), &mut list), 0);
    }

    #[test]
    fn list_has_room_for_every_second_word() {
        let mut now = Box::new(*pristine());
        now.iter_mut().step_by(16).for_each(|byte| *byte = !*byte);
        let mut list = vec![0; MOST_CHANGES];
        let used = changes(&now, pristine(), &mut list);
        let words: u64 = AREAS.iter().filter(|area| area.writable).map(|area| area.size / 16).sum();
        assert_eq!(runs(&list[..used]).count() as u64, words);
    }

    #[test]
    fn areas_do_not_touch() {
        assert_eq!(offset(STACK.start + STACK.size, 1), None);
        assert_eq!(offset(DATA.start - 1, 2), None);
        assert_eq!(offset(u64::MAX, 2), None);
    }
}

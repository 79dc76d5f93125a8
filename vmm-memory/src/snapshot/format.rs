//! The bytes of a snapshot's envelope: header and table.
//!
//! ```text
//! header             4096 bytes
//! RAM                pages, or compressed chunks
//! states             one behind the other
//! chunks             a record of 64 bytes for each 256 KiB of RAM
//! table              versions, and where the states are
//! ```
//!
//! All numbers are little-endian. Each byte of the file belongs to exactly one part, and is covered by a BLAKE3 digest: RAM by those in its
//! records, records, states and the table by theirs, and all of these by the header's, which so is one of everything.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What a file begins with.
pub(super) const MAGIC: &str = "VMMSNAP\n";
/// Version of the envelope.
pub(super) const VERSION: u32 = 1;
/// EM_X86_64, EM_AARCH64, EM_RISCV (ELF gABI).
pub(super) const ARCHITECTURE: u32 = if cfg!(target_arch = "x86_64") {
    62
} else if cfg!(target_arch = "aarch64") {
    183
} else if cfg!(target_arch = "riscv64") {
    243
} else {
    0
};

/// Bytes of the header, and where RAM begins.
pub(super) const HEADER_SIZE: u64 = HEADER_BYTES as u64;
const HEADER_BYTES: usize = 4096;
/// Most states, and bytes of one.
pub(super) const MAX_STATES: usize = 4096;
pub(super) const MAX_STATE: usize = 64 << 20;
/// Most bytes of the table: all states, each with the longest name.
pub(super) const MAX_TABLE: usize = 1 << 20;
/// Most bytes of a name.
const MAX_NAME: usize = 64;
/// Most families of states.
const MAX_FORMATS: usize = 256;

pub(super) type Digest = [u8; 32];

/// The header; zero behind it, up to [`HEADER_SIZE`].
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) magic: [u8; 8],
    pub(super) version: U32,
    pub(super) architecture: U32,
    /// Where the states begin, where RAM ends.
    pub(super) states_at: U64,
    pub(super) chunks_at: U64,
    pub(super) table_at: U64,
    /// Where the file ends.
    pub(super) end: U64,
    pub(super) chunks_digest: Digest,
    pub(super) table_digest: Digest,
    /// The digest of the snapshot that this one is based on, zero for none.
    pub(super) base: Digest,
    /// Of the header, with this being zero.
    pub(super) digest: Digest,
}

impl Header {
    /// The page, with its digest in it.
    pub(super) fn seal(&mut self) -> Vec<u8> {
        self.digest = [0; 32];
        let mut page = self.as_bytes().to_vec();
        page.resize(HEADER_BYTES, 0);
        self.digest = blake3::hash(&page).into();
        let len = self.as_bytes().len();
        page.get_mut(..len).unwrap_or_default().copy_from_slice(self.as_bytes());
        page
    }

    /// The header at the beginning of a page, and whether the page is as it was sealed.
    pub(super) fn read(page: &[u8]) -> Option<(Self, bool)> {
        let (header, rest) = Self::read_from_prefix(page).ok()?;
        let unsealed = Self { digest: [0; 32], ..header.clone() };
        let digest = blake3::Hasher::new().update(unsealed.as_bytes()).update(rest).finalize();
        let is_sealed = digest == header.digest;
        Some((header, is_sealed))
    }
}

/// Where a state is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: String,
    /// Index of its family.
    pub(super) format: usize,
    pub(super) offset: u64,
    pub(super) len: usize,
    pub(super) digest: Digest,
}

/// The table: families with their versions, and states.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) formats: Vec<(String, u16)>,
    pub(super) entries: Vec<Entry>,
}

/// Whether states and families may be called that.
pub(super) fn check_name(name: &str) -> Result<(), &'static str> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_/.".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME {
        return Err("names have 1 to 64 characters");
    }
    if !name.bytes().all(known) {
        return Err("names are made of ASCII letters, digits, \"-\", \"_\", \"/\" and \".\"");
    }
    Ok(())
}

impl Table {
    pub(super) fn write(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let name = |out: &mut Vec<u8>, name: &str| {
            // Names have been checked.
            out.push(u8::try_from(name.len()).unwrap_or(0));
            out.extend_from_slice(name.as_bytes());
        };
        out.extend_from_slice(&count(self.formats.len()));
        for (format, version) in &self.formats {
            name(&mut out, format);
            out.extend_from_slice(&version.to_le_bytes());
        }
        out.extend_from_slice(&count(self.entries.len()));
        for entry in &self.entries {
            name(&mut out, &entry.name);
            out.extend_from_slice(&count(entry.format));
            out.extend_from_slice(&u32::try_from(entry.len).unwrap_or(u32::MAX).to_le_bytes());
            out.extend_from_slice(&entry.digest);
        }
        out
    }

    /// Reads a table of states that lie between `states_at` and `states_end`, without gaps.
    pub(super) fn read(bytes: &[u8], states_at: u64, states_end: u64) -> Result<Self, String> {
        let mut cursor = Cursor(bytes);
        let mut table = Self::default();
        let formats = cursor.count(MAX_FORMATS, "families of states")?;
        for _ in 0..formats {
            let name = cursor.name()?;
            if table.formats.iter().any(|(other, _)| *other == name) {
                return Err(format!("it has the family \"{name}\" twice"));
            }
            let version = u16::from_le_bytes(cursor.take()?);
            table.formats.push((name, version));
        }
        let entries = cursor.count(MAX_STATES, "states")?;
        let mut offset = states_at;
        for _ in 0..entries {
            let name = cursor.name()?;
            if table.entries.iter().any(|other| other.name == name) {
                return Err(format!("it has the state \"{name}\" twice"));
            }
            let format = usize::from(u16::from_le_bytes(cursor.take()?));
            if format >= formats {
                return Err(format!(
                    "the state \"{name}\" is of family {format}, of which there are {formats}"
                ));
            }
            let len = u32::from_le_bytes(cursor.take()?);
            if len as usize > MAX_STATE {
                return Err(format!("the state \"{name}\" has {len} bytes; at most {MAX_STATE} are allowed"));
            }
            let digest = cursor.take()?;
            table.entries.push(Entry { name, format, offset, len: len as usize, digest });
            offset = offset.saturating_add(len.into());
        }
        if !cursor.0.is_empty() {
            return Err(format!("{} bytes follow its end", cursor.0.len()));
        }
        if offset != states_end {
            return Err(format!(
                "its states end at {offset:#x}, and what follows them begins at {states_end:#x}"
            ));
        }
        Ok(table)
    }
}

fn count(number: usize) -> [u8; 2] {
    u16::try_from(number).unwrap_or(u16::MAX).to_le_bytes()
}

/// What is left to be read.
struct Cursor<'a>(&'a [u8]);

impl Cursor<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or("it ends in the middle of a record")?;
        self.0 = rest;
        Ok(*bytes)
    }

    fn count(&mut self, most: usize, of: &str) -> Result<usize, String> {
        let number = usize::from(u16::from_le_bytes(self.take()?));
        if number > most {
            Err(format!("it has {number} {of}; at most {most} are allowed"))
        } else {
            Ok(number)
        }
    }

    fn name(&mut self) -> Result<String, String> {
        let [len] = self.take()?;
        let (name, rest) = self.0.split_at_checked(len.into()).ok_or("it ends in the middle of a name")?;
        self.0 = rest;
        let name = std::str::from_utf8(name).map_err(|_| "it has a name that is no text")?;
        check_name(name).map_err(|problem| format!("it has the name {name:?}: {problem}"))?;
        Ok(name.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let entry = |name: &str, format, offset, len| Entry {
            name: name.to_owned(),
            format,
            offset,
            len,
            digest: [u8::try_from(len).unwrap(); 32],
        };
        Table {
            formats: vec![("vmm-cpu".to_owned(), 3), ("vmm-devices".to_owned(), 1)],
            entries: vec![entry("cpu/0", 0, 100, 7), entry("uart", 1, 107, 0), entry("pic", 1, 107, 9)],
        }
    }

    #[test]
    fn a_table_is_read_as_it_was_written() {
        assert_eq!(Table::read(&table().write(), 100, 116), Ok(table()));
        let empty = Table::default();
        assert_eq!(Table::read(&empty.write(), 5, 5), Ok(empty));
    }

    #[test]
    fn tables_that_no_writer_writes_are_refused() {
        let bytes = table().write();
        for len in 0..bytes.len() {
            assert!(Table::read(&bytes[..len], 100, 116).is_err(), "{len} bytes of {}", bytes.len());
        }
        let changed = |change: fn(&mut Table)| {
            let mut table = table();
            change(&mut table);
            Table::read(&table.write(), 100, 116).unwrap_err()
        };
        for (problem, expected) in [
            (changed(|table| table.formats[1].0 = "vmm-cpu".to_owned()), "the family \"vmm-cpu\" twice"),
            (changed(|table| table.entries[1].name = "pic".to_owned()), "the state \"pic\" twice"),
            (changed(|table| table.entries[2].format = 2), "of family 2, of which there are 2"),
            (changed(|table| table.entries[0].len += 1), "end at 0x75, and what follows them begins at 0x74"),
            (changed(|table| table.entries[0].len = MAX_STATE + 1), "at most 67108864 are allowed"),
            (changed(|table| table.entries[0].name = "cpu 0".to_owned()), "names are made of"),
            (changed(|table| table.entries[0].name = String::new()), "1 to 64 characters"),
            (Table::read(&[&*bytes, &[0]].concat(), 100, 116).unwrap_err(), "1 bytes follow its end"),
        ] {
            assert!(problem.contains(expected), "{problem}");
        }
    }

    #[test]
    fn a_header_is_one_page_with_its_digest() {
        let mut header = Header {
            magic: *b"VMMSNAP\n",
            version: VERSION.into(),
            architecture: ARCHITECTURE.into(),
            states_at: 4096.into(),
            chunks_at: 5000.into(),
            table_at: 5000.into(),
            end: 6000.into(),
            chunks_digest: [1; 32],
            table_digest: [2; 32],
            base: [0; 32],
            digest: [0; 32],
        };
        let page = header.seal();
        assert_eq!(page.len() as u64, HEADER_SIZE);
        assert_eq!(Header::read(&page), Some((header, true)));
        for at in 0..page.len() {
            let mut page = page.clone();
            page[at] ^= 1;
            assert!(!Header::read(&page).unwrap().1, "{at}");
        }
    }
}

//! The states of this crate in bytes, by `versionize`: the one place that knows of it.
//!
//! `versionize` writes plain data without tags or lengths and accepts what follows it, so what is read here has to end where its bytes do.
//! A field that is added gets `#[version(start = N)]`, and [`FORMAT`] the version N.

use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

use super::error::StateError;
use super::ram::{RamLayout, RamRange};
use super::state::{SnapshotState, StateFormat};

const FORMAT: StateFormat = StateFormat { name: "vmm-memory", newest: 1, oldest: 1 };

#[derive(Versionize)]
struct Layout {
    regions: Vec<Range>,
    packed: bool,
}

#[derive(Clone, Versionize)]
struct Range {
    gpa: u64,
    size: u64,
    read_only: bool,
}

/// Which version each structure has in each version of [`FORMAT`].
fn versions() -> VersionMap {
    VersionMap::new()
}

impl SnapshotState for RamLayout {
    const FORMAT: StateFormat = FORMAT;

    fn encode(&self, version: u16) -> Result<Vec<u8>, StateError> {
        let regions = self
            .regions
            .iter()
            .map(|range| Range { gpa: range.gpa, size: range.size, read_only: range.read_only })
            .collect();
        let mut bytes = Vec::new();
        Layout { regions, packed: self.packed }.serialize(&mut bytes, &versions(), version).map_err(text)?;
        Ok(bytes)
    }

    fn decode(mut bytes: &[u8], version: u16) -> Result<Self, StateError> {
        let layout = Layout::deserialize(&mut bytes, &versions(), version).map_err(text)?;
        if !bytes.is_empty() {
            return Err(format!("{} bytes follow its end", bytes.len()).into());
        }
        let regions = layout
            .regions
            .into_iter()
            .map(|range| RamRange { gpa: range.gpa, size: range.size, read_only: range.read_only })
            .collect();
        let layout = Self { regions, packed: layout.packed };
        layout.check()?;
        Ok(layout)
    }
}

fn text(error: versionize::VersionizeError) -> StateError {
    error.to_string().into()
}

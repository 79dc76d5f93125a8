//! Disks of the guest's: files of this machine.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context as _, Error, Result, bail, ensure};
use vmm_devices::Clock;
use vmm_devices::virtio::Block;
use vmm_devices::virtio::block::{ID_BYTES, RawFile};
use vmm_devices::virtio::metrics::DeviceMetrics;
use vmm_devices::virtio::rate::{Limits, Rate, RateLimiter};

use crate::policy::lock_image;

/// A disk of the guest's: a file of this machine, or a block device, taken for the disk's bytes whatever is in them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Where it is here.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// How many requests a second it serves at most.
    pub iops: Option<NonZeroU64>,
}

impl FromStr for Disk {
    type Err = Error;

    /// `FILE`, with `,ro` and `,iops=N` behind it or not.
    fn from_str(text: &str) -> Result<Self> {
        let (mut path, mut read_only, mut iops) = (text, false, None);
        // From the end: what else has commas is the file's name.
        while let Some((before, last)) = path.rsplit_once(',') {
            match last.strip_prefix("iops=") {
                Some(number) => {
                    let number =
                        number.parse().with_context(|| format!("{last:?} is no number from 1 on"))?;
                    iops = Some(number);
                }
                None if last == "ro" => read_only = true,
                None => break,
            }
            path = before;
        }
        ensure!(!path.is_empty(), "{text:?} is not FILE[,ro][,iops=N]");
        Ok(Self { path: path.into(), read_only, iops })
    }
}

impl Disk {
    pub(super) fn device(&self, figures: Arc<DeviceMetrics>, clock: &Arc<dyn Clock>) -> Result<Block> {
        let Self { path, read_only, iops } = self;
        let file = RawFile::open(path, *read_only)?;
        match lock_image(&file, *read_only) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let (other, take) = if *read_only {
                    ("it is written to by another program or disk", "end that one")
                } else {
                    ("another program or disk has it open", "take it read-only (,ro)")
                };
                bail!("{other}, and an image has one writer or readers alone; {take}");
            }
            Err(error) => {
                tracing::warn!(shown = %path.display(), %error, "nobody is kept from writing to a disk, too");
            }
            Ok(()) => {}
        }
        let name = path.file_name().map(|name| name.as_encoded_bytes().to_vec()).unwrap_or_default();
        let serial = name.get(..name.len().min(ID_BYTES)).unwrap_or_default();
        let mut device = Block::builder(Arc::new(file)).read_only(*read_only).serial(serial);
        if let Some(iops) = *iops {
            let operations = Some(Rate { per_second: iops, burst: NonZeroU64::MIN });
            device = device.rate(RateLimiter::new(Arc::clone(clock), Limits { bytes: None, operations }));
        }
        Ok(device.metrics(figures, Arc::clone(clock)).build()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_a_disk_are_told_from_its_name() {
        let disk =
            |path: &str, read_only, iops| Disk { path: path.into(), read_only, iops: NonZeroU64::new(iops) };
        for (text, expected) in [
            ("a", disk("a", false, 0)),
            ("a,ro", disk("a", true, 0)),
            ("a,b,iops=7,ro", disk("a,b", true, 7)),
            ("a,ro,iops=7", disk("a", true, 7)),
            ("ro", disk("ro", false, 0)),
        ] {
            assert_eq!(text.parse::<Disk>().unwrap(), expected, "{text}");
        }
        for text in ["", ",ro", "a,iops=0", "a,iops=", "a,iops=-1"] {
            assert!(text.parse::<Disk>().is_err(), "{text}");
        }
    }
}

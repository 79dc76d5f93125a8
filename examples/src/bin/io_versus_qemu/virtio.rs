//! Rows of virtio-blk and virtio-net, in a guest here and on QEMU.

use std::net::TcpListener;
use std::thread;

use anyhow::{Context as _, Result, bail};
use vmm_examples::race::order;
use vmm_examples::rates::Row;

use crate::guest::{IoGuests, Monitor, SERVER};
use crate::server;

/// Name of the work, what it is called in the table, and how much of that is one operation.
const ROWS: [(&str, &str, f64); 9] = [
    ("disk-read-4k", "virtio-blk, 4 KiB random reads, 1 at a time, /s", 1.0),
    ("disk-write-4k", "virtio-blk, 4 KiB random writes, 1 at a time, /s", 1.0),
    ("disk-read-4k-32", "virtio-blk, 4 KiB random reads, 32 at a time, /s", 1.0),
    ("disk-write-4k-32", "virtio-blk, 4 KiB random writes, 32 at a time, /s", 1.0),
    ("disk-read-1m", "virtio-blk, 1 MiB reads in order, MB/s", 1.048_576),
    ("disk-write-1m", "virtio-blk, 1 MiB writes in order, MB/s", 1.048_576),
    ("net-send", "virtio-net, TCP to the host, MB/s", 1.048_576),
    ("net-receive", "virtio-net, TCP from the host, MB/s", 1.048_576),
    ("net-ping-pong", "virtio-net, a byte to the host and back by TCP, /s", 1.0),
];

/// Those of `names`, or all.
///
/// # Errors
/// Fails on a name that no row has.
pub(crate) fn chosen(names: &[String]) -> Result<Vec<(&'static str, &'static str, f64)>> {
    if let Some(unknown) = names.iter().find(|name| ROWS.iter().all(|(known, ..)| known != name)) {
        bail!("--rows: there is no {unknown:?}; there are {}", ROWS.map(|(name, ..)| name).join(", "));
    }
    let wanted = |known: &str| names.is_empty() || names.iter().any(|name| name == known);
    Ok(ROWS.into_iter().filter(|(known, ..)| wanted(known)).collect())
}

/// The guests, and the rows that they work on.
pub(crate) struct Virtio {
    guests: IoGuests,
    chosen: Vec<(&'static str, &'static str, f64)>,
}

impl Virtio {
    /// Has both, and serves the guests' connections.
    ///
    /// # Errors
    /// Fails on a name that is none, and where guests are not to be had.
    pub(crate) fn new(names: &[String]) -> Result<Self> {
        let (chosen, guests) = (chosen(names)?, IoGuests::get()?);
        let listener = TcpListener::bind(SERVER).with_context(|| format!("listening at {SERVER}"))?;
        thread::spawn(move || server::serve(&listener));
        Ok(Self { guests, chosen })
    }

    /// Each row once in either guest; which one is first depends on the number of the pair.
    pub(crate) fn pair(&self, pair: u32) -> Vec<Row> {
        let work: Vec<&str> = self.chosen.iter().map(|(name, ..)| *name).collect();
        let empty = |label: &str| Row { label: label.to_owned(), peer: "QEMU".to_owned(), ..Row::default() };
        let mut rows: Vec<Row> = self.chosen.iter().map(|(_, label, _)| empty(label)).collect();
        for index in order(pair, 2) {
            let monitor = if index == 0 { Monitor::Ours } else { Monitor::Qemu };
            eprintln!("virtio: {monitor:?} works");
            let report = self.guests.work(monitor, &work);
            for (row, (name, _, each)) in rows.iter_mut().zip(&self.chosen) {
                let figures = if monitor == Monitor::Ours { &mut row.ours } else { &mut row.theirs };
                match &report {
                    Ok(report) => match (report.figures.get(*name), report.failures.get(*name)) {
                        (Some(nanoseconds), _) => figures.push(each * 1e9 / nanoseconds),
                        (None, why) => {
                            let why = why.map_or("it was not reached", String::as_str);
                            row.failure = Some(format!("{monitor:?}: {why}"));
                        }
                    },
                    Err(error) => row.failure = Some(format!("{monitor:?}: {error:#}")),
                }
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_chosen_by_name() {
        assert_eq!(chosen(&[]).unwrap().len(), ROWS.len());
        let names = ["net-send", "disk-read-1m"].map(str::to_owned);
        let found: Vec<_> = chosen(&names).unwrap().iter().map(|(name, ..)| *name).collect();
        assert_eq!(found, ["disk-read-1m", "net-send"]);
        let error = chosen(&["disk".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("no \"disk\"") && error.contains("net-ping-pong"), "{error}");
    }
}

//! What the page shows.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use crate::event::{Event, Kind, Party, Verdict};
use crate::read::{Entries, Item};
use crate::sink::describe;
use crate::storage::Storage;

/// What went, or did not go, between two parties.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Flow {
    /// Requests that were allowed, throttled ones among them.
    pub allowed: u64,
    /// Requests that were not.
    pub denied: u64,
    /// The rules that denied, with how often.
    pub rules: BTreeMap<String, u64>,
    /// What was denied, with how often.
    pub objects: BTreeMap<String, u64>,
    /// When it was last denied, nanoseconds since 1970.
    pub last_denied: u64,
}

/// Pairs that are kept: more become one.
const PAIRS: usize = 2000;
/// Lines of what is notable that are kept.
const NOTABLE: usize = 200;
/// Bars of the timeline.
pub(super) const BARS: usize = 60;

/// What the page shows of the entries.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ReportData {
    /// Entries.
    pub entries: u64,
    /// Events by kind.
    pub kinds: BTreeMap<Kind, u64>,
    /// Flows by subject and peer or, without a peer, object.
    pub flows: BTreeMap<(String, String), Flow>,
    /// Times of the first and the last entry, nanoseconds since 1970.
    pub times: Option<(u64, u64)>,
    /// For each bar of the timeline: denied, allowed, others.
    pub bars: Vec<[u64; 3]>,
    /// Time, sequence number and text of what people should see: denials, faults, recoveries. The last ones.
    pub notable: Vec<(u64, u64, String)>,
    /// How many of those there were.
    pub notable_total: u64,
    /// Events that were counted and not written one by one.
    pub counted: u64,
}

fn is_notable(event: &Event) -> bool {
    matches!(event.verdict, Some(Verdict::Deny | Verdict::Quarantine))
        || matches!(
            event.kind,
            Kind::Revoked
                | Kind::Misbehaviour
                | Kind::EmulationFailure
                | Kind::Recovery
                | Kind::Retention
                | Kind::StorageFault
                | Kind::Malformed
                | Kind::PolicyLoaded
                | Kind::Administration
                | Kind::Launch
        )
}

impl ReportData {
    fn add(&mut self, seq: u64, event: &Event) {
        self.entries += 1;
        *self.kinds.entry(event.kind).or_default() += 1;
        if event.kind == Kind::Coalesced {
            self.counted += event.count;
        }
        if is_notable(event) {
            self.notable_total += 1;
            if self.notable.len() >= NOTABLE {
                self.notable.remove(0);
            }
            self.notable.push((event.wall, seq, describe(event)));
        }
        let Some(verdict) = event.verdict.filter(|_| event.kind != Kind::Coalesced) else { return };
        let Some(subject) = &event.subject else { return };
        let to = match (&event.peer, &event.object) {
            (Some(peer), _) => peer.to_string(),
            (None, Some(object)) => object.to_string(),
            (None, None) => return,
        };
        let mut pair = (subject.to_string(), to);
        if self.flows.len() >= PAIRS && !self.flows.contains_key(&pair) {
            pair = ("others".to_owned(), "others".to_owned());
        }
        let flow = self.flows.entry(pair).or_default();
        if matches!(verdict, Verdict::Deny | Verdict::Quarantine) {
            flow.denied += 1;
            flow.last_denied = event.wall;
            let add = |counts: &mut BTreeMap<String, u64>, name: String| {
                if counts.len() < 20 || counts.contains_key(&name) {
                    *counts.entry(name).or_default() += 1;
                }
            };
            if let Some(rule) = &event.rule {
                add(&mut flow.rules, rule.to_string());
            }
            if let Some(object) = &event.object {
                add(&mut flow.objects, object.to_string());
            }
        } else {
            flow.allowed += 1;
        }
    }
}

/// Whether a party of a flow is a virtual machine, and what it is called in a picture.
pub(super) fn short(name: &str) -> String {
    match name.parse::<Party>() {
        Ok(Party::Vm(vm)) => {
            // The end of it: identifiers that a person gives begin alike.
            let id = format!("{:032x}", vm.uuid);
            format!("vm …{}#{}", id.get(24..).unwrap_or(&id), vm.incarnation)
        }
        _ => name.chars().take(28).collect(),
    }
}

/// Reads the log, twice: for the time that it spans, and for what is in it.
///
/// # Errors
/// If the storage cannot be read.
pub fn collect(storage: &Arc<dyn Storage>) -> io::Result<ReportData> {
    let mut data = ReportData { bars: vec![[0; 3]; BARS], ..ReportData::default() };
    each(storage, |_, event| {
        let (first, last) = data.times.unwrap_or((event.wall, event.wall));
        data.times = Some((first.min(event.wall), last.max(event.wall)));
    })?;
    let (first, last) = data.times.unwrap_or_default();
    let width = ((last - first) / BARS as u64).max(1);
    each(storage, |seq, event| {
        data.add(seq, event);
        let bar = usize::try_from((event.wall.saturating_sub(first)) / width).unwrap_or(0).min(BARS - 1);
        let class = match event.verdict {
            Some(Verdict::Deny | Verdict::Quarantine) => 0,
            Some(_) => 1,
            None => 2,
        };
        if let Some(count) = data.bars.get_mut(bar).and_then(|bar| bar.get_mut(class)) {
            *count += if event.kind == Kind::Coalesced { 0 } else { 1 };
        }
    })?;
    Ok(data)
}

fn each(storage: &Arc<dyn Storage>, mut with: impl FnMut(u64, &Event)) -> io::Result<()> {
    let mut entries = Entries::new(Arc::clone(storage)).live();
    while let Some(item) = entries.next()? {
        if let Item::Entry(found) = item
            && let Ok(event) = &found.event
        {
            with(found.seq, event);
        }
    }
    Ok(())
}

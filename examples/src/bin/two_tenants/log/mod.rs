//! The audit log of a run. What is decided and done goes into it at once, each source through a ring of its own; a process of its own writes it.
//! At the end that process is told what the program has shown, verifies the log with the key that is its own, and looks for it there.

#[cfg(test)]
mod tests;
mod written;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use vmm_audit::collector::Attached;
use vmm_audit::event::{Kind, Party, Verdict};
use vmm_audit::gaps::gaps;
use vmm_audit::pipeline::Emitter;
use vmm_audit::storage::FsStorage;
use vmm_audit::verify::{VerifyOptions, verify};
use vmm_audit::{Entries, Item};
use vmm_examples::audit::{Collected, LogProcess, MachineLog, collect};
use vmm_examples::confine::Confinement;

use crate::host::{ROLES, Role};
use crate::log::written::{Written, name};

const ORIGIN: &str = "two-tenants.example/audit";

/// Who tells what the policy decides, and what the gate in front of it lets through.
const POLICY: &str = "policy";
const GATE: &str = "gate";

/// What a launch is measured from.
const MEASURED: [&str; 6] = ["kernel", "initrd", "command-line", "cpu-model", "policy", "vmm"];

/// A decision, as the program shows it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Said {
    pub(crate) who: String,
    pub(crate) peer: Option<String>,
    pub(crate) action: String,
    pub(crate) object: String,
    pub(crate) verdict: String,
    pub(crate) layer: String,
    /// File, line and text.
    pub(crate) rule: Option<String>,
    /// The digest of the policy.
    pub(crate) policy: String,
    /// The second person, where it takes one.
    pub(crate) confirmed_by: Option<String>,
}

/// A verb that was carried out, likewise.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Done {
    pub(crate) who: String,
    pub(crate) verb: String,
    pub(crate) of: Option<String>,
    pub(crate) confirmed_by: Option<String>,
    pub(crate) rule: Option<String>,
    pub(crate) policy: String,
}

/// A verb, or the confirmation of one, that came to nothing for another reason than a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Rejected {
    pub(crate) who: String,
    pub(crate) of: Option<String>,
    pub(crate) ticket: Option<u64>,
    pub(crate) asked_by: Option<String>,
    pub(crate) why: String,
}

/// A right that was taken back, likewise.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Taken {
    pub(crate) who: String,
    pub(crate) peer: Option<String>,
    pub(crate) object: String,
    /// Has the rule in it.
    pub(crate) why: String,
}

/// All that was shown.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Shown {
    /// By their numbers: one may be shown twice.
    pub(crate) said: BTreeMap<u64, Said>,
    pub(crate) taken: Vec<Taken>,
    pub(crate) done: Vec<Done>,
    pub(crate) rejected: Vec<Rejected>,
    /// Decisions that allowed, that asked for a second person or were confirmed by one, and that refused.
    pub(crate) counts: [u64; 3],
    /// The digests that the policy was given, by the names of the machines.
    pub(crate) launched: BTreeMap<String, String>,
}

/// What the process found: each check, and whether it holds.
pub(crate) type Checks = Vec<(String, bool)>;

/// The log, from where what goes into it happens.
pub(crate) struct Log {
    process: LogProcess,
    policy: Attached,
    gate: Attached,
}

impl Log {
    /// Has one begin in that directory, or go on there.
    pub(crate) fn start(dir: &Path) -> Result<Self> {
        let process = LogProcess::start(dir, "--write-log")?;
        let policy = process.attach(&Party::host(POLICY))?;
        let gate = process.attach(&Party::host(GATE))?;
        Ok(Self { process, policy, gate })
    }

    pub(crate) fn policy(&self) -> Emitter {
        self.policy.emitter().clone()
    }

    pub(crate) fn gate(&self) -> Emitter {
        self.gate.emitter().clone()
    }

    pub(crate) fn machine(&self, role: Role) -> Result<MachineLog> {
        MachineLog::new(&self.process, Party::vm(role.number.into(), role.identity().incarnation()))
    }

    /// With what the log needs.
    pub(crate) fn confinement(&self, confinement: Confinement) -> Confinement {
        self.process.confinement(confinement)
    }

    /// Closes it, when all else has ended, and has what was shown looked for.
    pub(crate) fn end(self, shown: &Shown) -> Result<Checks> {
        let Self { process, policy, gate } = self;
        drop((policy, gate));
        let found = process.end(&serde_json::to_string(shown)?)?;
        serde_json::from_str(&found)
            .with_context(|| format!("the process that writes the log says {found:?}"))
    }
}

/// What that process does.
pub(crate) fn write(dir: &Path) -> Result<()> {
    let collected = collect(dir, ORIGIN)?;
    let shown = serde_json::from_str(&collected.said).context("the monitor has ended before its time")?;
    let checks = check(&dir.join("log"), &collected, &shown)?;
    writeln!(io::stdout(), "{}", serde_json::to_string(&checks)?)?;
    Ok(())
}

fn check(dir: &Path, collected: &Collected, shown: &Shown) -> Result<Checks> {
    let storage = Arc::new(FsStorage::existing(dir)?);
    let result = verify(&*storage, &VerifyOptions::new(collected.key.clone()), &mut |_, _| ())?;
    let mut checks = vec![("the log is intact and closed".to_owned(), result.intact && result.closed)];

    let accounts = gaps(Arc::clone(&storage) as _)?.accounts;
    let accounts: Vec<_> =
        accounts.into_iter().filter(|account| account.first_entry >= collected.before).collect();
    let is_whole = accounts.iter().all(|account| account.missing == 0 && account.torn == 0 && account.ended);
    checks.push((
        format!("all that its {} sources told is accounted for", accounts.len()),
        is_whole && !accounts.is_empty(),
    ));
    let who = |account: &vmm_audit::gaps::Account| {
        let party: Option<Party> = account.who.as_deref().and_then(|who| who.parse().ok());
        (account.source, name(party.as_ref()))
    };
    let sources: BTreeMap<u32, String> = accounts.iter().map(who).collect();

    let mut written = Written::default();
    let mut entries = Entries::new(storage);
    while let Some(item) = entries.next()? {
        let Item::Entry(found) = item else { continue };
        let Ok(event) = found.event else { continue };
        // Counters are written by the log, which says whose they are.
        let source = if found.source == 0 && event.kind == Kind::Coalesced {
            event.get("source").and_then(|source| source.parse().ok()).unwrap_or(0)
        } else {
            found.source
        };
        if let (true, Some(source)) = (found.seq >= collected.before, sources.get(&source)) {
            written.add(found.seq, source, event);
        }
    }
    checks.extend(compare(&written, shown));
    Ok(checks)
}

fn compare(written: &Written, shown: &Shown) -> Checks {
    let mut checks = Vec::new();
    // Each entry stands for one that was shown.
    let mut left = written.said.clone();
    let mut absent = Vec::new();
    for said in shown.said.values() {
        match left.iter().position(|written| written == said) {
            Some(at) => drop(left.swap_remove(at)),
            None => absent.push(said),
        }
    }
    let what = match absent.first() {
        None => format!("it has all {} verdicts that are shown here", shown.said.len()),
        Some(first) => format!("it has {} of the verdicts shown here not: {first:?}", absent.len()),
    };
    checks.push((what, absent.is_empty() && !shown.said.is_empty()));

    let mut counts = [0; 3];
    let counted = written.counted.iter().map(|((_, verdict), count)| (verdict, count));
    for (verdict, count) in written.verdicts.iter().chain(counted) {
        let [allowed, asked, refused] = &mut counts;
        *match verdict {
            Some(Verdict::Allow) => allowed,
            Some(Verdict::Ask) => asked,
            _ => refused,
        } += count;
    }
    let [allowed, asked, refused] = counts;
    let what =
        format!("it has all decisions: {allowed} allowed, {asked} for a second person, {refused} refused");
    checks.push((what, counts == shown.counts));

    let is_taken = |taken: &Taken| {
        let same = |(other, rule): &&(Taken, Option<String>)| {
            (&other.who, &other.peer, &other.object) == (&taken.who, &taken.peer, &taken.object)
                && rule.as_ref().is_some_and(|rule| taken.why.contains(rule.as_str()))
        };
        written.taken.iter().filter(same).count() == 1
    };
    let what = format!("it has the {} channels that were closed, each with its rule", shown.taken.len());
    checks.push((what, shown.taken.iter().all(is_taken) && !shown.taken.is_empty()));

    let is_launch = |(who, digest): (&String, &String)| {
        written.machines.get(who).is_some_and(|[(_, event), _]| {
            let names: Vec<&str> = event.measured.iter().map(|measured| measured.name.as_str()).collect();
            let known = event.launch_digest.map(|launch| launch.to_string());
            event.kind == Kind::Launch && names == MEASURED && known.as_ref() == Some(digest)
        })
    };
    let machines: BTreeSet<&String> = written.machines.keys().collect();
    let is_all = machines == shown.launched.keys().collect() && machines.len() == ROLES.len();
    checks.push((
        "each machine's first event is its launch, with the digest that the policy has".to_owned(),
        is_all && shown.launched.iter().all(is_launch),
    ));
    let sorted = |mut all: Vec<Done>| {
        all.sort();
        all
    };
    let done = sorted(written.done.iter().map(|(_, done)| done.clone()).collect());
    let is_all = done == sorted(shown.done.clone()) && written.begun.is_empty() && !done.is_empty();
    checks.push((
        format!("it has the {} verbs that were carried out, each before that was done", done.len()),
        is_all && written.done.iter().all(|done| written.is_before_effect(done)),
    ));
    let (mut absent, mut rejected) = (shown.rejected.clone(), written.rejected.clone());
    absent.sort();
    rejected.sort();
    let what = format!("and the {} that somebody wanted in vain, and who that was", rejected.len());
    checks.push((what, absent == rejected && !rejected.is_empty()));
    checks.push((format!("there are {} entries of this run", written.entries), written.entries > 0));
    checks
}

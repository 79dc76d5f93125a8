//! Both, asked the same.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Result, bail};
use vmm_policy::{
    Lifecycle, Monitor, Object, Policy, Request, SubjectId, SubjectSpec, Uuid, Value, ValueKind,
};

use crate::host::{Cedar, State};
use crate::random::{FLAGS, KINDS, NAMES, policy};
use crate::workload::Workload;

/// What was compared.
pub(crate) struct Found {
    pub(crate) pairs: usize,
    pub(crate) policies: usize,
    pub(crate) allowed: usize,
}

/// Requests of each policy.
const EACH: usize = 100;

/// Asks both until `pairs` answers agree.
pub(crate) fn differ(pairs: usize, seed: u64) -> Result<Found> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut found = Found { pairs: 0, policies: 0, allowed: 0 };
    while found.pairs < pairs {
        let (text, machines) = policy(&mut rng);
        // One that stands on both sides of a wall is no policy.
        let Ok(policy) = Policy::parse(&text) else { continue };
        found.policies += 1;
        let cedar = Cedar::new(policy.document())?;
        let monitor = Monitor::new(policy);
        let states: Vec<State> = (0..machines)
            .map(|_| State {
                lifecycle: Lifecycle::ALL[rng.usize(..Lifecycle::ALL.len())],
                attested: rng.bool(),
            })
            .collect();
        let mut ids: Vec<SubjectId> = Vec::new();
        for (at, state) in states.iter().enumerate() {
            let id = monitor
                .register(SubjectSpec::vm(Uuid::from_u128(1 + at as u128)).attested(state.attested))?;
            monitor.set_lifecycle(id, state.lifecycle)?;
            ids.push(id);
        }
        let wanted: Vec<&str> = FLAGS.iter().filter(|_| rng.bool()).copied().collect();
        // A flag that no condition asks for is none.
        let flags: Vec<&str> =
            wanted.into_iter().filter(|flag| monitor.set_flag(flag, true).is_ok()).collect();
        for _ in 0..EACH.min(pairs - found.pairs) {
            let kind = KINDS[rng.usize(..KINDS.len())];
            let action = kind.actions()[rng.usize(..kind.actions().len())].0;
            let value = match kind.value_kind() {
                ValueKind::Number(_) => Value::Number(rng.u64(..16)),
                ValueKind::Name => Value::Name(NAMES[rng.usize(..NAMES.len())]),
                ValueKind::Nothing => Value::Number(0),
            };
            let Some(object) = Object::new(kind, value) else { bail!("{kind} {value:?} is none") };
            let asker = rng.usize(..machines);
            let peer = (rng.u8(0..4) > 0).then(|| rng.usize(..machines));
            let mut request = Request::new(ids[asker], action, object);
            request.peer = peer.map(|peer| ids[peer]);
            let ours = monitor.check(&request).permits();
            let name = |at: usize| format!("v{at}");
            let (asker_name, peer_name) = (name(asker), peer.map(name));
            let peer_side = peer.and_then(|peer| Some((peer_name.as_deref()?, states[peer])));
            let asked =
                cedar.request((asker_name.as_str(), states[asker]), peer_side, action, &object, &flags)?;
            let theirs = cedar.allows(&asked);
            if ours != theirs {
                bail!(
                    "{asker_name} to {action} {object} of {peer_name:?}, {states:?}, {flags:?}: {ours} here, {theirs} by Cedar\n{text}\n{}",
                    crate::translate::translate(monitor.policy().document())?
                );
            }
            found.pairs += 1;
            found.allowed += usize::from(ours);
        }
    }
    Ok(found)
}

/// The median of a decision of Cedar's in nanoseconds, on the benchmark's policy; what it decides is compared, too.
pub(crate) fn times(rules: usize) -> Result<f64> {
    let workload = Workload::new(rules);
    let (monitor, ids) = match workload.monitor() {
        Ok(made) => made,
        Err(error) => bail!("{error}"),
    };
    let policy = monitor.policy();
    let cedar = Cedar::new(policy.document())?;
    let names: Vec<&str> = policy.parties().collect();
    let state = |at: u32| {
        let (lifecycle, attested) = Workload::state(at as usize);
        State { lifecycle, attested }
    };
    let mut rng = fastrand::Rng::with_seed(1);
    let mut times = Vec::new();
    let mut name = String::new();
    let begin = Instant::now();
    // Hundreds where that takes no longer than seconds.
    while times.len() < 2000 && (times.len() < 21 || begin.elapsed().as_secs() < 10) {
        let asked = workload.asked(&mut rng);
        name.clear();
        asked.write_name(&mut name);
        let object = asked.object(&name);
        let side = |at: u32| (names[at as usize], state(at));
        let peer = asked.peer.map(side);
        let request = cedar.request(side(asked.asker), peer, asked.action, &object, &[])?;
        let start = Instant::now();
        let theirs = black_box(cedar.allows(black_box(&request)));
        times.push(start.elapsed().as_nanos() as f64);
        let ours = monitor.check(&asked.of(&name, &ids)).permits();
        if ours != theirs {
            bail!(
                "{} to {} {object} of {:?}: {ours} here, {theirs} by Cedar",
                names[asked.asker as usize],
                asked.action,
                peer.map(|(name, _)| name),
            );
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_say_the_same() {
        let found = differ(20_000, 2).unwrap();
        assert!(found.allowed > 2000, "{} of {} allowed: that tests little", found.allowed, found.pairs);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn both_say_the_same_a_million_times() {
        let found = differ(1_000_000, 1).unwrap();
        assert_eq!(found.pairs, 1_000_000);
    }
}

//! Both, asked the same.

use std::hint::black_box;
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use vmm_policy::{
    Lifecycle, Monitor, Object, Policy, Request, SubjectId, SubjectSpec, Uuid, Value, ValueKind,
};

use crate::host::{Cedar, State};
use crate::random::{FLAGS, KINDS, NAMES, policy};
use crate::workload::Workload;

/// What was compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) pairs: usize,
    pub(crate) policies: usize,
    pub(crate) allowed: usize,
}

impl std::ops::AddAssign for Found {
    fn add_assign(&mut self, other: Self) {
        self.pairs += other.pairs;
        self.policies += other.policies;
        self.allowed += other.allowed;
    }
}

/// Requests of each policy.
const EACH: usize = 100;
/// Pairs that have a seed of their own: what is compared depends neither on how many threads there are nor on where a run begins.
const PIECE: usize = 10_000;

/// Asks both, on all processors, until `pairs` answers agree, from the piece of 10,000 on that is given. After each piece `progress` is told
/// what there is so far.
pub(crate) fn differ(
    pairs: usize,
    seed: u64,
    first: usize,
    progress: impl Fn(Found) + Sync,
) -> Result<Found> {
    let (next, sum) = (AtomicUsize::new(0), Mutex::new(Found::default()));
    let work = || -> Result<()> {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let left = pairs.saturating_sub(at * PIECE);
            if left == 0 {
                return Ok(());
            }
            let number = (first + at) as u64;
            let piece = self::piece(PIECE.min(left), seed.wrapping_mul(1 << 32).wrapping_add(number));
            if piece.is_err() {
                // The others end with the piece that they are at.
                next.store(usize::MAX / PIECE / 2, Ordering::Relaxed);
            }
            let piece = piece.with_context(|| format!("piece {number} of seed {seed}"))?;
            let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
            *sum += piece;
            progress(*sum);
        }
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        all.into_iter().try_for_each(|one| one.join().unwrap_or_else(|_| bail!("a thread has ended early")))
    })?;
    Ok(sum.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn piece(pairs: usize, seed: u64) -> Result<Found> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut found = Found::default();
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
        let found = differ(20_000, 2, 0, |_| ()).unwrap();
        assert_eq!(found.pairs, 20_000);
        assert!(found.allowed > 2000, "{} of {} allowed: that tests little", found.allowed, found.pairs);
    }

    #[test]
    #[ignore = "takes minutes"]
    fn both_say_the_same_a_million_times() {
        let found = differ(1_000_000, 1, 0, |_| ()).unwrap();
        assert_eq!(found.pairs, 1_000_000);
    }

    #[test]
    fn a_run_in_parts_is_the_run() {
        let part = |pairs, first| differ(pairs, 3, first, |_| ()).unwrap();
        let mut parts = part(PIECE, 0);
        parts += part(2000, 1);
        assert_eq!(parts, part(PIECE + 2000, 0));
    }
}

//! A host with tenants, a policy of as many rules as are wanted, and what is asked of it. The oracle translates the same policy for Cedar.
//!
//! Each layer has something to say. Levels and categories differ between machines; the first 64 tenants stand at walls of eight, so that
//! most machines have a history, and rules between tenants let it spread; a fifth of the rules has conditions, on states that machines
//! differ in; a limit is asked about hypercalls. Nine actions are asked for, with and without a peer, of numbers and of names. Half of the
//! requests are about what some rule is about, the others about anything; no two are equal.

use std::collections::HashSet;
use std::fmt::Write;

use vmm_policy::{
    Action, Kind, Lifecycle, Monitor, Object, Policy, Request, SubjectId, SubjectSpec, Uuid, Value, ValueKind,
};

/// Machines of a tenant.
const ROLES: usize = 5;
/// Beginnings of names.
const NAMES: u16 = 64;
/// What is asked for.
const OPS: [(Kind, Action); 9] = [
    (Kind::Vsock, Action::Connect),
    (Kind::Vsock, Action::Accept),
    (Kind::Tcp, Action::Connect),
    (Kind::Udp, Action::Send),
    (Kind::Region, Action::MapRo),
    (Kind::Region, Action::MapRw),
    (Kind::Disk, Action::Attach),
    (Kind::Doorbell, Action::Notify),
    (Kind::Hypercall, Action::Use),
];
/// What stands behind the rules about tenants.
const WIDE: [&str; 4] = [
    "deny any to connect tcp 25 of any",
    "deny any to connect vsock 0..1023 of any unless peer running",
    "deny any to map-rw region of any in other tenant",
    "limit any vm to use hypercall at 1000000 per second burst 1000000",
];

/// What is measured.
pub(crate) struct Workload {
    /// The policy's text.
    pub(crate) text: String,
    tenants: usize,
    rules: Vec<About>,
}

/// What a rule is about: machines, an action, and ports up to 2000 above or names that begin alike.
#[derive(Clone, Copy)]
struct About {
    asker: usize,
    peer: usize,
    op: usize,
    first: u16,
}

impl Workload {
    /// With so many rules, at least five. There is a tenant to a hundred of them, two at least and 400 at most.
    pub(crate) fn new(rules: usize) -> Self {
        let mut rng = fastrand::Rng::with_seed(rules as u64);
        let tenants = (rules / 100).clamp(2, 400);
        let mut text =
            String::from("secrecy internal < secret\nintegrity low < high\ncategories health, money\n");
        let list = |range: std::ops::Range<usize>, name: &str| {
            range.map(|at| format!("{name}{at}")).collect::<Vec<_>>().join(", ")
        };
        writeln!(text, "family tenant: {}\nlabels {}", list(0..tenants, "t"), list(0..ROLES, "r")).ok();
        for first in (0..tenants.min(64)).step_by(8) {
            writeln!(text, "wall w{first}: {}", list(first..tenants.min(first + 8), "t")).ok();
        }
        for at in 0..tenants * ROLES {
            let (tenant, role) = (at / ROLES, at % ROLES);
            // A tenant's machines are on one level, but for a few.
            let secret = (tenant % 4 == 0) != (rng.u8(0..20) == 0);
            let with = if rng.u8(0..20) == 0 { " with money" } else { "" };
            let level = if secret { format!(" secrecy secret{with}") } else { String::new() };
            let integrity = if rng.u8(0..30) == 0 { " integrity high" } else { "" };
            let uuid = Uuid::from_u128(1 + at as u128);
            writeln!(
                text,
                "vm v{tenant}-{role} {{ uuid {uuid} labels t{tenant}, r{role}{level}{integrity} }}"
            )
            .ok();
        }
        let mut abouts = Vec::new();
        for at in 0..rules.saturating_sub(WIDE.len()) {
            let tenant = at % tenants;
            let other = if rng.u8(0..20) == 0 { rng.usize(..tenants) } else { tenant };
            let op = rng.usize(..OPS.len());
            let (kind, action) = OPS[op];
            let named = kind.value_kind() == ValueKind::Name;
            let about = About {
                asker: tenant * ROLES + rng.usize(..ROLES),
                peer: other * ROLES + rng.usize(..ROLES),
                op,
                first: if named { rng.u16(..NAMES) } else { rng.u16(0..60_000) },
            };
            let verb = if rng.u8(0..10) == 0 { "deny" } else { "allow" };
            let when = match rng.u8(0..20) {
                0 => " when attested",
                1 => " when running and peer running",
                2 => " unless migrating",
                3 => " when running or attested",
                _ => "",
            };
            let who = |at: usize| format!("t{} and r{}", at / ROLES, at % ROLES);
            let values = if named {
                format!("obj-{}-*", about.first)
            } else {
                format!("{}..{}", about.first, u32::from(about.first) + 2000)
            };
            let of =
                if leads_to_peer(kind, action) { format!(" of {}", who(about.peer)) } else { String::new() };
            // What is not asked of a peer cannot depend on its state.
            let when = if of.is_empty() && when.contains("peer") { "" } else { when };
            writeln!(text, "{verb} {} to {action} {kind} {values}{of}{when}", who(about.asker)).ok();
            abouts.push(about);
        }
        WIDE.iter().for_each(|rule| {
            writeln!(text, "{rule}").ok();
        });
        Self { text, tenants, rules: abouts }
    }

    /// What a machine's state is.
    pub(crate) fn state(at: usize) -> (Lifecycle, bool) {
        let lifecycle = match at % 16 {
            3 => Lifecycle::Paused,
            9 => Lifecycle::Migrating,
            _ => Lifecycle::Running,
        };
        (lifecycle, at.is_multiple_of(2))
    }

    /// A monitor with all machines registered, in their states.
    pub(crate) fn monitor(&self) -> Result<(Monitor, Vec<SubjectId>), Box<dyn std::error::Error>> {
        let monitor = Monitor::new(Policy::parse(&self.text)?);
        let mut subjects = Vec::new();
        for at in 0..self.tenants * ROLES {
            let (lifecycle, attested) = Self::state(at);
            let id = monitor.register(SubjectSpec::vm(Uuid::from_u128(1 + at as u128)).attested(attested))?;
            monitor.set_lifecycle(id, lifecycle)?;
            subjects.push(id);
        }
        Ok((monitor, subjects))
    }

    /// So many requests, no two of which are equal.
    pub(crate) fn distinct(&self, count: usize, rng: &mut fastrand::Rng) -> Vec<Asked> {
        let mut known = HashSet::with_capacity(count);
        let mut all = Vec::with_capacity(count);
        while all.len() < count {
            let asked = self.asked(rng);
            if known.insert(asked) {
                all.push(asked);
            }
        }
        all
    }

    /// A request.
    pub(crate) fn asked(&self, rng: &mut fastrand::Rng) -> Asked {
        let machine = |rng: &mut fastrand::Rng, tenant: usize| tenant * ROLES + rng.usize(..ROLES);
        let (about, near) = if rng.bool() && !self.rules.is_empty() {
            (self.rules[rng.usize(..self.rules.len())], true)
        } else {
            let tenant = rng.usize(..self.tenants);
            let other = if rng.bool() { tenant } else { rng.usize(..self.tenants) };
            let about = About {
                asker: machine(rng, tenant),
                peer: machine(rng, other),
                op: rng.usize(..OPS.len()),
                first: 0,
            };
            (about, false)
        };
        let (kind, action) = OPS[about.op];
        let (number, name) = if kind.value_kind() == ValueKind::Name {
            let begin = if near { about.first } else { rng.u16(..NAMES) };
            (rng.u32(..1_000_000), Some(begin))
        } else {
            let number = if near { u32::from(about.first) + rng.u32(0..=2000) } else { rng.u32(..65_536) };
            (number, None)
        };
        let peer = leads_to_peer(kind, action).then_some(about.peer as u32);
        Asked { asker: about.asker as u32, peer, kind, action, number, name }
    }
}

fn leads_to_peer(kind: Kind, action: Action) -> bool {
    !matches!((kind, action), (Kind::Disk | Kind::Hypercall, _) | (Kind::Vsock, Action::Accept))
}

/// A request between machines by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Asked {
    /// Who.
    pub(crate) asker: u32,
    /// Of whom.
    pub(crate) peer: Option<u32>,
    kind: Kind,
    /// What.
    pub(crate) action: Action,
    number: u32,
    name: Option<u16>,
}

impl Asked {
    /// Adds the object's name to `names`, if it has one.
    pub(crate) fn write_name(&self, names: &mut String) {
        if let Some(begin) = self.name {
            write!(names, "obj-{begin}-{}", self.number).ok();
        }
    }

    /// With what, by the name that [`write_name`](Self::write_name) has written.
    pub(crate) fn object<'n>(&self, name: &'n str) -> Object<'n> {
        let value = match self.name {
            Some(_) => Value::Name(name),
            None => Value::Number(self.number.into()),
        };
        Object::new(self.kind, value).unwrap_or(Object::balloon())
    }

    /// For a monitor.
    pub(crate) fn of<'n>(&self, name: &'n str, subjects: &[SubjectId]) -> Request<'n> {
        let mut request = Request::new(subjects[self.asker as usize], self.action, self.object(name));
        request.peer = self.peer.map(|peer| subjects[peer as usize]);
        request
    }
}

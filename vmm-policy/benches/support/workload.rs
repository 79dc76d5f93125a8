//! A host with tenants, and a policy of as many rules as are wanted. The oracle translates the same policy for Cedar.

use std::fmt::Write;

use vmm_policy::{Action, Lifecycle, Monitor, Object, Policy, Request, SubjectId, SubjectSpec, Uuid};

/// What is measured.
pub(crate) struct Workload {
    /// The policy's text.
    pub(crate) text: String,
    tenants: usize,
    names: Vec<String>,
}

const ROLES: usize = 5;

impl Workload {
    /// With so many rules. A tenant has five machines and about a hundred rules; all four layers have something to say: levels differ
    /// for a tenth of the machines, the first tenants stand at a wall, and a fifth of the rules has conditions.
    pub(crate) fn new(rules: usize) -> Self {
        let mut rng = fastrand::Rng::with_seed(rules as u64);
        let tenants = (rules / 100).clamp(2, 400);
        let mut text = String::from("secrecy internal < secret\nintegrity low < high\n");
        let list = |name: &str, count: usize| {
            (0..count).map(|at| format!("{name}{at}")).collect::<Vec<_>>().join(", ")
        };
        writeln!(text, "family tenant: {}\nlabels {}", list("t", tenants), list("r", ROLES)).ok();
        writeln!(text, "wall side: {}", list("t", tenants.min(8))).ok();
        for tenant in 0..tenants {
            for role in 0..ROLES {
                let level = if rng.u8(0..10) == 0 { " secrecy secret" } else { "" };
                let uuid = Uuid::from_u128(1 + (tenant * ROLES + role) as u128);
                writeln!(text, "vm v{tenant}-{role} {{ uuid {uuid} labels t{tenant}, r{role}{level} }}").ok();
            }
        }
        let names: Vec<String> = (0..64).map(|at| format!("obj-{at}")).collect();
        for at in 0..rules.saturating_sub(1) {
            let tenant = at % tenants;
            let (one, other) = (rng.usize(..ROLES), rng.usize(..ROLES));
            let verb = if rng.u8(0..10) == 0 { "deny" } else { "allow" };
            let when = match rng.u8(0..10) {
                0 => " when attested",
                1 => " when running and peer running",
                _ => "",
            };
            let who = format!("t{tenant} and r{one}");
            let peer = format!("t{tenant} and r{other}");
            let first = rng.u16(0..60_000);
            match rng.u8(0..4) {
                0 => {
                    writeln!(text, "{verb} {who} to connect vsock {first}..{} of {peer}{when}", first + 2000)
                }
                1 => writeln!(text, "{verb} {who} to connect tcp {first}..{} of {peer}{when}", first + 2000),
                2 => {
                    writeln!(text, "{verb} {who} to map-ro region {} of {peer}{when}", names[rng.usize(..64)])
                }
                _ => writeln!(text, "{verb} {who} to attach disk {}{when}", names[rng.usize(..64)]),
            }
            .ok();
        }
        writeln!(text, "deny any to connect tcp 25 of any").ok();
        Self { text, tenants, names }
    }

    /// A monitor with all machines registered and running, every second one attested.
    pub(crate) fn monitor(&self) -> Result<(Monitor, Vec<SubjectId>), Box<dyn std::error::Error>> {
        let monitor = Monitor::new(Policy::parse(&self.text)?);
        let mut subjects = Vec::new();
        for at in 0..self.tenants * ROLES {
            let id =
                monitor.register(SubjectSpec::vm(Uuid::from_u128(1 + at as u128)).attested(at % 2 == 0))?;
            monitor.set_lifecycle(id, Lifecycle::Running)?;
            subjects.push(id);
        }
        Ok((monitor, subjects))
    }

    /// What is asked for, as numbers of machines: most of it within a tenant.
    pub(crate) fn request(&self, rng: &mut fastrand::Rng) -> Asked<'_> {
        let tenant = rng.usize(..self.tenants);
        let other = if rng.u8(0..4) == 0 { rng.usize(..self.tenants) } else { tenant };
        let asker = tenant * ROLES + rng.usize(..ROLES);
        let peer = other * ROLES + rng.usize(..ROLES);
        let name = &self.names[rng.usize(..self.names.len())];
        let (peer, action, object) = match rng.u8(0..4) {
            0 => (Some(peer), Action::Connect, Object::vsock(rng.u32(0..65_536))),
            1 => (Some(peer), Action::Connect, Object::tcp(rng.u16(..))),
            2 => (Some(peer), Action::MapRo, Object::region(name)),
            _ => (None, Action::Attach, Object::disk(name)),
        };
        Asked { asker, peer, action, object }
    }
}

/// A request between machines by their numbers.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'w> {
    /// Who.
    pub(crate) asker: usize,
    /// Of whom.
    pub(crate) peer: Option<usize>,
    /// What.
    pub(crate) action: Action,
    /// With what.
    pub(crate) object: Object<'w>,
}

impl<'w> Asked<'w> {
    /// For a monitor.
    pub(crate) fn of(&self, subjects: &[SubjectId]) -> Request<'w> {
        let mut request = Request::new(subjects[self.asker], self.action, self.object);
        request.peer = self.peer.map(|peer| subjects[peer]);
        request
    }
}

//! The gate, and how what it has let through is closed again.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use vmm_devices::channel::{ClosedChannel, Gate, Gatekeeper, GrantId, Party, Refusal, Request, VmIdentity};
use vmm_memory::Access;
use vmm_policy::{
    Action, Hold, Honours, Monitor, MonitorError, Object, Policy, Revocation, SubjectId, SubjectSpec, Uuid,
};

use super::flows::PolicyFlows;
use super::words;

/// A policy that devices ask, and that closes what they have opened. Clones are the same one.
#[derive(Clone)]
pub struct Enforcement {
    gate: Arc<PolicyGate>,
    gatekeeper: Gatekeeper,
}

/// What a change has closed.
#[derive(Debug)]
#[non_exhaustive]
pub struct Cut {
    /// Channels of devices, why, and how long that took.
    pub closed: Vec<ClosedChannel>,
    /// What the monitor says of them, and of what is open beside them, as disks are.
    pub revoked: Vec<Revocation>,
}

/// What the gate knows of who asks, and keeps of what is open.
pub(super) struct PolicyGate {
    pub(super) monitor: Monitor,
    parties: RwLock<HashMap<Party, SubjectId>>,
    held: Mutex<HashMap<GrantId, Held>>,
    /// Bytes of regions, for limits.
    sizes: RwLock<HashMap<Arc<str>, u64>>,
    addresses: RwLock<Addresses>,
    /// How often something was changed beside the policy.
    changes: AtomicU64,
}

#[derive(Default)]
struct Addresses {
    owners: HashMap<IpAddr, SubjectId>,
    /// Who has some of IPv4, and of IPv6.
    bound: HashSet<(SubjectId, bool)>,
}

/// The policy's right to a device's channel.
struct Held {
    hold: Hold,
    asker: SubjectId,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Enforcement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Enforcement").field("monitor", &self.gate.monitor).finish_non_exhaustive()
    }
}

impl Enforcement {
    /// With the policy that is in force at `monitor`, and nobody there.
    pub fn new(monitor: Monitor) -> Self {
        Self::behind(monitor, |gate| gate)
    }

    /// The same behind a gate that is asked first and asks this one, as one does that writes down what opens.
    pub fn behind<G: Gate + 'static>(monitor: Monitor, first: impl FnOnce(Arc<dyn Gate>) -> G) -> Self {
        let gate = Arc::new(PolicyGate {
            monitor,
            parties: RwLock::default(),
            held: Mutex::default(),
            sizes: RwLock::default(),
            addresses: RwLock::default(),
            changes: AtomicU64::new(0),
        });
        let gatekeeper = Gatekeeper::new(first(Arc::clone(&gate) as Arc<dyn Gate>));
        Self { gate, gatekeeper }
    }

    /// Whom devices ask.
    #[must_use]
    pub fn gatekeeper(&self) -> Gatekeeper {
        self.gatekeeper.clone()
    }

    /// Who decides. What is changed there without [`reload`](Self::reload) or [`change`](Self::change) closes no channel of a device.
    #[must_use]
    pub fn monitor(&self) -> &Monitor {
        &self.gate.monitor
    }

    /// The policy for the flows of a switch.
    #[must_use]
    pub fn flows(&self) -> PolicyFlows {
        PolicyFlows::new(Arc::clone(&self.gate))
    }

    /// Lets a life of a virtual machine that the policy declares take part.
    ///
    /// # Errors
    /// As [`Monitor::register`].
    pub fn register(&self, vm: VmIdentity) -> Result<SubjectId, MonitorError> {
        self.register_as(vm, |spec| spec)
    }

    /// The same, with labels, a digest and the like.
    ///
    /// # Errors
    /// As [`Monitor::register`].
    pub fn register_as(
        &self,
        vm: VmIdentity,
        what: impl FnOnce(SubjectSpec) -> SubjectSpec,
    ) -> Result<SubjectId, MonitorError> {
        let spec = SubjectSpec::vm(Uuid::from_u128(vm.uuid())).incarnation(vm.incarnation());
        let id = self.gate.monitor.register(what(spec))?;
        self.gate.parties.write().unwrap_or_else(PoisonError::into_inner).insert(vm.into(), id);
        Ok(id)
    }

    /// Lets a program of the host's take part, by the name that devices call it.
    ///
    /// # Errors
    /// As [`Monitor::register`].
    pub fn register_host(&self, name: &str) -> Result<SubjectId, MonitorError> {
        let id = self.gate.monitor.register(SubjectSpec::host(name))?;
        self.gate
            .parties
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(Party::Host(name.into()), id);
        Ok(id)
    }

    /// Ends somebody's part, and closes what it has and what leads to it.
    ///
    /// # Errors
    /// As [`Monitor::unregister`].
    pub fn unregister(&self, party: impl Into<Party>) -> Result<Cut, MonitorError> {
        let id = self.gate.parties.write().unwrap_or_else(PoisonError::into_inner).remove(&party.into());
        let Some(id) = id else { return Ok(Cut { closed: Vec::new(), revoked: Vec::new() }) };
        let mut addresses = self.gate.addresses.write().unwrap_or_else(PoisonError::into_inner);
        addresses.owners.retain(|_, owner| *owner != id);
        addresses.bound.retain(|(owner, _)| *owner != id);
        drop(addresses);
        self.change(|monitor| monitor.unregister(id))
    }

    /// How large a region is, which limits on pages ask.
    pub fn region_size(&self, name: impl Into<Arc<str>>, bytes: u64) {
        self.gate.sizes.write().unwrap_or_else(PoisonError::into_inner).insert(name.into(), bytes);
    }

    /// An address of a virtual machine's: no other sends from it, and it sends from no other of that version of IP.
    pub fn bind_address(&self, vm: VmIdentity, address: IpAddr) -> bool {
        let Some(id) = self.gate.subject(&vm.into()) else { return false };
        let mut addresses = self.gate.addresses.write().unwrap_or_else(PoisonError::into_inner);
        addresses.owners.insert(address, id);
        addresses.bound.insert((id, address.is_ipv4()));
        drop(addresses);
        // Flows that are open are asked about again.
        self.gate.changes.fetch_add(1, Ordering::AcqRel);
        true
    }

    /// Asks whether something may be plugged while the guest runs: `cpu`, `memory`, `device`. The right is kept for as long as it is there, and counts
    /// for limits (`limit any vm to attach hotplug at 4 open`); [`Hold::on_revoked`] says what to unplug.
    ///
    /// # Errors
    /// If the policy refuses, or nobody such is registered.
    pub fn plug(&self, vm: VmIdentity, what: &str) -> Result<Hold, Refusal> {
        self.hold(vm, Action::Attach, Object::hotplug(what))
    }

    /// Asks whether a virtual machine may have a folder of the host's, for whoever serves it (no device of this workspace does). The right is kept
    /// for as long as it is served; [`Hold::on_revoked`] says when to end that.
    ///
    /// # Errors
    /// As [`plug`](Self::plug).
    pub fn share(&self, vm: VmIdentity, name: &str, access: Access) -> Result<Hold, Refusal> {
        let action = match access {
            Access::ReadOnly => Action::AttachRo,
            Access::ReadWrite => Action::Attach,
        };
        self.hold(vm, action, Object::share(name))
    }

    fn hold(&self, vm: VmIdentity, action: Action, object: Object<'_>) -> Result<Hold, Refusal> {
        let subject = self.gate.known(&vm.into())?;
        let request = vmm_policy::Request::new(subject, action, object);
        let hold = self.gate.monitor.hold(&request, Honours::NONE);
        hold.map_err(|refused| Refusal::new(refused.to_string()))
    }

    /// Puts another policy in force, and closes what it does not allow, before it returns.
    ///
    /// # Errors
    /// As [`Monitor::reload`]; then the one before is in force, and nothing is closed.
    pub fn reload(&self, policy: Policy) -> Result<Cut, MonitorError> {
        self.change(|monitor| monitor.reload(policy).map(|reloaded| reloaded.revoked))
    }

    /// Changes something else on which decisions depend, and closes what lost its right by that.
    ///
    /// # Errors
    /// Those of the change.
    pub fn change(
        &self,
        change: impl FnOnce(&Monitor) -> Result<Vec<Revocation>, MonitorError>,
    ) -> Result<Cut, MonitorError> {
        let revoked = change(&self.gate.monitor)?;
        self.gate.changes.fetch_add(1, Ordering::AcqRel);
        // What is decided meanwhile is decided again by this.
        let closed = self.gatekeeper.reconsider_timed();
        Ok(Cut { closed, revoked })
    }

    /// For the other parts of this module.
    pub(super) fn subject(&self, vm: VmIdentity) -> Option<SubjectId> {
        self.gate.subject(&vm.into())
    }
}

impl PolicyGate {
    /// Who that is, if it is registered: a machine in that life, and a program by the name that it was registered by.
    fn subject(&self, party: &Party) -> Option<SubjectId> {
        self.parties.read().unwrap_or_else(PoisonError::into_inner).get(party).copied()
    }

    fn known(&self, party: &Party) -> Result<SubjectId, Refusal> {
        self.subject(party).ok_or_else(|| Refusal::new(format!("deny (identity): {party} is not registered")))
    }

    /// Who holds a grant.
    pub(super) fn holder(&self, grant: GrantId) -> Option<SubjectId> {
        locked(&self.held).get(&grant).map(|held| held.asker)
    }

    /// Another number when decisions may be others.
    pub(super) fn epoch(&self) -> u64 {
        self.changes.load(Ordering::Acquire).wrapping_add(self.monitor.epoch() << 32)
    }

    pub(super) fn owns(&self, holder: SubjectId, address: IpAddr) -> bool {
        let addresses = self.addresses.read().unwrap_or_else(PoisonError::into_inner);
        match addresses.owners.get(&address) {
            Some(owner) => *owner == holder,
            None => !addresses.bound.contains(&(holder, address.is_ipv4())),
        }
    }

    fn bytes(&self, request: &Request) -> u64 {
        let vmm_devices::channel::Object::Region { name } = request.object() else { return 0 };
        self.sizes.read().unwrap_or_else(PoisonError::into_inner).get(name).copied().unwrap_or(0)
    }

    /// In the policy's words.
    fn ask<R>(
        &self,
        request: &Request,
        ask: impl FnOnce(&vmm_policy::Request<'_>) -> Result<R, Refusal>,
    ) -> Result<R, Refusal> {
        let asker = self.known(request.asker())?;
        let peer = request.peer().map(|peer| self.known(peer)).transpose()?;
        let (action, object) = words::asked(request)
            .ok_or_else(|| Refusal::new(format!("deny (identity): no policy knows {request}")))?;
        let asked = vmm_policy::Request { asker, peer, action, object, bytes: self.bytes(request) };
        ask(&asked)
    }
}

impl Gate for PolicyGate {
    fn decide(&self, id: GrantId, request: &Request) -> Result<(), Refusal> {
        // Asked again about what is open: the right is there, and is revoked if it would not be given now.
        let known = locked(&self.held).get(&id).map(|held| held.hold.is_live());
        match known {
            Some(true) => Ok(()),
            Some(false) => Err(self
                .ask(request, |asked| {
                    let decision = self.monitor.check(asked);
                    if decision.permits() {
                        return Ok(Refusal::new("revoked by hand".to_owned()));
                    }
                    Ok(Refusal::new(self.monitor.refused(decision).to_string()))
                })
                .unwrap_or_else(|refusal| refusal)),
            None => {
                let (asker, hold) = self.ask(request, |asked| {
                    let hold = self.monitor.hold(asked, Honours::NONE);
                    let hold = hold.map_err(|refused| Refusal::new(refused.to_string()))?;
                    Ok((asked.asker, hold))
                })?;
                locked(&self.held).insert(id, Held { hold, asker });
                Ok(())
            }
        }
    }

    fn closed(&self, id: GrantId, _: &Request) {
        // Dropped without the lock: that gives back what limits have counted.
        let held = locked(&self.held).remove(&id);
        drop(held);
    }
}

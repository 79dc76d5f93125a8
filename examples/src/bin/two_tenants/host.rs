//! The host: who is on it, what joins them, and the policy in front of that.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use vmm_audit::Digest;
use vmm_audit::hooks::desk::AuditedDesk;
use vmm_audit::hooks::devices::AuditedGate;
use vmm_audit::hooks::policy::PolicyLog;
use vmm_audit::verb::Begun;
use vmm_cpu::Hypervisor;
use vmm_devices::channel::{Gatekeeper, NetworkAttach, Refusal, RegionMap, VmIdentity, VsockListen};
use vmm_devices::ivshmem::{Hub, Region};
use vmm_devices::net::MacAddr;
use vmm_devices::net::switch::flows::FlowTable;
use vmm_devices::net::switch::{PortConfig, Switch};
use vmm_devices::virtio::{Net, Vsock, vsock};
use vmm_examples::policy::{Enforcement, PolicyFlows};
use vmm_examples::virtio::{Transport, VirtioDevices};
use vmm_memory::{Access, SharedMemory};
use vmm_policy::{Monitor, Policy};

use crate::guest::Image;
use crate::log::Log;
use crate::machine::{Machine, Recipe};
use crate::operators::{Deed, MANAGERS};
use crate::trail::{Both, Trail};

/// The port of the databases.
pub(crate) const DATABASE: u32 = 5432;

/// Bytes of the memory that a database publishes.
const REGION: u64 = 1 << 20;

/// How long a guest may take to answer a connection: on a translator that has little of the processor it answers late.
const PATIENCE: Duration = Duration::from_secs(30);

/// One of the machines, as the host is told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Role {
    pub(crate) name: &'static str,
    /// The last byte of its UUID, of its MAC and IP address; its context identifier.
    pub(crate) number: u8,
    /// Memory that it sees, and whether it writes there.
    region: Option<(&'static str, Access)>,
    /// Whether it has a port of a database's.
    listens: bool,
}

const fn role(name: &'static str, number: u8, region: Option<(&'static str, Access)>, listens: bool) -> Role {
    Role { name, number, region, listens }
}

pub(crate) const ROLES: [Role; 5] = [
    role("web-red", 0xa1, Some(("frames-red", Access::ReadOnly)), false),
    role("db-red", 0xa2, Some(("frames-red", Access::ReadWrite)), true),
    role("web-blue", 0xb1, Some(("frames-blue", Access::ReadOnly)), false),
    role("db-blue", 0xb2, Some(("frames-blue", Access::ReadWrite)), true),
    role("gateway", 0xc1, None, false),
];

impl Role {
    pub(crate) fn of(name: &str) -> Result<Self> {
        ROLES.into_iter().find(|role| role.name == name).with_context(|| format!("who is {name}?"))
    }

    pub(crate) fn identity(self) -> VmIdentity {
        VmIdentity::new(self.number.into(), 1)
    }

    pub(crate) fn cid(self) -> u32 {
        self.number.into()
    }

    fn mac(self) -> MacAddr {
        MacAddr([2, 0, 0, 0, 0, self.number])
    }

    fn address_bytes(self) -> [u8; 4] {
        [10, 9, 0, self.number]
    }

    pub(crate) fn address(self) -> String {
        std::net::Ipv4Addr::from(self.address_bytes()).to_string()
    }

    /// What its guest does before it listens: its address, and those of all others, so that what it sends comes as far as the switch.
    fn setup(self) -> String {
        let others = ROLES.iter().filter(|other| other.number != self.number && other.name != "gateway");
        let known = others.map(|other| format!("arp -s {} {};", other.address(), other.mac()));
        let own = self.address();
        format!(
            "ip link set lo up; ip addr add {own}/24 dev eth0; ip link set eth0 up; {}",
            known.collect::<String>()
        )
    }
}

/// What joins the machines.
pub(crate) struct Host {
    pub(crate) enforcement: Enforcement,
    pub(crate) trail: Trail,
    told: PolicyLog,
    /// Where those ask who manage it.
    pub(crate) desk: AuditedDesk,
    pub(crate) table: Arc<FlowTable<PolicyFlows>>,
    network: Switch,
    vsock: vsock::Switch,
    regions: BTreeMap<&'static str, Hub>,
}

impl Host {
    pub(crate) fn new(policy: Policy, log: &Log) -> Result<Self> {
        let trail = Trail::default();
        let told = PolicyLog::new(log.policy(), &policy);
        let observer = Both(trail.clone(), told.clone());
        let monitor = Monitor::builder(policy).observer(observer).build();
        // What cannot be written down does not open.
        let enforcement =
            Enforcement::behind(monitor, |gate| AuditedGate::new(gate, log.gate()).without_verdicts());
        for name in MANAGERS {
            enforcement.register_host(name)?;
        }
        let desk = AuditedDesk::new(enforcement.monitor(), &told);
        let start = Instant::now();
        let clock = move || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let network = Switch::builder("lan", clock).build();
        let table = Arc::new(FlowTable::builder(enforcement.flows()).build());
        let judge = Arc::clone(&table);
        network.set_judge(Some(judge));
        let mut regions = BTreeMap::new();
        for name in ["frames-red", "frames-blue"] {
            enforcement.region_size(name, REGION);
            let memory = SharedMemory::create(name, REGION)?;
            regions.insert(name, Hub::new(Region::new(name, memory)?, 1)?);
        }
        Ok(Self { enforcement, trail, told, desk, table, network, vsock: vsock::Switch::new(), regions })
    }

    fn gatekeeper(&self) -> Gatekeeper {
        self.enforcement.gatekeeper()
    }

    /// Asks for memory, as the machine's monitor does for its device.
    pub(crate) fn ask_for_region(&self, role: Role, name: &str, access: Access) -> Result<(), Refusal> {
        let map = RegionMap { region: name.into(), access };
        self.gatekeeper().open(role.identity().into(), None, map).map(drop)
    }

    /// A machine with devices that have taken their rights, and the digest of its launch, which the policy learns with who it is. An operator
    /// has it launched, which has ended when its guest answers.
    pub(crate) fn machine(
        &self,
        hypervisor: &dyn Hypervisor,
        image: &Image,
        role: Role,
        log: &Log,
    ) -> Result<(Machine, Digest, Begun)> {
        let (gatekeeper, enforcement, vm) = (self.gatekeeper(), &self.enforcement, role.identity());
        let recipe = Recipe::new(hypervisor, image, &role.setup())?;
        let launch = recipe.launch(hypervisor, &enforcement.monitor().policy())?;
        let log = log.machine(role)?;
        // Whom a verb is about has to be known to the policy.
        enforcement.register_as(vm, |spec| spec.digest(launch.digest().as_bytes()))?;
        self.told.learn(enforcement.monitor());
        let launching = Deed::new("alice", "launch", role.name).granted(self)?.begin()?;
        log.launch(&launch)?;
        enforcement.bind_address(vm, role.address_bytes().into());
        let mut devices = VirtioDevices::new(Transport::Pci, false)?.on_failure(log.on_failure());

        let right = gatekeeper.open(vm.into(), None, NetworkAttach { network: "lan".into() })?;
        let port = self.network.attach(right, PortConfig::new(role.name).mac(role.mac()))?;
        devices =
            devices.device("network", "virtio_net", Net::builder(Arc::new(port), role.mac()).build()?)?;

        let seat = if role.listens {
            let right = gatekeeper.open(vm.into(), None, VsockListen { port: DATABASE })?;
            self.vsock.join(role.cid(), right)?
        } else {
            self.vsock.join_to_connect(role.cid(), vm)?
        };
        let vsock =
            Vsock::builder(role.cid(), devices.clock()).gatekeeper(vm, gatekeeper.clone()).switch(seat);
        let vsock = vsock.connect_timeout(PATIENCE).build()?;
        devices = devices.device("sockets", "vmw_vsock_virtio_transport", vsock)?;

        if let Some((name, access)) = role.region {
            let right = gatekeeper.open(vm.into(), None, RegionMap { region: name.into(), access })?;
            let hub = self.regions.get(name).with_context(|| format!("there is no region {name}"))?;
            devices = devices.member(hub.join(right, None)?)?;
        }
        let machine = Machine::new(hypervisor, role.name, &recipe, devices, log)
            .with_context(|| format!("machine {}", role.name))?;
        Ok((machine, launch.digest(), launching))
    }
}

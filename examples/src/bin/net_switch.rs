//! A network for guests of several programs: a switch, and a socket by which `linux --net switch=PATH` gets a port of it.
//!
//! It says who comes and goes, and reads commands from its standard input: `ports`, `macs`, `revoke NAME`, which takes a guest's port
//! away and keeps it from coming back, and `allow NAME`, which lets it come back. SIGTERM and SIGINT end it.
//!
//! Who may connect is, first, whoever the socket's file lets; then those of this program's user; and then, with `--allow`, those
//! named. Before anybody connects, the process gives up all that it does not need (`vmm_examples::confine`).

use std::collections::BTreeSet;
use std::io::{self, BufRead as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vmm_devices::channel::{Gatekeeper, Object, Party, Refusal, Request};
use vmm_devices::net::switch::broker::{Peer, ServerEvent, SwitchServer};
use vmm_devices::net::switch::{
    DropReason, Isolation, PortConfig, PortSnapshot, PortVlans, Switch, VlanId, VlanSet,
};
use vmm_examples::confine::{Confinement, Engine, inherited_descriptors};

/// A network for guests of several programs.
#[derive(Parser)]
struct Options {
    /// Where to listen.
    #[arg(long)]
    socket: PathBuf,
    /// What the network is called.
    #[arg(long, default_value = "lan")]
    network: String,
    /// The VLANs of the guest of that name: one whose frames have no tags, or several whose frames have, of which one may be without.
    /// Others are in VLAN 1. Repeatable.
    #[arg(long, value_name = "NAME=ID|NAME=trunk[:ID...][:native=ID]", value_parser = parse_vlans)]
    vlan: Vec<(String, PortVlans)>,
    /// Keeps the guest of that name from others that are kept so. Repeatable.
    #[arg(long, value_name = "NAME")]
    isolate: Vec<String>,
    /// Lets the guest of that name in, and no others but those named so. Repeatable.
    #[arg(long, value_name = "NAME")]
    allow: Vec<String>,
    /// Largest packet that guests are told, in bytes.
    #[arg(long, value_parser = clap::value_parser!(u16).range(68..))]
    mtu: Option<u16>,
}

fn parse_vlans(text: &str) -> Result<(String, PortVlans)> {
    let (name, vlans) = text.split_once('=').context("NAME= is missing")?;
    let id = |text: &str| -> Result<VlanId> { Ok(VlanId::new(text.parse().context(text.to_owned())?)?) };
    let mut parts = vlans.split(':');
    if parts.next() != Some("trunk") {
        return Ok((name.to_owned(), PortVlans::Access(id(vlans)?)));
    }
    let (mut native, mut allowed) = (None, Vec::new());
    for part in parts {
        match part.strip_prefix("native=") {
            Some(part) => native = Some(id(part)?),
            None => allowed.push(id(part)?),
        }
    }
    let allowed = if allowed.is_empty() { VlanSet::all() } else { allowed.into_iter().collect() };
    Ok((name.to_owned(), PortVlans::Trunk { native, allowed }))
}

/// Who may be there.
#[derive(Default)]
struct Rules {
    /// `None` for all.
    allowed: Option<BTreeSet<String>>,
    revoked: BTreeSet<String>,
}

impl Rules {
    fn decide(&self, request: &Request) -> Result<(), Refusal> {
        let (Party::Host(name), Object::Network { .. }) = (request.asker(), request.object()) else {
            return Err(Refusal::new("it is no guest that wants to be on a network"));
        };
        if self.revoked.contains(&**name) {
            return Err(Refusal::new(format!("{name} was sent away")));
        }
        match &self.allowed {
            Some(allowed) if !allowed.contains(&**name) => {
                Err(Refusal::new(format!("{name} is not on the list")))
            }
            _ => Ok(()),
        }
    }
}

fn main() -> ExitCode {
    match run(Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("net_switch: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> Result<()> {
    let inherited = inherited_descriptors()?;
    let start = Instant::now();
    let clock = move || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let mut switch = Switch::builder(options.network, clock);
    if let Some(mtu) = options.mtu {
        switch = switch.mtu(mtu);
    }
    let switch = switch.build();
    let allowed = (!options.allow.is_empty()).then(|| options.allow.into_iter().collect());
    let rules = Arc::new(Mutex::new(Rules { allowed, ..Rules::default() }));
    let of_gate = Arc::clone(&rules);
    let gatekeeper = Gatekeeper::new(move |request: &Request| {
        of_gate.lock().unwrap_or_else(PoisonError::into_inner).decide(request)
    });
    let (vlans, isolate) = (options.vlan, options.isolate);
    let configure = move |peer: &Peer| {
        let mut config = PortConfig::new(Arc::clone(&peer.name));
        if let Some(mac) = peer.mac {
            config = config.mac(mac);
        }
        if let Some((_, vlans)) = vlans.iter().find(|(name, _)| **name == *peer.name) {
            config = config.vlans(vlans.clone());
        }
        if isolate.iter().any(|name| **name == *peer.name) {
            config = config.isolation(Isolation::Isolated);
        }
        Ok(config)
    };
    let server = SwitchServer::builder(switch.clone(), gatekeeper.clone());
    let mut server = server.configure(configure).events(tell).listen(&options.socket)?;

    let stopper = server.stopper();
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if signals.forever().next().is_some() {
            stopper.stop();
        }
    })?;
    std::thread::Builder::new().name("commands".to_owned()).spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if let Err(error) = obey(&line, &switch, &gatekeeper, &rules) {
                say(&format!("{error:#}"));
            }
        }
    })?;
    confine(&inherited)?;
    say(&format!("listening at {}", options.socket.display()));
    server.run()?;
    Ok(())
}

/// Clients, and the memory that they bring.
fn confine(inherited: &[i32]) -> Result<()> {
    let mut confinement = Confinement::new(Engine::Interpreter).deny_descriptors(inherited);
    for call in [
        libc::SYS_accept4,
        libc::SYS_getsockopt,
        libc::SYS_fstatfs,
        libc::SYS_geteuid,
        libc::SYS_getuid,
        libc::SYS_shutdown,
    ] {
        confinement = confinement.allow(call);
    }
    for control in [libc::F_GET_SEALS, libc::F_GETFL, libc::F_DUPFD_CLOEXEC] {
        confinement = confinement.allow_if(libc::SYS_fcntl, 1, u64::try_from(control)?);
    }
    // What is mapped is never executable.
    let protection = u64::try_from(libc::PROT_READ | libc::PROT_WRITE)?;
    confinement.allow_if(libc::SYS_mmap, 2, protection).enter()
}

/// A line for whoever started this, who may not be there to read it.
fn say(line: &str) {
    let mut output = io::stdout().lock();
    drop(writeln!(output, "{line}").and_then(|()| output.flush()));
}

fn tell(event: ServerEvent) {
    let name_of = |peer: &Peer| format!("{} (process {}, user {})", peer.name, peer.pid, peer.uid);
    match event {
        ServerEvent::Attached { peer, port } => {
            let mac = peer.mac.map_or_else(|| "no address".to_owned(), |mac| mac.to_string());
            say(&format!("attached {} with {mac} as port {}", name_of(&peer), port.get()));
        }
        ServerEvent::Refused { peer, reason } => {
            let who = peer.as_ref().map_or_else(|| "somebody".to_owned(), name_of);
            say(&format!("refused {who}: {reason}"));
        }
        ServerEvent::Left { peer, reason, metrics } => {
            say(&format!("left {}: {reason}; {}", name_of(&peer), figures(&metrics)));
        }
        _ => {}
    }
}

fn figures(metrics: &PortSnapshot) -> String {
    let PortSnapshot { from_device, to_device, .. } = metrics;
    let mut text = format!(
        "sent {} frames of {} bytes, received {} of {}",
        from_device.frames, from_device.bytes, to_device.frames, to_device.bytes
    );
    for reason in DropReason::ALL {
        let count = metrics.dropped(*reason);
        if count > 0 {
            text.push_str(&format!(", dropped {count} ({})", reason.name()));
        }
    }
    text
}

fn obey(line: &str, switch: &Switch, gatekeeper: &Gatekeeper, rules: &Mutex<Rules>) -> Result<()> {
    let rules = || rules.lock().unwrap_or_else(PoisonError::into_inner);
    match line.split_once(' ').map_or((line, ""), |(verb, name)| (verb, name.trim())) {
        ("ports", "") => {
            for port in switch.ports() {
                say(&format!("port {} {}: {}", port.port.id.get(), port.port.name, figures(&port.metrics)));
            }
        }
        ("macs", "") => {
            for entry in switch.macs() {
                say(&format!("mac {} VLAN {} port {}", entry.mac, entry.vlan, entry.port.get()));
            }
        }
        ("revoke", name) if !name.is_empty() => {
            rules().revoked.insert(name.to_owned());
            // The rules are not held here: they are asked.
            let count = gatekeeper.reconsider().len();
            say(&format!("revoked {count} of {name}"));
        }
        ("allow", name) if !name.is_empty() => {
            rules().revoked.remove(name);
            say(&format!("allowed {name}"));
        }
        ("", "") => {}
        _ => bail!("{line:?} is none of ports, macs, revoke NAME and allow NAME"),
    }
    Ok(())
}

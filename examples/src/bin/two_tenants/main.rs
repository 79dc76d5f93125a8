//! Two tenants on one host, with a web server and a database each, and a gateway that both use: five virtual machines of this process with
//! Debian's kernel, and a policy that says who may talk to whom.
//!
//! Guests try what is allowed and what is not, and the program shows, for each attempt, what the guest says of it, what the policy said and by
//! which rule. Then the web server of one tenant has been broken into: another policy is put in force while all of them run, and its open connection
//! and its mapped memory are gone, which it says itself; nobody else notices. That no way leads from one tenant to the other, by however many steps,
//! is proven for both policies, and drawn.
//!
//! What operators do to the machines is judged by the same policy: they launch them and put policies in force, and to destroy one takes two of them.
//!
//! All that is decided and done is in an audit log, which a process of its own writes: in the end that verifies it and looks for what was shown.
//!
//! It ends with 0 if all went as the policies say, and the log says so too.

mod attempts;
mod guest;
mod host;
mod log;
mod machine;
mod operators;
mod report;
mod trail;

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use vmm_cpu::translate::TranslateHypervisor;
use vmm_cpu::{Hypervisor, open_backend};
use vmm_examples::confine::{Confinement, Engine, inherited_descriptors};
use vmm_policy::Policy;

use crate::attempts::{HTTPS, Policies, Try, attempt};
use crate::guest::Image;
use crate::host::{DATABASE, Host, ROLES};
use crate::log::Log;
use crate::machine::Machine;
use crate::operators::{Comes, Deed};
use crate::report::Report;

/// Two tenants on one host, a gateway, and a policy.
#[derive(Parser)]
struct Options {
    /// Where the graph and the policies go.
    #[arg(long, value_name = "DIRECTORY", required_unless_present = "write_log")]
    out: Option<PathBuf>,
    /// Where the audit log is kept; otherwise in `audit`, beside the graph. `vmm-audit verify DIRECTORY/log --key DIRECTORY/key.pub`
    /// checks it.
    #[arg(long, value_name = "DIRECTORY")]
    log: Option<PathBuf>,
    /// Is the process that writes that log.
    #[arg(long, value_name = "DIRECTORY", hide = true)]
    write_log: Option<PathBuf>,
    /// What runs the guests: kvm, translate, or auto, which takes hardware assistance where the processor has it.
    #[arg(long, default_value = "auto")]
    backend: String,
}

/// The policies, by the names of their files.
const FILES: [(&str, &str); 3] = [
    ("tenants.policy", include_str!("../../../policies/tenants.policy")),
    ("two-tenants.policy", include_str!("../../../policies/two-tenants.policy")),
    ("two-tenants-lockdown.policy", include_str!("../../../policies/two-tenants-lockdown.policy")),
];

/// How long what is cut may take to be heard of, from inside of a guest that has little of the processor. What the host takes is shown beside it.
const HEARD: Duration = Duration::from_secs(5);

/// How long one waits to see that nothing was cut.
const QUIET: Duration = Duration::from_millis(300);

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("two_tenants: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all went as the policies say.
fn run(options: &Options) -> Result<bool> {
    if let Some(dir) = &options.write_log {
        return log::write(dir).map(|()| true);
    }
    let inherited = inherited_descriptors()?;
    let mut report = Report::new();
    let out = options.out.as_deref().context("--out")?;
    let (open, lockdown) = write_policies(out)?;
    let mut policies = Policies::new(FILES.map(|(name, text)| (name.to_owned(), text.to_owned())).into());
    policies.push(open.clone());
    prove(&mut report, &open)?;
    std::fs::write(out.join("graph.svg"), open.graph()?.to_svg())?;

    let hypervisor = choose(&options.backend)?;
    let image = Image::get()?;
    let log_dir = options.log.clone().unwrap_or_else(|| out.join("audit"));
    let log = Log::start(&log_dir).context("--log")?;
    let host = Host::new(open, &log)?;
    let begun = Instant::now();
    let (mut machines, mut launching) = (BTreeMap::new(), BTreeMap::new());
    for role in ROLES {
        let (machine, launched, begun) = host.machine(&*hypervisor, &image, role, &log)?;
        machines.insert(role.name, machine);
        launching.insert(role.name, begun);
        report.shown.launched.insert(role.name.to_owned(), launched.to_string());
    }
    confine(&*hypervisor, &inherited, &log)?;
    for machine in machines.values() {
        machine.start();
    }
    for machine in machines.values_mut() {
        machine.answer().context("the boot")?.map_err(anyhow::Error::msg)?;
    }
    report.booted(hypervisor.name(), begun.elapsed());
    report.title_of_verbs("What operators do, and others would like to");
    for (name, begun) in launching {
        begun.done();
        report.row(&Deed::new("alice", "launch", name).row(&host, &policies, Comes::Done)?);
    }
    for (who, verb, of) in NOT_THEIRS {
        report.row(&Deed { who, verb, of: *of }.refused(&host, &policies)?);
    }

    serve(&mut machines)?;
    report.title("Attempts, each from inside a guest");
    for (who, tries, allowed) in ATTEMPTS {
        report.row(&attempt(&host, &policies, &mut machines, who, *tries, *allowed)?);
    }
    cut(&mut report, &host, &mut policies, &mut machines, lockdown)?;
    report.title("After the lockdown");
    for (who, tries, allowed) in AFTER {
        report.row(&attempt(&host, &policies, &mut machines, who, *tries, *allowed)?);
    }
    destroy(&mut report, &host, &policies, machines)?;
    report.counts(host.trail.counts(), host.table.totals());
    drop(host);
    report.log(&log.end(&report.shown).context("--log")?, &log_dir);
    report.end(out);
    Ok(report.is_good())
}

/// Writes the policies where the user finds them, and reads them there.
fn write_policies(directory: &Path) -> Result<(Policy, Policy)> {
    std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    for (name, text) in FILES {
        std::fs::write(directory.join(name), text)?;
    }
    let read = |name| Policy::from_file(&directory.join(name));
    Ok((read("two-tenants.policy")?, read("two-tenants-lockdown.policy")?))
}

/// That no way leads from one tenant to the other.
fn prove(report: &mut Report, policy: &Policy) -> Result<()> {
    for (from, to) in ["web", "db"]
        .iter()
        .flat_map(|from| ["web", "db"].map(|to| (format!("{from}-red"), format!("{to}-blue"))))
    {
        for (from, to) in [(&from, &to), (&to, &from)] {
            report.proof(from, to, policy.prove_no_path(from, to)?.as_ref());
        }
    }
    // A proof that finds nothing anywhere proves nothing.
    report.witness("db-red", "gateway", policy.prove_no_path("db-red", "gateway")?.as_ref());
    Ok(())
}

/// The fastest backend that is there.
fn choose(name: &str) -> Result<Box<dyn Hypervisor>> {
    match name {
        "auto" => Ok(match open_backend("kvm") {
            Ok(kvm) if kvm.capabilities().hardware_assisted == Some(true) => kvm,
            _ => Box::new(TranslateHypervisor::default()),
        }),
        name => Ok(open_backend(name)?),
    }
}

/// Gives up what is not needed from here on, so that a guest which breaks out has no more of the host than this. The tenants are not kept apart by that: for
/// hosts that run guests of people who do not trust each other, each machine is a process (`linux`, with the programs `net_switch`,
/// `vsock_switch` and `ivshmem_server` between, whose gates are of the same kind).
fn confine(hypervisor: &dyn Hypervisor, inherited: &[RawFd], log: &Log) -> Result<()> {
    let engine = if hypervisor.name() == "kvm" { Engine::Kvm } else { Engine::Interpreter };
    let mut confinement = Confinement::new(engine).deny_descriptors(inherited).allow_duplicates();
    confinement = log.confinement(confinement);
    // A connection between two guests is a pair of sockets.
    confinement = confinement.allow_if(libc::SYS_socketpair, 0, u64::try_from(libc::AF_UNIX)?);
    for call in [
        libc::SYS_epoll_create1,
        libc::SYS_getsockopt,
        libc::SYS_sendmsg,
        libc::SYS_setsockopt,
        libc::SYS_shutdown,
    ] {
        confinement = confinement.allow(call);
    }
    confinement.enter()
}

/// Has everybody offer what there is to be reached, whether the policy lets it be or not: what is refused is not refused for want of somebody.
fn serve(machines: &mut BTreeMap<&'static str, Machine>) -> Result<()> {
    for machine in machines.values_mut() {
        machine.must(&format!("listen {DATABASE}"))?;
        machine.must(&format!("serve {HTTPS}"))?;
        if let Some(tenant) = machine.name.strip_prefix("db-") {
            machine.must(&format!("publish {tenant}"))?;
        }
    }
    Ok(())
}

/// Puts the lockdown in force while guests run, and hears from them what that cuts.
fn cut(
    report: &mut Report,
    host: &Host,
    policies: &mut Policies,
    machines: &mut BTreeMap<&'static str, Machine>,
    lockdown: Policy,
) -> Result<()> {
    report.title("Another policy, while guests run");
    for who in ["web-red", "web-blue"] {
        let to = if who == "web-red" { "db-red" } else { "db-blue" };
        report.row(&attempt(host, policies, machines, who, Try::Hold { to }, true)?);
        machines.get_mut(who).context(who)?.must("watch")?;
    }
    prove(report, &lockdown)?;
    policies.push(lockdown.clone());
    let deed = Deed::of_host("alice", "reload");
    let (cut, begun, took) = deed.granted(host)?.carry_out(|| {
        let begun = Instant::now();
        let cut = host.enforcement.reload(lockdown)?;
        anyhow::Ok((cut, begun, begun.elapsed()))
    })?;
    report.row(&deed.row(host, policies, Comes::Done)?);
    report.cut(&cut, took);
    let red = machines.get_mut("web-red").context("web-red")?;
    let mut heard = Vec::new();
    while heard.len() < 2 {
        let Some((when, line)) = red.event(HEARD)? else { break };
        report.heard("web-red", &line, when.saturating_duration_since(begun));
        heard.push(line);
    }
    heard.sort();
    let is_ended = |line: &String| *line == "! vsock ended, sending: Err(BrokenPipe)";
    report.check("web-red hears that its connection is no more", heard.iter().any(is_ended));
    report
        .check("web-red sees that its memory is gone", heard.iter().any(|line| line == "! region all ones"));

    let blue = machines.get_mut("web-blue").context("web-blue")?;
    blue.must("held")?;
    let event = blue.event(HEARD)?.map(|(_, line)| line);
    report.check("the other tenant's connection goes on", event.as_deref() == Some("! vsock heard"));
    let event = blue.event(QUIET)?;
    report.check("and its memory is there", event.is_none() && blue.must("region")? == "blue");
    Ok(())
}

/// Ends the machines, as operators want it: two of them, for each.
fn destroy(
    report: &mut Report,
    host: &Host,
    policies: &Policies,
    mut machines: BTreeMap<&'static str, Machine>,
) -> Result<()> {
    report.title_of_verbs("The end of the machines, which takes two");
    for role in ROLES {
        let (mut deed, mut second) = (Deed::new("alice", "destroy", role.name), "bob");
        let (mut ticket, row) = deed.waits(host, policies)?;
        report.row(&row);
        match role.name {
            "web-red" => {
                for who in ["alice", "rita"] {
                    report.row(&deed.not_confirmed(host, ticket, who));
                }
            }
            "gateway" => {
                report.row(&deed.declined(host, ticket, second));
                report.row(&deed.not_confirmed(host, ticket, second));
                (deed, second) = (Deed { who: second, ..deed }, deed.who);
                let (again, row) = deed.waits(host, policies)?;
                report.row(&row);
                ticket = again;
            }
            _ => {}
        }
        let machine = machines.remove(role.name).context(role.name)?;
        deed.confirmed(host, ticket, second)?.carry_out(|| {
            machine.stop();
            anyhow::Ok(())
        })?;
        report.row(&deed.done_by(host, policies, second)?);
        host.enforcement.unregister(role.identity())?;
    }
    // What is gone is nobody any more.
    report.row(&Deed::new("alice", "destroy", "web-red").refused(host, policies)?);
    Ok(())
}

/// Who tries to manage what is not his to manage.
const NOT_THEIRS: &[(&str, &str, Option<&str>)] = &[
    ("mallory", "destroy", Some("web-red")),
    ("rita", "destroy", Some("web-red")),
    ("rita", "launch", Some("db-blue")),
    ("rita", "reload", None),
];

const fn vsock(to: &'static str) -> Try {
    Try::Vsock { to, port: DATABASE }
}

const fn tcp(to: &'static str) -> Try {
    Try::Tcp { to, port: HTTPS }
}

/// Who tries what, and whether it is allowed.
const ATTEMPTS: &[(&str, Try, bool)] = &[
    ("web-red", vsock("db-red"), true),
    ("web-blue", vsock("db-blue"), true),
    ("web-red", tcp("gateway"), true),
    ("db-red", tcp("gateway"), true),
    ("web-blue", tcp("gateway"), true),
    ("db-blue", tcp("gateway"), true),
    ("web-red", Try::Read { region: "frames-red", says: "red" }, true),
    ("web-blue", Try::Read { region: "frames-blue", says: "blue" }, true),
    // Across tenants.
    ("web-red", vsock("db-blue"), false),
    ("web-blue", vsock("db-red"), false),
    ("db-red", vsock("db-blue"), false),
    ("web-red", tcp("web-blue"), false),
    ("web-blue", tcp("db-red"), false),
    ("db-blue", Try::Ping { to: "db-red" }, false),
    ("web-red", Try::Region { region: "frames-blue" }, false),
    ("web-blue", Try::Region { region: "frames-red" }, false),
    // Within a tenant and to the gateway, what no rule is about.
    ("web-red", Try::Write { region: "frames-red" }, false),
    ("web-red", Try::Vsock { to: "db-red", port: 22 }, false),
    ("db-red", vsock("web-red"), false),
    ("web-red", tcp("db-red"), false),
    ("web-red", Try::Tcp { to: "gateway", port: 22 }, false),
    ("gateway", tcp("web-red"), false),
    ("gateway", vsock("db-blue"), false),
];

/// The same for the policy of the lockdown.
const AFTER: &[(&str, Try, bool)] = &[
    ("web-red", vsock("db-red"), false),
    ("web-red", tcp("gateway"), true),
    ("web-blue", vsock("db-blue"), true),
    ("web-blue", Try::Read { region: "frames-blue", says: "blue" }, true),
    ("web-blue", vsock("db-red"), false),
];

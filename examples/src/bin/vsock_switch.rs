//! Joins the guests of several `linux --vsock CID,PATH,switch=BROKER` by their context identifiers.
//!
//! It is not in the way of what they say to each other: it introduces them, and cuts what its gate takes back. Here the gate lets
//! all connect to all, or, with `--allow`, those alone that are named. `RUST_LOG=info` shows what opens and closes.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context as _, Result};
use clap::Parser;
use vmm_devices::channel::{Action, Gate, Gatekeeper, GrantId, Party, Refusal, Request};
use vmm_devices::virtio::vsock::Broker;

/// Joins guests by their context identifiers.
#[derive(Parser)]
struct Options {
    /// Where monitors find it. It listens there alone, for its own user.
    broker: PathBuf,
    /// Lets guest FROM connect to PORT of guest TO, and all that is not named no more. Repeatable.
    #[arg(long, value_name = "FROM,TO,PORT")]
    allow: Vec<Rule>,
}

/// Who may connect to what of whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    from: u32,
    to: u32,
    port: u32,
}

impl FromStr for Rule {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let numbers: Option<Vec<u32>> = text.split(',').map(|word| word.parse().ok()).collect();
        match numbers.as_deref() {
            Some([from, to, port]) => Ok(Self { from: *from, to: *to, port: *port }),
            _ => anyhow::bail!("{text:?} is not FROM,TO,PORT"),
        }
    }
}

/// Guests are called by their context identifiers.
struct Rules(Vec<Rule>);

impl Gate for Rules {
    fn decide(&self, id: GrantId, request: &Request) -> Result<(), Refusal> {
        let named = self.0.iter().any(|rule| {
            request.asker() == &guest(request.asker(), rule.from)
                && request.peer().is_some_and(|peer| peer == &guest(peer, rule.to))
                && request.object().port() == Some(rule.port)
        });
        let allowed = self.0.is_empty() || request.action() != Action::Connect || named;
        tracing::info!(%id, %request, allowed, "asked");
        if allowed { Ok(()) } else { Err(Refusal::new("no rule names it")) }
    }

    fn closed(&self, id: GrantId, request: &Request) {
        tracing::info!(%id, %request, "closed");
    }
}

/// The guest with that identifier, in the life that `party` has.
fn guest(party: &Party, cid: u32) -> Party {
    let life = if let Party::Vm(vm) = party { vm.incarnation() } else { 0 };
    vmm_devices::channel::VmIdentity::new(cid.into(), life).into()
}

fn main() -> Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let options = Options::parse();
    let broker = Broker::listen(&options.broker, Gatekeeper::new(Rules(options.allow)))?;
    // A rule names an identifier, so nobody is at another than its own.
    let broker = broker.identify(|_, cid, claimed| (claimed.uuid() == cid.into()).then_some(claimed));
    let stop = broker.handle();
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGINT, libc::SIGTERM])?;
    let wait = move || {
        signals.forever().next();
        stop.stop();
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(wait).context("a thread")?;
    broker.run();
    Ok(())
}

//! What the program prints, and whether all of it is as it is to be.

use std::path::Path;
use std::time::{Duration, Instant};

use vmm_devices::channel::{Object, Party};
use vmm_devices::net::switch::flows::FlowTotals;
use vmm_examples::policy::Cut;
use vmm_policy::Path as Way;

use crate::attempts::Row;
use crate::host::ROLES;
use crate::log::{Checks, Shown, Taken};
use crate::trail::Counts;

/// What the policy calls it.
fn name(party: &Party) -> String {
    let role = ROLES.into_iter().find(|role| Party::Vm(role.identity()) == *party);
    role.map_or_else(|| party.to_string(), |role| role.name.to_owned())
}

/// In the policy's words.
fn object(object: &Object) -> String {
    match object {
        Object::Vsock { port } => format!("vsock {port}"),
        other => other.to_string(),
    }
}

pub(crate) struct Report {
    /// What the audit log has to have.
    pub(crate) shown: Shown,
    begun: Instant,
    checks: u32,
    failed: u32,
}

impl Report {
    pub(crate) fn new() -> Self {
        Self { shown: Shown::default(), begun: Instant::now(), checks: 0, failed: 0 }
    }

    /// Whether everything went as it was to go.
    pub(crate) fn is_good(&self) -> bool {
        self.failed == 0 && self.checks > 0
    }

    fn note(&mut self, good: bool) -> &'static str {
        self.checks += 1;
        if good {
            "ok"
        } else {
            self.failed += 1;
            "WRONG"
        }
    }

    pub(crate) fn title(&self, title: &str) {
        println!("\n{title}");
        Self::columns("guest says");
    }

    /// The same for what operators do.
    pub(crate) fn title_of_verbs(&self, title: &str) {
        println!("\n{title}");
        Self::columns("comes of it");
    }

    fn columns(third: &str) {
        println!("  {:<5}  {:<9} {:<41} {third:<19} {:<16} by", "", "who", "tries to", "policy says");
    }

    pub(crate) fn row(&mut self, row: &Row) {
        let Row { who, what, guest, verdict, rule, good, said, done, rejected } = row;
        self.shown.said.extend(said.clone());
        self.shown.done.extend(done.clone());
        self.shown.rejected.extend(rejected.clone());
        let mark = self.note(*good);
        println!("  {mark:<5}  {who:<9} {what:<41} {guest:<19} {verdict:<16} {rule}");
    }

    pub(crate) fn check(&mut self, what: &str, good: bool) {
        let mark = self.note(good);
        println!("  {mark:<5}  {what}");
    }

    pub(crate) fn proof(&mut self, from: &str, to: &str, way: Option<&Way>) {
        let mark = self.note(way.is_none());
        match way {
            None => println!("  {mark:<5}  proven: no path from {from} to {to}"),
            Some(way) => println!("  {mark:<5}  from {from} to {to} there is a path: {way}"),
        }
    }

    pub(crate) fn witness(&mut self, from: &str, to: &str, way: Option<&Way>) {
        let mark = self.note(way.is_some());
        match way {
            None => println!("  {mark:<5}  no path from {from} to {to}, where there is to be one"),
            Some(way) => println!("  {mark:<5}  and from {from} to {to} there is one: {way}"),
        }
    }

    pub(crate) fn booted(&self, backend: &str, took: Duration) {
        println!(
            "\nfive guests with Debian's kernel have booted on {backend} in {:.1} s",
            took.as_secs_f64()
        );
    }

    pub(crate) fn cut(&mut self, cut: &Cut, took: Duration) {
        println!(
            "  the policy of the lockdown is in force after {:.3} ms; closed are",
            took.as_secs_f64() * 1e3
        );
        for closed in &cut.closed {
            let micros = closed.took.as_secs_f64() * 1e6;
            let request = &closed.channel.request;
            let (who, what) = (name(request.asker()), request.object());
            let of = request.peer().map_or_else(String::new, |peer| format!(" of {}", name(peer)));
            let why = closed.why.reason();
            println!("         {who}: {} {what}{of}, in {micros:.0} us: {why}", request.action());
            let (peer, object) = (request.peer().map(name), object(what));
            self.shown.taken.push(Taken { who, peer, object, why: why.to_owned() });
        }
        self.check("two channels are closed, and no others", cut.closed.len() == 2);
    }

    pub(crate) fn heard(&self, who: &str, line: &str, after: Duration) {
        let line = line.trim_start_matches("! ");
        println!("         {who} says {:.1} ms after that began: {line}", after.as_secs_f64() * 1e3);
    }

    pub(crate) fn counts(&mut self, counts: Counts, flows: FlowTotals) {
        let Counts { allowed, asked, refused } = counts;
        self.shown.counts = [allowed, asked, refused].map(|count| count as u64);
        println!(
            "\nthe policy was asked {} times: {allowed} allowed, {asked} for a second person, {refused} refused",
            allowed + asked + refused
        );
        println!(
            "the switch dropped {} frames that belonged to nothing, {} that were unclear, {} from others' addresses",
            flows.stray, flows.unclear, flows.spoofed
        );
    }

    /// What the process that writes the audit log found in it.
    pub(crate) fn log(&mut self, checks: &Checks, dir: &Path) {
        println!("\nThe audit log, in {}", dir.display());
        for (what, good) in checks {
            self.check(what, *good);
        }
    }

    pub(crate) fn end(&self, out: &Path) {
        println!("policies and graph.svg are in {}", out.display());
        let (good, seconds) = (self.checks - self.failed, self.begun.elapsed().as_secs_f64());
        println!("{good} of {} checks are as they are to be, in {seconds:.1} s", self.checks);
    }
}

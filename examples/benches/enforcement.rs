//! What a policy costs in front of devices: a frame's way through a switch without one and with one, and how long it takes to take channels back.
//!
//!     cargo bench -p vmm-examples --bench enforcement [-- ROUNDS]

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a program that measures"
)]

#[path = "../tests/revocation/channels.rs"]
mod channels;
#[path = "../tests/revocation/regions.rs"]
mod regions;
#[path = "../tests/revocation/sockets.rs"]
mod sockets;

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use channels::{ALL_REGIONS, CHANNELS, Channels, percentile};
use vmm_devices::channel::{NetworkAttach, VmIdentity};
use vmm_devices::net::switch::flows::FlowTable;
use vmm_devices::net::switch::{PortConfig, Switch, SwitchPort};
use vmm_devices::net::{Agreed, MAX_FRAME, MacAddr, NetBackend as _, NetEvents, NetPort, PacketInfo};
use vmm_examples::policy::Enforcement;
use vmm_examples::race::Spread;
use vmm_memory::vm_memory::VolatileSlice;
use vmm_policy::{Monitor, Policy};

/// Frames that are sent at once.
const BURST: usize = 256;

/// Bursts of a round.
const BURSTS: usize = 200;

/// Connections between which frames take turns.
const FLOWS: u16 = 64;

fn main() {
    // Cargo calls it with arguments of its own.
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(15);
    switch(rounds);
    for busy in [false, true] {
        revocation(rounds.min(5), busy);
    }
}

struct Quiet;

impl NetEvents for Quiet {
    fn ready(&self, _: u16) {}

    fn link_changed(&self) {}
}

struct Lan {
    _ports: Vec<SwitchPort>,
    sender: Box<dyn NetPort>,
    receiver: Box<dyn NetPort>,
    _enforcement: Enforcement,
}

fn mac(number: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, number])
}

/// A policy with so many rules about other ports before the one that allows.
fn policy(rules: usize) -> Policy {
    let mut text = "labels l, m\nnetwork lan { filtered }\nallow l to attach network lan\n".to_owned();
    for rule in 0..rules {
        text.push_str(&format!("allow m to connect tcp {} of l\n", 1000 + rule));
    }
    text.push_str("allow l to connect tcp 443 of l\n");
    Policy::parse(&text).unwrap()
}

impl Lan {
    fn new(judged: Option<usize>) -> Self {
        let enforcement = Enforcement::new(Monitor::new(policy(judged.unwrap_or(0))));
        let start = Instant::now();
        let clock = move || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let switch = Switch::builder("lan", clock).build();
        if judged.is_some() {
            switch.set_judge(Some(Arc::new(FlowTable::builder(enforcement.flows()).build())));
        }
        let port = |number: u8| {
            let vm = VmIdentity::new(number.into(), 1);
            enforcement.register_as(vm, |spec| spec.label("l")).unwrap();
            let lan = NetworkAttach { network: "lan".into() };
            let right = enforcement.gatekeeper().open(vm.into(), None, lan).unwrap();
            switch.attach(right, PortConfig::new(format!("p{number}")).mac(mac(number))).unwrap()
        };
        let ports = vec![port(1), port(2)];
        let driver = |port: &SwitchPort| port.attach(&Agreed::new(1), Arc::new(Quiet)).unwrap().remove(0);
        let (sender, receiver) = (driver(&ports[0]), driver(&ports[1]));
        Self { _ports: ports, sender, receiver, _enforcement: enforcement }
    }

    /// Nanoseconds that a frame took, of so many to and fro.
    fn round(&mut self, frames: &mut [Vec<u8>]) -> f64 {
        let mut room = vec![0; MAX_FRAME];
        let begun = Instant::now();
        for burst in 0..BURSTS {
            let flows = frames.len();
            for number in 0..BURST {
                let frame = &mut frames[(burst * BURST + number) % flows];
                let sent =
                    self.sender.transmit(&PacketInfo::default(), &[VolatileSlice::from(&mut frame[..])]);
                drop(black_box(sent));
            }
            self.sender.flush();
            for _ in 0..BURST {
                let came = self.receiver.receive(&[VolatileSlice::from(&mut room[..])]).unwrap();
                assert!(came.is_some(), "a frame was lost");
            }
        }
        begun.elapsed().as_secs_f64() * 1e9 / (BURST * BURSTS) as f64
    }
}

/// A frame of a connection that is open.
fn frame(len: usize, port: u16, flags: u8) -> Vec<u8> {
    let size = u16::try_from(len - 14).unwrap().to_be_bytes();
    let ip = [0x45, 0, size[0], size[1], 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 9, 0, 1, 10, 9, 0, 2];
    let tcp = [0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0];
    let ports = [port.to_be_bytes(), 443_u16.to_be_bytes()].concat();
    let mut frame = [&mac(2).0[..], &mac(1).0, &[8, 0], &ip, &ports, &tcp].concat();
    frame.resize(len, 0);
    frame
}

fn switch(rounds: usize) {
    println!("{:>6} {:>6}  {:>12} {:>12} {:>6}", "bytes", "rules", "without, ns", "with, ns", "ratio");
    for len in [64, 1514] {
        for rules in [10, 10_000] {
            let (mut plain, mut judged) = (Lan::new(None), Lan::new(Some(rules)));
            let mut frames: Vec<_> = (0..FLOWS).map(|flow| frame(len, 4000 + flow, 0x10)).collect();
            let mut begin: Vec<_> = (0..FLOWS).map(|flow| frame(len, 4000 + flow, 2)).collect();
            let (mut without, mut with, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
            for lan in [&mut plain, &mut judged] {
                lan.round(&mut begin);
            }
            for _ in 0..rounds {
                // By turns, as others use this machine as well.
                let (one, two) = (plain.round(&mut frames), judged.round(&mut frames));
                without.push(one);
                with.push(two);
                ratios.push(two / one);
            }
            println!(
                "{len:>6} {rules:>6}  {:>12.0} {:>12.0} {:>6.2}",
                Spread::of(without).median,
                Spread::of(with).median,
                Spread::of(ratios).median
            );
        }
    }
}

fn revocation(rounds: usize, busy: bool) {
    let (mut sockets, mut regions, mut all, mut seen) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut packets = 0;
    for _ in 0..rounds {
        let outcome = Channels::open().cut(busy);
        sockets.extend(outcome.sockets);
        regions.extend(outcome.regions);
        all.push(outcome.all);
        seen.extend(outcome.seen);
        packets += outcome.packets;
    }
    let used = if busy { ", and guests that send by all of them" } else { "" };
    println!(
        "\n{CHANNELS} channels, {ALL_REGIONS} of them regions, with processors that load from them{used}; a reload takes half of them back, \
         {rounds} times; {packets} packets before and meanwhile"
    );
    for (what, times, target) in [
        ("a socket", &mut sockets, Duration::from_millis(1)),
        ("a region", &mut regions, Duration::from_millis(10)),
        ("all of them", &mut all, Duration::MAX),
        ("until the processor sees it", &mut seen, Duration::MAX),
    ] {
        times.sort();
        let (p50, p99) = (percentile(times, 50), percentile(times, 99));
        let most = times.last().copied().unwrap_or_default();
        let met = match target {
            Duration::MAX => String::new(),
            _ if p99 <= target => format!(", as wanted: at most {target:?}"),
            _ => format!(", MORE than the {target:?} that are wanted"),
        };
        println!("{what:<28} p50 {p50:?}, p99 {p99:?}, at most {most:?} of {}{met}", times.len());
    }
}

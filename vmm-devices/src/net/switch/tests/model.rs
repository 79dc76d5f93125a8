//! The switch beside a naive one, which keeps a list and looks at all of it.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::sample::select;

use super::*;

const AGING_S: u64 = 10;
const LEARNED: usize = 3;
const SECOND: u64 = 1_000_000_000;

#[derive(Clone, Debug)]
enum Step {
    Send { port: usize, to: u8, from: u8, tags: Vec<u16> },
    Pass { seconds: u64 },
    Leave { port: usize },
    Enter { port: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let tags = prop::collection::vec(select(vec![0, 1, 2, 3, 0xe002, 0x2000, 4095]), 0..3);
    // 0 stands for everybody.
    prop_oneof![
        30 => (0usize..6, 0u8..8, 1u8..8, tags).prop_map(|(port, to, from, tags)| Step::Send { port, to, from, tags }),
        3 => (1u64..8).prop_map(|seconds| Step::Pass { seconds }),
        1 => (0usize..6).prop_map(|port| Step::Leave { port }),
        2 => (0usize..6).prop_map(|port| Step::Enter { port }),
    ]
}

fn config(port: usize) -> PortConfig {
    let config = PortConfig::new(format!("p{port}")).learned_macs(LEARNED).queue_bytes(1 << 20);
    match port {
        0 => config,
        1 => config.mac(mac(1)),
        2 => config.vlans(access(2)).isolation(Isolation::Isolated),
        3 => config.vlans(trunk(Some(1), &[2, 3])).isolation(Isolation::Community(1)),
        4 => config.vlans(trunk(None, &[1, 2])).isolation(Isolation::Isolated),
        _ => config.vlans(access(2)),
    }
}

#[derive(Default)]
struct Model {
    now_s: u64,
    here: Vec<usize>,
    /// VLAN and address: port, and when.
    known: BTreeMap<(u16, u8), (usize, u64)>,
}

impl Model {
    fn members(port: usize) -> (Option<u16>, Vec<u16>) {
        match port {
            0 | 1 => (Some(1), vec![]),
            2 | 5 => (Some(2), vec![]),
            3 => (Some(1), vec![2, 3]),
            _ => (None, vec![1, 2]),
        }
    }

    fn is_fresh(&self, seen: u64) -> bool {
        self.now_s - seen < AGING_S
    }

    /// Who gets what.
    fn send(&mut self, port: usize, to: u8, from: u8, tags: &[u16]) -> Vec<(usize, Vec<u8>)> {
        let (untagged, allowed) = Self::members(port);
        let outer = tags.first().copied();
        let vlan = match outer.map_or(0, |tag| tag & 0xfff) {
            0 => untagged,
            vlan if allowed.contains(&vlan) => Some(vlan),
            _ => None,
        };
        let Some(vlan) = vlan else { return Vec::new() };
        if port == 1 && from != 1 {
            return Vec::new();
        }
        let pinned = |vlan, address| vlan == 1 && address == 1 && self.here.contains(&1);
        if pinned(vlan, from) && port != 1 {
            return Vec::new();
        }
        if !pinned(vlan, from) {
            let known = self.known.get(&(vlan, from)).copied();
            if known.is_some_and(|(owner, seen)| owner == port && self.is_fresh(seen)) {
                self.known.insert((vlan, from), (port, self.now_s));
            } else {
                self.known.remove(&(vlan, from));
                let fresh =
                    self.known.values().filter(|(owner, seen)| *owner == port && self.is_fresh(*seen));
                if fresh.count() < LEARNED {
                    self.known.insert((vlan, from), (port, self.now_s));
                }
            }
        }
        let inner = tags.get(1..).unwrap_or_default();
        let target = if pinned(vlan, to) {
            Some(1)
        } else {
            self.known.get(&(vlan, to)).filter(|(_, seen)| self.is_fresh(*seen)).map(|(port, _)| *port)
        };
        let mut got = Vec::new();
        for &other in self.here.iter().filter(|other| **other != port) {
            if target.is_some_and(|target| target != other) || to != 0 && target == Some(port) {
                continue;
            }
            let apart = |port| port == 2 || port == 4;
            let community = |port| port == 3;
            let meets = match (port, other) {
                (a, b) if apart(a) || community(a) => !apart(b) && !community(b),
                _ => true,
            };
            let (untagged, allowed) = Self::members(other);
            let is_trunk = !allowed.is_empty();
            let leaves = if untagged == Some(vlan) {
                if is_trunk && !inner.is_empty() {
                    allowed.contains(&vlan).then_some(true)
                } else {
                    Some(false)
                }
            } else {
                allowed.contains(&vlan).then_some(true)
            };
            let Some(with_tag) = leaves.filter(|_| meets) else { continue };
            let own = with_tag.then_some(outer.unwrap_or(0) & 0xf000 | vlan);
            let tags: Vec<u16> = own.into_iter().chain(inner.iter().copied()).collect();
            got.push((other, tagged_to(to, from, &tags)));
        }
        got
    }
}

fn tagged_to(to: u8, from: u8, tags: &[u16]) -> Vec<u8> {
    let mut frame = tagged(to, from, tags, "text");
    if to == 0 {
        frame[..6].copy_from_slice(&[0xff; 6]);
    }
    frame
}

proptest! {
    #[test]
    fn a_switch_does_as_a_naive_one(steps in prop::collection::vec(step(), 1..120)) {
        let lan = Lan::with(|builder| builder.aging(AGING_S * SECOND));
        let mut devices: Vec<Option<Device>> = (0..6).map(|port| Some(lan.device(config(port)))).collect();
        let mut model = Model { here: (0..6).collect(), ..Model::default() };
        for step in steps {
            match step {
                Step::Send { port, to, from, tags } => {
                    let Some(device) = &mut devices[port] else { continue };
                    device.send(&tagged_to(to, from, &tags));
                    let mut expected = model.send(port, to, from, &tags);
                    for (port, device) in devices.iter_mut().enumerate() {
                        while let Some(frame) = device.as_mut().and_then(Device::receive) {
                            let at = expected.iter().position(|entry| *entry == (port, frame.clone()));
                            prop_assert!(at.is_some(), "port {port} got {frame:x?}");
                            expected.remove(at.unwrap());
                        }
                    }
                    prop_assert!(expected.is_empty(), "lost: {expected:x?}");
                }
                Step::Pass { seconds } => {
                    lan.clock.advance(seconds * SECOND);
                    model.now_s += seconds;
                }
                Step::Leave { port } => {
                    devices[port] = None;
                    model.here.retain(|other| *other != port);
                    model.known.retain(|_, (owner, _)| *owner != port);
                }
                Step::Enter { port } => {
                    if devices[port].is_none() {
                        devices[port] = Some(lan.device(config(port)));
                        model.here.push(port);
                        if port == 1 {
                            model.known.remove(&(1, 1));
                        }
                    }
                }
            }
        }
    }
}

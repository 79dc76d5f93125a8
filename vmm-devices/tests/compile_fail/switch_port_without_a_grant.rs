//! What a grant is for is no grant.

use vmm_devices::channel::NetworkAttach;
use vmm_devices::net::switch::{PortConfig, Switch, SwitchPort};

fn attach(switch: &Switch) -> SwitchPort {
    switch.attach(NetworkAttach { network: "lan".into() }, PortConfig::new("a")).unwrap()
}

fn main() {}

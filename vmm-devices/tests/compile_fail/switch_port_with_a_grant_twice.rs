//! A grant opens one port.

use vmm_devices::channel::{Grant, NetworkAttach};
use vmm_devices::net::switch::{PortConfig, Switch, SwitchPort};

fn attach(switch: &Switch, grant: Grant<NetworkAttach>) -> [SwitchPort; 2] {
    ["a", "b"].map(|name| switch.attach(grant, PortConfig::new(name)).unwrap())
}

fn main() {}

//! A grant for a vsock port opens no port of a switch.

use vmm_devices::channel::{Grant, VsockConnect};
use vmm_devices::net::switch::broker::{ClientConfig, SwitchClient};

fn connect(grant: Grant<VsockConnect>) -> SwitchClient {
    SwitchClient::connect(grant, "/run/switch", ClientConfig::new("a")).unwrap()
}

fn main() {}

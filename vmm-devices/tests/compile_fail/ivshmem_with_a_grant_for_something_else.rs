//! The right to ring is no right to the memory, and the other way round.

use vmm_devices::channel::{DoorbellRing, Grant, RegionMap};
use vmm_devices::ivshmem::{Client, Hub, Member};

fn join(hub: &Hub, map: Grant<RegionMap>, ring: Grant<DoorbellRing>) -> Member {
    hub.join(ring, Some(map)).unwrap()
}

fn join_at_server(client: Client, ring: Grant<DoorbellRing>) -> Member {
    client.join(ring, None).unwrap()
}

fn main() {}

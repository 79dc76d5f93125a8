//! What a grant is for is no grant.

use vmm_devices::channel::RegionMap;
use vmm_devices::ivshmem::{Hub, Member};
use vmm_devices::vmm_memory::Access;

fn join(hub: &Hub) -> Member {
    hub.join(RegionMap { region: "r".into(), access: Access::ReadWrite }, None).unwrap()
}

fn main() {}

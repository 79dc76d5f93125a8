//! One grant is one seat.

use vmm_devices::channel::{Grant, RegionMap};
use vmm_devices::ivshmem::{Member, Region};

fn attach(region: &Region, map: Grant<RegionMap>) -> [Member; 2] {
    [region.attach(map).unwrap(), region.attach(map).unwrap()]
}

fn attach_copies(region: &Region, map: &Grant<RegionMap>) -> Member {
    region.attach(map.clone()).unwrap()
}

fn main() {}

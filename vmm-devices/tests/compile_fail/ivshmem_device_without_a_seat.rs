//! A device takes a seat, which none but a hub, a client or a region gives; memory alone is none.

use vmm_devices::ivshmem::{Ivshmem, IvshmemBuilder, Member, Region};

fn device(region: Region) -> IvshmemBuilder {
    Ivshmem::builder(region, |_: u64, _: u32| {})
}

fn seat(region: Region) -> Member {
    Member { region: region.name().clone(), size: region.size() }
}

fn main() {}

//! Guest memory of the host's huge pages, of which no smaller part can be mapped a second time: programs do without a window.

use std::sync::Arc;

use iced_x86::code_asm::*;
use vmm_cpu::{GuestAccess, Halt};
use vmm_memory::vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
use vmm_memory::{Backing, GuestRam, HugePageSize, RegionConfig, ReservedHugePages};

use crate::machine::{Call, DATA, SPACE, Tier, build, call, figure, page, run};

const PLACE: u64 = 0x1234_5678_0000;
const HUGE: u64 = 0x4000_0000;
const SIZE: u64 = 4 << 20;

#[test]
fn programs_do_without_a_window() {
    let _pages = match ReservedHugePages::reserve(HugePageSize::TwoMib, 2) {
        Ok(pages) => pages,
        Err(error) => {
            println!("skipped: {error}");
            return;
        }
    };
    for tier in [Tier::Interpreter, Tier::Window(true), Tier::Window(false)] {
        let (mut setup, mut vcpu) = build(tier);
        let backing = Backing::HugeTlbMemfd { page_size: HugePageSize::TwoMib };
        let config = RegionConfig::new(GuestAddress(HUGE), SIZE).backing(backing);
        let region = GuestRam::builder().region(config).build().unwrap().regions().remove(0);
        setup.vm.map_memory(Arc::clone(&region), GuestAccess::ReadWrite).unwrap();
        // The first page of a huge page, which the host would map whole; one in the middle; and one that is no part of any.
        let pages = [HUGE, HUGE + 0x20_3000, page(1)];
        for (n, gpa) in (0..).zip(pages) {
            setup.map(SPACE, PLACE + n * 0x1000, gpa, DATA);
        }
        let mut a = CodeAssembler::new(64).unwrap();
        let mut emit = || -> Result<(), IcedError> {
            a.mov(rbx, PLACE)?;
            a.mov(ebp, 1000)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            for n in 0..3 {
                a.add(qword_ptr(rbx + n * 0x1000), rbp)?;
            }
            a.dec(rbp)?;
            a.jnz(again)?;
            call(&mut a, Call::Exit);
            Ok(())
        };
        emit().unwrap();
        setup.program(&mut a);
        assert_eq!(run(&mut setup, &mut *vcpu, |_, _| {}), Halt::Halted);
        let sums = [0, 0x20_3000].map(|offset| region.read_obj::<u64>(MemoryRegionAddress(offset)).unwrap());
        assert_eq!((sums, setup.read(page(1))), ([500_500; 2], 500_500), "{tier:?}");
        assert_eq!(figure(&*vcpu, "window-pages-mapped"), 0, "{tier:?}");
    }
}

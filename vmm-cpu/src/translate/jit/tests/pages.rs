//! Pages whose translations are not entered while it is not known whether they hold.

use std::sync::Arc;

use iced_x86::code_asm::{al, qword_ptr};

use super::*;
use crate::translate::cpu::RAX;
use crate::translate::memory::MemoryMap;

const PORT: i32 = 0x80;
/// Two functions of a page.
const FIRST: u64 = FREE;
const SECOND: u64 = FREE + 64;

/// ADD RAX, `addend`; RET.
fn function(addend: u8) -> [u8; 5] {
    [0x48, 0x83, 0xc0, addend, 0xc3]
}

/// A device that replaces the second function at each store to its port.
struct Device {
    map: Arc<MemoryMap>,
    addends: Vec<u8>,
}

impl VcpuIo for Device {
    fn pio_write(&mut self, _: u16, _: usize, _: &[u8]) {
        assert!(self.map.write(SECOND, &function(self.addends.remove(0))));
    }
}

#[test]
fn a_page_that_is_what_it_was_need_not_be_what_its_code_was_made_from() {
    on_all(|mut vcpu| {
        vcpu.put_bytes(FIRST, &function(1));
        vcpu.put_bytes(SECOND, &function(2));
        vcpu.put(MAIN, |a| {
            // The page is known before it changes, and its second function while it is another one.
            for _ in 0..5 {
                a.call(FIRST)?;
            }
            a.out(PORT, al)?;
            for _ in 0..5 {
                a.call(SECOND)?;
            }
            a.out(PORT, al)?;
            a.invlpg(qword_ptr(FREE))?;
            a.call(FIRST)?;
            a.call(SECOND)?;
            a.hlt()
        });
        let map = Arc::clone(vcpu.guest.core.map());
        vcpu.run_with(&mut Device { map, addends: vec![100, 2] });
        assert_eq!(vcpu.register(RAX), 5 + 500 + 1 + 2);
    });
}

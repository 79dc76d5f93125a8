//! What is in the pages: stubs, and the tables by which a processor comes to them.

use vmm_memory::PAGE_SIZE;

use super::{EXCEPTIONS, PAGE_BYTES, PROGRAMS_DOOR, SHOWN_DOORS, STUBS_DOOR, VA, stack, va};

/// Stub of SYSCALL, and behind its instruction.
pub(in crate::kvm::split) const VA_SYSCALL: u64 = VA;
pub(in crate::kvm::split) const VA_SYSCALL_END: u64 = VA + STORE_SIZE as u64;
/// Where programs see the door of that stub.
pub(in crate::kvm::split) const VA_PROGRAMS_DOOR: u64 = VA + SHOWN_DOORS * PAGE_SIZE;
/// Operation: for RCX addresses in the list at RSI, a store that changes nothing; then as [`VA_LOAD_ROOT`].
pub(in crate::kvm::split) const VA_SHOW: u64 = VA + 0x20;
/// Operation: load the root in RBP.
const VA_LOAD_ROOT: u64 = VA_SHOW + 9;
/// Stub of exception 0; the others follow.
const VA_EXCEPTIONS: u64 = VA + 0x100;
const STUB_SIZE: u64 = 8;
/// Bytes of the instruction that stores to a door.
const STORE_SIZE: usize = 6;

/// Where the door of the engine's own operations is, behind those of the exceptions, 8 bytes each.
pub(super) const DOOR_DONE: u64 = 0x800;

/// The exception whose stub begins at `va`.
pub(in crate::kvm::split) fn exception_at(va: u64) -> Option<u16> {
    let offset = va.checked_sub(VA_EXCEPTIONS).filter(|offset| offset.is_multiple_of(STUB_SIZE))?;
    u16::try_from(offset / STUB_SIZE).ok().filter(|vector| *vector < EXCEPTIONS)
}

/// End of the stack of an exception in its page: debug exceptions have their own, since they may come up at
/// the first instruction of another exception's stub.
pub(super) fn stack_end(vector: u16) -> u64 {
    if vector == 1 { PAGE_SIZE } else { PAGE_SIZE / 2 }
}

/// Ends of the two interrupt stacks of a vCPU.
pub(super) fn stack_ends(vcpu: u32) -> [u64; 2] {
    [0, 1].map(|vector| va(stack(vcpu)) + stack_end(vector))
}

/// The stubs. What follows a store to a door is not reached: all registers are set before the vCPU runs again.
pub(super) fn stubs() -> Vec<u8> {
    let mut page = vec![0xcc; PAGE_BYTES];
    let mut put = |at: u64, code: &[u8]| {
        let start = usize::try_from(at - VA).unwrap_or(usize::MAX);
        if let Some(place) = page.get_mut(start..start.saturating_add(code.len())) {
            place.copy_from_slice(code);
        }
    };
    put(VA_SYSCALL, &store(VA_SYSCALL, va(PROGRAMS_DOOR)));
    // again: LODSQ; LOCK OR QWORD PTR [RAX], 0; LOOP again
    put(VA_SHOW, &[0x48, 0xad, 0xf0, 0x48, 0x83, 0x08, 0, 0xe2, 0xf7]);
    // MOV CR3, RBP
    put(VA_LOAD_ROOT, &[0x0f, 0x22, 0xdd]);
    put(VA_LOAD_ROOT + 3, &store(VA_LOAD_ROOT + 3, va(STUBS_DOOR) + DOOR_DONE));
    for vector in 0..EXCEPTIONS {
        let at = exception_stub(vector);
        put(at, &store(at, va(STUBS_DOOR) + u64::from(vector) * 8));
    }
    page
}

/// MOV BYTE PTR [door], AL at `at`: a store of less than 8 bytes is one exit, and done with that.
fn store(at: u64, door: u64) -> [u8; STORE_SIZE] {
    let distance = u32::try_from(door - at - STORE_SIZE as u64).unwrap_or(0);
    let [a, b, c, d] = distance.to_le_bytes();
    [0x88, 0x05, a, b, c, d]
}

/// The stub of an exception.
pub(super) fn exception_stub(vector: u16) -> u64 {
    VA_EXCEPTIONS + u64::from(vector) * STUB_SIZE
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    use super::super::tests::{Contains as _, entry};
    use super::super::{Door, LEAVES, Pages, USER};
    use super::*;

    #[test]
    fn stubs_leave_by_their_door() {
        let pages = Pages::new(46).unwrap();
        let page = stubs();
        let exceptions =
            (0..EXCEPTIONS).map(|n| (VA_EXCEPTIONS + u64::from(n) * STUB_SIZE, Door::Exception(n)));
        for (va, door) in [(VA_SYSCALL, Door::SystemCall), (VA_SHOW, Door::Done), (VA_LOAD_ROOT, Door::Done)]
            .into_iter()
            .chain(exceptions)
        {
            let code = &page[usize::try_from(va - VA).unwrap()..];
            let mut decoder = Decoder::with_ip(64, code, va, DecoderOptions::NONE);
            let store = decoder.iter().find(|i| i.is_ip_rel_memory_operand()).unwrap();
            assert_eq!((store.mnemonic(), store.memory_size().size()), (Mnemonic::Mov, 1));
            assert!(store.ip() - va < 16);
            let index = (store.ip_rel_memory_address() - VA) / PAGE_SIZE;
            let entry = entry(&pages, LEAVES, index);
            let gpa = entry & !(PAGE_SIZE - 1) | (store.ip_rel_memory_address() % PAGE_SIZE);
            assert_eq!(pages.door(gpa), Some(door), "{va:#x}");
            assert_eq!(entry & USER != 0, door == Door::SystemCall);
            assert!(pages.regions().iter().all(|region| !region.contains(gpa)), "no memory there");
            let Door::Exception(vector) = door else { continue };
            assert_eq!(exception_at(va), Some(vector));
        }
        assert_eq!(page[usize::try_from(VA_SYSCALL_END - VA).unwrap()], 0xcc);
        let show = &page[usize::try_from(VA_SHOW - VA).unwrap()..];
        let code: Vec<_> = Decoder::with_ip(64, show, VA_SHOW, DecoderOptions::NONE).iter().take(4).collect();
        assert!(
            code[0].mnemonic() == Mnemonic::Lodsq && code[1].has_lock_prefix() && code[1].immediate(1) == 0
        );
        assert_eq!((code[2].mnemonic(), code[2].near_branch_target()), (Mnemonic::Loop, VA_SHOW));
        assert_eq!(code[3].ip(), VA_LOAD_ROOT);
    }

    #[test]
    fn what_is_no_beginning_of_a_stub_is_none() {
        for no_stub in [VA_SYSCALL, VA_EXCEPTIONS + 1, VA_EXCEPTIONS + STUB_SIZE * u64::from(EXCEPTIONS)] {
            assert_eq!(exception_at(no_stub), None, "{no_stub:#x}");
        }
    }
}

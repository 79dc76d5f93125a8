//! Tables of an engine's own in a guest: by these a processor comes to stubs of the engine's, on stacks of the engine's, when guest code that is
//! not privileged causes an exception. Used by `xen_pv` for its guests and by `kvm` for programs.

/// Interrupt gates of vectors 0 up (Intel SDM 3A 6.14.1), to handlers in code segment `cs`: on the second interrupt stack for debug exceptions, which may come
/// up at the first instruction of another exception's handler, on the first for all others. INT3 and INTO may be used by the guest itself, as the
/// processor does for others.
pub(crate) fn interrupt_table(cs: u16, handlers: impl IntoIterator<Item = u64>) -> Vec<u8> {
    let mut table = Vec::new();
    for (vector, target) in handlers.into_iter().enumerate() {
        let dpl: u64 = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let stack: u64 = if vector == 1 { 2 } else { 1 };
        let low = target & 0xffff
            | u64::from(cs) << 16
            | stack << 32
            | (0x8e | dpl << 5) << 40
            | (target >> 16 & 0xffff) << 48;
        table.extend(low.to_le_bytes());
        table.extend((target >> 32).to_le_bytes());
    }
    table
}

/// A 64-bit task state (Intel SDM 3A 9.7) with two interrupt stacks, which end there, and no I/O permissions. What else comes to privilege level 0 is on the
/// first one.
pub(crate) fn task_state([first, second]: [u64; 2]) -> [u8; 0x68] {
    let mut bytes = [0; 0x68];
    for (offset, end) in [(4, first), (0x24, first), (0x2c, second)] {
        if let Some(field) = bytes.get_mut(offset..offset + 8) {
            field.copy_from_slice(&end.to_le_bytes());
        }
    }
    // The permission map starts beyond the limit: there is none.
    [bytes[0x66], bytes[0x67]] = 0x68_u16.to_le_bytes();
    bytes
}

/// The descriptor of such a task state, busy, at `base`.
pub(crate) fn task_state_descriptor(base: u64) -> [u64; 2] {
    let low = 0x67 | (base & 0xff_ffff) << 16 | 0x8b << 40 | (base >> 24 & 0xff) << 56;
    [low, base >> 32]
}

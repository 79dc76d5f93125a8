use super::super::super::abi::sched::{ShutdownReason, schedop};
use super::super::super::test_support::Guest;
use super::super::super::vcpu_abi::Action;
use super::*;

fn entry(op: u64, args: [u64; 3]) -> MulticallEntry {
    let [a, b, c] = args;
    MulticallEntry { op, result: 0xdead, args: [a, b, c, 0, 0, 0] }
}

fn results(guest: &Guest, list: u64, count: u64) -> Vec<u64> {
    (0..count).map(|index| guest.get::<MulticallEntry>(list + index * 64).result).collect()
}

#[test]
fn every_call_gets_its_result() {
    let mut guest = Guest::new();
    let version = entry(nr::XEN_VERSION, [0; 3]);
    let list = guest.put(&[version, entry(63, [0; 3]), entry(nr::XEN_VERSION, [7, 0, 0])]);
    assert_eq!(guest.call(nr::MULTICALL, &[list, 3]), Ok(0));
    let results = results(&guest, list, 3);
    assert_eq!(results[0], 4 << 16 | 17);
    assert_eq!(results[1], Errno::ENOSYS.value());
    assert_eq!(results[2], 4096);
    assert_eq!(guest.domain.unknown_hypercalls(63), 1);
}

#[test]
fn it_does_not_nest() {
    let mut guest = Guest::new();
    let inner = guest.put(&entry(nr::XEN_VERSION, [0; 3]));
    let list = guest.put(&[entry(nr::MULTICALL, [inner, 1, 0]), entry(nr::IRET, [0; 3])]);
    let rip = guest.engine.context.general.rip;
    assert_eq!(guest.call(nr::MULTICALL, &[list, 2]), Ok(0));
    assert_eq!(results(&guest, list, 2), [Errno::EINVAL.value(), Errno::ENOSYS.value()]);
    assert_eq!(results(&guest, inner, 1), [0xdead]);
    assert_eq!(guest.engine.context.general.rip, rip);
}

#[test]
fn lists_in_no_memory_fault() {
    let mut guest = Guest::new();
    for list in [0, u64::MAX - 63, u64::MAX, 0xffff_8000_0000_0000] {
        assert_eq!(guest.call(nr::MULTICALL, &[list, 2]), Err(Errno::EFAULT), "{list:#x}");
    }
    assert_eq!(guest.call(nr::MULTICALL, &[0, 0]), Ok(0));
    // The count has 32 bits.
    assert_eq!(guest.call(nr::MULTICALL, &[0, 1 << 32]), Ok(0));
}

/// Whom a call tells of an entry that the one before has written finds it.
#[test]
fn entries_are_published_before_anything_else_is_called() {
    let mut guest = Guest::new();
    let none = entry(nr::MMU_UPDATE, [0; 3]);
    for (op, published) in [(nr::MMU_UPDATE, 0), (nr::XEN_VERSION, 1), (nr::EVENT_CHANNEL_OP, 1)] {
        (guest.engine.live_stores, guest.engine.published) = (vec![(0, 0)], 0);
        let list = guest.put(&[none, entry(op, [0; 3])]);
        guest.syscall(nr::MULTICALL, &[list, 2]);
        assert_eq!(guest.engine.published, published, "call {op}");
    }
}

#[test]
fn long_lists_are_taken_in_parts() {
    let mut guest = Guest::new();
    let list = guest.put(vec![entry(nr::XEN_VERSION, [7, 0, 0]); 3000].as_slice());
    let rip = guest.engine.context.general.rip;
    guest.syscall(nr::MULTICALL, &[list, 3000]);
    assert_eq!(guest.engine.context.general.rip, rip - 2);
    guest.engine.context.general.rip = rip;
    assert_eq!(guest.call(nr::MULTICALL, &[list, 3000]), Ok(0));
    assert!(results(&guest, list, 3000).iter().all(|result| *result == 4096));
}

#[test]
fn a_long_call_within_goes_on_where_it_was() {
    use super::super::super::abi::domid;
    use super::super::super::abi::mmu::{MACHPHYS_UPDATE, MmuUpdate};
    let mut guest = Guest::new();
    let updates: Vec<_> =
        (0..2000).map(|n| MmuUpdate { ptr: (n * 4096) | MACHPHYS_UPDATE, val: n + 1 }).collect();
    let updates = guest.put(updates.as_slice());
    let done = guest.put(&0_u32);
    let mut call = entry(nr::MMU_UPDATE, [updates, 2000, done]);
    call.args[3] = domid::SELF.into();
    let list = guest.put(&[entry(nr::XEN_VERSION, [7, 0, 0]), call, entry(nr::XEN_VERSION, [7, 0, 0])]);
    assert_eq!(guest.call(nr::MULTICALL, &[list, 3]), Ok(0));
    assert_eq!(results(&guest, list, 3), [4096, 0, 4096]);
    assert_eq!(guest.get::<u32>(done), 2000);
}

#[test]
fn a_call_that_waits_leaves_the_rest_for_later() {
    let mut guest = Guest::new();
    let list = guest.put(&[entry(nr::SCHED_OP, [schedop::BLOCK, 0, 0]), entry(nr::XEN_VERSION, [7, 0, 0])]);
    let rip = guest.engine.context.general.rip;
    let (action, _) = guest.syscall(nr::MULTICALL, &[list, 2]);
    assert_eq!(action, Action::Block);
    let general = guest.engine.context.general;
    assert_eq!((general.rip, general.rax, general.rdi, general.rsi), (rip - 2, nr::MULTICALL, list + 64, 1));
    let reason = guest.put(&0_u32);
    let list = guest.put(&entry(nr::SCHED_OP, [schedop::SHUTDOWN, reason, 0]));
    let (action, rax) = guest.syscall(nr::MULTICALL, &[list, 1]);
    assert_eq!((action, rax), (Action::Shutdown(ShutdownReason::PowerOff), 0));
}

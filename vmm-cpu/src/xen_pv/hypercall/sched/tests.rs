use super::super::super::abi::event::{Pair, evtchnop};
use super::super::super::abi::nr::{EVENT_CHANNEL_OP, SCHED_OP, SCHED_OP_COMPAT, SET_TIMER_OP};
use super::super::super::test_support::Guest;
use super::super::super::vcpu_abi::Wake;
use super::*;

fn ipi_port(guest: &mut Guest) -> u32 {
    let at = guest.put(&Pair::default());
    guest.call(EVENT_CHANNEL_OP, &[evtchnop::BIND_IPI, at]).unwrap();
    guest.get::<Pair>(at).second
}

fn unmask(guest: &mut Guest, port: u32) {
    let at = guest.put(&port);
    guest.call(EVENT_CHANNEL_OP, &[evtchnop::UNMASK, at]).unwrap();
}

#[test]
fn yield_and_block() {
    let mut guest = Guest::new();
    for nr in [SCHED_OP, SCHED_OP_COMPAT] {
        guest.set_mask(true);
        assert_eq!(guest.syscall(nr, &[schedop::YIELD, 0]), (Action::Yield, 0));
        assert_eq!(guest.info_byte(shared_info::UPCALL_MASK), 1);
        assert_eq!(guest.syscall(nr, &[schedop::BLOCK, 0]), (Action::Block, 0));
        assert_eq!(guest.info_byte(shared_info::UPCALL_MASK), 0, "waiting unmasks");
    }
}

#[test]
fn an_event_that_is_there_already_is_not_waited_for() {
    let mut guest = Guest::new();
    let port = ipi_port(&mut guest);
    unmask(&mut guest, port);
    guest.set_mask(true);
    guest.domain.set_pending(port);
    assert_eq!(guest.syscall(SCHED_OP, &[schedop::BLOCK, 0]), (Action::Continue, 0));
}

#[test]
fn an_event_from_another_thread_ends_the_wait() {
    let mut guest = Guest::new();
    let port = ipi_port(&mut guest);
    unmask(&mut guest, port);
    assert_eq!(guest.syscall(SCHED_OP, &[schedop::BLOCK, 0]).0, Action::Block);
    let domain = guest.domain.clone();
    let other = std::thread::spawn(move || domain.set_pending(port));
    assert_eq!(guest.vcpu.wait(&mut guest.engine).unwrap(), Wake::Ready);
    other.join().unwrap();
}

#[test]
fn shutdown_gives_its_reason() {
    for (number, reason) in [
        (0_u32, ShutdownReason::PowerOff),
        (1, ShutdownReason::Reboot),
        (2, ShutdownReason::Suspend),
        (3, ShutdownReason::Crash),
        (4, ShutdownReason::Watchdog),
    ] {
        let mut guest = Guest::new();
        let at = guest.put(&number);
        assert_eq!(guest.syscall(SCHED_OP, &[schedop::SHUTDOWN, at]).0, Action::Shutdown(reason));
        assert_eq!(guest.domain.shutdown_reason(), Some(reason));
        assert_eq!(guest.before_entry(), Action::Shutdown(reason), "it stays");
        assert_eq!(guest.vcpu.wait(&mut guest.engine).unwrap(), Wake::Shutdown(reason));
        let mut guest = Guest::new();
        let (action, _) = guest.syscall(SCHED_OP_COMPAT, &[schedop::SHUTDOWN, number.into()]);
        assert_eq!(action, Action::Shutdown(reason));
    }
    let mut guest = Guest::new();
    for number in [5_u32, 6, u32::MAX] {
        let at = guest.put(&number);
        assert_eq!(guest.call(SCHED_OP, &[schedop::SHUTDOWN, at]), Err(Errno::EINVAL));
        assert_eq!(guest.call(SCHED_OP, &[schedop::SHUTDOWN_CODE, at]), Err(Errno::EINVAL));
    }
    for number in [5, 1 << 32, u64::MAX] {
        assert_eq!(guest.call(SCHED_OP_COMPAT, &[schedop::SHUTDOWN, number]), Err(Errno::EINVAL));
    }
    assert_eq!(guest.call(SCHED_OP, &[schedop::SHUTDOWN, 8]), Err(Errno::EFAULT));
}

#[test]
fn a_latched_reason_wins() {
    let mut guest = Guest::new();
    let [crash, off] = [3_u32, 0].map(|number| guest.put(&number));
    assert_eq!(guest.call(SCHED_OP, &[schedop::SHUTDOWN_CODE, crash]), Ok(0));
    let (action, _) = guest.syscall(SCHED_OP, &[schedop::SHUTDOWN, off]);
    assert_eq!(action, Action::Shutdown(ShutdownReason::Crash));
}

fn poll(guest: &mut Guest, ports: &[u32], timeout: u64) -> (Action, u64) {
    let list = guest.put(ports);
    let at = guest.put(&Poll {
        ports: list,
        nr_ports: ports.len().try_into().unwrap(),
        timeout,
        ..Default::default()
    });
    guest.syscall(SCHED_OP, &[schedop::POLL, at])
}

#[test]
fn polling_sees_masked_ports() {
    let mut guest = Guest::new();
    let ports = [ipi_port(&mut guest), ipi_port(&mut guest)];
    guest.set_mask(true);
    assert_eq!(poll(&mut guest, &ports, 0), (Action::Block, 0));
    let domain = guest.domain.clone();
    let other = std::thread::spawn(move || domain.set_pending(ports[1]));
    assert_eq!(guest.vcpu.wait(&mut guest.engine).unwrap(), Wake::Ready);
    other.join().unwrap();
    assert_eq!(guest.info_byte(shared_info::UPCALL_MASK), 1, "polling unmasks nothing");
    assert_eq!(poll(&mut guest, &ports, 0), (Action::Continue, 0), "pending already");
}

#[test]
fn polling_ends_in_time() {
    let mut guest = Guest::new();
    let port = ipi_port(&mut guest);
    guest.set_mask(true);
    guest.pass(1000);
    assert_eq!(poll(&mut guest, &[port], 500).0, Action::Block);
    assert_eq!(guest.vcpu.wait(&mut guest.engine).unwrap(), Wake::Ready);
    assert_eq!(poll(&mut guest, &[], 500).0, Action::Block);
    assert_eq!(guest.vcpu.wait(&mut guest.engine).unwrap(), Wake::Ready);
}

#[test]
fn bad_polls_are_refused() {
    let mut guest = Guest::new();
    let einval = Errno::EINVAL.value();
    assert_eq!(poll(&mut guest, &[1; 129], 0).1, einval, "too many");
    for port in [0, 1, 4096, u32::MAX] {
        assert_eq!(poll(&mut guest, &[port], 0).1, einval, "port {port}");
    }
    let at = guest.put(&Poll { ports: 8, nr_ports: 1, ..Default::default() });
    assert_eq!(guest.call(SCHED_OP, &[schedop::POLL, at]), Err(Errno::EFAULT));
    assert_eq!(guest.call(SCHED_OP, &[schedop::POLL, 8]), Err(Errno::EFAULT));
}

#[test]
fn a_kick_ends_any_wait() {
    let mut guest = Guest::new();
    assert_eq!(guest.syscall(SCHED_OP, &[schedop::BLOCK, 0]).0, Action::Block);
    guest.domain.kick(0);
    assert_eq!(guest.vcpu.wait(&mut guest.engine).unwrap(), Wake::Kicked);
    assert!(!guest.vcpu.take_kick());
    guest.domain.kick(7);
}

#[test]
fn what_is_not_there_says_so() {
    let mut guest = Guest::new();
    for command in [4, 7, 8, u64::MAX] {
        assert_eq!(guest.call(SCHED_OP, &[command, 0]), Err(Errno::ENOSYS));
    }
    let at = guest.put(&0_u64);
    assert_eq!(guest.call(SCHED_OP, &[schedop::WATCHDOG, at]), Err(Errno::ENOSYS));
    assert_eq!(guest.call(SCHED_OP, &[schedop::WATCHDOG, 8]), Err(Errno::EFAULT));
    assert_eq!(guest.call(SCHED_OP_COMPAT, &[3, 0]), Err(Errno::ENOSYS));
}

#[test]
fn the_old_timer() {
    let mut guest = Guest::new();
    assert_eq!(guest.call(SET_TIMER_OP, &[500]), Ok(0));
    assert_eq!(guest.vcpu.deadline(), Some(500));
    assert_eq!(guest.call(SET_TIMER_OP, &[0]), Ok(0));
    assert_eq!(guest.vcpu.deadline(), None);
}

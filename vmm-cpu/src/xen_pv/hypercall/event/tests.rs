use super::super::super::abi::event::{PORTS, status};
use super::super::super::abi::nr::EVENT_CHANNEL_OP;
use super::super::super::abi::{shared_info, virq};
use super::super::super::gate::{EventSink, Gate};
use super::super::super::test_support::{Counter, Guest, TestHandle};
use super::*;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use zerocopy::{Immutable, IntoBytes};

const SELF: u16 = domid::SELF;

fn op<T: IntoBytes + Immutable>(guest: &mut Guest, command: u64, argument: &T) -> (Result<u64, Errno>, u64) {
    let at = guest.put(argument);
    (guest.call(EVENT_CHANNEL_OP, &[command, at]), at)
}

fn unbound(guest: &mut Guest, remote_dom: u16) -> u32 {
    let (result, at) = op(guest, evtchnop::ALLOC_UNBOUND, &AllocUnbound { dom: SELF, remote_dom, port: 0 });
    assert_eq!(result, Ok(0));
    guest.get::<AllocUnbound>(at).port
}

fn bind_virq(guest: &mut Guest, virq: u32, vcpu: u32) -> Result<u32, Errno> {
    let (result, at) = op(guest, evtchnop::BIND_VIRQ, &BindVirq { virq, vcpu, port: 0 });
    result.map(|_| guest.get::<BindVirq>(at).port)
}

fn bind_ipi(guest: &mut Guest, vcpu: u32) -> Result<u32, Errno> {
    let (result, at) = op(guest, evtchnop::BIND_IPI, &Pair { first: vcpu, second: 0 });
    result.map(|_| guest.get::<Pair>(at).second)
}

fn port_op(guest: &mut Guest, command: u64, port: u32) -> Result<u64, Errno> {
    op(guest, command, &port).0
}

fn status_of(guest: &mut Guest, port: u32) -> Result<Status, Errno> {
    let (result, at) = op(guest, evtchnop::STATUS, &Status { dom: SELF, port, ..Default::default() });
    result.map(|_| guest.get(at))
}

fn is_pending(guest: &Guest, port: u32) -> bool {
    guest.domain.is_pending(port).unwrap()
}

#[test]
fn virtual_interrupts_are_bound_once() {
    let mut guest = Guest::new();
    let port = bind_virq(&mut guest, virq::TIMER, 0).unwrap();
    assert_eq!(bind_virq(&mut guest, virq::TIMER, 0), Err(Errno::EEXIST));
    let other = bind_virq(&mut guest, virq::TIMER, 1).unwrap();
    assert_ne!(port, other);
    assert_eq!(bind_virq(&mut guest, virq::TIMER, 2), Err(Errno::ENOENT));
    assert_eq!(bind_virq(&mut guest, virq::COUNT, 0), Err(Errno::EINVAL));
    assert_eq!(bind_virq(&mut guest, u32::MAX, 0), Err(Errno::EINVAL));
    assert_eq!(
        bind_virq(&mut guest, 2, 1),
        Err(Errno::EINVAL),
        "one for the whole domain, on processor 0 first"
    );
    guest.domain.raise_virq(1, virq::TIMER);
    assert!(is_pending(&guest, other) && !is_pending(&guest, port));
    let status = status_of(&mut guest, other).unwrap();
    assert_eq!((status.status, status.vcpu, status.detail), (status::VIRQ, 1, virq::TIMER));
    assert_eq!(port_op(&mut guest, evtchnop::SEND, port), Err(Errno::EINVAL), "nobody is at the other end");
    assert_eq!(port_op(&mut guest, evtchnop::CLOSE, port), Ok(0));
    assert_eq!(bind_virq(&mut guest, virq::TIMER, 0), Ok(port), "free again");
}

#[test]
fn a_virtual_interrupt_of_the_domain_moves_and_is_freed() {
    let mut guest = Guest::new();
    let port = bind_virq(&mut guest, 2, 0).unwrap();
    assert_eq!(op(&mut guest, evtchnop::BIND_VCPU, &Pair { first: port, second: 1 }).0, Ok(0));
    assert_eq!(port_op(&mut guest, evtchnop::CLOSE, port), Ok(0));
    assert_eq!(bind_virq(&mut guest, 2, 0), Ok(port));
}

#[test]
fn the_upcall_protocol_is_followed() {
    let mut guest = Guest::new();
    let port = bind_ipi(&mut guest, 0).unwrap();
    // All channels start masked.
    assert_eq!(port_op(&mut guest, evtchnop::SEND, port), Ok(0));
    assert!(is_pending(&guest, port));
    assert_eq!(guest.info_byte(shared_info::UPCALL_PENDING), 0);
    assert_eq!(port_op(&mut guest, evtchnop::UNMASK, port), Ok(0));
    assert_eq!(guest.info_byte(shared_info::UPCALL_PENDING), 1);
    let sel = guest.domain.memory.load(guest.vcpu.info() + shared_info::PENDING_SEL).unwrap();
    assert_eq!(sel, 1 << (port / 64));
    assert_eq!(guest.shared_word(shared_info::EVTCHN_MASK) & (1 << port), 0);
    // A pending channel that is raised again changes nothing.
    let info = guest.vcpu.info();
    guest.domain.memory.swap_byte(info + shared_info::UPCALL_PENDING, 0).unwrap();
    assert_eq!(port_op(&mut guest, evtchnop::SEND, port), Ok(0));
    assert_eq!(guest.info_byte(shared_info::UPCALL_PENDING), 0);
}

#[test]
fn another_virtual_processor_is_kicked_when_it_is_in_the_guest() {
    let mut guest = Guest::new();
    let handle = Arc::new(TestHandle::default());
    guest.domain.set_handle(1, Arc::<TestHandle>::clone(&handle)).unwrap();
    let port = bind_ipi(&mut guest, 1).unwrap();
    port_op(&mut guest, evtchnop::UNMASK, port).unwrap();
    let other = guest.domain.processor(1).unwrap();
    other.enter();
    assert_eq!(port_op(&mut guest, evtchnop::SEND, port), Ok(0));
    assert_eq!(handle.kicks.load(Ordering::SeqCst), 1);
    assert_eq!(guest.info_byte(shared_info::UPCALL_PENDING), 0, "not this one");
    // Outside of the guest it looks for itself.
    guest.domain.clear_pending(port);
    let other = guest.domain.processor(1).unwrap();
    let info = other.info();
    guest.domain.memory.store(info + shared_info::PENDING_SEL, 0).unwrap();
    guest.domain.memory.swap_byte(info + shared_info::UPCALL_PENDING, 0).unwrap();
    guest.domain.processor(1).unwrap().leave();
    assert_eq!(port_op(&mut guest, evtchnop::SEND, port), Ok(0));
    assert_eq!(handle.kicks.load(Ordering::SeqCst), 1);
}

#[test]
fn interprocessor_channels_stay_where_they_are() {
    let mut guest = Guest::new();
    let port = bind_ipi(&mut guest, 1).unwrap();
    assert_eq!(bind_ipi(&mut guest, 2), Err(Errno::ENOENT));
    assert_eq!(op(&mut guest, evtchnop::BIND_VCPU, &Pair { first: port, second: 0 }).0, Err(Errno::EINVAL));
    assert_eq!(status_of(&mut guest, port).unwrap().status, status::IPI);
    let port = unbound(&mut guest, 0);
    assert_eq!(op(&mut guest, evtchnop::BIND_VCPU, &Pair { first: port, second: 1 }).0, Ok(0));
    assert_eq!(op(&mut guest, evtchnop::BIND_VCPU, &Pair { first: port, second: 2 }).0, Err(Errno::ENOENT));
    assert_eq!(status_of(&mut guest, port).unwrap().vcpu, 1);
}

#[test]
fn a_back_end_connects_to_a_channel() {
    let mut guest = Guest::new();
    let port = unbound(&mut guest, domid::BACKEND);
    assert_eq!(port_op(&mut guest, evtchnop::SEND, port), Ok(0), "nobody hears it");
    let (events, counter) = (guest.domain.events(), Arc::new(Counter::default()));
    assert!(events.connect(port, 7, Arc::<Counter>::clone(&counter)).is_err(), "kept for another one");
    events.connect(port, domid::BACKEND, Arc::<Counter>::clone(&counter)).unwrap();
    assert!(is_pending(&guest, port), "what was sent before is not lost");
    assert_eq!(port_op(&mut guest, evtchnop::SEND, port), Ok(0));
    assert_eq!(counter.0.load(Ordering::SeqCst), 1);
    let status = status_of(&mut guest, port).unwrap();
    assert_eq!((status.status, status.detail), (status::INTERDOMAIN, 0));
    assert!(events.connect(port, domid::BACKEND, counter).is_err(), "taken");
    events.close(port).unwrap();
    assert!(!is_pending(&guest, port));
    assert_eq!(status_of(&mut guest, port).unwrap().status, status::CLOSED);
    assert!(events.close(port).is_err());
    events.raise(port);
    assert!(!is_pending(&guest, port), "a free port takes no event");
    events.raise(u32::MAX);
}

#[test]
fn a_domain_connects_with_itself() {
    let mut guest = Guest::new();
    let one = unbound(&mut guest, SELF);
    let request = BindInterdomain { remote_dom: SELF, remote_port: one, ..Default::default() };
    let (result, at) = op(&mut guest, evtchnop::BIND_INTERDOMAIN, &request);
    assert_eq!(result, Ok(0));
    let other = guest.get::<BindInterdomain>(at).local_port;
    assert!(is_pending(&guest, other));
    assert_eq!(port_op(&mut guest, evtchnop::SEND, other), Ok(0));
    assert!(is_pending(&guest, one));
    assert_eq!(op(&mut guest, evtchnop::BIND_INTERDOMAIN, &request).0, Err(Errno::EINVAL), "taken");
    // The end that stays waits for another one.
    assert_eq!(port_op(&mut guest, evtchnop::CLOSE, other), Ok(0));
    assert_eq!(status_of(&mut guest, one).unwrap().status, status::UNBOUND);
    assert_eq!(op(&mut guest, evtchnop::BIND_INTERDOMAIN, &request).0, Ok(0));
}

#[derive(Debug)]
struct Friends(Arc<Counter>);

impl Gate for Friends {
    fn may_reach(&self, domid: u16) -> bool {
        domid == 5
    }

    fn bind(&self, domid: u16, port: u32) -> Option<Arc<dyn EventSink>> {
        (domid == 5 && port == 9).then(|| Arc::<Counter>::clone(&self.0) as Arc<dyn EventSink>)
    }
}

#[test]
fn other_domains_are_reached_through_the_gate() {
    let counter = Arc::new(Counter::default());
    let friends = Friends(Arc::clone(&counter));
    let mut guest = Guest::with(|config| config.gate = Box::new(friends));
    unbound(&mut guest, 5);
    let request = AllocUnbound { dom: SELF, remote_dom: 6, port: 0 };
    assert_eq!(op(&mut guest, evtchnop::ALLOC_UNBOUND, &request).0, Err(Errno::EPERM));
    for (remote_dom, remote_port, expected) in
        [(5, 9, Ok(0)), (5, 8, Err(Errno::ESRCH)), (6, 9, Err(Errno::ESRCH)), (0, 1, Err(Errno::ESRCH))]
    {
        let request = BindInterdomain { remote_dom, remote_port, ..Default::default() };
        let (result, at) = op(&mut guest, evtchnop::BIND_INTERDOMAIN, &request);
        assert_eq!(result, expected, "{request:?}");
        if result.is_ok() {
            let port = guest.get::<BindInterdomain>(at).local_port;
            assert_eq!(port_op(&mut guest, evtchnop::SEND, port), Ok(0));
            assert_eq!(counter.0.load(Ordering::SeqCst), 1);
        }
    }
}

#[test]
fn nobody_speaks_for_another_domain() {
    let mut guest = Guest::new();
    let request = AllocUnbound { dom: 1, remote_dom: 0, port: 0 };
    assert_eq!(op(&mut guest, evtchnop::ALLOC_UNBOUND, &request).0, Err(Errno::ESRCH));
    let request = AllocUnbound { dom: SELF, remote_dom: 3, port: 0 };
    assert_eq!(op(&mut guest, evtchnop::ALLOC_UNBOUND, &request).0, Err(Errno::EPERM));
    assert_eq!(
        op(&mut guest, evtchnop::STATUS, &Status { dom: 0, ..Default::default() }).0,
        Err(Errno::ESRCH)
    );
    assert_eq!(op(&mut guest, evtchnop::RESET, &0_u16).0, Err(Errno::ESRCH));
}

#[test]
fn ports_out_of_range_are_refused() {
    let mut guest = Guest::new();
    for port in [0, 1, PORTS - 1, PORTS, u32::MAX] {
        for command in [evtchnop::CLOSE, evtchnop::SEND, evtchnop::UNMASK] {
            assert_eq!(
                port_op(&mut guest, command, port),
                Err(Errno::EINVAL),
                "command {command}, port {port}"
            );
        }
        assert_eq!(
            op(&mut guest, evtchnop::BIND_VCPU, &Pair { first: port, second: 0 }).0,
            Err(Errno::EINVAL)
        );
        let expected = if port < PORTS { Ok(status::CLOSED) } else { Err(Errno::EINVAL) };
        assert_eq!(status_of(&mut guest, port).map(|status| status.status), expected, "port {port}");
    }
}

#[test]
fn ports_run_out_and_are_reset() {
    let mut guest = Guest::new();
    let at = guest.put(&Pair::default());
    for _ in 1..PORTS {
        assert_eq!(guest.call(EVENT_CHANNEL_OP, &[evtchnop::BIND_IPI, at]), Ok(0));
    }
    assert_eq!(guest.call(EVENT_CHANNEL_OP, &[evtchnop::BIND_IPI, at]), Err(Errno::ENOSPC));
    assert_eq!(bind_virq(&mut guest, virq::TIMER, 0), Err(Errno::ENOSPC));
    assert_eq!(port_op(&mut guest, evtchnop::SEND, PORTS - 1), Ok(0));
    assert_eq!(op(&mut guest, evtchnop::RESET, &SELF).0, Ok(0));
    assert!(!is_pending(&guest, PORTS - 1));
    assert_eq!(port_op(&mut guest, evtchnop::SEND, PORTS - 1), Err(Errno::EINVAL));
    assert!(bind_virq(&mut guest, virq::TIMER, 0).is_ok());
}

#[test]
fn what_is_not_there_says_so() {
    let mut guest = Guest::new();
    assert_eq!(op(&mut guest, evtchnop::BIND_PIRQ, &[0_u32; 3]).0, Err(Errno::EPERM));
    // The FIFO interface.
    for command in [11, 12, 13, 14, u64::MAX] {
        assert_eq!(op(&mut guest, command, &[0_u64; 4]).0, Err(Errno::ENOSYS));
    }
    assert_eq!(guest.domain.unknown_hypercalls(EVENT_CHANNEL_OP), 6);
}

#[test]
fn an_answer_that_cannot_be_given_leaves_no_port() {
    use super::super::super::abi::mmu::entry;
    use super::super::super::test_support::{DIRECT, FREE, L1};
    let mut guest = Guest::new();
    for command in 0..=10 {
        assert_eq!(
            guest.call(EVENT_CHANNEL_OP, &[command, 8]),
            match command {
                evtchnop::BIND_PIRQ => Err(Errno::EPERM),
                _ => Err(Errno::EFAULT),
            }
        );
    }
    // A page that can be read and not written.
    guest.store(L1 + 2, 0, (FREE * 4096) | entry::PRESENT);
    for command in [evtchnop::BIND_IPI, evtchnop::BIND_VIRQ] {
        let at = DIRECT + FREE * 4096;
        assert_eq!(guest.call(EVENT_CHANNEL_OP, &[command, at]), Err(Errno::EFAULT));
        assert_eq!(guest.call(EVENT_CHANNEL_OP, &[command, at]), Err(Errno::EFAULT));
    }
    assert_eq!(bind_ipi(&mut guest, 0), Ok(1), "none was kept");
}

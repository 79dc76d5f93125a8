//! The timer: a single shot, and the event that it ends in.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::abi::{self, SCHED_OP, VCPU_OP, VcpuInfo, event, hypercall};
use crate::check;

const VIRQ_TIMER: u32 = 0;
const SET_SINGLESHOT: u64 = 8;

static PORT: AtomicU64 = AtomicU64::new(u64::MAX);
static TICKS: AtomicU64 = AtomicU64::new(0);

pub(crate) fn on_event(port: u64) {
    if port == PORT.load(Ordering::SeqCst) {
        TICKS.fetch_add(1, Ordering::SeqCst);
    }
}

pub(crate) fn timer() {
    check("yield", hypercall(SCHED_OP, [abi::sched::YIELD, 0, 0, 0]) == 0);
    let this = VcpuInfo(0);
    let Some(port) = event::bind_virq(VIRQ_TIMER) else { return check("timer", false) };
    PORT.store(port.into(), Ordering::SeqCst);
    let unmasked = event::unmask(port);
    let due = this.system_time() + 2_000_000;
    let request = [due, 0];
    let set = hypercall(VCPU_OP, [SET_SINGLESHOT, 0, request.as_ptr() as u64, 0]) == 0;
    this.wait(|| TICKS.load(Ordering::SeqCst) != 0);
    let in_time = this.system_time() >= due && TICKS.load(Ordering::SeqCst) == 1;
    check("timer, waited for with block", unmasked && set && in_time);
}

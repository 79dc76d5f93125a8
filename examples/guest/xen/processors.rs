//! A second processor: started, reached by an event, taken down.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::abi::{
    self, CS, Page, SCHED_OP, SS, StartInfo, VCPU_OP, VcpuInfo, event, hypercall, machine_frame,
};
use crate::{check, entry, say};

const INITIALISE: u64 = 0;
const UP: u64 = 1;
const DOWN: u64 = 2;
const IS_UP: u64 = 3;
const ENOENT: i64 = -2;

static ALIVE: AtomicBool = AtomicBool::new(false);
static REACHED: AtomicBool = AtomicBool::new(false);
static PORT: AtomicU64 = AtomicU64::new(u64::MAX);

/// `vcpu_guest_context`, in words, on two pages.
static CONTEXT: [Page; 2] = [const { Page::new() }; 2];

pub(crate) fn on_event(port: u64) {
    if port == PORT.load(Ordering::SeqCst) {
        REACHED.store(true, Ordering::SeqCst);
    }
}

extern "C" fn second_main() -> ! {
    ALIVE.store(true, Ordering::SeqCst);
    VcpuInfo(1).wait(|| REACHED.load(Ordering::SeqCst));
    loop {
        hypercall(VCPU_OP, [DOWN, 1, 0, 0]);
    }
}

fn is_up() -> i64 {
    hypercall(VCPU_OP, [IS_UP, 1, 0, 0])
}

/// Gives others time until `done`; not for ever.
fn yield_until(done: impl Fn() -> bool) -> bool {
    let start = VcpuInfo(0).system_time();
    while !done() {
        if VcpuInfo(0).system_time() - start > 60_000_000_000 {
            return false;
        }
        hypercall(SCHED_OP, [abi::sched::YIELD, 0, 0, 0]);
    }
    true
}

pub(crate) fn second(info: &StartInfo) {
    if is_up() == ENOENT {
        return say!("       there is one processor");
    }
    let root = machine_frame(info, info.pt_base >> 12) << 12;
    let stack = &raw const entry::second_stack_end as u64 - 8;
    let start = second_main as extern "C" fn() -> ! as usize as u64;
    let event = entry::event_1 as unsafe extern "C" fn() as usize as u64;
    // Flags (in kernel mode), RIP, CS, RFLAGS, RSP, SS, CR3, event callback.
    for (word, value) in
        [(64, 1 << 2), (81, start), (82, CS), (83, 0x202), (84, stack), (85, SS), (626, root), (639, event)]
    {
        CONTEXT[word / 512].set(word, value);
    }
    let port = event::bind_ipi(1);
    PORT.store(port.map_or(u64::MAX, u64::from), Ordering::SeqCst);
    let Some(port) = port.filter(|port| event::unmask(*port)) else {
        return check("port of a processor", false);
    };
    let initialised = hypercall(VCPU_OP, [INITIALISE, 1, CONTEXT[0].address(), 0]) == 0;
    let up = hypercall(VCPU_OP, [UP, 1, 0, 0]) == 0;
    check("second processor", initialised && up && yield_until(|| ALIVE.load(Ordering::SeqCst)));
    check("event for it", event::send(port) && yield_until(|| REACHED.load(Ordering::SeqCst)));
    check("its end", yield_until(|| is_up() == 0));
}

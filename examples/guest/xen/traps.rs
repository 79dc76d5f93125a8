//! Traps: the table that Xen is given, what each of them leaves for the kernel to look at, and what the kernel does about it.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::abi::{self, CS, SET_CALLBACKS, SET_TRAP_TABLE, VcpuInfo, hypercall};
use crate::entry::{self, Frame};
use crate::{check, processors, say, shut_down, time, user};

/// `trap_info`.
#[repr(C)]
struct TrapInfo {
    vector: u8,
    flags: u8,
    cs: u16,
    address: u64,
}

/// Traps that came so far, a bit each; INT 0x80 is bit 63.
static SEEN: AtomicU64 = AtomicU64::new(0);
/// Error code and address of the last page fault.
static FAULT: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

/// The instruction of [`load`].
const LOAD_LENGTH: u64 = 3;

pub(crate) fn set_up() {
    let trap = |vector, level: u8, entry: unsafe extern "C" fn()| TrapInfo {
        vector,
        flags: level,
        cs: CS as u16,
        address: entry as usize as u64,
    };
    let table = [
        trap(0, 0, entry::divide_error),
        trap(3, 3, entry::breakpoint),
        trap(13, 0, entry::general_protection),
        trap(14, 0, entry::page_fault),
        trap(0x80, 3, entry::interrupt_80),
        TrapInfo { vector: 0, flags: 0, cs: 0, address: 0 },
    ];
    let traps = hypercall(SET_TRAP_TABLE, [table.as_ptr() as u64, 0, 0, 0]);
    let [event, failsafe, system_call] = [entry::event_0, entry::failsafe, entry::system_call]
        .map(|entry: unsafe extern "C" fn()| entry as usize as u64);
    let callbacks = hypercall(SET_CALLBACKS, [event, failsafe, system_call, 0]);
    check("trap table and callbacks", traps == 0 && callbacks == 0);
}

/// Tries to load from an address.
fn load(address: u64) -> u64 {
    let value;
    // SAFETY: a load; where there is nothing, the handler of page faults goes on behind it.
    unsafe { asm!("mov rax, [rdi]", in("rdi") address, inlateout("rax") 0_u64 => value, options(nostack)) }
    value
}

/// Error code and address of the fault that a load gives, if it gives one.
fn fault_at(address: u64) -> Option<(u64, u64)> {
    SEEN.fetch_and(!(1 << 14), Ordering::SeqCst);
    load(address);
    let seen = SEEN.load(Ordering::SeqCst) >> 14 & 1 != 0;
    seen.then(|| (FAULT[0].load(Ordering::SeqCst), FAULT[1].load(Ordering::SeqCst)))
}

pub(crate) fn exceptions() {
    // SAFETY: the handlers go on behind each of them.
    unsafe {
        asm!("xor edx, edx", "xor ecx, ecx", "div ecx", "int3", "int 0x80", inout("eax") 1 => _, out("ecx") _, out("edx") _);
    }
    let seen = SEEN.load(Ordering::SeqCst);
    check("divide error", seen & 1 != 0);
    check("breakpoint", seen >> 3 & 1 != 0);
    check("INT 0x80", seen >> 63 != 0);
    let hole = 0x7f00_0000_1238;
    check("page fault of the kernel", fault_at(hole) == Some((0, hole)));
    // The table ends somewhere.
    let beyond = abi::MACH2PHYS + (1 << 38);
    check(
        "page fault beyond the machine-to-physical table",
        fault_at(beyond).is_some_and(|(_, at)| at == beyond),
    );
    // What is mapped is loaded, with a trap table as without.
    check("a load that does not fault", fault_at(abi::MACH2PHYS).is_none() && load(abi::MACH2PHYS + 8) == 1);
}

/// What every entry into the kernel comes to; the frame is where it goes on.
#[unsafe(no_mangle)]
extern "C" fn on_entry(frame: &mut Frame) {
    let seen = |bit: u64| SEEN.fetch_or(1 << bit, Ordering::SeqCst);
    let from_user = frame.cs & 3 == 3;
    match frame.number {
        0 => {
            seen(0);
            frame.rip += 2;
        }
        3 => _ = seen(3),
        0x80 => _ = seen(63),
        14 => {
            seen(14);
            let address = VcpuInfo(0).cr2();
            FAULT[0].store(frame.error_code, Ordering::SeqCst);
            FAULT[1].store(address, Ordering::SeqCst);
            if from_user {
                user::faulted(frame.error_code, address);
            }
            frame.rip += LOAD_LENGTH;
        }
        0x100 => user::called(frame),
        0x101 => VcpuInfo(0).take_events(time::on_event),
        0x102 => VcpuInfo(1).take_events(processors::on_event),
        _ => {
            say!("unexpected: {frame:#x?}");
            shut_down(abi::sched::CRASH);
        }
    }
}

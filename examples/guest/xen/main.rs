//! A small paravirtual kernel: says hello on Xen's console and tries what a kernel of its kind needs, one subject after
//! the other, with nothing but start information and hypercalls. Each subject prints a line; the last hypercall says
//! whether all went well: power-off, or crash. With `crash` on its command line it does so earlier.
//!
//! It is of the old sort: its hypercalls go through the page that the domain builder fills, and it reads the
//! machine-to-physical table at the address that Xen's headers give.

#![no_std]
#![no_main]

mod abi;
mod entry;
mod processors;
#[path = "../runtime.rs"]
mod runtime;
mod time;
mod traps;
mod user;

use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use abi::{CONSOLE_IO, Number, SCHED_OP, START_INFO_MAGIC, StartInfo, direct_hypercall, hypercall};

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        hypercall(CONSOLE_IO, [abi::console::WRITE, text.len() as u64, text.as_ptr() as u64, 0]);
        Ok(())
    }
}

/// A line of its own, in one hypercall each part.
macro_rules! say {
    ($($argument:tt)*) => {{ let _ = core::fmt::Write::write_fmt(&mut crate::Console, format_args!("{}\n", format_args!($($argument)*))); }};
}
pub(crate) use say;

static FAILED: AtomicBool = AtomicBool::new(false);

/// Says how a subject went.
pub(crate) fn check(subject: &str, passed: bool) {
    if !passed {
        FAILED.store(true, Ordering::SeqCst);
    }
    say!("{} {subject}", if passed { "ok    " } else { "FAILED" });
}

pub(crate) fn shut_down(reason: u32) -> ! {
    hypercall(SCHED_OP, [abi::sched::SHUTDOWN, &raw const reason as u64, 0, 0]);
    loop {
        core::hint::spin_loop();
    }
}

/// The table of Xen's headers, entry `frame`.
fn machine_to_physical(frame: u64) -> u64 {
    // SAFETY: Xen shows the table there, read-only, with an entry for every machine frame of the domain.
    unsafe { (abi::MACH2PHYS as *const u64).add(frame as usize).read_volatile() }
}

fn start_information(info: &StartInfo) {
    say!("Hello from a paravirtual kernel: {} pages, {:?}", info.nr_pages, info.command_line());
    check("start information", info.magic.starts_with(START_INFO_MAGIC));
    // Every frame that the kernel is told of leads back to itself.
    let physical = [0, 0x100, info.pt_base >> 12, info.nr_pages - 1];
    let back = physical.iter().all(|pfn| machine_to_physical(abi::machine_frame(info, *pfn)) == *pfn);
    check("machine-to-physical table", back);
}

fn platform() {
    let [eax, ebx, ecx, edx] = abi::cpuid(0x4000_0000);
    let mut signature = [0; 12];
    for (bytes, word) in signature.chunks_exact_mut(4).zip([ebx, ecx, edx]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    check("CPUID with Xen's prefix", &signature == b"XenVMMXenVMM" && eax >= 0x4000_0002);
    let version = hypercall(Number(17), [0; 4]);
    check(
        "version, by the hypercall page and by SYSCALL",
        version >> 16 == 4 && version == direct_hypercall(17),
    );
    check(
        "hypercalls that do not exist",
        [11, 55, 127].iter().all(|nr| hypercall(Number(*nr), [0; 4]) == -38),
    );
}

/// Where `entry.rs` goes on.
#[unsafe(no_mangle)]
extern "C" fn kernel_main(info: &'static StartInfo) -> ! {
    start_information(info);
    if info.command_line().contains("crash") {
        // There is no handler yet.
        // SAFETY: ends the domain.
        unsafe { core::arch::asm!("ud2", options(noreturn)) };
    }
    platform();
    traps::set_up();
    abi::map_shared_info(info);
    traps::exceptions();
    time::timer();
    processors::second(info);
    user::program(info);
    let failed = FAILED.load(Ordering::SeqCst);
    say!("{}", if failed { "Something failed." } else { "All is well." });
    shut_down(if failed { abi::sched::CRASH } else { abi::sched::POWER_OFF })
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("guest panic: {info}");
    shut_down(abi::sched::CRASH)
}

//! What of Xen's interface the kernel uses (Xen public/xen.h and its siblings).

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::ffi::CStr;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// `MACH2PHYS_VIRT_START`.
pub(crate) const MACH2PHYS: u64 = 0xffff_8000_0000_0000;

pub(crate) const START_INFO_MAGIC: &[u8] = b"xen-3.0-x86_64\0";
/// DOMID_SELF.
pub(crate) const SELF: u64 = 0x7ff0;
/// FLAT_KERNEL_CS and FLAT_KERNEL_SS.
pub(crate) const CS: u64 = 0xe033;
pub(crate) const SS: u64 = 0xe02b;

/// The number of a hypercall.
#[derive(Clone, Copy)]
pub(crate) struct Number(pub(crate) u64);

pub(crate) const SET_TRAP_TABLE: Number = Number(0);
pub(crate) const STACK_SWITCH: Number = Number(3);
pub(crate) const SET_CALLBACKS: Number = Number(4);
pub(crate) const UPDATE_VA_MAPPING: Number = Number(14);
pub(crate) const CONSOLE_IO: Number = Number(18);
pub(crate) const VCPU_OP: Number = Number(24);
pub(crate) const MMUEXT_OP: Number = Number(26);
pub(crate) const SCHED_OP: Number = Number(29);
pub(crate) const EVENT_CHANNEL_OP: Number = Number(32);

pub(crate) mod console {
    pub(crate) const WRITE: u64 = 0;
}

pub(crate) mod sched {
    pub(crate) const YIELD: u64 = 0;
    pub(crate) const BLOCK: u64 = 1;
    pub(crate) const SHUTDOWN: u64 = 2;
    pub(crate) const POWER_OFF: u32 = 0;
    pub(crate) const CRASH: u32 = 3;
}

global_asm!(
    r#"
    .section .note.Xen, "a", @note
    .balign 4
    .macro note type:req, size:req
    .long 4, \size, \type
    .asciz "Xen"
    .endm
    note 1, 8                       // ENTRY
    .quad start
    note 2, 8                       // HYPERCALL_PAGE
    .quad hypercall_page
    note 3, 8                       // VIRT_BASE
    .quad 0
    note 4, 8                       // PADDR_OFFSET
    .quad 0
    note 5, 8                       // XEN_VERSION
    .asciz "xen-3.0"
    note 6, 8                       // GUEST_OS
    .asciz "test os"
    note 8, 8                       // LOADER
    .asciz "generic"

    .section .text.hypercall_page, "ax"
    .balign 4096
    .global hypercall_page
hypercall_page:
    .skip 4096
"#,
    options(att_syntax)
);

unsafe extern "C" {
    safe static hypercall_page: [[u8; 32]; 128];
}

/// Makes a hypercall by way of the page that the domain builder filled.
pub(crate) fn hypercall(Number(nr): Number, [a, b, c, d]: [u64; 4]) -> i64 {
    let stub = &raw const hypercall_page[nr as usize];
    let result;
    // SAFETY: a hypercall changes what its caller gave it the address of; every caller gives what may change.
    unsafe {
        asm!("call {stub}", stub = in(reg) stub, inlateout("rax") 0_u64 => result,
             inlateout("rdi") a => _, inlateout("rsi") b => _, inlateout("rdx") c => _, inlateout("r10") d => _,
             out("rcx") _, out("r11") _, out("r8") _, out("r9") _);
    }
    result
}

/// The hypercall without arguments, as newer kernels make it.
pub(crate) fn direct_hypercall(nr: u64) -> i64 {
    let result;
    // SAFETY: with no arguments there is nothing that the call could change.
    unsafe {
        asm!("syscall", inlateout("rax") nr => result, in("rdi") 0, in("rsi") 0, out("rcx") _, out("r11") _, options(nostack));
    }
    result
}

/// CPUID as Xen's prefix has it, which a trap to Xen answers.
pub(crate) fn cpuid(leaf: u32) -> [u32; 4] {
    let (eax, ebx, ecx, edx): (u32, u64, u32, u32);
    // SAFETY: CPUID changes these registers and no memory; RBX, which the compiler keeps, is put back.
    unsafe {
        asm!("mov {ebx}, rbx", "ud2", ".ascii \"xen\"", "cpuid", "xchg {ebx}, rbx", ebx = out(reg) ebx,
             inlateout("eax") leaf => eax, inlateout("ecx") 0 => ecx, lateout("edx") edx, options(nostack));
    }
    [eax, ebx as u32, ecx, edx]
}

/// `start_info`, as far as it is used.
#[repr(C)]
pub(crate) struct StartInfo {
    pub(crate) magic: [u8; 32],
    pub(crate) nr_pages: u64,
    shared_info: u64,
    flags: u64,
    store: [u64; 2],
    console: [u64; 2],
    /// Guest-virtual address of the root of the page tables.
    pub(crate) pt_base: u64,
    nr_pt_frames: u64,
    mfn_list: u64,
    module: [u64; 2],
    cmd_line: [u8; 1024],
}

impl StartInfo {
    pub(crate) fn command_line(&self) -> &str {
        CStr::from_bytes_until_nul(&self.cmd_line)
            .ok()
            .and_then(|text| text.to_str().ok())
            .unwrap_or("(no text)")
    }
}

/// The machine frame of a page.
pub(crate) fn machine_frame(info: &StartInfo, pfn: u64) -> u64 {
    // SAFETY: the list has an entry for every page, and is mapped.
    unsafe { (info.mfn_list as *const u64).add(pfn as usize).read_volatile() }
}

/// A page of the kernel's own, which others may change too: Xen, another processor, the page tables' owner.
#[repr(C, align(4096))]
pub(crate) struct Page(UnsafeCell<[u64; 512]>);

// SAFETY: whoever reads or writes it does so word by word, with raw pointers.
unsafe impl Sync for Page {}

impl Page {
    pub(crate) const fn new() -> Self {
        Self(UnsafeCell::new([0; 512]))
    }

    pub(crate) fn address(&self) -> u64 {
        self.0.get() as u64
    }

    pub(crate) fn set(&self, index: usize, value: u64) {
        // SAFETY: within the page, which nobody has a reference into.
        unsafe { self.0.get().cast::<u64>().add(index % 512).write_volatile(value) }
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: within the page, aligned; words in it are used as atomic ones only.
        unsafe { &*self.0.get().cast::<AtomicU64>().add(offset / 8) }
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: within the page; bytes in it are used as atomic ones only.
        unsafe { &*self.0.get().cast::<AtomicU8>().add(offset) }
    }
}

static SHARED_INFO: Page = Page::new();

/// UVMF_INVLPG.
const INVALIDATE: u64 = 2;

pub(crate) fn map_shared_info(info: &StartInfo) {
    let mapped = hypercall(UPDATE_VA_MAPPING, [SHARED_INFO.address(), info.shared_info | 7, INVALIDATE, 0]);
    crate::check(
        "shared information",
        mapped == 0 && SHARED_INFO.word(EVENTS_MASKED).load(Ordering::SeqCst) == u64::MAX,
    );
}

/// Takes the right to write away from a page, as page tables need it.
pub(crate) fn protect(info: &StartInfo, page: &Page) -> bool {
    let entry = machine_frame(info, page.address() >> 12) << 12 | 5;
    hypercall(UPDATE_VA_MAPPING, [page.address(), entry, INVALIDATE, 0]) == 0
}

const EVENTS_PENDING: usize = 2048;
const EVENTS_MASKED: usize = 2048 + 512;

/// The `vcpu_info` of a processor.
#[derive(Clone, Copy)]
pub(crate) struct VcpuInfo(pub(crate) usize);

impl VcpuInfo {
    fn byte(self, offset: usize) -> &'static AtomicU8 {
        SHARED_INFO.byte(self.0 * 64 + offset)
    }

    fn word(self, offset: usize) -> &'static AtomicU64 {
        SHARED_INFO.word(self.0 * 64 + offset)
    }

    /// Keeps events back, or lets them come.
    pub(crate) fn mask(self, masked: bool) {
        self.byte(1).store(masked.into(), Ordering::SeqCst);
    }

    /// The address of the last page fault.
    pub(crate) fn cr2(self) -> u64 {
        self.word(16).load(Ordering::SeqCst)
    }

    /// Time since the start, in nanoseconds (pvclock).
    pub(crate) fn system_time(self) -> u64 {
        let [stamp, base, scale] = [40, 48, 56].map(|offset| self.word(offset).load(Ordering::SeqCst));
        // SAFETY: reads the time-stamp counter.
        let ticks = unsafe { core::arch::x86_64::_rdtsc() }.wrapping_sub(stamp);
        let shift = (scale >> 32) as i8;
        let shifted = if shift < 0 { ticks >> -shift } else { ticks << shift };
        base + (u128::from(shifted) * u128::from(scale as u32) >> 32) as u64
    }

    /// Calls `f` for each port that has an event for this processor, and clears it.
    pub(crate) fn take_events(self, mut f: impl FnMut(u64)) {
        self.byte(0).store(0, Ordering::SeqCst);
        let selected = self.word(8).swap(0, Ordering::SeqCst);
        for word in (0..64).filter(|word| selected >> word & 1 != 0) {
            let masked = SHARED_INFO.word(EVENTS_MASKED + 8 * word).load(Ordering::SeqCst);
            let pending = SHARED_INFO.word(EVENTS_PENDING + 8 * word);
            let ready = pending.load(Ordering::SeqCst) & !masked;
            for bit in (0..64).filter(|bit| ready >> bit & 1 != 0) {
                pending.fetch_and(!(1 << bit), Ordering::SeqCst);
                f(word as u64 * 64 + bit);
            }
        }
    }

    /// Waits until `done`, which an event sets.
    pub(crate) fn wait(self, done: impl Fn() -> bool) {
        self.mask(true);
        while !done() {
            // Lets events come and waits for one; none can come in between.
            hypercall(SCHED_OP, [sched::BLOCK, 0, 0, 0]);
            self.mask(true);
        }
        self.mask(false);
    }
}

/// Commands of `event_channel_op`.
pub(crate) mod event {
    use super::{EVENT_CHANNEL_OP, hypercall};

    fn op<const N: usize>(command: u64, request: &mut [u32; N]) -> bool {
        hypercall(EVENT_CHANNEL_OP, [command, request.as_mut_ptr() as u64, 0, 0]) == 0
    }

    /// A port for a virtual interrupt of processor 0.
    pub(crate) fn bind_virq(virq: u32) -> Option<u32> {
        let mut request = [virq, 0, 0];
        op(1, &mut request).then_some(request[2])
    }

    /// A port that reaches `vcpu`.
    pub(crate) fn bind_ipi(vcpu: u32) -> Option<u32> {
        let mut request = [vcpu, 0];
        op(7, &mut request).then_some(request[1])
    }

    pub(crate) fn send(port: u32) -> bool {
        op(4, &mut [port])
    }

    pub(crate) fn unmask(port: u32) -> bool {
        op(9, &mut [port])
    }
}

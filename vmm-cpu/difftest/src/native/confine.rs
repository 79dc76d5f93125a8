//! What a child gives up before it runs cases.
#![allow(unsafe_code, reason = "system calls")]

use super::enter::call_sites;

/// AUDIT_ARCH_X86_64 of linux/audit.h.
const ARCH: u32 = 0xc000_003e;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const RIP_LOW: u32 = 8;
const RIP_HIGH: u32 = 12;

fn load(offset: u32) -> libc::sock_filter {
    libc::sock_filter { code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, jt: 0, jf: 0, k: offset }
}

/// Skips so many instructions if the value is `k`, and so many if not.
fn equal(k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, jt, jf, k }
}

fn answer(k: u32) -> libc::sock_filter {
    libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k }
}

/// Every system call becomes a SIGSYS, but for a few from this program's own code: the one that waits, the one that
/// ends, and the return from a signal.
fn filter() -> [libc::sock_filter; 14] {
    let [call, back] = call_sites();
    let high = (call >> 32) as u32;
    let numbers = [libc::SYS_futex as u32, libc::SYS_exit_group as u32, libc::SYS_rt_sigreturn as u32];
    let [futex, exit_group, sigreturn] = numbers;
    [
        load(ARCHITECTURE),
        equal(ARCH, 0, 10),
        load(RIP_HIGH),
        equal(high, 0, 8),
        load(RIP_LOW),
        equal(call as u32, 1, 0),
        equal(back as u32, 3, 5),
        load(NUMBER),
        equal(futex, 4, 0),
        equal(exit_group, 3, 2),
        load(NUMBER),
        equal(sigreturn, 1, 0),
        answer(libc::SECCOMP_RET_TRAP),
        answer(libc::SECCOMP_RET_ALLOW),
    ]
}

fn limit(resource: libc::__rlimit_resource_t, value: u64) -> bool {
    let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: the argument lives for the call.
    unsafe { libc::setrlimit(resource, &raw const limit) == 0 }
}

fn control(option: libc::c_int, value: libc::c_ulong) -> bool {
    // SAFETY: options that take numbers.
    unsafe { libc::prctl(option, value, 0, 0, 0) == 0 }
}

/// Gives up whatever a case could do harm with. No descriptor is left, nor any way to get one. Whether it worked.
pub(super) fn confine() -> bool {
    // SAFETY: nothing here is going to use a descriptor again.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) } == 0;
    let limits = limit(libc::RLIMIT_CORE, 0) && limit(libc::RLIMIT_NOFILE, 0) && limit(libc::RLIMIT_FSIZE, 0);
    let filter = filter();
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    closed
        && limits
        && control(libc::PR_SET_NO_NEW_PRIVS, 1)
        // SAFETY: the program lives for the call.
        && unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) } == 0
}

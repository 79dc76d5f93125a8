//! What the process gives up before a guest runs. A guest that breaks out of the monitor then has the monitor's
//! memory and the descriptors that it works with, and can open, connect, start and map nothing.
//!
//! Two seccomp filters do it. One ends the process at a call that is not on the list of what a running monitor
//! needs. The other refuses what opens files with EACCES: libraries look for files that they can do without (the
//! allocator for the number of processors, a panic for the program's symbols), and must not die of it.
//!
//! Threads that exist are confined as well, and no new ones can be started: start them before. Descriptors from
//! whoever started the program are not for the guest either; see [`inherited_descriptors`].

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::RawFd;

use anyhow::{Context, Result, ensure};
use seccompiler::{
    SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Compare, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};

/// The most descriptors that can be refused: each is compared with at every call that takes one.
const MOST_DENIED: usize = 32;

/// The type of KVM's requests in bits 8 to 15 of a request (Linux, include/uapi/linux/kvm.h, KVMIO).
const KVM_REQUESTS: u64 = 0xae00;
const REQUEST_TYPE: u64 = 0xff00;

/// What runs the guest, which decides what it needs of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Engine {
    /// An interpreter: no memory becomes executable.
    Interpreter,
    /// A translator, which writes machine code.
    Translator,
    /// KVM: its requests are let through.
    Kvm,
}

/// Calls that read from or write to a descriptor.
const DESCRIPTOR_CALLS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_fstat,
    libc::SYS_timerfd_settime,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
];

/// Calls that are harmless whatever their arguments.
const FREE_CALLS: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_ppoll,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// Calls by which a socket device serves its guest, but for the one that makes sockets.
const UNIX_SOCKET_CALLS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_epoll_create1,
    libc::SYS_getsockopt,
    libc::SYS_sendmsg,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// The family of sockets that a device is given.
const UNIX: u64 = libc::AF_UNIX as u64;

/// Calls that find something by a path.
const PATH_CALLS: &[libc::c_long] = &[
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getcwd,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_readlinkat,
    libc::SYS_statx,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
];

/// Requests about a terminal's mode and size. TIOCSTI, which types for the user, is not among them.
const TERMINAL_REQUESTS: [libc::Ioctl; 6] =
    [libc::TCGETS, libc::TCSETS, libc::TCSETSW, libc::TCGETS2, libc::TCSETS2, libc::TIOCGWINSZ];

/// Requests of a network device that is on a tap device while its driver comes, and chooses queues and offloads.
pub const TAP_REQUESTS: [libc::Ioctl; 2] = [libc::TUNSETOFFLOAD, libc::TUNSETQUEUE];

/// What the process keeps.
#[derive(Debug, Clone)]
#[must_use = "nothing is given up before `enter`"]
pub struct Confinement {
    engine: Engine,
    denied: Vec<RawFd>,
    allowed: Vec<libc::c_long>,
    requests: Vec<libc::Ioctl>,
    duplicates: bool,
    conditions: Vec<(libc::c_long, u8, u64)>,
}

impl Confinement {
    /// What a guest on `engine` needs, and no more.
    pub fn new(engine: Engine) -> Self {
        Self {
            engine,
            denied: Vec::new(),
            allowed: Vec::new(),
            requests: Vec::new(),
            duplicates: false,
            conditions: Vec::new(),
        }
    }

    /// Refuses to read from or write to `descriptors`, of which 32 can be named.
    pub fn deny_descriptors(mut self, descriptors: &[RawFd]) -> Self {
        self.denied.extend(descriptors);
        self
    }

    /// Also lets through the system call with that number, for a device that needs it.
    pub fn allow(mut self, call: libc::c_long) -> Self {
        self.allowed.push(call);
        self
    }

    /// Also lets through that system call where its argument of that number, from 0 on, has that value: 32 bits.
    pub fn allow_if(mut self, call: libc::c_long, argument: u8, value: u64) -> Self {
        self.conditions.push((call, argument, value));
        self
    }

    /// Also lets through these requests of ioctl(2), for devices that need them: [`TAP_REQUESTS`].
    pub fn allow_requests(mut self, requests: &[libc::Ioctl]) -> Self {
        self.requests.extend(requests);
        self
    }

    /// Also lets descriptors be duplicated, but for those that are denied: an event loop does so with what a device waits for, when
    /// the guest's driver comes.
    pub fn allow_duplicates(mut self) -> Self {
        self.duplicates = true;
        self
    }

    /// Also lets it connect to Unix sockets, of whatever path, and accept at those at which it listens: what a socket device does for its
    /// guest. There are no sockets of other families.
    pub fn allow_unix_sockets(mut self) -> Self {
        self.allowed.extend(UNIX_SOCKET_CALLS);
        self.conditions.push((libc::SYS_socket, 0, UNIX));
        self.allow_duplicates()
    }

    /// Confines all threads of the process, for good. It also can no longer gain privileges by starting a program.
    ///
    /// # Errors
    /// Fails if the host has no seccomp, or too many descriptors are denied. The process may then be confined in
    /// part and should end.
    pub fn enter(&self) -> Result<()> {
        let refuse = SeccompAction::Errno(u32::try_from(libc::EACCES)?);
        let paths = PATH_CALLS.iter().map(|call| (*call, Vec::new())).collect();
        // First, while installing filters is still possible.
        install(paths, SeccompAction::Allow, refuse)?;
        install(self.rules()?, SeccompAction::KillProcess, SeccompAction::Allow)
    }

    /// The calls that are let through, each with what its arguments may be.
    fn rules(&self) -> Result<Rules> {
        ensure!(
            self.denied.len() <= MOST_DENIED,
            "{} descriptors are to be denied, possible are {MOST_DENIED}",
            self.denied.len()
        );
        let mut rules: Rules = FREE_CALLS.iter().chain(PATH_CALLS).map(|call| (*call, Vec::new())).collect();
        let mut other_descriptors = Vec::new();
        for descriptor in &self.denied {
            other_descriptors.push(condition(0, Compare::Ne, u64::try_from(*descriptor)?)?);
        }
        for call in DESCRIPTOR_CALLS {
            let alternatives = match other_descriptors.as_slice() {
                [] => Vec::new(),
                conditions => vec![SeccompRule::new(conditions.to_vec())?],
            };
            rules.insert(*call, alternatives);
        }

        let executable = u64::try_from(libc::PROT_EXEC)?;
        let anonymous = u64::try_from(libc::MAP_ANONYMOUS)?;
        let mut map = vec![condition(3, Compare::MaskedEq(anonymous), anonymous)?];
        let mut protect = Vec::new();
        if self.engine != Engine::Translator {
            map.push(condition(2, Compare::MaskedEq(executable), 0)?);
            protect.push(SeccompRule::new(vec![condition(2, Compare::MaskedEq(executable), 0)?])?);
        }
        rules.insert(libc::SYS_mmap, vec![SeccompRule::new(map)?]);
        rules.insert(libc::SYS_mprotect, protect);

        let mut requests = Vec::new();
        for request in TERMINAL_REQUESTS.iter().chain(&self.requests) {
            requests.push(SeccompRule::new(vec![condition(1, Compare::Eq, *request)?])?);
        }
        if self.engine == Engine::Kvm {
            let kvm = condition(1, Compare::MaskedEq(REQUEST_TYPE), KVM_REQUESTS)?;
            requests.push(SeccompRule::new(vec![kvm])?);
        }
        rules.insert(libc::SYS_ioctl, requests);

        // What Rust's library asks before it closes a descriptor, in a program with debug assertions.
        let is_open = condition(1, Compare::Eq, u64::try_from(libc::F_GETFD)?)?;
        let mut controls = vec![SeccompRule::new(vec![is_open])?];
        if self.duplicates {
            let duplicate = condition(1, Compare::Eq, u64::try_from(libc::F_DUPFD_CLOEXEC)?)?;
            controls.push(SeccompRule::new([other_descriptors, vec![duplicate]].concat())?);
        }
        rules.insert(libc::SYS_fcntl, controls);
        // A thread that was just started may not have its name yet.
        let set_name = condition(0, Compare::Eq, u64::try_from(libc::PR_SET_NAME)?)?;
        rules.insert(libc::SYS_prctl, vec![SeccompRule::new(vec![set_name])?]);
        // Signals to its own threads: how a vCPU is stopped, and how a signal ends the process.
        let this_process = condition(0, Compare::Eq, u64::from(std::process::id()))?;
        rules.insert(libc::SYS_tgkill, vec![SeccompRule::new(vec![this_process])?]);
        for (call, argument, value) in &self.conditions {
            let alternative = SeccompRule::new(vec![condition(*argument, Compare::Eq, *value)?])?;
            rules
                .entry(*call)
                .and_modify(|rules| {
                    if !rules.is_empty() {
                        rules.push(alternative.clone())
                    }
                })
                .or_insert_with(|| vec![alternative]);
        }
        rules.extend(self.allowed.iter().map(|call| (*call, Vec::new())));
        Ok(rules)
    }
}

/// System calls, each with alternatives for its arguments; with none, all are meant.
type Rules = BTreeMap<libc::c_long, Vec<SeccompRule>>;

fn condition(argument: u8, compare: Compare, value: u64) -> Result<SeccompCondition> {
    // All that are compared are of type int or unsigned int, whose upper half the kernel does not look at.
    Ok(SeccompCondition::new(argument, Length::Dword, compare, value)?)
}

fn install(rules: Rules, otherwise: SeccompAction, then: SeccompAction) -> Result<()> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(rules, otherwise, then, architecture)?;
    let program: seccompiler::BpfProgram = filter.try_into()?;
    apply_filter_all_threads(&program).context("installing a seccomp filter")
}

/// Descriptors, standard ones apart, that whoever started the program left open. Call it before the program opens
/// anything.
///
/// They are not closed: which of them a library opened meanwhile is not to be known, and one that is refused to
/// the guest's monitor does it no good.
///
/// # Errors
/// Fails if there is no `/proc`.
pub fn inherited_descriptors() -> Result<Vec<RawFd>> {
    const OWN: &str = "/proc/self/fd";
    let mut listed = Vec::new();
    for entry in fs::read_dir(OWN).context(OWN)? {
        listed.extend(entry.context(OWN)?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()));
    }
    // The listing's own is closed by now.
    let open = |descriptor: &RawFd| fs::symlink_metadata(format!("{OWN}/{descriptor}")).is_ok();
    Ok(listed.into_iter().filter(|descriptor| *descriptor > 2 && open(descriptor)).collect())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{self, ErrorKind, Write as _};
    use std::os::fd::{AsFd as _, AsRawFd as _};
    use std::os::unix::net::UnixStream;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Command, Output, exit};

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::termios::tcgetattr;

    use vmm_cpu::{CpuModel, VmConfig};

    use super::*;

    /// Tells this test, started as a process of its own, what to try.
    const ATTEMPT: &str = "VMM_EXAMPLES_ATTEMPT";

    /// IA32_TIME_STAMP_COUNTER.
    const TSC: u32 = 0x10;

    fn attempt(what: &str) -> ! {
        let null = File::options().write(true).open("/dev/null").unwrap();
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let kvm = vmm_cpu::open_backend("kvm").and_then(|kvm| kvm.create_vm(&VmConfig::new(CpuModel::Host)));
        let mut vcpu = kvm.as_ref().ok().map(|vm| vm.create_vcpu(0).unwrap());
        let engine = if what == "KVM's request" { Engine::Kvm } else { Engine::Interpreter };
        let mut confinement = Confinement::new(engine).deny_descriptors(&[null.as_raw_fd()]);
        if what == "eventfd that is allowed" {
            confinement = confinement.allow(libc::SYS_eventfd2);
        }
        if what.starts_with("duplicate that is allowed") {
            confinement = confinement.allow_duplicates();
        }
        if what == "request that is allowed" {
            confinement = confinement.allow_requests(&[libc::FIONREAD]);
        }
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || receiver.recv().is_err());
        confinement.enter().unwrap();
        let done = match what {
            "work" => {
                let memory: Vec<Vec<u8>> = (0..64).map(|n| vec![n; 1 << 20]).collect();
                assert_eq!(memory.iter().map(|block| block.len()).sum::<usize>(), 64 << 20);
                assert_eq!(rustix::io::write(&event, &1_u64.to_ne_bytes()).unwrap(), 8);
                std::thread::sleep(std::time::Duration::from_millis(1));
                assert!(std::thread::available_parallelism().is_ok());
                assert!(tcgetattr(io::stdin()).is_err());
                drop(sender);
                assert!(thread.join().unwrap());
                true
            }
            "open" => {
                matches!(File::open("/dev/null"), Err(error) if error.kind() == ErrorKind::PermissionDenied)
            }
            "panic" => std::panic::catch_unwind(|| panic!("a panic of the test")).is_err(),
            "eventfd that is allowed" => eventfd(0, EventfdFlags::CLOEXEC).is_ok(),
            "eventfd" => eventfd(0, EventfdFlags::CLOEXEC).is_err(),
            "denied descriptor" => (&null).write(b"x").is_err(),
            "socket" => UnixStream::pair().is_err(),
            "thread" => std::thread::Builder::new().spawn(|| ()).is_err(),
            "program" => Command::new("true").spawn().is_err(),
            "duplicate that is allowed" => event.try_clone().is_ok(),
            "duplicate" => event.try_clone().is_err(),
            "duplicate that is allowed of a denied descriptor" => null.try_clone().is_err(),
            "request that is allowed" => rustix::io::ioctl_fionread(event.as_fd()).is_err(),
            "other request" => rustix::io::ioctl_fionread(event.as_fd()).is_err(),
            _ => vcpu.as_mut().is_some_and(|vcpu| vcpu.msr(TSC).is_ok()),
        };
        println!("came back: {done}");
        io::stdout().flush().unwrap();
        exit(i32::from(!done))
    }

    fn child(what: &str) -> Output {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "confine::tests::what_is_not_needed_is_refused"])
            .env(ATTEMPT, what)
            .env("RUST_BACKTRACE", "1")
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap()
    }

    #[test]
    fn what_is_not_needed_is_refused() {
        if let Ok(what) = std::env::var(ATTEMPT) {
            attempt(&what);
        }
        let (mut possible, mut refused) = (
            vec![
                "work",
                "open",
                "panic",
                "eventfd that is allowed",
                "duplicate that is allowed",
                "request that is allowed",
            ],
            vec![
                "eventfd",
                "denied descriptor",
                "duplicate",
                "duplicate that is allowed of a denied descriptor",
                "socket",
                "thread",
                "program",
                "other request",
            ],
        );
        match vmm_cpu::open_backend("kvm") {
            Ok(_) => {
                possible.push("KVM's request");
                refused.push("KVM's request of an interpreter");
            }
            Err(error) => println!("KVM's requests: skipped: {error}"),
        }
        for what in possible {
            let output = child(what);
            assert_eq!(output.status.code(), Some(0), "{what}: {output:?}");
            assert!(
                String::from_utf8_lossy(&output.stdout).contains("came back: true"),
                "{what}: {output:?}"
            );
        }
        for what in refused {
            let output = child(what);
            assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{what}: {output:?}");
            assert!(!String::from_utf8_lossy(&output.stdout).contains("came back"), "{what}: {output:?}");
        }
    }

    #[test]
    fn each_engine_has_what_it_needs() {
        let rules = |engine| Confinement::new(engine).rules().unwrap();
        let interpreter = rules(Engine::Interpreter);
        assert_eq!(interpreter[&libc::SYS_mprotect].len(), 1);
        assert!(rules(Engine::Translator)[&libc::SYS_mprotect].is_empty());
        assert_eq!(rules(Engine::Kvm)[&libc::SYS_ioctl].len(), interpreter[&libc::SYS_ioctl].len() + 1);
        let sockets = Confinement::new(Engine::Interpreter).allow_unix_sockets().rules().unwrap();
        assert!(sockets[&libc::SYS_socket].len() == 1 && sockets.contains_key(&libc::SYS_connect));
        for call in [libc::SYS_execve, libc::SYS_socket, libc::SYS_clone, libc::SYS_ptrace, libc::SYS_dup] {
            assert!(!interpreter.contains_key(&call), "{call}");
        }
    }

    #[test]
    fn too_many_descriptors_are_refused() {
        let many: Vec<RawFd> = (3..).take(MOST_DENIED + 1).collect();
        let error = Confinement::new(Engine::Kvm).deny_descriptors(&many).rules().unwrap_err();
        assert_eq!(error.to_string(), "33 descriptors are to be denied, possible are 32");
    }

    #[test]
    fn a_descriptor_that_is_open_is_found() {
        let file = File::open("/dev/null").unwrap();
        assert!(inherited_descriptors().unwrap().contains(&file.as_raw_fd()));
    }
}

//! The backends under test.

use std::fmt;
use std::sync::Arc;

use vmm_cpu::{CpuModel, Error, Hypervisor, InterruptMode, VmConfig, backend_names, open_backend};

use super::case::Stop;
use super::toy::ToyHypervisor;

/// The backend that executes privileged code in software, and programs on KVM.
const KVM_FOR_PROGRAMS: &str = "kvm-programs";

/// The backend whose guests are of another kind.
const PARAVIRTUAL: &str = "xen-pv";

/// A backend that is compiled in, and whether this host has what it needs.
pub(crate) struct Candidate {
    pub(crate) name: &'static str,
    opened: Result<Backend, Error>,
    /// The subjects that it differs in from one that is there already; all if it is new.
    subjects: Option<&'static [&'static str]>,
}

/// A backend that is open.
#[derive(Clone)]
pub(crate) struct Backend {
    name: &'static str,
    pub(crate) hypervisor: Arc<dyn Hypervisor>,
}

/// Cases that KVM cannot pass on a host whose processor has no virtualization, and why. KVM then emulates the
/// guest's privileged code one instruction at a time and runs the rest natively.
const KVM_WITHOUT_HARDWARE: &[(&str, &str)] = &[
    ("cpuid::guest_sees_no_feature_beyond_the_table", "features of unprivileged code cannot be hidden"),
    ("clock::counter_stands_still_while_paused", "the guest's time-stamp counter is the host's"),
    ("debug::watchpoint_stops_after_a_write", "data breakpoints never fire"),
    ("debug::watchpoint_stops_after_an_access", "data breakpoints never fire"),
    ("debug::int3_stops_the_debugger", "INT3 goes to the guest"),
    ("debug::int3_is_the_guests_unless_asked_for", "INT3 of privileged 64-bit code is not emulated"),
    (
        "ordering::locked_additions_across_cache_lines_and_pages_add_up",
        "a locked access that is not aligned is emulated as a load and a store",
    ),
    ("hypercalls::not_passed_on_fails_in_the_guest", "VMCALL is patched and executed again for ever"),
    (
        "programs::alignment_is_checked_if_the_kernel_wants_that",
        "unprivileged code runs with the host's CR0.AM",
    ),
];

/// Cases that a virtual machine with privileged code in software, and programs on KVM without virtualization hardware, cannot
/// pass.
const SOFTWARE_AND_KVM: &[(&str, &str)] = &[
    (
        "unemulated::wide_accesses_of_a_device",
        "software has no AVX, which kernels are told of to keep its registers",
    ),
    ("clock::counter_stands_still_while_paused", "the guest's time-stamp counter is the host's"),
    ("memory::memory_that_the_host_has_lost_is_named", "the kernel's accesses are this process's"),
    (
        "programs::number_of_the_processor_is_what_the_kernel_has_said",
        "the processor has the host's IA32_TSC_AUX again whenever KVM_RUN has returned",
    ),
];

/// Subjects whose guests are too much for the toy.
const BEYOND_THE_TOY: &[&str] =
    &["ordering", "litmus", "cross_modifying", "shootdown", "transfers", "unemulated", "programs"];

/// All backends: those of the crate by name, and the suite's own. One that executes guests in several ways is several.
pub(crate) fn candidates() -> Vec<Candidate> {
    let mut candidates = Vec::new();
    for &name in backend_names() {
        #[cfg(feature = "translate")]
        if name == vmm_cpu::translate::NAME {
            candidates.extend(tiers());
            continue;
        }
        let opened = open_backend(name).map(|hypervisor| Backend { name, hypervisor: Arc::from(hypervisor) });
        candidates.push(Candidate { name, opened, subjects: None });
        #[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
        if name == vmm_cpu::kvm::NAME {
            candidates.extend(kvm_with_rings());
            #[cfg(feature = "translate")]
            candidates.push(kvm_for_programs());
        }
    }
    let name = ToyHypervisor::NAME;
    let toy = Backend { name, hypervisor: Arc::new(ToyHypervisor::new()) };
    candidates.push(Candidate { name, opened: Ok(toy), subjects: None });
    candidates
}

/// The interpreter alone, and all that can be translated from its first run on.
#[cfg(feature = "translate")]
fn tiers() -> [Candidate; 2] {
    use vmm_cpu::translate::{TranslateHypervisor, TranslateOptions};

    [("translate-tier0", None), ("translate-tier1", Some(0))].map(|(name, translate_after)| {
        let options = TranslateOptions::default().translate_after(translate_after);
        let hypervisor = Arc::new(TranslateHypervisor::with_options(options));
        Candidate { name, opened: Ok(Backend { name, hypervisor }), subjects: None }
    })
}

/// KVM that notes dirty pages in rings, where it knows how.
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
fn kvm_with_rings() -> Option<Candidate> {
    let name = "kvm-dirty-ring";
    // Without virtualization hardware the kernel writes for the guest, and notes each write, for as long as it likes before it
    // looks whether there is room: only a ring that is never full is of use.
    let opened = match kvm_with_ring(65_536) {
        Err(Error::Unsupported { .. }) => return None,
        opened => opened.map(|hypervisor| Backend { name, hypervisor }),
    };
    Some(Candidate { name, opened, subjects: Some(&["dirty", "huge_pages"]) })
}

/// KVM that runs programs, with privileged code in software.
#[cfg(all(feature = "kvm", feature = "translate", target_os = "linux", target_arch = "x86_64"))]
fn kvm_for_programs() -> Candidate {
    use vmm_cpu::kvm::{KvmHypervisor, KvmOptions};

    let name = KVM_FOR_PROGRAMS;
    let kvm =
        KvmHypervisor::with_options(KvmOptions::default().privileged_in_software(true).all_programs(true));
    let opened = kvm.map(|kvm| Backend { name, hypervisor: Arc::new(kvm) });
    Candidate { name, opened, subjects: None }
}

#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
fn kvm_with_ring(entries: u32) -> Result<Arc<dyn Hypervisor>, Error> {
    use vmm_cpu::kvm::{KvmHypervisor, KvmOptions};

    let kvm = KvmHypervisor::with_options(KvmOptions::default().dirty_ring(Some(entries)))?;
    Ok(Arc::new(kvm))
}

impl Candidate {
    /// The backend; a host that lacks the interface, or keeps it from this user, is no failure of the backend.
    pub(crate) fn backend(&self) -> Result<&Backend, Stop> {
        self.opened.as_ref().map_err(|error| match error {
            Error::HostInterfaceAbsent { path, .. } => Stop::skipped(format!("no {path}")),
            Error::PermissionDenied { path, .. } => Stop::skipped(format!("no permission to open {path}")),
            other => Stop::failed(other.to_string()),
        })
    }

    /// Whether cases of that subject say something about it.
    pub(crate) fn is_for(&self, subject: &str) -> bool {
        self.subjects.is_none_or(|subjects| subjects.contains(&subject))
    }

    /// Says why this host cannot run the case of that name, if so.
    pub(crate) fn check_limits(&self, case: &str) -> Result<(), Stop> {
        if self.name == PARAVIRTUAL {
            return Err(Stop::skipped(
                "the guests here know nothing of Xen's ABI, which this backend's have to",
            ));
        }
        let subject = case.split("::").next().unwrap_or_default();
        if self.name == ToyHypervisor::NAME && BEYOND_THE_TOY.contains(&subject) {
            return Err(Stop::skipped("the toy interpreter knows too few instructions"));
        }
        let is_software = self.name == KVM_FOR_PROGRAMS;
        if let Some((_, reason)) = SOFTWARE_AND_KVM.iter().find(|(name, _)| is_software && *name == case) {
            return Err(Stop::skipped(*reason));
        }
        let without_hardware = self.opened.as_ref().is_ok_and(Backend::is_kvm_without_hardware);
        match KVM_WITHOUT_HARDWARE.iter().find(|(name, _)| without_hardware && *name == case) {
            Some((_, reason)) => Err(Stop::skipped(format!("KVM without virtualization hardware: {reason}"))),
            None => Ok(()),
        }
    }
}

impl Backend {
    /// A configuration with the host's CPU in interrupt mode `mode`.
    pub(crate) fn config(&self, mode: InterruptMode) -> Result<VmConfig, Stop> {
        if !self.hypervisor.capabilities().interrupt_modes.contains(&mode) {
            return Err(Stop::skipped(format!("interrupt mode {mode:?} is not offered")));
        }
        Ok(VmConfig::new(CpuModel::Host).interrupts(mode))
    }

    /// How many times too often a level-triggered interrupt may arrive. KVM without virtualization hardware repeats
    /// one in fifty although its line fell before the end of interrupt; everywhere else a repetition is an error.
    pub(crate) fn level_repetitions(&self) -> u64 {
        u64::from(self.is_kvm_without_hardware())
    }

    /// The same backend with dirty rings that are soon full, if it has rings.
    pub(crate) fn with_small_rings(&self) -> Option<Result<Self, Error>> {
        #[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
        if self.name == "kvm-dirty-ring" {
            return Some(kvm_with_ring(1024).map(|hypervisor| Self { name: self.name, hypervisor }));
        }
        None
    }

    pub(crate) fn is_kvm_without_hardware(&self) -> bool {
        self.hypervisor.name() == "kvm"
            && self.name != KVM_FOR_PROGRAMS
            && self.hypervisor.capabilities().hardware_assisted == Some(false)
    }

    /// All other backends that this host can run.
    pub(crate) fn others(&self) -> Vec<Backend> {
        candidates()
            .into_iter()
            .filter(|other| other.name != self.name && other.name != PARAVIRTUAL && other.subjects.is_none())
            .filter_map(|other| other.opened.ok())
            .collect()
    }
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

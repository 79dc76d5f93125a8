//! Opening `/dev/kvm`, capabilities, creating virtual machines.

use std::ffi::CString;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_VM_TYPES, KVM_CAP_X2APIC_API,
    KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::dirty::DirtyRings;
use super::vm::{KvmVm, VmInner, VmParts, enable_cap};
use super::{NAME, host, platform_state, sys};
use crate::cpuid::{CpuidEntry, CpuidTable};
use crate::error::{Error, Result};
use crate::hypervisor::{Capabilities, ClockSource, Hypervisor, InterruptMode, VmConfig};
use crate::state::VmState;
use crate::vm::Vm;

/// Where KVM wants three pages for a task-state segment and one for an identity map on Intel
/// processors without unrestricted guest; below 4 GiB, outside of RAM and of the firmware.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TSS: usize = 0xfffb_d000;

/// Inputs of the VMM's I/O APIC whose ends of interrupt KVM reports with a split irqchip.
const SPLIT_IO_APIC_PINS: u64 = 24;

/// sizeof(struct kvm_dirty_gfn).
const DIRTY_ENTRY_BYTES: u32 = 16;

/// The kernel wants room for what it notes before it looks whether a ring is full: 64 entries, and 512 where the processor logs
/// pages by itself.
const LEAST_DIRTY_ENTRIES: u32 = 1024;

/// Leaves that hold the processor's name (Intel SDM 2A, CPUID).
const BRAND_STRING: std::ops::RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;

/// What the backend cannot do without.
const REQUIRED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// How the backend is to be, beside what it is unless somebody says otherwise.
///
/// ```no_run
/// use vmm_cpu::kvm::{KvmHypervisor, KvmOptions};
///
/// let kvm = KvmHypervisor::with_options(KvmOptions::default().dirty_ring(Some(4096)))?;
/// # Ok::<(), vmm_cpu::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvmOptions {
    dirty_ring: Option<u32>,
    software_protected: bool,
    finish_instructions: bool,
    #[cfg(feature = "translate")]
    privileged_in_software: bool,
    #[cfg(feature = "translate")]
    all_programs: bool,
}

impl Default for KvmOptions {
    fn default() -> Self {
        Self {
            dirty_ring: None,
            software_protected: false,
            finish_instructions: true,
            #[cfg(feature = "translate")]
            privileged_in_software: false,
            #[cfg(feature = "translate")]
            all_programs: false,
        }
    }
}

impl KvmOptions {
    /// Has each vCPU note the pages that it writes in a ring of so many entries, a power of two, instead of a bitmap:
    /// harvesting then takes time by what was written and not by how much memory there is. A ring takes 16 bytes an entry,
    /// and its vCPU stops for a moment when it is full. `None`, which holds unless something else is said: the bitmap.
    #[must_use]
    pub fn dirty_ring(mut self, entries: Option<u32>) -> Self {
        self.dirty_ring = entries;
        self
    }

    /// Makes virtual machines whose memory can be private (`KVM_X86_SW_PROTECTED_VM`), which shows as
    /// [`Vm::private_memory`]. Linux has these for development only.
    #[must_use]
    pub fn software_protected(mut self, protected: bool) -> Self {
        self.software_protected = protected;
        self
    }

    /// Whether an instruction that KVM gives up on (KVM_EXIT_INTERNAL_ERROR, emulation failure) is executed in software, one at a
    /// time, by the interpreter of [`translate`](crate::translate): MMIO by vector instructions, `cmpxchg16b`, far transfers and
    /// `iret` of protected mode on KVMs that lack them. What software cannot execute as the guest's processor would is
    /// [`Error::Unhandled`] as without; [`Vcpu::exit_counts`](crate::Vcpu::exit_counts) has how many there were. Holds unless something
    /// else is said; without feature `translate` it means nothing.
    #[must_use]
    pub fn finish_instructions(mut self, finish: bool) -> Self {
        self.finish_instructions = finish;
        self
    }
}

#[cfg(feature = "translate")]
impl KvmOptions {
    /// Has software, the translator of [`translate`](crate::translate), execute all but programs (64-bit code at privilege level 3),
    /// which KVM runs. For hosts without VT-x or SVM, whose KVM emulates the rest one instruction at a time: [`Capabilities`] say
    /// `hardware_assisted: Some(false)`. Such a virtual machine has what those of `translate` have: local APICs of software,
    /// up to 8 vCPUs. Its time-stamp counter is the host's.
    #[must_use]
    pub fn privileged_in_software(mut self, software: bool) -> Self {
        self.privileged_in_software = software;
        self
    }

    /// With [`KvmOptions::privileged_in_software`], has KVM run all programs, those too that ask their kernel so often that they are
    /// faster in software: for tests, and for measurements.
    #[must_use]
    pub fn all_programs(mut self, all: bool) -> Self {
        self.all_programs = all;
        self
    }
}

/// The KVM backend.
#[derive(Debug)]
pub struct KvmHypervisor {
    kvm: Kvm,
    options: KvmOptions,
    capabilities: Capabilities,
    cpuid: CpuidTable,
    /// What programs see, and the width of their addresses, where privileged code is software's.
    #[cfg(feature = "translate")]
    host: (CpuidTable, u8),
    /// What the processor itself says.
    #[cfg(feature = "translate")]
    processor: CpuidTable,
    saved_msrs: Vec<u32>,
    run_page_size: usize,
    max_slots: u32,
    default_tsc_khz: OnceLock<u32>,
}

impl KvmHypervisor {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// [`Error::HostInterfaceAbsent`], [`Error::PermissionDenied`] or [`Error::HostTooOld`], which say
    /// what to do.
    pub fn open() -> Result<Self> {
        Self::open_path("/dev/kvm")
    }

    /// Opens `/dev/kvm` for virtual machines with those options.
    ///
    /// # Errors
    /// As [`KvmHypervisor::open`]; [`Error::Unsupported`] for an option that the host's KVM lacks, and
    /// [`Error::InvalidArgument`] for a number of entries that it does not allow.
    pub fn with_options(options: KvmOptions) -> Result<Self> {
        Self::open()?.options(options)
    }

    /// The same for virtual machines with those options: for who has looked at its [capabilities](Hypervisor::capabilities) first.
    ///
    /// # Errors
    /// As [`KvmHypervisor::with_options`]; [`Error::Unsupported`] if it was given options already.
    pub fn options(self, options: KvmOptions) -> Result<Self> {
        if self.options != KvmOptions::default() {
            return Err(Error::unsupported("other options", "this backend was given some before"));
        }
        if let Some(entries) = options.dirty_ring {
            check_dirty_ring(&self.kvm, entries)?;
        }
        let types = self.kvm.check_extension_raw(u64::from(KVM_CAP_VM_TYPES));
        if options.software_protected && types & 1 << KVM_X86_SW_PROTECTED_VM == 0 {
            return Err(Error::unsupported(
                "a software-protected virtual machine",
                "KVM_CAP_VM_TYPES of this host lacks it (CONFIG_KVM_SW_PROTECTED_VM, and two-dimensional paging)",
            ));
        }
        let this = Self { options, ..self };
        #[cfg(feature = "translate")]
        if this.options.privileged_in_software {
            return this.split();
        }
        Ok(this)
    }

    /// Becomes what [`KvmOptions::privileged_in_software`] says.
    #[cfg(feature = "translate")]
    fn split(mut self) -> Result<Self> {
        let options = &self.options;
        if options.dirty_ring.is_some() || options.software_protected {
            return Err(Error::unsupported(
                "privileged code in software",
                "it goes with neither dirty rings nor software-protected virtual machines",
            ));
        }
        let translate = crate::translate::TranslateHypervisor::new();
        let software = crate::Hypervisor::capabilities(&translate);
        self.capabilities.max_vcpus = self.capabilities.max_vcpus.min(super::split::MAX_VCPUS);
        // The engine's own pages are at the end of what KVM has.
        self.capabilities.gpa_bits = (self.capabilities.gpa_bits - 1).min(software.gpa_bits);
        self.capabilities.interrupt_modes.clone_from(&software.interrupt_modes);
        self.capabilities.legacy_timer = false;
        self.capabilities.tsc_scaling = false;
        self.capabilities.hardware_assisted = Some(false);
        self.capabilities.shadowed_page_tables = false;
        self.cpuid = crate::translate::native::supported_with_vectors(&self.processor, &self.host.0);
        Ok(self)
    }

    /// A virtual machine of both backends.
    #[cfg(feature = "translate")]
    fn create_split(&self, config: &VmConfig) -> Result<super::split::SplitVm> {
        self.check(config)?;
        let cpuid = config.cpu.resolve(&self.cpuid)?;
        let below = VmConfig { interrupts: InterruptMode::External, ..config.clone() };
        let kvm = self.create_inner(&below, self.host.0.clone(), false)?;
        let tsc_khz = kvm.clock.tsc_khz();
        let always = self.options.all_programs;
        // Beyond x87 and SSE, which all have.
        let vectors = self.cpuid.get(0xd, 0).map_or(0, |leaf| u64::from(leaf.eax & !3));
        super::split::SplitVm::new(kvm, self.host.1, vectors, config, cpuid, tsc_khz, always)
    }

    /// Opens the KVM device at another path.
    ///
    /// # Errors
    /// As [`KvmHypervisor::open`].
    pub fn open_path(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let shown = path.display().to_string();
        let c_path = CString::new(shown.as_bytes()).map_err(|_| {
            Error::invalid("path of the KVM device", format_args!("{shown:?}"), "a path without NUL")
        })?;
        let kvm = Kvm::new_with_path(c_path.as_c_str()).map_err(|errno| match errno.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => Error::HostInterfaceAbsent {
                backend: NAME,
                path: shown.clone(),
                hint: "load the module kvm_intel or kvm_amd, enable virtualization in the firmware, \
                       or choose another backend",
            },
            libc::EACCES | libc::EPERM => Error::PermissionDenied {
                backend: NAME,
                path: shown.clone(),
                hint: "join the group that owns it (usually kvm)",
            },
            _ => host("opening the KVM device", errno),
        })?;
        let version = kvm.get_api_version();
        if u32::try_from(version) != Ok(KVM_API_VERSION) {
            return Err(Error::HostTooOld {
                backend: NAME,
                what: format!("KVM API version {KVM_API_VERSION}: {shown} answers {version}"),
            });
        }
        for (cap, name) in REQUIRED {
            if !kvm.check_extension(cap) {
                return Err(Error::HostTooOld { backend: NAME, what: name.to_owned() });
            }
        }
        let processor = CpuidTable::host();
        let cpuid = supported_cpuid(&kvm, &processor)?;
        let saved_msrs = kvm
            .get_msr_index_list()
            .map_err(|errno| host("KVM_GET_MSR_INDEX_LIST", errno))?
            .as_slice()
            .to_vec();
        let run_page_size =
            kvm.get_vcpu_mmap_size().map_err(|errno| host("KVM_GET_VCPU_MMAP_SIZE", errno))?;
        let capabilities = capabilities(&kvm, &cpuid);
        let max_slots = u32::try_from(kvm.get_nr_memslots()).unwrap_or(u32::MAX);
        tracing::debug!(?capabilities, "kvm: opened");
        let default_tsc_khz = OnceLock::new();
        let options = KvmOptions::default();
        Ok(Self {
            kvm,
            options,
            #[cfg(feature = "translate")]
            host: (cpuid.clone(), capabilities.gpa_bits),
            #[cfg(feature = "translate")]
            processor,
            capabilities,
            cpuid,
            saved_msrs,
            run_page_size,
            max_slots,
            default_tsc_khz,
        })
    }

    fn check(&self, config: &VmConfig) -> Result<()> {
        let limit = self.capabilities.max_vcpus;
        if config.max_vcpus == 0 {
            return Err(Error::invalid("VmConfig::max_vcpus", 0, format_args!("1 to {limit}")));
        }
        if config.max_vcpus > limit {
            return Err(Error::TooManyVcpus {
                index: config.max_vcpus - 1,
                limit,
                reason: "KVM_CAP_MAX_VCPUS of this host",
            });
        }
        if !self.capabilities.interrupt_modes.contains(&config.interrupts) {
            return Err(Error::unsupported(
                "the interrupt mode",
                format!("{:?}: this host's KVM lacks it", config.interrupts),
            ));
        }
        if config.legacy_timer && config.interrupts != InterruptMode::Platform {
            return Err(Error::unsupported("the i8254 timer", "it needs InterruptMode::Platform"));
        }
        match config.clock.source {
            ClockSource::Host => {}
            #[cfg(feature = "translate")]
            ClockSource::HostTsc if self.options.privileged_in_software => {}
            ClockSource::HostTsc => {
                let reason = "counters have an offset here; KvmOptions::privileged_in_software makes machines without one";
                return Err(Error::unsupported("the host's time-stamp counter", reason));
            }
            ClockSource::Deterministic => {
                return Err(Error::unsupported("a deterministic clock", "KVM guests see the host's time"));
            }
        }
        Ok(())
    }

    fn create(&self, config: &VmConfig) -> Result<Arc<VmInner>> {
        self.check(config)?;
        let cpuid = config.cpu.resolve(&self.cpuid)?;
        self.create_inner(config, cpuid, self.options.finish_instructions)
    }

    fn create_inner(&self, config: &VmConfig, cpuid: CpuidTable, finishes: bool) -> Result<Arc<VmInner>> {
        let kind = if self.options.software_protected { KVM_X86_SW_PROTECTED_VM } else { KVM_X86_DEFAULT_VM };
        let fd =
            self.kvm.create_vm_with_type(u64::from(kind)).map_err(|errno| host("KVM_CREATE_VM", errno))?;
        let default_tsc_khz = self.default_tsc_khz(&fd)?;
        let tsc_khz = self.tsc_khz(config.clock.tsc_khz, default_tsc_khz)?;
        let dirty_rings =
            self.options.dirty_ring.map(|entries| enable_dirty_rings(&fd, entries)).transpose()?;
        fd.set_identity_map_address(IDENTITY_MAP)
            .map_err(|errno| host("KVM_SET_IDENTITY_MAP_ADDR", errno))?;
        fd.set_tss_address(TSS).map_err(|errno| host("KVM_SET_TSS_ADDR", errno))?;
        create_interrupt_controllers(&fd, config)?;
        let finish = if finishes { self.finish(&fd, &cpuid, config)? } else { None };
        let inner = Arc::new(VmInner::new(VmParts {
            fd,
            interrupts: config.interrupts,
            legacy_timer: config.legacy_timer,
            cpuid,
            max_vcpus: config.max_vcpus,
            max_slots: self.max_slots,
            run_page_size: self.run_page_size,
            saved_msrs: self.saved_msrs.clone(),
            dirty_rings,
            finish,
        }));
        inner.clock.set_rates(tsc_khz, default_tsc_khz);
        tracing::debug!(?config.interrupts, config.max_vcpus, "kvm: virtual machine created");
        Ok(inner)
    }

    /// What executes the instructions that KVM cannot.
    #[cfg(feature = "translate")]
    fn finish(
        &self,
        fd: &VmFd,
        cpuid: &CpuidTable,
        config: &VmConfig,
    ) -> Result<Option<super::finish::Finish>> {
        use super::finish::Finish;
        let shadowed = self.capabilities.shadowed_page_tables;
        let new = || Finish::new(fd, cpuid, config.max_vcpus, config.interrupts, shadowed);
        new().map(Some)
    }

    #[cfg(not(feature = "translate"))]
    #[allow(clippy::unnecessary_wraps, reason = "as with the feature")]
    fn finish(&self, _: &VmFd, _: &CpuidTable, _: &VmConfig) -> Result<Option<super::finish::Finish>> {
        Ok(None)
    }

    /// The rate of vCPUs that ask for none, 0 if KVM cannot say (the host's TSC is unstable). Before Linux 5.18 a virtual machine
    /// does not say, and a vCPU is made for the question: to make that and its machine, and end them, takes milliseconds.
    fn default_tsc_khz(&self, vm: &VmFd) -> Result<u32> {
        if let Some(khz) = self.default_tsc_khz.get() {
            return Ok(*khz);
        }
        if let Some(khz) = sys::vm_tsc_khz(vm) {
            return Ok(*self.default_tsc_khz.get_or_init(|| khz));
        }
        let vm = self.kvm.create_vm().map_err(|errno| host("KVM_CREATE_VM", errno))?;
        let vcpu = vm.create_vcpu(0).map_err(|errno| host("KVM_CREATE_VCPU", errno))?;
        Ok(*self.default_tsc_khz.get_or_init(|| vcpu.get_tsc_khz().unwrap_or(0)))
    }

    /// The rate of a VM's vCPUs.
    fn tsc_khz(&self, wanted: Option<u32>, default: u32) -> Result<u32> {
        match wanted {
            None => Ok(default),
            Some(0) => Err(Error::invalid("ClockConfig::tsc_khz", 0, "at least 1 kHz")),
            Some(wanted) if wanted != default && !self.capabilities.tsc_scaling => Err(Error::unsupported(
                "another TSC frequency",
                format!(
                    "the host's TSC runs at {default} kHz, {wanted} kHz are asked for, and it cannot scale"
                ),
            )),
            Some(wanted) => Ok(wanted),
        }
    }
}

/// The capability of dirty rings, and the bytes that one may have.
fn dirty_ring_capability(check: impl Fn(u32) -> i32) -> Option<(u32, u32)> {
    [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
        .into_iter()
        .find_map(|cap| u32::try_from(check(cap)).ok().filter(|bytes| *bytes > 0).map(|bytes| (cap, bytes)))
}

fn check_dirty_ring(kvm: &Kvm, entries: u32) -> Result<()> {
    let Some((_, bytes)) = dirty_ring_capability(|cap| kvm.check_extension_raw(u64::from(cap))) else {
        return Err(Error::unsupported("a dirty ring", "KVM_CAP_DIRTY_LOG_RING of this host says so"));
    };
    let most = bytes / DIRTY_ENTRY_BYTES;
    if entries.is_power_of_two() && (LEAST_DIRTY_ENTRIES..=most).contains(&entries) {
        return Ok(());
    }
    let allowed = format_args!("a power of two from {LEAST_DIRTY_ENTRIES} to {most}").to_string();
    Err(Error::invalid("entries of a dirty ring", entries, allowed))
}

/// Before there are vCPUs.
fn enable_dirty_rings(fd: &VmFd, entries: u32) -> Result<DirtyRings> {
    let check = |cap: u32| fd.check_extension_raw(u64::from(cap));
    let (cap, _) = dirty_ring_capability(check).ok_or_else(|| {
        Error::unsupported("a dirty ring", "KVM_CAP_DIRTY_LOG_RING of this virtual machine says so")
    })?;
    enable_cap(fd, cap, u64::from(entries) * u64::from(DIRTY_ENTRY_BYTES))
        .map_err(|errno| host("KVM_ENABLE_CAP(DIRTY_LOG_RING)", errno))?;
    let with_bitmap = check(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) > 0;
    if with_bitmap {
        enable_cap(fd, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, 0)
            .map_err(|errno| host("KVM_ENABLE_CAP(DIRTY_LOG_RING_WITH_BITMAP)", errno))?;
    }
    Ok(DirtyRings::new(entries, with_bitmap))
}

fn create_interrupt_controllers(fd: &VmFd, config: &VmConfig) -> Result<()> {
    match config.interrupts {
        InterruptMode::External => {}
        InterruptMode::LocalApic => {
            enable_cap(fd, KVM_CAP_SPLIT_IRQCHIP, SPLIT_IO_APIC_PINS)
                .map_err(|errno| host("KVM_ENABLE_CAP(SPLIT_IRQCHIP)", errno))?;
        }
        InterruptMode::Platform => {
            fd.create_irq_chip().map_err(|errno| host("KVM_CREATE_IRQCHIP", errno))?;
        }
    }
    if config.interrupts != InterruptMode::External {
        let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        enable_cap(fd, KVM_CAP_X2APIC_API, u64::from(flags))
            .map_err(|errno| host("KVM_ENABLE_CAP(X2APIC_API)", errno))?;
    }
    if config.legacy_timer {
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(|errno| host("KVM_CREATE_PIT2", errno))?;
    }
    Ok(())
}

fn supported_cpuid(kvm: &Kvm, processor: &CpuidTable) -> Result<CpuidTable> {
    /// KVM_CPUID_FLAG_SIGNIFCANT_INDEX.
    const SUBLEAF_MATTERS: u32 = 1;
    let table = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|errno| host("KVM_GET_SUPPORTED_CPUID", errno))?;
    let entries = table.as_slice().iter().map(|entry| CpuidEntry {
        leaf: entry.function,
        subleaf: (entry.flags & SUBLEAF_MATTERS != 0).then_some(entry.index),
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    });
    let mut supported = CpuidTable::new(entries.collect());
    // KVM leaves the processor's name to its users.
    for leaf in BRAND_STRING {
        if let Some(entry) = processor.get(leaf, 0)
            && supported.max_extended_leaf() >= leaf
        {
            supported.set(entry);
        }
    }
    Ok(supported)
}

fn capabilities(kvm: &Kvm, cpuid: &CpuidTable) -> Capabilities {
    let mut interrupt_modes = vec![InterruptMode::External];
    if kvm.check_extension_raw(u64::from(KVM_CAP_SPLIT_IRQCHIP)).is_positive() {
        interrupt_modes.push(InterruptMode::LocalApic);
    }
    if kvm.check_extension(Cap::Irqchip) {
        interrupt_modes.push(InterruptMode::Platform);
    }
    // Leaf 0x8000_0008, EAX[7:0]: physical-address bits.
    let gpa_bits = cpuid.get(0x8000_0008, 0).map_or(36, |entry| entry.eax.to_le_bytes()[0]);
    Capabilities {
        max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
        gpa_bits,
        interrupt_modes,
        legacy_timer: kvm.check_extension(Cap::Pit2),
        tsc_scaling: kvm.check_extension(Cap::TscControl),
        hardware_assisted: Some(host_has_virtualization()),
        shadowed_page_tables: !host_has_virtualization(),
    }
}

/// Whether the processor offers VMX or SVM: without them KVM can only be of the kind that emulates
/// privileged code.
fn host_has_virtualization() -> bool {
    use core::arch::x86_64::__cpuid;
    let vmx = __cpuid(1).ecx & 1 << 5 != 0;
    let svm = __cpuid(0x8000_0000).eax > 0x8000_0000 && __cpuid(0x8000_0001).ecx & 1 << 2 != 0;
    vmx || svm
}

impl Hypervisor for KvmHypervisor {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn supported_cpuid(&self) -> &CpuidTable {
        &self.cpuid
    }

    fn create_vm(&self, config: &VmConfig) -> Result<Arc<dyn Vm>> {
        #[cfg(feature = "translate")]
        if self.options.privileged_in_software {
            return Ok(Arc::new(self.create_split(config)?));
        }
        Ok(Arc::new(KvmVm(self.create(config)?)))
    }

    fn restore_vm(&self, config: &VmConfig, state: &VmState) -> Result<Arc<dyn Vm>> {
        #[cfg(feature = "translate")]
        if self.options.privileged_in_software {
            let vm = self.create_split(config)?;
            vm.restore(state)?;
            return Ok(Arc::new(vm));
        }
        let inner = self.create(config)?;
        platform_state::restore(&inner, state)?;
        Ok(Arc::new(KvmVm(inner)))
    }
}

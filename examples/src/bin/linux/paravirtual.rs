//! The guest that asks for what it wants: a paravirtual Xen guest, which has no PC but a console.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, ensure};
use vmm_cpu::xen_pv::abi::sched::ShutdownReason;
use vmm_cpu::xen_pv::builder::PvBoot;
use vmm_cpu::xen_pv::{self, DomainDevices, XenPvHypervisor};
use vmm_cpu::{CpuModel, EmptyBus, Error, Hypervisor, VcpuIo, VcpuThreads, Vm as _, VmConfig};
use vmm_examples::guest_command::{Session, Wiring};
use vmm_examples::pv_console::PvConsole;
use vmm_examples::terminal::RawMode;
use vmm_memory::boot::KernelImage;
use vmm_memory::vm_memory::GuestAddress;
use vmm_memory::{GuestRam, RegionConfig};

use crate::end::{Memory, conclude, end_by};
use crate::guest::Guest;
use crate::options::{Options, session};
use crate::watch::{StopSign, Watch, alarm, read_keys};
use crate::{TSC_KHZ, choose, confine};

/// Runs the guest that `options` ask for.
pub(crate) fn run(options: &Options, started: Instant, inherited: &[RawFd]) -> Result<u8> {
    ensure!(
        !options.rerun.is_deterministic(),
        "--deterministic, --record, --replay and --state-hashes go with --backend translate: the timers of a paravirtual \
         guest follow the host's clock"
    );
    ensure!(
        !options.debug.is_wanted(),
        "--gdb does not go with --backend {}: a debugger steps the guest at the backend below, where the engine's own code \
         would be in its way",
        xen_pv::NAME
    );
    ensure!(
        options.wanted_transport().is_none(),
        "--transport, --disk, --net, --balloon, --console virtio, --port, --ivshmem, --vsock and --metrics do not go with \
         --backend {}: its guest has no PC whose buses the devices could be on",
        xen_pv::NAME
    );
    // With the in-guest fast path behind the name of the backend below.
    let (below, shim) =
        options.engine.strip_suffix("-shim").map_or((&*options.engine, false), |name| (name, true));
    let engine: Arc<dyn Hypervisor> = Arc::from(choose(options, below)?);
    let hypervisor = XenPvHypervisor::new(Arc::clone(&engine))?.shim(shim);
    let session = session(options)?;
    let guest = Guest::get(options, &session, Wiring::PvConsole.into())?;

    // Without the hole that a PC has below 4 GiB.
    let whole = options.ram.apply_to_region(RegionConfig::new(GuestAddress(0), options.memory << 20));
    let ram = GuestRam::builder().region(whole).build()?;
    let kernel = KernelImage::parse(&guest.image).with_context(|| guest.name())?;
    let mut boot =
        PvBoot::new(&kernel).with_context(|| guest.name())?.command_line(guest.command_line.trim());
    if let Some(initrd) = &guest.initrd {
        boot = boot.initrd(initrd);
    }
    let mut config = VmConfig::new(CpuModel::Host).vcpus(options.cpus);
    if hypervisor.capabilities().tsc_scaling {
        config.clock.tsc_khz = Some(TSC_KHZ);
    }
    let stop = Arc::new(StopSign::default());
    let watch = Arc::new(Watch::new(&session, Arc::clone(&stop), started));
    let console = PvConsole::new(&session, |port| Watch::port(&watch, port));
    let vm = hypervisor.create_domain(&config, &ram, DomainDevices::default().console(console))?;
    vm.boot(&boot).with_context(|| guest.name())?;
    let with_nothing = |index| Ok((vm.create_vcpu(index)?, Box::new(EmptyBus) as Box<dyn VcpuIo + Send>));
    let vcpus = (0..options.cpus).map(with_nothing).collect::<Result<Vec<_>, Error>>()?;
    let threads = VcpuThreads::spawn(vcpus)?;
    let pause = threads.pause_handle();
    stop.reaches(move || pause.pause());
    let raw = if matches!(session, Session::Shell(_)) { RawMode::enter()? } else { None };
    if !matches!(session, Session::Command { .. }) {
        let domain = Arc::clone(vm.domain()?);
        read_keys(move |keys| domain.console_input(keys), &watch, raw.is_some())?;
    }
    let time_is_up = alarm(options.seconds, &stop)?;
    let memory = options.timings.then(|| Memory::open(&ram)).transpose()?;
    confine(&*engine, inherited, options, None)?;

    threads.resume();
    let mut end = end_by(threads.wait(None), None, &watch, &time_is_up);
    let vcpus = threads.stop();
    drop(raw);
    if let Some(reason @ (ShutdownReason::Crash | ShutdownReason::Watchdog)) = vm.shutdown_reason() {
        // A command that ended before has a status of its own.
        if watch.done.load(Ordering::SeqCst) {
            eprintln!("linux: the guest shut down: {reason:?}");
        } else {
            end = end.and(Err(anyhow!("the guest shut down: {reason:?}")));
        }
    }
    conclude(options, &session, &watch, started, &vcpus, memory, end)
}

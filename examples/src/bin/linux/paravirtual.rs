//! The guest that asks for what it wants: a paravirtual Xen guest, which has no PC but a console.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, ensure};
use vmm_cpu::xen_pv::abi::sched::ShutdownReason;
use vmm_cpu::xen_pv::builder::PvBoot;
use vmm_cpu::xen_pv::{self, DomainDevices, XenPvHypervisor, XenPvVm};
use vmm_cpu::{CpuModel, EmptyBus, Error, Hypervisor, VcpuIo, VcpuThreads, Vm as _, VmConfig};
use vmm_examples::guest_command::{Hardware, Session, Wiring};
use vmm_examples::pv_console::PvConsole;
use vmm_examples::terminal::RawMode;
use vmm_memory::boot::KernelImage;
use vmm_memory::vm_memory::{Bytes as _, GuestAddress};
use vmm_memory::{GuestRam, PAGE_SIZE, RegionConfig};

use crate::end::{End, Memory, conclude, end_by};
use crate::guest::Guest;
use crate::options::{Options, session};
use crate::snapshot::{Machine, Saving, run_or_save};
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
    let restored = options.snapshot.restored(false)?;
    let session = match &restored {
        Some(restored) => restored.session.clone(),
        None => session(options)?,
    };
    // Without the hole that a PC has below 4 GiB.
    let new_ram = |bytes| -> Result<GuestRam> {
        let whole = options.ram.apply_to_region(RegionConfig::new(GuestAddress(0), bytes));
        Ok(GuestRam::builder().region(whole).build()?)
    };
    let ram = match &restored {
        Some(restored) => restored.ram(new_ram)?,
        None => new_ram(options.memory << 20)?,
    };
    let config = match &restored {
        Some(restored) => restored.config.clone(),
        None => config(&hypervisor, options),
    };
    let mut saving = options.snapshot.saving()?;
    let stop = Arc::new(StopSign::default());
    let heard = restored.as_ref().map(|restored| restored.heard.clone());
    let watch = Arc::new(Watch::new(&session, Arc::clone(&stop), started, heard, saving.is_some()));
    let lazy = restored.as_ref().map(|restored| restored.give(&ram)).transpose()?;
    let console = PvConsole::new(&session, |port| Watch::port(&watch, port));
    let console = console.begun(restored.as_ref().map_or(&[], |restored| &restored.line));
    let line = console.line();
    let devices = DomainDevices::default().console(console);
    let (vm, vcpus) = match &restored {
        Some(restored) => {
            restored.finish()?;
            let vm = hypervisor.restore_domain(&config, &ram, devices, &restored.vm)?;
            let vcpus = restored.vcpus(&*vm)?;
            (vm, vcpus)
        }
        None => {
            let vm = hypervisor.create_domain(&config, &ram, devices)?;
            boot(&vm, options, &session)?;
            let vcpus =
                (0..options.cpus).map(|index| vm.create_vcpu(index)).collect::<Result<Vec<_>, Error>>()?;
            (vm, vcpus)
        }
    };
    let changes = restored.as_ref().map(|restored| restored.changes(&*vm, &ram)).transpose()?.flatten();
    let with_nothing = |vcpu| (vcpu, Box::new(EmptyBus) as Box<dyn VcpuIo + Send>);
    let threads = VcpuThreads::spawn(vcpus.into_iter().map(with_nothing).collect())?;
    let pause = threads.pause_handle();
    stop.reaches(move || pause.pause());
    let raw = if matches!(session, Session::Shell(_)) { RawMode::enter()? } else { None };
    if !matches!(session, Session::Command { .. }) {
        let domain = Arc::clone(vm.domain()?);
        read_keys(move |keys| domain.console_input(keys), &watch, raw.is_some())?;
    }
    let check = restored.as_ref().map(|restored| restored.check_beside(&watch)).transpose()?.flatten();
    let time_is_up = alarm(options.seconds, &stop)?;
    let snapshot_is_due = options.snapshot.moment(&stop)?;
    let memory = options.timings.then(|| Memory::open(&ram)).transpose()?;
    confine(&*engine, inherited, options, None)?;

    threads.resume();
    watch.begin();
    if let Some(check) = check {
        check.send(())?;
    }
    let save = |saving: Saving| {
        let machine = Machine {
            hypervisor: &hypervisor,
            config: &config,
            vm: &*vm,
            threads: &threads,
            pc: None,
            devices: None,
            ram: &vm.ram()?,
            session: &session,
            line: line.bytes(),
            events: pending(&vm, &ram)?,
            changes: changes.as_ref(),
        };
        saving.finish(machine, &watch)
    };
    let go_on = || {
        watch.give_up_snapshots();
        snapshot_is_due.store(false, Ordering::SeqCst);
        Ok(())
    };
    let end_of = |exit| end_by(exit, None, &watch, &time_is_up, &snapshot_is_due);
    let mut end = run_or_save(&threads, &mut saving, end_of, save, go_on);
    if let (Ok(End::Snapshot), Some(saving)) = (&end, saving.take()) {
        save(saving)?;
    }
    let vcpus = threads.stop();
    drop((raw, lazy));
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

/// What a domain is created from.
fn config(hypervisor: &XenPvHypervisor, options: &Options) -> VmConfig {
    let mut config = VmConfig::new(CpuModel::Host).vcpus(options.cpus);
    if hypervisor.capabilities().tsc_scaling {
        config.clock.tsc_khz = Some(TSC_KHZ);
    }
    config
}

/// Puts the kernel into a domain that is new.
fn boot(vm: &XenPvVm, options: &Options, session: &Session) -> Result<()> {
    let is_saved = options.snapshot.saves();
    let hardware = Hardware { is_saved, ..Wiring::PvConsole.into() };
    let guest = Guest::get(options, session, hardware, TSC_KHZ)?;
    let kernel = KernelImage::parse(&guest.image).with_context(|| guest.name())?;
    let mut boot =
        PvBoot::new(&kernel).with_context(|| guest.name())?.command_line(guest.command_line.trim());
    if let Some(initrd) = &guest.initrd {
        boot = boot.initrd(initrd);
    }
    vm.boot(&boot).with_context(|| guest.name())?;
    Ok(())
}

/// Event channels that are pending and not masked. Where they are told is above the domain's RAM, in the handle that it was made with.
fn pending(vm: &XenPvVm, ram: &GuestRam) -> Result<u32> {
    let (memory, frame) = (ram.memory(), vm.domain()?.shared_info_frame());
    // In shared_info (Xen public/xen.h) 64 words of each follow 32 vcpu_info of 64 bytes.
    let mut words = [[0_u64; 64]; 2];
    for (at, word) in (frame * PAGE_SIZE + 32 * 64..).step_by(8).zip(words.as_flattened_mut()) {
        *word = memory.read_obj(GuestAddress(at))?;
    }
    let [pending, mask] = words;
    Ok(pending.iter().zip(mask).map(|(pending, mask)| (pending & !mask).count_ones()).sum())
}

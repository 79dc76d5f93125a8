use super::super::super::abi::event::{BindVirq, evtchnop};
use super::super::super::abi::nr::{EVENT_CHANNEL_OP, VCPU_OP, VM_ASSIST};
use super::super::super::abi::{virq, vm_assist};
use super::super::super::test_support::{FRAMES, FREE, Guest, L4};
use super::super::super::vcpu_abi::{VcpuAbi, Wake};
use super::*;
use zerocopy::FromZeros;

fn op(guest: &mut Guest, command: u64, vcpu: u64, at: u64) -> Result<u64, Errno> {
    guest.call(VCPU_OP, &[command, vcpu, at])
}

fn start() -> Box<VcpuGuestContext> {
    let mut context = Box::new(VcpuGuestContext::new_zeroed());
    context.ctrlreg[3] = L4 << 12;
    context
}

#[test]
fn numbers_out_of_range_are_refused() {
    let mut guest = Guest::new();
    for command in (0..14).chain([99]) {
        for vcpu in [2, 32, u64::from(u32::MAX)] {
            assert_eq!(
                op(&mut guest, command, vcpu, 0),
                Err(Errno::ENOENT),
                "command {command}, number {vcpu}"
            );
        }
    }
    for command in [12, 14, 15, u64::MAX] {
        assert_eq!(op(&mut guest, command, 0, 0), Err(Errno::ENOSYS));
    }
}

#[test]
fn another_one_is_brought_up() {
    let mut guest = Guest::new();
    assert_eq!(op(&mut guest, vcpuop::IS_UP, 0, 0), Ok(1));
    assert_eq!(op(&mut guest, vcpuop::IS_UP, 1, 0), Ok(0));
    assert_eq!(op(&mut guest, vcpuop::UP, 1, 0), Err(Errno::EINVAL), "not initialised");
    let at = guest.put(&*start());
    assert_eq!(op(&mut guest, vcpuop::INITIALISE, 1, at), Ok(0));
    assert_eq!(op(&mut guest, vcpuop::INITIALISE, 1, at), Err(Errno::EEXIST));
    assert_eq!(op(&mut guest, vcpuop::INITIALISE, 0, at), Err(Errno::EEXIST), "it runs");
    assert_eq!(op(&mut guest, vcpuop::UP, 1, 0), Ok(0));
    assert_eq!(op(&mut guest, vcpuop::IS_UP, 1, 0), Ok(1));
    assert_eq!(op(&mut guest, vcpuop::DOWN, 1, 0), Err(Errno::EOPNOTSUPP));
    let (action, rax) = guest.syscall(VCPU_OP, &[vcpuop::DOWN, 0, 0]);
    assert_eq!((action, rax), (Action::Offline, 0));
    assert_eq!(op(&mut guest, vcpuop::IS_UP, 0, 0), Ok(0));
}

#[test]
fn an_offline_one_waits_until_it_is_brought_up() {
    let mut guest = Guest::new();
    let mut other = VcpuAbi::new(guest.domain.clone(), 1).unwrap();
    assert!(VcpuAbi::new(guest.domain.clone(), 2).is_err());
    assert!(!other.start(&mut guest.engine).unwrap());
    let at = guest.put(&*start());
    assert_eq!(op(&mut guest, vcpuop::INITIALISE, 1, at), Ok(0));
    let domain = guest.domain.clone();
    let thread = std::thread::spawn(move || domain.processor(1).unwrap().set_up(true));
    assert_eq!(other.wait(&mut guest.engine).unwrap(), Wake::Ready);
    thread.join().unwrap();
    // It may have been brought up before it began to wait.
    assert_eq!(other.wait(&mut guest.engine).unwrap(), Wake::Ready);
    assert!(other.start(&mut guest.engine).unwrap());
}

#[test]
fn impossible_starts_are_refused() {
    let mut guest = Guest::new();
    let bad: [fn(&mut VcpuGuestContext); 8] = [
        |context| context.ctrlreg[3] = FRAMES << 12,
        |context| context.ctrlreg[3] = u64::MAX,
        |context| context.ctrlreg[1] = FRAMES << 12,
        |context| context.fs_base = 1 << 47,
        |context| context.traps[200].address = 1 << 63,
        |context| context.event_callback_eip = 1 << 63,
        |context| context.gdt_ents = 7169,
        |context| context.ldt_ents = 1,
    ];
    for (number, change) in bad.iter().enumerate() {
        let mut context = start();
        change(&mut context);
        let at = guest.put(&*context);
        assert_eq!(op(&mut guest, vcpuop::INITIALISE, 1, at), Err(Errno::EINVAL), "change {number}");
    }
    assert_eq!(op(&mut guest, vcpuop::INITIALISE, 1, 8), Err(Errno::EFAULT));
    let at = guest.put(&*start());
    assert_eq!(op(&mut guest, vcpuop::INITIALISE, 1, at), Ok(0), "none of them counted");
}

#[test]
fn the_vcpu_info_moves_once() {
    let mut guest = Guest::new();
    let register = |guest: &mut Guest, vcpu, mfn, offset| {
        let at = guest.put(&RegisterVcpuInfo { mfn, offset, rsvd: 0 });
        op(guest, vcpuop::REGISTER_VCPU_INFO, vcpu, at)
    };
    for (mfn, offset) in
        [(FREE, 4033), (FREE, 4096), (FREE, u32::MAX), (FREE, 4), (FRAMES, 0), (u64::MAX, 0), (1 << 52, 0)]
    {
        assert_eq!(
            register(&mut guest, 0, mfn, offset),
            Err(Errno::EINVAL),
            "frame {mfn:#x}, offset {offset}"
        );
    }
    assert_eq!(register(&mut guest, 0, FREE, 4032), Ok(0));
    assert_eq!(guest.vcpu.info(), FREE * PAGE_SIZE + 4032);
    assert_eq!(guest.info_byte(shared_info::UPCALL_PENDING), 1, "the guest shall look at everything");
    assert_eq!(guest.info_byte(shared_info::UPCALL_MASK), 1, "what it held came along");
    assert_ne!(guest.get::<TimeInfo>(Guest::va(guest.vcpu.info() + shared_info::TIME)).tsc_to_system_mul, 0);
    assert_eq!(register(&mut guest, 0, FREE, 0), Err(Errno::EINVAL), "a second time");
    assert_eq!(register(&mut guest, 1, FREE, 0), Ok(0), "that of another one");
    assert_eq!(op(&mut guest, vcpuop::REGISTER_VCPU_INFO, 1, 8), Err(Errno::EFAULT));
}

fn bind_timer(guest: &mut Guest) -> u32 {
    let at = guest.put(&BindVirq { virq: virq::TIMER, ..Default::default() });
    guest.call(EVENT_CHANNEL_OP, &[evtchnop::BIND_VIRQ, at]).unwrap();
    guest.get::<BindVirq>(at).port
}

#[test]
fn the_singleshot_timer_fires_once() {
    let mut guest = Guest::new();
    let port = bind_timer(&mut guest);
    let at = guest.put(&SingleshotTimer { timeout_abs_ns: 1000, ..Default::default() });
    assert_eq!(op(&mut guest, vcpuop::SET_SINGLESHOT_TIMER, 0, at), Ok(0));
    assert_eq!(guest.vcpu.deadline(), Some(1000));
    guest.pass(999);
    guest.interrupt();
    assert!(!guest.domain.is_pending(port).unwrap());
    guest.pass(2);
    guest.interrupt();
    assert!(guest.domain.is_pending(port).unwrap());
    assert_eq!(guest.vcpu.deadline(), None);
    assert_eq!(op(&mut guest, vcpuop::SET_SINGLESHOT_TIMER, 0, at), Ok(0), "a past time fires at once");
    guest.domain.clear_pending(port);
    guest.before_entry();
    assert!(guest.domain.is_pending(port).unwrap(), "without a kick");
    let at = guest.put(&SingleshotTimer { timeout_abs_ns: 900, flags: SINGLESHOT_FUTURE, pad: 0 });
    assert_eq!(op(&mut guest, vcpuop::SET_SINGLESHOT_TIMER, 0, at), Err(Errno::ETIME));
    assert_eq!(op(&mut guest, vcpuop::STOP_SINGLESHOT_TIMER, 0, 0), Ok(0));
    assert_eq!(guest.vcpu.deadline(), None);
    for command in [vcpuop::SET_SINGLESHOT_TIMER, vcpuop::STOP_SINGLESHOT_TIMER] {
        assert_eq!(op(&mut guest, command, 1, at), Err(Errno::EINVAL), "that of another one");
    }
    assert_eq!(op(&mut guest, vcpuop::SET_SINGLESHOT_TIMER, 0, 8), Err(Errno::EFAULT));
}

#[test]
fn the_periodic_timer_goes_on() {
    let mut guest = Guest::new();
    let port = bind_timer(&mut guest);
    let at = guest.put(&MIN_PERIOD);
    assert_eq!(op(&mut guest, vcpuop::SET_PERIODIC_TIMER, 0, at), Ok(0));
    for _ in 0..3 {
        guest.pass(MIN_PERIOD);
        guest.interrupt();
        assert!(guest.domain.is_pending(port).unwrap());
        guest.domain.clear_pending(port);
    }
    assert_eq!(op(&mut guest, vcpuop::STOP_PERIODIC_TIMER, 0, 0), Ok(0));
    assert_eq!(guest.vcpu.deadline(), None);
    for period in [0, 1, MIN_PERIOD - 1, MAX_PERIOD + 1, u64::MAX] {
        let at = guest.put(&period);
        assert_eq!(op(&mut guest, vcpuop::SET_PERIODIC_TIMER, 0, at), Err(Errno::EINVAL), "{period}");
    }
}

#[test]
fn areas_are_written() {
    let mut guest = Guest::new();
    guest.pass(700);
    let area = guest.put(&RunstateInfo { state: 99, ..Default::default() });
    let at = guest.put(&area);
    assert_eq!(op(&mut guest, vcpuop::REGISTER_RUNSTATE_MEMORY_AREA, 0, at), Ok(0));
    let info: RunstateInfo = guest.get(area);
    assert_eq!((info.state, info.time[0]), (runstate::RUNNING, 700));
    // Time asleep is told after waking, with and without the mark of an update.
    for (waited, assist) in [(1000, vm_assist::DISABLE), (2000, vm_assist::ENABLE)] {
        guest.call(VM_ASSIST, &[assist, vm_assist::RUNSTATE_UPDATE_FLAG]).unwrap();
        let tsc = std::sync::Arc::clone(&guest.engine.tsc);
        let domain = guest.domain.clone();
        domain.processor(0).unwrap();
        let thread = std::thread::spawn(move || {
            while domain.processor(0).unwrap().runstate_as_entered().state != runstate::BLOCKED {
                std::thread::yield_now();
            }
            tsc.fetch_add(1000, std::sync::atomic::Ordering::SeqCst);
            domain.kick(0);
        });
        assert_eq!(guest.vcpu.wait(&mut guest.engine).unwrap(), Wake::Kicked);
        thread.join().unwrap();
        let info: RunstateInfo = guest.get(area);
        assert_eq!((info.state, info.time[2]), (runstate::RUNNING, waited));
        assert_eq!(info.state_entry_time & runstate::UPDATE, 0);
    }
    let time = guest.put(&TimeInfo::default());
    let at = guest.put(&time);
    assert_eq!(op(&mut guest, vcpuop::REGISTER_VCPU_TIME_MEMORY_AREA, 0, at), Ok(0));
    assert_ne!(guest.get::<TimeInfo>(time).tsc_to_system_mul, 0);
    let nowhere = guest.put(&8_u64);
    let none = guest.put(&0_u64);
    for command in [vcpuop::REGISTER_RUNSTATE_MEMORY_AREA, vcpuop::REGISTER_VCPU_TIME_MEMORY_AREA] {
        assert_eq!(op(&mut guest, command, 0, nowhere), Err(Errno::EFAULT));
        assert_eq!(op(&mut guest, command, 0, 8), Err(Errno::EFAULT));
        assert_eq!(op(&mut guest, command, 0, none), Ok(0));
    }
    assert_eq!(guest.vcpu.processor().unwrap().runstate_area(), None);
    // Linux registers those of others before it starts them.
    let area = guest.put(&RunstateInfo { state: 99, ..Default::default() });
    let at = guest.put(&area);
    assert_eq!(op(&mut guest, vcpuop::REGISTER_RUNSTATE_MEMORY_AREA, 1, at), Ok(0));
    assert_eq!(guest.get::<RunstateInfo>(area).state, runstate::OFFLINE);
    assert_eq!(guest.domain.processor(1).unwrap().runstate_area(), Some(area));
}

#[test]
fn the_wall_clock_starts_with_the_domain() {
    let boot = std::time::Duration::new((7 << 32) + 5, 9);
    let guest = Guest::with(|config| config.boot_time = Some(boot));
    let word = |offset| guest.get::<u32>(Guest::va(guest.domain.memory.shared_info() + offset));
    assert_eq!(word(shared_info::WC_VERSION) % 2, 0);
    assert_eq!(
        (word(shared_info::WC_SEC), word(shared_info::WC_SEC_HI), word(shared_info::WC_NSEC)),
        (5, 7, 9)
    );
}

#[test]
fn run_states_of_all_are_told() {
    let mut guest = Guest::new();
    guest.pass(50);
    let at = guest.put(&RunstateInfo::default());
    assert_eq!(op(&mut guest, vcpuop::GET_RUNSTATE_INFO, 1, at), Ok(0));
    let info: RunstateInfo = guest.get(at);
    assert_eq!((info.state, info.time[3]), (runstate::OFFLINE, 50));
    assert_eq!(op(&mut guest, vcpuop::GET_RUNSTATE_INFO, 0, 8), Err(Errno::EFAULT));
}

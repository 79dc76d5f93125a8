//! What the other crates tell, as it comes into the log: with their own gatekeeper, policy monitor and exits, and no virtual machine.

// The lints spare test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[path = "support/written.rs"]
mod written;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm_audit::Digest;
use vmm_audit::event::{Action, Kind, Launch, Object, ObjectClass, Outcome, Party, Verdict};
use vmm_audit::hooks::cpu::Machine;
use vmm_audit::hooks::devices::{AuditedGate, AuditedPlatform, misbehaviour};
use vmm_audit::hooks::policy::PolicyLog;
use vmm_audit::pipeline::PipelineOptions;
use vmm_cpu::{Error, Halt, VcpuEvents as _, VcpuExit};
use vmm_devices::channel::{AllowAll, Gatekeeper, NetworkAttach, Refusal, Request, VmIdentity, VsockConnect};
use vmm_devices::platform::{PlatformEvent, PlatformEvents as _};
use vmm_policy::{Monitor, Policy, SubjectSpec, Uuid, channel};
use written::{LONG, log};

fn vm(uuid: u128) -> Party {
    Party::vm(uuid, 1)
}

fn identity(uuid: u128) -> vmm_devices::channel::Party {
    VmIdentity::new(uuid, 1).into()
}

#[test]
fn a_gatekeeper_has_what_it_opens_refuses_revokes_and_closes_written_down() {
    let written = log(PipelineOptions::new());
    let closed_for_today = Arc::new(AtomicBool::new(false));
    let closed = Arc::clone(&closed_for_today);
    let gate = move |request: &Request| match request.object().port() {
        Some(22) if !closed.load(Ordering::SeqCst) => Ok(()),
        Some(22) => Err(Refusal::new("closed for today")),
        Some(_) => Err(Refusal::new("only port 22")),
        None => Ok(()),
    };
    let keeper = Gatekeeper::new(AuditedGate::new(gate, written.log.emitter(Party::host("keeper"))));
    let ssh = || keeper.open(identity(1), Some(identity(2)), VsockConnect { port: 22 });
    let first = ssh().unwrap();
    assert!(keeper.open(identity(1), Some(identity(2)), VsockConnect { port: 23 }).is_err());
    let lan = keeper.open(identity(3), None, NetworkAttach { network: "lan".into() }).unwrap();
    drop(first);
    let second = ssh().unwrap();
    // All are asked about, and one loses its right; another is taken back without a reason.
    closed_for_today.store(true, Ordering::SeqCst);
    let holder = Arc::new(Mutex::new(Some(second)));
    let closing = Arc::clone(&holder);
    holder.lock().unwrap().as_ref().unwrap().on_revoked(move || drop(closing.lock().unwrap().take()));
    assert_eq!(keeper.reconsider().len(), 1);
    assert!(keeper.revoke(lan.id()));
    drop(lan);

    let events = written.events();
    let told: Vec<_> = events.iter().map(|e| (e.kind, e.verdict, e.get("grant").unwrap())).collect();
    let (allow, deny) = (Some(Verdict::Allow), Some(Verdict::Deny));
    assert_eq!(
        told,
        [
            (Kind::Opened, allow, "1"),
            (Kind::Decision, deny, "2"),
            (Kind::Opened, allow, "3"),
            (Kind::Closed, None, "1"),
            (Kind::Opened, allow, "4"),
            (Kind::Revoked, deny, "4"),
            (Kind::Closed, None, "4"),
            (Kind::Closed, None, "3"),
        ]
    );
    let reason = |n: usize| events[n].reason.as_ref().unwrap().as_str();
    assert_eq!((reason(1), reason(5)), ("only port 22", "closed for today"));
    assert_eq!((&events[1].subject, &events[1].peer), (&Some(vm(1)), &Some(vm(2))));
    assert_eq!(events[1].object, Some(Object::numbered(ObjectClass::Vsock, 23)));
    assert_eq!((events[1].action, events[2].action), (Some(Action::Connect), Some(Action::Attach)));
    assert_eq!(events[2].object, Some(Object::named(ObjectClass::Network, "lan")));
}

#[test]
fn a_gate_whose_policy_tells_its_verdicts_tells_what_opens_and_closes() {
    let written = log(PipelineOptions::new());
    let refuses = Arc::new(AtomicBool::new(false));
    let refused = Arc::clone(&refuses);
    let gate = move |_: &Request| match refused.load(Ordering::SeqCst) {
        false => Ok(()),
        true => Err(Refusal::new("closed for today")),
    };
    let gate = AuditedGate::new(gate, written.log.emitter(Party::host("keeper"))).without_verdicts();
    let keeper = Gatekeeper::new(gate);
    let open = || keeper.open(identity(1), Some(identity(2)), VsockConnect { port: 22 });
    let holder = Arc::new(Mutex::new(Some(open().unwrap())));
    refuses.store(true, Ordering::SeqCst);
    assert!(open().is_err());
    let closing = Arc::clone(&holder);
    holder.lock().unwrap().as_ref().unwrap().on_revoked(move || drop(closing.lock().unwrap().take()));
    assert_eq!(keeper.reconsider().len(), 1);
    let events = written.events();
    let told: Vec<_> = events.iter().map(|e| (e.kind, e.verdict, e.get("grant").unwrap())).collect();
    assert_eq!(told, [(Kind::Opened, None, "1"), (Kind::Closed, None, "1")]);
}

#[test]
fn nothing_opens_while_the_log_stands_still_and_what_is_open_stays() {
    let deadline = Duration::from_millis(200);
    let written = log(PipelineOptions::new().deadline(deadline));
    let emitter = written.log.emitter(Party::host("keeper"));
    let keeper = Gatekeeper::new(AuditedGate::new(AllowAll, emitter));
    let open = |port| keeper.open(identity(1), None, VsockConnect { port });
    let established = open(1).unwrap();
    written.log.flush(LONG).unwrap();
    written.faults.stall(true);
    // It is admitted, and does not get to the disk.
    let second = open(2).unwrap();
    std::thread::sleep(deadline * 2);
    let refused = open(3).unwrap_err();
    assert!(refused.reason().contains("audit log has written nothing for"), "{refused}");
    assert!(established.is_live() && second.is_live());
    written.faults.stall(false);
    written.log.flush(LONG).unwrap();
    drop(open(4).unwrap());
    let events = written.events();
    let opened: Vec<_> = events.iter().filter(|event| event.kind == Kind::Opened).collect();
    let ports: Vec<_> = opened.iter().map(|event| event.object.as_ref().unwrap().number.unwrap()).collect();
    assert_eq!(ports, [1, 2, 4]);
    // The one that was refused is in the counters.
    assert_eq!(events.last().unwrap().lost, 1);
}

#[test]
fn the_launch_comes_first_with_what_was_measured_and_ends_are_told_apart() {
    let written = log(PipelineOptions::new());
    let emitter = written.log.emitter(vm(7));
    let machine = Machine::new(emitter.clone(), vm(7));
    let launch = Launch::new()
        .kernel(b"bzImage")
        .initrd(b"cpio")
        .command_line("quiet")
        .cpu_model(b"leaf 0")
        .policy(Digest::of(b"policy"))
        .vmm()
        .unwrap();
    machine.launch(&launch).unwrap().wait(LONG).unwrap();
    let gone = || Error::UnknownBackend { name: "x".to_owned(), available: "none".to_owned() };
    let panicked = || Error::ThreadPanicked { index: 2, message: "index out of range".to_owned() };
    for (index, reason) in
        (0..).zip([Ok(Halt::Reset), Ok(Halt::Shutdown), Ok(Halt::Interrupted), Err(gone()), Err(panicked())])
    {
        machine.stopped(&VcpuExit { index, reason });
    }
    let asked = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&asked);
    let next = move |event: PlatformEvent| heard.lock().unwrap().push(event);
    let platform = AuditedPlatform::new(next, emitter.clone(), vm(7));
    platform.event(PlatformEvent::PowerOff);
    assert_eq!(*asked.lock().unwrap(), [PlatformEvent::PowerOff]);
    misbehaviour(emitter.clone(), vm(7), "disk 0")(&std::io::Error::other("descriptor 9 of a queue of 8"));
    drop((platform, machine, emitter));

    let events = written.events();
    let told: Vec<_> = events.iter().map(|event| (event.kind, event.outcome.unwrap())).collect();
    assert_eq!(
        told,
        [
            (Kind::Launch, Outcome::Success),
            (Kind::Reset, Outcome::Success),
            (Kind::Shutdown, Outcome::Success),
            (Kind::EmulationFailure, Outcome::Failed),
            (Kind::Shutdown, Outcome::Failed),
            (Kind::Shutdown, Outcome::Success),
            (Kind::Misbehaviour, Outcome::NeedsReset),
        ]
    );
    let names: Vec<_> = events[0].measured.iter().map(|measured| measured.name.as_str()).collect();
    assert_eq!(names, ["kernel", "initrd", "command-line", "cpu-model", "policy", "vmm"]);
    assert_eq!(events[0].launch_digest, Some(launch.digest()));
    assert_eq!(events[0].measured[0].digest, Digest::of(b"bzImage"));
    assert_eq!(events[3].object, Some(Object::numbered(ObjectClass::Vcpu, 3)));
    assert!(events.iter().all(|event| event.subject == Some(vm(7))));
}

#[test]
fn a_monitor_has_its_decisions_written_down_with_rule_and_policy() {
    let written = log(PipelineOptions::new());
    let launch = Launch::new().kernel(b"bzImage").command_line("quiet");
    let digest = launch.digest();
    // The launch digest is what the condition of a rule asks for.
    let text = format!(
        "labels web, db\nallow web to connect vsock 5432 of db\nallow db to connect vsock of web when measured \"{digest}\""
    );
    let policy = Policy::parse(&text).unwrap();
    let told = PolicyLog::new(written.log.emitter(Party::host("policy")), &policy);
    let first = Digest::from_bytes(policy.digest());
    let monitor = Monitor::builder(policy).observer(told.clone()).build();
    let spec = |n: u128| SubjectSpec::vm(Uuid::from_u128(n));
    let shop = monitor.register(spec(1).label("web").incarnation(7)).unwrap();
    let orders = monitor.register(spec(2).label("db").digest(digest.as_bytes())).unwrap();
    let other = monitor.register(spec(3).label("db").digest(&[0; 32])).unwrap();
    told.learn(&monitor);
    let connect = |from, port, to| {
        vmm_policy::Request::new(from, vmm_policy::Action::Connect, vmm_policy::Object::vsock(port)).of(to)
    };
    let grant = monitor.open::<channel::Vsock>(&connect(shop, 5432, orders)).unwrap();
    assert!(!monitor.authorize(&connect(shop, 22, orders)).permits());
    assert!(monitor.authorize(&connect(orders, 80, shop)).permits(), "it was launched from what is expected");
    assert!(!monitor.authorize(&connect(other, 80, shop)).permits(), "and this one was not");
    let none = Policy::deny_all();
    let second = Digest::from_bytes(none.digest());
    assert_eq!(monitor.reload(none).unwrap().revoked.len(), 1);
    drop(grant);

    let events = written.events();
    let (decision, loaded) = (Kind::Decision, Kind::PolicyLoaded);
    let (allow, deny) = (Some(Verdict::Allow), Some(Verdict::Deny));
    let told: Vec<_> = events.iter().map(|event| (event.kind, event.verdict)).collect();
    let decided = [(decision, allow), (decision, deny), (decision, allow), (decision, deny)];
    assert_eq!(told[0], (loaded, None));
    assert_eq!(told[1..5], decided);
    // In whichever order the monitor tells of the new policy and of what it takes back.
    let mut rest = told[5..].to_vec();
    rest.sort_unstable();
    assert_eq!(rest, [(Kind::Revoked, deny), (loaded, None)]);
    assert!(events[..5].iter().all(|event| event.policy == Some(first)));
    assert!(events[5..].iter().any(|event| event.kind == loaded && event.policy == Some(second)));
    let rule = events[1].rule.as_ref().unwrap().as_str();
    assert!(rule.contains("allow web to connect vsock 5432 of db"), "{rule}");
    assert_eq!((events[1].rule_line, events[3].rule_line), (2, 3));
    assert_eq!(events[2].rule, None, "no rule allows it");
    assert_eq!(events[1].subject, Some(Party::vm(1, 7)));
    let uuid_of = |party: &Option<Party>| match party {
        Some(Party::Vm(vm)) => vm.uuid,
        other => panic!("{other:?}"),
    };
    assert_eq!((uuid_of(&events[1].subject), uuid_of(&events[1].peer)), (1, 2));
    assert_eq!(uuid_of(&events[4].subject), 3);
}

#[test]
fn a_policy_asks_under_which_other_one_a_machine_was_launched() {
    let written = log(PipelineOptions::new());
    let labels = "labels web, db\n";
    let first = Policy::parse(&format!("{labels}allow web to connect vsock of db")).unwrap();
    let launch = |policy: &Policy| {
        Launch::new().kernel(b"bzImage").policy(Digest::from_bytes(policy.digest())).digest()
    };
    let (trusted, other) = (launch(&first), launch(&Policy::deny_all()));
    let told = PolicyLog::new(written.log.emitter(Party::host("policy")), &first);
    let monitor = Monitor::builder(first).observer(told.clone()).build();
    let register = |n: u128, label: &str, digest: Digest| {
        let spec = SubjectSpec::vm(Uuid::from_u128(n)).label(label).digest(digest.as_bytes());
        monitor.register(spec).unwrap()
    };
    let (db, good, bad) =
        (register(1, "db", trusted), register(2, "web", trusted), register(3, "web", other));
    told.learn(&monitor);
    let permits = |from| {
        let (connect, port) = (vmm_policy::Action::Connect, vmm_policy::Object::vsock(80));
        monitor.authorize(&vmm_policy::Request::new(from, connect, port).of(db)).permits()
    };
    assert!(permits(good) && permits(bad));
    let second = format!("{labels}allow web to connect vsock of db when measured \"{trusted}\"");
    monitor.reload(Policy::parse(&second).unwrap()).unwrap();
    assert!(permits(good) && !permits(bad));
    let verdicts: Vec<_> = written.events().iter().filter_map(|event| event.verdict).collect();
    assert_eq!(verdicts, [Verdict::Allow, Verdict::Allow, Verdict::Allow, Verdict::Deny]);
}

/// Rules of several files are told apart by the file.
#[test]
fn a_rule_of_one_of_several_files_is_named_with_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("base.policy", "labels l\nallow l to connect vsock 1 of l");
    write("main.policy", "include \"base.policy\"\nallow l to connect vsock 2 of l");
    let policy = Policy::from_file(&folder.path().join("main.policy")).unwrap();
    let written = log(PipelineOptions::new());
    let told = PolicyLog::new(written.log.emitter(Party::host("policy")), &policy);
    let monitor = Monitor::builder(policy).observer(told).build();
    let spec = |n: u128| SubjectSpec::vm(Uuid::from_u128(n)).label("l");
    let (one, two) = (monitor.register(spec(1)).unwrap(), monitor.register(spec(2)).unwrap());
    for port in [1, 2] {
        let (connect, port) = (vmm_policy::Action::Connect, vmm_policy::Object::vsock(port));
        assert!(monitor.authorize(&vmm_policy::Request::new(one, connect, port).of(two)).permits());
    }
    let events = written.events();
    let named: Vec<_> =
        events[1..].iter().map(|event| (event.get("file").unwrap(), event.rule_line)).collect();
    assert_eq!(named, [("base.policy", 2), ("main.policy", 2)]);
}

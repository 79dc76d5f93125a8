//! Deterministic runs of the program `linux`: the same run twice, recorded and replayed, with one input changed, and with
//! the vCPU kicked at random.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic, also in functions that it calls")]

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmm_cpu::entry::entry_state;
use vmm_cpu::{ClockSource, CpuModel, InterruptMode, VmConfig, open_backend};
use vmm_examples::debian::{self, Series};
use vmm_examples::pc::{Clocks, Pc};
use vmm_examples::replay::{Director, Finish, Inputs, Machine, StateHash};
use vmm_memory::GuestRam;
use vmm_memory::boot::{Boot, KernelImage};

use crate::multiboot;

const LINUX: &str = env!("CARGO_BIN_EXE_linux");
const VMM_FAILURE: i32 = 125;

/// A multiboot 1 kernel that counts in memory, asks the timer for the time, echoes what is typed, and ends with status 43
/// at a `q`.
fn kernel() -> Vec<u8> {
    use iced_x86::code_asm::{CodeAssembler, al, dword_ptr, dx, eax, ebx, ecx, edi};

    let mut code = CodeAssembler::new(32).unwrap();
    let (mut again, mut idle) = (code.create_label(), code.create_label());
    // The PIT counts.
    code.mov(al, 0x34).unwrap();
    code.out(0x43, al).unwrap();
    code.xor(eax, eax).unwrap();
    code.out(0x40, al).unwrap();
    code.out(0x40, al).unwrap();
    code.set_label(&mut again).unwrap();
    code.inc(ebx).unwrap();
    code.mov(edi, ebx).unwrap();
    code.and(edi, 0xf_fffc).unwrap();
    code.add(dword_ptr(edi + 0x20_0000), ebx).unwrap();
    code.in_(al, 0x40).unwrap();
    code.add(dword_ptr(0x40_0000), eax).unwrap();
    code.mov(edi, 0x50_0000).unwrap();
    code.mov(ecx, 3000).unwrap();
    code.rep().stosb().unwrap();
    code.mov(dx, 0x3fd).unwrap();
    code.in_(al, dx).unwrap();
    code.test(al, 1).unwrap();
    code.jz(idle).unwrap();
    code.mov(dx, 0x3f8).unwrap();
    code.in_(al, dx).unwrap();
    code.out(dx, al).unwrap();
    code.movzx(eax, al).unwrap();
    code.add(dword_ptr(0x40_0004), eax).unwrap();
    code.cmp(al, i32::from(b'q')).unwrap();
    code.jne(idle).unwrap();
    code.mov(al, 21).unwrap();
    code.out(0xf4, al).unwrap();
    code.set_label(&mut idle).unwrap();
    code.jmp(again).unwrap();
    multiboot::kernel(code)
}

/// A directory with the kernel in it.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        std::fs::write(this.path("kernel"), kernel()).unwrap();
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(LINUX);
        command.args(["--backend", "translate", "--memory", "16", "--kernel", "kernel"]);
        command.args(arguments).current_dir(self.0.path()).env_remove("RUST_LOG");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut child = self.command(arguments).spawn().unwrap();
        drop(child.stdin.take());
        child.wait_with_output().unwrap()
    }

    /// Records a run in which somebody types slowly.
    fn record(&self) -> Output {
        let arguments = ["--record", "log", "--state-hashes", "hashes", "--hash-interval", "5000"];
        let mut child = self.command(&arguments).spawn().unwrap();
        let mut keys = child.stdin.take().unwrap();
        let mut echo = child.stdout.take().unwrap();
        // A line of more than the console takes at once.
        let long = format!("{}\n", "some more, ".repeat(9));
        for text in ["first\n", &long, "x\n", "q"] {
            std::thread::sleep(Duration::from_millis(10));
            keys.write_all(text.as_bytes()).unwrap();
            // The program shows whole lines.
            if text.ends_with('\n') {
                let mut seen = vec![0; text.len()];
                echo.read_exact(&mut seen).unwrap();
                assert_eq!(seen, text.as_bytes());
            }
        }
        let mut rest = Vec::new();
        echo.read_to_end(&mut rest).unwrap();
        let mut output = child.wait_with_output().unwrap();
        output.stdout = rest;
        output
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Instruction counts of what was typed, by the log.
fn typed(log: &str) -> Vec<u64> {
    let consoles = log.lines().filter(|line| line.starts_with("{\"console\""));
    let count = |line: &str| {
        let (_, rest) = line.split_once("\"instructions\":").unwrap();
        rest.split(['}', ',']).next().unwrap().parse().unwrap()
    };
    consoles.map(count).collect()
}

#[test]
fn what_is_typed_is_typed_at_the_same_instruction_when_it_is_replayed() {
    let place = Place::new();
    let recorded = place.record();
    assert_eq!(recorded.status.code(), Some(43), "{}", text(&recorded));
    let (log, hashes) = (place.read("log"), place.read("hashes"));
    // At least one piece more than was typed, since the console has no room for the longest.
    assert!(typed(&log).len() >= 4, "{log}");
    assert!(hashes.lines().count() > 1 && hashes.starts_with("0 "), "{hashes}");

    let replayed = place.run(&["--replay", "log", "--state-hashes", "again", "--hash-interval", "5000"]);
    assert_eq!(replayed.status.code(), Some(43), "{}", text(&replayed));
    assert!(replayed.stdout.starts_with(b"first") && replayed.stdout.ends_with(b"x\nq"));
    assert_eq!(place.read("again"), hashes);
    // Without hashing or with another interval it is the same run, and each hash is that of the whole.
    let replayed = place.run(&["--replay", "log"]);
    assert_eq!(replayed.status.code(), Some(43), "{}", text(&replayed));
    let arguments =
        ["--replay", "log", "--state-hashes", "sparse", "--hash-interval", "15000", "--hash-check"];
    let replayed = place.run(&arguments);
    assert_eq!(replayed.status.code(), Some(43), "{}", text(&replayed));
    assert!(place.read("sparse").lines().all(|line| hashes.lines().any(|other| other == line)));
}

#[test]
fn one_changed_byte_shows_after_it_was_typed_and_not_before() {
    let place = Place::new();
    assert_eq!(place.record().status.code(), Some(43));
    let (log, hashes) = (place.read("log"), place.read("hashes"));
    // The x, which comes alone.
    let line = log.lines().find(|line| line.ends_with("\"bytes\":[120,10]}}")).unwrap();
    let point = *typed(line).first().unwrap();
    let changed = log.replace(line, &line.replace("[120,", "[121,"));
    std::fs::write(place.path("changed"), &changed).unwrap();

    let replayed = place.run(&["--replay", "changed"]);
    assert_eq!(replayed.status.code(), Some(VMM_FAILURE));
    let error = text(&replayed);
    let (_, found) = error.split_once("differs from the log's at instruction ").unwrap();
    let found: u64 = found.split(' ').next().unwrap().parse().unwrap();
    let first_after = hashes.lines().find_map(|line| {
        let count: u64 = line.split(' ').next()?.parse().ok()?;
        (count > point).then_some(count)
    });
    assert_eq!(Some(found), first_after, "{error}");

    // The whole list, with nothing to compare with: the same up to the byte, and another one in each line from there on.
    let only_inputs: Vec<&str> = changed.lines().filter(|line| !line.starts_with("{\"state\"")).collect();
    std::fs::write(place.path("changed"), only_inputs.join("\n") + "\n").unwrap();
    let replayed = place.run(&["--replay", "changed", "--state-hashes", "other", "--hash-interval", "5000"]);
    assert_eq!(replayed.status.code(), Some(43), "{}", text(&replayed));
    assert!(replayed.stdout.ends_with(b"y\nq"));
    let other = place.read("other");
    assert_eq!(other.lines().count(), hashes.lines().count());
    for (a, b) in hashes.lines().zip(other.lines()) {
        let count: u64 = a.split(' ').next().unwrap().parse().unwrap();
        assert_eq!(a == b, count <= point, "{a}\n{b}");
    }
}

#[test]
fn a_log_that_does_not_fit_is_refused_by_the_field() {
    let place = Place::new();
    assert_eq!(place.record().status.code(), Some(43));
    for (arguments, field) in [
        (&["--replay", "log", "--append", "more"][..], "command_line"),
        (&["--replay", "log", "--initrd", "log"], "initrd"),
    ] {
        let output = place.run(arguments);
        assert_eq!(output.status.code(), Some(VMM_FAILURE));
        assert!(text(&output).contains(field), "{}", text(&output));
    }
    let log = place.read("log");
    std::fs::write(place.path("cut"), &log[..log.len() - 9]).unwrap();
    let output = place.run(&["--replay", "cut"]);
    let line = format!("line {}, column", log.lines().count());
    assert_eq!(output.status.code(), Some(VMM_FAILURE));
    assert!(text(&output).contains(&line), "{}", text(&output));
    let output = place.run(&["--deterministic", "--cpus", "2"]);
    assert!(text(&output).contains("one vCPU, not 2"), "{}", text(&output));
}

#[test]
fn a_time_limit_is_in_the_log() {
    let place = Place::new();
    let output = place.run(&["--record", "log", "--seconds", "1", "--state-hashes", "hashes"]);
    assert_eq!(output.status.code(), Some(124), "{}", text(&output));
    let output = place.run(&["--replay", "log", "--state-hashes", "again"]);
    assert_eq!(output.status.code(), Some(124), "{}", text(&output));
    assert_eq!(place.read("again"), place.read("hashes"));
}

/// Runs the kernel, the keys being logged ones, and gives the list of hashes; `kicks` is how many microseconds lie between
/// two kicks.
fn hashes(list: &Path, kicks: Option<u64>) -> String {
    let image = kernel();
    let ram = GuestRam::builder().ram(16 << 20).track_dirty(true).build().unwrap();
    let image = KernelImage::parse(&image).unwrap();
    Pc::write_tables(&ram, 1, |tables| tables).unwrap();
    let entry = Boot::new(&image).load(&*ram.memory()).unwrap();
    let mut config = VmConfig::new(CpuModel::Host).interrupts(InterruptMode::LocalApic);
    config.clock.source = ClockSource::Deterministic;
    let vm = open_backend("translate").unwrap().create_vm(&config).unwrap();
    vm.map_ram(&ram).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    entry_state(&entry).unwrap().apply(&mut *vcpu).unwrap();
    let clock = vm.clock().unwrap();
    let clocks = Clocks { uptime: Arc::new(move || clock.now().unwrap()), boot: 1_700_000_000_000_000_000 };
    let handle = vcpu.handle();
    let ended = move || handle.kick();
    let pc = Pc::with_clocks(clocks, vm.msi().unwrap(), |_| Box::new(std::io::sink()), ended).unwrap();
    let pc = Arc::new(pc);

    let records = [(1_234_567, "a"), (2_345_678, "bc"), (4_000_000, "q")].map(|(ns, keys)| {
        let bytes = keys.bytes().map(|byte| byte.to_string()).collect::<Vec<_>>().join(",");
        format!("{{\"console\":{{\"at\":{{\"ns\":{ns},\"instructions\":0}},\"bytes\":[{bytes}]}}}}")
    });
    let mut records: Vec<vmm_examples::replay::Record> =
        records.iter().map(|record| serde_json::from_str(record).unwrap()).collect();
    for record in &mut records {
        if let vmm_examples::replay::Record::Console { at, .. } = record {
            // This guest never sleeps.
            at.instructions = at.ns;
        }
    }
    let done = Arc::new(AtomicBool::new(false));
    let kicker = kicks.map(|pause| {
        let (handle, done) = (vcpu.handle(), Arc::clone(&done));
        std::thread::spawn(move || {
            let mut n = pause;
            while !done.load(Ordering::SeqCst) {
                handle.kick();
                n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                std::thread::sleep(Duration::from_micros(n >> 33 & 0x3f));
            }
        })
    });
    let state = StateHash::new(&ram, &*vm, false).unwrap();
    let director = Director::new(Inputs::logged(records)).hash(
        state,
        50_000,
        Some(std::fs::File::create(list).unwrap()),
    );
    let machine = Machine { vm: &*vm, vcpu: &mut *vcpu, pc: &pc };
    let finish = director.run(machine, || false, || (pc.end().is_some()).then_some(Finish::User));
    done.store(true, Ordering::SeqCst);
    if let Some(kicker) = kicker {
        kicker.join().unwrap();
    }
    assert_eq!(finish.unwrap(), Finish::User);
    std::fs::read_to_string(list).unwrap()
}

#[test]
fn kicks_change_nothing() {
    let place = tempfile::tempdir().unwrap();
    let list = place.path().join("list");
    let undisturbed = hashes(&list, None);
    assert!(undisturbed.lines().count() > 80, "{undisturbed}");
    for pause in [1, 77] {
        assert!(hashes(&list, Some(pause)) == undisturbed, "kicks show");
    }
}

/// A boot of Debian, recorded with some options and replayed with others: the hashes of both, and what `--timings` said.
fn recorded_and_replayed(test: &str, record: &[&str], replay: &[&str]) -> Option<[(String, String); 2]> {
    if let Err(error) = debian::kernel(Series::V6_1).and_then(|_| debian::busybox()) {
        println!("{test}: skipped: {error:#}");
        return None;
    }
    let place = tempfile::tempdir().unwrap();
    let run = |options: &[&str], hashes: &str, arguments: &[&str]| {
        let mut command = Command::new(LINUX);
        command.args(["--backend", "translate", "--memory", "128", "--timings", "--state-hashes", hashes]);
        command.args(options).args(arguments).stdin(Stdio::null());
        let output = command.current_dir(place.path()).env_remove("RUST_LOG").output().unwrap();
        assert_eq!(output.status.code(), Some(7), "{}", text(&output));
        let list = std::fs::read_to_string(place.path().join(hashes)).unwrap();
        (output.stdout, list, String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let line = "date +%s; cat /proc/uptime /proc/interrupts; head -c 16 /dev/urandom | od -t x1; exit 7";
    let (first, hashes, said) = run(record, "first", &["--record", "log", "--command", line]);
    let (second, hashes_again, said_again) = run(replay, "second", &["--replay", "log"]);
    assert_eq!(String::from_utf8_lossy(&first), String::from_utf8_lossy(&second));
    assert!(hashes.lines().count() > 500, "{}", hashes.lines().count());
    Some([(hashes, said), (hashes_again, said_again)])
}

/// Debian boots twice to the same state at every millionth instruction, also where translations have to make room for each
/// other all the time.
#[test]
fn debian_boots_the_same_way_twice() {
    let little = ["--code-memory", "2048"];
    if let Some([first, second]) = recorded_and_replayed("deterministic Debian", &[], &little) {
        assert_eq!(first.0, second.0);
        assert!(figure(&second.1, "translated-parts-emptied") > 50, "{}", second.1);
    }
}

/// Programs that access memory through the host's MMU leave the same state everywhere, accessed bits and all.
#[test]
fn debian_boots_the_same_way_with_address_windows() {
    let (always, never) = (["--address-window", "always"], ["--address-window", "never"]);
    if let Some([with, without]) = recorded_and_replayed("Debian with address windows", &always, &never) {
        assert_eq!(with.0, without.0);
        assert!(figure(&with.1, "window-pages-mapped") > 100, "{}", with.1);
        assert!(!without.1.contains("window-"), "{}", without.1);
    }
}

/// Translated code comes to the same states as the interpreter.
#[test]
fn debian_boots_the_same_way_translated_and_interpreted() {
    if let Some([translated, interpreted]) = recorded_and_replayed("translated Debian", &[], &["--interpret"])
    {
        assert_eq!(translated.0, interpreted.0);
        assert!(figure(&translated.1, "translated-instructions") > 500_000_000, "{}", translated.1);
        assert!(!interpreted.1.contains("translat"), "{}", interpreted.1);
    }
}

/// The same with the registers at the start of each basic block, of which there are some 140 million.
#[test]
#[ignore = "takes minutes: cargo test --release --test deterministic -- --ignored"]
fn each_block_begins_the_same_way_translated_and_interpreted() {
    let interpreted = ["--interpret", "--digest"];
    if let Some([translated, interpreted]) =
        recorded_and_replayed("digests of Debian", &["--digest"], &interpreted)
    {
        assert_eq!(translated.0, interpreted.0);
        assert_eq!(figure(&translated.1, "digest"), figure(&interpreted.1, "digest"));
        assert!(figure(&translated.1, "translated-entries") > 100_000_000, "{}", translated.1);
    }
}

/// A figure of `--timings`.
fn figure(said: &str, name: &str) -> u64 {
    let figure = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    figure.unwrap_or_else(|| panic!("no {name} in {said}")).trim().parse().unwrap()
}

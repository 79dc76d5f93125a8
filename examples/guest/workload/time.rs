//! Pieces of work and how long they take.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::{check, compute, io, system};

/// The least time that a figure is from.
const ENOUGH: Duration = Duration::from_millis(200);

/// The most operations that are done for one.
const MOST: u64 = 1 << 32;

/// Does so many operations, and says how long they took without what comes before and after.
type Work = fn(u64) -> Duration;

/// Pieces of work by their names.
const WORK: [(&str, Work); 18] = [
    ("getppid", getppid),
    ("fork+wait", fork),
    ("fork+exec", exec),
    ("pipe-ping-pong", ping_pong),
    ("mmap+touch", touch),
    ("sha256-KiB", busybox_sha256),
    ("gzip-KiB", gzip),
    ("shell-loop", shell),
    ("alu", compute::alu),
    ("sieve", compute::sieve),
    ("qsort", compute::qsort),
    ("fib", compute::fibonacci),
    ("float", compute::float),
    ("matmul", compute::matmul),
    ("memcpy", compute::memcpy),
    ("sha256", compute::sha256),
    ("read+write", read_write),
    ("shell-exec", shell_exec),
];

/// The same of disks and networks, which are not among all: not every guest has some.
const IO_WORK: [(&str, Work); 9] = [
    ("disk-read-4k", io::read_4k),
    ("disk-write-4k", io::write_4k),
    ("disk-read-4k-32", io::read_4k_many),
    ("disk-write-4k-32", io::write_4k_many),
    ("disk-read-1m", io::read_1m),
    ("disk-write-1m", io::write_1m),
    ("net-send", io::net_send),
    ("net-receive", io::net_receive),
    ("net-ping-pong", io::net_ping_pong),
];

/// The least time that those are measured for.
const ENOUGH_IO: Duration = Duration::from_secs(1);

/// Times those of the names, in their order, or all.
pub(crate) fn all(names: &[&str]) {
    if names.is_empty() {
        WORK.iter().for_each(|(name, work)| one(name, *work, ENOUGH));
    }
    for name in names {
        let find = |work: &[(&str, Work)]| Some(work.iter().find(|(known, _)| known == name)?.1);
        let of_io = find(&IO_WORK);
        let work = find(&WORK).or(of_io);
        let work = work.unwrap_or_else(|| panic!("no work is named {name:?}"));
        one(name, work, if of_io.is_some() { ENOUGH_IO } else { ENOUGH });
    }
}

fn one(name: &str, work: Work, enough: Duration) {
    // More and more until it takes long enough. One that is so long by itself needs no warming up.
    let mut operations = 1;
    let mut time = work(operations);
    while time < enough && operations < MOST {
        let missing = enough.as_nanos() * 11 / 10 / time.as_nanos().max(1);
        operations *= missing.clamp(2, 16) as u64;
        time = work(operations);
    }
    println!("{name} {operations} {}", time.as_nanos());
}

pub(crate) fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn getppid(operations: u64) -> Duration {
    timed(|| {
        for _ in 0..operations {
            std::hint::black_box(system::parent());
        }
    })
}

fn fork(operations: u64) -> Duration {
    timed(|| {
        for _ in 0..operations {
            assert_eq!(system::wait(system::child(|| 0)), 0);
        }
    })
}

/// This program, which then does nothing.
fn exec(operations: u64) -> Duration {
    timed(|| {
        for _ in 0..operations {
            let status = Command::new("/proc/self/exe").arg("nothing").status().expect("the program itself");
            assert!(status.success());
        }
    })
}

fn ping_pong(operations: u64) -> Duration {
    let (mut here, mut there) = std::io::pipe().expect("a pipe");
    let (mut back, mut from) = std::io::pipe().expect("a pipe");
    let child = system::child(|| {
        let mut byte = [0];
        for _ in 0..operations {
            if here.read_exact(&mut byte).and_then(|()| from.write_all(&byte)).is_err() {
                return 1;
            }
        }
        0
    });
    let time = timed(|| {
        for number in 0..operations {
            let mut byte = [number as u8];
            there.write_all(&byte).expect("a byte for the child");
            byte = [!byte[0]];
            back.read_exact(&mut byte).expect("the byte back");
            assert_eq!(byte, [number as u8]);
        }
    });
    assert_eq!(system::wait(child), 0);
    time
}

/// A page that is mapped, touched and unmapped.
fn touch(operations: u64) -> Duration {
    const PAGES: u64 = 256;
    timed(|| {
        let mut left = operations;
        while left > 0 {
            let count = left.min(PAGES);
            let mut pages = system::Pages::new(count as usize);
            for byte in pages.bytes().iter_mut().step_by(4096) {
                *byte = 1;
            }
            left -= count;
        }
    })
}

/// What `dd bs=1` does with a byte.
fn read_write(operations: u64) -> Duration {
    let mut zero = File::open("/dev/zero").expect("/dev/zero");
    let mut null = OpenOptions::new().write(true).open("/dev/null").expect("/dev/null");
    timed(|| {
        for _ in 0..operations {
            let mut byte = [1];
            zero.read_exact(&mut byte).expect("a byte");
            null.write_all(&byte).expect("room for a byte");
            assert_eq!(byte, [0]);
        }
    })
}

fn busybox(arguments: &[&str]) -> Command {
    let mut command = Command::new(path_of_busybox());
    command.args(arguments);
    command
}

fn path_of_busybox() -> String {
    std::env::var("busybox").unwrap_or_else(|_| "/bin/busybox".to_owned())
}

/// Busybox, with so many KiB of input.
fn filter(arguments: &[&str], operations: u64) -> Duration {
    let data = check::data(64 << 10);
    let command = busybox(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
    let mut child = command.expect("busybox");
    let mut input = child.stdin.take().expect("its input");
    timed(|| {
        let mut left = operations as usize * 1024;
        while left > 0 {
            let count = left.min(data.len());
            input.write_all(&data[..count]).expect("input for busybox");
            left -= count;
        }
        drop(input);
        assert!(child.wait().expect("busybox's end").success());
    })
}

fn busybox_sha256(operations: u64) -> Duration {
    filter(&["sha256sum"], operations)
}

fn gzip(operations: u64) -> Duration {
    filter(&["gzip", "-c"], operations)
}

/// A shell that does `line` so often, from when it is there to its end.
fn loop_of(line: &str, operations: u64) -> Duration {
    let script = format!("echo; read go; i=0; while [ $i -lt {operations} ]; do i=$((i + 1)); {line} done");
    let shell = busybox(&["sh", "-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut shell = shell.expect("busybox");
    let (mut input, mut output) = (shell.stdin.take().expect("a pipe"), shell.stdout.take().expect("a pipe"));
    output.read_exact(&mut [0]).expect("a line of the shell");
    timed(|| {
        input.write_all(b"go\n").expect("a line for the shell");
        assert!(shell.wait().expect("the shell's end").success());
    })
}

fn shell(operations: u64) -> Duration {
    loop_of("", operations)
}

/// The shell starts a program, which does nothing.
fn shell_exec(operations: u64) -> Duration {
    loop_of(&format!("'{}' true || exit 1;", path_of_busybox()), operations)
}

//! Pieces of work and how long they take.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::{check, system};

/// The least time that a figure is from.
const ENOUGH: Duration = Duration::from_millis(300);

/// Pieces of work: a name, and what does so many operations of it.
const WORK: [(&str, fn(u64)); 8] = [
    ("getppid", getppid),
    ("fork+wait", fork),
    ("fork+exec", exec),
    ("pipe-ping-pong", ping_pong),
    ("mmap+touch", touch),
    ("sha256-KiB", sha256),
    ("gzip-KiB", gzip),
    ("shell-loop", shell),
];

pub(crate) fn all(names: &[&str]) {
    for (name, work) in WORK {
        if !names.is_empty() && !names.contains(&name) {
            continue;
        }
        // Once to warm up, then more and more until it takes long enough.
        work(1);
        let mut operations = 1;
        let time = loop {
            let start = Instant::now();
            work(operations);
            let time = start.elapsed();
            if time >= ENOUGH || operations >= 1 << 24 {
                break time;
            }
            operations *= if time * 8 < ENOUGH { 8 } else { 2 };
        };
        println!("{name} {operations} {}", time.as_nanos());
    }
}

fn getppid(operations: u64) {
    for _ in 0..operations {
        std::hint::black_box(system::parent());
    }
}

fn fork(operations: u64) {
    for _ in 0..operations {
        assert_eq!(system::wait(system::child(|| 0)), 0);
    }
}

/// This program, which then does nothing.
fn exec(operations: u64) {
    for _ in 0..operations {
        let status = Command::new("/proc/self/exe").arg("nothing").status().expect("the program itself");
        assert!(status.success());
    }
}

fn ping_pong(operations: u64) {
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
    for number in 0..operations {
        let mut byte = [number as u8];
        there.write_all(&byte).expect("a byte for the child");
        byte = [!byte[0]];
        back.read_exact(&mut byte).expect("the byte back");
        assert_eq!(byte, [number as u8]);
    }
    assert_eq!(system::wait(child), 0);
}

/// A page that is mapped, touched and unmapped.
fn touch(operations: u64) {
    const PAGES: u64 = 256;
    let mut left = operations;
    while left > 0 {
        let count = left.min(PAGES);
        let mut pages = system::Pages::new(count as usize);
        for byte in pages.bytes().iter_mut().step_by(4096) {
            *byte = 1;
        }
        left -= count;
    }
}

/// Busybox, with so many KiB of input.
fn filter(arguments: &[&str], operations: u64) {
    let data = check::data(64 << 10);
    let mut child = Command::new("/bin/busybox")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("busybox");
    let mut input = child.stdin.take().expect("its input");
    let mut left = operations as usize * 1024;
    while left > 0 {
        let count = left.min(data.len());
        input.write_all(&data[..count]).expect("input for busybox");
        left -= count;
    }
    drop(input);
    assert!(child.wait().expect("busybox's end").success());
}

fn sha256(operations: u64) {
    filter(&["sha256sum"], operations);
}

fn gzip(operations: u64) {
    filter(&["gzip", "-c"], operations);
}

fn shell(operations: u64) {
    let line = format!("i=0; while [ $i -lt {operations} ]; do i=$((i + 1)); done");
    let status = Command::new("/bin/busybox").args(["sh", "-c", &line]).status().expect("busybox");
    assert!(status.success());
}

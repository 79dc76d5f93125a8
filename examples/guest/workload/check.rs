//! Work with known results.

use std::io::{Read, Write};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::system::{self, ARRIVED, SIGALRM, SIGUSR1};
use crate::{memory, registers};

pub(crate) fn all(rounds: usize) {
    let subjects: [(&str, fn(usize)); 10] = [
        ("children and their status", children),
        ("programs that are started", programs),
        ("pipes", pipes),
        ("signals", signals),
        ("timers", timers),
        ("fresh pages and rights", memory::rights),
        ("copies on write", memory::copies),
        ("vector registers", registers::kept),
        ("threads", threads),
        ("clocks", clocks),
    ];
    for (name, subject) in subjects {
        subject(rounds);
        println!("{name}: ok");
    }
}

/// Bytes that are always the same and compress somewhat.
pub(crate) fn data(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        b'a' + (state >> 28) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// A mebibyte of these on standard output.
pub(crate) fn write_data() {
    std::io::stdout().write_all(&data(1 << 20)).expect("standard output");
}

fn children(rounds: usize) {
    for round in 0..10 * rounds {
        let all: Vec<_> = (0..8).map(|n| (n, system::child(|| (round as i32 + n) & 0xff))).collect();
        for (n, child) in all {
            assert_eq!(system::wait(child), ((round as i32 + n) & 0xff) << 8, "child {n}");
        }
        // A child of a child.
        let outer = system::child(|| system::wait(system::child(|| 3)) >> 8);
        assert_eq!(system::wait(outer), 3 << 8);
    }
}

fn programs(rounds: usize) {
    for round in 0..5 * rounds {
        let text = format!("{round} {}", "x".repeat(round * 100 % 5000));
        let output = Command::new("/bin/busybox").args(["echo", &text]).output().expect("busybox");
        assert_eq!(String::from_utf8(output.stdout).expect("text"), format!("{text}\n"));
        let status = Command::new("/bin/busybox").args(["sh", "-c", "exit 9"]).status().expect("busybox");
        assert_eq!(status.code(), Some(9));
    }
}

fn pipes(rounds: usize) {
    for _ in 0..rounds {
        let (mut reader, mut writer) = std::io::pipe().expect("a pipe");
        let sent = data(300_000);
        let child = system::child(|| writer.write_all(&sent).map_or(1, |()| 0));
        drop(writer);
        let mut received = Vec::new();
        reader.read_to_end(&mut received).expect("what the child sends");
        assert_eq!(system::wait(child), 0);
        assert!(received == sent, "{} bytes came through the pipe, not as they were sent", received.len());
    }
}

fn signals(rounds: usize) {
    system::count_signal(SIGUSR1);
    let counter = &ARRIVED[SIGUSR1 as usize];
    let this = std::process::id() as i32;
    for _ in 0..200 * rounds {
        let before = counter.load(SeqCst);
        system::send(this, SIGUSR1);
        assert_eq!(counter.load(SeqCst), before + 1, "a signal to oneself");
    }
    for _ in 0..5 * rounds {
        let before = counter.load(SeqCst);
        let child = system::child(|| {
            system::send(this, SIGUSR1);
            0
        });
        assert_eq!(system::wait(child), 0);
        assert_eq!(counter.load(SeqCst), before + 1, "a signal from a child");
        // One that ends the child.
        let child = system::child(|| {
            system::default_signal(SIGUSR1);
            system::send(std::process::id() as i32, SIGUSR1);
            0
        });
        assert_eq!(system::wait(child), SIGUSR1);
    }
}

fn timers(rounds: usize) {
    system::count_signal(SIGALRM);
    let counter = &ARRIVED[SIGALRM as usize];
    let before = counter.load(SeqCst);
    system::every(2000);
    let start = Instant::now();
    let mut work = 0_u64;
    while counter.load(SeqCst) < before + 5 * rounds as u64 {
        work = std::hint::black_box(work.wrapping_mul(31) + 1);
        assert!(start.elapsed() < Duration::from_secs(60), "the timer's signals do not come");
    }
    system::every(0);
}

fn threads(rounds: usize) {
    const THREADS: usize = 4;
    let count = 500 * rounds as u64;
    let (sum, barrier) = (Arc::new((Mutex::new(0_u64), Condvar::new())), Arc::new(Barrier::new(THREADS)));
    let plain = Arc::new(AtomicU64::new(0));
    let all: Vec<_> = (0..THREADS)
        .map(|number| {
            let (sum, barrier, plain) = (Arc::clone(&sum), Arc::clone(&barrier), Arc::clone(&plain));
            thread::spawn(move || {
                barrier.wait();
                for _ in 0..count {
                    *sum.0.lock().expect("the lock") += 1;
                    plain.fetch_add(1, SeqCst);
                }
                // Each waits for those before it.
                let target = (THREADS as u64 * count) + number as u64;
                let mut value = sum.0.lock().expect("the lock");
                while *value != target {
                    value = sum.1.wait(value).expect("the lock");
                }
                *value += 1;
                sum.1.notify_all();
                number
            })
        })
        .collect();
    for (number, thread) in all.into_iter().enumerate() {
        // The last to add finds nobody to wake it but these.
        while !thread.is_finished() {
            sum.1.notify_all();
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(thread.join().expect("a thread"), number);
    }
    assert_eq!(plain.load(SeqCst), THREADS as u64 * count);
    assert_eq!(*sum.0.lock().expect("the lock"), THREADS as u64 * (count + 1));
}

fn clocks(rounds: usize) {
    let mut last = Instant::now();
    for _ in 0..2000 * rounds {
        let now = Instant::now();
        assert!(now >= last, "the clock went back");
        last = now;
    }
    for _ in 0..rounds.min(20) {
        let start = Instant::now();
        thread::sleep(Duration::from_millis(5));
        let slept = start.elapsed();
        assert!(slept >= Duration::from_millis(5) && slept < Duration::from_secs(30), "slept {slept:?}");
    }
}

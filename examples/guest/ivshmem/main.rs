//! Uses the memory and the doorbells of an ivshmem device from a program, by what the kernel shows of a PCI function.
//!
//! A static program on std alone. `ivshmem COMMAND`:
//!
//! | command | does |
//! |---|---|
//! | `position` | prints what peers call this guest |
//! | `write OFFSET`, `read OFFSET LENGTH` | standard input into the memory, the memory to standard output |
//! | `word OFFSET`, `store OFFSET VALUE` | prints, changes 8 bytes |
//! | `await OFFSET VALUE SECONDS` | until 8 bytes are that |
//! | `ring PEER VECTOR` | rings |
//! | `poll SECONDS` | until Interrupt Status says that somebody rang |
//! | `wait COUNT SECONDS` | for so many interrupts, which come by the driver `uio_pci_generic` |
//! | `answer PEER COUNT SECONDS`, `call PEER COUNT SECONDS` | the two sides of doorbells back and forth, by those interrupts |
//! | `arm ENTRY VECTOR` | has rings for that entry come as a message with that interrupt vector to processor 0 |
//! | `msix VECTOR` | has the device send a message for ring 0, with that interrupt vector, to processor 0 |
//! | `copy MIB [from\|to\|own]` | how fast so much is copied, from or to the region, or within this process, in GB/s |
//!
//! It ends with 1 and a line on standard error where something takes longer than it may.

mod device;

use std::env;
use std::hint::black_box;
use std::io::{Read as _, Write as _};
use std::process::exit;
use std::time::{Duration, Instant};

use device::{Device, Interrupts};

fn fail(why: &str) -> ! {
    eprintln!("ivshmem: {why}");
    exit(1)
}

fn number(text: &str) -> u64 {
    let digits = text.strip_prefix("0x");
    let parsed = digits.map_or_else(|| text.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok());
    parsed.unwrap_or_else(|| fail(&format!("{text:?} is no number")))
}

/// Ends the program unless `done` says that it is, in time.
fn until(what: &str, seconds: u64, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !done() {
        if Instant::now() > deadline {
            fail(&format!("{what}: not within {seconds} s"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let device = Device::find().unwrap_or_else(|why| fail(&why));
    match arguments[..] {
        ["position"] => println!("{}", device.position()),
        ["write", offset] => {
            let mut data = Vec::new();
            std::io::stdin().read_to_end(&mut data).expect("standard input");
            device.write(number(offset), &data);
        }
        ["read", offset, length] => {
            let data = device.read(number(offset), number(length));
            std::io::stdout().write_all(&data).expect("standard output");
        }
        ["word", offset] => println!("{}", device.word(number(offset))),
        ["store", offset, value] => device.store(number(offset), number(value)),
        ["await", offset, value, seconds] => {
            let (offset, value) = (number(offset), number(value));
            until("the word", number(seconds), || device.word(offset) == value);
        }
        ["ring", peer, vector] => device.ring(number(peer), number(vector)),
        ["poll", seconds] => {
            until("a ring", number(seconds), || device.take_status() != 0);
            println!("rung");
        }
        ["wait", count, seconds] => {
            let mut interrupts = Interrupts::of(&device).unwrap_or_else(|why| fail(&why));
            for _ in 0..number(count) {
                interrupts.wait(Duration::from_secs(number(seconds))).unwrap_or_else(|why| fail(&why));
            }
            println!("{} interrupts", number(count));
        }
        ["answer", peer, count, seconds] => {
            let mut interrupts = Interrupts::of(&device).unwrap_or_else(|why| fail(&why));
            println!("ready");
            for _ in 0..number(count) {
                interrupts.wait(Duration::from_secs(number(seconds))).unwrap_or_else(|why| fail(&why));
                device.ring(number(peer), 0);
            }
            println!("answered {}", number(count));
        }
        ["call", peer, count, seconds] => {
            let mut interrupts = Interrupts::of(&device).unwrap_or_else(|why| fail(&why));
            let begun = Instant::now();
            for _ in 0..number(count) {
                device.ring(number(peer), 0);
                interrupts.wait(Duration::from_secs(number(seconds))).unwrap_or_else(|why| fail(&why));
            }
            let each = begun.elapsed().as_secs_f64() * 1e6 / number(count) as f64;
            println!("{each:.1} us a round trip");
        }
        ["arm", entry, vector] => {
            device.arm(number(entry), number(vector)).unwrap_or_else(|why| fail(&why));
        }
        ["msix", vector] => {
            device.arm(0, number(vector)).unwrap_or_else(|why| fail(&why));
            device.ring(device.position().into(), 0);
        }
        ["copy", mib, way] => println!("{:.3}", copy(&device, number(mib), way)),
        _ => fail("what is to be done? See the head of the program"),
    }
}

/// Bytes a nanosecond, the best of five times.
fn copy(device: &Device, mib: u64, way: &str) -> f64 {
    let size = ((mib as usize) << 20).min(device.size());
    let mut own: Vec<u8> = (0..size).map(pattern).collect();
    let other = if way == "own" { own.clone() } else { Vec::new() };
    let mut best = f64::MAX;
    for _ in 0..5 {
        let begun = Instant::now();
        match way {
            "to" => device.write(0, black_box(&own)),
            "from" => device.read_into(0, black_box(&mut own)),
            _ => black_box(&mut own).copy_from_slice(black_box(&other)),
        }
        best = best.min(begun.elapsed().as_secs_f64());
    }
    if !(0..size).all(|n| own[n] == pattern(n)) {
        fail("the memory is not what another guest has written");
    }
    size as f64 / best / 1e9
}

/// What is written.
fn pattern(n: usize) -> u8 {
    ((n * 31) >> 3 ^ n >> 16) as u8
}

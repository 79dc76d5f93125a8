//! Computes a running digest over memory that changes all the while, on several processors, and over a disk: whatever happens to the
//! machine meanwhile, the last line says.
//!
//! A static program on std alone, which also runs on the host. `digest ROUNDS THREADS [DISK]` prints a digest for each thread and, with a
//! disk or file of at least 4 MiB, those of further threads, which read and write it all the while.

use std::arch::asm;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// Bytes of a thread's memory.
const MEMORY: usize = 16 << 20;
/// Threads for a disk, blocks of it that each has, and bytes of a block.
const LANES: usize = 4;
const BLOCKS: usize = 16;
const BLOCK: usize = 64 << 10;
/// O_DIRECT of x86: what is read is what the disk has.
const DIRECT: i32 = 0o40000;

/// Numbers that depend on the ones before (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// FNV-1a over words.
fn mix(digest: u64, words: &[u64]) -> u64 {
    words.iter().fold(digest, |digest, word| (digest ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(23))
}

/// Copies `count` words by one instruction, which an interrupt finds in its middle.
fn copy(memory: &mut [u64], from: usize, to: usize, count: usize) {
    assert!(from + count <= to && to + count <= memory.len());
    let base = memory.as_mut_ptr();
    // SAFETY: both ranges are in the memory, and apart.
    unsafe {
        asm!(
            "rep movsq",
            inout("rcx") count => _,
            inout("rsi") base.add(from) => _,
            inout("rdi") base.add(to) => _,
            options(nostack, preserves_flags)
        );
    }
}

fn memory(thread: u64, rounds: u64) -> u64 {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15 ^ thread << 17);
    let mut memory: Vec<u64> = (0..MEMORY / 8).map(|_| numbers.next()).collect();
    let half = memory.len() / 2;
    let mut digest = 0xcbf2_9ce4_8422_2325;
    for round in 0..rounds {
        let count = 1 + numbers.below(half / 4);
        let (from, to) = (numbers.below(half - count), half + numbers.below(half - count));
        copy(&mut memory, from, to, count);
        let window = 4096;
        let at = numbers.below(half - window);
        digest = mix(digest, &memory[half + at..half + at + window]);
        // What was hashed changes what comes.
        let place = numbers.below(half);
        memory[place] ^= digest ^ round;
        numbers.0 ^= digest | 1;
        // Pages come and go, and the kernel has something to do.
        let fresh = vec![digest; 1 << 15];
        digest = mix(digest, &fresh[fresh.len() - 8..]);
    }
    digest
}

/// What reads and writes a disk of which no other thread uses the same blocks.
struct Lane {
    disk: File,
    /// The first of its blocks.
    first: usize,
    memory: Vec<u8>,
    /// Where whole pages begin there, which O_DIRECT wants.
    start: usize,
}

impl Lane {
    fn new(path: &str, number: usize) -> Self {
        let disk = File::options().read(true).write(true).custom_flags(DIRECT).open(path).expect("the disk");
        let memory = vec![0_u8; 2 * BLOCK];
        let start = memory.as_ptr().align_offset(4096);
        Self { disk, first: number * BLOCKS, memory, start }
    }

    fn block(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + BLOCK]
    }

    fn place(&self, block: usize) -> u64 {
        ((self.first + block) * BLOCK) as u64
    }

    /// Reads a block; its digest, behind one.
    fn read(&mut self, block: usize, digest: u64) -> u64 {
        let at = self.place(block);
        self.disk
            .read_exact_at(&mut self.memory[self.start..self.start + BLOCK], at)
            .expect("reading the disk");
        let words = self.block().chunks_exact(8);
        let words: Vec<u64> =
            words.map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))).collect();
        mix(digest, &words)
    }

    fn write(&mut self, block: usize) {
        let at = self.place(block);
        self.disk.write_all_at(&self.memory[self.start..self.start + BLOCK], at).expect("writing the disk");
        // That takes a while.
        self.disk.sync_data().expect("flushing the disk");
    }

    /// Reads and writes blocks in an order that depends on what was read; then, until the others have `ended`, looks whether each is what
    /// it was in the end, and writes it again: so there is always a request under way, and the digest is the same however long they take.
    fn run(mut self, rounds: u64, ended: &AtomicBool) -> u64 {
        let mut numbers = Numbers(77 + self.first as u64);
        let mut digest = 1;
        for _ in 0..rounds {
            digest = self.read(numbers.below(BLOCKS), digest);
            self.block()[..8].copy_from_slice(&digest.to_le_bytes());
            numbers.0 ^= digest | 1;
            self.write(numbers.below(BLOCKS));
        }
        let last: Vec<u64> = (0..BLOCKS).map(|block| self.read(block, 1)).collect();
        while !ended.load(Ordering::SeqCst) {
            let block = numbers.below(BLOCKS);
            assert_eq!(self.read(block, 1), last[block], "block {} has changed", self.first + block);
            self.write(block);
        }
        mix(digest, &last)
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number =
        |at: usize| arguments.get(at).and_then(|text| text.parse().ok()).expect("ROUNDS THREADS [DISK]");
    let (rounds, threads): (u64, u64) = (number(1), number(2));
    let ended = &AtomicBool::new(false);
    let digests = thread::scope(|scope| {
        let disk = arguments.get(3).into_iter();
        let lanes = disk.flat_map(|path| (0..LANES).map(move |lane| Lane::new(path, lane)));
        let lanes: Vec<_> = lanes.map(|lane| scope.spawn(move || lane.run(rounds / 256, ended))).collect();
        let others: Vec<_> = (0..threads).map(|thread| scope.spawn(move || memory(thread, rounds))).collect();
        let mut digests: Vec<u64> =
            others.into_iter().map(|thread| thread.join().expect("a thread")).collect();
        ended.store(true, Ordering::SeqCst);
        digests.extend(lanes.into_iter().map(|lane| lane.join().expect("a thread of the disk")));
        digests
    });
    for digest in digests {
        println!("{digest:016x}");
    }
    std::io::stdout().flush().expect("output");
}

//! Work for the processor alone, with known results: what a program computes between two system calls.

use std::hint::black_box;
use std::time::Duration;

use crate::check;
use crate::time::timed;

/// A thousand steps of a chain of shifts, additions and a multiplication (xorshift64*).
pub(crate) fn alu(operations: u64) -> Duration {
    timed(|| {
        for _ in 0..operations {
            let (mut state, mut sum) = (black_box(0x9e37_79b9_7f4a_7c15_u64), 0_u64);
            for _ in 0..1000 {
                state ^= state >> 12;
                state ^= state << 25;
                state ^= state >> 27;
                sum = sum.rotate_left(7).wrapping_add(state.wrapping_mul(0x2545_f491_4f6c_dd1d));
            }
            assert_eq!(sum, ALU, "the sum");
        }
    })
}

/// The primes below a mebi, in an array of a byte each.
pub(crate) fn sieve(operations: u64) -> Duration {
    const SIZE: usize = 1 << 20;
    let mut composite = vec![false; SIZE];
    timed(|| {
        for _ in 0..operations {
            composite.fill(false);
            let mut number = 2;
            while number * number < SIZE {
                if !composite[number] {
                    for multiple in (number * number..SIZE).step_by(number) {
                        composite[multiple] = true;
                    }
                }
                number += 1;
            }
            let primes = composite[2..].iter().filter(|composite| !**composite).count();
            assert_eq!(primes, 82_025, "primes below {SIZE}");
        }
    })
}

/// 100000 numbers, in no order at first.
pub(crate) fn qsort(operations: u64) -> Duration {
    const COUNT: usize = 100_000;
    let mut numbers = vec![0_u32; COUNT];
    // As with C's qsort, the compiler does not know what compares.
    let compare: fn(u32, u32) -> i32 = black_box(|a, b| i32::from(a > b) - i32::from(a < b));
    let (mut before, mut after) = (0_u64, 0_u64);
    let time = timed(|| {
        for _ in 0..operations {
            let mut state = 1_u32;
            for number in &mut numbers {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *number = state;
                before += u64::from(state);
            }
            quicksort(&mut numbers, compare);
            after += numbers.iter().map(|number| u64::from(*number)).sum::<u64>();
        }
    });
    assert!(numbers.is_sorted() && before == after, "numbers that are not sorted");
    time
}

/// Hoare's, with the middle one as the pivot.
fn quicksort(mut numbers: &mut [u32], compare: fn(u32, u32) -> i32) {
    while numbers.len() > 1 {
        let pivot = numbers[numbers.len() / 2];
        let (mut low, mut high) = (0, numbers.len() - 1);
        loop {
            while compare(numbers[low], pivot) < 0 {
                low += 1;
            }
            while compare(numbers[high], pivot) > 0 {
                high -= 1;
            }
            if low >= high {
                break;
            }
            numbers.swap(low, high);
            low += 1;
            high -= 1;
        }
        let (first, second) = numbers.split_at_mut(low);
        // The recursion is for the smaller part, and so not deep.
        let (smaller, larger) = if first.len() < second.len() { (first, second) } else { (second, first) };
        quicksort(smaller, compare);
        numbers = larger;
    }
}

/// The 27th of Fibonacci's numbers, by as many calls.
pub(crate) fn fibonacci(operations: u64) -> Duration {
    #[inline(never)]
    fn number(n: u32) -> u32 {
        // Without it the compiler makes a loop of the second call.
        if n < 2 { n } else { number(n - 1) + black_box(number(n - 2)) }
    }
    timed(|| {
        for _ in 0..operations {
            assert_eq!(number(black_box(27)), 196_418, "Fibonacci's number");
        }
    })
}

/// A thousand steps of a chain of additions, multiplications, divisions and square roots.
pub(crate) fn float(operations: u64) -> Duration {
    timed(|| {
        for _ in 0..operations {
            let mut value = black_box(0.5_f64);
            for step in 1..=1000_u32 {
                value = (value * 1.25 + f64::from(step)).sqrt() + 3.0 / (value + 1.0);
            }
            assert_eq!(value.to_bits(), FLOAT, "the value is {value}");
        }
    })
}

/// The product of two matrices of 256 by 256, of f64.
pub(crate) fn matmul(operations: u64) -> Duration {
    const SIZE: usize = 256;
    let matrix = |seed: usize| -> Vec<f64> {
        (0..SIZE * SIZE).map(|at| ((at * seed + at / SIZE) % 7) as f64).collect()
    };
    let (a, b, mut c) = (matrix(3), matrix(5), vec![0.0; SIZE * SIZE]);
    let time = timed(|| {
        for _ in 0..operations {
            for (row, line) in a.chunks_exact(SIZE).zip(c.chunks_exact_mut(SIZE)) {
                for (column, place) in line.iter_mut().enumerate() {
                    let mut sum = 0.0;
                    for (k, factor) in row.iter().enumerate() {
                        sum += factor * b[k * SIZE + column];
                    }
                    *place = sum;
                }
            }
            black_box(&mut c);
        }
    });
    // All are small integers, so that every sum is exact: that of the product's elements, of columns times rows.
    let sum: f64 = (0..SIZE)
        .map(|k| {
            let column: f64 = a.iter().skip(k).step_by(SIZE).sum();
            column * b[k * SIZE..][..SIZE].iter().sum::<f64>()
        })
        .sum();
    assert_eq!(c.iter().sum::<f64>(), sum, "the product of the matrices");
    time
}

/// A copy of a mebibyte, by the C library.
pub(crate) fn memcpy(operations: u64) -> Duration {
    let (from, mut to) = (check::data(1 << 20), vec![0; 1 << 20]);
    let time = timed(|| {
        for _ in 0..operations {
            to.copy_from_slice(black_box(&from));
            black_box(&mut to);
        }
    });
    assert!(from == to, "a copy that is not the same");
    time
}

/// The digest of 64 KiB (FIPS 180-4), without the processor's instructions for it.
pub(crate) fn sha256(operations: u64) -> Duration {
    let data = check::data(64 << 10);
    timed(|| {
        for _ in 0..operations {
            assert_eq!(digest(black_box(&data)), DIGEST, "the digest");
        }
    })
}

/// Of whole blocks.
fn digest(data: &[u8]) -> [u32; 8] {
    let mut state = [
        0x6a09_e667,
        0xbb67_ae85,
        0x3c6e_f372,
        0xa54f_f53a,
        0x510e_527f,
        0x9b05_688c,
        0x1f83_d9ab,
        0x5be0_cd19,
    ];
    let (blocks, rest) = data.as_chunks::<64>();
    assert!(rest.is_empty(), "{} bytes beyond whole blocks", rest.len());
    for block in blocks {
        compress(&mut state, block);
    }
    let mut last = [0; 64];
    last[0] = 0x80;
    last[56..].copy_from_slice(&(data.len() as u64 * 8).to_be_bytes());
    compress(&mut state, &last);
    state
}

fn compress(state: &mut [u32; 8], block: &[u8; 64]) {
    let mut words = [0_u32; 64];
    for (word, bytes) in words.iter_mut().zip(block.as_chunks().0) {
        *word = u32::from_be_bytes(*bytes);
    }
    for at in 16..64 {
        let (a, b) = (words[at - 15], words[at - 2]);
        let first = a.rotate_right(7) ^ a.rotate_right(18) ^ (a >> 3);
        let second = b.rotate_right(17) ^ b.rotate_right(19) ^ (b >> 10);
        words[at] = words[at - 16].wrapping_add(first).wrapping_add(words[at - 7]).wrapping_add(second);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for (word, constant) in words.iter().zip(&ROUNDS) {
        let sum = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let choice = (e & f) ^ (!e & g);
        let first = h.wrapping_add(sum).wrapping_add(choice).wrapping_add(*constant).wrapping_add(*word);
        let sum = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let second = sum.wrapping_add((a & b) ^ (a & c) ^ (b & c));
        (h, g, f, e, d, c, b, a) = (g, f, e, d.wrapping_add(first), c, b, a, first.wrapping_add(second));
    }
    for (value, addend) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *value = value.wrapping_add(addend);
    }
}

/// What the chain of [`alu`] comes to.
const ALU: u64 = 0x0beb_f76c_b8b4_6072;

/// What that of [`float`] comes to, as bits.
const FLOAT: u64 = 0x4040_2c37_068e_d594;

/// That of the 64 KiB.
const DIGEST: [u32; 8] =
    [0x7cb5_706c, 0x5f72_736e, 0x79a7_16d5, 0xe24c_1dbe, 0xb44d_ff16, 0x5ac8_f50b, 0x53d9_4d1e, 0x8871_5e36];

/// The cube roots of the first primes, 32 bits after the point.
#[rustfmt::skip]
const ROUNDS: [u32; 64] = [
    0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5,
    0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174,
    0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da,
    0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7, 0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967,
    0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85,
    0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070,
    0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
    0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2,
];

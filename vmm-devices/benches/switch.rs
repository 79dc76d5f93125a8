//! How fast frames go from port to port of a switch, beside a copy of the same bytes: in one process and between clients of a broker, with a
//! judge and without.
//!
//!     cargo bench -p vmm-devices --bench switch [-- ROUNDS]

#![allow(clippy::unwrap_used, clippy::panic, reason = "a program that measures")]

use std::num::NonZeroU64;

#[path = "support/switch_rates.rs"]
mod switch_rates;

fn main() {
    // Cargo calls it with arguments of its own.
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok());
    let rounds = rounds.or(NonZeroU64::new(11)).unwrap();
    println!("{:>6}  {:<11} {:>12} {:>8} {:>8} {:>6}", "bytes", "way", "frames/s", "GB/s", "copied", "ratio");
    for row in switch_rates::rows(rounds) {
        println!(
            "{:>6}  {:<11} {:>12.0} {:>8.2} {:>8.2} {:>6.2}",
            row.len,
            format!("{:?}", row.way),
            row.frames,
            row.bytes / 1e9,
            row.copied / 1e9,
            row.ratio
        );
    }
}

//! Work of a program of a guest, to be timed or to be checked.
//!
//! A static program on std alone, which also runs on the host. `workload time [NAME...]` prints a line `NAME OPERATIONS
//! NANOSECONDS` for each piece of work, by the guest's monotonic clock; `workload check [ROUNDS]` prints a line for each subject
//! and ends with 0, or panics and says what was wrong. `workload clock` prints the clock; `workload nothing` does it. Busybox is
//! `/bin/busybox`, or what the environment says.

mod check;
mod compute;
mod io;
mod memory;
mod registers;
mod system;
mod time;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["nothing"] => {}
        ["clock"] => println!("clock {}", system::monotonic()),
        ["time", names @ ..] => time::all(names),
        ["check"] => check::all(1),
        ["check", rounds] => check::all(rounds.parse().expect("a number of rounds")),
        ["data"] => check::write_data(),
        _ => panic!("workload time [NAME...] | check [ROUNDS] | data | clock | nothing"),
    }
}

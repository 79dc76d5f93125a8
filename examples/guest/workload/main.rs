//! Work of a program of a guest, to be timed or to be checked.
//!
//! A static program on std alone, which also runs on the host. `workload time [NAME...]` prints a line `NAME OPERATIONS
//! NANOSECONDS` for each piece of work, by the guest's monotonic clock; `workload check [ROUNDS]` prints a line for each subject
//! and ends with 0, or panics and says what was wrong. `workload clock` prints the clock; `workload nothing` does it; `workload serve ADDRESS`
//! is the other end of what goes over TCP. Busybox is `/bin/busybox`, or what the environment says.

mod check;
mod compute;
mod io;
mod memory;
mod registers;
mod server;
mod system;
mod time;

use std::net::TcpListener;

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
        ["serve", address] => server::serve(&TcpListener::bind(address).expect("an address")),
        _ => panic!("workload time [NAME...] | check [ROUNDS] | serve ADDRESS | data | clock | nothing"),
    }
}

//! An unprivileged program that tries to get at what is not its own: memory of the kernel and of what runs the kernel, and
//! every gate out of its ring. Each attempt is to end in a signal, or as Linux documents it, and in nothing else.
//!
//! A static program on std alone, which also runs on the host. `probe [long] [int1]` prints the outcomes by subject, a
//! table of those that were not expected, and `probes: N unexpected: M`; it ends with 0 if M is. `long` tries all
//! of what is sampled otherwise; `int1` tries that instruction too, which hangs the processor on some hypervisors.

mod catch;
mod code;
mod gates;
mod memory;
mod privileged;
mod report;
mod system;

use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let wants = |word: &str| words.iter().any(|given| given == word);
    let density = if wants("long") { 1 } else { 64 };
    system::become_nobody();
    catch::install();
    let (mut report, mut code) = (report::Report::default(), code::Code::new());
    memory::all(&mut report, &mut code, density);
    gates::interrupts(&mut report, &mut code);
    gates::system_calls(&mut report);
    gates::odd_entries(&mut report, &mut code);
    privileged::all(&mut report, &mut code);
    gates::segments(&mut report, &mut code, density);
    gates::far_transfers(&mut report, &mut code, density);
    gates::entry_page(&mut report, &mut code, density);
    gates::compatibility_mode(&mut report, &mut code);
    if wants("int1") {
        gates::int1(&mut report, &mut code);
    }
    if report.print() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

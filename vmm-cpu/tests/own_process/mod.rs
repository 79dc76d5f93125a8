//! Tests that need a process of their own: tests of a program share one, and run in parallel.

use std::process::{Command, Output};

/// Runs the test of that name in a process of its own; what became of that. `None` in that process, where the test goes on.
pub(crate) fn run(test: &str) -> Option<Output> {
    const CHILD: &str = "TEST_HAS_OWN_PROCESS";
    if std::env::var_os(CHILD).is_some() {
        return None;
    }
    let arguments = ["--exact", test, "--nocapture", "--test-threads=1"];
    let child = Command::new(std::env::current_exe().unwrap()).args(arguments).env(CHILD, "1").output();
    let output = child.unwrap();
    let ran = String::from_utf8_lossy(&output.stdout).contains("running 1 test");
    assert!(ran, "there is no test {test}");
    Some(output)
}

/// Whether this is the process of the test of that name. If not, it has passed in one when this returns.
pub(crate) fn is_it(test: &str) -> bool {
    let Some(output) = run(test) else { return true };
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {text}", output.status);
    false
}

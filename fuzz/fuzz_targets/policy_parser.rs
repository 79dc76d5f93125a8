//! A policy's text: read, or refused with a place; what is read is written and read again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm_policy::syntax::MemoryLoader;
use vmm_policy::{Policy, PolicyError};

fuzz_target!(|text: &str| {
    // What comes behind a NUL is a file that it may include as "f".
    let (text, file) = text.split_once('\0').unwrap_or((text, ""));
    let files = MemoryLoader([("f".to_owned(), file.to_owned())].into());
    match Policy::parse_with("top", text, &files) {
        Ok(policy) => {
            let written = policy.document().to_string();
            let again = Policy::parse_with("top", &written, &files).expect("what was written is read");
            assert_eq!(again.document(), policy.document(), "{written}");
            assert_eq!(again.digest(), policy.digest());
        }
        Err(PolicyError::Invalid(problems)) => {
            for problem in problems.iter() {
                let lines = if problem.file == "top" { text } else { file }.lines().count() + 1;
                assert!((1..=lines).contains(&problem.line) && problem.column >= 1, "{problem:?}");
            }
        }
        Err(_) => (),
    }
});

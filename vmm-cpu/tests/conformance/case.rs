//! One case, its outcome, and the deadline that turns a hang into a failure.

use std::any::Any;
use std::error::Error;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use libtest_mimic::{Completion, Failed};

use super::backend::{Backend, Candidate};

/// Longest that one case may take on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(90);

/// A named case.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&Backend) -> Outcome,
}

/// What a case ends with.
pub(crate) type Outcome<T = ()> = Result<T, Stop>;

/// Why a case did not pass.
pub(crate) enum Stop {
    /// The backend does not show a capability that the case is about.
    Skipped(String),
    /// The backend is wrong.
    Failed(String),
}

impl Stop {
    pub(crate) fn skipped(reason: impl Into<String>) -> Self {
        Self::Skipped(reason.into())
    }

    pub(crate) fn failed(reason: impl Into<String>) -> Self {
        Self::Failed(reason.into())
    }
}

impl<E: Error> From<E> for Stop {
    fn from(error: E) -> Self {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        Self::Failed(text)
    }
}

/// The cases of one subject, named as the functions that they are.
macro_rules! cases {
    ($($name:ident),+ $(,)?) => {
        pub(super) const CASES: &[$crate::suite::case::Case] =
            &[$($crate::suite::case::Case { name: stringify!($name), run: $name }),+];
    };
}
pub(crate) use cases;

/// Runs the case of that full name to its end or to the deadline.
pub(crate) fn conclude(
    name: &str,
    candidate: &Arc<Candidate>,
    case: &'static Case,
) -> Result<Completion, Failed> {
    if let Err(Stop::Skipped(reason)) = candidate.check_limits(name) {
        return Ok(Completion::ignored_with(format!("skipped: {reason}")));
    }
    let (sender, receiver) = mpsc::channel();
    let candidate = Arc::clone(candidate);
    // A thread of its own: one that hangs is left behind and does not keep the suite from ending.
    thread::Builder::new().name(format!("{}::{name}", candidate.name)).spawn(move || {
        let run = AssertUnwindSafe(|| candidate.backend().and_then(case.run));
        let outcome = panic::catch_unwind(run).unwrap_or_else(|panic| Err(Stop::Failed(message_of(&*panic))));
        sender.send(outcome).ok();
    })?;
    match receiver.recv_timeout(DEADLINE) {
        Ok(Ok(())) => Ok(Completion::Completed),
        Ok(Err(Stop::Skipped(reason))) => Ok(Completion::ignored_with(format!("skipped: {reason}"))),
        Ok(Err(Stop::Failed(reason))) => Err(reason.into()),
        Err(_) => Err(format!("no end within {} s", DEADLINE.as_secs()).into()),
    }
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic without a message".to_owned())
}

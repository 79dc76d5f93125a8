//! What may be asked for after what.

use std::collections::BTreeMap;
use std::sync::Arc;

/// A state machine: states, and which request leads from which to which. Made once for a kind of device, and shared.
///
/// ```
/// use vmm_policy::trust::{Protocol, Session};
///
/// let door = Protocol::builder("door", "closed").step("closed", "open", "open").step("open", "close", "closed").build()?;
/// let mut session = Session::new(&door);
/// session.take("open").unwrap();
/// assert_eq!(session.take("open").unwrap_err().to_string(), "door: \"open\" is not expected in state \"open\", but \"close\"");
/// # Ok::<(), vmm_policy::trust::ProtocolError>(())
/// ```
#[derive(Debug)]
pub struct Protocol {
    name: &'static str,
    states: Vec<&'static str>,
    /// By the numbers of states.
    steps: BTreeMap<(usize, &'static str), usize>,
}

/// Why a protocol is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A request leads to two states.
    #[error("{protocol}: {request:?} leads from {state:?} to two states")]
    Ambiguous {
        /// Of which.
        protocol: &'static str,
        /// In which state.
        state: &'static str,
        /// Which.
        request: &'static str,
    },
    /// A state is never come to.
    #[error("{protocol}: nothing leads to {state:?}")]
    Unreachable {
        /// Of which.
        protocol: &'static str,
        /// Which.
        state: &'static str,
    },
}

/// Makes a [`Protocol`].
#[derive(Debug)]
pub struct ProtocolBuilder {
    name: &'static str,
    start: &'static str,
    steps: Vec<(&'static str, &'static str, &'static str)>,
}

impl ProtocolBuilder {
    /// In state `from`, `request` leads to state `to`.
    #[must_use]
    pub fn step(mut self, from: &'static str, request: &'static str, to: &'static str) -> Self {
        self.steps.push((from, request, to));
        self
    }

    /// In each state that steps lead from or to, `request` leads to `to`; of those steps that have been named before.
    #[must_use]
    pub fn always(mut self, request: &'static str, to: &'static str) -> Self {
        let mut states: Vec<&'static str> =
            self.steps.iter().flat_map(|(from, _, to)| [*from, *to]).collect();
        states.push(self.start);
        states.sort_unstable();
        states.dedup();
        self.steps.extend(states.into_iter().map(|from| (from, request, to)));
        self
    }

    /// The protocol.
    ///
    /// # Errors
    /// If a request leads to two states, or nothing leads to a state.
    pub fn build(self) -> Result<Arc<Protocol>, ProtocolError> {
        let mut states = vec![self.start];
        for (from, _, to) in &self.steps {
            for state in [from, to] {
                if !states.contains(state) {
                    states.push(state);
                }
            }
        }
        let number = |state: &str| states.iter().position(|known| *known == state).unwrap_or(0);
        let mut steps = BTreeMap::new();
        for (from, request, to) in &self.steps {
            let to = number(to);
            if steps.insert((number(from), *request), to).is_some_and(|before| before != to) {
                return Err(ProtocolError::Ambiguous { protocol: self.name, state: from, request });
            }
        }
        let mut reached = vec![0];
        let mut at = 0;
        while let Some(from) = reached.get(at).copied() {
            for (_, to) in steps.range((from, "")..).take_while(|((state, _), _)| *state == from) {
                if !reached.contains(to) {
                    reached.push(*to);
                }
            }
            at += 1;
        }
        match states.iter().enumerate().find(|(state, _)| !reached.contains(state)) {
            Some((_, state)) => Err(ProtocolError::Unreachable { protocol: self.name, state }),
            None => Ok(Arc::new(Protocol { name: self.name, states, steps })),
        }
    }
}

impl Protocol {
    /// Begins in state `start`.
    pub fn builder(name: &'static str, start: &'static str) -> ProtocolBuilder {
        ProtocolBuilder { name, start, steps: Vec::new() }
    }

    /// A virtio device by its status register (Virtio 1.3, 2.1 and 3.1.1).
    ///
    /// # Errors
    /// None.
    pub fn virtio_device() -> Result<Arc<Self>, ProtocolError> {
        Self::builder("virtio device", "reset")
            .step("reset", "acknowledge", "acknowledged")
            .step("acknowledged", "driver", "driver")
            .step("driver", "features-ok", "features")
            .step("features", "queue-setup", "features")
            .step("features", "driver-ok", "live")
            .step("live", "notify", "live")
            .step("live", "needs-reset", "broken")
            .step("acknowledged", "failed", "failed")
            .step("driver", "failed", "failed")
            .step("features", "failed", "failed")
            .step("live", "failed", "failed")
            .always("reset", "reset")
            .build()
    }

    /// A stream of a vsock device's, from the guest's side (Virtio 1.3, 5.10.6.6).
    ///
    /// # Errors
    /// None.
    pub fn vsock_stream() -> Result<Arc<Self>, ProtocolError> {
        Self::builder("vsock stream", "closed")
            .step("closed", "request", "asked")
            .step("asked", "response", "open")
            .step("open", "rw", "open")
            .step("open", "credit", "open")
            .step("open", "shutdown", "closing")
            .step("closing", "rw", "closing")
            .step("closing", "credit", "closing")
            .step("closing", "shutdown", "closing")
            .always("rst", "closed")
            .build()
    }

    /// What it is called.
    pub fn name(&self) -> &'static str {
        self.name
    }
}

/// That a request does not follow from what was before. The state is what it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{protocol}: {request:?} is not expected in state {state:?}, but {expected}")]
pub struct OutOfOrder {
    /// Of which protocol.
    pub protocol: &'static str,
    /// In which state.
    pub state: &'static str,
    /// What was asked for.
    pub request: String,
    /// What could have been.
    pub expected: String,
}

/// One device or connection, and where it is.
#[derive(Clone, Debug)]
pub struct Session {
    protocol: Arc<Protocol>,
    state: usize,
}

impl Session {
    /// At the start.
    pub fn new(protocol: &Arc<Protocol>) -> Self {
        Self { protocol: Arc::clone(protocol), state: 0 }
    }

    /// Where it is.
    pub fn state(&self) -> &'static str {
        self.protocol.states.get(self.state).copied().unwrap_or_default()
    }

    /// Where `request` would lead.
    ///
    /// # Errors
    /// If nowhere.
    pub fn look(&self, request: &str) -> Result<&'static str, OutOfOrder> {
        self.next(request).map(|state| self.protocol.states.get(state).copied().unwrap_or_default())
    }

    /// Goes where `request` leads.
    ///
    /// # Errors
    /// If nowhere.
    pub fn take(&mut self, request: &str) -> Result<&'static str, OutOfOrder> {
        self.state = self.next(request)?;
        Ok(self.state())
    }

    fn next(&self, request: &str) -> Result<usize, OutOfOrder> {
        let here =
            self.protocol.steps.range((self.state, "")..).take_while(|((state, _), _)| *state == self.state);
        let mut expected = Vec::new();
        for ((_, known), to) in here {
            if *known == request {
                return Ok(*to);
            }
            expected.push(format!("{known:?}"));
        }
        let expected = match expected.as_slice() {
            [] => "nothing".to_owned(),
            all => crate::syntax::one_of(all.iter().map(String::as_str)),
        };
        Err(OutOfOrder {
            protocol: self.protocol.name,
            state: self.state(),
            request: request.chars().take(64).collect(),
            expected,
        })
    }
}

//! Which entries someone wants to see.

use crate::event::Party;
use crate::event::{Action, Event, Kind, Outcome, Verdict, parse_uuid};

/// A filter: what is not said, everything passes.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Filter {
    /// One of these kinds.
    pub kinds: Vec<Kind>,
    /// One of these actions.
    pub actions: Vec<Action>,
    /// One of these verdicts.
    pub verdicts: Vec<Verdict>,
    /// One of these outcomes.
    pub outcomes: Vec<Outcome>,
    /// A virtual machine, as subject or peer.
    pub vm: Option<u128>,
    /// A source.
    pub source: Option<u32>,
    /// Not before this entry.
    pub from: Option<u64>,
    /// Not behind this entry.
    pub to: Option<u64>,
    /// Not before this time, nanoseconds since 1970.
    pub after: Option<u64>,
    /// Not after this time.
    pub before: Option<u64>,
    /// Text in the name of a party, object, rule, reason or attribute.
    pub text: Option<String>,
}

fn among<T: PartialEq>(allowed: &[T], value: Option<T>) -> bool {
    allowed.is_empty() || value.is_some_and(|value| allowed.contains(&value))
}

impl Filter {
    /// Everything.
    pub fn new() -> Self {
        Self::default()
    }

    /// A virtual machine by its UUID as text; `None` if that is none.
    pub fn parse_vm(text: &str) -> Option<u128> {
        parse_uuid(text)
    }

    /// Whether an entry passes.
    pub fn passes(&self, seq: u64, source: u32, event: &Event) -> bool {
        let is_vm = |party: &Option<Party>, uuid| matches!(party, Some(Party::Vm(vm)) if vm.uuid == uuid);
        among(&self.kinds, Some(event.kind))
            && among(&self.actions, event.action)
            && among(&self.verdicts, event.verdict)
            && among(&self.outcomes, event.outcome)
            && self.vm.is_none_or(|uuid| is_vm(&event.subject, uuid) || is_vm(&event.peer, uuid))
            && self.source.is_none_or(|wanted| wanted == source)
            && self.from.is_none_or(|from| seq >= from)
            && self.to.is_none_or(|to| seq <= to)
            && self.after.is_none_or(|after| event.wall >= after)
            && self.before.is_none_or(|before| event.wall <= before)
            && self.text.as_ref().is_none_or(|text| crate::sink::describe(event).contains(text.as_str()))
    }
}

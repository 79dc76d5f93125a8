//! Interrupts and exceptions: what they are, and how they are delivered (Intel SDM 3A chapter 7).
//!
//! The run loop calls [`Machine::deliver`] for interrupts and [`Machine::deliver_exception`] for what comes of that and
//! of instructions; handlers of INT n and the like call [`Machine::deliver`].
//!
//! Threat model: the IVT, IDT, GDT, LDT and TSS are guest memory. Whatever they hold ends in a delivery, an exception or
//! a shutdown after a bounded number of steps.

mod entry;
mod long;
mod stack;

pub(crate) use stack::{Stack, is_64_bit};

use super::core::{Flow, Machine, Reason};
use crate::vcpu::Halt;

/// Vectors of exceptions (Intel SDM 3A table 7-1).
pub(crate) mod vector {
    pub(crate) const DE: u8 = 0;
    pub(crate) const DB: u8 = 1;
    pub(crate) const NMI: u8 = 2;
    pub(crate) const BP: u8 = 3;
    pub(crate) const OF: u8 = 4;
    pub(crate) const BR: u8 = 5;
    pub(crate) const UD: u8 = 6;
    pub(crate) const NM: u8 = 7;
    pub(crate) const DF: u8 = 8;
    pub(crate) const TS: u8 = 10;
    pub(crate) const NP: u8 = 11;
    pub(crate) const SS: u8 = 12;
    pub(crate) const GP: u8 = 13;
    pub(crate) const PF: u8 = 14;
    pub(crate) const MF: u8 = 16;
    pub(crate) const AC: u8 = 17;
    pub(crate) const MC: u8 = 18;
    pub(crate) const XM: u8 = 19;
}

/// Bits of DR6 (Intel SDM 3B 19.2.3).
pub(crate) mod dr6 {
    /// Breakpoints 0 to 3.
    pub(crate) const BREAKPOINTS: u64 = 0xf;
    /// An access to a debug register while DR7.GD was set.
    pub(crate) const BD: u64 = 1 << 13;
    /// A single step.
    pub(crate) const BS: u64 = 1 << 14;
    /// A switch to a task whose TSS asks for it.
    pub(crate) const BT: u64 = 1 << 15;
}

/// Deliveries in a row. Without tasks there are three at most: an exception, a double fault, a shutdown.
const MAX_DELIVERIES: u32 = 8;

/// General detect, in DR7.
const DR7_GD: u64 = 1 << 13;

/// An exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exception {
    pub(crate) vector: u8,
    /// Not pushed in real mode.
    pub(crate) error: Option<u32>,
    /// Linear address of a page fault.
    pub(crate) cr2: Option<u64>,
    /// Bits that a debug exception sets in DR6.
    pub(crate) dr6: u64,
}

impl Exception {
    /// One without an error code.
    pub(crate) fn new(vector: u8) -> Self {
        Self { vector, error: None, cr2: None, dr6: 0 }
    }

    pub(crate) fn with_error(vector: u8, error: u16) -> Self {
        Self { error: Some(u32::from(error)), ..Self::new(vector) }
    }

    /// #PF at linear address `va`.
    pub(crate) fn page_fault(va: u64, error: u32) -> Self {
        Self { error: Some(error), cr2: Some(va), ..Self::new(vector::PF) }
    }

    /// #DB with the bits that it sets in DR6.
    pub(crate) fn debug(dr6_bits: u64) -> Self {
        Self { dr6: dr6_bits, ..Self::new(vector::DB) }
    }

    /// Whether RIP is that of the instruction that faulted, which then goes on with RF set. Data and task breakpoints
    /// and single steps are traps; an instruction breakpoint is a fault that leaves RF alone.
    fn sets_resume_flag(&self) -> bool {
        match self.vector {
            vector::DB => self.dr6 & dr6::BD != 0,
            vector::NMI | vector::BP | vector::OF | vector::DF | vector::MC => false,
            _ => true,
        }
    }

    fn class(&self) -> Class {
        match self.vector {
            vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
            vector::PF => Class::PageFault,
            vector::DF => Class::DoubleFault,
            _ => Class::Benign,
        }
    }
}

/// What an exception does to one that was being delivered (Intel SDM 3A tables 7-4 and 7-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

/// What interrupts the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Exception(Exception),
    /// INT n.
    Software {
        vector: u8,
    },
    /// INT3.
    Breakpoint,
    /// INTO.
    Overflow,
    /// INT1.
    Int1,
    /// From an interrupt controller.
    External {
        vector: u8,
    },
    Nmi,
}

impl Event {
    pub(crate) fn vector(&self) -> u8 {
        match *self {
            Event::Exception(exception) => exception.vector,
            Event::Software { vector } | Event::External { vector } => vector,
            Event::Breakpoint => vector::BP,
            Event::Overflow => vector::OF,
            Event::Int1 => vector::DB,
            Event::Nmi => vector::NMI,
        }
    }

    /// Whether an instruction asks for it: INT n, INT3, INTO. Such may only use gates that their privilege level
    /// reaches, and exceptions on the way are the program's own.
    fn is_software(&self) -> bool {
        matches!(self, Event::Software { .. } | Event::Breakpoint | Event::Overflow)
    }

    fn error(&self) -> Option<u32> {
        match self {
            Event::Exception(exception) => exception.error,
            _ => None,
        }
    }

    fn class(&self) -> Class {
        match self {
            Event::Exception(exception) => exception.class(),
            _ => Class::Benign,
        }
    }
}

/// What is delivered after `second` came up while `first` was being delivered; `None`: the processor shuts down.
fn combine(first: &Event, second: Exception) -> Option<Exception> {
    let benign = second.class() == Class::Benign;
    match first.class() {
        Class::DoubleFault if !benign => None,
        Class::PageFault if !benign => Some(Exception::with_error(vector::DF, 0)),
        Class::Contributory if second.class() == Class::Contributory => {
            Some(Exception::with_error(vector::DF, 0))
        }
        _ => Some(second),
    }
}

impl Machine<'_> {
    /// Delivers an event, and what comes of exceptions in doing so. RIP is what the handler shall return to.
    ///
    /// The one way to fail is [`Halt::Shutdown`], the triple fault.
    ///
    /// A handler that is a task may fault as soon as it is entered, and so may the handler of that. What is still on its
    /// way after a few of those waits for the run loop, which looks at kicks in between.
    pub(crate) fn take(&mut self, event: Event) -> Flow {
        let mut event = event;
        for _ in 0..MAX_DELIVERIES {
            if self.deliver(event).is_ok() {
                return Ok(());
            }
            let second = match std::mem::take(&mut self.reason) {
                Reason::Exception(second) => second,
                other => return Err(self.leave(other)),
            };
            self.note(&second);
            match combine(&event, second) {
                Some(next) => event = Event::Exception(next),
                None => return Err(self.leave(Reason::Halt(Halt::Shutdown))),
            }
        }
        self.injected = Some(event);
        self.urgent = true;
        self.end_block();
        Ok(())
    }

    /// As [`Machine::take`], of an exception; the halt that it ends in, if it does.
    pub(crate) fn deliver_exception(&mut self, exception: Exception) -> Option<Halt> {
        self.take(Event::Exception(exception)).is_err().then(|| match std::mem::take(&mut self.reason) {
            Reason::Halt(halt) => halt,
            _ => Halt::Shutdown,
        })
    }

    /// Leaves in CR2, DR6 and DR7 what an exception leaves there, whatever becomes of its delivery.
    fn note(&mut self, exception: &Exception) {
        if let Some(va) = exception.cr2 {
            self.cpu.cr2 = va;
        }
        if exception.vector == vector::DB {
            self.cpu.dr6 = self.cpu.dr6 & !dr6::BREAKPOINTS | exception.dr6;
            self.cpu.dr7 &= !DR7_GD;
        }
    }
}

#[cfg(test)]
mod tests;

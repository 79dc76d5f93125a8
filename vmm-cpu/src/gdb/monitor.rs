//! GDB's `monitor` commands: those that every machine has, and those that its VMM adds.

use std::fmt::{self, Write};

use super::inferior::Inferior;
use super::page_walk;
use crate::error::Result;
use crate::state::{LocalApicState, SystemRegisters};

/// Commands that a VMM adds to those of the stub.
///
/// Called on the debugger's thread while all vCPUs stand still.
pub trait Monitor: Send {
    /// The commands, each with a line of help.
    fn commands(&self) -> &[MonitorCommand];

    /// Answers one of [`Monitor::commands`], in lines for people to read. `arguments` is what follows the name.
    ///
    /// # Errors
    /// What `out` says.
    fn run(&mut self, name: &str, arguments: &str, out: &mut dyn Write) -> fmt::Result;
}

/// The name of a command, without blanks, and what it does in a few words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MonitorCommand {
    /// What is typed.
    pub name: &'static str,
    /// What `monitor help` says.
    pub help: &'static str,
}

/// The stub's own.
const OWN: [MonitorCommand; 4] = [
    MonitorCommand { name: "help", help: "this list" },
    MonitorCommand { name: "translate", help: "ADDRESS [VCPU]: the page-table entries that translate it" },
    MonitorCommand { name: "registers", help: "[VCPU]: segment, table, control and debug registers" },
    MonitorCommand { name: "interrupts", help: "[VCPU]: pending events and the local APIC" },
];

/// The answer to a command, in lines. What is wrong with one is an answer too.
pub(super) fn answer(inferior: &mut Inferior, command: &str) -> String {
    let mut out = String::new();
    if let Err(error) = dispatch(inferior, command.trim(), &mut out) {
        // Writing to a string does not fail.
        let _unfailing = writeln!(out, "{error}");
    }
    if !out.is_empty() && !out.ends_with('\n') {
        out.push('\n');
    }
    out
}

#[derive(Debug, thiserror::Error)]
enum MonitorError {
    #[error(transparent)]
    Vcpu(#[from] crate::Error),
    #[error("the answer has no text")]
    Text(#[from] fmt::Error),
    #[error("{0:?} is no command; try `monitor help`")]
    Unknown(String),
    #[error("{0:?} is no number")]
    Number(String),
    #[error("an address is missing")]
    NoAddress,
}

fn dispatch(inferior: &mut Inferior, command: &str, out: &mut String) -> Result<(), MonitorError> {
    let (name, arguments) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
    let mut words = arguments.split_whitespace();
    match name {
        "help" | "" => help(inferior, out)?,
        "translate" => {
            let gva = number(words.next().ok_or(MonitorError::NoAddress)?)?;
            let system = inferior.with(vcpu(inferior, words.next())?, |vcpu| vcpu.system_registers())?;
            page_walk::show(&inferior.ram, &system, gva, out)?;
        }
        "registers" => {
            let system = inferior.with(vcpu(inferior, words.next())?, |vcpu| vcpu.system_registers())?;
            registers(&system, out)?;
        }
        "interrupts" => {
            let index = vcpu(inferior, words.next())?;
            let state = inferior.with(index, |vcpu| vcpu.save())?;
            let interrupts_on = state.general.rflags & crate::state::rflags::IF != 0;
            writeln!(out, "vCPU {index}: {:?}, RFLAGS.IF {}", state.run_state, u8::from(interrupts_on))?;
            writeln!(out, "{:?}", state.events)?;
            match &state.local_apic {
                Some(apic) => local_apic(apic, state.system.apic_base, out)?,
                None => writeln!(out, "no local APIC")?,
            }
        }
        _ => {
            let knows = |commands: &[MonitorCommand]| commands.iter().any(|command| command.name == name);
            let monitor = inferior.monitors.iter_mut().find(|monitor| knows(monitor.commands()));
            monitor.ok_or_else(|| MonitorError::Unknown(name.to_owned()))?.run(
                name,
                arguments.trim(),
                out,
            )?;
        }
    }
    Ok(())
}

fn help(inferior: &Inferior, out: &mut String) -> fmt::Result {
    let added = inferior.monitors.iter().flat_map(|monitor| monitor.commands());
    for MonitorCommand { name, help } in OWN.iter().chain(added) {
        writeln!(out, "{name:12} {help}")?;
    }
    Ok(())
}

/// A number as people write it: decimal, or hexadecimal after `0x`.
fn number(text: &str) -> Result<u64, MonitorError> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| MonitorError::Number(text.to_owned()))
}

/// The vCPU of that index; without one, the one that stopped last.
fn vcpu(inferior: &Inferior, text: Option<&str>) -> Result<u32, MonitorError> {
    let Some(text) = text else { return Ok(inferior.current) };
    u32::try_from(number(text)?).map_err(|_| MonitorError::Number(text.to_owned()))
}

fn registers(s: &SystemRegisters, out: &mut dyn Write) -> fmt::Result {
    let segments = [
        ("CS", &s.cs),
        ("SS", &s.ss),
        ("DS", &s.ds),
        ("ES", &s.es),
        ("FS", &s.fs),
        ("GS", &s.gs),
        ("TR", &s.tr),
        ("LDTR", &s.ldtr),
    ];
    for (name, segment) in segments {
        write!(
            out,
            "{name:4} {:04x} base {:#018x} limit {:#010x}",
            segment.selector, segment.base, segment.limit
        )?;
        let named = [
            (segment.present, "present"),
            (segment.code_or_data, "code/data"),
            (segment.long, "64-bit"),
            (segment.big, "32-bit"),
            (segment.unusable, "unusable"),
        ];
        for (_, name) in named.into_iter().filter(|(is, _)| *is) {
            write!(out, " {name}")?;
        }
        writeln!(out, " type {:#x} DPL {}", segment.kind, segment.dpl)?;
    }
    for (name, table) in [("GDTR", s.gdtr), ("IDTR", s.idtr)] {
        writeln!(out, "{name} base {:#018x} limit {:#06x}", table.base, table.limit)?;
    }
    writeln!(out, "CR0 {:#x} CR2 {:#x} CR3 {:#x} CR4 {:#x} CR8 {:#x}", s.cr0, s.cr2, s.cr3, s.cr4, s.cr8)?;
    writeln!(out, "EFER {:#x} APIC_BASE {:#x} XCR0 {:#x}", s.efer, s.apic_base, s.xcr0)?;
    let [dr0, dr1, dr2, dr3] = s.dr;
    writeln!(out, "DR0 {dr0:#x} DR1 {dr1:#x} DR2 {dr2:#x} DR3 {dr3:#x} DR6 {:#x} DR7 {:#x}", s.dr6, s.dr7)
}

/// Registers by their number, which is their offset divided by 16 (Intel SDM 3A table 12-1).
fn local_apic(apic: &LocalApicState, base: u64, out: &mut dyn Write) -> fmt::Result {
    let register = |number: usize| apic.registers.get(number).copied().unwrap_or(0);
    let mode = match base >> 10 & 3 {
        0b10 => "xAPIC",
        0b11 => "x2APIC",
        _ => "disabled",
    };
    writeln!(
        out,
        "local APIC: {mode}, ID {:#x}, TPR {:#x}, PPR {:#x}, SVR {:#x}, ESR {:#x}",
        register(0x02),
        register(0x08),
        register(0x0a),
        register(0x0f),
        register(0x28),
    )?;
    for (name, first) in [("in service (ISR)", 0x10), ("level (TMR)", 0x18), ("requested (IRR)", 0x20)] {
        write!(out, "  {name}:")?;
        let mut none = true;
        for (word, base) in (first..first + 8).zip((0..).step_by(32)) {
            for bit in (0..32).filter(|bit| register(word) >> bit & 1 != 0) {
                write!(out, " {:#04x}", base + bit)?;
                none = false;
            }
        }
        writeln!(out, "{}", if none { " none" } else { "" })?;
    }
    let lvt = [
        ("timer", 0x32),
        ("thermal", 0x33),
        ("counters", 0x34),
        ("LINT0", 0x35),
        ("LINT1", 0x36),
        ("error", 0x37),
    ];
    for (name, number) in lvt {
        let entry = register(number);
        let masked = if entry >> 16 & 1 != 0 { ", masked" } else { "" };
        writeln!(out, "  LVT {name}: vector {:#04x}{masked} ({entry:#x})", entry & 0xff)?;
    }
    writeln!(
        out,
        "  timer: initial count {}, current count {}, divide {:#x}",
        register(0x38),
        register(0x39),
        register(0x3e)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!(number("0xffffffff81000000").unwrap(), 0xffff_ffff_8100_0000);
        assert_eq!(number("10").unwrap(), 10);
        for text in ["", "0x", "x", "-1", "0x1ffffffffffffffff"] {
            assert!(number(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_local_apics_vectors_are_shown_by_number() {
        let mut apic = LocalApicState::default();
        apic.registers[0x21] = 1 << 4;
        apic.registers[0x27] = 1 << 31;
        apic.registers[0x32] = 0x1_00ec;
        let mut out = String::new();
        local_apic(&apic, 0xfee0_0c00, &mut out).unwrap();
        assert!(out.contains("x2APIC") && out.contains("requested (IRR): 0x24 0xff\n"), "{out}");
        assert!(
            out.contains("in service (ISR): none\n") && out.contains("LVT timer: vector 0xec, masked"),
            "{out}"
        );
    }
}

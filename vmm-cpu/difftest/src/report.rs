//! What a mismatch looks like: the case, reduced to what matters, and how both sides end it.

use std::fmt::Write as _;

use anyhow::Result;
use iced_x86::{Code, Formatter, IntelFormatter};

use crate::backend::Tier;
use crate::case::{Case, Mode, Outcome, Registers};
use crate::generate::Shape;
use crate::judge::{self, general_name, selector_name};
use crate::run::{Mismatch, Plan, Sides};
use crate::start;

/// A simplification that is tried on a case.
type Step = Box<dyn Fn(&mut Case)>;

/// Has NOPs in the place of an instruction: whatever branches over it still leads where it did.
fn omit(case: &mut Case, place: usize) {
    let length = case.code.len();
    let next = case.instructions.get(place + 1).map_or(length, |(_, offset)| usize::from(*offset));
    let Some((form, offset)) = case.instructions.get_mut(place) else { return };
    if let Some(bytes) = case.code.get_mut(usize::from(*offset)..next) {
        bytes.fill(NOP);
        *form = Code::Nopd;
    }
}

const NOP: u8 = 0x90;

/// Cuts NOPs off at both ends.
fn trim(case: &mut Case) {
    let is_nop = |(form, _): &(Code, u8)| *form == Code::Nopd;
    while case.instructions.len() > 1 && case.instructions.last().is_some_and(is_nop) {
        if let Some((_, offset)) = case.instructions.pop() {
            case.code.truncate(offset.into());
        }
    }
    while case.instructions.len() > 1 && case.instructions.first().is_some_and(is_nop) {
        case.instructions.remove(0);
        let Some((_, first)) = case.instructions.first().copied() else { return };
        case.code.drain(..usize::from(first).min(case.code.len()));
        case.address += u64::from(first);
        case.instructions.iter_mut().for_each(|(_, offset)| *offset -= first);
    }
}

/// What may be left out of a case one by one.
fn steps(case: &Case) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for place in (0..case.instructions.len()).rev() {
        steps.push(Box::new(move |case| omit(case, place)));
    }
    steps.push(Box::new(trim));
    for index in (0..case.memory.len()).rev() {
        steps.push(Box::new(move |case| {
            if index < case.memory.len() {
                case.memory.remove(index);
            }
        }));
    }
    for register in 0..16 {
        steps.push(Box::new(move |case| {
            if let Some(value) = case.registers.general.get_mut(register) {
                *value = 0;
            }
        }));
    }
    for from in (160..416).step_by(16).chain((32..160).step_by(16)) {
        steps.push(Box::new(move |case| {
            if let Some(value) = case.registers.fxsave.get_mut(from..from + 16) {
                value.fill(0);
            }
        }));
    }
    for (from, default) in [(0, 0x37f_u16), (2, 0), (4, 0), (6, 0), (24, 0x1f80)] {
        steps.push(Box::new(move |case| {
            if let Some(value) = case.registers.fxsave.get_mut(from..from + 2) {
                value.copy_from_slice(&default.to_le_bytes());
            }
        }));
    }
    for bit in 0..22 {
        steps.push(Box::new(move |case| case.registers.rflags &= !(1 << bit)));
    }
    steps.push(Box::new(|case| case.registers.fs_base = 0));
    steps.push(Box::new(|case| case.registers.gs_base = 0));
    steps
}

/// Leaves out of a case whatever it differs without in the same way.
fn reduce(sides: &mut Sides, plan: &Plan, mismatch: &Mismatch) -> Result<Case> {
    let mut case = mismatch.case.clone();
    for step in steps(&case) {
        let mut smaller = case.clone();
        step(&mut smaller);
        start::normalize(&mut smaller);
        if sides.differences(plan, &smaller, mismatch.who)? == mismatch.differences {
            case = smaller;
        }
    }
    Ok(case)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _written = write!(text, "{byte:02x}");
        text
    })
}

fn little(bytes: &[u8]) -> String {
    let turned: Vec<u8> = bytes.iter().rev().copied().collect();
    hex(&turned)
}

fn field(fxsave: &[u8; 512], from: usize, len: usize) -> &[u8] {
    fxsave.get(from..from + len).unwrap_or_default()
}

const FIELDS: [(&str, usize, usize); 7] = [
    ("FCW", 0, 2),
    ("FSW", 2, 2),
    ("FTW", 4, 1),
    ("FOP", 6, 2),
    ("FIP", 8, 8),
    ("FDP", 16, 8),
    ("MXCSR", 24, 4),
];

/// Registers, of which those that are as in `than` are left out.
fn registers(now: &Registers, than: &Registers) -> String {
    let mut list = Vec::new();
    for (number, (value, old)) in now.general.iter().zip(&than.general).enumerate() {
        if value != old {
            list.push(format!("{}={value:x}", general_name(number)));
        }
    }
    if now.rflags != than.rflags {
        list.push(format!("RFLAGS={:x}", now.rflags));
    }
    for (name, value, old) in [("FSbase", now.fs_base, than.fs_base), ("GSbase", now.gs_base, than.gs_base)] {
        if value != old {
            list.push(format!("{name}={value:x}"));
        }
    }
    for (name, from, len) in FIELDS {
        if field(&now.fxsave, from, len) != field(&than.fxsave, from, len) {
            list.push(format!("{name}={}", little(field(&now.fxsave, from, len))));
        }
    }
    for (name, start, len) in [("ST", 32, 10), ("XMM", 160, 16)] {
        let count = if name == "ST" { 8 } else { 16 };
        for number in 0..count {
            let from = start + 16 * number;
            if field(&now.fxsave, from, len) != field(&than.fxsave, from, len) {
                list.push(format!("{name}{number}={}", little(field(&now.fxsave, from, len))));
            }
        }
    }
    list.join(" ")
}

fn outcome(text: &mut String, who: &str, outcome: &Outcome, case: &Case) {
    let mut before = case.registers.clone();
    before.rflags = 0;
    let selectors: Vec<String> = outcome
        .selectors
        .iter()
        .enumerate()
        .map(|(number, selector)| format!("{}={selector:x}", selector_name(number)))
        .collect();
    let stores: Vec<String> =
        outcome.stores.iter().map(|(address, data)| format!("[{address:x}]={}", hex(data))).collect();
    let _written = writeln!(
        text,
        "  {who}: {:x?}\n    RIP={:x} {} {} {}",
        outcome.ending,
        outcome.rip,
        registers(&outcome.registers, &before),
        selectors.join(" "),
        stores.join(" ")
    );
}

/// The text of a mismatch.
pub(crate) fn describe(sides: &mut Sides, plan: &Plan, mismatch: &Mismatch) -> Result<String> {
    let case = reduce(sides, plan, mismatch)?;
    let (native, ours) = sides.outcomes(plan, &case)?;
    let mut text = String::new();
    let names: Vec<String> = mismatch.differences.iter().map(ToString::to_string).collect();
    let mode = if case.mode == Mode::Long { "64-bit" } else { "32-bit" };
    let _written = writeln!(
        text,
        "case {} of {:?}, {mode}, {}: {}\n  code {} at {:x}",
        mismatch.number,
        mismatch.target,
        mismatch.who,
        names.join(", "),
        hex(&case.code),
        case.address
    );
    let mut formatter = IntelFormatter::new();
    for (code, instruction) in judge::decode(&case) {
        let mut line = String::new();
        formatter.format(&instruction, &mut line);
        let _written = writeln!(text, "    {:x} {line}    ({code:?})", instruction.ip());
    }
    let mut zero = Registers { general: [0; 16], rflags: 0, fs_base: 0, gs_base: 0, fxsave: [0; 512] };
    if let Some(place) = zero.fxsave.get_mut(..2) {
        place.copy_from_slice(&0x37f_u16.to_le_bytes());
    }
    if let Some(place) = zero.fxsave.get_mut(24..26) {
        place.copy_from_slice(&0x1f80_u16.to_le_bytes());
    }
    let _written = writeln!(text, "  with {}", registers(&case.registers, &zero));
    for (address, data) in &case.memory {
        let _written = writeln!(text, "    [{address:x}]={}", hex(data));
    }
    match native {
        Some(native) => outcome(&mut text, "processor    ", &native, &case),
        None => text.push_str("  processor    : nothing, its child died\n"),
    }
    for (who, ours) in &ours {
        outcome(&mut text, &format!("{who:13}"), ours, &case);
    }
    let plant = plan.plant.map_or_else(String::new, |code| format!(" --plant {code:?}"));
    let only = match plan.forms.as_slice() {
        [code] => format!(" --code {code:?}"),
        _ => String::new(),
    };
    let tier = match plan.tier {
        Tier::Interpreter => "",
        Tier::Translator => " --tier 1",
        Tier::Window => " --tier window",
        Tier::All => " --tier all",
    };
    let sequences = if plan.shape == Shape::Sequence { " --sequences" } else { "" };
    let _written = writeln!(
        text,
        "  again: --seed {} --case {}{tier}{sequences}{only}{plant}",
        plan.seed, mismatch.number
    );
    Ok(text)
}

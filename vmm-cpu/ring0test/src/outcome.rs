//! What is left of a scenario, in words.

use iced_x86::{Decoder, DecoderOptions, Formatter as _, IntelFormatter};

use crate::layout::*;

/// The word at an offset of an arena.
pub(crate) fn word(bytes: &[u8], offset: u64) -> u64 {
    let at = usize::try_from(offset).unwrap_or(usize::MAX);
    let field = at.checked_add(8).and_then(|end| bytes.get(at..end)).and_then(|field| field.try_into().ok());
    u64::from_le_bytes(field.unwrap_or_default())
}

/// How many events there were.
pub(crate) fn event_count(bytes: &[u8]) -> u64 {
    word(bytes, header::EVENT_COUNT) & 0xffff_ffff
}

const REGISTERS: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// The fields of an event by name.
fn fields() -> Vec<(String, u64)> {
    let mut fields = vec![("vector".to_owned(), event::VECTOR)];
    let registers = REGISTERS.iter().zip(0..);
    fields.extend(registers.map(|(name, n)| ((*name).to_owned(), event::REGISTERS + 8 * n)));
    fields.extend((0..event::FRAME_WORDS).map(|n| (format!("frame[{n}]"), event::FRAME + 8 * n)));
    let rest = [
        ("cr0", event::CR0),
        ("cr2", event::CR2),
        ("cr3", event::CR3),
        ("cr4", event::CR4),
        ("cr8", event::CR8),
        ("efer", event::EFER),
        ("fs base", event::FS_BASE),
        ("gs base", event::GS_BASE),
        ("kernel gs base", event::KERNEL_GS_BASE),
        ("dr6", event::DR6),
        ("dr7", event::DR7),
        ("cs", event::CS),
        ("ss", event::SS),
        ("ds", event::DS),
        ("es", event::ES),
        ("fs", event::FS),
        ("gs", event::GS),
        ("tr", event::TR),
        ("ldtr", event::LDTR),
        ("rflags", event::FLAGS),
        ("gdtr base", event::GDTR + 2),
        ("idtr base", event::IDTR + 2),
    ];
    fields.extend(rest.map(|(name, offset)| (name.to_owned(), offset)));
    fields
}

/// The events of one side, each a line.
pub(crate) fn events(bytes: &[u8]) -> String {
    let mut text = String::new();
    for n in 0..event_count(bytes).min(event::MAX) {
        let at = page::EVENTS + n * event::BYTES;
        let field = |offset| word(bytes, at + offset);
        let frame: Vec<String> = (0..6).map(|n| format!("{:#x}", field(event::FRAME + 8 * n))).collect();
        text += &format!(
            "      vector {:#x}: frame {}, cr2 {:#x}, cs {:#x}, ss {:#x}, rsp {:#x}, rflags {:#x}, dr6 {:#x}\n",
            field(event::VECTOR),
            frame.join(" "),
            field(event::CR2),
            field(event::CS) & 0xffff,
            field(event::SS) & 0xffff,
            field(event::REGISTERS + 32),
            field(event::FLAGS),
            field(event::DR6),
        );
    }
    text
}

/// The words that differ, by name.
pub(crate) fn differences(ours: &[u8], theirs: &[u8]) -> Vec<(u64, u64, u64)> {
    let length = ours.len().min(theirs.len()) as u64;
    (0..length / 8)
        .map(|n| 8 * n)
        .map(|at| (at, word(ours, at), word(theirs, at)))
        .filter(|(_, ours, theirs)| ours != theirs)
        .collect()
}

/// What lies at an offset of an arena.
pub(crate) fn name(offset: u64) -> String {
    let page =
        usize::try_from(offset / PAGE).ok().and_then(|page| page::NAMES.get(page)).copied().unwrap_or("?");
    let within = offset % PAGE;
    if offset / PAGE * PAGE == page::EVENTS {
        let field = fields().into_iter().find(|(_, field)| *field & !7 == (within % event::BYTES) & !7);
        let field = field.map_or_else(|| format!("{:#x}", within % event::BYTES), |(name, _)| name);
        return format!("event {} {field}", within / event::BYTES);
    }
    format!("{page} + {within:#x}")
}

/// The first instructions of the code page.
pub(crate) fn disassembly(bytes: &[u8], bits: u32, address: u64) -> String {
    let code = usize::try_from(page::CODE).ok().and_then(|at| bytes.get(at..at + 160)).unwrap_or_default();
    let mut decoder = Decoder::with_ip(bits, code, address, DecoderOptions::AMD);
    let (mut formatter, mut text) = (IntelFormatter::new(), String::new());
    let mut is_over = false;
    while decoder.can_decode() && !is_over {
        let instruction = decoder.decode();
        let mut line = String::new();
        formatter.format(&instruction, &mut line);
        is_over = line.starts_with("int 0E0h");
        text += &format!("      {:#x}: {line}\n", instruction.ip());
    }
    text
}

/// Bits of the code segment that the scenario starts in.
pub(crate) fn start(bytes: &[u8]) -> (u32, u64) {
    let cs = word(bytes, header::FRAME_64 + 8) & 0xffff;
    let descriptor = word(bytes, page::GDT + (cs & !7));
    let bits = match descriptor >> 53 & 3 {
        1 => 64,
        2 => 32,
        _ => 16,
    };
    (bits, word(bytes, header::FRAME_64))
}

//! The forms of instructions that a run covers: those in Debian's kernels and its busybox, from `forms.txt`, which
//! `difftest --scan` makes.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::LazyLock;

use anyhow::{Context, Result, bail};
use iced_x86::{Code, CpuidFeature};

use crate::scan;

const LIST: &str = include_str!("forms.txt");

/// All of them, in the order of their numbers in iced.
pub(crate) fn forms() -> &'static [Code] {
    static FORMS: LazyLock<Vec<Code>> = LazyLock::new(|| {
        let mut forms: Vec<Code> = listed().filter_map(named).collect();
        forms.sort_unstable();
        forms
    });
    &FORMS
}

/// The form with this name of iced's.
pub(crate) fn named(name: &str) -> Option<Code> {
    static NAMES: LazyLock<HashMap<String, Code>> =
        LazyLock::new(|| Code::values().map(|code| (format!("{code:?}"), code)).collect());
    NAMES.get(name).copied()
}

/// Whether it is of a feature that the interpreter's CPUID does not offer, so that it is undefined there whatever the
/// processor makes of it.
pub(crate) fn is_beyond(code: Code) -> bool {
    use CpuidFeature as F;
    !code.cpuid_features().iter().all(|feature| {
        matches!(
            feature,
            F::INTEL8086
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::X64
                | F::ADX
                | F::AES
                | F::BMI1
                | F::BMI2
                | F::CLFLUSHOPT
                | F::CLFSH
                | F::CMOV
                | F::CMPXCHG16B
                | F::CPUID
                | F::CX8
                | F::FPU
                | F::FPU287
                | F::FPU387
                | F::FSGSBASE
                | F::FXSR
                | F::LZCNT
                | F::MMX
                | F::MOVBE
                | F::MSR
                | F::MULTIBYTENOP
                | F::PAUSE
                | F::PCLMULQDQ
                | F::POPCNT
                | F::PREFETCHW
                | F::RDPMC
                | F::RDTSCP
                | F::SEP
                | F::SHA
                | F::SMAP
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::SSSE3
                | F::SYSCALL
                | F::TSC
                // Hints that processors without them take for NOP.
                | F::CET_IBT
                | F::CLDEMOTE
                // WBINVD with a prefix that is ignored.
                | F::WBNOINVD
                | F::PREFETCHITI
                | F::PREFETCHWT1
        ) || matches!(code, Code::Rdsspd_r32 | Code::Rdsspq_r64)
    })
}

/// All forms that the interpreter's CPUID offers.
pub(crate) fn offered() -> Vec<Code> {
    Code::values()
        .filter(|code| {
            let op_code = code.op_code();
            op_code.is_instruction() && op_code.decoder_option() == 0 && !is_beyond(*code)
        })
        .collect()
}

fn listed() -> impl Iterator<Item = &'static str> {
    LIST.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split(' ').next())
}

/// The text of `forms.txt` for the kernels and programs at `paths`, and what of it the present one lacks.
pub(crate) fn scan(paths: &[impl AsRef<Path>]) -> Result<(String, Vec<String>)> {
    let mut columns = Vec::new();
    for path in paths {
        let name = path.as_ref().file_name().and_then(|name| name.to_str());
        columns.push((name.context("a path without a file name")?, scan::file(path.as_ref())?));
    }
    let mut names: Vec<&String> = columns.iter().flat_map(|(_, counts)| counts.keys()).collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        bail!("no file to scan");
    }

    let mut text = "# How often each form of iced's occurs in".to_owned();
    for (name, _) in &columns {
        write!(text, " {name}")?;
    }
    text.push('\n');
    for name in &names {
        text.push_str(name);
        for (_, counts) in &columns {
            write!(text, " {}", counts.get(*name).unwrap_or(&0))?;
        }
        text.push('\n');
    }
    let known: Vec<&str> = listed().collect();
    let new = names.into_iter().filter(|name| !known.contains(&name.as_str())).cloned().collect();
    Ok((text, new))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_list_is_a_form() {
        let unknown: Vec<&str> = listed().filter(|name| named(name).is_none()).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
        assert_eq!(forms().len(), listed().count());
        assert!(forms().contains(&Code::Mov_r64_rm64));
    }

    #[test]
    fn a_program_is_scanned() {
        let (text, _) = scan(&["/proc/self/exe"]).unwrap();
        assert!(text.starts_with("# How often each form of iced's occurs in exe\n"), "{text}");
        assert!(text.contains("\nRetnq "), "{text}");
    }
}

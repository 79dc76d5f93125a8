//! The forms of instructions that a run covers: those in Debian's kernels and its busybox, from `forms.txt`, which
//! `difftest --scan` makes.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::LazyLock;

use anyhow::{Context, Result, bail};
use iced_x86::{Code, EncodingKind};

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

/// Whether no processor that the interpreter can be has it: VEX, EVEX and XOP encodings.
pub(crate) fn is_beyond(code: Code) -> bool {
    code.op_code().encoding() != EncodingKind::Legacy
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

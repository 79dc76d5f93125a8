//! The commands: each returns whether all was well.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use vmm_policy::{Coverage, Document, Policy, RuleReport, Usage, limits};

/// As text, or as the document that `fmt --json` writes.
fn read(path: &Path) -> Result<Policy> {
    if path.extension().is_none_or(|extension| extension != "json") {
        return Ok(Policy::from_file(path)?);
    }
    let name = || path.display().to_string();
    let mut bytes = Vec::new();
    let most = limits::POLICY_BYTES as u64 * 4;
    fs::File::open(path).with_context(name)?.take(most + 1).read_to_end(&mut bytes).with_context(name)?;
    ensure!(bytes.len() as u64 <= most, "{} has more than {most} bytes", path.display());
    let document: Document = serde_json::from_slice(&bytes).with_context(name)?;
    Ok(Policy::from_document(&document)?)
}

fn json(value: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

fn hex(digest: [u8; 32]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn check(file: &Path, strict: bool, as_json: bool) -> Result<bool> {
    let policy = read(file)?;
    let useless: Vec<RuleReport> =
        policy.usage()?.into_iter().filter(|report| report.usage != Usage::Used).collect();
    let good = !strict || useless.is_empty();
    if as_json {
        #[derive(Serialize)]
        struct Report {
            title: String,
            digest: String,
            rules: usize,
            useless: Vec<RuleReport>,
        }
        let report = Report {
            title: policy.title().to_owned(),
            digest: hex(policy.digest()),
            rules: policy.rules().count(),
            useless,
        };
        json(&report)?;
        return Ok(good);
    }
    useless.iter().for_each(|report| println!("{report}"));
    let parties = policy.parties().count();
    println!(
        "{}: {} rules about {parties} parties hold together; {}",
        file.display(),
        policy.rules().count(),
        hex(policy.digest())
    );
    Ok(good)
}

pub(crate) fn explain(file: &Path, request: &str, as_json: bool) -> Result<bool> {
    let explanation = read(file)?.explain(request)?;
    if as_json {
        json(&explanation)?;
    } else {
        print!("{explanation}");
    }
    Ok(explanation.verdict.permits())
}

pub(crate) fn prove(file: &Path, a: &str, b: &str, trust_guards: bool, as_json: bool) -> Result<bool> {
    let path = read(file)?.find_path(a, b, trust_guards)?;
    if as_json {
        json(&path)?;
        return Ok(path.is_none());
    }
    let Some(path) = path else {
        println!("no path");
        return Ok(true);
    };
    for step in &path.steps {
        println!(
            "{} -> {}\n    {}, by {}:{}: {}",
            step.from, step.to, step.by, step.file, step.line, step.rule
        );
    }
    Ok(false)
}

pub(crate) fn graph(file: &Path, svg: bool, output: Option<&Path>, as_json: bool) -> Result<bool> {
    let graph = read(file)?.graph()?;
    let text = match (as_json, svg) {
        (true, _) => serde_json::to_string_pretty(&graph)?,
        (false, true) => graph.to_svg(),
        (false, false) => graph.to_dot(),
    };
    match output {
        Some(path) => fs::write(path, text).with_context(|| path.display().to_string())?,
        None => io::stdout().write_all(text.as_bytes())?,
    }
    Ok(true)
}

pub(crate) fn diff(before: &Path, after: &Path, as_json: bool) -> Result<bool> {
    let changes = read(before)?.diff(&read(after)?)?;
    if as_json {
        json(&changes)?;
    } else {
        changes.iter().for_each(|change| println!("{change}"));
    }
    Ok(changes.is_empty())
}

pub(crate) fn fmt(files: &[std::path::PathBuf], check: bool, as_json: bool) -> Result<bool> {
    let mut good = true;
    for path in files {
        if as_json {
            json(read(path)?.document())?;
            continue;
        }
        if path.extension().is_some_and(|extension| extension == "json") {
            print!("{}", read(path)?.document());
            continue;
        }
        let before = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        // Names that mean nothing are no matter of looks.
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        let after = vmm_policy::syntax::format(&name, &before)?;
        if before == after {
            continue;
        }
        if check {
            good = false;
            println!("{} would be written differently", path.display());
        } else {
            fs::write(path, after).with_context(|| path.display().to_string())?;
        }
    }
    Ok(good)
}

pub(crate) fn simulate(file: &Path, log: &Path, cover: bool, as_json: bool) -> Result<bool> {
    let policy = read(file)?;
    let mut coverage = Coverage::new(&policy);
    let reader: Box<dyn BufRead> = if log == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        Box::new(BufReader::new(fs::File::open(log).with_context(|| log.display().to_string())?))
    };
    let (mut differ, mut out) = (0_usize, io::stdout().lock());
    for (number, line) in reader.lines().enumerate() {
        let line = line?;
        let (recorded, request) = line
            .split_once('\t')
            .map_or((None, line.as_str()), |(verdict, request)| (Some(verdict), request));
        if request.trim().is_empty() || request.starts_with('#') {
            continue;
        }
        let entry = coverage.record(request).with_context(|| format!("{}:{}", log.display(), number + 1))?;
        let differs = recorded.is_some_and(|verdict| verdict != entry.verdict.word());
        differ += usize::from(differs);
        if as_json {
            writeln!(out, "{}", serde_json::to_string(&entry)?)?;
        } else {
            writeln!(out, "{}{entry}", if differs { "! " } else { "" })?;
        }
    }
    let unused: Vec<_> = coverage.unused().filter_map(|rule| policy.rule(rule)).collect();
    if !as_json {
        writeln!(out, "denied without a rule: {}", coverage.denied_by_default())?;
        for rule in &unused {
            writeln!(out, "not needed: {rule}")?;
        }
    }
    Ok(differ == 0 && (!cover || unused.is_empty()))
}

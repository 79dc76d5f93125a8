//! Commands that say something about a log.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use vmm_audit::checkpoint::Checkpoint;
use vmm_audit::gaps::gaps as account;
use vmm_audit::keys::{FileKeys, KeyChain, KeyStore as _};
use vmm_audit::merkle::proof::{prove_consistency, verify_consistency};
use vmm_audit::note::Verifier;
use vmm_audit::proof::EntryProof;
use vmm_audit::storage::{FsStorage, Storage};
use vmm_audit::verify::{Severity, VerifyOptions, verify as check};
use vmm_audit::{Entries, Item, report as page};

use crate::arguments::{Consistency, Gaps, Key, Prove, Report, Trust, Verify};
use crate::output::{BAD, GOOD, Progress, QUIET, styled};

/// Whether all is well with the log.
pub(crate) type Done = Result<bool, Box<dyn Error>>;

pub(crate) fn storage(dir: &Path) -> Result<Arc<dyn Storage>, Box<dyn Error>> {
    let storage = FsStorage::existing(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    Ok(Arc::new(storage))
}

impl Trust {
    fn verifier(&self) -> Result<Verifier, Box<dyn Error>> {
        let text = if self.key.contains('+') {
            self.key.clone()
        } else {
            std::fs::read_to_string(&self.key).map_err(|e| format!("--key {}: {e}", self.key))?
        };
        Ok(text.trim().parse()?)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Box<dyn Error>> {
    std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()).into())
}

pub(crate) fn verify(command: &Verify) -> Done {
    let storage = storage(&command.dir)?;
    let mut options =
        VerifyOptions::new(command.trust.verifier()?).live(command.live).tree(!command.chain_only);
    for path in &command.since {
        options = options.since(read(path)?);
    }
    let mut progress = Progress::new("verifying");
    let result = check(&*storage, &options, &mut |done, total| progress.show(done, total))?;
    drop(progress);
    if let (true, Some(path), Some(note)) = (result.intact, &command.save_checkpoint, &result.checkpoint) {
        std::fs::write(path, note).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    if command.json {
        anstream::println!("{}", serde_json::to_string_pretty(&result)?);
        return Ok(result.intact);
    }
    for finding in &result.findings {
        let mark = match finding.severity {
            Severity::Damage => styled(BAD, "damage"),
            Severity::Note => styled(QUIET, "note"),
        };
        anstream::println!("{mark}: {finding}");
    }
    if result.more > 0 {
        anstream::println!("{}: {} more findings", styled(BAD, "damage"), result.more);
    }
    let state = if result.intact { styled(GOOD, "intact") } else { styled(BAD, "damaged") };
    let (origin, size) = (&result.origin, result.size);
    let first = if result.first_entry > 0 { format!(" from {}", result.first_entry) } else { String::new() };
    anstream::println!(
        "{origin}: {state}, {size} entries{first}, {} checkpoints in {} segments, epoch {}{}",
        result.checkpoints,
        result.segments,
        result.epoch,
        if result.closed { ", closed" } else { "" }
    );
    anstream::println!("{}", styled(QUIET, format!("root {}", result.root)));
    if command.since.is_empty() && result.intact {
        let hint = "without --since a log whose end was cut off at a checkpoint looks like an older one";
        anstream::println!("{}", styled(QUIET, hint));
    }
    Ok(result.intact)
}

pub(crate) fn prove(command: &Prove) -> Done {
    let key = command.trust.verifier()?;
    if let Some(path) = &command.check {
        let proof: EntryProof = serde_json::from_slice(&read(path)?)?;
        return match proof.check(&key) {
            Ok((source, event)) => {
                let value = json!({ "index": proof.index, "source": source, "event": event });
                anstream::println!("{}", serde_json::to_string_pretty(&value)?);
                anstream::eprintln!("{}: entry {} is in the log", styled(GOOD, "proven"), proof.index);
                Ok(true)
            }
            Err(error) => {
                anstream::eprintln!("{}: {error}", styled(BAD, "not proven"));
                Ok(false)
            }
        };
    }
    let (Some(dir), Some(seq)) = (&command.dir, command.entry) else {
        return Err("DIR and ENTRY are needed".into());
    };
    let storage = storage(dir)?;
    let mut entries = Entries::near(Arc::clone(&storage), seq)?.live();
    let found = loop {
        match entries.next()? {
            Some(Item::Entry(found)) if found.seq == seq => break found,
            Some(_) => {}
            None => return Err(format!("entry {seq} is not in the log").into()),
        }
    };
    let proof = EntryProof::make(&*storage, seq, &found.bytes)?;
    proof.check(&key)?;
    anstream::println!("{}", serde_json::to_string_pretty(&proof)?);
    Ok(true)
}

pub(crate) fn consistency(command: &Consistency) -> Done {
    let storage = storage(&command.dir)?;
    let (keys, broken) = KeyChain::load(command.trust.verifier()?, &*storage);
    if let Some(broken) = broken {
        anstream::println!("{}: {broken}", styled(BAD, "damage"));
        return Ok(false);
    }
    let kept = keys.open(&read(&command.since)?)?;
    let now = storage.read("checkpoint", 1 << 14)?.ok_or("the log has no published checkpoint")?;
    let now: Checkpoint = keys.open(&now)?;
    let tiles: &dyn Storage = &*storage;
    let proven = (|| -> Result<_, Box<dyn Error>> {
        let proof = prove_consistency(&tiles, kept.size, now.size)?;
        verify_consistency(kept.size, kept.root, now.size, now.root, &proof)?;
        Ok(proof)
    })();
    let (from, to) = (kept.size, now.size);
    if command.json {
        let (proof, error) = match &proven {
            Ok(proof) => (Some(proof), None),
            Err(error) => (None, Some(error.to_string())),
        };
        let value =
            json!({ "consistent": error.is_none(), "from": kept, "to": now, "proof": proof, "error": error });
        anstream::println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        match &proven {
            Ok(proof) => {
                let hashes = proof.len();
                anstream::println!("{}: {from} entries to {to}, {hashes} hashes", styled(GOOD, "consistent"));
            }
            Err(error) => {
                anstream::println!("{}: {from} entries to {to}: {error}", styled(BAD, "not consistent"))
            }
        }
    }
    Ok(proven.is_ok())
}

pub(crate) fn gaps(command: &Gaps) -> Done {
    let gaps = account(storage(&command.dir)?)?;
    let complete = gaps.is_complete();
    if command.json {
        anstream::println!("{}", serde_json::to_string_pretty(&gaps)?);
        return Ok(complete);
    }
    anstream::println!(
        "{:>6} {:>10} {:>10} {:>10} {:>6} {:>8}  who",
        "source",
        "emitted",
        "written",
        "counted",
        "torn",
        "missing"
    );
    for account in &gaps.accounts {
        let missing = format!("{:>8}", account.missing);
        let missing = if account.missing > 0 { styled(BAD, missing) } else { missing };
        let state = if account.ended { "" } else { " (at work, or ended with the log)" };
        anstream::println!(
            "{:>6} {:>10} {:>10} {:>10} {:>6} {missing}  {}{}",
            account.source,
            account.issued,
            account.written,
            account.counted,
            account.torn,
            account.who.as_deref().unwrap_or("?"),
            styled(QUIET, state)
        );
    }
    for silence in &gaps.silences {
        let why = if silence.closed { "closed" } else { "silent" };
        anstream::println!(
            "{why} for {} s from {} (after entry {})",
            silence.seconds,
            silence.from,
            silence.after_entry
        );
    }
    if gaps.cut > 0 {
        anstream::println!("{} events were cut off before they were acknowledged", gaps.cut);
    }
    for damage in &gaps.damage {
        anstream::println!("{}: {damage}", styled(BAD, "damage"));
    }
    Ok(complete)
}

pub(crate) fn report(command: &Report) -> Done {
    let storage = storage(&command.dir)?;
    let options = VerifyOptions::new(command.trust.verifier()?).live(command.live);
    let mut progress = Progress::new("verifying");
    let verification = check(&*storage, &options, &mut |done, total| progress.show(done, total))?;
    drop(progress);
    let gaps = account(Arc::clone(&storage))?;
    let data = page::collect(&storage)?;
    let html = page::render(&data, &verification, &gaps);
    std::fs::write(&command.out, html).map_err(|e| format!("{}: {e}", command.out.display()))?;
    let state = if verification.intact { styled(GOOD, "intact") } else { styled(BAD, "damaged") };
    anstream::println!("{state}: {}", command.out.display());
    Ok(verification.intact)
}

pub(crate) fn key(command: &Key) -> Done {
    let keys = FileKeys::new(&command.file).load()?;
    let keys = keys.ok_or_else(|| format!("{}: not there", command.file.display()))?;
    anstream::println!("{}", keys.root);
    Ok(true)
}

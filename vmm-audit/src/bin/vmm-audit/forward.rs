//! Commands that pass entries on.

use std::error::Error;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use vmm_audit::export::export_tiles;
use vmm_audit::query::Filter;
use vmm_audit::sink::{Delivery, Form, Forwarder, Journald, Lines, Sink, SinkError, Syslog, SyslogTarget};
use vmm_audit::{Entries, Item};

use crate::arguments::{Export, Format, Query, Tail};
use crate::commands::{Done, storage};
use crate::output::{BAD, GOOD, styled};

fn form(format: Format, json: bool) -> Result<Form, Box<dyn Error>> {
    match format {
        _ if json => Ok(Form::Json),
        Format::Text => Ok(Form::Text),
        Format::Json => Ok(Form::Json),
        Format::Ocsf => Ok(Form::Ocsf),
        Format::Tiles => Err("tiles are for export --out DIR".into()),
    }
}

/// Whoever reads the output has had enough: no error.
fn unless_closed(result: Result<u64, SinkError>) -> Result<Option<u64>, SinkError> {
    match result {
        Err(SinkError::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => Ok(None),
        result => result.map(Some),
    }
}

fn follow<S: Sink>(forwarder: &mut Forwarder<S>, follow: bool) -> Done {
    loop {
        match unless_closed(forwarder.forward())? {
            None => return Ok(true),
            Some(_) if !follow => return Ok(true),
            Some(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

pub(crate) fn tail(command: &Tail) -> Done {
    let storage = storage(&command.dir)?;
    // The end is found by the segments' headers and the entries of the last one.
    let mut entries = Entries::near(Arc::clone(&storage), u64::MAX)?.live();
    while entries.next()?.is_some() {}
    let from = entries.position().saturating_sub(command.count);
    let mut forwarder = Forwarder::new(storage, Lines::stdout(form(command.format, command.json)?), from)?;
    follow(&mut forwarder, command.follow)
}

/// A time as RFC 3339, or how long ago.
fn time(text: &str) -> Result<u64, Box<dyn Error>> {
    let time = match humantime::parse_rfc3339_weak(text) {
        Ok(time) => time,
        Err(_) => {
            let age = humantime::parse_duration(text)
                .map_err(|_| format!("{text:?}: RFC 3339, or an age as 2h"))?;
            SystemTime::now() - age
        }
    };
    Ok(u64::try_from(time.duration_since(SystemTime::UNIX_EPOCH)?.as_nanos())?)
}

pub(crate) fn query(command: &Query) -> Done {
    let mut filter = Filter::new();
    filter.kinds.clone_from(&command.kind);
    filter.actions.clone_from(&command.action);
    filter.verdicts.clone_from(&command.verdict);
    filter.outcomes.clone_from(&command.outcome);
    (filter.source, filter.from, filter.to) = (command.source, command.from, command.to);
    filter.text.clone_from(&command.text);
    if let Some(vm) = &command.vm {
        filter.vm =
            Some(Filter::parse_vm(vm).ok_or_else(|| format!("--vm {vm:?}: a UUID of 36 characters"))?);
    }
    filter.after = command.after.as_deref().map(time).transpose()?;
    filter.before = command.before.as_deref().map(time).transpose()?;
    let mut lines = Lines::stdout(form(command.format, command.json)?);
    let mut entries = Entries::near(storage(&command.dir)?, command.from.unwrap_or(0))?.live();
    let (mut left, mut whole) = (command.limit.unwrap_or(u64::MAX), true);
    while left > 0
        && let Some(item) = entries.next()?
    {
        match item {
            Item::Entry(found) => match found.event {
                Ok(event) if filter.passes(found.seq, found.source, &event) => {
                    let delivery = Delivery { seq: found.seq, source: found.source, event };
                    if unless_closed(lines.send(&delivery).map(|()| 1))?.is_none() {
                        return Ok(whole);
                    }
                    left -= 1;
                }
                Ok(_) => {}
                Err(error) => {
                    whole = false;
                    anstream::eprintln!("{}: {}: {error}", styled(BAD, "damage"), found.place);
                }
            },
            Item::Damage { place, bytes, why } => {
                whole = false;
                anstream::eprintln!("{}: {place}: {bytes} bytes: {why}", styled(BAD, "damage"));
            }
            _ => {}
        }
    }
    unless_closed(lines.flush().map(|()| 0))?;
    Ok(whole)
}

fn sink(to: &str) -> Result<Box<dyn Sink>, Box<dyn Error>> {
    let target = match to.split_once(':') {
        None if to == "journald" => return Ok(Box::new(Journald::new()?)),
        Some(("syslog", path)) => SyslogTarget::Datagram(PathBuf::from(path)),
        Some(("syslog-stream", path)) => SyslogTarget::Stream(PathBuf::from(path)),
        Some(("syslog-tcp", address)) => SyslogTarget::Tcp(address.parse()?),
        _ => {
            let allowed = "journald, syslog:PATH, syslog-stream:PATH, syslog-tcp:ADDRESS:PORT";
            return Err(format!("--to {to:?}: allowed are {allowed}").into());
        }
    };
    Ok(Box::new(Syslog::new(target)))
}

pub(crate) fn export(command: &Export) -> Done {
    let storage = storage(&command.dir)?;
    if let (Format::Tiles, None) = (command.format, &command.to) {
        let out = command.out.as_ref().ok_or("--format tiles needs --out DIR")?;
        let size = export_tiles(&storage, out)?;
        anstream::eprintln!("{}: {size} entries to {}", styled(GOOD, "exported"), out.display());
        return Ok(true);
    }
    let sink: Box<dyn Sink> = match (&command.to, &command.out) {
        (Some(to), _) => sink(to)?,
        (None, Some(out)) => Box::new(Lines::file(out, form(command.format, false)?)?),
        (None, None) => Box::new(Lines::stdout(form(command.format, false)?)),
    };
    let mut forwarder = match &command.cursor {
        Some(cursor) => Forwarder::with_cursor(storage, sink, cursor.clone())?,
        None => Forwarder::new(storage, sink, 0)?,
    };
    let done = follow(&mut forwarder, command.follow)?;
    std::io::stdout().flush()?;
    Ok(done)
}

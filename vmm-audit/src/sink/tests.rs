use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::event::{Action, Kind, Object, ObjectClass, Party, Verdict};
use crate::keys::MemoryKeys;
use crate::log::{LogOptions, LogWriter};
use crate::storage::MemoryStorage;

const LONG: Duration = Duration::from_secs(60);

fn event(n: u64) -> Event {
    let mut event = Event::new(Kind::Decision)
        .subject(Party::host("a \"b\" ]\\c"))
        .peer(Party::vm(2, 1))
        .action(Action::Connect)
        .object(Object::numbered(ObjectClass::Vsock, n))
        .verdict(Verdict::Deny)
        .rule("r", 3)
        .reason("first\nsecond");
    event.wall = 1_700_000_000_123_456_789;
    event
}

fn delivery(n: u64) -> Delivery {
    Delivery { seq: n, source: 4, event: event(n) }
}

/// A log with `count` events of others in it; the last `open` of them are not acknowledged.
fn log(storage: &MemoryStorage, count: u64, open: u64) -> LogWriter {
    let keys = Box::new(MemoryKeys::new());
    let (mut log, _) = LogWriter::open(Arc::new(storage.clone()), keys, "l", LogOptions::new()).unwrap();
    for n in 0..count {
        if n == count - open {
            log.commit().unwrap();
        }
        log.append(4, &event(n).encode().unwrap()).unwrap();
    }
    if open == 0 {
        log.commit().unwrap();
    }
    log
}

#[test]
fn lines_in_each_form() {
    let mut json = Lines::new("test", Vec::new(), Form::Json);
    json.send(&delivery(7)).unwrap();
    json.flush().unwrap();
    let text = String::from_utf8(json.to.into_inner().unwrap()).unwrap();
    let value: Value = serde_json::from_str(text.trim_end()).unwrap();
    assert_eq!(
        (&value["seq"], &value["verdict"], &value["object"]["number"]),
        (&7.into(), &"deny".into(), &7.into())
    );
    let text = lines::line(&delivery(7), Form::Text);
    assert!(text.starts_with("2023-11-14T22:13:20.123456789Z"), "{text}");
    assert!(text.contains("decision deny connect vsock 7 by host a \"b\"") && !text.contains('\n'), "{text}");
}

/// Takes nothing for a while.
struct Moody {
    got: Vec<u64>,
    refuse: u32,
}

impl Sink for Moody {
    fn send(&mut self, delivery: &Delivery) -> Result<(), SinkError> {
        if self.refuse > 0 {
            self.refuse -= 1;
            return Err(SinkError::Io { sink: "moody".to_owned(), source: io::ErrorKind::TimedOut.into() });
        }
        self.got.push(delivery.seq);
        Ok(())
    }
}

#[test]
fn a_forwarder_hands_over_what_is_acknowledged_and_nothing_twice() {
    let storage = MemoryStorage::new();
    let mut log = log(&storage, 10, 3);
    let shared: Arc<dyn Storage> = Arc::new(storage);
    let mut forwarder = Forwarder::new(shared, Moody { got: Vec::new(), refuse: 2 }, 0).unwrap();
    assert!(forwarder.forward().is_err() && forwarder.forward().is_err());
    // The log's own, and seven of ten.
    assert_eq!(forwarder.forward().unwrap(), 8);
    assert_eq!(forwarder.forward().unwrap(), 0);
    log.commit().unwrap();
    log.rotate().unwrap();
    log.append(4, &event(99).encode().unwrap()).unwrap();
    log.commit().unwrap();
    assert_eq!(forwarder.forward().unwrap(), 4);
    assert_eq!(forwarder.sink().got, (0..12).collect::<Vec<_>>());
}

#[test]
fn a_cursor_goes_on_where_it_was() {
    let storage = MemoryStorage::new();
    drop(log(&storage, 10, 0));
    let folder = tempfile::tempdir().unwrap();
    let cursor = folder.path().join("cursor");
    let sink = || Moody { got: Vec::new(), refuse: 0 };
    let shared: Arc<dyn Storage> = Arc::new(storage);
    let mut forwarder = Forwarder::with_cursor(Arc::clone(&shared), sink(), cursor.clone()).unwrap();
    assert_eq!(forwarder.forward().unwrap(), 11);
    let mut forwarder = Forwarder::with_cursor(Arc::clone(&shared), sink(), cursor.clone()).unwrap();
    assert_eq!((forwarder.position(), forwarder.forward().unwrap()), (11, 0));
    std::fs::write(&cursor, "eleven").unwrap();
    assert!(Forwarder::with_cursor(shared, sink(), cursor).is_err());
}

#[test]
fn the_journal_gets_fields_and_long_ones_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let journal = UnixDatagram::bind(&path).unwrap();
    let mut sink = Journald::at(&path).unwrap();
    sink.send(&delivery(7)).unwrap();
    let mut buffer = [0; 8192];
    let length = journal.recv(&mut buffer).unwrap();
    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
    assert!(text.contains("\nPRIORITY=4\n") && text.contains("\nVMM_AUDIT_SEQ=7\n"), "{text}");
    // A value with lines has its length before it.
    assert!(text.contains("VMM_AUDIT_REASON\n\u{c}\0\0\0\0\0\0\0first\nsecond\n"), "{text}");
    assert!(Journald::at(&folder.path().join("nobody")).unwrap().send(&delivery(1)).is_err());
}

#[test]
fn a_syslog_connection_that_ends_is_made_again() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut sink = Syslog::new(SyslogTarget::Tcp(listener.local_addr().unwrap()));
    sink.send(&delivery(1)).unwrap();
    let (mut first, _) = listener.accept().unwrap();
    let mut buffer = [0; 4096];
    let length = first.read(&mut buffer).unwrap();
    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
    let (count, message) = text.split_once(' ').unwrap();
    assert_eq!(count.parse::<usize>().unwrap(), message.len());
    assert!(message.starts_with("<108>1 2023-11-14T22:13:20.123456Z "), "{message}");
    assert!(message.contains(r#" subject="host a \"b\" \]\\c""#), "{message}");
    drop(first);
    let begun = Instant::now();
    // The first that are sent into a connection that is gone may get lost; an error shows it then.
    while sink.send(&delivery(2)).is_ok() {
        assert!(begun.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(5));
    }
    sink.send(&delivery(3)).unwrap();
    let (mut second, _) = listener.accept().unwrap();
    let length = second.read(&mut buffer).unwrap();
    assert!(String::from_utf8_lossy(&buffer[..length]).contains("seq=\"3\""));
}

struct Rsyslog {
    folder: tempfile::TempDir,
    child: Child,
    port: u16,
}

impl Drop for Rsyslog {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Rsyslog {
    /// Debian's rsyslogd, with a socket and a TCP port of its own. `None` if there is none here.
    fn start() -> Option<Self> {
        let program =
            ["/usr/sbin/rsyslogd", "/sbin/rsyslogd"].into_iter().find(|path| Path::new(path).exists());
        let Some(program) = program else {
            println!("skipped: there is no rsyslogd (Debian's package rsyslog)");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let at = folder.path().display();
        let config = format!(
            "global(workDirectory=\"{at}\" parser.escapeControlCharactersOnReceive=\"on\")\n\
             module(load=\"imuxsock\" SysSock.Use=\"off\")\n\
             module(load=\"imtcp\")\n\
             input(type=\"imuxsock\" Socket=\"{at}/socket\" UseSpecialParser=\"off\" ParseHostname=\"on\"\n  IgnoreTimestamp=\"off\" UseSysTimeStamp=\"off\")\n\
             input(type=\"imtcp\" port=\"{port}\" address=\"127.0.0.1\")\n\
             template(name=\"parts\" type=\"string\" string=\"%app-name%|%pri%|%msgid%|%timereported:::date-rfc3339%|%structured-data%|%msg%\\n\")\n\
             action(type=\"omfile\" file=\"{at}/out\" template=\"parts\")\n"
        );
        let path = folder.path().join("config");
        std::fs::write(&path, config).unwrap();
        let child = Command::new(program)
            .args(["-n", "-i"])
            .arg(folder.path().join("pid"))
            .arg("-f")
            .arg(&path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let rsyslog = Self { folder, child, port };
        let begun = Instant::now();
        while !rsyslog.socket().exists() || std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begun.elapsed() < LONG, "rsyslogd does not begin");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(rsyslog)
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// The lines that it has written, once there are `count`.
    fn lines(&self, count: usize) -> Vec<String> {
        let begun = Instant::now();
        loop {
            let text = std::fs::read_to_string(self.folder.path().join("out")).unwrap_or_default();
            let lines: Vec<_> =
                text.lines().filter(|l| l.starts_with("vmm-audit|")).map(str::to_owned).collect();
            if lines.len() >= count {
                return lines;
            }
            assert!(begun.elapsed() < LONG, "{text}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn check_lines(lines: &[String], first: u64) {
    for (line, n) in lines.iter().zip(first..) {
        let parts: Vec<_> = line.splitn(6, '|').collect();
        assert_eq!(parts[1..4], ["108", "decision", "2023-11-14T22:13:20.123456Z"], "{line}");
        assert!(
            parts[4].starts_with(&format!("[vmm-audit@32473 seq=\"{n}\" source=\"4\" kind=\"decision\"")),
            "{line}"
        );
        assert!(parts[4].contains(r#"subject="host a \"b\" \]\\c""#), "{line}");
        assert!(parts[5].contains("decision deny connect vsock"), "{line}");
    }
}

#[test]
fn rsyslog_takes_all_over_tcp() {
    let Some(rsyslog) = Rsyslog::start() else { return };
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], rsyslog.port));
    for (framing, first) in [(Framing::OctetCounting, 0), (Framing::Newline, 500)] {
        let mut sink = Syslog::new(SyslogTarget::Tcp(address)).framing(framing);
        for n in first..first + 500 {
            sink.send(&delivery(n)).unwrap();
        }
        drop(sink);
        check_lines(&rsyslog.lines(usize::try_from(first).unwrap() + 500), 0);
    }
}

#[test]
fn rsyslog_takes_all_over_its_socket() {
    let Some(rsyslog) = Rsyslog::start() else { return };
    let mut sink = Syslog::new(SyslogTarget::Datagram(rsyslog.socket()));
    for n in 0..300 {
        sink.send(&delivery(n)).unwrap();
    }
    check_lines(&rsyslog.lines(300), 0);
    std::io::stdout().flush().unwrap();
}

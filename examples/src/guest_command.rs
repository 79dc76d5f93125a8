//! One run of a guest: how it is told what to do, and how what it says comes back.
//!
//! The guest has the four serial ports of a PC. The kernel's console and an interactive shell are on the first. A
//! command's standard output and standard error have a port each, so that they stay apart from each other and from
//! what the kernel logs, whatever bytes they have. The last is for what is said of the run, a line each: `init`
//! when it starts, `snapshot` when a program wants the machine to be saved, and `status N` when the command has ended and all
//! of its output is out.
//!
//! Other ways were found wanting. Debian's kernel has no `/dev/port`, so no program reaches the debug-exit port. A
//! status among the output needs a mark that the output cannot have, and bytes held back in search of it. Sent over
//! the console, it mixes with the kernel's log.
//!
//! The command is in a file of a second archive that follows the first: the kernel's command line is short, and its
//! quoting is not the shell's. Standard input is in a file there as well: a serial port has no end of file.
//!
//! The guest is hostile: what it sends is bytes for the caller's streams, at most [`KEPT`] bytes of log are kept,
//! and what it says of the run is used for the exit status only.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::initramfs::Archive;

/// Bytes of the kernel's log that are kept to be shown if the guest fails.
pub const KEPT: usize = 256 << 10;

/// The longest shell line, in bytes: what Linux takes as one argument of a program, without the zero byte.
pub const LONGEST_COMMAND: usize = (128 << 10) - 1;

/// The longest line about the run, in bytes; longer ones are none of init's.
const LONGEST_LINE: usize = 64;

/// The guest's serial ports, which are those of a PC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SerialPort {
    /// The kernel's log and the interactive shell.
    Console,
    /// A command's standard output.
    Output,
    /// A command's standard error.
    Errors,
    /// What init says of the run.
    Control,
}

impl SerialPort {
    /// All of them, from the first to the fourth.
    pub const ALL: [Self; 4] = [Self::Console, Self::Output, Self::Errors, Self::Control];

    /// The first of its eight I/O ports.
    #[must_use]
    pub const fn io_base(self) -> u16 {
        match self {
            Self::Console => 0x3f8,
            Self::Output => 0x2f8,
            Self::Errors => 0x3e8,
            Self::Control => 0x2e8,
        }
    }

    /// Its interrupt line. Two ports share one, which the kernel expects: it asks both.
    #[must_use]
    pub const fn irq(self) -> u8 {
        match self {
            Self::Console | Self::Errors => 4,
            Self::Output | Self::Control => 3,
        }
    }

    /// Its name in the guest.
    #[must_use]
    pub const fn device(self) -> &'static str {
        match self {
            Self::Console => "/dev/ttyS0",
            Self::Output => "/dev/ttyS1",
            Self::Errors => "/dev/ttyS2",
            Self::Control => "/dev/ttyS3",
        }
    }

    /// The port with the I/O port `port`, and which of its eight registers that is.
    #[must_use]
    pub fn at(port: u16) -> Option<(Self, u8)> {
        Self::ALL.into_iter().find_map(|serial| {
            let register = u8::try_from(port.checked_sub(serial.io_base())?).ok()?;
            (register < 8).then_some((serial, register))
        })
    }
}

/// What connects a guest with the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wiring {
    /// The serial ports of a PC.
    SerialPorts,
    /// The same, but the shell is on a virtio console; the kernel's log stays where it was from the start.
    VirtioConsole,
    /// The one console of a paravirtual guest, which [`pv_console`](crate::pv_console) takes apart.
    PvConsole,
}

impl Wiring {
    /// What the kernel is told of it. The early console shows what goes wrong before the kernel has found the real one.
    #[must_use]
    pub fn parameters(self) -> String {
        match self {
            // The kernel otherwise counts ticks of its timer against a busy loop, and panics ("IO-APIC + timer doesn't work") where the
            // host had something else to do meanwhile. A KVM guest leaves that out by itself (kvm_guest_init).
            Self::SerialPorts | Self::VirtioConsole => format!(
                "console=ttyS0 earlyprintk=serial,ttyS0 8250.nr_uarts={} no_timer_check",
                SerialPort::ALL.len()
            ),
            // The kernel would otherwise patch itself for one processor, an entry of its page tables at a time.
            Self::PvConsole => "console=hvc0 earlyprintk=xen noreplace-smp".to_owned(),
        }
    }

    /// The file in the guest that stands for a port in a session.
    fn device(self, port: SerialPort, session: &Session) -> &'static str {
        match (self, port, session) {
            (Self::VirtioConsole, SerialPort::Console, _) => "/dev/hvc0",
            (Self::SerialPorts | Self::VirtioConsole, ..) => port.device(),
            // The user's shell has the console for itself.
            (Self::PvConsole, SerialPort::Control, Session::Shell(_)) => "/dev/null",
            (Self::PvConsole, ..) => "/dev/hvc0",
        }
    }
}

/// What a guest has to work with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hardware<'a> {
    /// What connects it with the program.
    pub wiring: Wiring,
    /// Modules of its kernel that are loaded first, by name.
    pub modules: &'a [&'a str],
    /// Names of the ports that its devices have, which are names of files and words of the shell as well.
    pub ports: &'a [&'a str],
    /// It may be saved and go on at another time, and is told the time then ([`clock_line`]).
    pub is_saved: bool,
}

/// What a guest that goes on is told through [`SerialPort::Control`]: the time, in seconds since 1970-01-01 UTC.
#[must_use]
pub fn clock_line(seconds: u64) -> String {
    format!("clock {seconds}\n")
}

impl From<Wiring> for Hardware<'_> {
    fn from(wiring: Wiring) -> Self {
        Self { wiring, modules: &[], ports: &[], is_saved: false }
    }
}

/// What a guest does once it has booted. In the end it powers off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Session {
    /// Runs a shell line. What it leaves running is killed.
    Command {
        /// The line, at most [`LONGEST_COMMAND`] bytes.
        line: String,
        /// Its standard input; `None` is `/dev/null`.
        input: Option<Vec<u8>>,
    },
    /// Runs an interactive shell on the console.
    Shell(Screen),
    /// Does nothing else.
    Log,
}

/// The terminal that the user has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Screen {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub columns: u16,
    /// Its kind, as in the variable `TERM`.
    pub term: String,
}

/// What a virtual machine is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestRun {
    /// Path of the kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk: the userspace and what this run is about.
    pub initrd: Vec<u8>,
    /// The kernel's command line.
    pub command_line: String,
}

impl GuestRun {
    /// A run of `session` on `kernel` with `userspace`, which is [`initramfs::userspace`](crate::initramfs::userspace)'s,
    /// on `hardware`. `append` ends the kernel's command line.
    ///
    /// # Errors
    /// Fails on a shell line that is too long or has a zero byte, and if an archive cannot be made.
    pub fn new(
        kernel: PathBuf,
        userspace: &Archive,
        session: &Session,
        hardware: Hardware<'_>,
        append: &str,
    ) -> Result<Self> {
        let mut initrd = userspace.to_bytes()?;
        initrd.extend(run_archive(session, hardware)?.to_bytes()?);
        let mut command_line = format!("{} panic=-1", hardware.wiring.parameters());
        if *session != Session::Log {
            command_line.push_str(" quiet");
        }
        if !append.trim().is_empty() {
            command_line.push(' ');
            command_line.push_str(append.trim());
        }
        Ok(Self { kernel, initrd, command_line })
    }
}

/// The archive with what init is told.
fn run_archive(session: &Session, hardware: Hardware<'_>) -> Result<Archive> {
    let Hardware { wiring, modules, ports: channels, is_saved } = hardware;
    let mut archive = Archive::new();
    let mut set = vec![("modules", modules.join(" ")), ("ports", channels.join(" "))];
    let ports = [
        ("console", SerialPort::Console),
        ("output", SerialPort::Output),
        ("errors", SerialPort::Errors),
        ("control", SerialPort::Control),
    ];
    set.extend(ports.map(|(name, port)| (name, wiring.device(port, session).to_owned())));
    if is_saved {
        set.push(("saved", "yes".to_owned()));
    }
    if wiring == Wiring::PvConsole {
        set.push(("shared", "yes".to_owned()));
    }
    match session {
        Session::Command { line, input } => {
            ensure!(
                line.len() <= LONGEST_COMMAND,
                "the command has {} bytes, allowed are {LONGEST_COMMAND}",
                line.len()
            );
            ensure!(!line.contains('\0'), "the command has a zero byte");
            archive.fifo("vmm/output", 0o600)?;
            archive.fifo("vmm/errors", 0o600)?;
            let path = match input {
                Some(bytes) => {
                    archive.file("vmm/input", 0o600, bytes.clone())?;
                    "/vmm/input"
                }
                None => "/dev/null",
            };
            set.extend([
                ("mode", "command".to_owned()),
                ("command", line.clone()),
                ("input", path.to_owned()),
            ]);
        }
        Session::Shell(Screen { rows, columns, term }) => {
            set.extend([
                ("mode", "shell".to_owned()),
                ("rows", rows.to_string()),
                ("columns", columns.to_string()),
                ("term", term.clone()),
            ]);
        }
        Session::Log => set.push(("mode", "log".to_owned())),
    }
    let run: String = set.iter().map(|(name, value)| format!("{name}={}\n", quoted(value))).collect();
    ensure!(!run.contains('\0'), "what the guest is told has a zero byte: {run:?}");
    archive.file("vmm/run", 0o600, run.into_bytes())?;
    Ok(archive)
}

/// `value` as one word of the shell.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\'', r"'\''"))
}

/// What init, and programs of the guest, have said of the run so far.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Heard {
    line: Vec<u8>,
    /// The line is longer than any of init's.
    overlong: bool,
    init: bool,
    /// A program has asked for a snapshot.
    snapshot: bool,
    status: Option<u8>,
}

impl Heard {
    fn receive(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\n' => {
                    if !self.overlong {
                        self.take_line();
                    }
                    self.line.clear();
                    self.overlong = false;
                }
                // The guest's terminal puts it before each line feed.
                b'\r' => {}
                _ if self.line.len() < LONGEST_LINE => self.line.push(byte),
                _ => self.overlong = true,
            }
        }
    }

    /// A line that is none of init's is passed over: it tells nothing, and the guest may not end the run with it.
    fn take_line(&mut self) {
        match std::str::from_utf8(&self.line).unwrap_or_default().split_once(' ') {
            None if self.line == b"init" => self.init = true,
            None if self.line == b"snapshot" => self.snapshot = true,
            Some(("status", number)) if self.status.is_none() => self.status = number.parse().ok(),
            _ => {}
        }
    }
}

/// Where the bytes go that a guest sends through its serial ports.
///
/// Writers that buffer want [`flush`](Self::flush) when the guest is idle.
#[derive(Debug)]
pub struct GuestStreams<O, E> {
    output: O,
    errors: E,
    /// The end of the kernel's log, if it is not to be seen.
    log: Option<VecDeque<u8>>,
    /// Every byte is to be seen at once: a prompt has no line feed.
    immediate: bool,
    heard: Heard,
}

impl<O: Write, E: Write> GuestStreams<O, E> {
    /// Streams for `session`: what is to be seen of the guest goes to `output`, a command's errors go to `errors`.
    pub fn new(session: &Session, output: O, errors: E) -> Self {
        let log = matches!(session, Session::Command { .. }).then(VecDeque::new);
        let immediate = matches!(session, Session::Shell(_));
        Self { output, errors, log, immediate, heard: Heard::default() }
    }

    /// Takes what the guest has sent through `port`.
    ///
    /// # Errors
    /// Those of the writers. What could not be written is lost.
    pub fn receive(&mut self, port: SerialPort, bytes: &[u8]) -> io::Result<()> {
        match (port, &mut self.log) {
            (SerialPort::Console, None) => {
                self.output.write_all(bytes)?;
                if self.immediate {
                    self.output.flush()?;
                }
            }
            (SerialPort::Console, Some(log)) => {
                log.extend(bytes);
                log.drain(..log.len().saturating_sub(KEPT));
            }
            (SerialPort::Output, Some(_)) => self.output.write_all(bytes)?,
            (SerialPort::Errors, Some(_)) => self.errors.write_all(bytes)?,
            // No command runs that could have sent it.
            (SerialPort::Output | SerialPort::Errors, None) => {}
            (SerialPort::Control, _) => self.heard.receive(bytes),
        }
        Ok(())
    }

    /// Whether init has begun.
    #[must_use]
    pub fn init_has_begun(&self) -> bool {
        self.heard.init
    }

    /// Whether a program of the guest has asked for a snapshot.
    #[must_use]
    pub fn asks_for_snapshot(&self) -> bool {
        self.heard.snapshot
    }

    /// What has been heard so far, for streams in another process that go on from here.
    #[must_use]
    pub fn heard(&self) -> Heard {
        Heard { snapshot: false, ..self.heard.clone() }
    }

    /// Goes on from what other streams have heard.
    pub fn go_on(&mut self, heard: Heard) {
        self.heard = heard;
    }

    /// The exit status, once there is one: the command has ended and its output is complete, so that the virtual
    /// machine may end before the guest powers off.
    #[must_use]
    pub fn status(&self) -> Option<u8> {
        self.heard.status
    }

    /// Writes out what the writers hold back.
    ///
    /// # Errors
    /// Those of the writers.
    pub fn flush(&mut self) -> io::Result<()> {
        self.output.flush()?;
        self.errors.flush()
    }

    /// Ends the streams after the guest has ended, and returns the exit status if it gave one. If a command ran and
    /// gave none, what is kept of the kernel's log goes to the errors.
    ///
    /// # Errors
    /// Those of the writers.
    pub fn finish(mut self) -> Result<Option<u8>> {
        let status = self.status();
        self.flush().context("writing what the guest has sent")?;
        if let (None, Some(log)) = (status, &self.log) {
            let (first, second) = log.as_slices();
            let written = [first, second].into_iter().try_for_each(|part| self.errors.write_all(part));
            written.and_then(|()| self.errors.flush()).context("writing the guest's log")?;
        }
        Ok(status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command() -> Session {
        Session::Command { line: "true".to_owned(), input: None }
    }

    fn streams<'a>(
        session: &Session,
        output: &'a mut Vec<u8>,
        errors: &'a mut Vec<u8>,
    ) -> GuestStreams<&'a mut Vec<u8>, &'a mut Vec<u8>> {
        GuestStreams::new(session, output, errors)
    }

    #[test]
    fn a_commands_streams_stay_apart_and_keep_every_byte() {
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        let mut guest = streams(&command(), &mut output, &mut errors);
        guest.receive(SerialPort::Console, b"[    0.1] a warning\r\n").unwrap();
        guest.receive(SerialPort::Control, b"init\r\n").unwrap();
        guest.receive(SerialPort::Output, b"status 9\r\n\0\xff").unwrap();
        guest.receive(SerialPort::Errors, b"oh").unwrap();
        assert!(guest.init_has_begun());
        assert_eq!(guest.status(), None);
        for byte in b"status 3\r\n" {
            guest.receive(SerialPort::Control, &[*byte]).unwrap();
        }
        assert_eq!(guest.finish().unwrap(), Some(3));
        assert_eq!(output, b"status 9\r\n\0\xff");
        assert_eq!(errors, b"oh");
    }

    #[test]
    fn the_end_of_the_log_is_shown_if_there_is_no_status() {
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        let mut guest = streams(&command(), &mut output, &mut errors);
        guest.receive(SerialPort::Console, b"first").unwrap();
        for _ in 0..KEPT / 4 {
            guest.receive(SerialPort::Console, b"....").unwrap();
        }
        guest.receive(SerialPort::Console, b"panic").unwrap();
        assert_eq!(guest.finish().unwrap(), None);
        assert_eq!(errors.len(), KEPT);
        assert!(errors.ends_with(b"...panic") && errors.starts_with(b"..."));
        assert!(output.is_empty());
    }

    #[test]
    fn without_a_command_the_console_is_what_is_seen() {
        let screen = Screen { rows: 24, columns: 80, term: "linux".to_owned() };
        for session in [Session::Log, Session::Shell(screen)] {
            let (mut output, mut errors) = (Vec::new(), Vec::new());
            let mut guest = streams(&session, &mut output, &mut errors);
            guest.receive(SerialPort::Console, b"# ").unwrap();
            guest.receive(SerialPort::Output, b"nobody's").unwrap();
            assert_eq!(guest.finish().unwrap(), None);
            assert_eq!((&*output, &*errors), (&b"# "[..], &b""[..]));
        }
    }

    #[test]
    fn only_inits_lines_count_and_the_first_status() {
        let mut progress = Heard::default();
        progress.receive(b"status 256\nstatus -1\nstatus\nstatus x\n\xff\xfe\n status 1\ninitial\n");
        assert_eq!((progress.init, progress.status), (false, None));
        progress.receive(&[b'x'; 100_000]);
        assert!(progress.line.len() <= LONGEST_LINE);
        progress.receive(b"status 4\n");
        // What fits of this would be a status.
        progress.receive(format!("status {:0>57}6\n", 5).as_bytes());
        assert_eq!(progress.status, None);
        progress.receive(b"status 5\nstatus 6\n");
        assert_eq!(progress.status, Some(5));
    }

    #[test]
    fn the_ports_are_told_by_their_registers() {
        assert_eq!(SerialPort::at(0x3f8), Some((SerialPort::Console, 0)));
        assert_eq!(SerialPort::at(0x2ff), Some((SerialPort::Output, 7)));
        assert_eq!(SerialPort::at(0x3e9), Some((SerialPort::Errors, 1)));
        assert_eq!(SerialPort::at(0x2e8), Some((SerialPort::Control, 0)));
        for port in [0, 0x2e7, 0x2f0, 0x400, 0xffff] {
            assert_eq!(SerialPort::at(port), None);
        }
    }

    /// The shell of this machine reads what init would.
    #[test]
    fn the_shell_reads_back_the_command_as_it_was() {
        let line = "echo 'a'\\''b' \"$HOME\" `id` \\\n# é\n";
        let session = Session::Command { line: line.to_owned(), input: Some(vec![0, 255]) };
        let modules = ["virtio_blk", "overlay"];
        let hardware = Hardware { modules: &modules, ..Wiring::SerialPorts.into() };
        let bytes = run_archive(&session, hardware).unwrap().to_bytes().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("run");
        std::fs::write(&script, entry(&bytes, "vmm/run")).unwrap();
        let shell = std::process::Command::new("sh")
            .args(["-c", r#". "$0"; printf '%s|' "$command" "$mode" "$input" "$modules" "$control""#])
            .arg(&script)
            .output()
            .unwrap();
        let expected = format!("{line}|command|/vmm/input|virtio_blk overlay|/dev/ttyS3|");
        assert_eq!(String::from_utf8(shell.stdout).unwrap(), expected);
        assert_eq!(entry(&bytes, "vmm/input"), [0, 255]);
    }

    fn entry(mut archive: &[u8], name: &str) -> Vec<u8> {
        loop {
            let reader = cpio::NewcReader::new(archive).unwrap();
            assert!(!reader.entry().is_trailer(), "no {name}");
            let found = reader.entry().name() == name;
            let mut content = Vec::new();
            archive = reader.to_writer(&mut content).unwrap();
            if found {
                return content;
            }
        }
    }

    #[test]
    fn a_command_that_no_program_could_take_is_refused() {
        for (line, reason) in
            [("x".repeat(LONGEST_COMMAND + 1), "131072 bytes"), ("a\0b".to_owned(), "zero byte")]
        {
            let session = Session::Command { line, input: None };
            let error = run_archive(&session, Wiring::SerialPorts.into()).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_run_is_quiet_unless_its_log_is_what_is_wanted() {
        let archive = Archive::new();
        let run = |session: &Session| {
            GuestRun::new("kernel".into(), &archive, session, Wiring::SerialPorts.into(), " nosmp ").unwrap()
        };
        let log = run(&Session::Log);
        assert!(log.command_line.ends_with(" no_timer_check panic=-1 nosmp"), "{}", log.command_line);
        assert!(run(&command()).command_line.ends_with(" panic=-1 quiet nosmp"));
        // A paravirtual guest has no such timer.
        assert!(!Wiring::PvConsole.parameters().contains("no_timer_check"));
        assert_eq!(log.initrd.len() % 4, 0);
    }
}

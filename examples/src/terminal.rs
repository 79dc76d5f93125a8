//! The user's terminal while a guest's shell has it: every key goes to the guest, and the terminal is as it was on
//! every way out, panics and signals included. Two ways cannot be caught: SIGKILL, and the SIGSYS of
//! [`confine`](crate::confine).

use std::io::{self, IsTerminal as _};
use std::os::fd::AsFd as _;
use std::sync::{Mutex, Once, PoisonError};

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

/// How the terminal at standard input was, while it is otherwise.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Ctrl-a, with which the keys begin that are not for the guest, as in QEMU.
const ESCAPE: u8 = 0x01;

/// Holds the terminal at standard input in raw mode until it is dropped.
#[derive(Debug)]
#[must_use = "the terminal leaves raw mode when this is dropped"]
pub struct RawMode(());

impl RawMode {
    /// Enters raw mode if standard input is a terminal. Call it before the process is confined: it starts a thread
    /// that waits for signals.
    ///
    /// # Errors
    /// Fails if the terminal cannot be changed, or signals cannot be waited for.
    pub fn enter() -> Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        restore_on_panic();
        restore_on_signals().context("waiting for signals")?;
        let before = tcgetattr(stdin.as_fd()).context("asking for the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
        // The one from before stays if there are two of these.
        saved.get_or_insert(before);
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw).context("setting the terminal's mode")?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back as it was, if it is in raw mode. For ways out that drop nothing.
pub fn restore() {
    // A panic while this thread holds the lock must not wait for it.
    let saved = match SAVED.try_lock() {
        Ok(mut saved) => saved.take(),
        Err(_) => None,
    };
    if let Some(saved) = saved
        && let Err(error) = tcsetattr(io::stdin().as_fd(), OptionalActions::Now, &saved)
    {
        eprintln!("the terminal cannot be set to the mode it had: {error}; `reset` may help");
    }
}

/// Before the message, which is hard to read in raw mode.
fn restore_on_panic() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let next = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            next(panic);
        }));
    });
}

/// The process then ends by the signal, so that whoever waits for it sees why.
fn restore_on_signals() -> io::Result<()> {
    static WAITING: Mutex<bool> = Mutex::new(false);
    let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    if !*waiting {
        let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM])?;
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for signal in signals.forever() {
                restore();
                if let Err(error) = emulate_default_handler(signal) {
                    eprintln!("signal {signal} cannot end the process: {error}");
                }
            }
        })?;
        *waiting = true;
    }
    Ok(())
}

/// Has `tell` hear of the lines and columns that the terminal at standard input has whenever they change, on a thread of its
/// own. Call it before the process is confined.
///
/// # Errors
/// Fails if signals cannot be waited for.
pub fn on_resize(tell: impl Fn(u16, u16) + Send + 'static) -> Result<()> {
    let mut signals = Signals::new([SIGWINCH]).context("waiting for signals")?;
    let wait = move || {
        for _ in signals.forever() {
            if let Some((rows, columns)) = size() {
                tell(rows, columns);
            }
        }
    };
    std::thread::Builder::new().name("resize".to_owned()).spawn(wait).context("a thread")?;
    Ok(())
}

/// Lines and columns of the terminal at standard input, if it is one and knows.
#[must_use]
pub fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdin()).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// The kind of terminal that the variable `TERM` names, or one that any terminal is.
#[must_use]
pub fn kind() -> String {
    let known = |term: &String| {
        (1..=64).contains(&term.len())
            && term.chars().all(|c| c.is_ascii_alphanumeric() || "+-._".contains(c))
    };
    std::env::var("TERM").ok().filter(known).unwrap_or_else(|| "dumb".to_owned())
}

/// Finds what the user types for the monitor among what is for the guest: Ctrl-a x ends the virtual machine, Ctrl-a
/// twice is one Ctrl-a for the guest.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct EscapeKeys {
    begun: bool,
}

impl EscapeKeys {
    /// Adds what of `typed` is for the guest to `guest`. Returns whether the virtual machine is to end, and then
    /// leaves out what follows.
    pub fn take(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> bool {
        for &byte in typed {
            if std::mem::take(&mut self.begun) {
                match byte {
                    b'x' | b'X' => return true,
                    ESCAPE => guest.push(ESCAPE),
                    other => guest.extend([ESCAPE, other]),
                }
            } else if byte == ESCAPE {
                self.begun = true;
            } else {
                guest.push(byte);
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Write as _};
    use std::os::fd::OwnedFd;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Child, Command, ExitStatus, Stdio};

    use rustix::fs::{Mode, OFlags, open};
    use rustix::process::{Pid, Signal, kill_process};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;

    use super::*;
    use crate::confine::{Confinement, Engine};

    /// Tells this test, started as a process of its own, how to leave.
    const WAY_OUT: &str = "VMM_EXAMPLES_WAY_OUT";

    #[test]
    fn keys_for_the_monitor_are_found() {
        for (typed, guest, ends) in [
            ("ls\n", "ls\n", false),
            ("a\x01x|after", "a", true),
            ("\x01|X", "", true),
            ("\x01\x01x", "\x01x", false),
            ("\x01c|x", "\x01cx", false),
            ("\x01", "", false),
        ] {
            let (mut keys, mut got) = (EscapeKeys::default(), Vec::new());
            let ended = typed.split('|').any(|typed| keys.take(typed.as_bytes(), &mut got));
            assert_eq!((&*got, ended), (guest.as_bytes(), ends), "{typed:?}");
        }
    }

    /// Both ends of a new terminal.
    fn terminal() -> (OwnedFd, OwnedFd) {
        let control = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&control).unwrap();
        unlockpt(&control).unwrap();
        let name = ptsname(&control, Vec::new()).unwrap();
        let user = open(&*name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        (control, user)
    }

    /// This test again, as a process with a terminal, when it has that in raw mode.
    fn start(way_out: &str) -> (Child, OwnedFd, OwnedFd) {
        let (control, user) = terminal();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "terminal::tests::the_terminal_is_given_back_on_every_way_out"])
            .env(WAY_OUT, way_out)
            .stdin(user.try_clone().unwrap())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut said = Vec::new();
        let mut byte = [0];
        while !said.ends_with(b"raw!") {
            child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
            said.extend(byte);
        }
        (child, control, user)
    }

    fn is_raw(terminal: &OwnedFd) -> bool {
        let mode = tcgetattr(terminal).unwrap().local_modes;
        !mode.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    fn leave(way_out: &str) -> ! {
        let mut typed = File::from(io::stdin().as_fd().try_clone_to_owned().unwrap());
        let raw = RawMode::enter().unwrap().expect("a terminal");
        if way_out == "signal to a confined process" {
            Confinement::new(Engine::Interpreter).enter().unwrap();
        }
        print!("raw!");
        io::stdout().flush().unwrap();
        // Until the test has looked.
        typed.read_exact(&mut [0]).unwrap();
        match way_out {
            "drop" => drop(raw),
            "panic in another thread" => {
                let thread = std::thread::spawn(|| panic!("a panic of the test"));
                assert!(thread.join().is_err());
                std::mem::forget(raw);
            }
            // As when a guest runs.
            _ => loop {
                std::thread::park();
            },
        }
        std::process::exit(0)
    }

    fn ended(mut child: Child, terminal: &OwnedFd) -> ExitStatus {
        let status = child.wait().unwrap();
        assert!(!is_raw(terminal));
        status
    }

    #[test]
    fn the_terminal_is_given_back_on_every_way_out() {
        if let Ok(way_out) = std::env::var(WAY_OUT) {
            leave(&way_out);
        }
        for way_out in ["drop", "panic in another thread"] {
            let (child, control, user) = start(way_out);
            assert!(is_raw(&user), "{way_out}");
            rustix::io::write(&control, b"x").unwrap();
            assert_eq!(ended(child, &user).code(), Some(0), "{way_out}");
        }
        for (way_out, signal) in [
            ("signal", Signal::TERM),
            ("signal", Signal::INT),
            ("signal", Signal::HUP),
            ("signal to a confined process", Signal::TERM),
        ] {
            let (child, control, user) = start(way_out);
            assert!(is_raw(&user), "{way_out}");
            kill_process(Pid::from_child(&child), signal).unwrap();
            assert_eq!(ended(child, &user).signal(), Some(signal.as_raw()), "{way_out}");
            drop(control);
        }
    }
}

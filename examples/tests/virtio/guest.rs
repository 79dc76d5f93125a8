//! A guest that tests talk to while it runs.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vmm_examples::debian::{self, Series};

use crate::scrape::Figures;

/// Nothing that a guest does takes so long, on a host that has much else to do.
const LONGEST: Duration = Duration::from_secs(240);

/// `linux`, to be started with devices over that transport. `None` where Debian's packages are not to be had.
pub(crate) fn linux(test: &str, transport: &str) -> Option<Command> {
    if let Err(error) = debian::kernel(Series::V6_1).and_then(|_| debian::busybox()) {
        println!("{test}: skipped: {error:#}");
        return None;
    }
    let mut linux = Command::new(env!("CARGO_BIN_EXE_linux"));
    linux
        .args(["--backend", "translate", "--seconds", "300", "--transport", transport])
        .env_remove("RUST_LOG");
    Some(linux)
}

/// What `look` finds, when it finds something.
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < LONGEST, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A client of a socket that is soon there.
pub(crate) fn connect(path: &PathBuf) -> UnixStream {
    let client = wait_for("a socket", || UnixStream::connect(path).ok());
    client.set_read_timeout(Some(LONGEST)).unwrap();
    client.set_write_timeout(Some(LONGEST)).unwrap();
    client
}

/// A guest that runs a shell line, which has its end of a conversation as descriptor 3.
pub(crate) struct Guest {
    child: Child,
    directory: tempfile::TempDir,
    talk: BufReader<UnixStream>,
}

impl Guest {
    pub(crate) fn start(mut linux: Command, line: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        let child = linux
            .arg("--port")
            .arg(format!("talk,{}", path("talk").display()))
            .arg("--metrics")
            .arg(format!("unix:{}", path("metrics").display()))
            .args(["--command", &format!("exec 3<>/dev/virtio-ports/talk; {line}")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let talk = BufReader::new(connect(&path("talk")));
        Self { child, directory, talk }
    }

    /// The next line that it says.
    pub(crate) fn hear(&mut self) -> String {
        let mut line = String::new();
        self.talk.read_line(&mut line).unwrap();
        if !line.ends_with('\n') {
            let mut errors = String::new();
            self.child.stderr.as_mut().unwrap().read_to_string(&mut errors).unwrap();
            panic!("the guest said {line:?} and no more: {errors}");
        }
        line.trim_end().to_owned()
    }

    pub(crate) fn say(&mut self, line: &str) {
        writeln!(self.talk.get_mut(), "{line}").unwrap();
    }

    pub(crate) fn figures(&self) -> Figures {
        Figures::scrape(connect(&self.directory.path().join("metrics")))
    }

    /// Ends it at once, whatever it does.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Bytes of memory that the process has.
    pub(crate) fn resident(&self) -> u64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap();
        let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
        pages * u64::try_from(rustix::param::page_size()).unwrap()
    }

    /// What it has printed, when it has ended.
    pub(crate) fn output(self) -> String {
        let output = self.child.wait_with_output().unwrap();
        let (text, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{text}\n{errors}");
        text.into_owned()
    }
}

/// Its checksum, as sha256sum prints it.
pub(crate) fn sha256(mut data: impl std::io::Read) -> String {
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    std::io::copy(&mut data, child.stdin.as_mut().unwrap()).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

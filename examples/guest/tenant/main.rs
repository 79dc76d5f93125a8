//! A machine of the program `two_tenants`: does what it is told on its console, and says what came of it.
//!
//! A static program on std alone. It reads a line at a time:
//!
//! | words | what |
//! |---|---|
//! | `listen PORT` | from then on sends back what comes by connections of AF_VSOCK to that port |
//! | `serve PORT` | the same by TCP |
//! | `vsock CID PORT` | connects, says something, and hears it back |
//! | `hold CID PORT` | the same, keeps the connection, and says when it ends and how |
//! | `tcp ADDRESS PORT SECONDS` | connects, says something, and hears it back |
//! | `ping ADDRESS` | one echo request |
//! | `held` | whether what it holds is there: says something once more, and hears it back |
//! | `publish TEXT` | writes the text into the memory in common |
//! | `region` | what text is in that |
//! | `scribble` | tries to write something else into it, and looks what is there then |
//! | `watch` | says when the memory is gone, which is when all of its bits are ones |
//!
//! To each line it answers with one: `= yes`, `= yes TEXT` or `= no REASON`. What happens later is a line `! WHAT`.

#[allow(dead_code, reason = "another program uses the rest")]
#[path = "../ivshmem/device.rs"]
mod device;
#[allow(dead_code, reason = "another program uses the rest")]
#[path = "../vsock/socket.rs"]
mod socket;

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use device::Device;
use socket::{Kind, Socket};

/// What is said to see whether it comes back.
const GREETING: &[u8] = b"is anybody there?";

/// Where the text is in the memory in common, after a word that tells whether the memory is there, and its length.
const TEXT: u64 = 64;
const LONGEST: usize = 200;

type Answer = Result<String, String>;

fn say(line: &str) {
    let mut output = io::stdout().lock();
    writeln!(output, "{line}").and_then(|()| output.flush()).expect("standard output");
}

fn main() {
    let console = BufReader::new(File::open("/dev/ttyS0").expect("the console"));
    let mut guest = Guest { held: None };
    say("= yes");
    for line in console.lines() {
        let line = line.expect("a line of the console");
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.is_empty() {
            continue;
        }
        match guest.obey(&words) {
            Ok(text) if text.is_empty() => say("= yes"),
            Ok(text) => say(&format!("= yes {text}")),
            Err(reason) => say(&format!("= no {reason}")),
        }
    }
}

struct Guest {
    held: Option<Arc<Socket>>,
}

fn reason(error: io::Error) -> String {
    format!("{:?}", error.kind())
}

fn number<N: std::str::FromStr>(word: &str) -> Result<N, String> {
    word.parse().map_err(|_| format!("{word:?} is no number"))
}

impl Guest {
    fn obey(&mut self, words: &[&str]) -> Answer {
        match *words {
            ["listen", port] => listen(number(port)?).map_err(reason),
            ["serve", port] => serve(number(port)?).map_err(reason),
            ["vsock", cid, port] => vsock(number(cid)?, number(port)?).map(|_| String::new()).map_err(reason),
            ["hold", cid, port] => {
                let socket = Arc::new(vsock(number(cid)?, number(port)?).map_err(reason)?);
                self.held = Some(Arc::clone(&socket));
                thread::spawn(move || wait_for_end(&socket));
                Ok(String::new())
            }
            // The other thread reads what comes back.
            ["held"] => {
                let held = self.held.as_ref().ok_or("it holds nothing")?;
                held.send_all(GREETING).map_err(reason)?;
                Ok(String::new())
            }
            ["tcp", address, port, seconds] => tcp(address, number(port)?, number(seconds)?).map_err(reason),
            ["ping", address] => {
                let mut ping = Command::new("ping");
                ping.args(["-c", "1", "-W", "1", address]).stdout(Stdio::null()).stderr(Stdio::null());
                match ping.status().map_err(reason)?.success() {
                    true => Ok(String::new()),
                    false => Err("TimedOut".to_owned()),
                }
            }
            ["publish", text] => {
                let device = Device::find()?;
                write(&device, text);
                device.store(0, 1);
                Ok(String::new())
            }
            ["region"] => read(&Device::find()?),
            ["scribble"] => {
                let device = Device::find()?;
                let before = read(&device)?;
                write(&device, "scribbled");
                let after = read(&device)?;
                if after == before { Err(format!("it still says {after}")) } else { Ok(after) }
            }
            ["watch"] => {
                let device = Device::find()?;
                if device.word(0) != 1 {
                    return Err("nothing is published".to_owned());
                }
                drop(device);
                thread::spawn(|| match Device::find() {
                    Ok(device) => {
                        while device.word(0) != u64::MAX {
                            thread::sleep(Duration::from_millis(1));
                        }
                        say("! region all ones");
                    }
                    Err(reason) => say(&format!("! region {reason}")),
                });
                Ok(String::new())
            }
            _ => Err(format!("{words:?} is nothing that it can do")),
        }
    }
}

fn write(device: &Device, text: &str) {
    let text = &text.as_bytes()[..text.len().min(LONGEST)];
    device.write(TEXT + 8, text);
    device.store(TEXT, text.len() as u64);
}

fn read(device: &Device) -> Answer {
    let length = device.word(TEXT);
    if length > LONGEST as u64 {
        return Err(format!("a text of {length} bytes"));
    }
    String::from_utf8(device.read(TEXT + 8, length)).map_err(|error| error.to_string())
}

fn listen(port: u32) -> io::Result<String> {
    let listener = Socket::listen(Kind::Stream, port)?;
    thread::spawn(move || {
        while let Ok(client) = listener.accept() {
            thread::spawn(move || {
                let mut room = [0; 256];
                while let Ok(came @ 1..) = client.receive(&mut room) {
                    if client.send_all(&room[..came]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    Ok(String::new())
}

fn serve(port: u16) -> io::Result<String> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut room = [0; 256];
                let mut client = client;
                while let Ok(came @ 1..) = client.read(&mut room) {
                    if client.write_all(&room[..came]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    Ok(String::new())
}

fn vsock(cid: u32, port: u32) -> io::Result<Socket> {
    let socket = Socket::connect(Kind::Stream, cid, port)?;
    socket.send_all(GREETING)?;
    let mut heard = Vec::<u8>::new();
    let mut room = [0; 256];
    while heard.len() < GREETING.len() {
        match socket.receive(&mut room)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            came => heard.extend(&room[..came]),
        }
    }
    if heard == GREETING { Ok(socket) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Reads until the connection is no more. To one who reads, Linux says the same of a reset as of an end, but who sends after that hears of
/// it: an end would leave that way open.
fn wait_for_end(socket: &Socket) {
    let mut room = [0; 256];
    loop {
        match socket.receive(&mut room) {
            Ok(1..) => say("! vsock heard"),
            Ok(0) => {
                let sent = socket.send_all(GREETING);
                return say(&format!("! vsock ended, sending: {:?}", sent.map_err(|error| error.kind())));
            }
            Err(error) => return say(&format!("! vsock {:?}", error.kind())),
        }
    }
}

fn tcp(address: &str, port: u16, seconds: u64) -> io::Result<String> {
    let address = address.parse().map_err(|_| io::ErrorKind::InvalidInput)?;
    let patience = Duration::from_secs(seconds);
    let mut stream = TcpStream::connect_timeout(&(std::net::SocketAddr::new(address, port)), patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(GREETING)?;
    let mut heard = vec![0; GREETING.len()];
    stream.read_exact(&mut heard)?;
    if heard == GREETING { Ok(String::new()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

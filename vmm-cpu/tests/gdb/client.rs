//! The debugger's side of the protocol (GDB manual, "GDB Remote Serial Protocol").

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

/// Longest that an answer may take on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// A debugger's connection.
pub(crate) struct Client(TcpStream);

impl Client {
    pub(crate) fn connect(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self(stream)
    }

    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    /// Sends bytes to a stub that may hang up before it has seen them all.
    pub(crate) fn try_send(&mut self, bytes: &[u8]) {
        if let Err(error) = self.0.write_all(bytes) {
            assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{error}");
        }
    }

    /// Sends a packet; the stub acknowledges it.
    pub(crate) fn send(&mut self, body: &str) {
        self.send_bytes(&packet(body.as_bytes()));
    }

    /// The next packet, run lengths expanded; `None` once the stub has closed the connection.
    pub(crate) fn receive(&mut self) -> Option<String> {
        while self.byte()? != b'$' {}
        let mut body: Vec<u8> = Vec::new();
        loop {
            match self.byte()? {
                b'#' => break,
                b'*' => {
                    let times = self.byte()? - 29;
                    let last = *body.last().unwrap();
                    body.extend(std::iter::repeat_n(last, times.into()));
                }
                b'}' => body.push(self.byte()? ^ 0x20),
                byte => body.push(byte),
            }
        }
        self.byte()?;
        self.byte()?;
        self.send_bytes(b"+");
        Some(String::from_utf8_lossy(&body).into_owned())
    }

    /// What the stub answers to a packet.
    pub(crate) fn ask(&mut self, body: &str) -> String {
        self.send(body);
        self.receive().unwrap_or_else(|| panic!("the stub has hung up on {body:?}"))
    }

    /// As [`Client::ask`]; the answer is a stop.
    pub(crate) fn stop(&mut self, body: &str) -> String {
        self.ask(body)
    }

    /// What `monitor` says.
    pub(crate) fn monitor(&mut self, command: &str) -> String {
        let mut text = Vec::new();
        let mut answer = self.ask(&format!("qRcmd,{}", hex(command.as_bytes())));
        while answer != "OK" {
            text.extend(unhex(answer.strip_prefix('O').unwrap()));
            answer = self.receive().unwrap();
        }
        String::from_utf8(text).unwrap()
    }

    /// A register of 8 bytes, by its number.
    pub(crate) fn register(&mut self, number: usize) -> u64 {
        let bytes = unhex(&self.ask(&format!("p{number:x}")));
        u64::from_le_bytes(bytes.try_into().unwrap())
    }

    pub(crate) fn rip(&mut self) -> u64 {
        self.register(16)
    }

    /// Whether the stub has closed the connection.
    pub(crate) fn is_closed(&mut self) -> bool {
        loop {
            match self.0.read(&mut [0; 4096]) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == ErrorKind::ConnectionReset,
            }
        }
    }

    fn byte(&mut self) -> Option<u8> {
        let mut byte = [0];
        match self.0.read(&mut byte) {
            Ok(0) => None,
            Ok(_) => Some(byte[0]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
            Err(error) => panic!("no answer: {error}"),
        }
    }
}

pub(crate) fn packet(body: &[u8]) -> Vec<u8> {
    let sum = body.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    [b"$", body, format!("#{sum:02x}").as_bytes()].concat()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|n| u8::from_str_radix(&text[2 * n..2 * n + 2], 16).unwrap()).collect()
}

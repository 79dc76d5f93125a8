//! Socket connections (AF_VSOCK) of a program of a guest.
//!
//! A static program on std alone. KIND is `stream` or `seqpacket`; messages have up to 60000 bytes, of all sizes.
//!
//! | words | what |
//! |---|---|
//! | `send KIND CID PORT` | connects, sends standard input, and prints what comes back |
//! | `echo KIND PORT` | says `listening`, accepts one connection, and sends back what comes |
//! | `refused KIND CID PORT` | connects, and prints the name of the error that this gives |
//! | `pour CID PORT BYTES`, `drain CID PORT` | sends so many bytes, and waits for one; reads until the end. Both print bytes and nanoseconds |
//! | `rounds CID PORT COUNT SIZE` | sends messages and waits for each to come back; prints count and nanoseconds |

mod socket;

use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::thread;
use std::time::Instant;

use socket::{Kind, Socket};

/// The largest piece of data.
const PIECE: usize = 60_000;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vsock: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> io::Result<()> {
    match *words {
        ["send", kind, cid, port] => {
            send(&Socket::connect(kind_of(kind)?, number(cid)?, number(port)?)?, kind_of(kind)?)
        }
        ["echo", kind, port] => {
            let listener = Socket::listen(kind_of(kind)?, number(port)?)?;
            println!("listening");
            echo(&listener.accept()?)
        }
        ["refused", kind, cid, port] => match Socket::connect(kind_of(kind)?, number(cid)?, number(port)?) {
            Ok(_) => Err(io::Error::other("it was accepted")),
            Err(error) => {
                println!("{:?}", error.kind());
                Ok(())
            }
        },
        ["pour", cid, port, bytes] => {
            pour(&Socket::connect(Kind::Stream, number(cid)?, number(port)?)?, number(bytes)?)
        }
        ["drain", cid, port] => drain(&Socket::connect(Kind::Stream, number(cid)?, number(port)?)?),
        ["rounds", cid, port, count, size] => {
            let socket = Socket::connect(Kind::Stream, number(cid)?, number(port)?)?;
            rounds(&socket, number(count)?, number(size)? as usize)
        }
        _ => Err(io::Error::other("send | echo | refused | pour | drain | rounds, see the source")),
    }
}

fn kind_of(word: &str) -> io::Result<Kind> {
    match word {
        "stream" => Ok(Kind::Stream),
        "seqpacket" => Ok(Kind::SeqPacket),
        _ => Err(io::Error::other(format!("{word:?} is neither stream nor seqpacket"))),
    }
}

fn number(word: &str) -> io::Result<u32> {
    word.parse().map_err(|_| io::Error::other(format!("{word:?} is no number")))
}

/// Both ways at once: neither side waits for the other to have sent all.
fn send(socket: &Socket, kind: Kind) -> io::Result<()> {
    let mut data = Vec::new();
    io::stdin().read_to_end(&mut data)?;
    let (mut back, mut ends) = (Vec::new(), Vec::new());
    let mut sent = Vec::new();
    thread::scope(|scope| {
        let sender = scope.spawn(|| -> io::Result<()> {
            let (mut at, mut size) = (0, 1);
            while let Some(rest) = data.get(at..).filter(|rest| !rest.is_empty()) {
                let part = rest.get(..size).unwrap_or(rest);
                socket.send_all(part)?;
                at += part.len();
                sent.push(at);
                size = size * 7 % (PIECE - 1) + 1;
            }
            socket.shut_down_sending()
        });
        let mut piece = vec![0; PIECE];
        loop {
            let len = socket.receive(&mut piece)?;
            let Some(part) = piece.get(..len).filter(|part| !part.is_empty()) else { break };
            back.extend_from_slice(part);
            ends.push(back.len());
        }
        sender.join().map_err(|_| io::Error::other("the sender panicked"))?
    })?;
    if kind == Kind::SeqPacket && sent != ends {
        return Err(io::Error::other(format!(
            "{} messages were sent, {} others came back",
            sent.len(),
            ends.len()
        )));
    }
    io::stdout().write_all(&back)
}

fn echo(socket: &Socket) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let len = socket.receive(&mut piece)?;
        match piece.get(..len) {
            Some(part) if !part.is_empty() => socket.send_all(part)?,
            _ => return Ok(()),
        }
    }
}

fn pour(socket: &Socket, bytes: u32) -> io::Result<()> {
    let piece = vec![0x5a; PIECE];
    let begun = Instant::now();
    let mut left = bytes as usize;
    while left > 0 {
        let part = piece.get(..left).unwrap_or(&piece);
        socket.send_all(part)?;
        left -= part.len();
    }
    socket.shut_down_sending()?;
    socket.receive(&mut [0])?;
    println!("{bytes} {}", begun.elapsed().as_nanos());
    Ok(())
}

fn drain(socket: &Socket) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    let (mut bytes, mut begun) = (0, None);
    loop {
        let len = socket.receive(&mut piece)?;
        let begun = begun.get_or_insert_with(Instant::now);
        if len == 0 {
            println!("{bytes} {}", begun.elapsed().as_nanos());
            return Ok(());
        }
        bytes += len;
    }
}

fn rounds(socket: &Socket, count: u32, size: usize) -> io::Result<()> {
    let mut message = vec![0x5a; size];
    let begun = Instant::now();
    for _ in 0..count {
        socket.send_all(&message)?;
        let mut came = 0;
        while came < size {
            match socket.receive(message.get_mut(came..).unwrap_or_default())? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                len => came += len,
            }
        }
    }
    println!("{count} {}", begun.elapsed().as_nanos());
    Ok(())
}

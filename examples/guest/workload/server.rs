//! The other end of TCP connections that `io.rs` makes. `io_versus_qemu` has it, too, for guests that the host serves.

use std::io::{Error, Read as _, Result, Write as _};
use std::net::{TcpListener, TcpStream};

/// Serves whoever connects, as long as anybody can.
pub(crate) fn serve(listener: &TcpListener) {
    for client in listener.incoming().flatten() {
        std::thread::spawn(move || {
            // A guest may end in the middle of it.
            if let Err(error) = one(client) {
                eprintln!("a client: {error}");
            }
        });
    }
}

fn one(mut client: TcpStream) -> Result<()> {
    client.set_nodelay(true)?;
    let (mut what, mut count) = ([0], [0; 8]);
    client.read_exact(&mut what)?;
    client.read_exact(&mut count)?;
    let mut left = u64::from_le_bytes(count);
    let mut data = vec![0x5a; 256 << 10];
    match what {
        [b'G'] => {
            while left > 0 {
                let len = client.read(&mut data)? as u64;
                left = left
                    .checked_sub(len)
                    .filter(|_| len > 0)
                    .ok_or(Error::other("too few bytes, or too many"))?;
            }
            client.write_all(&[1])?;
        }
        [b'T'] => {
            while left > 0 {
                let len = usize::try_from(left).unwrap_or(usize::MAX).min(data.len());
                client.write_all(data.get(..len).unwrap_or_default())?;
                left -= len as u64;
            }
        }
        [b'P'] => {
            for _ in 0..left {
                client.read_exact(&mut what)?;
                client.write_all(&what)?;
            }
        }
        _ => return Err(Error::other(format!("it wants {what:?}"))),
    }
    // Until the guest has all of it.
    while client.read(&mut data)? > 0 {}
    Ok(())
}

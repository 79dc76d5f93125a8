//! Packets (Virtio 1.3, 5.10.6): a header of 44 bytes, and data behind that.
//!
//! `virtio-vsock` of rust-vmm has a parser that wants a header in one descriptor and all data in another, which Linux from 6.17 on
//! does not send. Here both are read out of the chain as a run of bytes, whatever pieces they come in.

/// The largest amount of data in one packet, in bytes, as Linux has it: longer ones are a breach of the rules.
pub const MAX_DATA: u32 = 64 << 10;

/// Bytes of a header.
pub const HEADER: usize = 44;

/// What a packet is for (5.10.6).
pub mod operation {
    /// Wants a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts one.
    pub const RESPONSE: u16 = 2;
    /// Ends one at once, or refuses it.
    pub const RST: u16 = 3;
    /// Sends no more, receives no more, or both.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const RW: u16 = 5;
    /// How much may be sent.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for that.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of SHUTDOWN (5.10.6.4).
pub mod shutdown {
    /// Receives no more.
    pub const RECEIVE: u32 = 1;
    /// Sends no more.
    pub const SEND: u32 = 2;
    /// Both.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// Flags of RW on a seqpacket connection (5.10.6.5).
pub mod boundary {
    /// The message ends here.
    pub const MESSAGE: u32 = 1;
    /// And so does a record (MSG_EOR).
    pub const RECORD: u32 = 2;
}

/// What a connection carries (5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// Bytes (SOCK_STREAM).
    Stream,
    /// Messages (SOCK_SEQPACKET).
    SeqPacket,
}

impl Kind {
    /// What the field `type` says of it.
    pub fn number(self) -> u16 {
        match self {
            Self::Stream => 1,
            Self::SeqPacket => 2,
        }
    }

    /// The kind of that number, if it is one.
    pub fn of(number: u16) -> Option<Self> {
        [Self::Stream, Self::SeqPacket].into_iter().find(|kind| kind.number() == number)
    }
}

/// A header, as it came. Nothing about it need be true.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context identifier of the sender.
    pub src_cid: u64,
    /// And of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// And of the receiver.
    pub dst_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    /// See [`Kind::number`].
    pub kind: u16,
    /// See [`operation`].
    pub op: u16,
    /// See [`shutdown`] and [`boundary`].
    pub flags: u32,
    /// Bytes of the sender's buffer for what it receives.
    pub buf_alloc: u32,
    /// How many bytes have left that buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads one.
    pub fn parse(bytes: &[u8; HEADER]) -> Self {
        let mut rest = &bytes[..];
        let src_cid = u64::from_le_bytes(take(&mut rest));
        let dst_cid = u64::from_le_bytes(take(&mut rest));
        let [src_port, dst_port, len] = std::array::from_fn(|_| u32::from_le_bytes(take(&mut rest)));
        let [kind, op] = std::array::from_fn(|_| u16::from_le_bytes(take(&mut rest)));
        let [flags, buf_alloc, fwd_cnt] = std::array::from_fn(|_| u32::from_le_bytes(take(&mut rest)));
        Self { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt }
    }

    /// Writes it.
    pub fn to_bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let fields = [&self.src_cid, &self.dst_cid].into_iter().flat_map(|cid| cid.to_le_bytes());
        let fields = fields
            .chain([self.src_port, self.dst_port, self.len].into_iter().flat_map(u32::to_le_bytes))
            .chain([self.kind, self.op].into_iter().flat_map(u16::to_le_bytes))
            .chain([self.flags, self.buf_alloc, self.fwd_cnt].into_iter().flat_map(u32::to_le_bytes));
        bytes.iter_mut().zip(fields).for_each(|(place, byte)| *place = byte);
        bytes
    }
}

/// The next field.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk() {
        Some((field, behind)) => {
            *rest = behind;
            *field
        }
        None => [0; N],
    }
}

//! The compressed kernel inside a bzImage, and its extraction.
//!
//! The kernel's build appends the size of the output, 4 bytes little endian, to every payload; gzip ends
//! with the same number by itself. That size is what the output is held to, and it may not exceed a limit,
//! so that a small file cannot fill the host's memory.

use std::fmt;

use super::BootError;

/// Largest output of a decompressor in bytes, whatever the image says.
pub const MAX_PAYLOAD_SIZE: u64 = 512 << 20;

/// How the payload of a bzImage is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compression {
    /// gzip (RFC 1952).
    Gzip,
    /// Legacy LZ4 frames, which is what `lz4 -l` writes.
    Lz4,
    /// Zstandard (RFC 8878).
    Zstd,
    /// xz, with the x86 branch filter.
    Xz,
    /// bzip2, which is recognised and not supported.
    Bzip2,
    /// The older `.lzma` format, which is recognised and not supported.
    Lzma,
    /// LZO, which is recognised and not supported.
    Lzo,
    /// None of the known magic numbers.
    Unknown,
}

impl Compression {
    /// Tells the compression from the first bytes of the payload.
    fn identify(payload: &[u8]) -> Self {
        match payload {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x02, 0x21, 0x4c, 0x18, ..] => Self::Lz4,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            [b'B', b'Z', b'h', ..] => Self::Bzip2,
            [0x5d, 0, 0, ..] => Self::Lzma,
            [0x89, b'L', b'Z', b'O', ..] => Self::Lzo,
            _ => Self::Unknown,
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Xz => "xz",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "lzma",
            Self::Lzo => "lzo",
            Self::Unknown => "unknown",
        })
    }
}

/// The payload of a bzImage.
#[derive(Clone, Copy)]
pub struct Payload<'a> {
    /// The compressed data and, behind it, the size of the output.
    whole: &'a [u8],
    declared: u32,
    compression: Compression,
    limit: u64,
}

impl fmt::Debug for Payload<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Payload")
            .field("compression", &self.compression)
            .field("compressed_size", &self.compressed_size())
            .field("declared_size", &self.declared)
            .finish()
    }
}

impl<'a> Payload<'a> {
    /// `limit` is what the setup header's `init_size` leaves for the decompressed kernel.
    pub(super) fn new(whole: &'a [u8], limit: u64) -> Result<Self, BootError> {
        let Some((data, size)) = whole.split_last_chunk::<4>() else {
            return Err(BootError::NoPayload { length: u32::try_from(whole.len()).unwrap_or(u32::MAX) });
        };
        Ok(Self {
            whole,
            declared: u32::from_le_bytes(*size),
            compression: Compression::identify(data),
            limit,
        })
    }

    /// How it is compressed.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// Size in bytes of the compressed data.
    pub fn compressed_size(&self) -> usize {
        self.data().len()
    }

    /// Size in bytes that the payload declares for its output; not checked against anything yet.
    pub fn declared_size(&self) -> u64 {
        self.declared.into()
    }

    fn data(&self) -> &'a [u8] {
        self.whole.split_last_chunk::<4>().map_or(&[], |(data, _)| data)
    }

    /// The decompressed payload.
    pub(super) fn decompress(&self) -> Result<Vec<u8>, BootError> {
        let (limit, limit_from) = if self.limit < MAX_PAYLOAD_SIZE {
            (self.limit, "init_size")
        } else {
            (MAX_PAYLOAD_SIZE, "the cap of the loader")
        };
        let size = self.declared_size();
        if size > limit {
            return Err(BootError::PayloadTooLarge { size, limit, limit_from });
        }
        self.decode()
    }

    fn unsupported(&self) -> BootError {
        let mut magic = [0; 6];
        for (to, from) in magic.iter_mut().zip(self.data()) {
            *to = *from;
        }
        BootError::UnsupportedCompression { compression: self.compression, magic }
    }

    /// Always an error: this build has no decompressors (feature `decompress`).
    #[cfg(not(feature = "decompress"))]
    fn decode(&self) -> Result<Vec<u8>, BootError> {
        Err(self.unsupported())
    }
}

#[cfg(feature = "decompress")]
mod decompress {
    use std::cmp::Ordering;
    use std::io::{self, Read};

    use lz4_flex::block::DecompressError;
    use lzma_rust2::XzReader;
    use ruzstd::decoding::StreamingDecoder;

    use super::super::error::ProducedSize;
    use super::{BootError, Compression, Payload};

    /// Magic of a legacy LZ4 frame.
    const LZ4_LEGACY_MAGIC: u32 = 0x184c_2102;
    /// Output of one block of a legacy LZ4 frame.
    const LZ4_LEGACY_BLOCK: usize = 8 << 20;
    /// The kernel's build uses dictionaries of up to 128 MiB.
    const XZ_MEMORY_LIMIT_KIB: u32 = 160 << 10;

    impl Payload<'_> {
        pub(super) fn decode(&self) -> Result<Vec<u8>, BootError> {
            match self.compression {
                // The appended size is the last field of the gzip trailer.
                Compression::Gzip => self.read_all(flate2::read::GzDecoder::new(self.whole)),
                Compression::Lz4 => self.lz4_legacy(),
                Compression::Zstd => self.zstd(),
                Compression::Xz => {
                    self.read_all(XzReader::new_mem_limit(self.data(), false, XZ_MEMORY_LIMIT_KIB))
                }
                _ => Err(self.unsupported()),
            }
        }

        fn damaged(&self, problem: impl ToString) -> BootError {
            BootError::Decompress { compression: self.compression, problem: problem.to_string() }
        }

        fn check_size(&self, produced: usize) -> Result<(), BootError> {
            let (declared, produced) = (self.declared_size(), produced as u64);
            match produced.cmp(&declared) {
                Ordering::Equal => Ok(()),
                Ordering::Less => Err(self.wrong_size(ProducedSize::Bytes(produced))),
                Ordering::Greater => Err(self.wrong_size(ProducedSize::More)),
            }
        }

        fn wrong_size(&self, produced: ProducedSize) -> BootError {
            BootError::PayloadSize { compression: self.compression, declared: self.declared_size(), produced }
        }

        /// Reads to the end of the stream, where decoders check their checksum, or to one byte too many.
        fn read_all(&self, decoder: impl Read) -> Result<Vec<u8>, BootError> {
            let mut output = Vec::new();
            self.read_into(&mut output, decoder)?;
            self.check_size(output.len())?;
            Ok(output)
        }

        fn read_into(&self, output: &mut Vec<u8>, decoder: impl Read) -> Result<(), BootError> {
            // The buffer grows with what arrives: a file of a few bytes does not get what it declares.
            match decoder.take(self.declared_size() + 1).read_to_end(output) {
                Ok(_) => Ok(()),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    Err(self.damaged("the compressed data ends early"))
                }
                Err(error) => Err(self.damaged(error)),
            }
        }

        fn zstd(&self) -> Result<Vec<u8>, BootError> {
            let mut decoder = StreamingDecoder::new(self.data()).map_err(|error| self.damaged(error))?;
            let mut output = Vec::new();
            self.read_into(&mut output, &mut decoder)?;
            self.check_size(output.len())?;
            // The decoder computes the checksum and leaves the comparison to its caller.
            let stored = decoder.decoder.get_checksum_from_data();
            if stored.is_some() && stored != decoder.decoder.get_calculated_checksum() {
                return Err(self.damaged("the content checksum does not match"));
            }
            Ok(output)
        }

        /// Frames of the legacy format: a magic, then blocks of a 4-byte size and data, up to the end of
        /// the input. The blocks are walked here because a stream decoder has no end to stop at and takes
        /// a torn block header for one.
        fn lz4_legacy(&self) -> Result<Vec<u8>, BootError> {
            let declared = usize::try_from(self.declared_size()).unwrap_or(usize::MAX);
            // Zero pages of the host until they are written to, whatever the file declares. Room for each
            // block as it comes would have to be zeroed each time, and blocks can be tiny.
            let mut output = vec![0; declared];
            let mut produced: usize = 0;
            let mut rest = self.data();
            while !rest.is_empty() {
                let (word, after) = rest
                    .split_first_chunk::<4>()
                    .ok_or_else(|| self.damaged("the last block header is cut short"))?;
                rest = after;
                let size = u32::from_le_bytes(*word);
                match size {
                    LZ4_LEGACY_MAGIC => continue,
                    // Not in the format, but Linux's own decompressor ends here too.
                    0 => break,
                    _ => {}
                }
                let (data, after) =
                    usize::try_from(size).ok().and_then(|size| rest.split_at_checked(size)).ok_or_else(
                        || self.damaged(format!("a block of {size:#x} bytes with {:#x} left", rest.len())),
                    )?;
                rest = after;
                let space = output.get_mut(produced..).unwrap_or_default();
                let room = space.len().min(LZ4_LEGACY_BLOCK);
                let space = space.get_mut(..room).unwrap_or_default();
                match lz4_flex::block::decompress_into(data, space) {
                    Ok(length) => produced = produced.saturating_add(length),
                    Err(DecompressError::OutputTooSmall { .. }) if room < LZ4_LEGACY_BLOCK => {
                        return Err(self.wrong_size(ProducedSize::More));
                    }
                    Err(error) => return Err(self.damaged(format!("a block of {size:#x} bytes: {error}"))),
                }
            }
            self.check_size(produced)?;
            Ok(output)
        }
    }
}

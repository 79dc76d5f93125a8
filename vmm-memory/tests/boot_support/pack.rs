//! Compressed payloads as the kernel's build makes them, in every supported format.

use std::io::Write;

use lzma_rust2::filter::FilterType;
use lzma_rust2::{XzOptions, XzWriter};

/// The size of the output that the build appends.
pub fn with_size(mut packed: Vec<u8>, size: usize) -> Vec<u8> {
    packed.extend(u32::try_from(size).unwrap().to_le_bytes());
    packed
}

/// gzip needs no appended size: its trailer ends with it.
pub fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// What `lz4 -l` writes: independent blocks of up to 8 MiB.
pub fn lz4(data: &[u8]) -> Vec<u8> {
    with_size(lz4_blocks(data), data.len())
}

/// The same with a block size of 0 at the end, which Linux takes for the end of the data.
pub fn lz4_with_end_mark(data: &[u8]) -> Vec<u8> {
    let mut packed = lz4_blocks(data);
    packed.extend([0; 4]);
    with_size(packed, data.len())
}

fn lz4_blocks(data: &[u8]) -> Vec<u8> {
    let mut packed = 0x184c_2102_u32.to_le_bytes().to_vec();
    for block in data.chunks(8 << 20) {
        let block = lz4_flex::block::compress(block);
        packed.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
        packed.extend(block);
    }
    packed
}

pub fn zstd(data: &[u8]) -> Vec<u8> {
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    with_size(ruzstd::encoding::compress_to_vec(data, level), data.len())
}

pub fn xz(data: &[u8]) -> Vec<u8> {
    let mut options = XzOptions::with_preset(0);
    options.prepend_pre_filter(FilterType::BcjX86, 0);
    let mut encoder = XzWriter::new(Vec::new(), options).unwrap();
    encoder.write_all(data).unwrap();
    with_size(encoder.finish().unwrap(), data.len())
}

/// A function that packs its argument.
pub type Pack = fn(&[u8]) -> Vec<u8>;

/// Name and packer of every supported format.
pub const ALL: [(&str, Pack); 4] = [("gzip", gzip), ("lz4", lz4), ("zstd", zstd), ("xz", xz)];

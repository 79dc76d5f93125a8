//! A builder of bzImages.

pub struct BzImageBuilder {
    pub version: u16,
    pub xloadflags: u16,
    pub loadflags: u8,
    pub relocatable: u8,
    pub alignment: u32,
    pub pref_address: u64,
    pub init_size: u32,
    pub cmdline_size: u32,
    pub initrd_addr_max: u32,
    pub payload: Vec<u8>,
    /// Bytes behind the kernel that do not belong to it.
    pub trailer: usize,
}

impl Default for BzImageBuilder {
    fn default() -> Self {
        Self {
            version: 0x020f,
            xloadflags: 1,
            loadflags: 1,
            relocatable: 1,
            alignment: 0x20_0000,
            pref_address: 0x100_0000,
            init_size: 0x40_0000,
            cmdline_size: 2047,
            initrd_addr_max: 0x7fff_ffff,
            payload: Vec::new(),
            trailer: 0,
        }
    }
}

/// Size of the real-mode part: a boot sector and two more.
pub const SETUP_SIZE: usize = 3 * 512;
/// Offset of the payload in the protected-mode kernel.
pub const PAYLOAD_OFFSET: usize = 0x240;

impl BzImageBuilder {
    pub fn build(&self) -> Vec<u8> {
        let mut kernel = vec![0xcc; PAYLOAD_OFFSET];
        kernel.extend(&self.payload);
        kernel.resize(kernel.len().next_multiple_of(16), 0xee);
        let mut file = vec![0; SETUP_SIZE];
        let mut put = |offset: usize, bytes: &[u8]| super::patch(&mut file, offset, bytes);
        put(0x1f1, &[2]);
        put(0x1f4, &u32::try_from(kernel.len() / 16).unwrap().to_le_bytes());
        put(0x1fe, &0xaa55_u16.to_le_bytes());
        put(0x200, &[0xeb, 0x6a]);
        put(0x202, b"HdrS");
        put(0x206, &self.version.to_le_bytes());
        put(0x211, &[self.loadflags]);
        put(0x214, &0x10_0000_u32.to_le_bytes());
        put(0x22c, &self.initrd_addr_max.to_le_bytes());
        put(0x230, &self.alignment.to_le_bytes());
        put(0x234, &[self.relocatable, 21]);
        put(0x236, &self.xloadflags.to_le_bytes());
        put(0x238, &self.cmdline_size.to_le_bytes());
        put(0x248, &u32::try_from(PAYLOAD_OFFSET).unwrap().to_le_bytes());
        put(0x24c, &u32::try_from(self.payload.len()).unwrap().to_le_bytes());
        // A list of setup data that is not the loader's.
        put(0x250, &0xdead_beef_u64.to_le_bytes());
        put(0x258, &self.pref_address.to_le_bytes());
        put(0x260, &self.init_size.to_le_bytes());
        file.extend(kernel);
        file.resize(file.len() + self.trailer, 0x55);
        file
    }
}

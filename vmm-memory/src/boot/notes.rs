//! Notes by which a kernel tells how it wants to be started (Xen public/elfnote.h).

use super::error::BootError;

/// `XEN_ELFNOTE_PHYS32_ENTRY`, the note that makes a kernel startable by PVH.
pub(super) const PHYS32_ENTRY: u32 = 18;

/// The notes named "Xen" of an ELF kernel.
///
/// A note that is absent is `None`; of a note that appears more than once the last counts, as in Xen.
/// Unknown note types are skipped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct XenNotes {
    entry: Option<u64>,
    hypercall_page: Option<u64>,
    virt_base: Option<u64>,
    paddr_offset: Option<u64>,
    xen_version: Option<String>,
    guest_os: Option<String>,
    guest_version: Option<String>,
    loader: Option<String>,
    pae_mode: Option<String>,
    features: Option<String>,
    bsd_symtab: Option<bool>,
    hv_start_low: Option<u64>,
    l1_mfn_valid: Option<(u64, u64)>,
    suspend_cancel: Option<bool>,
    init_p2m: Option<u64>,
    mod_start_pfn: Option<bool>,
    supported_features: Option<u64>,
    phys32_entry: Option<u32>,
}

impl XenNotes {
    /// Virtual address of the PV entry point (type 1, `ENTRY`).
    pub fn entry(&self) -> Option<u64> {
        self.entry
    }

    /// Virtual address of the page that is to become the hypercall page (type 2, `HYPERCALL_PAGE`).
    pub fn hypercall_page(&self) -> Option<u64> {
        self.hypercall_page
    }

    /// Virtual address at which the kernel's address 0 is mapped (type 3, `VIRT_BASE`).
    pub fn virt_base(&self) -> Option<u64> {
        self.virt_base
    }

    /// Offset of the ELF physical addresses from the guest's (type 4, `PADDR_OFFSET`).
    pub fn paddr_offset(&self) -> Option<u64> {
        self.paddr_offset
    }

    /// The Xen interface the kernel was written for, such as "xen-3.0" (type 5, `XEN_VERSION`).
    pub fn xen_version(&self) -> Option<&str> {
        self.xen_version.as_deref()
    }

    /// The guest operating system, such as "linux" (type 6, `GUEST_OS`).
    pub fn guest_os(&self) -> Option<&str> {
        self.guest_os.as_deref()
    }

    /// The guest operating system's version (type 7, `GUEST_VERSION`).
    pub fn guest_version(&self) -> Option<&str> {
        self.guest_version.as_deref()
    }

    /// The loader type, such as "generic" (type 8, `LOADER`).
    pub fn loader(&self) -> Option<&str> {
        self.loader.as_deref()
    }

    /// The PAE mode of a 32-bit kernel: "yes", "no", "bimodal" (type 9, `PAE_MODE`).
    pub fn pae_mode(&self) -> Option<&str> {
        self.pae_mode.as_deref()
    }

    /// Feature names separated by `|`; `!` before a name makes it mandatory (type 10, `FEATURES`).
    pub fn features(&self) -> Option<&str> {
        self.features.as_deref()
    }

    /// Whether the kernel wants its symbol table loaded (type 11, `BSD_SYMTAB`).
    pub fn bsd_symtab(&self) -> Option<bool> {
        self.bsd_symtab
    }

    /// Lowest address of the hypervisor hole that the kernel can bear (type 12, `HV_START_LOW`).
    pub fn hv_start_low(&self) -> Option<u64> {
        self.hv_start_low
    }

    /// Mask and value by which the kernel tells a valid level 1 entry (type 13, `L1_MFN_VALID`).
    pub fn l1_mfn_valid(&self) -> Option<(u64, u64)> {
        self.l1_mfn_valid
    }

    /// Whether a suspend may be cancelled (type 14, `SUSPEND_CANCEL`).
    pub fn suspend_cancel(&self) -> Option<bool> {
        self.suspend_cancel
    }

    /// Virtual address at which the kernel wants the initial p2m table (type 15, `INIT_P2M`).
    pub fn init_p2m(&self) -> Option<u64> {
        self.init_p2m
    }

    /// Whether `mod_start` may be a frame number of unmapped memory (type 16, `MOD_START_PFN`).
    pub fn mod_start_pfn(&self) -> Option<bool> {
        self.mod_start_pfn
    }

    /// Bitmap of features, bit numbers as in public/features.h (type 17, `SUPPORTED_FEATURES`).
    pub fn supported_features(&self) -> Option<u64> {
        self.supported_features
    }

    /// Physical address of the 32-bit PVH entry point (type 18, `PHYS32_ENTRY`).
    pub fn phys32_entry(&self) -> Option<u32> {
        self.phys32_entry
    }

    /// Whether the kernel can be started as a Xen PV domain: a note `ENTRY` is what makes it one here.
    pub fn is_pv(&self) -> bool {
        self.entry.is_some()
    }

    /// Takes over one note.
    pub(super) fn insert(&mut self, kind: u32, desc: &[u8]) -> Result<(), BootError> {
        match kind {
            1 => self.entry = Some(number("ENTRY", desc)?),
            2 => self.hypercall_page = Some(number("HYPERCALL_PAGE", desc)?),
            3 => self.virt_base = Some(number("VIRT_BASE", desc)?),
            4 => self.paddr_offset = Some(number("PADDR_OFFSET", desc)?),
            5 => self.xen_version = Some(text("XEN_VERSION", desc)?),
            6 => self.guest_os = Some(text("GUEST_OS", desc)?),
            7 => self.guest_version = Some(text("GUEST_VERSION", desc)?),
            8 => self.loader = Some(text("LOADER", desc)?),
            9 => self.pae_mode = Some(text("PAE_MODE", desc)?),
            10 => self.features = Some(text("FEATURES", desc)?),
            11 => self.bsd_symtab = Some(text("BSD_SYMTAB", desc)? == "yes"),
            12 => self.hv_start_low = Some(number("HV_START_LOW", desc)?),
            13 => self.l1_mfn_valid = Some(number_pair("L1_MFN_VALID", desc)?),
            14 => self.suspend_cancel = Some(number("SUSPEND_CANCEL", desc)? != 0),
            15 => self.init_p2m = Some(number("INIT_P2M", desc)?),
            16 => self.mod_start_pfn = Some(number("MOD_START_PFN", desc)? != 0),
            17 => self.supported_features = Some(number("SUPPORTED_FEATURES", desc)?),
            PHYS32_ENTRY => {
                let entry = number("PHYS32_ENTRY", desc)?;
                self.phys32_entry = Some(u32::try_from(entry).map_err(|_| {
                    BootError::field("Xen note PHYS32_ENTRY", entry, "a physical address below 4 GiB")
                })?);
            }
            _ => {}
        }
        Ok(())
    }
}

fn place(name: &str) -> String {
    format!("Xen note {name}")
}

fn number(name: &str, desc: &[u8]) -> Result<u64, BootError> {
    if !matches!(desc.len(), 1 | 2 | 4 | 8) {
        let field = format!("Xen note {name}: n_descsz");
        return Err(BootError::field(field, desc.len() as u64, "1, 2, 4 or 8 for a number"));
    }
    let mut bytes = [0; 8];
    for (to, from) in bytes.iter_mut().zip(desc) {
        *to = *from;
    }
    Ok(u64::from_le_bytes(bytes))
}

/// Two numbers of 4 or of 8 bytes each.
fn number_pair(name: &str, desc: &[u8]) -> Result<(u64, u64), BootError> {
    match desc.split_at_checked(desc.len() / 2) {
        Some((mask, value)) if matches!(desc.len(), 8 | 16) => {
            Ok((number(name, mask)?, number(name, value)?))
        }
        _ => {
            let field = format!("Xen note {name}: n_descsz");
            Err(BootError::field(field, desc.len() as u64, "8 or 16 for a pair of numbers"))
        }
    }
}

fn text(name: &str, desc: &[u8]) -> Result<String, BootError> {
    let bytes = desc.split(|&byte| byte == 0).next().unwrap_or_default();
    match str::from_utf8(bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(error) => Err(BootError::note(
            place(name),
            format!("byte {} of the string is not UTF-8", error.valid_up_to()),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_may_have_any_power_of_two_size_up_to_eight() {
        let mut notes = XenNotes::default();
        notes.insert(1, &0xffff_ffff_8100_0000_u64.to_le_bytes()).unwrap();
        notes.insert(16, &1_u32.to_le_bytes()).unwrap();
        notes.insert(14, &[0]).unwrap();
        assert_eq!(notes.entry(), Some(0xffff_ffff_8100_0000));
        assert_eq!(notes.mod_start_pfn(), Some(true));
        assert_eq!(notes.suspend_cancel(), Some(false));
        assert!(notes.is_pv());
    }

    #[test]
    fn a_number_of_three_bytes_is_refused_by_name() {
        let error = XenNotes::default().insert(3, &[1, 2, 3]).unwrap_err().to_string();
        assert_eq!(error, "Xen note VIRT_BASE: n_descsz is 0x3; allowed: 1, 2, 4 or 8 for a number");
    }

    #[test]
    fn a_pvh_entry_above_four_gibibytes_is_refused() {
        let error = XenNotes::default().insert(18, &(1_u64 << 32).to_le_bytes()).unwrap_err();
        assert!(matches!(error, BootError::Field { value: 0x1_0000_0000, .. }), "{error}");
    }

    #[test]
    fn strings_end_at_their_nul_and_the_last_note_counts() {
        let mut notes = XenNotes::default();
        notes.insert(6, b"netbsd\0").unwrap();
        notes.insert(6, b"linux\0\0\0").unwrap();
        notes.insert(10, b"!writable_page_tables|pae_pgdir_above_4gb").unwrap();
        notes.insert(11, b"yes\0").unwrap();
        assert_eq!(notes.guest_os(), Some("linux"));
        assert_eq!(notes.features(), Some("!writable_page_tables|pae_pgdir_above_4gb"));
        assert_eq!(notes.bsd_symtab(), Some(true));
        assert!(notes.insert(8, &[0x67, 0xff, 0]).is_err());
    }

    #[test]
    fn a_pair_is_split_in_the_middle() {
        let mut notes = XenNotes::default();
        notes.insert(13, &[1, 0, 0, 0, 3, 0, 0, 0]).unwrap();
        assert_eq!(notes.l1_mfn_valid(), Some((1, 3)));
        assert!(notes.insert(13, &[0; 12]).is_err());
    }

    #[test]
    fn unknown_types_are_skipped() {
        let mut notes = XenNotes::default();
        notes.insert(0x1234, b"anything").unwrap();
        assert_eq!(notes, XenNotes::default());
    }
}

//! The backends that are compiled in, by name.

use crate::error::{Error, Result};
use crate::hypervisor::Hypervisor;

/// Names of the backends that are compiled in.
pub fn backend_names() -> &'static [&'static str] {
    &[
        #[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
        crate::kvm::NAME,
        #[cfg(feature = "translate")]
        crate::translate::NAME,
    ]
}

/// Opens a backend by name, so that a program can take the name from its command line.
///
/// # Errors
/// [`Error::UnknownBackend`] if none of that name is compiled in, else what the backend says.
pub fn open_backend(name: &str) -> Result<Box<dyn Hypervisor>> {
    match name {
        #[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
        crate::kvm::NAME => Ok(Box::new(crate::kvm::KvmHypervisor::open()?)),
        #[cfg(feature = "translate")]
        crate::translate::NAME => Ok(Box::new(crate::translate::TranslateHypervisor::new())),
        _ => Err(Error::UnknownBackend { name: name.to_owned(), available: backend_names().join(", ") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_name_lists_what_there_is() {
        let error = open_backend("bochs").unwrap_err().to_string();
        assert!(error.contains("\"bochs\""), "{error}");
        assert!(backend_names().iter().all(|name| error.contains(name)), "{error}");
    }
}

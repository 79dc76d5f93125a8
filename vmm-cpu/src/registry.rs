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
        #[cfg(all(feature = "xen-pv", feature = "translate"))]
        crate::xen_pv::NAME,
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
        #[cfg(all(feature = "xen-pv", feature = "translate"))]
        crate::xen_pv::NAME => Ok(Box::new(crate::xen_pv::XenPvHypervisor::new(paravirtual_engine())?)),
        _ => Err(Error::UnknownBackend { name: name.to_owned(), available: backend_names().join(", ") }),
    }
}

/// What executes paravirtual guests unless the caller chooses: hardware where there is some.
#[cfg(all(feature = "xen-pv", feature = "translate"))]
fn paravirtual_engine() -> std::sync::Arc<dyn Hypervisor> {
    #[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
    if let Ok(kvm) = crate::kvm::KvmHypervisor::open()
        && kvm.capabilities().hardware_assisted == Some(true)
    {
        return std::sync::Arc::new(kvm);
    }
    std::sync::Arc::new(crate::translate::TranslateHypervisor::new())
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

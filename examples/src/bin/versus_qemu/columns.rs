//! The columns: what runs the guests here.

use anyhow::{Result, bail};
use vmm_cpu::{Error, backend_names, open_backend};
use vmm_examples::race::{Machine, host_tsc_khz};

/// The column that the others are compared with.
pub(crate) const TCG: &str = "TCG";

/// The host itself.
pub(crate) const NATIVE: &str = "native";

/// Ours, by name: a backend, or a paravirtual guest's engine behind a slash.
const OURS: [&str; 4] = ["translate", "kvm", "xen-pv/kvm-shim", "xen-pv/translate"];

/// What runs here, and what does not.
#[derive(Debug, Default)]
pub(crate) struct Columns {
    /// The host, TCG and then ours.
    pub(crate) machines: Vec<Machine>,
    /// Names, and why they are left out.
    pub(crate) left_out: Vec<(String, String)>,
}

impl Columns {
    /// Those of these names, or all that there are.
    ///
    /// # Errors
    /// Fails on a name that is none.
    pub(crate) fn chosen(names: &[String]) -> Result<Self> {
        let mut columns = Self::default();
        // So that the guest need not measure it.
        let rate = host_tsc_khz().map(|khz| format!("tsc_early_khz={khz}"));
        columns.machines = vec![Machine::native(NATIVE), Machine::tcg(TCG, &rate.unwrap_or_default())];
        let all = OURS.map(str::to_owned);
        for name in if names.is_empty() { &all[..] } else { names } {
            let (backend, engine) = match name.split_once('/') {
                Some(("xen-pv", engine)) => ("xen-pv", Some(engine)),
                None if backend_names().contains(&&**name) && name != "xen-pv" => (&**name, None),
                _ => bail!(
                    "--backend: there is no {name:?}; there are {}, and what else `linux --engine` takes behind xen-pv/",
                    OURS.join(", ")
                ),
            };
            // With the in-guest fast path behind the name of the backend below.
            let below = engine.map_or(backend, |engine| engine.strip_suffix("-shim").unwrap_or(engine));
            if let Some(reason) = missing(below)? {
                columns.left_out.push((name.clone(), reason));
                continue;
            }
            let mut arguments = vec!["--backend", backend];
            arguments.extend(engine.iter().flat_map(|engine| ["--engine", engine]));
            columns.machines.push(Machine::ours(name, &arguments));
        }
        Ok(columns)
    }
}

/// Why there can be nothing on `backend` here.
fn missing(backend: &str) -> Result<Option<String>> {
    match open_backend(backend) {
        Ok(_) => Ok(None),
        Err(error @ Error::UnknownBackend { .. }) => bail!("--backend: {error}"),
        Err(error) => Ok(Some(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(text: &str) -> Result<Columns> {
        Columns::chosen(&text.split(',').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn a_column_is_a_backend_or_an_engine() {
        let columns = chosen("translate,xen-pv/translate-shim").unwrap();
        let names: Vec<&str> = columns.machines.iter().map(|machine| &*machine.name).collect();
        assert_eq!(names, [NATIVE, TCG, "translate", "xen-pv/translate-shim"]);
        let expected = Machine::ours(names[3], &["--backend", "xen-pv", "--engine", "translate-shim"]);
        assert_eq!(columns.machines[3], expected);
        for wrong in ["bochs", "xen-pv", "xen-pv/bochs", "hvm/kvm", ""] {
            assert!(chosen(wrong).unwrap_err().to_string().contains("--backend"), "{wrong}");
        }
    }

    #[test]
    fn what_is_there_runs_or_says_why_not() {
        let columns = Columns::chosen(&[]).unwrap();
        assert_eq!(columns.machines.len() + columns.left_out.len(), 2 + OURS.len());
        assert!(columns.left_out.iter().all(|(_, reason)| !reason.is_empty()), "{columns:?}");
        assert!(columns.machines.iter().any(|machine| machine.name == "translate"));
    }
}

//! CPU models as text: `host`, `x86-64-v2`, `x86-64-v3,+aes,-0x7.0.ebx.5`.

use std::fmt;
use std::str::FromStr;

use super::levels::Level;
use super::{CpuModel, CpuModelError, CpuidMask, CpuidRegister, Feature};

impl FromStr for CpuModel {
    type Err = CpuModelError;

    /// Reads a model's name, then any number of changes, separated by commas: `+` or `-` and the
    /// [name of a feature](Feature::name), or leaf, subleaf, register and bit with dots between them.
    /// There is no text for [`CpuModel::Exact`].
    fn from_str(text: &str) -> Result<Self, CpuModelError> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        let base = match name {
            "host" => Self::Host,
            "x86-64-v1" => Self::X86_64V1,
            "x86-64-v2" => Self::X86_64V2,
            "x86-64-v3" => Self::X86_64V3,
            "x86-64-v4" => Self::X86_64V4,
            _ => return Err(CpuModelError::UnknownModel { name: name.to_owned() }),
        };
        parts.try_fold(base, |model, change| {
            change_from_str(change)
                .map(|mask| model.masked(mask))
                .ok_or_else(|| CpuModelError::UnknownFeature { text: change.to_owned() })
        })
    }
}

fn change_from_str(text: &str) -> Option<CpuidMask> {
    let (add, name) = match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(name), _) => (true, name),
        (_, Some(name)) => (false, name),
        _ => return None,
    };
    let (leaf, subleaf, register, bits) = match Feature::from_name(name) {
        Some(feature) => (feature.leaf(), feature.subleaf(), feature.register(), feature.mask()),
        None => place_from_str(name)?,
    };
    let (clear, set) = if add { (0, bits) } else { (bits, 0) };
    Some(CpuidMask { leaf, subleaf, register, clear, set })
}

/// `leaf.subleaf.register.bit`
fn place_from_str(text: &str) -> Option<(u32, u32, CpuidRegister, u32)> {
    let mut parts = text.split('.');
    let leaf = number_from_str(parts.next()?)?;
    let subleaf = number_from_str(parts.next()?)?;
    let register = match parts.next()? {
        "eax" => CpuidRegister::Eax,
        "ebx" => CpuidRegister::Ebx,
        "ecx" => CpuidRegister::Ecx,
        "edx" => CpuidRegister::Edx,
        _ => return None,
    };
    let bits = 1_u32.checked_shl(number_from_str(parts.next()?)?)?;
    parts.next().is_none().then_some((leaf, subleaf, register, bits))
}

fn number_from_str(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

impl fmt::Display for CpuModel {
    /// Writes what [`CpuModel::from_str`] reads; [`CpuModel::Exact`] is written as `exact`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self {
            Self::Host => return f.write_str("host"),
            Self::Exact(_) => return f.write_str("exact"),
            Self::Custom(custom) => {
                write!(f, "{}", custom.base())?;
                return custom.masks().iter().try_for_each(|mask| write_change(f, mask));
            }
            Self::X86_64V1 => Level::V1,
            Self::X86_64V2 => Level::V2,
            Self::X86_64V3 => Level::V3,
            Self::X86_64V4 => Level::V4,
        };
        write!(f, "{level}")
    }
}

fn write_change(f: &mut fmt::Formatter<'_>, mask: &CpuidMask) -> fmt::Result {
    let CpuidMask { leaf, subleaf, register, .. } = *mask;
    for bit in 0..32_u8 {
        let value = 1_u32 << bit;
        let sign = match (mask.clear & value != 0, mask.set & value != 0) {
            (_, true) => '+',
            (true, false) => '-',
            (false, false) => continue,
        };
        match Feature::at(leaf, subleaf, register, bit) {
            Some(feature) => write!(f, ",{sign}{feature}")?,
            None => {
                let register = register.to_string().to_lowercase();
                write!(f, ",{sign}{leaf:#x}.{subleaf}.{register}.{bit}")?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips() {
        for text in [
            "host",
            "x86-64-v1",
            "x86-64-v2",
            "x86-64-v4,+aes,-sse4.1,+rdrand",
            "host,-0x7.0.ebx.12,+0x77.3.edx.31",
        ] {
            assert_eq!(text.parse::<CpuModel>().unwrap().to_string(), text);
        }
        let model: CpuModel = "x86-64-v3,-7.0.ebx.5".parse().unwrap();
        assert_eq!(model, CpuModel::X86_64V3.without_feature(Feature::AVX2));
        assert_eq!(model.to_string(), "x86-64-v3,-avx2");
        assert_eq!(CpuModel::Exact(crate::CpuidTable::default()).to_string(), "exact");
    }

    #[test]
    fn several_bits_of_a_mask_are_written_one_by_one() {
        let model = CpuModel::Host.masked(CpuidMask {
            leaf: 1,
            subleaf: 0,
            register: CpuidRegister::Ecx,
            clear: 0b11,
            set: 0b1_0000_0000_0001,
        });
        assert_eq!(model.to_string(), "host,+sse3,-pclmulqdq,+fma");
    }

    #[test]
    fn wrong_text_is_named() {
        for name in ["", "qemu64", "Host", "exact", "x86-64-v5", "x86-64"] {
            let error = name.parse::<CpuModel>().unwrap_err();
            assert_eq!(error, CpuModelError::UnknownModel { name: name.to_owned() });
        }
        for change in [
            "",
            "aes",
            "+",
            "+aes2",
            "~aes",
            "-0x7.0.ebx.32",
            "-0x7.0.ebp.1",
            "+7.0.ebx",
            "+7.0.ebx.1.1",
            "-7..ebx.1",
        ] {
            let error = format!("host,+aes,{change}").parse::<CpuModel>().unwrap_err();
            assert_eq!(error, CpuModelError::UnknownFeature { text: change.to_owned() });
        }
    }
}

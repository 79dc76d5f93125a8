//! Whether this host can be compared with.
#![allow(unsafe_code, reason = "asks the C library")]

use std::arch::x86_64::__cpuid;

/// HWCAP2_FSGSBASE of Linux: programs may use WRFSBASE.
const FSGSBASE: libc::c_ulong = 1 << 1;

/// Why it cannot.
pub(crate) fn problem() -> Option<String> {
    let vendor = __cpuid(0);
    // The interpreter does as AMD's processors where the manuals leave a choice.
    if (vendor.ebx, vendor.edx, vendor.ecx) != (0x6874_7541, 0x6974_6e65, 0x444d_4163) {
        return Some("the processor is not AMD's, as the interpreter's CPUID says that it is".to_owned());
    }
    // SAFETY: it only reads what the kernel told the program.
    if unsafe { libc::getauxval(libc::AT_HWCAP2) } & FSGSBASE == 0 {
        return Some("the kernel does not let programs use WRFSBASE: Linux 5.9 or later does".to_owned());
    }
    macro_rules! missing {
        ($($feature:tt)*) => {
            [$(($feature, std::arch::is_x86_feature_detected!($feature)),)*]
        };
    }
    let features = missing!(
        "adx" "aes" "bmi1" "bmi2" "lzcnt" "movbe" "pclmulqdq" "popcnt" "sha" "sse3" "sse4.1" "sse4.2" "ssse3"
    );
    let missing = features.into_iter().find(|(_, is_there)| !is_there);
    missing.map(|(feature, _)| format!("the processor has no {feature}, which the interpreter offers"))
}

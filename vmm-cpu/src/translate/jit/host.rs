//! What this host's processor can execute of what guests are offered.

use std::is_x86_feature_detected as has;
use std::sync::LazyLock;

use iced_x86::CpuidFeature;

/// Whether the host executes instructions of `feature` as the interpreter does.
pub(super) fn host_has(feature: CpuidFeature) -> bool {
    static HOST: LazyLock<Host> = LazyLock::new(Host::detect);
    use CpuidFeature as F;
    match feature {
        F::INTEL8086 | F::INTEL386 | F::INTEL486 | F::X64 | F::CMOV | F::SSE | F::SSE2 => true,
        F::SSE3 => HOST.sse3,
        F::SSSE3 => HOST.ssse3,
        F::SSE4_1 => HOST.sse41,
        F::SSE4_2 => HOST.sse42,
        F::POPCNT => HOST.popcnt,
        F::LZCNT => HOST.lzcnt,
        F::BMI1 => HOST.bmi1,
        F::BMI2 => HOST.bmi2,
        F::MOVBE => HOST.movbe,
        F::ADX => HOST.adx,
        F::AES => HOST.aes,
        F::PCLMULQDQ => HOST.pclmulqdq,
        F::SHA => HOST.sha,
        _ => false,
    }
}

#[allow(clippy::struct_excessive_bools, reason = "one a feature")]
struct Host {
    sse3: bool,
    ssse3: bool,
    sse41: bool,
    sse42: bool,
    popcnt: bool,
    lzcnt: bool,
    bmi1: bool,
    bmi2: bool,
    movbe: bool,
    adx: bool,
    aes: bool,
    pclmulqdq: bool,
    sha: bool,
}

impl Host {
    fn detect() -> Self {
        Self {
            sse3: has!("sse3"),
            ssse3: has!("ssse3"),
            sse41: has!("sse4.1"),
            sse42: has!("sse4.2"),
            popcnt: has!("popcnt"),
            lzcnt: has!("lzcnt"),
            bmi1: has!("bmi1"),
            bmi2: has!("bmi2"),
            movbe: has!("movbe"),
            adx: has!("adx"),
            aes: has!("aes"),
            pclmulqdq: has!("pclmulqdq"),
            sha: has!("sha"),
        }
    }
}

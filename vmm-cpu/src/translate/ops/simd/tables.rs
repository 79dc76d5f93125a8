//! The operations by mnemonic, looked up once for the process.

use std::sync::LazyLock;

use iced_x86::Mnemonic;

use crate::translate::float::{FloatOp, float_op};
use crate::translate::vector::{VectorOp, xmm_op};

/// The operations on XMM registers.
#[derive(Debug)]
pub(crate) struct Tables {
    xmm: Vec<Option<VectorOp>>,
    float: Vec<Option<FloatOp>>,
}

static TABLES: LazyLock<Tables> = LazyLock::new(|| Tables {
    xmm: Mnemonic::values().map(xmm_op).collect(),
    float: Mnemonic::values().map(float_op).collect(),
});

impl Tables {
    pub(crate) fn get() -> &'static Self {
        &TABLES
    }

    #[inline(always)]
    pub(crate) fn xmm(&self, mnemonic: usize) -> Option<VectorOp> {
        self.xmm.get(mnemonic).copied().flatten()
    }

    #[inline(always)]
    pub(crate) fn float(&self, mnemonic: usize) -> Option<FloatOp> {
        self.float.get(mnemonic).copied().flatten()
    }
}

//! Error numbers of hypercalls (public/errno.h).

/// An error that a hypercall answers: its negative goes to RAX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub u16);

#[allow(missing_docs, reason = "each constant is the error of its name")]
impl Errno {
    pub const EPERM: Self = Self(1);
    pub const ENOENT: Self = Self(2);
    pub const ESRCH: Self = Self(3);
    pub const E2BIG: Self = Self(7);
    pub const EAGAIN: Self = Self(11);
    pub const ENOMEM: Self = Self(12);
    pub const EACCES: Self = Self(13);
    pub const EFAULT: Self = Self(14);
    pub const EBUSY: Self = Self(16);
    pub const EEXIST: Self = Self(17);
    pub const ENODEV: Self = Self(19);
    pub const EINVAL: Self = Self(22);
    pub const ENOSPC: Self = Self(28);
    pub const ENOSYS: Self = Self(38);
    pub const ETIME: Self = Self(62);
    pub const EOPNOTSUPP: Self = Self(95);

    /// What RAX becomes.
    pub fn value(self) -> u64 {
        (-i64::from(self.0)).cast_unsigned()
    }
}

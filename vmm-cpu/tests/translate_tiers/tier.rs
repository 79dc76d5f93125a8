//! What executes guests, and tests that all of it comes to the same.

use std::fmt::Debug;

use vmm_cpu::ClockSource;
use vmm_cpu::translate::AddressWindow;

/// What executes the guest.
#[derive(Clone, Copy, Debug)]
pub struct Tier {
    pub translate_after: Option<u32>,
    pub clock: ClockSource,
    pub window: AddressWindow,
    /// The guest begins at privilege level 3.
    pub user: bool,
}

impl Tier {
    pub const INTERPRETED: Self = Self {
        translate_after: None,
        clock: ClockSource::Deterministic,
        window: AddressWindow::Never,
        user: false,
    };
    /// Translated code that counts instructions.
    pub const COUNTED: Self = Self { translate_after: Some(0), ..Self::INTERPRETED };
    /// Translated code in host time.
    pub const FREE: Self = Self { clock: ClockSource::Host, ..Self::COUNTED };
    /// The same, whose memory accesses at privilege level 3 go through the address window.
    pub const WINDOW: Self = Self { window: AddressWindow::Always, ..Self::FREE };

    /// The same for a guest that begins at privilege level 3, if `user`.
    pub fn at(self, user: bool) -> Self {
        Self { user, ..self }
    }
}

/// Runs `test` on each tier, with guests at privilege level 0, which must come to the same, and returns that.
pub fn on_each_tier<T: PartialEq + Debug>(test: impl Fn(Tier) -> T) -> T {
    on_each_tier_at(false, test)
}

/// The same at privilege level 3, if `user`.
pub fn on_each_tier_at<T: PartialEq + Debug>(user: bool, test: impl Fn(Tier) -> T) -> T {
    let expected = test(Tier::INTERPRETED.at(user));
    for tier in [Tier::COUNTED, Tier::FREE, Tier::WINDOW] {
        if tier.window == AddressWindow::Always && !user {
            continue;
        }
        let result = test(tier.at(user));
        assert!(result == expected, "{tier:?}, {user}: {result:#x?}\ninterpreted: {expected:#x?}");
    }
    expected
}

/// The same at both levels, which come to the same as well: HLT ends all guests.
pub fn on_each_tier_and_level<T: PartialEq + Debug>(test: impl Fn(Tier) -> T) -> T {
    let [kernel, user] = [false, true].map(|user| on_each_tier_at(user, &test));
    assert!(kernel == user, "at privilege level 0: {kernel:#x?}\nat level 3: {user:#x?}");
    kernel
}

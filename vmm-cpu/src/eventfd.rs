//! Eventfds that others have made, as notifiers.

#![allow(unsafe_code, reason = "vmm-sys-util has no safe way from an owned descriptor to its EventFd")]

use std::os::fd::{FromRawFd as _, IntoRawFd as _, OwnedFd};

use vmm_sys_util::eventfd::EventFd;

use crate::vm::Notifier;

impl From<OwnedFd> for Notifier {
    /// Takes over an eventfd, which should be non-blocking: what the virtio transports of `vmm-devices` give for a doorbell.
    /// With another descriptor, whatever the notifier is used for is an error.
    fn from(event_fd: OwnedFd) -> Self {
        // SAFETY: the descriptor is open, and nobody owns it any more.
        Self::from(unsafe { EventFd::from_raw_fd(event_fd.into_raw_fd()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_same_eventfd() {
        let ours = Notifier::new().unwrap();
        // SAFETY: the descriptor is open, and nobody owns it any more.
        let owned = unsafe { OwnedFd::from_raw_fd(ours.event_fd().try_clone().unwrap().into_raw_fd()) };
        let theirs = Notifier::from(owned);
        theirs.notify().unwrap();
        assert_eq!(ours.take().unwrap(), 1);
        drop(theirs);
        ours.notify().unwrap();
        assert_eq!(ours.take().unwrap(), 1, "a descriptor of its own");
    }
}

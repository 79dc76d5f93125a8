//! Channels: whatever a virtual machine reaches beside its own memory and devices. Other virtual machines, programs of the host,
//! networks. None opens without a [`Grant`], which only a [`Gatekeeper`] hands out, after it has asked a [`Gate`].
//!
//! | part | what |
//! |---|---|
//! | [`Request`] | who wants what of whom: [`Party`], [`Object`], [`Action`] |
//! | [`Gate`] | decides; the monitor's policy implements it. [`DenyAll`] is what there is without one |
//! | [`Gatekeeper`] | asks the gate, keeps account of what is open, and closes what lost its right |
//! | [`Grant`] | the right to one channel, of one type; a device that has a channel holds it as long as the channel is open |
//!
//! A function that opens a channel takes the grant for it by value, so that a monitor which forgets to ask does not compile. The
//! grant's type says what for: one for [`VsockConnect`] opens no [`RegionMap`].
//!
//! # Revocation
//! [`Gatekeeper::revoke`] takes a right back while the guest runs. From then on [`Grant::is_live`] is false, which the holder looks
//! at before each use, and the holder's [`on_revoked`](Grant::on_revoked) is called: it stops the channel, takes it out of the
//! guest's reach and closes it, in that order, and drops the grant at the end. [`Gatekeeper::reconsider`] asks the gate again about
//! everything that is open, and revokes what it now refuses; a request that is decided meanwhile is decided again.
//!
//! # Threat model
//! Guests choose which channels they ask for, and when (vsock connects); what they name reaches the gate as plain numbers. The
//! gate and the holder of the gatekeeper are the monitor's own.
//!
//! ```
//! use vmm_devices::channel::{Gatekeeper, Party, Refusal, Request, VmIdentity, VsockConnect};
//!
//! let (web, db) = (Party::Vm(VmIdentity::new(1, 1)), Party::Vm(VmIdentity::new(2, 1)));
//! let gatekeeper = Gatekeeper::new(|request: &Request| match request.object() {
//!     object if object.port() == Some(5432) => Ok(()),
//!     _ => Err(Refusal::new("nothing but the database's port")),
//! });
//! let grant = gatekeeper.open(web.clone(), Some(db.clone()), VsockConnect { port: 5432 })?;
//! assert!(grant.is_live());
//! assert!(gatekeeper.open(web, Some(db), VsockConnect { port: 22 }).is_err());
//! gatekeeper.revoke(grant.id());
//! assert!(!grant.is_live());
//! # Ok::<(), Refusal>(())
//! ```

mod gate;
mod grant;
mod keeper;
mod request;
#[cfg(test)]
mod tests;

pub use gate::{AllowAll, DenyAll, Gate, Refusal};
pub use grant::{Grant, GrantId, Watch};
pub use keeper::{ClosedChannel, Gatekeeper, OpenChannel};
pub use request::{
    Action, Channel, DoorbellRing, NetworkAttach, Object, Party, RegionMap, Request, VmIdentity,
    VsockConnect, VsockListen,
};

//! The devices' words in the policy's.

use vmm_devices::channel::{self, Request};
use vmm_devices::net::switch::flows::FlowKind;
use vmm_policy::{Action, Object};

/// What a device asks for. `None` for what this adapter does not know, which is refused.
pub(super) fn asked(request: &Request) -> Option<(Action, Object<'_>)> {
    let object = match request.object() {
        channel::Object::Vsock { port } => Object::vsock(*port),
        channel::Object::Network { name } => Object::network(name),
        channel::Object::Region { name } => Object::region(name),
        channel::Object::Doorbell { region } => Object::doorbell(region),
        _ => return None,
    };
    let action = match request.action() {
        channel::Action::Connect => Action::Connect,
        channel::Action::Accept => Action::Accept,
        channel::Action::Attach => Action::Attach,
        channel::Action::MapReadOnly => Action::MapRo,
        channel::Action::MapReadWrite => Action::MapRw,
        channel::Action::Notify => Action::Notify,
        _ => return None,
    };
    Some((action, object))
}

/// What a flow is about.
pub(super) fn flow(kind: FlowKind) -> Option<(Action, Object<'static>)> {
    Some(match kind {
        FlowKind::Tcp { port } => (Action::Connect, Object::tcp(port)),
        FlowKind::Udp { port } => (Action::Send, Object::udp(port)),
        FlowKind::Icmp { kind } => (Action::Send, Object::icmp(kind)),
        FlowKind::Ip { protocol } => (Action::Send, Object::ip(protocol)),
        FlowKind::Ethernet { ether_type } => (Action::Send, Object::ethernet(ether_type)),
        _ => return None,
    })
}

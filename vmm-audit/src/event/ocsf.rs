//! Events as the Open Cybersecurity Schema Framework has them (OCSF 1.3), for what collects from many products.

use serde_json::{Map, Value, json};

use super::{Action, Event, Kind, ObjectClass, Outcome, Party, Verdict, VmId};

/// Which class of the schema, and what activity of it.
fn class(event: &Event) -> (u32, &'static str, u32, &'static str, u32) {
    match event.kind {
        Kind::Misbehaviour | Kind::EmulationFailure | Kind::Malformed | Kind::StorageFault => {
            (2, "Findings", 2004, "Detection Finding", 1)
        }
        Kind::Administration
        | Kind::PolicyLoaded
        | Kind::LogOpened
        | Kind::LogClosed
        | Kind::Retention
        | Kind::Recovery => (6, "Application Activity", 6003, "API Activity", activity_of_api(event)),
        Kind::Decision | Kind::Revoked if !is_network(event) => {
            (3, "Identity & Access Management", 3003, "Authorize Session", 1)
        }
        _ if is_network(event) => {
            (4, "Network Activity", 4001, "Network Activity", activity_of_network(event))
        }
        _ => (6, "Application Activity", 6003, "API Activity", activity_of_api(event)),
    }
}

fn is_network(event: &Event) -> bool {
    event
        .object
        .as_ref()
        .is_some_and(|object| matches!(object.class, ObjectClass::Vsock | ObjectClass::Network))
}

/// 1 create, 2 read, 3 update, 4 delete, 99 other.
fn activity_of_api(event: &Event) -> u32 {
    match (event.kind, event.action) {
        (Kind::Launch | Kind::Opened, _) | (_, Some(Action::Create)) => 1,
        (_, Some(Action::Read | Action::MapReadOnly | Action::Export)) => 2,
        (Kind::PolicyLoaded | Kind::Reset, _)
        | (_, Some(Action::Write | Action::Attach | Action::Delegate)) => 3,
        (Kind::Shutdown | Kind::Closed | Kind::Revoked | Kind::Retention, _) => 4,
        _ => 99,
    }
}

/// 1 open, 2 close, 4 fail, 5 refuse, 6 traffic.
fn activity_of_network(event: &Event) -> u32 {
    match (event.kind, event.verdict) {
        (_, Some(Verdict::Deny)) => 5,
        (Kind::Traffic | Kind::Coalesced, _) => 6,
        (Kind::Closed | Kind::Revoked, _) => 2,
        _ if event.outcome == Some(Outcome::Failed) => 4,
        _ => 1,
    }
}

fn endpoint(party: &Party) -> Value {
    match party {
        Party::Vm(VmId { uuid, incarnation }) => json!({
            "uid": super::Uuid(*uuid).to_string(), "instance_uid": incarnation.to_string(), "type": "Virtual", "type_id": 6,
        }),
        Party::Host(name) => json!({ "name": name, "type": "Server", "type_id": 1 }),
    }
}

/// 1 success, 2 failure, 0 unknown.
fn status(event: &Event) -> u32 {
    match (event.outcome, event.verdict) {
        (Some(Outcome::Success), _) | (None, Some(Verdict::Allow)) => 1,
        (Some(_), _) | (None, Some(_)) => 2,
        (None, None) => 0,
    }
}

/// 1 informational, 2 low, 3 medium, 4 high.
fn severity(event: &Event) -> u32 {
    match (event.kind, event.verdict) {
        (Kind::Malformed | Kind::StorageFault, _) | (_, Some(Verdict::Quarantine)) => 4,
        (Kind::Misbehaviour | Kind::EmulationFailure | Kind::Revoked | Kind::Recovery, _) => 3,
        (_, Some(Verdict::Deny)) => 2,
        _ => 1,
    }
}

/// The event as an object of OCSF: API Activity (6003), Network Activity (4001), Authorize Session (3003) or Detection
/// Finding (2004). What the schema has no place for is under `unmapped`, so that nothing is lost.
pub fn to_ocsf(event: &Event, seq: u64, source: u32) -> Value {
    let (category, category_name, class, class_name, activity) = class(event);
    let mut out = Map::new();
    let mut put = |name: &str, value: Value| drop(out.insert(name.to_owned(), value));
    put("category_uid", category.into());
    put("category_name", category_name.into());
    put("class_uid", class.into());
    put("class_name", class_name.into());
    put("activity_id", activity.into());
    put("type_uid", (class * 100 + activity).into());
    put("time", (event.wall / 1_000_000).into());
    put("severity_id", severity(event).into());
    put("status_id", status(event).into());
    put(
        "metadata",
        json!({
            "version": "1.3.0", "uid": seq.to_string(), "sequence": seq, "log_name": "vmm-audit",
            "product": { "name": "vmm-audit", "vendor_name": "vmm-audit", "version": env!("CARGO_PKG_VERSION") },
        }),
    );
    if let Some(reason) = &event.reason {
        put("message", json!(reason));
    }
    if let Some(verdict) = event.verdict {
        let (id, name) = match verdict {
            Verdict::Allow | Verdict::Throttle => (1, "Allowed"),
            Verdict::Deny | Verdict::Quarantine => (2, "Denied"),
            _ => (99, "Other"),
        };
        put("action_id", id.into());
        put("action", name.into());
    }
    if let Some(rule) = &event.rule {
        put("policy", json!({ "name": rule, "uid": event.policy, "is_applied": true }));
    }
    for (name, party) in [("src_endpoint", &event.subject), ("dst_endpoint", &event.peer)] {
        if let Some(party) = party {
            let mut value = endpoint(party);
            if let (Some(map), Some(object), "dst_endpoint") = (value.as_object_mut(), &event.object, name)
                && object.class == ObjectClass::Vsock
                && let Some(port) = object.number
            {
                map.insert("port".to_owned(), port.into());
            }
            put(name, value);
        }
    }
    if class == 6003 {
        // Of a management verb its name says more than that it is one.
        let verb = event.object.as_ref().filter(|object| object.class == ObjectClass::Verb);
        let verb = verb.and_then(|object| object.name.as_ref()).map(ToString::to_string);
        let action = || event.action.map_or_else(|| event.kind.to_string(), |action| action.to_string());
        let operation = verb.unwrap_or_else(action);
        put("api", json!({ "operation": operation, "service": { "name": "vmm" } }));
        put("actor", json!({ "app_name": event.subject.as_ref().map(ToString::to_string) }));
    }
    if class == 2004 {
        put("finding_info", json!({ "uid": seq.to_string(), "title": event.kind, "desc": event.reason }));
    }
    if event.count != 0 {
        put("count", event.count.into());
    }
    put("unmapped", json!({ "source": source, "event": event }));
    Value::Object(out)
}

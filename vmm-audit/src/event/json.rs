//! Events as JSON. The names are those of the field dictionary.

use std::time::{Duration, SystemTime};

use serde::de::Error as _;
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Action, Event, Kind, Measured, Object, Outcome, Party, Text, Uuid, Verdict, parse_uuid};
use crate::digest::Digest;

/// Nanoseconds since 1970 as RFC 3339, in UTC, with nine digits of a second. The last moment that it can write is the end of 9999.
pub(crate) fn rfc3339(nanoseconds: u64) -> String {
    let time = SystemTime::UNIX_EPOCH + Duration::from_nanos(nanoseconds);
    humantime::format_rfc3339_nanos(time).to_string()
}

fn from_rfc3339(text: &str) -> Option<u64> {
    let time = humantime::parse_rfc3339(text).ok()?;
    u64::try_from(time.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_nanos()).ok()
}

/// A list of pairs as an object.
struct Pairs<'a, V>(&'a [(Text, V)]);

impl<V: Serialize> Serialize for Pairs<'_, V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

impl Serialize for Event {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("kind", &self.kind)?;
        let mut some = |name: &'static str, value: Option<&dyn erased::Json>| match value {
            Some(value) => map.serialize_entry(name, &erased::Ref(value)),
            None => Ok(()),
        };
        fn number(value: &u64) -> Option<&dyn erased::Json> {
            (*value != 0).then_some(value as &dyn erased::Json)
        }
        fn opt<T: erased::Json>(value: &Option<T>) -> Option<&dyn erased::Json> {
            value.as_ref().map(|value| value as &dyn erased::Json)
        }
        some("action", opt(&self.action))?;
        some("verdict", opt(&self.verdict))?;
        some("outcome", opt(&self.outcome))?;
        some("monotonic", Some(&self.monotonic))?;
        some("wall", Some(&rfc3339(self.wall)))?;
        some("source_seq", number(&self.source_seq))?;
        some("subject", opt(&self.subject))?;
        some("peer", opt(&self.peer))?;
        some("object", opt(&self.object))?;
        some("rule", opt(&self.rule))?;
        some("rule_line", number(&self.rule_line.into()))?;
        some("policy", opt(&self.policy))?;
        some("request", opt(&self.request))?;
        some("reason", opt(&self.reason))?;
        some("count", number(&self.count))?;
        some("bytes", number(&self.bytes))?;
        some("lost", number(&self.lost))?;
        some("boot", opt(&self.boot.map(|boot| Uuid(boot).to_string())))?;
        some("launch_digest", opt(&self.launch_digest))?;
        if !self.measured.is_empty() {
            let pairs: Vec<_> = self.measured.iter().map(|m| (m.name.clone(), m.digest)).collect();
            map.serialize_entry("measured", &Pairs(&pairs))?;
        }
        if !self.attributes.is_empty() {
            map.serialize_entry("attributes", &Pairs(&self.attributes))?;
        }
        if !self.unknown.is_empty() {
            map.serialize_entry("unknown", &self.unknown)?;
        }
        map.end()
    }
}

/// A value that is to become JSON, whatever its type.
mod erased {
    use serde::{Serialize, Serializer};

    pub(super) trait Json {
        fn value(&self) -> serde_json::Result<serde_json::Value>;
    }

    impl<T: Serialize> Json for T {
        fn value(&self) -> serde_json::Result<serde_json::Value> {
            serde_json::to_value(self)
        }
    }

    pub(super) struct Ref<'a>(pub(super) &'a dyn Json);

    impl Serialize for Ref<'_> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            self.0.value().map_err(serde::ser::Error::custom)?.serialize(serializer)
        }
    }
}

/// A JSON object whose order and repetitions count.
struct Ordered<V>(Vec<(Text, V)>);

impl<V> Default for Ordered<V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Ordered<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> serde::de::Visitor<'de> for Visitor<V> {
            type Value = Ordered<V>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Ordered(pairs))
            }
        }
        deserializer.deserialize_map(Visitor(std::marker::PhantomData))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Form {
    kind: Kind,
    action: Option<Action>,
    verdict: Option<Verdict>,
    outcome: Option<Outcome>,
    #[serde(default)]
    monotonic: u64,
    wall: Option<String>,
    #[serde(default)]
    source_seq: u64,
    subject: Option<Party>,
    peer: Option<Party>,
    object: Option<Object>,
    rule: Option<Text>,
    #[serde(default)]
    rule_line: u32,
    policy: Option<Digest>,
    request: Option<Digest>,
    reason: Option<Text>,
    #[serde(default)]
    count: u64,
    #[serde(default)]
    bytes: u64,
    #[serde(default)]
    lost: u64,
    boot: Option<String>,
    launch_digest: Option<Digest>,
    #[serde(default)]
    measured: Ordered<Digest>,
    #[serde(default)]
    attributes: Ordered<Text>,
    #[serde(default)]
    unknown: Vec<u32>,
}

impl<'de> Deserialize<'de> for Event {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let form = Form::deserialize(deserializer)?;
        let wall = form.wall.map_or(Ok(0), |wall| {
            from_rfc3339(&wall)
                .ok_or_else(|| D::Error::custom(format!("wall {wall:?}: RFC 3339, 1970 to 2554")))
        });
        let boot = form.boot.map(|boot| {
            parse_uuid(&boot)
                .ok_or_else(|| D::Error::custom(format!("boot {boot:?}: a UUID of 36 characters")))
        });
        Ok(Self {
            kind: form.kind,
            action: form.action,
            verdict: form.verdict,
            outcome: form.outcome,
            monotonic: form.monotonic,
            wall: wall?,
            source_seq: form.source_seq,
            subject: form.subject,
            peer: form.peer,
            object: form.object,
            rule: form.rule,
            rule_line: form.rule_line,
            policy: form.policy,
            request: form.request,
            reason: form.reason,
            count: form.count,
            bytes: form.bytes,
            lost: form.lost,
            boot: boot.transpose()?,
            launch_digest: form.launch_digest,
            measured: form.measured.0.into_iter().map(|(name, digest)| Measured { name, digest }).collect(),
            attributes: form.attributes.0,
            unknown: form.unknown,
        })
    }
}

//! Text of bounded length.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::digest::Digest;

/// A name or reason in an event, of at most [`Text::MAX`] bytes. A clone is a counter's increment.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Text(Arc<str>);

impl Text {
    /// Bytes of UTF-8 at most.
    pub const MAX: usize = 200;

    /// `text`, if it is not too long. Else its beginning, with `…` and the first half of its SHA-256 behind it, so that it is seen
    /// to be shortened and can be told from others that begin like it.
    pub fn new(text: &str) -> Self {
        if text.len() <= Self::MAX {
            return Self(text.into());
        }
        let digest = Digest::of(text.as_bytes()).to_string();
        let digest = digest.get(..32).unwrap_or_default();
        let room = Self::MAX - digest.len() - "…#".len();
        let kept = text.get(..text.floor_char_boundary(room)).unwrap_or_default();
        Self(format!("{kept}…#{digest}").into())
    }

    /// As a string.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self::new(&text)
    }
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_is_seen_to_be() {
        let long = "ä".repeat(300);
        let text = Text::new(&long);
        assert!(text.as_str().len() <= Text::MAX);
        assert!(text.as_str().contains("…#"));
        assert_ne!(text, Text::new(&format!("{long}.")));
        assert_eq!(Text::new(text.as_str()), text);
        assert_eq!(Text::new("short").as_str(), "short");
    }
}

//! Signed notes (C2SP signed-note) with Ed25519 keys: text that a person reads, and signatures over it.

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE64;
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use zeroize::Zeroizing;

use crate::digest::Digest;

/// Bytes of a note at most.
pub const MAX_NOTE: usize = 16384;
/// The signature type of Ed25519.
const ED25519: u8 = 1;

/// What is wrong with a note or a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoteError {
    /// It does not have the form of a note.
    #[error("not a signed note: {0}")]
    Form(&'static str),
    /// Nobody who is trusted has signed it.
    #[error("not signed by {0}")]
    Unsigned(String),
    /// The signature of a trusted key is wrong.
    #[error("the signature of {0} does not fit the text")]
    Signature(String),
    /// Not a verifier key.
    #[error("a verifier key is NAME+HASH+BASE64, this is {0:?}: {1}")]
    Key(String, &'static str),
    /// Not a name of a key.
    #[error("the name of a key has no spaces, control characters or plus, and is not empty: {0:?}")]
    Name(String),
}

fn check_name(name: &str) -> Result<(), NoteError> {
    let bad = |c: char| c.is_whitespace() || c.is_control() || c == '+';
    if name.is_empty() || name.len() > 200 || name.contains(bad) {
        return Err(NoteError::Name(name.chars().take(200).collect()));
    }
    Ok(())
}

/// A public key and its name. As text it is `NAME+HASH+BASE64`, as Go's `note` package and the tools around it write it.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier {
    name: String,
    id: [u8; 4],
    key: VerifyingKey,
}

impl Verifier {
    fn new(name: &str, key: VerifyingKey) -> Result<Self, NoteError> {
        check_name(name)?;
        let hash = Digest::of_parts(&[name.as_bytes(), b"\n", &[ED25519], key.as_bytes()]);
        let [a, b, c, d, ..] = *hash.as_bytes();
        Ok(Self { name: name.to_owned(), id: [a, b, c, d], key })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Checks that `note` is signed by this key, and returns its text. Signatures of others are of no account.
    ///
    /// # Errors
    /// If it is not.
    pub fn open<'a>(&self, note: &'a [u8]) -> Result<&'a str, NoteError> {
        let parsed = Note::parse(note)?;
        let mut signed = false;
        for (name, id, signature) in &parsed.signatures {
            if *name != self.name || *id != self.id {
                continue;
            }
            let signature =
                Signature::from_slice(signature).map_err(|_| NoteError::Signature(self.to_string()))?;
            let verified = self.key.verify_strict(parsed.text.as_bytes(), &signature);
            verified.map_err(|_| NoteError::Signature(self.to_string()))?;
            signed = true;
        }
        if signed { Ok(parsed.text) } else { Err(NoteError::Unsigned(self.to_string())) }
    }
}

impl fmt::Display for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut key = vec![ED25519];
        key.extend_from_slice(self.key.as_bytes());
        write!(f, "{}+{}+{}", self.name, data_encoding::HEXLOWER.encode(&self.id), BASE64.encode(&key))
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for Verifier {
    type Err = NoteError;

    fn from_str(text: &str) -> Result<Self, NoteError> {
        let error = |why| NoteError::Key(text.chars().take(200).collect(), why);
        let mut parts = text.trim_end_matches('\n').splitn(3, '+');
        let (Some(name), Some(hash), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(error("fewer than two plus signs"));
        };
        let key = BASE64.decode(key.as_bytes()).map_err(|_| error("the key is not base64"))?;
        let Some((&ED25519, key)) = key.split_first() else { return Err(error("not an Ed25519 key")) };
        let key = key.try_into().map_err(|_| error("an Ed25519 key has 32 bytes"))?;
        let key = VerifyingKey::from_bytes(key).map_err(|_| error("not a point of the curve"))?;
        let verifier = Self::new(name, key)?;
        if data_encoding::HEXLOWER.encode(&verifier.id) == hash {
            Ok(verifier)
        } else {
            Err(error("the hash is not that of name and key"))
        }
    }
}

/// A secret key and its name. The secret is zeroed when this is dropped.
pub struct Signer {
    key: SigningKey,
    verifier: Verifier,
}

impl Signer {
    /// A new one, of the system's randomness.
    ///
    /// # Errors
    /// If the name cannot be one, or the system gives no randomness.
    pub fn generate(name: &str) -> Result<Self, NoteError> {
        let mut seed = Zeroizing::new([0u8; 32]);
        getrandom::fill(seed.as_mut_slice())
            .map_err(|_| NoteError::Form("the system gives no randomness"))?;
        Self::from_seed(name, &seed)
    }

    /// Of the 32 bytes of an Ed25519 secret key (RFC 8032, 5.1.5).
    ///
    /// # Errors
    /// If the name cannot be one.
    pub fn from_seed(name: &str, seed: &[u8; 32]) -> Result<Self, NoteError> {
        let key = SigningKey::from_bytes(seed);
        let verifier = Verifier::new(name, key.verifying_key())?;
        Ok(Self { key, verifier })
    }

    pub(crate) fn seed(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.key.to_bytes())
    }

    /// Its public half.
    pub fn verifier(&self) -> &Verifier {
        &self.verifier
    }

    /// The note with `text`, signed.
    ///
    /// # Errors
    /// If the text does not end in a newline, or has control characters.
    pub fn sign(&self, text: &str) -> Result<String, NoteError> {
        check_text(text)?;
        let mut signature = self.verifier.id.to_vec();
        signature.extend_from_slice(&self.key.sign(text.as_bytes()).to_bytes());
        Ok(format!("{text}\n— {} {}\n", self.verifier.name, BASE64.encode(&signature)))
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("verifier", &self.verifier).finish_non_exhaustive()
    }
}

fn check_text(text: &str) -> Result<(), NoteError> {
    if !text.ends_with('\n') {
        return Err(NoteError::Form("the text does not end in a newline"));
    }
    if text.bytes().any(|b| b < 0x20 && b != b'\n') {
        return Err(NoteError::Form("control characters"));
    }
    Ok(())
}

/// A note whose signatures nobody has checked.
struct Note<'a> {
    text: &'a str,
    /// Name, key ID and signature of each.
    signatures: Vec<(&'a str, [u8; 4], Vec<u8>)>,
}

impl<'a> Note<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, NoteError> {
        if bytes.len() > MAX_NOTE {
            return Err(NoteError::Form("longer than 16384 bytes"));
        }
        let note = std::str::from_utf8(bytes).map_err(|_| NoteError::Form("not UTF-8"))?;
        let at = note.rfind("\n\n").ok_or(NoteError::Form("no empty line before the signatures"))?;
        let (text, lines) = note.split_at_checked(at + 1).ok_or(NoteError::Form("no text"))?;
        check_text(text)?;
        let lines = lines.strip_prefix('\n').and_then(|lines| lines.strip_suffix('\n'));
        let lines = lines.ok_or(NoteError::Form("the last line does not end"))?;
        let mut signatures = Vec::new();
        for line in lines.split('\n') {
            let parts = line.strip_prefix("— ").and_then(|line| line.split_once(' '));
            let (name, signature) =
                parts.ok_or(NoteError::Form("a signature line is not `— NAME BASE64`"))?;
            check_name(name)?;
            let signature = BASE64.decode(signature.as_bytes());
            let signature = signature.map_err(|_| NoteError::Form("a signature is not base64"))?;
            let (id, signature) =
                signature.split_first_chunk::<4>().ok_or(NoteError::Form("a signature is too short"))?;
            signatures.push((name, *id, signature.to_vec()));
        }
        Ok(Self { text, signatures })
    }
}

/// The text of a note, its signatures unchecked.
pub(crate) fn unverified_text(note: &[u8]) -> Result<&str, NoteError> {
    Note::parse(note).map(|note| note.text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of C2SP signed-note, with the key of Go's documentation for it.
    #[test]
    fn the_note_of_go_opens() {
        let key = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";
        let note = "If you think cryptography is the answer to your problem,\n\
                    then you don't know what your problem is.\n\n\
                    — PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n";
        let verifier: Verifier = key.parse().unwrap();
        assert!(verifier.open(note.as_bytes()).unwrap().starts_with("If you think"));
        assert_eq!(verifier.to_string(), key);
        let other = note.replace("answer", "Answer");
        assert!(matches!(verifier.open(other.as_bytes()), Err(NoteError::Signature(_))));
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let signer = Signer::from_seed("example.com/log", &[7; 32]).unwrap();
        let note = signer.sign("example.com/log\n0\n").unwrap();
        assert!(signer.verifier().open(note.as_bytes()).is_ok());
        for at in 0..note.len() {
            for bit in 0..8 {
                let mut bytes = note.clone().into_bytes();
                bytes[at] ^= 1 << bit;
                assert!(signer.verifier().open(&bytes).is_err(), "byte {at}, bit {bit}");
            }
        }
    }

    #[test]
    fn names_and_keys_that_are_none() {
        for name in ["", "a b", "a+b", "a\nb"] {
            assert!(Signer::from_seed(name, &[1; 32]).is_err());
        }
        let good = Signer::from_seed("n", &[1; 32]).unwrap().verifier().to_string();
        for wrong in ["", "n", "n+00000000+AQ==", &good.replacen("n+", "m+", 1), &good[..good.len() - 4]] {
            assert!(wrong.parse::<Verifier>().is_err(), "{wrong}");
        }
        assert!(Signer::from_seed("n", &[1; 32]).unwrap().sign("no newline").is_err());
    }
}

//! The form for programs: what it says is what the text says, and nothing else gets in by it.

#![cfg(feature = "serde")]
#![allow(clippy::indexing_slicing, clippy::panic, clippy::unwrap_used, missing_docs, reason = "a test")]

use proptest::prelude::*;
use vmm_policy::Policy;
use vmm_policy::syntax::{Document, Item};

#[path = "support/words.rs"]
mod words;

fn through_json(document: &Document) -> Document {
    serde_json::from_str(&serde_json::to_string(document).unwrap()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn what_was_read_comes_back_from_json(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let text = words::policy(&bytes);
        let Ok(policy) = Policy::parse(&text) else { return Ok(()) };
        let back = through_json(policy.document());
        prop_assert_eq!(&back, policy.document());
        let again = Policy::from_document(&back).unwrap();
        prop_assert_eq!(again.digest(), policy.digest());
        prop_assert_eq!(again.document().to_string(), policy.document().to_string());
    }

    #[test]
    fn no_word_says_more_than_itself(word in "[ -~\\n\u{e9}]{0,12}", at in 0_usize..6) {
        // Wherever a program puts a text, it is that text or an error.
        let json = serde_json::to_string(&word).unwrap();
        let statement = match at {
            0 => format!("{{\"policy\":{json}}}"),
            1 => format!("{{\"labels\":[{json}]}}"),
            2 => format!("{{\"family\":{{\"name\":{json},\"labels\":[\"a\"]}}}}"),
            3 => format!("{{\"comments\":[{json}],\"labels\":[\"a\"]}}"),
            4 => format!("{{\"trailing\":{json},\"labels\":[\"a\"]}}"),
            _ => format!("{{\"wall\":{{\"name\":{json},\"labels\":[\"a\",{json}]}}}}"),
        };
        let document: Document = serde_json::from_str(&format!("{{\"statements\":[{statement}]}}")).unwrap();
        match Policy::from_document(&document) {
            Ok(policy) => {
                prop_assert_eq!(policy.document().statements.len(), 1);
                let read: Vec<&Item> = policy.document().statements.iter().map(|one| &one.item).collect();
                let given: Vec<&Item> = document.statements.iter().map(|one| &one.item).collect();
                prop_assert_eq!(read, given);
            }
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}

#[test]
fn a_comment_does_not_become_a_rule() {
    let text = "harmless\nallow any to anything of any";
    let plain = Policy::parse("labels a").unwrap().document().clone();
    let mut before = plain.clone();
    before.statements[0].comments = vec![text.to_owned()];
    let mut behind = plain.clone();
    behind.statements[0].trailing = Some(text.to_owned());
    let mut last = plain;
    last.comments = vec![text.to_owned()];
    for document in [before, behind, last] {
        let policy = Policy::from_document(&document).unwrap();
        assert_eq!((policy.rules().count(), policy.document().statements.len()), (0, 1), "{document}");
        assert!(policy.document().to_string().contains("# harmless"));
    }
}

#[test]
fn depth_has_a_bound_in_json_too() {
    let deep = format!("{}\"any\"{}", "{\"not\":".repeat(100_000), "}".repeat(100_000));
    let rule = format!(
        "{{\"statements\":[{{\"rule\":{{\"effect\":\"allow\",\"targets\":{{\"asker\":{deep}}}}}}}]}}"
    );
    let refused = serde_json::from_str::<Document>(&rule).unwrap_err().to_string();
    assert!(refused.contains("recursion limit"), "{refused}");
}

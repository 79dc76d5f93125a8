use proptest::prelude::*;

use super::*;
use crate::digest::Digest;

fn full() -> Event {
    let launch = Launch::new().kernel(b"k").initrd(b"i").command_line("c").cpu_model(b"m");
    let mut event = Event::launch(Party::vm(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff, 3), &launch)
        .peer(Party::host("root"))
        .object(Object { class: ObjectClass::Msr, number: Some(0x1b), name: Some("apic".into()) })
        .action(Action::Execute)
        .verdict(Verdict::Throttle)
        .outcome(Outcome::NeedsReset)
        .rule("r1", 7)
        .policy(Digest::of(b"policy"))
        .request(Digest::of(b"request"))
        .reason("because \"so\"\n")
        .amount(3, u64::MAX)
        .attribute("z", "1")
        .attribute("a", "2");
    (event.monotonic, event.wall, event.source_seq, event.lost) = (1, 1_700_000_000_123_456_789, 9, 8);
    event.boot = Some(5);
    event
}

#[test]
fn all_fields_survive_bytes_and_json() {
    let event = full();
    assert_eq!(Event::decode(&event.encode().unwrap()), Ok(event.clone()));
    let json = serde_json::to_string(&event).unwrap();
    assert_eq!(serde_json::from_str::<Event>(&json).unwrap(), event, "{json}");
    assert!(json.contains(r#""wall":"2023-11-14T22:13:20.123456789Z""#), "{json}");
    assert!(json.contains(r#""attributes":{"z":"1","a":"2"}"#), "{json}");
}

#[test]
fn a_decision_takes_at_most_160_bytes() {
    let mut event = Event::new(Kind::Decision)
        .subject(Party::vm(u128::MAX, 3))
        .peer(Party::vm(u128::MAX - 1, 300))
        .object(Object::numbered(ObjectClass::Vsock, 5432))
        .action(Action::Connect)
        .verdict(Verdict::Deny)
        .rule("tenants-apart", 120)
        .policy(Digest::of(b"p"));
    (event.monotonic, event.wall, event.source_seq) = (u64::MAX, u64::MAX, 1 << 20);
    let without_request = event.encode().unwrap().len();
    let with_request = event.request(Digest::of(b"r")).encode().unwrap().len();
    assert!(without_request <= 140 && with_request <= 176, "{without_request} {with_request}");
}

/// The binary form is for good. If this fails, what changed breaks every reader there is.
#[test]
fn bytes_are_those_of_the_field_dictionary() {
    let mut event = Event::new(Kind::Decision).verdict(Verdict::Deny).subject(Party::host("ab")).reason("x");
    (event.monotonic, event.wall) = (0x0102, 3);
    let expected = [
        &[0x08, 1][..],                  // 1 kind
        &[0x18, 1],                      // 3 verdict
        &[0x29, 2, 1, 0, 0, 0, 0, 0, 0], // 5 monotonic
        &[0x31, 3, 0, 0, 0, 0, 0, 0, 0], // 6 wall
        &[0x42, 4, 0x1a, 2, b'a', b'b'], // 8 subject, 3 host
        &[0x7a, 1, b'x'],                // 15 reason
    ];
    assert_eq!(event.encode().unwrap(), expected.concat());
}

#[test]
fn fields_of_later_versions_are_skipped_and_seen() {
    let mut bytes = Event::new(Kind::Reset).encode().unwrap();
    bytes.extend_from_slice(&[0xf8, 0x06, 1]); // 111, varint
    assert_eq!(Event::decode(&bytes).unwrap().unknown, [111]);
}

#[test]
fn what_is_no_event_is_refused() {
    let good = full().encode().unwrap();
    for length in 0..good.len() {
        // A cut between fields leaves an event; within one it does not.
        if let Ok(event) = Event::decode(&good[..length]) {
            assert_eq!(event.encode().unwrap(), good[..length]);
        }
    }
    for (bytes, error) in [
        (&[][..], EventError::Absent { field: 1 }),
        (&[0x08, 0x80, 0], EventError::Varint),
        (&[0x08, 1, 0x08, 1], EventError::Twice { field: 1 }),
        (&[0x10, 1, 0x08, 1], EventError::Order { field: 1, last: 2 }),
        (&[0x0a, 1, 0], EventError::WireType { field: 1 }),
        (&[0x08, 1, 0x5a, 2, 0xff, 0xff], EventError::Utf8 { field: 11 }),
        (&[0x08, 1, 0x6a, 1, 0], EventError::Length { field: 13, length: 1, allowed: 32 }),
        (&[0x08, 1, 0x42, 0], EventError::Absent { field: 8 }),
        (
            &[0x08, 0x80, 0x80, 0x80, 0x80, 0x10],
            EventError::Range { field: 1, value: 1 << 32, max: 0xffff_ffff },
        ),
        (&[0x08, 1, 0x7a, 5, b'x'], EventError::CutShort),
    ] {
        assert_eq!(Event::decode(bytes), Err(error));
    }
    let mut many = Event::new(Kind::Reset);
    for n in 0..=MAX_ATTRIBUTES {
        many = many.attribute(n.to_string(), "");
    }
    assert!(matches!(many.encode(), Err(EventError::Length { field: 22, length: 17, allowed: 16 })));
}

#[test]
fn names_and_numbers_belong_together() {
    for kind in Kind::NAMED {
        assert_eq!(Kind::from_number(kind.number()), *kind);
        assert_eq!(kind.to_string().parse(), Ok(*kind));
    }
    assert_eq!("other-77".parse(), Ok(Verdict::Other(77)));
    assert!("perhaps".parse::<Verdict>().unwrap_err().to_string().contains("deny allow"));
}

#[test]
fn parties_as_text() {
    let vm = Party::vm(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff, 3);
    assert_eq!(vm.to_string(), "vm 00112233-4455-6677-8899-aabbccddeeff#3");
    assert_eq!(vm.to_string().parse(), Ok(vm));
    assert_eq!("host a b".parse(), Ok(Party::host("a b")));
    for wrong in
        ["vm 00112233445566778899aabbccddeeff#3", "vm 00112233-4455-6677-8899-aabbccddeeff", "host", "x y"]
    {
        assert!(wrong.parse::<Party>().is_err(), "{wrong}");
    }
}

#[test]
fn ocsf_has_the_classes_of_the_design() {
    let vsock = Object::numbered(ObjectClass::Vsock, 22);
    let cases = [
        (Event::new(Kind::Administration).action(Action::Create), 6003, 600_301),
        (
            Event::new(Kind::Decision).object(vsock).verdict(Verdict::Deny).peer(Party::vm(1, 1)),
            4001,
            400_105,
        ),
        (Event::new(Kind::Decision).object(Object::named(ObjectClass::Region, "r")), 3003, 300_301),
        (Event::new(Kind::Misbehaviour), 2004, 200_401),
    ];
    for (event, class, kind) in cases {
        let json = to_ocsf(&event, 5, 1);
        assert_eq!((&json["class_uid"], &json["type_uid"]), (&class.into(), &kind.into()));
        assert_eq!(serde_json::from_value::<Event>(json["unmapped"]["event"].clone()).unwrap(), event);
    }
    let refused =
        Event::new(Kind::Decision).object(Object::numbered(ObjectClass::Vsock, 22)).peer(Party::vm(1, 1));
    assert_eq!(to_ocsf(&refused, 5, 1)["dst_endpoint"]["port"], 22);
    let done = Event::new(Kind::Administration).action(Action::Administer).subject(Party::host("alice"));
    let operation = |event: &Event| to_ocsf(event, 5, 1)["api"]["operation"].clone();
    assert_eq!(operation(&done), "administer");
    assert_eq!(operation(&done.object(Object::named(ObjectClass::Verb, "destroy"))), "destroy");
}

proptest! {
    /// Whatever decodes encodes to the same bytes, unless it has fields that are not known here.
    #[test]
    fn one_form_only(bytes in proptest::collection::vec(any::<u8>(), 0..64), flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3)) {
        let mut good = full().encode().unwrap();
        for (index, byte) in flips {
            let index = index.index(good.len());
            good[index] = byte;
        }
        for bytes in [bytes, good] {
            if let Ok(event) = Event::decode(&bytes) && event.unknown.is_empty() {
                // Defaults that are written out, and times that are absent, are read and not written so.
                let again = event.encode().unwrap();
                prop_assert_eq!(Event::decode(&again).unwrap(), event);
            }
        }
    }
}

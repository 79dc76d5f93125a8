use super::super::super::abi::nr::XEN_VERSION;
use super::super::super::test_support::Guest;
use super::*;

#[test]
fn version_and_page_size_are_values() {
    let mut guest = Guest::new();
    assert_eq!(guest.call(XEN_VERSION, &[0, 0]), Ok(0x4_0011));
    assert_eq!(guest.call(XEN_VERSION, &[7, 0]), Ok(4096));
}

#[test]
fn features_that_linux_needs_are_announced() {
    let mut guest = Guest::new();
    let at = guest.put(&[0_u32, 0]);
    assert_eq!(guest.call(XEN_VERSION, &[6, at]), Ok(0));
    assert_eq!(guest.get::<u32>(at + 4), 1 << 5 | 1 << 7);
    let at = guest.put(&[1_u32, 0]);
    assert_eq!(guest.call(XEN_VERSION, &[6, at]), Err(Errno::EINVAL));
}

#[test]
fn texts_fill_their_fields() {
    let mut guest = Guest::new();
    for (command, size) in [(1, 16), (2, 144), (3, 1024), (4, 64), (8, 16)] {
        let at = guest.put(&[0xff_u8; 1100]);
        assert_eq!(guest.call(XEN_VERSION, &[command, at]), Ok(0));
        let field = guest.get::<[u8; 1100]>(at);
        assert_eq!(field.iter().position(|byte| *byte == 0xff), Some(size), "command {command}");
        assert_eq!(field[size - 1], 0);
        if command == 3 {
            assert!(field.starts_with(CAPABILITIES.as_bytes()));
        }
    }
    let at = guest.put(&0_u64);
    assert_eq!(guest.call(XEN_VERSION, &[5, at]), Ok(0));
    assert_eq!(guest.get::<u64>(at), 0xffff_8000_0000_0000);
}

#[test]
fn bad_places_and_commands_are_refused() {
    let mut guest = Guest::new();
    for command in [1, 2, 3, 4, 5, 6, 8] {
        for at in [8, u64::MAX, u64::MAX - 3] {
            assert_eq!(
                guest.call(XEN_VERSION, &[command, at]),
                Err(Errno::EFAULT),
                "command {command} at {at:#x}"
            );
        }
    }
    for command in [9, 10, 100, u64::MAX] {
        assert_eq!(guest.call(XEN_VERSION, &[command, 0]), Err(Errno::ENOSYS));
    }
    assert_eq!(guest.domain.unknown_hypercalls(XEN_VERSION), 4);
}

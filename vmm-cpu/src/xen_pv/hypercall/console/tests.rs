use super::super::super::abi::PAGE_SIZE;
use super::super::super::abi::nr::CONSOLE_IO;
use super::super::super::console::ConsoleSource;
use super::super::super::test_support::{FRAMES, FREE, Guest};
use super::*;

#[test]
fn text_is_printed() {
    let mut guest = Guest::new();
    let text: Vec<u8> = (0..1000_u32).map(|n| (n % 251) as u8).collect();
    let at = guest.put_bytes(&text);
    assert_eq!(guest.call(CONSOLE_IO, &[WRITE, 1000, at]), Ok(0));
    assert_eq!(guest.printed.by(ConsoleSource::Hypercall), text);
    assert_eq!(guest.call(CONSOLE_IO, &[WRITE, 0, 8]), Ok(0));
    assert_eq!(guest.call(CONSOLE_IO, &[WRITE, 1, 8]), Err(Errno::EFAULT));
    assert_eq!(guest.call(CONSOLE_IO, &[READ, 1 << 31, at]), Err(Errno::E2BIG));
    assert_eq!(guest.call(CONSOLE_IO, &[2, 1, at]), Err(Errno::ENOSYS));
}

#[test]
fn a_megabyte_is_printed_in_parts() {
    let mut guest = Guest::new();
    let at = guest.put_bytes(&[b'x'; 1 << 20]);
    let rip = guest.engine.context.general.rip;
    guest.syscall(CONSOLE_IO, &[WRITE, 1 << 20, at]);
    assert_eq!(guest.engine.context.general.rip, rip - 2);
    assert!(guest.printed.by(ConsoleSource::Hypercall).len() < 1 << 20);
    guest.engine.context.general.rip = rip;
    let left = guest.engine.context.general;
    assert_eq!(guest.call(CONSOLE_IO, &[WRITE, left.rsi, left.rdx]), Ok(0));
    assert_eq!(guest.printed.by(ConsoleSource::Hypercall).len(), 1 << 20);
}

#[test]
fn input_is_read() {
    let mut guest = Guest::new();
    let at = guest.put(&[0_u8; 16]);
    assert_eq!(guest.call(CONSOLE_IO, &[READ, 16, at]), Ok(0));
    guest.domain.console_input(b"hello");
    assert_eq!(guest.call(CONSOLE_IO, &[READ, 3, at]), Ok(3));
    assert_eq!(guest.call(CONSOLE_IO, &[READ, 1000, at + 3]), Ok(2));
    assert_eq!(&guest.get::<[u8; 16]>(at)[..6], b"hello\0");
}

/// Indices of the ring: in consumer, in producer, out consumer, out producer.
fn index(guest: &Guest, which: u64) -> u32 {
    guest.get(Guest::va(FREE * PAGE_SIZE + 3072 + 4 * which))
}

fn set_index(guest: &Guest, which: u64, value: u32) {
    guest.domain.memory.store_u32(FREE * PAGE_SIZE + 3072 + 4 * which, value).unwrap();
}

#[test]
fn the_ring_carries_both_ways() {
    let guest = Guest::new();
    let port = guest.domain.attach_console(FREE).unwrap();
    // Output that goes around the end of the ring.
    set_index(&guest, 2, u32::MAX - 1);
    for (n, byte) in (u64::from(u32::MAX - 1)..).zip(b"abcd") {
        guest.domain.memory.write(FREE * PAGE_SIZE + 1024 + n % 2048, &[*byte]).unwrap();
    }
    set_index(&guest, 3, 2);
    guest.domain.send(port).unwrap();
    assert_eq!(guest.printed.by(ConsoleSource::Ring), b"abcd");
    assert_eq!(index(&guest, 2), 2);
    assert!(guest.domain.is_pending(port).unwrap(), "there is room again");
    guest.domain.console_input(&[b'i'; 1500]);
    assert_eq!(index(&guest, 1), 1024, "what fits");
    set_index(&guest, 0, 1024);
    guest.domain.send(port).unwrap();
    assert_eq!(index(&guest, 1), 1500);
    assert_eq!(guest.get::<u8>(Guest::va(FREE * PAGE_SIZE + 475)), b'i');
}

#[test]
fn nonsense_in_the_ring_is_dropped() {
    let guest = Guest::new();
    let port = guest.domain.attach_console(FREE).unwrap();
    for (consumed, produced) in [(0, 2049), (5, 4), (0, u32::MAX)] {
        set_index(&guest, 2, consumed);
        set_index(&guest, 3, produced);
        guest.domain.send(port).unwrap();
        assert_eq!(guest.printed.by(ConsoleSource::Ring), b"");
        assert_eq!(index(&guest, 2), produced);
    }
    // The guest says that it has read what was never there.
    set_index(&guest, 0, 77);
    set_index(&guest, 1, 0);
    guest.domain.console_input(b"x");
    assert_eq!(index(&guest, 1), 0);
}

#[test]
fn a_domain_has_one_ring_in_its_ram() {
    let guest = Guest::new();
    assert!(guest.domain.attach_console(FRAMES).is_err());
    assert!(guest.domain.attach_console(FREE).is_ok());
    assert!(guest.domain.attach_console(FREE + 1).is_err());
    assert_eq!(guest.domain.ports.vcpu(2), None, "no port is lost");
    guest.domain.console_input(b"x");
    assert_eq!(index(&guest, 1), 1, "the first one serves");
}

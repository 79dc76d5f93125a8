//! Two guests.

use crate::guest::{Guest, Place, packages, sha256};

/// Writes, tells, and answers interrupts; reads what the other one wrote. Words 0 and 8 say how far each is.
const FIRST: &str = "set -e
    dd if=/dev/urandom of=data bs=64k count=16 2>/dev/null
    ivshmem write 0x100000 <data
    sha256sum <data
    ivshmem position
    ivshmem store 0 1
    ivshmem await 8 1 120
    ivshmem read 0x200000 0x100000 | sha256sum
    ivshmem poll 60
    ivshmem store 0 2
    ivshmem answer 1 50 60
    grep uio_pci_generic /proc/interrupts | tr -s ' ' | cut -d ' ' -f 3";

const SECOND: &str = "set -e
    dd if=/dev/urandom of=data bs=64k count=16 2>/dev/null
    ivshmem write 0x200000 <data
    sha256sum <data
    ivshmem position
    ivshmem await 0 1 120
    ivshmem read 0x100000 0x100000 | sha256sum
    ivshmem store 8 1
    ivshmem ring 0 1
    ivshmem await 0 2 60
    until ivshmem call 0 1 2; do :; done
    ivshmem call 0 49 60
    grep uio_pci_generic /proc/interrupts | tr -s ' ' | cut -d ' ' -f 3";

#[test]
fn guests_have_memory_in_common_and_interrupt_each_other() {
    if !packages("pair") {
        return;
    }
    let place = Place::new(usize::MAX);
    let first = Guest::start(&place.path(), "", FIRST);
    place.has(1);
    let second = Guest::start(&place.path(), "", SECOND);
    let (first, second) = (first.output(), second.output());
    println!("{first}\n{second}");
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let (first, second) = (lines(&first), lines(&second));
    let (written, other) =
        (sha256(&place.bytes(0x10_0000, 1 << 20)), sha256(&place.bytes(0x20_0000, 1 << 20)));
    assert_ne!(written, other);
    // What one wrote, the host and the other one see.
    assert_eq!(first[..4], [written.clone(), "0".to_owned(), other.clone(), "rung".to_owned()]);
    assert_eq!(second[..3], [other, "1".to_owned(), written]);
    // Each ring was an interrupt. What came before the first answer was ready was one that was not waited for.
    assert!(first.contains(&"answered 50".to_owned()), "{first:?}");
    let interrupts = |lines: &[String]| lines.last().unwrap().parse::<u64>().unwrap();
    assert!(interrupts(&first) >= 50 && interrupts(&second) >= 50, "{first:?} {second:?}");
}

/// A message reaches the processor with the vector that was asked for: Debian's kernel has no handler for it, and says so.
#[test]
fn a_message_reaches_the_processor() {
    if !packages("message") {
        return;
    }
    let place = Place::new(usize::MAX);
    let guest = Guest::start(
        &place.path(),
        ",direct",
        "for vector in 77 141 205; do ivshmem msix $vector; sleep 0.2; done; dmesg | grep -o '[0-9.]* No irq handler for vector'",
    );
    let output = guest.output();
    for vector in [77, 141, 205] {
        assert!(output.contains(&format!("0.{vector} No irq handler")), "{output}");
    }
}

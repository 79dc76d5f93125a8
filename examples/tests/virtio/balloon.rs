//! The balloon: what a guest gives back leaves the process.

use crate::guest::{Guest, linux, wait_for};

const MIB: u64 = 1 << 20;
const BALLOON: u64 = 64;
/// What of the memory that the guest has filled may stay: pages between those in use, which it does not report.
const STAYS: u64 = 24;

/// Touches all memory that is free while there is no balloon.
const LINE: &str = "
    kib() { sed -n \"s/^$1: *\\([0-9]*\\) kB/\\1/p\" /proc/meminfo; }
    rmmod virtio_balloon
    fill=$(($(kib MemAvailable) / 1024 - 16))
    mount -t tmpfs -o size=100% tmpfs /tmp
    dd if=/dev/zero of=/tmp/fill bs=1M count=$fill || exit
    rm /tmp/fill
    before=$(kib MemFree)
    echo $fill >&3; read looked <&3
    modprobe virtio_balloon
    until [ $(($(kib MemFree) + 60000)) -lt $before ]; do sleep 0.1; done
    echo $(kib MemTotal) >&3; read looked <&3
    rmmod virtio_balloon
    [ $(($(kib MemFree) + 10000)) -gt $before ] && echo all is back";

#[test]
fn memory_of_a_balloon_leaves_the_process_over_mmio() {
    memory_of_a_balloon_leaves_the_process("mmio");
}

#[test]
fn memory_of_a_balloon_leaves_the_process_over_pci() {
    memory_of_a_balloon_leaves_the_process("pci");
}

fn memory_of_a_balloon_leaves_the_process(transport: &str) {
    let Some(mut command) = linux("balloon", transport) else { return };
    command.args(["--memory", "256", "--balloon", &BALLOON.to_string()]);
    let mut guest = Guest::start(command, LINE);
    let filled = guest.hear().parse::<u64>().unwrap() * MIB;
    let before = guest.resident();
    assert!(filled > 2 * BALLOON * MIB && before > filled, "{filled} bytes filled, {before} resident");
    let balloon =
        |guest: &Guest, what| guest.figures().get(&format!("virtio_balloon_{what}{{device=\"balloon0\"}}"));
    let inflated = balloon(&guest, "inflated_bytes_total");
    guest.say("looked");

    let total = guest.hear().parse::<u64>().unwrap() << 10;
    let size = (BALLOON * MIB) as f64;
    // The guest says how much it is behind what it does.
    wait_for("a full balloon", || (balloon(&guest, "actual_bytes") == size).then_some(()));
    assert_eq!(balloon(&guest, "inflated_bytes_total") - inflated, size);
    // What is in the balloon, and what is free, which the guest reports by and by.
    let left = wait_for("memory that leaves the process", || {
        Some(guest.resident()).filter(|resident| resident + filled < before + STAYS * MIB)
    });
    println!("{transport}: {} MiB resident, then {}; {} filled", before / MIB, left / MIB, filled / MIB);
    let figures = guest.figures();
    let taken_back = figures.get("virtio_balloon_deflated_bytes_total{device=\"balloon0\"}");
    assert!(
        taken_back > 0.0 && figures.of("transferred_bytes", "balloon0", "read") == taken_back,
        "{figures:?}"
    );
    let reported = balloon(&guest, "reported_bytes_total");
    assert!(reported >= filled as f64 - size - (STAYS * MIB) as f64, "{reported}");
    // It is asked by the scrape before.
    let told = "virtio_balloon_guest_memory_bytes{device=\"balloon0\",kind=\"total\"}";
    assert_eq!(guest.figures().get(told), total as f64);
    guest.say("looked");
    assert_eq!(guest.output(), "all is back\n");
}

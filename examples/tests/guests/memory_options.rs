//! `linux` with RAM of huge pages and on NUMA nodes: what the host's kernel says of the process, and how mistakes end.

// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use vmm_memory::{HugePageSize, NodeSet, ReservedHugePages};

const LINUX: &str = env!("CARGO_BIN_EXE_linux");
const VMM_FAILURE: i32 = 125;

/// What a run printed and how it ended. Meanwhile `look` is shown what is in `file` of the process's directory in /proc.
fn run_and_look(arguments: &[&str], file: &str, mut look: impl FnMut(String)) -> (Option<i32>, String) {
    let mut child = Command::new(LINUX)
        .args(arguments)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while child.try_wait().unwrap().is_none() {
        if let Ok(text) = fs::read_to_string(format!("/proc/{}/{file}", child.id())) {
            look(text);
        }
        thread::sleep(Duration::from_millis(100));
    }
    let output = child.wait_with_output().unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.code(), text)
}

fn run(arguments: &[&str]) -> (Option<i32>, String) {
    run_and_look(arguments, "status", drop)
}

/// The same, and how many MiB of the pool the process had at most.
fn run_on_huge_pages(arguments: &[&str]) -> (Option<i32>, String, u64) {
    let mut most = 0;
    let (status, text) = run_and_look(arguments, "smaps", |smaps| most = most.max(huge_mib(&smaps)));
    (status, text, most)
}

/// MiB of the pool that the process had.
fn huge_mib(smaps: &str) -> u64 {
    let number =
        |line: &str| line.strip_prefix("Private_Hugetlb:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok();
    smaps.lines().filter_map(number).sum::<u64>() >> 10
}

/// Pages for a test; without them it says why it is skipped.
fn reserve(page_size: HugePageSize, pages: u64) -> Option<ReservedHugePages> {
    ReservedHugePages::reserve(page_size, pages).map_err(|error| println!("skipped: {error}")).ok()
}

/// The guest fills half of its memory and reads it again.
const FILLS_MEMORY: &str = "mkdir -p /m && mount -t tmpfs -o size=100m none /m && head -c 64m /dev/zero | tr '\\0' x >/m/x \
                            && md5sum /m/x";
/// `head -c 64M /dev/zero | tr '\\0' x | md5sum`
const SUM: &str = "de506679685541efcb501eac224adc64";

#[test]
fn ram_of_huge_pages() {
    let Some(_pages) = reserve(HugePageSize::TwoMib, 96) else { return };
    for backend in ["translate", "xen-pv"] {
        let arguments =
            ["--backend", backend, "--hugepages", "2M", "--memory", "192", "--command", FILLS_MEMORY];
        let (status, text, mib) = run_on_huge_pages(&arguments);
        assert_eq!(status, Some(0), "{text}");
        assert!(text.contains(SUM), "{text}");
        assert!((64..=192).contains(&mib), "{mib} MiB of huge pages");
    }
}

#[test]
fn ram_of_a_huge_page_of_one_gibibyte() {
    let Some(_page) = reserve(HugePageSize::OneGib, 1) else { return };
    let arguments =
        ["--backend", "translate", "--hugepages", "1G", "--memory", "1024", "--command", FILLS_MEMORY];
    let (status, text, mib) = run_on_huge_pages(&arguments);
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains(SUM), "{text}");
    assert_eq!(mib, 1024);
}

#[test]
fn a_balloon_returns_huge_pages() {
    let Some(_pages) = reserve(HugePageSize::TwoMib, 96) else { return };
    let arguments = [
        "--backend",
        "translate",
        "--hugepages",
        "2M",
        "--memory",
        "192",
        "--balloon",
        "64",
        "--command",
        "sleep 1; grep MemFree: /proc/meminfo",
    ];
    let (status, text) = run(&arguments);
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("MemFree:"), "{text}");
}

#[test]
fn too_few_huge_pages_end_with_what_to_do() {
    if HugePageSize::TwoMib.pool().is_none() {
        println!("skipped: the host has no huge pages of 2 MiB");
        return;
    }
    let (status, text) = run(&["--backend", "translate", "--hugepages", "2M", "--memory", "524288"]);
    assert_eq!(status, Some(VMM_FAILURE), "{text}");
    assert!(text.contains("echo ") && text.contains("nr_hugepages"), "{text}");
    let (_, text) = run(&["--hugepages", "4K"]);
    assert!(text.contains("there are 2M and 1G"), "{text}");
}

#[test]
fn odd_ram_for_huge_pages_ends_with_the_page_size() {
    let (status, text) = run(&["--backend", "translate", "--hugepages", "2M", "--memory", "129"]);
    assert_eq!(status, Some(VMM_FAILURE), "{text}");
    assert!(text.contains("multiples of 0x200000"), "{text}");
}

#[test]
fn ram_on_a_numa_node() {
    let node = NodeSet::of_host().iter().next().unwrap();
    for (policy, noted) in [("", "bind"), ("prefer:", "prefer"), ("interleave:", "interleave")] {
        let numa = format!("{policy}{node}");
        let arguments = ["--backend", "translate", "--numa", &numa, "--command", "echo done"];
        let mut ram = None;
        // RAM is a memfd of that name with this backend.
        let (status, text) = run_and_look(&arguments, "numa_maps", |maps| {
            ram = maps.lines().find(|line| line.contains("guest-ram")).map(str::to_owned).or(ram.take());
        });
        if text.contains("cannot set the NUMA policy") && !fs::exists("/proc/self/numa_maps").unwrap() {
            println!("skipped: the host's kernel knows no NUMA policies");
            return;
        }
        assert_eq!(status, Some(0), "{text}");
        let ram = ram.unwrap();
        assert!(ram.contains(&format!("{noted}:{node}")), "{ram}");
    }
}

#[test]
fn wrong_nodes_end_with_those_there_are() {
    let absent = (0..1024).find(|node| !NodeSet::of_host().contains(*node)).unwrap().to_string();
    let (status, text) = run(&["--backend", "translate", "--numa", &absent]);
    assert_eq!(status, Some(VMM_FAILURE), "{text}");
    assert!(
        text.contains(&format!("node {absent}")) && text.contains(&NodeSet::of_host().to_string()),
        "{text}"
    );
    for (wrong, told) in [("x", "0 to 1023"), ("spread:0", "bind, prefer and interleave")] {
        let (_, text) = run(&["--numa", wrong]);
        assert!(text.contains(told), "{text}");
    }
}

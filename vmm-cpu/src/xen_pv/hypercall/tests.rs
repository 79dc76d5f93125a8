//! The whole surface: every number and every command, those that are not there first of all.

use std::ops::RangeInclusive;

use super::super::abi::domid;
use super::super::abi::mmu::{MmuextOp, MulticallEntry, mmuext};
use super::super::test_support::{DIRECT, FREE, Guest};
use super::*;

/// Numbers that Xen has or had, and some more.
const NUMBERS: RangeInclusive<u64> = 0..=72;

/// Commands of one hypercall, and a few that nobody has.
fn commands() -> impl Iterator<Item = u64> {
    (0..64).chain([64, 255, 1 << 16, 1 << 31, u64::from(u32::MAX)])
}

/// Those that are there, as the table of what is there says.
fn is_there(nr: u64) -> bool {
    matches!(nr, 0..=6 | 8..=10 | 12..=15 | 17 | 18 | 20..=26 | 28..=30 | 32 | 33)
}

/// A hypercall with commands: which of them are there, what those that are not there answer beside `-ENOSYS`, and
/// how it is called.
struct Group {
    nr: u64,
    there: &'static [u64],
    refused: &'static [(u64, Errno)],
    args: fn(u64, u64) -> [u64; 6],
}

fn first(command: u64, at: u64) -> [u64; 6] {
    [command, at, 0, 0, 0, 0]
}

const GROUPS: &[Group] = &[
    Group { nr: nr::SCHED_OP_COMPAT, there: &[0, 1, 2], refused: &[], args: first },
    Group {
        nr: nr::MEMORY_OP,
        there: &[0, 1, 2, 3, 4, 6, 9, 12, 14],
        refused: &[(11, Errno::EPERM)],
        args: first,
    },
    Group { nr: nr::XEN_VERSION, there: &[0, 1, 2, 3, 4, 5, 6, 7, 8], refused: &[], args: first },
    Group { nr: nr::CONSOLE_IO, there: &[0, 1], refused: &[], args: |command, at| [command, 1, at, 0, 0, 0] },
    Group {
        nr: nr::GRANT_TABLE_OP,
        there: &[0, 1, 2, 5, 6, 7, 8, 10, 11],
        refused: &[],
        args: |command, at| [command, at, 1, 0, 0, 0],
    },
    Group { nr: nr::VM_ASSIST, there: &[0, 1], refused: &[], args: |command, _| [command, 2, 0, 0, 0, 0] },
    Group {
        nr: nr::VCPU_OP,
        there: &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13],
        refused: &[],
        args: |command, at| [command, 0, at, 0, 0, 0],
    },
    Group { nr: nr::NMI_OP, there: &[0, 1], refused: &[], args: first },
    Group { nr: nr::SCHED_OP, there: &[0, 1, 2, 3, 5], refused: &[], args: first },
    Group { nr: nr::CALLBACK_OP, there: &[0, 1], refused: &[], args: first },
    Group {
        nr: nr::EVENT_CHANNEL_OP,
        there: &[0, 1, 3, 4, 5, 6, 7, 8, 9, 10],
        refused: &[(2, Errno::EPERM)],
        args: first,
    },
    Group { nr: nr::PHYSDEV_OP, there: &[6, 7], refused: &[], args: first },
];

/// What a guest may have in a register: nothing, everything, addresses of garbage and of nothing.
fn garbage(guest: &mut Guest) -> [u64; 6] {
    let at = guest.put(&[0xa5a5_a5a5_5a5a_5a5a_u64; 64]);
    [0, 8, at, DIRECT + FREE * 4096, 0xffff_8000_0000_0000, u64::MAX]
}

#[test]
fn numbers_that_are_not_there_say_so_and_are_counted() {
    let mut guest = Guest::new();
    let garbage = garbage(&mut guest);
    for nr in NUMBERS.filter(|nr| !is_there(*nr)).chain([1 << 31, 1 << 32, 1 << 32 | 17, u64::MAX]) {
        for value in garbage {
            let before = guest.domain.unknown_hypercalls(nr);
            assert_eq!(guest.call(nr, &[value; 6]), Err(Errno::ENOSYS), "hypercall {nr:#x}, {value:#x}");
            assert_eq!(guest.domain.unknown_hypercalls(nr), before + 1, "hypercall {nr:#x}");
        }
    }
}

#[test]
fn so_do_they_in_a_multicall() {
    let mut guest = Guest::new();
    let numbers: Vec<u64> = NUMBERS.filter(|nr| !is_there(*nr)).collect();
    let entry = |nr: &u64| MulticallEntry { op: *nr, result: 0, args: [0; 6] };
    let list = guest.put(numbers.iter().map(entry).collect::<Vec<_>>().as_slice());
    assert_eq!(guest.call(nr::MULTICALL, &[list, numbers.len() as u64]), Ok(0));
    for (index, nr) in (0..).zip(&numbers) {
        let result = guest.get::<MulticallEntry>(list + index * 64).result;
        assert_eq!(result, Errno::ENOSYS.value(), "hypercall {nr}");
    }
}

#[test]
fn commands_that_are_not_there_say_so_and_are_counted() {
    for group in GROUPS {
        let mut guest = Guest::new();
        let garbage = garbage(&mut guest);
        for command in commands() {
            // What is above the command proper says where a call goes on.
            let proper = if group.nr == nr::MEMORY_OP { command & 0x3f } else { command };
            if group.there.contains(&proper) {
                continue;
            }
            let refused = group.refused.iter().find(|(refused, _)| *refused == proper);
            let expected = refused.map_or(Errno::ENOSYS, |(_, errno)| *errno);
            for at in garbage {
                let before = guest.domain.unknown_hypercalls(group.nr);
                let args = (group.args)(command, at);
                let what = format!("command {command:#x} of hypercall {}, {at:#x}", group.nr);
                // The watchdog's arguments are looked at.
                let unread = group.nr == nr::SCHED_OP
                    && command == 6
                    && guest.call(group.nr, &args) == Err(Errno::EFAULT);
                if !unread {
                    assert_eq!(guest.call(group.nr, &args), Err(expected), "{what}");
                    assert!(guest.domain.unknown_hypercalls(group.nr) > before, "{what}");
                }
            }
        }
    }
}

/// A compiler that puts an int into a 64-bit register may leave anything above it.
#[test]
fn commands_are_ints() {
    for group in GROUPS.iter().filter(|group| group.nr != nr::MEMORY_OP) {
        for command in commands() {
            let what = format!("command {command:#x} of hypercall {}", group.nr);
            // Those that wait or end are called once each.
            let answers = [command, command | 0xa5a5_a5a5 << 32].map(|command| {
                let mut guest = Guest::new();
                let (action, rax) = guest.syscall(group.nr, &(group.args)(command, 8));
                (action, rax)
            });
            assert_eq!(answers[0], answers[1], "{what}");
        }
    }
}

/// Commands that answer something other than an error although what they are given is no address: those that read
/// nothing.
#[test]
fn what_is_there_looks_at_its_arguments() {
    const READ_NOTHING: &[(u64, &[u64])] = &[
        (nr::SCHED_OP_COMPAT, &[0, 1]),
        (nr::MEMORY_OP, &[2]),
        (nr::XEN_VERSION, &[0, 7]),
        // There is no input, so there is nothing to write.
        (nr::CONSOLE_IO, &[1]),
        (nr::VM_ASSIST, &[0, 1]),
        (nr::VCPU_OP, &[1, 2, 3, 7, 9, 11]),
        (nr::NMI_OP, &[1]),
        (nr::SCHED_OP, &[0, 1]),
    ];
    for group in GROUPS {
        for command in group.there {
            let mut guest = Guest::new();
            let (_, rax) = guest.syscall(group.nr, &(group.args)(*command, 8));
            let silent =
                READ_NOTHING.iter().any(|(nr, commands)| *nr == group.nr && commands.contains(command));
            let faulted = rax == Errno::EFAULT.value()
                || (group.nr == nr::SCHED_OP_COMPAT && rax == Errno::EINVAL.value());
            assert_eq!(faulted, !silent, "command {command} of hypercall {}: {rax:#x}", group.nr);
        }
    }
}

#[test]
fn commands_for_page_tables_that_are_not_there_say_so_and_are_counted() {
    const REFUSED: &[(u32, Errno)] = &[
        (mmuext::FLUSH_CACHE, Errno::EACCES),
        (mmuext::FLUSH_CACHE_GLOBAL, Errno::EACCES),
        (mmuext::MARK_SUPER, Errno::EOPNOTSUPP),
        (mmuext::UNMARK_SUPER, Errno::EOPNOTSUPP),
    ];
    let mut guest = Guest::new();
    for cmd in (0..64).chain([1 << 16, 1 << 31, u32::MAX]) {
        if matches!(cmd, 0..=11 | 13 | 15..=17) {
            continue;
        }
        let expected =
            REFUSED.iter().find(|(refused, _)| *refused == cmd).map_or(Errno::ENOSYS, |(_, errno)| *errno);
        for value in [0, 8, FREE, u64::MAX] {
            let list = guest.put(&MmuextOp { cmd, arg1: value, arg2: value, ..Default::default() });
            let before = guest.domain.unknown_hypercalls(nr::MMUEXT_OP);
            let result = guest.call(nr::MMUEXT_OP, &[list, 1, 0, domid::SELF.into()]);
            assert_eq!(result, Err(expected), "command {cmd:#x}");
            assert_eq!(guest.domain.unknown_hypercalls(nr::MMUEXT_OP), before + 1, "command {cmd:#x}");
        }
    }
}

#[test]
fn other_numbers_in_place_of_commands_are_refused() {
    let mut guest = Guest::new();
    for (nr, known, errno) in [
        (nr::SET_SEGMENT_BASE, 0..=3, Errno::EINVAL),
        (nr::SET_DEBUGREG, 0..=7, Errno::ENODEV),
        (nr::GET_DEBUGREG, 0..=7, Errno::ENODEV),
    ] {
        for command in commands().filter(|command| !known.contains(command)) {
            assert_eq!(guest.call(nr, &[command, 0]), Err(errno), "command {command:#x} of hypercall {nr}");
        }
    }
    for kind in commands().filter(|kind| !matches!(kind, 0..=2 | 4 | 5)) {
        assert_eq!(guest.call(nr::VM_ASSIST, &[0, kind]), Err(Errno::EINVAL), "assist {kind}");
    }
}

/// Hypercalls that read or write a structure, how they are called with its address, and its bytes.
type Structure = (u64, fn(u64) -> Vec<u64>, u64);

const OWN: u64 = domid::SELF as u64;

const STRUCTURES: &[Structure] = &[
    (nr::SET_TRAP_TABLE, |at| vec![at], 16),
    (nr::MMU_UPDATE, |at| vec![at, 1, 0, OWN], 16),
    (nr::SET_GDT, |at| vec![at, 1], 8),
    (nr::MEMORY_OP, |at| vec![0, at], 32),
    (nr::MEMORY_OP, |at| vec![1, at], 32),
    (nr::MEMORY_OP, |at| vec![3, at], 2),
    (nr::MEMORY_OP, |at| vec![4, at], 2),
    (nr::MEMORY_OP, |at| vec![6, at], 32),
    (nr::MEMORY_OP, |at| vec![9, at], 16),
    (nr::MEMORY_OP, |at| vec![12, at], 24),
    (nr::MEMORY_OP, |at| vec![14, at], 2),
    (nr::MULTICALL, |at| vec![at, 1], 64),
    (nr::XEN_VERSION, |at| vec![1, at], 16),
    (nr::XEN_VERSION, |at| vec![2, at], 144),
    (nr::XEN_VERSION, |at| vec![3, at], 1024),
    (nr::XEN_VERSION, |at| vec![4, at], 64),
    (nr::XEN_VERSION, |at| vec![5, at], 8),
    (nr::XEN_VERSION, |at| vec![6, at], 8),
    (nr::XEN_VERSION, |at| vec![8, at], 16),
    (nr::CONSOLE_IO, |at| vec![0, 4, at], 4),
    (nr::GRANT_TABLE_OP, |at| vec![0, at, 1], 32),
    (nr::GRANT_TABLE_OP, |at| vec![1, at, 1], 24),
    (nr::GRANT_TABLE_OP, |at| vec![2, at, 1], 24),
    (nr::GRANT_TABLE_OP, |at| vec![5, at, 1], 40),
    (nr::GRANT_TABLE_OP, |at| vec![6, at, 1], 16),
    (nr::GRANT_TABLE_OP, |at| vec![8, at, 1], 4),
    (nr::GRANT_TABLE_OP, |at| vec![10, at, 1], 8),
    (nr::GRANT_TABLE_OP, |at| vec![11, at, 1], 12),
    (nr::VCPU_OP, |at| vec![0, 1, at], 5168),
    (nr::VCPU_OP, |at| vec![4, 0, at], 48),
    (nr::VCPU_OP, |at| vec![5, 0, at], 8),
    (nr::VCPU_OP, |at| vec![6, 0, at], 8),
    (nr::VCPU_OP, |at| vec![8, 0, at], 16),
    (nr::VCPU_OP, |at| vec![10, 0, at], 16),
    (nr::VCPU_OP, |at| vec![13, 0, at], 8),
    (nr::MMUEXT_OP, |at| vec![at, 1, 0, OWN], 24),
    (nr::NMI_OP, |at| vec![0, at], 8),
    (nr::SCHED_OP, |at| vec![2, at], 4),
    (nr::SCHED_OP, |at| vec![3, at], 24),
    (nr::SCHED_OP, |at| vec![5, at], 4),
    (nr::SCHED_OP, |at| vec![6, at], 8),
    (nr::CALLBACK_OP, |at| vec![0, at], 16),
    (nr::CALLBACK_OP, |at| vec![1, at], 2),
    (nr::EVENT_CHANNEL_OP, |at| vec![0, at], 12),
    (nr::EVENT_CHANNEL_OP, |at| vec![1, at], 12),
    (nr::EVENT_CHANNEL_OP, |at| vec![3, at], 4),
    (nr::EVENT_CHANNEL_OP, |at| vec![4, at], 4),
    (nr::EVENT_CHANNEL_OP, |at| vec![5, at], 24),
    (nr::EVENT_CHANNEL_OP, |at| vec![6, at], 8),
    (nr::EVENT_CHANNEL_OP, |at| vec![7, at], 8),
    (nr::EVENT_CHANNEL_OP, |at| vec![8, at], 8),
    (nr::EVENT_CHANNEL_OP, |at| vec![9, at], 4),
    (nr::EVENT_CHANNEL_OP, |at| vec![10, at], 2),
    (nr::PHYSDEV_OP, |at| vec![6, at], 4),
    (nr::PHYSDEV_OP, |at| vec![7, at], 12),
];

#[test]
fn structures_in_no_memory_fault() {
    for (nr, args, size) in STRUCTURES {
        let mut guest = Guest::new();
        let end = DIRECT + guest.domain.memory.layout().abi_frames().end * 4096;
        // Nothing, what no address is, Xen's own range and both its ends, the last bytes that there are, what wraps around,
        // and what begins in the last page that is mapped: all but the last byte is there.
        let mut places = vec![0, 8, 1 << 47, 1 << 63, 0xffff_7fff_ffff_ffff, 0xffff_8000_0000_0000];
        places.extend([
            0xffff_8180_0000_0000,
            0xffff_87ff_ffff_ffff,
            u64::MAX - 7,
            u64::MAX,
            end,
            end - size + 1,
        ]);
        for at in places {
            // No trap table is one, that of all zeros.
            if (*nr, at) == (nr::SET_TRAP_TABLE, 0) {
                continue;
            }
            let what = format!("hypercall {nr}, {:x?}", args(at));
            assert_eq!(guest.call(*nr, &args(at)), Err(Errno::EFAULT), "{what}");
        }
        assert_eq!(guest.domain.shutdown_reason(), None);
    }
}

/// Unaligned and across two pages that are neighbours in virtual memory only: as good as any place.
#[test]
fn structures_may_lie_anywhere() {
    use super::super::test_support::L1;
    for (nr, args, size) in STRUCTURES.iter().filter(|(.., size)| (2..=4096).contains(size)) {
        let [aligned, across] = [FREE * 4096, FREE * 4096 + 4096 - size / 2].map(|gpa| {
            let mut guest = Guest::new();
            guest.store(L1 + 2, 1, ((FREE + 7) * 4096) | 7);
            guest.syscall(*nr, &args(DIRECT + gpa))
        });
        assert_eq!(aligned, across, "hypercall {nr}, {:x?}", args(0));
    }
}

#[test]
fn counts_of_nothing_and_of_everything_end() {
    type List = (u64, fn(u64, u64) -> Vec<u64>);
    let lists: [List; 4] = [
        (nr::MMU_UPDATE, |at, count| vec![at, count, 0, OWN]),
        (nr::MMUEXT_OP, |at, count| vec![at, count, 0, OWN]),
        (nr::MULTICALL, |at, count| vec![at, count]),
        (nr::GRANT_TABLE_OP, |at, count| vec![0, at, count]),
    ];
    for (nr, args) in lists {
        let mut guest = Guest::new();
        assert_eq!(guest.call(nr, &args(8, 0)), Ok(0), "hypercall {nr}");
        // From here on memory is zero up to its end. The upper bit of two of them says something else.
        for count in [u64::from(u32::MAX), u64::from(u32::MAX >> 1)] {
            let result = guest.call(nr, &args(Guest::va(FREE * 4096), count));
            assert!(matches!(result, Err(Errno::EFAULT | Errno::EINVAL)), "hypercall {nr}: {result:?}");
        }
    }
}

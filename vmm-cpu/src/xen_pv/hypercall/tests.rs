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

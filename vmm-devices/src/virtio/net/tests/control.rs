//! The control queue.

use super::*;
use crate::net::MAX_MAC_ENTRIES;

const FILTERS: u64 = ALL | feature::CTRL_VLAN;

/// Which of these destinations get through: its own, another device's, a group's, everybody's.
fn passing(rig: &mut Rig) -> [bool; 4] {
    [MAC, PEER, MacAddr([1, 0, 0x5e, 0, 0, 1]), MacAddr::BROADCAST].map(|to| {
        if rig.buffers.is_empty() {
            (0..60).for_each(|_| rig.offer(BUFFER));
        }
        rig.network.give(TestFrame::new(frame(to, 100)));
        rig.received().is_some()
    })
}

fn table(unicast: &[MacAddr], multicast: &[MacAddr]) -> Vec<u8> {
    let one = |addresses: &[MacAddr]| {
        let count = u32::try_from(addresses.len()).unwrap().to_le_bytes();
        [&count[..], &addresses.iter().flat_map(|mac| mac.0).collect::<Vec<_>>()].concat()
    };
    [one(unicast), one(multicast)].concat()
}

#[test]
fn the_driver_chooses_what_it_gets() {
    let mut rig = Rig::new(ALL);
    let group = MacAddr([1, 0, 0x5e, 0, 0, 1]);
    assert_eq!(passing(&mut rig), [true; 4], "until it says something");
    let steps: [(u8, u8, Vec<u8>, [bool; 4]); 12] = [
        (0, 0, vec![0], [true, false, false, true]),
        (0, 1, vec![1], [true, false, true, true]),
        (0, 1, vec![0], [true, false, false, true]),
        (0, 2, vec![1], [true, true, false, true]),
        (0, 4, vec![1], [false, false, false, true]),
        (0, 5, vec![1], [false; 4]),
        (0, 4, vec![0], [true, true, false, false]),
        (0, 2, vec![0], [true, false, false, false]),
        (1, 0, table(&[PEER], &[group]), [true, true, true, false]),
        (0, 3, vec![1], [true, true, false, false]),
        (1, 1, MacAddr([2; 6]).0.to_vec(), [false, true, false, false]),
        (0, 0, vec![1], [true; 4]),
    ];
    for (class, command, data, expected) in steps {
        assert!(rig.command(class, command, &data), "{class} {command}");
        assert_eq!(passing(&mut rig), expected, "{class} {command} {data:?}");
    }
    assert!(rig.handle.counters().filtered > 0);
    assert_eq!(rig.handle.mac(), MacAddr([2; 6]));
    assert_eq!(rig.network.filter().unwrap().mac, MacAddr([2; 6]), "the network hears of it");
    assert_eq!(rig.config()[..6], [2; 6], "and so does who reads the configuration (5.1.6.5.2)");
    rig.start(ALL);
    assert_eq!((passing(&mut rig), rig.handle.mac()), ([true; 4], MAC), "a reset");
    assert_eq!(rig.config()[..6], MAC.0);
}

#[test]
fn more_addresses_than_are_kept_are_all_addresses() {
    let mut rig = Rig::new(ALL);
    assert!(rig.command(0, 0, &[0]));
    let many: Vec<_> = (0..).map(MacAddr::local).take(MAX_MAC_ENTRIES + 1).collect();
    assert!(rig.command(1, 0, &table(&many[1..], &[])));
    assert_eq!(passing(&mut rig), [true, true, false, true], "PEER is among them");
    assert!(rig.command(1, 0, &table(&many[4..], &[])));
    assert_eq!(passing(&mut rig), [true, false, false, true]);
    assert!(rig.command(1, 0, &table(&many, &many)));
    assert_eq!(passing(&mut rig), [true; 4]);
    assert!(rig.command(1, 0, &table(&[], &[])));
    assert_eq!(passing(&mut rig), [true, false, false, true]);
}

#[test]
fn vlans_are_let_in_one_by_one() {
    let mut rig = Rig::new(FILTERS);
    (0..20).for_each(|_| rig.offer(BUFFER));
    let tagged = |vlan: u16| {
        let mut bytes = frame(MAC, 100);
        bytes[12..14].copy_from_slice(&[0x81, 0]);
        // With a priority.
        bytes[14..16].copy_from_slice(&(vlan | 0x6000).to_be_bytes());
        TestFrame::new(bytes)
    };
    let passing = |rig: &mut Rig| {
        [0, 5, 4095].map(|vlan| {
            rig.network.give(tagged(vlan));
            rig.received().is_some()
        })
    };
    assert_eq!(passing(&mut rig), [false; 3]);
    for vlan in [5_u16, 4095] {
        assert!(rig.command(2, 0, &vlan.to_le_bytes()));
    }
    assert_eq!(passing(&mut rig), [false, true, true]);
    assert!(rig.command(2, 1, &5_u16.to_le_bytes()));
    assert_eq!(passing(&mut rig), [false, false, true]);
    assert!(!rig.command(2, 0, &4096_u16.to_le_bytes()));
    rig.network.give(TestFrame::new(frame(MAC, 100)));
    assert!(rig.received().is_some(), "untagged frames pass");
}

#[test]
fn offloads_can_be_given_up_and_taken_again() {
    let mut rig = Rig::new(ALL);
    (0..20).for_each(|_| rig.offer(BUFFER));
    let give = |rig: &mut Rig| {
        rig.network.give(TestFrame::new(frame(MAC, 1000)).with_info(segmented()));
        rig.received().is_some()
    };
    assert!(give(&mut rig));
    assert!(rig.command(5, 0, &feature::GUEST_CSUM.to_le_bytes()));
    assert_eq!(rig.network.agreed().unwrap().receive, Offloads::CSUM);
    assert!(!give(&mut rig));
    let both = feature::GUEST_CSUM | feature::GUEST_TSO4;
    assert!(rig.command(5, 0, &both.to_le_bytes()));
    assert!(give(&mut rig));
    // What needs something else, what is none, and what was not agreed upon.
    for wrong in [feature::GUEST_TSO4, 1 << 10 | 2, feature::CSUM, u64::MAX] {
        assert!(!rig.command(5, 0, &wrong.to_le_bytes()), "{wrong:#x}");
    }
    assert!(give(&mut rig));
    assert_eq!(rig.network.agreed().unwrap().receive, Offloads::CSUM | Offloads::TSO4);
}

#[test]
fn commands_that_are_none_change_nothing() {
    let mut rig = Rig::new(FILTERS);
    let before = rig.network.filter();
    let mut cases: Vec<(u8, u8, Vec<u8>)> = vec![
        (0, 6, vec![0]),
        (0, 0, vec![]),
        (1, 1, vec![1, 0, 0, 0, 0, 0]),
        (1, 1, vec![0; 6]),
        (1, 1, vec![2; 5]),
        (1, 2, vec![2; 6]),
        (2, 2, vec![0; 2]),
        (2, 0, vec![0]),
        (3, 1, vec![]),
        (4, 0, vec![2, 0]),
        (4, 0, vec![0, 0]),
        (4, 1, vec![1, 0]),
        (5, 0, vec![0; 7]),
        (5, 1, vec![0; 8]),
        (6, 0, vec![0; 8]),
        (0xff, 0xff, vec![0xff; 200]),
    ];
    let good = table(&[PEER], &[PEER, MAC]);
    cases.extend((0..good.len()).map(|len| (1, 0, good[..len].to_vec())));
    cases.push((1, 0, [&good[..], &[0]].concat()));
    cases.push((1, 0, [&u32::MAX.to_le_bytes()[..], &good].concat()));
    let count = cases.len() as u64;
    for (class, command, data) in cases {
        assert!(!rig.command(class, command, &data), "{class} {command} {data:?}");
    }
    assert_eq!((rig.network.filter(), rig.handle.counters().commands_refused), (before, count));
}

#[test]
fn a_command_without_room_for_its_answer_is_not_obeyed() {
    let mut rig = Rig::new(ALL);
    rig.put(COMMAND, &[0, 0, 0]);
    let heads = [
        rig.control.chain().readable(COMMAND, 3).submit().unwrap(),
        rig.control.chain().readable(COMMAND, 3).writable(ANSWER, 0).submit().unwrap(),
        rig.control.chain().readable(COMMAND, 3).writable(NOWHERE, 1).submit().unwrap(),
        rig.control.chain().writable(ANSWER, 1).submit().unwrap(),
        rig.control.chain().readable(COMMAND, 1).writable(ANSWER, 1).submit().unwrap(),
        rig.control.chain().readable(NOWHERE, 3).writable(ANSWER, 1).submit().unwrap(),
    ];
    rig.driver.notify(2);
    for (head, written) in heads.into_iter().zip([0, 0, 0, 1, 1, 1]) {
        assert_eq!(rig.control.take_used().unwrap(), Some((head.into(), written)));
    }
    assert!(rig.network.filter().unwrap().promiscuous || rig.handle.counters().commands_refused == 5);
}

#[test]
fn features_that_were_not_agreed_upon_have_no_commands() {
    let mut rig = Rig::new(feature::CTRL_VQ);
    let data = [(0, 0, 1), (0, 2, 1), (1, 1, 6), (2, 0, 2), (3, 0, 0), (4, 0, 2), (5, 0, 8)];
    for (class, command, len) in data {
        assert!(!rig.command(class, command, &vec![2; len]), "{class} {command}");
    }
}

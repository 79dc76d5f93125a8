//! Guests that do anything at all, at a hub whose members come and go.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Action {
    Store { who: usize, bar: usize, offset: u64, data: Vec<u8> },
    Load { who: usize, bar: usize, offset: u64, size: usize },
    Configure { who: usize, offset: u64, value: u32 },
    Move { who: usize, place: u64 },
    Decode { who: usize, on: bool },
    Ring { who: usize, peer: u16, vector: u16 },
    Leave { who: usize },
    Join { who: usize },
    Reset { who: usize },
}

fn action() -> impl Strategy<Value = Action> {
    let who = || 0..3_usize;
    let offset = || prop_oneof![0..0x40_u64, 0x7f0..0x820_u64, 0..SIZE, any::<u64>()];
    let data = prop::collection::vec(any::<u8>(), 1..9);
    prop_oneof![
        3 => (who(), 0..3_usize, offset(), data)
            .prop_map(|(who, bar, offset, data)| Action::Store { who, bar, offset, data }),
        2 => (who(), 0..3_usize, offset(), 1..9_usize)
            .prop_map(|(who, bar, offset, size)| Action::Load { who, bar, offset, size }),
        2 => (who(), 0..0x80_u64, any::<u32>())
            .prop_map(|(who, offset, value)| Action::Configure { who, offset: offset & !3, value }),
        3 => (who(), 0..0x600_u64).prop_map(|(who, place)| Action::Move { who, place }),
        2 => (who(), any::<bool>()).prop_map(|(who, on)| Action::Decode { who, on }),
        4 => (who(), 0..6_u16, 0..4_u16).prop_map(|(who, peer, vector)| Action::Ring { who, peer, vector }),
        1 => who().prop_map(|who| Action::Leave { who }),
        1 => who().prop_map(|who| Action::Join { who }),
        1 => who().prop_map(|who| Action::Reset { who }),
    ]
}

fn perform(hub: &Hub, machines: &mut [Option<Machine>; 3], action: &Action) {
    let machine = |who: usize| machines[who].as_ref();
    match action {
        Action::Store { who, bar, offset, data } => {
            if let Some(machine) = machine(*who) {
                let base = machine.bar(*bar);
                machine.mmio.write(GuestAddress(base.wrapping_add(*offset)), data);
            }
        }
        Action::Load { who, bar, offset, size } => {
            if let Some(machine) = machine(*who) {
                let base = machine.bar(*bar);
                machine.mmio.read(GuestAddress(base.wrapping_add(*offset)), &mut vec![0; *size]);
            }
        }
        Action::Configure { who, offset, value } => {
            if let Some(machine) = machine(*who) {
                machine.configure(*offset, &value.to_le_bytes());
            }
        }
        Action::Move { who, place } => {
            if let Some(machine) = machine(*who) {
                machine.configure(0x18, &(0xe7ff_0000 + place * SIZE / 4).to_le_bytes()[..4]);
            }
        }
        Action::Decode { who, on } => {
            if let Some(machine) = machine(*who) {
                machine.configure(COMMAND, &[if *on { 6 } else { 0 }, 0]);
            }
        }
        Action::Ring { who, peer, vector } => {
            if let Some(machine) = machine(*who) {
                machine.ring(*peer, *vector);
            }
        }
        Action::Leave { who } => machines[*who] = None,
        Action::Join { who } => {
            if machines[*who].is_none() {
                machines[*who] = Some(Machine::ready(join(hub)));
            }
        }
        Action::Reset { who } => {
            if let Some(machine) = machine(*who) {
                machine.bridge.reset();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_guest_sees_the_memory_where_its_bar_is(actions in prop::collection::vec(action(), 1..120)) {
        let hub = Hub::new(region("random"), 3).unwrap();
        let mut machines = [Some(Machine::ready(join(&hub))), Some(Machine::ready(join(&hub))), None];
        for action in &actions {
            perform(&hub, &mut machines, action);
            for machine in machines.iter().flatten() {
                let sees: Vec<u64> =
                    lock(&machine.guest.sees).iter().map(|(region, _)| region.start_addr().0).collect();
                let answers = machine.bridge.mappings().iter().any(|mapping| {
                    mapping.bar == 2 && mapping.status == crate::pci::BarStatus::Mapped
                });
                let expected = if answers { vec![machine.bar(2)] } else { vec![] };
                prop_assert_eq!(&sees, &expected, "after {:?}", action);
            }
            let present: Vec<u16> = {
                let mut all: Vec<u16> = machines.iter().flatten()
                    .map(|machine| lock(&machine.function).member().position()).collect();
                all.sort_unstable();
                all
            };
            prop_assert_eq!(hub.members(), present);
        }
        // Nothing that was rung is lost: what went out came in, where nobody has left meanwhile.
        if !actions.iter().any(|action| matches!(action, Action::Leave { .. })) {
            let sum = |count: fn(&IvshmemFigures) -> u64| -> u64 {
                machines.iter().flatten().map(|machine| count(&machine.figures())).sum()
            };
            prop_assert_eq!(sum(|figures| figures.rung), sum(|figures| figures.received));
        }
    }
}

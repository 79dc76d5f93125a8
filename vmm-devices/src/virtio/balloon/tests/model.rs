//! The device against a model that knows each page.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Inflate(Vec<u32>),
    Deflate(Vec<u32>),
    Report(Vec<(u32, u32)>),
    Poison(u32),
    Refuse(bool),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let numbers = || prop::collection::vec(prop_oneof![4 => 0x1f0..0x220_u32, 1 => any::<u32>()], 0..40);
    let buffers = prop::collection::vec((0x1f_0000..0x22_0000_u32, 0..0x6000_u32), 1..8);
    prop_oneof![
        4 => numbers().prop_map(Step::Inflate),
        2 => numbers().prop_map(Step::Deflate),
        4 => buffers.prop_map(Step::Report),
        1 => (0..2_u32).prop_map(Step::Poison),
        1 => any::<bool>().prop_map(Step::Refuse),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    /// Released is what is RAM of what was said, page by page; counted is all of it.
    #[test]
    fn agrees_with_a_model(steps in prop::collection::vec(step(), 1..24)) {
        let (mut t, ledger) =
            test(guest_memory_of(&[(0, 2 * MIB), (2 * MIB, 0x8000), (2 * MIB + 0x9000, 0x8000)]).unwrap());
        let is_ram = |page: &u64| *page < 0x208 || (0x209..0x211).contains(page);
        let (mut refuse, mut poison, mut model) = (false, 0, BalloonCounters::default());
        t.start(feature::PAGE_REPORTING | feature::PAGE_POISON, &[0, 1, 4]);
        for step in steps {
            let mut pages: Vec<u64> = Vec::new();
            let (mut kept, mut counter) = (false, &mut model.inflated);
            match &step {
                Step::Inflate(numbers) | Step::Deflate(numbers) => {
                    t.send(u16::from(matches!(step, Step::Deflate(_))), numbers);
                    pages.extend(numbers.iter().map(|number| u64::from(*number)));
                    pages.sort_unstable();
                    pages.dedup();
                    if matches!(step, Step::Deflate(_)) {
                        counter = &mut model.deflated;
                    }
                    model.requests += 1;
                }
                Step::Report(buffers) => {
                    t.report(&buffers.iter().map(|(gpa, len)| (u64::from(*gpa), *len)).collect::<Vec<_>>());
                    for (start, len) in buffers.iter().filter(|(_, len)| *len > 0) {
                        let (start, end) = (u64::from(*start), u64::from(start + len));
                        for page in start / PAGE..end.div_ceil(PAGE) {
                            if page * PAGE < start || (page + 1) * PAGE > end {
                                model.skipped += 1;
                            } else {
                                pages.push(page);
                            }
                        }
                    }
                    kept = poison != 0;
                    counter = if kept { &mut model.poisoned } else { &mut model.reported };
                    model.requests += 1;
                }
                Step::Poison(value) => {
                    t.driver.write_config(12, &value.to_le_bytes());
                    poison = *value;
                }
                Step::Refuse(value) => {
                    ledger.0.refuse.store(*value, Ordering::SeqCst);
                    refuse = *value;
                }
                Step::Reset => {
                    t.queues = queues(&t.memory);
                    t.start(feature::PAGE_REPORTING | feature::PAGE_POISON, &[0, 1, 4]);
                    poison = 0;
                }
            }
            let ram = pages.iter().filter(|page| is_ram(page)).count() as u64;
            model.skipped += pages.len() as u64 - ram;
            *(if refuse && !kept { &mut model.failed } else { counter }) += ram;
            pages.retain(is_ram);
            let reclaimed = std::mem::take(&mut *lock(&ledger.0.reclaimed));
            let mut done: Vec<u64> =
                [ledger.take(), reclaimed].concat().iter().flat_map(|(page, pages)| *page..page + pages).collect();
            done.sort_unstable();
            pages.sort_unstable();
            prop_assert_eq!(done, if refuse || kept { vec![] } else { pages });
            prop_assert_eq!(t.handle.counters(), model);
        }
    }
}

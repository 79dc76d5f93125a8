//! A slice of what the program does, for every test run.

use crate::backend::Tier;
use crate::generate::Shape;
use crate::host;
use crate::run::{Plan, Sides, all_forms};

/// Cases of each form.
const EACH: u64 = 4;

fn plan(tier: Tier, shape: Shape) -> Plan {
    Plan { seed: 20, cases: 0, forms: all_forms(), threads: 1, plant: None, tier, shape }
}

#[test]
fn instructions_do_as_the_processors() {
    does_as_the_processor(Shape::Plain);
}

#[test]
fn sequences_do_as_the_processors() {
    does_as_the_processor(Shape::Sequence);
}

fn does_as_the_processor(shape: Shape) {
    if let Some(problem) = host::problem() {
        println!("skipped: {problem}");
        return;
    }
    let plan = plan(Tier::All, shape);
    let summary = Sides::new(Tier::All).unwrap().some(&plan, 0, EACH * plan.forms.len() as u64).unwrap();
    let kept = summary.kept.iter().map(|mismatch| format!("{}, {:?}", mismatch.number, mismatch.target));
    assert_eq!(
        summary.mismatches,
        0,
        "run `difftest --tier all --seed 20 --case NUMBER` ({shape:?}): {:?}",
        kept.collect::<Vec<_>>()
    );
    for code in &plan.forms {
        assert!(summary.tally.reaches(*code, 1), "no case of {code:?} was compared");
    }
}

#[test]
fn planted_errors_are_noticed() {
    if let Some(problem) = host::problem() {
        println!("skipped: {problem}");
        return;
    }
    let mut sides = Sides::new(Tier::Interpreter).unwrap();
    // Some of all kinds of results.
    for code in all_forms().into_iter().step_by(29) {
        let plan = Plan { forms: vec![code], plant: Some(code), ..plan(Tier::Interpreter, Shape::Plain) };
        let summary = sides.some(&plan, 0, 128).unwrap();
        assert_ne!(summary.mismatches, 0, "{code:?}");
    }
}

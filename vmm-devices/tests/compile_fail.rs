//! What does not compile: a channel that is opened without the grant for it. Each file of `compile_fail` has one way to try, and beside
//! it what the compiler says.

#[test]
fn channels_do_not_open_without_grants() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}

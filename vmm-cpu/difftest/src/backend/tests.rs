use super::*;
use crate::native::Native;
use crate::native::tests::case;
use crate::start;

fn both(native: &mut Native, backend: &mut Backend, case: &Case) -> (Outcome, Outcome) {
    let prepared = start::prepare(case).unwrap();
    native.start([&prepared]).unwrap();
    let ours = backend.run(case, &prepared).unwrap();
    (native.finish(&[(case, &prepared)]).unwrap().remove(0).unwrap(), ours)
}

#[test]
fn both_sides_agree() {
    both_sides_agree_with(Who::Interpreter);
    both_sides_agree_with(Who::Translator);
}

fn both_sides_agree_with(who: Who) {
    let (mut native, mut backend) = (Native::new().unwrap(), Backend::new(who).unwrap());
    let long: &[&[u8]] = &[
        &[0x90],
        &[0xcc],
        &[0x0f, 0x0b],
        &[0xf4],
        &[0xcd, 0x05],
        &[0xf7, 0xf0],
        &[0x0f, 0x05],
        &[0xcd, 0x80],
        &[0x88, 0x04, 0x25, 0x05, 0x00, 0x20, 0x10],
        &[0x88, 0x04, 0x25, 0x05, 0x00, 0x10, 0x10],
        &[0xeb, 0xfe],
        &[0x50],
        &[0x8c, 0xd8],
    ];
    let compatibility: &[&[u8]] =
        &[&[0x40, 0x37], &[0x8c, 0xd8], &[0x06], &[0xce], &[0x65, 0xa1, 0, 0, 0x10, 0x10]];
    let modes = [(Mode::Long, long), (Mode::Compatibility, compatibility)];
    for (mode, code) in modes.into_iter().flat_map(|(mode, codes)| codes.iter().map(move |code| (mode, code)))
    {
        let (native, ours) = both(&mut native, &mut backend, &case(mode, code));
        assert_eq!((native.ending, native.selectors), (ours.ending, ours.selectors), "{code:02x?}");
        assert_eq!(native.stores, ours.stores, "{code:02x?}");
        if native.ending != Ending::TimedOut {
            assert_eq!(native.rip, ours.rip, "{code:02x?}");
            assert_eq!(native.registers.general, ours.registers.general, "{code:02x?}");
            assert_eq!(native.registers.rflags, ours.registers.rflags, "{code:02x?}");
        }
    }
}

//! What AMD's processors do where the manuals leave a choice, as compared with one.

use crate::translate::core::Reason;
use crate::translate::cpu::{RAX, RDI, cr4};
use crate::translate::ops::misc::bench::{Bench, HOLE};

/// FSW with TOP 3.
const STATUS: u16 = 3 << 11;

fn bench() -> Bench {
    let mut bench = Bench::new(64);
    bench.core.cpu.cr4 |= cr4::OSFXSR | cr4::OSXMMEXCPT;
    bench.core.update_mode();
    bench.core.cpu.x87.set_status(STATUS);
    bench
}

fn fault(result: Result<(), Reason>) -> (u8, Option<u64>) {
    match result {
        Err(Reason::Exception(exception)) => (exception.vector, exception.cr2),
        other => panic!("{other:?} in place of an exception"),
    }
}

#[test]
fn conversion_from_memory_leaves_x87_alone() {
    let mut bench = bench();
    bench.set(&[(RAX, 0x8_0000)]);
    // CVTPI2PS XMM0, [RAX] and CVTPI2PD.
    bench.run(&[0x0f, 0x2a, 0x00]).unwrap();
    bench.run(&[0x66, 0x0f, 0x2a, 0x00]).unwrap();
    assert_eq!((bench.core.cpu.x87.status(), bench.core.cpu.x87.tags()), (STATUS, 0));
    // CVTPI2PS XMM0, MM0.
    bench.run(&[0x0f, 0x2a, 0xc0]).unwrap();
    assert_eq!((bench.core.cpu.x87.status(), bench.core.cpu.x87.tags()), (0, 0xff));
}

#[test]
fn conversion_to_mmx_that_ends_in_an_exception_is_seen_in_x87() {
    let mut bench = bench();
    bench.core.cpu.set_xmm(0, u128::MAX);
    bench.core.cpu.mxcsr = 0x1f00;
    // CVTTPS2PI MM0, XMM0 of NaNs, the invalid exception unmasked.
    assert_eq!(fault(bench.run(&[0x0f, 0x2c, 0xc0])).0, 19);
    assert_eq!((bench.core.cpu.x87.status(), bench.core.cpu.x87.tags()), (0, 0xff));
}

#[test]
fn masked_store_of_nothing_faults() {
    // MASKMOVQ MM0, MM0 and MASKMOVDQU XMM0, XMM0.
    for (code, tags) in [(&[0x0f, 0xf7, 0xc0][..], 0xff), (&[0x66, 0x0f, 0xf7, 0xc0], 0)] {
        let mut bench = bench();
        bench.set(&[(RDI, HOLE)]);
        assert_eq!(fault(bench.run(code)), (14, Some(HOLE)), "{code:x?}");
        assert_eq!(bench.core.cpu.x87.tags(), tags, "{code:x?}");
    }
}

#[test]
fn sha_takes_memory_of_any_alignment() {
    let mut bench = bench();
    bench.set(&[(RAX, 0x8_0001)]);
    // SHA1MSG1 XMM0, [RAX]; SHA256RNDS2; and PXOR, which does not.
    bench.run(&[0x0f, 0x38, 0xc9, 0x00]).unwrap();
    bench.run(&[0x0f, 0x38, 0xcb, 0x00]).unwrap();
    assert_eq!(fault(bench.run(&[0x66, 0x0f, 0xef, 0x00])).0, 13);
}

#[test]
fn whole_image_must_be_accessible() {
    // FXSAVE [RAX] and FXRSTOR, whose last 16 bytes are not there.
    for code in [[0x0f, 0xae, 0x00], [0x0f, 0xae, 0x08]] {
        let mut bench = bench();
        bench.set(&[(RAX, HOLE - 496)]);
        assert_eq!(fault(bench.run(&code)), (14, Some(HOLE)), "{code:x?}");
        assert_eq!(bench.peek(HOLE - 496, 496), [0; 496], "{code:x?}");
    }
}

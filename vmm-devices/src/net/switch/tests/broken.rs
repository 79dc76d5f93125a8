//! Senders that change a frame while it is looked at, and frames that are none.

use std::sync::atomic::AtomicBool;
use std::thread;

use vmm_memory::vm_memory::{MmapRegion, VolatileMemory as _};

use super::*;

#[test]
fn what_is_no_frame_is_dropped() {
    let lan = Lan::new();
    let [mut a, mut b] = ["a", "b"].map(|name| lan.plain(name));
    a.send(&frame(2, 1, "")[..13]);
    a.send(&tagged(2, 1, &[0], "")[..17]);
    a.send(&vec![2; MAX_FRAME + 1]);
    let inside =
        PacketInfo { checksum: Some(crate::net::Checksum { start: 14, offset: 0 }), ..PacketInfo::default() };
    a.send_as(&inside, &tagged(2, 1, &[0], "a checksum in the tag"));
    assert_eq!((b.received(), lan.dropped("a", DropReason::Malformed)), (0, 4));
    assert_eq!(lan.switch.macs(), []);
}

/// CVE-2015-8550: what was looked at is what is delivered. The sender of this one changes source, tag and type all the while.
#[test]
fn cve_2015_8550_a_frame_is_read_once() {
    let lan = Lan::new();
    let config = PortConfig::new("a").vlans(trunk(None, &[7])).mac(mac(1));
    let mut a = lan.device(config);
    let mut b = lan.device(PortConfig::new("b").vlans(access(7)).mac(mac(2)).queue_bytes(16 << 20));
    let mut eavesdrop = lan.device(PortConfig::new("c").vlans(access(8)).mac(mac(2)));
    let memory = MmapRegion::<()>::new(4096).unwrap();
    let start = [tagged(2, 1, &[7], "honest"), vec![0; 1000]].concat();
    let slice = || memory.get_slice(0, start.len()).unwrap();
    slice().copy_from(&start);
    let done = AtomicBool::new(false);
    let (mut honest, mut forged) = (0, 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            let forged = tagged(2, 3, &[8], "forged");
            let honest = tagged(2, 1, &[7], "honest");
            while !done.load(Ordering::SeqCst) {
                // The source, then the tag.
                for bytes in [&forged, &honest] {
                    slice().offset(11).unwrap().copy_from(&bytes[11..12]);
                    slice().offset(15).unwrap().copy_from(&bytes[15..16]);
                }
            }
        });
        for _ in 0..30_000 {
            assert_eq!(a.ports[0].transmit(&PacketInfo::default(), &[slice()]).unwrap(), Sent::Done);
            while let Some(frame) = b.receive() {
                assert_eq!(frame[6..12], mac(1).0, "a source that was not looked at");
                assert_eq!(frame[12..14], [0x88, 0xb5]);
                honest += 1;
            }
        }
        done.store(true, Ordering::SeqCst);
        forged += lan.dropped("a", DropReason::Spoofed) + lan.dropped("a", DropReason::Vlan);
    });
    assert!(honest > 100 && forged > 100, "no race: {honest}, {forged}");
    assert_eq!(eavesdrop.received(), 0);
}

/// CVE-2015-8550, without a race: the frame changes as soon as it has been judged.
#[test]
fn cve_2015_8550_what_was_judged_is_what_is_delivered() {
    let lan = Lan::new();
    let mut a = lan.device(PortConfig::new("a").mac(mac(1)));
    let mut b = lan.device(PortConfig::new("b").mac(mac(2)));
    let memory = Arc::new(MmapRegion::<()>::new(4096).unwrap());
    let (honest, forged) = (frame(2, 1, "honest"), frame(2, 3, "forged"));
    memory.get_slice(0, honest.len()).unwrap().copy_from(&honest);
    let of_judge = Arc::clone(&memory);
    lan.switch.set_judge(Some(Arc::new(move |_: &Flow<'_>| {
        of_judge.get_slice(0, forged.len()).unwrap().copy_from(&forged);
        Verdict::Pass
    })));
    let slices = [memory.get_slice(0, honest.len()).unwrap()];
    assert_eq!(a.ports[0].transmit(&PacketInfo::default(), &slices).unwrap(), Sent::Done);
    assert_eq!(b.receive(), Some(honest));
}

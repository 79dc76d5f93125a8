//! Bytes of anybody's: no packet ends the service, or does more to the guest than the protocol says.

use crate::client::{Client, hex, packet};
use crate::machine::Machine;

/// Numbers that look random, the same each time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % end
    }
}

/// The stub is there and knows the machine.
fn assert_served(machine: &Machine, after: &[u8]) {
    let mut gdb = machine.attach();
    assert_eq!(gdb.ask("g").len(), 2 * 608, "after {:?}", String::from_utf8_lossy(after));
}

#[test]
fn malformed_packets_end_at_most_the_connection() {
    let (machine, _) = Machine::looping(1);
    let long = [b"$".to_vec(), vec![b'a'; 1 << 20]].concat();
    let many = vec![b'x'; 1 << 16];
    let mut sent: Vec<Vec<u8>> = vec![
        long,
        many,
        b"$g#00".to_vec(),
        b"$g#zz".to_vec(),
        b"#$#$#".to_vec(),
        b"-".to_vec(),
        vec![0; 4096],
        vec![3; 64],
        packet(b""),
        packet(b"m"),
        packet(b"m,"),
        packet(b"m0,ffffffffffffffff"),
        packet(b"mffffffffffffffff,ffffffffffffffff"),
        packet(b"mffffffffffffff00,1000"),
        packet(b"M0,ffffffffffffffff:00"),
        packet(b"M0,1:0"),
        packet(b"X0,10:a"),
        packet(b"p"),
        packet(b"pffffffffffffffff"),
        packet(b"P10"),
        packet(b"P10=zz"),
        packet(b"G00"),
        packet(b"Z0,,"),
        packet(b"Z9,0,0"),
        packet(b"Z2,ffffffffffffffff,ffffffffffffffff"),
        packet(b"Hg0"),
        packet(b"Hg-1"),
        packet(b"Hgffffffffffffffff"),
        packet(b"vCont;s:ffff"),
        packet(b"vCont;s"),
        packet(b"vCont;x:1"),
        packet(b"vCont;r0,ffffffffffffffff:1"),
        packet(b"qXfer:features:read:target.xml:ffffffffffffffff,ffffffffffffffff"),
        packet(b"qXfer:features:read:../../etc/passwd:0,1000"),
        packet(b"qXfer:memory-map:read::0,100"),
        packet(b"vFile:open:2f6574632f706173737764,0,0"),
        packet(b"vRun;2f62696e2f7368"),
        packet(b"qRcmd,"),
        packet(b"qRcmd,zz"),
        packet(b"qRcmd,ff00ff"),
        packet(b"qThreadExtraInfo,ffffffff"),
        packet(b"T0"),
        packet(b"QStartNoAckMode"),
        packet(format!("qRcmd,{}", hex(&[b'a'; 8000])).as_bytes()),
    ];
    sent.push(sent.concat());
    for bytes in sent {
        let mut gdb = Client::connect(&machine.address);
        // The stub may hang up in the middle of it.
        gdb.try_send(&bytes);
        drop(gdb);
        assert_served(&machine, &bytes[..bytes.len().min(80)]);
    }
}

#[test]
fn packets_changed_at_random_end_at_most_the_connection() {
    const PACKETS: [&str; 16] = [
        "qSupported:multiprocess+;swbreak+;hwbreak+;vContSupported+",
        "qXfer:features:read:target.xml:0,3fb",
        "vMustReplyEmpty",
        "Hgp1.1",
        "m8000,40",
        "M40000,4:01020304",
        "X40000,2:ab",
        "p10",
        "P1=0102030405060708",
        "Z0,8000,1",
        "Z1,8000,1",
        "z0,8000,1",
        "Z2,40000,8",
        "vCont;s:p1.1",
        "qRcmd,7472616e736c6174652030",
        "qThreadExtraInfo,p1.1",
    ];
    let (machine, _) = Machine::looping(2);
    let mut numbers = Numbers(1);
    let mut gdb = Client::connect(&machine.address);
    for round in 0..3000 {
        let mut body = PACKETS[numbers.below(PACKETS.len())].as_bytes().to_vec();
        for _ in 0..=numbers.below(3) {
            let at = numbers.below(body.len());
            match numbers.below(4) {
                0 => body[at] = b"0123456789abcdef,;:=-+p."[numbers.below(24)],
                1 => body[at] = b" ~#$}*\0\x03\xff"[numbers.below(9)],
                2 => drop(body.remove(at)),
                _ => body.insert(at, b'f'),
            }
            if body.is_empty() {
                body.push(b'?');
            }
        }
        gdb.try_send(&packet(&body));
        if round % 20 == 19 {
            gdb = Client::connect(&machine.address);
        }
    }
    drop(gdb);
    assert_served(&machine, b"all of them");
}

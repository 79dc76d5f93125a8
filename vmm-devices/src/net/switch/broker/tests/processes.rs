//! Broker and clients that are processes, and are killed.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use super::*;

/// What this test, started as a process of its own, is to be, and where.
const ROLE: &str = "VMM_DEVICES_SWITCH_ROLE";
const PLACE: &str = "VMM_DEVICES_SWITCH_PLACE";

fn role(role: &str) -> ! {
    let path = PathBuf::from(std::env::var(PLACE).unwrap());
    if role == "broker" {
        let broker = Broker::start(&path);
        println!("here");
        while let Ok(event) = broker.events.recv() {
            println!("{event:?}");
        }
        std::process::exit(1);
    }
    // A client that sends all the time.
    let mut device = Device::new(&path, "child", 5);
    println!("here");
    loop {
        device.try_send(&PacketInfo::default(), &frame(1, 5, &[5; 20_000]));
        device.try_receive();
    }
}

fn start(role: &str, path: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "--nocapture",
            "net::switch::broker::tests::processes::whoever_is_killed_takes_nothing_with_it",
        ])
        .env(ROLE, role)
        .env(PLACE, path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    while !lines.next().unwrap().unwrap().contains("here") {}
    // What else it says, nobody reads; it does not wait for that.
    std::thread::spawn(move || lines.count());
    child
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn whoever_is_killed_takes_nothing_with_it() {
    if let Ok(what) = std::env::var(ROLE) {
        role(&what);
    }
    let (_directory, path) = place();
    // A client that is killed in the middle of a frame, several times.
    let broker = Broker::start(&path);
    let mut a = Device::new(&path, "a", 1);
    for _ in 0..5 {
        let child = start("client", &path);
        let pid = i32::try_from(child.id()).unwrap();
        wait_for("frames of the child's", || a.try_receive().filter(|(_, frame)| frame[11] == 5));
        kill(child);
        wait_for("its port to go", || (broker.ports() == ["a"]).then_some(()));
        let was_child =
            |event: &ServerEvent| matches!(event, ServerEvent::Left { peer, .. } if peer.pid == pid);
        wait_for("to be told of it", || broker.events.try_recv().ok().filter(was_child));
        assert!(a.up());
        while a.try_receive().is_some() {}
    }
    drop(broker);
    wait_for("the link to go down", || (!a.up()).then_some(()));

    // A broker that is killed leaves its socket behind.
    let mut brokers = Vec::new();
    for _ in 0..3 {
        let broker = start("broker", &path);
        let mut b = Device::new(&path, "b", 2);
        wait_for("the link to come up", || a.up().then_some(()));
        talk(&mut a, 2, 1, &mut b);
        kill(broker);
        wait_for("links to go down", || (!a.up() && !b.up()).then_some(()));
        assert!(a.try_send(&PacketInfo::default(), &frame(2, 1, b"lost")) && a.try_receive().is_none());
        brokers.push(b);
    }
}

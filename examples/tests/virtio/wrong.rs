//! Devices that a machine cannot have: errors say what to do instead.

use std::process::Command;

fn refused(arguments: &[&str]) -> String {
    let linux =
        Command::new(env!("CARGO_BIN_EXE_linux")).args(["--backend", "translate"]).args(arguments).output();
    let output = linux.unwrap();
    assert!(!output.status.success(), "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn devices_that_cannot_be_are_refused_with_a_way_out() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let disk = path("disk");
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let read_only = format!("{disk},ro");
    let many = ["--disk", &read_only].repeat(8);
    let (port, same) = (format!("a,{}", path("a")), format!("a,{}", path("b")));
    let nowhere = format!("a,{}", path("no/where"));
    let deterministic = "leave --console virtio or --deterministic";
    let cases: &[(&[&str], &str)] = &[
        (&["--deterministic", "--console", "virtio"], deterministic),
        (&["--deterministic", "--port", &port], "--port goes with no deterministic run"),
        (&["--deterministic", "--disk", &disk], "--disk goes with no deterministic run"),
        (&["--deterministic", "--balloon", "1"], "--balloon goes with no deterministic run"),
        (&many, "take --transport pci"),
        (&["--disk", &disk, "--disk", &disk], "an image has one writer or readers alone"),
        (&["--balloon", "257"], "a balloon of 257 MiB is more than the 256 MiB of RAM"),
        // Pages of it would be counted from zero again.
        (&["--balloon", "72057594037927937"], "a balloon of 72057594037927937 MiB is more"),
        (&["--port", &port, "--port", &same], "2 ports are called a"),
        (&["--port", "a b,path"], "no name of a port"),
        (&["--port", "a"], "not NAME,PATH"),
        (&["--port", &nowhere], "no/where"),
        (&["--vsock", "2,path"], "a guest's CID is 3 to 4294967294"),
        (&["--vsock", "3"], "not CID,PATH[,switch=BROKER]"),
        (&["--vsock", &format!("3,{}", path("no/where"))], "no/where"),
        (&["--vsock", &format!("3,{},switch={}", path("v"), path("nobody"))], "nobody"),
        (&["--deterministic", "--vsock", "3,v"], "--vsock goes with no deterministic run"),
        (&["--metrics", "9100"], "HOST:PORT"),
        (&["--net", "tap=nobody-has-it"], "ip tuntap add dev NAME mode tap"),
        (&["--net", "tap=a/b"], "no name of a network device"),
        (&["--net", "nobody-has-it"], "is not tap=NAME"),
        (&["--deterministic", "--net", "tap=t0"], "--net goes with no deterministic run"),
    ];
    for (arguments, expected) in cases {
        let error = refused(arguments);
        assert!(error.contains(expected), "{arguments:?}: {error}");
    }
    let error =
        Command::new(env!("CARGO_BIN_EXE_linux")).args(["--backend", "xen-pv", "--port", &port]).output();
    let error = String::from_utf8(error.unwrap().stderr).unwrap();
    assert!(
        error.contains("--port, --ivshmem, --vsock and --metrics do not go with --backend xen-pv"),
        "{error}"
    );
}

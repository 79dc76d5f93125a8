//! Histories at walls.

use std::sync::Arc;

use super::{connect, monitor, vm};
use crate::channel::{Region, Vsock};
use crate::monitor::*;
use crate::sync::{Mutex, lock};
use crate::{Action, Decision, Layer, Object, Policy, SubjectSpec, Uuid, Verdict};

#[test]
fn who_has_had_to_do_with_one_side_of_a_wall_has_not_with_the_other() {
    let text = "labels red, blue\nlabels free\nwall w: red, blue\nallow any to connect vsock of any\nallow any to notify doorbell of any";
    let history = Arc::new(MemoryHistory::default());
    let build = || Monitor::builder(Policy::parse(text).unwrap()).history(Arc::clone(&history)).build();
    let monitor = build();
    let (red, blue) = (vm(&monitor, 1, &["red"]), vm(&monitor, 2, &["blue"]));
    let (free, other) = (vm(&monitor, 3, &["free"]), vm(&monitor, 4, &["free"]));
    let wall = |decision: Decision| (decision.verdict, decision.layer) == (Verdict::Deny, Layer::Wall);
    assert!(wall(monitor.authorize(&connect(red, blue, 1))));
    assert!(monitor.check(&connect(free, blue, 1)).permits(), "free may choose");
    assert!(monitor.authorize(&connect(free, red, 1)).permits());
    assert!(wall(monitor.authorize(&connect(free, blue, 1))), "it has chosen");
    // What free knows goes on with it: through another it would come to blue.
    assert!(monitor.authorize(&connect(other, free, 1)).permits());
    assert!(wall(monitor.authorize(&connect(other, blue, 1))));
    // It is remembered over lives, monitors and reloads.
    monitor.reload(Policy::parse(&format!("{text}\nlabels more")).unwrap()).unwrap();
    assert!(wall(monitor.authorize(&connect(free, blue, 1))));
    let next = build();
    let blue = vm(&next, 2, &["blue"]);
    let free = vm(&next, 3, &[]);
    assert!(wall(next.authorize(&connect(free, blue, 1))));
    let refused = next.register(SubjectSpec::vm(Uuid::from_u128(4)).label("blue")).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "vm 00000000-0000-0000-0000-000000000004 is, or has been, on another side of the wall \"w\""
    );
}

#[test]
fn what_is_learned_goes_on_along_what_is_open() {
    let text = "labels red, blue, free\nwall w: red, blue\nallow any to connect vsock of any\nallow any to map-ro region of any";
    let monitor = monitor(text);
    let (red, blue) = (vm(&monitor, 1, &["red"]), vm(&monitor, 2, &["blue"]));
    let (one, two, reader) = (vm(&monitor, 3, &[]), vm(&monitor, 4, &[]), vm(&monitor, 5, &[]));
    let _channel = monitor.open::<Vsock>(&connect(one, two, 1)).unwrap();
    let _view =
        monitor.open::<Region>(&Request::new(reader, Action::MapRo, Object::region("r")).of(two)).unwrap();
    let _to_blue = monitor.open::<Vsock>(&connect(two, blue, 1)).unwrap();
    // What one would learn of red, two would learn, and two has had to do with blue.
    assert_eq!(monitor.authorize(&connect(one, red, 1)).layer, Layer::Wall);
    assert_eq!(monitor.authorize(&connect(reader, red, 1)).layer, Layer::Wall, "it has seen what two has");
}

#[test]
fn what_is_learned_while_a_channel_opens_goes_on_along_it() {
    /// Has somebody learn while it is read: between what is decided and what is opened.
    #[derive(Clone, Default)]
    struct Meanwhile(Arc<Mutex<Option<(Monitor, Request<'static>)>>>);
    impl Clock for Meanwhile {
        fn monotonic(&self) -> u64 {
            let learned = lock(&self.0).take();
            if let Some((monitor, request)) = learned {
                assert!(monitor.authorize(&request).permits());
            }
            0
        }

        fn wall(&self) -> u64 {
            0
        }
    }
    let text = "labels red, blue, free\nwall w: red, blue\nallow any to connect vsock of any\nallow any to map-ro region of any\n\
        limit any to map-ro region of any at 10 per second";
    let clock = Meanwhile::default();
    let monitor = Monitor::builder(Policy::parse(text).unwrap()).clock(clock.clone()).build();
    let (red, blue) = (vm(&monitor, 1, &["red"]), vm(&monitor, 2, &["blue"]));
    let (writer, reader) = (vm(&monitor, 3, &[]), vm(&monitor, 4, &[]));
    *lock(&clock.0) = Some((monitor.clone(), connect(writer, red, 1)));
    let view = Request::new(reader, Action::MapRo, Object::region("r")).of(writer);
    let _channel = monitor.open::<Region>(&view).unwrap();
    assert!(lock(&clock.0).is_none(), "the clock was read");
    assert_eq!(monitor.authorize(&connect(reader, blue, 1)).layer, Layer::Wall, "it sees what came from red");
}

#[test]
fn a_history_that_cannot_be_kept_denies() {
    struct Full;
    impl History for Full {
        fn load(&self, _: &Principal) -> Result<Vec<String>, HistoryError> {
            Ok(Vec::new())
        }

        fn record(&self, principal: &Principal, _: &str) -> Result<(), HistoryError> {
            Err(HistoryError { principal: principal.clone(), source: "no room".into() })
        }
    }
    let policy =
        Policy::parse("labels red, blue\nwall w: red, blue\nallow any to connect vsock of any").unwrap();
    let monitor = Monitor::builder(policy).history(Full).build();
    let (red, free) = (vm(&monitor, 1, &["red"]), vm(&monitor, 2, &[]));
    assert_eq!(monitor.authorize(&connect(free, red, 1)).layer, Layer::Wall);
    let (third, fourth) = (vm(&monitor, 3, &[]), vm(&monitor, 4, &[]));
    assert!(monitor.authorize(&connect(third, fourth, 1)).permits(), "nothing is to be kept of those");
}

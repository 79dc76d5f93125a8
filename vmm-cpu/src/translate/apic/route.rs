//! Which local APICs a message goes to (Intel SDM 3A 12.6.2).

use std::sync::Arc;

use super::inbox::Inbox;
use super::message::{Delivery, Message};

/// A set of vCPU indices below 64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct VcpuSet(u64);

impl VcpuSet {
    /// How many indices there are.
    pub(crate) const MAX: usize = 64;

    /// Whether it is empty.
    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether vCPU `index` is in it.
    pub(crate) fn contains(self, index: usize) -> bool {
        index < Self::MAX && self.0 >> index & 1 != 0
    }

    /// The indices, ascending.
    pub(crate) fn iter(self) -> impl Iterator<Item = usize> {
        (0..Self::MAX).filter(move |index| self.contains(*index))
    }

    fn insert(&mut self, index: usize) {
        if index < Self::MAX {
            self.0 |= 1 << index;
        }
    }

    fn only(index: usize) -> Self {
        let mut set = Self::default();
        set.insert(index);
        set
    }
}

/// Posts `message` to those of `inboxes`, which stand by vCPU index, that it is for, and returns which took it. The
/// caller kicks them, the sender excepted, which drains its own inbox before its next instruction. No message
/// reaches a vCPU beyond the first [`VcpuSet::MAX`].
///
/// `sender` is the vCPU whose command register sent it, if any.
pub(crate) fn deliver(inboxes: &[Arc<Inbox>], sender: Option<usize>, message: Message) -> VcpuSet {
    // Each address is looked at once, so that one which changes meanwhile is treated as before or as after.
    let (mut receivers, mut interruptible) = (VcpuSet::default(), VcpuSet::default());
    for (index, inbox) in inboxes.iter().enumerate() {
        if let Some(receiver) = inbox.receives(message.destination, sender == Some(index)) {
            receivers.insert(index);
            if receiver.takes_interrupts {
                interruptible.insert(index);
            }
        }
    }
    let post = |to: VcpuSet, act: &dyn Fn(&Inbox)| {
        for (_, inbox) in inboxes.iter().enumerate().filter(|(index, _)| to.contains(*index)) {
            act(inbox);
        }
        to
    };
    match message.delivery {
        Delivery::Fixed { vector, level } => {
            post(interruptible, &|inbox| inbox.post_interrupt(vector, level))
        }
        Delivery::LowestPriority { vector, level } => {
            let chosen = lowest_priority(inboxes, interruptible, vector);
            post(chosen, &|inbox| inbox.post_interrupt(vector, level))
        }
        Delivery::ExtInt => post(interruptible, &Inbox::post_ext_int),
        Delivery::Nmi => post(receivers, &Inbox::post_nmi),
        Delivery::Init => post(receivers, &Inbox::post_init),
        Delivery::StartUp { page } => post(receivers, &|inbox| inbox.post_start_up(page)),
        Delivery::Smi => VcpuSet::default(),
    }
}

/// The one of `candidates` at the lowest processor priority. Among equals the vector chooses, so that each
/// vector keeps to one vCPU and different ones spread.
fn lowest_priority(inboxes: &[Arc<Inbox>], candidates: VcpuSet, vector: u8) -> VcpuSet {
    let mut lowest = u8::MAX;
    let mut equals = VcpuSet::default();
    for (index, inbox) in inboxes.iter().enumerate().filter(|(index, _)| candidates.contains(*index)) {
        let priority = inbox.priority();
        if priority < lowest {
            (lowest, equals) = (priority, VcpuSet::default());
        }
        if priority == lowest {
            equals.insert(index);
        }
    }
    let turn = usize::from(vector).checked_rem(equals.iter().count());
    turn.and_then(|turn| equals.iter().nth(turn)).map_or(VcpuSet::default(), VcpuSet::only)
}

#[cfg(test)]
mod tests {
    use super::super::base::Mode;
    use super::super::inbox::Address;
    use super::super::message::Destination::{self, All, AllButSender, Logical, Physical, Sender};
    use super::*;

    const XAPIC: Address =
        Address { mode: Mode::Xapic, software_enabled: true, xapic_id: 0, logical_id: 0, model: 0xf };
    const X2APIC: Address = Address { mode: Mode::X2apic, ..XAPIC };
    const NOBODY: [usize; 0] = [];

    fn machine(addresses: impl IntoIterator<Item = (u32, Address)>) -> Vec<Arc<Inbox>> {
        let build = |(id, address)| {
            let inbox = Inbox::new(id);
            inbox.publish(address);
            Arc::new(inbox)
        };
        addresses.into_iter().map(build).collect()
    }

    /// Four in xAPIC mode: IDs 0 to 3, one bit each of the logical ID.
    fn flat() -> Vec<Arc<Inbox>> {
        machine((0..4).map(|id| (u32::from(id), Address { xapic_id: id, logical_id: 1 << id, ..XAPIC })))
    }

    /// Two clusters of two.
    fn clustered() -> Vec<Arc<Inbox>> {
        let logical_ids = [0x01, 0x02, 0x11, 0x12];
        machine(
            (0..4).zip(logical_ids).map(|(id, logical_id)| {
                (u32::from(id), Address { xapic_id: id, logical_id, model: 0, ..XAPIC })
            }),
        )
    }

    fn x2apic() -> Vec<Arc<Inbox>> {
        machine([0, 1, 15, 16, 255, 0x1_0000].map(|id| (id, X2APIC)))
    }

    fn fixed(destination: Destination) -> Message {
        Message { destination, delivery: Delivery::Fixed { vector: 0x40, level: false } }
    }

    fn reached(inboxes: &[Arc<Inbox>], destination: Destination) -> Vec<usize> {
        let told: Vec<_> = deliver(inboxes, Some(1), fixed(destination)).iter().collect();
        let got: Vec<_> = (0..inboxes.len())
            .filter(|index| inboxes[*index].take_interrupts().edge.highest() == Some(0x40))
            .collect();
        assert_eq!(told, got, "what is returned is who got it");
        got
    }

    #[test]
    fn physical() {
        for id in 0..4 {
            assert_eq!(reached(&flat(), Physical(id)), [id as usize]);
        }
        assert_eq!(reached(&flat(), Physical(4)), NOBODY);
        assert_eq!(reached(&flat(), Physical(0x100)), NOBODY, "32 bits are not cut to 8");
        assert_eq!(reached(&flat(), Physical(0xff)), [0, 1, 2, 3]);
        assert_eq!(reached(&flat(), Physical(u32::MAX)), [0, 1, 2, 3]);
        for (index, id) in [0, 1, 15, 16, 255, 0x1_0000].into_iter().enumerate() {
            assert_eq!(reached(&x2apic(), Physical(id)), [index]);
        }
        assert_eq!(reached(&x2apic(), Physical(u32::MAX)), [0, 1, 2, 3, 4, 5]);
        assert_eq!(reached(&x2apic(), Physical(2)), NOBODY);
    }

    #[test]
    fn physical_follows_a_changed_xapic_id() {
        let inboxes = machine([(3, Address { xapic_id: 9, ..XAPIC })]);
        assert_eq!(reached(&inboxes, Physical(9)), [0]);
        assert_eq!(reached(&inboxes, Physical(3)), NOBODY);
    }

    #[test]
    fn logical_flat() {
        assert_eq!(reached(&flat(), Logical(0b0101)), [0, 2]);
        assert_eq!(reached(&flat(), Logical(0xf0)), NOBODY);
        assert_eq!(reached(&flat(), Logical(0)), NOBODY);
        assert_eq!(reached(&flat(), Logical(0x1_0001)), NOBODY);
        assert_eq!(
            reached(&machine([(0, XAPIC)]), Logical(0xff)),
            [0],
            "all ones reaches one without logical ID"
        );
        assert_eq!(reached(&machine([(0, XAPIC)]), Logical(u32::MAX)), [0]);
    }

    #[test]
    fn logical_cluster() {
        assert_eq!(reached(&clustered(), Logical(0x03)), [0, 1]);
        assert_eq!(reached(&clustered(), Logical(0x12)), [3]);
        assert_eq!(reached(&clustered(), Logical(0x1f)), [2, 3]);
        assert_eq!(reached(&clustered(), Logical(0x21)), NOBODY);
        assert_eq!(reached(&clustered(), Logical(0x10)), NOBODY);
        assert_eq!(reached(&clustered(), Logical(0xff)), [0, 1, 2, 3]);
    }

    #[test]
    fn logical_with_no_such_model_reaches_nobody() {
        let inboxes = machine([(0, Address { logical_id: 0xff, model: 7, ..XAPIC })]);
        assert_eq!(reached(&inboxes, Logical(0x01)), NOBODY);
    }

    #[test]
    fn logical_x2apic() {
        assert_eq!(reached(&x2apic(), Logical(0x0000_8003)), [0, 1, 2]);
        assert_eq!(reached(&x2apic(), Logical(0x0001_0001)), [3]);
        assert_eq!(reached(&x2apic(), Logical(0x000f_8000)), [4]);
        assert_eq!(reached(&x2apic(), Logical(0x1000_0001)), [5]);
        assert_eq!(reached(&x2apic(), Logical(0x0001_0000)), NOBODY);
        assert_eq!(reached(&x2apic(), Logical(0xff)), [0, 1], "8 bits of ones are no broadcast here");
        assert_eq!(reached(&x2apic(), Logical(u32::MAX)), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn shorthands() {
        assert_eq!(reached(&flat(), Sender), [1]);
        assert_eq!(reached(&flat(), All), [0, 1, 2, 3]);
        assert_eq!(reached(&flat(), AllButSender), [0, 2, 3]);
        assert!(deliver(&flat(), None, fixed(Sender)).is_empty(), "a device is no APIC");
        assert!(deliver(&flat(), Some(99), fixed(Sender)).is_empty());
    }

    #[test]
    fn disabled_apics_receive_what_the_manual_says() {
        let deliveries = [
            (Delivery::Fixed { vector: 0x40, level: false }, false),
            (Delivery::LowestPriority { vector: 0x40, level: false }, false),
            (Delivery::ExtInt, false),
            (Delivery::Nmi, true),
            (Delivery::Init, true),
            (Delivery::StartUp { page: 1 }, true),
        ];
        for (delivery, without_software_enable) in deliveries {
            let message = Message { destination: All, delivery };
            let software = machine([(0, Address { software_enabled: false, ..XAPIC })]);
            assert_eq!(
                deliver(&software, None, message).contains(0),
                without_software_enable,
                "{delivery:?}"
            );
            assert!(deliver(&[Arc::new(Inbox::new(0))], None, message).is_empty(), "{delivery:?}, not there");
            assert!(deliver(&flat(), None, message).contains(0), "{delivery:?}, enabled");
        }
        assert!(deliver(&flat(), None, Message { destination: All, delivery: Delivery::Smi }).is_empty());
    }

    #[test]
    fn events_arrive_as_what_they_are() {
        let inboxes = flat();
        let send = |delivery| deliver(&inboxes, None, Message { destination: Physical(2), delivery });
        for delivery in [Delivery::Nmi, Delivery::Init, Delivery::StartUp { page: 0x9a }, Delivery::ExtInt] {
            assert_eq!(send(delivery).iter().collect::<Vec<_>>(), [2]);
        }
        let events = inboxes[2].take_events();
        assert!(events.nmi && events.init && events.ext_int);
        assert_eq!(events.start_up, Some(0x9a));
        send(Delivery::Fixed { vector: 0x50, level: true });
        assert_eq!(inboxes[2].take_interrupts().level.highest(), Some(0x50));
    }

    #[test]
    fn lowest_priority_goes_to_one() {
        let inboxes = flat();
        let send = |vector, destination| {
            let delivery = Delivery::LowestPriority { vector, level: false };
            deliver(&inboxes, None, Message { destination, delivery }).iter().collect::<Vec<_>>()
        };
        for (inbox, priority) in inboxes.iter().zip([0x30, 0x20, 0x50, 0x20]) {
            inbox.publish_priority(priority);
        }
        assert_eq!(send(0x40, All), [1]);
        assert_eq!(send(0x41, All), [3], "equals take turns by vector");
        assert_eq!(send(0x41, Logical(0b0101)), [0]);
        assert_eq!(send(0x41, Physical(2)), [2]);
        assert_eq!(send(0x41, Physical(9)), NOBODY);
        for inbox in &inboxes {
            inbox.publish_priority(0xff);
        }
        assert_eq!(send(0x40, All), [0], "the highest priority of all is one to choose, too");
    }

    #[test]
    fn vcpus_beyond_64_are_out_of_reach() {
        let inboxes = machine((0..70).map(|id| (id, X2APIC)));
        assert_eq!(deliver(&inboxes, None, fixed(All)).iter().count(), 64);
        assert!(deliver(&inboxes, None, fixed(Physical(64))).is_empty());
        assert!(!inboxes[64].has_posted());
    }
}

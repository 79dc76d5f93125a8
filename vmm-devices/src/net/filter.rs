//! Which frames a driver wants (Virtio 1.3, 5.1.6.5.1 to 5.1.6.5.3).

use smallvec::SmallVec;

use super::ETHERNET_HEADER;
use super::mac::MacAddr;

/// Addresses of each kind that a filter has at most. A driver that wants more gets everything of that kind.
pub const MAX_MAC_ENTRIES: usize = 64;

/// Addresses of one kind.
pub type MacTable = SmallVec<[MacAddr; 8]>;

/// VLANs that there are (IEEE 802.1Q).
pub const VLANS: u16 = 4096;

/// The type of a frame with a VLAN tag.
const TAGGED: [u8; 2] = [0x81, 0x00];

/// Whether a frame that begins so has a VLAN tag.
pub(crate) fn is_tagged(frame: &[u8]) -> bool {
    frame.first_chunk::<ETHERNET_HEADER>().is_some_and(|header| header.ends_with(&TAGGED))
}

/// Which frames a driver wants. The default is everything.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RxFilter {
    /// The device's own address.
    pub mac: MacAddr,
    /// Everything, whatever else is said but for VLANs.
    pub promiscuous: bool,
    /// Every group's frames.
    pub all_multicast: bool,
    /// Every device's frames.
    pub all_unicast: bool,
    /// No group's frames, but for everybody's.
    pub no_multicast: bool,
    /// No device's frames, not even its own.
    pub no_unicast: bool,
    /// Not even everybody's.
    pub no_broadcast: bool,
    /// Further devices whose frames it takes; `None` for all, as a driver that wants more than [`MAX_MAC_ENTRIES`].
    pub unicast: Option<MacTable>,
    /// Groups whose frames it takes; `None` for all, likewise.
    pub multicast: Option<MacTable>,
    /// The VLANs whose tagged frames it takes, a bit each; `None` for all. Untagged frames pass.
    pub vlans: Option<Box<[u64; VLANS as usize / 64]>>,
}

impl RxFilter {
    /// Everything, for the device with that address.
    pub fn everything(mac: MacAddr) -> Self {
        Self {
            mac,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Some(MacTable::new()),
            multicast: Some(MacTable::new()),
            vlans: None,
        }
    }

    /// Whether no frame needs to be looked at.
    pub fn is_everything(&self) -> bool {
        self.promiscuous && self.vlans.is_none()
    }

    /// Whether it is to have a frame that begins so: with [`ETHERNET_HEADER`] bytes, and two more where there is a tag. What is
    /// shorter is no frame.
    pub fn passes(&self, frame: &[u8]) -> bool {
        let Some(&[a, b, c, d, e, f, ..]) = frame.first_chunk::<ETHERNET_HEADER>() else {
            return false;
        };
        if is_tagged(frame)
            && let Some(vlans) = &self.vlans
        {
            let Some(&[high, low]) = frame.get(ETHERNET_HEADER..).and_then(<[u8]>::first_chunk) else {
                return false;
            };
            let vlan = u16::from_be_bytes([high, low]) % VLANS;
            if vlans.get(usize::from(vlan / 64)).is_none_or(|word| word >> (vlan % 64) & 1 == 0) {
                return false;
            }
        }
        if self.promiscuous {
            return true;
        }
        let to = MacAddr([a, b, c, d, e, f]);
        if to == MacAddr::BROADCAST {
            !self.no_broadcast
        } else if to.is_multicast() {
            !self.no_multicast && (self.all_multicast || holds(&self.multicast, to))
        } else {
            !self.no_unicast && (self.all_unicast || to == self.mac || holds(&self.unicast, to))
        }
    }
}

fn holds(table: &Option<MacTable>, address: MacAddr) -> bool {
    table.as_ref().is_none_or(|table| table.contains(&address))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
    const OTHER: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
    const GROUP: MacAddr = MacAddr([1, 0, 0x5e, 0, 0, 1]);

    fn frame(to: MacAddr, vlan: Option<u16>) -> Vec<u8> {
        let mut frame = Vec::from(to.0);
        frame.extend([2, 0, 0, 0, 0, 9]);
        if let Some(vlan) = vlan {
            frame.extend(TAGGED);
            frame.extend(vlan.to_be_bytes());
        }
        frame.extend([8, 0]);
        frame
    }

    fn passing(filter: &RxFilter) -> [bool; 4] {
        [OWN, OTHER, GROUP, MacAddr::BROADCAST].map(|to| filter.passes(&frame(to, None)))
    }

    #[test]
    fn each_switch_does_what_it_says() {
        let everything = RxFilter::everything(OWN);
        assert!(everything.is_everything());
        assert_eq!(passing(&everything), [true; 4]);
        let own = RxFilter { promiscuous: false, ..everything };
        assert_eq!(passing(&own), [true, false, false, true]);
        type Change = fn(&mut RxFilter);
        let cases: [(Change, [bool; 4]); 9] = [
            (|f| f.all_multicast = true, [true, false, true, true]),
            (|f| f.all_unicast = true, [true, true, false, true]),
            (|f| f.unicast = Some(MacTable::from_slice(&[OTHER])), [true, true, false, true]),
            (|f| f.multicast = Some(MacTable::from_slice(&[GROUP])), [true, false, true, true]),
            (|f| f.unicast = None, [true, true, false, true]),
            (|f| f.multicast = None, [true, false, true, true]),
            (|f| f.no_broadcast = true, [true, false, false, false]),
            (|f| (f.no_unicast, f.all_unicast) = (true, true), [false, false, false, true]),
            (|f| (f.no_multicast, f.all_multicast) = (true, true), [true, false, false, true]),
        ];
        for (change, expected) in cases {
            let mut filter = own.clone();
            change(&mut filter);
            assert_eq!(passing(&filter), expected, "{filter:?}");
        }
    }

    #[test]
    fn vlans_pass_one_by_one_and_priorities_do_not_matter() {
        let mut vlans = Box::new([0; 64]);
        vlans[4095 / 64] |= 1 << (4095 % 64);
        let filter = RxFilter { vlans: Some(vlans), ..RxFilter::everything(OWN) };
        assert!(!filter.is_everything());
        assert!(filter.passes(&frame(OWN, Some(4095))) && filter.passes(&frame(OWN, Some(0x6fff))));
        assert!(!filter.passes(&frame(OWN, Some(0))) && filter.passes(&frame(OTHER, None)));
        let untagged = RxFilter { vlans: None, ..filter };
        assert!(untagged.passes(&frame(OWN, Some(0))));
    }

    #[test]
    fn what_is_shorter_than_a_header_is_no_frame() {
        let (everything, whole) = (RxFilter::everything(OWN), frame(OWN, Some(1)));
        assert!(everything.passes(&whole[..14]) && !everything.passes(&whole[..13]));
        let filter = RxFilter { vlans: Some(Box::new([u64::MAX; 64])), ..everything };
        assert!(filter.passes(&whole[..16]) && !filter.passes(&whole[..15]));
    }
}

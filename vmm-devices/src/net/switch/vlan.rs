//! VLANs (IEEE 802.1Q): of which a port is, and what tags its frames have.
//!
//! Tags of type 0x8100 are looked at, the outermost alone. What lies below, and service tags (0x88a8), are payload, and stay.

use std::fmt;

use super::error::SwitchError;

/// The type of a frame with a tag.
pub(super) const TAGGED: [u8; 2] = [0x81, 0x00];

/// Bits of a tag's control information that are the VLAN; priority and drop eligibility are above.
const VID: u16 = 0xfff;

/// A VLAN, 1 to 4094.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VlanId(u16);

impl VlanId {
    /// That of ports which nothing is said of.
    pub const DEFAULT: Self = Self(1);

    /// The VLAN of that number.
    ///
    /// # Errors
    /// If there is no such VLAN: 0 means none, and 4095 is reserved.
    pub fn new(number: u16) -> Result<Self, SwitchError> {
        if (1..4095).contains(&number) { Ok(Self(number)) } else { Err(SwitchError::Vlan { number }) }
    }

    /// Its number.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VLAN {}", self.0)
    }
}

/// Some VLANs.
#[derive(Clone, PartialEq, Eq)]
pub struct VlanSet(Box<[u64; 64]>);

impl VlanSet {
    /// All of them.
    pub fn all() -> Self {
        Self(Box::new([u64::MAX; 64]))
    }

    /// Whether `vlan` is one of them.
    pub fn contains(&self, vlan: VlanId) -> bool {
        self.0.get(usize::from(vlan.0 / 64)).is_some_and(|word| word >> (vlan.0 % 64) & 1 != 0)
    }
}

impl FromIterator<VlanId> for VlanSet {
    fn from_iter<I: IntoIterator<Item = VlanId>>(vlans: I) -> Self {
        let mut words = Box::new([0; 64]);
        for VlanId(vlan) in vlans {
            if let Some(word) = words.get_mut(usize::from(vlan / 64)) {
                *word |= 1 << (vlan % 64);
            }
        }
        Self(words)
    }
}

impl fmt::Debug for VlanSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries((1..4095).filter(|vlan| self.contains(VlanId(*vlan)))).finish()
    }
}

/// Of which VLANs a port is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PortVlans {
    /// Of one. Its frames have no tags; what comes with a tag is dropped, but for priority tags (VLAN 0), which are taken off.
    Access(VlanId),
    /// Of several, whose frames have tags.
    Trunk {
        /// The VLAN whose frames have none. What comes with its tag all the same is taken if `allowed` names it.
        native: Option<VlanId>,
        /// The others.
        allowed: VlanSet,
    },
}

impl Default for PortVlans {
    fn default() -> Self {
        Self::Access(VlanId::DEFAULT)
    }
}

/// How a frame leaves by a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leaves {
    /// Without a tag of this switch's.
    Untagged,
    /// With one.
    Tagged,
}

impl PortVlans {
    /// The VLAN of a frame that comes in with that tag's control information; `None` if it is dropped.
    pub(super) fn enters(&self, tag: Option<u16>) -> Option<VlanId> {
        let number = tag.map_or(0, |tag| tag & VID);
        match self {
            Self::Access(vlan) => (number == 0).then_some(*vlan),
            Self::Trunk { native, .. } if number == 0 => *native,
            Self::Trunk { allowed, .. } => VlanId::new(number).ok().filter(|vlan| allowed.contains(*vlan)),
        }
    }

    /// How a frame of `vlan` leaves; `None` if the port is not of it. One with a tag below keeps its own on a trunk: without, the one
    /// below would be taken for it at the other end, and the frame would be in a VLAN that its sender has chosen.
    pub(super) fn leaves(&self, vlan: VlanId, has_inner_tag: bool) -> Option<Leaves> {
        match self {
            Self::Access(own) => (*own == vlan).then_some(Leaves::Untagged),
            Self::Trunk { native, allowed } if *native == Some(vlan) => {
                if !has_inner_tag {
                    Some(Leaves::Untagged)
                } else {
                    allowed.contains(vlan).then_some(Leaves::Tagged)
                }
            }
            Self::Trunk { allowed, .. } => allowed.contains(vlan).then_some(Leaves::Tagged),
        }
    }

    /// The VLAN of frames without a tag.
    pub(super) fn untagged(&self) -> Option<VlanId> {
        self.enters(None)
    }
}

/// Control information of a tag of `vlan`, with priority and drop eligibility of the one that the frame came with.
pub(super) fn tag(vlan: VlanId, came_with: Option<u16>) -> u16 {
    (came_with.unwrap_or(0) & !VID) | vlan.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vlan(number: u16) -> VlanId {
        VlanId::new(number).unwrap()
    }

    #[test]
    fn there_are_4094() {
        for number in [0, 4095, 4096, u16::MAX] {
            assert_eq!(VlanId::new(number), Err(SwitchError::Vlan { number }));
        }
        assert_eq!((vlan(1).get(), vlan(4094).get()), (1, 4094));
        let set: VlanSet = [vlan(1), vlan(64), vlan(4094)].into_iter().collect();
        assert_eq!(format!("{set:?}"), "{1, 64, 4094}");
        assert!((1..4095).all(|number| VlanSet::all().contains(vlan(number))));
    }

    #[test]
    fn an_access_port_has_no_tags() {
        let port = PortVlans::Access(vlan(7));
        assert_eq!([None, Some(0), Some(0xe000)].map(|tag| port.enters(tag)), [Some(vlan(7)); 3]);
        assert_eq!([Some(7), Some(8), Some(4095)].map(|tag| port.enters(tag)), [None; 3]);
        assert_eq!(port.leaves(vlan(7), false), Some(Leaves::Untagged));
        assert_eq!(port.leaves(vlan(8), false), None);
    }

    #[test]
    fn a_trunk_has_tags_but_for_its_native_vlan() {
        let allowed: VlanSet = [vlan(7), vlan(8)].into_iter().collect();
        let port = PortVlans::Trunk { native: Some(vlan(9)), allowed: allowed.clone() };
        assert_eq!(port.enters(None), Some(vlan(9)));
        assert_eq!(port.enters(Some(0x6007)), Some(vlan(7)));
        assert_eq!([Some(9), Some(10), Some(4095)].map(|tag| port.enters(tag)), [None; 3]);
        assert_eq!(port.leaves(vlan(9), false), Some(Leaves::Untagged));
        assert_eq!(port.leaves(vlan(8), false), Some(Leaves::Tagged));
        assert_eq!(port.leaves(vlan(10), false), None);
        let port = PortVlans::Trunk { native: None, allowed };
        assert_eq!(port.enters(None), None);
        assert_eq!(tag(vlan(8), Some(0xf007)), 0xf008);
    }

    /// The old way into another VLAN: two tags, of which the first is the trunk's native one.
    #[test]
    fn a_native_tag_is_not_taken_off_another_one() {
        let port = |allowed: &[u16]| PortVlans::Trunk {
            native: Some(vlan(1)),
            allowed: allowed.iter().map(|v| vlan(*v)).collect(),
        };
        assert_eq!(port(&[1, 2]).leaves(vlan(1), true), Some(Leaves::Tagged));
        assert_eq!(port(&[2]).leaves(vlan(1), true), None);
    }
}

//! The common configuration of virtio over PCI (Virtio 1.3, 4.1.4.3): one register for each field, of the field's width.

use super::vectors::Vectors;
use crate::bus::halves;
use crate::virtio::control::{Control, Ring, Signal};
use crate::virtio::device::DeviceMemory;

/// Bytes of the structure.
pub(super) const SIZE: u64 = 0x40;

/// A field: where it is, and how many bytes it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    NumQueues,
    DeviceStatus,
    ConfigGeneration,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    QueueNotifyOff,
    Queue(Ring, Half),
}

/// Of an address of 64 bits, which drivers write in two (4.1.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Half {
    Low,
    High,
}

/// Offset, width in bytes, field.
const FIELDS: [(u64, usize, Field); 19] = [
    (0x00, 4, Field::DeviceFeatureSelect),
    (0x04, 4, Field::DeviceFeature),
    (0x08, 4, Field::DriverFeatureSelect),
    (0x0c, 4, Field::DriverFeature),
    (0x10, 2, Field::ConfigVector),
    (0x12, 2, Field::NumQueues),
    (0x14, 1, Field::DeviceStatus),
    (0x15, 1, Field::ConfigGeneration),
    (0x16, 2, Field::QueueSelect),
    (0x18, 2, Field::QueueSize),
    (0x1a, 2, Field::QueueVector),
    (0x1c, 2, Field::QueueEnable),
    (0x1e, 2, Field::QueueNotifyOff),
    (0x20, 4, Field::Queue(Ring::Descriptors, Half::Low)),
    (0x24, 4, Field::Queue(Ring::Descriptors, Half::High)),
    (0x28, 4, Field::Queue(Ring::Available, Half::Low)),
    (0x2c, 4, Field::Queue(Ring::Available, Half::High)),
    (0x30, 4, Field::Queue(Ring::Used, Half::Low)),
    (0x34, 4, Field::Queue(Ring::Used, Half::High)),
];

/// The fields that an access of `len` bytes at `offset` names, one by one: just whole fields count, and a wide access to an
/// address is one to both halves.
fn fields(offset: u64, len: usize) -> impl Iterator<Item = (usize, usize, Field)> {
    let end = offset.saturating_add(len as u64);
    let wide = len == 8;
    FIELDS.into_iter().filter_map(move |(at, width, field)| {
        let whole =
            if wide { at >= offset && at + width as u64 <= end } else { at == offset && width == len };
        let address = matches!(field, Field::Queue(..));
        // Eight bytes at once are for addresses.
        let start = usize::try_from(at.checked_sub(offset)?).ok()?;
        (whole && (!wide || address && offset.is_multiple_of(8))).then_some((start, width, field))
    })
}

/// The driver reads `data.len()` bytes at `offset`.
pub(super) fn read<M: DeviceMemory, S: Signal + 'static>(
    control: &Control<M, S>,
    vectors: &Vectors,
    offset: u64,
    data: &mut [u8],
) {
    data.fill(0);
    for (start, width, field) in fields(offset, data.len()) {
        let value = value(control, vectors, field).to_le_bytes();
        if let (Some(to), Some(from)) = (data.get_mut(start..start + width), value.get(..width)) {
            to.copy_from_slice(from);
        }
    }
}

fn value<M: DeviceMemory, S: Signal + 'static>(
    control: &Control<M, S>,
    vectors: &Vectors,
    field: Field,
) -> u32 {
    let queue = control.queue();
    match field {
        Field::DeviceFeatureSelect => control.device_features_select,
        Field::DeviceFeature => control.device_features(),
        Field::DriverFeatureSelect => control.driver_features_select,
        Field::DriverFeature => control.driver_features(),
        Field::ConfigVector => vectors.config().into(),
        Field::NumQueues => u32::try_from(control.queue_count()).unwrap_or(u32::from(u16::MAX)),
        Field::DeviceStatus => control.status().into(),
        Field::ConfigGeneration => control.config_generation() & 0xff,
        Field::QueueSelect => control.queue_select.into(),
        // 0 where there is no such queue (4.1.4.3).
        Field::QueueSize => queue.map_or(0, |queue| queue.size.into()),
        Field::QueueVector => vectors.queue(control.queue_select).into(),
        Field::QueueEnable => queue.map_or(0, |queue| queue.ready.into()),
        Field::QueueNotifyOff => queue.map_or(0, |_| control.queue_select.into()),
        Field::Queue(ring, half) => queue.map_or(0, |queue| {
            let address = match ring {
                Ring::Descriptors => queue.desc_table,
                Ring::Available => queue.avail_ring,
                Ring::Used => queue.used_ring,
            };
            let [low, high] = halves(address);
            if half == Half::Low { low } else { high }
        }),
    }
}

/// The driver writes `data` at `offset`.
pub(super) fn write<M: DeviceMemory, S: Signal + 'static>(
    control: &mut Control<M, S>,
    vectors: &Vectors,
    offset: u64,
    data: &[u8],
) {
    for (start, width, field) in fields(offset, data.len()) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data.get(start..start + width).unwrap_or_default()) {
            *to = *from;
        }
        set(control, vectors, field, bytes);
    }
}

fn set<M: DeviceMemory, S: Signal + 'static>(
    control: &mut Control<M, S>,
    vectors: &Vectors,
    field: Field,
    bytes: [u8; 4],
) {
    let value = u32::from_le_bytes(bytes);
    let [low, high, ..] = bytes;
    let word = u16::from_le_bytes([low, high]);
    match field {
        Field::DeviceFeatureSelect => control.device_features_select = value,
        Field::DriverFeatureSelect => control.driver_features_select = value,
        Field::DriverFeature => control.set_driver_features(value),
        Field::ConfigVector => vectors.set_config(word),
        Field::DeviceStatus => control.set_status(low),
        Field::QueueSelect => control.queue_select = word,
        Field::QueueSize => control.set_queue_size(word),
        Field::QueueVector => vectors.set_queue(control.queue_select, word),
        // A driver must not write 0 (4.1.4.3.2).
        Field::QueueEnable if word == 1 => control.enable_queue(),
        Field::Queue(ring, Half::Low) => control.set_queue_address(ring, Some(value), None),
        Field::Queue(ring, Half::High) => control.set_queue_address(ring, None, Some(value)),
        Field::DeviceFeature
        | Field::NumQueues
        | Field::ConfigGeneration
        | Field::QueueEnable
        | Field::QueueNotifyOff => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fields that an access names.
    fn named(offset: u64, len: usize) -> Vec<Field> {
        fields(offset, len).map(|(_, _, field)| field).collect()
    }

    #[test]
    fn accesses_have_the_width_of_their_field() {
        assert_eq!(named(0x14, 1), [Field::DeviceStatus]);
        assert_eq!(named(0x16, 2), [Field::QueueSelect]);
        for (offset, len) in [
            (0x14, 2),
            (0x14, 4),
            (0x16, 1),
            (0x17, 1),
            (0, 2),
            (0, 8),
            (0x10, 4),
            (0x10, 8),
            (0x38, 2),
            (1, 4),
        ] {
            assert_eq!(named(offset, len), [], "{len} bytes at {offset:#x}");
        }
    }

    #[test]
    fn addresses_are_written_in_halves_or_at_once() {
        let halves = [Half::Low, Half::High].map(|half| Field::Queue(Ring::Available, half));
        assert_eq!(named(0x28, 4), [halves[0]]);
        assert_eq!(named(0x2c, 4), [halves[1]]);
        assert_eq!(named(0x28, 8), halves);
        assert_eq!(named(0x2c, 8), [], "half of one, half of another");
        assert_eq!(named(u64::MAX, 8), []);
    }
}

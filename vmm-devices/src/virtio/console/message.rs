//! Control messages (Virtio 1.3, 5.3.6.2): a port, an event, a value, and for some more behind.

pub(super) const DEVICE_READY: u16 = 0;
pub(super) const PORT_ADD: u16 = 1;
pub(super) const PORT_REMOVE: u16 = 2;
pub(super) const PORT_READY: u16 = 3;
pub(super) const CONSOLE_PORT: u16 = 4;
pub(super) const RESIZE: u16 = 5;
pub(super) const PORT_OPEN: u16 = 6;
pub(super) const PORT_NAME: u16 = 7;

/// Bytes of a message without what may be behind.
pub(super) const LEN: usize = 8;

pub(super) fn of(id: u32, event: u16, value: u16) -> Vec<u8> {
    let [a, b, c, d] = id.to_le_bytes();
    let ([e, f], [g, h]) = (event.to_le_bytes(), value.to_le_bytes());
    vec![a, b, c, d, e, f, g, h]
}

pub(super) fn resize(id: u32, (columns, rows): (u16, u16), rows_first: bool) -> Vec<u8> {
    let (first, second) = if rows_first { (rows, columns) } else { (columns, rows) };
    let mut message = of(id, RESIZE, 0);
    message.extend(first.to_le_bytes());
    message.extend(second.to_le_bytes());
    message
}

/// Without a NUL behind the name.
pub(super) fn name(id: u32, name: &str) -> Vec<u8> {
    let mut message = of(id, PORT_NAME, 1);
    message.extend(name.as_bytes());
    message
}

/// Port, event and value.
pub(super) fn parse([a, b, c, d, e, f, g, h]: [u8; LEN]) -> (u32, u16, u16) {
    (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]))
}

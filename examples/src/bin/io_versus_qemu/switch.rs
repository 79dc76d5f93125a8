//! From port to port of a switch, in this process and through a broker, beside memcpy of the same bytes.

#[allow(
    dead_code,
    clippy::unwrap_used,
    reason = "a bench's; a panic fails this group, and the ratio is taken of medians here"
)]
#[path = "../../../../vmm-devices/benches/support/switch_rates.rs"]
mod switch_rates;

use std::num::NonZeroU64;

use vmm_examples::rates::Row;

use switch_rates::Way;

/// How often each is measured for one figure.
const ROUNDS: NonZeroU64 = NonZeroU64::new(3).unwrap();

/// All sizes each way.
///
/// # Panics
/// If the host has no memory, sockets or threads for it.
pub(crate) fn rows() -> Vec<Row> {
    let row = |row: switch_rates::Row| {
        let way = match row.way {
            Way::OneThread => "one thread",
            Way::TwoThreads => "two threads",
            Way::Judged => "two threads, judged",
            Way::Broker => "two clients of a broker",
        };
        let label = format!("switch, frames of {} bytes, {way}, MB/s", row.len);
        let remark = match row.way {
            Way::OneThread if row.len < 1000 => Some(format!(
                "switch: a small frame takes {:.0} ns, whatever its length: headers, lookups, a queue's locks on either side",
                1e9 / row.frames
            )),
            Way::OneThread if row.len > 10_000 => Some(
                "switch: it copies each frame twice, out of the sender's memory and into the receiver's, so that no guest reaches \
                 another one's: 0.5 of memcpy is the most there can be"
                    .to_owned(),
            ),
            Way::Broker if row.len > 10_000 => {
                Some("a broker: a third copy, and a third thread, for which this takes a third processor".to_owned())
            }
            _ => None,
        };
        Row { remark, ..Row::new(label, row.bytes / 1e6, "memcpy", row.copied / 1e6) }
    };
    switch_rates::rows(ROUNDS).into_iter().map(row).collect()
}

//! Pictures: the timeline and who talks to whom.

use std::collections::BTreeMap;

use super::collect::{Flow, ReportData, short};
use super::escape;
use crate::event::rfc3339;

/// Parties in the picture.
const NODES: usize = 18;

/// Bars of what happened when.
pub(super) fn timeline(data: &ReportData) -> String {
    let (width, height) = (960.0, 160.0);
    let most = data.bars.iter().map(|bar| bar.iter().sum::<u64>()).max().unwrap_or(0).max(1);
    let step = width / data.bars.len().max(1) as f64;
    let mut svg = format!(
        r#"<svg class="timeline" viewBox="0 0 {width} {}" role="img" aria-label="events over time">"#,
        height + 24.0
    );
    for (n, bar) in data.bars.iter().enumerate() {
        let mut y = height;
        for (count, class) in bar.iter().zip(["denied", "allowed", "other"]) {
            if *count == 0 {
                continue;
            }
            let h = (*count as f64 / most as f64 * (height - 8.0)).max(1.5);
            y -= h;
            let (x, w) = (n as f64 * step, (step - 2.0).max(1.0));
            svg += &format!(
                r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{w:.1}" height="{h:.1}"><title>{count} {class}</title></rect>"#
            );
        }
    }
    svg += &format!(r#"<line class="axis" x1="0" y1="{height}" x2="{width}" y2="{height}"/>"#);
    if let Some((first, last)) = data.times {
        let at = |time: u64| rfc3339(time).get(..19).unwrap_or_default().replace('T', " ");
        let y = height + 17.0;
        svg += &format!(r#"<text x="0" y="{y}">{} UTC</text>"#, at(first));
        svg += &format!(r#"<text x="{width}" y="{y}" text-anchor="end">{} UTC</text>"#, at(last));
    }
    svg + "</svg>"
}

/// The parties with the most traffic, in a circle, and what goes between them.
pub(super) fn flows(data: &ReportData) -> String {
    let mut weight: BTreeMap<&str, u64> = BTreeMap::new();
    for ((from, to), flow) in &data.flows {
        for name in [from, to] {
            *weight.entry(name).or_default() += flow.allowed + flow.denied;
        }
    }
    let mut names: Vec<_> = weight.into_iter().collect();
    names.sort_by_key(|(_, weight)| std::cmp::Reverse(*weight));
    let left_out = names.len().saturating_sub(NODES);
    names.truncate(NODES);
    names.sort_unstable();
    let count = names.len().max(1) as f64;
    let (cx, cy, rx, ry) = (480.0, 270.0, 300.0, 205.0);
    let place: BTreeMap<&str, (f64, f64)> = names
        .iter()
        .enumerate()
        .map(|(n, (name, _))| {
            let angle = (n as f64 / count) * std::f64::consts::TAU - std::f64::consts::FRAC_PI_2;
            (*name, (cx + rx * angle.cos(), cy + ry * angle.sin()))
        })
        .collect();
    let mut svg = String::from(
        r#"<svg class="flows" viewBox="0 0 960 540" role="img" aria-label="who talks to whom"><defs>"#,
    );
    for class in ["allowed", "denied"] {
        svg += &format!(
            r#"<marker id="{class}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="11" markerHeight="11" markerUnits="userSpaceOnUse" orient="auto"><path class="tip {class}" d="M0 0 10 5 0 10z"/></marker>"#
        );
    }
    svg += "</defs>";
    for ((from, to), flow) in &data.flows {
        if let Some((a, b)) = place.get(from.as_str()).zip(place.get(to.as_str())) {
            svg += &edge(*a, *b, (from.as_str(), to.as_str()), flow);
        }
    }
    for (name, (x, y)) in &place {
        let class = if name.starts_with("vm ") { "vm" } else { "thing" };
        let label = short(name);
        let w = 18.0 + 8.0 * label.chars().count() as f64;
        svg += &format!(
            r#"<g class="node {class}"><title>{}</title><rect x="{:.1}" y="{:.1}" width="{w:.1}" height="28" rx="6"/><text x="{x:.1}" y="{:.1}" text-anchor="middle">{}</text></g>"#,
            escape(name),
            x - w / 2.0,
            y - 14.0,
            y + 5.0,
            escape(&label)
        );
    }
    svg += "</svg>";
    if left_out > 0 {
        svg +=
            &format!("<p class=\"quiet\">{left_out} parties with less traffic are not in the picture.</p>");
    }
    svg
}

/// An arrow for what was allowed and one for what was denied, bent so that both are seen.
fn edge((ax, ay): (f64, f64), (bx, by): (f64, f64), (from, to): (&str, &str), flow: &Flow) -> String {
    let mut svg = String::new();
    for (count, class, bend) in [(flow.allowed, "allowed", 0.10), (flow.denied, "denied", 0.22)] {
        if count == 0 {
            continue;
        }
        let (dx, dy) = (bx - ax, by - ay);
        // It ends where it meets the boxes, of 140 by 28, with some air.
        let back = (76.0 / dx.abs().max(0.1)).min(20.0 / dy.abs().max(0.1)).min(0.45);
        let (sx, sy, ex, ey) = (ax + dx * back, ay + dy * back, bx - dx * back, by - dy * back);
        let (mx, my) = ((ax + bx) / 2.0 - dy * bend, (ay + by) / 2.0 + dx * bend);
        let thick = 1.2 + (count as f64).log10().max(0.0) * 0.9;
        svg += &format!(
            r#"<path class="edge {class}" stroke-width="{thick:.1}" marker-end="url(#{class})" d="M{sx:.1} {sy:.1} Q{mx:.1} {my:.1} {ex:.1} {ey:.1}"><title>{} → {}: {count} {class}</title></path>"#,
            escape(from),
            escape(to)
        );
    }
    svg
}

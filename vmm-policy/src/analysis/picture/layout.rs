//! Where everything is: groups side by side, subjects left and objects right in each; those of no group that manage stand above,
//! the others below.

use crate::analysis::graph::{Graph, Node, NodeShape};

pub(super) const NODE: (f64, f64) = (150.0, 46.0);
const ROW: f64 = 116.0;
/// From the middle of a group's subjects to that of its objects.
const COLUMN: f64 = 300.0;
pub(super) const GROUP_GAP: f64 = 90.0;
pub(super) const MARGIN: f64 = 40.0;

#[derive(Clone, Copy, Debug)]
pub(super) struct Box2 {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) w: f64,
    pub(super) h: f64,
}

impl Box2 {
    /// How much of one lies upon the other.
    pub(super) fn overlap(&self, other: &Self) -> f64 {
        let along = |a: f64, b: f64, size_a: f64, size_b: f64| {
            ((size_a + size_b) / 2.0 - (a - b).abs()).clamp(0.0, size_a.min(size_b))
        };
        along(self.x, other.x, self.w, other.w) * along(self.y, other.y, self.h, other.h)
    }
}

/// Where everything is.
#[derive(Default)]
pub(super) struct Layout {
    /// The middle of each node.
    pub(super) nodes: Vec<(f64, f64)>,
    pub(super) groups: Vec<Box2>,
    pub(super) size: (f64, f64),
}

fn is_object(node: &Node) -> bool {
    matches!(node.shape, NodeShape::Object(_))
}

pub(super) fn layout(graph: &Graph) -> Layout {
    let mut layout = Layout { nodes: vec![(0.0, 0.0); graph.nodes.len()], ..Layout::default() };
    let members = |group: Option<usize>, wanted: &dyn Fn(&Node) -> bool| -> Vec<usize> {
        let inside = |(_, node): &(usize, &Node)| node.group == group && wanted(node);
        graph.nodes.iter().enumerate().filter(inside).map(|(at, _)| at).collect()
    };
    let above = members(None, &|node| node.shape == NodeShape::Host);
    let below = members(None, &|node| node.shape != NodeShape::Host);
    let mut top = 84.0;
    let above_y = top + NODE.1 / 2.0;
    if !above.is_empty() {
        top += ROW;
    }
    // Wide pictures are hard to look at: some groups a row.
    let per_row = (graph.groups.len() as f64).sqrt().ceil().max(3.0) as usize;
    let (mut x, mut y, mut row_height, mut width) = (MARGIN, top, 0.0_f64, 0.0_f64);
    for group in 0..graph.groups.len() {
        if group > 0 && group % per_row == 0 {
            (x, y, row_height) = (MARGIN, y + row_height + GROUP_GAP, 0.0);
        }
        let subjects = members(Some(group), &|node| !is_object(node));
        let objects = members(Some(group), &is_object);
        let columns = if objects.is_empty() { 0.0 } else { COLUMN };
        let rows = subjects.len().max(objects.len()).max(1) as f64;
        let (w, h) = (NODE.0 + columns + 60.0, rows * ROW - (ROW - NODE.1) + 84.0);
        for (nth, at) in subjects.iter().enumerate() {
            place(&mut layout, *at, x + 30.0 + NODE.0 / 2.0, y + 52.0 + NODE.1 / 2.0 + nth as f64 * ROW);
        }
        for (nth, at) in objects.iter().enumerate() {
            place(
                &mut layout,
                *at,
                x + 30.0 + NODE.0 / 2.0 + columns,
                y + 52.0 + NODE.1 / 2.0 + nth as f64 * ROW,
            );
        }
        layout.groups.push(Box2 { x: x + w / 2.0, y: y + h / 2.0, w, h });
        x += w + GROUP_GAP;
        width = width.max(x - GROUP_GAP + MARGIN);
        row_height = row_height.max(h);
    }
    let wide = above.len().max(below.len().min(6)) as f64 * (NODE.0 + 90.0);
    let width = width.max(wide + 2.0 * MARGIN).max(560.0);
    let shift = (width
        - layout.groups.iter().map(|group| group.x + group.w / 2.0 + MARGIN).fold(0.0, f64::max))
        / 2.0;
    if !layout.groups.is_empty() {
        layout.groups.iter_mut().for_each(|group| group.x += shift);
        layout.nodes.iter_mut().for_each(|node| node.0 += shift);
    }
    for (nth, at) in above.iter().enumerate() {
        place(&mut layout, *at, width * (nth as f64 + 0.5) / above.len() as f64, above_y);
    }
    let groups_end = if graph.groups.is_empty() { top } else { y + row_height + 96.0 };
    let per_row = below.len().clamp(1, 6);
    for (nth, at) in below.iter().enumerate() {
        let in_row = (below.len() - nth / per_row * per_row).min(per_row) as f64;
        let column = (nth % per_row) as f64;
        place(
            &mut layout,
            *at,
            width * (column + 0.5) / in_row,
            groups_end + NODE.1 / 2.0 + (nth / per_row) as f64 * ROW * 1.3,
        );
    }
    let rows = below.len().div_ceil(per_row) as f64;
    let end = if below.is_empty() { y + row_height } else { groups_end + (rows - 1.0) * ROW * 1.3 + NODE.1 };
    layout.size = (width, end + 92.0);
    layout
}

fn place(layout: &mut Layout, at: usize, x: f64, y: f64) {
    if let Some(place) = layout.nodes.get_mut(at) {
        *place = (x, y);
    }
}

/// A cubic curve.
#[derive(Clone, Copy)]
pub(super) struct Curve(pub(super) [(f64, f64); 4]);

impl Curve {
    /// From the side of one node to that of another; `nth` of those between the same two.
    pub(super) fn between(from: (f64, f64), to: (f64, f64), nth: f64) -> Self {
        let (dx, dy) = (to.0 - from.0, to.1 - from.1);
        let (half_w, half_h) = (NODE.0 / 2.0, NODE.1 / 2.0);
        if dx.abs() < 1.0 && dy.abs() < 1.0 {
            let (x, y) = (from.0 + half_w, from.1);
            return Self([(x, y - 10.0), (x + 60.0, y - 40.0), (x + 60.0, y + 40.0), (x, y + 10.0)]);
        }
        if dx.abs() > NODE.0 {
            let side = dx.signum();
            let (a, b) = (
                (from.0 + side * half_w, from.1 + nth * 9.0),
                (to.0 - side * (half_w + 7.0), to.1 + nth * 9.0),
            );
            let reach = (b.0 - a.0).abs().max(60.0) * 0.45;
            return Self([a, (a.0 + side * reach, a.1), (b.0 - side * reach, b.1), b]);
        }
        if dy.abs() > ROW * 1.2 && dx.abs() < 1.0 {
            // Round the nodes between.
            let (a, b) = ((from.0 - half_w, from.1 + nth * 7.0), (to.0 - half_w - 7.0, to.1 + nth * 7.0));
            let out = 40.0 + nth.abs() * 12.0;
            return Self([a, (a.0 - out, a.1), (b.0 - out, b.1), b]);
        }
        let side = dy.signum();
        let (a, b) = (
            (from.0 + nth * 34.0, from.1 + side * half_h),
            (to.0 + nth * 34.0, to.1 - side * (half_h + 7.0)),
        );
        let reach = (b.1 - a.1).abs() * 0.45;
        Self([a, (a.0, a.1 + side * reach), (b.0, b.1 - side * reach), b])
    }

    pub(super) fn at(&self, t: f64) -> (f64, f64) {
        let Self([a, b, c, d]) = *self;
        let s = 1.0 - t;
        let mix = |a: f64, b: f64, c: f64, d: f64| {
            s * s * s * a + 3.0 * s * s * t * b + 3.0 * s * t * t * c + t * t * t * d
        };
        (mix(a.0, b.0, c.0, d.0), mix(a.1, b.1, c.1, d.1))
    }
}

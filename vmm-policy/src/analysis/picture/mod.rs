//! The graph as SVG.

mod layout;

use std::collections::BTreeSet;
use std::fmt::Write;

use layout::{Box2, Curve, GROUP_GAP, Layout, MARGIN, NODE, layout};

use super::graph::{Edge, Graph, Node, NodeShape};
use crate::model::Kind;

pub(super) fn draw(graph: &Graph) -> String {
    let layout = layout(graph);
    let mut svg = String::new();
    match write_picture(&mut svg, graph, &layout) {
        Ok(()) => svg,
        // Writing to a string does not fail.
        Err(std::fmt::Error) => String::new(),
    }
}

fn escaped(text: &str) -> String {
    // What XML cannot have at all is left out.
    let clean: String = text.chars().filter(|c| !c.is_control()).collect();
    clean.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn write_picture(svg: &mut String, graph: &Graph, layout: &Layout) -> std::fmt::Result {
    let (w, h) = layout.size;
    writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{w:.0}\" height=\"{h:.0}\" viewBox=\"0 0 {w:.0} {h:.0}\" font-family=\"Helvetica, Arial, sans-serif\" role=\"img\">"
    )?;
    let title = if graph.title.is_empty() { "policy" } else { &graph.title };
    writeln!(svg, "<title>{}</title>", escaped(title))?;
    writeln!(svg, "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>")?;
    writeln!(
        svg,
        "<text x=\"{MARGIN}\" y=\"44\" font-size=\"22\" font-weight=\"600\" fill=\"#1b2733\">{}</text>",
        escaped(title)
    )?;
    let kinds: BTreeSet<(&str, &str)> = graph.edges.iter().map(|edge| edge.kind.theme()).collect();
    writeln!(svg, "<defs>")?;
    for (nth, (colour, _)) in kinds.iter().enumerate() {
        writeln!(
            svg,
            "<marker id=\"a{nth}\" viewBox=\"0 0 10 10\" refX=\"2\" refY=\"5\" markerWidth=\"7\" markerHeight=\"7\" orient=\"auto-start-reverse\"><path d=\"M0 0 10 5 0 10z\" fill=\"{colour}\"/></marker>"
        )?;
    }
    writeln!(svg, "</defs>")?;
    let tints = ["#fdecea", "#e8f1fb", "#edf7ed", "#fff6e0", "#f4ecf7", "#e6f6f5"];
    let lines = ["#c62828", "#1565c0", "#2e7d32", "#b26a00", "#7b1fa2", "#00796b"];
    for (nth, (area, name)) in layout.groups.iter().zip(&graph.groups).enumerate() {
        let (fill, line) =
            (tints.get(nth % 6).unwrap_or(&"#eeeeee"), lines.get(nth % 6).unwrap_or(&"#444444"));
        let (x, y) = (area.x - area.w / 2.0, area.y - area.h / 2.0);
        writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"14\" fill=\"{fill}\" stroke=\"{line}\" stroke-opacity=\"0.35\"/>",
            area.w, area.h
        )?;
        writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" font-size=\"15\" font-weight=\"600\" fill=\"{line}\">{}</text>",
            x + 16.0,
            y + 26.0,
            escaped(name)
        )?;
    }
    write_edges(svg, graph, layout, &kinds)?;
    write_walls(svg, graph, layout)?;
    for (node, (x, y)) in graph.nodes.iter().zip(&layout.nodes) {
        write_node(svg, node, *x, *y)?;
    }
    write_legend(svg, graph, &kinds, h)?;
    svg.push_str("</svg>\n");
    Ok(())
}

/// Where it is proven that no path goes: between neighbours; the legend has the others.
fn walls(graph: &Graph, layout: &Layout) -> impl Iterator<Item = Box2> {
    graph.apart.iter().filter_map(|(one, other)| {
        let (left, right) = (layout.groups.get(*one)?, layout.groups.get(*other)?);
        let gap = (right.x - right.w / 2.0) - (left.x + left.w / 2.0);
        let (top, other_top) = (left.y - left.h / 2.0, right.y - right.h / 2.0);
        let end = (left.y + left.h / 2.0).max(right.y + right.h / 2.0);
        let are_neighbours = (top - other_top).abs() <= 1.0 && (0.0..=GROUP_GAP + 1.0).contains(&gap);
        let x = left.x + left.w / 2.0 + gap / 2.0;
        are_neighbours.then_some(Box2 { x, y: (top + end) / 2.0, w: 3.0, h: end - top })
    })
}

fn write_walls(svg: &mut String, graph: &Graph, layout: &Layout) -> std::fmt::Result {
    for Box2 { x, y, h, .. } in walls(graph, layout) {
        let (top, end) = (y - h / 2.0, y + h / 2.0);
        writeln!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"{top:.1}\" x2=\"{x:.1}\" y2=\"{end:.1}\" stroke=\"#b71c1c\" stroke-width=\"3\" stroke-dasharray=\"2 7\" stroke-linecap=\"round\"/>"
        )?;
        writeln!(
            svg,
            "<g transform=\"rotate(-90 {x:.1} {y:.1})\"><rect x=\"{:.1}\" y=\"{:.1}\" width=\"76\" height=\"22\" rx=\"11\" fill=\"#b71c1c\"/><text x=\"{x:.1}\" y=\"{:.1}\" font-size=\"12\" font-weight=\"600\" text-anchor=\"middle\" fill=\"#ffffff\">no path</text></g>",
            x - 38.0,
            y - 11.0,
            y + 4.2
        )?;
    }
    Ok(())
}

/// Edges that look alike and join the same two are one.
fn merged(graph: &Graph) -> Vec<Edge> {
    let mut edges: Vec<Edge> = Vec::new();
    for edge in &graph.edges {
        let looks = |edge: &Edge| (edge.from, edge.to, edge.kind.theme(), edge.conditional);
        match edges.iter_mut().find(|other| looks(other) == looks(edge)) {
            Some(other) => other.labels.extend(edge.labels.iter().cloned()),
            None => edges.push(edge.clone()),
        }
    }
    edges
}

fn write_edges(
    svg: &mut String,
    graph: &Graph,
    layout: &Layout,
    kinds: &BTreeSet<(&str, &str)>,
) -> std::fmt::Result {
    let mut taken: Vec<Box2> =
        layout.nodes.iter().map(|(x, y)| Box2 { x: *x, y: *y, w: NODE.0, h: NODE.1 }).collect();
    // The names of groups, and what says that no path is there.
    taken.extend(layout.groups.iter().zip(&graph.groups).map(|(area, name)| {
        let w = name.chars().count() as f64 * 9.0;
        Box2 { x: area.x - area.w / 2.0 + 16.0 + w / 2.0, y: area.y - area.h / 2.0 + 21.0, w, h: 18.0 }
    }));
    taken.extend(walls(graph, layout).map(|wall| Box2 { w: 24.0, ..wall }));
    let edges = merged(graph);
    let mut labels = String::new();
    let pair = |edge: &Edge| (edge.from.min(edge.to), edge.from.max(edge.to));
    for (nth, edge) in edges.iter().enumerate() {
        let (Some(from), Some(to)) = (layout.nodes.get(edge.from), layout.nodes.get(edge.to)) else {
            continue;
        };
        let alike: Vec<usize> = edges
            .iter()
            .enumerate()
            .filter(|(_, other)| pair(other) == pair(edge))
            .map(|(at, _)| at)
            .collect();
        let place =
            alike.iter().position(|at| *at == nth).unwrap_or(0) as f64 - (alike.len() as f64 - 1.0) / 2.0;
        let curve = Curve::between(*from, *to, place);
        let Curve([a, b, c, d]) = curve;
        let (colour, _) = edge.kind.theme();
        let marker = kinds.iter().position(|(known, _)| *known == colour).unwrap_or(0);
        let dash = if edge.conditional { " stroke-dasharray=\"6 4\"" } else { "" };
        writeln!(
            svg,
            "<path d=\"M{:.1} {:.1}C{:.1} {:.1} {:.1} {:.1} {:.1} {:.1}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.8\"{dash} marker-end=\"url(#a{marker})\"/>",
            a.0, a.1, b.0, b.1, c.0, c.1, d.0, d.1
        )?;
        // What one may do with each of many is said once.
        let is_said = |other: &Edge| {
            (other.from, other.kind, &other.labels, other.conditional)
                == (edge.from, edge.kind, &edge.labels, edge.conditional)
        };
        let is_host = graph.nodes.get(edge.from).is_some_and(|node| node.shape == NodeShape::Host);
        if !is_host || !edges.iter().take(nth).any(is_said) {
            write_label(&mut labels, edge, &curve, colour, &mut taken)?;
        }
    }
    svg.push_str(&labels);
    Ok(())
}

fn write_label(
    svg: &mut String,
    edge: &Edge,
    curve: &Curve,
    colour: &str,
    taken: &mut Vec<Box2>,
) -> std::fmt::Result {
    let mut lines: Vec<String> = edge.labels.iter().flat_map(|label| wrapped(label, 26)).collect();
    if lines.len() > 4 {
        let more = lines.len() - 3;
        lines.truncate(3);
        lines.push(format!("and {more} more"));
    }
    let longest = lines.iter().map(|line| line.chars().count()).max().unwrap_or(0) as f64;
    let (w, h) = (longest * 6.1 + 12.0, lines.len() as f64 * 14.0 + 6.0);
    // Near the middle, and upon as little as can be.
    let tries = [0.5, 0.45, 0.55, 0.4, 0.6, 0.35, 0.65, 0.3, 0.7, 0.25, 0.75, 0.2, 0.8, 0.15, 0.85];
    let boxes = tries.map(|t| {
        let (x, y) = curve.at(t);
        Box2 { x, y, w, h }
    });
    let covers = |candidate: &Box2| taken.iter().map(|other| other.overlap(candidate)).sum::<f64>();
    let least = |one: &&Box2, other: &&Box2| covers(one).total_cmp(&covers(other));
    let Some(place) = boxes.iter().min_by(least).copied() else { return Ok(()) };
    taken.push(place);
    writeln!(
        svg,
        "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" rx=\"6\" fill=\"#ffffff\" fill-opacity=\"0.92\" stroke=\"{colour}\" stroke-opacity=\"0.3\"/>",
        place.x - w / 2.0,
        place.y - h / 2.0
    )?;
    for (nth, line) in lines.iter().enumerate() {
        let y = place.y - h / 2.0 + 14.0 + nth as f64 * 14.0;
        writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{y:.1}\" font-size=\"11.5\" text-anchor=\"middle\" fill=\"{colour}\">{}</text>",
            place.x,
            escaped(line)
        )?;
    }
    Ok(())
}

fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let full = lines
            .last()
            .is_some_and(|line| !line.is_empty() && line.chars().count() + word.chars().count() >= width);
        if full {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

fn write_node(svg: &mut String, node: &Node, x: f64, y: f64) -> std::fmt::Result {
    let (w, h) = NODE;
    let (left, top) = (x - w / 2.0, y - h / 2.0);
    let (fill, line) = match node.shape {
        NodeShape::Vm => ("#ffffff", "#37474f"),
        NodeShape::Host => ("#eceff1", "#546e7a"),
        NodeShape::Object(kind) => ("#fbfbfb", kind.theme().0),
    };
    if node.guard {
        writeln!(
            svg,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"11\" fill=\"none\" stroke=\"{line}\"/>",
            left - 4.0,
            top - 4.0,
            w + 8.0,
            h + 8.0
        )?;
    }
    match node.shape {
        NodeShape::Object(Kind::Disk | Kind::Snapshot) => {
            let (right, end) = (left + w, top + h);
            writeln!(
                svg,
                "<path d=\"M{left:.1} {:.1}C{left:.1} {top:.1} {right:.1} {top:.1} {right:.1} {:.1}V{:.1}C{right:.1} {end:.1} {left:.1} {end:.1} {left:.1} {:.1}z\" fill=\"{fill}\" stroke=\"{line}\" stroke-width=\"1.5\"/>",
                top + 9.0,
                top + 9.0,
                end - 9.0,
                end - 9.0
            )?;
            writeln!(
                svg,
                "<path d=\"M{left:.1} {:.1}C{left:.1} {:.1} {right:.1} {:.1} {right:.1} {:.1}\" fill=\"none\" stroke=\"{line}\"/>",
                top + 9.0,
                top + 17.0,
                top + 17.0,
                top + 9.0
            )?;
        }
        _ => {
            let round = if matches!(node.shape, NodeShape::Object(_)) { h / 2.0 } else { 8.0 };
            writeln!(
                svg,
                "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" rx=\"{round}\" fill=\"{fill}\" stroke=\"{line}\" stroke-width=\"1.5\"/>"
            )?;
        }
    }
    let name = node.name();
    let name =
        if name.chars().count() > 20 { name.chars().take(19).chain(['\u{2026}']).collect() } else { name };
    writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{:.1}\" font-size=\"13.5\" font-weight=\"600\" text-anchor=\"middle\" fill=\"#1b2733\">{}</text>",
        y + 2.0,
        escaped(&name)
    )?;
    let what = match node.shape {
        NodeShape::Vm => "virtual machine".to_owned(),
        NodeShape::Host => "host".to_owned(),
        NodeShape::Object(kind) => kind.to_string(),
    };
    let what = match (&node.level, node.guard) {
        (_, true) => format!("{what}, guard"),
        (Some(level), false) => format!("{what}, {level}"),
        (None, false) => what,
    };
    writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{:.1}\" font-size=\"10.5\" text-anchor=\"middle\" fill=\"#5f6f7a\">{}</text>",
        y + 16.0,
        escaped(&what)
    )
}

fn write_legend(
    svg: &mut String,
    graph: &Graph,
    kinds: &BTreeSet<(&str, &str)>,
    height: f64,
) -> std::fmt::Result {
    let y = height - 44.0;
    let mut x = MARGIN;
    for (colour, word) in kinds {
        writeln!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{:.1}\" y2=\"{y:.1}\" stroke=\"{colour}\" stroke-width=\"3\"/><text x=\"{:.1}\" y=\"{:.1}\" font-size=\"12\" fill=\"#37474f\">{word}</text>",
            x + 24.0,
            x + 30.0,
            y + 4.0
        )?;
        x += 48.0 + word.len() as f64 * 7.4;
    }
    if graph.edges.iter().any(|edge| edge.conditional) {
        writeln!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{:.1}\" y2=\"{y:.1}\" stroke=\"#37474f\" stroke-width=\"2\" stroke-dasharray=\"6 4\"/><text x=\"{:.1}\" y=\"{:.1}\" font-size=\"12\" fill=\"#37474f\">on a condition</text>",
            x + 24.0,
            x + 30.0,
            y + 4.0
        )?;
    }
    let name = |at: &usize| graph.groups.get(*at).cloned().unwrap_or_default();
    let apart: Vec<String> =
        graph.apart.iter().take(4).map(|(one, other)| format!("{} and {}", name(one), name(other))).collect();
    if !apart.is_empty() {
        let guards: Vec<String> = graph.nodes.iter().filter(|node| node.guard).map(Node::name).collect();
        let trusted = if guards.is_empty() {
            String::new()
        } else {
            format!(", trusting the guards {}", guards.join(", "))
        };
        let more = if graph.apart.len() > 4 {
            format!(" and {} pairs more", graph.apart.len() - 4)
        } else {
            String::new()
        };
        let text = format!("Proven: no path joins {}{more}{trusted}.", apart.join(", "));
        writeln!(
            svg,
            "<text x=\"{MARGIN}\" y=\"{:.1}\" font-size=\"12\" fill=\"#b71c1c\">{}</text>",
            y + 26.0,
            escaped(&text)
        )?;
    }
    Ok(())
}

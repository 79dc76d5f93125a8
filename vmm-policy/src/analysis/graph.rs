//! Who may talk to whom, as a graph.

use std::collections::BTreeMap;

use super::diff::shortened;
use super::reach::{Place, Reach};
use crate::compile::{ClassKind, NOBODY, Steps, Strength};
use crate::model::{Kind, Op, ValueKind};
use crate::policy::Policy;
use crate::syntax::PolicyError;

/// The nodes by class, and of objects by kind and number.
type NodeIndex = BTreeMap<(u32, Option<(Kind, u64)>), usize>;

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum NodeShape {
    /// Virtual machines.
    Vm,
    /// Host principals.
    Host,
    /// An object.
    Object(Kind),
}

/// Those that the policy treats alike, or an object.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Node {
    /// Their names.
    pub members: Vec<String>,
    /// What they are.
    pub shape: NodeShape,
    /// Which of [`Graph::groups`] they are in.
    pub group: Option<usize>,
    /// Whether they are guards.
    pub guard: bool,
    /// Their level of secrecy, if the policy has levels.
    pub level: Option<String>,
}

/// What one may do with another.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Edge {
    /// Who asks, of [`Graph::nodes`].
    pub from: usize,
    /// Whom.
    pub to: usize,
    /// What of, for the colour.
    pub kind: Kind,
    /// What: `vsock 5432`, `map-ro`.
    pub labels: Vec<String>,
    /// Whether all of it depends on conditions, or on somebody's yes.
    pub conditional: bool,
}

/// Who may talk to whom: machines, host principals and objects that a policy declares, and what its rules open between them. Those that it
/// treats alike are one node.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Graph {
    /// The policy's title.
    pub title: String,
    /// Labels of the first family, by which nodes are drawn together.
    pub groups: Vec<String>,
    /// The nodes.
    pub nodes: Vec<Node>,
    /// The edges.
    pub edges: Vec<Edge>,
    /// Pairs of groups between which there is no path, either way.
    pub apart: Vec<(usize, usize)>,
}

impl Policy {
    /// Who may talk to whom.
    ///
    /// # Errors
    /// If it would take too many steps.
    pub fn graph(&self) -> Result<Graph, PolicyError> {
        let mut graph = Graph {
            title: self.title().to_owned(),
            groups: self.groups(),
            nodes: Vec::new(),
            edges: Vec::new(),
            apart: Vec::new(),
        };
        let by_place = self.nodes(&mut graph);
        self.edges(&mut graph, &by_place)?;
        self.apart(&mut graph, &by_place)?;
        Ok(graph)
    }

    /// The labels of the first family that somebody has.
    fn groups(&self) -> Vec<String> {
        let model = &*self.model;
        let of_first = |label: &&u32| model.family(**label) == Some(0);
        let mut labels: Vec<u32> =
            model.parties.iter().flat_map(|party| party.labels.iter().filter(of_first)).copied().collect();
        labels.sort_unstable();
        labels.dedup();
        labels.iter().filter_map(|label| Some(model.labels.get(*label as usize)?.to_string())).collect()
    }

    fn nodes(&self, graph: &mut Graph) -> NodeIndex {
        let model = &*self.model;
        let mut by_place: NodeIndex = BTreeMap::new();
        for party in &model.parties {
            let Some(class) = self.table.class_of(&party.class) else { continue };
            let key = if party.object.is_some() { (NOBODY, party.object) } else { (class, None) };
            let at = *by_place.entry(key).or_insert(graph.nodes.len());
            if let Some(node) = graph.nodes.get_mut(at) {
                node.members.push(party.name.to_string());
                continue;
            }
            let label = |label: &u32| model.labels.get(*label as usize).map(|label| label.to_string());
            let group = party
                .labels
                .iter()
                .filter_map(label)
                .find_map(|label| graph.groups.iter().position(|group| *group == label));
            graph.nodes.push(Node {
                members: vec![party.name.to_string()],
                shape: match (party.class.kind, party.object) {
                    (_, Some((kind, _))) => NodeShape::Object(kind),
                    (ClassKind::Host, None) => NodeShape::Host,
                    _ => NodeShape::Vm,
                },
                group,
                guard: party.class.guard,
                level: model.secrecy.get(usize::from(party.class.secrecy)).map(|level| level.to_string()),
            });
        }
        by_place
    }

    fn edges(&self, graph: &mut Graph, by_place: &NodeIndex) -> Result<(), PolicyError> {
        let (model, table) = (&*self.model, &*self.table);
        let mut steps = Steps::default();
        // By who, whom and kind of object: what for, and whether it may be without a condition.
        let mut found: BTreeMap<(usize, usize, Kind), (Vec<String>, bool)> = BTreeMap::new();
        for op in Op::all() {
            for (asker, peer) in table.pairs(op, &mut steps)? {
                let Some(from) = by_place.get(&(asker, None)).copied() else { continue };
                table.outcomes(op, asker, peer, |outcome| {
                    let Some(rule) = outcome.opened_by.and_then(|rule| model.rules.get(rule as usize)) else {
                        return;
                    };
                    let plain = rule.condition == 0 && rule.strength != Strength::Ask;
                    let mut add = |to: usize, text: String| {
                        let (texts, certain) = found.entry((from, to, op.kind())).or_default();
                        if !texts.contains(&text) {
                            texts.push(text);
                        }
                        *certain |= plain;
                    };
                    if let Some(to) = by_place.get(&(peer, None)) {
                        add(*to, edge_text(model, op, outcome.first, outcome.last, rule.strength));
                    }
                    for object in model.objects.iter().filter(|object| object.kind == op.kind()) {
                        let inside = (outcome.first..=outcome.last).contains(&object.atom);
                        let meant = table.object_class(object.kind, object.atom) == peer;
                        if let Some(to) = by_place
                            .get(&(NOBODY, Some((object.kind, object.atom))))
                            .filter(|_| inside && meant)
                        {
                            add(*to, op.action().to_string());
                        }
                    }
                });
            }
        }
        let found = found.into_iter();
        graph.edges = found
            .map(|((from, to, kind), (labels, certain))| Edge {
                from,
                to,
                kind,
                labels,
                conditional: !certain,
            })
            .collect();
        Ok(())
    }

    fn apart(&self, graph: &mut Graph, by_place: &NodeIndex) -> Result<(), PolicyError> {
        let reach = Reach::new(&self.model, &self.table)?;
        let places = |group: usize| -> Vec<Place> {
            let inside = |at: usize| graph.nodes.get(at).is_some_and(|node| node.group == Some(group));
            by_place
                .iter()
                .filter(|(_, at)| inside(**at))
                .map(|((class, object), _)| {
                    object.map_or(Place::Class(*class), |(kind, atom)| Place::Station(kind, atom))
                })
                .collect()
        };
        let sets: Vec<Vec<Place>> = (0..graph.groups.len()).map(places).collect();
        for (one, from) in sets.iter().enumerate() {
            for (other, to) in sets.iter().enumerate().skip(one + 1) {
                let free = |from: &[Place], to: &[Place]| {
                    reach.between(&self.model, &self.table, from, to, true).is_none()
                };
                if free(from, to) && free(to, from) {
                    graph.apart.push((one, other));
                }
            }
        }
        Ok(())
    }
}

/// `vsock 5432`, `tcp 80 throttled`, `send icmp`.
fn edge_text(model: &crate::compile::Model, op: Op, first: u64, last: u64, strength: Strength) -> String {
    let mut text = match op.kind() {
        Kind::Vsock | Kind::Tcp | Kind::Udp if op.action() != crate::Action::Accept => op.kind().to_string(),
        Kind::Verb => String::new(),
        _ => op.to_string(),
    };
    match op.kind().value_kind() {
        ValueKind::Number(most) if first == last && first <= most => text.push_str(&format!(" {first}")),
        ValueKind::Number(most) if first > 0 || last < most => {
            text.push_str(&format!(" {first}..{}", last.min(most)))
        }
        ValueKind::Name => {
            let names = model.names.get(op.kind() as usize).map_or(0, |names| names.last());
            let last = last.min(names.max(first));
            let mut shown: Vec<String> =
                (first..=last).take(4).map(|atom| model.atom_name(op.kind(), atom)).collect();
            if last - first >= 4 {
                shown.truncate(2);
                shown.push(format!("and {} more", last - first - 1));
            }
            text.push_str(&format!(" {}", shown.join(", ")));
        }
        _ => (),
    }
    match strength {
        Strength::Throttle => text.push_str(", throttled"),
        Strength::Ask => text.push_str(", if confirmed"),
        Strength::Quarantine => text.push_str(", in quarantine"),
        Strength::Redirect => text.push_str(", redirected"),
        _ => (),
    }
    text.trim_start().to_owned()
}

impl Kind {
    /// A colour and a word for what is alike.
    pub(super) fn theme(self) -> (&'static str, &'static str) {
        match self {
            Self::Vsock => ("#1565c0", "vsock"),
            Self::Tcp | Self::Udp | Self::Icmp | Self::Ip | Self::Ethernet | Self::Network => {
                ("#2e7d32", "network")
            }
            Self::Region | Self::Grant | Self::Doorbell | Self::EventChannel => {
                ("#7b1fa2", "memory and doorbells")
            }
            Self::Disk | Self::Share | Self::Snapshot | Self::Migration => ("#a15c00", "storage"),
            _ => ("#546e7a", "management"),
        }
    }
}

impl Node {
    /// The first few members.
    pub(super) fn name(&self) -> String {
        shortened(&self.members)
    }
}

impl Graph {
    /// For Graphviz.
    pub fn to_dot(&self) -> String {
        let quote = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
        let mut dot = format!(
            "digraph policy {{\n  label=\"{}\"; labelloc=t; rankdir=LR; fontname=\"sans-serif\";\n  node [fontname=\"sans-serif\"]; edge [fontname=\"sans-serif\", fontsize=10];\n",
            quote(&self.title)
        );
        let node = |at: usize, node: &Node, indent: &str| {
            let shape = match node.shape {
                NodeShape::Vm => "box",
                NodeShape::Host => "house",
                NodeShape::Object(Kind::Disk | Kind::Snapshot) => "cylinder",
                NodeShape::Object(Kind::Share) => "folder",
                NodeShape::Object(_) => "ellipse",
            };
            let frame = if node.guard { ", peripheries=2" } else { "" };
            format!("{indent}n{at} [label=\"{}\", shape={shape}{frame}];\n", quote(&node.name()))
        };
        for (group, name) in self.groups.iter().enumerate() {
            dot.push_str(&format!(
                "  subgraph cluster_{group} {{\n    label=\"{}\"; style=rounded;\n",
                quote(name)
            ));
            for (at, inside) in self.nodes.iter().enumerate().filter(|(_, node)| node.group == Some(group)) {
                dot.push_str(&node(at, inside, "    "));
            }
            dot.push_str("  }\n");
        }
        for (at, outside) in self.nodes.iter().enumerate().filter(|(_, node)| node.group.is_none()) {
            dot.push_str(&node(at, outside, "  "));
        }
        for edge in &self.edges {
            let (colour, _) = edge.kind.theme();
            let style = if edge.conditional { ", style=dashed" } else { "" };
            let label = quote(&edge.labels.join("\n")).replace('\n', "\\n");
            dot.push_str(&format!(
                "  n{} -> n{} [label=\"{label}\", color=\"{colour}\", fontcolor=\"{colour}\"{style}];\n",
                edge.from, edge.to
            ));
        }
        dot.push_str("}\n");
        dot
    }

    /// A picture of its own: groups side by side, whom they share below, and who manages above.
    pub fn to_svg(&self) -> String {
        super::picture::draw(self)
    }
}

//! Why: one decision, rule by rule.
//!
//! It goes over all rules one after the other and shares nothing with the table but the numbers of names: what it says of a request
//! is compared with what the table says by tests.

use std::fmt;

use super::scene::Scene;
use crate::compile::{Class, ClassKey, ClassKind, Facts, Model, NOBODY, RuleDef, Strength, contradiction};
use crate::model::{Layer, Op, RuleId, Verdict};
use crate::policy::Policy;
use crate::syntax::PolicyError;

/// Why a request is answered as it is.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Explanation {
    /// The request.
    pub request: String,
    /// The answer.
    pub verdict: Verdict,
    /// Which layer said so.
    pub layer: Layer,
    /// What each layer says, in the order in which they are asked.
    pub layers: Vec<LayerFinding>,
    /// The rules about such a request, strongest first; the first that applies is the answer, if the layers before let it come that far.
    pub rules: Vec<Finding>,
}

/// What a layer says.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct LayerFinding {
    /// Which.
    pub layer: Layer,
    /// Whether it lets the request pass.
    pub passes: bool,
    /// Why.
    pub reason: String,
}

/// A rule about such a request.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Finding {
    /// Which.
    #[cfg_attr(feature = "serde", serde(skip))]
    pub id: RuleId,
    /// Its file.
    pub file: String,
    /// Its line.
    pub line: usize,
    /// Its text.
    pub rule: String,
    /// Whether its condition holds.
    pub applies: bool,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n  {} ({})", self.request, self.verdict, self.layer)?;
        for finding in &self.layers {
            let answer = if finding.passes { "passes" } else { "refuses" };
            writeln!(f, "  {:<9} {answer}: {}", finding.layer.to_string(), finding.reason)?;
        }
        for finding in &self.rules {
            let mark = if finding.applies { "applies" } else { "its condition does not hold" };
            writeln!(f, "  {}:{}: {}  ({mark})", finding.file, finding.line, finding.rule)?;
        }
        Ok(())
    }
}

/// What holds of a request by the rules alone: the first that applies, and the first that would have opened it.
pub(crate) fn rules_about<'m>(
    model: &'m Model,
    op: Op,
    asker: &ClassKey,
    peer: Option<&ClassKey>,
    value: u64,
) -> impl Iterator<Item = (RuleId, &'m RuleDef)> {
    let about = move |rule: &RuleDef| {
        let targets = &rule.targets;
        let matches = |who: u32, key: &ClassKey| {
            model.who.get(who as usize).is_some_and(|who| who.matches(key.kind, &key.labels))
        };
        let of_peer = match (targets.peer, peer) {
            // A rule about nobody is about an object that stands for itself.
            (None, None) => true,
            (None, Some(key)) => key.kind == ClassKind::Object,
            (Some(_), None) => false,
            (Some(who), Some(key)) => matches(who, key),
        };
        let family = |key: &ClassKey, of| model.label_of(&key.labels, of);
        let related = targets.relation.is_none_or(|(same, of)| {
            match (family(asker, of), peer.and_then(|peer| family(peer, of))) {
                (Some(one), Some(other)) => (one == other) == same,
                _ => false,
            }
        });
        let of_value = targets.ranges.is_empty()
            || targets.ranges.iter().any(|(first, last)| (*first..=*last).contains(&value));
        targets.ops.contains(&op) && of_peer && related && of_value && matches(targets.asker, asker)
    };
    model.rules.iter().zip(0..).filter(move |(rule, _)| about(rule)).map(|(rule, at)| (RuleId(at), rule))
}

/// The answer without a table: lattice and walls, then the rules in order.
pub(crate) fn evaluate(
    model: &Model,
    op: Op,
    asker: &ClassKey,
    peer: Option<&ClassKey>,
    value: u64,
    facts: &Facts,
) -> (Verdict, Layer, Option<RuleId>) {
    let nobody = ClassKey::default();
    let (asker_class, peer_class) = (Class::from(asker), Class::from(peer.unwrap_or(&nobody)));
    let flow = op.flow();
    if !asker_class.permits(&peer_class, flow) {
        return (Verdict::Deny, Layer::Lattice, None);
    }
    let both = asker_class.wall | peer_class.wall;
    let meet = asker_class.wall != 0 && peer_class.wall != 0 && (flow.reads() || flow.writes());
    if meet && model.wall_conflict(both).is_some() {
        return (Verdict::Deny, Layer::Wall, None);
    }
    let mut missed = None;
    for (id, rule) in rules_about(model, op, asker, peer, value) {
        if model.conditions.holds(rule.condition, facts) {
            let layer = if rule.condition == 0 { Layer::Type } else { Layer::Attribute };
            return (rule.verdict, layer, Some(id));
        }
        if rule.strength > Strength::Deny && missed.is_none() {
            missed = Some(id);
        }
    }
    let layer = if missed.is_some() { Layer::Attribute } else { Layer::Type };
    (Verdict::Deny, layer, missed)
}

impl Policy {
    /// Why a request is answered as it is. It is a sentence as rules are, between machines and host principals that the policy
    /// declares: `web to connect vsock 5432 of db when running and attested`. Without `when`, both run.
    ///
    /// # Errors
    /// If the sentence is none, or is about nobody.
    pub fn explain(&self, sentence: &str) -> Result<Explanation, PolicyError> {
        let scene = Scene::new(self, sentence)?;
        let model = &*self.model;
        let key = |class: u32| self.table.keys.get(class as usize);
        let nobody = ClassKey::default();
        let asker = key(scene.asker_class(self)).unwrap_or(&nobody);
        let (peer_class, object_class) = scene.peer_classes(self);
        let peer = (peer_class != NOBODY).then(|| key(peer_class)).flatten();
        let object = (object_class != NOBODY).then(|| key(object_class)).flatten();

        let mut layers = Vec::new();
        if object.is_some() {
            // The object that is named beside its peer has levels of its own.
            layers.extend([self.lattice(scene.op, asker, object), self.wall(scene.op, asker, object)]);
            layers
                .extend(peer.map(|peer| self.wall(scene.op, peer, object)).filter(|finding| !finding.passes));
        }
        layers.extend([self.lattice(scene.op, asker, peer), self.wall(scene.op, asker, peer)]);
        if let (Some(peer), Some(object)) = (peer, object)
            && let Some((one, other)) = contradiction(model, peer, object)
        {
            let label = |label: u32| model.labels.get(label as usize).map_or("", |label| label);
            let reason =
                format!("the peer is {:?} and the object {:?}: it is another's", label(one), label(other));
            layers.push(LayerFinding { layer: Layer::Identity, passes: false, reason });
        }
        let finding = |(id, rule): (RuleId, &RuleDef), facts: &Facts| Finding {
            id,
            file: model.sources.name(rule.span).to_owned(),
            line: model.sources.place(rule.span).0,
            rule: model.sources.one_line(rule.span),
            applies: model.conditions.holds(rule.condition, facts),
        };
        let about = |peer: Option<&ClassKey>| -> Vec<(RuleId, &RuleDef)> {
            rules_about(model, scene.op, asker, peer, scene.value).collect()
        };
        let mut rules: Vec<Finding> =
            about(peer).into_iter().map(|rule| finding(rule, &scene.facts)).collect();
        let (mut verdict, mut layer, _) = evaluate_rules(model, &scene, asker, peer);
        // What is said of the object itself, where it is stronger.
        let of_object = object.into_iter().flat_map(|object| about(Some(object)));
        let facts = Facts { peer: 0, ..scene.facts };
        let of_object = of_object.map(|rule| (rule.1.strength, finding(rule, &facts)));
        if let Some((strength, stronger)) = of_object.into_iter().find(|(_, finding)| finding.applies) {
            let by_peer = rules.iter().find(|finding| finding.applies).and_then(|found| model.rule(found.id));
            if strength < by_peer.map_or(Strength::Deny, |rule| rule.strength) {
                let rule = model.rule(stronger.id);
                verdict = rule.map_or(Verdict::Deny, |rule| rule.verdict);
                let plain = rule.is_some_and(|rule| rule.condition == 0);
                layer = if plain { Layer::Type } else { Layer::Attribute };
                rules.insert(0, stronger);
            }
        }
        let by_rules = layer;
        let line = |id: RuleId| {
            self.rule(id).map_or(String::new(), |rule| format!("line {} of {}", rule.line, rule.file))
        };
        let winner = rules.iter().find(|finding| finding.applies).map(|finding| finding.id);
        let word = winner.and_then(|id| model.rule(id)).map_or(Verdict::Deny, |rule| rule.verdict);
        layers.push(LayerFinding {
            layer: by_rules,
            passes: word != Verdict::Deny,
            reason: match (winner, rules.first()) {
                (Some(id), _) => format!("{word} by {}", line(id)),
                (None, Some(finding)) => format!("what {} would allow does not hold now", line(finding.id)),
                (None, None) => "no rule is about it, and nothing is allowed that no rule allows".to_owned(),
            },
        });
        if let Some(refusing) = layers.iter().find(|finding| !finding.passes) {
            (verdict, layer) = (Verdict::Deny, refusing.layer);
        }
        Ok(Explanation { request: scene.shown, verdict, layer, layers, rules })
    }

    fn lattice(&self, op: Op, asker: &ClassKey, peer: Option<&ClassKey>) -> LayerFinding {
        let model = &*self.model;
        let Some(peer) = peer else {
            return LayerFinding {
                layer: Layer::Lattice,
                passes: true,
                reason: "it leads to nobody with levels".to_owned(),
            };
        };
        let passes = Class::from(asker).permits(&Class::from(peer), op.flow());
        let shown = |key: &ClassKey| {
            let level = |levels: &[Box<str>], at: u8| levels.get(usize::from(at)).cloned();
            let categories =
                model.categories.iter().enumerate().filter(|(at, _)| key.categories >> at & 1 == 1);
            let parts = [level(&model.secrecy, key.secrecy), level(&model.integrity, key.integrity)];
            let mut parts: Vec<String> = parts.into_iter().flatten().map(String::from).collect();
            parts.extend(categories.map(|(_, name)| name.to_string()));
            if key.guard {
                "a guard".to_owned()
            } else if parts.is_empty() {
                "no level".to_owned()
            } else {
                parts.join(" ")
            }
        };
        let (asker, peer) = (shown(asker), shown(peer));
        let reason = match op.flow() {
            crate::Flow::None => "no information goes".to_owned(),
            crate::Flow::In => format!("information goes from {peer} to {asker}"),
            crate::Flow::Out => format!("information goes from {asker} to {peer}"),
            crate::Flow::Both => format!("information goes both ways between {asker} and {peer}"),
        };
        LayerFinding { layer: Layer::Lattice, passes, reason }
    }

    fn wall(&self, op: Op, asker: &ClassKey, peer: Option<&ClassKey>) -> LayerFinding {
        let own = |key: &ClassKey| Class::from(key).wall;
        let both = own(asker) | peer.map_or(0, own);
        let flows = op.flow().reads() || op.flow().writes();
        match self.model.wall_conflict(both).filter(|_| flows) {
            Some(wall) => {
                let reason = format!("the two stand on different sides of the wall {wall:?}");
                LayerFinding { layer: Layer::Wall, passes: false, reason }
            }
            None => {
                let reason = "no wall is between their labels; what they have had to do with before is the monitor's to know";
                LayerFinding { layer: Layer::Wall, passes: true, reason: reason.to_owned() }
            }
        }
    }
}

/// The part of [`evaluate`] that is about rules.
fn evaluate_rules(
    model: &Model,
    scene: &Scene,
    asker: &ClassKey,
    peer: Option<&ClassKey>,
) -> (Verdict, Layer, Option<RuleId>) {
    let plain = |key: &ClassKey| ClassKey { guard: true, ..key.clone() };
    evaluate(model, scene.op, &plain(asker), peer.map(plain).as_ref(), scene.value, &scene.facts)
}

//! The page.

use super::collect::{ReportData, short};
use super::{escape, graph};
use crate::event::rfc3339;
use crate::gaps::Gaps;
use crate::verify::{Severity, Verification};

const STYLE: &str = "
:root{--bg:#fbfbf9;--fg:#1c1e21;--quiet:#686c72;--line:#dddfe2;--card:#fff;--denied:#c8372d;--allowed:#2f7d4f;--other:#9aa3ad;--accent:#2f5d9b}
@media(prefers-color-scheme:dark){:root{--bg:#15171a;--fg:#e6e7e9;--quiet:#9aa0a8;--line:#33373d;--card:#1d2024;--denied:#ef6a5f;--allowed:#5fbf86;--other:#6b7480;--accent:#7fa9e6}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}h1{font-size:26px;margin:0}h2{font-size:18px;margin:34px 0 10px}
.quiet{color:var(--quiet)}.mono{font-family:ui-monospace,'DejaVu Sans Mono',monospace;font-size:13px;overflow-wrap:anywhere}
.state{display:flex;gap:16px;align-items:flex-start;border:1px solid var(--line);border-left:6px solid var(--allowed);background:var(--card);padding:14px 18px;border-radius:8px;margin:18px 0}
.state.bad{border-left-color:var(--denied)}.state strong{font-size:17px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.card b{display:block;font-size:22px;font-variant-numeric:tabular-nums}
svg{width:100%;height:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px}svg text{fill:var(--fg);font-size:13px}
rect.denied,.tip.denied{fill:var(--denied)}rect.allowed,.tip.allowed{fill:var(--allowed)}rect.other{fill:var(--other)}.axis{stroke:var(--line)}
.edge{fill:none;opacity:.85}.edge.denied{stroke:var(--denied);stroke-dasharray:6 4}.edge.allowed{stroke:var(--allowed)}
.node rect{fill:var(--bg);stroke:var(--accent);stroke-width:1.5}.node.thing rect{stroke:var(--quiet)}
table{width:100%;border-collapse:collapse;background:var(--card);border:1px solid var(--line);border-radius:8px}th,td{text-align:left;padding:7px 10px;border-top:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}
th{color:var(--quiet);font-weight:600;border-top:0}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}td.time,td.party{white-space:nowrap}
.key i{display:inline-block;width:11px;height:11px;border-radius:2px;margin:0 5px 0 14px}";

fn time(nanoseconds: u64) -> String {
    rfc3339(nanoseconds).get(..19).unwrap_or_default().replace('T', " ")
}

fn number(n: u64) -> String {
    let digits = n.to_string();
    let mut grouped = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push('\u{202f}');
        }
        grouped.push(digit);
    }
    grouped
}

/// The page, as HTML. It has no scripts and loads nothing.
pub fn render(data: &ReportData, verification: &Verification, gaps: &Gaps) -> String {
    let origin = escape(&verification.origin);
    let mut html = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\
         <title>Audit report: {origin}</title><style>{STYLE}</style></head><body><main>\
         <h1>{origin}</h1><p class=\"quiet\">Audit report"
    );
    if let Some((first, last)) = data.times {
        html += &format!(", {} to {} UTC", time(first), time(last));
    }
    html += "</p>";
    html += &state(verification, gaps);
    html += &cards(data, verification, gaps);
    html += "<h2>Timeline</h2><p class=\"key quiet\"><i style=\"background:var(--denied)\"></i>denied\
             <i style=\"background:var(--allowed)\"></i>allowed<i style=\"background:var(--other)\"></i>without a verdict</p>";
    html += &graph::timeline(data);
    html += "<h2>Denials by pair</h2>";
    html += &denials(data);
    html += "<h2>Flows</h2><p class=\"key quiet\">An arrow goes from who asked to whom or what for; dashed ones were denied.</p>";
    html +=
        &if data.flows.is_empty() { "<p class=\"quiet\">None.</p>".to_owned() } else { graph::flows(data) };
    html += "<h2>To be looked at</h2>";
    html += &notable(data);
    html += "<h2>Accounts of the sources</h2>";
    html += &accounts(gaps);
    html += &format!(
        "<h2>Last checkpoint</h2><pre class=\"mono\">{}</pre></main></body></html>\n",
        // Its lines are to stay.
        verification
            .checkpoint
            .as_deref()
            .unwrap_or("none")
            .lines()
            .map(escape)
            .collect::<Vec<_>>()
            .join("\n")
    );
    html
}

fn state(verification: &Verification, gaps: &Gaps) -> String {
    let good = verification.intact && gaps.is_complete();
    let (class, title) = match (verification.intact, good) {
        (true, true) => ("", "The log is as it was written"),
        (true, false) => (" bad", "The log is as it was written, and events are missing in it"),
        (false, _) => (" bad", "The log is damaged"),
    };
    let mut html = format!(
        "<section class=\"state{class}\" data-intact=\"{}\"><div><strong>{title}</strong><br>{} entries, {} checkpoints in {} segments, key epoch {}{}",
        verification.intact,
        number(verification.size),
        number(verification.checkpoints),
        number(verification.segments),
        verification.epoch,
        if verification.closed { ", closed" } else { "" }
    );
    html += &format!("<br><span class=\"quiet mono\">root {}</span>", verification.root);
    if !verification.findings.is_empty() {
        html += "<ul>";
        for finding in verification.findings.iter().take(50) {
            let mark = if finding.severity == Severity::Damage { "<b>damage</b>: " } else { "" };
            html += &format!("<li>{mark}{}</li>", escape(&finding.to_string()));
        }
        html += "</ul>";
    }
    html + "</div></section>"
}

fn cards(data: &ReportData, verification: &Verification, gaps: &Gaps) -> String {
    let sum = |f: &dyn Fn(&super::Flow) -> u64| data.flows.values().map(f).sum::<u64>();
    let missing = gaps.accounts.iter().map(|account| account.missing).sum::<u64>();
    let cards = [
        ("entries", verification.size),
        ("denied", sum(&|flow| flow.denied)),
        ("allowed", sum(&|flow| flow.allowed)),
        ("counted only", gaps.accounts.iter().map(|account| account.counted).sum()),
        ("missing", missing),
        ("bytes", verification.bytes),
    ];
    let cards = cards.map(|(name, n)| {
        format!("<div class=\"card\"><b>{}</b><span class=\"quiet\">{name}</span></div>", number(n))
    });
    format!("<div class=\"cards\">{}</div>", cards.concat())
}

fn denials(data: &ReportData) -> String {
    let mut pairs: Vec<_> = data.flows.iter().filter(|(_, flow)| flow.denied > 0).collect();
    if pairs.is_empty() {
        return "<p class=\"quiet\">None.</p>".to_owned();
    }
    pairs.sort_by_key(|(_, flow)| std::cmp::Reverse(flow.denied));
    let list = |counts: &std::collections::BTreeMap<String, u64>| {
        let mut counts: Vec<_> = counts.iter().collect();
        counts.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let shown = counts.iter().take(4).map(|(name, count)| format!("{} ({count})", escape(name)));
        shown.collect::<Vec<_>>().join(", ")
    };
    let mut html = String::from(
        "<table><tr><th>who</th><th>whom or what</th><th class=\"n\">denied</th><th class=\"n\">allowed</th><th>what for</th><th>rules</th><th>last</th></tr>",
    );
    for ((from, to), flow) in pairs.iter().take(100) {
        html += &format!(
            "<tr>{}{}<td class=\"n\">{}</td><td class=\"n\">{}</td><td>{}</td><td>{}</td><td class=\"time\">{}</td></tr>",
            party(from),
            party(to),
            number(flow.denied),
            number(flow.allowed),
            list(&flow.objects),
            list(&flow.rules),
            time(flow.last_denied)
        );
    }
    html + "</table>"
}

/// A cell with a party, or an object that stands for itself: short, and whole for who points at it.
fn party(name: &str) -> String {
    format!("<td class=\"party\" title=\"{}\">{}</td>", escape(name), escape(&short(name)))
}

fn notable(data: &ReportData) -> String {
    let mut html = String::from("<table><tr><th>time (UTC)</th><th class=\"n\">entry</th><th>what</th></tr>");
    for (wall, seq, text) in data.notable.iter().rev() {
        html += &format!(
            "<tr><td class=\"time\">{}</td><td class=\"n\">{seq}</td><td>{}</td></tr>",
            time(*wall),
            escape(text)
        );
    }
    html += "</table>";
    let left_out = data.notable_total - data.notable.len() as u64;
    if left_out > 0 {
        html += &format!("<p class=\"quiet\">{} earlier ones are in the log.</p>", number(left_out));
    }
    html
}

fn accounts(gaps: &Gaps) -> String {
    let mut html = String::from(
        "<table><tr><th class=\"n\">source</th><th>who</th><th class=\"n\">emitted</th><th class=\"n\">written</th><th class=\"n\">counted</th><th class=\"n\">torn</th><th class=\"n\">missing</th></tr>",
    );
    for account in gaps.accounts.iter().take(200) {
        html += &format!(
            "<tr><td class=\"n\">{}</td>{}<td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
            account.source,
            party(account.who.as_deref().unwrap_or("")),
            number(account.issued),
            number(account.written),
            number(account.counted),
            number(account.torn),
            number(account.missing)
        );
    }
    html += "</table>";
    for silence in &gaps.silences {
        let why = if silence.closed { "the log was closed" } else { "the log was silent" };
        html += &format!("<p>{} s from {}: {why}.</p>", silence.seconds, escape(&silence.from));
    }
    html
}

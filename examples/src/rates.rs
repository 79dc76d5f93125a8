//! What is done in a second, beside what a peer does: the table that `io_versus_qemu` and `vsock_times` print.

use crate::race::Spread;

/// A row: what was done in a second, here and by the peer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Row {
    /// What it is, with its unit: the more, the better.
    pub label: String,
    /// One figure of each pair.
    pub ours: Vec<f64>,
    /// Whom ours is compared with.
    pub peer: String,
    /// Its figures.
    pub theirs: Vec<f64>,
    /// Why there is no figure.
    pub failure: Option<String>,
    /// Where the time goes, if that explains the ratio.
    pub remark: Option<String>,
}

impl Row {
    /// A row of one pair.
    pub fn new(label: impl Into<String>, ours: f64, peer: impl Into<String>, theirs: f64) -> Self {
        let (ours, theirs) = (vec![ours], vec![theirs]);
        Self { label: label.into(), ours, peer: peer.into(), theirs, ..Self::default() }
    }

    /// With what explains it.
    #[must_use]
    pub fn remark(self, remark: impl Into<String>) -> Self {
        Self { remark: Some(remark.into()), ..self }
    }

    /// One without figures.
    pub fn failed(label: impl Into<String>, why: impl Into<String>) -> Self {
        Self { label: label.into(), peer: "-".to_owned(), failure: Some(why.into()), ..Self::default() }
    }

    /// The cells: label, ours, peer, theirs, ratio.
    fn cells(&self) -> [String; 5] {
        let spread = |figures: &[f64]| {
            let spread = Spread::of(figures.to_vec());
            let half = (spread.most - spread.least) / 2.0 / spread.median * 100.0;
            (
                spread.median,
                if figures.is_empty() {
                    if self.failure.is_some() { "failed" } else { "-" }.to_owned()
                } else {
                    format!("{} ±{half:.0}%", digits(spread.median))
                },
            )
        };
        let ((ours, ours_text), (theirs, theirs_text)) = (spread(&self.ours), spread(&self.theirs));
        let ratio = if self.ours.is_empty() || self.theirs.is_empty() {
            "-".to_owned()
        } else {
            format!("{:.2}", ours / theirs)
        };
        [self.label.clone(), ours_text, self.peer.clone(), theirs_text, ratio]
    }
}

/// Adds a further pair to what there is of rows with the same labels.
pub fn join(rows: &mut Vec<Row>, pair: Vec<Row>) {
    for row in pair {
        match rows.iter_mut().find(|known| known.label == row.label) {
            Some(known) => {
                known.ours.extend(row.ours);
                known.theirs.extend(row.theirs);
                known.failure = known.failure.take().or(row.failure);
                known.remark = row.remark.or(known.remark.take());
            }
            None => rows.push(row),
        }
    }
}

/// What explains them, each once, in their order.
pub fn remarks(rows: &[Row]) -> Vec<&str> {
    let mut remarks: Vec<&str> = Vec::new();
    for remark in rows.iter().filter_map(|row| row.remark.as_deref()) {
        if !remarks.contains(&remark) {
            remarks.push(remark);
        }
    }
    remarks
}

fn digits(value: f64) -> String {
    let places = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.places$}")
}

/// All of it, as Markdown that a terminal shows as well.
pub fn table(rows: &[Row]) -> String {
    let head = ["", "ours", "peer", "the peer's", "ratio"].map(str::to_owned);
    let cells: Vec<[String; 5]> = std::iter::once(head).chain(rows.iter().map(Row::cells)).collect();
    let widths: Vec<usize> = (0..5)
        .map(|column| cells.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max())
        .map(|width| width.unwrap_or(0).max(3))
        .collect();
    let mut text = String::new();
    for (number, row) in cells.iter().enumerate() {
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            // Words are flush left.
            text += &if column == 0 || column == 2 {
                format!("| {cell:<width$} ")
            } else {
                format!("| {cell:>width$} ")
            };
        }
        text += "|\n";
        if number == 0 {
            for (column, &width) in widths.iter().enumerate() {
                let rule = "-".repeat(width + 1);
                text += &if column == 0 || column == 2 {
                    format!("| {} ", &rule[..width])
                } else {
                    format!("| {}: ", &rule[..width - 1])
                };
            }
            text += "|\n";
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_medians_and_ratios_of_them() {
        let row = |label: &str, ours: &[f64], theirs: &[f64]| Row {
            label: label.to_owned(),
            ours: ours.to_vec(),
            peer: "QEMU".to_owned(),
            theirs: theirs.to_vec(),
            ..Row::default()
        };
        let expected = "\
|          |      ours | peer | the peer's | ratio |
| -------- | --------: | ---- | ---------: | ----: |
| read, /s | 3000 ±50% | QEMU |   1500 ±0% |  2.00 |
| MB/s     |  5.25 ±0% | QEMU |          - |     - |
";
        let text = table(&[row("read, /s", &[4000.0, 3000.0, 1000.0], &[1500.0]), row("MB/s", &[5.25], &[])]);
        assert_eq!(text, expected);
    }

    #[test]
    fn remarks_are_those_of_the_last_pair_each_once() {
        let row = |label: &str, remark: &str| Row::new(label, 1.0, "memcpy", 2.0).remark(remark);
        let mut rows = vec![row("a", "slow"), row("b", "other")];
        join(&mut rows, vec![row("a", "other"), Row::new("b", 1.0, "memcpy", 2.0)]);
        assert_eq!(remarks(&rows), ["other"]);
    }

    #[test]
    fn pairs_are_joined_by_label() {
        let mut rows = vec![Row::new("a", 1.0, "memcpy", 2.0)];
        join(&mut rows, vec![Row::failed("group", "late"), Row::new("a", 3.0, "memcpy", 4.0)]);
        join(&mut rows, vec![Row::failed("group", "later")]);
        assert_eq!((&rows[0].ours[..], &rows[0].theirs[..]), (&[1.0, 3.0][..], &[2.0, 4.0][..]));
        assert_eq!((rows.len(), rows[1].failure.as_deref()), (2, Some("late")));
        assert!(table(&rows).contains("| group |    failed | -      |"), "{}", table(&rows));
    }
}

//! The table: what was found, as Markdown that a terminal shows as well.

use std::fmt;

use vmm_examples::race::Spread;

/// What is known of one row in one column.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Cell {
    /// Seconds, one of each pair.
    pub(crate) seconds: Vec<f64>,
    /// Why there is no figure.
    pub(crate) failure: Option<String>,
}

/// A row of the table.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Line {
    pub(crate) label: String,
    /// Units in a second.
    pub(crate) per_second: f64,
    /// In the order of the columns.
    pub(crate) cells: Vec<Cell>,
}

/// All of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Table {
    /// The columns' names.
    pub(crate) names: Vec<String>,
    /// The column that those after it are compared with.
    pub(crate) compared_with: usize,
    pub(crate) lines: Vec<Line>,
}

impl Table {
    fn cell(&self, line: &Line, column: usize) -> String {
        let spread = |column: usize| {
            let cell = line.cells.get(column).filter(|cell| cell.failure.is_none())?;
            (!cell.seconds.is_empty()).then(|| Spread::of(cell.seconds.clone()))
        };
        let Some(here) = spread(column) else {
            let failed = line.cells.get(column).is_some_and(|cell| cell.failure.is_some());
            return if failed { "-".to_owned() } else { String::new() };
        };
        let mut text = digits(here.median * line.per_second);
        if line.cells.get(column).is_some_and(|cell| cell.seconds.len() > 1) {
            text += &format!(" ±{:.0}%", (here.most - here.least) / 2.0 / here.median * 100.0);
        }
        if column > self.compared_with
            && let Some(theirs) = spread(self.compared_with)
        {
            text += &format!(" ×{}", ratio(here.median / theirs.median));
        }
        text
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = std::iter::once(String::new()).chain(self.names.iter().cloned()).collect();
        let mut rows: Vec<Vec<String>> = vec![head];
        rows.extend(self.lines.iter().map(|line| {
            let cells = (0..self.names.len()).map(|column| self.cell(line, column));
            std::iter::once(line.label.clone()).chain(cells).collect()
        }));
        let width = |column| {
            let texts = rows.iter().filter_map(|row| row.get(column));
            texts.map(|text: &String| text.chars().count()).max().unwrap_or(0).max(NARROWEST)
        };
        let widths: Vec<usize> = (0..=self.names.len()).map(width).collect();
        let mut rows = rows.iter();
        write_row(f, rows.next().into_iter().flatten(), &widths)?;
        // All but the first are flush right.
        let rule = widths.iter().enumerate().map(|(column, width)| {
            if column == 0 { "-".repeat(*width) } else { format!("{}:", "-".repeat(width - 1)) }
        });
        write_row(f, &rule.collect::<Vec<_>>(), &widths)?;
        rows.try_for_each(|row| write_row(f, row, &widths))
    }
}

/// What Markdown wants of a rule.
const NARROWEST: usize = 3;

fn write_row<'a>(
    f: &mut fmt::Formatter<'_>,
    texts: impl IntoIterator<Item = &'a String>,
    widths: &[usize],
) -> fmt::Result {
    for (column, (text, &width)) in texts.into_iter().zip(widths).enumerate() {
        if column == 0 {
            write!(f, "| {text:<width$} |")?;
        } else {
            write!(f, " {text:>width$} |")?;
        }
    }
    writeln!(f)
}

/// Three digits, or as many as there are before the point.
fn digits(value: f64) -> String {
    if !value.is_finite() {
        return value.to_string();
    }
    let places = (0..6).find(|&places| value.abs() * 10_f64.powi(places) >= 99.95).unwrap_or(6);
    format!("{value:.*}", usize::try_from(places).unwrap_or(0))
}

/// The same, but no more than three places.
fn ratio(value: f64) -> String {
    if value < 0.1 {
        format!("{value:.3}")
    } else if value < 1.0 {
        format!("{value:.2}")
    } else {
        digits(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(seconds: &[f64]) -> Cell {
        Cell { seconds: seconds.to_vec(), failure: None }
    }

    fn failed() -> Cell {
        // What came before the failure does not count.
        Cell { seconds: vec![1.0], failure: Some("it hung".to_owned()) }
    }

    fn line(label: &str, per_second: f64, cells: [Cell; 4]) -> Line {
        Line { label: label.to_owned(), per_second, cells: cells.to_vec() }
    }

    fn table(lines: Vec<Line>) -> Table {
        let names = ["native", "TCG", "translate", "kvm"].map(str::to_owned).to_vec();
        Table { names, compared_with: 1, lines }
    }

    #[test]
    fn three_digits_whatever_the_size() {
        for (value, text) in [
            (0.0, "0.000000"),
            (0.000_004_2, "0.000004"),
            (0.05, "0.0500"),
            (0.1234, "0.123"),
            (0.9996, "1.00"),
            (1.0, "1.00"),
            (9.994, "9.99"),
            (9.996, "10.0"),
            (99.94, "99.9"),
            (99.96, "100"),
            (12_345.6, "12346"),
            (f64::NAN, "NaN"),
        ] {
            assert_eq!(digits(value), text);
        }
    }

    #[test]
    fn it_is_markdown_in_columns() {
        let lines = vec![
            line(
                "exec to init, s",
                1.0,
                [cell(&[]), cell(&[2.0, 2.2, 1.9]), cell(&[5.0, 5.0, 5.5]), failed()],
            ),
            line("getppid, us", 1e6, [cell(&[5e-8]), cell(&[4e-7]), cell(&[1e-5]), cell(&[1e-7])]),
        ];
        let expected = "\
|                 | native |      TCG |      translate |         kvm |
| --------------- | -----: | -------: | -------------: | ----------: |
| exec to init, s |        | 2.00 ±8% | 5.00 ±5% ×2.50 |           - |
| getppid, us     | 0.0500 |    0.400 |     10.0 ×25.0 | 0.100 ×0.25 |
";
        assert_eq!(table(lines).to_string(), expected);
    }

    #[test]
    fn without_tcg_there_is_no_ratio() {
        let lines = vec![line("fib", 1e3, [cell(&[0.001]), failed(), cell(&[0.25]), cell(&[])])];
        let text = table(lines).to_string();
        assert!(text.ends_with("| fib |   1.00 |   - |       250 |     |\n"), "{text}");
    }
}

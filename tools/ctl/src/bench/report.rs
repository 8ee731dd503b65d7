//! The results as a table and as JSON.

use std::error::Error;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::experiments::Values;
use super::figures::{self, Figure, Part};

/// Samples by figure and subject, as the JSON has them: in the shown unit.
#[derive(Debug)]
pub struct Report {
    part: Part,
    figures: Map<String, Value>,
}

/// Median, least and greatest of the samples.
fn summary(samples: &[f64]) -> Option<(f64, f64, f64)> {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let (min, max) = (*sorted.first()?, *sorted.last()?);
    let middle = sorted.len() / 2;
    let median = if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 };
    Some((median, min, max))
}

impl Report {
    /// The part's results in the JSON file; none if there is no such file.
    pub fn load(part: Part, path: Option<&Path>) -> Self {
        let mut all = path.map(read).unwrap_or_default();
        let figures = match all.remove(part.name()) {
            Some(Value::Object(figures)) => figures,
            _ => Map::new(),
        };
        Self { part, figures }
    }

    /// Adds the samples of one subject. What the part does not report is left out.
    pub fn add(&mut self, subject: &str, samples: &[Values]) {
        for figure in figures::of(self.part) {
            let values: Vec<_> = samples
                .iter()
                .filter_map(|values| values.iter().find(|(id, _)| *id == figure.id))
                .map(|(_, value)| value / figure.unit.scale())
                .collect();
            let Some((median, min, max)) = summary(&values) else { continue };
            let entry = self.figures.entry(figure.id).or_insert_with(|| {
                json!({ "what": figure.what.trim_start(), "unit": figure.unit.symbol(), "goal": figure.goal, "results": {} })
            });
            entry["results"][subject] = json!({ "median": median, "min": min, "max": max, "samples": values });
        }
    }

    /// Writes the part's results into the JSON file, beside those of other parts.
    pub fn save(&self, path: &Path) -> Result<(), Box<dyn Error>> {
        let mut all = read(path);
        all.insert(self.part.name().to_owned(), self.figures.clone().into());
        fs::write(path, serde_json::to_string_pretty(&all)? + "\n")?;
        Ok(())
    }

    /// What of a subject missed its goal.
    pub fn missed(&self, subject: &str) -> Vec<&'static str> {
        let median = |figure: &Figure| self.figures.get(figure.id)?["results"][subject]["median"].as_f64();
        let figures = figures::of(self.part).iter();
        let missed = figures.filter(|figure| median(figure).is_some_and(|median| misses(figure, median)));
        missed.map(|figure| figure.what.trim_start()).collect()
    }

    /// The table: a line for each figure that was measured, a column for each subject.
    pub fn table(&self) -> String {
        let mut subjects: Vec<&str> = Vec::new();
        for name in self.figures.values().filter_map(|figure| figure["results"].as_object()).flat_map(Map::keys) {
            if !subjects.contains(&name.as_str()) {
                subjects.push(name);
            }
        }
        let mut heading = vec![format!("{} (median, min–max)", self.part.name())];
        heading.extend(subjects.iter().map(|&name| name.to_owned()));
        heading.extend(["goal".to_owned(), "Firecracker 1.17".to_owned()]);
        let mut rows = vec![heading];
        for figure in figures::of(self.part) {
            if let Some(entry) = self.figures.get(figure.id) {
                rows.push(row(figure, &entry["results"], &subjects));
            }
        }
        render(&rows)
    }
}

fn read(path: &Path) -> Map<String, Value> {
    serde_json::from_str(&fs::read_to_string(path).unwrap_or_default()).unwrap_or_default()
}

fn misses(figure: &Figure, median: f64) -> bool {
    figure.goal.is_some_and(|goal| median > goal)
}

fn row(figure: &Figure, results: &Value, subjects: &[&str]) -> Vec<String> {
    let mut row = vec![figure.what.to_owned()];
    for &subject in subjects {
        let value = |key: &str| results[subject][key].as_f64();
        row.push(match (value("median"), value("min"), value("max")) {
            (Some(median), Some(min), Some(max)) => {
                let missed = if misses(figure, median) { " !" } else { "" };
                let spread = if min < max { format!(" {}–{}", short(min), short(max)) } else { String::new() };
                format!("{} {}{spread}{missed}", short(median), figure.unit.symbol())
            }
            _ => String::new(),
        });
    }
    row.push(figure.goal.map_or_else(String::new, |goal| format!("≤ {}", short(goal))));
    row.push(figure.firecracker.to_owned());
    row
}

/// Three digits.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Columns of equal width.
fn render(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<_> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_medians_and_marks_what_misses_its_goal() {
        let mut report = Report::load(Part::Native, None);
        let samples =
            |factor: f64| [0.0007, 0.0001, 0.0009].map(|value| vec![("api", value * factor), ("unknown", 1.0)]);
        report.add("a", &samples(1.0));
        report.add("b", &samples(2.0));
        let table = report.table();
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines.len(), 2, "{table}");
        assert_eq!((report.missed("a").len(), report.missed("b").len(), report.missed("c").len()), (0, 1, 0));
        assert!(lines[1].contains("0.70 ms 0.10–0.90 ") && lines[1].contains("1.40 ms 0.20–1.80 !"), "{table}");
    }

    #[test]
    fn a_file_collects_parts_figures_and_subjects() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("results.json");
        for part in [Part::Native, Part::Deterministic] {
            for subject in ["a", "b"] {
                let mut report = Report::load(part, Some(&file));
                report.add(subject, &[vec![("api-cpu", 0.001)], vec![("api-cpu", 0.003)]]);
                report.add(subject, &[vec![("pause", 0.5)]]);
                report.save(&file).unwrap();
            }
        }
        let all: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
        for part in ["native", "deterministic"] {
            for subject in ["a", "b"] {
                assert_eq!(all[part]["api-cpu"]["results"][subject]["median"], 2.0, "{all}");
            }
        }
        assert_eq!(Report::load(Part::Native, Some(&file)).table().lines().count(), 3);
    }
}

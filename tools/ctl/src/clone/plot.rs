//! Distributions, as text and as SVG.

use std::fmt::Write;

/// Measured times of one thing.
#[derive(Debug)]
pub struct Series {
    name: &'static str,
    /// Milliseconds, ascending.
    values: Vec<f64>,
}

/// Share of the values that is shown, and how it is called.
const PERCENTILES: [(f64, &str); 4] = [(0.5, "p50"), (0.9, "p90"), (0.99, "p99"), (1.0, "max")];
/// Characters of the longest bar.
const BAR: usize = 40;
const BINS: usize = 12;

impl Series {
    /// Of times in milliseconds.
    pub fn new(name: &'static str, mut values: Vec<f64>) -> Self {
        values.sort_unstable_by(f64::total_cmp);
        Self { name, values }
    }

    /// The value that a share of all, 0 to 1, does not exceed; 0 if there are none.
    pub fn percentile(&self, share: f64) -> f64 {
        let rank = (self.values.len() as f64 * share).ceil() as usize;
        self.values.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
    }

    fn max(&self) -> f64 {
        self.percentile(1.0)
    }
}

/// A table of percentiles, and a histogram of each.
pub fn text(all: &[Series]) -> String {
    let mut text = format!("{:28}", "milliseconds");
    for (_, name) in PERCENTILES {
        let _ = write!(text, "{name:>9}");
    }
    for series in all {
        let _ = write!(text, "\n{:28}", series.name);
        for (share, _) in PERCENTILES {
            let _ = write!(text, "{:9.2}", series.percentile(share));
        }
    }
    text.push('\n');
    for series in all {
        let _ = writeln!(text, "\n{}", series.name);
        text += &histogram(series);
    }
    text
}

fn histogram(series: &Series) -> String {
    let least = series.values.first().copied().unwrap_or(0.0);
    let width = ((series.max() - least) / BINS as f64).max(1e-3);
    let mut bins = [0; BINS];
    for value in &series.values {
        bins[(((value - least) / width) as usize).min(BINS - 1)] += 1;
    }
    let most = bins.iter().copied().max().unwrap_or(0).max(1);
    let mut text = String::new();
    for (bin, count) in bins.iter().enumerate() {
        let bar = "█".repeat((count * BAR).div_ceil(most));
        let _ =
            writeln!(text, "{:8.2} {bar}{} {count}", least + width * bin as f64, if *count == 0 { "·" } else { "" });
    }
    text
}

/// The share of the values that is at most so large, as curves.
pub fn svg(all: &[Series]) -> String {
    const WIDTH: f64 = 720.0;
    const HEIGHT: f64 = 360.0;
    const MARGIN: f64 = 50.0;
    const COLOURS: [&str; 3] = ["#1f6feb", "#d1242f", "#2da44e"];
    let max = all.iter().map(Series::max).fold(1e-3, f64::max) * 1.05;
    let place = |value: f64, share: f64| {
        (MARGIN + value / max * (WIDTH - 2.0 * MARGIN), HEIGHT - MARGIN - share * (HEIGHT - 2.0 * MARGIN))
    };
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for step in 0..=4 {
        let share = f64::from(step) / 4.0;
        let ((left, y), (right, _)) = (place(0.0, share), place(max, share));
        let _ = writeln!(text, "<path d=\"M{left:.1} {y:.1}H{right:.1}\" stroke=\"#ddd\"/>");
        let _ = writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}%</text>",
            left - 6.0,
            y + 4.0,
            step * 25
        );
        let (x, bottom) = place(max * share, 0.0);
        let _ = writeln!(
            text,
            "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{:.1}</text>",
            bottom + 18.0,
            max * share
        );
    }
    let _ = writeln!(
        text,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">milliseconds</text>",
        WIDTH / 2.0,
        HEIGHT - 12.0
    );
    for (index, (series, colour)) in all.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let (x, y) = place(0.0, 0.0);
        let mut path = format!("M{x:.1} {y:.1}");
        for (rank, value) in series.values.iter().enumerate() {
            let (x, y) = place(*value, (rank + 1) as f64 / series.values.len() as f64);
            let _ = write!(path, "H{x:.1}V{y:.1}");
        }
        let _ = writeln!(text, "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>");
        let y = MARGIN - 32.0 + 16.0 * index as f64;
        let _ = writeln!(text, "<text x=\"{MARGIN}\" y=\"{y:.1}\" fill=\"{colour}\">{}</text>", series.name);
    }
    text + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let series = Series::new("load", (1..=100).rev().map(f64::from).collect());
        let shown: Vec<_> = PERCENTILES.iter().map(|(share, _)| series.percentile(*share)).collect();
        assert_eq!(shown, [50.0, 90.0, 99.0, 100.0]);
        assert_eq!(Series::new("one", vec![7.0]).percentile(0.5), 7.0);
        assert_eq!(Series::new("none", Vec::new()).percentile(0.5), 0.0);
    }

    #[test]
    fn every_value_is_in_the_histogram() {
        let series = Series::new("load", vec![1.0, 1.1, 1.2, 5.0, 9.0]);
        let text = text(&[series]);
        let counts = text.lines().filter_map(|line| line.rsplit(' ').next()?.parse::<u32>().ok());
        assert_eq!(counts.sum::<u32>(), 5, "{text}");
        assert!(text.contains("p99") && text.contains("5.00"), "{text}");
    }

    #[test]
    fn the_drawing_has_a_curve_for_each_and_stays_inside() {
        let drawing =
            svg(&[Series::new("a", vec![1.0, 2.0]), Series::new("b", vec![3.0]), Series::new("c", Vec::new())]);
        assert_eq!(drawing.matches("stroke-width=\"2\"").count(), 3);
        assert!(drawing.starts_with("<svg") && drawing.ends_with("</svg>\n"));
        assert!(!drawing.contains("NaN") && !drawing.contains("inf"), "{drawing}");
    }
}

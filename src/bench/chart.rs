//! Charts as SVG, written by hand: a dozen rectangles need no plotting library.
#![forbid(unsafe_code)]

use std::fmt::{Display, Write as _};

/// What stands over a chart.
#[derive(Debug, Clone, Copy)]
pub struct Heading<'a> {
    /// What is shown.
    pub title: &'a str,
    /// The unit of its numbers; empty for counts.
    pub unit: &'a str,
    /// A line under the title: what a reader must know; may be empty.
    pub note: &'a str,
}

/// One bar.
#[derive(Debug, Clone, PartialEq)]
pub struct Bar {
    /// What it stands for.
    pub label: String,
    /// Its length, in the chart's unit.
    pub value: f64,
    /// The lower end of the spread.
    pub low: f64,
    /// The upper end of the spread.
    pub high: f64,
    /// Drawn in the colour of this project.
    pub ours: bool,
}

/// One bar of stages laid end to end.
#[derive(Debug, Clone, PartialEq)]
pub struct Stack {
    /// What it stands for.
    pub label: String,
    /// Name and length of each stage, in order.
    pub stages: Vec<(String, f64)>,
}

/// One line of a curve.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// What it stands for.
    pub label: String,
    /// Points from left to right.
    pub points: Vec<(f64, f64)>,
    /// Drawn in the colour of this project.
    pub ours: bool,
}

const WIDTH: f64 = 820.0;
const LEFT: f64 = 200.0;
const RIGHT: f64 = 90.0;
const ROW: f64 = 36.0;
const TOP: f64 = 62.0;
const OURS: &str = "#0b7285";
const OTHERS: [&str; 5] = ["#868e96", "#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c"];
/// Colours of stages, told apart in any order.
const STAGES: [&str; 8] = [
    "#0b7285", "#66d9e8", "#f08c00", "#ffd43b", "#5f3dc4", "#b197fc", "#2b8a3e", "#8ce99a",
];

/// An SVG that grows.
struct Drawing(String);

impl Drawing {
    fn new(heading: Heading<'_>, height: f64) -> Self {
        let title = match heading.unit {
            "" => heading.title.to_owned(),
            unit => format!("{} ({unit})", heading.title),
        };
        let mut drawing = Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
             height=\"{height}\" font-family=\"DejaVu Sans,Verdana,sans-serif\" font-size=\"13\" role=\"img\">\n\
             <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
             <text x=\"12\" y=\"26\" font-size=\"17\" font-weight=\"600\">{}</text>\n",
            escape(&title)
        ));
        drawing.text(12.0, 46.0, "start", "#868e96", heading.note);
        drawing
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, colour: &str, text: impl Display) {
        let text = escape(&text.to_string());
        // Writing to a string cannot fail.
        let _ = writeln!(
            self.0,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{text}</text>"
        );
    }

    fn rect(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), colour: &str) {
        let _ = writeln!(
            self.0,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
        );
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str) {
        let _ = writeln!(
            self.0,
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            from.0, from.1, to.0, to.1
        );
    }

    fn end(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

/// Horizontal bars from zero, each with its value and its spread.
pub fn bars(heading: Heading<'_>, bars: &[Bar]) -> String {
    let mut drawing = Drawing::new(heading, TOP + ROW * bars.len() as f64 + 12.0);
    let longest = largest(bars.iter().map(|bar| bar.high.max(bar.value)));
    let scale = |value: f64| (value / longest) * (WIDTH - LEFT - RIGHT);
    for (index, bar) in bars.iter().enumerate() {
        let y = TOP + ROW * index as f64;
        let middle = y + ROW / 2.0;
        let colour = if bar.ours { OURS } else { "#adb5bd" };
        let (low, high) = (LEFT + scale(bar.low), LEFT + scale(bar.high));
        drawing.text(LEFT - 10.0, middle + 5.0, "end", "#212529", &bar.label);
        drawing.rect((LEFT, y + 8.0), (scale(bar.value), 20.0), colour);
        drawing.line((low, middle), (high, middle), "#212529");
        for end in [low, high] {
            drawing.line((end, middle - 4.0), (end, middle + 4.0), "#212529");
        }
        let after = high.max(LEFT + scale(bar.value)) + 8.0;
        drawing.text(after, middle + 5.0, "start", "#212529", number(bar.value));
    }
    drawing.end()
}

/// Bars of stages, with a legend that names each stage once.
pub fn stacks(heading: Heading<'_>, stacks: &[Stack]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in stacks.iter().flat_map(|stack| &stack.stages) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let legend = names.len().div_ceil(4) as f64 * 22.0;
    let mut drawing = Drawing::new(heading, TOP + legend + ROW * stacks.len() as f64 + 12.0);
    let colour = |name: &str| {
        let index = names.iter().position(|known| *known == name).unwrap_or(0);
        STAGES[index % STAGES.len()]
    };
    for (index, name) in names.iter().enumerate() {
        let (x, y) = (
            12.0 + (index % 4) as f64 * 200.0,
            TOP + (index / 4) as f64 * 22.0,
        );
        drawing.rect((x, y), (12.0, 12.0), colour(name));
        drawing.text(x + 18.0, y + 11.0, "start", "#212529", name);
    }
    let total = |stack: &Stack| stack.stages.iter().map(|(_, length)| length).sum::<f64>();
    let longest = largest(stacks.iter().map(total));
    let scale = |value: f64| (value / longest) * (WIDTH - LEFT - RIGHT);
    for (index, stack) in stacks.iter().enumerate() {
        let y = TOP + legend + ROW * index as f64;
        drawing.text(LEFT - 10.0, y + 23.0, "end", "#212529", &stack.label);
        let mut x = LEFT;
        for (name, length) in &stack.stages {
            drawing.rect((x, y + 8.0), (scale(*length), 20.0), colour(name));
            x += scale(*length);
        }
        drawing.text(x + 8.0, y + 23.0, "start", "#212529", number(total(stack)));
    }
    drawing.end()
}

const PLOT_HEIGHT: f64 = 320.0;

/// Lines over a number of pods; both axes begin at zero.
pub fn curves(heading: Heading<'_>, lines: &[Line]) -> String {
    let bottom = TOP + PLOT_HEIGHT;
    let mut drawing = Drawing::new(heading, bottom + 48.0);
    let points = || lines.iter().flat_map(|line| &line.points);
    let (right, top) = (
        largest(points().map(|p| p.0)),
        largest(points().map(|p| p.1)),
    );
    let (left, width) = (70.0, WIDTH - 70.0 - LEFT);
    let place = |x: f64, y: f64| {
        (
            left + x / right * width,
            bottom - y / top * (PLOT_HEIGHT - 10.0),
        )
    };
    for quarter in 0..=4 {
        let share = f64::from(quarter) / 4.0;
        let (x, y) = place(right * share, top * share);
        drawing.line((left, y), (left + width, y), "#e9ecef");
        drawing.text(left - 8.0, y + 4.0, "end", "#495057", number(top * share));
        drawing.text(
            x,
            bottom + 20.0,
            "middle",
            "#495057",
            number((right * share).round()),
        );
    }
    drawing.text(
        left + width / 2.0,
        bottom + 40.0,
        "middle",
        "#495057",
        "pods",
    );
    let mut others = OTHERS.iter().cycle();
    for line in lines {
        let colour = if line.ours {
            OURS
        } else {
            others.next().unwrap_or(&OTHERS[0])
        };
        for pair in line.points.windows(2) {
            let (from, to) = (place(pair[0].0, pair[0].1), place(pair[1].0, pair[1].1));
            drawing.line(from, to, colour);
        }
        if let Some(last) = line.points.last() {
            let (x, y) = place(last.0, last.1);
            drawing.text(x + 6.0, y + 4.0, "start", colour, &line.label);
        }
    }
    drawing.end()
}

fn largest(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::MIN_POSITIVE, f64::max)
}

/// Three significant digits, no exponent.
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v == v.trunc() => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Text as it may stand in XML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADING: Heading<'_> = Heading {
        title: "t",
        unit: "ms",
        note: "a & b",
    };

    #[test]
    fn bars_are_as_long_as_their_values() {
        let bar = |value: f64| Bar {
            label: "a<b".to_owned(),
            value,
            low: value,
            high: value,
            ours: false,
        };
        let svg = bars(HEADING, &[bar(5.0), bar(10.0)]);
        assert!(
            svg.contains("width=\"265.0\"") && svg.contains("width=\"530.0\""),
            "{svg}"
        );
        assert!(svg.contains("a&lt;b") && !svg.contains("a<b"));
        assert!(svg.contains("t (ms)") && svg.contains("a &amp; b"));
    }

    #[test]
    fn stages_are_laid_end_to_end_and_named_once() {
        let stack = |label: &str, last: f64| Stack {
            label: label.to_owned(),
            stages: vec![("vmm".to_owned(), 2.0), ("kernel".to_owned(), last)],
        };
        let svg = stacks(HEADING, &[stack("a", 8.0), stack("b", 3.0)]);
        assert_eq!(svg.matches(">kernel<").count(), 1);
        // 530 wide for the longest: the second stage begins where the first ends.
        assert!(
            svg.contains("x=\"200.0\"") && svg.contains("width=\"106.0\""),
            "{svg}"
        );
        assert!(
            svg.contains("x=\"306.0\"") && svg.contains("width=\"424.0\""),
            "{svg}"
        );
        assert!(svg.contains(">10<") && svg.contains(">5<"));
    }

    #[test]
    fn curves_span_the_plot() {
        let line = Line {
            label: "ours".to_owned(),
            points: vec![(0.0, 0.0), (10.0, 200.0)],
            ours: true,
        };
        let svg = curves(HEADING, &[line]);
        assert!(
            svg.contains("x1=\"70.0\" y1=\"382.0\" x2=\"620.0\" y2=\"72.0\""),
            "{svg}"
        );
        assert!(svg.contains(">200<") && svg.contains(">ours<"));
    }

    #[test]
    fn numbers_have_three_digits() {
        let shown = [0.0, 0.126, 1.0, 12.34, 999.9].map(number);
        assert_eq!(shown, ["0", "0.13", "1", "12.3", "1000"]);
    }
}

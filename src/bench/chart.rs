//! Charts as SVG, written by hand: a dozen rectangles need no plotting library.
#![forbid(unsafe_code)]

use std::fmt::Write as _;

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

const WIDTH: f64 = 760.0;
const LEFT: f64 = 170.0;
const RIGHT: f64 = 90.0;
const ROW: f64 = 36.0;
const TOP: f64 = 48.0;

/// Horizontal bars from zero, each with its value and its spread.
pub fn bars(title: &str, unit: &str, bars: &[Bar]) -> String {
    let height = TOP + ROW * bars.len() as f64 + 12.0;
    let longest = bars
        .iter()
        .map(|bar| bar.high.max(bar.value))
        .fold(f64::MIN_POSITIVE, f64::max);
    let scale = |value: f64| (value / longest) * (WIDTH - LEFT - RIGHT);
    let heading = if unit.is_empty() {
        title.to_owned()
    } else {
        format!("{title} ({unit})")
    };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"system-ui,sans-serif\" font-size=\"14\" role=\"img\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"12\" y=\"26\" font-size=\"17\" font-weight=\"600\">{}</text>\n",
        escape(&heading)
    );
    for (index, bar) in bars.iter().enumerate() {
        let y = TOP + ROW * index as f64;
        let middle = y + ROW / 2.0;
        let colour = if bar.ours { "#0b7285" } else { "#adb5bd" };
        let (low, high) = (LEFT + scale(bar.low), LEFT + scale(bar.high));
        let _ = write!(
            svg,
            "<text x=\"{label}\" y=\"{text}\" text-anchor=\"end\">{name}</text>\n\
             <rect x=\"{LEFT}\" y=\"{top}\" width=\"{length:.1}\" height=\"20\" rx=\"2\" fill=\"{colour}\"/>\n\
             <line x1=\"{low:.1}\" x2=\"{high:.1}\" y1=\"{middle}\" y2=\"{middle}\" stroke=\"#212529\" \
             stroke-width=\"2\"/>\n\
             <text x=\"{after:.1}\" y=\"{text}\">{value}</text>\n",
            label = LEFT - 10.0,
            text = middle + 5.0,
            name = escape(&bar.label),
            top = y + 8.0,
            length = scale(bar.value),
            after = high.max(LEFT + scale(bar.value)) + 8.0,
            value = format_args!("{:.*}", usize::from(bar.value < 100.0) * 2, bar.value),
        );
    }
    svg.push_str("</svg>\n");
    svg
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

    #[test]
    fn bars_are_as_long_as_their_values() {
        let bar = |value: f64| Bar {
            label: "a<b".to_owned(),
            value,
            low: value,
            high: value,
            ours: false,
        };
        let svg = bars("t", "ms", &[bar(5.0), bar(10.0)]);
        assert!(
            svg.contains("width=\"250.0\"") && svg.contains("width=\"500.0\""),
            "{svg}"
        );
        assert!(svg.contains("a&lt;b") && !svg.contains("a<b"));
    }
}

//! A decode step of both sides as a picture: a lane for the GPU and one for the CPU workers, cut into rows as a text is
//! into lines, hand-overs between them, and figures below. One self-contained SVG, or a page around it. Deterministic;
//! draws whatever it is given.

use crate::engine::{Activity, Span, StepTrace};
use std::fmt::Write;
use std::path::Path;

/// How the picture is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The picture alone.
    Svg,
    /// A page around it.
    Html,
}

impl Format {
    /// The one that the extension of `path` names.
    ///
    /// # Errors
    /// Another extension.
    pub fn of(path: &Path) -> Result<Self, String> {
        match path.extension().and_then(|e| e.to_str()) {
            Some("svg") => Ok(Format::Svg),
            Some("html") => Ok(Format::Html),
            _ => Err(format!("{}: a trace is written as .svg or .html", path.display())),
        }
    }
}

/// Pixels: the picture, the lanes' names at its left, a lane, and from a row to the next.
const WIDTH: f64 = 1360.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 88.0;
const LANE: f64 = 26.0;
const LANE_GAP: f64 = 14.0;
const ROW: f64 = 2.0 * LANE + LANE_GAP + 38.0;
/// Hand-overs of a row.
const PER_ROW: usize = 8;
/// Width of a letter, pixels.
const LETTER: f64 = 6.1;

const STYLE: &str = "text{font:11px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#1d2530}\
.title{font-size:17px;font-weight:600}.note{fill:#4a5563}.axis{fill:#8b95a1;font-size:10px}.lane{font-weight:600}\
.value{font-size:15px;font-weight:600}.in{fill:#fff;pointer-events:none}";

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Colour of what a span shows: the same as in the page of a plan.
fn colour(span: &Span) -> &'static str {
    match span.what {
        Activity::Wait => "#e8ebef",
        Activity::HandOver => "#d14b5a",
        Activity::Ahead => "#e3b58f",
        _ if span.name.contains("ffn") || span.name.contains("moe") => "#c96f2e",
        _ if span.name.contains("delta_net") => "#2f6fb0",
        _ if span.name.contains("attn") => "#5aa0d8",
        _ => "#6b8f3a",
    }
}

/// A time in words: microseconds below a millisecond.
fn time(us: f64) -> String {
    if us < 1000.0 { format!("{us:.1} µs") } else { format!("{:.2} ms", us / 1000.0) }
}

/// From a mark of a time line to the next: 1, 2 or 5 times a power of ten, at least `least`.
fn tick(least: f64) -> f64 {
    let power = 10f64.powf(least.max(1e-3).log10().floor());
    [1.0, 2.0, 5.0, 10.0].map(|n| n * power).into_iter().find(|t| *t >= least).unwrap_or(10.0 * power)
}

/// Figures of a step, in the order in which they are shown: what, and how much.
pub fn figures(trace: &StepTrace) -> Vec<(&'static str, String)> {
    let (gpu, cpu) = (trace.gpu_busy(), trace.cpu_busy());
    let handoff = if trace.handoffs.is_empty() { 0.0 } else { super::bench::median(&trace.handoffs) };
    let (longer, path) = (trace.longer_part(), trace.longest_path(handoff));
    let busy = |us: f64| format!("{} ({:.0} %)", time(us), 100.0 * us / trace.step);
    vec![
        ("step", time(trace.step)),
        ("GPU computes", busy(gpu)),
        ("CPU computes", busy(cpu - trace.ahead())),
        ("reads ahead", busy(trace.ahead())),
        ("hand-offs", format!("{} × {}", trace.handoffs.len(), time(handoff))),
        ("max(GPU, CPU) + hand-offs", time(longer)),
        ("step / that", format!("{:.2}", trace.step / longer)),
        ("the same block by block", time(path)),
        ("step / that", format!("{:.2}", trace.step / path)),
    ]
}

/// The picture of `trace` under `title`; `notes` are lines of small print below it.
pub fn svg(trace: &StepTrace, title: &str, notes: &[String]) -> String {
    let shares = || trace.cpu.iter().filter(|s| s.what == Activity::Share);
    let n_rows = shares().count().div_ceil(PER_ROW).max(1);
    let (row_us, scale) = (trace.step / n_rows as f64, (WIDTH - LEFT - RIGHT) * n_rows as f64 / trace.step);
    let row_top = |row: usize| TOP + row as f64 * ROW;
    let below = row_top(n_rows) + 6.0;
    let height = below + 62.0 + 16.0 * notes.len() as f64;
    let mut out = String::new();
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height:.0}\" viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\">\
<style>{STYLE}</style><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\
<text class=\"title\" x=\"{LEFT}\" y=\"30\">{}</text>",
        escape(title)
    );
    let legend = [
        ("#2f6fb0", "delta net"),
        ("#5aa0d8", "attention"),
        ("#c96f2e", "feed-forward, experts"),
        ("#e3b58f", "reads their weights ahead"),
        ("#6b8f3a", "embedding, head"),
        ("#d14b5a", "hand-over"),
        ("#e8ebef", "waits"),
    ];
    let mut x = LEFT;
    for (colour, words) in legend {
        let _ = write!(
            out,
            "<rect x=\"{x:.0}\" y=\"46\" width=\"11\" height=\"11\" rx=\"2\" fill=\"{colour}\"/><text class=\"note\" x=\"{:.0}\" y=\"56\">{words}</text>",
            x + 16.0
        );
        x += 38.0 + LETTER * words.len() as f64;
    }
    for row in 0..n_rows {
        let (top, from) = (row_top(row), row as f64 * row_us);
        let to = from + row_us;
        let at = |us: f64| LEFT + (us.clamp(from, to) - from) * scale;
        let (gpu_y, cpu_y) = (top, top + LANE + LANE_GAP);
        let (axis_y, step) = (cpu_y + LANE + 14.0, tick(row_us / 12.0));
        let mut k = (from / step).ceil();
        while k * step <= to {
            let (x, label) = (at(k * step), format!("{:.2}", k * step / 1000.0));
            let _ = write!(
                out,
                "<path d=\"M{x:.1} {top:.1}V{:.1}\" stroke=\"#eef0f3\"/><text class=\"axis\" x=\"{x:.1}\" y=\"{axis_y:.1}\" text-anchor=\"middle\">{label}</text>",
                cpu_y + LANE + 3.0
            );
            k += 1.0;
        }
        for (name, y, spans) in [("GPU", gpu_y, &trace.gpu), ("CPU", cpu_y, &trace.cpu)] {
            let _ = write!(
                out,
                "<text class=\"lane\" x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>",
                LEFT - 8.0,
                y + LANE / 2.0 + 4.0
            );
            for span in spans.iter().filter(|s| s.end > from && s.start < to) {
                let (x, width) = (at(span.start), at(span.end) - at(span.start));
                let (name, duration) = (escape(&span.name), time(span.end - span.start));
                let _ = write!(
                    out,
                    "<rect x=\"{x:.2}\" y=\"{y:.1}\" width=\"{:.2}\" height=\"{LANE}\" fill=\"{}\"><title>{name}: {duration}</title></rect>",
                    width.max(0.3),
                    colour(span)
                );
                // The last part of a name says most: `ffn` of `blk.3.ffn`.
                let short = span.name.rsplit('.').next().unwrap_or_default();
                let fits = |text: &&&str| width > LETTER * text.len() as f64 + 2.0;
                if let Some(text) = [span.name.as_str(), short].iter().find(fits)
                    && matches!(span.what, Activity::Alone | Activity::Share)
                {
                    let _ = write!(
                        out,
                        "<text class=\"in\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                        x + width / 2.0,
                        y + LANE / 2.0 + 4.0,
                        escape(text)
                    );
                }
            }
        }
        // Down where the workers get their input, up where their answer is there.
        for span in shares() {
            for (us, y, tip) in [(span.start, cpu_y, -5.0), (span.end, gpu_y + LANE, 5.0)] {
                if (from..to).contains(&us) {
                    let x = at(us);
                    let start = if tip < 0.0 { gpu_y + LANE } else { cpu_y };
                    let _ = write!(
                        out,
                        "<path d=\"M{x:.2} {start:.1}V{y:.1}M{:.2} {:.1}L{x:.2} {y:.1}L{:.2} {:.1}\" fill=\"none\" stroke=\"#d14b5a\"/>",
                        x - 3.0,
                        y + tip,
                        x + 3.0,
                        y + tip
                    );
                }
            }
        }
    }
    let mut x = LEFT;
    for (what, value) in figures(trace) {
        let _ = write!(
            out,
            "<text class=\"note\" x=\"{x:.1}\" y=\"{:.1}\">{what}</text><text class=\"value\" x=\"{x:.1}\" y=\"{:.1}\">{value}</text>",
            below + 10.0,
            below + 30.0
        );
        x += 30.0 + (LETTER * what.len() as f64).max(1.4 * LETTER * value.chars().count() as f64);
    }
    for (i, note) in notes.iter().enumerate() {
        let y = below + 56.0 + 16.0 * i as f64;
        let _ = write!(out, "<text class=\"note\" x=\"{LEFT}\" y=\"{y:.1}\">{}</text>", escape(note));
    }
    out.push_str("</svg>\n");
    out
}

/// A page around [`svg`].
pub fn html(trace: &StepTrace, title: &str, notes: &[String]) -> String {
    format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\"><title>{}</title>\
<style>body{{margin:1rem}}svg{{max-width:100%;height:auto}}</style>{}</html>\n",
        escape(title),
        svg(trace, title, notes)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace() -> StepTrace {
        let (mut gpu, mut cpu) = (Vec::new(), Vec::new());
        let span = |name: &str, what, start, end| Span { name: name.into(), what, start, end };
        for i in 0..20 {
            let at = 100.0 * f64::from(i);
            gpu.push(span(&format!("blk.{i}.attn"), Activity::Alone, at, at + 30.0));
            gpu.push(span("to the CPU", Activity::HandOver, at + 30.0, at + 32.0));
            gpu.push(span("blk.<i>.ffn & \"more\"", Activity::Share, at + 32.0, at + 60.0));
            gpu.push(span("waits for the CPU", Activity::Wait, at + 60.0, at + 97.0));
            gpu.push(span("from the CPU", Activity::HandOver, at + 97.0, at + 100.0));
            cpu.push(span(&format!("blk.{i}.ffn"), Activity::Share, at + 35.0, at + 95.0));
        }
        StepTrace { gpu, cpu, step: 2000.0, handoffs: vec![10.0; 20], clock_error: 1.5 }
    }

    /// The same picture twice, well-formed: every name is escaped, every element closed, and no number is one that a
    /// picture cannot have.
    #[test]
    fn pictures_are_well_formed_and_deterministic() {
        let picture = svg(&trace(), "a <model> & \"more\"", &["5 < 6".into()]);
        assert_eq!(picture, svg(&trace(), "a <model> & \"more\"", &["5 < 6".into()]));
        let mut open = Vec::new();
        for tag in picture.split('<').skip(1) {
            let (tag, text) = tag.split_once('>').expect("a tag ends");
            assert!(!text.contains('&') || text.contains(';'), "{text}");
            let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap();
            assert!(["svg", "style", "rect", "text", "title", "path"].contains(&name), "<{tag}>");
            match (tag.starts_with('/'), tag.ends_with('/')) {
                (true, _) => assert_eq!(open.pop(), Some(name)),
                (false, false) => open.push(name),
                (false, true) => {}
            }
            assert_eq!(tag.matches('"').count() % 2, 0, "<{tag}>");
        }
        assert!(open.is_empty() && !picture.contains("NaN") && !picture.contains("inf"));
        assert!(picture.contains("a &lt;model&gt; &amp; &quot;more&quot;") && picture.contains("5 &lt; 6"));
        assert!(picture.contains("blk.&lt;i&gt;.ffn &amp; &quot;more&quot;"));
        assert!(html(&trace(), "t", &[]).contains("<svg"));
    }

    /// 20 hand-overs make three rows; the figures are those of the step.
    #[test]
    fn figures_are_those_of_the_step() {
        let figures = figures(&trace());
        let value = |i: usize| figures[i].1.as_str();
        assert_eq!((value(0), value(1), value(2)), ("2.00 ms", "1.16 ms (58 %)", "1.20 ms (60 %)"));
        assert_eq!((value(3), value(4), value(5), value(6)), ("0.0 µs (0 %)", "20 × 10.0 µs", "1.40 ms", "1.43"));
        assert_eq!(svg(&trace(), "", &[]).matches(">GPU<").count(), 3);
    }

    #[test]
    fn the_extension_names_the_format() {
        assert_eq!(Format::of(Path::new("a/b.svg")), Ok(Format::Svg));
        assert_eq!(Format::of(Path::new("b.html")), Ok(Format::Html));
        assert!(Format::of(Path::new("b.png")).unwrap_err().contains(".svg"));
    }
}

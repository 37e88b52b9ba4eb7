//! Text while it is generated: bytes of tokens to complete UTF-8, stop strings that may span tokens, and the
//! reasoning part apart from the answer. What comes out doesn't depend on how the bytes were cut.

/// Collects the bytes of tokens and gives out text: only whole characters, and nothing that is or could still
/// become part of a stop string.
#[derive(Clone, Debug, Default)]
pub struct TextStream {
    stops: Vec<String>,
    bytes: Vec<u8>, // of a character that is not complete
    held: String,   // complete, but it could be the beginning of a stop string
    stopped: bool,
}

impl TextStream {
    /// A stream that ends at the first of these strings. Empty ones are ignored.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), ..Self::default() }
    }

    /// Takes the bytes of one token and appends the text that is certain to `out`. Bytes that are no UTF-8
    /// become U+FFFD. Returns whether a stop string ended the text; further bytes are ignored then.
    pub fn push(&mut self, bytes: &[u8], out: &mut String) -> bool {
        if self.stopped {
            return true;
        }
        self.bytes.extend_from_slice(bytes);
        let mut used = 0;
        for chunk in self.bytes.utf8_chunks() {
            self.held.push_str(chunk.valid());
            used += chunk.valid().len();
            let invalid = chunk.invalid();
            let open = used + invalid.len() == self.bytes.len() && is_incomplete(invalid);
            if !invalid.is_empty() && !open {
                self.held.push(char::REPLACEMENT_CHARACTER);
                used += invalid.len();
            }
        }
        self.bytes.drain(..used);
        self.release(out);
        self.stopped
    }

    /// The generation is over: appends what was held back. Bytes of an incomplete character become U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if !std::mem::take(&mut self.bytes).is_empty() && !self.stopped {
            self.held.push(char::REPLACEMENT_CHARACTER);
            self.release(out);
        }
        out.push_str(&std::mem::take(&mut self.held));
    }

    /// Gives out everything before a stop string, or before what could become one.
    fn release(&mut self, out: &mut String) {
        // The match that is complete first wins: how the text was cut can't change which one that is.
        let matches = self.stops.iter().filter_map(|stop| self.held.find(stop).map(|at| (at + stop.len(), at)));
        if let Some((_, at)) = matches.min() {
            out.push_str(&self.held[..at]);
            self.held.clear();
            self.bytes.clear();
            self.stopped = true;
            return;
        }
        let kept = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        out.push_str(&self.held[..self.held.len() - kept]);
        self.held.drain(..self.held.len() - kept);
    }
}

/// Whether `bytes`, which are no UTF-8, could become a character with more bytes.
fn is_incomplete(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

/// Bytes of the longest end of `text` that is a beginning of `stop`, but not all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest).rev().find(|&n| text.as_bytes().ends_with(&stop.as_bytes()[..n])).unwrap_or(0)
}

/// A part of what a model says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Between `<think>` and `</think>`.
    Reasoning,
    /// What is meant to be read.
    Answer,
}

/// Tells the reasoning of a model from its answer. The tags themselves are left out.
#[derive(Clone, Debug)]
pub struct ReasoningSplitter {
    state: State,
    held: String, // could be the beginning of a tag
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Only white space so far: reasoning may follow.
    Beginning,
    Reasoning,
    Answer,
}

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

impl ReasoningSplitter {
    /// For the text that follows `prompt`: a chat template may have opened the reasoning already.
    pub fn new(prompt: &str) -> Self {
        let opened = prompt.trim_end().ends_with(OPEN);
        Self { state: if opened { State::Reasoning } else { State::Beginning }, held: String::new() }
    }

    /// Calls `part` with pieces of `text` as they become certain, in order.
    pub fn push(&mut self, text: &str, part: &mut dyn FnMut(Part, &str)) {
        self.held.push_str(text);
        if self.state == State::Beginning {
            let begun = self.held.trim_start();
            if let Some(rest) = begun.strip_prefix(OPEN) {
                self.held = rest.to_owned();
                self.state = State::Reasoning;
            } else if !OPEN.starts_with(begun) {
                self.state = State::Answer;
            }
        }
        if self.state == State::Reasoning {
            match self.held.find(CLOSE) {
                Some(at) => {
                    give(Part::Reasoning, &self.held[..at], part);
                    self.held.drain(..at + CLOSE.len());
                    self.state = State::Answer;
                }
                None => {
                    let certain = self.held.len() - overlap(&self.held, CLOSE);
                    give(Part::Reasoning, &self.held[..certain], part);
                    self.held.drain(..certain);
                }
            }
        }
        if self.state == State::Answer {
            give(Part::Answer, &self.held, part);
            self.held.clear();
        }
    }

    /// The generation is over: calls `part` with what was held back.
    pub fn finish(&mut self, part: &mut dyn FnMut(Part, &str)) {
        let kind = if self.state == State::Reasoning { Part::Reasoning } else { Part::Answer };
        give(kind, &std::mem::take(&mut self.held), part);
    }
}

fn give(kind: Part, text: &str, part: &mut dyn FnMut(Part, &str)) {
    if !text.is_empty() {
        part(kind, text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The stream's text and whether it stopped, with the bytes cut after every `step` bytes.
    fn run(stops: &[&str], bytes: &[u8], step: usize) -> (String, bool) {
        let mut stream = TextStream::new(stops.iter().map(ToString::to_string).collect());
        let mut out = String::new();
        let mut stopped = false;
        for chunk in bytes.chunks(step) {
            let before = out.len();
            stopped = stream.push(chunk, &mut out);
            assert!(out.is_char_boundary(before));
        }
        stream.finish(&mut out);
        (out, stopped)
    }

    #[test]
    fn text_is_whole_however_it_is_cut() {
        let text = "Zwölf Äpfel, 日本語 and 🦉\u{200d}🦊 \u{fffd} end";
        for step in 1..=text.len() {
            assert_eq!(run(&[], text.as_bytes(), step), (text.to_owned(), false));
        }
    }

    #[test]
    fn bytes_that_are_no_utf8_are_replaced() {
        let cases: [(&[u8], &str); 5] = [
            (b"a\xFFb", "a\u{fffd}b"),
            (b"a\xE6\x97", "a\u{fffd}"),
            (b"\xE6\x97x", "\u{fffd}x"),
            (b"\xF0\x9F\xA6\xC3\xB6", "\u{fffd}\u{f6}"),
            (b"\x80\x80", "\u{fffd}\u{fffd}"),
        ];
        for (bytes, expected) in cases {
            for step in 1..=bytes.len() {
                assert_eq!(run(&[], bytes, step).0, expected, "{bytes:?} by {step}");
            }
        }
    }

    #[test]
    fn stops_hide_themselves_and_what_follows() {
        let cases: [(&[&str], &str, &str, bool); 8] = [
            (&["END"], "one END two", "one ", true),
            (&["END"], "one EN two", "one EN two", false),
            (&["END"], "one EN", "one EN", false),
            (&["aab"], "aaab", "a", true),
            (&["abcd", "bc"], "xabcd", "xa", true),
            (&["\n\n"], "a\nb\n\nc", "a\nb", true),
            (&["日本"], "日日本語", "日", true),
            (&["", "x"], "ab", "ab", false),
        ];
        for (stops, text, expected, stopped) in cases {
            for step in 1..=text.len() {
                assert_eq!(
                    run(stops, text.as_bytes(), step),
                    (expected.to_owned(), stopped),
                    "{stops:?} in {text:?} by {step}"
                );
            }
        }
    }

    #[test]
    fn text_before_a_stop_is_not_held_back() {
        let mut stream = TextStream::new(vec!["STOP".into()]);
        let mut out = String::new();
        assert!(!stream.push(b"one S", &mut out));
        assert_eq!(out, "one ");
        assert!(!stream.push(b"even", &mut out));
        assert_eq!(out, "one Seven");
    }

    #[test]
    fn reasoning_is_told_from_the_answer() {
        let cases = [
            ("<|im_start|>assistant\n", "<think>\nhm</think>\n\nYes", "\nhm", "\n\nYes"),
            ("<|im_start|>assistant\n<think>\n", "hm </thin</think>Yes", "hm </thin", "Yes"),
            ("<|im_start|>assistant\n", "Plain <think>x</think>", "", "Plain <think>x</think>"),
            ("<|im_start|>assistant\n", "  <thin", "", "  <thin"),
            ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "Yes", "", "Yes"),
            ("", "<think>never closed </", "never closed </", ""),
        ];
        for (prompt, text, reasoning, answer) in cases {
            for step in 1..=text.len() {
                let mut splitter = ReasoningSplitter::new(prompt);
                let mut found = [String::new(), String::new()];
                let mut part = |kind: Part, text: &str| found[(kind == Part::Answer) as usize].push_str(text);
                for chunk in text.as_bytes().chunks(step) {
                    splitter.push(std::str::from_utf8(chunk).unwrap(), &mut part);
                }
                splitter.finish(&mut part);
                assert_eq!(found, [reasoning, answer], "{text:?} by {step}");
            }
        }
    }
}

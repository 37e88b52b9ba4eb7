//! Split patterns of byte-level BPE, by their name in `tokenizer.ggml.pre`: how text is cut into words
//! before merging. The patterns are facts of the tokenizers that files were converted from.
//!
//! All patterns run on the `regex` crate, in time linear in the text. It has no look-ahead, and the only
//! one that the patterns need is `\s+(?!\S)` (a run of spaces leaves its last one to the word that
//! follows). [`Tail`] says where that rule holds, and [`PreTokenizer::split`] applies it to the match.

use regex::Regex;

/// What happens to a run of white space in front of a word: the part `\s+(?!\S)|\s+` of a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tail {
    /// The pattern has no such part.
    None,
    /// A run leaves its last character to the next word.
    Spaces,
    /// The same, but runs with a line end are matched before, by `\s*[\r\n]+`.
    SpacesAfterLines,
}

/// One pattern applied to every piece that the one before left; what it doesn't match stays as a piece.
struct Step {
    pattern: &'static str,
    tail: Tail,
}

const fn step(pattern: &'static str) -> Step {
    Step { pattern, tail: Tail::None }
}
const fn spaces(pattern: &'static str) -> Step {
    Step { pattern, tail: Tail::Spaces }
}
const fn lines(pattern: &'static str) -> Step {
    Step { pattern, tail: Tail::SpacesAfterLines }
}

/// A row of the table of split patterns.
struct Family {
    names: &'static [&'static str],
    steps: &'static [Step],
    /// A whole word that is a token is taken without merging.
    whole_words: bool,
    /// BOS is put in front when the file doesn't say.
    add_bos: bool,
}

impl Family {
    const fn new(names: &'static [&'static str], steps: &'static [Step]) -> Self {
        Self { names, steps, whole_words: false, add_bos: false }
    }
    const fn whole_words_and_bos(self) -> Self {
        Self { whole_words: true, add_bos: true, ..self }
    }
}

macro_rules! contraction {
    () => {
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    };
}
// `$digits` is the alternative for numbers.
macro_rules! qwen2_like {
    ($digits:literal) => {
        concat!(contraction!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|", $digits, r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    };
}
// Words split where capitals begin; `$suffix` follows a word, `$digits` is the alternative for numbers.
macro_rules! cased_words {
    ($suffix:expr, $digits:literal) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            $suffix,
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            $suffix,
            "|",
            $digits,
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
        )
    };
}

const GPT2: Step = spaces(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+");
const QWEN2: Step = lines(qwen2_like!(r"\p{N}"));
const LLAMA3: Step = lines(qwen2_like!(r"\p{N}{1,3}"));
const PUNCTUATION: &str = r"[\p{P}\$\+<=>\^~\|]+";
const CJK: &str = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+";
const BLOOM: Step = step(r" ?[^(\s|.,!?…。，、।۔،)]+");

/// Every pattern that files of the supported architectures name.
const FAMILIES: &[Family] = &[
    Family::new(
        &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"],
        &[QWEN2],
    ),
    Family::new(
        &["qwen35"],
        &[lines(concat!(
            contraction!(),
            r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
        ))],
    ),
    Family::new(&["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"], &[LLAMA3])
        .whole_words_and_bos(),
    Family::new(&["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], &[LLAMA3]),
    Family::new(
        &["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "a.x-4.0", "mellum", "exaone4"],
        &[GPT2],
    ),
    Family::new(
        &["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[step(r"\p{N}"), GPT2],
    ),
    Family::new(&["falcon"], &[step(r"[\p{P}\$\+<=>\^~\|`]+"), GPT2, step("[0-9][0-9][0-9]")]),
    Family::new(&["default"], &[step(PUNCTUATION), GPT2, step(r"\p{N}+"), step("[0-9][0-9][0-9]")]),
    Family::new(
        &["deepseek-llm"],
        &[
            step(r"[\r\n]"),
            step(concat!(
                r"\s?[",
                r"\x{41}-\x{5A}\x{61}-\x{7A}\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}",
                r"\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}",
                r"\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}",
                r"\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}",
                r"\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}",
                r"\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}",
                r"\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}",
                r"\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}",
                r"\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}",
                r"\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}",
                r"\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}",
                r"\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}",
                r"\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}",
                r"\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}",
                r"\x{1E900}-\x{1E943}",
                "]+",
            )),
            step(r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+"),
            step(r"\s+$"),
            step(CJK),
            step(r"\p{N}+"),
        ],
    ),
    Family::new(
        &["deepseek-coder"],
        &[step(r"[\r\n]"), step(r"\s?\p{L}+"), step(r"\s?\p{P}+"), step(CJK), step(r"\p{N}")],
    ),
    Family::new(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        &[
            step(r"\p{N}{1,3}"),
            step(r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"),
            lines(concat!(
                r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
                r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+"
            )),
        ],
    ),
    Family::new(
        &["gpt-4o", "llama4", "kanana2", "minimax-m2"],
        &[lines(cased_words!("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}"))],
    ),
    Family::new(&["tekken"], &[lines(cased_words!("", r"\p{N}"))]).whole_words_and_bos(),
    Family::new(
        &["bailingmoe", "bailingmoe2", "llada-moe"],
        &[lines(concat!(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+"
        ))],
    ),
    Family::new(
        &["seed-coder"],
        &[lines(concat!(contraction!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+"))],
    ),
    Family::new(&["poro-chat", "bloom", "gpt3-finnish"], &[BLOOM]),
    Family::new(&["viking"], &[BLOOM, step(r"\p{N}")]),
];

/// A split pattern, ready to cut text.
#[derive(Debug)]
pub struct PreTokenizer {
    steps: Vec<(Regex, Tail)>,
    /// A whole word that is a token is taken without merging.
    pub whole_words: bool,
    /// BOS is put in front when the file doesn't say.
    pub add_bos: bool,
}

impl PreTokenizer {
    /// The split pattern called `name`, or `None`; [`PreTokenizer::names`] has the known ones.
    pub fn new(name: &str) -> Option<Self> {
        let family = FAMILIES.iter().find(|family| family.names.contains(&name))?;
        let compile = |step: &Step| (Regex::new(step.pattern).expect("a pattern of the table compiles"), step.tail);
        Some(Self {
            steps: family.steps.iter().map(compile).collect(),
            whole_words: family.whole_words,
            add_bos: family.add_bos,
        })
    }

    /// Every known name.
    pub fn names() -> impl Iterator<Item = &'static str> {
        FAMILIES.iter().flat_map(|family| family.names).copied()
    }

    /// Calls `word` for every word of `text`, in order. The words are the whole text, none is empty.
    pub fn split<'t>(&self, text: &'t str, word: &mut dyn FnMut(&'t str)) {
        split(&self.steps, text, word);
    }
}

fn split<'t>(steps: &[(Regex, Tail)], text: &'t str, word: &mut dyn FnMut(&'t str)) {
    if text.is_empty() {
        return;
    }
    let Some(((regex, tail), rest)) = steps.split_first() else { return word(text) };
    let mut at = 0;
    while let Some(found) = regex.find_at(text, at) {
        let end = found.start() + kept(found.as_str(), *tail, found.end() == text.len());
        split(rest, &text[at..found.start()], word);
        split(rest, &text[found.start()..end], word);
        at = end;
    }
    split(rest, &text[at..], word);
}

/// Bytes of a match that belong to its word: all, or for a run of white space in front of something
/// all but its last character (`\s+(?!\S)`, which needs a run of at least two).
fn kept(found: &str, tail: Tail, at_end: bool) -> usize {
    let last = found.chars().next_back().filter(|c| c.is_whitespace());
    let Some(last) = last.filter(|_| tail != Tail::None && !at_end) else { return found.len() };
    let by_lines = tail == Tail::SpacesAfterLines && matches!(last, '\r' | '\n');
    if by_lines || found.len() == last.len_utf8() || !found.chars().all(char::is_whitespace) {
        return found.len();
    }
    found.len() - last.len_utf8()
}

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
const CJK: &str = "[一-龥ࠀ-一가-퟿]+";
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
            step(
                r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
            ),
            step(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
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
            step("[一-龥぀-ゟ゠-ヿ]+"),
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

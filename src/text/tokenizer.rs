//! The tokenizer: text to token ids and back, made from the vocabulary that a file carries.
//!
//! Text is cut at special tokens first, the rest goes to one of two models. `gpt2` files: split pattern,
//! bytes to printable characters, and merging by the `tokenizers` crate. `llama` files: merging by score,
//! done here, because that crate merges by rank only and equal scores have to be taken from the left.
//! Text is not normalised. Vocabularies that could not encode every text are refused when they are read.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use aho_corasick::{AhoCorasick, AhoCorasickKind, MatchKind};
use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Vocab};

use super::pre_tokenizer::PreTokenizer;
use super::vocabulary::{Problem, TokenType, Vocabulary, same_length};
use crate::gguf::{self, quoted};

/// Bytes of all special tokens together: a bound on the automata that find them, far above any model's.
const SPECIAL_BYTES_MAX: usize = 4 << 20;
/// What stands for a space in `llama` vocabularies.
const SPACE: char = '\u{2581}';

/// Tokens after which a model has nothing more to say, by their text.
const ENDS: &[&str] = &[
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "</s>",
    "<end_of_turn>",
    "<EOT>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
];

/// Text to token ids and back. Immutable; encoding and decoding never fail.
#[derive(Debug)]
pub struct Tokenizer {
    model: Algorithm,
    types: Vec<TokenType>, // [n_vocab]
    text: Vec<u8>,         // bytes of every token, one after the other
    ends: Vec<usize>,      // [n_vocab] where each token's bytes end in `text`
    user_defined: Option<Specials>,
    all_specials: Option<Specials>,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    add_eos: bool,
    end_of_generation: Vec<u32>,
}

#[derive(Debug)]
enum Algorithm {
    BytePairs { pre: PreTokenizer, merges: Box<BPE> },
    Scores(Scores),
}

/// Finds special tokens in text, leftmost first and of those the longest.
#[derive(Debug)]
struct Specials {
    finder: AhoCorasick,
    ids: Vec<u32>, // by pattern of `finder`
}

impl Tokenizer {
    /// Checks `vocabulary` and prepares it.
    ///
    /// # Errors
    /// Names the key, what it should hold and what it holds: an unknown `model` or `pre`, no tokens, lists
    /// of different lengths, unknown token types, ids outside the vocabulary, malformed byte tokens, merges
    /// that are no pair of tokens or don't give a token, scores that are not numbers, and vocabularies
    /// without a token for some byte.
    pub fn new(mut vocabulary: Vocabulary) -> Result<Self, gguf::Error> {
        let file = std::mem::take(&mut vocabulary.file);
        Self::build(vocabulary).map_err(|problem| problem.of(&file))
    }

    fn build(mut vocabulary: Vocabulary) -> Result<Self, Problem> {
        const TOKENS: &str = "tokenizer.ggml.tokens";
        if vocabulary.tokens.is_empty() {
            return Err(Problem::new(TOKENS, "a list of tokens", "none"));
        }
        if u32::try_from(vocabulary.tokens.len()).is_err() {
            return Err(Problem::new(TOKENS, "less than 2^32 tokens", format!("{}", vocabulary.tokens.len())));
        }
        let types = vocabulary.types()?;
        let score_based = match vocabulary.model.as_str() {
            "gpt2" => false,
            "llama" => true,
            other => {
                return Err(Problem::new(
                    "tokenizer.ggml.model",
                    "gpt2 (byte-level BPE) or llama (SentencePiece style)",
                    format!("{other:?}"),
                ));
            }
        };
        if score_based {
            // What such files leave out means these.
            vocabulary.unknown = vocabulary.unknown.or(Some(0));
            vocabulary.bos = vocabulary.bos.or(Some(1));
            vocabulary.eos = vocabulary.eos.or(Some(2));
        }
        for (key, id) in [
            ("tokenizer.ggml.bos_token_id", vocabulary.bos),
            ("tokenizer.ggml.eos_token_id", vocabulary.eos),
            ("tokenizer.ggml.eot_token_id", vocabulary.eot),
            ("tokenizer.ggml.eom_token_id", vocabulary.eom),
            ("tokenizer.ggml.unknown_token_id", vocabulary.unknown),
            ("tokenizer.ggml.padding_token_id", vocabulary.padding),
        ] {
            if let Some(id) = id.filter(|&id| id as usize >= types.len()) {
                let expected = format!("an id below {}, the number of tokens", types.len());
                return Err(Problem::new(key, expected, format!("{id}")));
            }
        }
        let (text, ends) = token_bytes(&vocabulary.tokens, &types, score_based)?;
        let user_defined = Specials::new(&vocabulary.tokens, &types, &[TokenType::UserDefined])?;
        let all_specials = Specials::new(
            &vocabulary.tokens,
            &types,
            &[TokenType::UserDefined, TokenType::Control, TokenType::Unknown],
        )?;
        let end_of_generation = end_of_generation(&vocabulary, &types);
        let Vocabulary { bos, eos, add_bos, add_eos, .. } = vocabulary;
        let model =
            if score_based { Algorithm::Scores(Scores::new(vocabulary, &types)?) } else { byte_pairs(vocabulary)? };
        let bos_by_default = match &model {
            Algorithm::BytePairs { pre, .. } => pre.add_bos,
            Algorithm::Scores(_) => true,
        };
        for (key, asked, id, id_key) in [
            ("tokenizer.ggml.add_bos_token", add_bos, bos, "bos_token_id"),
            ("tokenizer.ggml.add_eos_token", add_eos, eos, "eos_token_id"),
        ] {
            if asked == Some(true) && id.is_none() {
                return Err(Problem::new(key, format!("tokenizer.ggml.{id_key} with it"), "no such key"));
            }
        }
        Ok(Self {
            model,
            types,
            text,
            ends,
            user_defined,
            all_specials,
            bos,
            eos,
            add_bos: add_bos.unwrap_or(bos_by_default) && bos.is_some(),
            add_eos: add_eos.unwrap_or(false),
            end_of_generation,
        })
    }

    /// Token ids of `text`, without BOS and EOS. User-defined tokens are always recognised in the text,
    /// control and unknown tokens only with `control`: prompts made from a chat template want that, text
    /// that a person wrote doesn't.
    pub fn encode(&self, text: &str, control: bool) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        let specials = if control { &self.all_specials } else { &self.user_defined };
        let mut at = 0;
        if let Some(specials) = specials {
            for found in specials.finder.find_iter(text) {
                self.encode_plain(&text[at..found.start()], &mut ids);
                ids.push(specials.ids[found.pattern().as_usize()]);
                at = found.end();
            }
        }
        self.encode_plain(&text[at..], &mut ids);
        ids
    }

    /// [`Tokenizer::encode`] as the start of a sequence: with BOS in front if the file asks for it and the
    /// text doesn't begin with it, and EOS at the end likewise.
    pub fn encode_prompt(&self, text: &str, control: bool) -> Vec<u32> {
        let mut ids = self.encode(text, control);
        if let Some(bos) = self.bos.filter(|bos| self.add_bos && ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        if let Some(eos) = self.eos.filter(|eos| self.add_eos && ids.last() != Some(eos)) {
            ids.push(eos);
        }
        ids
    }

    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        match &self.model {
            Algorithm::Scores(scores) => scores.encode(text, ids),
            Algorithm::BytePairs { pre, merges } => {
                let mut mapped = String::new();
                pre.split(text, &mut |word| {
                    mapped.clear();
                    mapped.extend(word.bytes().map(|byte| BYTE_TO_CHAR[byte as usize]));
                    let tokens =
                        merges.tokenize(&mapped).expect("merging fails only with an unknown token, which is not set");
                    ids.extend(tokens.iter().map(|token| token.id));
                });
            }
        }
    }

    /// The bytes that a token stands for; they need not be whole characters. Control and unknown tokens give
    /// nothing, or with `control` their name. Ids past the vocabulary (rows that fill up a model's head) give
    /// nothing.
    pub fn piece(&self, id: u32, control: bool) -> &[u8] {
        let index = id as usize;
        match self.types.get(index) {
            None => &[],
            Some(TokenType::Control | TokenType::Unknown) if !control => &[],
            Some(_) => {
                let start = if index == 0 { 0 } else { self.ends[index - 1] };
                &self.text[start..self.ends[index]]
            }
        }
    }

    /// The bytes of a whole sequence: what [`Tokenizer::encode`] was given. Control tokens give their name.
    pub fn decode(&self, ids: &[u32]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        // Encoding put a space before each fragment between special tokens.
        let prefixed = matches!(&self.model, Algorithm::Scores(scores) if scores.space_prefix);
        let mut fragment_begins = true;
        for &id in ids {
            let piece = self.piece(id, true);
            let special = self
                .types
                .get(id as usize)
                .is_some_and(|kind| matches!(kind, TokenType::Control | TokenType::Unknown | TokenType::UserDefined));
            let drop_space = prefixed && fragment_begins && !special;
            bytes.extend_from_slice(piece.strip_prefix(b" ").filter(|_| drop_space).unwrap_or(piece));
            fragment_begins = special;
        }
        bytes
    }

    /// Tokens of the vocabulary.
    pub fn n_vocab(&self) -> usize {
        self.types.len()
    }

    /// The token that begins a sequence, if the file names one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a sequence, if the file names one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Every token that ends a generation, ascending.
    pub fn end_of_generation(&self) -> &[u32] {
        &self.end_of_generation
    }

    /// Whether a generation ends with this token.
    pub fn ends_generation(&self, id: u32) -> bool {
        self.end_of_generation.binary_search(&id).is_ok()
    }
}

/// The tokens after which a generation ends: the ids the file names for it, and the usual texts. `</s>` counts only
/// where it is more than ordinary text: byte-level vocabularies have it from web pages.
fn end_of_generation(vocabulary: &Vocabulary, types: &[TokenType]) -> Vec<u32> {
    let named = [vocabulary.eos, vocabulary.eot, vocabulary.eom].into_iter().flatten();
    let by_text = vocabulary.tokens.iter().zip(types).enumerate().filter(|(_, (text, kind))| {
        ENDS.contains(&text.as_str()) && (text.as_str() != "</s>" || **kind != TokenType::Normal)
    });
    let mut ends: Vec<u32> = named.chain(by_text.map(|(id, _)| id as u32)).collect();
    ends.sort_unstable();
    ends.dedup();
    ends
}

/// The bytes of every token, one after the other, and where each ends.
fn token_bytes(tokens: &[String], types: &[TokenType], score_based: bool) -> Result<(Vec<u8>, Vec<usize>), Problem> {
    let mut bytes = Vec::with_capacity(tokens.iter().map(String::len).sum());
    let mut ends = Vec::with_capacity(tokens.len());
    for (id, (token, kind)) in tokens.iter().zip(types).enumerate() {
        match kind {
            TokenType::Byte => bytes.push(byte_of(token).ok_or_else(|| {
                Problem::new(
                    "tokenizer.ggml.tokens",
                    "byte tokens like <0x0A>",
                    format!("{} for token {id}", quoted(token.as_bytes())),
                )
            })?),
            TokenType::Normal | TokenType::Unused if score_based => {
                for c in token.chars() {
                    push_char(&mut bytes, if c == SPACE { ' ' } else { c });
                }
            }
            TokenType::Normal | TokenType::Unused => {
                for c in token.chars() {
                    match CHAR_TO_BYTE.get(c as usize).copied().flatten() {
                        Some(byte) => bytes.push(byte),
                        None => push_char(&mut bytes, c),
                    }
                }
            }
            TokenType::Control | TokenType::Unknown | TokenType::UserDefined => {
                bytes.extend_from_slice(token.as_bytes())
            }
        }
        ends.push(bytes.len());
    }
    Ok((bytes, ends))
}

fn push_char(bytes: &mut Vec<u8>, c: char) {
    bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

/// The byte that a token `<0xHH>` stands for.
fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let hex = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    u8::from_str_radix(digits, 16).ok().filter(|_| hex)
}

impl Specials {
    /// A finder for the tokens of these types, or `None` where there are none. Empty tokens are in no text.
    fn new(tokens: &[String], types: &[TokenType], wanted: &[TokenType]) -> Result<Option<Self>, Problem> {
        let chosen = tokens.iter().zip(types).enumerate();
        let chosen = chosen.filter(|(_, (token, kind))| wanted.contains(kind) && !token.is_empty());
        let (ids, texts): (Vec<u32>, Vec<&str>) = chosen.map(|(id, (token, _))| (id as u32, token.as_str())).unzip();
        if ids.is_empty() {
            return Ok(None);
        }
        let expected = format!("special tokens of at most {SPECIAL_BYTES_MAX} bytes together");
        let total: usize = texts.iter().map(|text| text.len()).sum();
        if total > SPECIAL_BYTES_MAX {
            return Err(Problem::new("tokenizer.ggml.tokens", expected, format!("{total} bytes")));
        }
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .kind(Some(AhoCorasickKind::ContiguousNFA))
            .build(&texts)
            .map_err(|error| Problem::new("tokenizer.ggml.tokens", expected, error.to_string()))?;
        Ok(Some(Self { finder, ids }))
    }
}

/// Byte-level BPE, with the merging done by the `tokenizers` crate.
fn byte_pairs(vocabulary: Vocabulary) -> Result<Algorithm, Problem> {
    const PRE: &str = "tokenizer.ggml.pre";
    const MERGES: &str = "tokenizer.ggml.merges";
    let known = || format!("one of {}", PreTokenizer::names().collect::<Vec<_>>().join(", "));
    let name = vocabulary.pre.ok_or_else(|| Problem::new(PRE, known(), "no such key"))?;
    let pre = PreTokenizer::new(&name).ok_or_else(|| Problem::new(PRE, known(), quoted(name.as_bytes())))?;
    let mut ids = Vocab::with_capacity(vocabulary.tokens.len());
    ids.extend(vocabulary.tokens.into_iter().zip(0..));
    let in_utf8 = |byte: u8| !matches!(byte, 0xC0 | 0xC1 | 0xF5..);
    if let Some(byte) = (0..=u8::MAX)
        .find(|&b| in_utf8(b) && !ids.contains_key(BYTE_TO_CHAR[b as usize].encode_utf8(&mut [0; 4]) as &str))
    {
        let character = BYTE_TO_CHAR[byte as usize];
        return Err(Problem::new(
            "tokenizer.ggml.tokens",
            "a token for every byte",
            format!("none for byte 0x{byte:02X} ({character:?})"),
        ));
    }
    let merges = vocabulary.merges.iter().enumerate().map(|(rank, merge)| {
        let first = merge.chars().next().map_or(0, char::len_utf8);
        match merge[first..].split_once(' ') {
            Some((left, right)) if !right.is_empty() => Ok((format!("{}{left}", &merge[..first]), right.to_owned())),
            _ => Err(Problem::new(
                MERGES,
                "two tokens with a space between",
                format!("{} at rank {rank}", quoted(merge.as_bytes())),
            )),
        }
    });
    let merges = merges.collect::<Result<Vec<_>, _>>()?;
    // No cache: it is a lock and a copy per word, and words of a prompt are merged once.
    let merges = BPE::builder()
        .vocab_and_merges(ids, merges)
        .ignore_merges(pre.whole_words)
        .cache_capacity(0)
        .build()
        .map_err(|error| Problem::new(MERGES, "pairs of tokens that together are a token", error.to_string()))?;
    Ok(Algorithm::BytePairs { pre, merges: Box::new(merges) })
}

/// SentencePiece-style merging: of all adjacent pairs that together are a token, the one with the highest
/// score is merged first, and the leftmost among equals.
#[derive(Debug)]
struct Scores {
    tokens: HashMap<String, (u32, f32)>, // text to id and score
    longest: usize,                      // bytes of the longest token
    bytes: Vec<u32>, // [256] what a byte without a token becomes: its byte token, or the unknown token
    space_prefix: bool,
}

/// A piece of the text while merging. Merging leaves holes, so neighbours are linked.
struct Symbol {
    start: usize,
    end: usize, // equal to `start` once merged into its left neighbour
    previous: usize,
    next: usize,
}

/// A pair that could be merged, as it was when it was found.
struct Candidate {
    score: f32,
    left: usize, // index of the left symbol
    end: usize,  // where the right symbol ends in the text
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left)).then(other.end.cmp(&self.end))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}

impl Scores {
    fn new(vocabulary: Vocabulary, types: &[TokenType]) -> Result<Self, Problem> {
        const SCORES: &str = "tokenizer.ggml.scores";
        same_length(SCORES, vocabulary.scores.len(), types.len())?;
        if let Some(id) = vocabulary.scores.iter().position(|score| score.is_nan()) {
            return Err(Problem::new(SCORES, "numbers", format!("NaN for token {id}")));
        }
        let unknown = vocabulary.unknown.expect("set to its default");
        let mut bytes = vec![unknown; 256];
        let mut tokens = HashMap::with_capacity(types.len());
        for (id, ((token, &score), kind)) in
            vocabulary.tokens.into_iter().zip(&vocabulary.scores).zip(types).enumerate()
        {
            match kind {
                TokenType::Byte => bytes[byte_of(&token).expect("checked with the token bytes") as usize] = id as u32,
                TokenType::Control | TokenType::Unknown => {}
                TokenType::Normal | TokenType::UserDefined | TokenType::Unused => {
                    tokens.insert(token, (id as u32, score));
                }
            }
        }
        let longest = tokens.keys().map(String::len).max().unwrap_or(0);
        Ok(Self { tokens, longest, bytes, space_prefix: vocabulary.add_space_prefix.unwrap_or(true) })
    }

    fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let mut escaped = String::with_capacity(text.len() + text.len() / 2 + SPACE.len_utf8());
        if self.space_prefix {
            escaped.push(SPACE);
        }
        escaped.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
        let text = escaped.as_str();

        const NONE: usize = usize::MAX;
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol {
                start,
                end: start + c.len_utf8(),
                previous: i.wrapping_sub(1),
                next: i + 1,
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        let mut candidates = BinaryHeap::with_capacity(symbols.len());
        let consider = |candidates: &mut BinaryHeap<Candidate>, symbols: &[Symbol], left: usize| {
            if left == NONE || symbols[left].next == NONE {
                return;
            }
            let (start, end) = (symbols[left].start, symbols[symbols[left].next].end);
            if end - start <= self.longest
                && let Some(&(_, score)) = self.tokens.get(&text[start..end])
            {
                candidates.push(Candidate { score, left, end });
            }
        };
        for left in 0..symbols.len() {
            consider(&mut candidates, &symbols, left);
        }
        while let Some(Candidate { left, end, .. }) = candidates.pop() {
            let right = symbols[left].next;
            // Outdated: one of the two was merged since. Symbols only grow, so the end tells.
            if symbols[left].start == symbols[left].end || right == NONE || symbols[right].end != end {
                continue;
            }
            let after = symbols[right].next;
            symbols[left].end = end;
            symbols[left].next = after;
            symbols[right].end = symbols[right].start;
            if after != NONE {
                symbols[after].previous = left;
            }
            let previous = symbols[left].previous;
            consider(&mut candidates, &symbols, previous);
            consider(&mut candidates, &symbols, left);
        }
        for symbol in symbols.iter().filter(|symbol| symbol.start != symbol.end) {
            let piece = &text[symbol.start..symbol.end];
            match self.tokens.get(piece) {
                Some(&(id, _)) => ids.push(id),
                None => ids.extend(piece.bytes().map(|byte| self.bytes[byte as usize])),
            }
        }
    }
}

/// The printable character that stands for each byte in byte-level BPE: printable Latin-1 stands for itself,
/// the other 68 bytes are U+0100 and up in order.
const BYTE_TO_CHAR: [char; 256] = {
    let mut table = ['\0'; 256];
    let (mut byte, mut other) = (0u32, 0x100u32);
    while byte < 256 {
        let code = if matches!(byte, 33..=126 | 161..=172 | 174..=255) {
            byte
        } else {
            other += 1;
            other - 1
        };
        table[byte as usize] = char::from_u32(code).expect("below the surrogates");
        byte += 1;
    }
    table
};

/// The reverse of [`BYTE_TO_CHAR`], by code point.
const CHAR_TO_BYTE: [Option<u8>; 324] = {
    let mut table = [None; 324];
    let mut byte = 0;
    while byte < 256 {
        table[BYTE_TO_CHAR[byte] as usize] = Some(byte as u8);
        byte += 1;
    }
    table
};

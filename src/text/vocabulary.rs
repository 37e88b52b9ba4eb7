//! The vocabulary of a file as plain data: what `tokenizer.ggml.*` holds, before any of it is believed.
//! [`crate::text::Tokenizer`] checks what it says; here only the types of the values are.

use crate::gguf::{self, Metadata};

/// A key that holds what no tokenizer can be made of.
pub(super) struct Problem {
    key: &'static str,
    expected: String,
    found: String,
}

impl Problem {
    pub(super) fn new(key: &'static str, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self { key, expected: expected.into(), found: found.into() }
    }

    /// The error about `file`.
    pub(super) fn of(self, file: &str) -> gguf::Error {
        gguf::Error::key(file, self.key, self.expected, self.found)
    }
}

/// What a token is (`tokenizer.ggml.token_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenType {
    /// Ordinary text.
    Normal,
    /// Stands for text that has no token.
    Unknown,
    /// Steers the model and prints nothing, like the start and the end of a turn.
    Control,
    /// Text of its own that is never split.
    UserDefined,
    /// A row without a meaning.
    Unused,
    /// One byte, written `<0xHH>`.
    Byte,
}

impl TokenType {
    /// The type with this number in a file, if there is one. 0 (undefined) counts as normal.
    pub fn from_id(id: i32) -> Option<Self> {
        Some(match id {
            0 | 1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

/// The `tokenizer.ggml.*` keys of a file. `None` and empty lists are absent keys.
#[derive(Clone, Debug, Default)]
pub struct Vocabulary {
    /// Name of the file, for messages.
    pub file: String,
    /// `model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece style).
    pub model: String,
    /// `pre`: name of the split pattern; needed for `gpt2`.
    pub pre: Option<String>,
    /// `tokens`: `[n_vocab]`.
    pub tokens: Vec<String>,
    /// `token_type`: `[n_vocab]`, or empty when every token is normal.
    pub token_types: Vec<i32>,
    /// `scores`: `[n_vocab]`, needed for `llama`.
    pub scores: Vec<f32>,
    /// `merges`: `left right` in rank order, needed for `gpt2`.
    pub merges: Vec<String>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `eot_token_id`.
    pub eot: Option<u32>,
    /// `eom_token_id`.
    pub eom: Option<u32>,
    /// `unknown_token_id`.
    pub unknown: Option<u32>,
    /// `padding_token_id`.
    pub padding: Option<u32>,
    /// `add_bos_token`.
    pub add_bos: Option<bool>,
    /// `add_eos_token`.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`, used by `llama`.
    pub add_space_prefix: Option<bool>,
}

impl Vocabulary {
    /// What the `tokenizer.ggml.*` keys of a file hold.
    ///
    /// # Errors
    /// A value of another type than its key needs, tokens or merges that are not UTF-8, and no `model` or
    /// `tokens` at all.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, gguf::Error> {
        let strings = |key: &str, strings: gguf::Strings<'_>| {
            let utf8 = |(i, bytes): (usize, &[u8])| match std::str::from_utf8(bytes) {
                Ok(text) => Ok(text.to_owned()),
                Err(_) => {
                    let found = format!("{} in entry {i}", gguf::quoted(bytes));
                    Err(metadata.error(key, "strings of UTF-8", found))
                }
            };
            strings.iter().enumerate().map(utf8).collect::<Result<Vec<_>, _>>()
        };
        let id = |key: &str| metadata.get::<u32>(key);
        const TOKENS: &str = "tokenizer.ggml.tokens";
        const MERGES: &str = "tokenizer.ggml.merges";
        Ok(Self {
            file: metadata.file().to_owned(),
            model: metadata.require::<&str>("tokenizer.ggml.model")?.to_owned(),
            pre: metadata.get::<&str>("tokenizer.ggml.pre")?.map(str::to_owned),
            tokens: strings(TOKENS, metadata.require(TOKENS)?)?,
            token_types: metadata.get("tokenizer.ggml.token_type")?.unwrap_or_default(),
            scores: metadata.get("tokenizer.ggml.scores")?.unwrap_or_default(),
            merges: metadata.get(MERGES)?.map_or(Ok(Vec::new()), |merges| strings(MERGES, merges))?,
            bos: id("tokenizer.ggml.bos_token_id")?,
            eos: id("tokenizer.ggml.eos_token_id")?,
            eot: id("tokenizer.ggml.eot_token_id")?,
            eom: id("tokenizer.ggml.eom_token_id")?,
            unknown: id("tokenizer.ggml.unknown_token_id")?,
            padding: id("tokenizer.ggml.padding_token_id")?,
            add_bos: metadata.get("tokenizer.ggml.add_bos_token")?,
            add_eos: metadata.get("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: metadata.get("tokenizer.ggml.add_space_prefix")?,
        })
    }

    /// Type of every token, `[n_vocab]`.
    ///
    /// Errors: a list of another length than `tokens`, or a number that names no type.
    pub(super) fn types(&self) -> Result<Vec<TokenType>, Problem> {
        const KEY: &str = "tokenizer.ggml.token_type";
        if self.token_types.is_empty() {
            return Ok(vec![TokenType::Normal; self.tokens.len()]);
        }
        same_length(KEY, self.token_types.len(), self.tokens.len())?;
        let types = self.token_types.iter().enumerate().map(|(id, &number)| {
            TokenType::from_id(number)
                .ok_or_else(|| Problem::new(KEY, "types from 0 to 6", format!("{number} for token {id}")))
        });
        types.collect()
    }
}

/// Demands one entry per token.
pub(super) fn same_length(key: &'static str, found: usize, tokens: usize) -> Result<(), Problem> {
    if found == tokens {
        return Ok(());
    }
    Err(Problem::new(key, format!("{tokens} entries, one per token"), format!("{found} entries")))
}

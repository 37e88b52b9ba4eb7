//! The vocabulary of a file as plain data: what `tokenizer.ggml.*` holds, before any of it is believed.
//! [`crate::text::Tokenizer`] checks it; nothing here does.

use super::Error;

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
    /// Type of every token, `[n_vocab]`.
    ///
    /// Errors: a list of another length than `tokens`, or a number that names no type.
    pub(crate) fn types(&self) -> Result<Vec<TokenType>, Error> {
        const KEY: &str = "tokenizer.ggml.token_type";
        if self.token_types.is_empty() {
            return Ok(vec![TokenType::Normal; self.tokens.len()]);
        }
        same_length(KEY, self.token_types.len(), self.tokens.len())?;
        let types = self.token_types.iter().enumerate().map(|(id, &number)| {
            TokenType::from_id(number)
                .ok_or_else(|| Error::metadata(KEY, "types from 0 to 6", format!("{number} for token {id}")))
        });
        types.collect()
    }
}

/// Demands one entry per token.
pub(crate) fn same_length(key: &str, found: usize, tokens: usize) -> Result<(), Error> {
    if found == tokens {
        return Ok(());
    }
    Err(Error::metadata(key, format!("{tokens} entries, one per token"), format!("{found} entries")))
}

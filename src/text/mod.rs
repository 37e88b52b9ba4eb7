//! Text: tokenizer, chat template, sampler, and streaming of complete UTF-8. Everything here works on
//! strings, token ids and logits; it knows no model, no device and no terminal.

pub mod pre_tokenizer;
pub mod tokenizer;
pub mod vocabulary;

pub use tokenizer::Tokenizer;
pub use vocabulary::{TokenType, Vocabulary};

/// What is wrong with the text part of a file, with a chat template or with sampling options.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A metadata key holds something the tokenizer can't be made of.
    #[error("{key}: expected {expected}, found {found}")]
    Metadata {
        /// Metadata key of the file.
        key: String,
        /// What the key has to hold.
        expected: String,
        /// What it holds.
        found: String,
    },
}

impl Error {
    pub(crate) fn metadata(key: &str, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Metadata { key: key.into(), expected: expected.into(), found: found.into() }
    }
}

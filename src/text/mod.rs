//! Text: tokenizer, chat template, sampler, and streaming of complete UTF-8. Everything here works on
//! strings, token ids and logits; it knows no model, no device and no terminal.

pub mod chat;
mod guard;
pub mod pre_tokenizer;
pub mod sampler;
pub mod stream;
pub mod tokenizer;
pub mod vocabulary;

pub use chat::{ChatTemplate, Message, RenderOptions};
pub use sampler::{Sampler, SamplerOptions};
pub use stream::{Part, ReasoningSplitter, TextStream};
pub use tokenizer::Tokenizer;
pub use vocabulary::{TokenType, Vocabulary};

/// What is wrong with a chat template, with sampling options or with logits.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// A chat template is wrong, fails or refuses the messages.
    #[error("the chat template can't be used: {0}")]
    Template(String),
    /// A sampling option is out of range.
    #[error("{option}: expected {expected}, found {found}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// Its range.
        expected: &'static str,
        /// Its value.
        found: String,
    },
    /// Logits that no token can be drawn from: the computation before is wrong.
    #[error("the logits are unusable: token {id} has {found}, and no draw is possible")]
    Logits {
        /// The token with the offending logit.
        id: u32,
        /// Its logit.
        found: f32,
    },
}

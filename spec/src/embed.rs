//! `Embed`: token ids to rows of the residual stream.

use crate::Matrix;

/// `x[t] = token_embd[token[t]]`, no scaling.
#[derive(Clone, Debug)]
pub struct Embed<W> {
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Rows of the table.
    pub n_vocab: usize,
    /// `[n_vocab, n_embd]`; in tied models the same file tensor as [`crate::Head::output`].
    pub token_embd: W,
}

impl<W> Embed<W> {
    /// The same block with every weight replaced by `f` of it.
    pub fn try_map<U, E>(&self, f: &mut dyn FnMut(&W) -> Result<U, E>) -> Result<Embed<U>, E> {
        Ok(Embed { n_embd: self.n_embd, n_vocab: self.n_vocab, token_embd: f(&self.token_embd)? })
    }
}

impl Embed<Matrix> {
    /// Reference: the rows of `tokens`, `[n_tokens, n_embd]`.
    pub fn reference(&self, tokens: &[u32]) -> Vec<f64> {
        tokens.iter().flat_map(|t| self.token_embd.row(*t as usize)).map(|x| f64::from(*x)).collect()
    }
}

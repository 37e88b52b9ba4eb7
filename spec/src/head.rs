//! `Head`: `logits = output . rms(x, output_norm)`, for the wanted rows only.

use crate::{Linear, Matrix, math};

/// Shape of the output head.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct HeadShape {
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Rows of the output projection.
    pub n_vocab: usize,
    /// Epsilon of the norm.
    pub rms_eps: f32,
}

/// The output head.
#[derive(Clone, Debug)]
pub struct Head<W> {
    /// Sizes.
    pub shape: HeadShape,
    /// `[n_embd]` f32.
    pub output_norm: W,
    /// `[n_vocab, n_embd]`; tied models: the token embedding.
    pub output: Linear<W>,
}

impl<W> Head<W> {
    /// The same block with every weight replaced by `f` of it.
    pub fn try_map<U, E>(&self, f: &mut dyn FnMut(&W) -> Result<U, E>) -> Result<Head<U>, E> {
        Ok(Head { shape: self.shape.clone(), output_norm: f(&self.output_norm)?, output: self.output.try_map(f)? })
    }
}

impl Head<Matrix> {
    /// Reference: hidden states after the norm `[wanted.len(), n_embd]` of the `wanted` rows of `x`
    /// `[n_tokens, n_embd]`.
    pub fn reference_hidden(&self, x: &[f64], wanted: &[usize]) -> Vec<f64> {
        let row = |r: usize| &x[r * self.shape.n_embd..(r + 1) * self.shape.n_embd];
        wanted.iter().flat_map(|r| math::rms_norm(row(*r), &self.output_norm, self.shape.rms_eps)).collect()
    }

    /// Reference: logits `[n, n_vocab]` of hidden states `[n, n_embd]`.
    pub fn reference_logits(&self, hidden: &[f64]) -> Vec<f64> {
        hidden.chunks_exact(self.shape.n_embd).flat_map(|h| self.output.apply(h)).collect()
    }
}

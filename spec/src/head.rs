//! `Head`: `logits = output . rms(x, output_norm)`, for the wanted rows only.

use crate::Linear;

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

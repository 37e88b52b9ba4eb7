//! `Ffn`: `x += ffn_down . (silu(ffn_gate . h) * (ffn_up . h))` on `h = rms(x, ffn_norm)`.

use crate::{Linear, Matrix, math};

/// Shape of a dense feed-forward block.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct FfnShape {
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Hidden width.
    pub n_ff: usize,
    /// Epsilon of the norm.
    pub rms_eps: f32,
}

/// A dense feed-forward block (SwiGLU).
#[derive(Clone, Debug)]
pub struct Ffn<W> {
    /// Layer number, as in `blk.{layer}`.
    pub layer: usize,
    /// Sizes.
    pub shape: FfnShape,
    /// `[n_embd]` f32: `ffn_norm`, in the hybrids `post_attention_norm`.
    pub ffn_norm: W,
    /// `[n_ff, n_embd]`.
    pub ffn_gate: Linear<W>,
    /// `[n_ff, n_embd]`.
    pub ffn_up: Linear<W>,
    /// `[n_embd, n_ff]`.
    pub ffn_down: Linear<W>,
}

impl<W> Ffn<W> {
    /// The same block with every weight replaced by `f` of it.
    pub fn try_map<U, E>(&self, f: &mut dyn FnMut(&W) -> Result<U, E>) -> Result<Ffn<U>, E> {
        Ok(Ffn {
            layer: self.layer,
            shape: self.shape.clone(),
            ffn_norm: f(&self.ffn_norm)?,
            ffn_gate: self.ffn_gate.try_map(f)?,
            ffn_up: self.ffn_up.try_map(f)?,
            ffn_down: self.ffn_down.try_map(f)?,
        })
    }
}

impl Ffn<Matrix> {
    /// Reference: adds the block's output to every row of `x` `[n_tokens, n_embd]`.
    pub fn reference(&self, x: &mut [f64]) {
        for x in x.chunks_exact_mut(self.shape.n_embd) {
            let h = math::rms_norm(x, &self.ffn_norm, self.shape.rms_eps);
            let y = swiglu(self.ffn_gate.apply(&h), &self.ffn_up.apply(&h));
            math::add(x, &self.ffn_down.apply(&y));
        }
    }
}

/// `silu(gate) * up`.
pub(crate) fn swiglu(mut gate: Vec<f64>, up: &[f64]) -> Vec<f64> {
    gate.iter_mut().zip(up).for_each(|(g, u)| *g = math::silu(*g) * u);
    gate
}

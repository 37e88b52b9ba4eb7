//! `Mtp`: one multi-token-prediction block. `x = eh_proj . [rms(embedding, enorm) ; rms(h, hnorm)]`, then an
//! attention and a feed-forward block with a KV cache of their own, `m = rms(x, shared_head_norm)`, and the
//! head. `h` is the trunk's hidden state after `output_norm`.

use crate::{Block, Linear};

/// A multi-token-prediction block.
#[derive(Clone, Debug)]
pub struct Mtp<W> {
    /// Layer number in the file, as in `blk.{layer}`.
    pub layer: usize,
    /// `[n_embd]` f32.
    pub enorm: W,
    /// `[n_embd]` f32.
    pub hnorm: W,
    /// `[n_embd, 2 * n_embd]`: input is embedding, then hidden.
    pub eh_proj: Linear<W>,
    /// Attention, then Ffn or Moe.
    pub blocks: Vec<Block<W>>,
    /// `[n_embd]` f32; absent: the trunk's `output_norm`.
    pub shared_head_norm: Option<W>,
    /// `[n_vocab, n_embd]`; absent: the trunk's embedding.
    pub embed_tokens: Option<W>,
    /// `[n_vocab, n_embd]`; absent: the trunk's head.
    pub shared_head_head: Option<Linear<W>>,
}

impl<W> Mtp<W> {
    /// The same block with every weight replaced by `f` of it.
    pub fn try_map<U, E>(&self, f: &mut dyn FnMut(&W) -> Result<U, E>) -> Result<Mtp<U>, E> {
        Ok(Mtp {
            layer: self.layer,
            enorm: f(&self.enorm)?,
            hnorm: f(&self.hnorm)?,
            eh_proj: self.eh_proj.try_map(f)?,
            blocks: self.blocks.iter().map(|b| b.try_map(f)).collect::<Result<_, E>>()?,
            shared_head_norm: self.shared_head_norm.as_ref().map(&mut *f).transpose()?,
            embed_tokens: self.embed_tokens.as_ref().map(&mut *f).transpose()?,
            shared_head_head: self.shared_head_head.as_ref().map(|l| l.try_map(f)).transpose()?,
        })
    }
}

//! `Mtp`: one multi-token-prediction block. `x = eh_proj . [rms(embedding, enorm) ; rms(h, hnorm)]`, then an
//! attention and a feed-forward block with a KV cache of their own, `m = rms(x, shared_head_norm)`, and the
//! head. `h` is the trunk's hidden state after `output_norm`.

use crate::{AttentionState, Block, Embed, Head, KvDtype, Linear, Matrix, Sequence, math};

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

impl Mtp<Matrix> {
    /// Reference: hidden states after the block's head norm `[n_tokens, n_embd]` for rows that pair
    /// `tokens[t]` with `previous[t]` `[n_embd]`, the hidden state after the trunk's `output_norm` (or this
    /// block's own result) at the token before it. `run` says which slot of the block's own `states` the rows
    /// continue and at which row of its cache; rotary positions count those rows.
    pub fn reference(
        &self,
        tokens: &[u32],
        previous: &[f64],
        run: &Sequence,
        trunk: (&Embed<Matrix>, &Head<Matrix>),
        states: &mut [AttentionState],
        kv_dtype: KvDtype,
    ) -> Vec<f64> {
        let (embed, head) = trunk;
        let table = self.embed_tokens.as_ref().unwrap_or(&embed.token_embd);
        let mut x = Vec::with_capacity(previous.len());
        for (token, previous) in tokens.iter().zip(previous.chunks_exact(embed.n_embd)) {
            let embedding: Vec<f64> = table.row(*token as usize).iter().map(|x| f64::from(*x)).collect();
            let mut both = math::rms_norm(&embedding, &self.enorm, head.shape.rms_eps);
            both.extend(math::rms_norm(previous, &self.hnorm, head.shape.rms_eps));
            x.extend(self.eh_proj.apply(&both));
        }
        for block in &self.blocks {
            match block {
                Block::Attention(b) => b.reference(&mut x, std::slice::from_ref(run), states, kv_dtype),
                Block::Ffn(b) => b.reference(&mut x),
                Block::Moe(b) => b.reference(&mut x),
                other => panic!("a {} in a multi-token-prediction block", other.kind()),
            }
        }
        let norm = self.shared_head_norm.as_ref().unwrap_or(&head.output_norm);
        x.chunks_exact(embed.n_embd).flat_map(|x| math::rms_norm(x, norm, head.shape.rms_eps)).collect()
    }

    /// Reference: draft logits `[n, n_vocab]` of hidden states `[n, n_embd]`.
    pub fn reference_logits(&self, hidden: &[f64], head: &Head<Matrix>) -> Vec<f64> {
        let output = self.shared_head_head.as_ref().unwrap_or(&head.output);
        hidden.chunks_exact(head.shape.n_embd).flat_map(|h| output.apply(h)).collect()
    }
}

//! A model: a list of blocks. The index of a block in the list is its identity in plans and steps.

use crate::{Attention, DeltaNet, Embed, Ffn, FfnShape, Head, Linear, Moe, Mtp, Weight};
use std::ops::Range;

/// The unit of placement, of testing and of timing.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub enum Block<W> {
    Embed(Embed<W>),
    Attention(Attention<W>),
    DeltaNet(DeltaNet<W>),
    Ffn(Ffn<W>),
    Moe(Moe<W>),
    Head(Head<W>),
}

impl<W> Block<W> {
    /// The same block with every weight replaced by `f` of it.
    pub fn try_map<U, E>(&self, f: &mut dyn FnMut(&W) -> Result<U, E>) -> Result<Block<U>, E> {
        Ok(match self {
            Block::Embed(b) => Block::Embed(b.try_map(f)?),
            Block::Attention(b) => Block::Attention(b.try_map(f)?),
            Block::DeltaNet(b) => Block::DeltaNet(b.try_map(f)?),
            Block::Ffn(b) => Block::Ffn(b.try_map(f)?),
            Block::Moe(b) => Block::Moe(b.try_map(f)?),
            Block::Head(b) => Block::Head(b.try_map(f)?),
        })
    }

    /// Calls `f` with every weight.
    pub fn for_each(&self, f: &mut dyn FnMut(&W)) {
        let mapped: Result<Block<()>, std::convert::Infallible> = self.try_map(&mut |w| {
            f(w);
            Ok(())
        });
        let Ok(_) = mapped;
    }

    /// Name in plans and traces: `embed`, `blk.3.attn`, `blk.3.delta_net`, `blk.3.ffn`, `blk.3.moe`, `head`.
    pub fn name(&self) -> String {
        match self {
            Block::Embed(_) => "embed".into(),
            Block::Attention(b) => format!("blk.{}.attn", b.layer),
            Block::DeltaNet(b) => format!("blk.{}.delta_net", b.layer),
            Block::Ffn(b) => format!("blk.{}.ffn", b.layer),
            Block::Moe(b) => format!("blk.{}.moe", b.layer),
            Block::Head(_) => "head".into(),
        }
    }

    /// Kind of block, for reports: `embed`, `attention`, `delta_net`, `ffn`, `moe`, `head`.
    pub fn kind(&self) -> &'static str {
        match self {
            Block::Embed(_) => "embed",
            Block::Attention(_) => "attention",
            Block::DeltaNet(_) => "delta_net",
            Block::Ffn(_) => "ffn",
            Block::Moe(_) => "moe",
            Block::Head(_) => "head",
        }
    }
}

impl Block<Weight> {
    /// The share of the block that computes `part`: rows of `n_ff` of an FFN (whole quantisation blocks of `ffn_down`),
    /// experts of a mixture, all of any other block. The outputs of shares that cover the block add up to that of the
    /// block, if one of them is its `home`: that one has what is added once (the bias of `ffn_down`, the shared
    /// expert) and the router; in the other shares of a mixture the router has no rows.
    pub fn share(&self, part: Range<usize>, is_home: bool) -> Self {
        let rows = |l: &Linear<Weight>| Linear {
            weight: l.weight.row_range(part.clone()),
            scale: l.scale.clone(),
            bias: l.bias.as_ref().map(|b| b.element_range(part.clone())),
        };
        match self {
            Block::Ffn(b) if part.len() < b.shape.n_ff => Block::Ffn(Ffn {
                layer: b.layer,
                shape: FfnShape { n_ff: part.len(), ..b.shape.clone() },
                ffn_norm: b.ffn_norm.clone(),
                ffn_gate: rows(&b.ffn_gate),
                ffn_up: rows(&b.ffn_up),
                ffn_down: Linear {
                    weight: b.ffn_down.weight.col_range(part),
                    scale: b.ffn_down.scale.clone(),
                    bias: b.ffn_down.bias.clone().filter(|_| is_home),
                },
            }),
            Block::Moe(b) if part.len() < b.shape.n_experts || !is_home => {
                let stack = |l: &Linear<Weight>| {
                    let n = l.weight.n_rows() / b.shape.n_experts;
                    Linear {
                        weight: l.weight.row_range(part.start * n..part.end * n),
                        scale: l.scale.as_ref().map(|s| s.element_range(part.clone())),
                        bias: l.bias.clone(),
                    }
                };
                Block::Moe(Moe {
                    layer: b.layer,
                    shape: b.shape.clone(),
                    experts: part.clone(),
                    ffn_norm: b.ffn_norm.clone(),
                    ffn_gate_inp: if is_home { b.ffn_gate_inp.clone() } else { b.ffn_gate_inp.row_range(0..0) },
                    ffn_gate_exps: stack(&b.ffn_gate_exps),
                    ffn_up_exps: stack(&b.ffn_up_exps),
                    ffn_down_exps: stack(&b.ffn_down_exps),
                    shared: b.shared.clone().filter(|_| is_home),
                })
            }
            whole => whole.clone(),
        }
    }
}

/// A model as the runtime sees it: no device, no file, no architecture beyond its name.
#[derive(Clone, Debug)]
pub struct Model<W = Weight> {
    /// `general.architecture`.
    pub arch: String,
    /// `general.name`, or empty.
    pub name: String,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Vocabulary rows.
    pub n_vocab: usize,
    /// Trunk layers.
    pub n_layers: usize,
    /// Context length the model was trained for.
    pub n_ctx_train: usize,
    /// Embed, then two blocks a layer (mixer, feed-forward), then Head.
    pub blocks: Vec<Block<W>>,
    /// Multi-token-prediction block, where the file has one.
    pub mtp: Option<Mtp<W>>,
}

impl<W> Model<W> {
    /// Whether the model has recurrent (delta-net) layers.
    pub fn is_hybrid(&self) -> bool {
        self.blocks.iter().any(|b| matches!(b, Block::DeltaNet(_)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Maker, Rng};
    use crate::{MoeShape, TensorType};
    use std::convert::Infallible;

    fn reference(block: &Block<Weight>, maker: &Maker, x: &mut [f64]) {
        let Ok(block) = block.try_map(&mut |w| Ok::<_, Infallible>(crate::Matrix::decode(w, &maker.source)));
        match block {
            Block::Ffn(b) => b.reference(x),
            Block::Moe(b) => b.reference(x),
            _ => unreachable!("only feed-forward blocks are shared here"),
        }
    }

    /// What shares add to the residual stream sums to what the block adds.
    #[test]
    fn shares_add_up() {
        let mut maker = Maker::new(3, &[TensorType::Q4_0]);
        let ffn = Block::Ffn(maker.ffn(0, &FfnShape { n_embd: 64, n_ff: 96, rms_eps: 1e-6 }));
        let moe = MoeShape { n_embd: 64, n_experts: 6, n_used: 3, n_ff: 32, n_ff_shared: 32, rms_eps: 1e-6 };
        let moe = Block::Moe(maker.moe(1, &moe));
        let x: Vec<f64> = Rng::new(5).normals(2 * 64, 1.0).into_iter().map(f64::from).collect();
        for (block, at) in [(&ffn, 32), (&ffn, 64), (&moe, 0), (&moe, 2)] {
            let n = if at > 6 { 96 } else { 6 };
            let mut whole = x.clone();
            reference(block, &maker, &mut whole);
            let mut sum = x.clone();
            for (part, is_home) in [(0..at, true), (at..n, false)] {
                let mut share = block.share(part, is_home);
                if let (Block::Moe(share), Block::Moe(block)) = (&mut share, block) {
                    share.ffn_gate_inp = block.ffn_gate_inp.clone(); // the choice is made at home
                }
                let mut added = x.clone();
                reference(&share, &maker, &mut added);
                sum.iter_mut().zip(added.iter().zip(&x)).for_each(|(s, (a, x))| *s += a - x);
            }
            for (sum, whole) in sum.iter().zip(&whole) {
                assert!((sum - whole).abs() < 1e-9, "{}: {sum} and {whole}", block.name());
            }
        }
    }
}

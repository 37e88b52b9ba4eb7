//! A model: a list of blocks. The index of a block in the list is its identity in plans and steps.

use crate::{Attention, DeltaNet, Embed, Ffn, Head, Moe, Mtp, Weight};

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

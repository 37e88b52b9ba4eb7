//! The reference: runs a block, or a whole model, in f64 from the decoded weights. Slow, exact and simple:
//! every backend is compared with it, and it shares no code with any of them.

use crate::{
    AttentionState, Batch, Block, DeltaForm, DeltaNetState, KvDtype, Matrix, Model, Sequence, TensorSource, Weight,
};
use std::convert::Infallible;

/// One block with its decoded weights and the states of its slots.
pub struct BlockReference {
    block: Block<Matrix>,
    state: State,
    kv_dtype: KvDtype,
    form: DeltaForm,
}

/// What a block keeps from step to step, by slot.
enum State {
    None,
    Attention(Vec<AttentionState>),
    DeltaNet(Vec<DeltaNetState>),
}

impl BlockReference {
    /// Decodes the weights of `block`; `n_slots` sequences can be under way at a time.
    pub fn new(
        block: &Block<Weight>,
        source: &dyn TensorSource,
        n_slots: usize,
        kv_dtype: KvDtype,
        form: DeltaForm,
    ) -> Self {
        let Ok(block) = block.try_map(&mut |w| Ok::<_, Infallible>(Matrix::decode(w, source)));
        let state = match &block {
            Block::Attention(_) => State::Attention(vec![AttentionState::default(); n_slots]),
            Block::DeltaNet(b) => State::DeltaNet(vec![DeltaNetState::new(&b.shape); n_slots]),
            Block::Embed(_) | Block::Ffn(_) | Block::Moe(_) | Block::Head(_) => State::None,
        };
        Self { block, state, kv_dtype, form }
    }

    /// Runs the block over `batch`. `x` holds the residual stream `[n_tokens, n_embd]`: Embed fills it, Head
    /// turns it into the logits `[wanted, n_vocab]`, every other block adds to it.
    pub fn run(&mut self, batch: &Batch, x: &mut Vec<f64>) {
        match (&self.block, &mut self.state) {
            (Block::Embed(b), _) => *x = b.reference(&batch.tokens),
            (Block::Attention(b), State::Attention(states)) => {
                b.reference(x, &batch.sequences, states, self.kv_dtype);
            }
            (Block::DeltaNet(b), State::DeltaNet(states)) => b.reference(x, &batch.sequences, states, self.form),
            (Block::Ffn(b), _) => b.reference(x),
            (Block::Moe(b), _) => b.reference(x),
            (Block::Head(b), _) => *x = b.reference_logits(&b.reference_hidden(x, &batch.wanted)),
            (Block::Attention(_) | Block::DeltaNet(_), _) => unreachable!("mixers are made with their states"),
        }
    }
}

/// A whole model.
pub struct Reference {
    blocks: Vec<BlockReference>,
    mtp: Option<MtpReference>,
}

/// A multi-token-prediction block and the caches of its slots.
struct MtpReference {
    mtp: crate::Mtp<Matrix>,
    states: Vec<AttentionState>,
    kv_dtype: KvDtype,
}

/// What one step computes.
pub struct StepResult {
    /// Logits `[wanted, n_vocab]`.
    pub logits: Vec<f64>,
    /// Hidden states after `output_norm` of the wanted rows `[wanted, n_embd]`.
    pub hidden: Vec<f64>,
    /// The residual stream `[n_tokens, n_embd]` after every block but the head.
    pub trace: Vec<Vec<f64>>,
}

impl Reference {
    /// Decodes the weights of `model`; `n_slots` sequences can be under way at a time.
    pub fn new(model: &Model, source: &dyn TensorSource, n_slots: usize, kv_dtype: KvDtype, form: DeltaForm) -> Self {
        let block = |b| BlockReference::new(b, source, n_slots, kv_dtype, form);
        let mtp = model.mtp.as_ref().map(|mtp| {
            let Ok(mtp) = mtp.try_map(&mut |w| Ok::<_, Infallible>(Matrix::decode(w, source)));
            MtpReference { mtp, states: vec![AttentionState::default(); n_slots], kv_dtype }
        });
        Self { blocks: model.blocks.iter().map(block).collect(), mtp }
    }

    /// Runs one step.
    pub fn step(&mut self, batch: &Batch) -> StepResult {
        let (head, body) = self.blocks.split_last_mut().expect("a model ends with its head");
        let mut x = Vec::new();
        let mut trace = Vec::new();
        for block in body {
            block.run(batch, &mut x);
            trace.push(x.clone());
        }
        let Block::Head(head) = &head.block else { panic!("a model ends with its head") };
        let hidden = head.reference_hidden(&x, &batch.wanted);
        StepResult { logits: head.reference_logits(&hidden), hidden, trace }
    }

    /// Runs the multi-token-prediction block over rows that pair `tokens[t]` with `previous[t]`, at rows
    /// `run` of its own cache. Returns hidden states `[n_tokens, n_embd]` and draft logits
    /// `[n_tokens, n_vocab]`.
    ///
    /// # Panics
    /// If the model has no such block.
    pub fn step_mtp(&mut self, tokens: &[u32], previous: &[f64], run: &Sequence) -> (Vec<f64>, Vec<f64>) {
        let MtpReference { mtp, states, kv_dtype } = self.mtp.as_mut().expect("a multi-token-prediction block");
        let (Some(Block::Embed(embed)), Some(Block::Head(head))) =
            (self.blocks.first().map(|b| &b.block), self.blocks.last().map(|b| &b.block))
        else {
            panic!("a model starts with its embedding and ends with its head");
        };
        let hidden = mtp.reference(tokens, previous, run, (embed, head), states, *kv_dtype);
        let logits = mtp.reference_logits(&hidden, head);
        (hidden, logits)
    }
}

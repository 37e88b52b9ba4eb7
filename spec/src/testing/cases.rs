//! The table of cases: one list of shapes, types and steps that the tests and benches of every backend
//! read. Shapes include 1, primes, tails and those of real models.

use super::{AttentionParts, Buffers, Maker, Rng};
use crate::{
    AttentionShape, Batch, Block, BlockReference, DeltaForm, DeltaNetShape, FfnShape, HeadOrder, HeadShape, KvDtype,
    MoeShape, Rope, RopeScaling, RopeStyle, Sequence, TensorType, Weight,
};

/// Shape of the block of a case.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub enum Shape {
    Embed { n_vocab: usize, n_embd: usize },
    Attention { shape: AttentionShape, parts: AttentionParts },
    DeltaNet(DeltaNetShape),
    Ffn(FfnShape),
    Moe(MoeShape),
    Head(HeadShape),
}

/// One case: a random block, and the steps to run through it one after the other.
#[derive(Clone, Debug)]
pub struct Case {
    /// Kind of block, types and what is special about it.
    pub name: String,
    /// Shape of the block.
    pub shape: Shape,
    /// Types of the matrices, taken in turn.
    pub types: Vec<TensorType>,
    /// Whether matrices have companion scales and come as row ranges of larger tensors.
    pub awkward: bool,
    /// Type of keys and values.
    pub kv_dtype: KvDtype,
    /// Slots that the steps use.
    pub n_slots: usize,
    /// Runs (slot, tokens) of each step. Each continues its slot.
    pub steps: Vec<Vec<(usize, usize)>>,
    /// Seed of weights and inputs.
    pub seed: u64,
}

impl Case {
    fn new(name: &str, shape: Shape, types: &[TensorType], steps: &[&[(usize, usize)]]) -> Self {
        let steps: Vec<Vec<_>> = steps.iter().map(|runs| runs.to_vec()).collect();
        let n_slots = steps.iter().flatten().map(|run| run.0 + 1).max().unwrap_or(1);
        let seed = name.bytes().fold(0, |seed: u64, b| seed.wrapping_mul(31).wrapping_add(u64::from(b)));
        let (types, kv_dtype) = (types.to_vec(), KvDtype::F32);
        Self { name: name.into(), shape, types, awkward: false, kv_dtype, n_slots, steps, seed }
    }

    fn awkward(mut self) -> Self {
        self.awkward = true;
        self
    }

    fn bf16(mut self) -> Self {
        self.kv_dtype = KvDtype::Bf16;
        self
    }

    /// Width of the residual stream.
    pub fn n_embd(&self) -> usize {
        match &self.shape {
            Shape::Embed { n_embd, .. } => *n_embd,
            Shape::Attention { shape, .. } => shape.n_embd,
            Shape::DeltaNet(shape) => shape.n_embd,
            Shape::Ffn(shape) => shape.n_embd,
            Shape::Moe(shape) => shape.n_embd,
            Shape::Head(shape) => shape.n_embd,
        }
    }

    /// Rows of the vocabulary; 1 where the block has none.
    pub fn n_vocab(&self) -> usize {
        match &self.shape {
            Shape::Embed { n_vocab, .. } => *n_vocab,
            Shape::Head(shape) => shape.n_vocab,
            _ => 1,
        }
    }

    /// The block, layer 0, and the tensors of its weights.
    pub fn block(&self) -> (Block<Weight>, Buffers) {
        let mut maker = Maker::new(self.seed, &self.types);
        maker.awkward = self.awkward;
        let block = match &self.shape {
            Shape::Embed { n_vocab, n_embd } => Block::Embed(maker.embed(*n_vocab, *n_embd)),
            Shape::Attention { shape, parts } => Block::Attention(maker.attention(0, shape, *parts)),
            Shape::DeltaNet(shape) => Block::DeltaNet(maker.delta_net(0, shape)),
            Shape::Ffn(shape) => Block::Ffn(maker.ffn(0, shape)),
            Shape::Moe(shape) => Block::Moe(maker.moe(0, shape)),
            Shape::Head(shape) => Block::Head(maker.head(shape)),
        };
        (block, maker.source)
    }

    /// The batches of the steps, and the residual stream `[n_tokens, n_embd]` that enters each: noise of
    /// standard deviation 1. Every second row is wanted, and the last.
    pub fn inputs(&self) -> Vec<(Batch, Vec<f32>)> {
        let mut rng = Rng::new(self.seed ^ 0x5eed);
        let mut positions = vec![0; self.n_slots];
        let batch = |runs: &Vec<(usize, usize)>| {
            let mut sequences = Vec::new();
            for &(slot, n_tokens) in runs {
                sequences.push(Sequence { slot, position: positions[slot], n_tokens });
                positions[slot] += n_tokens;
            }
            let n_tokens: usize = runs.iter().map(|run| run.1).sum();
            let tokens = (0..n_tokens).map(|_| rng.below(self.n_vocab()) as u32).collect();
            let wanted = (0..n_tokens).filter(|r| r % 2 == 1 || r + 1 == n_tokens).collect();
            (Batch { tokens, sequences, wanted }, rng.normals(n_tokens * self.n_embd(), 1.0))
        };
        self.steps.iter().map(batch).collect()
    }

    /// What the block makes of the inputs, step by step: what it adds to the residual stream
    /// `[n_tokens, n_embd]` (a wrong block cannot hide behind the stream that passes through); for Embed the
    /// rows, for Head the logits `[wanted, n_vocab]`.
    pub fn expected(&self, block: &Block<Weight>, source: &Buffers, inputs: &[(Batch, Vec<f32>)]) -> Vec<Vec<f64>> {
        let form = DeltaForm::Recurrent;
        let mut reference = BlockReference::new(block, source, self.n_slots, self.kv_dtype, form);
        let is_added = !matches!(self.shape, Shape::Embed { .. } | Shape::Head(_));
        let step = |(batch, x): &(Batch, Vec<f32>)| {
            let before: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            let mut x = before.clone();
            reference.run(batch, &mut x);
            if is_added {
                x.iter_mut().zip(&before).for_each(|(x, before)| *x -= before);
            }
            x
        };
        inputs.iter().map(step).collect()
    }
}

/// Every tensor type that weights may have.
const TYPES: [TensorType; 16] = {
    use TensorType::*;
    [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4]
};

/// One token after another.
const DECODE: &[&[(usize, usize)]] = &[&[(0, 1)], &[(0, 1)], &[(0, 1)], &[(0, 1)], &[(0, 1)]];
/// A prompt with a tail behind every usual tile, then single tokens.
const PROMPT: &[&[(usize, usize)]] = &[&[(0, 67)], &[(0, 1)], &[(0, 2)]];
/// Three sequences that come, stay and go in one step, in no order.
const SEVERAL: &[&[(usize, usize)]] =
    &[&[(2, 9)], &[(0, 1), (2, 1)], &[(1, 33), (2, 1), (0, 3)], &[(2, 2), (0, 1), (1, 1)]];
/// Chunk lengths around the window of the convolution and the chunks of the delta rule.
const CHUNKS: &[&[(usize, usize)]] =
    &[&[(0, 2)], &[(0, 1)], &[(0, 63)], &[(0, 64)], &[(0, 65)], &[(0, 130)], &[(0, 1)]];
/// A context that is longer than any tile of an attention kernel.
const LONG: &[&[(usize, usize)]] = &[&[(0, 300)], &[(0, 1)], &[(0, 230), (1, 5)], &[(1, 1), (0, 1)]];

fn rope(n_rot: usize, style: RopeStyle) -> Rope {
    Rope { n_rot, base: 10_000.0, style, scaling: RopeScaling::None, rotated_pairs: Vec::new() }
}

fn attention(n_embd: usize, n_heads: usize, n_kv_heads: usize, head_dim: usize, rope: Rope) -> AttentionShape {
    AttentionShape { n_embd, n_heads, n_kv_heads, head_dim, gated: false, rms_eps: 1e-6, rope }
}

/// Attention of the hybrids: gated, norms on q and k, a quarter of each head rotated.
fn attention_gated(n_embd: usize, n_heads: usize, n_kv_heads: usize, head_dim: usize) -> Shape {
    let rope = Rope { base: 1e7, ..rope(head_dim / 4, RopeStyle::Neox) };
    let shape = AttentionShape { gated: true, ..attention(n_embd, n_heads, n_kv_heads, head_dim, rope) };
    Shape::Attention { shape, parts: AttentionParts { qk_norm: true, ..Default::default() } }
}

fn delta_net(n_embd: usize, n_k_heads: usize, n_v_heads: usize, head_dim: usize, head_order: HeadOrder) -> Shape {
    let (conv_kernel, rms_eps) = (4, 1e-6);
    Shape::DeltaNet(DeltaNetShape { n_embd, n_k_heads, n_v_heads, head_dim, conv_kernel, head_order, rms_eps })
}

fn ffn(n_embd: usize, n_ff: usize) -> Shape {
    Shape::Ffn(FfnShape { n_embd, n_ff, rms_eps: 1e-6 })
}

fn moe(n_embd: usize, n_experts: usize, n_used: usize, n_ff: usize, n_ff_shared: usize) -> Shape {
    Shape::Moe(MoeShape { n_embd, n_experts, n_used, n_ff, n_ff_shared, rms_eps: 1e-6 })
}

fn head(n_embd: usize, n_vocab: usize) -> Shape {
    Shape::Head(HeadShape { n_embd, n_vocab, rms_eps: 1e-6 })
}

/// All cases. A case is cheap until [`Case::block`] makes its weights.
pub fn cases() -> Vec<Case> {
    let kinds = [cases_embed(), cases_attention(), cases_delta_net(), cases_ffn(), cases_moe(), cases_head()];
    kinds.into_iter().flatten().collect()
}

fn cases_embed() -> Vec<Case> {
    let of_type =
        |ty: &TensorType| Case::new(&format!("embed {ty}"), Shape::Embed { n_vocab: 67, n_embd: 512 }, &[*ty], SEVERAL);
    let mut cases: Vec<Case> = TYPES.iter().map(of_type).collect();
    cases.push(Case::new("embed odd", Shape::Embed { n_vocab: 1, n_embd: 37 }, &[TensorType::F32], DECODE));
    cases.push(Case::new("embed 0.8B", Shape::Embed { n_vocab: 4099, n_embd: 1024 }, &[TensorType::Q6_K], PROMPT));
    cases
}

fn cases_attention() -> Vec<Case> {
    use TensorType::*;
    let plain = |shape| Shape::Attention { shape, parts: AttentionParts::default() };
    let neox = |n_rot| rope(n_rot, RopeStyle::Neox);
    let scaled = |scaling| Rope { scaling, ..rope(16, RopeStyle::Neox) };
    let linear = scaled(RopeScaling::Linear { factor: 4.0 });
    let yarn = scaled(RopeScaling::Yarn { factor: 4.0, original: 64 });
    let sections = Rope { rotated_pairs: vec![true, true, false, true], ..rope(8, RopeStyle::Neox) };
    let qk_norm = AttentionParts { qk_norm: true, ..Default::default() };
    let bias = AttentionParts { bias: true, ..Default::default() };
    let rope_freqs = AttentionParts { rope_freqs: true, ..Default::default() };
    let llama = attention(256, 4, 2, 64, rope(64, RopeStyle::Adjacent));
    vec![
        Case::new("attention one head", plain(attention(8, 1, 1, 4, neox(4))), &[F32], DECODE),
        Case::new("attention odd", plain(attention(37, 3, 1, 10, neox(6))), &[F32], SEVERAL),
        Case::new("attention odd bf16 kv", plain(attention(37, 6, 2, 22, neox(10))), &[F16], SEVERAL).bf16(),
        Case::new("attention llama", Shape::Attention { shape: llama.clone(), parts: rope_freqs }, &[Q4_0], SEVERAL),
        Case::new("attention llama f32", Shape::Attention { shape: llama, parts: rope_freqs }, &[F32], PROMPT),
        Case::new(
            "attention qwen2",
            Shape::Attention { shape: attention(128, 14, 2, 64, neox(64)), parts: bias },
            &[Q5_0],
            SEVERAL,
        ),
        Case::new(
            "attention qwen3",
            Shape::Attention { shape: attention(256, 8, 2, 128, neox(128)), parts: qk_norm },
            &[Q6_K],
            SEVERAL,
        )
        .bf16(),
        Case::new("attention linear scaling", plain(attention(64, 2, 2, 32, linear)), &[F32], PROMPT),
        Case::new("attention yarn", plain(attention(64, 2, 1, 32, yarn)), &[F32], PROMPT),
        Case::new("attention sections", plain(attention(64, 2, 1, 16, sections)), &[BF16], PROMPT),
        Case::new("attention awkward", attention_gated(256, 4, 2, 64), &[Q4_K, Q8_0, Q6_K], SEVERAL).awkward(),
        Case::new("attention long", attention_gated(64, 4, 2, 32), &[Q8_0], LONG),
        Case::new("attention long bf16 kv", attention_gated(64, 8, 2, 64), &[F32], LONG).bf16(),
        Case::new("attention 0.8B", attention_gated(1024, 8, 2, 256), &[Q4_K, Q4_K, Q6_K], PROMPT).bf16(),
        Case::new("attention 0.8B f32 kv", attention_gated(1024, 8, 2, 256), &[Q8_0], SEVERAL),
        Case::new("attention groups of 4", attention_gated(256, 16, 4, 256), &[Q5_K], SEVERAL).bf16(),
        Case::new("attention groups of 6", attention_gated(256, 24, 4, 256), &[Q4_K], SEVERAL).bf16(),
        Case::new("attention groups of 8", attention_gated(256, 16, 2, 256), &[Q4_K], PROMPT).bf16(),
        Case::new("attention groups of 16", attention_gated(256, 32, 2, 256), &[IQ4_XS], SEVERAL).bf16(),
    ]
}

fn cases_delta_net() -> Vec<Case> {
    use HeadOrder::{Grouped, Tiled};
    use TensorType::*;
    vec![
        Case::new("delta_net one head", delta_net(8, 1, 1, 4, Tiled), &[F32], DECODE),
        Case::new("delta_net odd", delta_net(37, 2, 6, 10, Tiled), &[F32], SEVERAL),
        Case::new("delta_net chunks", delta_net(32, 2, 4, 16, Tiled), &[F32], CHUNKS),
        Case::new("delta_net grouped", delta_net(32, 2, 6, 8, Grouped), &[F16], CHUNKS),
        Case::new("delta_net grouped several", delta_net(64, 4, 8, 32, Grouped), &[Q8_0], SEVERAL),
        Case::new("delta_net S 64", delta_net(64, 2, 4, 64, Tiled), &[Q5_1], SEVERAL),
        Case::new("delta_net awkward", delta_net(256, 2, 4, 64, Tiled), &[Q4_K, Q6_K, Q8_0], SEVERAL).awkward(),
        Case::new("delta_net 0.8B", delta_net(1024, 16, 16, 128, Tiled), &[Q6_K, Q4_K], SEVERAL),
        Case::new("delta_net 0.8B prompt", delta_net(1024, 16, 16, 128, Tiled), &[Q8_0], PROMPT),
        Case::new("delta_net ratio 2", delta_net(256, 16, 32, 128, Tiled), &[Q4_K], PROMPT),
        Case::new("delta_net ratio 3", delta_net(256, 16, 48, 128, Tiled), &[Q5_K], SEVERAL),
        Case::new("delta_net ratio 4", delta_net(256, 16, 64, 128, Tiled), &[F32], &[&[(0, 129)], &[(0, 1)]]),
    ]
}

fn cases_ffn() -> Vec<Case> {
    use TensorType::*;
    let of_type = |ty: &TensorType| Case::new(&format!("ffn {ty}"), ffn(512, 768), &[*ty], SEVERAL);
    let mut cases: Vec<Case> = TYPES.iter().map(of_type).collect();
    cases.extend([
        Case::new("ffn 1", ffn(1, 1), &[F32], DECODE),
        Case::new("ffn odd f32", ffn(37, 41), &[F32], SEVERAL),
        Case::new("ffn odd f16", ffn(37, 41), &[F16], SEVERAL),
        Case::new("ffn odd rows", ffn(32, 96), &[Q4_0, Q8_0, Q5_1], PROMPT),
        Case::new("ffn floats and codes", ffn(256, 96), &[F16, Q4_K, Q8_0], SEVERAL),
        Case::new("ffn K tails", ffn(256, 544), &[Q4_K, Q5_K, Q6_K], SEVERAL),
        Case::new("ffn awkward", ffn(256, 512), &[Q4_K, Q6_K, Q8_0], SEVERAL).awkward(),
        Case::new("ffn 0.8B", ffn(1024, 3584), &[Q4_K, Q4_K, Q6_K], PROMPT),
        Case::new("ffn 0.8B decode", ffn(1024, 3584), &[Q8_0], DECODE),
        Case::new("ffn wide", ffn(5120, 256), &[Q4_K], SEVERAL),
    ]);
    cases
}

fn cases_moe() -> Vec<Case> {
    use TensorType::*;
    let of_type = |ty: &TensorType| Case::new(&format!("moe {ty}"), moe(256, 5, 2, 256, 256), &[*ty], SEVERAL);
    let mut cases: Vec<Case> = TYPES.iter().map(of_type).collect();
    cases.extend([
        Case::new("moe one expert", moe(32, 1, 1, 32, 0), &[F32], DECODE),
        Case::new("moe odd", moe(37, 7, 3, 41, 11), &[F32], SEVERAL),
        Case::new("moe no shared", moe(64, 13, 4, 96, 0), &[Q8_0], PROMPT),
        Case::new("moe awkward", moe(256, 6, 2, 256, 64), &[Q4_K, Q6_K], SEVERAL).awkward(),
        Case::new("moe token by token", moe(256, 6, 3, 352, 96), &[Q8_0], DECODE),
        Case::new("moe 256 of 8", moe(256, 256, 8, 32, 32), &[Q4_0], SEVERAL),
        Case::new("moe 512 of 10", moe(64, 512, 10, 32, 32), &[Q8_0], DECODE),
        Case::new("moe 35B", moe(2048, 12, 8, 512, 512), &[Q4_K, Q4_K, Q6_K], SEVERAL),
    ]);
    cases
}

fn cases_head() -> Vec<Case> {
    use TensorType::*;
    let of_type = |ty: &TensorType| Case::new(&format!("head {ty}"), head(512, 131), &[*ty], SEVERAL);
    let mut cases: Vec<Case> = TYPES.iter().map(of_type).collect();
    cases.extend([
        Case::new("head one token", head(32, 1), &[Q8_0], DECODE),
        Case::new("head odd", head(37, 67), &[F32], SEVERAL),
        Case::new("head awkward", head(256, 67), &[Q6_K], SEVERAL).awkward(),
        Case::new("head 0.8B", head(1024, 4099), &[Q6_K], PROMPT),
        Case::new("head 0.8B token by token", head(1024, 4099), &[Q6_K], DECODE),
    ]);
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::relative_rms_of_rows;

    /// Names tell the cases apart; every batch is sound; every kind of block has cases.
    #[test]
    fn cases_are_sound() {
        let cases = cases();
        let mut names: Vec<_> = cases.iter().map(|c| c.name.clone()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), cases.len(), "names repeat");
        for case in &cases {
            for (batch, x) in case.inputs() {
                batch.check(case.n_slots, 1024, case.n_vocab()).unwrap_or_else(|e| panic!("{}: {e}", case.name));
                assert_eq!(x.len(), batch.tokens.len() * case.n_embd(), "{}", case.name);
            }
        }
    }

    /// The two forms of the delta rule agree, whatever the chunks, on every delta-net case.
    #[test]
    fn chunked_delta_rule_equals_recurrent() {
        for case in cases_delta_net().iter().filter(|c| c.n_embd() <= 64) {
            let (block, source) = case.block();
            let inputs = case.inputs();
            let expected = case.expected(&block, &source, &inputs);
            for chunk in [1, 7, 64] {
                let form = DeltaForm::Chunked(chunk);
                let mut reference = BlockReference::new(&block, &source, case.n_slots, case.kv_dtype, form);
                for ((batch, before), want) in inputs.iter().zip(&expected) {
                    let mut x: Vec<f64> = before.iter().map(|x| f64::from(*x)).collect();
                    reference.run(batch, &mut x);
                    let got: Vec<f32> = x.iter().zip(before).map(|(x, b)| (x - f64::from(*b)) as f32).collect();
                    let error = relative_rms_of_rows(&got, want, case.n_embd());
                    assert!(error < 1e-7, "{}, chunks of {chunk}: {error:e}", case.name);
                }
            }
        }
    }

    /// Every case has a finite result of order 1: not all zero, nothing that drowns the rest.
    #[test]
    fn expected_results_are_of_order_one() {
        for case in cases().iter().filter(|c| c.n_embd() <= 256) {
            let (block, source) = case.block();
            let inputs = case.inputs();
            for y in case.expected(&block, &source, &inputs) {
                let rms = (y.iter().map(|y| y * y).sum::<f64>() / y.len() as f64).sqrt();
                assert!((1e-3..1e2).contains(&rms), "{}: rms {rms}", case.name);
            }
        }
    }
}

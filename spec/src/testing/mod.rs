//! What the tests and benches of every backend share: seeded noise, random valid blocks of every tensor
//! type, random blocks of a model, the table of [`cases`], the released [`shapes`], poisoned outputs, and errors in
//! which NaN is a failure. Nothing here is used by a run.

mod cases;
pub mod shapes;

pub use cases::{Case, Shape, cases};

use crate::{
    Attention, AttentionShape, DeltaNet, DeltaNetShape, Embed, Ffn, FfnShape, Head, HeadShape, Linear, Moe, MoeShape,
    SharedExpert, Tensor, TensorSource, TensorType, Weight,
};

/// A seeded generator (SplitMix64, Steele et al. 2014): the same seed gives the same noise everywhere.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator that starts at `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Uniform in `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next_u64() % n as u64) as usize
    }

    /// Uniform in `[low, high)`.
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Normal with mean 0 and standard deviation 1 (Box-Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform(0.0, 1.0)).ln()).sqrt();
        radius * self.uniform(0.0, std::f64::consts::TAU).cos()
    }

    /// `n` normal values with standard deviation `std`.
    pub fn normals(&mut self, n: usize, std: f64) -> Vec<f32> {
        (0..n).map(|_| (self.normal() * std) as f32).collect()
    }

    /// `n` random bytes.
    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..n.div_ceil(8)).flat_map(|_| self.next_u64().to_le_bytes()).collect();
        bytes.truncate(n);
        bytes
    }
}

/// How random codes of a type are spread when the scale is 1.
struct Spread {
    /// Byte offset of the half that scales the block.
    d: usize,
    /// Byte offset of the half for the minimum (or the added constant), and the factor of `d` to store there
    /// so that the values have mean 0.
    min: Option<(usize, f64)>,
    /// Standard deviation of the values for `d = 1` and random bits in every other field.
    std: f64,
}

fn spread(ty: TensorType) -> Spread {
    let spread = |d, min, std| Spread { d, min, std };
    match ty {
        TensorType::Q4_0 => spread(0, None, 4.64),
        TensorType::Q4_1 => spread(0, Some((2, -7.5)), 4.61),
        TensorType::Q5_0 => spread(0, None, 9.25),
        TensorType::Q5_1 => spread(0, Some((2, -15.5)), 9.23),
        TensorType::Q8_0 => spread(0, None, 73.9),
        TensorType::Q2_K => spread(80, Some((82, 1.5)), 13.87),
        TensorType::Q3_K => spread(108, None, 43.35),
        TensorType::Q4_K => spread(0, Some((2, 7.5)), 258.3),
        TensorType::Q5_K => spread(0, Some((2, 15.5)), 526.9),
        TensorType::Q6_K => spread(208, None, 1366.0),
        TensorType::IQ4_NL => spread(0, None, 67.44),
        TensorType::IQ4_XS => spread(0, None, 1246.0),
        _ => unreachable!("{ty} has no half as scale"),
    }
}

/// Valid blocks for `n` values with mean about 0 and standard deviation about `std`: every code, sub-block
/// scale and minimum is random bits, every block has a scale of its own with a random sign, so that a kernel
/// that mixes up codes, scales or blocks is found out.
///
/// # Panics
/// If the type is not supported or `n` is not a whole number of blocks.
pub fn random_blocks(ty: TensorType, n: usize, std: f64, rng: &mut Rng) -> Vec<u8> {
    let n_bytes = ty.row_bytes(n).expect("a whole number of blocks");
    let mut bytes = match ty {
        TensorType::F32 => return (0..n).flat_map(|_| ((rng.normal() * std) as f32).to_le_bytes()).collect(),
        TensorType::F16 => {
            return (0..n).flat_map(|_| half::f16::from_f64(rng.normal() * std).to_le_bytes()).collect();
        }
        TensorType::BF16 => {
            return (0..n).flat_map(|_| half::bf16::from_f64(rng.normal() * std).to_le_bytes()).collect();
        }
        _ => rng.bytes(n_bytes),
    };
    for block in bytes.chunks_exact_mut(ty.row().block_bytes) {
        if ty == TensorType::MXFP4 {
            // Powers of two: one of two neighbours, whose mean square is about right.
            let exponent = (std / 5.85).log2() + rng.uniform(-0.6, 0.6);
            block[0] = (exponent.round() + 128.0) as u8;
            continue;
        }
        let spread = spread(ty);
        let sign = if rng.below(2) == 0 { 1.0 } else { -1.0 };
        let d = sign * std / spread.std * rng.uniform(0.5, 1.4);
        block[spread.d..spread.d + 2].copy_from_slice(&half::f16::from_f64(d).to_le_bytes());
        if let Some((at, factor)) = spread.min {
            block[at..at + 2].copy_from_slice(&half::f16::from_f64(d * factor).to_le_bytes());
        }
    }
    bytes
}

/// The tensors of a file that does not exist: owned buffers as a [`TensorSource`].
#[derive(Default)]
pub struct Buffers {
    tensors: Vec<(Tensor, Vec<u8>)>,
}

impl Buffers {
    /// Adds a tensor of shape `ne` (ggml order) and returns all its rows.
    ///
    /// # Panics
    /// If the number of bytes is not that of the shape.
    pub fn add(&mut self, name: &str, ty: TensorType, ne: &[usize], bytes: Vec<u8>) -> Weight {
        let tensor = Tensor { name: name.into(), ty, ne: ne.to_vec() };
        assert_eq!(tensor.n_bytes(), bytes.len(), "bytes of {name}");
        let weight = Weight::whole(self.tensors.len(), &tensor);
        self.tensors.push((tensor, bytes));
        weight
    }
}

impl TensorSource for Buffers {
    fn bytes(&self, tensor: usize) -> &[u8] {
        &self.tensors[tensor].1
    }
}

/// Optional parts of an attention block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttentionParts {
    /// `attn_q_norm` and `attn_k_norm`.
    pub qk_norm: bool,
    /// Biases on q, k and v.
    pub bias: bool,
    /// `rope_freqs`.
    pub rope_freqs: bool,
}

/// Makes random blocks of a model. Norm weights lie around 1 and matrices have standard deviation
/// `1 / sqrt(n_in)`, so that activations stay of order 1.
pub struct Maker {
    /// Where the tensors go.
    pub source: Buffers,
    /// The noise.
    pub rng: Rng,
    /// Types of the matrices, taken in turn.
    types: Vec<TensorType>,
    /// Matrices so far.
    n_matrices: usize,
    /// Store matrices with companion scales, and as two row ranges of a larger tensor in reverse order.
    pub awkward: bool,
}

impl Maker {
    /// A maker whose matrices take `types` in turn.
    pub fn new(seed: u64, types: &[TensorType]) -> Self {
        assert!(!types.is_empty(), "at least one type");
        let (source, rng) = (Buffers::default(), Rng::new(seed));
        Self { source, rng, types: types.to_vec(), n_matrices: 0, awkward: false }
    }

    /// A vector of `n` f32 around `mean`.
    pub fn vector(&mut self, name: &str, n: usize, mean: f64, std: f64) -> Weight {
        let values = (0..n).flat_map(|_| ((mean + std * self.rng.normal()) as f32).to_le_bytes()).collect();
        self.source.add(name, TensorType::F32, &[n], values)
    }

    /// A vector of `n` f32 uniform in `[low, high)`.
    fn vector_uniform(&mut self, name: &str, n: usize, low: f64, high: f64) -> Weight {
        let values = (0..n).flat_map(|_| (self.rng.uniform(low, high) as f32).to_le_bytes()).collect();
        self.source.add(name, TensorType::F32, &[n], values)
    }

    /// A matrix `[n_rows, n_cols]` of the next type, or, where `n_cols` is no whole number of its blocks, of
    /// Q8_0, or F16.
    pub fn matrix(&mut self, name: &str, n_rows: usize, n_cols: usize) -> Weight {
        let ty = self.types[self.n_matrices % self.types.len()];
        self.n_matrices += 1;
        let fits = |ty: &TensorType| ty.row_bytes(n_cols).is_some();
        let ty = [ty, TensorType::Q8_0, TensorType::F16].into_iter().find(fits).expect("F16 fits every width");
        let n_unused = if self.awkward { 3 } else { 0 };
        let std = 1.0 / (n_cols as f64).sqrt();
        let bytes = random_blocks(ty, (n_rows + n_unused) * n_cols, std, &mut self.rng);
        let weight = self.source.add(name, ty, &[n_cols, n_rows + n_unused], bytes);
        if !self.awkward {
            return weight;
        }
        let cut = n_rows / 3;
        weight.with_rows([cut + n_unused..n_rows + n_unused, 0..cut])
    }

    /// A projection of `n_stacked` matrices `[n_out, n_in]` in a row, perhaps with a bias.
    fn projection(&mut self, name: &str, n_stacked: usize, n_out: usize, n_in: usize, bias: bool) -> Linear<Weight> {
        let weight = self.matrix(&format!("{name}.weight"), n_stacked * n_out, n_in);
        let scale = self.awkward.then(|| self.vector(&format!("{name}.scale"), n_stacked, 1.0, 0.3));
        let bias = bias.then(|| self.vector(&format!("{name}.bias"), n_out, 0.0, 0.5));
        Linear { weight, scale, bias }
    }

    /// A projection `[n_out, n_in]`.
    pub fn linear(&mut self, name: &str, n_out: usize, n_in: usize) -> Linear<Weight> {
        self.projection(name, 1, n_out, n_in, false)
    }

    /// An embedding.
    pub fn embed(&mut self, n_vocab: usize, n_embd: usize) -> Embed<Weight> {
        Embed { n_embd, n_vocab, token_embd: self.matrix("token_embd.weight", n_vocab, n_embd) }
    }

    /// An attention block.
    pub fn attention(&mut self, layer: usize, shape: &AttentionShape, parts: AttentionParts) -> Attention<Weight> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let (n_embd, head_dim) = (shape.n_embd, shape.head_dim);
        let (q, kv) = (shape.n_heads * head_dim, shape.n_kv_heads * head_dim);
        let q_rows = if shape.gated { 2 * q } else { q };
        Attention {
            layer,
            shape: shape.clone(),
            attn_norm: self.vector(&name("attn_norm.weight"), n_embd, 1.0, 0.2),
            attn_q: self.projection(&name("attn_q"), 1, q_rows, n_embd, parts.bias),
            attn_k: self.projection(&name("attn_k"), 1, kv, n_embd, parts.bias),
            attn_v: self.projection(&name("attn_v"), 1, kv, n_embd, parts.bias),
            attn_q_norm: parts.qk_norm.then(|| self.vector(&name("attn_q_norm.weight"), head_dim, 1.5, 0.3)),
            attn_k_norm: parts.qk_norm.then(|| self.vector(&name("attn_k_norm.weight"), head_dim, 1.5, 0.3)),
            rope_freqs: parts
                .rope_freqs
                .then(|| self.vector_uniform("rope_freqs.weight", shape.rope.n_rot / 2, 1.0, 8.0)),
            attn_output: self.linear(&name("attn_output"), n_embd, q),
        }
    }

    /// A gated-delta-net block.
    pub fn delta_net(&mut self, layer: usize, shape: &DeltaNetShape) -> DeltaNet<Weight> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let (n_embd, n_v_heads) = (shape.n_embd, shape.n_v_heads);
        let taps = self.rng.normals(shape.n_channels() * shape.conv_kernel, 0.5);
        let taps = taps.iter().flat_map(|x| x.to_le_bytes()).collect();
        let taps_ne = [shape.conv_kernel, shape.n_channels()];
        DeltaNet {
            layer,
            shape: shape.clone(),
            attn_norm: self.vector(&name("attn_norm.weight"), n_embd, 1.0, 0.2),
            attn_qkv: self.linear(&name("attn_qkv"), shape.n_channels(), n_embd),
            attn_gate: self.linear(&name("attn_gate"), shape.n_value(), n_embd),
            ssm_conv1d: self.source.add(&name("ssm_conv1d.weight"), TensorType::F32, &taps_ne, taps),
            // Decays exp(g) from about 0.5 to 0.999, as in trained models.
            ssm_dt: self.vector(&name("ssm_dt.bias"), n_v_heads, -3.0, 1.0),
            ssm_a: self.vector_uniform(&name("ssm_a"), n_v_heads, -4.0, -0.05),
            ssm_beta: self.linear(&name("ssm_beta"), n_v_heads, n_embd),
            ssm_alpha: self.linear(&name("ssm_alpha"), n_v_heads, n_embd),
            ssm_norm: self.vector(&name("ssm_norm.weight"), shape.head_dim, 1.0, 0.2),
            ssm_out: self.linear(&name("ssm_out"), n_embd, shape.n_value()),
        }
    }

    /// A dense feed-forward block.
    pub fn ffn(&mut self, layer: usize, shape: &FfnShape) -> Ffn<Weight> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        Ffn {
            layer,
            shape: shape.clone(),
            ffn_norm: self.vector(&name("ffn_norm.weight"), shape.n_embd, 1.0, 0.2),
            ffn_gate: self.linear(&name("ffn_gate"), shape.n_ff, shape.n_embd),
            ffn_up: self.linear(&name("ffn_up"), shape.n_ff, shape.n_embd),
            ffn_down: self.linear(&name("ffn_down"), shape.n_embd, shape.n_ff),
        }
    }

    /// A mixture-of-experts block; with a shared expert (and its gate) if `n_ff_shared` is not 0.
    pub fn moe(&mut self, layer: usize, shape: &MoeShape) -> Moe<Weight> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let (n_embd, n_experts, n_ff) = (shape.n_embd, shape.n_experts, shape.n_ff);
        let router = random_blocks(TensorType::F32, n_experts * n_embd, 1.0 / (n_embd as f64).sqrt(), &mut self.rng);
        let shared = (shape.n_ff_shared > 0).then(|| SharedExpert {
            ffn_gate_inp_shexp: Some(self.vector(
                &name("ffn_gate_inp_shexp.weight"),
                n_embd,
                0.0,
                1.0 / (n_embd as f64).sqrt(),
            )),
            ffn_gate_shexp: self.linear(&name("ffn_gate_shexp"), shape.n_ff_shared, n_embd),
            ffn_up_shexp: self.linear(&name("ffn_up_shexp"), shape.n_ff_shared, n_embd),
            ffn_down_shexp: self.linear(&name("ffn_down_shexp"), n_embd, shape.n_ff_shared),
        });
        Moe {
            layer,
            shape: shape.clone(),
            experts: 0..n_experts,
            ffn_norm: self.vector(&name("ffn_norm.weight"), n_embd, 1.0, 0.2),
            ffn_gate_inp: self.source.add(&name("ffn_gate_inp.weight"), TensorType::F32, &[n_embd, n_experts], router),
            ffn_gate_exps: self.projection(&name("ffn_gate_exps"), n_experts, n_ff, n_embd, false),
            ffn_up_exps: self.projection(&name("ffn_up_exps"), n_experts, n_ff, n_embd, false),
            ffn_down_exps: self.projection(&name("ffn_down_exps"), n_experts, n_embd, n_ff, false),
            shared,
        }
    }

    /// An output head.
    pub fn head(&mut self, shape: &HeadShape) -> Head<Weight> {
        Head {
            shape: shape.clone(),
            output_norm: self.vector("output_norm.weight", shape.n_embd, 1.0, 0.2),
            output: self.linear("output", shape.n_vocab, shape.n_embd),
        }
    }
}

/// `sqrt(sum (got - want)^2 / sum want^2)`: the normalised error of a result. Infinite if the lengths differ
/// or any value is not finite, so that `error <= bound` fails.
pub fn relative_rms(got: &[f32], want: &[f64]) -> f64 {
    if got.len() != want.len() || got.iter().any(|x| !x.is_finite()) {
        return f64::INFINITY;
    }
    let square = |x: f64| x * x;
    let error: f64 = got.iter().zip(want).map(|(g, w)| square(f64::from(*g) - w)).sum();
    let norm: f64 = want.iter().map(|w| square(*w)).sum();
    if error == 0.0 { 0.0 } else { (error / norm).sqrt() }
}

/// The largest [`relative_rms`] of any row of `n_cols` values: one wrong row in many does not average away.
pub fn relative_rms_of_rows(got: &[f32], want: &[f64], n_cols: usize) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    got.chunks(n_cols).zip(want.chunks(n_cols)).map(|(g, w)| relative_rms(g, w)).fold(0.0, f64::max)
}

/// The largest `|got - want|`; infinite if the lengths differ or any value is not finite.
pub fn max_abs(got: &[f32], want: &[f64]) -> f64 {
    if got.len() != want.len() || got.iter().any(|x| !x.is_finite()) {
        return f64::INFINITY;
    }
    got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).abs()).fold(0.0, f64::max)
}

/// An output of `n` values, all NaN at first, with guard values behind it.
pub struct Poisoned {
    values: Vec<f32>,
    n: usize,
}

/// Values after the output that a kernel must not touch: more than the widest vector store.
const N_GUARD: usize = 64;
/// A NaN that no computation produces.
const GUARD: u32 = 0x7fa5_5a5a;

impl Poisoned {
    /// An output of `n` values.
    pub fn new(n: usize) -> Self {
        Self { values: vec![f32::from_bits(GUARD); n + N_GUARD], n }
    }

    /// The output to write.
    pub fn out(&mut self) -> &mut [f32] {
        &mut self.values[..self.n]
    }

    /// The values written.
    ///
    /// # Panics
    /// If something was written behind the output, or some value was not written.
    pub fn checked(&self) -> &[f32] {
        let (out, guard) = self.values.split_at(self.n);
        let touched = guard.iter().position(|x| x.to_bits() != GUARD);
        assert_eq!(touched, None, "written behind an output of {} values", self.n);
        let missing = out.iter().position(|x| x.to_bits() == GUARD);
        assert_eq!(missing, None, "value not written in an output of {}", self.n);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor_type::TYPES;

    /// Random blocks of every supported type: finite, mean about 0, the standard deviation asked for.
    #[test]
    fn random_blocks_have_the_wanted_spread() {
        for ty in TYPES.iter().filter(|row| row.decode.is_some()).map(|row| row.ty) {
            let n = 256 * 256;
            let mut values = vec![f32::NAN; n];
            ty.decode(&random_blocks(ty, n, 0.03, &mut Rng::new(7)), &mut values);
            let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / n as f64;
            let std = (values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n as f64).sqrt();
            // The scales of MXFP4 are powers of two.
            let bound = if ty == TensorType::MXFP4 { 0.01 } else { 0.002 };
            assert!((std - 0.03).abs() < bound, "{ty}: standard deviation {std}");
            assert!(mean.abs() < 0.003, "{ty}: mean {mean}");
        }
    }

    #[test]
    fn nan_and_wrong_lengths_are_failures() {
        assert_eq!(relative_rms(&[1.0, 2.0], &[1.0, 2.0]), 0.0);
        assert_eq!(relative_rms(&[1.0, f32::NAN], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(relative_rms(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(relative_rms(&[1.0], &[0.0]), f64::INFINITY);
        assert_eq!(relative_rms_of_rows(&[1e9, 0.0, 1.0, 0.0], &[1e9, 0.0, 2.0, 0.0], 2), 0.5);
        assert_eq!(max_abs(&[f32::NAN], &[0.0]), f64::INFINITY);
    }

    #[test]
    #[should_panic(expected = "written behind an output")]
    fn guards_see_an_overrun() {
        let mut poisoned = Poisoned::new(3);
        poisoned.out().fill(1.0);
        poisoned.values[3] = 0.0;
        poisoned.checked();
    }

    #[test]
    #[should_panic(expected = "value not written")]
    fn poison_sees_a_missing_value() {
        let mut poisoned = Poisoned::new(3);
        poisoned.out()[..2].fill(1.0);
        poisoned.checked();
    }
}

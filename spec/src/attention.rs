//! `Attention`: `x += attn_output . (softmax(q k^T / sqrt(D)) v [* sigmoid(gate)])` on `rms(x, attn_norm)`,
//! with optional q/k norms, rotary embedding and a KV cache.

use crate::{Linear, Matrix, Sequence, math};

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// 4 bytes an element.
    F32,
    /// 2 bytes an element, rounded to nearest even.
    Bf16,
}

impl KvDtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::Bf16 => 2,
        }
    }
}

/// Which elements of a head form a rotated pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub enum RopeStyle {
    /// `(x[j], x[j + n_rot/2])`.
    Neox,
    /// `(x[2j], x[2j + 1])` (llama).
    Adjacent,
}

/// Context extension.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub enum RopeScaling {
    /// Frequencies as they are.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// Extension factor.
        factor: f64,
    },
    /// YaRN (Peng et al. 2023): interpolation ramp between 32 and 1 turns over `original` positions,
    /// cos and sin multiplied by `1 + 0.1 ln factor`.
    Yarn {
        /// Extension factor.
        factor: f64,
        /// Context length before extension.
        original: usize,
    },
}

/// Rotary embedding of the first `n_rot` elements of each head.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Rope {
    /// Rotated elements per head: even, at most the head width.
    pub n_rot: usize,
    /// Base of the frequencies `base^(-2j / n_rot)`.
    pub base: f64,
    /// Pairing.
    pub style: RopeStyle,
    /// Context extension.
    pub scaling: RopeScaling,
    /// Pairs `j` that are not rotated at all (multi-axis sections that text does not reach);
    /// empty, or `[n_rot / 2]` with `true` for a pair that turns.
    pub rotated_pairs: Vec<bool>,
}

impl Rope {
    /// Angle per position of each pair `[n_rot / 2]` (0 for a pair that does not turn) and the
    /// factor on cos and sin. `divisors` is `rope_freqs` `[n_rot / 2]`, where the model has it.
    pub fn frequencies(&self, divisors: Option<&[f32]>) -> (Vec<f64>, f64) {
        let half = self.n_rot / 2;
        let mut freq: Vec<f64> = (0..half).map(|j| self.base.powf(-2.0 * j as f64 / self.n_rot as f64)).collect();
        if let Some(d) = divisors {
            freq.iter_mut().zip(d).for_each(|(f, d)| *f /= f64::from(*d));
        }
        let mut magnitude = 1.0;
        match self.scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => freq.iter_mut().for_each(|f| *f /= factor),
            RopeScaling::Yarn { factor, original } => {
                let pair_of = |turns: f64| {
                    self.n_rot as f64 * (original as f64 / (turns * 2.0 * std::f64::consts::PI)).ln()
                        / (2.0 * self.base.ln())
                };
                let low = pair_of(32.0).floor().max(0.0);
                let high = pair_of(1.0).ceil().min(self.n_rot as f64 - 1.0);
                for (j, f) in freq.iter_mut().enumerate() {
                    let keep = 1.0 - ((j as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                    *f *= keep + (1.0 - keep) / factor;
                }
                magnitude = 1.0 + 0.1 * factor.ln();
            }
        }
        for (f, turns) in freq.iter_mut().zip(&self.rotated_pairs) {
            if !turns {
                *f = 0.0;
            }
        }
        (freq, magnitude)
    }
}

/// Shape of an attention block.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct AttentionShape {
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads; divides `n_heads`. Query head `h` reads KV head `h / (n_heads / n_kv_heads)`.
    pub n_kv_heads: usize,
    /// Width of a head, the same for queries, keys and values.
    pub head_dim: usize,
    /// Whether `attn_q` holds a gate beside each query head.
    pub gated: bool,
    /// Epsilon of the norms.
    pub rms_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
}

impl AttentionShape {
    /// Bytes of keys and values of one token in this layer.
    pub fn kv_bytes_per_token(&self, dtype: KvDtype) -> usize {
        2 * self.n_kv_heads * self.head_dim * dtype.bytes()
    }
}

/// An attention block.
#[derive(Clone, Debug)]
pub struct Attention<W> {
    /// Layer number, as in `blk.{layer}`.
    pub layer: usize,
    /// Sizes.
    pub shape: AttentionShape,
    /// `[n_embd]` f32.
    pub attn_norm: W,
    /// `[n_heads * head_dim, n_embd]`; gated: per head `head_dim` query rows, then `head_dim` gate rows.
    pub attn_q: Linear<W>,
    /// `[n_kv_heads * head_dim, n_embd]`.
    pub attn_k: Linear<W>,
    /// `[n_kv_heads * head_dim, n_embd]`.
    pub attn_v: Linear<W>,
    /// `[head_dim]` f32: RMS norm of each query head before the rotation.
    pub attn_q_norm: Option<W>,
    /// `[head_dim]` f32.
    pub attn_k_norm: Option<W>,
    /// `[n_rot / 2]` f32: divisors of the rotary frequencies (llama 3).
    pub rope_freqs: Option<W>,
    /// `[n_embd, n_heads * head_dim]`.
    pub attn_output: Linear<W>,
}

impl<W> Attention<W> {
    /// The same block with every weight replaced by `f` of it.
    pub fn try_map<U, E>(&self, f: &mut dyn FnMut(&W) -> Result<U, E>) -> Result<Attention<U>, E> {
        Ok(Attention {
            layer: self.layer,
            shape: self.shape.clone(),
            attn_norm: f(&self.attn_norm)?,
            attn_q: self.attn_q.try_map(f)?,
            attn_k: self.attn_k.try_map(f)?,
            attn_v: self.attn_v.try_map(f)?,
            attn_q_norm: self.attn_q_norm.as_ref().map(&mut *f).transpose()?,
            attn_k_norm: self.attn_k_norm.as_ref().map(&mut *f).transpose()?,
            rope_freqs: self.rope_freqs.as_ref().map(&mut *f).transpose()?,
            attn_output: self.attn_output.try_map(f)?,
        })
    }
}

impl KvDtype {
    /// `x` as it is read back from a cache of this type.
    pub fn round(self, x: f64) -> f64 {
        match self {
            KvDtype::F32 => f64::from(x as f32),
            KvDtype::Bf16 => half::bf16::from_f32(x as f32).to_f64(),
        }
    }
}

/// Reference: keys and values of one slot.
#[derive(Clone, Debug, Default)]
pub struct AttentionState {
    /// Keys after norm and rotation `[n_past, n_kv_heads, head_dim]`, as read back from the cache.
    pub k: Vec<f64>,
    /// Values `[n_past, n_kv_heads, head_dim]`, as read back from the cache.
    pub v: Vec<f64>,
}

impl Rope {
    /// Reference: rotates the first `n_rot` elements of a head `[head_dim]` to `position`.
    pub fn rotate(&self, x: &mut [f64], position: usize, divisors: Option<&[f32]>) {
        let (frequencies, magnitude) = self.frequencies(divisors);
        for (j, frequency) in frequencies.iter().enumerate() {
            let (a, b) = match self.style {
                RopeStyle::Neox => (j, j + self.n_rot / 2),
                RopeStyle::Adjacent => (2 * j, 2 * j + 1),
            };
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            let (u, v) = (x[a], x[b]);
            x[a] = magnitude * (u * cos - v * sin);
            x[b] = magnitude * (u * sin + v * cos);
        }
    }
}

impl Attention<Matrix> {
    /// Reference: adds the block's output to `x` `[n_tokens, n_embd]`, whose rows are the runs of
    /// `sequences` one after the other. A run continues its slot of `states` at its position: rows of the
    /// cache from there on are forgotten.
    pub fn reference(&self, x: &mut [f64], sequences: &[Sequence], states: &mut [AttentionState], kv_dtype: KvDtype) {
        let mut rows = x.chunks_exact_mut(self.shape.n_embd);
        for run in sequences {
            let state = &mut states[run.slot];
            let n_past = run.position * self.shape.n_kv_heads * self.shape.head_dim;
            assert!(n_past <= state.k.len(), "slot {} has not seen position {}", run.slot, run.position);
            state.k.truncate(n_past);
            state.v.truncate(n_past);
            for (position, x) in (run.position..run.position + run.n_tokens).zip(&mut rows) {
                let y = self.reference_row(x, position, state, kv_dtype);
                math::add(x, &y);
            }
        }
    }

    /// The output of one row `x` `[n_embd]` at `position`, before the residual.
    fn reference_row(&self, x: &[f64], position: usize, state: &mut AttentionState, kv_dtype: KvDtype) -> Vec<f64> {
        let AttentionShape { n_heads, n_kv_heads, head_dim, gated, rms_eps, ref rope, .. } = self.shape;
        let divisors = self.rope_freqs.as_ref().map(|d| &d.values[..]);
        let norm_and_rotate = |x: &[f64], norm: &Option<Matrix>| {
            let mut x = norm.as_ref().map_or_else(|| x.to_vec(), |w| math::rms_norm(x, w, rms_eps));
            rope.rotate(&mut x, position, divisors);
            x
        };
        let h = math::rms_norm(x, &self.attn_norm, rms_eps);
        let q = self.attn_q.apply(&h);
        for k in self.attn_k.apply(&h).chunks_exact(head_dim) {
            state.k.extend(norm_and_rotate(k, &self.attn_k_norm).iter().map(|k| kv_dtype.round(*k)));
        }
        state.v.extend(self.attn_v.apply(&h).iter().map(|v| kv_dtype.round(*v)));

        let n_kv = n_kv_heads * head_dim;
        let mut output = Vec::with_capacity(n_heads * head_dim);
        for (head, q_and_gate) in q.chunks_exact(if gated { 2 * head_dim } else { head_dim }).enumerate() {
            let q = norm_and_rotate(&q_and_gate[..head_dim], &self.attn_q_norm);
            let at = head / (n_heads / n_kv_heads) * head_dim;
            let scale = 1.0 / (head_dim as f64).sqrt();
            let score = |k: &[f64]| scale * k[at..at + head_dim].iter().zip(&q).map(|(k, q)| k * q).sum::<f64>();
            let mut p: Vec<f64> = state.k.chunks_exact(n_kv).map(score).collect();
            math::softmax(&mut p);
            let mut o = vec![0.0; head_dim];
            for (p, v) in p.iter().zip(state.v.chunks_exact(n_kv)) {
                o.iter_mut().zip(&v[at..at + head_dim]).for_each(|(o, v)| *o += p * v);
            }
            if gated {
                let gate = &q_and_gate[head_dim..];
                o.iter_mut().zip(gate).for_each(|(o, g)| *o *= math::sigmoid(*g));
            }
            output.extend(o);
        }
        self.attn_output.apply(&output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frequencies under context extension, against the numbers of the oracle in `scripts/reference`.
    #[test]
    fn frequencies_are_those_of_the_oracle() {
        let yarn = |n_rot, base, original| Rope {
            n_rot,
            base,
            style: RopeStyle::Neox,
            scaling: RopeScaling::Yarn { factor: 4.0, original },
            rotated_pairs: Vec::new(),
        };
        let check = |rope: &Rope, divisors: Option<&[f32]>, want: &[(usize, f64)], want_magnitude: f64| {
            let (frequencies, magnitude) = rope.frequencies(divisors);
            assert_eq!(frequencies.len(), rope.n_rot / 2);
            assert!((magnitude - want_magnitude).abs() < 1e-12, "{magnitude}");
            for (j, want) in want {
                assert!((frequencies[*j] / want - 1.0).abs() < 1e-8, "pair {j}: {}, not {want}", frequencies[*j]);
            }
        };
        let want = [(0, 1.0), (1, 2.37170825e-1), (2, 5e-2), (3, 7.90569415e-3), (7, 7.90569415e-5)];
        check(&yarn(16, 1e4, 64), None, &want, 1.138629436111989);
        let want = [(8, 1.27813833e-2), (12, 8.15159711e-4), (16, 7.90569415e-5), (20, 1.05424126e-5)];
        check(&yarn(64, 1e7, 4096), None, &want, 1.138629436111989);

        let linear = Rope { scaling: RopeScaling::Linear { factor: 4.0 }, ..yarn(4, 1e4, 0) };
        check(&linear, Some(&[1.0, 5.0]), &[(0, 0.25), (1, 0.25 * 0.01 / 5.0)], 1.0);
        let sections = Rope { rotated_pairs: vec![false, true], ..linear };
        assert_eq!(sections.frequencies(None).0, [0.0, 0.0025]);
    }
}

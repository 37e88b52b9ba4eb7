//! `Attention`: `x += attn_output . (softmax(q k^T / sqrt(D)) v [* sigmoid(gate)])` on `rms(x, attn_norm)`,
//! with optional q/k norms, rotary embedding and a KV cache.

use crate::Linear;

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

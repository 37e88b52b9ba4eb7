//! `DeltaNet`: the gated delta rule (Yang et al. 2024, "Gated Delta Networks"). On `h = rms(x, attn_norm)`:
//! `u = attn_qkv . h`, `z = attn_gate . h`; causal depthwise convolution and SiLU over `u`; L2 norm of q
//! and k, `q /= sqrt(S)`; `beta = sigmoid(ssm_beta . h)`, `g = ssm_a * softplus(ssm_alpha . h + ssm_dt)`;
//! per V head `M = exp(g) M; d = beta (v - M^T k); M += k d^T; o = M^T q`; then
//! `x += ssm_out . (rms(o, ssm_norm) * silu(z))`.

use crate::Linear;

/// Which K head a V head uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub enum HeadOrder {
    /// V head `n` uses K head `n % n_k_heads` (qwen35, qwen35moe).
    Tiled,
    /// V head `n` uses K head `n / (n_v_heads / n_k_heads)` (qwen3next).
    Grouped,
}

/// Shape of a gated-delta-net block.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct DeltaNetShape {
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Heads of q and k.
    pub n_k_heads: usize,
    /// Heads of v, z, beta, alpha; a multiple of `n_k_heads`.
    pub n_v_heads: usize,
    /// Width of every head (S).
    pub head_dim: usize,
    /// Taps of the causal convolution.
    pub conv_kernel: usize,
    /// V head to K head.
    pub head_order: HeadOrder,
    /// Epsilon of the RMS norms and (inside the root, beside the sum) of the L2 norms.
    pub rms_eps: f32,
}

impl DeltaNetShape {
    /// Channels of the convolution: q, k and v.
    pub fn n_channels(&self) -> usize {
        (2 * self.n_k_heads + self.n_v_heads) * self.head_dim
    }

    /// Width of v, z and the output before `ssm_out`.
    pub fn n_value(&self) -> usize {
        self.n_v_heads * self.head_dim
    }

    /// K head that V head `n` uses.
    pub fn k_head(&self, n: usize) -> usize {
        match self.head_order {
            HeadOrder::Tiled => n % self.n_k_heads,
            HeadOrder::Grouped => n / (self.n_v_heads / self.n_k_heads),
        }
    }

    /// Elements of the recurrent state of one slot: `[n_v_heads, S, S]` f32.
    pub fn recurrent_len(&self) -> usize {
        self.n_v_heads * self.head_dim * self.head_dim
    }

    /// Elements of the convolution state of one slot: `[conv_kernel - 1, n_channels]` f32, oldest first.
    pub fn conv_len(&self) -> usize {
        (self.conv_kernel - 1) * self.n_channels()
    }

    /// Bytes of both states of one slot.
    pub fn state_bytes(&self) -> usize {
        4 * (self.recurrent_len() + self.conv_len())
    }
}

/// A gated-delta-net block.
#[derive(Clone, Debug)]
pub struct DeltaNet<W> {
    /// Layer number, as in `blk.{layer}`.
    pub layer: usize,
    /// Sizes.
    pub shape: DeltaNetShape,
    /// `[n_embd]` f32.
    pub attn_norm: W,
    /// `[n_channels, n_embd]`: all q heads, all k heads, all v heads.
    pub attn_qkv: Linear<W>,
    /// `[n_value, n_embd]`: z.
    pub attn_gate: Linear<W>,
    /// `[n_channels, conv_kernel]` f32; the last tap multiplies the current input.
    pub ssm_conv1d: W,
    /// `[n_v_heads]` f32, added to alpha (`ssm_dt.bias`).
    pub ssm_dt: W,
    /// `[n_v_heads]` f32, negative: `-exp(A_log)`.
    pub ssm_a: W,
    /// `[n_v_heads, n_embd]`.
    pub ssm_beta: Linear<W>,
    /// `[n_v_heads, n_embd]`.
    pub ssm_alpha: Linear<W>,
    /// `[head_dim]` f32, the same for all heads.
    pub ssm_norm: W,
    /// `[n_embd, n_value]`.
    pub ssm_out: Linear<W>,
}

impl<W> DeltaNet<W> {
    /// The same block with every weight replaced by `f` of it.
    pub fn try_map<U, E>(&self, f: &mut dyn FnMut(&W) -> Result<U, E>) -> Result<DeltaNet<U>, E> {
        Ok(DeltaNet {
            layer: self.layer,
            shape: self.shape.clone(),
            attn_norm: f(&self.attn_norm)?,
            attn_qkv: self.attn_qkv.try_map(f)?,
            attn_gate: self.attn_gate.try_map(f)?,
            ssm_conv1d: f(&self.ssm_conv1d)?,
            ssm_dt: f(&self.ssm_dt)?,
            ssm_a: f(&self.ssm_a)?,
            ssm_beta: self.ssm_beta.try_map(f)?,
            ssm_alpha: self.ssm_alpha.try_map(f)?,
            ssm_norm: f(&self.ssm_norm)?,
            ssm_out: self.ssm_out.try_map(f)?,
        })
    }
}

//! `DeltaNet`: the gated delta rule (Yang et al. 2024, "Gated Delta Networks"). On `h = rms(x, attn_norm)`:
//! `u = attn_qkv . h`, `z = attn_gate . h`; causal depthwise convolution and SiLU over `u`; L2 norm of q
//! and k, `q /= sqrt(S)`; `beta = sigmoid(ssm_beta . h)`, `g = ssm_a * softplus(ssm_alpha . h + ssm_dt)`;
//! per V head `M = exp(g) M; d = beta (v - M^T k); M += k d^T; o = M^T q`; then
//! `x += ssm_out . (rms(o, ssm_norm) * silu(z))`.

use crate::{Linear, Matrix, Sequence, math};

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

/// Reference: the states of one slot.
#[derive(Clone, Debug)]
pub struct DeltaNetState {
    /// Tokens seen.
    pub n_past: usize,
    /// The last inputs of the convolution `[conv_kernel - 1, n_channels]`, oldest first.
    pub conv: Vec<f64>,
    /// The matrices M `[n_v_heads, S of k, S of v]`.
    pub recurrent: Vec<f64>,
}

impl DeltaNetState {
    /// The state before the first token.
    pub fn new(shape: &DeltaNetShape) -> Self {
        Self { n_past: 0, conv: vec![0.0; shape.conv_len()], recurrent: vec![0.0; shape.recurrent_len()] }
    }
}

/// Reference: which of the two equal forms of the delta rule is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeltaForm {
    /// Token after token.
    Recurrent,
    /// Chunks of this many tokens in the WY form (Yang et al. 2024).
    Chunked(usize),
}

/// Inputs of the delta rule for one V head over the tokens of a run.
#[derive(Default)]
struct DeltaInputs {
    /// `[n_tokens, S]`, normalised and scaled.
    q: Vec<f64>,
    /// `[n_tokens, S]`, normalised.
    k: Vec<f64>,
    /// `[n_tokens, S]`.
    v: Vec<f64>,
    /// `[n_tokens]`: logarithm of the decay, at most 0.
    g: Vec<f64>,
    /// `[n_tokens]`.
    beta: Vec<f64>,
}

/// The delta rule on the state `m` `[S, S]` of one head; returns the outputs `[n_tokens, S]`.
fn delta_rule_recurrent(inputs: &DeltaInputs, m: &mut [f64], size: usize) -> Vec<f64> {
    let mut outputs = Vec::with_capacity(inputs.v.len());
    for t in 0..inputs.g.len() {
        let row = |x: &[f64]| x[t * size..(t + 1) * size].to_vec();
        let (q, k, v) = (row(&inputs.q), row(&inputs.k), row(&inputs.v));
        m.iter_mut().for_each(|m| *m *= inputs.g[t].exp());
        let read = transposed_product(m, &k);
        let d: Vec<f64> = v.iter().zip(&read).map(|(v, read)| inputs.beta[t] * (v - read)).collect();
        for (m, k) in m.chunks_exact_mut(size).zip(&k) {
            m.iter_mut().zip(&d).for_each(|(m, d)| *m += k * d);
        }
        outputs.extend(transposed_product(m, &q));
    }
    outputs
}

/// The same map by chunks. With `G` the running sum of `g` in the chunk and `Dec_ij = exp(G_i - G_j)` for
/// `j <= i`: `A_ij = beta_i (k_i . k_j) Dec_ij` for `j < i`; rows `d` of the update solve
/// `(I + A) D = diag(beta) (V - diag(exp G) K M)`; `O = diag(exp G) Q M + ((Q K^T) o Dec) D`;
/// `M' = exp(G_C) M + (diag(exp(G_C - G)) K)^T D`.
fn delta_rule_chunked(inputs: &DeltaInputs, m: &mut [f64], size: usize, chunk: usize) -> Vec<f64> {
    let mut outputs = Vec::with_capacity(inputs.v.len());
    let n_tokens = inputs.g.len();
    for start in (0..n_tokens).step_by(chunk) {
        let tokens = start..n_tokens.min(start + chunk);
        let row = |x: &[f64], t: usize| x[t * size..(t + 1) * size].to_vec();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let sums: Vec<f64> = tokens
            .clone()
            .scan(0.0, |sum, t| {
                *sum += inputs.g[t];
                Some(*sum)
            })
            .collect();
        let mut updates: Vec<Vec<f64>> = Vec::new();
        for (i, t) in tokens.clone().enumerate() {
            let (q, k, v, beta) = (row(&inputs.q, t), row(&inputs.k, t), row(&inputs.v, t), inputs.beta[t]);
            let read = transposed_product(m, &k);
            let mut d: Vec<f64> = v.iter().zip(&read).map(|(v, r)| beta * (v - sums[i].exp() * r)).collect();
            for (j, earlier) in updates.iter().enumerate() {
                let a = beta * dot(&k, &row(&inputs.k, start + j)) * (sums[i] - sums[j]).exp();
                d.iter_mut().zip(earlier).for_each(|(d, e)| *d -= a * e);
            }
            updates.push(d);
            let mut o: Vec<f64> = transposed_product(m, &q).iter().map(|o| sums[i].exp() * o).collect();
            for (j, d) in updates.iter().enumerate() {
                let score = dot(&q, &row(&inputs.k, start + j)) * (sums[i] - sums[j]).exp();
                o.iter_mut().zip(d).for_each(|(o, d)| *o += score * d);
            }
            outputs.extend(o);
        }
        let last = sums[sums.len() - 1];
        m.iter_mut().for_each(|m| *m *= last.exp());
        for ((t, d), sum) in tokens.zip(&updates).zip(&sums) {
            for (m, k) in m.chunks_exact_mut(size).zip(row(&inputs.k, t)) {
                m.iter_mut().zip(d).for_each(|(m, d)| *m += (last - sum).exp() * k * d);
            }
        }
    }
    outputs
}

/// `m^T x` for `m` `[S, S]`.
fn transposed_product(m: &[f64], x: &[f64]) -> Vec<f64> {
    let mut y = vec![0.0; x.len()];
    for (m, x) in m.chunks_exact(x.len()).zip(x) {
        y.iter_mut().zip(m).for_each(|(y, m)| *y += x * m);
    }
    y
}

impl DeltaNet<Matrix> {
    /// Reference: adds the block's output to `x` `[n_tokens, n_embd]`, whose rows are the runs of
    /// `sequences` one after the other. A run at position 0 starts its slot of `states` anew; any other
    /// must continue where the slot stands.
    pub fn reference(&self, x: &mut [f64], sequences: &[Sequence], states: &mut [DeltaNetState], form: DeltaForm) {
        let mut rest = x;
        for run in sequences {
            let x;
            (x, rest) = rest.split_at_mut(run.n_tokens * self.shape.n_embd);
            let state = &mut states[run.slot];
            if run.position == 0 {
                *state = DeltaNetState::new(&self.shape);
            }
            assert_eq!(state.n_past, run.position, "a recurrent state cannot move to another position");
            state.n_past += run.n_tokens;
            self.reference_run(x, state, form);
        }
    }

    /// One run `x` `[n_tokens, n_embd]`.
    fn reference_run(&self, x: &mut [f64], state: &mut DeltaNetState, form: DeltaForm) {
        let DeltaNetShape { n_embd, n_k_heads, n_v_heads, head_dim: size, rms_eps, .. } = self.shape;
        let mut heads: Vec<DeltaInputs> = (0..n_v_heads).map(|_| DeltaInputs::default()).collect();
        let mut gates = Vec::new();
        for x in x.chunks_exact(n_embd) {
            let h = math::rms_norm(x, &self.attn_norm, rms_eps);
            let c = self.convolve(self.attn_qkv.apply(&h), &mut state.conv);
            let (beta, alpha) = (self.ssm_beta.apply(&h), self.ssm_alpha.apply(&h));
            gates.push(self.attn_gate.apply(&h));
            let head_of = |first: usize, i: usize| c[(first + i) * size..(first + i + 1) * size].to_vec();
            for (n, head) in heads.iter_mut().enumerate() {
                let k_head = self.shape.k_head(n);
                let (mut q, mut k) = (head_of(0, k_head), head_of(n_k_heads, k_head));
                math::l2_norm(&mut q, rms_eps);
                math::l2_norm(&mut k, rms_eps);
                q.iter_mut().for_each(|q| *q /= (size as f64).sqrt());
                head.q.extend(q);
                head.k.extend(k);
                head.v.extend(head_of(2 * n_k_heads, n));
                head.beta.push(math::sigmoid(beta[n]));
                let step = math::softplus(alpha[n] + f64::from(self.ssm_dt.values[n]));
                head.g.push(f64::from(self.ssm_a.values[n]) * step);
            }
        }
        let states = state.recurrent.chunks_exact_mut(size * size);
        let outputs: Vec<Vec<f64>> = heads
            .iter()
            .zip(states)
            .map(|(head, m)| match form {
                DeltaForm::Recurrent => delta_rule_recurrent(head, m, size),
                DeltaForm::Chunked(chunk) => delta_rule_chunked(head, m, size, chunk),
            })
            .collect();
        for ((t, x), z) in x.chunks_exact_mut(n_embd).enumerate().zip(&gates) {
            let mut y = Vec::with_capacity(z.len());
            for o in &outputs {
                y.extend(math::rms_norm(&o[t * size..(t + 1) * size], &self.ssm_norm, rms_eps));
            }
            y.iter_mut().zip(z).for_each(|(y, z)| *y *= math::silu(*z));
            math::add(x, &self.ssm_out.apply(&y));
        }
    }

    /// Convolution and SiLU at one token with input `u` `[n_channels]`; moves the window `conv` on.
    fn convolve(&self, u: Vec<f64>, conv: &mut Vec<f64>) -> Vec<f64> {
        let n_channels = u.len();
        conv.extend(u);
        let output = (0..n_channels)
            .map(|channel| {
                let inputs = conv[channel..].iter().step_by(n_channels);
                let sum = self.ssm_conv1d.row(channel).iter().zip(inputs).map(|(w, u)| f64::from(*w) * u).sum();
                math::silu(sum)
            })
            .collect();
        conv.drain(..n_channels);
        output
    }
}

//! `DeltaNet`: the projections of the normed input are one space of rows, and the worker that made a channel runs the
//! convolution over it; one barrier; V heads are shared out, and each state is read and written once a step; one
//! barrier; output projection. A head's state is kept with a row per value element.
//!
//! Prompts take the recurrent step as well, row by row of the state: four rows stay in the first-level cache while
//! up to [`TOKENS`] tokens pass.

use crate::gemm::prefetch_behind;
use crate::norm::{gated_norm, rms_norm, scale};
use crate::pool::Worker;
use crate::projection::{Projection, for_each_run, read_ahead, vector};
use crate::simd::{self, Kernel, Simd, for_lanes, silu};
use crate::state::BlockState;
use crate::step::Step;
use crate::{Error, Isa};
use std::ops::Range;
use tandem_spec::{DeltaNet, DeltaNetShape, Sequence, TensorSource, Weight};

/// Tokens that pass while rows of a state stay in the cache.
const TOKENS: usize = 64;

/// Elements of a worker's tile: normed k and q of [`TOKENS`] tokens, and three numbers a token.
pub(crate) fn tile_len(shape: &DeltaNetShape) -> usize {
    TOKENS * (2 * shape.head_dim + 3)
}

/// A gated-delta-net block.
pub(crate) struct DeltaNetBlock {
    shape: DeltaNetShape,
    /// `[n_embd]`.
    attn_norm: Box<[f32]>,
    /// `[n_channels, n_embd]`.
    attn_qkv: Projection,
    /// `[n_value, n_embd]`.
    attn_gate: Projection,
    /// `[conv_kernel, n_channels]`, oldest first.
    ssm_conv1d: Box<[f32]>,
    /// `[n_v_heads]`.
    ssm_dt: Box<[f32]>,
    /// `[n_v_heads]`.
    ssm_a: Box<[f32]>,
    /// `[n_v_heads, n_embd]`.
    ssm_beta: Projection,
    /// `[n_v_heads, n_embd]`.
    ssm_alpha: Projection,
    /// `[head_dim]`.
    ssm_norm: Box<[f32]>,
    /// `[n_embd, n_value]`.
    ssm_out: Projection,
}

impl DeltaNetBlock {
    /// Packs the weights of `block`. Convolutions of 2 to 4 taps are supported.
    pub fn load(block: &DeltaNet<Weight>, source: &dyn TensorSource, isa: Isa) -> Result<Self, Error> {
        let (n_taps, n_channels) = (block.shape.conv_kernel, block.shape.n_channels());
        if !(2..=4).contains(&n_taps) {
            return Err(Error::Unsupported(format!(
                "{} has {n_taps} taps; convolutions of 2 to 4 are supported",
                block.ssm_conv1d.name
            )));
        }
        let taps = vector(&block.ssm_conv1d, source);
        let transposed = (0..n_taps * n_channels).map(|i| taps[i % n_channels * n_taps + i / n_channels]);
        Ok(Self {
            shape: block.shape.clone(),
            attn_norm: vector(&block.attn_norm, source),
            attn_qkv: Projection::load(&block.attn_qkv, source, isa)?,
            attn_gate: Projection::load(&block.attn_gate, source, isa)?,
            ssm_conv1d: transposed.collect(),
            ssm_dt: vector(&block.ssm_dt, source),
            ssm_a: vector(&block.ssm_a, source),
            ssm_beta: Projection::load(&block.ssm_beta, source, isa)?,
            ssm_alpha: Projection::load(&block.ssm_alpha, source, isa)?,
            ssm_norm: vector(&block.ssm_norm, source),
            ssm_out: Projection::load(&block.ssm_out, source, isa)?,
        })
    }

    /// Bytes of the weights.
    pub fn n_bytes(&self) -> usize {
        let vectors = [&self.attn_norm, &self.ssm_conv1d, &self.ssm_dt, &self.ssm_a, &self.ssm_norm];
        self.projections().map(|p| p.n_bytes()).sum::<usize>()
            + vectors.iter().map(|v| size_of_val(&***v)).sum::<usize>()
    }

    /// Channels, output gate, beta, alpha and output.
    pub fn projections(&self) -> impl Iterator<Item = &Projection> {
        self.inputs().into_iter().chain([&self.ssm_out])
    }

    /// What the first stage multiplies with, in the order of the wide scratch.
    pub fn inputs(&self) -> [&Projection; 4] {
        [&self.attn_qkv, &self.attn_gate, &self.ssm_beta, &self.ssm_alpha]
    }

    /// Adds the block to the residual stream.
    pub fn run(&self, w: &Worker, step: &Step, state: BlockState) {
        let BlockState::Delta { recurrent, conv } = state else { panic!("a delta net without its states") };
        let projections = self.inputs();
        let forms = projections.iter().map(|p| p.forms()).reduce(|a, b| a.or(b)).expect("four projections");
        let h = step.prepare(w, &step.buffers.normed, step.n_tokens, step.n_embd, forms, |i, row| {
            // SAFETY: nobody writes the residual stream in this stage.
            let x = unsafe { step.x.read(step.row(i, 0..step.n_embd)) };
            rms_norm(step.isa, x, &self.attn_norm, self.shape.rms_eps, row);
            row
        });
        for_each_run(w, step.n_tokens, &projections, |index, rows| {
            let first: usize = projections[..index].iter().map(|p| p.n_out()).sum();
            let cols = first + rows.start..first + rows.end;
            let out = step.memory.ptr(step.wide(0, cols.clone()).start..step.wide(step.n_tokens - 1, cols).end);
            // SAFETY: these rows of the projection are this worker's, in every token.
            unsafe { projections[index].apply(step.isa, rows.clone(), &h, out, step.layout.wide_len) };
            if index == 0 {
                for (first, sequence) in step.sequences() {
                    self.convolve(step, first, sequence, conv, rows.clone());
                }
            }
        });
        w.barrier();

        let n_heads = self.shape.n_v_heads;
        for piece in w.pieces(n_heads * step.batch.sequences.len()) {
            let (first, sequence) = step.sequences().nth(piece / n_heads).expect("a piece is a head of a sequence");
            self.head(w, step, first, sequence, recurrent, piece % n_heads);
        }
        step.barrier_reading(w, |ahead| read_ahead(w, &[&self.ssm_out], ahead));

        let n_value = self.shape.n_value();
        let forms = self.ssm_out.forms();
        let o = step.prepare(w, &step.buffers.mixed, step.n_tokens, n_value, forms, |i, _| {
            // SAFETY: nobody writes the mixed scratch in this stage.
            unsafe { step.memory.read(step.mixed(i, 0..n_value)) }
        });
        step.add(w, &self.ssm_out, &o);
    }

    /// Convolution and SiLU over the channels `channels` of a sequence whose first row is `first`, in place.
    fn convolve(&self, step: &Step, first: usize, sequence: &Sequence, conv: usize, channels: Range<usize>) {
        let n_channels = self.shape.n_channels();
        let states = step.layout.slot(sequence.slot).start + conv + channels.start;
        let last_state = states + (self.shape.conv_kernel - 2) * n_channels + channels.len();
        let last_row = step.wide(first + sequence.n_tokens - 1, channels.clone()).end;
        let convolve = Convolve::<0> {
            state: step.memory.ptr(states..last_state),
            taps: &self.ssm_conv1d[channels.start..],
            n_channels,
            x: step.memory.ptr(step.wide(first, channels.clone()).start..last_row),
            stride: step.layout.wide_len,
            n_tokens: sequence.n_tokens,
            width: channels.len(),
        };
        match self.shape.conv_kernel {
            2 => simd::run(step.isa, 0, convolve.taps::<2>()),
            3 => simd::run(step.isa, 0, convolve.taps::<3>()),
            _ => simd::run(step.isa, 0, convolve.taps::<4>()),
        }
    }

    /// One V head of a sequence: delta rule, norm and gate, into the mixed scratch.
    fn head(&self, w: &Worker, step: &Step, first: usize, sequence: &Sequence, recurrent: usize, head: usize) {
        let (s, n_keys) = (self.shape.head_dim, self.shape.n_k_heads * self.shape.head_dim);
        let (n_channels, n_value, n_v_heads) = (self.shape.n_channels(), self.shape.n_value(), self.shape.n_v_heads);
        let at_key = self.shape.k_head(head) * s;
        let state = step.layout.slot(sequence.slot).start + recurrent + head * s * s;
        let tile = step.tile(w);
        let (k, tile) = tile.split_at_mut(TOKENS * s);
        let (q, tile) = tile.split_at_mut(TOKENS * s);
        let (beta, tile) = tile.split_at_mut(TOKENS);
        let (decay, kq) = tile.split_at_mut(TOKENS);
        // SAFETY: nobody writes the wide scratch in this stage.
        let wide =
            |token: usize, start: usize, n: usize| unsafe { step.memory.read(step.wide(token, start..start + n)) };
        for start in (first..first + sequence.n_tokens).step_by(TOKENS) {
            let n = TOKENS.min(first + sequence.n_tokens - start);
            for i in 0..n {
                let token = start + i;
                let (k, q) = (&mut k[i * s..][..s], &mut q[i * s..][..s]);
                let eps = Some(self.shape.rms_eps);
                scale(step.isa, wide(token, at_key, s), 1.0 / (s as f32).sqrt(), eps, q);
                scale(step.isa, wide(token, n_keys + at_key, s), 1.0, eps, k);
                let b = wide(token, n_channels + n_value + head, 1)[0];
                let a = wide(token, n_channels + n_value + n_v_heads + head, 1)[0] + self.ssm_dt[head];
                beta[i] = 1.0 / (1.0 + (-b).exp());
                // softplus in the form that neither overflows nor loses small values.
                let softplus = a.max(0.0) + (-a.abs()).exp().ln_1p();
                decay[i] = (self.ssm_a[head] * softplus).exp();
                kq[i] = k.iter().zip(&*q).map(|(k, q)| k * q).sum();
            }
            let values = 2 * n_keys + head * s..2 * n_keys + (head + 1) * s;
            let out = head * s..(head + 1) * s;
            let delta = Delta {
                s,
                n_tokens: n,
                state: step.memory.ptr(state..state + s * s),
                k,
                q,
                beta,
                decay,
                kq,
                v: step.memory.ptr(step.wide(start, values.clone()).start..step.wide(start + n - 1, values).end),
                v_stride: step.layout.wide_len,
                out: step.memory.ptr(step.mixed(start, out.clone()).start..step.mixed(start + n - 1, out.clone()).end),
                out_stride: step.layout.mixed_len,
            };
            simd::run(step.isa, s, delta);
            for token in start..start + n {
                // SAFETY: this head of these tokens is this worker's piece.
                let o = unsafe { step.memory.write(step.mixed(token, out.clone())) };
                let z = wide(token, n_channels + head * s, s);
                gated_norm(step.isa, o, &self.ssm_norm, z, self.shape.rms_eps);
            }
        }
    }
}

/// Convolution of `KERNEL` taps and SiLU.
struct Convolve<'a, const KERNEL: usize> {
    /// `[KERNEL - 1, n_channels]` from the first of these channels on, oldest first.
    state: *mut f32,
    /// `[KERNEL, n_channels]`, likewise.
    taps: &'a [f32],
    n_channels: usize,
    /// `[n_tokens, width]`, rows `stride` apart.
    x: *mut f32,
    stride: usize,
    n_tokens: usize,
    width: usize,
}

impl<'a> Convolve<'a, 0> {
    /// The same with its number of taps fixed, so that the window stays in registers.
    fn taps<const KERNEL: usize>(self) -> Convolve<'a, KERNEL> {
        let Self { state, taps, n_channels, x, stride, n_tokens, width } = self;
        Convolve { state, taps, n_channels, x, stride, n_tokens, width }
    }
}

impl<const KERNEL: usize> Kernel for Convolve<'_, KERNEL> {
    type Output = ();
    #[inline(always)]
    fn run<V: Simd>(self) {
        assert!(self.taps.len() >= (KERNEL - 1) * self.n_channels + self.width);
        let taps = self.taps.as_ptr();
        for_lanes!(V, self.width, |i| {
            // SAFETY: `i + LANES <= width`; the taps were checked, and the caller made `state` and `x` from ranges of
            // shared memory with these shapes, whose columns are this worker's.
            unsafe {
                let tap: [V; KERNEL] = std::array::from_fn(|j| V::load(taps.add(j * self.n_channels + i)));
                // The last inputs, oldest first, and room for the current one.
                let mut window: [V; KERNEL] = std::array::from_fn(|j| {
                    if j + 1 < KERNEL { V::load(self.state.add(j * self.n_channels + i)) } else { V::splat(0.0) }
                });
                for t in 0..self.n_tokens {
                    let x = self.x.add(t * self.stride + i);
                    window[KERNEL - 1] = V::load(x);
                    let mut sum = window[0].mul(tap[0]);
                    for j in 1..KERNEL {
                        sum = window[j].mul_add(tap[j], sum);
                        window[j - 1] = window[j];
                    }
                    silu(sum).store(x);
                }
                for j in 0..KERNEL - 1 {
                    window[j].store(self.state.add(j * self.n_channels + i));
                }
            }
        });
    }
}

/// The delta rule of one head: per token `d = beta (v - g S k)`, `S = g S + d k^T`, `o = S q`.
struct Delta<'a> {
    s: usize,
    n_tokens: usize,
    /// `[S, S]`: rows are value elements, columns key elements.
    state: *mut f32,
    /// `[n_tokens, S]`.
    k: &'a [f32],
    /// `[n_tokens, S]`.
    q: &'a [f32],
    /// `[n_tokens]`.
    beta: &'a [f32],
    /// `[n_tokens]`: `exp(g)`.
    decay: &'a [f32],
    /// `[n_tokens]`: `k . q`.
    kq: &'a [f32],
    /// `[n_tokens, S]`, rows `v_stride` apart.
    v: *const f32,
    v_stride: usize,
    /// `[n_tokens, S]`, rows `out_stride` apart.
    out: *mut f32,
    out_stride: usize,
}

impl Delta<'_> {
    /// Value elements `row..row + 4`, or as many as there are.
    ///
    /// # Safety
    /// The pointers hold the shapes above; `row + ROWS <= S`.
    #[inline(always)]
    unsafe fn rows<V: Simd, const ROWS: usize>(&self, row: usize) {
        let s = self.s;
        // SAFETY: rows are below S, columns are whole vectors below S, tokens below `n_tokens`, whose slices `run`
        // checked.
        unsafe {
            let state = self.state.add(row * s);
            for t in 0..self.n_tokens {
                let (k, q) = (self.k.as_ptr().add(t * s), self.q.as_ptr().add(t * s));
                let (mut sk, mut sq) = ([V::splat(0.0); 4], [V::splat(0.0); 4]);
                for i in (0..s).step_by(V::LANES) {
                    let (k, q) = (V::load(k.add(i)), V::load(q.add(i)));
                    for r in 0..ROWS {
                        if t == 0 {
                            prefetch_behind::<V, f32>(state.wrapping_add(r * s), i);
                        }
                        let m = V::load(state.add(r * s + i));
                        sk[r] = m.mul_add(k, sk[r]);
                        sq[r] = m.mul_add(q, sq[r]);
                    }
                }
                let (sk, sq) = (V::sums(sk), V::sums(sq));
                let (g, beta, kq) = (self.decay[t], self.beta[t], self.kq[t]);
                let mut d = [0f32; ROWS];
                for r in 0..ROWS {
                    d[r] = beta * (*self.v.add(t * self.v_stride + row + r) - g * sk[r]);
                    *self.out.add(t * self.out_stride + row + r) = g * sq[r] + d[r] * kq;
                }
                let g = V::splat(g);
                for i in (0..s).step_by(V::LANES) {
                    let k = V::load(k.add(i));
                    for r in 0..ROWS {
                        let m = state.add(r * s + i);
                        k.mul_add(V::splat(d[r]), V::load(m).mul(g)).store(m);
                    }
                }
            }
        }
    }
}

impl Kernel for Delta<'_> {
    type Output = ();
    #[inline(always)]
    fn run<V: Simd>(self) {
        let (s, n) = (self.s, self.n_tokens);
        assert!(s.is_multiple_of(V::LANES) && self.k.len() >= n * s && self.q.len() >= n * s);
        assert!(self.beta.len() >= n && self.decay.len() >= n && self.kq.len() >= n);
        // SAFETY: the caller made the pointers from ranges of shared memory with these shapes; rows stay below S.
        unsafe {
            for row in (0..s / 4 * 4).step_by(4) {
                self.rows::<V, 4>(row);
            }
            for row in s / 4 * 4..s {
                self.rows::<V, 1>(row);
            }
        }
    }
}

//! `Attention` on the GPU: norm, one product for q, k and v, then `attention.cu` (norms, rotation and cache; the
//! context in parts; their combination with the output gate), output product.

use crate::arena::Ptr;
use crate::compile::{Args, Function, Launch, Program};
use crate::error::Error;
use crate::gemv::Gemv;
use crate::ops::{DeviceWeight, Linker, Norm, Options, PART_ROWS, Row, Step};
use tandem_spec::{Attention, AttentionShape, KvDtype, RopeStyle};

/// Positions of the shortest part of the context.
const CHUNK: usize = 64;

#[repr(C)]
#[derive(Clone, Copy)]
struct AttentionArgs {
    rows: Ptr,
    q: Ptr,
    k: Ptr,
    v: Ptr,
    q_norm: Ptr,
    k_norm: Ptr,
    freq: Ptr,
    keys: Ptr,
    values: Ptr,
    parts: Ptr,
    out: Ptr,
    codes: Ptr,
    heads: Ptr,
    halves: Ptr,
    n_ctx: u64,
    magnitude: f32,
    eps: f32,
}
// SAFETY: mirrors AttentionArgs in attention.cu, which compares sizes.
unsafe impl Args for AttentionArgs {}

/// Blocks of query heads per KV head: eight heads share a key.
fn blocks_per_kv(s: &AttentionShape) -> usize {
    (s.n_heads / s.n_kv_heads).div_ceil(8)
}

/// Parts of the context: two blocks per multiprocessor when one sequence decodes, but no more than the context has
/// parts of the shortest length.
pub(crate) fn n_splits(s: &AttentionShape, options: &Options, n_sms: usize) -> usize {
    (2 * n_sms / (s.n_kv_heads * blocks_per_kv(s))).clamp(1, options.n_ctx.div_ceil(CHUNK)).min(64)
}

/// A block with its kernels.
pub(crate) struct AttentionOp {
    block: Attention<DeviceWeight>,
    /// `[n_rot / 2]` f64.
    freq: Ptr,
    magnitude: f32,
    n_splits: usize,
    norm: Norm,
    input: Gemv,
    prepare: Function,
    split: Function,
    combine: Function,
    /// Heads that are not whole units are quantised apart.
    quantise: Option<Norm>,
    output: Gemv,
}

impl AttentionOp {
    /// `freq`: [`tandem_spec::Rope::frequencies`] in device memory, and its factor.
    pub fn new(
        linker: &mut Linker,
        block: Attention<DeviceWeight>,
        freq: (Ptr, f64),
        options: &Options,
    ) -> Result<Self, Error> {
        let s = &block.shape;
        let n_splits = n_splits(s, options, linker.n_sms);
        let inputs = [&block.attn_q, &block.attn_k, &block.attn_v];
        let program = Program::new("attention.cu", include_str!("attention.cu"))
            .args::<AttentionArgs>("ATTENTION_ARGS")
            .define("D", s.head_dim)
            .define("N_HEADS", s.n_heads)
            .define("N_KV_HEADS", s.n_kv_heads)
            .define("GATED", u32::from(s.gated))
            .define("QK_NORM", u32::from(block.attn_q_norm.is_some()))
            .define("N_ROT", s.rope.n_rot)
            .define("ADJACENT", u32::from(s.rope.style == RopeStyle::Adjacent))
            .define("KV_BF16", u32::from(options.kv == KvDtype::Bf16))
            .define("N_SPLITS", n_splits)
            .define("CHUNK", CHUNK);
        let apart = block.attn_output.weight.ty.is_quantised() && !s.head_dim.is_multiple_of(32);
        assert_eq!(block.attn_q_norm.is_some(), block.attn_k_norm.is_some(), "norms of q and k come together");
        Ok(Self {
            norm: Norm::new(linker, &block.attn_norm, s.rms_eps, &inputs)?,
            input: Gemv::new(linker, &inputs)?,
            prepare: linker.function(program.clone(), "attention_prepare", 0)?,
            split: linker.function(program.clone(), "attention_split", 0)?,
            combine: linker.function(program, "attention_combine", 0)?,
            quantise: if apart { Some(Norm::quantiser(linker, s.n_heads * s.head_dim)?) } else { None },
            output: Gemv::new(linker, &[&block.attn_output])?,
            freq: freq.0,
            magnitude: freq.1 as f32,
            n_splits,
            block,
        })
    }

    pub fn launch(&self, step: &Step) -> Result<(), Error> {
        let (b, s, device, n) = (&self.block, &self.block.shape, step.device, step.n_tokens);
        self.norm.launch(step, step.x, Ptr::NULL, &step.hidden, n)?;
        let q = step.projected;
        let k = q.offset(n * b.attn_q.weight.n_rows * 4);
        let v = k.offset(n * b.attn_k.weight.n_rows * 4);
        self.input.launch(step, &step.hidden, &[q, k, v], n, false)?;
        let quantised = b.attn_output.weight.ty.is_quantised() && self.quantise.is_none();
        let only = |wanted: bool, p: Ptr| if wanted { p } else { Ptr::NULL };
        let args = AttentionArgs {
            rows: step.rows,
            q,
            k,
            v,
            q_norm: b.attn_q_norm.map_or(Ptr::NULL, |w| w.ptr),
            k_norm: b.attn_k_norm.map_or(Ptr::NULL, |w| w.ptr),
            freq: self.freq,
            keys: step.state[0],
            values: step.state[1],
            parts: step.parts,
            out: only(!quantised, step.mixed.x),
            codes: only(quantised && n == 1, step.mixed.codes),
            heads: step.mixed.heads,
            halves: only(quantised && n > 1, step.mixed.halves),
            n_ctx: step.n_ctx as u64,
            magnitude: self.magnitude,
            eps: s.rms_eps,
        };
        let n_heads = s.n_heads + 2 * s.n_kv_heads;
        // SAFETY: buffers hold `n` rows; slots and positions were checked against the caches when the batch was
        // built; all three kernels wait for their inputs.
        unsafe {
            self.prepare.launch_early(device, Launch::grid(n_heads.div_ceil(4), n, 1, 128), &args)?;
            for first in (0..n).step_by(PART_ROWS) {
                let (rows, out) = (PART_ROWS.min(n - first), first * s.n_heads * s.head_dim);
                let part = AttentionArgs {
                    rows: args.rows.offset(first * size_of::<Row>()),
                    q: args.q.offset(first * b.attn_q.weight.n_rows * 4),
                    out: only(!quantised, step.mixed.x.offset(out * 4)),
                    halves: only(quantised && n > 1, step.mixed.halves.offset(out * 2)),
                    ..args
                };
                let blocks = s.n_kv_heads * blocks_per_kv(s);
                self.split.launch_early(device, Launch::grid(self.n_splits, blocks, rows, 128), &part)?;
                let threads = s.head_dim.next_multiple_of(32);
                self.combine.launch_early(device, Launch::grid(s.n_heads, rows, 1, threads), &part)?;
            }
        }
        if let Some(quantise) = &self.quantise {
            quantise.launch(step, step.mixed.x, Ptr::NULL, &step.mixed, n)?;
        }
        self.output.launch(step, &step.mixed, &[step.x], n, true)
    }
}

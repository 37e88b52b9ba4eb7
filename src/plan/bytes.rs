//! The account: every byte that a plan takes, by device and pool. Sizes of packed weights, states and scratch
//! are the backends' to say; this is the one place that asks.

use super::{Device, Place, Share};
use serde::{Deserialize, Serialize};
use tandem_spec::{Block, KvDtype, Linear, Model, TensorType, Weight};

/// Ranges of a device arena start at multiples of this.
const CUDA_ALIGN: u64 = 256;
/// Captured graphs, module globals and the driver's own bookkeeping per replayed graph.
const CUDA_GRAPH_BYTES: u64 = 64 << 20;
/// Kept free on a GPU: other programs on the desktop come and go.
const CUDA_RESERVE: u64 = 256 << 20;
/// Kept free in main memory: the system, the tokenizer, this process.
const HOST_RESERVE: u64 = 512 << 20;
/// Pinned ring through which weights are uploaded: 8 buffers of 16 MiB.
const UPLOAD_RING: u64 = 8 * (16 << 20);
/// Most bytes of one staging buffer for streamed weights; layers that are larger are streamed in pieces.
const STAGING_MAX: u64 = 256 << 20;

/// What bytes are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pool {
    /// Weights in the device's layout.
    Weights,
    /// Weights read in place from the mapped file.
    Mapped,
    /// Keys and values.
    Kv,
    /// Delta-net states, recurrent and convolution.
    States,
    /// Activations and scratch of the largest batch.
    Scratch,
    /// Logits of the wanted rows.
    Logits,
    /// Buffers for weights that are streamed to a GPU.
    Staging,
    /// Pinned host memory: upload ring and hand-off buffers.
    Pinned,
    /// Graphs and modules.
    Graphs,
    /// Kept free.
    Reserve,
}

impl Pool {
    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Pool::Weights => "weights",
            Pool::Mapped => "mapped weights",
            Pool::Kv => "kv",
            Pool::States => "states",
            Pool::Scratch => "scratch",
            Pool::Logits => "logits",
            Pool::Staging => "staging",
            Pool::Pinned => "pinned",
            Pool::Graphs => "graphs",
            Pool::Reserve => "reserve",
        }
    }
}

/// One row of the account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Whose memory.
    pub device: Device,
    /// What for.
    pub pool: Pool,
    /// Name of the tensor, or of the block, or what it is.
    pub name: String,
    /// Index of the block that it belongs to, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<usize>,
    /// Bytes, alignment included.
    pub bytes: u64,
}

/// The sizes that decide everything beside the weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sizes {
    pub n_ctx: usize,
    pub n_slots: usize,
    pub n_batch: usize,
    pub kv_dtype: KvDtype,
    /// Whether host weights are streamed to the GPU for prompts.
    pub stream: bool,
}

/// Rows of one tensor that a device holds.
struct Piece<'m> {
    name: &'m str,
    ty: TensorType,
    n_rows: usize,
    n_cols: usize,
    mapped: bool,
}

fn align(bytes: u64, to: u64) -> u64 {
    bytes.next_multiple_of(to)
}

/// Bytes of a matrix or vector in a device's layout.
fn layout_bytes(device: Device, piece: &Piece) -> u64 {
    let row_bytes = piece.ty.row_bytes(piece.n_cols).expect("shares end at whole blocks") as u64;
    match device {
        Device::Cuda(_) => align(piece.n_rows as u64 * row_bytes, CUDA_ALIGN),
        Device::Cpu if piece.mapped => piece.n_rows as u64 * row_bytes,
        // Panels of 8 rows, each matrix at a cache line.
        Device::Cpu if piece.n_rows > 1 => align((piece.n_rows as u64).next_multiple_of(8) * row_bytes, 64),
        Device::Cpu => align(row_bytes, 64),
    }
}

/// What `share` of `block` holds; `home`: whether it is the block's first share.
fn pieces<'m>(block: &'m Block<Weight>, share: &Share, home: bool) -> Vec<Piece<'m>> {
    let mut out = Vec::new();
    let n = share.part.len();
    let mut put = |w: &'m Weight, n_rows: usize, n_cols: usize| {
        if n_rows > 0 && n_cols > 0 {
            out.push(Piece { name: &w.name, ty: w.ty, n_rows, n_cols, mapped: false });
        }
    };
    // Scale and bias of a projection: what belongs to rows goes with them, what is added once stays at home.
    match block {
        Block::Ffn(b) => {
            if home {
                put(&b.ffn_norm, 1, b.ffn_norm.n_cols);
            }
            for linear in [&b.ffn_gate, &b.ffn_up] {
                put(&linear.weight, n, linear.weight.n_cols);
                linear.scale.iter().for_each(|s| put(s, 1, s.n_cols));
                linear.bias.iter().for_each(|bias| put(bias, 1, n));
            }
            put(&b.ffn_down.weight, b.ffn_down.weight.n_rows(), n);
            b.ffn_down.scale.iter().for_each(|s| put(s, 1, s.n_cols));
            b.ffn_down.bias.iter().filter(|_| home).for_each(|bias| put(bias, 1, bias.n_cols));
        }
        Block::Moe(b) => {
            if home {
                put(&b.ffn_norm, 1, b.ffn_norm.n_cols);
                put(&b.ffn_gate_inp, b.ffn_gate_inp.n_rows(), b.ffn_gate_inp.n_cols);
                if let Some(shared) = &b.shared {
                    shared.ffn_gate_inp_shexp.iter().for_each(|w| put(w, 1, w.n_cols));
                    for linear in [&shared.ffn_gate_shexp, &shared.ffn_up_shexp, &shared.ffn_down_shexp] {
                        linear_pieces(linear, &mut put);
                    }
                }
            }
            for linear in [&b.ffn_gate_exps, &b.ffn_up_exps, &b.ffn_down_exps] {
                put(&linear.weight, linear.weight.n_rows() / b.shape.n_experts * n, linear.weight.n_cols);
                linear.scale.iter().for_each(|s| put(s, 1, n));
                linear.bias.iter().for_each(|bias| put(bias, 1, bias.n_cols / b.shape.n_experts * n));
            }
        }
        Block::Attention(b) => {
            let vectors = [Some(&b.attn_norm), b.attn_q_norm.as_ref(), b.attn_k_norm.as_ref(), b.rope_freqs.as_ref()];
            vectors.into_iter().flatten().for_each(|w| put(w, 1, w.n_cols));
            for linear in [&b.attn_q, &b.attn_k, &b.attn_v, &b.attn_output] {
                linear_pieces(linear, &mut put);
            }
        }
        Block::DeltaNet(b) => {
            for w in [&b.attn_norm, &b.ssm_conv1d, &b.ssm_dt, &b.ssm_a, &b.ssm_norm] {
                put(w, w.n_rows(), w.n_cols);
            }
            for linear in [&b.attn_qkv, &b.attn_gate, &b.ssm_beta, &b.ssm_alpha, &b.ssm_out] {
                linear_pieces(linear, &mut put);
            }
        }
        Block::Head(b) => {
            put(&b.output_norm, 1, b.output_norm.n_cols);
            linear_pieces(&b.output, &mut put);
        }
        Block::Embed(b) => {
            let w = &b.token_embd;
            out.push(Piece { name: &w.name, ty: w.ty, n_rows: w.n_rows(), n_cols: w.n_cols, mapped: true });
        }
    }
    out
}

fn linear_pieces<'m>(linear: &'m Linear<Weight>, put: &mut impl FnMut(&'m Weight, usize, usize)) {
    put(&linear.weight, linear.weight.n_rows(), linear.weight.n_cols);
    linear.scale.iter().for_each(|s| put(s, 1, s.n_cols));
    linear.bias.iter().for_each(|b| put(b, 1, b.n_cols));
}

/// Elements of a token's widest intermediate in any block, beside the residual stream: f32 on every backend.
fn widest(model: &Model) -> usize {
    let width = |block: &Block<Weight>| match block {
        Block::Attention(b) => {
            let heads = b.shape.n_heads * b.shape.head_dim;
            b.attn_q.weight.n_rows() + 2 * b.shape.n_kv_heads * b.shape.head_dim + heads
        }
        Block::DeltaNet(b) => 2 * b.shape.n_channels() + 2 * b.shape.n_value() + 2 * b.shape.n_v_heads,
        Block::Ffn(b) => 2 * b.shape.n_ff,
        Block::Moe(b) => b.shape.n_experts + 2 * (b.shape.n_used * b.shape.n_ff + b.shape.n_ff_shared) + b.shape.n_embd,
        Block::Embed(_) | Block::Head(_) => 0,
    };
    model.blocks.iter().map(width).max().unwrap_or(0)
}

/// Whether the embedding and the head are one file tensor.
pub(super) fn is_tied(model: &Model) -> bool {
    let tensor = |block: &Block<Weight>| match block {
        Block::Embed(b) => Some(b.token_embd.tensor),
        Block::Head(b) => Some(b.output.weight.tensor),
        _ => None,
    };
    let (first, last) = (model.blocks.first().and_then(tensor), model.blocks.last().and_then(tensor));
    model.blocks.len() > 1 && first.is_some() && first == last
}

/// Entries of one share of block `index`: weights, keys and values, states.
pub(super) fn share_entries(model: &Model, index: usize, share: &Share, home: bool, sizes: &Sizes) -> Vec<Entry> {
    let block = &model.blocks[index];
    let device = share.device;
    let entry = |pool, name: &str, bytes| Entry { device, pool, name: name.into(), block: Some(index), bytes };
    let mut entries: Vec<Entry> = pieces(block, share, home)
        .iter()
        .map(|p| {
            let pool = if p.mapped && device == Device::Cpu { Pool::Mapped } else { Pool::Weights };
            entry(pool, p.name, layout_bytes(device, p))
        })
        .collect();
    let to = if device == Device::Cpu { 64 } else { CUDA_ALIGN };
    match block {
        Block::Attention(b) => {
            let bytes = b.shape.kv_bytes_per_token(sizes.kv_dtype) as u64 * (sizes.n_ctx * sizes.n_slots) as u64;
            entries.push(entry(Pool::Kv, &block.name(), align(bytes, to)));
        }
        Block::DeltaNet(b) => {
            let bytes = b.shape.state_bytes() as u64 * sizes.n_slots as u64;
            entries.push(entry(Pool::States, &block.name(), align(bytes, to)));
        }
        Block::Head(b) => {
            let bytes = 4 * (b.shape.n_vocab * sizes.n_slots) as u64;
            entries.push(entry(Pool::Logits, &block.name(), align(bytes, to)));
        }
        _ => {}
    }
    entries
}

/// Entries of a device that do not depend on which blocks it runs, only on that it runs any (`is_used`).
/// `n_gpus` is the number of GPUs in use, `staging` the bytes of one staging buffer.
pub(super) fn device_entries(model: &Model, device: Device, is_used: bool, n_gpus: usize, sizes: &Sizes) -> Vec<Entry> {
    let entry = |pool, name: &str, bytes| Entry { device, pool, name: name.into(), block: None, bytes };
    let tokens = sizes.n_batch as u64;
    // Residual stream, the normalised input of a block, and the block's widest intermediate, f32.
    let activations = 4 * tokens * (2 * model.n_embd + widest(model)) as u64;
    let staging = if sizes.stream { staging_bytes(model, sizes) } else { 0 };
    let mut entries = Vec::new();
    if is_used {
        entries.push(entry(Pool::Scratch, "activations", align(activations, CUDA_ALIGN)));
    }
    match device {
        Device::Cuda(_) => {
            if staging > 0 {
                entries.push(entry(Pool::Staging, "two buffers for streamed weights", 2 * staging));
            }
            entries.push(entry(Pool::Graphs, "graphs", CUDA_GRAPH_BYTES));
            entries.push(entry(Pool::Reserve, "kept free", CUDA_RESERVE));
        }
        Device::Cpu => {
            if n_gpus > 0 {
                entries.push(entry(Pool::Pinned, "upload ring", UPLOAD_RING));
                let handoff = 2 * 4 * tokens * model.n_embd as u64;
                entries.push(entry(Pool::Pinned, "hand-off of activations", align(handoff, CUDA_ALIGN)));
            }
            if staging > 0 && n_gpus > 0 {
                entries.push(entry(Pool::Staging, "two pinned buffers for streamed weights", 2 * staging));
            }
            entries.push(entry(Pool::Reserve, "kept free", HOST_RESERVE));
        }
    }
    entries
}

/// Bytes of one staging buffer: the largest feed-forward block, or [`STAGING_MAX`].
fn staging_bytes(model: &Model, sizes: &Sizes) -> u64 {
    let bytes = |(i, block): (usize, &Block<Weight>)| match block {
        Block::Ffn(_) | Block::Moe(_) => {
            let share = Share { device: Device::Cuda(0), part: 0..super::n_parts(block) };
            share_entries(model, i, &share, true, sizes).iter().map(|e| e.bytes).sum()
        }
        _ => 0,
    };
    model.blocks.iter().enumerate().map(bytes).max().unwrap_or(0).min(STAGING_MAX)
}

/// The account of a placement.
pub(super) fn account(model: &Model, places: &[Place], sizes: &Sizes) -> Vec<Entry> {
    let mut gpus: Vec<Device> = places.iter().flatten().map(|s| s.device).filter(|d| *d != Device::Cpu).collect();
    gpus.sort();
    gpus.dedup();
    let cpu_used = places.iter().flatten().any(|s| s.device == Device::Cpu);
    let mut entries = device_entries(model, Device::Cpu, cpu_used, gpus.len(), sizes);
    for gpu in &gpus {
        entries.extend(device_entries(model, *gpu, true, gpus.len(), sizes));
    }
    let tied = is_tied(model);
    for (i, place) in places.iter().enumerate() {
        for (nth, share) in place.iter().enumerate() {
            let mut rows = share_entries(model, i, share, nth == 0, sizes);
            if tied && i == 0 && share.device == places[places.len() - 1][0].device {
                rows.iter_mut().for_each(|e| e.bytes = 0); // the head's copy serves the embedding
            }
            entries.extend(rows);
        }
    }
    entries
}

/// Sum of the entries of `device`, in `pool` or in all of them.
pub fn total(entries: &[Entry], device: Device, pool: Option<Pool>) -> u64 {
    entries.iter().filter(|e| e.device == device && pool.is_none_or(|p| e.pool == p)).map(|e| e.bytes).sum()
}

//! The account: every byte that a plan takes, by device and pool. Sizes of packed weights, states and scratch
//! are the backends' to say; this is the one place that asks.

use super::{Device, Place, Share};
use serde::{Deserialize, Serialize};
use tandem_cpu::{Isa, Matrix, StateSize};
use tandem_spec::{Block, KvDtype, Linear, Model, Weight};

/// Ranges of a device arena start at multiples of this.
const CUDA_ALIGN: u64 = tandem_cuda::arena::ALIGN as u64;
/// Parts of the CPU's state memory start at multiples of this.
const CPU_ALIGN: u64 = 64;
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
    /// CPU kernels and workers.
    pub isa: Isa,
    pub threads: usize,
    /// Whether host weights are streamed to the GPU for prompts.
    pub stream: bool,
}

/// How a backend keeps a tensor.
#[derive(Clone, Copy)]
enum Kind {
    /// So many matrices, each packed on its own by the CPU.
    Matrices(usize),
    /// Plain floats.
    Vector,
    /// Factors of a projection: the CPU keeps them beside it, outside its weights.
    Scale,
}

/// Rows of one tensor that a device holds.
struct Piece<'m> {
    weight: &'m Weight,
    n_rows: usize,
    n_cols: usize,
    kind: Kind,
}

fn align(bytes: u64, to: u64) -> u64 {
    bytes.next_multiple_of(to)
}

/// Bytes of a piece in a device's layout.
fn layout_bytes(device: Device, piece: &Piece, isa: Isa) -> u64 {
    let &Piece { weight, n_rows, n_cols, kind } = piece;
    match (device, kind) {
        (Device::Cuda(_), _) => align(tandem_cuda::layout::bytes(n_rows, n_cols, weight.ty) as u64, CUDA_ALIGN),
        (Device::Cpu, Kind::Matrices(n)) => n as u64 * Matrix::packed_bytes(n_rows / n, n_cols, weight.ty, isa) as u64,
        (Device::Cpu, Kind::Vector) => 4 * (n_rows * n_cols) as u64,
        (Device::Cpu, Kind::Scale) => 0,
    }
}

/// What `share` of `block` holds; `home`: whether it is the block's first share.
fn pieces<'m>(block: &'m Block<Weight>, share: &Share, home: bool) -> Vec<Piece<'m>> {
    let mut out = Vec::new();
    let n = share.part.len();
    let mut put = |weight: &'m Weight, n_rows: usize, n_cols: usize, kind: Kind| {
        if n_rows > 0 && n_cols > 0 {
            out.push(Piece { weight, n_rows, n_cols, kind });
        }
    };
    // What belongs to rows goes with them, what is added once stays at home.
    match block {
        Block::Ffn(b) => {
            if home {
                put(&b.ffn_norm, 1, b.ffn_norm.n_cols, Kind::Vector);
            }
            for linear in [&b.ffn_gate, &b.ffn_up] {
                put(&linear.weight, n, linear.weight.n_cols, Kind::Matrices(1));
                linear.scale.iter().for_each(|s| put(s, 1, s.n_cols, Kind::Scale));
                linear.bias.iter().for_each(|bias| put(bias, 1, n, Kind::Vector));
            }
            put(&b.ffn_down.weight, b.ffn_down.weight.n_rows(), n, Kind::Matrices(1));
            b.ffn_down.scale.iter().for_each(|s| put(s, 1, s.n_cols, Kind::Scale));
            b.ffn_down.bias.iter().filter(|_| home).for_each(|bias| put(bias, 1, bias.n_cols, Kind::Vector));
        }
        Block::Moe(b) => {
            if home {
                put(&b.ffn_norm, 1, b.ffn_norm.n_cols, Kind::Vector);
                put(&b.ffn_gate_inp, b.ffn_gate_inp.n_rows(), b.ffn_gate_inp.n_cols, Kind::Matrices(1));
                if let Some(shared) = &b.shared {
                    shared.ffn_gate_inp_shexp.iter().for_each(|w| put(w, 1, w.n_cols, Kind::Matrices(1)));
                    for linear in [&shared.ffn_gate_shexp, &shared.ffn_up_shexp, &shared.ffn_down_shexp] {
                        linear_pieces(linear, &mut put);
                    }
                }
            }
            for linear in [&b.ffn_gate_exps, &b.ffn_up_exps, &b.ffn_down_exps] {
                let rows = linear.weight.n_rows() / b.shape.n_experts * n;
                put(&linear.weight, rows, linear.weight.n_cols, Kind::Matrices(n));
                linear.scale.iter().for_each(|s| put(s, 1, n, Kind::Scale));
                linear.bias.iter().for_each(|bias| put(bias, 1, bias.n_cols / b.shape.n_experts * n, Kind::Vector));
            }
        }
        Block::Attention(b) => {
            let vectors = [Some(&b.attn_norm), b.attn_q_norm.as_ref(), b.attn_k_norm.as_ref()];
            vectors.into_iter().flatten().for_each(|w| put(w, 1, w.n_cols, Kind::Vector));
            b.rope_freqs.iter().for_each(|w| put(w, 1, w.n_cols, Kind::Scale));
            for linear in [&b.attn_q, &b.attn_k, &b.attn_v, &b.attn_output] {
                linear_pieces(linear, &mut put);
            }
        }
        Block::DeltaNet(b) => {
            for w in [&b.attn_norm, &b.ssm_conv1d, &b.ssm_dt, &b.ssm_a, &b.ssm_norm] {
                put(w, w.n_rows(), w.n_cols, Kind::Vector);
            }
            for linear in [&b.attn_qkv, &b.attn_gate, &b.ssm_beta, &b.ssm_alpha, &b.ssm_out] {
                linear_pieces(linear, &mut put);
            }
        }
        Block::Head(b) => {
            put(&b.output_norm, 1, b.output_norm.n_cols, Kind::Vector);
            linear_pieces(&b.output, &mut put);
        }
        Block::Embed(b) => put(&b.token_embd, b.token_embd.n_rows(), b.token_embd.n_cols, Kind::Matrices(1)),
    }
    out
}

fn linear_pieces<'m>(linear: &'m Linear<Weight>, put: &mut impl FnMut(&'m Weight, usize, usize, Kind)) {
    put(&linear.weight, linear.weight.n_rows(), linear.weight.n_cols, Kind::Matrices(1));
    linear.scale.iter().for_each(|s| put(s, 1, s.n_cols, Kind::Scale));
    linear.bias.iter().for_each(|b| put(b, 1, b.n_cols, Kind::Vector));
}

/// Bytes of a backend's state for `blocks`: keys and values, delta-net states, scratch and (on a GPU) logits.
/// Saturates where a number overflows.
fn state_bytes(model: &Model, device: Device, n_sms: usize, blocks: &[usize], sizes: &Sizes) -> u64 {
    let &Sizes { n_ctx, n_slots, n_batch, kv_dtype, threads, .. } = sizes;
    match device {
        Device::Cpu => {
            let size = StateSize { n_slots, n_ctx, n_batch, kv_dtype };
            let backend = tandem_cpu::Backend::planned_state_bytes(model, blocks, size, threads);
            // The engine's residual stream lies beside it.
            backend.map_or(u64::MAX / 4, |bytes| bytes + 4 * (n_batch * model.n_embd) as u64)
        }
        Device::Cuda(_) => {
            let options = tandem_cuda::Options { n_slots, n_ctx, n_batch, kv: kv_dtype };
            let blocks: Vec<Block<Weight>> = blocks.iter().map(|&i| model.blocks[i].clone()).collect();
            tandem_cuda::StateLayout::new(&blocks, &options, n_sms).bytes() as u64
        }
    }
}

/// Keys and values, states and logits of one block: what [`state_bytes`] holds beside scratch.
fn own_state(block: &Block<Weight>, device: Device, sizes: &Sizes) -> Option<(Pool, u64)> {
    let slots = sizes.n_slots as u64;
    match (block, device) {
        (Block::Attention(b), _) => {
            let half = b.shape.kv_bytes_per_token(sizes.kv_dtype) as u64 / 2 * sizes.n_ctx as u64 * slots;
            let to = if device == Device::Cpu { CPU_ALIGN } else { CUDA_ALIGN };
            Some((Pool::Kv, 2 * align(half, to)))
        }
        (Block::DeltaNet(b), Device::Cpu) => {
            let part = |n: usize| align(4 * n as u64, CPU_ALIGN);
            Some((Pool::States, slots * (part(b.shape.recurrent_len()) + part(b.shape.conv_len()))))
        }
        (Block::DeltaNet(b), Device::Cuda(_)) => {
            let part = |n: usize| align(4 * n as u64 * slots, CUDA_ALIGN);
            let ring = tandem_cuda::layout::ring_len(&b.shape);
            Some((Pool::States, part(b.shape.recurrent_len()) + part(ring)))
        }
        (Block::Head(b), Device::Cpu) => Some((Pool::Logits, 4 * b.shape.n_vocab as u64 * slots)),
        (Block::Head(b), Device::Cuda(_)) => {
            let rows = tandem_cuda::ops::LOGIT_ROWS.max(sizes.n_slots) as u64;
            Some((Pool::Logits, align(4 * b.shape.n_vocab as u64 * rows, CUDA_ALIGN)))
        }
        _ => None,
    }
}

/// Scratch of the largest batch on a device that runs `blocks` (or parts of them): the backend's state without
/// what belongs to single blocks.
pub(super) fn scratch(model: &Model, device: Device, n_sms: usize, blocks: &[usize], sizes: &Sizes) -> u64 {
    let own = |&i: &usize| match own_state(&model.blocks[i], device, sizes) {
        Some((Pool::Logits, _)) if device == Device::Cpu => 0, // the engine's, not the backend's
        Some((_, bytes)) => bytes,
        None => 0,
    };
    state_bytes(model, device, n_sms, blocks, sizes) - blocks.iter().map(own).sum::<u64>()
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
        .map(|p| entry(Pool::Weights, &p.weight.name, layout_bytes(device, p, sizes.isa)))
        .collect();
    if let (Block::Attention(b), Device::Cuda(_)) = (block, device) {
        entries.push(entry(
            Pool::Weights,
            "rotary frequencies",
            align(8 * (b.shape.rope.n_rot / 2) as u64, CUDA_ALIGN),
        ));
    }
    entries.extend(own_state(block, device, sizes).map(|(pool, bytes)| entry(pool, &block.name(), bytes)));
    entries
}

/// Entries of a device beside its blocks; `scratch` is 0 where it runs none, `n_gpus` the number of GPUs in use.
pub(super) fn device_entries(model: &Model, device: Device, scratch: u64, n_gpus: usize, sizes: &Sizes) -> Vec<Entry> {
    let entry = |pool, name: &str, bytes| Entry { device, pool, name: name.into(), block: None, bytes };
    let staging = if sizes.stream { staging_bytes(model, sizes) } else { 0 };
    let mut entries = vec![entry(Pool::Scratch, "activations of the largest batch", scratch)];
    match device {
        Device::Cuda(_) => {
            entries.push(entry(Pool::Staging, "two buffers for streamed weights", 2 * staging));
            entries.push(entry(Pool::Graphs, "graphs", CUDA_GRAPH_BYTES));
            entries.push(entry(Pool::Reserve, "kept free", CUDA_RESERVE));
        }
        Device::Cpu => {
            if n_gpus > 0 {
                entries.push(entry(Pool::Pinned, "upload ring", UPLOAD_RING));
                let handoff = 2 * 4 * (sizes.n_batch * model.n_embd) as u64;
                entries.push(entry(Pool::Pinned, "hand-off of activations", align(handoff, CUDA_ALIGN)));
                entries.push(entry(Pool::Staging, "two pinned buffers for streamed weights", 2 * staging));
            }
            entries.push(entry(Pool::Reserve, "kept free", HOST_RESERVE));
        }
    }
    entries.retain(|e| e.bytes > 0);
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

/// The account of a placement; `n_sms` is the number of multiprocessors by GPU.
pub(super) fn account(model: &Model, places: &[Place], sizes: &Sizes, n_sms: &[usize]) -> Vec<Entry> {
    let blocks_on = |device: Device| -> Vec<usize> {
        (0..places.len()).filter(|&i| places[i].iter().any(|s| s.device == device)).collect()
    };
    let mut gpus: Vec<Device> = places.iter().flatten().map(|s| s.device).filter(|d| *d != Device::Cpu).collect();
    gpus.sort();
    gpus.dedup();
    let mut entries = Vec::new();
    for device in std::iter::once(Device::Cpu).chain(gpus.iter().copied()) {
        let blocks = blocks_on(device);
        let n_sms = if let Device::Cuda(i) = device { n_sms.get(i).copied().unwrap_or(0) } else { 0 };
        let scratch = if blocks.is_empty() { 0 } else { scratch(model, device, n_sms, &blocks, sizes) };
        entries.extend(device_entries(model, device, scratch, gpus.len(), sizes));
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

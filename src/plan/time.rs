//! Predicted time. A block on a device takes the time of the bytes it reads (weights, states, keys and values)
//! or of its arithmetic, whichever is longer, and a cost per kernel or barrier. Shares of a block run at the
//! same time, blocks one after the other:
//! `T = T_fixed + sum over blocks of max over devices + hand-offs`.

use super::bytes::Sizes;
use super::{Device, Plan, Share};
use crate::machine::{Gpu, Host, KernelRate, Machine};
use tandem_cpu::Isa;
use tandem_spec::{Block, Model, TensorType, Weight};

/// Share of [`Gpu::bandwidth_gb_per_s`] that matrix-vector kernels reach on quantised weights.
const GPU_GEMV_SHARE: f64 = 0.85;
/// Share of the host's read bandwidth that matrix-vector kernels reach where memory bounds them.
const CPU_GEMV_SHARE: f64 = 0.92;
/// One stage of a block on the CPU: barrier, and the serial pieces between (norm, quantisation), microseconds.
const CPU_STAGE_US: f64 = 4.0;
/// Sampling and bookkeeping of one token on the CPU, microseconds per 1000 vocabulary entries.
const CPU_SAMPLE_US_PER_1000: f64 = 0.5;
/// Launching the step's graph and reading the token back, microseconds.
const GPU_LAUNCH_US: f64 = 15.0;
/// Share of the matrix rate that attention scores and the chunked delta rule reach.
const GPU_SCAN_SHARE: f64 = 0.3;
const CPU_SCAN_SHARE: f64 = 0.3;

/// What one thread decodes at most, GB/s of weights, and multiplies, 10^9 operations per second, where the
/// kernels were not measured on the machine.
fn per_thread(isa: Isa, ty: TensorType) -> (f64, f64) {
    let plain = !ty.is_quantised();
    match isa {
        Isa::Avx512 => (if plain { 16.0 } else { 12.0 }, if plain { 60.0 } else { 110.0 }),
        Isa::Avx2 => (if plain { 14.0 } else { 8.0 }, if plain { 40.0 } else { 60.0 }),
        Isa::Portable => (1.0, 2.0),
    }
}

/// A device, as far as time is concerned.
#[derive(Clone, Copy)]
pub(super) enum Rates<'a> {
    Cpu { host: &'a Host, threads: usize },
    Gpu(&'a Gpu),
}

/// What a share of a block does in one step.
#[derive(Clone, Debug, Default)]
pub(super) struct Work {
    /// Bytes of weights read, by type.
    pub weights: Vec<(TensorType, f64)>,
    /// Bytes of states, keys and values read and written.
    pub cache: f64,
    /// Operations of matrix products, two per weight and token, by type.
    pub ops: Vec<(TensorType, f64)>,
    /// Operations of attention scores and the delta rule.
    pub scan_ops: f64,
    /// Kernels on a GPU, stages on a CPU.
    pub n_kernels: f64,
}

/// Work of the part of length `n` of `block` on `n_tokens` tokens, the cache holding `n_past` positions before
/// the last of them.
pub(super) fn work(block: &Block<Weight>, n: usize, home: bool, n_tokens: usize, n_past: usize, sizes: &Sizes) -> Work {
    let tokens = n_tokens as f64;
    let mut work = Work::default();
    let mut add = |w: &Weight, share: f64, read: f64, used: f64| {
        let bytes = w.n_bytes() as f64 * share;
        work.weights.push((w.ty, bytes * read));
        work.ops.push((w.ty, 2.0 * w.n_rows() as f64 * w.n_cols as f64 * share * used));
    };
    match block {
        Block::Embed(b) => {
            work.cache = tokens * (b.token_embd.row_bytes() + 4 * b.n_embd) as f64;
            work.n_kernels = 1.0;
        }
        Block::Attention(b) => {
            for linear in [&b.attn_q, &b.attn_k, &b.attn_v, &b.attn_output] {
                add(&linear.weight, 1.0, 1.0, tokens);
            }
            let seen = n_past as f64 + tokens / 2.0;
            work.cache = b.shape.kv_bytes_per_token(sizes.kv_dtype) as f64 * (seen + tokens);
            work.scan_ops = 4.0 * (b.shape.n_heads * b.shape.head_dim) as f64 * tokens * seen;
            work.n_kernels = 5.0;
        }
        Block::DeltaNet(b) => {
            for linear in [&b.attn_qkv, &b.attn_gate, &b.ssm_beta, &b.ssm_alpha, &b.ssm_out] {
                add(&linear.weight, 1.0, 1.0, tokens);
            }
            work.cache = 2.0 * b.shape.state_bytes() as f64;
            work.scan_ops = 8.0 * b.shape.recurrent_len() as f64 * tokens;
            work.n_kernels = 4.0;
        }
        Block::Ffn(b) => {
            let share = n as f64 / b.shape.n_ff as f64;
            for linear in [&b.ffn_gate, &b.ffn_up, &b.ffn_down] {
                add(&linear.weight, share, 1.0, tokens);
            }
            work.n_kernels = 3.0;
        }
        Block::Moe(b) => {
            let share = n as f64 / b.shape.n_experts as f64;
            let used = b.shape.n_used as f64 / b.shape.n_experts as f64;
            let touched = 1.0 - (1.0 - used).powf(tokens); // of the experts, by any of the tokens, routing being uniform
            for linear in [&b.ffn_gate_exps, &b.ffn_up_exps, &b.ffn_down_exps] {
                add(&linear.weight, share, touched, tokens * used);
            }
            work.n_kernels = 3.0;
            if home {
                add(&b.ffn_gate_inp, 1.0, 1.0, tokens);
                if let Some(shared) = &b.shared {
                    for linear in [&shared.ffn_gate_shexp, &shared.ffn_up_shexp, &shared.ffn_down_shexp] {
                        add(&linear.weight, 1.0, 1.0, tokens);
                    }
                }
                work.n_kernels = 4.0;
            }
        }
        Block::Head(b) => {
            add(&b.output.weight, 1.0, 1.0, 1.0);
            work.n_kernels = 2.0;
        }
    }
    work
}

impl Work {
    /// Bytes moved.
    pub fn bytes(&self) -> f64 {
        self.cache + self.weights.iter().map(|(_, b)| b).sum::<f64>()
    }
}

/// Bytes that one generated token moves in all blocks of `model` under `plan`, after `n_past` others: the weights
/// it uses, states read and written, and keys and values of every position.
pub fn token_bytes(model: &Model, plan: &Plan, n_past: usize) -> u64 {
    token_bytes_by_device(model, plan, n_past).iter().map(|(_, bytes)| bytes).sum::<f64>() as u64
}

/// Seconds in which the devices of `plan` could move the bytes of [`token_bytes`] at their measured bandwidths, one
/// device after the other: a rate times this is the share of the roof.
pub fn token_roof_seconds(model: &Model, plan: &Plan, facts: &Machine, n_past: usize) -> f64 {
    let gb_per_s = |device| match device {
        Device::Cpu => facts.host.read_gb_per_s(plan.threads),
        Device::Cuda(i) => facts.gpus.get(i).map_or(f64::INFINITY, |gpu| gpu.bandwidth_gb_per_s),
    };
    token_bytes_by_device(model, plan, n_past).iter().map(|&(device, bytes)| bytes * 1e-9 / gb_per_s(device)).sum()
}

fn token_bytes_by_device(model: &Model, plan: &Plan, n_past: usize) -> Vec<(Device, f64)> {
    let sizes = plan.sizes();
    let sizes = &sizes;
    let shares = model.blocks.iter().zip(&plan.places).flat_map(|(block, place)| {
        let share = move |(i, share): (usize, &Share)| {
            (share.device, work(block, share.part.len(), i == 0, 1, n_past, sizes).bytes())
        };
        place.iter().enumerate().map(share)
    });
    shares.collect()
}

/// The measured kernel of `ty`, or of the measured type that is nearest in bytes per weight; none for plain floats.
fn measured(host: &Host, ty: TensorType) -> Option<&KernelRate> {
    let bytes_per_weight = |ty: TensorType| ty.row().block_bytes as f64 / ty.row().block_len as f64;
    let distance = |k: &KernelRate| (bytes_per_weight(k.ty) / bytes_per_weight(ty)).ln().abs();
    host.kernels.iter().filter(|_| ty.is_quantised()).min_by(|a, b| distance(a).total_cmp(&distance(b)))
}

impl Rates<'_> {
    /// Weights of one type: GB/s for few tokens, and 10^9 operations per second for many.
    fn matmul(&self, ty: TensorType) -> (f64, f64) {
        match *self {
            Rates::Gpu(gpu) => {
                let ops = gpu.matmul_tflops * 1e3;
                (gpu.bandwidth_gb_per_s * GPU_GEMV_SHARE, if ty == TensorType::F32 { ops / 8.0 } else { ops })
            }
            Rates::Cpu { host, threads } => match measured(host, ty) {
                Some(kernel) => {
                    let share = host.read_gb_per_s(threads) / host.read_gb_per_s(host.threads);
                    let decode = kernel.decode_gb_per_s.min(host.read_gb_per_s(host.threads)) * share;
                    (decode, kernel.prompt_gflops * threads as f64 / host.threads as f64)
                }
                None => {
                    let (gb, gflops) = per_thread(host.isa, ty);
                    let t = threads as f64;
                    ((host.read_gb_per_s(threads) * CPU_GEMV_SHARE).min(gb * t), gflops * t)
                }
            },
        }
    }

    /// Seconds that `work` takes.
    pub fn seconds(&self, work: &Work) -> f64 {
        if work.n_kernels == 0.0 {
            return 0.0;
        }
        let matmul = |ty: TensorType| self.matmul(ty);
        let read: f64 = work.weights.iter().map(|&(ty, bytes)| bytes / matmul(ty).0 / 1e9).sum();
        let multiply: f64 = work.ops.iter().map(|&(ty, ops)| ops / matmul(ty).1 / 1e9).sum();
        let (cache_rate, scan_rate, stage_us) = match *self {
            Rates::Gpu(gpu) => {
                (gpu.bandwidth_gb_per_s * GPU_GEMV_SHARE, gpu.matmul_tflops * 1e3 * GPU_SCAN_SHARE, gpu.kernel_us)
            }
            Rates::Cpu { host, threads } => {
                let ops = self.matmul(TensorType::F32).1 * CPU_SCAN_SHARE;
                (host.read_gb_per_s(threads) * CPU_GEMV_SHARE, ops, CPU_STAGE_US)
            }
        };
        let cache = (work.cache / cache_rate).max(work.scan_ops / scan_rate) / 1e9;
        read.max(multiply) + cache + work.n_kernels * stage_us * 1e-6
    }

    /// Seconds of one step outside its blocks.
    pub fn fixed_seconds(&self, n_vocab: usize) -> f64 {
        1e-6 * match self {
            Rates::Gpu(_) => GPU_LAUNCH_US,
            Rates::Cpu { .. } => n_vocab as f64 / 1000.0 * CPU_SAMPLE_US_PER_1000,
        }
    }
}

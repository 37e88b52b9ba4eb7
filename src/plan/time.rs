//! Predicted time. On the CPU a block takes the time of the bytes it reads (weights, states, keys and values) or of its
//! arithmetic, whichever is longer, and a cost per barrier. On a GPU a token takes, kernel after kernel, its bytes
//! at the measured bandwidth and what no bandwidth shortens: the start of a kernel, the tail of its last blocks,
//! chains of dependent loads; a prompt takes its products at the measured rate of the tensor cores. Shares of a block
//! run at the same time, blocks one after the other:
//! `T = T_fixed + sum over blocks of max over devices + hand-offs`, of a shared mixture the mean of the maxima
//! ([`Token`]).
//!
//! Rates are facts of the machine. The constants here are facts of our kernels, measured on an H200 (`cargo bench -p
//! tandem-cuda --bench decode` and `prompt`: time of each kind of block of five models); none belongs to a model.

use super::bytes::{PROMPT_FROM, Sizes};
use super::{Device, Plan, Share};
use crate::machine::{CPU_STAGE_US, EXPERT_TOKENS, Gpu, Host, Machine};
use tandem_cpu::Isa;
use tandem_spec::{Block, Model, TensorType, Weight};

/// Share of the host's read bandwidth that matrix-vector kernels reach where memory bounds them.
const CPU_GEMV_SHARE: f64 = 0.92;
/// The beginning of a matrix-vector product on the CPU, where memory is slow: the large matrices that rates are
/// measured with hide it, and rates of experts contain it. Microseconds.
const CPU_BEGIN_US: f64 = 7.0;
/// The beginning and the end of a step of the CPU: waking its workers, and who waits for them. Microseconds, of two
/// workers; a hundredth of a token at most, but for the smallest models.
const CPU_WAKE_US: f64 = 90.0;
/// Sampling and bookkeeping of one token on the CPU, microseconds per 1000 vocabulary entries.
const CPU_SAMPLE_US_PER_1000: f64 = 0.5;
/// Tokens of an expert at which the CPU multiplies half as fast as with many, where that was not measured on the
/// machine: they share the decoding of its weights.
const CPU_EXPERT_TOKENS: f64 = 16.0;
/// Share of a thread's plain products that attention scores and the delta rule reach; measured hosts with AVX-512 reach
/// twice what is promised for those that are not here.
const CPU_SCAN_SHARE: f64 = 0.3;
const CPU_SCAN_SHARE_AVX512: f64 = 0.6;

/// Of the time in which the CPU reads ahead, what it has not to read later: rows of a block, and experts, some of which
/// are not those that are chosen. Measured with 16 threads, but rows save twice as much of large shares: with that the
/// planner gives the CPU small ones, which save less.
const CPU_AHEAD_ROWS: f64 = 0.3;
const CPU_AHEAD_EXPERTS: f64 = 0.42;

/// A kernel of a step beside its bytes, on top of [`Gpu::kernel_us`]: the round trips to memory from its inputs to its
/// outputs, microseconds.
const GPU_ROUND_TRIPS_US: f64 = 0.35;
/// Share of [`Gpu::bandwidth_gb_per_s`] of matrix-vector products.
const GPU_GEMV_SHARE: f64 = 0.92;
/// Matrix-vector products still decode when nothing is left to load: microseconds per MB, and at most; K-quants take
/// twice as long.
const GPU_TAIL_US_PER_MB: f64 = 0.135;
const GPU_TAIL_US: f64 = 2.0;
/// The delta rule of one token: a chain of loads, sums and barriers, microseconds.
const GPU_DELTA_STEP_US: f64 = 7.0;
/// Choosing the experts of a token: norm, logits, their hand-over between blocks, and the largest, microseconds.
const GPU_ROUTER_US: f64 = 3.8;
/// Attention of one token: positions of the shortest part of a context, parts at most, query heads that share a
/// key, and 10^9 operations per second of the block of threads that has a part.
const GPU_PART_POSITIONS: f64 = 64.0;
const GPU_PARTS: f64 = 64.0;
const GPU_PART_HEADS: usize = 8;
const GPU_PART_GOPS: f64 = 55.0;
/// Combining one part with the others, microseconds.
const GPU_COMBINE_US: f64 = 0.1;
/// Host side of a step: bookkeeping, the wait, the token read back, microseconds.
const GPU_STEP_US: f64 = 25.0;

/// Tokens that one pass of the kernels of less than [`PROMPT_FROM`] tokens takes.
const GPU_PASS: usize = 8;
/// Share of [`Gpu::mma_tflops`] of our own products, and the weights that a multiprocessor decodes per second for
/// the rows of a tile; fewer rows than a tile has take as long.
const GPU_TILE_SHARE: f64 = 0.8;
const GPU_TILE_WEIGHTS_PER_S: f64 = 7.0e9;
const GPU_TILE_ROWS: f64 = 128.0;
/// Share of [`Gpu::dense_tflops`], the best of a few products, in a prompt, where the chip is hot.
const GPU_DENSE_SHARE: f64 = 0.88;
/// Bytes that move per weight which is decoded to 16 bits for cuBLASLt, and the smallest products that go there.
const GPU_DENSE_BYTES: f64 = 4.0;
const GPU_DENSE_WEIGHTS: f64 = (1 << 20) as f64;
const GPU_DENSE_TOKENS: f64 = 128.0;
/// Share of [`Gpu::mma_tflops`] of attention over a prompt.
const GPU_FLASH_SHARE: f64 = 0.25;
/// The chunked delta rule: microseconds per token of one sequence, and bytes per token and element of a V head.
const GPU_DELTA_TOKEN_US: f64 = 0.08;
const GPU_DELTA_BYTES: f64 = 200.0;
/// What a mixer and a feed-forward block take beside these in a prompt batch, microseconds.
const GPU_MIXER_US: f64 = 75.0;
const GPU_FEED_FORWARD_US: f64 = 22.0;

/// What one thread decodes at most, GB/s of weights, and multiplies, 10^9 operations per second, where the
/// kernels were not measured on the machine.
fn per_thread(isa: Isa, ty: TensorType) -> (f64, f64) {
    let plain = !ty.is_quantised();
    match isa {
        Isa::Amx | Isa::Avx512 => (if plain { 16.0 } else { 12.0 }, if plain { 60.0 } else { 110.0 }),
        Isa::AvxVnni | Isa::Avx2 => (if plain { 14.0 } else { 8.0 }, if plain { 40.0 } else { 60.0 }),
        Isa::Portable => (1.0, 2.0),
    }
}

/// A device, as far as time is concerned.
#[derive(Clone, Copy)]
pub(super) enum Rates<'a> {
    Cpu { host: &'a Host, threads: usize },
    Gpu(&'a Gpu),
}

/// A matrix (or the experts of a stack that some token uses) and the tokens that meet it.
#[derive(Clone, Copy, Debug)]
struct Product {
    ty: TensorType,
    weights: f64,
    tokens: f64,
    /// One matrix per expert.
    is_stack: bool,
    /// Matrices of one kernel of a token have the same number.
    kernel: usize,
}

impl Product {
    fn bytes(&self) -> f64 {
        let row = self.ty.row();
        self.weights * row.block_bytes as f64 / row.block_len as f64
    }

    fn ops(&self) -> f64 {
        2.0 * self.weights * self.tokens
    }

    /// Of the rate at which the CPU multiplies with many tokens, what the few that meet an expert in a prompt reach.
    fn share_of_many(&self, work: &Work, host: &Host) -> f64 {
        if !self.is_stack || work.has_few(self) {
            return 1.0;
        }
        let half = host.kernel(self.ty).map_or(CPU_EXPERT_TOKENS, |k| {
            EXPERT_TOKENS as f64 * (k.prompt_gflops / k.experts_prompt_gflops - 1.0).max(0.0)
        });
        self.tokens / (self.tokens + half)
    }
}

/// What a block does beside products.
#[derive(Clone, Copy, Debug, Default)]
enum Scan {
    #[default]
    None,
    /// Heads, KV heads, their width, and positions that a token sees on average.
    Attention { n_heads: usize, n_kv_heads: usize, head_dim: usize, seen: f64 },
    /// Elements of all V heads, and of the state.
    Delta { n_value: usize, n_state: usize },
}

/// What a share of a block does in one step.
#[derive(Clone, Debug, Default)]
pub(super) struct Work {
    n_tokens: usize,
    products: Vec<Product>,
    /// Bytes of states, keys and values read and written.
    cache: f64,
    scan: Scan,
    /// Stages between barriers on the CPU.
    n_stages: f64,
    /// Kernels of a token on a GPU.
    n_kernels: f64,
    /// Of them, those that choose what the other shares compute, and so come before these.
    n_leading: f64,
    /// Latency of a token on a GPU beside its kernels and their bytes (before the other shares, if any kernel is),
    /// microseconds.
    token_us: f64,
    /// The same of a prompt batch.
    prompt_us: f64,
}

impl Work {
    /// Whether `product` is of experts that a few tokens at most have in common.
    fn has_few(&self, product: &Product) -> bool {
        product.is_stack && self.n_tokens < PROMPT_FROM
    }

    /// `share` of a matrix in kernel number `kernel`.
    fn add(&mut self, kernel: usize, w: &Weight, share: f64) {
        let weights = (w.n_rows() * w.n_cols) as f64 * share;
        self.products.push(Product { ty: w.ty, weights, tokens: self.n_tokens as f64, is_stack: false, kernel });
    }
}

/// Work of the part of length `n` of `block` on `n_tokens` tokens, the cache holding `n_past` positions before
/// the last of them.
pub(super) fn work(block: &Block<Weight>, n: usize, home: bool, n_tokens: usize, n_past: usize, sizes: &Sizes) -> Work {
    let tokens = n_tokens as f64;
    let mut work = Work { n_tokens, ..Work::default() };
    match block {
        Block::Embed(b) => {
            work.cache = tokens * (b.token_embd.row_bytes() + 4 * b.n_embd) as f64;
            (work.n_stages, work.n_kernels) = (1.0, 1.0);
        }
        Block::Attention(b) => {
            [&b.attn_q, &b.attn_k, &b.attn_v].into_iter().for_each(|l| work.add(0, &l.weight, 1.0));
            work.add(1, &b.attn_output.weight, 1.0);
            let seen = n_past as f64 + tokens / 2.0;
            let (n_heads, n_kv_heads, head_dim) = (b.shape.n_heads, b.shape.n_kv_heads, b.shape.head_dim);
            work.cache = b.shape.kv_bytes_per_token(sizes.kv_dtype) as f64 * (seen + tokens);
            work.scan = Scan::Attention { n_heads, n_kv_heads, head_dim, seen };
            (work.n_stages, work.n_kernels, work.prompt_us) = (5.0, 6.0, GPU_MIXER_US);
        }
        Block::DeltaNet(b) => {
            let inputs = [&b.attn_qkv, &b.attn_gate, &b.ssm_beta, &b.ssm_alpha];
            inputs.into_iter().for_each(|l| work.add(0, &l.weight, 1.0));
            work.add(1, &b.ssm_out.weight, 1.0);
            work.cache = 2.0 * b.shape.state_bytes() as f64;
            work.scan = Scan::Delta { n_value: b.shape.n_value(), n_state: b.shape.recurrent_len() };
            (work.n_stages, work.n_kernels) = (4.0, 4.0);
            (work.token_us, work.prompt_us) = (GPU_DELTA_STEP_US, GPU_MIXER_US);
        }
        Block::Ffn(b) => {
            let share = n as f64 / b.shape.n_ff as f64;
            [&b.ffn_gate, &b.ffn_up].into_iter().for_each(|l| work.add(0, &l.weight, share));
            work.add(1, &b.ffn_down.weight, share);
            (work.n_stages, work.n_kernels, work.prompt_us) = (3.0, 3.0, GPU_FEED_FORWARD_US);
        }
        Block::Moe(b) => {
            let used = b.shape.n_used as f64 / b.shape.n_experts as f64;
            let touched = 1.0 - (1.0 - used).powf(tokens); // of the experts, by any token: routing is uniform
            let share = n as f64 / b.shape.n_experts as f64;
            for (kernel, l) in [(1, &b.ffn_gate_exps), (1, &b.ffn_up_exps), (2, &b.ffn_down_exps)] {
                work.add(kernel, &l.weight, share * touched);
                let stack = work.products.last_mut().expect("just added");
                (stack.tokens, stack.is_stack) = (tokens * used / touched, true);
            }
            (work.n_stages, work.n_kernels, work.prompt_us) = (3.0, 2.0, GPU_FEED_FORWARD_US);
            if home {
                work.add(0, &b.ffn_gate_inp, 1.0);
                if let Some(s) = &b.shared {
                    [&s.ffn_gate_shexp, &s.ffn_up_shexp].into_iter().for_each(|l| work.add(1, &l.weight, 1.0));
                    work.add(2, &s.ffn_down_shexp.weight, 1.0);
                }
                (work.n_stages, work.n_kernels) = (4.0, 3.0);
                (work.token_us, work.n_leading) = (GPU_ROUTER_US, 1.0);
            }
        }
        Block::Head(b) => {
            work.add(0, &b.output.weight, 1.0);
            work.products[0].tokens = 1.0;
            (work.n_stages, work.n_kernels) = (2.0, 2.0);
        }
    }
    work
}

impl Work {
    /// The same about `share` of the routed experts.
    fn of_experts(&self, share: f64) -> Self {
        let mut work = self.clone();
        work.products.iter_mut().filter(|p| p.is_stack).for_each(|p| p.weights *= share);
        work
    }

    /// Bytes moved.
    pub fn bytes(&self) -> f64 {
        self.cache + self.products.iter().map(Product::bytes).sum::<f64>()
    }
}

/// Bytes that one generated token moves in all blocks of `model` under `plan`, after `n_past` others: the weights
/// it uses, states read and written, and keys and values of every position.
pub fn token_bytes(model: &Model, plan: &Plan, n_past: usize) -> u64 {
    token_bytes_by_device(model, plan, n_past).iter().map(|(_, bytes)| bytes).sum::<f64>() as u64
}

/// Seconds in which the devices of `plan` could move the bytes of [`token_bytes`], main memory at `read_gb_per_s`, GPUs
/// at their measured bandwidths, one device after the other: a rate times this is the share of the roof.
pub fn token_roof_seconds(model: &Model, plan: &Plan, facts: &Machine, read_gb_per_s: f64, n_past: usize) -> f64 {
    let gb_per_s = |device| match device {
        Device::Cpu => read_gb_per_s,
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

/// Weights of one type on the CPU: GB/s for few tokens, and 10^9 operations per second for many.
fn cpu_rates(host: &Host, threads: usize, ty: TensorType, is_experts: bool) -> (f64, f64) {
    match host.kernel(ty) {
        Some(kernel) => {
            let share = host.read_gb_per_s(threads) / host.read_gb_per_s(host.threads);
            let decode = if is_experts { kernel.experts_gb_per_s } else { kernel.decode_gb_per_s };
            (decode * share, kernel.prompt_gflops * threads as f64 / host.threads as f64)
        }
        None => {
            let (gb, gflops) = per_thread(host.isa, ty);
            let t = threads as f64;
            ((host.read_gb_per_s(threads) * CPU_GEMV_SHARE).min(gb * t), gflops * t)
        }
    }
}

/// What a CPU that waits for a GPU saves of its next share of a block: it reads weights ahead meanwhile, of a mixture
/// those of the experts that the GPU foresees.
#[derive(Clone, Copy, Debug, Default)]
struct Ahead {
    /// Of the time that it waits, what it has not to read later.
    useful: f64,
    /// Seconds that it saves at most.
    most: f64,
}

impl Ahead {
    /// Of `work`, a share of `block`.
    fn new(rates: &Rates, block: &Block<Weight>, work: &Work) -> Self {
        let Rates::Cpu { host, threads } = *rates else { return Self::default() };
        let cached = (tandem_cpu::AHEAD_BYTES * threads) as f64 / host.read_gb_per_s(threads) / 1e9;
        let useful = if matches!(block, Block::Moe(_)) { CPU_AHEAD_EXPERTS } else { CPU_AHEAD_ROWS };
        Self { useful, most: useful * cached.min(cpu_read_seconds(host, threads, work)) }
    }

    /// Seconds saved where it has waited `waited` seconds.
    fn seconds(&self, waited: f64) -> f64 {
        (self.useful * waited).min(self.most)
    }
}

/// One token in a block, by the devices of its place. Routing decides anew for every token how many of the experts that
/// it uses the CPU has, and both sides wait for each other in every block, so a mixture of both is a list of cases:
/// the mean of the longer side is more than the longer of both means.
#[derive(Clone, Debug, Default)]
pub(super) struct Token {
    cases: Vec<Case>,
    /// Seconds before the share that is not at home can begin.
    lead: f64,
    is_at_home_on_gpu: bool,
    is_shared: bool,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    probability: f64,
    /// Seconds of the share at home, and of the other one.
    seconds: [f64; 2],
    ahead: Ahead,
}

/// Cases of uniform routing that are so much rarer than the likeliest are left out.
const RARE: f64 = 1e-5;

impl Token {
    /// In `block`, placed at `place`, behind `n_past` others. `misses`: the probability of each number of experts that
    /// the GPU of a shared mixture lacks, from none to all that a token uses; `None`: routing is uniform.
    pub fn new<'a>(
        block: &Block<Weight>,
        place: &[Share],
        rates: impl Fn(Device) -> Rates<'a>,
        n_past: usize,
        sizes: &Sizes,
        misses: Option<&[f64]>,
    ) -> Self {
        let home = &place[0];
        let part = |n: usize, is_home: bool| work(block, n, is_home, 1, n_past, sizes);
        let at_home = part(home.part.len(), true);
        let mut token = Self {
            lead: rates(home.device).leading_seconds(&at_home),
            is_at_home_on_gpu: home.device != Device::Cpu,
            is_shared: place.len() > 1,
            cases: Vec::new(),
        };
        let Some(other) = place.get(1) else {
            let seconds = [rates(home.device).seconds(&at_home), 0.0];
            token.cases.push(Case { probability: 1.0, seconds, ahead: Ahead::default() });
            return token;
        };
        let case = |probability: f64, at_home: &Work, elsewhere: &Work| Case {
            probability,
            seconds: [rates(home.device).seconds(at_home), rates(other.device).seconds(elsewhere)],
            ahead: Ahead::new(&rates(other.device), block, elsewhere),
        };
        match block {
            Block::Moe(b) if !home.part.is_empty() => {
                let (n, n_used) = (b.shape.n_experts, b.shape.n_used);
                let misses = match misses {
                    Some(misses) => {
                        assert_eq!(misses.len(), n_used + 1, "of none to all experts of a token");
                        misses.iter().copied().enumerate().collect()
                    }
                    None => uniform_misses(n, other.part.len(), n_used),
                };
                let (at_home, elsewhere) = (part(n, true), part(n, false));
                let share = |k: usize| k as f64 / n_used as f64;
                let case = |(k, p)| case(p, &at_home.of_experts(share(n_used - k)), &elsewhere.of_experts(share(k)));
                token.cases = misses.into_iter().filter(|(_, p)| *p > 0.0).map(case).collect();
            }
            _ => token.cases.push(case(1.0, &at_home, &part(other.part.len(), false))),
        }
        token
    }

    fn mean(&self, seconds: impl Fn(&Case) -> f64) -> f64 {
        self.cases.iter().map(|c| c.probability * seconds(c)).sum()
    }

    /// Seconds until all is there, where the CPU had `waited` seconds to read ahead in.
    pub fn seconds(&self, waited: f64) -> f64 {
        self.mean(|c| match self.is_shared {
            true => c.seconds[0].max(self.lead + c.seconds[1] - c.ahead.seconds(waited)),
            false => c.seconds[0],
        })
    }

    /// Of them, seconds that reading ahead saves one side.
    pub fn ahead_seconds(&self, waited: f64) -> f64 {
        self.mean(|c| c.ahead.seconds(waited))
    }

    /// Seconds of share number `nth` of the place alone.
    pub fn share_seconds(&self, nth: usize) -> f64 {
        self.mean(|c| c.seconds[nth])
    }
}

/// How many of `n_used` different ones of `n` experts, all equally probable, are among `n_cpu` of them, and how
/// probably: the hypergeometric distribution, without what is rare.
fn uniform_misses(n: usize, n_cpu: usize, n_used: usize) -> Vec<(usize, f64)> {
    let (least, most) = ((n_used + n_cpu).saturating_sub(n), n_used.min(n_cpu));
    let likeliest = ((n_used + 1) * (n_cpu + 1) / (n + 2)).clamp(least, most);
    // From `k` to `k + 1`.
    let ratio = |k: usize| {
        let (more, fewer) = ((n_cpu - k) * (n_used - k), (k + 1) * (n + k + 1 - n_cpu - n_used));
        more as f64 / fewer as f64
    };
    let mut misses = vec![(likeliest, 1.0)];
    let mut weight = 1.0;
    for k in likeliest..most {
        weight *= ratio(k);
        misses.push((k + 1, weight));
    }
    weight = 1.0;
    for k in (least..likeliest).rev() {
        weight /= ratio(k);
        misses.push((k, weight));
    }
    misses.retain(|(_, weight)| *weight > RARE);
    let all: f64 = misses.iter().map(|(_, weight)| weight).sum();
    misses.iter_mut().for_each(|(_, weight)| *weight /= all);
    misses
}

/// How long the CPU has waited, block after block of a token.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Waiting {
    /// Seconds that a GPU has been alone since the CPU had something to compute.
    alone: f64,
    /// Whether that was a share of a mixture: in its shadow the GPU foresees the experts of the next one.
    after_mixture: bool,
}

impl Waiting {
    /// Passes `block`, which takes `token`; seconds that the CPU had to read ahead in before its share, if it has one.
    pub fn pass(&mut self, block: &Block<Weight>, token: &Token) -> f64 {
        let is_mixture = matches!(block, Block::Moe(_));
        match (token.is_at_home_on_gpu, token.is_shared) {
            (false, _) => {
                *self = Self::default();
                0.0
            }
            (true, false) => {
                self.alone += token.seconds(0.0);
                0.0
            }
            (true, true) => {
                let waited = if is_mixture && !self.after_mixture { 0.0 } else { self.alone + token.lead };
                *self = Self { alone: 0.0, after_mixture: is_mixture };
                waited
            }
        }
    }
}

/// Seconds in which the CPU reads the weights of `work`, a few tokens.
fn cpu_read_seconds(host: &Host, threads: usize, work: &Work) -> f64 {
    let rate = |p: &Product| cpu_rates(host, threads, p.ty, work.has_few(p)).0;
    work.products.iter().map(|p| p.bytes() / rate(p) / 1e9).sum()
}

fn cpu_seconds(host: &Host, threads: usize, work: &Work) -> f64 {
    let rates = |p: &Product| cpu_rates(host, threads, p.ty, work.has_few(p));
    let read = cpu_read_seconds(host, threads, work);
    let multiply: f64 = work.products.iter().map(|p| p.ops() / (rates(p).1 * p.share_of_many(work, host)) / 1e9).sum();
    let share = match host.isa {
        Isa::Amx | Isa::Avx512 if !host.kernels.is_empty() => CPU_SCAN_SHARE_AVX512,
        _ => CPU_SCAN_SHARE,
    };
    let scan = work.scan_ops() / (cpu_rates(host, threads, TensorType::F32, false).1 * share) / 1e9;
    let cache = work.cache / (host.read_gb_per_s(threads) * CPU_GEMV_SHARE) / 1e9;
    let n_begun = work.products.iter().filter(|p| !p.is_stack).map(|p| p.kernel + 1).max().unwrap_or(0);
    let fixed_us = work.n_stages * CPU_STAGE_US + n_begun as f64 * CPU_BEGIN_US;
    read.max(multiply) + cache.max(scan) + fixed_us * 1e-6
}

/// One token of a graph, or a few.
fn gpu_token_seconds(gpu: &Gpu, work: &Work) -> f64 {
    let bytes_per_us = gpu.bandwidth_gb_per_s * 1e3;
    let mut us = work.n_kernels * (gpu.kernel_us + GPU_ROUND_TRIPS_US) + work.token_us;
    for kernel in 0..work.products.iter().map(|p| p.kernel + 1).max().unwrap_or(0) {
        let products = || work.products.iter().filter(|p| p.kernel == kernel);
        let bytes = products().map(Product::bytes).sum::<f64>();
        let tail = if products().any(|p| p.ty.row().block_len == 256) { 2.0 } else { 1.0 };
        us += bytes / (bytes_per_us * GPU_GEMV_SHARE) + tail * (bytes / 1e6 * GPU_TAIL_US_PER_MB).min(GPU_TAIL_US);
    }
    us += match work.scan {
        Scan::Attention { n_heads, n_kv_heads, head_dim, seen } => {
            let group = n_heads / n_kv_heads;
            let n_blocks = (n_kv_heads * group.div_ceil(GPU_PART_HEADS)) as f64;
            let most = (2.0 * gpu.n_sms as f64 / n_blocks).floor().clamp(1.0, GPU_PARTS);
            let parts = (seen / GPU_PART_POSITIONS).ceil().clamp(1.0, most);
            let positions = (seen / parts).max(GPU_PART_POSITIONS.min(seen));
            let ops = 4.0 * positions * (group.min(GPU_PART_HEADS) * head_dim) as f64;
            (ops / GPU_PART_GOPS / 1e3).max(work.cache / bytes_per_us) + parts * GPU_COMBINE_US
        }
        Scan::None | Scan::Delta { .. } => work.cache / bytes_per_us,
    };
    us * 1e-6 * work.n_tokens.div_ceil(GPU_PASS) as f64
}

/// A batch of a prompt.
fn gpu_prompt_seconds(gpu: &Gpu, work: &Work) -> f64 {
    let bytes_per_s = gpu.bandwidth_gb_per_s * 1e9;
    let mma = gpu.mma_tflops * 1e12;
    let multiply = |p: &Product| match gpu.dense_tflops {
        _ if p.tokens <= 1.0 => p.bytes() / bytes_per_s,
        _ if p.ty == TensorType::F32 => (p.ops() / (mma / 8.0)).max(p.bytes() / bytes_per_s),
        Some(tflops) if !p.is_stack && p.weights >= GPU_DENSE_WEIGHTS && p.tokens >= GPU_DENSE_TOKENS => {
            let decode = if p.ty.is_quantised() { p.weights * GPU_DENSE_BYTES + p.bytes() } else { p.bytes() };
            p.ops() / (tflops * 1e12 * GPU_DENSE_SHARE) + decode / bytes_per_s
        }
        _ => {
            let tiles = (p.tokens / GPU_TILE_ROWS).ceil();
            let multiply = 2.0 * p.weights * tiles * GPU_TILE_ROWS / (mma * GPU_TILE_SHARE);
            let decode = p.weights * tiles / (GPU_TILE_WEIGHTS_PER_S * gpu.n_sms as f64);
            multiply.max(decode).max(p.bytes() / bytes_per_s)
        }
    };
    let scan = match work.scan {
        Scan::None => work.cache / bytes_per_s,
        Scan::Attention { .. } => (work.scan_ops() / (mma * GPU_FLASH_SHARE)).max(work.cache / bytes_per_s),
        Scan::Delta { n_value, .. } => {
            let tokens = work.n_tokens as f64;
            tokens * (GPU_DELTA_TOKEN_US * 1e-6 + GPU_DELTA_BYTES * n_value as f64 / bytes_per_s)
        }
    };
    work.products.iter().map(multiply).sum::<f64>() + scan + work.prompt_us * 1e-6
}

impl Work {
    /// Operations of attention scores and sums, or of the delta rule.
    fn scan_ops(&self) -> f64 {
        let tokens = self.n_tokens as f64;
        match self.scan {
            Scan::None => 0.0,
            Scan::Attention { n_heads, head_dim, seen, .. } => 4.0 * (n_heads * head_dim) as f64 * tokens * seen,
            Scan::Delta { n_state, .. } => 8.0 * n_state as f64 * tokens,
        }
    }
}

impl Rates<'_> {
    /// Seconds that `work` takes.
    pub fn seconds(&self, work: &Work) -> f64 {
        match *self {
            Rates::Cpu { host, threads } => cpu_seconds(host, threads, work),
            Rates::Gpu(gpu) if work.n_tokens < PROMPT_FROM => gpu_token_seconds(gpu, work),
            Rates::Gpu(gpu) => gpu_prompt_seconds(gpu, work),
        }
    }

    /// Of them, seconds before another device can begin with its share.
    fn leading_seconds(&self, work: &Work) -> f64 {
        match self {
            Rates::Gpu(gpu) if work.n_leading > 0.0 => {
                1e-6 * (work.n_leading * (gpu.kernel_us + GPU_ROUND_TRIPS_US) + work.token_us)
            }
            _ => 0.0,
        }
    }
}

/// Seconds of one token outside its blocks. `gpu`: the one that begins the step, and workers wake meanwhile; `n_vocab`:
/// of logits from which the host chooses, 0 where a GPU does.
pub(super) fn fixed_seconds(gpu: Option<&Gpu>, n_vocab: usize) -> f64 {
    let begin = gpu.map_or(CPU_WAKE_US, |gpu| gpu.launch_us + GPU_STEP_US);
    1e-6 * (begin + n_vocab as f64 / 1000.0 * CPU_SAMPLE_US_PER_1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against drawing one expert after the other.
    #[test]
    fn misses_of_uniform_routing() {
        for (n, n_cpu, n_used) in
            [(256usize, 102usize, 8), (256, 255, 8), (8, 3, 8), (8, 0, 2), (8, 8, 2), (60, 7, 10), (1024, 700, 64)]
        {
            let mut expected = vec![0.0; n_used + 1];
            expected[0] = 1.0;
            for drawn in 0..n_used {
                for k in (0..=drawn).rev() {
                    let is_cpu = n_cpu.saturating_sub(k) as f64 / (n - drawn) as f64;
                    expected[k + 1] += expected[k] * is_cpu;
                    expected[k] *= 1.0 - is_cpu;
                }
            }
            let misses = uniform_misses(n, n_cpu, n_used);
            assert!((misses.iter().map(|(_, p)| p).sum::<f64>() - 1.0).abs() < 1e-12);
            for (k, expected) in expected.into_iter().enumerate() {
                let p = misses.iter().find(|(n, _)| *n == k).map_or(0.0, |(_, p)| *p);
                assert!((p - expected).abs() < 2e-4, "{n_cpu} of {n}, {n_used} used, {k}: {p}, expected {expected}");
            }
        }
    }
}

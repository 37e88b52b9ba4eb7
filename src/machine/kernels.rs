//! What the CPU kernels reach on this machine: feed-forward blocks of each common type, their weights together larger
//! than the caches of any processor, run on one token, and one of them on a batch; and mixtures of experts, as shares
//! of a step whose other side answers at once.

use super::{CPU_STAGE_US, KernelRate};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;
use tandem_cpu::handoff::{Handoff, Memory, Task};
use tandem_cpu::{Backend, Error, Isa, Options, State, StateSize};
use tandem_spec::{
    Batch, Block, Ffn, FfnShape, KvDtype, Linear, Model, Moe, MoeShape, TensorSource, TensorType, Weight,
};

/// Types that are measured; others take the rate of the one that is nearest in size.
const TYPES: [TensorType; 3] = [TensorType::Q4_K, TensorType::Q6_K, TensorType::Q8_0];
const N_EMBD: usize = 4096;
const N_FF: usize = 8192;
/// Routed experts: those of the 35B-A3B.
const EXPERT_EMBD: usize = 2048;
const EXPERT_FF: usize = 512;
const N_USED: usize = 8;
/// Tokens of each kind in a prompt; kinds share no expert with each other. About
/// [`EXPERT_TOKENS`](super::EXPERT_TOKENS), also of the first few kinds alone, spread as routing spreads them: kernels
/// take tokens in groups, and 17 cost more than one more than 16.
const KINDS: [usize; 8] = [14, 18, 10, 22, 15, 17, 12, 20];
/// How long a rate of all types is measured for a file that is kept. The mean of all steps counts, as it does for a
/// text: others on a shared machine come and go within milliseconds.
const SECONDS: f64 = 0.5;
/// Tokens of the batch: enough that decoding the weights for them costs as little as in the batches of long prompts.
const PROMPT_TOKENS: usize = 256;

/// Zeros: speeds do not depend on the values.
struct Zeros(Vec<u8>);

impl TensorSource for Zeros {
    fn bytes(&self, _tensor: usize) -> &[u8] {
        &self.0
    }
}

fn weight(ty: TensorType, n_rows: usize, n_cols: usize) -> Weight {
    Weight::new(String::new(), 0, ty, n_rows, n_cols)
}

fn linear(ty: TensorType, n_rows: usize, n_cols: usize) -> Linear<Weight> {
    Linear { weight: weight(ty, n_rows, n_cols), scale: None, bias: None }
}

/// Of what rates are measured, and how.
#[derive(Clone, Copy)]
pub(super) struct Test<'a> {
    /// At least one.
    pub types: &'a [TensorType],
    pub threads: usize,
    pub isa: Isa,
    /// Of the weights of all types, or a block of each.
    pub bytes: usize,
    /// How long one token is measured.
    pub decode_seconds: f64,
}

/// Rates of every measured type with `threads` threads, on `bytes` of weights or a block of each; of those for which
/// there is memory.
pub(super) fn measure(threads: usize, isa: Isa, bytes: usize) -> Vec<KernelRate> {
    let rates =
        |types: &[TensorType]| {
            let test = Test { types, threads, isa, bytes, decode_seconds: SECONDS };
            let of_experts = experts(test)?;
            let all = types.iter().zip(dense(test)?).zip(of_experts);
            let rate = |((&ty, (decode_gb_per_s, prompt_gflops)), (experts_gb_per_s, experts_prompt_gflops))| {
                KernelRate { ty, decode_gb_per_s, experts_gb_per_s, prompt_gflops, experts_prompt_gflops }
            };
            Ok::<_, Error>(all.map(rate).collect::<Vec<_>>())
        };
    // Where there is no memory for all of them, one after the other.
    rates(&TYPES).unwrap_or_else(|_| TYPES.iter().filter_map(|ty| rates(&[*ty]).ok()).flatten().collect())
}

/// GB/s of one token and 10^9 operations per second of many, of each type in feed-forward blocks; an error where those
/// would take more than four times the bytes of `test`: there is no memory for them.
pub(super) fn dense(test: Test) -> Result<Vec<(f64, f64)>, Error> {
    let mut blocks = Blocks::new(test)?;
    let (decode, prompt) = (blocks.decode_gb_per_s(test.decode_seconds)?, blocks.prompt_gflops()?);
    Ok(decode.into_iter().zip(prompt).collect())
}

/// The same of experts, as the workers of a hybrid plan meet them: a mixture of each type, on the bytes of `test` in
/// all or of the fewest experts that will do. One token after the other takes all of them; of a prompt each has about
/// [`EXPERT_TOKENS`](super::EXPERT_TOKENS) tokens.
pub(super) fn experts(test: Test) -> Result<Vec<(f64, f64)>, Error> {
    let Test { types, threads, isa, bytes, decode_seconds } = test;
    let matrix = |ty: TensorType| weight(ty, EXPERT_FF, EXPERT_EMBD).n_bytes();
    let of_all: usize = types.iter().map(|ty| 3 * N_USED * matrix(*ty)).sum();
    if 2 * of_all > 4 * bytes {
        return Err(Error::WeightMemory { bytes: 2 * of_all });
    }
    let n_kinds = (bytes / of_all).max(2);
    let n_tokens: usize = KINDS.iter().take(n_kinds).sum();
    let n_experts = n_kinds * N_USED;
    let (n_ff, n_embd) = (n_experts * EXPERT_FF, n_experts * EXPERT_EMBD);
    let block = |&ty: &TensorType| Moe {
        layer: 0,
        shape: MoeShape {
            n_embd: EXPERT_EMBD,
            n_experts,
            n_used: N_USED,
            n_ff: EXPERT_FF,
            n_ff_shared: 0,
            rms_eps: 1e-6,
        },
        experts: 0..n_experts,
        ffn_norm: weight(TensorType::F32, 1, EXPERT_EMBD),
        ffn_gate_inp: weight(TensorType::F32, 0, EXPERT_EMBD),
        ffn_gate_exps: linear(ty, n_ff, EXPERT_EMBD),
        ffn_up_exps: linear(ty, n_ff, EXPERT_EMBD),
        ffn_down_exps: linear(ty, n_embd, EXPERT_FF),
        shared: None,
    };
    let largest = types.iter().map(|ty| n_experts * matrix(*ty)).max().unwrap_or(0);
    let blocks = types.iter().map(|ty| Block::Moe(block(ty))).collect();
    let (backend, mut state) = load(blocks, EXPERT_EMBD, largest, (threads, isa), n_tokens)?;
    let (mut x, mut sum) = (vec![1.0; n_tokens * EXPERT_EMBD], vec![0.0; n_tokens * EXPERT_EMBD]);
    let ids: Vec<AtomicU32> = (0..n_tokens * N_USED).map(|_| AtomicU32::new(0)).collect();
    let weights = vec![1.0; n_tokens * N_USED];
    let memory = Memory {
        x: x.as_mut_ptr(),
        sum: sum.as_mut_ptr(),
        len: x.len(),
        ids: ids.as_ptr().cast(),
        weights: weights.as_ptr(),
        n_choices: ids.len(),
    };
    let mut seconds = |n_tasks: usize, n_tokens: usize, whole: f64| {
        let batch = Batch::single(0, 0, &vec![0; n_tokens], false);
        let desk = Desk { memory, ids: &ids[..n_tokens * N_USED], n_kinds };
        mean_seconds(types.len(), whole, &mut |i| {
            let tasks = match i {
                Some(i) => vec![Task { blocks: i..i + 1, is_share: true }; n_tasks],
                None => vec![Task { blocks: 0..0, is_share: false }],
            };
            backend.serve(&tasks, &batch, &mut state, &desk, &mut []).map(|_| ())
        })
    };
    let (decode, prompt) = (seconds(n_kinds, 1, decode_seconds)?, seconds(1, n_tokens, SECONDS)?);
    let ops = 2.0 * (3 * EXPERT_EMBD * EXPERT_FF * N_USED * n_tokens) as f64;
    let stages = 3.0 * CPU_STAGE_US * 1e-6 * n_kinds as f64;
    let rates = types.iter().zip(decode).zip(prompt).map(|((&ty, decode), prompt)| {
        let reading = (decode - stages).max(decode / 2.0);
        ((3 * n_experts * matrix(ty)) as f64 / reading / 1e9, ops / prompt / 1e9)
    });
    Ok(rates.collect())
}

/// Of `n` things that `run` does, the mean seconds of each beyond those of a step that does nothing (`None`): waking
/// the workers, which a token has once. They take turns for `whole` seconds in all, after a round that warms up. At
/// least half counts, whatever else the machine does while nothing is measured.
fn mean_seconds(
    n: usize,
    whole: f64,
    run: &mut dyn FnMut(Option<usize>) -> Result<(), Error>,
) -> Result<Vec<f64>, Error> {
    let things = || (0..n).map(Some).chain([None]);
    things().try_for_each(&mut *run)?;
    let (mut sums, mut n_rounds, begin) = (vec![0.0; n + 1], 0.0, Instant::now());
    while n_rounds < 1.0 || begin.elapsed().as_secs_f64() < whole {
        for (thing, sum) in things().zip(&mut sums) {
            let start = Instant::now();
            run(thing)?;
            *sum += start.elapsed().as_secs_f64();
        }
        n_rounds += 1.0;
    }
    let nothing = sums.pop().expect("one more than `n`");
    Ok(sums.into_iter().map(|sum| (sum - nothing).max(sum / 2.0) / n_rounds).collect())
}

/// The other side of a step of mixtures, always ready. A token of kind `i` is about experts `i`, `i + n_kinds` and so
/// on; the first tokens of task `i` are of kind `i`, the next of a prompt of `i + 1` (see [`KINDS`]).
struct Desk<'a> {
    memory: Memory,
    ids: &'a [AtomicU32],
    n_kinds: usize,
}

// SAFETY: the workers use the memory by turns, as they do in a step.
unsafe impl Sync for Desk<'_> {}

// SAFETY: nobody else uses the memory while the workers serve, and the ids change in `wait` only.
unsafe impl Handoff for Desk<'_> {
    fn memory(&self) -> Memory {
        self.memory
    }

    fn wait(&self, task: usize) -> bool {
        let kinds = KINDS.iter().enumerate().flat_map(|(kind, &n)| std::iter::repeat_n(task + kind, n));
        for (ids, kind) in self.ids.chunks_exact(N_USED).zip(kinds) {
            for (i, id) in ids.iter().enumerate() {
                id.store((kind % self.n_kinds + i * self.n_kinds) as u32, Ordering::Relaxed);
            }
        }
        true
    }

    fn post(&self, _: usize) {}
}

/// `blocks` of width `n_embd` with weights of zeros, of which a matrix takes `largest` bytes at most, and a state for
/// `n_batch` tokens.
fn load(
    blocks: Vec<Block<Weight>>,
    n_embd: usize,
    largest: usize,
    (threads, isa): (usize, Isa),
    n_batch: usize,
) -> Result<(Backend, State), Error> {
    let (n_layers, indices) = (blocks.len(), Vec::from_iter(0..blocks.len()));
    let (arch, name, mtp) = (String::new(), String::new(), None);
    let model = Model { arch, name, n_embd, n_vocab: 1, n_layers, n_ctx_train: 1, blocks, mtp };
    let backend = Backend::load(&model, &indices, &Zeros(vec![0; largest]), Options { threads, isa }, &|_| {})?;
    let state = backend.state(StateSize { n_slots: 1, n_ctx: n_batch, n_batch, kv_dtype: KvDtype::Bf16 })?;
    Ok((backend, state))
}

/// As many feed-forward blocks of each type; they run type by type, so that one evicts the other from the caches.
struct Blocks {
    backend: Backend,
    state: State,
    x: Vec<f32>,
    /// Of each type, bytes of its weights in a block.
    n_bytes: Vec<usize>,
    n_blocks: usize,
}

impl Blocks {
    fn new(Test { types, threads, isa, bytes, .. }: Test) -> Result<Self, Error> {
        let block = |&ty: &TensorType| Ffn {
            layer: 0,
            shape: FfnShape { n_embd: N_EMBD, n_ff: N_FF, rms_eps: 1e-6 },
            ffn_norm: weight(TensorType::F32, 1, N_EMBD),
            ffn_gate: linear(ty, N_FF, N_EMBD),
            ffn_up: linear(ty, N_FF, N_EMBD),
            ffn_down: linear(ty, N_EMBD, N_FF),
        };
        let n_bytes = |ty: &TensorType| 3 * weight(*ty, N_FF, N_EMBD).n_bytes();
        let n_bytes: Vec<usize> = types.iter().map(n_bytes).collect();
        let of_all: usize = n_bytes.iter().sum();
        if of_all > 4 * bytes {
            return Err(Error::WeightMemory { bytes: of_all });
        }
        let n_blocks = bytes.div_ceil(of_all).max(1);
        let blocks: Vec<_> = types.iter().flat_map(|ty| vec![block(ty); n_blocks]).collect();
        let largest = n_bytes.iter().max().map_or(0, |n| n / 3);
        let blocks = blocks.into_iter().map(Block::Ffn).collect();
        let (backend, state) = load(blocks, N_EMBD, largest, (threads, isa), PROMPT_TOKENS)?;
        Ok(Self { backend, state, x: vec![1.0; PROMPT_TOKENS * N_EMBD], n_bytes, n_blocks })
    }

    /// Of each type, seconds of `n_tokens` through `n_blocks` of its blocks, measured for `whole` seconds.
    fn seconds(&mut self, n_blocks: usize, n_tokens: usize, whole: f64) -> Result<Vec<f64>, Error> {
        let batch = Batch::single(0, 0, &vec![0; n_tokens], false);
        mean_seconds(self.n_bytes.len(), whole, &mut |i| {
            let blocks = i.map_or(0..0, |i| i * self.n_blocks..i * self.n_blocks + n_blocks);
            self.backend.run(blocks, &batch, &mut self.state, &mut self.x, &mut [])
        })
    }

    fn decode_gb_per_s(&mut self, whole: f64) -> Result<Vec<f64>, Error> {
        let seconds = self.seconds(self.n_blocks, 1, whole)?;
        Ok(self.n_bytes.iter().zip(seconds).map(|(n, s)| (n * self.n_blocks) as f64 / s / 1e9).collect())
    }

    fn prompt_gflops(&mut self) -> Result<Vec<f64>, Error> {
        let ops = 2.0 * (3 * N_EMBD * N_FF * PROMPT_TOKENS) as f64;
        Ok(self.seconds(1, PROMPT_TOKENS, SECONDS)?.into_iter().map(|s| ops / s / 1e9).collect())
    }
}

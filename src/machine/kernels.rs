//! What the CPU kernels reach on this machine: feed-forward blocks of each common type, their weights together larger
//! than the caches of any processor, run on one token, and one of them on a batch.

use super::KernelRate;
use std::time::Instant;
use tandem_cpu::{Backend, Error, Isa, Options, State, StateSize};
use tandem_spec::{Batch, Block, Ffn, FfnShape, KvDtype, Linear, Model, TensorSource, TensorType, Weight};

/// Types that are measured; others take the rate of the one that is nearest in size.
const TYPES: [TensorType; 3] = [TensorType::Q4_K, TensorType::Q6_K, TensorType::Q8_0];
const N_EMBD: usize = 4096;
const N_FF: usize = 8192;
/// Steps of one token. Of steps the median counts: the fastest is 5 % faster than a text of many of them.
const DECODE_STEPS: usize = 9;
/// Tokens of the batch: enough that decoding the weights for them costs as little as in the batches of long prompts.
const PROMPT_TOKENS: usize = 256;
const PROMPT_STEPS: usize = 3;

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

/// Rates of every measured type with `threads` threads, on `bytes` of weights or a block of each; of those for which
/// there is memory.
pub(super) fn measure(threads: usize, isa: Isa, bytes: usize) -> Vec<KernelRate> {
    let rates = |types: &[TensorType]| rates(types, threads, isa, bytes);
    // Where there is no memory for all of them, one after the other.
    rates(&TYPES).unwrap_or_else(|_| TYPES.iter().filter_map(|ty| rates(&[*ty]).ok()).flatten().collect())
}

/// Rates of `types`, which are measured ones, on `bytes` of weights or a block of each; an error where those would take
/// more than four times as much: there is no memory for them.
pub(super) fn rates(types: &[TensorType], threads: usize, isa: Isa, bytes: usize) -> Result<Vec<KernelRate>, Error> {
    let mut blocks = Blocks::new(types, threads, isa, bytes)?;
    let (decode, prompt) = (blocks.decode_gb_per_s()?, blocks.prompt_gflops()?);
    let rates = types.iter().zip(decode.into_iter().zip(prompt));
    let rate = |(&ty, (decode_gb_per_s, prompt_gflops))| KernelRate { ty, decode_gb_per_s, prompt_gflops };
    Ok(rates.map(rate).collect())
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
    fn new(types: &[TensorType], threads: usize, isa: Isa, bytes: usize) -> Result<Self, Error> {
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
        let n_blocks = bytes.div_ceil(of_all.max(1)).max(1);
        let blocks: Vec<_> = types.iter().flat_map(|ty| vec![Block::Ffn(block(ty)); n_blocks]).collect();
        let source = Zeros(vec![0; n_bytes.iter().max().map_or(0, |n| n / 3)]);
        let (n_layers, indices) = (blocks.len(), Vec::from_iter(0..blocks.len()));
        let (arch, name, mtp) = (String::new(), String::new(), None);
        let model = Model { arch, name, n_embd: N_EMBD, n_vocab: 1, n_layers, n_ctx_train: 1, blocks, mtp };
        let backend = Backend::load(&model, &indices, &source, Options { threads, isa }, &|_| {})?;
        let size = StateSize { n_slots: 1, n_ctx: PROMPT_TOKENS, n_batch: PROMPT_TOKENS, kv_dtype: KvDtype::Bf16 };
        let state = backend.state(size)?;
        Ok(Self { backend, state, x: vec![1.0; PROMPT_TOKENS * N_EMBD], n_bytes, n_blocks })
    }

    /// Of each type, the median of `n_steps` of `n_tokens` through `n_blocks` of its blocks, after one that warms up.
    fn seconds(&mut self, n_blocks: usize, n_tokens: usize, n_steps: usize) -> Result<Vec<f64>, Error> {
        let batch = Batch::single(0, 0, &vec![0; n_tokens], false);
        let mut seconds = vec![Vec::new(); self.n_bytes.len()];
        for step in 0..=n_steps {
            for (i, seconds) in seconds.iter_mut().enumerate() {
                let (first, start) = (i * self.n_blocks, Instant::now());
                self.backend.run(first..first + n_blocks, &batch, &mut self.state, &mut self.x, &mut [])?;
                if step > 0 {
                    seconds.push(start.elapsed().as_secs_f64());
                }
            }
        }
        seconds.iter_mut().for_each(|seconds| seconds.sort_by(f64::total_cmp));
        Ok(seconds.iter().map(|seconds| seconds[n_steps / 2]).collect())
    }

    fn decode_gb_per_s(&mut self) -> Result<Vec<f64>, Error> {
        let seconds = self.seconds(self.n_blocks, 1, DECODE_STEPS)?;
        Ok(self.n_bytes.iter().zip(seconds).map(|(n, s)| (n * self.n_blocks) as f64 / s / 1e9).collect())
    }

    fn prompt_gflops(&mut self) -> Result<Vec<f64>, Error> {
        let ops = 2.0 * (3 * N_EMBD * N_FF * PROMPT_TOKENS) as f64;
        Ok(self.seconds(1, PROMPT_TOKENS, PROMPT_STEPS)?.into_iter().map(|s| ops / s / 1e9).collect())
    }
}

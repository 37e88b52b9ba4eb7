//! What the CPU kernels reach on this machine: feed-forward blocks of each common type, their weights larger than the
//! caches of any processor, run on one token, and one of them on a batch.

use super::KernelRate;
use std::time::Instant;
use tandem_cpu::{Backend, Isa, StateSize};
use tandem_spec::{Batch, Block, Ffn, FfnShape, KvDtype, Linear, Model, TensorSource, TensorType, Weight};

/// Types that are measured; others take the rate of the one that is nearest in size.
const TYPES: [TensorType; 3] = [TensorType::Q4_K, TensorType::Q6_K, TensorType::Q8_0];
const N_EMBD: usize = 4096;
const N_FF: usize = 8192;
/// Steps of one token; the fastest counts, since everything else on the machine only slows a step down.
const DECODE_STEPS: usize = 5;
/// Tokens of the batch: enough that decoding the weights for them costs as little as in the batches of long prompts.
const PROMPT_TOKENS: usize = 256;
const PROMPT_STEPS: usize = 2;

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

/// Rates of every measured type with `threads` threads, on `bytes` of weights or one block. A type that cannot be
/// measured (too little memory) is left out.
pub(super) fn measure(threads: usize, isa: Isa, bytes: usize) -> Vec<KernelRate> {
    TYPES.iter().filter_map(|&ty| measure_type(ty, threads, isa, bytes).ok()).collect()
}

fn measure_type(ty: TensorType, threads: usize, isa: Isa, bytes: usize) -> Result<KernelRate, tandem_cpu::Error> {
    let ffn = Ffn {
        layer: 0,
        shape: FfnShape { n_embd: N_EMBD, n_ff: N_FF, rms_eps: 1e-6 },
        ffn_norm: weight(TensorType::F32, 1, N_EMBD),
        ffn_gate: linear(ty, N_FF, N_EMBD),
        ffn_up: linear(ty, N_FF, N_EMBD),
        ffn_down: linear(ty, N_EMBD, N_FF),
    };
    let n_bytes = [&ffn.ffn_gate, &ffn.ffn_up, &ffn.ffn_down].map(|l| l.weight.n_bytes()).iter().sum::<usize>();
    let n = bytes.div_ceil(n_bytes).max(1);
    let source = Zeros(vec![0; ffn.ffn_gate.weight.n_bytes()]);
    let model = Model {
        arch: String::new(),
        name: String::new(),
        n_embd: N_EMBD,
        n_vocab: 1,
        n_layers: n,
        n_ctx_train: 1,
        blocks: vec![Block::Ffn(ffn); n],
        mtp: None,
    };
    let backend = Backend::load(&model, &Vec::from_iter(0..n), &source, tandem_cpu::Options { threads, isa }, &|_| {})?;
    let size = StateSize { n_slots: 1, n_ctx: PROMPT_TOKENS, n_batch: PROMPT_TOKENS, kv_dtype: KvDtype::Bf16 };
    let mut state = backend.state(size)?;
    let mut x = vec![1.0; PROMPT_TOKENS * N_EMBD];
    let mut fastest = |n_blocks: usize, n_tokens: usize, n_steps: usize| {
        let batch = Batch::single(0, 0, &vec![0; n_tokens], false);
        let mut seconds = f64::INFINITY;
        for _ in 0..=n_steps {
            let start = Instant::now();
            backend.run(0..n_blocks, &batch, &mut state, &mut x, &mut [])?;
            seconds = seconds.min(start.elapsed().as_secs_f64());
        }
        Ok::<_, tandem_cpu::Error>(seconds)
    };
    let decode_s = fastest(n, 1, DECODE_STEPS)?;
    let prompt_s = fastest(1, PROMPT_TOKENS, PROMPT_STEPS)?;
    let ops = 2.0 * (3 * N_EMBD * N_FF * PROMPT_TOKENS) as f64;
    Ok(KernelRate { ty, decode_gb_per_s: (n * n_bytes) as f64 / decode_s / 1e9, prompt_gflops: ops / prompt_s / 1e9 })
}

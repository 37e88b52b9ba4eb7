//! The CPU backend against the golden models, and against itself: chunk by chunk, batch by batch, and with keys
//! and values in bf16.

use super::golden::{Golden, golden_models, numbers, tokens};
use std::path::Path;
use tandem::gguf::File;
use tandem::model::describe;
use tandem_cpu::{Backend, Isa, Options, State, StateSize};
use tandem_spec::testing::{Rng, max_abs, relative_rms};
use tandem_spec::{Batch, KvDtype, Model, Sequence};

/// Tokens of the longest golden prompt.
const N_CTX: usize = 200;

/// The instruction sets that this processor has.
fn available() -> Vec<Isa> {
    let found: Vec<Isa> = Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect();
    for isa in Isa::ALL.iter().filter(|isa| !found.contains(isa)) {
        println!("skipped: this processor has no {}", isa.name());
    }
    found
}

/// A model with every block on the CPU.
struct OnCpu {
    model: Model,
    backend: Backend,
    size: StateSize,
}

impl OnCpu {
    fn load(path: &Path, isa: Isa, threads: usize, size: StateSize) -> Self {
        let name = path.display();
        let file = File::open(path).unwrap_or_else(|e| panic!("{name}: {e}"));
        let model = describe(&file).unwrap_or_else(|e| panic!("{name}: {e}"));
        let blocks: Vec<usize> = (0..model.blocks.len()).collect();
        let backend = Backend::load(&model, &blocks, &file, Options { threads, isa }, &|_| {});
        Self { backend: backend.unwrap_or_else(|e| panic!("{name}: {e}")), model, size }
    }

    fn golden(golden: &Golden, isa: Isa, threads: usize) -> Self {
        let size = StateSize { n_slots: 3, n_ctx: N_CTX, n_batch: N_CTX, kv_dtype: KvDtype::F32 };
        Self::load(&golden.path, isa, threads, size)
    }

    fn state(&self) -> State {
        self.backend.state(self.size).expect("memory for the states of a tiny model")
    }

    /// Logits `[wanted, n_vocab]` of one step.
    fn step(&self, state: &mut State, batch: &Batch) -> Vec<f32> {
        let mut x = vec![f32::NAN; batch.tokens.len() * self.model.n_embd];
        let mut logits = vec![f32::NAN; batch.wanted.len() * self.model.n_vocab];
        self.backend.run(0..self.model.blocks.len(), batch, state, &mut x, &mut logits).expect("a step");
        logits
    }
}

/// Logits `[ids.len(), n_vocab]` of a fresh sequence in slot 0, in batches of `chunk` tokens.
fn logits(on_cpu: &OnCpu, ids: &[u32], chunk: usize) -> Vec<f32> {
    let mut state = on_cpu.state();
    let chunks = ids.chunks(chunk).enumerate();
    chunks.flat_map(|(i, ids)| on_cpu.step(&mut state, &Batch::single(0, i * chunk, ids, true))).collect()
}

/// The rows of `logits` that the manifest has.
fn kept(logits: &[f32], positions: &[usize], n_vocab: usize) -> Vec<f32> {
    positions.iter().flat_map(|p| &logits[p * n_vocab..(p + 1) * n_vocab]).copied().collect()
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

/// F32 models to 1e-4; the others within twice what the manifest says that rounded activations do to an exact
/// computation.
#[test]
fn cpu_gives_the_golden_logits() {
    for isa in available() {
        for golden in golden_models() {
            let on_cpu = OnCpu::golden(&golden, isa, 2);
            for prompt in golden.prompts() {
                let ids = tokens(&prompt["tokens"]);
                let got = logits(&on_cpu, &ids, ids.len());
                let got = kept(&got, &numbers(&prompt["positions"]), on_cpu.model.n_vocab);
                let want = golden.array(&prompt["logits"]);
                let what = format!("{} {} {}", isa.name(), golden.name, prompt["name"]);
                match prompt["rounded_activations"]["rel_rms"].as_f64() {
                    None => assert!(max_abs(&got, &want) < 1e-4, "{what}: {:e}", max_abs(&got, &want)),
                    Some(rounded) => {
                        let error = relative_rms(&got, &want);
                        assert!(error < 2.0 * rounded, "{what}: relative rms {error:.5}, rounded {rounded}");
                    }
                }
            }
        }
    }
}

/// Token by token and in chunks, with any number of threads, the same logits.
#[test]
fn cpu_gives_the_same_in_any_chunks() {
    for isa in available() {
        for golden in golden_models() {
            let ids = tokens(&golden.prompts().last().expect("a prompt")["tokens"]);
            assert_eq!(ids.len(), 200, "{}", golden.name);
            let want = widen(&logits(&OnCpu::golden(&golden, isa, 1), &ids, 200));
            for (chunk, threads) in [(1, 2), (7, 3), (64, 2), (200, 2)] {
                let got = logits(&OnCpu::golden(&golden, isa, threads), &ids, chunk);
                let error = max_abs(&got, &want);
                assert!(error < 1e-3, "{} {}, chunks of {chunk}: {error:e}", isa.name(), golden.name);
            }
        }
    }
}

/// Sequences of different lengths that share a step get what each gets alone.
#[test]
fn cpu_keeps_the_sequences_of_a_batch_apart() {
    let n_prompt = [5, 64, 23];
    for isa in available() {
        for golden in golden_models() {
            let on_cpu = OnCpu::golden(&golden, isa, 2);
            let n_vocab = on_cpu.model.n_vocab;
            let prompt = tokens(&golden.prompts().last().expect("a prompt")["tokens"]);
            // Slot s runs its own stretch of the prompt, then three tokens one by one.
            let ids: Vec<&[u32]> = (0..3).map(|s| &prompt[40 * s..40 * s + n_prompt[s] + 3]).collect();
            let alone: Vec<Vec<f64>> = ids.iter().map(|ids| widen(&logits(&on_cpu, ids, n_prompt[1]))).collect();

            let mut state = on_cpu.state();
            for step in 0..4 {
                let (mut batch, mut want) = (Batch { tokens: vec![], sequences: vec![], wanted: vec![] }, Vec::new());
                for slot in [2, 0, 1] {
                    let position = if step == 0 { 0 } else { n_prompt[slot] + step - 1 };
                    let n_tokens = if step == 0 { n_prompt[slot] } else { 1 };
                    batch.tokens.extend_from_slice(&ids[slot][position..position + n_tokens]);
                    batch.sequences.push(Sequence { slot, position, n_tokens });
                    batch.wanted.push(batch.tokens.len() - 1);
                    let last = position + n_tokens - 1;
                    want.extend_from_slice(&alone[slot][last * n_vocab..(last + 1) * n_vocab]);
                }
                let error = max_abs(&on_cpu.step(&mut state, &batch), &want);
                assert!(error < 1e-3, "{} {}, step {step}: {error:e}", isa.name(), golden.name);
            }
        }
    }
}

/// A token drawn from the softmax of `logits`.
fn draw(logits: &[f32], rng: &mut Rng) -> u32 {
    let max = logits.iter().copied().fold(f32::MIN, f32::max);
    let weights: Vec<f64> = logits.iter().map(|x| f64::from(x - max).exp()).collect();
    let mut left = rng.uniform(0.0, weights.iter().sum());
    let drawn = weights.iter().position(|w| {
        left -= w;
        left < 0.0
    });
    drawn.unwrap_or(logits.len() - 1) as u32
}

fn best(logits: &[f32]) -> usize {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).expect("a vocabulary")
}

/// Keys and values in bf16 against f32 on the story model, over 1,000 tokens that the model itself tells: rounding
/// the cache to 8 bits of mantissa moves the logits by less than one percent (measured: 0.64 percent, the largest by
/// 0.16) and the greedy choice rarely (6 times).
#[test]
fn bf16_kv_stays_close_to_f32_kv_over_a_thousand_tokens() {
    const N_TOKENS: usize = 1000;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/story-q4_k_m.gguf");
    let [exact, rounded] = [KvDtype::F32, KvDtype::Bf16].map(|kv_dtype| {
        let size = StateSize { n_slots: 1, n_ctx: N_TOKENS, n_batch: 1, kv_dtype };
        OnCpu::load(&path, Isa::detect(), 2, size)
    });
    let (mut exact_state, mut rounded_state) = (exact.state(), rounded.state());
    let mut rng = Rng::new(5);
    let mut id = 681; // "Once"
    let (mut squares, mut norm, mut largest, mut n_agree) = (0.0, 0.0, 0f64, 0);
    for position in 0..N_TOKENS {
        let batch = Batch::single(0, position, &[id], true);
        let want = exact.step(&mut exact_state, &batch);
        let got = rounded.step(&mut rounded_state, &batch);
        largest = largest.max(max_abs(&got, &widen(&want)));
        squares += got.iter().zip(&want).map(|(g, w)| f64::from(g - w).powi(2)).sum::<f64>();
        norm += want.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>();
        n_agree += usize::from(best(&got) == best(&want));
        id = draw(&want, &mut rng);
    }
    let error = (squares / norm).sqrt();
    println!("bf16 KV: relative rms {error:.5}, largest {largest:.4}, greedy agreement {n_agree} of {N_TOKENS}");
    assert!(error < 0.01, "relative rms of the logits: {error}");
    assert!(largest < 0.5, "largest difference of a logit: {largest}");
    assert!(n_agree >= 985, "greedy choices that agree: {n_agree} of {N_TOKENS}");
}

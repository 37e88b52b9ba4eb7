//! Time of every kind of block in the shape of a released model: one token, a prompt, and one token behind a long
//! context.
//! `cargo bench -p tandem-cpu --bench blocks -- [--threads N] [--isa NAME] [KIND ..]`

use std::time::Instant;
use tandem_cpu::{Backend, Isa, Options, StateSize};
use tandem_spec::testing::{AttentionParts, Maker};
use tandem_spec::*;

/// Weights of a kind, at least: more than any cache holds.
const COLD_BYTES: u64 = 150 << 20;
/// Tokens of a prompt.
const PROMPT: usize = 512;
/// Positions before the token that reads a long context.
const DEPTH: usize = 4096;

/// A block of the 0.8B hybrid (the mixture: of the 35B one, with fewer experts).
fn block(kind: &str, maker: &mut Maker) -> Block<Weight> {
    let (n_embd, rms_eps) = (1024, 1e-6);
    match kind {
        "attention" => {
            let rope = Rope {
                n_rot: 64,
                base: 1e7,
                style: RopeStyle::Neox,
                scaling: RopeScaling::None,
                rotated_pairs: Vec::new(),
            };
            let shape = AttentionShape { n_embd, n_heads: 8, n_kv_heads: 2, head_dim: 256, gated: true, rms_eps, rope };
            let parts = AttentionParts { qk_norm: true, ..Default::default() };
            Block::Attention(maker.attention(0, &shape, parts))
        }
        "delta_net" => Block::DeltaNet(maker.delta_net(
            0,
            &DeltaNetShape {
                n_embd,
                n_k_heads: 16,
                n_v_heads: 16,
                head_dim: 128,
                conv_kernel: 4,
                head_order: HeadOrder::Tiled,
                rms_eps,
            },
        )),
        "ffn" => Block::Ffn(maker.ffn(0, &FfnShape { n_embd, n_ff: 3584, rms_eps })),
        "moe" => {
            let shape = MoeShape { n_embd: 2048, n_experts: 64, n_used: 8, n_ff: 512, n_ff_shared: 512, rms_eps };
            Block::Moe(maker.moe(0, &shape))
        }
        "head" => Block::Head(maker.head(&HeadShape { n_embd, n_vocab: 62080, rms_eps })),
        kind => panic!("no block {kind}"),
    }
}

fn main() {
    let mut options =
        Options { threads: std::thread::available_parallelism().map_or(1, |n| n.get()), isa: Isa::detect() };
    let (mut kinds, mut args) = (Vec::new(), std::env::args().skip(1));
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--bench" => {}
            "--threads" => options.threads = args.next().and_then(|n| n.parse().ok()).expect("--threads N"),
            "--isa" => {
                let name = args.next().expect("--isa NAME");
                options.isa = Isa::by_name(&name).expect("an ISA");
            }
            _ => kinds.push(arg),
        }
    }
    if kinds.is_empty() {
        kinds = ["attention", "delta_net", "ffn", "moe", "head"].map(String::from).to_vec();
    }
    println!("{}, {} threads; best and median microseconds a block", options.isa.name(), options.threads);
    println!(
        "kind        MB | one token: best  median  GB/s | behind {DEPTH}: best  median | prompt of {PROMPT}: best  median, per token"
    );
    for kind in kinds {
        let mut maker = Maker::new(1, &[TensorType::Q4_K, TensorType::Q4_K, TensorType::Q6_K]);
        let block = block(&kind, &mut maker);
        let n_embd = if kind == "moe" { 2048 } else { 1024 };
        let (arch, name) = (String::new(), String::new());
        let model = |n: usize| {
            let blocks = vec![block.clone(); n];
            Model {
                arch: arch.clone(),
                name: name.clone(),
                n_embd,
                n_vocab: 62080,
                n_layers: n,
                n_ctx_train: 0,
                blocks,
                mtp: None,
            }
        };
        let one = Backend::planned_weight_bytes(&model(1), &[0], options.isa);
        let n = (COLD_BYTES / one) as usize + 1;
        let model = model(n);
        let indices: Vec<usize> = (0..n).collect();
        let backend = Backend::load(&model, &indices, &maker.source, options, &|_| {}).expect("the backend loads");
        let size = StateSize { n_slots: 1, n_ctx: DEPTH + PROMPT, n_batch: PROMPT, kv_dtype: KvDtype::Bf16 };
        let mut state = backend.state(size).expect("memory");
        let (mut x, mut logits) = (vec![0f32; PROMPT * n_embd], vec![0f32; 62080]);
        let mut time = |position: usize, n_tokens: usize, repeats: usize| {
            let batch = Batch::single(0, position, &vec![1; n_tokens], false);
            let mut times: Vec<f64> = (0..repeats)
                .map(|_| {
                    x.iter_mut().enumerate().for_each(|(i, x)| *x = (i as f32 * 0.37).sin());
                    let start = Instant::now();
                    backend.run(0..n, &batch, &mut state, &mut x, &mut logits).expect("runs");
                    start.elapsed().as_secs_f64() * 1e6 / n as f64
                })
                .collect();
            times.sort_by(f64::total_cmp);
            (times[0], times[repeats / 2])
        };
        let (best, median) = time(0, 1, 21);
        let gb = one as f64 / 1e3 * if kind == "moe" { 9.0 / 65.0 } else { 1.0 };
        print!("{kind:9} {:5.1} | {best:15.1} {median:7.1} {:5.1} |", one as f64 / 1e6, gb / best);
        // Keys and values that were never written would all be one page of zeros.
        (0..DEPTH).step_by(PROMPT).for_each(|position| {
            time(position, PROMPT, 1);
        });
        let (best, median) = time(DEPTH, 1, 21);
        print!(" {best:17.1} {median:7.1} |");
        let (best, median) = time(0, PROMPT, 3);
        println!(" {:18.2} {:7.2}", best / PROMPT as f64, median / PROMPT as f64);
    }
}

//! Time of each kind of block over a prompt, on random weights of released shapes, and the rate of a model made of
//! them. The time of a block is the difference between a chain of five and a chain of one. Arguments: numbers of
//! tokens, names of models.

use std::sync::Arc;
use std::time::Instant;
use tandem_cuda::{Backend, Compiler, Device, Options};
use tandem_spec::testing::{AttentionParts, Maker};
use tandem_spec::{
    AttentionShape, Batch, Block, DeltaNetShape, FfnShape, HeadOrder, HeadShape, KvDtype, MoeShape, Rope, RopeScaling,
    RopeStyle, Sequence, TensorType, Weight,
};

/// A released shape of section 11 of the model specification: name, n_embd, layers, heads, KV heads, n_ff (0: experts),
/// V heads.
const MODELS: [(&str, usize, usize, usize, usize, usize, usize); 5] = [
    ("0.8B", 1024, 24, 8, 2, 3584, 16),
    ("4B", 2560, 32, 16, 4, 9216, 32),
    ("9B", 4096, 32, 16, 4, 12288, 32),
    ("27B", 5120, 64, 24, 4, 17408, 48),
    ("35B-A3B", 2048, 40, 16, 2, 0, 32),
];

fn main() {
    let libs = std::env::var_os("TANDEM_CUDA_LIBS").map(std::path::PathBuf::from);
    let cache = std::env::temp_dir().join("tandem-test-cubins");
    let opened = Device::open(0).and_then(|d| Compiler::new(libs.as_deref(), Some(cache.clone())).map(|_| d));
    let device = match opened {
        Ok(device) => Arc::new(device),
        Err(e) => return println!("skipped: {e}"),
    };
    let sizes: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let sizes = if sizes.is_empty() { vec![2048] } else { sizes };
    let wanted =
        |name: &str| MODELS.iter().all(|m| std::env::args().all(|a| a != m.0)) || std::env::args().any(|a| a == name);
    for (name, n_embd, n_layers, n_heads, n_kv_heads, n_ff, n_v_heads) in MODELS.into_iter().filter(|m| wanted(m.0)) {
        let mut maker = Maker::new(1, &[TensorType::Q4_K]);
        let rope =
            Rope { n_rot: 64, base: 1e7, style: RopeStyle::Neox, scaling: RopeScaling::None, rotated_pairs: vec![] };
        let rms_eps = 1e-6;
        let attention = AttentionShape { n_embd, n_heads, n_kv_heads, head_dim: 256, gated: true, rms_eps, rope };
        let head_order = HeadOrder::Tiled;
        let delta_net =
            DeltaNetShape { n_embd, n_k_heads: 16, n_v_heads, head_dim: 128, conv_kernel: 4, head_order, rms_eps };
        let parts = AttentionParts { qk_norm: true, ..Default::default() };
        let attention = Block::Attention(maker.attention(0, &attention, parts));
        let delta_net = Block::DeltaNet(maker.delta_net(0, &delta_net));
        let ff = if n_ff > 0 {
            Block::Ffn(maker.ffn(0, &FfnShape { n_embd, n_ff, rms_eps }))
        } else {
            let shape = MoeShape { n_embd, n_experts: 256, n_used: 8, n_ff: 512, n_ff_shared: 512, rms_eps };
            Block::Moe(maker.moe(0, &shape))
        };
        let embed = Block::Embed(maker.embed(1024, n_embd));
        let head = Block::Head(maker.head(&HeadShape { n_embd, n_vocab: 1024, rms_eps }));
        for &n in &sizes {
            let mut total = 0.0;
            for (block, count) in [(&delta_net, n_layers * 3 / 4), (&attention, n_layers / 4), (&ff, n_layers)] {
                let chain = |k: usize| -> Vec<Block<Weight>> {
                    std::iter::once(&embed).chain(std::iter::repeat_n(block, k)).chain([&head]).cloned().collect()
                };
                let time = |k: usize| {
                    let compiler = Compiler::new(libs.as_deref(), Some(cache.clone())).expect("loaded before");
                    let options = Options { n_slots: 1, n_ctx: n, n_batch: n, kv: KvDtype::Bf16 };
                    let backend = Backend::load(&device, compiler, &chain(k), &maker.source, &options, &mut |_, _| {})
                        .unwrap_or_else(|e| panic!("{e}"))
                        .with_prompt_from(1);
                    let mut state = backend.state().unwrap_or_else(|e| panic!("{e}"));
                    let batch = Batch {
                        tokens: (0..n as u32).map(|t| t * 7 % 1024).collect(),
                        sequences: vec![Sequence { slot: 0, position: 0, n_tokens: n }],
                        wanted: vec![n - 1],
                    };
                    let mut logits = vec![0.0; 1024];
                    let mut run = || {
                        let start = Instant::now();
                        backend
                            .run(&mut state, 0..k + 2, &batch, &mut [], &mut logits)
                            .unwrap_or_else(|e| panic!("{e}"));
                        start.elapsed().as_secs_f64()
                    };
                    run();
                    (0..5).map(|_| run()).fold(f64::INFINITY, f64::min)
                };
                let seconds = (time(5) - time(1)) / 4.0;
                total += seconds * count as f64;
                println!("{name:8} {n:6} tokens  {:10} {:9.1} us  x {count}", block.kind(), seconds * 1e6);
            }
            println!("{name:8} {n:6} tokens  together {:.1} ms  {:.0} tok/s", total * 1e3, n as f64 / total);
        }
    }
}

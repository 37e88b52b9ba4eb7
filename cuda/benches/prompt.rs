//! Time of each kind of block over a prompt, on random weights of released shapes, and the rate of a model made of
//! them. The time of a block is the difference between a chain of five and a chain of one. Arguments: numbers of
//! tokens, names of models; tensor types (Q4_K), kinds of blocks (ffn), and how products are computed (library, halves,
//! int8), all of which are tried.

use std::sync::Arc;
use std::time::Instant;
use tandem_cuda::{Backend, Compiler, Device, Options, Products};
use tandem_spec::tensor_type::TYPES;
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
    let compiler = || Compiler::new(libs.as_deref(), Some(std::env::temp_dir().join("tandem-test-cubins")));
    let args: Vec<String> = std::env::args().skip(1).collect();
    let products = [("library", Products::Library), ("halves", Products::Halves), ("int8", Products::Int8)];
    let mut products: Vec<_> = products.iter().filter(|p| args.iter().any(|a| a == p.0)).map(|p| Some(p.1)).collect();
    if products.is_empty() {
        products.push(None);
    }
    let mut types: Vec<_> = TYPES.iter().map(|row| row.ty).filter(|ty| args.contains(&ty.to_string())).collect();
    if types.is_empty() {
        types.push(TensorType::Q4_K);
    }
    for products in products {
        let device = match Device::open(0).and_then(|d| compiler().map(|_| d)) {
            Ok(device) => Arc::new(if let Some(p) = products { device.with_products(p) } else { device }),
            Err(e) => return println!("skipped: {e}"),
        };
        for ty in &types {
            println!("{ty}, products: {:?}", device.products());
            measure(&device, *ty, &args, &|| compiler().expect("loaded before"));
        }
    }
}

/// Blocks with weights of type `ty`, of the models and kinds and for the numbers of tokens that `args` name, or all.
fn measure(device: &Arc<Device>, ty: TensorType, args: &[String], compiler: &dyn Fn() -> Compiler) {
    let sizes: Vec<usize> = args.iter().filter_map(|a| a.parse().ok()).collect();
    let sizes = if sizes.is_empty() { vec![2048] } else { sizes };
    let named = |name: &str| args.iter().any(|a| a == name);
    let wanted = |name: &str| MODELS.iter().all(|m| !named(m.0)) || named(name);
    let wanted_kind = |kind: &str| ["delta_net", "attention", "ffn", "moe"].iter().all(|k| !named(k)) || named(kind);
    for (name, n_embd, n_layers, n_heads, n_kv_heads, n_ff, n_v_heads) in MODELS.into_iter().filter(|m| wanted(m.0)) {
        let mut maker = Maker::new(1, &[ty]);
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
            let blocks = [(&delta_net, n_layers * 3 / 4), (&attention, n_layers / 4), (&ff, n_layers)];
            for (block, count) in blocks.into_iter().filter(|(block, _)| wanted_kind(block.kind())) {
                let chain = |k: usize| -> Vec<Block<Weight>> {
                    std::iter::once(&embed).chain(std::iter::repeat_n(block, k)).chain([&head]).cloned().collect()
                };
                let time = |k: usize| {
                    let options = Options { n_slots: 1, n_ctx: n, n_batch: n, kv: KvDtype::Bf16 };
                    let backend = Backend::load(device, compiler(), &chain(k), &maker.source, &options, &mut |_, _| {})
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
                let mut n_weights = 0;
                block.for_each(&mut |w| n_weights += w.n_rows() * w.n_cols);
                let rate = if matches!(block, Block::Moe(_)) { 0.0 } else { 2e-12 * (n * n_weights) as f64 / seconds };
                println!(
                    "{name:8} {n:6} tokens  {:10} {:9.1} us  x {count}  {rate:.0} TFLOP/s of its matrices",
                    block.kind(),
                    seconds * 1e6
                );
            }
            println!("{name:8} {n:6} tokens  together {:.1} ms  {:.0} tok/s", total * 1e3, n as f64 / total);
        }
    }
}

//! Decode rates of the released shapes on GPU 0, with weights of random bits:
//! `decode [MODEL[:Q4_K_M|Q8_0]] ... [SEQUENCES] ...`.
//! Prints tokens per second, bytes per token and the share of the measured bandwidth, then the time of each kind of
//! block.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tandem_cuda::{Backend, Compiler, Device, Feed, Options, State, StateLayout, WeightsLayout};
use tandem_spec::testing::shapes::{self, Mix, RELEASED};
use tandem_spec::testing::{Rng, random_blocks};
use tandem_spec::{Block, KvDtype, SamplerOptions, Tensor, TensorSource, TensorType};

/// Every tensor of a type shares the same random bytes: speeds do not depend on the weights.
struct Noise {
    of_type: Vec<(TensorType, Vec<u8>)>,
    tensors: Vec<Tensor>,
}

impl Noise {
    fn new(tensors: Vec<Tensor>) -> Self {
        let mut of_type: Vec<(TensorType, Vec<u8>)> = Vec::new();
        for t in &tensors {
            if !of_type.iter().any(|(ty, _)| *ty == t.ty) {
                let most = tensors.iter().filter(|u| u.ty == t.ty).map(Tensor::n_bytes).max().unwrap_or(0);
                let part = random_blocks(t.ty, 1 << 22, 0.02, &mut Rng::new(1));
                of_type.push((t.ty, part.into_iter().cycle().take(most).collect()));
            }
        }
        Self { of_type, tensors }
    }
}

impl TensorSource for Noise {
    fn bytes(&self, tensor: usize) -> &[u8] {
        let t = &self.tensors[tensor];
        let (_, bytes) = self.of_type.iter().find(|(ty, _)| *ty == t.ty).expect("every type has noise");
        &bytes[..t.n_bytes()]
    }
}

/// Bytes that one token reads at depth 0: weights (chosen experts only; one row of the embedding) and delta-net states
/// twice.
fn bytes_per_token(blocks: &[Block<tandem_spec::Weight>]) -> usize {
    let mut bytes = 0;
    for block in blocks {
        match block {
            Block::Embed(_) => {}
            Block::Moe(b) => {
                let experts = [&b.ffn_gate_exps, &b.ffn_up_exps, &b.ffn_down_exps];
                let routed: usize = experts.iter().map(|l| l.weight.n_bytes()).sum();
                let mut all = 0;
                block.for_each(&mut |w| all += w.n_bytes());
                bytes += all - routed + routed / b.shape.n_experts * b.shape.n_used;
            }
            _ => block.for_each(&mut |w| bytes += w.n_bytes()),
        }
        if let Block::DeltaNet(b) = block {
            bytes += 2 * b.shape.state_bytes();
        }
    }
    bytes
}

fn samplers() -> [(&'static str, SamplerOptions); 5] {
    let drawing = SamplerOptions { top_p: 1.0, min_p: 0.0, ..Default::default() };
    [
        ("greedy", SamplerOptions::greedy()),
        ("top-k 20", SamplerOptions { top_k: 20, ..drawing.clone() }),
        ("top-k 40, top-p, min-p", SamplerOptions::default()),
        ("top-k 256", SamplerOptions { top_k: 256, ..drawing.clone() }),
        ("top-k 40, penalties", SamplerOptions { repeat_penalty: 1.1, ..drawing }),
    ]
}

/// Microseconds from the first kernel of a step to its last, the mean of many steps.
fn time_sampler(backend: &Backend, state: &mut State, sampler: &SamplerOptions) -> Result<f64, tandem_cuda::Error> {
    const N: usize = 500;
    let (mut tokens, mut before) = (vec![1], 0.0);
    for i in 0..N + 10 {
        if i == 10 {
            before = backend.busy_seconds(state)?;
        }
        let feed = Feed { slot: 0, position: i, token: tokens[i] };
        backend.launch(state, &[feed], &[(sampler, &tokens)])?;
        tokens.push(backend.wait(state)?[0]);
    }
    Ok((backend.busy_seconds(state)? - before) * 1e6 / N as f64)
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let device = match Device::open(0) {
        Ok(device) => Arc::new(device),
        Err(e) => return println!("skipped: {e}"),
    };
    let libs = std::env::var_os("TANDEM_CUDA_LIBS").map(PathBuf::from);
    println!("{:?}", device.info().expect("a GPU"));
    let start = Instant::now();
    let measured = tandem_cuda::probe::measure(&device, Compiler::new(libs.as_deref(), None).expect("NVRTC"))
        .unwrap_or_else(|e| panic!("{e}"));
    println!("{measured:?} in {:.2} s", start.elapsed().as_secs_f64());
    let roof = measured.read_gb_per_s * 1e9;
    let (numbers, names): (Vec<_>, Vec<_>) = args.iter().partition(|a| a.parse::<usize>().is_ok());
    let counts: Vec<usize> = numbers.iter().filter_map(|n| n.parse().ok()).collect();
    let mut cases = vec![(1, 0), (1, 4096), (1, 16384), (2, 0), (4, 0), (8, 0), (16, 0), (32, 0)];
    cases.retain(|(n, _)| counts.is_empty() || counts.contains(n));
    for name in names {
        let (model, quant) = name.split_once(':').unwrap_or((name, "Q4_K_M"));
        let Some(released) = RELEASED.iter().find(|r| r.name == model) else {
            println!("{model}: not a released shape");
            continue;
        };
        let made = shapes::model(released, if quant == "Q8_0" { Mix::All(TensorType::Q8_0) } else { Mix::Q4KM });
        let source = Noise::new(shapes::tensors(&made));
        let n_slots = 32;
        let options = Options { n_slots, n_ctx: 16640, n_batch: n_slots, kv: KvDtype::Bf16 };
        let start = Instant::now();
        let compiler = Compiler::new(libs.as_deref(), None).expect("NVRTC");
        let programs =
            tandem_cuda::programs(&made.blocks, &options, device.n_sms(), device.products()).expect("supported shapes");
        let (major, minor) = device.compute_capability();
        compiler.cubins(&programs, &format!("sm_{major}{minor}")).expect("kernels compile");
        let compiled = start.elapsed().as_secs_f64();
        let cache = std::env::temp_dir().join("tandem-bench-cubins");
        let compiler = Compiler::new(libs.as_deref(), Some(cache)).expect("NVRTC");
        let (free, _) = device.memory().expect("an open GPU");
        let start = Instant::now();
        let mut uploaded = (start, 0);
        let backend = Backend::load(&device, compiler, &made.blocks, &source, &options, &mut |done, _| {
            if uploaded.1 == 0 {
                uploaded.0 = Instant::now();
            }
            uploaded.1 = done;
        })
        .unwrap_or_else(|e| panic!("{e}"));
        let load_s = uploaded.0.elapsed().as_secs_f64();
        let mut state = backend.state().unwrap_or_else(|e| panic!("{e}"));
        println!(
            "{model} {quant}: {} programs compiled in {compiled:.1} s, {:.2} GB loaded in {load_s:.2} s ({:.1} GB/s), planned {} + {} bytes, allocated {} + {}",
            programs.len(),
            uploaded.1 as f64 / 1e9,
            uploaded.1 as f64 / 1e9 / load_s,
            WeightsLayout::new(&made.blocks).bytes(),
            StateLayout::new(&made.blocks, &options, device.n_sms()).bytes(),
            backend.weight_bytes(),
            state.bytes(),
        );
        let bytes = bytes_per_token(&made.blocks);
        for &(n, depth) in &cases {
            let mut feeds: Vec<Feed> = (0..n).map(|slot| Feed { slot, position: depth, token: 1 }).collect();
            let mut rates = Vec::new();
            for _ in 0..3 {
                for feed in &mut feeds {
                    feed.position = depth;
                }
                let mut times = Vec::new();
                for _ in 0..130 {
                    let start = Instant::now();
                    let tokens = backend.decode(&mut state, &feeds).unwrap_or_else(|e| panic!("{e}"));
                    times.push(start.elapsed().as_secs_f64());
                    for (feed, token) in feeds.iter_mut().zip(tokens) {
                        feed.position += 1;
                        feed.token = token;
                    }
                }
                rates.push(128.0 / times[2..].iter().sum::<f64>());
            }
            rates.sort_by(f64::total_cmp);
            println!(
                "  {n:2} sequences at {depth:5}: {:7.1} steps/s, {:7.1} tok/s, {:4.1} % of {:.2} TB/s ({:.0} us for {:.3} GB)",
                rates[1],
                rates[1] * n as f64,
                100.0 * rates[1] * bytes as f64 / roof,
                roof / 1e12,
                1e6 / rates[1],
                bytes as f64 / 1e9,
            );
        }
        let (left, _) = device.memory().expect("an open GPU");
        let driver = free as i64 - left as i64 - (backend.weight_bytes() + state.bytes()) as i64;
        println!("  the driver took {:.1} MiB beside that", driver as f64 / (1 << 20) as f64);
        for n_sequences in [1, 16].into_iter().filter(|n| cases.iter().any(|c| c.0 == *n)) {
            let times = backend.time_kinds(&mut state, n_sequences, 20).unwrap_or_else(|e| panic!("{e}"));
            for (kind, n, us) in times {
                let of_kind: Vec<_> = made.blocks.iter().filter(|b| b.kind() == kind).cloned().collect();
                let bytes = bytes_per_token(&of_kind);
                println!(
                    "  {n_sequences:2} sequences {kind:10} {n:3} blocks {us:8.1} us, {:6.2} us each, {:6.1} MB, {:4.1} %",
                    us / n as f64,
                    bytes as f64 / 1e6,
                    100.0 * bytes as f64 / roof / (us * 1e-6)
                );
            }
        }
        let mut least = [f64::INFINITY; 5];
        for _ in 0..3 {
            for (us, (_, sampler)) in least.iter_mut().zip(samplers()) {
                let step = time_sampler(&backend, &mut state, &sampler).unwrap_or_else(|e| panic!("{e}"));
                *us = us.min(step);
            }
        }
        for (us, (name, sampler)) in least.into_iter().zip(samplers()) {
            let choice = backend.time_choice(&mut state, &sampler, 20).unwrap_or_else(|e| panic!("{e}"));
            println!("  {name:24} {choice:6.1} us by itself, {us:8.1} us of device time a step");
        }
        let mut old = None;
        for _ in 0..3 {
            let start = Instant::now();
            let copy = backend.snapshot(&state, 0, old).unwrap_or_else(|e| panic!("{e}"));
            let (copied, start) = (start.elapsed().as_secs_f64(), Instant::now());
            backend.restore(&mut state, 0, &copy).unwrap_or_else(|e| panic!("{e}"));
            let (back, mb) = (start.elapsed().as_secs_f64(), backend.snapshot_bytes() as f64 / 1e6);
            println!("  copy of {mb:.1} MB of states: {:.2} ms, back {:.2} ms", copied * 1e3, back * 1e3);
            old = Some(copy);
        }
    }
}

//! Streaming of host weights on released shapes: what pinning costs, the rate of the bus with sorting, and a prompt
//! whose feed-forward weights (or a part of them) come from the host, beside the same prompt with everything on
//! the GPU.
//! Arguments: names of models, numbers of tokens, and the percentage of the feed-forward weights that the host has.

use cudarc::driver::sys;
use memmap2::{Advice, MmapMut};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tandem_cuda::{Backend, Compiler, Device, HostShare, Options, Streamed};
use tandem_spec::testing::{AttentionParts, Maker};
use tandem_spec::{
    AttentionShape, Batch, Block, DeltaNetShape, FfnShape, HeadOrder, HeadShape, KvDtype, Linear, MoeShape,
    PanelMemory, Panels, Rope, RopeScaling, RopeStyle, Sequence, TensorSource, TensorType, Weight, panel,
};

/// A released shape: name, n_embd, layers, heads, KV heads, n_ff (0: experts), V heads.
type Released = (&'static str, usize, usize, usize, usize, usize, usize);

/// With the percentage of the feed-forward weights that the host has: what a card of 12 GB leaves over; all experts.
const MODELS: [(Released, usize); 2] =
    [(("27B", 5120, 64, 24, 4, 17408, 48), 64), (("35B-A3B", 2048, 40, 16, 2, 0, 32), 100)];

/// Bytes of a mapping, as the CPU backend has them.
const MAPPING_BYTES: usize = 256 << 20;
const PANEL_ROWS: usize = 16;

struct Memory {
    mapping: Arc<MmapMut>,
    bytes: Range<usize>,
}

impl PanelMemory for Memory {
    fn bytes(&self) -> &[u8] {
        &self.mapping[self.bytes.clone()]
    }

    fn mapping(&self) -> Range<usize> {
        let range = self.mapping.as_ptr_range();
        range.start as usize..range.end as usize
    }
}

/// Rows `rows` of `weight`, packed.
fn pack(weight: &Weight, rows: Range<usize>, source: &dyn TensorSource) -> Vec<u8> {
    let (row_bytes, block_bytes) = (weight.row_bytes(), weight.ty.row().block_bytes);
    let mut bytes = vec![0u8; rows.len().next_multiple_of(PANEL_ROWS) * row_bytes];
    for (i, row) in rows.enumerate() {
        let panel = &mut bytes[i / PANEL_ROWS * PANEL_ROWS * row_bytes..][..PANEL_ROWS * row_bytes];
        for (block, from) in weight.row(source, row).chunks_exact(block_bytes).enumerate() {
            let mut to = block * block_bytes * PANEL_ROWS;
            for f in panel::fields(weight.ty) {
                for (n, unit) in from[f.offset..f.offset + f.len].chunks_exact(f.unit).enumerate() {
                    panel[to + (n * PANEL_ROWS + i % PANEL_ROWS) * f.unit..][..f.unit].copy_from_slice(unit);
                }
                to += f.len * PANEL_ROWS;
            }
        }
    }
    bytes
}

/// `share` for each of `blocks`, in memory of its own each.
fn host_shares(share: &Block<Weight>, blocks: &[usize], source: &dyn TensorSource) -> Vec<HostShare> {
    let (linears, n): ([&Linear<Weight>; 3], usize) = match share {
        Block::Ffn(b) => ([&b.ffn_gate, &b.ffn_up, &b.ffn_down], 1),
        Block::Moe(b) => ([&b.ffn_gate_exps, &b.ffn_up_exps, &b.ffn_down_exps], b.experts.len()),
        _ => unreachable!("feed-forward blocks are streamed"),
    };
    let matrices = || linears.iter().flat_map(|l| (0..n).map(move |e| (&l.weight, l.weight.n_rows() / n, e)));
    let packed: Vec<Vec<u8>> = matrices().map(|(w, rows, e)| pack(w, e * rows..(e + 1) * rows, source)).collect();
    let sizes: Vec<usize> = packed.iter().map(Vec::len).collect();
    // The places of all matrices, in mappings that are filled by all cores.
    let (mut mappings, mut places) = (vec![], vec![]);
    let mut used = usize::MAX;
    for _ in blocks {
        for size in &sizes {
            let size = size.next_multiple_of(64);
            if used.saturating_add(size) > MAPPING_BYTES {
                mappings.push(MmapMut::map_anon(MAPPING_BYTES.max(size)).expect("memory"));
                let _ = mappings[mappings.len() - 1].advise(Advice::HugePage);
                used = 0;
            }
            places.push((mappings.len() - 1, used));
            used += size;
        }
    }
    let (next, base) = (AtomicUsize::new(0), mappings.iter_mut().map(|m| m.as_mut_ptr() as usize).collect::<Vec<_>>());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let (Some((mapping, at)), bytes) = (places.get(i), &packed[i % sizes.len()]) else { return };
                    let to = (base[*mapping] + at) as *mut u8;
                    // SAFETY: the places are disjoint and lie in mappings that nobody else uses yet.
                    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
                }
            });
        }
    });
    let mappings: Vec<Arc<MmapMut>> = mappings.into_iter().map(Arc::new).collect();
    let of = |(number, &block): (usize, &usize)| {
        let places = &places[number * sizes.len()..][..sizes.len()];
        let panels = matrices().zip(places).zip(&sizes).map(|(((w, n_rows, _), (mapping, at)), size)| {
            let memory = Memory { mapping: mappings[*mapping].clone(), bytes: *at..at + size.next_multiple_of(64) };
            Panels { ty: w.ty, n_rows, n_cols: w.n_cols, panel_rows: PANEL_ROWS, memory: Arc::new(memory) }
        });
        HostShare { block, share: share.clone(), panels: panels.collect() }
    };
    blocks.iter().enumerate().map(of).collect()
}

/// Seconds to pin all memory of `shares` with so many threads, and to give it back.
fn time_pinning(shares: &[HostShare], threads: usize) -> (f64, f64, usize) {
    let mut mappings: Vec<_> =
        shares.iter().flat_map(|s| &s.panels).map(|p| (p.memory.mapping().start, p.memory.mapping().len())).collect();
    mappings.sort();
    mappings.dedup();
    let each = |f: &(dyn Fn(usize, usize) -> sys::CUresult + Sync)| {
        let (start, next, failed) = (Instant::now(), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let mut context = std::ptr::null_mut();
                    // SAFETY: the primary context of the opened device.
                    unsafe {
                        assert_eq!(sys::cuDevicePrimaryCtxRetain(&mut context, 0), sys::CUresult::CUDA_SUCCESS);
                        assert_eq!(sys::cuCtxSetCurrent(context), sys::CUresult::CUDA_SUCCESS);
                    }
                    while let Some((start, len)) = mappings.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if f(*start, *len) != sys::CUresult::CUDA_SUCCESS {
                            failed.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(failed.into_inner(), 0, "mappings that were refused");
        start.elapsed().as_secs_f64()
    };
    // SAFETY: the mappings live as long as the shares.
    let pin = each(&|start, len| unsafe { sys::cuMemHostRegister_v2(start as *mut _, len, 1) });
    // SAFETY: as above.
    let unpin = each(&|start, _| unsafe { sys::cuMemHostUnregister(start as *mut _) });
    (pin, unpin, mappings.iter().map(|m| m.1).sum())
}

fn main() {
    let libs = std::env::var_os("TANDEM_CUDA_LIBS").map(std::path::PathBuf::from);
    let cache = std::env::temp_dir().join("tandem-test-cubins");
    let opened = Device::open(0).and_then(|d| Compiler::new(libs.as_deref(), Some(cache.clone())).map(|_| d));
    let device = match opened {
        Ok(device) => Arc::new(device),
        Err(e) => return println!("skipped: {e}"),
    };
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut sizes: Vec<usize> = arguments.iter().filter_map(|a| a.parse().ok()).collect();
    if sizes.is_empty() {
        sizes.push(2048);
    }
    let percent = arguments.iter().find_map(|a| a.strip_suffix('%')?.parse::<usize>().ok());
    let is_wanted =
        |name: &str| MODELS.iter().all(|m| arguments.iter().all(|a| a != m.0.0)) || arguments.iter().any(|a| a == name);
    for ((name, n_embd, n_layers, n_heads, n_kv_heads, n_ff, n_v_heads), usual) in
        MODELS.into_iter().filter(|m| is_wanted(m.0.0))
    {
        let percent = percent.unwrap_or(usual);
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
        let (ff, n_parts, unit) = if n_ff > 0 {
            (Block::Ffn(maker.ffn(0, &FfnShape { n_embd, n_ff, rms_eps })), n_ff, 256)
        } else {
            let shape = MoeShape { n_embd, n_experts: 256, n_used: 8, n_ff: 512, n_ff_shared: 512, rms_eps };
            (Block::Moe(maker.moe(0, &shape)), 256, 1)
        };
        let embed = Block::Embed(maker.embed(1024, n_embd));
        let head = Block::Head(maker.head(&HeadShape { n_embd, n_vocab: 1024, rms_eps }));
        let on_gpu = n_parts * (100 - percent) / 100 / unit * unit;
        let layers = |ff: &Block<Weight>| -> Vec<Block<Weight>> {
            let layer = |i: usize| [if i % 4 == 3 { &attention } else { &delta_net }, ff];
            std::iter::once(&embed).chain((0..n_layers).flat_map(layer)).chain([&head]).cloned().collect()
        };
        let indices: Vec<usize> = (0..n_layers).map(|i| 2 + 2 * i).collect();
        let start = Instant::now();
        let shares = || host_shares(&ff.share(on_gpu..n_parts, false), &indices, &maker.source);
        let made = shares();
        let bytes: usize = made.iter().flat_map(|s| &s.panels).map(|p| p.n_panels() * p.panel_bytes()).sum();
        println!(
            "{name}: {percent} % on the host, {:.2} GB, made in {:.1} s",
            bytes as f64 / 1e9,
            start.elapsed().as_secs_f64()
        );
        for threads in [1, 8] {
            let (pin, unpin, n) = time_pinning(&made, threads);
            let gb = n as f64 / 1e9;
            println!(
                "  pinned {gb:.2} GB with {threads} threads in {:.2} s ({:.1} GB/s), unpinned in {unpin:.2} s",
                pin,
                gb / pin
            );
        }
        let mut made = Some(made);
        for &n in &sizes {
            let load = |blocks: &[Block<Weight>], streamed: Streamed| {
                let compiler = Compiler::new(libs.as_deref(), Some(cache.clone())).expect("loaded before");
                let options = Options { n_slots: 1, n_ctx: n, n_batch: n, kv: KvDtype::Bf16 };
                Backend::load_streaming(&device, compiler, blocks, streamed, &maker.source, &options, &mut |_, _| {})
                    .unwrap_or_else(|e| panic!("{e}"))
                    .with_prompt_from(1)
            };
            let time = |backend: &Backend, n: usize, times: usize| {
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
                        .run(&mut state, 0..2 * n_layers + 2, &batch, &mut [], &mut logits)
                        .unwrap_or_else(|e| panic!("{e}"));
                    start.elapsed().as_secs_f64()
                };
                run();
                let mut seconds: Vec<f64> = (0..times).map(|_| run()).collect();
                seconds.sort_by(f64::total_cmp);
                (seconds[0], seconds[times / 2])
            };
            let (resident, _) = time(&load(&layers(&ff), Streamed::default()), n, 3);
            let streamed = Streamed { from: 1, shares: made.take().unwrap_or_else(&shares) };
            let start = Instant::now();
            let backend = load(&layers(&ff.share(0..on_gpu, true)), streamed);
            let loaded = start.elapsed().as_secs_f64();
            assert_eq!(backend.unpinned_bytes(), 0, "pinned");
            let (copies, _) = time(&backend, 16, 3);
            let (together, median) = time(&backend, n, 5);
            let bound = resident.max(copies);
            println!(
                "{name:8} {n:5} tokens: on the GPU {:.1} ms, streaming alone {:.1} ms ({:.1} GB/s), together {:.1} ms (median \
                 {:.1}) = {:.0} tok/s, {:.0} % of the larger; loaded in {loaded:.2} s",
                resident * 1e3,
                copies * 1e3,
                bytes as f64 / copies / 1e9,
                together * 1e3,
                median * 1e3,
                n as f64 / together,
                100.0 * together / bound
            );
        }
    }
}

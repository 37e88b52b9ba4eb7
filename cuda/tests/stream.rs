//! Streamed weights: `unpack` compiles everywhere; on a GPU, shares that are streamed from panels give what resident
//! ones do.

use crate::gpu::gpu;
use memmap2::MmapMut;
use std::ops::Range;
use std::sync::Arc;
use tandem_cuda::{Backend, HostShare, Options, StreamLayout, Streamed};
use tandem_spec::tensor_type::TYPES;
use tandem_spec::testing::{Buffers, Maker, Rng, relative_rms_of_rows};
use tandem_spec::{
    Batch, Block, FfnShape, KvDtype, Linear, Matrix, MoeShape, PanelMemory, Panels, TensorSource, TensorType, Weight,
    panel,
};

/// Panels in a mapping that they share with others.
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

/// Packs rows `rows` byte by byte, as `tandem_spec::panel` says.
fn pack(weight: &Weight, rows: Range<usize>, source: &dyn TensorSource, panel_rows: usize) -> Vec<u8> {
    let (ty, row_bytes) = (weight.ty, weight.row_bytes());
    let block_bytes = ty.row().block_bytes;
    let mut bytes = vec![0u8; rows.len().next_multiple_of(panel_rows) * row_bytes];
    for (i, row) in rows.clone().enumerate() {
        let panel = &mut bytes[i / panel_rows * panel_rows * row_bytes..][..panel_rows * row_bytes];
        for (block, from) in weight.row(source, row).chunks_exact(block_bytes).enumerate() {
            let mut to = block * block_bytes * panel_rows;
            for f in panel::fields(ty) {
                for (n, unit) in from[f.offset..f.offset + f.len].chunks_exact(f.unit).enumerate() {
                    panel[to + (n * panel_rows + i % panel_rows) * f.unit..][..f.unit].copy_from_slice(unit);
                }
                to += f.len * panel_rows;
            }
        }
    }
    bytes.resize(bytes.len().next_multiple_of(64), 0);
    bytes
}

/// `share` of block `block` as a host would have it.
fn host_share(block: usize, share: Block<Weight>, source: &dyn TensorSource, panel_rows: usize) -> HostShare {
    let (linears, n): ([&Linear<Weight>; 3], usize) = match &share {
        Block::Ffn(b) => ([&b.ffn_gate, &b.ffn_up, &b.ffn_down], 1),
        Block::Moe(b) => ([&b.ffn_gate_exps, &b.ffn_up_exps, &b.ffn_down_exps], b.experts.len()),
        _ => unreachable!("feed-forward blocks are streamed"),
    };
    let matrices: Vec<_> = linears
        .iter()
        .flat_map(|l| (0..n).map(move |e| (&l.weight, l.weight.n_rows() / n, e)))
        .map(|(w, rows, e)| (w, rows, pack(w, e * rows..(e + 1) * rows, source, panel_rows)))
        .collect();
    let all = matrices.iter().flat_map(|(.., bytes)| bytes).copied().collect::<Vec<_>>();
    let mut mapping = MmapMut::map_anon(all.len()).expect("memory");
    mapping.copy_from_slice(&all);
    let (mapping, mut end) = (Arc::new(mapping), 0);
    let panels = matrices.iter().map(|(w, n_rows, bytes)| {
        let range = end..end + bytes.len();
        end = range.end;
        let memory = Arc::new(Memory { mapping: mapping.clone(), bytes: range });
        Panels { ty: w.ty, n_rows: *n_rows, n_cols: w.n_cols, panel_rows, memory }
    });
    let panels = panels.collect();
    HostShare { block, share, panels }
}

#[test]
fn unpack_compiles_for_every_type_panel_and_architecture() {
    let Some(nvrtc) = crate::compile::nvrtc() else { return };
    let types = TYPES.iter().filter(|row| row.ty.is_supported());
    let programs: Vec<_> =
        types.flat_map(|row| [8, 16].map(|panel_rows| tandem_cuda::stream::program(row.ty, panel_rows))).collect();
    let reports = crate::compile::compile_all(&nvrtc, &programs, &["sm_75", "sm_90", "sm_120"]);
    assert_eq!(reports.len(), programs.len() * 3);
    for (what, log) in reports {
        assert!(log.contains("0 bytes spill stores"), "{what}: {log}");
    }
}

/// Blocks of `shape` in weights of `ty`: each split at `at(block)` between the GPU and panels, or wholly on the GPU.
struct Split {
    whole: Vec<Block<Weight>>,
    n_embd: usize,
    source: Buffers,
}

impl Split {
    /// The residual stream after all blocks, for a batch of `n` tokens run `times` times over the same input; and the
    /// bytes of unpinned panels.
    fn run(
        &self,
        gpu: &(Arc<tandem_cuda::Device>, impl Fn() -> tandem_cuda::Compiler),
        host: Option<(&[Range<usize>], usize)>,
        n: usize,
    ) -> Vec<f32> {
        let (mut blocks, mut shares) = (self.whole.clone(), Vec::new());
        if let Some((parts, panel_rows)) = host {
            for (i, part) in parts.iter().enumerate() {
                blocks[i] = self.whole[i].share(0..part.start, true);
                shares.push(host_share(i, self.whole[i].share(part.clone(), false), &self.source, panel_rows));
            }
        }
        let options = Options { n_slots: 1, n_ctx: n, n_batch: n, kv: KvDtype::F32 };
        let streamed = Streamed { from: 1, shares };
        let bytes = StreamLayout::new(&streamed.blocks()).bytes();
        assert_eq!(bytes > 0, host.is_some());
        let backend =
            Backend::load_streaming(&gpu.0, gpu.1(), &blocks, streamed, &self.source, &options, &mut |_, _| {})
                .unwrap_or_else(|e| panic!("{e}"))
                .with_prompt_from(1);
        let mut state = backend.state().unwrap();
        let batch = Batch::single(0, 0, &vec![0; n], false);
        let input = self.input(n);
        let mut outputs = (0..3).map(|_| {
            let mut x = input.clone();
            backend.run(&mut state, 0..blocks.len(), &batch, &mut x, &mut []).unwrap_or_else(|e| panic!("{e}"));
            x
        });
        let first = outputs.next().expect("three runs");
        assert!(outputs.all(|x| x == first), "runs differ");
        first
    }

    fn input(&self, n: usize) -> Vec<f32> {
        Rng::new(7).normals(n * self.n_embd, 1.0)
    }

    /// What the blocks add to the input.
    fn expected(&self, n: usize) -> Vec<f64> {
        let input: Vec<f64> = self.input(n).into_iter().map(f64::from).collect();
        let mut x = input.clone();
        for block in &self.whole {
            let Ok(block) = block.try_map(&mut |w| Ok::<_, std::convert::Infallible>(Matrix::decode(w, &self.source)));
            match block {
                Block::Ffn(b) => b.reference(&mut x),
                Block::Moe(b) => b.reference(&mut x),
                _ => unreachable!("feed-forward blocks"),
            }
        }
        x.iter().zip(&input).map(|(x, before)| x - before).collect()
    }

    fn error(&self, x: &[f32], n: usize) -> f64 {
        let added: Vec<f32> = x.iter().zip(self.input(n)).map(|(x, before)| x - before).collect();
        relative_rms_of_rows(&added, &self.expected(n), self.n_embd)
    }
}

/// Four blocks a type (more than there are slots), odd numbers of rows, tails of panels and of tiles: wholly streamed
/// they give exactly what resident blocks give; split, what the reference does.
#[test]
fn streamed_ffns_agree_with_resident_ones() {
    let Some(gpu) = gpu() else { return };
    let mut failed = Vec::new();
    for row in TYPES.iter().filter(|row| row.ty.is_supported()) {
        // A width of several tiles of `unpack` and a tail, and rows that fill no panel.
        let (n_embd, n_ff) = if row.block_len == 256 { (2304, 512 + 256) } else { (1088, 416 + 64) };
        let mut maker = Maker::new(3 + row.ty as u64, &[row.ty]);
        let shape = FfnShape { n_embd, n_ff, rms_eps: 1e-6 };
        let whole = (0..4).map(|i| Block::Ffn(maker.ffn(i, &shape))).collect();
        let split = Split { whole, n_embd, source: maker.source };
        for n in [5, 150] {
            let resident = split.run(&gpu, None, n);
            for panel_rows in [8, 16] {
                let all = [0..n_ff, 0..n_ff, 0..n_ff, 0..n_ff];
                let streamed = split.run(&gpu, Some((&all, panel_rows)), n);
                let unit = row.block_len.max(32);
                let parts = [unit..n_ff, n_ff - unit..n_ff, 0..n_ff, 2 * unit..n_ff];
                let error = split.error(&split.run(&gpu, Some((&parts, panel_rows)), n), n);
                println!("{:8} panels of {panel_rows:2} rows, {n:3} tokens: {error:.2e}", row.name);
                let differ = streamed.iter().zip(&resident).filter(|(a, b)| a != b).count();
                if differ > 0 || error.is_nan() || error > 2e-2 {
                    failed.push(format!("{}, {panel_rows} rows, {n} tokens: {differ} differ, {error:.2e}", row.name));
                }
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

/// Four mixtures a type, which choose among a few experts: wherever these lie, the sum is exactly the same, since every
/// expert's rows and the order of the sum are. Then one type with experts of several units a block.
#[test]
fn streamed_mixtures_agree_with_resident_ones() {
    let Some(gpu) = gpu() else { return };
    let mut failed = Vec::new();
    let mut check = |ty: TensorType, shape: MoeShape, sizes: &[usize], parts: &[[usize; 4]]| {
        let (n_embd, n) = (shape.n_embd, shape.n_experts);
        let mut maker = Maker::new(5 + ty as u64, &[ty]);
        let whole = (0..4).map(|i| Block::Moe(maker.moe(i, &shape))).collect();
        let split = Split { whole, n_embd, source: maker.source };
        for &n_tokens in sizes {
            let resident = split.run(&gpu, None, n_tokens);
            for (at, panel_rows) in parts.iter().flat_map(|at| [8, 16].map(|panel_rows| (at, panel_rows))) {
                let parts = at.map(|at| at..n);
                let streamed = split.run(&gpu, Some((&parts, panel_rows)), n_tokens);
                let differ = streamed.iter().zip(&resident).filter(|(a, b)| a != b).count();
                println!(
                    "{ty} {n_tokens:3} tokens, from expert {at:?}, panels of {panel_rows:2} rows: {differ} differ"
                );
                if differ > 0 || streamed.iter().any(|x| !x.is_finite()) {
                    failed.push(format!("{ty} {n_tokens} tokens {at:?} {panel_rows} rows: {differ} differ"));
                }
            }
        }
    };
    for row in TYPES.iter().filter(|row| row.ty.is_supported()) {
        let (n_embd, n_ff) = if row.block_len == 256 { (512, 256) } else { (160, 96) };
        let shape = MoeShape { n_embd, n_experts: 13, n_used: 3, n_ff, n_ff_shared: n_ff, rms_eps: 1e-6 };
        check(row.ty, shape, &[5, 150], &[[0; 4], [5, 12, 0, 1]]);
    }
    let shape = MoeShape { n_embd: 1024, n_experts: 96, n_used: 4, n_ff: 512, n_ff_shared: 0, rms_eps: 1e-6 };
    check(TensorType::Q8_0, shape, &[301], &[[0, 5, 95, 12]]);
    assert!(failed.is_empty(), "{failed:#?}");
}

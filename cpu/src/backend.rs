//! The backend: packed blocks of a model, and the run of consecutive blocks over a batch. Immutable once loaded.
//! Refuses batches that the state has no room for.

use crate::ahead::Ahead;
use crate::attention::AttentionBlock;
use crate::delta_net::DeltaNetBlock;
use crate::embed::EmbedBlock;
use crate::ffn::FfnBlock;
use crate::handoff::{Choices, ELSEWHERE, Handoff, Task};
use crate::head::HeadBlock;
use crate::matrix::Storage;
use crate::moe::{MoeBlock, Routing};
use crate::pool::{Pool, Worker};
use crate::projection::{Projection, read_ahead, vector};
use crate::read::read;
use crate::state::{BlockState, Layout, StateSize};
use crate::step::{Shared, Step};
use crate::{Isa, Matrix, State};
use rayon::prelude::*;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tandem_spec::{Batch, Block, Linear, Model, Panels, StateBytes, TensorSource, Weight};

/// Rows of an embedding that one thread writes while the workers wake up.
const EMBED_ALONE: usize = 8;

/// Bytes of weights that a worker takes at a time where it only reads them.
const READ_BYTES: usize = 256 << 10;

/// How long workers look for a guess of the experts that they will be asked for: it may come a little later than they.
const GUESS_TIME: Duration = Duration::from_micros(20);

/// What can fail.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The instruction set was asked for and is not there.
    #[error(
        "this processor has no {0}; choose one that it has (portable runs anywhere), or leave the choice to tandem"
    )]
    Isa(&'static str),
    /// Threads cannot be started.
    #[error("cannot start the CPU workers: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
    /// Memory cannot be allocated.
    #[error(
        "cannot allocate {bytes} bytes for keys, values, states, logits and scratch; use a shorter context, fewer sequences or a smaller batch"
    )]
    Memory {
        /// What was asked for.
        bytes: usize,
    },
    /// Memory for weights cannot be allocated.
    #[error(
        "cannot allocate {bytes} bytes for packed weights; free memory, put more of the model on a GPU or use a smaller one"
    )]
    WeightMemory {
        /// What was asked for.
        bytes: usize,
    },
    /// The batch does not fit the state.
    #[error("{0}")]
    Batch(String),
    /// A worker panicked: the others have left the step.
    #[error("a CPU worker failed: {0}")]
    Worker(String),
    /// A block that this backend cannot run.
    #[error("{0}")]
    Unsupported(String),
}

/// How the backend runs.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Worker threads, at least 1.
    pub threads: usize,
    /// Instruction set.
    pub isa: Isa,
}

enum CpuBlock {
    Embed(EmbedBlock),
    Attention(AttentionBlock),
    DeltaNet(DeltaNetBlock),
    Ffn(FfnBlock),
    Moe(MoeBlock),
    Head(HeadBlock),
}

impl CpuBlock {
    fn n_bytes(&self) -> usize {
        match self {
            CpuBlock::Embed(b) => b.n_bytes(),
            CpuBlock::Attention(b) => b.n_bytes(),
            CpuBlock::DeltaNet(b) => b.n_bytes(),
            CpuBlock::Ffn(b) => b.n_bytes(),
            CpuBlock::Moe(b) => b.n_bytes(),
            CpuBlock::Head(b) => b.n_bytes(),
        }
    }

    /// What one token multiplies with, of a mixture the experts of [`MoeBlock::projections`].
    fn projections(&self, draw: usize) -> Vec<&Projection> {
        match self {
            CpuBlock::Embed(_) => Vec::new(),
            CpuBlock::Attention(b) => b.projections().collect(),
            CpuBlock::DeltaNet(b) => b.projections().collect(),
            CpuBlock::Ffn(b) => b.projections().collect(),
            CpuBlock::Moe(b) => b.projections(draw).collect(),
            CpuBlock::Head(b) => vec![&b.output],
        }
    }

    /// Reads ahead what this worker will multiply one token with first.
    fn read_ahead(&self, w: &Worker, ahead: &mut Ahead) {
        match self {
            CpuBlock::Embed(_) => {}
            CpuBlock::Attention(b) => read_ahead(w, &b.inputs(), ahead),
            CpuBlock::DeltaNet(b) => read_ahead(w, &b.inputs(), ahead),
            CpuBlock::Ffn(b) => b.read_ahead(w, ahead),
            CpuBlock::Moe(b) => {
                let (routers, n_routers) = b.routers();
                read_ahead(w, &routers[..n_routers], ahead);
            }
            CpuBlock::Head(b) => read_ahead(w, &[&b.output], ahead),
        }
    }
}

/// Packed blocks of a model and the workers that run them.
pub struct Backend {
    /// Shapes and types of the model's blocks, for the layout of states.
    model: Model,
    /// Indices of the blocks that are here.
    indices: Vec<usize>,
    /// By index; `None` where the block is elsewhere.
    blocks: Vec<Option<CpuBlock>>,
    weight_bytes: u64,
    isa: Isa,
    pool: Pool,
}

/// Calls `f` with every tensor that this backend holds of a block (or of a share of one) and the bytes that it takes:
/// matrices packed, each expert's on its own, vectors as floats. Scales and rotary divisors are numbers beside them.
pub fn for_each_weight(block: &Block<Weight>, isa: Isa, f: &mut dyn FnMut(&Weight, u64)) {
    let stack = |w: &Weight, n: usize| {
        let one = Matrix::packed_bytes(w.n_rows() / n.max(1), w.n_cols, w.ty, isa);
        (n * one) as u64
    };
    let matrix = |w: &Weight| stack(w, 1);
    let vector = |w: &Weight| 4 * (w.n_rows() * w.n_cols) as u64;
    let linear = |l: &Linear<Weight>, f: &mut dyn FnMut(&Weight, u64)| {
        f(&l.weight, matrix(&l.weight));
        l.bias.iter().for_each(|b| f(b, vector(b)));
    };
    match block {
        Block::Embed(b) => f(&b.token_embd, matrix(&b.token_embd)),
        Block::Attention(b) => {
            [&b.attn_q, &b.attn_k, &b.attn_v, &b.attn_output].into_iter().for_each(|l| linear(l, f));
            f(&b.attn_norm, vector(&b.attn_norm));
            b.attn_q_norm.iter().chain(&b.attn_k_norm).for_each(|v| f(v, vector(v)));
        }
        Block::DeltaNet(b) => {
            let linears = [&b.attn_qkv, &b.attn_gate, &b.ssm_beta, &b.ssm_alpha, &b.ssm_out];
            linears.into_iter().for_each(|l| linear(l, f));
            [&b.attn_norm, &b.ssm_conv1d, &b.ssm_dt, &b.ssm_a, &b.ssm_norm].into_iter().for_each(|v| f(v, vector(v)));
        }
        Block::Ffn(b) => {
            [&b.ffn_gate, &b.ffn_up, &b.ffn_down].into_iter().for_each(|l| linear(l, f));
            f(&b.ffn_norm, vector(&b.ffn_norm));
        }
        Block::Moe(b) => {
            f(&b.ffn_gate_inp, matrix(&b.ffn_gate_inp));
            for l in [&b.ffn_gate_exps, &b.ffn_up_exps, &b.ffn_down_exps] {
                f(&l.weight, stack(&l.weight, b.experts.len()));
            }
            f(&b.ffn_norm, vector(&b.ffn_norm));
            if let Some(s) = &b.shared {
                [&s.ffn_gate_shexp, &s.ffn_up_shexp, &s.ffn_down_shexp].into_iter().for_each(|l| linear(l, f));
                s.ffn_gate_inp_shexp.iter().for_each(|w| f(w, matrix(w)));
            }
        }
        Block::Head(b) => {
            linear(&b.output, f);
            f(&b.output_norm, vector(&b.output_norm));
        }
    }
}

/// The embedding table that the head of a tied model multiplies with, if both are among `blocks`.
fn tied<'a>(model: &'a Model, blocks: &[usize]) -> Option<&'a Weight> {
    let of = |i: &usize| &model.blocks[*i];
    let embed = blocks.iter().map(of).find_map(|b| if let Block::Embed(b) = b { Some(&b.token_embd) } else { None })?;
    let head =
        blocks.iter().map(of).find_map(|b| if let Block::Head(b) = b { Some(&b.output.weight) } else { None })?;
    (embed == head).then_some(embed)
}

impl Backend {
    /// Packs the weights of the blocks with the given indices, in parallel, and starts the workers. `progress` is
    /// told the bytes done so far (of [`Backend::planned_weight_bytes`]).
    pub fn load(
        model: &Model,
        blocks: &[usize],
        source: &dyn TensorSource,
        options: Options,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Self, Error> {
        let isa = options.isa;
        if !isa.is_available() {
            return Err(Error::Isa(isa.name()));
        }
        let pool = Pool::new(options.threads)?;
        let tied = tied(model, blocks);
        let (done, planned) = (AtomicU64::new(0), Self::planned_weight_bytes(model, blocks, isa));
        let load = |index: usize, table: Option<&Arc<Matrix>>| {
            let shared = |weight: &Weight| match table {
                Some(table) if Some(weight) == tied => Ok(table.clone()),
                _ => Matrix::pack(weight, source, isa).map(Arc::new),
            };
            let block = &model.blocks[index];
            let packed = match block {
                Block::Embed(b) => CpuBlock::Embed(EmbedBlock { token_embd: shared(&b.token_embd)? }),
                Block::Attention(b) => CpuBlock::Attention(AttentionBlock::load(b, source, isa)?),
                Block::DeltaNet(b) => CpuBlock::DeltaNet(DeltaNetBlock::load(b, source, isa)?),
                Block::Ffn(b) => CpuBlock::Ffn(FfnBlock::load(b, source, isa)?),
                Block::Moe(b) => CpuBlock::Moe(MoeBlock::load(b, source, isa)?),
                Block::Head(b) => CpuBlock::Head(HeadBlock {
                    shape: b.shape.clone(),
                    output_norm: vector(&b.output_norm, source),
                    output: Projection::of(shared(&b.output.weight)?, &b.output, source).past_caches(),
                }),
            };
            let mut bytes = 0;
            for_each_weight(block, isa, &mut |_, n| bytes += n);
            // The head's part of a shared table was done with the embedding.
            progress((done.fetch_add(bytes, Ordering::Relaxed) + bytes).min(planned));
            Ok::<_, Error>((index, packed))
        };
        // Each worker packs blocks of its own, into pages of its own: two that share a matrix clear the same new pages.
        let here: Result<Vec<_>, Error> = pool.install(|| {
            let table = tied.map(|w| Matrix::pack(w, source, isa).map(Arc::new)).transpose()?;
            blocks.par_iter().map(|&index| load(index, table.as_ref())).collect()
        });
        Storage::end_mapping();
        let here = here?;
        let mut packed: Vec<Option<CpuBlock>> = model.blocks.iter().map(|_| None).collect();
        here.into_iter().for_each(|(index, block)| packed[index] = Some(block));
        let loaded = || packed.iter().flatten();
        let embed = loaded().find_map(|b| if let CpuBlock::Embed(b) = b { Some(&b.token_embd) } else { None });
        let head = loaded().find_map(|b| if let CpuBlock::Head(b) = b { Some(&b.output.matrix) } else { None });
        let repeated = embed.zip(head).filter(|(a, b)| Arc::ptr_eq(a, b)).map_or(0, |(table, _)| table.n_bytes());
        let weight_bytes = (loaded().map(CpuBlock::n_bytes).sum::<usize>() - repeated) as u64;
        Ok(Self { model: model.clone(), indices: blocks.to_vec(), blocks: packed, weight_bytes, isa, pool })
    }

    /// Bytes of the packed weights of `blocks`: what [`Backend::load`] allocates for them. A table that embedding and
    /// head share is there once.
    pub fn planned_weight_bytes(model: &Model, blocks: &[usize], isa: Isa) -> u64 {
        let mut bytes = 0;
        for &index in blocks {
            for_each_weight(&model.blocks[index], isa, &mut |_, n| bytes += n);
        }
        bytes - tied(model, blocks).map_or(0, |w| Matrix::packed_bytes(w.n_rows(), w.n_cols, w.ty, isa) as u64)
    }

    /// Bytes allocated for weights.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// The matrices of feed-forward block `block`, for a GPU that streams them: gate, up and down; of a mixture the
    /// routed experts' gates, then their ups, then their downs.
    ///
    /// # Panics
    /// If the block is not here or is of another kind.
    pub fn panels(&self, block: usize) -> Vec<Panels> {
        match self.blocks.get(block) {
            Some(Some(CpuBlock::Ffn(b))) => b.projections().map(|p| p.matrix.panels()).collect(),
            Some(Some(CpuBlock::Moe(b))) => b.routed().map(|p| p.matrix.panels()).collect(),
            _ => panic!("block {block} is no feed-forward block of this backend"),
        }
    }

    /// Reads what one token multiplies with in the loop of [`ReadTest`](crate::ReadTest), every worker its share of all
    /// of it and then what others have not come to: how fast a step that did nothing else could be. Mixtures choose
    /// other experts with another `draw`. Returns the bytes of all parts; of each the last `len % 512` are left out.
    pub fn read_weights(&self, draw: usize) -> usize {
        let all = self.blocks.iter().flatten().flat_map(|block| block.projections(draw));
        let parts: Vec<&[u8]> = all.flat_map(|p| p.matrix.row_bytes(0..p.n_out()).chunks(READ_BYTES)).collect();
        let bytes = AtomicUsize::new(0);
        self.pool.run(|w| {
            for i in w.pieces(parts.len()) {
                read(self.isa, parts[i]);
                bytes.fetch_add(parts[i].len(), Ordering::Relaxed);
            }
        });
        bytes.into_inner()
    }

    /// Instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Worker threads.
    pub fn n_threads(&self) -> usize {
        self.pool.n_workers()
    }

    /// Bytes that [`Backend::state`] allocates with the same arguments and `threads` workers; `None` where the
    /// number overflows.
    pub fn planned_state_bytes(model: &Model, blocks: &[usize], size: StateSize, threads: usize) -> Option<StateBytes> {
        Some(Layout::new(model, blocks, size, threads.max(1))?.bytes())
    }

    /// States and scratch for batches within `size`, all positions empty. An error where the memory is not there.
    pub fn state(&self, size: StateSize) -> Result<State, Error> {
        assert!(size.n_slots > 0 && size.n_ctx > 0 && size.n_batch > 0, "a state of no use: {size:?}");
        let layout = Layout::new(&self.model, &self.indices, size, self.n_threads());
        State::new(layout.ok_or(Error::Memory { bytes: usize::MAX })?)
    }

    /// Runs the consecutive blocks `blocks`, which are all here, on `batch`. `x` `[n_tokens, n_embd]` is the residual
    /// stream, in and out (Embed writes it); Head writes `logits` `[wanted, n_vocab]`, which is otherwise not touched.
    ///
    /// The slots of `state` must have seen exactly the tokens before the batch's positions: GDN states and keys
    /// continue from there.
    pub fn run(
        &self,
        blocks: Range<usize>,
        batch: &Batch,
        state: &mut State,
        x: &mut [f32],
        logits: &mut [f32],
    ) -> Result<(), Error> {
        let task = Task { blocks, is_share: false };
        self.execute(&[task], batch, state, Shared::new(x), None, logits).map(|_| ())
    }

    /// Runs `tasks`, one after the other, each when `handoff` has its input. Returns whether all were run: not if
    /// the other side gave up. A worker that panics ends the step with [`Error::Worker`], since the other side waits.
    pub fn serve(
        &self,
        tasks: &[Task],
        batch: &Batch,
        state: &mut State,
        handoff: &dyn Handoff,
        logits: &mut [f32],
    ) -> Result<bool, Error> {
        let memory = handoff.memory();
        // SAFETY: the handoff vouches for its memory; workers touch it only between `wait` and `post`.
        let x = unsafe { Shared::from_raw(memory.x, memory.len) };
        let serve = || self.execute(tasks, batch, state, x, Some(handoff), logits);
        catch_unwind(AssertUnwindSafe(serve)).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(Error::Worker(text.unwrap_or("no reason given").into()))
        })
    }

    fn execute(
        &self,
        tasks: &[Task],
        batch: &Batch,
        state: &mut State,
        x: Shared,
        handoff: Option<&dyn Handoff>,
        logits: &mut [f32],
    ) -> Result<bool, Error> {
        let (n_tokens, n_embd, size) = (batch.tokens.len(), self.model.n_embd, state.size());
        batch.check(size.n_slots, size.n_ctx, self.model.n_vocab).map_err(Error::Batch)?;
        if n_tokens > size.n_batch {
            return Err(Error::Batch(format!("a batch of {n_tokens} tokens, but there is room for {}", size.n_batch)));
        }
        let x = x.prefix(n_tokens * n_embd);
        let here = |i: usize| self.blocks[i].as_ref().expect("the plan runs blocks where they were loaded");
        let all = || tasks.iter().flat_map(|t| t.blocks.clone());
        for i in all() {
            if let CpuBlock::Head(head) = here(i) {
                assert!(logits.len() >= batch.wanted.len() * head.shape.n_vocab, "{} logits", logits.len());
            }
        }
        let (layout, memory, buffers, routing) = state.split();
        let routing = Exclusive(routing.as_mut_ptr(), routing.len());
        let (logits, memory) = (Shared::new(logits), Shared::new(memory));
        let whole = Step {
            isa: self.isa,
            batch,
            n_tokens,
            n_embd,
            x,
            sum: None,
            choices: None,
            logits,
            layout,
            memory,
            buffers,
        };
        let share = handoff.map(|handoff| {
            let memory = handoff.memory();
            // SAFETY: as for `x` in `serve`.
            let sum = unsafe { Shared::from_raw(memory.sum, memory.len) };
            // SAFETY: as above; the choices are read between `wait` and `post` only.
            let choices = unsafe { Choices::new(memory) };
            Step { sum: Some(sum.prefix(n_tokens * n_embd)), choices: Some(choices), ..whole }
        });
        // The other side waits for its embedding: a few rows take less time than the workers need to wake up.
        let mut n_done = 0;
        if let (Some(handoff), Some(first)) = (handoff, tasks.first().filter(|t| t.blocks.len() == 1))
            && let CpuBlock::Embed(embed) = here(first.blocks.start)
            && n_tokens <= EMBED_ALONE
        {
            if !handoff.wait(0) {
                return Ok(false);
            }
            // SAFETY: no worker has begun.
            unsafe { embed.write_rows(0..n_tokens, &whole) };
            handoff.post(0);
            n_done = 1;
        }
        if n_done == tasks.len() {
            return Ok(true);
        }
        let gave_up = AtomicBool::new(false);
        self.pool.run(|w| {
            // SAFETY: each worker takes the routing tables of its own number, and they outlive the run.
            let routing = unsafe { routing.get(w.index) };
            for rope in 0..layout.ropes.len() {
                let uses = |i: &usize| matches!(layout.blocks[*i], BlockState::Kv { rope: r, .. } if r == rope);
                if let Some(CpuBlock::Attention(b)) = all().find(uses).map(here) {
                    b.fill_rope(w, &whole, rope);
                }
            }
            for (number, task) in tasks.iter().enumerate().skip(n_done) {
                if let Some(handoff) = handoff {
                    if task.is_share && n_tokens == 1 {
                        read_share_ahead(w, here(task.blocks.start), handoff, number);
                    }
                    if w.index == 0 && !handoff.wait(number) {
                        gave_up.store(true, Ordering::Relaxed);
                    }
                    w.barrier();
                    if gave_up.load(Ordering::Relaxed) {
                        return;
                    }
                }
                let step = if task.is_share { share.as_ref().expect("shares have a handoff") } else { &whole };
                for i in task.blocks.clone() {
                    match here(i) {
                        CpuBlock::Embed(b) => b.run(w, step),
                        CpuBlock::Attention(b) => b.run(w, step, layout.blocks[i]),
                        CpuBlock::DeltaNet(b) => b.run(w, step, layout.blocks[i]),
                        CpuBlock::Ffn(b) => b.run(w, step),
                        CpuBlock::Moe(b) => b.run(w, step, routing),
                        CpuBlock::Head(b) => b.run(w, step),
                    }
                    // What all workers wrote is complete.
                    step.barrier_reading(w, |ahead| {
                        if i + 1 < task.blocks.end {
                            here(i + 1).read_ahead(w, ahead);
                        }
                    });
                }
                if let Some(handoff) = handoff.filter(|_| w.index == 0) {
                    handoff.post(number);
                }
            }
        });
        Ok(!gave_up.into_inner())
    }
}

/// Reads ahead what this worker will multiply first in task `number`, a share of `block`, until its input is there.
fn read_share_ahead(w: &Worker, block: &CpuBlock, handoff: &dyn Handoff, number: usize) {
    let is_over = || handoff.is_ready(number);
    let begin = || {
        if w.index == 0 {
            handoff.reads_ahead(number);
        }
        Ahead::until(&is_over)
    };
    match block {
        CpuBlock::Ffn(b) => b.read_ahead(w, &mut begin()),
        CpuBlock::Moe(b) => {
            let start = Instant::now();
            while handoff.foreseen(number, 0).is_none() {
                if is_over() || start.elapsed() > GUESS_TIME {
                    return;
                }
                std::hint::spin_loop();
            }
            let ids = (0..).map_while(|i| handoff.foreseen(number, i));
            b.read_experts_ahead(w, ids.filter(|id| id & ELSEWHERE == 0).map(|id| id as usize), &mut begin());
        }
        _ => {}
    }
}

/// One element a worker.
struct Exclusive(*mut Routing, usize);

// SAFETY: `get` makes its caller promise that each element has one user.
unsafe impl Sync for Exclusive {}

impl Exclusive {
    /// # Safety
    /// No two users of one element; the elements outlive the result.
    #[allow(clippy::mut_from_ref)]
    unsafe fn get(&self, i: usize) -> &mut Routing {
        assert!(i < self.1);
        // SAFETY: in bounds; exclusive as the caller promises.
        unsafe { &mut *self.0.add(i) }
    }
}

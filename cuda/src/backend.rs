//! The blocks of a model on one GPU: weights loaded once into one arena, the state of all slots in another, blocks run
//! one after the other ([`Backend::run`]) or the whole decode step as one graph ([`Backend::decode`]). Refuses float
//! parameters of other types than F32, and batches larger than it was made for.

use crate::arena::{ALIGN, Arena, Pinned, Ptr, Range, Ranges};
use crate::attention::AttentionOp;
use crate::compile::{Compiler, Kernels, Program};
use crate::delta_net::DeltaNetOp;
use crate::device::Device;
use crate::error::{During, Error};
use crate::experts::{self, Exchange, ExpertSlots, HostExperts};
use crate::ffn::FfnOp;
use crate::handoff::{Chosen, Handover, Mailbox, mailbox_size};
use crate::head::{HeadOp, MAX_WINDOW, NO_TOKEN, SlotSampler};
use crate::layout::{self, ExpertSlot};
use crate::moe::MoeOp;
use crate::ops::{Constants, DeviceWeight, Embed, LOGIT_ROWS, Linker, Options, Row, Run, StateLayout, Step};
use crate::prompt::{Products, Prompt, Tables};
use crate::stream::{self, Event, Parts, StreamLayout, Streamed, Streamer};
use crate::upload;
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tandem_spec::{Batch, Block, SamplerOptions, StateBytes, TensorSource, TensorType, Weight};

/// Where the weights of blocks lie in the weight arena: a pure function of the blocks. A file tensor that two blocks
/// use (tied embeddings) lies there once.
#[derive(Clone, Debug)]
pub struct WeightsLayout {
    items: HashMap<Weight, upload::Item>,
    /// Routed experts of mixtures: the table `[n_experts]` u64, the slots, and how these are divided.
    experts: Vec<Option<(Range, Range, ExpertSlot)>>,
    /// Rotary frequencies of attention blocks, `[n_rot / 2]` f64.
    frequencies: Vec<Option<Range>>,
    total: usize,
}

impl WeightsLayout {
    /// The layout of `blocks`.
    pub fn new(blocks: &[Block<Weight>]) -> Self {
        let mut taken = Ranges::default();
        let mut items = HashMap::new();
        let (mut experts, mut frequencies) = (Vec::new(), Vec::new());
        for block in blocks {
            experts.push(match block {
                Block::Moe(b) => {
                    let slot = ExpertSlot::new(b, |w| w.ty);
                    let table = taken.take(8 * b.shape.n_experts);
                    let slots = taken.take(b.experts.len() * slot.bytes);
                    for (part, linear) in slot.parts.iter().zip(b.stacks()) {
                        let (weight, n) = (linear.weight.clone(), b.experts.len());
                        items.insert(weight.clone(), upload::Item::stack(weight, slots, *part, n, slot.bytes));
                    }
                    Some((table, slots, slot))
                }
                _ => None,
            });
            block.for_each(&mut |w| {
                let item = || upload::Item::whole(w.clone(), taken.take(layout::weight_bytes(w)));
                items.entry(w.clone()).or_insert_with(item);
            });
            frequencies.push(match block {
                Block::Attention(b) => Some(taken.take(b.shape.rope.n_rot / 2 * 8)),
                _ => None,
            });
        }
        Self { items, experts, frequencies, total: taken.total() }
    }

    /// Bytes of the weight arena.
    pub fn bytes(&self) -> usize {
        self.total
    }

    fn range(&self, weight: &Weight) -> Range {
        self.items[weight].range
    }
}

/// Calls `f` with the name of every tensor of a block (or of a share of one) and the bytes that it takes in the weight
/// arena, alignment included.
pub fn for_each_weight(block: &Block<Weight>, f: &mut dyn FnMut(&str, u64)) {
    let aligned = |bytes: usize| bytes.next_multiple_of(ALIGN) as u64;
    block.for_each(&mut |w| {
        let n_matrices = match block {
            Block::Moe(b) if b.stacks().iter().any(|l| l.weight == *w) => b.experts.len(),
            _ => 1,
        };
        f(&w.name, n_matrices as u64 * aligned(layout::weight_bytes(w) / n_matrices.max(1)));
    });
    match block {
        Block::Attention(b) => f("rotary frequencies", aligned(b.shape.rope.n_rot / 2 * 8)),
        Block::Moe(b) => f("table of experts", aligned(8 * b.shape.n_experts)),
        _ => {}
    }
}

/// Every program that `blocks` need on a GPU of `n_sms` multiprocessors; `products`: [`Device::products`].
///
/// # Errors
/// A shape that the kernels do not take.
pub fn programs(
    blocks: &[Block<Weight>],
    options: &Options,
    n_sms: usize,
    products: Products,
) -> Result<Vec<Program>, Error> {
    let mut linker = Linker::collecting(n_sms);
    for block in blocks {
        Op::new(&mut linker, unplaced(block), Constants::NONE, options)?;
    }
    Handover::new(&mut linker)?;
    let placed: Vec<_> = blocks.iter().map(unplaced).collect();
    Prompt::new(&mut linker, &placed, options.kv, (8, 0), products)?;
    let mut programs = linker.programs;
    for block in blocks {
        block.for_each(&mut |w| {
            if w.ty.is_quantised() {
                programs.push(upload::program(w.ty));
            }
        });
    }
    let mut seen = std::collections::HashSet::new();
    programs.retain(|p| seen.insert(p.clone()));
    Ok(programs)
}

/// A block without addresses: for what depends on shapes only.
pub(crate) fn unplaced(block: &Block<Weight>) -> Block<DeviceWeight> {
    let Ok(block) = block.try_map(&mut |w| Ok::<_, Infallible>(DeviceWeight::unplaced(w)));
    block
}

/// A block with its kernels.
enum Op {
    Embed(Embed),
    Attention(AttentionOp),
    DeltaNet(DeltaNetOp),
    /// None where the block has no rows: all are streamed, or the CPU's.
    Ffn(Option<FfnOp>),
    Moe(MoeOp),
    Head(HeadOp),
}

impl Op {
    fn new(
        linker: &mut Linker,
        block: Block<DeviceWeight>,
        constants: Constants,
        options: &Options,
    ) -> Result<Self, Error> {
        Ok(match block {
            Block::Embed(b) => Op::Embed(Embed::new(linker, &b)?),
            Block::Attention(b) => {
                Op::Attention(AttentionOp::new(linker, b, (constants.freq, constants.magnitude), options)?)
            }
            Block::DeltaNet(b) => Op::DeltaNet(DeltaNetOp::new(linker, b)?),
            Block::Ffn(b) if b.shape.n_ff == 0 => Op::Ffn(None),
            Block::Ffn(b) => Op::Ffn(Some(FfnOp::new(linker, b)?)),
            Block::Moe(b) => Op::Moe(MoeOp::new(linker, b, constants.experts)?),
            Block::Head(b) => Op::Head(HeadOp::new(linker, b)?),
        })
    }

    fn kind(&self) -> &'static str {
        match self {
            Op::Embed(_) => "embed",
            Op::Attention(_) => "attention",
            Op::DeltaNet(_) => "delta_net",
            Op::Ffn(_) => "ffn",
            Op::Moe(_) => "moe",
            Op::Head(_) => "head",
        }
    }

    /// Queues a step of the block; for Head, logits of the first [`LOGIT_ROWS`] wanted rows at most.
    fn launch(&self, step: &Step) -> Result<(), Error> {
        match self {
            Op::Embed(op) => op.launch(step),
            Op::Attention(op) => op.launch(step),
            Op::DeltaNet(op) => op.launch(step),
            Op::Ffn(op) => op.as_ref().map_or(Ok(()), |op| op.launch(step)),
            Op::Moe(op) => op.choose(step).and_then(|()| op.add(step)),
            Op::Head(op) => op.launch(step, 0, step.n_wanted),
        }
    }
}

/// Weights that kernels read as plain floats.
fn float_weights(block: &Block<Weight>) -> Vec<&Weight> {
    match block {
        Block::Embed(_) => vec![],
        Block::Attention(b) => {
            let optional = [&b.attn_q_norm, &b.attn_k_norm, &b.rope_freqs];
            std::iter::once(&b.attn_norm).chain(optional.into_iter().flatten()).collect()
        }
        Block::DeltaNet(b) => vec![&b.attn_norm, &b.ssm_conv1d, &b.ssm_dt, &b.ssm_a, &b.ssm_norm],
        Block::Ffn(b) => vec![&b.ffn_norm],
        Block::Moe(b) => {
            let gate = b.shared.as_ref().and_then(|s| s.ffn_gate_inp_shexp.as_ref());
            [&b.ffn_norm, &b.ffn_gate_inp].into_iter().chain(gate).collect()
        }
        Block::Head(b) => vec![&b.output_norm],
    }
}

/// Tokens of a batch from which on the prompt kernels are faster.
pub const PROMPT_FROM: usize = 16;

/// Something that the CPU workers do in the middle of a step, in the order of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostTask {
    /// A share: the other share of this block of the backend; else blocks that come before it (or after the last).
    pub at: usize,
    /// Whether it is a share of the block.
    pub is_share: bool,
    /// Whether the workers need the residual stream: not where they begin with the embedding.
    pub gives: bool,
    /// Whether something comes back: not where they end with the head.
    pub takes: bool,
}

/// What loading took, seconds.
#[derive(Clone, Copy, Debug)]
pub struct LoadTimes {
    /// Compiling the kernels, or reading them from the cache.
    pub kernels_s: f64,
    /// Copying the weights, with the buffers for it.
    pub upload_s: f64,
}

/// Blocks of a model on one GPU.
pub struct Backend {
    ops: Vec<Op>,
    handover: Handover,
    host_tasks: Vec<HostTask>,
    prompt: Prompt,
    prompt_from: usize,
    /// Tokens of the smallest batch for which the host's shares are streamed, and what streams them.
    streamer: Option<(usize, Mutex<Streamer>)>,
    streamed_blocks: Vec<usize>,
    /// Slots of experts that change.
    experts: Option<Mutex<ExpertSlots>>,
    blocks: Vec<(Block<DeviceWeight>, Constants)>,
    names: Vec<String>,
    n_embd: usize,
    n_vocab: Option<usize>,
    options: Options,
    layout: StateLayout,
    planned: usize,
    /// Device memory that was free before anything was loaded.
    free_before: usize,
    load_times: LoadTimes,
    weights: Arena,
    kernels: Kernels,
    /// The block of a step that has begun last, of whatever state: faults are the device's. Dropped after the kernels,
    /// which wait for the stream.
    begun: Pinned,
    device: Arc<Device>,
}

impl Backend {
    /// Compiles the kernels of `blocks` and loads their weights from `source`. `progress` is told the bytes loaded so
    /// far and their total.
    ///
    /// # Errors
    /// A shape or type that the kernels do not take, no memory, or what driver and compiler say.
    pub fn load(
        device: &Arc<Device>,
        compiler: Compiler,
        blocks: &[Block<Weight>],
        source: &dyn TensorSource,
        options: &Options,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, Error> {
        Self::load_streaming(device, compiler, blocks, Streamed::default(), source, options, progress)
    }

    /// As [`Backend::load`], where the host has `streamed` shares of some of the blocks.
    ///
    /// # Errors
    /// As [`Backend::load`].
    pub fn load_streaming(
        device: &Arc<Device>,
        compiler: Compiler,
        blocks: &[Block<Weight>],
        streamed: Streamed,
        source: &dyn TensorSource,
        options: &Options,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, Error> {
        device.bind()?;
        let shares = streamed.blocks();
        for w in blocks.iter().chain(&shares).flat_map(float_weights) {
            if w.ty != TensorType::F32 {
                return Err(Error::Unsupported(format!("{} is {}, the GPU kernels want F32", w.name, w.ty)));
            }
        }
        let (free_before, _) = device.memory()?;
        let n_sms = device.n_sms();
        let weights_layout = WeightsLayout::new(blocks);
        let layout = StateLayout::streaming(blocks, &shares, options, n_sms);
        let planned = weights_layout.bytes() + layout.bytes() + StreamLayout::new(&shares).bytes();
        let kernels = Kernels::new(device, compiler);
        let start = Instant::now();
        let own = programs(blocks, options, n_sms, device.products())?;
        kernels.prepare(own.into_iter().chain(stream::programs(&streamed.shares)))?;
        let kernels_s = start.elapsed().as_secs_f64();
        let weights = Arena::new(device, "weights", weights_layout.bytes(), planned)?;

        let mut items = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for block in blocks {
            block.for_each(&mut |w| {
                let item = &weights_layout.items[w];
                if item.range.bytes > 0 && seen.insert(item.range.offset) {
                    items.push(item.clone());
                }
            });
        }
        let total = items.iter().map(|i| i.weight.n_bytes()).sum();
        let start = Instant::now();
        upload::upload(device, &kernels, &weights, &items, source, planned, &mut |done| progress(done, total))?;
        let load_times = LoadTimes { kernels_s, upload_s: start.elapsed().as_secs_f64() };

        let (mut ops, mut placed_blocks) = (Vec::new(), Vec::new());
        let mut linker = Linker::resolving(&kernels, n_sms);
        for ((block, frequencies), experts) in
            blocks.iter().zip(&weights_layout.frequencies).zip(&weights_layout.experts)
        {
            let mut constants = Constants::NONE;
            if let (Block::Moe(b), Some((table, slots, slot))) = (block, experts) {
                let first = weights.ptr(*slots);
                let address = |e| b.experts.contains(&e).then(|| first.offset((e - b.experts.start) * slot.bytes).0);
                let addresses: Vec<u64> = (0..b.shape.n_experts).map(|e| address(e).unwrap_or(0)).collect();
                weights.write(*table, &addresses)?;
                constants.experts = weights.ptr(*table);
            }
            if let (Block::Attention(b), Some(range)) = (block, frequencies) {
                let divisors: Option<Vec<f32>> = b.rope_freqs.as_ref().map(|w| {
                    let bytes = w.runs(source).collect::<Vec<_>>().concat();
                    bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().expect("four bytes"))).collect()
                });
                let (values, magnitude) = b.shape.rope.frequencies(divisors.as_deref());
                weights.write(*range, &values)?;
                (constants.freq, constants.magnitude) = (weights.ptr(*range), magnitude);
            }
            let Ok(placed) = block.try_map(&mut |w| {
                let ptr = weights.ptr(weights_layout.range(w));
                Ok::<_, Infallible>(DeviceWeight { ptr, ..DeviceWeight::unplaced(w) })
            });
            placed_blocks.push((placed.clone(), constants));
            ops.push(Op::new(&mut linker, placed, constants, options)?);
        }
        let handover = Handover::new(&mut linker)?;
        let all: Vec<_> = placed_blocks.iter().map(|(b, _)| b.clone()).collect();
        let prompt = Prompt::new(&mut linker, &all, options.kv, device.compute_capability(), device.products())?;
        let streamed_blocks = streamed.shares.iter().map(|s| s.block).collect();
        let streamer = if streamed.shares.is_empty() {
            None
        } else {
            let streamer = Streamer::new(device, &kernels, streamed.shares, source, planned)?;
            Some((streamed.from, Mutex::new(streamer)))
        };
        let n_embd = blocks.iter().map(n_embd).max().unwrap_or(0);
        let n_vocab = blocks.iter().find_map(|b| match b {
            Block::Embed(b) => Some(b.n_vocab),
            Block::Head(b) => Some(b.shape.n_vocab),
            _ => None,
        });
        Ok(Self {
            ops,
            handover,
            host_tasks: Vec::new(),
            prompt,
            prompt_from: PROMPT_FROM,
            streamer,
            streamed_blocks,
            experts: None,
            blocks: placed_blocks,
            names: blocks.iter().map(Block::name).collect(),
            n_embd,
            n_vocab,
            options: options.clone(),
            layout,
            planned,
            free_before,
            load_times,
            weights,
            kernels,
            begun: Pinned::new(BEGUN_BYTES)?,
            device: device.clone(),
        })
    }

    /// The same with the prompt kernels for batches of `n_tokens` tokens and more: for tests and measurements.
    pub fn with_prompt_from(self, n_tokens: usize) -> Self {
        Self { prompt_from: n_tokens, ..self }
    }

    /// The same with tasks of the CPU workers between its blocks, in order: [`State::mailbox`] is where they meet.
    pub fn with_host_tasks(self, host_tasks: Vec<HostTask>) -> Self {
        Self { host_tasks, ..self }
    }

    /// The same with experts of which the host has all: those that are here can be exchanged for others.
    ///
    /// # Errors
    /// No memory, or what compiler and driver say.
    pub fn with_expert_cache(self, experts: Vec<HostExperts>) -> Result<Self, Error> {
        if experts.is_empty() {
            return Ok(self);
        }
        let mixture = |e: &HostExperts| match &self.blocks[e.block] {
            (Block::Moe(b), constants) => (b, constants.experts),
            _ => panic!("block {} is no mixture of experts", e.block),
        };
        let mixtures: Vec<_> = experts.iter().map(mixture).collect();
        let staging = mixtures.iter().map(|(b, _)| experts::staging_bytes(b, |w| w.ty)).max().unwrap_or(0);
        let slots = ExpertSlots::new(&self.device, &self.kernels, &mixtures, experts, staging, self.planned)?;
        Ok(Self { experts: Some(Mutex::new(slots)), ..self })
    }

    /// Experts that were exchanged before take part from the next step on, and if all are there, those that `choose`
    /// names begin to be exchanged when the last step that was queued is done.
    ///
    /// # Errors
    /// What the driver says.
    pub fn exchange_experts(&self, choose: impl FnOnce() -> Vec<Exchange>) -> Result<(), Error> {
        let Some(experts) = &self.experts else { return Ok(()) };
        let mut experts = experts.lock().unwrap_or_else(PoisonError::into_inner);
        if experts.settle()? {
            experts.exchange(&choose(), &self.kernels)?;
        }
        Ok(())
    }

    /// Calls `f` with each block whose mixture was streamed to the GPU in the last batch, if its experts change, and
    /// how often each of them was chosen `[n_experts]`. Waits for the batch.
    ///
    /// # Errors
    /// What the driver says.
    pub fn streamed_uses(&self, f: &mut dyn FnMut(usize, &[u32])) -> Result<(), Error> {
        let Some(experts) = &self.experts else { return Ok(()) };
        self.device.bind()?;
        experts.lock().unwrap_or_else(PoisonError::into_inner).read_counts(f)
    }

    /// Bytes of device memory, and of pinned memory, that exchanges of experts take.
    pub fn expert_bytes(&self) -> (usize, usize) {
        let experts = self.experts.as_ref().map(|e| e.lock().unwrap_or_else(PoisonError::into_inner));
        experts.map_or((0, 0), |e| (e.bytes(), e.pinned_bytes()))
    }

    /// For each task of the CPU workers in a step of `n_tokens` over blocks `range`: whether it is theirs, and its
    /// weights are not streamed to the GPU.
    pub fn host_tasks(&self, range: std::ops::Range<usize>, n_tokens: usize) -> impl Iterator<Item = bool> {
        let end = self.ops.len();
        let within = self.host_tasks.iter().filter(move |t| range.contains(&t.at) || (t.at == end && range.end == end));
        within.map(move |t| !(t.is_share && self.is_streamed(t.at, n_tokens)))
    }

    /// Whether the host's share of block `i` comes to the GPU for a batch of `n_tokens`.
    fn is_streamed(&self, i: usize, n_tokens: usize) -> bool {
        self.streams(n_tokens) && self.streamed_blocks.contains(&i)
    }

    fn streams(&self, n_tokens: usize) -> bool {
        self.streamer.as_ref().is_some_and(|(from, _)| n_tokens >= (*from).max(self.prompt_from))
    }

    /// Whether the GPU has not failed: what a worker that waits for it asks now and then.
    pub fn is_alive(&self) -> bool {
        use sys::CUresult::{CUDA_ERROR_NOT_READY, CUDA_SUCCESS};
        // SAFETY: the stream lives as long as the device.
        self.device.bind().is_ok()
            && matches!(unsafe { sys::cuStreamQuery(self.device.stream()) }, CUDA_SUCCESS | CUDA_ERROR_NOT_READY)
    }

    /// Bytes of the weight arena.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// What loading took.
    pub fn load_times(&self) -> LoadTimes {
        self.load_times
    }

    /// Bytes of device memory that the driver took since the context was there, beside the weights and `states`, as
    /// far as other programs stand still: modules, graphs, cuBLASLt.
    ///
    /// # Errors
    /// What the driver says.
    pub fn driver_bytes(&self, states: &[&State]) -> Result<i64, Error> {
        let (free, _) = self.device.memory()?;
        let states = states.iter().map(|s| s.bytes()).sum::<usize>();
        let ours = self.weights.bytes() + self.stream_bytes() + self.expert_bytes().0 + states;
        Ok(self.free_before as i64 - free as i64 - ours as i64)
    }

    /// Bytes of the buffers for streamed shares: those of their [`StreamLayout`].
    pub fn stream_bytes(&self) -> usize {
        self.of_streamer(Streamer::bytes)
    }

    /// Bytes of streamed shares that the system refused to pin: they arrive at a third of the rate.
    pub fn unpinned_bytes(&self) -> usize {
        self.of_streamer(Streamer::unpinned_bytes)
    }

    fn of_streamer(&self, f: fn(&Streamer) -> usize) -> usize {
        self.streamer.as_ref().map_or(0, |(_, s)| f(&s.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Memory for all slots and the buffers of a step.
    ///
    /// # Errors
    /// Out of memory.
    pub fn state(&self) -> Result<State, Error> {
        let arena = Arena::new(&self.device, "states and buffers", self.layout.bytes(), self.planned)?;
        arena.fill(self.layout.routed[1], 0)?;
        arena.fill(self.layout.done, 0)?;
        arena.fill(self.layout.sums[1], 0)?;
        for range in self.layout.sampled.zeroed() {
            arena.fill(range, 0)?;
        }
        let pinned = Pinned::new(self.options.n_slots * 4)?;
        let samplers = vec![SamplerOptions::greedy(); self.options.n_slots];
        arena.fill(self.layout.handoff, 0)?;
        let mailbox = match self.host_tasks.is_empty() {
            true => None,
            false => {
                let blocks: Vec<_> = self.blocks.iter().map(|(block, _)| block.clone()).collect();
                let (n, n_choices) = mailbox_size(&blocks, self.n_embd, self.options.n_batch);
                Some(Arc::new(Mailbox::new(n, n_choices, arena.ptr(self.layout.handoff))?))
            }
        };
        let (by_use, graphs) = (self.layout.by_use(), HashMap::new());
        Ok(State { mailbox, arena, by_use, graphs, pinned, held: Vec::new(), running: Vec::new(), samplers })
    }

    /// Bytes of a copy of the delta-net states of one slot; 0 where no block has any.
    pub fn snapshot_bytes(&self) -> usize {
        self.slot_states().map(|(_, bytes)| bytes).sum()
    }

    /// A copy, in pinned host memory, of the delta-net states of `slot`, which belong to the position that it has
    /// reached; in the memory of `old`, if there is one, since new pinned memory is slow to get.
    ///
    /// # Errors
    /// What the driver says, or the fault of an earlier kernel.
    pub fn snapshot(&self, state: &State, slot: usize, old: Option<Snapshot>) -> Result<Snapshot, Error> {
        assert!(slot < self.options.n_slots, "slot {slot} of {}", self.options.n_slots);
        self.device.bind()?;
        let mut snapshot = match old {
            Some(old) => old,
            None => Snapshot(Pinned::new(self.snapshot_bytes())?),
        };
        let mut rest = snapshot.bytes_mut();
        for (range, n) in self.slot_states() {
            let part;
            (part, rest) = rest.split_at_mut(n);
            state.arena.queue_read_at(range, slot, part)?;
        }
        self.device.wait("copying states")?;
        Ok(snapshot)
    }

    /// Puts `slot` back to the position at which `snapshot` was taken, from the same slot: keys and values from that
    /// position on are overwritten as the sequence goes on.
    ///
    /// # Errors
    /// What the driver says.
    pub fn restore(&self, state: &mut State, slot: usize, snapshot: &Snapshot) -> Result<(), Error> {
        let mut rest = snapshot.bytes();
        assert_eq!(rest.len(), self.snapshot_bytes(), "a copy of the same blocks");
        for (range, n) in self.slot_states() {
            let part;
            (part, rest) = rest.split_at(n);
            state.arena.write_at(range, slot, part)?;
        }
        Ok(())
    }

    /// Where delta-net states lie, and the bytes of one slot there: every range is `[n_slots, ..]`.
    fn slot_states(&self) -> impl Iterator<Item = (Range, usize)> {
        let delta_nets =
            self.blocks.iter().zip(&self.layout.blocks).filter(|((b, _), _)| matches!(b, Block::DeltaNet(_)));
        delta_nets.flat_map(|(_, ranges)| *ranges).map(|range| (range, range.bytes / self.options.n_slots))
    }

    fn step<'a>(&'a self, state: &State) -> Result<Step<'a>, Error> {
        let begun = self.begun.device_ptr()?;
        Ok(Step::new(&self.device, &self.layout, &self.options, begun, |range| state.arena.ptr(range)))
    }

    /// Goes on to block `i`.
    fn enter(&self, step: &mut Step, state: &State, i: usize) {
        step.block = i;
        step.state = self.layout.blocks[i].map(|range| state.arena.ptr(range));
    }

    /// An error of a step; where the GPU failed, in the block that had begun last.
    fn locate(&self, e: Error) -> Error {
        match e {
            Error::Kernel { reason, .. } | Error::Driver { reason, .. } if !self.is_alive() => {
                // SAFETY: one word, which the GPU writes no more.
                let begun = unsafe { self.begun.as_ptr::<u32>().read_volatile() };
                Error::Kernel { block: self.names[begun as usize].clone(), ordinal: self.device.ordinal(), reason }
            }
            e => e,
        }
    }

    /// Runs blocks `range` over `batch`, and the tasks of the CPU workers between them, who must be at work
    /// meanwhile. `x` holds the residual stream `[n_tokens, n_embd]`: read unless the first block is Embed, written
    /// unless the last is Head (on either side). `logits` `[wanted, n_vocab]` is written if the last block is Head.
    ///
    /// # Errors
    /// A batch that does not fit, a fault, with the block's name, or workers that do not answer.
    pub fn run(
        &self,
        state: &mut State,
        range: std::ops::Range<usize>,
        batch: &Batch,
        x: &mut [f32],
        logits: &mut [f32],
    ) -> Result<(), Error> {
        self.run_blocks(state, range, batch, x, logits).map_err(|e| self.locate(e))
    }

    fn run_blocks(
        &self,
        state: &mut State,
        range: std::ops::Range<usize>,
        batch: &Batch,
        x: &mut [f32],
        logits: &mut [f32],
    ) -> Result<(), Error> {
        let n = batch.tokens.len();
        let Options { n_slots, n_ctx, n_batch, .. } = self.options;
        batch.check(n_slots, n_ctx, self.n_vocab.unwrap_or(usize::MAX)).map_err(Error::Batch)?;
        if n > n_batch {
            return Err(Error::Batch(format!("a batch of {n} tokens, but the largest is {n_batch}")));
        }
        self.device.bind()?;
        state.held.clear();
        state.running.clear();
        let rows = rows(batch);
        let runs: Vec<Run> = runs(batch);
        state.arena.write(self.layout.rows, &rows)?;
        state.arena.write(self.layout.runs, &runs)?;
        let wanted: Vec<u32> = batch.wanted.iter().map(|r| *r as u32).collect();
        state.arena.write(self.layout.wanted, &wanted)?;
        let mut step = self.step(state)?;
        step.n_tokens = n;
        step.n_runs = runs.len();
        step.has_long_runs = runs.iter().any(|r| r.n_tokens > 1);
        let x_range = Range { bytes: n * self.n_embd * 4, ..self.layout.x };
        let n_tasks = self.host_tasks(range.clone(), n).filter(|is_theirs| *is_theirs).count();
        let begins_there = range.start == 0 && self.host_tasks.iter().any(|t| !t.gives);
        let ends_there = range.end == self.ops.len() && self.host_tasks.iter().any(|t| !t.takes);
        if !begins_there && !matches!(self.ops[range.start], Op::Embed(_)) {
            assert_eq!(x.len(), n * self.n_embd, "residual stream");
            state.arena.write(x_range, x)?;
        }
        let tables = if n >= self.prompt_from {
            let memory = state.arena.ptr(self.layout.tables);
            let blocks = self.blocks.iter().map(|(b, _)| b);
            Some(self.prompt.tables(&self.device, batch, blocks, self.options.kv, (step.rows, step.runs), memory)?)
        } else {
            None
        };
        let streamer = self.streamer.as_ref().filter(|_| self.streams(n));
        let mut streamer = streamer.map(|(_, streamer)| streamer.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(streamer) = &mut streamer {
            streamer.begin(range.clone())?;
        }
        for i in range.clone() {
            self.enter(&mut step, state, i);
            self.meet(state, &step, i)?;
            self.device.write_host(step.begun, i as u32)?;
            if let Op::Head(head) = &self.ops[i] {
                assert_eq!(logits.len(), wanted.len() * head.n_vocab, "logits");
                self.sleep_meanwhile(n_tasks)?;
                for (c, out) in logits.chunks_mut(LOGIT_ROWS * head.n_vocab).enumerate() {
                    let (first, n) = (c * LOGIT_ROWS, out.len() / head.n_vocab);
                    match &self.blocks[i].0 {
                        Block::Head(b) if n >= self.prompt_from.min(LOGIT_ROWS / 2) => {
                            let scratch = state.arena.ptr(self.layout.scratch);
                            let wanted = (step.wanted.offset(first * 4), n);
                            self.prompt.head(&self.device, b, wanted, step.x, step.logits, scratch)?;
                        }
                        _ => head.launch(&step, first, n)?,
                    }
                    state.arena.read(self.layout.logits, out)?;
                }
                if logits.is_empty() {
                    self.device.wait("a step")?; // a fault is this batch's
                }
                return self.end_meetings(state, n_tasks);
            }
            let parts = streamer.as_mut().map(|s| s.parts(i));
            self.launch_block(state, &step, i, tables.as_ref(), parts).map_err(|e| self.in_block(i, e))?;
        }
        if range.end == self.ops.len() {
            self.meet(state, &step, range.end)?;
        }
        self.sleep_meanwhile(n_tasks)?;
        if !ends_there {
            assert_eq!(x.len(), n * self.n_embd, "residual stream");
            state.arena.read(x_range, x)?;
        }
        self.end_meetings(state, n_tasks)
    }

    /// Waits for what is queued, asleep, where CPU workers have `n_tasks` of it: they have all cores, and the one whose
    /// core this thread spins on would keep the others waiting.
    fn sleep_meanwhile(&self, n_tasks: usize) -> Result<(), Error> {
        if n_tasks == 0 {
            return Ok(());
        }
        let done = Event::asleep()?;
        done.record(self.device.stream())?;
        done.wait()
    }

    /// Queues the blocks that the CPU workers run before block `i`.
    fn meet(&self, state: &State, step: &Step, i: usize) -> Result<(), Error> {
        let n = step.n_tokens * self.n_embd;
        for task in self.host_tasks.iter().filter(|t| t.at == i && !t.is_share) {
            let mailbox = state.mailbox.as_ref().expect("made with the tasks");
            let (given, started) = if task.gives { (n, Ptr::NULL) } else { (0, step.sampled.clock) };
            self.handover.give(step.device, mailbox, step.x, given, step.n_tokens, None, started)?;
            if task.takes {
                self.handover.take(step.device, mailbox, step.x, n, step.n_tokens, false)?;
            }
        }
        Ok(())
    }

    /// Queues block `i`, over many tokens where there are `tables`, and what its other share on the CPU adds.
    fn launch_block(
        &self,
        state: &State,
        step: &Step,
        i: usize,
        tables: Option<&Tables>,
        parts: Option<Parts>,
    ) -> Result<(), Error> {
        let n = step.n_tokens * self.n_embd;
        let is_streamed = parts.is_some() && self.streamed_blocks.contains(&i);
        let is_met = !is_streamed && self.host_tasks.iter().any(|t| t.at == i && t.is_share);
        let mailbox = state.mailbox.as_ref().filter(|_| is_met);
        let give = |chosen: Option<Chosen>| match mailbox {
            Some(mailbox) => self.handover.give(step.device, mailbox, step.x, n, step.n_tokens, chosen, Ptr::NULL),
            None => Ok(()),
        };
        match (&self.ops[i], tables) {
            (Op::Embed(op), _) => op.launch(step)?,
            (Op::Moe(_), Some(tables)) => {
                // Those that are streamed are not handed over: the host learns of them this way.
                let experts = self.experts.as_ref().filter(|_| is_streamed);
                let mut experts = experts.map(|e| e.lock().unwrap_or_else(PoisonError::into_inner));
                self.launch_prompt(state, i, parts, tables, step, &mut |chosen| match &mut experts {
                    Some(experts) => experts.count(i, chosen.counts),
                    None => give(Some(chosen)),
                })?;
            }
            (Op::Moe(op), None) => {
                op.choose(step)?;
                give(Some(op.chosen(step)))?;
                op.add(step)?;
                if let (Some(mailbox), Some(next)) = (mailbox.filter(|_| step.n_tokens == 1), self.next_mixture(i)) {
                    next.foresee(step, mailbox)?;
                }
            }
            (_, Some(tables)) => {
                give(None)?;
                self.launch_prompt(state, i, parts, tables, step, &mut |_| Ok(()))?;
            }
            (op, None) => {
                give(None)?;
                op.launch(step)?;
            }
        }
        mailbox.map_or(Ok(()), |mailbox| self.handover.take(step.device, mailbox, step.x, n, step.n_tokens, true))
    }

    /// The mixture that the workers share in next after their share of block `i`, if that is what they do next.
    fn next_mixture(&self, i: usize) -> Option<&MoeOp> {
        let next = self.host_tasks.iter().skip_while(|t| !(t.at == i && t.is_share)).nth(1)?;
        match self.ops.get(next.at) {
            Some(Op::Moe(op)) if next.is_share => Some(op),
            _ => None,
        }
    }

    /// After a step of both sides that one of them ended: both begin anew.
    ///
    /// # Errors
    /// The fault that ended it.
    pub fn recover(&self, state: &State) -> Result<(), Error> {
        let Some(mailbox) = &state.mailbox else { return Ok(()) };
        mailbox.abort();
        self.device.wait("a step").map_err(|e| self.locate(e))?;
        mailbox.finish(0);
        state.arena.fill(self.layout.handoff, 0)
    }

    /// Waits for a step with `n` tasks of the CPU workers.
    fn end_meetings(&self, state: &State, n: usize) -> Result<(), Error> {
        let Some(mailbox) = state.mailbox.as_ref().filter(|_| n > 0) else { return Ok(()) };
        self.device.wait("a step")?;
        if mailbox.finish(n) {
            return Ok(());
        }
        self.recover(state)?;
        Err(Error::NoAnswer)
    }

    /// Queues block `i` over many tokens.
    fn launch_prompt(
        &self,
        state: &State,
        i: usize,
        parts: Option<Parts>,
        tables: &Tables,
        step: &Step,
        between: &mut dyn FnMut(Chosen) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let scratch = state.arena.ptr(self.layout.scratch);
        let (prompt, device, x, state) = (&self.prompt, &self.device, step.x, step.state);
        match &self.blocks[i] {
            (Block::Attention(b), constants) => {
                let cache = (state[0], state[1], self.options.n_ctx, self.options.kv);
                prompt.attention(device, b, tables, x, cache, *constants, scratch)
            }
            (Block::DeltaNet(b), _) => prompt.delta_net(device, b, tables, x, state, scratch),
            (Block::Ffn(b), _) => prompt.ffn(device, b, parts, tables, x, scratch),
            (Block::Moe(b), constants) => prompt.moe(device, b, parts, tables, x, constants.experts, scratch, between),
            (Block::Embed(_) | Block::Head(_), _) => unreachable!("one kernel for any number of tokens"),
        }
    }

    /// Names the block in a launch error.
    fn in_block(&self, block: usize, e: Error) -> Error {
        match e {
            Error::Driver { call, reason } => Error::Kernel {
                block: self.names[block].clone(),
                ordinal: self.device.ordinal(),
                reason: format!("{call}: {reason}"),
            },
            other => other,
        }
    }

    /// One decode step of several sequences, each with one token: [`Backend::launch`] and [`Backend::wait`] with
    /// the most likely token of each.
    ///
    /// # Errors
    /// As those.
    pub fn decode(&self, state: &mut State, feeds: &[Feed]) -> Result<Vec<u32>, Error> {
        let greedy = SamplerOptions::greedy();
        self.launch(state, feeds, &vec![(&greedy, &[][..]); feeds.len()])?;
        self.wait(state)
    }

    /// Starts one decode step of several sequences, each with one token, as one graph, and the choice of the next
    /// token of each. All blocks must be here, Embed first and Head last. `samplers`: for each sequence how to
    /// choose (see [`crate::can_sample`]) and all its tokens, `feeds`' included, of which penalties want the last ones.
    /// A call that goes on where the last one ended (same slots and samplers, next positions, the tokens that were
    /// chosen) is one graph launch.
    ///
    /// # Errors
    /// A batch that does not fit, or a fault.
    pub fn launch(
        &self,
        state: &mut State,
        feeds: &[Feed],
        samplers: &[(&SamplerOptions, &[u32])],
    ) -> Result<(), Error> {
        let n = feeds.len();
        assert!(
            n > 0
                && (matches!(self.ops.first(), Some(Op::Embed(_))) || self.host_tasks.iter().any(|t| !t.gives))
                && (self.has_head() || self.host_tasks.iter().any(|t| !t.takes))
        );
        assert_eq!(samplers.len(), n, "a sampler for each sequence");
        let batch = Batch {
            tokens: feeds.iter().map(|f| f.token).collect(),
            sequences: feeds
                .iter()
                .map(|f| tandem_spec::Sequence { slot: f.slot, position: f.position, n_tokens: 1 })
                .collect(),
            wanted: (0..n).collect(),
        };
        batch
            .check(self.options.n_slots, self.options.n_ctx, self.n_vocab.unwrap_or(usize::MAX))
            .map_err(Error::Batch)?;
        self.device.bind()?;
        let goes_on = state.held == feeds;
        if !goes_on {
            state.arena.write(self.layout.rows, &rows(&batch))?;
            state.arena.write(self.layout.runs, &runs(&batch))?;
            state.arena.write(self.layout.wanted, &(0..n as u32).collect::<Vec<_>>())?;
        }
        for (feed, (options, tokens)) in feeds.iter().zip(samplers) {
            let is_same = state.samplers[feed.slot] == **options;
            if !is_same || (!goes_on && options.window() > 0) {
                self.set_sampler(state, feed.slot, options, tokens)?;
            }
        }
        if !state.graphs.contains_key(&n) {
            let graph = Graph::capture(&self.device, || self.queue_decode(state, n))?;
            state.graphs.insert(n, graph);
        }
        state.held.clear(); // until the tokens are known
        state.graphs[&n].launch(&self.device)?;
        state.running = feeds.to_vec();
        Ok(())
    }

    /// Waits for the step that was started and returns the token that it chose for each sequence: 4 bytes each, which
    /// the device wrote to host memory.
    ///
    /// # Errors
    /// [`Error::Logits`], or a fault.
    pub fn wait(&self, state: &mut State) -> Result<Vec<u32>, Error> {
        let feeds = std::mem::take(&mut state.running);
        assert!(!feeds.is_empty(), "a step was started");
        self.device.bind()?;
        let done = self.device.wait("a step").and_then(|()| self.end_meetings(state, self.host_tasks.len()));
        done.map_err(|e| self.locate(e))?;
        if !self.has_head() {
            return Ok(Vec::new());
        }
        // SAFETY: it holds a token per slot, and the step that writes it has been waited for.
        let tokens = unsafe { std::slice::from_raw_parts(state.pinned.as_ptr::<u32>(), feeds.len()) }.to_vec();
        if let Some(i) = tokens.iter().position(|t| *t == NO_TOKEN) {
            return Err(Error::Logits { slot: feeds[i].slot });
        }
        let next = |(f, t): (&Feed, &u32)| Feed { position: f.position + 1, token: *t, ..*f };
        state.held = feeds.iter().zip(&tokens).map(next).collect();
        Ok(tokens)
    }

    /// Whether the head is here, and with it the choice of tokens.
    pub fn has_head(&self) -> bool {
        matches!(self.ops.last(), Some(Op::Head(_)))
    }

    /// Writes how `slot` chooses, after `tokens`.
    fn set_sampler(
        &self,
        state: &mut State,
        slot: usize,
        options: &SamplerOptions,
        tokens: &[u32],
    ) -> Result<(), Error> {
        let sampled = &self.layout.sampled;
        let recent = options.recent(tokens);
        state.arena.write_at(sampled.samplers, slot, &[SlotSampler::new(options, recent.len())])?;
        if options.window() > 0 {
            let mut window = [0; MAX_WINDOW];
            window[..recent.len()].copy_from_slice(recent);
            state.arena.write_at(sampled.recent, slot, &window)?;
            let mut counts = vec![0u16; self.n_vocab.unwrap_or(0)];
            recent.iter().for_each(|t| counts[*t as usize] += 1); // the batches that fed them were checked
            state.arena.write_at(sampled.counts, slot, &counts)?;
        }
        state.samplers[slot] = options.clone();
        Ok(())
    }

    /// Seconds that the device was at work, from the first kernel of a decode step to its last, over all steps of
    /// `state`.
    ///
    /// # Errors
    /// What the driver says.
    pub fn busy_seconds(&self, state: &State) -> Result<f64, Error> {
        let mut clock = [0u64; 2];
        state.arena.read(self.layout.sampled.clock, &mut clock)?;
        Ok(clock[1] as f64 * 1e-9)
    }

    /// Nanoseconds, by the device's clock, at which the last decode step of `state` began.
    ///
    /// # Errors
    /// What the driver says.
    pub fn started(&self, state: &State) -> Result<u64, Error> {
        let mut started = [0u64];
        state.arena.read(self.layout.sampled.clock, &mut started)?;
        Ok(started[0])
    }

    /// Device time in microseconds, and number, of the blocks of each kind in a decode step of `n_sequences` like the
    /// last ones: a graph of just these blocks, launched `n` times. For benches; the state's contents are lost.
    ///
    /// # Errors
    /// What the driver says.
    pub fn time_kinds(
        &self,
        state: &mut State,
        n_sequences: usize,
        n: usize,
    ) -> Result<Vec<(&'static str, usize, f64)>, Error> {
        self.device.bind()?;
        state.held.clear();
        let mut times: Vec<(&'static str, usize, f64)> = Vec::new();
        for op in &self.ops {
            match times.iter_mut().find(|t| t.0 == op.kind()) {
                Some(time) => time.1 += 1,
                None => times.push((op.kind(), 1, 0.0)),
            }
        }
        for time in &mut times {
            let graph = Graph::capture(&self.device, || {
                let mut step = self.step(state)?;
                (step.n_tokens, step.n_runs, step.n_wanted) = (n_sequences, n_sequences, n_sequences);
                for (i, op) in self.ops.iter().enumerate().filter(|(_, op)| op.kind() == time.0) {
                    self.enter(&mut step, state, i);
                    op.launch(&step)?;
                }
                Ok(())
            })?;
            time.2 = self.time_graph(&graph, n)?;
        }
        Ok(times)
    }

    /// Microseconds of one choice of a token by `options`, from the logits of the last decode step of one sequence: 16
    /// of them in a graph, launched `n` times. For benches; the sampler's state is lost.
    ///
    /// # Errors
    /// What the driver says.
    pub fn time_choice(&self, state: &mut State, options: &SamplerOptions, n: usize) -> Result<f64, Error> {
        const CHOICES: usize = 16;
        self.device.bind()?;
        state.held.clear();
        self.set_sampler(state, 0, options, &[])?;
        let graph = Graph::capture(&self.device, || {
            let mut step = self.step(state)?;
            (step.n_tokens, step.n_runs, step.n_wanted) = (1, 1, 1);
            let heads = self.ops.iter().filter_map(|op| if let Op::Head(head) = op { Some(head) } else { None });
            heads.cycle().take(CHOICES).try_for_each(|head| head.choose(&step, state.pinned.device_ptr()?))
        })?;
        Ok(self.time_graph(&graph, n)? / CHOICES as f64)
    }

    /// Microseconds of a launch of `graph`, the second time that it is launched `n` times.
    fn time_graph(&self, graph: &Graph, n: usize) -> Result<f64, Error> {
        let launch_all = || {
            let start = Instant::now();
            (0..n).try_for_each(|_| graph.launch(&self.device))?;
            self.device.wait("a measurement")?;
            Ok(start.elapsed().as_secs_f64() * 1e6 / n as f64)
        };
        launch_all()?;
        launch_all()
    }

    fn queue_decode(&self, state: &State, n: usize) -> Result<(), Error> {
        let mut step = self.step(state)?;
        (step.n_tokens, step.n_runs, step.n_wanted) = (n, n, n);
        for (i, op) in self.ops.iter().enumerate() {
            self.enter(&mut step, state, i);
            self.meet(state, &step, i)?;
            self.launch_block(state, &step, i, None, None).map_err(|e| self.in_block(i, e))?;
            if let Op::Head(head) = op {
                head.choose(&step, state.pinned.device_ptr()?)?;
            }
        }
        self.meet(state, &step, self.ops.len())
    }

    /// Logits `[n, n_vocab]` of the last decode step of `n` sequences.
    ///
    /// # Errors
    /// What the driver says.
    pub fn logits(&self, state: &State, logits: &mut [f32]) -> Result<(), Error> {
        state.arena.read(self.layout.logits, logits)
    }
}

/// Pinned bytes of a [`Backend`]: the number of the block that has begun.
pub const BEGUN_BYTES: usize = 4;

/// One sequence of a decode step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feed {
    /// Slot.
    pub slot: usize,
    /// Position of `token`: the number of tokens that the slot has seen.
    pub position: usize,
    /// Token id.
    pub token: u32,
}

/// A copy of the delta-net states of one slot.
pub struct Snapshot(Pinned);

impl Snapshot {
    fn bytes(&self) -> &[u8] {
        // SAFETY: the allocation has so many bytes; whoever writes them has `bytes_mut`, and waits for the device.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), self.0.bytes()) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_ptr(), self.0.bytes()) }
    }
}

/// What changes from step to step: KV rows, delta-net states, activations, and the graphs that work on them.
pub struct State {
    graphs: HashMap<usize, Graph>,
    /// What rows and runs hold on the device.
    held: Vec<Feed>,
    /// The step that was started and not waited for.
    running: Vec<Feed>,
    /// By slot, as the device holds them.
    samplers: Vec<SamplerOptions>,
    by_use: StateBytes,
    arena: Arena,
    // Dropped after the arena, which waits for the stream.
    /// The token that was chosen for each slot.
    pinned: Pinned,
    mailbox: Option<Arc<Mailbox>>,
}

impl State {
    /// Bytes of the state arena.
    pub fn bytes(&self) -> usize {
        self.arena.bytes()
    }

    /// The same by use.
    pub fn by_use(&self) -> StateBytes {
        StateBytes { scratch: self.by_use.scratch + self.arena.bytes() as u64 - self.by_use.total(), ..self.by_use }
    }

    /// Bytes of pinned host memory.
    pub fn pinned_bytes(&self) -> usize {
        self.pinned.bytes() + self.mailbox.as_ref().map_or(0, |mailbox| mailbox.bytes())
    }

    /// Where the GPU and the CPU workers meet, if there are tasks for them.
    pub fn mailbox(&self) -> Option<&Arc<Mailbox>> {
        self.mailbox.as_ref()
    }
}

/// Kernels and copies that are launched together.
pub(crate) struct Graph {
    exec: sys::CUgraphExec,
}

impl Graph {
    /// Captures what `queue` queues on the stream of `device`. The addresses that it names must outlive the graph.
    ///
    /// # Errors
    /// What `queue` or the driver says.
    pub fn capture(device: &Device, queue: impl FnOnce() -> Result<(), Error>) -> Result<Self, Error> {
        let stream = device.stream();
        let _capture = device.capture();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is valid; the capture is ended below on every path.
        unsafe { result::stream::begin_capture(stream, mode) }.during("capturing a step")?;
        let queued = queue();
        // SAFETY: as above.
        let graph = unsafe { result::stream::end_capture(stream) };
        queued?;
        let graph = graph.during("capturing a step")?;
        let mut exec = std::ptr::null_mut();
        // SAFETY: the graph was just captured; it is not needed after the instantiation.
        let made = unsafe {
            let made = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0).result();
            let _ = result::graph::destroy(graph);
            made
        };
        made.during("instantiating a step")?;
        Ok(Self { exec })
    }

    /// Queues the graph on the stream of the device for which it was captured.
    ///
    /// # Errors
    /// What the driver says.
    pub fn launch(&self, device: &Device) -> Result<(), Error> {
        // SAFETY: whoever captured the graph keeps what it names.
        unsafe { result::graph::launch(self.exec, device.stream()) }.during("launching a step")
    }
}

// SAFETY: graph handles may be used from any thread whose context is current.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated once, destroyed once; the arena behind it is dropped later and waits for the stream.
        let _ = unsafe { result::graph::exec_destroy(self.exec) };
    }
}

fn rows(batch: &Batch) -> Vec<Row> {
    let mut rows = Vec::with_capacity(batch.tokens.len());
    for (i, s) in batch.sequences.iter().enumerate() {
        for t in 0..s.n_tokens {
            rows.push(Row {
                slot: s.slot as u32,
                position: (s.position + t) as u32,
                sequence: i as u32,
                token: batch.tokens[rows.len()],
            });
        }
    }
    rows
}

fn runs(batch: &Batch) -> Vec<Run> {
    let mut first_row = 0;
    let run = |s: &tandem_spec::Sequence| {
        let run = Run { slot: s.slot as u32, position: s.position as u32, first_row, n_tokens: s.n_tokens as u32 };
        first_row += run.n_tokens;
        run
    };
    batch.sequences.iter().map(run).collect()
}

fn n_embd(block: &Block<Weight>) -> usize {
    match block {
        Block::Embed(b) => b.n_embd,
        Block::Attention(b) => b.shape.n_embd,
        Block::DeltaNet(b) => b.shape.n_embd,
        Block::Ffn(b) => b.shape.n_embd,
        Block::Moe(b) => b.shape.n_embd,
        Block::Head(b) => b.shape.n_embd,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_spec::testing::{AttentionParts, Maker};
    use tandem_spec::{AttentionShape, FfnShape, HeadShape, KvDtype, MoeShape, Rope, RopeScaling, RopeStyle, Sequence};

    /// Which step of a process of its own is to fail.
    const STEP: &str = "TANDEM_TEST_FAULT";

    fn compiler() -> Result<Compiler, Error> {
        let libs = std::env::var_os("TANDEM_CUDA_LIBS").map(std::path::PathBuf::from);
        Compiler::new(libs.as_deref(), Some(std::env::temp_dir().join("tandem-test-cubins")))
    }

    /// Where nothing comes between two mixtures, the experts that are foreseen are those that are chosen, in their
    /// order and with the marks of those that are here; of the first mixture nothing is known.
    #[test]
    fn experts_are_foreseen() {
        let (device, compiler) = match Device::open(0).and_then(|device| Ok((Arc::new(device), compiler()?))) {
            Ok(gpu) => gpu,
            Err(e) => return println!("skipped: {e}"),
        };
        let mut maker = Maker::new(2, &[TensorType::Q4_K]);
        let (n_embd, n_used) = (512, 6);
        let shape = MoeShape { n_embd, n_experts: 40, n_used, n_ff: 256, n_ff_shared: 256, rms_eps: 1e-6 };
        let blocks = [0, 1].map(|i| Block::Moe(maker.moe(i, &shape)).share(0..20, true));
        let options = Options { n_slots: 1, n_ctx: 16, n_batch: 1, kv: KvDtype::F32 };
        let backend = Backend::load(&device, compiler, &blocks, &maker.source, &options, &mut |_, _| {}).unwrap();
        let tasks = [0, 1].map(|at| HostTask { at, is_share: true, gives: true, takes: true });
        let backend = backend.with_host_tasks(tasks.to_vec());
        let mut state = backend.state().unwrap();
        let mailbox = state.mailbox().unwrap().clone();
        for seed in 1..9 {
            let mut x: Vec<f32> = (0..n_embd).map(|i| ((i * seed) as f32).sin()).collect();
            let base = mailbox.begin();
            let serve = || {
                let mut all = Vec::new();
                for task in 0..2 {
                    assert!(mailbox.wait(base, task, 1, &|| backend.is_alive()));
                    let (_, sum, _, ids, ..) = mailbox.memory();
                    // SAFETY: both are longer, and the GPU leaves them alone until the answer.
                    let chosen = unsafe {
                        sum.write_bytes(0, n_embd);
                        std::slice::from_raw_parts(ids, n_used).to_vec()
                    };
                    all.push((chosen, (0..n_used).map_while(|i| mailbox.foreseen(base, task, i)).collect::<Vec<_>>()));
                    mailbox.post(base, task);
                }
                all
            };
            let batch = Batch::single(0, 0, &[0], false);
            let (run, served) = std::thread::scope(|scope| {
                let workers = scope.spawn(serve);
                (backend.run(&mut state, 0..2, &batch, &mut x, &mut []), workers.join().unwrap())
            });
            run.unwrap();
            let [(_, of_first), (chosen, foreseen)] = &served[..] else { unreachable!("two tasks") };
            assert!(of_first.is_empty(), "{of_first:?}");
            assert_eq!(foreseen, chosen, "seed {seed}");
        }
    }

    #[test]
    fn a_fault_names_its_block() {
        if let Err(e) = Device::open(0).and_then(|_| compiler()) {
            return println!("skipped: {e}");
        }
        for step in ["prompt", "token"] {
            let child = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "backend::tests::fault_in_attention", "--nocapture"])
                .env(STEP, step)
                .output()
                .unwrap();
            let out = String::from_utf8_lossy(&child.stdout);
            assert!(out.contains("kernel fault in blk.1.attn on GPU 0: "), "{step}: {out}");
        }
    }

    /// A fault ends all work of a process on the GPU, so that this is run by the test above.
    #[test]
    fn fault_in_attention() {
        let Ok(failing) = std::env::var(STEP) else { return };
        let mut maker = Maker::new(1, &[TensorType::Q4_K]);
        let rope =
            Rope { n_rot: 64, base: 1e7, style: RopeStyle::Neox, scaling: RopeScaling::None, rotated_pairs: vec![] };
        let (n_embd, n_vocab, rms_eps) = (512, 64, 1e-6);
        let shape = AttentionShape { n_embd, n_heads: 4, n_kv_heads: 2, head_dim: 128, gated: true, rms_eps, rope };
        let blocks = [
            Block::Embed(maker.embed(n_vocab, n_embd)),
            Block::Ffn(maker.ffn(0, &FfnShape { n_embd, n_ff: 1024, rms_eps })),
            Block::Attention(maker.attention(1, &shape, AttentionParts::default())),
            Block::Head(maker.head(&HeadShape { n_embd, n_vocab, rms_eps })),
        ];
        let device = Arc::new(Device::open(0).unwrap());
        let options = Options { n_slots: 1, n_ctx: 64, n_batch: 32, kv: KvDtype::F32 };
        let mut backend =
            Backend::load(&device, compiler().unwrap(), &blocks, &maker.source, &options, &mut |_, _| {}).unwrap();
        let mut state = backend.state().unwrap();
        let batch = |slot, n_tokens| Batch {
            tokens: (0..n_tokens as u32).collect(),
            sequences: vec![Sequence { slot, position: 0, n_tokens }],
            wanted: vec![n_tokens - 1],
        };
        let error = if failing == "prompt" {
            let Block::Attention(attention) = &mut backend.blocks[2].0 else { unreachable!() };
            attention.attn_q.weight.ptr = Ptr(1 << 8); // where no memory is
            backend.run(&mut state, 0..4, &batch(0, 20), &mut [], &mut vec![0.0; n_vocab]).unwrap_err()
        } else {
            backend.decode(&mut state, &[Feed { slot: 0, position: 0, token: 1 }]).unwrap();
            let next = state.held.clone();
            // The next step goes on with what the device holds: a slot far behind the cache.
            state.arena.write(backend.layout.rows, &rows(&batch(1 << 30, 1))).unwrap();
            backend.decode(&mut state, &next).unwrap_err()
        };
        println!("{error}");
        std::process::exit(0); // nothing of the GPU can be given back
    }
}

//! Which share of which block goes where: the least predicted time for the stated workload, within the
//! capacities.
//!
//! Blocks move from the CPU to the GPU in a fixed order, most time saved per byte first: mixers with their
//! keys, values and states, the head, then FFN rows or routed experts, one unit of every layer after the
//! other. A few such orders, each with a few batch sizes and with or without streaming of prompt weights, give
//! a list of candidate placements that does not depend on the capacities. Over several GPUs each of them is cut
//! into runs of blocks, one per GPU, fastest memory first; every cut is a candidate. The plan is the fastest
//! candidate that fits. More memory only adds candidates that fit, so it never predicts a longer time (but for what
//! [`EXPERT_CACHE_WORTH`] allows), and since every candidate is timed exactly, a step that does not pay (a hand-off
//! that costs more than the rows it moves) is simply not taken.

use super::bytes::{self, Sizes, StagingBytes};
use super::time::{self, Rates, Token, Waiting};
use super::{Alternative, Device, Place, Plan, Refusal, Share, Wishes, Workload, n_parts, row_unit};
use crate::machine::Machine;
use tandem_spec::{Block, KvDtype, Model, TensorType, Weight};

/// Context length where none is asked for: enough for a chat, and no surprise in memory.
const DEFAULT_CTX: usize = 8192;
/// Batch sizes that are tried where a GPU can be used; without one the first is taken.
const BATCHES: [usize; 3] = [512, 2048, 8192];
/// The same where weights are streamed: a batch that only just hides the copies leaves most memory for weights.
const STREAM_BATCHES: [usize; 4] = [512, 1024, 2048, 8192];
/// Placements timed per order of moves, divided by the number of GPUs; longer orders are walked in equal strides.
const MAX_STEPS: usize = 2000;
/// How much longer a plan whose experts follow the routing may take by the predicted times, which are those of uniform
/// routing and so know nothing of its gain: 1.6 times the generation rate where routing follows Zipf's law.
const EXPERT_CACHE_WORTH: f64 = 1.25;

/// How far a block has moved to the GPU: 0 not at all, `max_level` wholly.
type Level = usize;

fn max_level(block: &Block<Weight>) -> Level {
    match block {
        Block::Ffn(b) => b.shape.n_ff.div_ceil(row_unit(b)),
        Block::Moe(b) => 1 + b.shape.n_experts, // 1: home on the GPU, all routed experts on the CPU
        _ => 1,
    }
}

/// Rows or experts on the GPU at `level`.
fn gpu_part(block: &Block<Weight>, level: Level) -> usize {
    match block {
        Block::Ffn(b) => (level * row_unit(b)).min(b.shape.n_ff),
        Block::Moe(_) => level.saturating_sub(1),
        _ => level,
    }
}

pub(super) fn place(block: &Block<Weight>, level: Level, gpu: Device) -> Place {
    let (n, on_gpu) = (n_parts(block), gpu_part(block, level));
    let mut place = Place::new();
    if level > 0 {
        place.push(Share { device: gpu, part: 0..on_gpu });
    }
    if on_gpu < n {
        place.push(Share { device: Device::Cpu, part: on_gpu..n });
    }
    place
}

/// Bytes and times of one block at one level.
#[derive(Clone, Debug, Default)]
struct Cell {
    gpu_bytes: u64,
    cpu_bytes: u64,
    token: Token,
    /// Seconds of one prompt batch: of the side that takes longer.
    prompt: f64,
    /// One prompt batch wholly on the GPU, and the bytes that must be streamed for that; infinite where the
    /// CPU's part cannot be streamed.
    streamed: f64,
    stream_bytes: f64,
    /// Of the GPU's buffers for that.
    staging: StagingBytes,
}

/// A placement with its times and bytes.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub levels: Vec<Level>,
    /// GPU of each block that has a level above 0.
    pub gpus: Vec<usize>,
    pub sizes: Sizes,
    /// Seconds of one token and of the whole prompt.
    pub decode_s: f64,
    pub prompt_s: f64,
    /// Whether the prompt is faster streamed.
    pub prompt_streams: bool,
}

/// Seconds of one token, and of one prompt batch computed in place or with the host's weights streamed.
struct Times {
    decode: f64,
    in_place: f64,
    streamed: f64,
}

/// Seconds of consecutive blocks: of one token, of one prompt batch computed in place, and of one with the host's
/// weights streamed, in three parts: what nothing overlaps, and computing and copying, which overlap each other.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    decode: f64,
    in_place: f64,
    apart: f64,
    compute: f64,
    copy: f64,
}

impl Span {
    fn plus(self, sign: f64, other: Self) -> Self {
        Self {
            decode: self.decode + sign * other.decode,
            in_place: self.in_place + sign * other.in_place,
            apart: self.apart + sign * other.apart,
            compute: self.compute + sign * other.compute,
            copy: self.copy + sign * other.copy,
        }
    }

    fn streamed(&self) -> f64 {
        self.apart + self.compute.max(self.copy)
    }
}

/// Bytes that a placement needs, where it does not fit: by GPU index, and of the host.
#[derive(Clone, Debug)]
struct Overflow {
    gpus: Vec<u64>,
    gpus_full: bool,
    host: u64,
    excess: u64,
}

/// What is given: everything that does not depend on the candidate.
#[derive(Clone)]
pub(super) struct Problem<'a> {
    pub model: &'a Model,
    pub facts: &'a Machine,
    pub wishes: &'a Wishes,
    pub threads: usize,
    /// Usable bytes by GPU index.
    pub vram: Vec<u64>,
    pub ram: u64,
    /// GPU indices in the order in which they are filled: fastest memory first.
    order: Vec<usize>,
    /// Level (and GPU, where it is named) of the blocks that the user placed.
    fixed: Vec<Option<(Level, Option<usize>)>>,
    tied: bool,
    /// The probability of each number of a token's experts that the GPU of a shared mixture lacks; `None`: routing is
    /// uniform.
    misses: Option<&'a [f64]>,
}

impl<'a> Problem<'a> {
    /// Reads the wishes; refuses the ones that name what is not there.
    pub fn new(model: &'a Model, facts: &'a Machine, wishes: &'a Wishes) -> Result<Self, Refusal> {
        let n_gpus = facts.gpus.len();
        if wishes.vram.len() > n_gpus && wishes.vram.iter().any(|v| *v > 0) {
            let n = wishes.vram.len();
            let note = facts.gpu_note.as_deref().unwrap_or("");
            return Err(Refusal::wish(format!("--vram names {n} GPUs, but {} has {n_gpus}. {note}", facts.name)));
        }
        let limit = |i: usize| wishes.vram.get(i).copied().unwrap_or(u64::MAX);
        let vram: Vec<u64> = facts.gpus.iter().enumerate().map(|(i, g)| g.vram_free.min(limit(i))).collect();
        let mut order: Vec<usize> = (0..n_gpus).filter(|&i| vram[i] > 0).collect();
        // Cards of one kind are one speed, whatever the measurements of each say.
        let speed = |i: usize| {
            let same = facts.gpus.iter().filter(|g| g.name == facts.gpus[i].name);
            same.map(|g| g.bandwidth_gb_per_s).fold(0.0, f64::max)
        };
        order.sort_by(|&a, &b| speed(b).total_cmp(&speed(a)).then(a.cmp(&b)));
        let mut problem = Self {
            model,
            facts,
            wishes,
            threads: wishes.threads.unwrap_or(facts.host.threads).max(1),
            vram,
            ram: facts.host.ram_available.min(wishes.ram.unwrap_or(u64::MAX)),
            order,
            fixed: vec![None; model.blocks.len()],
            tied: bytes::is_tied(model),
            misses: None,
        };
        problem.fix()?;
        Ok(problem)
    }

    /// The GPU that is filled first.
    pub fn first_gpu(&self) -> usize {
        self.order[0]
    }

    /// Turns `--gpu-layers` and `--place` into levels.
    fn fix(&mut self) -> Result<(), Refusal> {
        let (model, wishes) = (self.model, self.wishes);
        let no_gpu = |what: &str| {
            let note = self.facts.gpu_note.as_deref().unwrap_or("");
            Refusal::wish(format!("{what} asks for a GPU, but none of {} can be used. {note}", self.facts.name))
        };
        if let Some(n) = wishes.gpu_layers {
            if n > 0 && self.order.is_empty() {
                return Err(no_gpu("--gpu-layers"));
            }
            let first = (model.n_layers + 1).saturating_sub(n);
            for (i, block) in model.blocks.iter().enumerate() {
                let on_gpu = match block {
                    Block::Embed(_) => self.tied && n > 0,
                    Block::Head(_) => n > 0,
                    Block::Attention(b) => b.layer >= first,
                    Block::DeltaNet(b) => b.layer >= first,
                    Block::Ffn(b) => b.layer >= first,
                    Block::Moe(b) => b.layer >= first,
                };
                self.fixed[i] = Some((if on_gpu { max_level(block) } else { 0 }, None));
            }
        }
        for rule in &wishes.place {
            let mut matched = false;
            for (i, block) in model.blocks.iter().enumerate().filter(|(_, b)| rule.matches(&b.name())) {
                matched = true;
                let Device::Cuda(gpu) = rule.device else {
                    let level = match rule.share {
                        Some(s) => level_of_share(block, 1.0 - s)?,
                        None => 0,
                    };
                    self.fixed[i] = Some((level, None));
                    continue;
                };
                if !self.order.contains(&gpu) {
                    return Err(no_gpu(&format!("placement `{}=cuda{gpu}`", rule.blocks)));
                }
                let level = match rule.share {
                    Some(s) => level_of_share(block, s)?,
                    None => max_level(block),
                };
                self.fixed[i] = Some((level, Some(gpu)));
            }
            if !matched {
                let names: Vec<String> = model.blocks.iter().map(Block::name).collect();
                let (first, last) = (names.get(..5.min(names.len())).unwrap_or(&[]).join(", "), names.last());
                return Err(Refusal::wish(format!(
                    "placement `{}={}` matches no block; the blocks are {first}, ..., {}",
                    rule.blocks,
                    rule.device,
                    last.map_or("", String::as_str)
                )));
            }
        }
        Ok(())
    }

    /// Context, KV type and slots, as asked for or by default.
    fn sizes(&self) -> Sizes {
        let workload = &self.wishes.workload;
        let wanted = DEFAULT_CTX.max(workload.prompt + workload.generate);
        let default_kv = if self.model.is_hybrid() { KvDtype::Bf16 } else { KvDtype::F32 };
        Sizes {
            n_ctx: self.wishes.n_ctx.unwrap_or(self.model.n_ctx_train.clamp(1, wanted)),
            n_slots: self.wishes.n_slots.max(1),
            n_batch: 0,
            kv_dtype: self.wishes.kv_dtype.unwrap_or(default_kv),
            n_logits: self.wishes.n_slots.max(1),
            n_snapshots: 0,
            isa: self.facts.host.isa,
            threads: self.threads,
            stream: false,
            expert_cache: false,
        }
    }

    /// The fastest placement that fits.
    pub fn solve(&self) -> Result<Outcome, Refusal> {
        type Best = Option<(f64, Outcome)>;
        let (mut cached, mut fixed): (Best, Best) = (None, None);
        let mut nearest: Option<Overflow> = None;
        for sizes in self.candidate_sizes() {
            let tables = Tables::new(self, sizes);
            for order in tables.orders() {
                let best = if sizes.expert_cache { &mut cached } else { &mut fixed };
                tables.walk(&order, best, &mut nearest);
            }
        }
        let follows = |(block, level): (&Block<Weight>, &Level)| {
            bytes::has_changing_experts(block, &place(block, *level, Device::Cuda(0)), self.facts.host.isa)
        };
        let worth =
            |o: &Outcome| if self.model.blocks.iter().zip(&o.levels).any(follows) { EXPERT_CACHE_WORTH } else { 1.0 };
        let is_slower = |(c, f): (&(f64, Outcome), &(f64, Outcome))| c.0 > worth(&c.1) * f.0;
        let best = if cached.as_ref().zip(fixed.as_ref()).is_some_and(is_slower) { fixed } else { cached.or(fixed) };
        match (best, nearest) {
            (Some((_, outcome)), _) => Ok(outcome),
            (None, Some(needs)) => Err(self.too_big(&needs)),
            (None, None) => unreachable!("every walk times or refuses at least the placement it starts from"),
        }
    }

    /// Batch sizes, without streaming and then with it.
    fn candidate_sizes(&self) -> Vec<Sizes> {
        let mut sizes = self.sizes();
        sizes.n_snapshots = bytes::n_snapshots(self.model, self.ram, &sizes);
        let has_experts = self.model.blocks.iter().any(|b| matches!(b, Block::Moe(_)));
        let caches: &[bool] =
            if self.wishes.expert_cache && has_experts && !self.order.is_empty() { &[true, false] } else { &[false] };
        let with = |stream: bool, batches: &[usize]| -> Vec<Sizes> {
            let mut batches: Vec<usize> = batches.iter().map(|n| (*n).min(sizes.n_ctx)).collect();
            batches.dedup();
            let n_logits = |n_batch| if self.wishes.all_logits { n_batch } else { sizes.n_logits };
            let both = batches.into_iter().flat_map(|n_batch| caches.iter().map(move |&cache| (n_batch, cache)));
            let of =
                |(n_batch, expert_cache)| Sizes { n_batch, n_logits: n_logits(n_batch), stream, expert_cache, ..sizes };
            both.map(of).collect()
        };
        match self.wishes.n_batch {
            Some(n) if self.order.is_empty() => with(false, &[n]),
            Some(n) => [with(false, &[n]), with(true, &[n])].concat(),
            None if self.order.is_empty() => with(false, &BATCHES[..1]),
            None => [with(false, &BATCHES), with(true, &STREAM_BATCHES)].concat(),
        }
    }

    fn too_big(&self, needs: &Overflow) -> Refusal {
        let mut rows = vec![super::Need { device: Device::Cpu, needed: needs.host, available: self.ram }];
        for &g in &self.order {
            rows.push(super::Need { device: Device::Cuda(g), needed: needs.gpus[g], available: self.vram[g] });
        }
        Refusal { reason: "the model does not fit".into(), needs: rows, options: Vec::new() }
    }
}

/// The level that puts `share` of a divisible block on the GPU.
fn level_of_share(block: &Block<Weight>, share: f64) -> Result<Level, Refusal> {
    match block {
        Block::Ffn(_) => Ok((share * max_level(block) as f64).round() as Level),
        Block::Moe(b) => Ok(1 + (share * b.shape.n_experts as f64).round() as Level),
        _ if share == 0.0 || share == 1.0 => Ok(share as Level),
        _ => Err(Refusal::wish(format!(
            "{} cannot be shared; only feed-forward blocks can (blk.N.ffn by rows, blk.N.moe by experts)",
            block.name()
        ))),
    }
}

/// Bytes and times of every block at every level, for one batch size.
struct Tables<'a> {
    problem: &'a Problem<'a>,
    sizes: Sizes,
    /// Number of the column of each block: blocks of equal tensors share one.
    column_of: Vec<usize>,
    /// By position in `problem.order` (one table without GPU times where there is no GPU), column and level.
    cells: Vec<Vec<Vec<Cell>>>,
    /// Bytes that a used GPU takes beside its blocks, by GPU index.
    gpu_base: Vec<u64>,
    /// The same of the host, by number of GPUs in use.
    host_base: Vec<u64>,
    /// Scratch of the CPU, where it runs any block.
    host_scratch: u64,
    /// Prompt batches, and tokens of each.
    n_batches: f64,
    batch_tokens: usize,
}

impl<'a> Tables<'a> {
    fn new(problem: &'a Problem<'a>, sizes: Sizes) -> Self {
        let (model, workload) = (problem.model, problem.wishes.workload);
        let n_batches = workload.prompt.div_ceil(sizes.n_batch);
        let batch_tokens = workload.prompt.div_ceil(n_batches.max(1)).max(1);
        let sum = |entries: Vec<bytes::Entry>| entries.iter().map(|e| e.bytes).sum::<u64>();
        // Scratch as if every block ran there: an upper bound that does not depend on the placement.
        let all: Vec<usize> = (0..model.blocks.len()).collect();
        let exchanges = bytes::exchange_entries(model.blocks.iter(), Device::Cuda(0), &sizes);
        let gpu_base = problem.facts.gpus.iter().map(|gpu| {
            let size = bytes::GpuSize { n_sms: gpu.n_sms, driver_bytes: gpu.driver_bytes };
            let scratch = bytes::scratch(model, Device::Cuda(0), gpu.n_sms, &all, &sizes);
            sum(bytes::gpu_entries(Device::Cuda(0), size, scratch, scratch, 0))
                + bytes::total(&exchanges, Device::Cuda(0), None)
        });
        let gpu_base = gpu_base.collect();
        let host_base = |n| {
            let meet = n as u64 * bytes::mailbox_entry(model, &all, Device::Cuda(0), &sizes).bytes;
            let counts = if n > 0 { bytes::total(&exchanges, Device::Cpu, None) } else { 0 };
            let snapshots = bytes::most_snapshot_bytes(model, n > 0, &sizes);
            sum(bytes::host_entries(model, 0, n, &sizes)) + meet + counts + snapshots
        };
        let host_base: Vec<u64> = (0..=problem.order.len()).map(host_base).collect();
        type Class = Vec<(TensorType, usize, usize)>; // type, rows and columns of every weight
        let mut classes: Vec<(Class, usize)> = Vec::new();
        let column_of = (0..model.blocks.len())
            .map(|i| {
                let mut class = Vec::new();
                model.blocks[i].for_each(&mut |w| class.push((w.ty, w.n_rows(), w.n_cols)));
                classes.iter().position(|(known, _)| *known == class).unwrap_or_else(|| {
                    classes.push((class, i));
                    classes.len() - 1
                })
            })
            .collect();
        let mut tables = Self {
            problem,
            sizes,
            column_of,
            cells: Vec::new(),
            gpu_base,
            host_scratch: bytes::scratch(model, Device::Cpu, 0, &all, &sizes),
            host_base,
            n_batches: n_batches as f64,
            batch_tokens,
        };
        let n_tables = problem.order.len().max(1);
        tables.cells = (0..n_tables).map(|g| classes.iter().map(|&(_, i)| tables.column(g, i)).collect()).collect();
        tables
    }

    /// Block `i` at `level` on the GPU at position `g`.
    fn cell(&self, g: usize, i: usize, level: Level) -> &Cell {
        &self.cells[g][self.column_of[i]][level]
    }

    /// All levels of block `index` on the GPU at position `g`.
    fn column(&self, g: usize, index: usize) -> Vec<Cell> {
        let Problem { model, facts, wishes, threads, order, .. } = self.problem;
        let block = &model.blocks[index];
        let past = (wishes.workload.prompt + wishes.workload.generate / 2).min(self.sizes.n_ctx);
        let prompt_past = wishes.workload.prompt.saturating_sub(self.batch_tokens) / 2;
        let cpu = Rates::Cpu { host: &facts.host, threads: *threads };
        let gpu = order.get(g).map(|&i| Rates::Gpu(&facts.gpus[i]));
        let levels = if gpu.is_some() { max_level(block) } else { 0 };
        let rates = |device| if device == Device::Cpu { cpu } else { gpu.expect("levels above 0 only with a GPU") };
        let prompt_seconds = |rates: &Rates, n: usize, home: bool| {
            rates.seconds(&time::work(block, n, home, self.batch_tokens, prompt_past, &self.sizes))
        };
        let whole_on_gpu = gpu.map_or(0.0, |gpu| prompt_seconds(&gpu, n_parts(block), true));
        (0..=levels)
            .map(|level| {
                let place = place(block, level, Device::Cuda(0));
                let token = Token::new(block, &place, rates, past, &self.sizes, self.problem.misses);
                let mut cell = Cell { token, streamed: f64::INFINITY, ..Cell::default() };
                let streamed = if self.sizes.stream { bytes::streamed_share(block, &place, &self.sizes) } else { None };
                cell.staging = streamed.as_ref().map(StagingBytes::of).unwrap_or_default();
                for (nth, share) in place.iter().enumerate() {
                    let entries = bytes::share_entries(model, index, &place, nth, &self.sizes);
                    let bytes: u64 = entries.iter().map(|e| e.bytes).sum();
                    let weights = entries.iter().filter(|e| e.pool == bytes::Pool::Weights).map(|e| e.bytes);
                    match share.device {
                        Device::Cpu => {
                            cell.cpu_bytes = bytes;
                            if streamed.is_some() {
                                (cell.streamed, cell.stream_bytes) = (whole_on_gpu, weights.sum::<u64>() as f64);
                            }
                        }
                        Device::Cuda(_) => cell.gpu_bytes = bytes,
                    }
                    cell.prompt = cell.prompt.max(prompt_seconds(&rates(share.device), share.part.len(), nth == 0));
                }
                cell
            })
            .collect()
    }

    /// Bytes of the buffers of a GPU that streams everything that is streamed at `levels`.
    fn staging(&self, levels: &[Level]) -> u64 {
        let of = |(i, &level): (usize, &Level)| self.cell(0, i, level).staging;
        levels.iter().enumerate().map(of).fold(StagingBytes::default(), StagingBytes::and).total()
    }

    /// Seconds of the whole workload that block `i` takes at `level`, on the first GPU.
    fn block_seconds(&self, i: usize, level: Level) -> f64 {
        let cell = self.cell(0, i, level);
        self.problem.wishes.workload.generate as f64 * cell.token.seconds(0.0) + self.n_batches * cell.prompt
    }

    /// The orders in which blocks move to the GPU; a move is (block, level reached).
    fn orders(&self) -> Vec<Vec<(usize, Level)>> {
        if self.problem.order.is_empty() {
            return vec![Vec::new()];
        }
        let blocks = &self.problem.model.blocks;
        let free = |i: &usize| self.problem.fixed[*i].is_none();
        let value = |i: usize, from: Level, to: Level| {
            let bytes = self.cell(0, i, to).gpu_bytes - self.cell(0, i, from).gpu_bytes;
            (self.block_seconds(i, from) - self.block_seconds(i, to)) / bytes.max(1) as f64
        };
        // Groups that move one after the other, with the seconds that a byte of them saves.
        let mut groups: Vec<(f64, Vec<(usize, Level)>)> = Vec::new();
        let mut rounds: Vec<usize> = Vec::new();
        let (mut head, mut embed) = (Vec::new(), Vec::new());
        for i in (0..blocks.len()).filter(free) {
            match &blocks[i] {
                Block::Ffn(_) => rounds.push(i),
                Block::Moe(_) => {
                    groups.push((value(i, 0, 1), vec![(i, 1)]));
                    rounds.push(i);
                }
                Block::Attention(_) | Block::DeltaNet(_) => groups.push((value(i, 0, 1), vec![(i, 1)])),
                Block::Head(_) => head.push((i, 1)),
                Block::Embed(_) => embed.push((i, 1)),
            }
        }
        let first_round = |i: usize| if matches!(blocks[i], Block::Moe(_)) { 2 } else { 1 };
        let last = rounds.iter().map(|&i| max_level(&blocks[i])).max().unwrap_or(0);
        let round_moves: Vec<(usize, Level)> = (1..=last)
            .flat_map(|k| rounds.iter().map(move |&i| (i, k)))
            .filter(|&(i, k)| k >= first_round(i) && k <= max_level(&blocks[i]))
            .collect();
        let round_value =
            rounds.iter().map(|&i| value(i, first_round(i) - 1, max_level(&blocks[i]))).fold(0.0, f64::max);
        let by_value = |groups: &[(f64, Vec<(usize, Level)>)]| -> Vec<(usize, Level)> {
            let mut sorted: Vec<_> = groups.iter().collect();
            sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
            sorted.into_iter().flat_map(|(_, moves)| moves.iter().copied()).collect()
        };
        let mixers = by_value(&groups);
        if let Some(&(i, _)) = head.first() {
            let mut moves = head.clone();
            if self.problem.tied {
                moves.append(&mut embed);
            }
            head = moves;
            groups.push((value(i, 0, 1), head.clone()));
        }
        groups.push((round_value, round_moves.clone()));
        let mut orders = vec![
            [by_value(&groups), embed.clone()].concat(),
            [mixers.clone(), head.clone(), round_moves.clone(), embed.clone()].concat(),
            [mixers.clone(), round_moves.clone(), head.clone(), embed.clone()].concat(),
            [round_moves, mixers, head, embed].concat(),
        ];
        orders.dedup();
        orders
    }

    /// Times the placements along one order of moves and keeps the fastest that fits.
    fn walk(&self, order: &[(usize, Level)], best: &mut Option<(f64, Outcome)>, nearest: &mut Option<Overflow>) {
        let problem = self.problem;
        let mut levels: Vec<Level> = problem.fixed.iter().map(|f| f.map_or(0, |(level, _)| level)).collect();
        if problem.tied && problem.fixed[0].is_none() && levels.last() == Some(&1) {
            levels[0] = 1; // the head's copy serves the embedding
        }
        let stride = (order.len() * problem.order.len()).div_ceil(MAX_STEPS).max(1);
        for n_moves in 0..=order.len() {
            if n_moves > 0 {
                let (block, level) = order[n_moves - 1];
                levels[block] = level;
            }
            let at_stop = n_moves % stride == 0 || n_moves == order.len();
            if !at_stop {
                continue;
            }
            match self.evaluate(&levels) {
                // Without the buffers the same placement is a candidate as well.
                Ok(outcome) if self.sizes.stream && !outcome.prompt_streams => {}
                Ok(outcome) => {
                    let generate = problem.wishes.workload.generate as f64;
                    let seconds = outcome.prompt_s + generate * outcome.decode_s;
                    if best.as_ref().is_none_or(|(least, _)| seconds < *least) {
                        *best = Some((seconds, outcome));
                    }
                }
                Err(overflow) => {
                    let gpus_full = overflow.gpus_full;
                    let distance = |o: &Overflow| (o.gpus_full, o.excess);
                    if nearest.as_ref().is_none_or(|n| distance(&overflow) < distance(n)) {
                        *nearest = Some(overflow);
                    }
                    if gpus_full {
                        return; // every further move adds bytes, but for buffers of streams that shrink a little
                    }
                }
            }
        }
    }

    /// Time of a placement, or the bytes that it lacks.
    fn evaluate(&self, levels: &[Level]) -> Result<Outcome, Overflow> {
        let problem = self.problem;
        let blocks = &problem.model.blocks;
        let gpus = self.assign(levels);
        let staging = self.staging(levels);
        let mut used = vec![0u64; problem.vram.len()];
        let mut host = 0;
        let head = levels.len() - 1;
        for (i, &level) in levels.iter().enumerate() {
            let cell = self.cell(0, i, level);
            let shared_with_head = problem.tied && i == 0 && (level > 0) == (levels[head] > 0);
            if !shared_with_head {
                host += cell.cpu_bytes;
            }
            if level > 0 {
                let base = if used[gpus[i]] == 0 { self.gpu_base[gpus[i]] + staging } else { 0 };
                let is_copy = shared_with_head && gpus[0] == gpus[head];
                used[gpus[i]] += base + if is_copy { 0 } else { cell.gpu_bytes };
            }
        }
        let n_used = used.iter().filter(|u| **u > 0).count();
        let cpu_used = levels.iter().zip(blocks).any(|(&level, b)| level < max_level(b));
        host += self.host_base[n_used] + if cpu_used { self.host_scratch } else { 0 };
        let gpu_excess: u64 = used.iter().zip(&problem.vram).map(|(u, v)| u.saturating_sub(*v)).sum();
        let excess = gpu_excess + host.saturating_sub(problem.ram);
        if excess > 0 {
            return Err(Overflow { gpus: used, gpus_full: gpu_excess > 0, host, excess });
        }
        let times = self.timed(levels, &gpus, n_used > 0);
        let prompt_streams = self.sizes.stream && self.n_batches > 0.0 && times.streamed < times.in_place;
        Ok(Outcome {
            levels: levels.to_vec(),
            gpus,
            sizes: self.sizes,
            decode_s: times.decode,
            prompt_s: self.n_batches * if prompt_streams { times.streamed } else { times.in_place },
            prompt_streams,
        })
    }

    /// The GPU that the user named for block `i`.
    fn named(&self, i: usize) -> Option<usize> {
        self.problem.fixed[i].and_then(|(_, gpu)| gpu)
    }

    /// Whether block 0 is an embedding that uses the head's copy wherever that lies.
    fn follows_head(&self, levels: &[Level]) -> bool {
        self.problem.tied && levels[0] > 0 && levels[levels.len() - 1] > 0 && self.named(0).is_none()
    }

    /// Blocks on a GPU that may be any: the ones that are cut into runs.
    fn free(&self, levels: &[Level]) -> Vec<usize> {
        let first = if self.follows_head(levels) { 1 } else { 0 };
        (first..levels.len()).filter(|&i| levels[i] > 0 && self.named(i).is_none()).collect()
    }

    /// The GPU of every block that has a level above 0. The free blocks are cut into one run per GPU, some of them
    /// empty, in the order of the GPUs: the cuts of least excess over the capacities, then of least time.
    fn assign(&self, levels: &[Level]) -> Vec<usize> {
        let (n, order) = (levels.len(), &self.problem.order);
        let mut gpus: Vec<usize> =
            (0..n).map(|i| self.named(i).or(order.first().copied()).unwrap_or_default()).collect();
        let free = self.free(levels);
        if order.len() < 2 || free.is_empty() {
            if self.follows_head(levels) {
                gpus[0] = gpus[n - 1];
            }
            return gpus;
        }
        let staging = self.staging(levels);
        // Bytes of named blocks, and of the free blocks before each of them.
        let mut used = vec![0u64; self.problem.vram.len()];
        for i in (0..n).filter(|&i| levels[i] > 0) {
            let Some(gpu) = self.named(i) else { continue };
            let is_copy =
                self.problem.tied && i == 0 && self.named(n - 1).or(Some(gpu)) == Some(gpu) && levels[n - 1] > 0;
            let base = if used[gpu] == 0 { self.gpu_base[gpu] + staging } else { 0 };
            used[gpu] += base + if is_copy { 0 } else { self.cell(0, i, levels[i]).gpu_bytes };
        }
        let mut bytes = vec![0u64];
        for &i in &free {
            bytes.push(bytes[bytes.len() - 1] + self.cell(0, i, levels[i]).gpu_bytes);
        }
        let n_free = free.len();
        let mut best: Option<((u64, f64), Vec<usize>)> = None;
        for last in 0..order.len() {
            if self.follows_head(levels) {
                gpus[0] = self.named(n - 1).unwrap_or(order[last]);
            }
            // By number of free blocks in the runs so far: excess and seconds, and where the latest run starts.
            let mut so_far: Vec<Option<(u64, f64)>> = vec![None; n_free + 1];
            so_far[0] = Some((0, 0.0));
            let mut starts: Vec<Vec<usize>> = Vec::new();
            for &gpu in &order[..=last] {
                let runs = self.runs(levels, &gpus, &free, gpu);
                let is_last = starts.len() == last;
                let mut next = vec![None; n_free + 1];
                let mut start_of = vec![0; n_free + 1];
                for end in if is_last { n_free..=n_free } else { 0..=n_free } {
                    for start in 0..=if starts.is_empty() { 0 } else { end } {
                        let Some((excess, seconds)) = so_far[start].filter(|_| !is_last || start < end) else {
                            continue;
                        };
                        let base = if start < end && used[gpu] == 0 { self.gpu_base[gpu] + staging } else { 0 };
                        let needed = used[gpu] + base + bytes[end] - bytes[start];
                        let cost = (
                            excess + needed.saturating_sub(self.problem.vram[gpu]),
                            seconds + if start < end { runs.seconds(self, start, end) } else { 0.0 },
                        );
                        if next[end].is_none_or(|least| cost < least) {
                            (next[end], start_of[end]) = (Some(cost), start);
                        }
                    }
                }
                so_far = next;
                starts.push(start_of);
            }
            let Some(cost) = so_far[n_free] else { continue };
            if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                let mut found = gpus.clone();
                let mut end = n_free;
                for (position, start_of) in starts.iter().enumerate().rev() {
                    let start = start_of[end];
                    free[start..end].iter().for_each(|&i| found[i] = order[position]);
                    end = start;
                }
                best = Some((cost, found));
            }
        }
        best.map_or(gpus, |(_, found)| found)
    }

    /// Prefix times of the blocks as if `gpu` had all of the free ones.
    fn runs(&self, levels: &[Level], gpus: &[usize], free: &[usize], gpu: usize) -> Runs {
        let n = levels.len();
        let mut is_free = vec![false; n];
        free.iter().for_each(|&i| is_free[i] = true);
        let home = |i: usize| (levels[i] > 0).then_some(if is_free[i] { gpu } else { gpus[i] });
        let mut runs = Runs { before: Vec::with_capacity(free.len() + 1), handover: Vec::with_capacity(free.len()) };
        let mut sum = Span::default();
        for i in 0..n {
            let from = if i > 0 { home(i - 1) } else { None };
            let span = self.span(i, levels[i], home(i), from, 0.0);
            if is_free[i] {
                let from_other = if i > 0 && is_free[i - 1] { Some(usize::MAX) } else { from };
                runs.handover.push(self.span(i, levels[i], home(i), from_other, 0.0).plus(-1.0, span));
                runs.before.push(if runs.before.is_empty() { Span::default() } else { sum });
            }
            sum = sum.plus(1.0, span);
        }
        runs.before.push(sum);
        runs
    }

    /// Where a GPU comes in the order in which they are filled; 0 for the CPU.
    fn position(&self, gpu: Option<usize>) -> usize {
        let position = |gpu| self.problem.order.iter().position(|&o| o == gpu).expect("GPUs come from the order");
        gpu.map_or(0, position)
    }

    /// Times of block `i` at home on a GPU or (`None`) the CPU, after a block at home at `from`, where the CPU had
    /// `waited` seconds to read ahead in.
    fn span(&self, i: usize, level: Level, home: Option<usize>, from: Option<usize>, waited: f64) -> Span {
        let (problem, facts) = (self.problem, self.problem.facts);
        let cell = self.cell(self.position(home), i, level);
        let mut span = Span { decode: cell.token.seconds(waited), in_place: cell.prompt, ..Span::default() };
        let is_split = level > 0 && level < max_level(&problem.model.blocks[i]);
        let crossing = i > 0 && home != from;
        if let Some(gpu) = home.or(from).map(|g| &facts.gpus[g]).filter(|_| is_split || crossing) {
            let bytes_of_x = (4 * self.batch_tokens * problem.model.n_embd) as f64;
            let copy_of_x = bytes_of_x / gpu.pinned_gb_per_s / 1e9;
            let hops = if is_split { 2.0 } else { 0.0 } + if crossing { 1.0 } else { 0.0 };
            span.decode += hops / 2.0 * gpu.handoff_us * 1e-6;
            span.in_place += hops * copy_of_x;
            span.apart += if crossing { copy_of_x } else { 0.0 };
        }
        match home.filter(|_| cell.streamed.is_finite()) {
            Some(gpu) => {
                span.compute = cell.streamed;
                span.copy = cell.stream_bytes / facts.gpus[gpu].pinned_gb_per_s / 1e9;
            }
            None if home.is_some() => span.compute = cell.prompt,
            None => span.apart += cell.prompt,
        }
        span
    }

    /// Times of a placement.
    fn timed(&self, levels: &[Level], gpus: &[usize], any_gpu: bool) -> Times {
        let (problem, facts) = (self.problem, self.problem.facts);
        // Streaming overlaps within the run of a GPU: its buffers hold no more than the next weights.
        let (mut all, mut run, mut streamed) = (Span::default(), Span::default(), 0.0);
        let free = self.free(levels);
        let mut at = None;
        let mut from = None;
        let mut waiting = Waiting::default();
        for (i, &level) in levels.iter().enumerate() {
            let home = (level > 0).then_some(gpus[i]);
            if free.binary_search(&i).is_ok() && at != home {
                if at.is_some() {
                    streamed += run.streamed();
                    run = Span::default();
                }
                at = home;
            }
            let waited = waiting.pass(&problem.model.blocks[i], &self.cell(self.position(home), i, level).token);
            let span = self.span(i, level, home, from, waited);
            (all, run) = (all.plus(1.0, span), run.plus(1.0, span));
            from = home;
        }
        streamed += run.streamed();
        let gpu = if any_gpu { Some(&facts.gpus[problem.order[0]]) } else { None };
        let n_vocab = if levels[levels.len() - 1] == 0 { problem.model.n_vocab } else { 0 };
        let decode = all.decode + time::fixed_seconds(gpu, n_vocab);
        let can_stream = all.copy > 0.0 && self.batch_tokens >= bytes::PROMPT_FROM;
        let streamed = if can_stream { streamed } else { f64::INFINITY };
        Times { decode, in_place: all.in_place, streamed }
    }
}

/// Times of every run of free blocks on one GPU, with the other blocks up to the next run.
struct Runs {
    /// Of all blocks before each free one (before the first, nothing: its run begins with block 0), and of all.
    before: Vec<Span>,
    /// What each free block takes more when the free block before it is on another GPU.
    handover: Vec<Span>,
}

impl Runs {
    /// Seconds of the workload in the run of free blocks `start..end`.
    fn seconds(&self, tables: &Tables, start: usize, end: usize) -> f64 {
        let mut span = self.before[end].plus(-1.0, self.before[start]);
        if start > 0 {
            span = span.plus(1.0, self.handover[start]);
        }
        let prompt = if tables.sizes.stream { span.streamed() } else { span.in_place };
        tables.problem.wishes.workload.generate as f64 * span.decode + tables.n_batches * prompt
    }
}

/// Predicted seconds of one token after `workload.prompt` others, and of that prompt, of a plan that was made for
/// another workload, and where `misses` are known (of a token's experts, see [`Token::new`]); `None` where `facts` lack
/// a GPU of it.
pub(super) fn retimed(
    plan: &Plan,
    model: &Model,
    facts: &Machine,
    workload: Workload,
    misses: Option<&[f64]>,
) -> Option<(f64, f64)> {
    let wishes = Wishes { threads: Some(plan.threads), workload, ..Wishes::default() };
    let problem = Problem { misses, ..Problem::new(model, facts, &wishes).ok()? };
    let (mut levels, mut gpus) = (Vec::new(), Vec::new());
    for (block, place) in model.blocks.iter().zip(&plan.places) {
        let Device::Cuda(gpu) = place[0].device else {
            levels.push(0);
            gpus.push(0);
            continue;
        };
        if !problem.order.contains(&gpu) {
            return None;
        }
        levels.push(match block {
            Block::Ffn(b) => place[0].part.len().div_ceil(row_unit(b)),
            Block::Moe(_) => 1 + place[0].part.len(),
            _ => 1,
        });
        gpus.push(gpu);
    }
    let any_gpu = levels.iter().any(|level| *level > 0);
    let tables = Tables::new(&problem, plan.sizes());
    let times = tables.timed(&levels, &gpus, any_gpu);
    let streams = plan.stream_from.is_some_and(|from| tables.batch_tokens >= from.max(bytes::PROMPT_FROM));
    let prompt = if streams { times.streamed } else { times.in_place };
    Some((times.decode, tables.n_batches * prompt))
}

/// The smallest prompt batch for which streaming the host's weights is faster than computing in place. `outcome`
/// streams the prompt of its workload, so there is one.
pub(super) fn break_even(problem: &Problem, outcome: &Outcome) -> usize {
    let pays = |n_tokens: usize| {
        let workload = Workload { prompt: n_tokens, ..problem.wishes.workload };
        let wishes = Wishes { workload, ..problem.wishes.clone() };
        let times = Tables::new(&Problem { wishes: &wishes, ..problem.clone() }, outcome.sizes).timed(
            &outcome.levels,
            &outcome.gpus,
            true,
        );
        times.streamed < times.in_place
    };
    let prompt = problem.wishes.workload.prompt;
    // The tensor cores, which streamed weights are for, take no smaller batches.
    let least = bytes::PROMPT_FROM;
    let (mut no, mut yes) = (least - 1, prompt.div_ceil(prompt.div_ceil(outcome.sizes.n_batch)).max(least));
    while yes - no > 1 {
        let middle = no.midpoint(yes);
        if pays(middle) { yes = middle } else { no = middle }
    }
    yes
}

/// Changes of the wishes that make the model fit, nearest first, each with its predicted rates.
pub(super) fn options(model: &Model, facts: &Machine, wishes: &Wishes) -> Vec<Alternative> {
    let solve = |wishes: &Wishes| Problem::new(model, facts, wishes).and_then(|p| p.solve()).ok();
    let mut found: Vec<Alternative> = Vec::new();
    let offer = |found: &mut Vec<Alternative>, change: String, wishes: &Wishes| {
        let Some(outcome) = solve(wishes) else { return false };
        found.push(Alternative {
            change,
            prompt_tok_s: wishes.workload.prompt as f64 / outcome.prompt_s,
            generate_tok_s: 1.0 / outcome.decode_s,
        });
        true
    };
    if let Some(n) = wishes.gpu_layers {
        // Fewer layers take less of the GPU; the largest number that fits.
        let with = |n: usize| Wishes { gpu_layers: Some(n), ..wishes.clone() };
        if let Some(fits) = (0..n.min(model.n_layers + 1)).rev().find(|&n| solve(&with(n)).is_some()) {
            offer(&mut found, format!("--gpu-layers {fits}"), &with(fits));
        }
        offer(&mut found, "without --gpu-layers".into(), &Wishes { gpu_layers: None, ..wishes.clone() });
    }
    if !wishes.place.is_empty() {
        offer(&mut found, "without --place".into(), &Wishes { place: Vec::new(), ..wishes.clone() });
    }
    if !wishes.vram.is_empty() {
        offer(&mut found, "without --vram".into(), &Wishes { vram: Vec::new(), ..wishes.clone() });
    }
    if wishes.ram.is_some() {
        offer(&mut found, "without --ram".into(), &Wishes { ram: None, ..wishes.clone() });
    }
    let defaults = match Problem::new(model, facts, wishes) {
        Ok(problem) => problem.sizes(),
        Err(_) => return found,
    };
    // Smaller context, KV and batch, alone and together.
    let bf16 = Wishes { kv_dtype: Some(KvDtype::Bf16), ..wishes.clone() };
    let is_f32 = defaults.kv_dtype == KvDtype::F32;
    if is_f32 {
        offer(&mut found, "--kv-dtype bf16".into(), &bf16);
    }
    let smaller = |wishes: &Wishes, n_ctx: usize| Wishes { n_ctx: Some(n_ctx), ..wishes.clone() };
    let halves = || std::iter::successors(Some(defaults.n_ctx / 2), |n| Some(n / 2)).take_while(|n| *n >= 256);
    if let Some(n) = halves().find(|&n| solve(&smaller(wishes, n)).is_some()) {
        offer(&mut found, format!("--ctx {n}"), &smaller(wishes, n));
    } else if let Some(n) = halves().find(|&n| is_f32 && solve(&smaller(&bf16, n)).is_some()) {
        offer(&mut found, format!("--kv-dtype bf16 --ctx {n}"), &smaller(&bf16, n));
    }
    if wishes.n_batch.is_none_or(|n| n > 64) {
        let least = Wishes { n_batch: Some(64), ..wishes.clone() };
        if !offer(&mut found, "--batch 64".into(), &least) && found.is_empty() {
            let tight = Wishes { n_batch: Some(64), ..smaller(&bf16, 256.min(defaults.n_ctx)) };
            offer(&mut found, format!("--kv-dtype bf16 --ctx {} --batch 64", 256.min(defaults.n_ctx)), &tight);
        }
    }
    found
}

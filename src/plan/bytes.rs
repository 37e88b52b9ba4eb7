//! The account: every byte that a plan takes, by device and pool. Sizes of packed weights, states, scratch and staging
//! are the backends' to say, about the same shares of blocks that they load; this is the one place that asks.

use super::{Device, Limit, Place, Runs};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use tandem_cpu::{Isa, StateSize};
use tandem_spec::{Attention, Block, KvDtype, Model, StateBytes, Weight};

/// Kept free on a GPU: other programs on the desktop come and go.
const CUDA_RESERVE: u64 = 256 << 20;
/// Tokens of a batch from which on a GPU multiplies on its tensor cores.
pub(super) const PROMPT_FROM: usize = tandem_cuda::PROMPT_FROM;
/// A page table takes 8 bytes of the GPU's for 4 KiB of pinned memory.
const PINNED_PER_TABLE_BYTE: u64 = 512;
/// Kept free in main memory: the system, the tokenizer, this process.
const HOST_RESERVE: u64 = 512 << 20;
/// Copies of states that a session keeps take at most this, and at most a part of main memory.
const SNAPSHOTS_MAX: u64 = 512 << 20;
const SNAPSHOTS_PART: u64 = 64;

/// What bytes are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pool {
    /// Weights in the device's layout.
    Weights,
    /// Keys and values.
    Kv,
    /// Delta-net states, recurrent and convolution.
    States,
    /// Copies of delta-net states, from which a session continues.
    Snapshots,
    /// Activations and scratch of the largest batch.
    Scratch,
    /// Logits of the wanted rows.
    Logits,
    /// Buffers for weights on their way to a GPU.
    Staging,
    /// Pinned host memory: upload ring and hand-off buffers.
    Pinned,
    /// What the driver takes beside the context: modules, graphs, cuBLASLt.
    Driver,
    /// Kept free.
    Reserve,
}

impl Pool {
    /// All of them, in the order of tables.
    pub const ALL: [Pool; 10] = [
        Pool::Weights,
        Pool::Kv,
        Pool::States,
        Pool::Snapshots,
        Pool::Scratch,
        Pool::Logits,
        Pool::Staging,
        Pool::Pinned,
        Pool::Driver,
        Pool::Reserve,
    ];

    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Pool::Weights => "weights",
            Pool::Kv => "kv",
            Pool::States => "states",
            Pool::Snapshots => "snapshots",
            Pool::Scratch => "scratch",
            Pool::Logits => "logits",
            Pool::Staging => "staging",
            Pool::Pinned => "pinned",
            Pool::Driver => "driver",
            Pool::Reserve => "reserve",
        }
    }

    /// Whether tandem allocates it, so that planned and allocated bytes must be equal.
    pub fn is_ours(self) -> bool {
        !matches!(self, Pool::Driver | Pool::Reserve)
    }
}

/// One row of the account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Whose memory.
    pub device: Device,
    /// What for.
    pub pool: Pool,
    /// Name of the tensor, or of the block, or what it is.
    pub name: String,
    /// Index of the block that it belongs to, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<usize>,
    /// Bytes, alignment included.
    pub bytes: u64,
}

/// The sizes that decide everything beside the weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sizes {
    pub n_ctx: usize,
    pub n_slots: usize,
    pub n_batch: usize,
    pub kv_dtype: KvDtype,
    /// Rows of logits that are wanted at a time.
    pub n_logits: usize,
    /// Copies of states that a session keeps.
    pub n_snapshots: usize,
    /// CPU kernels and workers.
    pub isa: Isa,
    pub threads: usize,
    /// Whether host weights are streamed to the GPU for prompts.
    pub stream: bool,
    /// Whether the CPU keeps the experts that a GPU has too, so that these can change.
    pub expert_cache: bool,
}

/// What the account needs to know of a GPU.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GpuSize {
    pub n_sms: usize,
    pub driver_bytes: u64,
}

impl GpuSize {
    /// By GPU index.
    pub fn of(limits: &[Limit]) -> Vec<Self> {
        let mut sizes = vec![Self::default(); limits.len()];
        for limit in limits {
            if let Device::Cuda(i) = limit.device
                && let Some(size) = sizes.get_mut(i)
            {
                *size = Self { n_sms: limit.n_sms, driver_bytes: limit.driver_bytes };
            }
        }
        sizes
    }
}

/// Whether the experts of `block` on its GPU can change: some are there, others are not, and no number belongs to each.
pub(super) fn has_changing_experts(block: &Block<Weight>, place: &Place, isa: Isa) -> bool {
    let Block::Moe(b) = block else { return false };
    let has_scale = b.stacks().iter().any(|l| l.scale.is_some());
    let is_shared = place.len() > 1 && !place[0].part.is_empty();
    is_shared && !has_scale && tandem_cuda::can_stream(block, tandem_cpu::panel_rows(isa))
}

/// The part of `block` whose weights its share number `nth` holds.
fn held(block: &Block<Weight>, place: &Place, nth: usize, sizes: &Sizes) -> std::ops::Range<usize> {
    match sizes.expert_cache && nth > 0 && has_changing_experts(block, place, sizes.isa) {
        true => 0..super::n_parts(block),
        false => place[nth].part.clone(),
    }
}

/// The model as `device` sees it: blocks replaced by its shares of them, and the indices of those that it has.
pub(super) fn shares(model: &Model, places: &[Place], device: Device, sizes: &Sizes) -> (Model, Vec<usize>) {
    let mut model = model.clone();
    let mut indices = Vec::new();
    for (i, place) in places.iter().enumerate() {
        if let Some(nth) = place.iter().position(|s| s.device == device) {
            let block = &model.blocks[i];
            model.blocks[i] = block.share(held(block, place, nth, sizes), nth == 0);
            indices.push(i);
        }
    }
    (model, indices)
}

/// What the CPU has of a block at `place`, if the block's GPU can stream it.
pub(super) fn streamed_share(block: &Block<Weight>, place: &Place, sizes: &Sizes) -> Option<Block<Weight>> {
    let [home, other] = &place[..] else { return None };
    let share = block.share(held(block, place, 1, sizes), false);
    let is_streamed = home.device != Device::Cpu && other.device == Device::Cpu;
    (is_streamed && tandem_cuda::can_stream(&share, tandem_cpu::panel_rows(sizes.isa))).then_some(share)
}

/// The shares that `gpu` streams for large batches, with the indices of their blocks.
pub(super) fn streamed(model: &Model, places: &[Place], gpu: Device, sizes: &Sizes) -> Vec<(usize, Block<Weight>)> {
    let all = model.blocks.iter().zip(places).enumerate().filter(|_| sizes.stream);
    let here = all.filter(|(_, (_, place))| place[0].device == gpu);
    here.filter_map(|(i, (block, place))| Some((i, streamed_share(block, place, sizes)?))).collect()
}

/// Bytes of a GPU's buffers for streamed shares.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct StagingBytes {
    /// Grow with the largest unit of a share.
    pub slots: u64,
    /// The same for any number of shares.
    pub chunks: u64,
    /// Add up over shares.
    pub rest: u64,
}

impl StagingBytes {
    /// Of the layout of one share.
    pub fn of(share: &Block<Weight>) -> Self {
        let layout = tandem_cuda::StreamLayout::new(std::slice::from_ref(share));
        let (slots, chunks) = layout.shared_bytes();
        Self { slots: slots as u64, chunks: chunks as u64, rest: (layout.bytes() - slots - chunks) as u64 }
    }

    /// Of the layout of the shares of both.
    pub fn and(self, other: Self) -> Self {
        let (slots, chunks) = (self.slots.max(other.slots), self.chunks.max(other.chunks));
        Self { slots, chunks, rest: self.rest + other.rest }
    }

    pub fn total(self) -> u64 {
        self.slots + self.chunks + self.rest
    }
}

/// Bytes of a backend's state for `blocks` of `model`, and, of a GPU, for the shares `streamed` of some of them.
/// Saturates where a number overflows.
fn state_bytes(
    model: &Model,
    device: Device,
    n_sms: usize,
    blocks: &[usize],
    streamed: &[Block<Weight>],
    sizes: &Sizes,
) -> StateBytes {
    let &Sizes { n_ctx, n_slots, n_batch, kv_dtype, threads, .. } = sizes;
    match device {
        Device::Cpu => {
            let size = StateSize { n_slots, n_ctx, n_batch, kv_dtype };
            let planned = tandem_cpu::Backend::planned_state_bytes(model, blocks, size, threads);
            planned.unwrap_or(StateBytes { scratch: u64::MAX / 4, ..StateBytes::default() })
        }
        Device::Cuda(_) => {
            let options = tandem_cuda::Options { n_slots, n_ctx, n_batch, kv: kv_dtype };
            let blocks: Vec<Block<Weight>> = blocks.iter().map(|&i| model.blocks[i].clone()).collect();
            tandem_cuda::StateLayout::streaming(&blocks, streamed, &options, n_sms).by_use()
        }
    }
}

/// Scratch of the largest batch on a device that runs `blocks`.
pub(super) fn scratch(model: &Model, device: Device, n_sms: usize, blocks: &[usize], sizes: &Sizes) -> u64 {
    state_bytes(model, device, n_sms, blocks, &[], sizes).scratch
}

/// Copies of states that a session keeps, where main memory has `ram` bytes.
pub(super) fn n_snapshots(model: &Model, ram: u64, sizes: &Sizes) -> usize {
    let one = snapshot_bytes(model, Device::Cpu, sizes);
    (SNAPSHOTS_MAX.min(ram / SNAPSHOTS_PART)).checked_div(one).unwrap_or(0) as usize
}

/// Bytes of a copy of the delta-net states of one slot of the blocks of `model` on `device`.
fn snapshot_bytes(model: &Model, device: Device, sizes: &Sizes) -> u64 {
    let one = Sizes { n_slots: 1, n_ctx: 1, n_batch: 1, ..*sizes };
    let blocks: Vec<usize> =
        (0..model.blocks.len()).filter(|&i| matches!(model.blocks[i], Block::DeltaNet(_))).collect();
    state_bytes(model, device, 1, &blocks, &[], &one).states
}

/// Bytes of all copies of states wherever the blocks lie: an upper bound.
pub(super) fn most_snapshot_bytes(model: &Model, has_gpu: bool, sizes: &Sizes) -> u64 {
    let on = |device| snapshot_bytes(model, device, sizes);
    sizes.n_snapshots as u64 * if has_gpu { on(Device::Cpu).max(on(Device::Cuda(0))) } else { on(Device::Cpu) }
}

/// Whether the embedding and the head are one file tensor.
pub(super) fn is_tied(model: &Model) -> bool {
    let tensor = |block: &Block<Weight>| match block {
        Block::Embed(b) => Some(b.token_embd.tensor),
        Block::Head(b) => Some(b.output.weight.tensor),
        _ => None,
    };
    let (first, last) = (model.blocks.first().and_then(tensor), model.blocks.last().and_then(tensor));
    model.blocks.len() > 1 && first.is_some() && first == last
}

/// Entries of share number `nth` of block `index` at `place`: weights, keys and values, states, and on a GPU logits.
pub(super) fn share_entries(model: &Model, index: usize, place: &Place, nth: usize, sizes: &Sizes) -> Vec<Entry> {
    let device = place[nth].device;
    let entry = |pool, name: &str, bytes| Entry { device, pool, name: name.into(), block: Some(index), bytes };
    let block = &model.blocks[index];
    let mut entries = Vec::new();
    let part = block.share(held(block, place, nth, sizes), nth == 0);
    match device {
        Device::Cpu => tandem_cpu::for_each_weight(&part, sizes.isa, &mut |w, bytes| {
            entries.push(entry(Pool::Weights, &w.name, bytes));
        }),
        Device::Cuda(_) => tandem_cuda::for_each_weight(&part, &mut |name, bytes| {
            entries.push(entry(Pool::Weights, name, bytes));
        }),
    }
    if matches!(block, Block::Attention(_) | Block::DeltaNet(_) | Block::Head(_)) {
        // The scratch of a block on its own is not counted here, so neither are the multiprocessors that it depends on.
        let StateBytes { kv, states, logits, .. } = state_bytes(model, device, 1, &[index], &[], sizes);
        let own = [(Pool::Kv, kv), (Pool::States, states), (Pool::Logits, logits)];
        entries.extend(own.into_iter().map(|(pool, bytes)| entry(pool, &block.name(), bytes)));
    }
    if device != Device::Cpu && place.len() > 1 {
        // The GPU's copies of the CPU's share come from pinned memory.
        let changes = sizes.expert_cache && has_changing_experts(block, place, sizes.isa);
        if changes || sizes.stream && streamed_share(block, place, sizes).is_some() {
            let (mut pinned, share) = (0, block.share(held(block, place, 1, sizes), false));
            tandem_cpu::for_each_weight(&share, sizes.isa, &mut |_, bytes| pinned += bytes);
            entries.push(entry(Pool::Driver, "page tables of pinned weights", pinned / PINNED_PER_TABLE_BYTE));
        }
    }
    entries.retain(|e| e.bytes > 0);
    entries
}

/// Entries of the host beside its blocks: `scratch` is 0 where it runs none, `n_gpus` the number of GPUs in use.
pub(super) fn host_entries(model: &Model, scratch: u64, n_gpus: usize, sizes: &Sizes) -> Vec<Entry> {
    let floats = |n: usize| 4 * n as u64;
    let residual = floats(sizes.n_batch * model.n_embd);
    let mut rows = vec![
        (Pool::Scratch, "activations of the largest batch", scratch),
        (Pool::Scratch, "residual stream between devices", residual),
        (Pool::Logits, "logits", floats(sizes.n_logits * model.n_vocab)),
        (Pool::Reserve, "kept free", HOST_RESERVE),
    ];
    if n_gpus > 0 {
        rows.push((Pool::Pinned, "upload ring", tandem_cuda::upload::STAGING_BYTES as u64));
        rows.push((Pool::Pinned, "tokens", n_gpus as u64 * tandem_cuda::backend::pinned_bytes(sizes.n_slots) as u64));
    }
    entries(Device::Cpu, rows)
}

/// Pinned memory in which the CPU workers meet a GPU that has `blocks` of `model`.
pub(super) fn mailbox_entry(model: &Model, blocks: &[usize], gpu: Device, sizes: &Sizes) -> Entry {
    let blocks: Vec<_> = blocks.iter().map(|&i| model.blocks[i].clone()).collect();
    let bytes = tandem_cuda::handoff::mailbox_bytes(&blocks, model.n_embd, sizes.n_batch) as u64;
    let name = format!("hand-offs between {gpu} and the CPU");
    Entry { device: Device::Cpu, pool: Pool::Pinned, name, block: None, bytes }
}

/// What it takes so that the experts of the mixtures `blocks`, which a GPU shares with the CPU, can change: what they
/// pass through on their way, and in main memory the counts of their uses.
pub(super) fn exchange_entries<'b>(
    blocks: impl Iterator<Item = &'b Block<Weight>>,
    gpu: Device,
    sizes: &Sizes,
) -> Vec<Entry> {
    let (mut staging, mut counts) = (0, 0);
    for block in blocks.filter(|_| sizes.expert_cache) {
        let Block::Moe(b) = block else { continue };
        staging = staging.max(tandem_cuda::experts::staging_bytes(b, |w| w.ty) as u64);
        counts += tandem_cuda::experts::count_bytes(b) as u64;
    }
    let mut all = entries(Device::Cpu, vec![(Pool::Pinned, "uses of experts", counts)]);
    all.extend(entries(gpu, vec![(Pool::Staging, "experts on their way", staging)]));
    all
}

/// Entries of a GPU beside its blocks. `state` is everything that its states take, allocated after loading, `staging`
/// what streamed shares take.
pub(super) fn gpu_entries(device: Device, gpu: GpuSize, scratch: u64, state: u64, staging: u64) -> Vec<Entry> {
    let upload = (tandem_cuda::upload::STAGING_BYTES as u64).saturating_sub(state);
    entries(
        device,
        vec![
            (Pool::Scratch, "activations of the largest batch", scratch),
            (Pool::Staging, "streamed weights on their way", staging),
            (Pool::Staging, "upload buffers, beyond what states take later", upload),
            (Pool::Driver, "modules, graphs, cuBLASLt", gpu.driver_bytes),
            (Pool::Reserve, "kept free", CUDA_RESERVE),
        ],
    )
}

fn entries(device: Device, rows: Vec<(Pool, &str, u64)>) -> Vec<Entry> {
    let entry = |(pool, name, bytes): (Pool, &str, u64)| Entry { device, pool, name: name.into(), block: None, bytes };
    rows.into_iter().filter(|row| row.2 > 0).map(entry).collect()
}

/// The account of a placement; `gpus` by GPU index.
pub(super) fn account(model: &Model, places: &[Place], sizes: &Sizes, gpus: &[GpuSize]) -> Vec<Entry> {
    let mut used: Vec<Device> = places.iter().flatten().map(|s| s.device).filter(|d| *d != Device::Cpu).collect();
    used.sort();
    used.dedup();
    let with_tasks = Runs::new(places).gpus.into_iter().filter(|(_, tasks)| !tasks.is_empty());
    let meets: Vec<Device> = with_tasks.map(|(device, _)| device).collect();
    let mut entries = Vec::new();
    for device in std::iter::once(Device::Cpu).chain(used.iter().copied()) {
        let (shares, blocks) = shares(model, places, device, sizes);
        let gpu =
            if let Device::Cuda(i) = device { gpus.get(i).copied().unwrap_or_default() } else { GpuSize::default() };
        let streamed: Vec<_> = streamed(model, places, device, sizes).into_iter().map(|(_, share)| share).collect();
        let state = if blocks.is_empty() {
            StateBytes::default()
        } else {
            state_bytes(&shares, device, gpu.n_sms, &blocks, &streamed, sizes)
        };
        if meets.contains(&device) {
            entries.push(mailbox_entry(model, &blocks, device, sizes));
        }
        if device != Device::Cpu {
            let change = |(b, place): &(&Block<Weight>, &Place)| {
                place[0].device == device && has_changing_experts(b, place, sizes.isa)
            };
            let blocks = model.blocks.iter().zip(places).filter(change).map(|(b, _)| b);
            entries.extend(exchange_entries(blocks, device, sizes));
        }
        entries.extend(match device {
            Device::Cpu => host_entries(model, state.scratch, used.len(), sizes),
            Device::Cuda(_) => {
                let staging = tandem_cuda::StreamLayout::new(&streamed).bytes() as u64;
                gpu_entries(device, gpu, state.scratch, state.total(), staging)
            }
        });
    }
    let tied = is_tied(model);
    // Rotary divisors are one tensor of all layers, which a GPU holds once.
    let mut first_use: HashMap<Device, usize> = HashMap::new();
    for (i, place) in places.iter().enumerate() {
        for (nth, share) in place.iter().enumerate() {
            let mut rows = share_entries(model, i, place, nth, sizes);
            if tied && i == 0 && share.device == places[places.len() - 1][0].device {
                rows.iter_mut().for_each(|e| e.bytes = 0); // the head's copy serves the embedding
            }
            if let (Block::Attention(Attention { rope_freqs: Some(divisors), .. }), Device::Cuda(_)) =
                (&model.blocks[i], share.device)
                && *first_use.entry(share.device).or_insert(i) != i
            {
                rows.retain(|e| e.name != divisors.name);
            }
            entries.extend(rows);
        }
    }
    // Copies of states lie in main memory, those of blocks on a GPU too.
    for device in std::iter::once(Device::Cpu).chain(used) {
        let (mut shares, blocks) = shares(model, places, device, sizes);
        shares.blocks = blocks.iter().map(|&i| shares.blocks[i].clone()).collect();
        let bytes = sizes.n_snapshots as u64 * snapshot_bytes(&shares, device, sizes);
        if bytes > 0 {
            let name = format!("{} copies of the states on {device}", sizes.n_snapshots);
            entries.push(Entry { device: Device::Cpu, pool: Pool::Snapshots, name, block: None, bytes });
        }
    }
    entries
}

/// Sum of the entries of `device`, in `pool` or in all of them.
pub fn total(entries: &[Entry], device: Device, pool: Option<Pool>) -> u64 {
    entries.iter().filter(|e| e.device == device && pool.is_none_or(|p| e.pool == p)).map(|e| e.bytes).sum()
}

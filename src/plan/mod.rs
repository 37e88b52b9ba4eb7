//! The plan: which block (or which share of it) runs where, and every byte that takes. A pure function of
//! (model description, machine facts, wishes): no I/O, no clock, no device call.

mod bytes;
mod choose;
mod predict;
mod runs;
mod show;
mod time;

pub use bytes::{Entry, Pool, total};
pub use predict::{DeviceTime, Group, Prediction};
pub use runs::{Run, Runs};
pub use show::{html, summary, text, why};
pub use time::{token_bytes, token_roof_seconds};

use crate::machine::Machine;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;
use tandem_cpu::Isa;
use tandem_spec::{Block, Ffn, KvDtype, Model, Weight};

/// Most CPU worker threads of a plan.
pub const THREADS_MAX: usize = 1024;

/// A place where a block can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The CPU workers.
    Cpu,
    /// CUDA device by its index.
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(i) => write!(f, "cuda{i}"),
        }
    }
}

/// FFN rows are shared between devices in units of this many: a super-block of the K-quants in `ffn_down`; where that
/// would be a quarter of the block or more, as few as kernels and quantisation blocks allow.
pub fn row_unit(block: &Ffn<Weight>) -> usize {
    if block.shape.n_ff > 1024 { 256 } else { block.ffn_down.weight.ty.row().block_len.max(32) }
}

/// The part of a block that one device computes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Who computes it and holds its weights, KV rows and states.
    pub device: Device,
    /// Rows of `n_ff` of an FFN, routed experts of a mixture, `0..1` of any other block (see [`n_parts`]).
    pub part: Range<usize>,
}

/// Where one block runs. The first share's device is the block's home: it holds the norm, the router and the
/// shared expert, and the residual stream while the block runs. Its own part may be empty (a mixture whose
/// routed experts are all elsewhere). The parts are disjoint, ascend, and cover `0..n_parts(block)`, each
/// device occurs once.
pub type Place = Vec<Share>;

/// In how many parts a block can be shared: rows of an FFN, routed experts of a mixture, else 1.
pub fn n_parts<W>(block: &Block<W>) -> usize {
    match block {
        Block::Ffn(b) => b.shape.n_ff,
        Block::Moe(b) => b.shape.n_experts,
        _ => 1,
    }
}

/// What the engine does: it loads exactly this and its step walks exactly this.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Architecture, name and main type of the model.
    pub model: String,
    /// Name of the machine that the plan is for.
    pub machine: String,
    /// The run that it was made for.
    pub workload: Workload,
    /// Positions per slot.
    pub n_ctx: usize,
    /// Sequences that have a state at the same time.
    pub n_slots: usize,
    /// Tokens of the largest batch.
    pub n_batch: usize,
    /// How keys and values are stored.
    pub kv_dtype: KvDtype,
    /// Rows of logits that are wanted at a time.
    pub n_logits: usize,
    /// Copies of delta-net states that a session keeps.
    pub n_snapshots: usize,
    /// Instruction set of the CPU kernels, which decides how weights are packed.
    #[serde(with = "crate::machine::isa_name")]
    pub isa: Isa,
    /// CPU worker threads.
    pub threads: usize,
    /// Where each block of the model runs, by block index.
    pub places: Vec<Place>,
    /// Batches of at least so many tokens stream the host's feed-forward weights to the GPU; `None`: never,
    /// and there are no buffers for it.
    pub stream_from: Option<usize>,
    /// Whether main memory holds the routed experts that a GPU has too, so that those on the GPU follow the routing;
    /// else each has one place.
    #[serde(default)]
    pub expert_cache: bool,
    /// Every byte, by device, pool and tensor.
    pub account: Vec<Entry>,
    /// What each device could give.
    pub limits: Vec<Limit>,
    /// Predicted times.
    pub prediction: Prediction,
}

/// Memory of a device that the plan may use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// The device.
    pub device: Device,
    /// Its model name.
    pub name: String,
    /// Bytes: what is free, or what the user allowed.
    pub bytes: u64,
    /// Multiprocessors of a GPU: scratch depends on them.
    pub n_sms: usize,
    /// Bytes that a GPU's driver takes beside the context.
    pub driver_bytes: u64,
}

/// The fastest plan for `wishes.workload` on the machine of `facts`.
///
/// # Errors
/// A model that does not fit, with the bytes needed and available and what would fit; a wish that cannot be met.
pub fn plan(model: &Model, facts: &Machine, wishes: &Wishes) -> Result<Plan, Refusal> {
    let problem = choose::Problem::new(model, facts, wishes)?;
    match problem.solve() {
        Ok(outcome) => Ok(predict::finish(&problem, &outcome)),
        Err(mut refusal) => {
            refusal.options = choose::options(model, facts, wishes);
            Err(refusal)
        }
    }
}

impl Plan {
    /// The device that runs all of block `block`, or `None` if the block is shared.
    pub fn device(&self, block: usize) -> Option<Device> {
        match &self.places[block][..] {
            [share] => Some(share.device),
            _ => None,
        }
    }

    /// The part of block `block` that `device` computes, if any.
    pub fn part(&self, block: usize, device: Device) -> Option<Range<usize>> {
        self.places[block].iter().find(|s| s.device == device).map(|s| s.part.clone())
    }

    /// `model` as `device` sees it: blocks replaced by its shares of them, and the indices of those that it has.
    pub fn shares(&self, model: &Model, device: Device) -> (Model, Vec<usize>) {
        bytes::shares(model, &self.places, device, &self.sizes())
    }

    /// The CPU's shares of feed-forward blocks that `gpu` streams for batches of [`Plan::stream_from`] tokens and more,
    /// with the indices of the blocks.
    pub fn streamed(&self, model: &Model, gpu: Device) -> Vec<(usize, Block<Weight>)> {
        bytes::streamed(model, &self.places, gpu, &self.sizes())
    }

    /// Predicted tokens per second on the machine of `facts`: generated after `depth` tokens, and of a prompt of so
    /// many. `misses`: of the experts that a token uses in a mixture of both sides, the probability of each number that
    /// the GPU does not have, from none on (see [`crate::engine::ExpertUses::misses`]); `None`: routing is uniform.
    /// `None` where the machine lacks a GPU of the plan.
    ///
    /// # Panics
    /// If `misses` are of another number of experts than a token of `model` uses.
    pub fn rates_at(&self, model: &Model, facts: &Machine, depth: usize, misses: Option<&[f64]>) -> Option<(f64, f64)> {
        let workload = Workload { prompt: depth, generate: 0 };
        let (token_s, prompt_s) = choose::retimed(self, model, facts, workload, misses)?;
        Some((1.0 / token_s, depth as f64 / prompt_s))
    }

    /// Whether the experts that a GPU has of block `index` of `model` may change.
    pub fn has_changing_experts(&self, model: &Model, index: usize) -> bool {
        self.expert_cache && bytes::has_changing_experts(&model.blocks[index], &self.places[index], self.isa)
    }

    /// Devices that the plan uses, the CPU first.
    pub fn devices(&self) -> Vec<Device> {
        let mut devices: Vec<Device> = self.places.iter().flatten().map(|s| s.device).collect();
        devices.sort();
        devices.dedup();
        devices
    }

    /// Planned bytes of `device`, in one pool or in all of them.
    pub fn bytes(&self, device: Device, pool: Option<Pool>) -> u64 {
        total(&self.account, device, pool)
    }

    fn sizes(&self) -> bytes::Sizes {
        bytes::Sizes {
            n_ctx: self.n_ctx,
            n_slots: self.n_slots,
            n_batch: self.n_batch,
            kv_dtype: self.kv_dtype,
            n_logits: self.n_logits,
            n_snapshots: self.n_snapshots,
            isa: self.isa,
            threads: self.threads,
            stream: self.stream_from.is_some(),
            expert_cache: self.expert_cache,
        }
    }

    /// Whether the plan is one of `model`: every block placed once, shares that end at units, the same bytes.
    ///
    /// # Errors
    /// What differs.
    pub fn check(&self, model: &Model) -> Result<(), String> {
        let (found, expected) = (self.places.len(), model.blocks.len());
        if found != expected {
            return Err(format!(
                "the plan places {found} blocks, the model has {expected}: it is a plan of another model"
            ));
        }
        if [self.n_ctx, self.n_slots, self.n_batch, self.n_logits, self.threads].contains(&0) {
            return Err("context, slots, batch, logits and threads of a plan must be at least 1".into());
        }
        if self.threads > THREADS_MAX {
            return Err(format!("the plan has {} threads, more than {THREADS_MAX}", self.threads));
        }
        for (block, place) in model.blocks.iter().zip(&self.places) {
            let n = n_parts(block);
            let mut end = 0;
            for share in place {
                if share.part.start != end || share.part.end < end {
                    return Err(format!("{}: the shares do not follow each other: {place:?}", block.name()));
                }
                end = share.part.end;
                if let Block::Ffn(b) = block
                    && end != n
                    && end % row_unit(b) != 0
                {
                    let (name, unit) = (block.name(), row_unit(b));
                    return Err(format!("{name}: a share ends at row {end}, not at a multiple of {unit}"));
                }
            }
            if end != n {
                return Err(format!("{}: the shares end at {end} of {n}", block.name()));
            }
            let can_run = match (&place[..], block) {
                ([_], _) => true,
                ([home, other], Block::Ffn(_) | Block::Moe(_)) => {
                    let is_empty = home.part.is_empty() && matches!(block, Block::Ffn(_));
                    home.device != Device::Cpu && other.device == Device::Cpu && !is_empty && !other.part.is_empty()
                }
                _ => false,
            };
            if !can_run {
                let name = block.name();
                return Err(format!(
                    "{name}: a feed-forward block can be shared by a GPU and the CPU, nothing else: {place:?}"
                ));
            }
            let mut devices: Vec<Device> = place.iter().map(|s| s.device).collect();
            devices.sort();
            devices.dedup();
            if devices.len() != place.len() {
                return Err(format!("{}: a device occurs twice: {place:?}", block.name()));
            }
        }
        let sizes = self.sizes();
        if bytes::account(model, &self.places, &sizes, &bytes::GpuSize::of(&self.limits)) != self.account {
            return Err("the bytes of the plan are not those of this model: make the plan again".into());
        }
        for device in self.devices().into_iter().chain([Device::Cpu]) {
            let limit = self.limits.iter().find(|l| l.device == device).map_or(0, |l| l.bytes);
            let needed = self.bytes(device, None);
            if needed > limit {
                return Err(format!(
                    "{device} needs {needed} bytes, the plan's limit is {limit} (make the plan again, or with less: --ctx, --vram)"
                ));
            }
        }
        Ok(())
    }
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{}", show::refusal(self))]
pub struct Refusal {
    /// In a few words.
    pub reason: String,
    /// Bytes by device, where memory is what is missing.
    pub needs: Vec<Need>,
    /// What would fit, and how fast.
    pub options: Vec<Alternative>,
}

impl Refusal {
    /// A wish that cannot be met.
    fn wish(reason: String) -> Self {
        Self { reason: reason.trim_end().into(), needs: Vec::new(), options: Vec::new() }
    }
}

/// Bytes needed and available on one device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Need {
    /// The device.
    pub device: Device,
    /// Needed by the placement that comes nearest.
    pub needed: u64,
    /// Available.
    pub available: u64,
}

/// Changed wishes that would fit.
#[derive(Clone, Debug, PartialEq)]
pub struct Alternative {
    /// What to change, as options of the command line.
    pub change: String,
    /// Tokens per second, prompt and generation.
    pub prompt_tok_s: f64,
    /// Of generation.
    pub generate_tok_s: f64,
}

/// The run that a plan is made for: its time is what the planner minimises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens generated after it.
    pub generate: usize,
}

impl Default for Workload {
    /// A chat turn: 1024 tokens in, 256 out.
    fn default() -> Self {
        Self { prompt: 1024, generate: 256 }
    }
}

/// An explicit placement: blocks whose name matches go to a device, wholly or by a share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlaceRule {
    /// Pattern of block names: see [`PlaceRule::matches`].
    pub blocks: String,
    /// Where they go.
    pub device: Device,
    /// Share of the rows or experts that goes there, 0 to 1; the rest goes to the CPU. `None`: the whole block.
    pub share: Option<f64>,
}

impl PlaceRule {
    /// Reads `PATTERN=DEVICE` or `PATTERN=DEVICE:PERCENT%`: `blk.(0-9).ffn=cpu`, `blk.*.moe=cuda0:25%`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let expected =
            "expected PATTERN=DEVICE or PATTERN=DEVICE:PERCENT%, such as blk.(0-9).ffn=cpu or blk.*.moe=cuda0:25%";
        let (blocks, place) =
            text.split_once('=').ok_or_else(|| format!("placement `{text}` has no `=`: {expected}"))?;
        let (device, share) = match place.split_once(':') {
            None => (place, None),
            Some((device, percent)) => {
                let percent: f64 = percent
                    .strip_suffix('%')
                    .and_then(|p| p.parse().ok())
                    .filter(|p| (0.0..=100.0).contains(p))
                    .ok_or_else(|| format!("placement `{text}`: share `{percent}` is no percentage from 0% to 100%"))?;
                (device, Some(percent / 100.0))
            }
        };
        let device =
            match device {
                "cpu" => Device::Cpu,
                "cuda" => Device::Cuda(0),
                other => Device::Cuda(other.strip_prefix("cuda").and_then(|i| i.parse().ok()).ok_or_else(|| {
                    format!("placement `{text}`: device `{other}` is none of cpu, cuda0, cuda1, ...")
                })?),
            };
        if blocks.is_empty() {
            return Err(format!("placement `{text}` names no block: {expected}"));
        }
        Ok(Self { blocks: blocks.into(), device, share })
    }

    /// Whether the rule is about block `name`. The pattern is compared part by part between dots, and may be
    /// shorter than the name (`blk.3` is the whole layer). A part is literal, `*`, or a list of numbers and
    /// ranges in parentheses: `(0-9,63)`.
    pub fn matches(&self, name: &str) -> bool {
        let mut parts = name.split('.');
        self.blocks.split('.').all(|pattern| {
            let Some(part) = parts.next() else { return false };
            let Some(list) = pattern.strip_prefix('(').and_then(|p| p.strip_suffix(')')) else {
                return pattern == "*" || pattern == part;
            };
            let Ok(number) = part.parse::<usize>() else { return false };
            list.split(',').any(|range| {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                matches!((first.parse(), last.parse()), (Ok(a), Ok(b)) if (a..=b).contains(&number))
            })
        })
    }
}

/// What the user asks for; everything else is the planner's choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Wishes {
    /// Memory to use at most, per GPU by index, bytes; GPUs beyond the list are free to use, 0 leaves one out.
    /// Empty: what is free.
    pub vram: Vec<u64>,
    /// Main memory to use at most, bytes.
    pub ram: Option<u64>,
    /// Positions per slot.
    pub n_ctx: Option<usize>,
    /// Sequences with a state at the same time.
    pub n_slots: usize,
    /// Tokens of the largest batch.
    pub n_batch: Option<usize>,
    /// How keys and values are stored.
    pub kv_dtype: Option<KvDtype>,
    /// Whether the logits of all tokens of a batch are wanted, not only those of the last one of each slot.
    pub all_logits: bool,
    /// CPU worker threads.
    pub threads: Option<usize>,
    /// The run to plan for.
    pub workload: Workload,
    /// Whether the experts on a GPU may follow the routing, where main memory has room for all of them.
    pub expert_cache: bool,
    /// Placements, later ones win.
    pub place: Vec<PlaceRule>,
    /// The last so many layers go wholly to the GPU and the others to the CPU; the head counts as the last
    /// layer (as in llama.cpp).
    pub gpu_layers: Option<usize>,
}

impl Default for Wishes {
    fn default() -> Self {
        Self {
            vram: Vec::new(),
            ram: None,
            n_ctx: None,
            n_slots: 1,
            n_batch: None,
            kv_dtype: None,
            all_logits: false,
            threads: None,
            workload: Workload::default(),
            expert_cache: true,
            place: Vec::new(),
            gpu_layers: None,
        }
    }
}

//! From a chosen placement to the plan: the account, and the predicted times by group of blocks.

use super::bytes::{self, Entry};
use super::choose::{self, Outcome, Problem};
use super::time::{self, Rates, Token, Waiting};
use super::{Device, Limit, Place, Plan};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tandem_spec::{Model, TensorType};

/// Predicted times of the workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prediction {
    /// Tokens of the prompt per second.
    pub prompt_tok_s: f64,
    /// Generated tokens per second, at the context depth in the middle of the generation.
    pub generate_tok_s: f64,
    /// Seconds of the whole prompt.
    pub prompt_s: f64,
    /// Milliseconds of one generated token.
    pub token_ms: f64,
    /// Of them, handing activations from device to device.
    pub handoff_ms: f64,
    /// Of them, outside blocks: launch, sampling.
    pub fixed_ms: f64,
    /// Milliseconds of a token that the CPU's shares would take more if its workers read no weights ahead.
    #[serde(default)]
    pub ahead_ms: f64,
    /// Whether host weights are streamed to the GPU for the prompt.
    pub prompt_streams: bool,
    /// What one token's time goes by group of blocks, in the order in which they run.
    pub groups: Vec<Group>,
    /// What bounds the generation rate.
    pub bound: String,
}

/// Time of one token in all blocks of a kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// Kind of block.
    pub kind: String,
    /// Number of blocks.
    pub n_blocks: usize,
    /// Milliseconds of one token: per block, the slower device.
    pub token_ms: f64,
    /// By device.
    pub devices: Vec<DeviceTime>,
}

/// What one device does of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceTime {
    /// The device.
    pub device: Device,
    /// Bytes read and written per token.
    pub token_bytes: f64,
    /// Milliseconds busy per token.
    pub token_ms: f64,
    /// Milliseconds busy per prompt token, without streaming.
    pub prompt_ms: f64,
}

/// Architecture, name, and the type that most bytes of the weights have.
fn describe(model: &Model) -> String {
    let mut bytes: BTreeMap<TensorType, usize> = BTreeMap::new();
    for block in &model.blocks {
        block.for_each(&mut |w| *bytes.entry(w.ty).or_default() += w.n_bytes());
    }
    let main = bytes.iter().max_by_key(|(_, n)| **n).map_or("", |(ty, _)| ty.name());
    [model.arch.as_str(), model.name.as_str(), main]
        .iter()
        .filter(|s| !s.is_empty())
        .copied()
        .collect::<Vec<_>>()
        .join(" ")
}

/// The plan of an outcome.
pub(super) fn finish(problem: &Problem, outcome: &Outcome) -> Plan {
    let Problem { model, facts, wishes, .. } = *problem;
    let blocks = &model.blocks;
    let places: Vec<Place> = (0..blocks.len())
        .map(|i| choose::place(&blocks[i], outcome.levels[i], Device::Cuda(outcome.gpus[i])))
        .collect();
    let host =
        Limit { device: Device::Cpu, name: facts.host.cpu.clone(), bytes: problem.ram, n_sms: 0, driver_bytes: 0 };
    let mut limits = vec![host];
    for (i, gpu) in facts.gpus.iter().enumerate() {
        limits.push(Limit {
            device: Device::Cuda(i),
            name: gpu.name.clone(),
            bytes: problem.vram[i],
            n_sms: gpu.n_sms,
            driver_bytes: gpu.driver_bytes,
        });
    }
    let account = bytes::account(model, &places, &outcome.sizes, &bytes::GpuSize::of(&limits));
    for limit in &limits {
        let needed = bytes::total(&account, limit.device, None);
        let is_used = limit.device == Device::Cpu || needed > 0;
        assert!(!is_used || needed <= limit.bytes, "{}: planned {needed} of {} bytes", limit.device, limit.bytes);
    }
    let sizes = &outcome.sizes;
    Plan {
        model: describe(model),
        machine: facts.name.clone(),
        workload: wishes.workload,
        n_ctx: sizes.n_ctx,
        n_slots: sizes.n_slots,
        n_batch: sizes.n_batch,
        kv_dtype: sizes.kv_dtype,
        n_logits: sizes.n_logits,
        n_snapshots: sizes.n_snapshots,
        isa: facts.host.isa,
        threads: problem.threads,
        stream_from: sizes.stream.then(|| choose::break_even(problem, outcome)),
        expert_cache: sizes.expert_cache
            && blocks.iter().zip(&places).any(|(block, place)| bytes::has_changing_experts(block, place, sizes.isa)),
        prediction: predict(problem, outcome, &places, &account),
        places,
        account,
        limits,
    }
}

fn predict(problem: &Problem, outcome: &Outcome, places: &[Place], account: &[Entry]) -> Prediction {
    let Problem { model, facts, wishes, .. } = *problem;
    let workload = wishes.workload;
    let past = (workload.prompt + workload.generate / 2).min(outcome.sizes.n_ctx);
    let prompt = workload.prompt.clamp(1, outcome.sizes.n_batch);
    let rates = |device: Device| match device {
        Device::Cpu => Rates::Cpu { host: &facts.host, threads: problem.threads },
        Device::Cuda(i) => Rates::Gpu(&facts.gpus[i]),
    };
    let mut groups: Vec<Group> = Vec::new();
    let (mut waiting, mut ahead_ms) = (Waiting::default(), 0.0);
    for (block, place) in model.blocks.iter().zip(places) {
        let at = groups.iter().position(|g| g.kind == block.kind()).unwrap_or_else(|| {
            groups.push(Group { kind: block.kind().into(), n_blocks: 0, token_ms: 0.0, devices: Vec::new() });
            groups.len() - 1
        });
        let group = &mut groups[at];
        group.n_blocks += 1;
        let token = Token::new(block, place, rates, past, &outcome.sizes, None);
        let waited = waiting.pass(block, &token);
        group.token_ms += 1e3 * token.seconds(waited);
        ahead_ms += 1e3 * token.ahead_seconds(waited);
        for (nth, share) in place.iter().enumerate() {
            let work = |n, past| time::work(block, share.part.len(), nth == 0, n, past, &outcome.sizes);
            let (decode, batch) = (work(1, past), work(prompt, workload.prompt.saturating_sub(prompt) / 2));
            let device = match group.devices.iter().position(|d| d.device == share.device) {
                Some(at) => &mut group.devices[at],
                None => {
                    let device = share.device;
                    group.devices.push(DeviceTime { device, token_bytes: 0.0, token_ms: 0.0, prompt_ms: 0.0 });
                    group.devices.last_mut().expect("just pushed")
                }
            };
            device.token_bytes += decode.bytes();
            device.token_ms += 1e3 * token.share_seconds(nth);
            device.prompt_ms += 1e3 * rates(share.device).seconds(&batch) / prompt as f64;
        }
    }
    let in_blocks: f64 = groups.iter().map(|g| g.token_ms).sum();
    let token_ms = 1e3 * outcome.decode_s;
    let head_home = places.last().map_or(Device::Cpu, |p| p[0].device);
    let any_gpu = account.iter().any(|e| e.device != Device::Cpu);
    let gpu = if any_gpu { Some(&facts.gpus[problem.first_gpu()]) } else { None };
    let fixed_ms = 1e3 * time::fixed_seconds(gpu, if head_home == Device::Cpu { model.n_vocab } else { 0 });
    Prediction {
        prompt_tok_s: if workload.prompt == 0 { 0.0 } else { workload.prompt as f64 / outcome.prompt_s },
        generate_tok_s: 1.0 / outcome.decode_s,
        prompt_s: outcome.prompt_s,
        token_ms,
        handoff_ms: (token_ms - in_blocks - fixed_ms).max(0.0),
        fixed_ms,
        ahead_ms,
        prompt_streams: outcome.prompt_streams,
        bound: bound(&groups, token_ms),
        groups,
    }
}

/// Which device's memory takes most of the token's time, where blocks wait for it.
fn bound(groups: &[Group], token_ms: f64) -> String {
    let mut busy: BTreeMap<Device, f64> = BTreeMap::new();
    for device in groups.iter().flat_map(|g| &g.devices) {
        *busy.entry(device.device).or_default() += device.token_ms;
    }
    match busy.iter().max_by(|a, b| a.1.total_cmp(b.1)) {
        Some((device, ms)) if *ms > 0.5 * token_ms => format!("{device} memory"),
        _ => "devices wait for each other".into(),
    }
}

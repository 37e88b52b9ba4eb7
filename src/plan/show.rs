//! A plan in words: text, one line, a page, and what would change it. Nothing is computed here that is not in
//! the plan, except the plans that `why` compares with.

use super::{Device, Need, Plan, Pool, Refusal, Wishes, n_parts, plan};
use crate::machine::Machine;
use std::fmt::Write;
use tandem_spec::{Block, KvDtype, Model, TensorType, Weight};

/// Bytes for people: `11.4 GiB`, `512.0 MiB`.
pub(super) fn size(bytes: u64) -> String {
    let b = bytes as f64;
    match bytes {
        0 => "-".into(),
        _ if b >= 1024f64.powi(3) => format!("{:.2} GiB", b / 1024f64.powi(3)),
        _ if b >= 1024f64.powi(2) => format!("{:.1} MiB", b / 1024f64.powi(2)),
        _ => format!("{:.1} KiB", b / 1024.0),
    }
}

/// A rate or a time with three digits.
fn short(x: f64) -> String {
    match x {
        _ if x >= 100.0 => format!("{x:.0}"),
        _ if x >= 10.0 => format!("{x:.1}"),
        _ if x >= 1.0 => format!("{x:.2}"),
        _ => format!("{x:.3}"),
    }
}

/// Bytes moved, for people: `3.77 GB`, `24.1 MB`.
fn moved(bytes: f64) -> String {
    if bytes >= 1e9 { format!("{} GB", short(bytes / 1e9)) } else { format!("{} MB", short(bytes / 1e6)) }
}

fn kv_name(dtype: KvDtype) -> &'static str {
    match dtype {
        KvDtype::F32 => "f32",
        KvDtype::Bf16 => "bf16",
    }
}

/// Devices in the order of the columns: those in use, GPUs first.
fn columns(plan: &Plan) -> Vec<Device> {
    let mut devices: Vec<Device> = plan.limits.iter().map(|l| l.device).collect();
    devices.retain(|d| *d == Device::Cpu || plan.bytes(*d, None) > 0);
    devices.sort_by_key(|d| (*d == Device::Cpu, *d));
    devices
}

/// Of each kind of block, in the order in which they run: number, and the share of its parts per device.
fn shares(plan: &Plan, model: &Model) -> Vec<(&'static str, usize, Vec<f64>)> {
    let columns = columns(plan);
    let mut kinds: Vec<(&'static str, usize, usize, Vec<usize>)> = Vec::new();
    for (block, place) in model.blocks.iter().zip(&plan.places) {
        let at = kinds.iter().position(|k| k.0 == block.kind()).unwrap_or_else(|| {
            kinds.push((block.kind(), 0, 0, vec![0; columns.len()]));
            kinds.len() - 1
        });
        let kind = &mut kinds[at];
        kind.1 += 1;
        kind.2 += n_parts(block);
        for (device, parts) in columns.iter().zip(&mut kind.3) {
            *parts += place.iter().filter(|s| s.device == *device).map(|s| s.part.len()).sum::<usize>();
        }
    }
    let ratio = |parts: Vec<usize>, all: usize| parts.into_iter().map(|p| p as f64 / all as f64).collect();
    kinds.into_iter().map(|(kind, n, all, parts)| (kind, n, ratio(parts, all))).collect()
}

/// What is shared of a kind: rows, experts, or whole blocks.
fn unit_of(kind: &str) -> &'static str {
    match kind {
        "ffn" => "rows",
        "moe" => "experts",
        _ => "blocks",
    }
}

/// The plan in one line.
pub fn summary(plan: &Plan) -> String {
    let memory: Vec<String> = columns(plan)
        .into_iter()
        .map(|d| {
            let limit = plan.limits.iter().find(|l| l.device == d).map_or(0, |l| l.bytes);
            format!("{d} {} of {}", size(plan.bytes(d, None)), size(limit))
        })
        .collect();
    format!(
        "{}; ctx {}, kv {}; predicted {} tok/s generation, {} tok/s prompt; bound: {}",
        memory.join(", "),
        plan.n_ctx,
        kv_name(plan.kv_dtype),
        short(plan.prediction.generate_tok_s),
        short(plan.prediction.prompt_tok_s),
        plan.prediction.bound
    )
}

/// The plan as text: where everything lies, every byte, and where the time goes.
pub fn text(plan: &Plan, model: &Model) -> String {
    let mut out = String::new();
    let columns = columns(plan);
    let p = &plan.prediction;
    let line = &mut out;
    let _ = writeln!(line, "{} on {}", plan.model, plan.machine);
    let _ = writeln!(
        line,
        "context {} x {} slot{}, kv {}, batch {}, {} thread{}; for a prompt of {} and {} generated tokens",
        plan.n_ctx,
        plan.n_slots,
        if plan.n_slots == 1 { "" } else { "s" },
        kv_name(plan.kv_dtype),
        plan.n_batch,
        plan.threads,
        if plan.threads == 1 { "" } else { "s" },
        plan.workload.prompt,
        plan.workload.generate
    );
    let header = |line: &mut String, title: &str, last: &str| {
        let _ = write!(line, "\n{title:<22}");
        columns.iter().for_each(|d| {
            let _ = write!(line, "{:>20}", d.to_string());
        });
        let _ = writeln!(line, "{last}");
    };
    header(line, "where", "");
    for (kind, n, shares) in shares(plan, model) {
        let _ = write!(line, "  {:<20}", format!("{kind} x {n}"));
        for share in shares {
            let cell = match share {
                0.0 => "-".into(),
                1.0 => "all".into(),
                s if unit_of(kind) == "blocks" => format!("{} of {n}", (s * n as f64).round()),
                s => format!("{:.1} % {}", 100.0 * s, unit_of(kind)),
            };
            let _ = write!(line, "{cell:>20}");
        }
        let _ = writeln!(line);
    }
    if plan.expert_cache {
        let _ = writeln!(
            line,
            "  main memory holds all experts: those on the GPU follow the routing; times are those of uniform routing"
        );
    }
    header(line, "memory", "");
    let row = |line: &mut String, name: &str, bytes: &dyn Fn(Device) -> u64| {
        if columns.iter().any(|d| bytes(*d) > 0) {
            let _ = write!(line, "  {name:<20}");
            columns.iter().for_each(|d| {
                let _ = write!(line, "{:>20}", size(bytes(*d)));
            });
            let _ = writeln!(line);
        }
    };
    for pool in Pool::ALL {
        row(line, pool.name(), &|d| plan.bytes(d, Some(pool)));
    }
    let limit = |d: Device| plan.limits.iter().find(|l| l.device == d).map_or(0, |l| l.bytes);
    row(line, "total", &|d| plan.bytes(d, None));
    row(line, "available", &limit);
    row(line, "left", &|d| limit(d) - plan.bytes(d, None));
    header(line, &format!("token at depth {}", depth(plan)), "          time");
    for group in &p.groups {
        let _ = write!(line, "  {:<20}", format!("{} x {}", group.kind, group.n_blocks));
        for device in &columns {
            let cell = match group.devices.iter().find(|d| d.device == *device) {
                Some(d) if d.token_ms > 0.0 => format!("{} {} ms", moved(d.token_bytes), short(d.token_ms)),
                _ => "-".into(),
            };
            let _ = write!(line, "{cell:>20}");
        }
        let _ = writeln!(line, "{:>14}", format!("{} ms", short(group.token_ms)));
    }
    if p.handoff_ms > 0.0005 {
        let _ = writeln!(line, "  hand-offs: {} ms", short(p.handoff_ms));
    }
    if p.ahead_ms > 0.0005 {
        let _ = writeln!(line, "  read ahead by waiting CPU workers: {} ms of their shares", short(p.ahead_ms));
    }
    let _ = writeln!(line, "  launch and sampling: {} ms", short(p.fixed_ms));
    let _ =
        writeln!(line, "  together: {} ms = {} tok/s   bound: {}", short(p.token_ms), short(p.generate_tok_s), p.bound);
    if plan.workload.prompt > 0 {
        let _ = writeln!(
            line,
            "\nprompt of {}: {} s = {} tok/s",
            plan.workload.prompt,
            short(p.prompt_s),
            short(p.prompt_tok_s)
        );
        if let Some(n) = plan.stream_from {
            let now = if p.prompt_streams { "as here" } else { "not here" };
            let _ = writeln!(
                line,
                "  the host's feed-forward weights are streamed to the GPU for batches from {n} tokens ({now})"
            );
        }
    }
    out
}

/// Context depth that the generation rate is for.
fn depth(plan: &Plan) -> usize {
    (plan.workload.prompt + plan.workload.generate / 2).min(plan.n_ctx)
}

/// A refusal with its numbers: the missing ones in the first line.
pub(super) fn refusal(refusal: &Refusal) -> String {
    let mut out = refusal.reason.clone();
    let missing = |need: &Need| need.needed.saturating_sub(need.available);
    for (nth, need) in refusal.needs.iter().filter(|n| missing(n) > 0).enumerate() {
        let (needed, available) = (size(need.needed), size(need.available));
        let _ = write!(
            out,
            "{} {} needs {needed}, {available} are available",
            if nth == 0 { ":" } else { ";" },
            need.device
        );
    }
    for need in refusal.needs.iter().filter(|_| refusal.needs.len() > 1) {
        let (needed, available) = (size(need.needed), size(need.available));
        let verdict = if missing(need) > 0 { format!("{} too much", size(missing(need))) } else { "enough".into() };
        let _ =
            write!(out, "\n  {:<6} needs {needed:>11}, available {available:>11}: {verdict}", need.device.to_string());
    }
    if !refusal.options.is_empty() {
        let _ = write!(out, "\nwhat would fit:");
    }
    for option in &refusal.options {
        let (prompt, generate) = (short(option.prompt_tok_s), short(option.generate_tok_s));
        let _ = write!(out, "\n  {:<36} {generate} tok/s generation, {prompt} tok/s prompt", option.change);
    }
    if refusal.options.is_empty() && !refusal.needs.is_empty() {
        let _ = write!(out, "\nno smaller context, batch or KV type fits: take a smaller model or quantisation");
    }
    out
}

/// The same model with every quantised weight of another type, where its rows allow it.
fn retyped(model: &Model, ty: TensorType) -> Model {
    let change = |w: &Weight| {
        let mut w = w.clone();
        if w.ty.is_quantised() && w.n_cols.is_multiple_of(ty.row().block_len) {
            w.ty = ty;
        }
        Ok::<_, std::convert::Infallible>(w)
    };
    let blocks: Result<Vec<Block<Weight>>, _> = model.blocks.iter().map(|b| b.try_map(&mut { change })).collect();
    let Ok(blocks) = blocks;
    Model { blocks, ..model.clone() }
}

/// What one more GiB, the other KV type, half the context, more bandwidth or another quantisation would change.
pub fn why(plan_now: &Plan, model: &Model, facts: &Machine, wishes: &Wishes) -> String {
    let mut out = format!("bound: {}\n", plan_now.prediction.bound);
    let mut compare = |what: &str, model: &Model, facts: &Machine, wishes: &Wishes| {
        let _ = match plan(model, facts, wishes) {
            Err(refusal) => {
                let missing: u64 = refusal.needs.iter().map(|n| n.needed.saturating_sub(n.available)).sum();
                writeln!(out, "  {what:<28} does not fit: {} too much", size(missing))
            }
            Ok(other) => {
                let (a, b) = (&plan_now.prediction, &other.prediction);
                let percent = |now: f64, then: f64| if now > 0.0 { 100.0 * (then / now - 1.0) } else { 0.0 };
                let rows = gpu_share(&other, model) - gpu_share(plan_now, model);
                let moved = if rows.abs() < 0.0005 {
                    String::new()
                } else {
                    format!(", {:+.1} % of the feed-forward on the GPU", 100.0 * rows)
                };
                writeln!(
                    out,
                    "  {what:<28} generation {} tok/s ({:+.1} %), prompt {} tok/s ({:+.1} %){moved}",
                    short(b.generate_tok_s),
                    percent(a.generate_tok_s, b.generate_tok_s),
                    short(b.prompt_tok_s),
                    percent(a.prompt_tok_s, b.prompt_tok_s)
                )
            }
        };
    };
    const GIB: u64 = 1 << 30;
    for i in 0..facts.gpus.len() {
        let (mut facts, mut wishes) = (facts.clone(), wishes.clone());
        facts.gpus[i].vram_free += GIB;
        wishes.vram.iter_mut().skip(i).take(1).for_each(|v| *v += GIB);
        compare(&format!("1 GiB more on cuda{i}"), model, &facts, &wishes);
    }
    let other = if plan_now.kv_dtype == KvDtype::F32 { KvDtype::Bf16 } else { KvDtype::F32 };
    compare(&format!("{} kv", kv_name(other)), model, facts, &Wishes { kv_dtype: Some(other), ..wishes.clone() });
    let half = (plan_now.n_ctx / 2).max(1);
    compare(&format!("context {half}"), model, facts, &Wishes { n_ctx: Some(half), ..wishes.clone() });
    let mut faster = facts.clone();
    faster.host.read.iter_mut().for_each(|r| r.gb_per_s *= 1.5);
    faster.host.kernels.iter_mut().for_each(|k| {
        k.decode_gb_per_s *= 1.5;
        k.experts_gb_per_s *= 1.5;
    });
    compare("1.5 times the RAM bandwidth", model, &faster, wishes);
    for ty in [TensorType::Q8_0, TensorType::Q6_K, TensorType::Q4_K, TensorType::Q3_K] {
        compare(&format!("all weights {ty}"), &retyped(model, ty), facts, wishes);
    }
    out
}

/// Share of all feed-forward rows and experts that lie on GPUs.
fn gpu_share(plan: &Plan, model: &Model) -> f64 {
    let (mut on_gpu, mut all) = (0.0, 0.0);
    for (block, place) in model.blocks.iter().zip(&plan.places) {
        if matches!(block, Block::Ffn(_) | Block::Moe(_)) {
            let parts = place.iter().filter(|s| s.device != Device::Cpu).map(|s| s.part.len()).sum::<usize>();
            on_gpu += parts as f64 / n_parts(block) as f64;
            all += 1.0;
        }
    }
    if all == 0.0 { 0.0 } else { on_gpu / all }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1d2530;background:#fff}\
h1{font-size:1.4rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .5rem}p{margin:.3rem 0 1rem;color:#4a5563}\
.bar{display:flex;height:2.2rem;border-radius:4px;overflow:hidden;background:#e8ebef}.bar div{min-width:1px}\
.key{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:.4rem 0 1.2rem;font-size:.85rem}.key i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}\
table{border-collapse:collapse;width:100%;font-size:.9rem}td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #e3e7ec}td:first-child,th:first-child{text-align:left}\
.num{font-size:1.6rem;font-weight:600;margin-right:.3rem}";

fn colour(name: &str) -> &'static str {
    match name {
        "delta_net" => "#2f6fb0",
        "attention" => "#5aa0d8",
        "ffn" => "#c96f2e",
        "moe" => "#c96f2e",
        "head" => "#6b8f3a",
        "embed" => "#a8bf7a",
        "kv" => "#8a5fb5",
        "states" => "#b493d6",
        "scratch" => "#4d9c94",
        "logits" => "#9fd0ca",
        "staging" => "#d9b13b",
        "pinned" => "#ecd48a",
        "driver" => "#8b95a1",
        "snapshots" => "#d3bfe8",
        "hand-offs" => "#d14b5a",
        "launch, sampling" => "#8b95a1",
        "left" => "#e8ebef",
        _ => "#b9c1ca",
    }
}

/// One stacked bar with its legend; parts are (name, value, value in words).
fn bar(out: &mut String, parts: &[(String, f64, String)], full: f64) {
    let shown = || parts.iter().filter(|p| p.1 > 0.0);
    out.push_str("<div class=bar>");
    for (name, value, words) in shown() {
        let width = 100.0 * value / full;
        let _ = write!(
            out,
            "<div style=\"width:{width:.3}%;background:{}\" title=\"{}: {words}\"></div>",
            colour(name),
            escape(name)
        );
    }
    out.push_str("</div><div class=key>");
    for (name, _, words) in shown() {
        let _ = write!(out, "<span><i style=\"background:{}\"></i>{} {words}</span>", colour(name), escape(name));
    }
    out.push_str("</div>");
}

/// One self-contained page: a bar per device of what lies where, and the time of a token by block.
pub fn html(plan: &Plan, model: &Model) -> String {
    let p = &plan.prediction;
    let mut out = String::new();
    let title = escape(&format!("{} on {}", plan.model, plan.machine));
    let _ = write!(
        out,
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\"><title>{title}</title><style>{STYLE}</style>\
<h1>{title}</h1><p>context {} &times; {}, kv {}, batch {}, {} CPU threads</p>\
<div><span class=num>{}</span>tokens/s generated at depth {} &emsp; <span class=num>{}</span>tokens/s of a prompt of {} &emsp; bound: {}</div>",
        plan.n_ctx,
        plan.n_slots,
        kv_name(plan.kv_dtype),
        plan.n_batch,
        plan.threads,
        short(p.generate_tok_s),
        depth(plan),
        short(p.prompt_tok_s),
        plan.workload.prompt,
        escape(&p.bound)
    );
    for device in columns(plan) {
        let limit = plan.limits.iter().find(|l| l.device == device).expect("every column has a limit");
        let used = plan.bytes(device, None);
        let _ = write!(out, "<h2>{device}: {} of {}</h2><p>{}</p>", size(used), size(limit.bytes), escape(&limit.name));
        let mut parts: Vec<(String, f64, String)> = Vec::new();
        let mut put = |name: &str, bytes: u64| parts.push((name.into(), bytes as f64, size(bytes)));
        for kind in ["embed", "attention", "delta_net", "ffn", "moe", "head"] {
            let of_kind = |e: &&super::Entry| {
                e.device == device && e.pool == Pool::Weights && e.block.is_some_and(|b| model.blocks[b].kind() == kind)
            };
            put(kind, plan.account.iter().filter(of_kind).map(|e| e.bytes).sum());
        }
        for pool in &Pool::ALL[1..] {
            put(pool.name(), plan.bytes(device, Some(*pool)));
        }
        put("left", limit.bytes - used);
        bar(&mut out, &parts, limit.bytes as f64);
    }
    let _ = write!(out, "<h2>One token: {} ms</h2>", short(p.token_ms));
    let ms = |ms: f64| format!("{} ms", short(ms));
    let mut parts: Vec<(String, f64, String)> =
        p.groups.iter().map(|g| (g.kind.clone(), g.token_ms, ms(g.token_ms))).collect();
    parts.push(("hand-offs".into(), p.handoff_ms, ms(p.handoff_ms)));
    parts.push(("launch, sampling".into(), p.fixed_ms, ms(p.fixed_ms)));
    bar(&mut out, &parts, p.token_ms);
    out.push_str("<table><tr><th>blocks<th>device<th>share<th>reads per token<th>busy");
    for (group, (kind, _, shares)) in p.groups.iter().zip(shares(plan, model)) {
        for (device, share) in columns(plan).iter().zip(shares) {
            if let Some(d) = group.devices.iter().find(|d| d.device == *device) {
                let _ = write!(
                    out,
                    "<tr><td>{kind} &times; {}<td>{device}<td>{:.1} %<td>{}<td>{} ms",
                    group.n_blocks,
                    100.0 * share,
                    moved(d.token_bytes),
                    short(d.token_ms)
                );
            }
        }
    }
    let _ = write!(out, "</table><h2>In words</h2><pre>{}</pre></html>", escape(&text(plan, model)));
    out
}

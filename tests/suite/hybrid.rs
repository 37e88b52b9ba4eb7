//! Models shared between a GPU and the CPU: golden models and the story, for splits at each kind of block and several
//! shares, with and without streaming of the CPU's shares for prompts. Skipped, with the reason, where there is no GPU.

use super::golden::{Golden, golden_models, numbers, tokens};
use super::story::{asked, in_type, story};
use std::path::PathBuf;
use tandem::engine::{DeviceOptions, Engine, Session};
use tandem::gguf::File;
use tandem::machine::{self, Machine};
use tandem::plan::{self, PlaceRule, Plan, Wishes};
use tandem::text::{Tokenizer, Vocabulary};
use tandem_cpu::Isa;
use tandem_spec::testing::{Rng, relative_rms};
use tandem_spec::{Batch, KvDtype, Model, TensorSource, TensorType};

/// Placements of the same model: each kind of block on the CPU, feed-forward blocks shared, and mixtures of these.
const SPLITS: &[&[&str]] = &[
    &[],
    &["embed=cpu"],
    &["head=cpu"],
    &["embed=cpu", "head=cpu", "blk.(1)=cpu"],
    &["blk.*.attn=cpu"],
    &["blk.*.delta_net=cpu", "embed=cpu"],
    &["blk.*.ffn=cpu", "blk.*.moe=cpu"],
    &["embed=cpu", "blk.*.ffn=cuda0:50%", "blk.*.moe=cuda0:50%"],
    &["blk.*.ffn=cuda0:25%", "blk.*.moe=cuda0:0%"],
    &["blk.(0,2).ffn=cuda0:75%", "blk.(0,2).moe=cuda0:75%", "blk.1.ffn=cpu", "blk.1.moe=cpu"],
];

/// Shares of feed-forward blocks at several places.
const SHARES: &[&[&str]] = &[
    &["blk.*.ffn=cuda0:50%", "blk.*.moe=cuda0:50%"],
    &["embed=cpu", "head=cpu", "blk.*.ffn=cuda0:25%", "blk.*.moe=cuda0:0%"],
    &["blk.0.ffn=cuda0:75%", "blk.0.moe=cuda0:75%", "blk.1=cpu", "blk.2.ffn=cuda0:25%", "blk.2.moe=cuda0:25%"],
];

/// A machine with one large GPU, whatever is here; `None` where no GPU can be used.
fn machine() -> Option<Machine> {
    match tandem_cuda::Device::open(0) {
        Ok(_) => {
            let mut machine = machine::known("h200+server-16c-128gb").unwrap();
            machine.host.isa = Isa::detect();
            Some(machine)
        }
        Err(e) => {
            println!("skipped: {e}");
            None
        }
    }
}

/// The same with a host that is so slow that streaming its weights always pays.
fn slow_host(mut machine: Machine) -> Machine {
    machine.host.read.iter_mut().for_each(|rate| rate.gb_per_s = 1e-3);
    machine
}

fn options() -> DeviceOptions {
    let cuda_libs = std::env::var_os("TANDEM_CUDA_LIBS").map(PathBuf::from);
    let cubin_cache = Some(std::env::temp_dir().join("tandem-test-cubins"));
    DeviceOptions { isa: Isa::detect(), cuda_libs, cubin_cache }
}

fn plan(model: &Model, machine: &Machine, rules: &[&str], n_ctx: usize, n_batch: usize, expert_cache: bool) -> Plan {
    let names: Vec<String> = model.blocks.iter().map(|b| b.name()).collect();
    let rules = [&["embed=cuda0", "blk.*=cuda0", "head=cuda0"], rules].concat();
    let rules = rules.iter().map(|r| PlaceRule::parse(r).unwrap());
    let place = rules.filter(|r| names.iter().any(|name| r.matches(name))).collect();
    let (n_ctx, n_batch, kv_dtype) = (Some(n_ctx), Some(n_batch), Some(KvDtype::F32));
    let (threads, all_logits) = (Some(2), true);
    let wishes =
        Wishes { n_ctx, n_batch, kv_dtype, n_slots: 2, threads, place, expert_cache, all_logits, ..Default::default() };
    plan::plan(model, machine, &wishes).unwrap_or_else(|e| panic!("{e}"))
}

/// Everything on the CPU.
const CPU: &[&str] = &["embed=cpu", "blk.*=cpu", "head=cpu"];

/// `model` placed as [`plan`] says for 256 positions.
fn load(model: &Model, source: &dyn TensorSource, machine: &Machine, rules: &[&str], n_batch: usize) -> Engine {
    let plan = plan(model, machine, rules, 256, n_batch, true);
    Engine::load(model.clone(), plan, &options(), source, &|_| {}).unwrap_or_else(|e| panic!("{rules:?}: {e}"))
}

/// Twice what rounding of activations to 8 bits does in an exact computation, or f32 rounding of a whole model.
fn bound(prompt: &serde_json::Value) -> f64 {
    prompt["rounded_activations"]["rel_rms"].as_f64().map_or(5e-5, |rounded| 2.0 * rounded)
}

fn check(golden: &Golden, engine: &Engine, what: &str, failed: &mut Vec<String>) {
    let mut states = engine.states().unwrap();
    for prompt in golden.prompts() {
        let (ids, positions) = (tokens(&prompt["tokens"]), numbers(&prompt["positions"]));
        let want = golden.array(&prompt["logits"]);
        for chunk in [200, 7, 1] {
            let mut got = Vec::new();
            for (at, part) in ids.chunks(chunk).enumerate().map(|(i, part)| (i * chunk, part)) {
                let mut batch = Batch::single(1, at, part, false);
                batch.wanted = (0..part.len()).filter(|row| positions.contains(&(at + row))).collect();
                got.extend_from_slice(engine.step(&mut states, &batch).unwrap_or_else(|e| panic!("{what}: {e}")));
            }
            let error = relative_rms(&got, &want);
            if error.is_nan() || error > bound(prompt) {
                failed.push(format!("{what} {} chunks of {chunk}: {error:.2e}", prompt["name"]));
            }
        }
    }
}

#[test]
fn shared_models_give_the_golden_logits() {
    let Some(machine) = machine() else { return };
    let mut failed = Vec::new();
    let mut n_checked = 0;
    for golden in golden_models() {
        for rules in SPLITS {
            let file = File::open(&golden.path).unwrap_or_else(|e| panic!("{}: {e}", golden.name));
            let model = tandem::model::describe(&file).unwrap();
            let plan = plan(&model, &machine, rules, 200, 200, true);
            let engine = Engine::load(model, plan, &options(), &file, &|_| {}).unwrap_or_else(|e| panic!("{e}"));
            check(&golden, &engine, &format!("{} {rules:?}", golden.name), &mut failed);
            n_checked += 1;
        }
    }
    println!("{n_checked} placements of golden models");
    assert!(failed.is_empty(), "{} of {n_checked}: {failed:#?}", failed.len());
}

/// The `n` most likely tokens after `prompt`, one by one, and how far each was ahead of the second.
fn greedy(engine: &Engine, prompt: &[u32], n: usize) -> (Vec<u32>, Vec<f32>) {
    let mut session = Session::new(engine).unwrap();
    let mut tokens = prompt.to_vec();
    let mut margins = Vec::new();
    for _ in 0..n {
        session.feed(&tokens, &|| false).unwrap();
        let logits = session.logits();
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        let second = (0..logits.len()).filter(|i| *i != best).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        margins.push(logits[best] - logits[second.unwrap()]);
        tokens.push(best as u32);
    }
    (tokens, margins)
}

/// Whether two texts after a prompt of `start` tokens are one, up to a choice between tokens as good as equal, which
/// rounding may turn.
fn same_text(cpu: &[u32], margins: &[f32], other: &[u32], start: usize, what: &str) {
    let Some(at) = (start..cpu.len()).find(|at| cpu[*at] != other[*at]) else { return };
    let margin = margins[at - start];
    assert!(margin < 0.05, "{what}: token {at} differs, margin {margin}");
    println!("{what}: another token at {at}, where the margin is {margin}");
}

/// Whole prompts with the CPU's shares streamed; in chunks of 7 and 1 the CPU computes them.
#[test]
fn streamed_models_give_the_golden_logits() {
    let Some(machine) = machine().map(slow_host) else { return };
    let (mut failed, mut n_checked, mut n_streamed) = (Vec::new(), 0, 0);
    for golden in golden_models() {
        let file = File::open(&golden.path).unwrap_or_else(|e| panic!("{}: {e}", golden.name));
        let model = tandem::model::describe(&file).unwrap();
        let has_experts = model.blocks.iter().any(|b| matches!(b, tandem_spec::Block::Moe(_)));
        for (rules, cache) in SHARES.iter().flat_map(|rules| [(rules, false), (rules, true)]) {
            if cache && !has_experts {
                continue;
            }
            let plan = plan(&model, &machine, rules, 200, 200, cache);
            let is_shared = plan.places.iter().any(|place| place.len() > 1);
            assert_eq!(plan.stream_from, is_shared.then_some(16), "{} {rules:?}", golden.name);
            n_streamed += usize::from(is_shared);
            let engine =
                Engine::load(model.clone(), plan, &options(), &file, &|_| {}).unwrap_or_else(|e| panic!("{e}"));
            check(&golden, &engine, &format!("streamed {} {rules:?} cache {cache}", golden.name), &mut failed);
            n_checked += 1;
        }
    }
    println!("{n_streamed} of {n_checked} placements of golden models have streamed shares");
    assert!(n_streamed >= 20, "{n_streamed} of {n_checked} are streamed");
    assert!(failed.is_empty(), "{} of {n_checked}: {failed:#?}", failed.len());
}

/// A prompt in three streamed batches and a short one of the CPU, then 60 tokens that both sides generate: the text is
/// the CPU's. Strictly with weights as f32, which all of a prompt meets in f32, and as BF16, before which a GPU rounds
/// its activations to bf16: there the CPU's closest choice of the 60 is 0.04 ahead. In Q4_K_M up to near ties.
#[test]
fn streamed_story_goes_on_with_the_shares_of_the_cpu() {
    let Some(machine) = machine().map(slow_host) else { return };
    let file = story();
    let quantised = tandem::model::describe(&file).unwrap();
    let tokenizer = Tokenizer::new(Vocabulary::from_metadata(file.metadata()).unwrap()).unwrap();
    let question = asked(&file, &tokenizer, "Tell me a story about the owl Nora.");
    let check = |name: &str, model: &Model, source: &dyn TensorSource, is_strict: bool| {
        let engine = |rules: &[&str]| {
            let engine = load(model, source, &machine, rules, 32);
            assert_eq!(engine.plan().stream_from.is_some(), rules != CPU);
            engine
        };
        let on_cpu = engine(CPU);
        let (prompt, _) = greedy(&on_cpu, &question, 102 - question.len());
        let (cpu, margins) = greedy(&on_cpu, &prompt, 60);
        for rules in [&["blk.*.ffn=cuda0:50%"][..], &["embed=cpu", "blk.*.ffn=cuda0:25%"]] {
            let (shared, _) = greedy(&engine(rules), &prompt, 60);
            let what = format!("{name} {rules:?}");
            if is_strict {
                assert_eq!(shared, cpu, "{what}");
            } else {
                same_text(&cpu, &margins, &shared, prompt.len(), &what);
            }
        }
    };
    for ty in [TensorType::F32, TensorType::BF16] {
        let (model, weights) = in_type(&quantised, &file, ty);
        check(ty.name(), &model, &weights, true);
    }
    check("Q4_K_M", &quantised, &file, false);
}

/// Two sessions of one engine on two threads take turns: each tells what it tells alone.
#[test]
fn two_sessions_of_a_shared_model_take_turns() {
    let Some(machine) = machine() else { return };
    let file = story();
    let model = tandem::model::describe(&file).unwrap();
    let engine = load(&model, &file, &machine, &["embed=cpu", "blk.*.ffn=cuda0:50%"], 256);
    let prompts: [Vec<u32>; 2] = [0, 1].map(|k| (0..12).map(|i| 40 + (7 + k) * i).collect());
    let alone = prompts.each_ref().map(|prompt| greedy(&engine, prompt, 100).0);
    let together = std::thread::scope(|scope| {
        let told = prompts.each_ref().map(|prompt| scope.spawn(|| greedy(&engine, prompt, 100).0));
        told.map(|story| story.join().unwrap())
    });
    assert_eq!(alone, together);
}

/// A random placement of the 16 layers of the story.
fn random_rules(rng: &mut Rng) -> Vec<String> {
    let mut rules = Vec::new();
    for layer in 0..16 {
        match rng.below(4) {
            0 => rules.push(format!("blk.{layer}.ffn=cuda0:{}%", 25 * (1 + rng.below(3)))),
            1 => rules.push(format!("blk.{layer}.ffn=cpu")),
            2 => rules.push(format!("blk.{layer}=cpu")),
            _ => {}
        }
    }
    rules.extend(["embed=cpu", "head=cpu"].iter().filter(|_| rng.below(3) == 0).map(|r| r.to_string()));
    rules
}

/// Greedy text of 200 tokens on the GPU alone and at random placements is that of the CPU, and nothing hangs. At 50
/// placements strictly, with the weights as they were trained (BF16): single tokens and a prompt of 12 meet those in
/// f32 on both sides. At 10 in Q4_K_M up to near ties, since the sides round activations in groups of their own.
#[test]
fn shared_story_is_the_story_of_the_cpu() {
    let Some(machine) = machine() else { return };
    let file = story();
    let prompt: Vec<u32> = (0..12).map(|i| 40 + 7 * i).collect();
    let quantised = tandem::model::describe(&file).unwrap();
    let (trained, weights) = in_type(&quantised, &file, TensorType::BF16);
    let mut rng = Rng::new(7);
    let models = [(&trained, &weights as &dyn TensorSource, 50, true), (&quantised, &file, 10, false)];
    for (model, source, n_placements, is_strict) in models {
        let (cpu, margins) = greedy(&load(model, source, &machine, CPU, 256), &prompt, 200);
        for i in 0..=n_placements {
            let rules = if i > 0 { random_rules(&mut rng) } else { Vec::new() };
            let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
            let (shared, _) = greedy(&load(model, source, &machine, &rules, 256), &prompt, 200);
            if is_strict {
                assert_eq!(shared, cpu, "run {i} {rules:?}");
            } else {
                same_text(&cpu, &margins, &shared, prompt.len(), &format!("run {i} {rules:?}"));
            }
        }
    }
}

/// A text whose routing repeats: with a cache the GPU has more of the experts that it uses than with a fixed share of
/// the same size. That the logits stay those of the golden model is tested above.
#[test]
fn hot_experts_come_to_the_gpu() {
    let Some(machine) = machine() else { return };
    let mut n_checked = 0;
    for golden in golden_models() {
        let file = File::open(&golden.path).unwrap();
        let model = tandem::model::describe(&file).unwrap();
        if !model.blocks.iter().any(|b| matches!(b, tandem_spec::Block::Moe(_))) {
            continue;
        }
        let uses = |expert_cache: bool| {
            let plan = plan(&model, &machine, &["blk.*.moe=cuda0:25%"], 200, 200, expert_cache);
            assert_eq!(plan.expert_cache, expert_cache);
            let engine = Engine::load(model.clone(), plan, &options(), &file, &|_| {}).unwrap();
            let mut session = Session::new(&engine).unwrap();
            let tokens: Vec<u32> = (0..150).map(|i| 3 + i % 3).collect();
            (1..tokens.len()).for_each(|n| {
                session.feed(&tokens[..n], &|| false).unwrap();
            });
            session.expert_uses().share().expect("experts were used")
        };
        let (cached, fixed) = (uses(true), uses(false));
        println!("{}: {cached:?}, fixed {fixed:?}", golden.name);
        assert!(cached > fixed, "{}: {cached:?}, fixed {fixed:?}", golden.name);
        n_checked += 1;
    }
    assert!(n_checked > 0);
}

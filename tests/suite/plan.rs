//! Plans as text for machines that need not be here, and what holds for every plan.

use proptest::prelude::*;
use std::collections::BTreeMap;
use tandem::machine::{self, KernelRate, Machine};
use tandem::plan::{self, Device, PlaceRule, Plan, Pool, Wishes, Workload, n_parts, row_unit};
use tandem_spec::testing::shapes::{self, Mix, Shape};
use tandem_spec::{Block, KvDtype, Model, Tensor, TensorType};

const GIB: u64 = 1 << 30;

fn known(name: &str) -> Machine {
    machine::known(name).unwrap()
}

fn make(model: &Model, facts: &Machine, wishes: &Wishes) -> Plan {
    let plan = plan::plan(model, facts, wishes).unwrap_or_else(|e| panic!("{e}"));
    plan.check(model).unwrap();
    plan
}

/// The printed plan, or the refusal.
fn printed(shape: &Shape, mix: Mix, machine: &str, wishes: Wishes) -> String {
    let model = shapes::model(shape, mix);
    match plan::plan(&model, &known(machine), &wishes) {
        Ok(made) => format!("{}\n{}\n", plan::text(&made, &model), plan::summary(&made)),
        Err(refusal) => format!("{refusal}\n"),
    }
}

fn rules(rules: &[&str]) -> Vec<PlaceRule> {
    rules.iter().map(|r| PlaceRule::parse(r).unwrap()).collect()
}

#[test]
fn printed_plans() {
    let plain = Wishes::default;
    let q4 = Mix::Q4KM;
    let q8 = Mix::All(TensorType::Q8_0);
    let cases: Vec<(&str, &Shape, Mix, &str, Wishes)> = vec![
        ("27b_12gb", &shapes::QWEN35_27B, q4, "rtx4070ti-12gb+ddr5-64gb", plain()),
        ("27b_16gb", &shapes::QWEN35_27B, q4, "rtx4080-16gb+ddr5-64gb", plain()),
        ("27b_q8_0_24gb", &shapes::QWEN35_27B, q8, "rtx4090+ddr5-64gb", plain()),
        ("27b_h200", &shapes::QWEN35_27B, q4, "h200+server-16c-128gb", plain()),
        (
            "27b_h200_limited_to_12gb",
            &shapes::QWEN35_27B,
            q4,
            "h200+server-16c-128gb",
            Wishes { vram: vec![12 * GIB], workload: Workload { prompt: 2048, generate: 128 }, ..plain() },
        ),
        ("27b_two_gpus", &shapes::QWEN35_27B, q4, "rtx3060-12gb+rtx3060-12gb+ddr4-32gb", plain()),
        ("35b_12gb", &shapes::QWEN35_35B, q4, "rtx4070ti-12gb+ddr5-64gb", plain()),
        ("35b_24gb", &shapes::QWEN35_35B, q4, "rtx4090+ddr5-64gb", plain()),
        (
            "35b_experts_on_cpu",
            &shapes::QWEN35_35B,
            q4,
            "h200+server-16c-128gb",
            Wishes { place: rules(&["blk.*.moe=cuda0:0%"]), ..plain() },
        ),
        ("122b_24gb", &shapes::QWEN35_122B, q4, "rtx4090+ddr5-128gb", plain()),
        ("122b_too_small", &shapes::QWEN35_122B, q4, "rtx4090+ddr5-32gb", plain()),
        ("0_8b_no_gpu", &shapes::QWEN35_0_8B, q4, "ddr4-16gb", plain()),
        ("0_8b_two_cores", &shapes::QWEN35_0_8B, q8, "cascade-lake-2c-16gb", plain()),
        ("4b_8k_of_8gb", &shapes::QWEN35_4B, q4, "rtx4060ti-16gb+ddr4-16gb", Wishes { vram: vec![2 * GIB], ..plain() }),
        ("9b_gpu_layers", &shapes::QWEN35_9B, q4, "rtx3090+ddr4-64gb", Wishes { gpu_layers: Some(17), ..plain() }),
        (
            "9b_ffn_of_ten_layers_on_cpu",
            &shapes::QWEN35_9B,
            q4,
            "rtx3090+ddr4-64gb",
            Wishes { place: rules(&["blk.(0-9).ffn=cpu"]), ..plain() },
        ),
        (
            "qwen3_8b_long_context_too_big",
            &shapes::QWEN3_8B,
            q4,
            "ddr4-16gb",
            Wishes { n_ctx: Some(131_072), ..plain() },
        ),
        (
            "27b_gpu_layers_too_many",
            &shapes::QWEN35_27B,
            q4,
            "rtx4070ti-12gb+ddr5-64gb",
            Wishes { gpu_layers: Some(65), ..plain() },
        ),
    ];
    for (name, shape, mix, machine, wishes) in cases {
        insta::assert_snapshot!(name, printed(shape, mix, machine, wishes));
    }
}

#[test]
fn wishes_that_cannot_be_met_are_refused() {
    let model = shapes::model(&shapes::QWEN35_0_8B, Mix::Q4KM);
    let refused = |machine: &str, wishes: Wishes| plan::plan(&model, &known(machine), &wishes).unwrap_err().to_string();
    let no_gpu = refused("ddr4-16gb", Wishes { gpu_layers: Some(3), ..Wishes::default() });
    assert!(no_gpu.contains("--gpu-layers asks for a GPU"), "{no_gpu}");
    let no_gpu = refused("ddr4-16gb", Wishes { vram: vec![GIB], ..Wishes::default() });
    assert!(no_gpu.contains("--vram names 1 GPUs"), "{no_gpu}");
    let unmatched = refused("ddr4-16gb", Wishes { place: rules(&["blk.99.ffn=cpu"]), ..Wishes::default() });
    assert!(unmatched.contains("matches no block"), "{unmatched}");
    let wishes = Wishes { place: rules(&["head=cuda0:50%"]), ..Wishes::default() };
    let undivided = refused("rtx3090+ddr4-16gb", wishes);
    assert!(undivided.contains("cannot be shared"), "{undivided}");
}

#[test]
fn place_rules() {
    let matches = |rule: &str, name: &str| PlaceRule::parse(rule).unwrap().matches(name);
    assert!(matches("blk.(0-9).ffn=cpu", "blk.7.ffn"));
    assert!(!matches("blk.(0-9).ffn=cpu", "blk.10.ffn"));
    assert!(!matches("blk.(0-9).ffn=cpu", "blk.7.attn"));
    assert!(matches("blk.(1,5-6)=cuda1", "blk.6.delta_net"));
    assert!(!matches("blk.(1,5-6)=cuda1", "blk.2.delta_net"));
    assert!(matches("*=cuda", "head"));
    assert!(matches("blk.*.moe=cuda0:25%", "blk.3.moe"));
    assert_eq!(PlaceRule::parse("blk.*.moe=cuda0:25%").unwrap().share, Some(0.25));
    for wrong in ["blk.0", "blk.0=gpu", "=cpu", "blk.0=cuda0:120%", "blk.0=cuda0:x", "blk.0=cudax"] {
        assert!(PlaceRule::parse(wrong).unwrap_err().contains(wrong), "{wrong}");
    }
}

#[test]
fn kv_of_the_27b() {
    let model = shapes::model(&shapes::QWEN35_27B, Mix::Q4KM);
    let facts = known("rtx4070ti-12gb+ddr5-64gb");
    let with =
        |kv_dtype| make(&model, &facts, &Wishes { n_ctx: Some(4096), kv_dtype: Some(kv_dtype), ..Wishes::default() });
    let (f32, bf16) = (with(KvDtype::F32), with(KvDtype::Bf16));
    let kv = |plan: &Plan| -> u64 { plan.account.iter().filter(|e| e.pool == Pool::Kv).map(|e| e.bytes).sum() };
    assert_eq!(kv(&f32), 512 << 20);
    assert_eq!(kv(&bf16), 256 << 20);
    let rows = |plan: &Plan| -> usize {
        let shares = model.blocks.iter().zip(&plan.places).filter(|(b, _)| matches!(b, Block::Ffn(_)));
        shares.flat_map(|(_, p)| p).filter(|s| s.device == Device::Cuda(0)).map(|s| s.part.len()).sum()
    };
    assert!(rows(&bf16) > rows(&f32));
    assert!(bf16.prediction.generate_tok_s > f32.prediction.generate_tok_s);
    let wishes = Wishes { n_ctx: Some(4096), kv_dtype: Some(KvDtype::F32), ..Wishes::default() };
    insta::assert_snapshot!("27b_why_f32_kv", plan::why(&f32, &model, &facts, &wishes));
}

/// Tensor bytes of the files that `scripts/reference` (`oracle.make_gguf --quant Q4_K_M`) writes for these shapes.
#[test]
fn released_shapes_have_the_bytes_of_their_files() {
    let files = [
        (&shapes::QWEN35_0_8B, 518_335_744usize),
        (&shapes::QWEN35_4B, 2_697_836_544),
        (&shapes::QWEN35_9B, 5_618_141_184),
        (&shapes::QWEN35_27B, 16_536_406_016),
        (&shapes::QWEN35_35B, 21_155_768_832),
        (&shapes::QWEN35_122B, 74_201_739_264),
    ];
    for (shape, bytes) in files {
        let tensors = shapes::tensors(&shapes::model(shape, Mix::Q4KM));
        assert_eq!(tensors.iter().map(Tensor::n_bytes).sum::<usize>(), bytes, "{}", shape.name);
    }
}

#[test]
fn planned_bytes_are_those_of_the_backends() {
    let wishes = Wishes { n_ctx: Some(1000), n_slots: 3, n_batch: Some(77), ..Wishes::default() };
    for (shape, mix) in [
        (&shapes::QWEN35_0_8B, Mix::Q4KM),
        (&shapes::QWEN35_9B, Mix::All(TensorType::Q8_0)),
        (&shapes::QWEN35_35B, Mix::Q4KM),
        (&shapes::QWEN3_8B, Mix::Q4KM),
    ] {
        let model = shapes::model(shape, mix);
        let blocks: Vec<usize> = (0..model.blocks.len()).collect();
        let facts = known("ddr5-64gb");
        let made = make(&model, &facts, &wishes);
        let bytes =
            |plan: &Plan, device, pools: &[Pool]| -> u64 { pools.iter().map(|p| plan.bytes(device, Some(*p))).sum() };
        let weights = tandem_cpu::Backend::planned_weight_bytes(&model, &blocks, facts.host.isa);
        assert_eq!(bytes(&made, Device::Cpu, &[Pool::Weights]), weights, "{}", shape.name);
        let size = tandem_cpu::StateSize { n_slots: 3, n_ctx: 1000, n_batch: 77, kv_dtype: made.kv_dtype };
        let state = tandem_cpu::Backend::planned_state_bytes(&model, &blocks, size, made.threads).unwrap();
        let residual = 4 * 77 * model.n_embd as u64;
        let planned = bytes(&made, Device::Cpu, &[Pool::Kv, Pool::States, Pool::Scratch]);
        assert_eq!(planned, state.total() + residual, "{}", shape.name);

        let facts = known("h200+ddr5-64gb");
        let everything = Wishes { place: rules(&["*=cuda0"]), ..wishes.clone() };
        let made = make(&model, &facts, &everything);
        let gpu = Device::Cuda(0);
        let weights = tandem_cuda::WeightsLayout::new(&model.blocks).bytes() as u64;
        assert_eq!(bytes(&made, gpu, &[Pool::Weights]), weights, "{}", shape.name);
        let options = tandem_cuda::Options { n_slots: 3, n_ctx: 1000, n_batch: 77, kv: made.kv_dtype };
        let state = tandem_cuda::StateLayout::new(&model.blocks, &options, facts.gpus[0].n_sms).bytes() as u64;
        let planned = bytes(&made, gpu, &[Pool::Kv, Pool::States, Pool::Scratch, Pool::Logits]);
        assert_eq!(planned, state, "{}", shape.name);
    }
}

/// Rates that `tandem bench -p 2048 -n 128` and the decode benchmark measured on an H200 with everything on it
/// (docs/performance.md): within 10 % for generation, 20 % for prompts.
#[test]
fn gpu_predictions_are_those_measured() {
    let facts = known("h200+server-16c-128gb");
    let measured = [
        (&shapes::QWEN35_0_8B, &[(64, 1728.0)][..], 147_979.0),
        (&shapes::QWEN35_4B, &[(64, 649.1)], 49_518.0),
        (&shapes::QWEN35_9B, &[(64, 457.1), (16416, 421.9)], 31_903.0),
        (&shapes::QWEN35_27B, &[(64, 170.7), (16448, 157.0)], 9_523.0),
        (&shapes::QWEN35_35B, &[(64, 565.4), (16448, 474.0)], 26_002.0),
    ];
    let mut wrong = Vec::new();
    for (shape, rates, prompt) in measured {
        let model = shapes::model(shape, Mix::Q4KM);
        let wishes =
            Wishes { n_ctx: Some(16640), place: rules(&["*=cuda0"]), n_batch: Some(2048), ..Wishes::default() };
        let made = make(&model, &facts, &wishes);
        for &(depth, rate) in rates {
            let predicted = made.rates_at(&model, &facts, depth, None).unwrap().0;
            println!(
                "{} at {depth}: {predicted:.1}, measured {rate}: {:+.1} %",
                shape.name,
                100.0 * (predicted / rate - 1.0)
            );
            if (predicted / rate - 1.0).abs() > 0.1 {
                wrong.push(format!("{} at {depth}: {predicted:.1}, measured {rate}", shape.name));
            }
        }
        let predicted = made.rates_at(&model, &facts, 2048, None).unwrap().1;
        println!(
            "{} prompt: {predicted:.0}, measured {prompt}: {:+.1} %",
            shape.name,
            100.0 * (predicted / prompt - 1.0)
        );
        if (predicted / prompt - 1.0).abs() > 0.2 {
            wrong.push(format!("{} prompt: {predicted:.0}, measured {prompt}", shape.name));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Where rates of kernels were measured, experts are predicted by their own: of one token, and of a prompt.
#[test]
fn measured_experts_have_rates_of_their_own() {
    let model = shapes::model(&shapes::QWEN35_35B, Mix::Q4KM);
    let wishes = Wishes { place: rules(&["blk.*.moe=cuda0:0%"]), ..Wishes::default() };
    let predicted = |experts_gb_per_s, experts_prompt_gflops| {
        let mut facts = known("rtx4070ti-12gb+ddr5-64gb");
        let rate = |ty| KernelRate {
            ty,
            decode_gb_per_s: 60.0,
            experts_gb_per_s,
            prompt_gflops: 2000.0,
            experts_prompt_gflops,
        };
        facts.host.kernels = [TensorType::Q4_K, TensorType::Q6_K].map(rate).to_vec();
        facts.gpus[0].pinned_gb_per_s = 1.0; // so that prompts are not streamed
        make(&model, &facts, &wishes).prediction
    };
    let (now, token, prompt) = (predicted(50.0, 1000.0), predicted(25.0, 1000.0), predicted(50.0, 500.0));
    assert!(token.generate_tok_s < 0.65 * now.generate_tok_s && token.generate_tok_s > 0.45 * now.generate_tok_s);
    assert!(!now.prompt_streams);
    assert!(prompt.prompt_tok_s < 0.7 * now.prompt_tok_s, "{} of {}", prompt.prompt_tok_s, now.prompt_tok_s);
    assert_eq!(prompt.generate_tok_s, now.generate_tok_s);
}

#[test]
fn saved_plans_are_checked() {
    let model = shapes::model(&shapes::QWEN35_4B, Mix::Q4KM);
    let made = make(&model, &known("rtx3060-12gb+ddr4-32gb"), &Wishes { vram: vec![2 * GIB], ..Wishes::default() });
    let saved: Plan = serde_json::from_str(&serde_json::to_string(&made).unwrap()).unwrap();
    assert_eq!(saved.places, made.places);
    saved.check(&model).unwrap();
    assert!(saved.check(&shapes::model(&shapes::QWEN35_9B, Mix::Q4KM)).unwrap_err().contains("the shares end at 9216"));
    let other = shapes::model(&shapes::QWEN35_4B, Mix::All(TensorType::Q8_0));
    assert!(saved.check(&other).unwrap_err().contains("not those of this model"));
    let mut small = saved.clone();
    small.limits.iter_mut().for_each(|limit| limit.bytes = limit.bytes.min(GIB));
    assert!(small.check(&model).unwrap_err().contains("the plan's limit is 1073741824"));
    let mut cut = saved.clone();
    cut.places.pop();
    assert!(cut.check(&model).unwrap_err().contains("another model"));
    let mut gap = saved.clone();
    gap.places[2].remove(0);
    assert!(gap.check(&model).is_err());
}

#[test]
fn shipped_facts_parse() {
    let (cards, hosts) = machine::known_names();
    for card in &cards {
        let facts = known(&format!("{card}+{}", hosts[0]));
        assert!(facts.gpus[0].vram_free < facts.gpus[0].vram_total, "{card}");
        assert!(facts.gpus[0].pageable_gb_per_s < facts.gpus[0].pinned_gb_per_s, "{card}");
        assert_eq!(facts.check(), Ok(()), "{card}");
    }
    for host in &hosts {
        let facts = known(host);
        assert!(facts.host.read.is_sorted_by(|a, b| a.threads < b.threads && a.gb_per_s <= b.gb_per_s), "{host}");
        assert_eq!(serde_json::from_str::<Machine>(&serde_json::to_string(&facts).unwrap()).unwrap(), facts);
    }
    assert!(machine::known("rtx9999+ddr4-16gb").unwrap_err().contains("`rtx9999` is no shipped part"));
    assert!(machine::known("rtx3090").unwrap_err().contains("names no host"));
}

/// Facts that somebody wrote down wrongly are refused, not divided by.
#[test]
fn wrong_facts_are_refused() {
    let wrong = |change: &dyn Fn(&mut Machine)| {
        let mut facts = known("rtx3090+ddr4-64gb");
        assert_eq!(facts.check(), Ok(()));
        change(&mut facts);
        facts.check().unwrap_err()
    };
    assert!(wrong(&|m| m.host.read.clear()).contains("not be empty"));
    assert!(wrong(&|m| m.host.read[0].threads = 0).contains("at least 1"));
    assert!(wrong(&|m| m.host.read[0].threads = 1000).contains("ascend"));
    assert!(wrong(&|m| m.host.read[1].gb_per_s = 0.0).contains("larger than 0"));
    assert!(wrong(&|m| m.gpus[0].pinned_gb_per_s = -1.0).contains("larger than 0"));
    assert!(wrong(&|m| m.gpus[0].launch_us = -1.0).contains("not negative"));
    assert!(wrong(&|m| m.host.ram_available = u64::MAX).contains("less than"));
}

/// Weights are streamed to the tensor cores, which no batch of less than 16 tokens uses, however slow the CPU is.
#[test]
fn short_prompts_are_not_predicted_as_streamed() {
    let mut facts = known("h200+server-16c-128gb");
    facts.host.read.iter_mut().for_each(|rate| rate.gb_per_s = 1.0);
    let model = shapes::model(&shapes::QWEN35_27B, Mix::Q4KM);
    let plan = |prompt| {
        let workload = Workload { prompt, generate: 8 };
        make(&model, &facts, &Wishes { workload, vram: vec![12 * GIB], ..Wishes::default() })
    };
    assert!(!plan(15).prediction.prompt_streams);
    let streaming = plan(512);
    assert_eq!(streaming.stream_from, Some(16));
    let seconds = |n: usize| n as f64 / streaming.rates_at(&model, &facts, n, None).unwrap().1;
    assert!(seconds(15) > seconds(16), "{} and {}", seconds(15), seconds(16));
}

/// The rate for a routing: between those where a GPU has all experts of every token and none, and for uniform routing
/// that of the plan.
#[test]
fn rates_follow_the_routing() {
    let facts = known("h200+server-16c-128gb");
    let model = shapes::model(&shapes::QWEN35_35B, Mix::Q4KM);
    let place = rules(&["blk.*.moe=cuda0:50%"]);
    let plan = make(&model, &facts, &Wishes { place, ..Wishes::default() });
    let rate = |misses: Option<&[f64]>| plan.rates_at(&model, &facts, 512, misses).unwrap().0;
    let n_used = 8;
    // One expert drawn after the other.
    let mut uniform = vec![0.0; n_used + 1];
    uniform[0] = 1.0;
    for drawn in 0..n_used {
        for k in (0..=drawn).rev() {
            let is_cpu = (128 - k) as f64 / (256 - drawn) as f64;
            uniform[k + 1] += uniform[k] * is_cpu;
            uniform[k] *= 1.0 - is_cpu;
        }
    }
    let only = |k: usize| (0..=n_used).map(|i| if i == k { 1.0 } else { 0.0 }).collect::<Vec<_>>();
    assert!((rate(Some(&uniform)) / rate(None) - 1.0).abs() < 1e-3, "{} and {}", rate(Some(&uniform)), rate(None));
    let (hits, half, misses) = (rate(Some(&only(0))), rate(Some(&only(4))), rate(Some(&only(8))));
    assert!(hits > half && half > rate(None) && rate(None) > misses, "{hits}, {half}, {}, {misses}", rate(None));
}

fn any_shape() -> impl Strategy<Value = Shape> {
    let dense = (1usize..40).prop_map(|n| (64 * n, (0, 0, 0)));
    let moe = (2usize..40, 1usize..8, 1usize..4).prop_map(|(n, used, ff)| (0, (n, used.min(n), 32 * ff)));
    (
        (1usize..6, 1usize..9, 1usize..4, any::<bool>(), any::<bool>()),
        prop_oneof![dense, moe],
        (1usize..3, 100usize..3000),
    )
        .prop_map(|((embd, layers, heads, recurrent, tied), (n_ff, experts), (kv, vocab))| Shape {
            name: "random",
            n_embd: 128 * embd,
            n_layers: layers,
            n_heads: heads * kv,
            n_kv_heads: kv,
            head_dim: 64,
            n_ff,
            n_v_heads: if recurrent { 4 } else { 0 },
            delta: (2, 32),
            interval: 3,
            experts,
            n_vocab: vocab,
            tied,
        })
}

fn any_machine() -> impl Strategy<Value = Machine> {
    let card = prop::sample::select(vec!["rtx3060-12gb", "rtx4090", "h200"]);
    let host = prop::sample::select(vec!["ddr4-16gb", "cascade-lake-2c-16gb", "server-16c-128gb"]);
    (prop::collection::vec((card, 0u64..200), 0..4), host, 600u64..1200).prop_map(|(cards, host, ram)| {
        let names: Vec<&str> = cards.iter().map(|c| c.0).chain([host]).collect();
        let mut facts = known(&names.join("+"));
        for (gpu, (_, mib)) in facts.gpus.iter_mut().zip(&cards) {
            gpu.vram_free = (320 + mib) << 20;
        }
        facts.host.ram_available = ram << 20;
        facts
    })
}

fn any_wishes() -> impl Strategy<Value = Wishes> {
    let kv = prop::option::of(prop::sample::select(vec![KvDtype::F32, KvDtype::Bf16]));
    let batch = prop::option::of(1usize..600);
    let layers = prop_oneof![9 => Just(None), 1 => (0usize..10).prop_map(Some)];
    (1usize..5000, kv, batch, 0usize..3000, 1usize..400, layers, 1usize..4).prop_map(
        |(n_ctx, kv_dtype, n_batch, prompt, generate, gpu_layers, n_slots)| Wishes {
            n_ctx: Some(n_ctx),
            n_slots,
            kv_dtype,
            n_batch,
            workload: Workload { prompt, generate },
            gpu_layers,
            ..Wishes::default()
        },
    )
}

fn seconds(plan: &Plan) -> f64 {
    plan.prediction.prompt_s + 1e-3 * plan.prediction.token_ms * plan.workload.generate as f64
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn plans_hold(shape in any_shape(), facts in any_machine(), wishes in any_wishes(), more in 1u64..300, mix in 0..2) {
        let model = shapes::model(&shape, if mix == 0 { Mix::Q4KM } else { Mix::All(TensorType::Q8_0) });
        let made = plan::plan(&model, &facts, &wishes);
        prop_assert_eq!(&plan::plan(&model, &facts, &wishes), &made, "not deterministic");
        let mut larger = facts.clone();
        larger.gpus.iter_mut().for_each(|g| g.vram_free += more << 20);
        let with_more = plan::plan(&model, &larger, &wishes);
        let Ok(made) = made else {
            let refusal = made.unwrap_err();
            prop_assert!(!refusal.reason.is_empty());
            let all_fit = refusal.needs.iter().all(|n| n.needed <= n.available);
            prop_assert!(refusal.needs.is_empty() || !all_fit, "refused, but everything fits: {}", refusal);
            return Ok(());
        };
        // Every part of every block once, at whole units.
        prop_assert_eq!(made.check(&model), Ok(()));
        for (block, place) in model.blocks.iter().zip(&made.places) {
            prop_assert_eq!(place.iter().map(|s| s.part.len()).sum::<usize>(), n_parts(block));
            if let Block::Ffn(b) = block {
                let inner = &place[..place.len() - 1];
                prop_assert!(inner.iter().all(|s| s.part.end % row_unit(b) == 0));
            }
        }
        // Every tensor's bytes: at least those of the file, and no more than alignment and a panel of 16 rows add.
        let mut planned: BTreeMap<&str, u64> = BTreeMap::new();
        for e in made.account.iter().filter(|e| e.pool == Pool::Weights) {
            *planned.entry(&e.name).or_default() += e.bytes;
        }
        let n_devices = made.limits.len() as u64;
        for block in &model.blocks {
            let mut wrong = None;
            block.for_each(&mut |w| {
                let (file, now) = (w.n_bytes() as u64, planned.get(w.name.as_str()).copied().unwrap_or(0));
                let is_twice = shape.tied && w.name == "token_embd.weight" || made.expert_cache && w.name.contains("_exps");
                let copies = if is_twice { 2 } else { 1 };
                if now < file || now > copies * (file + n_devices * (256 + 16 * w.row_bytes() as u64)) {
                    wrong = Some((w.name.clone(), file, now));
                }
            });
            prop_assert_eq!(wrong, None);
        }
        // Never more than there is; pools sum to the total.
        for limit in &made.limits {
            let used = made.bytes(limit.device, None);
            prop_assert!(used <= limit.bytes || (limit.device != Device::Cpu && used == 0));
            let mut pools: BTreeMap<Pool, u64> = BTreeMap::new();
            for e in made.account.iter().filter(|e| e.device == limit.device) {
                *pools.entry(e.pool).or_default() += e.bytes;
            }
            prop_assert_eq!(pools.values().sum::<u64>(), used);
        }
        // The times of the groups are the time of a token.
        let p = &made.prediction;
        let parts: f64 = p.groups.iter().map(|g| g.token_ms).sum::<f64>() + p.handoff_ms + p.fixed_ms;
        prop_assert!((parts - p.token_ms).abs() <= 1e-9 * p.token_ms, "{} of {} ms", parts, p.token_ms);
        prop_assert!(p.generate_tok_s.is_finite() && p.generate_tok_s > 0.0);
        // More memory never hurts, but for what experts that follow the routing may cost where routing is uniform.
        let with_more = with_more.unwrap_or_else(|e| panic!("refused with more memory: {e}"));
        let worth = if with_more.expert_cache { 1.25 } else { 1.0 + 1e-12 };
        prop_assert!(seconds(&with_more) <= seconds(&made) * worth, "{} s, with more {} s", seconds(&made), seconds(&with_more));
    }
}

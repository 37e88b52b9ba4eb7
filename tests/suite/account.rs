//! What a plan counts is what is allocated, by device and pool, for every golden model and the bundled one: on the
//! CPU, and on a GPU where there is one (else that part says why it is skipped).

use super::allocations::allocated;
use super::golden::golden_models;
use super::gpu::gpu;
use std::collections::BTreeMap;
use tandem::engine::{DeviceOptions, Engine};
use tandem::gguf::File;
use tandem::machine;
use tandem::plan::{self, Device, PlaceRule, Plan, Pool, Wishes};
use tandem_cpu::Isa;
use tandem_spec::{Batch, KvDtype, Model};

/// Every golden model, and the bundled one.
fn models() -> Vec<(String, File)> {
    let open = |path: &std::path::Path| File::open(path).unwrap_or_else(|e| panic!("{e}"));
    let mut files: Vec<_> = golden_models().iter().map(|g| (g.name.clone(), open(&g.path))).collect();
    files.push((
        "story".into(),
        open(&[env!("CARGO_MANIFEST_DIR"), "models", "story-q4_k_m.gguf"].iter().collect::<std::path::PathBuf>()),
    ));
    files
}

/// The file as the plan for a machine of two cores and, if there are multiprocessors, an H200 with as many has it.
fn load(file: &File, n_sms: usize, wishes: &Wishes) -> Engine {
    let model: Model = tandem::model::describe(file).unwrap();
    let mut facts = machine::known(if n_sms > 0 { "h200+ddr4-16gb" } else { "ddr4-16gb" }).unwrap();
    facts.gpus.iter_mut().for_each(|gpu| gpu.n_sms = n_sms);
    facts.host.isa = Isa::detect();
    facts.host.read.iter_mut().for_each(|rate| rate.gb_per_s = 1e-3); // so that streaming its weights pays
    let plan = plan::plan(&model, &facts, wishes).unwrap_or_else(|e| panic!("{e}"));
    let cuda_libs = std::env::var_os("TANDEM_CUDA_LIBS").map(Into::into);
    let cubin_cache = Some(std::env::temp_dir().join("tandem-test-cubins"));
    let options = DeviceOptions { isa: facts.host.isa, cuda_libs, cubin_cache };
    Engine::load(model, plan, &options, file, &|_| {}).unwrap_or_else(|e| panic!("{e}"))
}

/// Planned bytes of what tandem allocates, by device and pool; copies of states are not there yet.
fn planned(plan: &Plan) -> BTreeMap<(Device, Pool), u64> {
    let mut bytes = BTreeMap::new();
    for e in plan.account.iter().filter(|e| e.pool.is_ours() && e.pool != Pool::Snapshots && e.bytes > 0) {
        *bytes.entry((e.device, e.pool)).or_default() += e.bytes;
    }
    bytes
}

/// Runs the largest batch and a token, and returns the bytes that were allocated by then.
fn used(engine: &Engine) -> BTreeMap<(Device, Pool), u64> {
    let plan = engine.plan();
    let (states, heap) = allocated(|| engine.states().unwrap());
    let mut states = states;
    // What lies on the heap is within scratch; the rest is mapped.
    let most = plan.bytes(Device::Cpu, Some(Pool::Scratch));
    assert!(heap.peak as u64 <= most + (64 << 10), "{heap:?} of {most}");
    let n = plan.n_batch.min(plan.n_ctx - 1);
    let tokens: Vec<u32> = (0..n as u32).map(|t| t * 7 % engine.model().n_vocab as u32).collect();
    engine.step(&mut states, &Batch::single(0, 0, &tokens, plan.n_logits >= n)).unwrap();
    engine.step(&mut states, &Batch::single(0, n, &[1], false)).unwrap();
    let mut bytes = BTreeMap::new();
    for (device, pool, n) in engine.bytes(&states).into_iter().filter(|(.., n)| *n > 0) {
        *bytes.entry((device, pool)).or_default() += n;
    }
    bytes
}

fn wishes() -> Vec<Wishes> {
    let one = Wishes { n_ctx: Some(75), n_batch: Some(33), threads: Some(2), ..Wishes::default() };
    let all = Wishes { n_slots: 3, kv_dtype: Some(KvDtype::F32), all_logits: true, ..one.clone() };
    vec![one, all]
}

#[test]
fn planned_bytes_are_allocated_on_the_cpu() {
    for (name, file) in models() {
        for wishes in wishes() {
            let engine = load(&file, 0, &wishes);
            assert_eq!(planned(engine.plan()), used(&engine), "{name}");
        }
    }
}

#[test]
fn planned_bytes_are_allocated_on_a_gpu() {
    let Some((device, _)) = gpu() else { return };
    for (name, file) in models() {
        for wishes in wishes() {
            let place = vec![PlaceRule::parse("*=cuda0").unwrap()];
            let engine = load(&file, device.n_sms(), &Wishes { place, ..wishes });
            assert_eq!(planned(engine.plan()), used(&engine), "{name}");
        }
    }
}

/// With shares of the CPU that are streamed to the GPU.
#[test]
fn planned_bytes_of_streams_are_allocated() {
    let Some((device, _)) = gpu() else { return };
    for (name, file) in models() {
        let names: Vec<String> = tandem::model::describe(&file).unwrap().blocks.iter().map(|b| b.name()).collect();
        for wishes in wishes() {
            let rules = ["*=cuda0", "blk.*.ffn=cuda0:50%", "blk.*.moe=cuda0:0%"].map(|r| PlaceRule::parse(r).unwrap());
            let place = rules.into_iter().filter(|r| names.iter().any(|name| r.matches(name))).collect();
            let engine = load(&file, device.n_sms(), &Wishes { place, ..wishes });
            let is_shared = engine.plan().places.iter().any(|place| place.len() > 1);
            assert_eq!(engine.plan().stream_from.is_some(), is_shared, "{name}");
            assert_eq!(planned(engine.plan()), used(&engine), "{name}");
        }
    }
}

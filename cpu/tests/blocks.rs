//! Every block on every instruction set of this processor against the exact reference, over the table of cases:
//! several sequences a step, every worker count, snapshots, and any cut of a prompt. Prints which were run.

use std::collections::BTreeMap;
use tandem_cpu::{Backend, Isa, Options, StateSize};
use tandem_spec::testing::{Buffers, Case, Poisoned, Shape, cases, relative_rms_of_rows};
use tandem_spec::{Batch, Block, KvDtype, Model, Weight};

fn isas() -> Vec<Isa> {
    let isas: Vec<_> = [Isa::Avx512, Isa::Avx2, Isa::Portable].into_iter().filter(|i| i.is_available()).collect();
    println!("instruction sets: {}", isas.iter().map(|i| i.name()).collect::<Vec<_>>().join(", "));
    isas
}

fn model(case: &Case, block: Block<Weight>) -> Model {
    Model {
        arch: "test".into(),
        name: case.name.clone(),
        n_embd: case.n_embd(),
        n_vocab: case.n_vocab(),
        n_layers: 1,
        n_ctx_train: 1024,
        blocks: vec![block],
        mtp: None,
    }
}

fn load(model: &Model, source: &Buffers, isa: Isa, threads: usize) -> Backend {
    let indices: Vec<usize> = (0..model.blocks.len()).collect();
    Backend::load(model, &indices, source, Options { threads, isa }, &|_| {}).expect("the backend loads")
}

fn size(case: &Case) -> StateSize {
    let n_batch = case.steps.iter().map(|runs| runs.iter().map(|r| r.1).sum()).max().unwrap_or(1);
    StateSize { n_slots: case.n_slots, n_ctx: 600, n_batch, kv_dtype: case.kv_dtype }
}

/// What a case gives, in the form of [`Case::expected`].
fn run(case: &Case, backend: &Backend, inputs: &[(Batch, Vec<f32>)]) -> Vec<Vec<f32>> {
    let mut state = backend.state(size(case)).expect("memory");
    let step = |(batch, before): &(Batch, Vec<f32>)| {
        let mut x = Poisoned::new(before.len());
        x.out().copy_from_slice(before);
        let is_head = matches!(case.shape, Shape::Head(_));
        let mut logits = Poisoned::new(if is_head { batch.wanted.len() * case.n_vocab() } else { 0 });
        backend.run(0..1, batch, &mut state, x.out(), logits.out()).expect("the step runs");
        match case.shape {
            Shape::Head(_) => logits.checked().to_vec(),
            Shape::Embed { .. } => x.checked().to_vec(),
            _ => x.checked().iter().zip(before).map(|(x, b)| x - b).collect(),
        }
    };
    inputs.iter().map(step).collect()
}

/// Largest error of a row that a case may have: that of f32 sums, or of what else is rounded.
fn bound(case: &Case) -> f64 {
    match (case.types.iter().any(|ty| ty.is_quantised()), &case.shape) {
        // Activations have 8 bits. The norm of a delta net's heads amplifies that at the first positions, where o is small.
        (true, Shape::DeltaNet(_)) => 0.15,
        (true, _) => 0.05,
        // A key or value that lies between two bf16 numbers may be rounded to the other one.
        (false, _) if case.kv_dtype == KvDtype::Bf16 => 1e-3,
        (false, _) => 2e-5,
    }
}

#[test]
fn blocks_match_the_reference() {
    let isas = isas();
    let mut worst: BTreeMap<(&str, &str, bool), (f64, String)> = BTreeMap::new();
    let mut failures = Vec::new();
    for case in cases() {
        let (block, source) = case.block();
        let inputs = case.inputs();
        let expected = case.expected(&block, &source, &inputs);
        let n_cols = if matches!(case.shape, Shape::Head(_)) { case.n_vocab() } else { case.n_embd() };
        let model = model(&case, block);
        for &isa in &isas {
            for threads in [1, 3] {
                let backend = load(&model, &source, isa, threads);
                for (step, (got, want)) in run(&case, &backend, &inputs).iter().zip(&expected).enumerate() {
                    let error = relative_rms_of_rows(got, want, n_cols);
                    if error > bound(&case) {
                        failures.push(format!(
                            "{} on {}, {threads} threads, step {step}: {error:e}",
                            case.name,
                            isa.name()
                        ));
                    }
                    let quantised = case.types.iter().any(|ty| ty.is_quantised());
                    let entry = worst.entry((isa.name(), model.blocks[0].kind(), quantised)).or_default();
                    if error > entry.0 {
                        *entry = (error, case.name.clone());
                    }
                }
            }
        }
    }
    for ((isa, kind, quantised), (error, name)) in worst {
        let kind = format!("{kind}{}", if quantised { ", quantised" } else { "" });
        println!("{isa:8} {kind:22} worst row {error:.2e} ({name})");
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

//! Golden models on a GPU: prompts in one batch, in chunks and token by token, and the decode graph. Skipped, with the
//! reason, where there is no GPU.

use super::golden::{golden_models, numbers, tokens};
use super::gpu::gpu;
use tandem::gguf::File;
use tandem::model::describe;
use tandem_cuda::{Backend, Feed, Options};
use tandem_spec::testing::relative_rms;
use tandem_spec::{Batch, KvDtype};

/// Floats throughout: rounding of f32 sums, and of the chip's own exp and log, over a whole model.
const BOUND_FLOAT: f64 = 5e-5;

/// Prompts in batches of many tokens.
#[test]
fn cuda_gives_the_golden_logits_in_chunks() {
    check_golden(&[200, 64], false);
}

/// The kernels for few tokens.
#[test]
fn cuda_gives_the_golden_logits_in_chunks_of_a_few_tokens() {
    check_golden(&[7], false);
}

#[test]
fn cuda_gives_the_golden_logits_token_by_token() {
    check_golden(&[1], true);
}

/// Every golden model, its prompts in chunks of so many tokens, and by the decode graph.
fn check_golden(chunks: &[usize], by_graph: bool) {
    let Some((device, compiler)) = gpu() else { return };
    let mut failed = Vec::new();
    for golden in golden_models() {
        let file = File::open(&golden.path).unwrap_or_else(|e| panic!("{}: {e}", golden.name));
        let model = describe(&file).unwrap_or_else(|e| panic!("{}: {e}", golden.name));
        let options = Options { n_slots: 2, n_ctx: 200, n_batch: 200, kv: KvDtype::F32 };
        let backend = Backend::load(&device, compiler(), &model.blocks, &file, &options, &mut |_, _| {})
            .unwrap_or_else(|e| panic!("{}: {e}", golden.name));
        let mut state = backend.state().unwrap();
        let n_blocks = model.blocks.len();
        for prompt in golden.prompts() {
            let (ids, positions) = (tokens(&prompt["tokens"]), numbers(&prompt["positions"]));
            let want = golden.array(&prompt["logits"]);
            // Twice what rounding of activations to 8 bits does in an exact computation.
            let rounded = prompt["rounded_activations"]["rel_rms"].as_f64();
            let bound = rounded.map_or(BOUND_FLOAT, |rounded| 2.0 * rounded);
            let mut check = |how: &str, got: &[f32]| {
                let error = relative_rms(got, &want);
                println!("{:18} {:5} {how:10} {error:.2e} of {bound:.2e}", golden.name, prompt["name"]);
                if error.is_nan() || error > bound {
                    failed.push(format!("{} {} {how}: {error:.2e} over {bound:.2e}", golden.name, prompt["name"]));
                }
            };
            for &chunk in chunks {
                let mut got = Vec::new();
                for (at, part) in ids.chunks(chunk).enumerate().map(|(i, part)| (i * chunk, part)) {
                    let mut batch = Batch::single(1, at, part, false);
                    batch.wanted = (0..part.len()).filter(|row| positions.contains(&(at + row))).collect();
                    let mut logits = vec![f32::NAN; batch.wanted.len() * model.n_vocab];
                    backend.run(&mut state, 0..n_blocks, &batch, &mut [], &mut logits).unwrap();
                    got.extend(logits);
                }
                check(&format!("chunks {chunk}"), &got);
            }
            if !by_graph {
                continue;
            }
            let mut got = Vec::new();
            for (position, token) in ids.iter().enumerate() {
                let chosen = backend.decode(&mut state, &[Feed { slot: 0, position, token: *token }]).unwrap();
                if positions.contains(&position) {
                    let mut logits = vec![f32::NAN; model.n_vocab];
                    backend.logits(&state, &mut logits).unwrap();
                    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    assert_eq!(logits.iter().position(|x| *x == best), Some(chosen[0] as usize), "{}", golden.name);
                    got.extend(logits);
                }
            }
            check("graph", &got);
        }
        if !by_graph {
            continue;
        }
        let slots = [0, 1].map(|slot| Feed { slot, position: 0, token: 1 + slot as u32 });
        let two = backend.decode(&mut state, &slots).unwrap();
        let alone: Vec<u32> = slots.iter().map(|feed| backend.decode(&mut state, &[*feed]).unwrap()[0]).collect();
        assert_eq!(two, alone, "{}: two sequences in one step", golden.name);
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

//! Golden models: tiny files of every architecture with logits from the oracle in `scripts/reference`.

use serde_json::Value;
use std::path::PathBuf;
use tandem::gguf::File;
use tandem::model::describe;
use tandem_spec::testing::{max_abs, relative_rms};
use tandem_spec::{Batch, DeltaForm, KvDtype, Reference, Sequence};

/// One golden model: its file, its expected arrays and what the manifest says about them.
pub struct Golden {
    pub name: String,
    pub path: PathBuf,
    entry: Value,
    data: Vec<u8>,
}

fn folder() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "golden"].iter().collect()
}

/// Every model of the manifest.
pub fn golden_models() -> Vec<Golden> {
    let manifest = std::fs::read(folder().join("manifest.json")).expect("manifest.json");
    let manifest: Value = serde_json::from_slice(&manifest).expect("manifest.json is JSON");
    let models = manifest["models"].as_array().expect("a list of models");
    let golden = |entry: &Value| {
        let text = |key: &str| entry[key].as_str().expect("text").to_string();
        let data = std::fs::read(folder().join(text("data"))).expect("expected arrays");
        Golden { name: text("name"), path: folder().join(text("model")), entry: entry.clone(), data }
    };
    let found: Vec<Golden> = models.iter().map(golden).collect();
    assert!(found.len() >= 15, "only {} golden models", found.len());
    found
}

impl Golden {
    /// The array that `place` (offset and shape) describes.
    pub fn array(&self, place: &Value) -> Vec<f64> {
        let at = number(&place["offset"]);
        let n: usize = numbers(&place["shape"]).iter().product();
        let values = self.data[at..at + 4 * n].chunks_exact(4);
        values.map(|b| f64::from(f32::from_le_bytes(b.try_into().expect("four bytes")))).collect()
    }

    pub fn prompts(&self) -> &[Value] {
        self.entry["prompts"].as_array().expect("prompts")
    }

    fn reference(&self, form: DeltaForm) -> Reference {
        let file = File::open(&self.path).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        let model = describe(&file).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        Reference::new(&model, &file, 2, KvDtype::F32, form)
    }
}

fn number(value: &Value) -> usize {
    value.as_u64().unwrap_or_else(|| panic!("a number, not {value}")) as usize
}

pub fn numbers(value: &Value) -> Vec<usize> {
    value.as_array().expect("a list").iter().map(number).collect()
}

pub fn tokens(value: &Value) -> Vec<u32> {
    numbers(value).into_iter().map(|t| t as u32).collect()
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|x| *x as f32).collect()
}

/// Expected arrays are f32 of order 1, and so is a cache of keys and values: beyond their rounding nothing differs.
const REFERENCE_BOUND: f64 = 1e-5;

/// The reference gives the oracle's logits for every model and prompt, whatever the types of the weights: token by
/// token with the recurrent delta rule, and as one batch with the chunked one.
#[test]
fn reference_gives_the_golden_logits() {
    for golden in golden_models() {
        for (form, chunk) in [(DeltaForm::Recurrent, 1), (DeltaForm::Chunked(64), usize::MAX)] {
            let mut reference = golden.reference(form);
            for prompt in golden.prompts() {
                let (ids, positions) = (tokens(&prompt["tokens"]), numbers(&prompt["positions"]));
                let mut got = Vec::new();
                for at in (0..ids.len()).step_by(chunk.min(ids.len())) {
                    let n_tokens = chunk.min(ids.len());
                    let mut batch = Batch::single(1, at, &ids[at..at + n_tokens], false);
                    batch.wanted = (0..n_tokens).filter(|row| positions.contains(&(at + row))).collect();
                    got.extend(reference.step(&batch).logits);
                }
                let error = max_abs(&narrow(&got), &golden.array(&prompt["logits"]));
                assert!(error < REFERENCE_BOUND, "{} {} {form:?}: {error:e}", golden.name, prompt["name"]);
            }
        }
    }
}

/// The residual stream after the embedding and after every layer: tells which layer goes wrong first.
#[test]
fn reference_gives_the_golden_residual_stream() {
    for golden in golden_models() {
        let stream = &golden.entry["residual_stream"];
        let n_embd = number(&golden.entry["embedding"]);
        let prompt = golden.prompts().iter().find(|p| p["name"] == stream["prompt"]).expect("the prompt of the stream");
        let ids = tokens(&prompt["tokens"]);
        let result = golden.reference(DeltaForm::Recurrent).step(&Batch::single(0, 0, &ids, false));
        // After the embedding, then after the second block (the feed-forward) of each layer.
        let row = number(&stream["position"]);
        let after_layers = result.trace.iter().step_by(2);
        let got: Vec<f64> = after_layers.flat_map(|x| &x[row * n_embd..(row + 1) * n_embd]).copied().collect();
        let want = golden.array(stream);
        assert_eq!(got.len(), want.len(), "{}", golden.name);
        for (layer, (got, want)) in got.chunks(n_embd).zip(want.chunks(n_embd)).enumerate() {
            let error = relative_rms(&narrow(got), want);
            assert!(error < 1e-6, "{}, after {layer} layers: {error:e}", golden.name);
        }
    }
}

/// The multi-token-prediction block: over the prompt, with and without a first row of zeros, and over three drafted
/// tokens.
#[test]
fn reference_gives_the_golden_draft_logits() {
    let mut n_checked = 0;
    for golden in golden_models().iter().filter(|g| g.entry["mtp"] == Value::Bool(true)) {
        for prompt in golden.prompts() {
            let ids = tokens(&prompt["tokens"]);
            let mut reference = golden.reference(DeltaForm::Recurrent);
            let trunk = reference.step(&Batch::single(0, 0, &ids, true)).hidden;
            let n_embd = trunk.len() / ids.len();
            let last = &trunk[trunk.len() - n_embd..];
            let error = max_abs(&narrow(last), &golden.array(&prompt["mtp"]["hidden_last"]));
            assert!(error < REFERENCE_BOUND, "{} {} hidden: {error:e}", golden.name, prompt["name"]);

            let zeros = vec![0.0; n_embd];
            let shifted = [&zeros, &trunk[..trunk.len() - n_embd]].concat();
            let layouts = [("pairs", &ids[1..], &shifted[n_embd..]), ("pairs_after_zero_row", &ids[..], &shifted[..])];
            for (slot, (key, row_tokens, previous)) in layouts.into_iter().enumerate() {
                let expected = &prompt["mtp"][key];
                let check = |got: &[f64], place: &Value, what: &str| {
                    let error = max_abs(&narrow(got), &golden.array(place));
                    assert!(error < REFERENCE_BOUND, "{} {} {key} {what}: {error:e}", golden.name, prompt["name"]);
                };
                let mut run = Sequence { slot, position: 0, n_tokens: row_tokens.len() };
                if !row_tokens.is_empty() {
                    let (_, logits) = reference.step_mtp(row_tokens, previous, &run);
                    let n_vocab = logits.len() / run.n_tokens;
                    let rows = numbers(&expected["rows"]);
                    let kept: Vec<f64> =
                        rows.iter().flat_map(|r| &logits[r * n_vocab..(r + 1) * n_vocab]).copied().collect();
                    check(&kept, &expected["logits"], "rows");
                }
                let mut drafted = Vec::new();
                let mut previous = last.to_vec();
                let fed =
                    [&[number(&expected["draft"]["after"]) as u32], &tokens(&expected["draft"]["tokens"])[..]].concat();
                for token in &fed[..fed.len() - 1] {
                    run = Sequence { slot, position: run.position + run.n_tokens, n_tokens: 1 };
                    let (hidden, logits) = reference.step_mtp(&[*token], &previous, &run);
                    previous = hidden;
                    drafted.extend(logits);
                }
                check(&drafted, &expected["draft"]["logits"], "draft");
                n_checked += 1;
            }
        }
    }
    assert!(n_checked > 0, "no golden model has a multi-token-prediction block");
}

/// Sequences of different lengths in one batch give what each gives alone.
#[test]
fn reference_keeps_the_sequences_of_a_batch_apart() {
    for golden in golden_models().iter().filter(|g| g.entry["quant"] == "F32") {
        let ids: Vec<Vec<u32>> = golden.prompts().iter().map(|p| tokens(&p["tokens"])).collect();
        let (long, short) = (&ids[2], &ids[1]);
        let mut alone = golden.reference(DeltaForm::Recurrent);
        let want = [alone.step(&Batch::single(0, 0, long, false)), alone.step(&Batch::single(1, 0, short, false))];
        let want: Vec<f64> = want.into_iter().flat_map(|r| r.logits).collect();
        let batch = Batch {
            tokens: [&long[..], short].concat(),
            sequences: vec![
                Sequence { slot: 1, position: 0, n_tokens: long.len() },
                Sequence { slot: 0, position: 0, n_tokens: short.len() },
            ],
            wanted: vec![long.len() - 1, long.len() + short.len() - 1],
        };
        let got = golden.reference(DeltaForm::Chunked(64)).step(&batch).logits;
        let error = max_abs(&narrow(&got), &want);
        assert!(error < REFERENCE_BOUND, "{}: {error:e}", golden.name);
    }
}

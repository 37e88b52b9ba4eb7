//! Crafted files: each must be refused with an error that names the file, the place, what was expected and what was
//! found, without allocating more than the file justifies.

#[path = "../../scripts/make_corpus.rs"]
mod make_corpus;

use super::allocations::allocated;
pub(crate) use make_corpus::craft;
use make_corpus::{Case, Stage, cases};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tandem::cli::inspect::inspect;
use tandem::gguf::{Error, File};
use tandem::model;
use tandem::text::{ChatTemplate, Tokenizer, Vocabulary};

const ARCHITECTURES: [&str; 7] = ["qwen35", "qwen35moe", "qwen3next", "qwen3", "qwen3moe", "qwen2", "llama"];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus")
}

/// Path of the file of a case that is to be opened.
fn path(case: &Case) -> PathBuf {
    folder().join(&case.files[0].0)
}

/// The error with which the case is refused at its stage.
fn refusal(case: &Case) -> Error {
    let opened = File::open(path(case));
    if case.stage == Stage::Header {
        return opened.map(drop).expect_err(case.name);
    }
    let file = opened.expect(case.name);
    match case.stage {
        Stage::Model => model::describe(&file).map(drop).expect_err(case.name),
        Stage::Template => {
            tokenizer(&file).expect(case.name);
            ChatTemplate::verify(file.metadata()).expect_err(case.name)
        }
        _ => tokenizer(&file).map(drop).expect_err(case.name),
    }
}

/// The tokenizer of the file.
fn tokenizer(file: &File) -> Result<Tokenizer, Error> {
    Tokenizer::new(Vocabulary::from_metadata(file.metadata())?)
}

#[test]
fn the_folder_holds_what_the_maker_makes() {
    let mut made = BTreeMap::new();
    for case in cases() {
        for (name, bytes) in case.files {
            assert!(made.insert(name.clone(), bytes).is_none(), "two crafted files are called {name}");
        }
    }
    let entries = std::fs::read_dir(folder()).unwrap().map(|e| e.unwrap());
    let found: BTreeMap<String, Vec<u8>> =
        entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect();
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&made), names(&found), "run `cargo run --release --example make_corpus`");
    for (name, bytes) in &made {
        assert!(*bytes == found[name], "{name} differs: run `cargo run --release --example make_corpus`");
    }
}

#[test]
fn every_crafted_file_is_refused_with_place_and_reason() {
    for case in cases() {
        let error = refusal(&case).to_string();
        let folder = folder().display().to_string();
        assert!(error.starts_with(&folder), "{}: {error}", case.name);
        assert!(error.contains(": expected ") || error.contains(" expected "), "{}: {error}", case.name);
        assert!(error.contains(", found "), "{}: {error}", case.name);
        assert!(error.contains(case.says), "{}: expected {:?} in {error}", case.name, case.says);
        assert!(error.len() < 1500, "{}: {error}", case.name);
    }
}

#[test]
fn crafted_files_cause_no_allocation_larger_than_they_justify() {
    for case in cases() {
        let bytes: usize = case.files.iter().map(|(_, bytes)| bytes.len()).sum();
        let (_, allocated) = allocated(|| refusal(&case));
        // The header is read in steps of 64 KiB, and a table entry takes a few times its bytes in the file. A tokenizer
        // has caches and compiled patterns, whatever the file.
        assert!(allocated.largest <= (1 << 20) + 4 * bytes, "{}: {allocated:?} for {bytes} bytes", case.name);
        assert!(allocated.peak <= (1 << 22) + 16 * bytes, "{}: {allocated:?} for {bytes} bytes", case.name);
    }
}

#[test]
fn without_their_fault_the_crafted_models_are_accepted() {
    for arch in ARCHITECTURES {
        for mtp in [false, true] {
            let shape = craft::Shape { mtp, ..craft::tiny(arch) };
            let file = File::from_bytes(craft::model(&shape, craft::F32).bytes(), arch).unwrap();
            let model = model::describe(&file).unwrap();
            assert_eq!((model.n_layers, model.mtp.is_some()), (2, mtp), "{arch}");
        }
    }
}

#[test]
fn every_prefix_of_a_file_is_refused() {
    let craft = craft::model(&craft::tiny("qwen35moe"), craft::F32);
    let whole = craft.bytes();
    // Only the padding behind the last tensor may be missing.
    let last = craft.tensors.last().unwrap();
    let needed = whole.len() - (last.size.next_multiple_of(craft.alignment) - last.size) as usize;
    for len in 0..needed {
        let (result, allocated) = allocated(|| File::from_bytes(whole[..len].to_vec(), "prefix").map(drop));
        let error = result.expect_err("a file without its end").to_string();
        assert!(error.starts_with("prefix: ") && error.contains("expected"), "{len} bytes: {error}");
        assert!(allocated.peak < 1 << 20, "{len} bytes: {allocated:?}");
    }
    File::from_bytes(whole[..needed].to_vec(), "prefix").unwrap();
}

#[test]
fn inspect_reports_every_problem_of_a_file() {
    for case in cases() {
        let report = inspect(&path(&case), true);
        let first = refusal(&case).to_string();
        assert!(report.problems.contains(&first), "{}: {:#?}", case.name, report.problems);
        assert!(report.text().contains("problems, "), "{}", case.name);
    }
    let many = cases().into_iter().find(|c| c.name == "many-problems").unwrap();
    let problems = inspect(&path(&many), true).problems;
    let expected = [
        "key \"general.name\": expected every key once",
        "tensor \"output_norm.weight\": expected a tensor type of",
        "tensor \"blk.0.ssm_norm.weight\": expected an offset that is a multiple of 32, found 3",
        "tensor \"blk.1.attn_k.weight\": expected bytes within the file",
        "tensor \"blk.1.attn_v.weight\": expected dimensions of at least 1",
        "key \"qwen35.rope.dimension_sections\": expected four integers that add up to 2",
        "tensor \"blk.1.ffn_up.weight\": expected finite scales and values",
    ];
    for text in expected {
        assert_eq!(problems.iter().filter(|p| p.contains(text)).count(), 1, "{text} in {problems:#?}");
    }
    assert!(!problems.iter().any(|p| p.contains("no such tensor")), "{problems:#?}");
}

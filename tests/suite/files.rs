//! The reader on sound files: golden models against gguf-rs, and split sets.

use std::path::{Path, PathBuf};
use tandem::gguf::{self, File, Value};
use tandem_spec::TensorSource;

/// Every golden file.
pub fn golden() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "gguf"));
    paths.sort();
    assert!(paths.len() >= 15, "golden files are missing");
    paths
}

/// The value as gguf-rs gives it.
fn json(value: Value<'_>) -> serde_json::Value {
    match value {
        Value::F32(v) => v.into(),
        Value::F64(v) => v.into(),
        Value::Bool(v) => v.into(),
        Value::String(s) => String::from_utf8(s.to_vec()).unwrap().into(),
        Value::Array(a) => a.iter().map(json).collect(),
        other => i64::try_from(other.integer().unwrap()).unwrap().into(),
    }
}

#[test]
fn golden_files_are_read_as_by_gguf_rs() {
    for path in golden() {
        let ours = File::open(&path).unwrap();
        let mut container = gguf_rs::get_gguf_container_array_size(path.to_str().unwrap(), u64::MAX).unwrap();
        let theirs = container.decode().unwrap();
        let metadata: std::collections::BTreeMap<String, serde_json::Value> =
            ours.metadata().iter().map(|(k, v)| (k.to_string(), json(v))).collect();
        assert_eq!(&metadata, theirs.metadata(), "{path:?}");
        assert_eq!(ours.tensors().len(), theirs.tensors().len(), "{path:?}");
        let raw = std::fs::read(&path).unwrap();
        for (index, (our, their)) in ours.tensors().iter().zip(theirs.tensors()).enumerate() {
            assert_eq!(our.name, their.name);
            assert_eq!(our.ty as u32, their.kind, "{}", our.name);
            assert_eq!(our.ne, their.shape.iter().map(|&d| d as usize).collect::<Vec<_>>(), "{}", our.name);
            // gguf-rs has the sizes of BF16 and of the 32-element types above id 9 wrong: ours is compared with the file.
            let start = (theirs.data_offset() + their.offset) as usize;
            assert_eq!(ours.bytes(index), &raw[start..start + our.n_bytes()], "{}", our.name);
        }
    }
}

#[test]
fn typed_getters_name_the_key_and_both_types() {
    let path = &golden()[0];
    let file = File::open(path).unwrap();
    let metadata = file.metadata();
    assert_eq!(metadata.require::<&str>("general.architecture").unwrap(), "llama");
    assert_eq!(metadata.require::<usize>("llama.block_count").unwrap(), 2);
    assert_eq!(metadata.get::<bool>("llama.no_such_key").unwrap(), None);
    let wrong = metadata.get::<bool>("llama.block_count").unwrap_err().to_string();
    assert_eq!(wrong, format!("{}: key \"llama.block_count\": expected a bool, found u32 2", path.display()));
    let absent = metadata.require::<f64>("llama.none").unwrap_err().to_string();
    assert_eq!(absent, format!("{}: key \"llama.none\": expected a number (f32), found no such key", path.display()));
    let tokens: gguf::Strings = metadata.require("tokenizer.ggml.tokens").unwrap();
    let types: Vec<i32> = metadata.require("tokenizer.ggml.token_type").unwrap();
    assert_eq!((tokens.len(), tokens.iter().count()), (types.len(), types.len()));
}

#[test]
fn bytes_in_memory_read_like_the_file() {
    for path in golden() {
        let mapped = File::open(&path).unwrap();
        let held = File::from_bytes(std::fs::read(&path).unwrap(), "held").unwrap();
        assert_eq!(mapped.tensors(), held.tensors());
        for index in 0..mapped.tensors().len() {
            assert_eq!(mapped.bytes(index), held.bytes(index));
        }
        assert!(mapped.metadata().iter().eq(held.metadata().iter()));
        mapped.check_unchanged().unwrap();
    }
}

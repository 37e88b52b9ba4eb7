//! The reader on sound files: golden models against gguf-rs, and split sets.

use super::corpus::craft::{self, Craft};
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
            // gguf-rs has the sizes of BF16 and of the 32-element types above id 9 wrong: ours is compared with the
            // file.
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

/// A folder for the files of one test.
fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

#[test]
fn both_versions_and_every_alignment_read_alike() {
    let plain = craft::model(&craft::tiny("qwen35"), craft::F32);
    let expected = File::from_bytes(plain.bytes(), "plain").unwrap();
    for (version, alignment) in [(2, 32), (3, 8), (3, 64), (3, 4096)] {
        let mut other = Craft { version, alignment, ..plain.clone() };
        other.key("general.alignment", craft::u32(alignment as u32));
        let file = File::from_bytes(other.bytes(), "other").unwrap();
        assert_eq!((file.version(), file.tensors()), (version, expected.tensors()));
        for index in 0..file.tensors().len() {
            assert_eq!(file.bytes(index), expected.bytes(index), "version {version}, alignment {alignment}");
        }
    }
}

#[test]
fn a_split_set_reads_like_one_file() {
    let whole = craft::model(&craft::tiny("qwen35moe"), craft::F32);
    let expected = File::from_bytes(whole.bytes(), "whole").unwrap();
    let folder = folder("split");
    let total = whole.tensors.len();
    // The first file of some sets has no tensors at all.
    for (set, cuts) in [("thirds", [0, total / 3, total / 2, total]), ("bare", [0, 0, total / 2, total])] {
        for part in 0..3 {
            let mut file = whole.clone();
            if part > 0 {
                file.keys.clear();
            }
            file.alignment = [32, 64, 32][part];
            file.key("general.alignment", craft::u32(file.alignment as u32));
            file.key("split.no", craft::u16(part as u16)).key("split.count", craft::u16(3));
            file.key("split.tensors.count", craft::i32(total as i32));
            file.tensors = whole.tensors[cuts[part]..cuts[part + 1]].to_vec();
            std::fs::write(folder.join(format!("{set}-0000{}-of-00003.gguf", part + 1)), file.bytes()).unwrap();
        }
        let file = File::open(folder.join(format!("{set}-00001-of-00003.gguf"))).unwrap();
        assert_eq!((file.n_parts(), file.tensors()), (3, expected.tensors()));
        for index in 0..total {
            assert_eq!(file.bytes(index), expected.bytes(index), "{set}: {}", file.tensors()[index].name);
        }
    }
}

#[test]
fn what_is_no_file_is_refused() {
    let folder = folder("no-file");
    let message = |path: &Path| File::open(path).unwrap_err().to_string();
    assert!(message(&folder.join("absent.gguf")).contains("absent.gguf: expected a readable file, found "));
    assert!(message(&folder).ends_with(": expected a regular file, found a directory"));
    #[cfg(unix)]
    assert!(message(Path::new("/dev/zero")).ends_with(": expected a regular file, found something else"));
}

#[cfg(unix)]
#[test]
fn a_file_that_shrinks_while_mapped_reads_as_zeros_and_is_reported() {
    let mut craft = Craft::default();
    craft.key("general.name", craft::text("shrinks")).tensor("weight", &[64, 512], craft::F32);
    let path = folder("shrink").join("shrinks.gguf");
    std::fs::write(&path, craft.bytes()).unwrap();
    let file = File::open(&path).unwrap();
    assert!(file.bytes(0).iter().rev().take(1024).any(|b| *b != 0));
    file.check_unchanged().unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    // Several threads meet the missing pages, as the workers of a step would.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert!(file.bytes(0).iter().rev().take(1024).all(|b| *b == 0)));
        }
    });
    let error = file.check_unchanged().unwrap_err().to_string();
    assert!(error.contains("it became shorter while it was in use"), "{error}");
    assert_eq!(file.metadata().get::<&str>("general.name").unwrap(), Some("shrinks"));
}

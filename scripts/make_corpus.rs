//! The corpus of crafted files: for every way in which a GGUF file can lie, a small file that does, and the words
//! that the error must contain. `cargo run --release --example make_corpus` writes them to `tests/corpus`; a test
//! checks that the folder holds exactly these bytes and that every file is refused as stated here.

#[allow(dead_code, reason = "other tests use more of it")]
pub(crate) mod craft;

use craft::*;

/// Which part of the program has to refuse a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Opening it.
    Header,
    /// Describing its model.
    Model,
    /// Building its tokenizer.
    Tokenizer,
    /// Parsing its chat template and rendering a message with it.
    Template,
}

/// A crafted file or split set.
pub(crate) struct Case {
    /// What it is an example of: the stem of its file names.
    pub name: &'static str,
    pub stage: Stage,
    /// Place and words of the error.
    pub says: &'static str,
    /// Name and bytes of each file; the first is the one to open.
    pub files: Vec<(String, Vec<u8>)>,
}

fn case(name: &'static str, stage: Stage, says: &'static str, bytes: Vec<u8>) -> Case {
    Case { name, stage, says, files: vec![(format!("{name}.gguf"), bytes)] }
}

/// A tiny model with one change.
fn changed(arch: &'static str, change: impl FnOnce(&mut Craft)) -> Vec<u8> {
    let mut c = model(&tiny(arch), F32);
    change(&mut c);
    c.bytes()
}

/// A file without tensors and with one key.
fn key_only(key: &str, value: Value) -> Vec<u8> {
    let mut c = Craft::default();
    c.key(key, value);
    c.bytes()
}

/// A string value whose length is stated as `len`.
fn string_of(len: u64) -> Value {
    Value(8, [&len.to_le_bytes()[..], b"text"].concat())
}

fn header_cases() -> Vec<Case> {
    use Stage::Header;
    let tensor = |change: &dyn Fn(&mut Tensor)| changed("llama", |c| change(c.tensor_mut("output_norm.weight")));
    let raw = |version: u32| changed("llama", |c| c.version = version);
    vec![
        case("empty", Header, "expected a GGUF file, found an empty file", vec![]),
        case("four-bytes", Header, "at byte 4: expected the format version of 4 bytes", b"GGUF".to_vec()),
        case(
            "foreign",
            Header,
            "at byte 0: expected the magic bytes \"GGUF\", found \"PK",
            b"PK\x03\x04 and more".to_vec(),
        ),
        case("version-1", Header, "at byte 4: expected format version 2 or 3, found 1", raw(1)),
        case("version-4", Header, "at byte 4: expected format version 2 or 3, found 4", raw(4)),
        case("big-endian", Header, "at byte 4: expected a little-endian file", raw(3 << 24)),
        case("tensors-2-60", Header, "at byte 16: expected at most", changed("llama", |c| c.n_tensors = Some(1 << 60))),
        case(
            "tensors-negative",
            Header,
            "at byte 16: expected at most",
            changed("llama", |c| c.n_tensors = Some(u64::MAX)),
        ),
        case("keys-2-60", Header, "at byte 24: expected at most", changed("llama", |c| c.n_keys = Some(1 << 60))),
        case("keys-negative", Header, "at byte 24: expected at most", changed("llama", |c| c.n_keys = Some(u64::MAX))),
        case("keys-one-more", Header, "expected", changed("llama", |c| c.n_keys = Some(c.keys.len() as u64 + 1))),
        case(
            "tensors-one-more",
            Header,
            "expected",
            changed("llama", |c| c.n_tensors = Some(c.tensors.len() as u64 + 1)),
        ),
        case("array-2-60", Header, "key \"k\": expected at most", key_only("k", array_of(8, 1 << 60, vec![0; 64]))),
        case("array-past-end", Header, "key \"k\": expected at most", key_only("k", array_of(6, 1000, vec![0; 64]))),
        case(
            "array-wraps",
            Header,
            "key \"k\": expected at most",
            key_only("k", array_of(10, (1 << 61) + 1, vec![0; 64])),
        ),
        case("array-nested", Header, "key \"k\": expected an array of plain elements", {
            key_only("k", array_of(9, 1 << 60, [&5u32.to_le_bytes()[..], &(1u64 << 60).to_le_bytes()].concat()))
        }),
        case("array-element-type", Header, "key \"k\": expected an element type from 0 to 12, found 77", {
            key_only("k", array_of(77, 4, vec![0; 64]))
        }),
        case("array-string-past-end", Header, "key \"k\": expected a string of an array of 4096 bytes", {
            key_only("k", array_of(8, 2, [&string_of(4).1[..], &string_of(4096).1].concat()))
        }),
        case(
            "value-type",
            Header,
            "key \"k\": expected a value type from 0 to 12, found 13",
            key_only("k", Value(13, vec![0; 8])),
        ),
        case(
            "string-past-end",
            Header,
            "key \"k\": expected a string of 1048576 bytes",
            key_only("k", string_of(1 << 20)),
        ),
        case("string-2-40", Header, "key \"k\": expected a string of at most", key_only("k", string_of(1 << 40))),
        case("string-wraps", Header, "key \"k\": expected a string of at most", key_only("k", string_of(u64::MAX))),
        case("key-length-wraps", Header, "at byte 32: expected a key of at most 65535 bytes", {
            let mut bytes = key_only("k", u32(1));
            bytes[24..32].copy_from_slice(&(u64::MAX - 7).to_le_bytes());
            bytes
        }),
        case("key-too-long", Header, "at byte 32: expected a key of at most 65535 bytes, found a length of 65536", {
            key_only(&"k".repeat(65536), u32(1))
        }),
        case(
            "key-empty",
            Header,
            "at byte 24: expected a key of UTF-8 that is not empty, found \"\"",
            key_only("", u32(1)),
        ),
        case("key-not-utf8", Header, "at byte 24: expected a key of UTF-8", {
            let mut c = Craft::default();
            c.key(b"k\xff\xfe", u32(1));
            c.bytes()
        }),
        case(
            "key-twice",
            Header,
            "key \"general.name\": expected every key once",
            changed("llama", |c| {
                c.key("general.name", text("again"));
            }),
        ),
        case("value-cut", Header, "key \"general.architecture\": expected a value of 8 bytes", {
            let mut bytes = key_only("general.architecture", Value(10, vec![1, 2, 3]));
            bytes.truncate(24 + 8 + 20 + 4 + 3);
            bytes
        }),
        case("alignment-0", Header, "key \"general.alignment\": expected a power of two from 8 to 1048576, found 0", {
            changed("llama", |c| {
                c.key("general.alignment", u32(0));
            })
        }),
        case("alignment-3", Header, "key \"general.alignment\": expected a power of two", {
            changed("llama", |c| {
                c.key("general.alignment", u32(3));
            })
        }),
        case("alignment-2-31", Header, "key \"general.alignment\": expected a power of two", {
            changed("llama", |c| {
                c.key("general.alignment", u32(1 << 31));
            })
        }),
        case(
            "alignment-text",
            Header,
            "key \"general.alignment\": expected an integer from 0 to 4294967295, found string",
            {
                changed("llama", |c| {
                    c.key("general.alignment", text("32"));
                })
            },
        ),
        case("alignment-negative", Header, "key \"general.alignment\": expected an integer", {
            changed("llama", |c| {
                c.key("general.alignment", i32(-32));
            })
        }),
        case(
            "name-twice",
            Header,
            "tensor \"output_norm.weight\": expected every tensor once",
            changed("llama", |c| {
                c.tensor("output_norm.weight", &[8], F32);
            }),
        ),
        case(
            "name-too-long",
            Header,
            "expected a name of at most 63 bytes, found 64",
            changed("llama", |c| {
                c.tensor(&"n".repeat(64), &[8], F32);
            }),
        ),
        case(
            "name-not-utf8",
            Header,
            "expected a name of UTF-8 that is not empty",
            tensor(&|t| t.name = b"a\xc3(".to_vec()),
        ),
        case(
            "name-empty",
            Header,
            "tensor \"\": expected a name of UTF-8 that is not empty",
            tensor(&|t| t.name.clear()),
        ),
        case("dimensions-0", Header, "expected 1 to 4 dimensions, found 0", tensor(&|t| t.n_dims = Some(0))),
        case("dimensions-5", Header, "expected 1 to 4 dimensions, found 5", tensor(&|t| t.n_dims = Some(5))),
        case("dimensions-2-32", Header, "expected 1 to 4 dimensions", tensor(&|t| t.n_dims = Some(u32::MAX))),
        case("dimension-zero", Header, "dimensions of at least 1, found shape [0]", tensor(&|t| t.ne = vec![0])),
        case("dimension-negative", Header, "fewer than 2^63 elements", tensor(&|t| t.ne = vec![u64::MAX])),
        case("elements-wrap", Header, "fewer than 2^63 elements", tensor(&|t| t.ne = vec![1 << 32, 1 << 32])),
        case("elements-wrap-to-8", Header, "fewer than 2^63 elements", tensor(&|t| t.ne = vec![8, 1 << 61, 8])),
        case("bytes-wrap", Header, "bytes within the file", tensor(&|t| t.ne = vec![1 << 62])),
        case(
            "blocks-cut",
            Header,
            "rows of whole Q8_0 blocks of 32 elements, found shape [8]",
            tensor(&|t| t.ty = Q8_0.0),
        ),
        case("type-unknown", Header, "found type id 99", tensor(&|t| t.ty = 99)),
        case("type-removed", Header, "found type id 31", tensor(&|t| t.ty = 31)),
        case(
            "offset-unaligned",
            Header,
            "expected an offset that is a multiple of 32, found 4",
            tensor(&|t| t.offset = Some(4)),
        ),
        case("offset-overlaps", Header, "which belongs to \"token_embd.weight\"", tensor(&|t| t.offset = Some(32))),
        case("offset-past-end", Header, "bytes within the file", tensor(&|t| t.offset = Some(1 << 20))),
        case("offset-wraps", Header, "bytes within the file", tensor(&|t| t.offset = Some(u64::MAX - 31))),
        case("offset-2-63", Header, "bytes within the file", tensor(&|t| t.offset = Some(1 << 63))),
        case("shape-past-end", Header, "bytes within the file", tensor(&|t| t.ne = vec![1 << 30])),
        case("data-cut", Header, "bytes within the file", {
            let mut bytes = changed("llama", |_| {});
            bytes.truncate(bytes.len() - 64);
            bytes
        }),
        case(
            "many-problems",
            Header,
            "key \"general.name\": expected every key once",
            changed("qwen35", |c| {
                c.set("qwen35.rope.dimension_sections", i32s(&[9, 9, 9, 9])).key("general.name", text("again"));
                c.tensor_mut("output_norm.weight").ty = 99;
                c.tensor_mut("blk.0.ssm_norm.weight").offset = Some(3);
                c.tensor_mut("blk.1.attn_k.weight").offset = Some(1 << 40);
                c.tensor_mut("blk.1.attn_v.weight").ne = vec![8, 0];
                c.tensor_mut("blk.1.ffn_up.weight").data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
            }),
        ),
    ]
}

fn split_cases() -> Vec<Case> {
    let part = |no: u16, count: u16, total: i32, tensors: &[&str]| {
        let mut whole = model(&tiny("llama"), F32);
        if no > 0 {
            whole.keys.clear();
        }
        whole.tensors.retain(|t| tensors.iter().any(|name| t.name.starts_with(name.as_bytes())));
        whole.key("split.no", u16(no)).key("split.count", u16(count)).key("split.tensors.count", i32(total));
        whole.bytes()
    };
    let total = model(&tiny("llama"), F32).tensors.len() as i32;
    let first = |total: i32| part(0, 2, total, &["token", "output", "blk.0."]);
    let second = || part(1, 2, total, &["blk.1."]);
    let set = |name: &'static str, says: &'static str, parts: Vec<Vec<u8>>, count: usize| {
        let file = |i: usize| format!("{name}-{:05}-of-{count:05}.gguf", i + 1);
        let files = parts.into_iter().enumerate().map(|(i, bytes)| (file(i), bytes)).collect();
        Case { name, stage: Stage::Header, says, files }
    };
    vec![
        set("split-missing", "split-missing-00002-of-00002.gguf: expected a readable file", vec![first(total)], 2),
        set("split-repeated", "key \"split.no\": expected 1, found 0", vec![first(total), first(total)], 2),
        set(
            "split-foreign",
            "key \"split.count\": expected 2, found 5",
            vec![first(total), part(1, 5, total, &["blk.1."])],
            2,
        ),
        set("split-total", "key \"split.tensors.count\": expected", vec![first(total + 1), second()], 2),
        set(
            "split-name-twice",
            "in another file of the set too",
            vec![first(total + 1), part(1, 2, total + 1, &["blk.1.", "output.weight"])],
            2,
        ),
        set(
            "split-unmarked",
            "key \"split.no\": expected 1, found no such key",
            vec![first(total), changed("llama", |c| c.tensors.retain(|t| t.name.starts_with(b"blk.1.")))],
            2,
        ),
        set(
            "split-offset-past-end",
            "expected bytes within the file",
            {
                let mut cut = second();
                cut.truncate(cut.len() - 64);
                vec![first(total), cut]
            },
            2,
        ),
        set("split-too-many", "expected a split set of 1 to 1024 files, found 99999", vec![first(total)], 99999),
        Case {
            name: "split-later",
            stage: Stage::Header,
            says: "expected the first file of the set, ",
            files: vec![("split-later-00002-of-00002.gguf".into(), second())],
        },
        case("split-renamed", Stage::Header, "key \"split.count\": expected 1, found 2", first(total)),
    ]
}

fn model_cases() -> Vec<Case> {
    use Stage::Model;
    let with = |name: &'static str, says: &'static str, arch: &'static str, change: &dyn Fn(&mut Craft)| {
        case(name, Model, says, changed(arch, |c| change(c)))
    };
    let key = |name: &'static str, says: &'static str, arch: &'static str, key: &'static str, value: Value| {
        case(
            name,
            Model,
            says,
            changed(arch, |c| {
                c.set(&format!("{arch}.{key}"), value);
            }),
        )
    };
    vec![
        with("architecture-missing", "key \"general.architecture\": expected a string", "llama", &|c| {
            c.remove("general.architecture");
        }),
        with(
            "architecture-unknown",
            "key \"general.architecture\": expected one of qwen35, qwen35moe, qwen3next, qwen3, \
              qwen3moe, qwen2, llama, found \"gpt9\"",
            "llama",
            &|c| {
                c.set("general.architecture", text("gpt9"));
            },
        ),
        with("architecture-number", "key \"general.architecture\": expected a string", "llama", &|c| {
            c.set("general.architecture", u32(7));
        }),
        key("block-count-text", "key \"llama.block_count\": expected an integer", "llama", "block_count", text("2")),
        key("block-count-float", "key \"llama.block_count\": expected an integer", "llama", "block_count", f32(2.0)),
        key(
            "block-count-zero",
            "key \"llama.block_count\": expected an integer from 1 to 512",
            "llama",
            "block_count",
            u32(0),
        ),
        key(
            "block-count-513",
            "key \"llama.block_count\": expected an integer from 1 to 512",
            "llama",
            "block_count",
            u32(513),
        ),
        key("block-count-negative", "key \"llama.block_count\": expected an integer", "llama", "block_count", i32(-1)),
        key("layers-too-few", "expected a tensor of shape [8], found no such tensor", "llama", "block_count", u32(40)),
        key(
            "layers-too-many",
            "expected blocks 0 to 0, as llama.block_count says, found block",
            "llama",
            "block_count",
            u32(1),
        ),
        key(
            "mtp-all",
            "nextn_predict_layers\": expected an integer from 0 to 1",
            "qwen35",
            "nextn_predict_layers",
            u32(2),
        ),
        key(
            "heads-text",
            "key \"llama.attention.head_count\": expected an integer",
            "llama",
            "attention.head_count",
            text("x"),
        ),
        key(
            "heads-bool",
            "key \"llama.attention.head_count\": expected an integer",
            "llama",
            "attention.head_count",
            bool(true),
        ),
        key(
            "heads-zero",
            "key \"llama.attention.head_count\": expected at least one head",
            "llama",
            "attention.head_count",
            u32(0),
        ),
        key(
            "heads-not-divided",
            "head_count_kv\": expected a divisor of the 2 query heads",
            "llama",
            "attention.head_count_kv",
            u32(3),
        ),
        key(
            "heads-kv-zero",
            "head_count_kv\": expected a divisor of the 2 query heads",
            "llama",
            "attention.head_count_kv",
            u32(0),
        ),
        key(
            "heads-huge",
            "head_count\": expected an integer from 0 to 16384",
            "llama",
            "attention.head_count",
            u32(u32::MAX),
        ),
        with(
            "heads-wide",
            "head_count\": expected heads of 1024 that are at most 1048576 wide together, found 2048",
            "llama",
            &|c| {
                c.set("llama.attention.head_count", u32(2048)).set("llama.attention.key_length", u32(1024));
            },
        ),
        key(
            "heads-array-short",
            "head_count_kv\": expected an array of 2, one entry a block",
            "llama",
            "attention.head_count_kv",
            i32s(&[1]),
        ),
        key(
            "heads-array-negative",
            "head_count_kv\": expected integers from 0",
            "llama",
            "attention.head_count_kv",
            i32s(&[1, -1]),
        ),
        key(
            "head-width-huge",
            "key_length\": expected an integer from 1 to 1024",
            "llama",
            "attention.key_length",
            u32(1 << 30),
        ),
        key(
            "head-widths-differ",
            "value_length\": expected 4, the width of the keys, found 8",
            "llama",
            "attention.value_length",
            u32(8),
        ),
        key("width-zero", "embedding_length\": expected an integer from 1", "llama", "embedding_length", u32(0)),
        key(
            "width-contradicts",
            "tensor \"token_embd.weight\": expected shape [16, 8], found shape [8, 8]",
            "llama",
            "embedding_length",
            u32(16),
        ),
        key(
            "eps-nan",
            "layer_norm_rms_epsilon\": expected a number from",
            "llama",
            "attention.layer_norm_rms_epsilon",
            f32(f32::NAN),
        ),
        key(
            "eps-text",
            "layer_norm_rms_epsilon\": expected a number",
            "llama",
            "attention.layer_norm_rms_epsilon",
            text("1e-6"),
        ),
        key("context-zero", "context_length\": expected an integer from 1", "llama", "context_length", u32(0)),
        key("context-huge", "context_length\": expected an integer from 1", "llama", "context_length", u32(u32::MAX)),
        key("rope-odd", "rope.dimension_count\": expected an even number", "llama", "rope.dimension_count", u32(3)),
        key(
            "rope-wider-than-head",
            "rope.dimension_count\": expected an even number up to the head width 4",
            "llama",
            "rope.dimension_count",
            u32(8),
        ),
        key("rope-base-nan", "rope.freq_base\": expected a number from", "llama", "rope.freq_base", f32(f32::NAN)),
        key("rope-base-zero", "rope.freq_base\": expected a number from", "llama", "rope.freq_base", f32(0.0)),
        key(
            "rope-scaling-unknown",
            "rope.scaling.type\": expected one of none, linear, yarn, found \"longrope\"",
            "llama",
            "rope.scaling.type",
            text("longrope"),
        ),
        key(
            "rope-scaling-infinite",
            "rope.scaling.factor\": expected a number from",
            "llama",
            "rope.scaling.factor",
            f32(f32::INFINITY),
        ),
        key(
            "rope-sections-sum",
            "rope.dimension_sections\": expected four integers that add up to 2",
            "qwen35",
            "rope.dimension_sections",
            i32s(&[3, 3, 2, 0]),
        ),
        key(
            "rope-sections-wrap",
            "rope.dimension_sections\": expected",
            "qwen35",
            "rope.dimension_sections",
            i32s(&[i32::MAX, i32::MAX, 4, 0]),
        ),
        key(
            "rope-sections-negative",
            "rope.dimension_sections\": expected four integers of at least 0",
            "qwen35",
            "rope.dimension_sections",
            i32s(&[-1, 3, 0, 0]),
        ),
        key(
            "rope-sections-three",
            "rope.dimension_sections\": expected four integers",
            "qwen35",
            "rope.dimension_sections",
            i32s(&[1, 1, 0]),
        ),
        key(
            "rope-sections-narrow",
            "rope.dimension_sections\": expected an array of i32, found array of 4 u8",
            "qwen35",
            "rope.dimension_sections",
            array_of(0, 4, vec![1, 1, 0, 0]),
        ),
        with("rope-sections-missing", "rope.dimension_sections\": expected an array of four i32", "qwen35", &|c| {
            c.remove("qwen35.rope.dimension_sections");
        }),
        key(
            "recurrent-short",
            "recurrent_layers\": expected an array of 2, one entry a block",
            "qwen35",
            "attention.recurrent_layers",
            bools(&[true]),
        ),
        key(
            "recurrent-contradicts",
            "tensor \"blk.0.attn_qkv.weight\": expected shape [8, 24]",
            "qwen35",
            "attention.recurrent_layers",
            bools(&[false, false]),
        ),
        key(
            "interval-zero",
            "full_attention_interval\": expected an integer from 1",
            "qwen35",
            "full_attention_interval",
            u32(0),
        ),
        key(
            "ssm-not-divided",
            "ssm.time_step_rank\": expected a multiple of the 3 groups",
            "qwen35",
            "ssm.group_count",
            u32(3),
        ),
        key("ssm-groups-zero", "ssm.group_count\": expected an integer from 1", "qwen35", "ssm.group_count", u32(0)),
        key("ssm-inner", "ssm.inner_size\": expected 4 heads of 4, found 20", "qwen35", "ssm.inner_size", u32(20)),
        key(
            "ssm-state-huge",
            "ssm.state_size\": expected an integer from 1 to 1024",
            "qwen35",
            "ssm.state_size",
            u32(1 << 31),
        ),
        key(
            "ssm-conv-zero",
            "ssm.conv_kernel\": expected an integer from 1 to 64",
            "qwen35",
            "ssm.conv_kernel",
            u32(0),
        ),
        key(
            "experts-contradict",
            "tensor \"blk.0.ffn_gate_exps.weight\": expected shape [8, 8, 4], found shape [8, 8, 3]",
            "qwen3moe",
            "expert_count",
            u32(4),
        ),
        key("experts-zero", "expert_count\": expected an integer from 1 to 1024", "qwen3moe", "expert_count", u32(0)),
        key(
            "experts-2000",
            "expert_count\": expected an integer from 1 to 1024",
            "qwen3moe",
            "expert_count",
            u32(2000),
        ),
        key(
            "experts-used-too-many",
            "expert_used_count\": expected an integer from 1 to 3, found 4",
            "qwen3moe",
            "expert_used_count",
            u32(4),
        ),
        key(
            "experts-used-zero",
            "expert_used_count\": expected an integer from 1 to 3, found 0",
            "qwen3moe",
            "expert_used_count",
            u32(0),
        ),
        key("experts-in-dense", "expert_count\": expected 0 for this architecture", "llama", "expert_count", u32(8)),
        with(
            "tensor-missing",
            "tensor \"blk.1.attn_v.weight\": expected a tensor of shape [8, 4], found no such tensor",
            "llama",
            &|c| {
                c.remove_tensor("blk.1.attn_v.weight");
            },
        ),
        with("bias-missing", "tensor \"blk.0.attn_k.bias\": expected a tensor of shape [4]", "qwen2", &|c| {
            c.remove_tensor("blk.0.attn_k.bias");
        }),
        with(
            "tensor-transposed",
            "tensor \"blk.0.attn_k.weight\": expected shape [8, 4], found shape [4, 8]",
            "llama",
            &|c| {
                c.tensor_mut("blk.0.attn_k.weight").ne.reverse();
            },
        ),
        with(
            "tensor-deeper",
            "tensor \"blk.0.attn_k.weight\": expected shape [8, 4], found shape [8, 2, 2]",
            "llama",
            &|c| {
                c.tensor_mut("blk.0.attn_k.weight").ne = vec![8, 2, 2];
            },
        ),
        with("tensor-type-unsupported", "tensor \"blk.0.attn_k.weight\": expected a type of F32, F16", "llama", &|c| {
            c.tensor_mut("blk.0.attn_k.weight").ty = 24;
        }),
        with("norm-not-f32", "tensor \"output_norm.weight\": expected type F32, found type F16", "llama", &|c| {
            c.tensor_mut("output_norm.weight").ty = 1;
        }),
        with("layer-name", "expected blocks 0 to 1, as llama.block_count says, found block \"x\"", "llama", &|c| {
            c.tensor("blk.x.attn_q.weight", &[8], F32);
        }),
        with(
            "vocabulary-larger-than-embedding",
            "tokenizer.ggml.tokens\": expected at most 8 tokens, the rows of token_embd.weight, found 9",
            "llama",
            &|c| {
                c.set("tokenizer.ggml.tokens", texts(&["t"; 9]));
            },
        ),
        with("vocabulary-numbers", "tokenizer.ggml.tokens\": expected an array of strings", "llama", &|c| {
            c.set("tokenizer.ggml.tokens", i32s(&[1, 2, 3]));
        }),
    ]
}

/// A file of a vocabulary alone, with one change: the bytes, a merge and control tokens (`gpt2`), or byte tokens and
/// scores (`llama`).
fn vocabulary(model: &str, change: impl FnOnce(&mut Craft, &mut Vec<String>)) -> Vec<u8> {
    let mut tokens: Vec<String> = if model == "gpt2" {
        // Printable bytes stand for themselves, the others for the characters from U+0100 on.
        let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
        let other = |b: u32| 0x100 + (0..b).filter(|b| !printable(*b)).count() as u32;
        let of = |b: u32| if printable(b) { b } else { other(b) };
        (0..256).map(|b| char::from_u32(of(b)).expect("a character below U+0144").to_string()).collect()
    } else {
        let fixed = ["<unk>", "<s>", "</s>"].map(String::from);
        fixed.into_iter().chain((0..256).map(|b| format!("<0x{b:02X}>"))).collect()
    };
    tokens.extend(["ab", "abc", "<|im_start|>", "<|im_end|>"].map(String::from));
    let kind = |t: &String| match t {
        _ if t.starts_with("<0x") => 6,
        _ if t.len() > 1 && t.starts_with('<') => 3,
        _ => 1,
    };
    let mut c = Craft::default();
    c.key("tokenizer.ggml.model", text(model)).key("tokenizer.ggml.pre", text("qwen2"));
    c.key("tokenizer.ggml.token_type", i32s(&tokens.iter().map(kind).collect::<Vec<_>>()));
    c.key("tokenizer.ggml.eos_token_id", u32(tokens.len() as u32 - 1));
    match model {
        "gpt2" => c.key("tokenizer.ggml.merges", texts(&["a b", "ab c"])),
        _ => c.key("tokenizer.ggml.scores", f32s(&vec![-1.0; tokens.len()])),
    };
    change(&mut c, &mut tokens);
    c.key("tokenizer.ggml.tokens", texts(&tokens));
    c.bytes()
}

fn tokenizer_cases() -> Vec<Case> {
    use Stage::Tokenizer;
    let with = |name: &'static str, says: &'static str, change: &dyn Fn(&mut Craft, &mut Vec<String>)| {
        case(name, Tokenizer, says, vocabulary("gpt2", |c, tokens| change(c, tokens)))
    };
    let scored = |name: &'static str, says: &'static str, change: &dyn Fn(&mut Craft, &mut Vec<String>)| {
        case(name, Tokenizer, says, vocabulary("llama", |c, tokens| change(c, tokens)))
    };
    let set = |name: &'static str, says: &'static str, key: &'static str, value: Value| {
        with(name, says, &|c, _| {
            c.set(key, value.clone());
        })
    };
    vec![
        set("tokenizer-model", "tokenizer.ggml.model\": expected gpt2", "tokenizer.ggml.model", text("t5")),
        set("tokenizer-pre", "tokenizer.ggml.pre\": expected", "tokenizer.ggml.pre", text("no-such")),
        with("tokens-none", "tokenizer.ggml.tokens\": expected", &|_, tokens| tokens.clear()),
        with("tokens-one-more", "tokenizer.ggml.token_type\": expected 261 entries", &|_, tokens| {
            tokens.push("x".into())
        }),
        with("tokens-one-byte-less", "tokenizer.ggml.tokens\": expected", &|_, tokens| tokens[122] = "zz".into()),
        set(
            "types-short",
            "tokenizer.ggml.token_type\": expected 260 entries",
            "tokenizer.ggml.token_type",
            i32s(&[1, 1]),
        ),
        set(
            "types-narrow",
            "token_type\": expected an array of i32, found array of 260 u8",
            "tokenizer.ggml.token_type",
            array_of(0, 260, vec![1; 260]),
        ),
        set(
            "types-unknown",
            "tokenizer.ggml.token_type\": expected types from 0 to 6",
            "tokenizer.ggml.token_type",
            i32s(&[77; 260]),
        ),
        set(
            "types-text",
            "tokenizer.ggml.token_type\": expected an array of i32",
            "tokenizer.ggml.token_type",
            texts(&["1"; 260]),
        ),
        set("eos-past-end", "eos_token_id\": expected an id below 260", "tokenizer.ggml.eos_token_id", u32(260)),
        set("eos-huge", "eos_token_id\": expected an id below 260", "tokenizer.ggml.eos_token_id", u32(u32::MAX)),
        set("eos-text", "eos_token_id\": expected an integer", "tokenizer.ggml.eos_token_id", text("2")),
        set("bos-negative", "bos_token_id\": expected an integer", "tokenizer.ggml.bos_token_id", i32(-1)),
        set(
            "merges-absent-token",
            "tokenizer.ggml.merges\": expected",
            "tokenizer.ggml.merges",
            texts(&["a b", "no such"]),
        ),
        set(
            "merges-absent-result",
            "tokenizer.ggml.merges\": expected",
            "tokenizer.ggml.merges",
            texts(&["a b", "a c"]),
        ),
        set("merges-no-pair", "tokenizer.ggml.merges\": expected", "tokenizer.ggml.merges", texts(&["ab"])),
        set(
            "merges-numbers",
            "tokenizer.ggml.merges\": expected an array of strings",
            "tokenizer.ggml.merges",
            i32s(&[1, 2]),
        ),
        scored("byte-token-malformed", "tokenizer.ggml.tokens\": expected", &|_, tokens| tokens[3] = "<0xZZ>".into()),
        scored("byte-token-short", "tokenizer.ggml.tokens\": expected", &|_, tokens| tokens[3] = "<0x".into()),
        scored("byte-token-long", "tokenizer.ggml.tokens\": expected", &|_, tokens| tokens[3] = "<0x000>".into()),
        scored("byte-token-wide", "tokenizer.ggml.tokens\": expected", &|_, tokens| tokens[3] = "<0x\u{20ac}>".into()),
        scored("scores-short", "tokenizer.ggml.scores\": expected", &|c, _| {
            c.set("tokenizer.ggml.scores", f32s(&[0.0; 3]));
        }),
        scored("scores-nan", "tokenizer.ggml.scores\": expected", &|c, tokens| {
            c.set("tokenizer.ggml.scores", f32s(&vec![f32::NAN; tokens.len()]));
        }),
        scored("scores-bytes", "tokenizer.ggml.scores\": expected an array of f32", &|c, tokens| {
            c.set("tokenizer.ggml.scores", array_of(0, tokens.len() as u64, vec![0; tokens.len()]));
        }),
    ]
}

fn template_cases() -> Vec<Case> {
    let with = |name: &'static str, says: &'static str, value: Value| {
        let bytes = vocabulary("gpt2", |c, _| {
            c.key("tokenizer.chat_template", value);
        });
        case(name, Stage::Template, says, bytes)
    };
    let renders = |name: &'static str, says: &'static str, source: &str| with(name, says, text(source));
    let key = "chat_template\": expected a chat template in Jinja, found";
    let steps = "line 1: it takes too many steps";
    let memory = "line 1: it does too much work or makes too much text";
    vec![
        with("template-number", "chat_template\": expected a string", u32(1)),
        with(
            "template-not-utf8",
            "chat_template\": expected",
            Value(8, [&4u64.to_le_bytes()[..], b"{{\xff}"].concat()),
        ),
        renders("template-syntax", key, "{% for m in messages %}{{ m.content }}"),
        renders("template-text-open", key, "{{ 'unterminated }}"),
        renders("template-inherits", "a statement that chat templates have no use for", "{% extends 'x' %}"),
        renders("template-too-long", "it has 131073 bytes, and the most is 131072", &"x".repeat((128 << 10) + 1)),
        renders("template-deep", key, &format!("{{{{ {}x{} }}}}", "(".repeat(5000), ")".repeat(5000))),
        renders("template-deep-ifs", key, &("{% if x %}".repeat(1000) + &"{% endif %}".repeat(1000))),
        renders(
            "template-loops",
            steps,
            "{% for i in range(60000) %}{% for j in range(60000) %}{% endfor %}{% endfor %}",
        ),
        renders(
            "template-range",
            "line 1: an argument of 1000000000, and the most is 65536",
            "{{ range(10**9) | list }}",
        ),
        renders(
            "template-recurses",
            "chat_template\": expected a chat template that renders a message, found",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        ),
        renders(
            "template-recurses-loop",
            "chat_template\": expected a chat template that renders a message, found",
            "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        ),
        renders("template-repeats", "line 1: an operation would make too much text", "{{ 'x' * 10**12 }}"),
        renders(
            "template-doubles",
            memory,
            "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        ),
        renders("template-width", "line 1: an argument of 1000000000", "{{ 'a' | indent(10**9) }}"),
        renders(
            "template-nests",
            "line 1: a value is nested more than 64 levels deep",
            "{% set n = namespace(s=[]) %}{% for i in range(60000) %}{% set n.s = [n.s] %}{% endfor %}",
        ),
        renders("template-absent-method", "chat_template\": expected", "{{ messages[0].content.nonsense() }}"),
        renders("template-refuses", "line 1: no", "{{ raise_exception('no') }}"),
    ]
}

/// Sound templates that use most of the language, for a fuzzer to mutate.
#[allow(dead_code, reason = "only `main` writes them")]
fn template_seeds() -> [&'static str; 6] {
    [
        TEMPLATE,
        "{%- set ns = namespace(last=-1, seen=[]) %}{%- for m in messages[::-1] %}{%- set i = messages | length - 1 - \
         loop.index0 %}{%- if ns.last == -1 and m.role == 'user' %}{%- set ns.last = i %}{%- endif %}{%- set ns.seen = \
         ns.seen + [m.role] %}{%- endfor %}{{ ns.last }}{{ ns.seen | join(', ') }}",
        "{% macro turn(role, text='') %}<|im_start|>{{ role ~ '\n' ~ text | trim }}<|im_end|>\n{{ caller() if caller }}\
         {% endmacro %}{% for m in messages if m.role != 'system' %}{{ turn(m['role'], text=m.content) }}{% endfor %}\
         {% call turn('user') %}{{ bos_token }}{% endcall %}",
        "{% if not messages %}{{ raise_exception('No messages.') }}{% elif messages[0].content is string %}{{ \
         messages[0].content.split('</think>')[-1].lstrip('\\n').replace('a', 'b') }}{% else %}{{ 2 ** 3 // 2 % 3 * 'x' }}\
         {% endif %}",
        "{% with a = {'b': [1, 2.5, none, true]} %}{% set c %}{{ a | tojson(indent=2) }}{% endset %}{{ c | upper | \
         replace('\\n', '') }}{{ a.items() | list }}{{ a.b | map('string') | unique | sort | first }}{% endwith %}",
        "{% for i in range(1, 9, 2) recursive %}{{ loop.cycle('a', 'b') }}{% if loop.changed(i) and loop.first %}{% continue %}\
         {% endif %}{{ strftime_now('%d %b %Y') }}{% break %}{% else %}{{ messages | selectattr('role', 'equalto', 'user') \
         | map(attribute='content') | list | tojson }}{% endfor %}",
    ]
}

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    let mut all = header_cases();
    all.extend(split_cases());
    all.extend(model_cases());
    all.extend(tokenizer_cases());
    all.extend(template_cases());
    all
}

/// Writes all files to `tests/corpus` and prints what each is for; or, together with sound models and templates to
/// mutate, to the folder given.
#[allow(dead_code, reason = "the test that includes this file has a main of its own")]
fn main() -> std::io::Result<()> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus");
    let folder = std::path::PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| default.into()));
    std::fs::create_dir_all(&folder)?;
    if folder != std::path::Path::new(default) {
        for arch in ["qwen35", "qwen35moe", "qwen3next", "qwen3", "qwen3moe", "qwen2", "llama"] {
            let shape = Shape { mtp: arch == "qwen35", ..tiny(arch) };
            std::fs::write(folder.join(format!("sound-{arch}.gguf")), model(&shape, F32).bytes())?;
        }
        std::fs::write(folder.join("sound-gpt2.gguf"), vocabulary("gpt2", |_, _| {}))?;
        std::fs::write(folder.join("sound-llama-scores.gguf"), vocabulary("llama", |_, _| {}))?;
        let templates = folder.join("templates");
        std::fs::create_dir_all(&templates)?;
        for (n, source) in template_seeds().iter().enumerate() {
            std::fs::write(templates.join(format!("{n}.jinja")), source)?;
        }
    }
    for case in cases() {
        println!("{:36} {:?}: {}", case.name, case.stage, case.says);
        for (name, bytes) in &case.files {
            std::fs::write(folder.join(name), bytes)?;
        }
    }
    Ok(())
}

//! Model descriptions: golden files of every architecture, and the layouts in which files may store the same model.

use super::corpus::craft::{self, Craft};
use super::files::golden;
use std::collections::HashSet;
use std::path::Path;
use tandem::gguf::{File, Problems};
use tandem::model;
use tandem_spec::{Block, HeadOrder, Model, Weight};

/// Every weight of the model, those of its MTP block included.
fn weights(model: &Model) -> Vec<Weight> {
    let mut all = Vec::new();
    model.blocks.iter().for_each(|b| b.for_each(&mut |w| all.push(w.clone())));
    if let Some(mtp) = &model.mtp {
        let visited: Result<_, std::convert::Infallible> = mtp.try_map(&mut |w| {
            all.push(w.clone());
            Ok(())
        });
        visited.unwrap();
    }
    all
}

#[test]
fn golden_models_are_described_with_every_tensor() {
    for path in golden() {
        if path.file_name().unwrap().to_str().unwrap().starts_with("tokenizer-") {
            continue;
        }
        let file = File::open(&path).unwrap();
        let model = model::describe(&file).unwrap();
        let arch: &str = file.metadata().require("general.architecture").unwrap();
        assert_eq!(model.arch, arch);
        assert_eq!(model.blocks.len(), 2 * model.n_layers + 2);
        assert_eq!(model.is_hybrid(), ["qwen35", "qwen35moe", "qwen3next"].contains(&arch), "{path:?}");
        let used: HashSet<usize> = weights(&model).iter().map(|w| w.tensor).collect();
        for (index, tensor) in file.tensors().iter().enumerate() {
            assert!(used.contains(&index), "{path:?}: {} is not used", tensor.name);
        }
        let has_mtp = file.tensors().iter().any(|t| t.name.contains(".nextn."));
        assert_eq!(model.mtp.is_some(), has_mtp, "{path:?}");
        for block in &model.blocks {
            if let Block::DeltaNet(block) = block {
                let expected = if arch == "qwen3next" { HeadOrder::Grouped } else { HeadOrder::Tiled };
                assert_eq!(block.shape.head_order, expected);
            }
        }
    }
}

#[test]
fn a_vocabulary_alone_is_not_a_model() {
    let path = golden().into_iter().find(|p| p.ends_with("tokenizer-qwen2.gguf")).unwrap();
    let file = File::open(&path).unwrap();
    let mut problems = Problems::default();
    assert!(model::examine(&file, &mut problems).is_none());
    let first = model::describe(&file).unwrap_err();
    assert_eq!(first, problems.0[0]);
}

/// The values of every weight, in the order in which the blocks hold them.
fn values(craft: &Craft) -> Vec<Vec<f32>> {
    let file = File::from_bytes(craft.bytes(), "layout").unwrap();
    let model = model::describe(&file).unwrap();
    weights(&model).iter().map(|w| w.decode(&file)).collect()
}

/// Replaces tensors by one of shape `ne` that holds `rows` of them: (index into `from`, first row, rows).
fn fuse(craft: &mut Craft, from: &[&str], name: &str, ne: &[u64], rows: &[(usize, u64, u64)]) {
    let parts: Vec<_> = from.iter().map(|name| craft.remove_tensor(name)).collect();
    craft.tensor(name, ne, craft::F32);
    let data = rows.iter().flat_map(|&(part, first, n)| {
        let row = if ne.len() == 1 { 4 } else { 4 * ne[0] };
        parts[part].data[(first * row) as usize..((first + n) * row) as usize].to_vec()
    });
    craft.tensor_mut(name).data = data.collect();
}

#[test]
fn fused_query_key_value_comes_apart() {
    for (arch, n_q) in [("qwen2", 8), ("llama", 8), ("qwen35", 16)] {
        let apart = craft::model(&craft::tiny(arch), craft::F32);
        let mut fused = apart.clone();
        let names = |kind: &str| ["q", "k", "v"].map(|c| format!("blk.1.attn_{c}.{kind}"));
        let rows = [(0, 0, n_q), (1, 0, 4), (2, 0, 4)];
        let from = names("weight");
        fuse(&mut fused, &from.each_ref().map(|s| &s[..]), "blk.1.attn_qkv.weight", &[8, n_q + 8], &rows);
        if arch == "qwen2" {
            let from = names("bias");
            fuse(&mut fused, &from.each_ref().map(|s| &s[..]), "blk.1.attn_qkv.bias", &[n_q + 8], &rows);
        }
        assert_eq!(values(&fused), values(&apart), "{arch}");
    }
}

#[test]
fn fused_experts_come_apart_and_share_their_scale() {
    let mut apart = craft::model(&craft::tiny("qwen35moe"), craft::F32);
    apart.tensor("blk.0.ffn_up_exps.scale", &[3], craft::F32);
    let mut fused = apart.clone();
    apart.tensor("blk.0.ffn_gate_exps.scale", &[3], craft::F32);
    apart.tensor_mut("blk.0.ffn_gate_exps.scale").data = fused.tensor_mut("blk.0.ffn_up_exps.scale").data.clone();
    let rows: Vec<_> = (0..3).flat_map(|e| [(0, 8 * e, 8), (1, 8 * e, 8)]).collect();
    let from = ["blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"];
    fuse(&mut fused, &from, "blk.0.ffn_gate_up_exps.weight", &[8, 16, 3], &rows);
    assert_eq!(values(&fused), values(&apart));
}

#[test]
fn older_delta_net_layouts_come_apart() {
    // Two K heads and four V heads of width 4: two V heads a group.
    let shape = craft::tiny("qwen3next");
    let apart = craft::model(&shape, craft::F32);
    let mut fused = apart.clone();
    let group = |g: u64| [(0, 4 * g, 4), (0, 8 + 4 * g, 4), (0, 16 + 8 * g, 8), (1, 8 * g, 8)];
    let rows: Vec<_> = (0..2).flat_map(group).collect();
    fuse(&mut fused, &["blk.0.attn_qkv.weight", "blk.0.attn_gate.weight"], "blk.0.ssm_in.weight", &[8, 48], &rows);
    assert_eq!(values(&fused), values(&apart));

    let mut separate = apart.clone();
    separate.tensor("blk.0.ssm_ba.copy", &[8, 8], craft::F32);
    separate.tensor_mut("blk.0.ssm_ba.copy").data = apart.clone().tensor_mut("blk.0.ssm_ba.weight").data.clone();
    let beta = [(0, 0, 2), (0, 4, 2)];
    let alpha = [(0, 2, 2), (0, 6, 2)];
    fuse(&mut separate, &["blk.0.ssm_ba.weight"], "blk.0.ssm_beta.weight", &[8, 4], &beta);
    fuse(&mut separate, &["blk.0.ssm_ba.copy"], "blk.0.ssm_alpha.weight", &[8, 4], &alpha);
    assert_eq!(values(&separate), values(&apart));
}

#[test]
fn a_missing_head_is_the_embedding() {
    let mut tied = craft::model(&craft::tiny("qwen3"), craft::F32);
    tied.remove_tensor("output.weight");
    let values = values(&tied);
    assert_eq!(values.first(), values.last());
}

#[test]
fn layer_kinds_follow_the_interval_or_the_list() {
    let shape = craft::Shape { n_layers: 4, interval: 2, mtp: true, ..craft::tiny("qwen35") };
    let mut craft = craft::model(&shape, craft::F32);
    let kinds = |craft: &Craft| -> Vec<&str> {
        let file = File::from_bytes(craft.bytes(), "kinds").unwrap();
        let model = model::describe(&file).unwrap();
        assert!(matches!(&model.mtp.as_ref().unwrap().blocks[..], [Block::Attention(_), Block::Ffn(_)]));
        model.blocks[1..].iter().step_by(2).map(|b| b.kind()).take(4).collect()
    };
    let expected = ["delta_net", "attention", "delta_net", "attention"];
    assert_eq!(kinds(&craft), expected);
    craft.set("qwen35.full_attention_interval", craft::u32(1));
    craft.key("qwen35.attention.recurrent_layers", craft::bools(&[true, false, true, false, true]));
    // Some writers count heads of recurrent and MTP blocks as 0.
    craft.set("qwen35.attention.head_count_kv", craft::i32s(&[0, 1, 0, 1, 0]));
    assert_eq!(kinds(&craft), expected);
}

#[test]
fn interleaved_sections_leave_the_pairs_of_the_fourth_axis_unrotated() {
    let mut shape = craft::tiny("qwen35");
    (shape.head_dim, shape.n_rot) = (16, 16);
    let turns = |sections: [i32; 4]| {
        let shape = craft::Shape { sections, ..shape.clone() };
        let file = File::from_bytes(craft::model(&shape, craft::F32).bytes(), "sections").unwrap();
        let model = model::describe(&file).unwrap();
        let attention = model.blocks.into_iter().find_map(|b| match b {
            Block::Attention(b) => Some(b.shape.rope.rotated_pairs),
            _ => None,
        });
        attention.unwrap()
    };
    assert_eq!(turns([3, 3, 2, 0]), Vec::<bool>::new());
    // The example of the reference: with (4, 2, 2, 0) and 8 pairs, pair 7 does not turn.
    assert_eq!(turns([4, 2, 2, 0]), [true, true, true, true, true, true, true, false]);
}

#[test]
fn released_shapes_have_their_parameter_counts() {
    let shape = |arch, n_embd, n_layers, n_heads, n_kv_heads, n_ff, ssm_heads, tied| craft::Shape {
        arch,
        n_vocab: 248_320,
        n_embd,
        n_layers,
        n_heads,
        n_kv_heads,
        head_dim: 256,
        n_ff,
        n_rot: 64,
        sections: [11, 11, 10, 0],
        interval: 4,
        ssm_state: 128,
        ssm_groups: 16,
        ssm_heads,
        tied,
        ..craft::Shape::default()
    };
    let moe = |dense: craft::Shape, n_used, n_ff_exp| craft::Shape {
        n_experts: 256,
        n_used,
        n_ff_exp,
        n_ff_shared: n_ff_exp,
        ..dense
    };
    // Counts without the MTP block, in units of 1e5.
    let released = [
        (shape("qwen35", 1024, 24, 8, 2, 3584, 16, true), 7_524),
        (shape("qwen35", 2048, 24, 8, 2, 6144, 16, true), 18_818),
        (shape("qwen35", 2560, 32, 16, 4, 9216, 32, true), 42_058),
        (shape("qwen35", 4096, 32, 16, 4, 12288, 32, false), 89_538),
        (shape("qwen35", 5120, 64, 24, 4, 17408, 48, false), 268_960),
        (moe(shape("qwen35moe", 2048, 40, 16, 2, 0, 32, false), 8, 512), 346_606),
        (moe(shape("qwen35moe", 3072, 48, 32, 2, 0, 64, false), 8, 1024), 1_221_115),
    ];
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    for (shape, expected) in released {
        let craft = craft::model(&craft::Shape { mtp: true, ..shape.clone() }, craft::Q4_K);
        // Only the header is written; the data is a hole in the file.
        let path = folder.join(format!("released-{}-{}.gguf", shape.arch, shape.n_embd));
        std::fs::write(&path, craft.header()).unwrap();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(craft.len()).unwrap();
        let file = File::open(&path).unwrap();
        let model = model::describe(&file).unwrap();
        let mut tensors = HashSet::new();
        model.blocks.iter().for_each(|b| {
            b.for_each(&mut |w: &Weight| {
                tensors.insert(w.tensor);
            })
        });
        let count: usize = tensors.iter().map(|&i| file.tensors()[i].ne.iter().product::<usize>()).sum();
        assert_eq!((count + 50_000) / 100_000, expected, "{} of width {}", shape.arch, shape.n_embd);
        if shape.n_layers == 40 {
            assert_eq!(file.tensors().len(), 753, "tensors of the 35B-A3B file");
        }
        drop(file);
        std::fs::remove_file(&path).unwrap();
    }
}

/// Kernels count rows in 32 bits. The file is as long as it says, without taking place on the disk.
#[test]
fn a_vocabulary_of_too_many_rows_is_refused() {
    let mut craft = craft::model(&craft::tiny("llama"), craft::F32);
    let mut table = craft.remove_tensor("token_embd.weight");
    let n_rows = (1 << 24) + 1;
    (table.ne, table.size, table.data) = (vec![8, n_rows], 4 * 8 * n_rows, Vec::new());
    craft.tensors.push(table);
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vocabulary-huge.gguf");
    std::fs::write(&path, craft.header()).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(craft.len()).unwrap();
    let error = model::describe(&File::open(&path).unwrap()).unwrap_err().to_string();
    assert!(error.ends_with("tensor \"token_embd.weight\": expected at most 16777216 rows, found 16777217"), "{error}");
    std::fs::remove_file(path).unwrap();
}

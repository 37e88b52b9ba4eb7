//! Model descriptions: golden files of every architecture, and the layouts in which files may store the same model.

use super::files::golden;
use std::collections::HashSet;
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

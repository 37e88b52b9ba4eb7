//! The model description: of any file it is an error or a model whose every weight lies inside its tensor.

#![no_main]

use tandem::{gguf::File, model};
use tandem_spec::{Block, TensorSource, Weight};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(file) = File::from_bytes(data.to_vec(), "fuzz") else { return };
    let Ok(model) = model::describe(&file) else { return };
    let check = |weight: &Weight| {
        assert_eq!(weight.name, file.tensors()[weight.tensor].name);
        let bytes: usize = weight.runs(&file).map(<[u8]>::len).sum();
        assert_eq!(bytes, weight.n_bytes());
        assert!(bytes <= file.bytes(weight.tensor).len());
    };
    model.blocks.iter().for_each(|block| block.for_each(&mut |weight| check(weight)));
    assert_eq!(model.blocks.len(), 2 * model.n_layers + 2);
    for block in &model.blocks {
        if let Block::Attention(b) = block {
            assert!(b.shape.n_heads.is_multiple_of(b.shape.n_kv_heads) && b.shape.rope.n_rot <= b.shape.head_dim);
        }
    }
});

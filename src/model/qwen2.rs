//! `qwen2` (Qwen2, Qwen2.5): attention with biases on q, k and v.

use super::layers;
use super::reader::Reader;
use tandem_spec::{Model, RopeStyle};

pub(super) fn read(r: &mut Reader) -> Option<Model> {
    layers::dense(r, RopeStyle::Neox, false, true, false)
}

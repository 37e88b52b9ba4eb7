//! `qwen3` and `qwen3moe` (Qwen3): attention with q and k norms; dense or with experts, none of them shared.

use super::layers;
use super::reader::Reader;
use tandem_spec::{Model, RopeStyle};

pub(super) fn read(r: &mut Reader) -> Option<Model> {
    let experts = r.arch == "qwen3moe";
    layers::dense(r, RopeStyle::Neox, true, false, experts)
}

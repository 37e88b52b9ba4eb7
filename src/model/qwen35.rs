//! `qwen35` and `qwen35moe` (Qwen3.5): hybrids whose V heads are tiled over the K heads and whose rotation has
//! sections.

use super::layers;
use super::reader::Reader;
use tandem_spec::{HeadOrder, Model};

pub(super) fn read(r: &mut Reader) -> Option<Model> {
    let experts = r.arch == "qwen35moe";
    layers::hybrid(r, HeadOrder::Tiled, true, experts)
}

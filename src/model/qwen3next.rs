//! `qwen3next` (Qwen3-Next): a hybrid with experts whose V heads are grouped by K head; beta and alpha come fused in
//! `ssm_ba`, and in old files q, k, v and z in `ssm_in`.

use super::layers;
use super::reader::Reader;
use tandem_spec::{HeadOrder, Model};

pub(super) fn read(r: &mut Reader) -> Option<Model> {
    layers::hybrid(r, HeadOrder::Grouped, false, true)
}

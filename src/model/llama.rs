//! `llama` (Llama 2 and 3, and what shares their shape): rotation of adjacent pairs, optionally with `rope_freqs`.

use super::layers;
use super::reader::Reader;
use tandem_spec::{Model, RopeStyle};

pub(super) fn read(r: &mut Reader) -> Option<Model> {
    layers::dense(r, RopeStyle::Adjacent, false, false, false)
}

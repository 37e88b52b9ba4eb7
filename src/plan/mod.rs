//! The plan: which block (or which share of it) runs where, and every byte that takes. A pure function of
//! (model description, machine facts, wishes): no I/O, no clock, no device call.

use tandem_spec::KvDtype;

/// A place where a block can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The CPU workers.
    Cpu,
    /// CUDA device by its index.
    Cuda(usize),
}

/// What the engine does: it loads exactly this and its step walks exactly this.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Plan {
    /// Positions per slot.
    pub n_ctx: usize,
    /// Sequences that have a state at the same time.
    pub n_slots: usize,
    /// Tokens of the largest batch.
    pub n_batch: usize,
    /// How keys and values are stored.
    pub kv_dtype: KvDtype,
    /// CPU worker threads.
    pub threads: usize,
    /// Where each block of the model runs, by block index.
    pub places: Vec<Device>,
}

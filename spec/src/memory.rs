//! What a backend's state takes, by use: the words in which backends tell the planner.

/// Bytes of a state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateBytes {
    /// Keys and values.
    pub kv: u64,
    /// Recurrent and convolution states.
    pub states: u64,
    /// Logits.
    pub logits: u64,
    /// Everything else: activations and scratch of the largest batch.
    pub scratch: u64,
}

impl StateBytes {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.kv + self.states + self.logits + self.scratch
    }
}

//! A batch: the tokens of one step, by sequence. States and KV rows are addressed by slot, so that
//! several sequences decode, or several prompts of different lengths run, in one step.

/// A run of consecutive tokens of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Slot whose KV rows and GDN states this run continues.
    pub slot: usize,
    /// Position of the first token; equals the number of tokens the slot has seen.
    pub position: usize,
    /// Tokens of this run, at least 1. Runs follow each other in [`Batch::tokens`].
    pub n_tokens: usize,
}

/// The tokens of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Token ids `[n_tokens]`, run after run.
    pub tokens: Vec<u32>,
    /// The runs; their `n_tokens` sum to `tokens.len()`, and no slot occurs twice.
    pub sequences: Vec<Sequence>,
    /// Rows (indices into `tokens`, ascending) whose logits are wanted.
    pub wanted: Vec<usize>,
}

impl Batch {
    /// One sequence: `tokens` at `position` of `slot`; logits of the last token only, or of all.
    pub fn single(slot: usize, position: usize, tokens: &[u32], all_logits: bool) -> Self {
        let n = tokens.len();
        Self {
            tokens: tokens.to_vec(),
            sequences: vec![Sequence { slot, position, n_tokens: n }],
            wanted: if all_logits { (0..n).collect() } else { vec![n - 1] },
        }
    }

    /// What is wrong with the batch for `n_slots` slots of `n_ctx` positions and `n_vocab` tokens.
    pub fn check(&self, n_slots: usize, n_ctx: usize, n_vocab: usize) -> Result<(), String> {
        if self.tokens.is_empty() {
            return Err("a batch without tokens".into());
        }
        let mut seen = vec![false; n_slots];
        let mut total = 0usize;
        for s in &self.sequences {
            if s.slot >= n_slots {
                return Err(format!("slot {} of a batch, but there are {n_slots}", s.slot));
            }
            if std::mem::replace(&mut seen[s.slot], true) {
                return Err(format!("slot {} occurs twice in a batch", s.slot));
            }
            if s.n_tokens == 0 {
                return Err(format!("slot {} of a batch has no tokens", s.slot));
            }
            if s.n_tokens > n_ctx || s.position > n_ctx - s.n_tokens {
                return Err(format!(
                    "{} tokens at position {} do not fit a context of {n_ctx}",
                    s.n_tokens, s.position
                ));
            }
            total += s.n_tokens;
        }
        if total != self.tokens.len() {
            return Err(format!("a batch of {} tokens whose sequences count {total}", self.tokens.len()));
        }
        if let Some(t) = self.tokens.iter().find(|t| **t as usize >= n_vocab) {
            return Err(format!("token id {t}, but the vocabulary has {n_vocab} entries (0 to {})", n_vocab - 1));
        }
        if !self.wanted.is_sorted_by(|a, b| a < b) || self.wanted.last().is_some_and(|&r| r >= total) {
            return Err("wanted rows must ascend and lie within the batch".into());
        }
        Ok(())
    }
}

//! `Embed`: rows of the packed table, decoded.

use crate::Matrix;
use crate::pool::Worker;
use crate::step::Step;
use std::ops::Range;
use std::sync::Arc;

/// The token table.
pub(crate) struct EmbedBlock {
    /// `[n_vocab, n_embd]`; in tied models the head's matrix.
    pub token_embd: Arc<Matrix>,
}

impl EmbedBlock {
    /// Bytes of the weights.
    pub fn n_bytes(&self) -> usize {
        self.token_embd.n_bytes()
    }

    /// Writes the rows of the tokens to the residual stream.
    pub fn run(&self, w: &Worker, step: &Step) {
        // SAFETY: tokens of this worker's share.
        unsafe { self.write_rows(w.share(step.n_tokens), step) };
    }

    /// Writes the rows of some of the tokens.
    ///
    /// # Safety
    /// Nobody else reads or writes the rows of `tokens` in the residual stream meanwhile.
    pub unsafe fn write_rows(&self, tokens: Range<usize>, step: &Step) {
        for token in tokens {
            // SAFETY: as the caller promises.
            let x = unsafe { step.x.write(step.row(token, 0..step.n_embd)) };
            self.token_embd.decode_row(step.batch.tokens[token] as usize, x);
        }
    }
}

//! `Head`: final norm and output projection, for the wanted rows only.

use crate::norm::rms_norm;
use crate::pool::Worker;
use crate::projection::{Projection, for_each_run};
use crate::step::Step;
use tandem_spec::HeadShape;

/// The output head.
pub(crate) struct HeadBlock {
    pub shape: HeadShape,
    /// `[n_embd]`.
    pub output_norm: Box<[f32]>,
    /// `[n_vocab, n_embd]`.
    pub output: Projection,
}

impl HeadBlock {
    /// Bytes of the weights.
    pub fn n_bytes(&self) -> usize {
        size_of_val(&*self.output_norm) + self.output.n_bytes()
    }

    /// Writes the logits of the wanted rows.
    pub fn run(&self, w: &Worker, step: &Step) {
        let (wanted, n_vocab) = (&step.batch.wanted, self.shape.n_vocab);
        if wanted.is_empty() {
            return;
        }
        let forms = self.output.forms();
        let h = step.prepare(w, &step.buffers.normed, wanted.len(), step.n_embd, forms, |i, row| {
            // SAFETY: nobody writes the residual stream in this stage.
            let x = unsafe { step.x.read(step.row(wanted[i], 0..step.n_embd)) };
            rms_norm(step.isa, x, &self.output_norm, self.shape.rms_eps, row);
            row
        });
        for_each_run(w, wanted.len(), &[&self.output], |_, rows| {
            let out = step.logits.ptr(rows.start..(wanted.len() - 1) * n_vocab + rows.end);
            // SAFETY: these rows of the projection are this worker's, in every token.
            unsafe { self.output.apply(step.isa, rows, &h, out, n_vocab) };
        });
    }
}

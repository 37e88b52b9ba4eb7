//! `Head`: final norm and output projection, for the wanted rows only.

use crate::norm::rms_norm;
use crate::pool::Worker;
use crate::projection::{Projection, for_each_piece};
use crate::step::Step;
use std::ops::Range;
use tandem_spec::HeadShape;

/// Logits of one row that a worker collects before it writes them, since the lines that they go to have left its caches
/// and each write takes the place of reads. With 1024, a token of the 0.8B in Q4_K_M takes 0.5 % less time on two cores
/// of a Sapphire Rapids, one of a mixture with a head of 2048 columns 1.4 %; 512 and 4096 gain less.
const RUN_ROWS: usize = 1024;

/// Collected logits, on a line of their own.
#[repr(align(64))]
struct Collected([f32; RUN_ROWS]);

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
        let (mut run, mut collected) = (0..0, Collected([0.0; RUN_ROWS]));
        let write = |run: &Range<usize>, collected: &Collected| {
            // SAFETY: these rows of the projection were this worker's pieces.
            unsafe { step.logits.write(run.clone()) }.copy_from_slice(&collected.0[..run.len()]);
        };
        for_each_piece(w, &[&self.output], |_, rows| {
            if wanted.len() == 1 {
                if rows.start != run.end || run.len() + rows.len() > RUN_ROWS {
                    write(&run, &collected);
                    run = rows.start..rows.start;
                }
                let out = &mut collected.0[run.len()..][..rows.len()];
                run.end = rows.end;
                // SAFETY: the logits that are collected are this worker's own.
                unsafe { self.output.apply(step.isa, rows, &h, out.as_mut_ptr(), out.len()) };
                return;
            }
            let out = step.logits.ptr(rows.start..(wanted.len() - 1) * n_vocab + rows.end);
            // SAFETY: these rows of the projection are this worker's piece, in every token.
            unsafe { self.output.apply(step.isa, rows, &h, out, n_vocab) };
        });
        write(&run, &collected);
        w.barrier();
    }
}

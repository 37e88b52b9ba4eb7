//! `Ffn`: gate and up rows of a run are multiplied and activated by one worker; one barrier; down projection.

use crate::ahead::Ahead;
use crate::norm::{rms_norm, silu_mul};
use crate::pool::Worker;
use crate::projection::{Cut, Projection, own_rows, read_ahead, vector};
use crate::step::Step;
use crate::{Activations, Error, Isa};
use std::ops::Range;
use tandem_spec::{Ffn, FfnShape, TensorSource, Weight};

/// `silu(gate . h) * (up . h)` for the hidden rows `rows`: the first of the first token at `out`, tokens `stride`
/// elements apart. `tile` holds `[h.n_rows(), rows.len()]`.
///
/// # Safety
/// `[h.n_rows(), rows.len()]` elements at `out` are valid, and nobody else uses them meanwhile.
pub(crate) unsafe fn gate_up(
    isa: Isa,
    gate: &Projection,
    up: &Projection,
    rows: Range<usize>,
    h: &Activations,
    (out, stride): (*mut f32, usize),
    tile: &mut [f32],
) {
    let n = rows.len();
    let tile = &mut tile[..h.n_rows() * n];
    // SAFETY: the tile is the caller's own, and the caller promises the output.
    unsafe {
        gate.apply(isa, rows.clone(), h, out, stride);
        up.apply(isa, rows.clone(), h, tile.as_mut_ptr(), n);
    }
    for (token, up) in tile.chunks_exact(n).enumerate() {
        // SAFETY: a row of the output.
        silu_mul(isa, unsafe { std::slice::from_raw_parts_mut(out.add(token * stride), n) }, up);
    }
}

/// A dense feed-forward block.
pub(crate) struct FfnBlock {
    shape: FfnShape,
    /// `[n_embd]`.
    ffn_norm: Box<[f32]>,
    /// `[n_ff, n_embd]`.
    ffn_gate: Projection,
    /// `[n_ff, n_embd]`.
    ffn_up: Projection,
    /// `[n_embd, n_ff]`.
    ffn_down: Projection,
}

impl FfnBlock {
    /// Packs the weights of `block`.
    pub fn load(block: &Ffn<Weight>, source: &dyn TensorSource, isa: Isa) -> Result<Self, Error> {
        Ok(Self {
            shape: block.shape.clone(),
            ffn_norm: vector(&block.ffn_norm, source),
            ffn_gate: Projection::load(&block.ffn_gate, source, isa)?,
            ffn_up: Projection::load(&block.ffn_up, source, isa)?,
            ffn_down: Projection::load(&block.ffn_down, source, isa)?,
        })
    }

    /// Bytes of the weights.
    pub fn n_bytes(&self) -> usize {
        size_of_val(&*self.ffn_norm) + self.projections().map(|p| p.n_bytes()).sum::<usize>()
    }

    /// Gate, up and down.
    pub fn projections(&self) -> impl Iterator<Item = &Projection> {
        [&self.ffn_gate, &self.ffn_up, &self.ffn_down].into_iter()
    }

    /// Reads ahead what this worker will multiply first.
    pub fn read_ahead(&self, w: &Worker, ahead: &mut Ahead) {
        let (gate, up) = (&self.ffn_gate.matrix, &self.ffn_up.matrix);
        if own_rows(w, self.shape.n_ff).all(|rows| ahead.rows(gate, rows.clone()) && ahead.rows(up, rows)) {
            read_ahead(w, &[&self.ffn_down], ahead);
        }
    }

    /// Adds the block to the residual stream.
    pub fn run(&self, w: &Worker, step: &Step) {
        let forms = self.ffn_gate.forms().or(self.ffn_up.forms());
        let h = step.prepare(w, &step.buffers.normed, step.n_tokens, step.n_embd, forms, |i, row| {
            // SAFETY: nobody writes the residual stream in this stage.
            let x = unsafe { step.x.read(step.row(i, 0..step.n_embd)) };
            rms_norm(step.isa, x, &self.ffn_norm, self.shape.rms_eps, row);
            row
        });
        let n_ff = self.shape.n_ff;
        let at = |token: usize, cols: Range<usize>| step.hidden(token * n_ff + cols.start..token * n_ff + cols.end);
        let cut = Cut::new(n_ff, w.n_workers(), step.n_tokens);
        let tile = step.tile(w);
        for run in w.runs(n_ff.div_ceil(cut.rows), cut.longest) {
            let rows = cut.rows_of(run, n_ff);
            let out = step.memory.ptr(at(0, rows.clone()).start..at(step.n_tokens - 1, rows.clone()).end);
            // SAFETY: these hidden columns are this worker's.
            unsafe { gate_up(step.isa, &self.ffn_gate, &self.ffn_up, rows, &h, (out, n_ff), tile) };
        }
        step.barrier_reading(w, |ahead| read_ahead(w, &[&self.ffn_down], ahead));
        let forms = self.ffn_down.forms();
        let hidden = step.prepare(w, &step.buffers.hidden, step.n_tokens, n_ff, forms, |i, _| {
            // SAFETY: nobody writes the hidden scratch in this stage.
            unsafe { step.memory.read(at(i, 0..n_ff)) }
        });
        step.add(w, &self.ffn_down, &hidden);
    }
}

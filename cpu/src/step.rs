//! One step as the blocks see it: the batch, the shared memory, and the three things most stages do, which are to
//! prepare the activations of a projection, to add a projection to the residual stream, and to read ahead at a barrier.
//! What a block adds is complete after the barrier that comes behind it in [`crate::backend`].
//!
//! Memory is shared by one rule: between two barriers an element is written by one worker, or read by any.

use crate::ahead::Ahead;
use crate::handoff::Choices;
use crate::norm::add_scaled;
use crate::pool::Worker;
use crate::projection::{Projection, for_each_run};
use crate::state::{Buffers, Layout, REDUNDANT_ROWS};
use crate::{ActivationBuffer, Activations, Forms, Isa};
use std::marker::PhantomData;
use std::ops::Range;
use tandem_spec::{Batch, Sequence};

/// f32 memory that the workers of a step share.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    ptr: *mut f32,
    len: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: all access goes through functions whose callers keep to the rule above.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// Shares `memory` for a step.
    pub fn new(memory: &'a mut [f32]) -> Self {
        Self { ptr: memory.as_mut_ptr(), len: memory.len(), lifetime: PhantomData }
    }

    /// `len` elements at `ptr`.
    ///
    /// # Safety
    /// They are valid for `'a`, and nobody else touches them while one of the functions below gives them out.
    pub unsafe fn from_raw(ptr: *mut f32, len: usize) -> Self {
        Self { ptr, len, lifetime: PhantomData }
    }

    /// The first `len` elements.
    pub fn prefix(self, len: usize) -> Self {
        assert!(len <= self.len, "{len} elements of {}", self.len);
        Self { len, ..self }
    }

    /// Pointer to the elements `range`.
    #[inline]
    pub fn ptr(&self, range: Range<usize>) -> *mut f32 {
        assert!(range.start <= range.end && range.end <= self.len, "elements {range:?} of {}", self.len);
        // SAFETY: `start` lies within the memory.
        unsafe { self.ptr.add(range.start) }
    }

    /// Elements to read.
    ///
    /// # Safety
    /// Nobody writes them while the slice is used, which ends before the step does.
    #[inline]
    pub unsafe fn read<'r>(&self, range: Range<usize>) -> &'r [f32] {
        // SAFETY: in bounds by `ptr`; not written, as the caller promises.
        unsafe { std::slice::from_raw_parts(self.ptr(range.clone()), range.len()) }
    }

    /// Elements to write.
    ///
    /// # Safety
    /// Nobody else uses them while the slice is used.
    #[inline]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn write(&self, range: Range<usize>) -> &'a mut [f32] {
        // SAFETY: in bounds by `ptr`; not shared, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.ptr(range.clone()), range.len()) }
    }
}

/// A step.
pub(crate) struct Step<'a> {
    pub isa: Isa,
    pub batch: &'a Batch,
    pub n_tokens: usize,
    pub n_embd: usize,
    /// Residual stream `[n_tokens, n_embd]`.
    pub x: Shared<'a>,
    /// Where a share of a block puts what it would add to the residual stream, which it leaves alone.
    pub sum: Option<Shared<'a>>,
    /// Experts that the block's home has chosen for a share of a mixture.
    pub choices: Option<Choices<'a>>,
    /// `[wanted, n_vocab]`.
    pub logits: Shared<'a>,
    pub layout: &'a Layout,
    /// Memory of the layout.
    pub memory: Shared<'a>,
    pub buffers: &'a Buffers,
}

impl<'a> Step<'a> {
    /// Columns `cols` of row `token` of the wide scratch.
    pub fn wide(&self, token: usize, cols: Range<usize>) -> Range<usize> {
        let start = self.layout.wide + token * self.layout.wide_len;
        start + cols.start..start + cols.end
    }

    /// Elements `range` of the hidden scratch.
    pub fn hidden(&self, range: Range<usize>) -> Range<usize> {
        self.layout.hidden + range.start..self.layout.hidden + range.end
    }

    /// Columns `cols` of row `token` of the mixed scratch.
    pub fn mixed(&self, token: usize, cols: Range<usize>) -> Range<usize> {
        let start = self.layout.mixed + token * self.layout.mixed_len;
        start + cols.start..start + cols.end
    }

    /// Cosines and sines of `token` in rotary table `rope`.
    pub fn rope(&self, rope: usize, token: usize, n_rot: usize) -> Range<usize> {
        let start = self.layout.rope + (rope * self.layout.size.n_batch + token) * self.layout.rope_len;
        start..start + n_rot
    }

    /// Columns `cols` of row `token` of the residual stream.
    pub fn row(&self, token: usize, cols: Range<usize>) -> Range<usize> {
        token * self.n_embd + cols.start..token * self.n_embd + cols.end
    }

    /// Columns `cols` of row `token` of what the block adds to: the residual stream or the sum of a share, which
    /// [`Step::begin_sum`] has cleared.
    ///
    /// # Safety
    /// As [`Shared::write`].
    pub unsafe fn target(&self, token: usize, cols: Range<usize>) -> &'a mut [f32] {
        // SAFETY: as the caller promises.
        unsafe { self.sum.as_ref().unwrap_or(&self.x).write(self.row(token, cols)) }
    }

    /// Clears columns `cols` of the sum of a share, in every token.
    ///
    /// # Safety
    /// As [`Shared::write`].
    pub unsafe fn begin_sum(&self, cols: Range<usize>) {
        for token in (0..self.n_tokens).filter(|_| self.sum.is_some()) {
            // SAFETY: as the caller promises.
            unsafe { self.target(token, cols.clone()).fill(0.0) };
        }
    }

    /// This worker's scratch row.
    #[allow(clippy::mut_from_ref)]
    pub fn row_of(&self, w: &Worker) -> &mut [f32] {
        // SAFETY: only this worker uses its row, in one function at a time.
        unsafe { self.memory.write(self.layout.worker_row(w.index)) }
    }

    /// This worker's scratch tile.
    #[allow(clippy::mut_from_ref)]
    pub fn tile(&self, w: &Worker) -> &mut [f32] {
        // SAFETY: only this worker uses its tile, in one function at a time.
        unsafe { self.memory.write(self.layout.worker_tile(w.index)) }
    }

    /// The sequences and the row at which each begins.
    pub fn sequences(&self) -> impl Iterator<Item = (usize, &'a Sequence)> {
        let mut next = 0;
        self.batch.sequences.iter().map(move |s| {
            let first = next;
            next += s.n_tokens;
            (first, s)
        })
    }

    /// Activations `[n_rows, n_cols]` in `forms`, row `i` from `fill(i, scratch row)`: by every worker for itself
    /// if the rows are few, else by all together into `buffer`, with a barrier.
    pub fn prepare(
        &self,
        w: &Worker,
        buffer: &'a ActivationBuffer,
        n_rows: usize,
        n_cols: usize,
        forms: Forms,
        fill: impl for<'r> Fn(usize, &'r mut [f32]) -> &'r [f32],
    ) -> Activations<'a> {
        let few = n_rows <= REDUNDANT_ROWS;
        let view = if few { &self.buffers.own[w.index] } else { buffer }.view(0, n_rows, n_cols, forms);
        let row = self.row_of(w);
        for i in if few { 0..n_rows } else { w.share(n_rows) } {
            let values = fill(i, &mut row[..n_cols]);
            // SAFETY: the buffer is this worker's own, or the rows of a share are.
            unsafe { view.write(i, 0, values) };
        }
        if !few {
            w.barrier();
        }
        view
    }

    /// [`Worker::barrier`]; with one token, workers that wait for others read ahead what `first` says that they will
    /// multiply first in the next stage.
    pub fn barrier_reading(&self, w: &Worker, first: impl FnOnce(&mut Ahead)) {
        match self.n_tokens {
            1 => w.barrier_while(|is_over| first(&mut Ahead::briefly_until(is_over))),
            _ => w.barrier(),
        }
    }

    /// `x += projection . activations`: complete after the next barrier.
    pub fn add(&self, w: &Worker, projection: &Projection, activations: &Activations) {
        let tile = self.tile(w);
        for_each_run(w, self.n_tokens, &[projection], |_, rows| {
            let n = rows.len();
            assert!(self.n_tokens * n <= tile.len());
            // SAFETY: the tile is this worker's own.
            unsafe { projection.apply(self.isa, rows.clone(), activations, tile.as_mut_ptr(), n) };
            // SAFETY: these rows of the projection are this worker's, in every token.
            unsafe { self.begin_sum(rows.clone()) };
            for token in 0..self.n_tokens {
                // SAFETY: as above.
                let x = unsafe { self.target(token, rows.clone()) };
                add_scaled(self.isa, x, 1.0, &tile[token * n..][..n]);
            }
        });
    }
}

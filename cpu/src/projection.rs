//! Projections `y = scale * (W . x) + bias` on packed matrices, and the cutting of their rows into pieces for
//! workers. Owns no memory but the weights.

use crate::ahead::Ahead;
use crate::pool::Worker;
use crate::simd::{self, Kernel, Simd, for_lanes};
use crate::{Activations, Error, Forms, Isa, Matrix, OutRows};
use std::ops::Range;
use std::sync::Arc;
use tandem_spec::{Linear, TensorSource, Weight};

/// Decodes a weight into f32: norms, biases, taps and other small vectors.
pub(crate) fn vector(weight: &Weight, source: &dyn TensorSource) -> Box<[f32]> {
    let geometry = weight.ty.row();
    let mut out = vec![0f32; weight.n_rows() * weight.n_cols].into_boxed_slice();
    let blocks = weight.runs(source).flat_map(|run| run.chunks_exact(geometry.block_bytes));
    for (block, out) in blocks.zip(out.chunks_exact_mut(geometry.block_len)) {
        weight.ty.decode(block, out);
    }
    out
}

/// A packed projection.
pub(crate) struct Projection {
    /// `[n_out, n_in]`; shared where two blocks use the same tensor.
    pub matrix: Arc<Matrix>,
    scale: f32,
    /// `[n_out]`, or empty.
    bias: Box<[f32]>,
    /// Whether no worker reads the products ([`OutRows::past_caches`]).
    past_caches: bool,
}

impl Projection {
    /// Packs `linear`.
    pub fn load(linear: &Linear<Weight>, source: &dyn TensorSource, isa: Isa) -> Result<Self, Error> {
        Ok(Self::of(Arc::new(Matrix::pack(&linear.weight, source, isa)?), linear, source))
    }

    /// `linear` on a matrix that is already packed.
    pub fn of(matrix: Arc<Matrix>, linear: &Linear<Weight>, source: &dyn TensorSource) -> Self {
        let scale = linear.scale.as_ref().map_or(1.0, |s| vector(s, source)[0]);
        let bias = linear.bias.as_ref().map(|b| vector(b, source)).unwrap_or_default();
        Self { matrix, scale, bias, past_caches: false }
    }

    /// The same, where no worker reads the products.
    pub fn past_caches(self) -> Self {
        Self { past_caches: true, ..self }
    }

    /// A product without scale and bias.
    pub fn plain(matrix: Arc<Matrix>) -> Self {
        Self { matrix, scale: 1.0, bias: Box::default(), past_caches: false }
    }

    /// Packs a stack of `n` projections of the same shape, one matrix each.
    pub fn load_stack(
        linear: &Linear<Weight>,
        n: usize,
        source: &dyn TensorSource,
        isa: Isa,
    ) -> Result<Vec<Self>, Error> {
        if linear.bias.is_some() {
            return Err(Error::Unsupported(format!("{} has a bias, which experts do not have", linear.weight.name)));
        }
        let scales = linear.scale.as_ref().map(|s| vector(s, source));
        let one = |(e, matrix): (usize, Matrix)| {
            let scale = scales.as_ref().map_or(1.0, |s| s[e.min(s.len() - 1)]);
            Self { matrix: Arc::new(matrix), scale, bias: Box::default(), past_caches: false }
        };
        Ok(Matrix::pack_stack(&linear.weight, n, source, isa)?.into_iter().enumerate().map(one).collect())
    }

    /// Form of activations that the matrix reads.
    pub fn forms(&self) -> Forms {
        Forms::of(self.matrix.ty())
    }

    /// Bytes of matrix and bias.
    pub fn n_bytes(&self) -> usize {
        self.matrix.n_bytes() + size_of_val(&*self.bias)
    }

    /// Rows of the output.
    pub fn n_out(&self) -> usize {
        self.matrix.n_rows()
    }

    /// Rows `rows` (whole panels, the last one maybe cut) of the projection, for every row of `x`: the first of the
    /// first token at `out`, tokens `stride` elements apart.
    ///
    /// # Safety
    /// `[x.n_rows(), rows.len()]` elements at `out` are valid, and nobody else uses them meanwhile.
    pub unsafe fn apply(&self, isa: Isa, rows: Range<usize>, x: &Activations, out: *mut f32, stride: usize) {
        let panel_rows = self.matrix.panel_rows();
        assert!(rows.start.is_multiple_of(panel_rows), "rows {rows:?} do not begin a panel");
        let panels = rows.start / panel_rows..rows.end.div_ceil(panel_rows);
        // SAFETY: the caller promises the memory; panels of one call are disjoint from those of others.
        let to = unsafe { OutRows::new(out, stride, x.n_rows(), rows.clone()) };
        self.matrix.mul(panels, x, &to.past_caches(self.past_caches));
        if self.scale != 1.0 || !self.bias.is_empty() {
            let bias = if self.bias.is_empty() { &[][..] } else { &self.bias[rows.clone()] };
            for token in 0..x.n_rows() {
                // SAFETY: rows of the memory that the caller promised.
                let y = unsafe { std::slice::from_raw_parts_mut(out.add(token * stride), rows.len()) };
                simd::run(isa, 0, ScaleAndShift { y, scale: self.scale, bias });
            }
        }
    }
}

/// `y = scale * y + bias`; an empty bias is zero.
struct ScaleAndShift<'a> {
    y: &'a mut [f32],
    scale: f32,
    bias: &'a [f32],
}

impl Kernel for ScaleAndShift<'_> {
    type Output = ();
    #[inline(always)]
    fn run<V: Simd>(self) {
        assert!(self.bias.is_empty() || self.bias.len() == self.y.len());
        let (y, bias) = (self.y.as_mut_ptr(), self.bias);
        for_lanes!(V, self.y.len(), |i| {
            // SAFETY: `i + LANES` is at most the length, which the bias has as well.
            unsafe {
                let shift = if bias.is_empty() { V::splat(0.0) } else { V::load(bias.as_ptr().add(i)) };
                V::load(y.add(i)).mul_add(V::splat(self.scale), shift).store(y.add(i));
            }
        });
    }
}

/// Rows of the smallest piece: whole panels of every layout and whole blocks of activations.
pub(crate) const ROWS: usize = 32;

/// How the rows of a stage are cut into pieces, and how many of them a worker takes at a time.
#[derive(Clone, Copy)]
pub(crate) struct Cut {
    /// Rows of a piece, a multiple of [`ROWS`].
    pub rows: usize,
    /// Pieces of a run at most.
    pub longest: usize,
}

impl Cut {
    /// Of `total` rows that are multiplied with `n_tokens` rows of activations. One row: runs of a share over the
    /// number of workers. Two workers jump to other weights seldom, which takes about a microsecond; many share what
    /// memory gives unequally, and have to help each other. More rows: enough pieces that all workers end together, and
    /// few enough rows that their weights stay in a cache.
    pub fn new(total: usize, n_workers: usize, n_tokens: usize) -> Self {
        match n_tokens {
            1 => {
                let longest = (total / ROWS).div_ceil(n_workers * n_workers).clamp(1, MAX_RUN_ROWS / ROWS);
                Self { rows: ROWS, longest }
            }
            _ => {
                let rows = (total / (16 * n_workers)).next_multiple_of(ROWS).clamp(ROWS, MAX_PIECE_ROWS);
                Self { rows, longest: 1 }
            }
        }
    }

    /// Rows of the pieces `pieces` of a matrix of `n` rows.
    pub fn rows_of(&self, pieces: Range<usize>, n: usize) -> Range<usize> {
        n.min(pieces.start * self.rows)..n.min(pieces.end * self.rows)
    }
}

/// Of `n` rows that are multiplied with one row of activations, those that worker number `worker` is given unless
/// another helps it.
pub(crate) fn share_rows(w: &Worker, worker: usize, n: usize) -> Range<usize> {
    let pieces = w.share_of(worker, n.div_ceil(ROWS));
    n.min(pieces.start * ROWS)..n.min(pieces.end * ROWS)
}

/// Of `n` rows that are multiplied with one row of activations, the runs that this worker takes if it has its share for
/// itself.
pub(crate) fn own_rows(w: &Worker, n: usize) -> impl Iterator<Item = Range<usize>> {
    let cut = Cut::new(n, w.n_workers(), 1);
    w.own_runs(n.div_ceil(cut.rows), cut.longest).map(move |run| cut.rows_of(run, n))
}

/// Most rows of a piece for several rows of activations: what tiles have room for.
pub(crate) const MAX_PIECE_ROWS: usize = 128;

/// Most rows of a run for one row of activations, likewise.
pub(crate) const MAX_RUN_ROWS: usize = 1024;

/// Shares out the rows of `projections` as one space, for `n_tokens` rows of activations; calls `f` with a projection's
/// index and rows of it.
pub(crate) fn for_each_run(
    w: &Worker,
    n_tokens: usize,
    projections: &[&Projection],
    mut f: impl FnMut(usize, Range<usize>),
) {
    let (cut, n_pieces) = cut_all(w, n_tokens, projections);
    for run in w.runs(n_pieces, cut.longest) {
        rows_of_run(projections, cut, run).for_each(|(index, rows)| f(index, rows));
    }
}

/// Reads ahead what this worker will multiply first in [`for_each_run`] of one row of activations.
pub(crate) fn read_ahead(w: &Worker, projections: &[&Projection], ahead: &mut Ahead) {
    let (cut, n_pieces) = cut_all(w, 1, projections);
    rows_of_run(projections, cut, w.share(n_pieces)).all(|(index, rows)| ahead.rows(&projections[index].matrix, rows));
}

/// How `projections` are cut as one space, and the number of pieces.
fn cut_all(w: &Worker, n_tokens: usize, projections: &[&Projection]) -> (Cut, usize) {
    let cut = Cut::new(projections.iter().map(|p| p.n_out()).sum(), w.n_workers(), n_tokens);
    (cut, projections.iter().map(|p| p.n_out().div_ceil(cut.rows)).sum())
}

/// The projections that a run of pieces of that space lies in, and its rows of each.
fn rows_of_run(
    projections: &[&Projection],
    cut: Cut,
    run: Range<usize>,
) -> impl Iterator<Item = (usize, Range<usize>)> {
    let mut first = 0;
    projections.iter().enumerate().filter_map(move |(index, p)| {
        let start = first;
        first += p.n_out().div_ceil(cut.rows);
        let pieces = run.start.max(start)..run.end.min(first);
        (!pieces.is_empty()).then(|| (index, cut.rows_of(pieces.start - start..pieces.end - start, p.n_out())))
    })
}

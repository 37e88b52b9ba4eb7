//! Weight matrices for the CPU: packed once at load into row panels, multiplied with [`Activations`].
//!
//! The layout of panels is [`tandem_spec::panel`]'s: one vector of `4 * R` bytes holds 4 consecutive codes of `R`
//! rows, what the integer dot-product instructions of every instruction set take. Rows become lanes, and no kernel
//! adds across lanes.

#[cfg(target_arch = "x86_64")]
mod amx;
mod float;
mod iq4;
mod kernel;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_k;
mod q6_k;
mod q8_0;
mod simd;
mod storage;
#[cfg(test)]
mod tests;

use crate::{Activations, Error, Isa};
use rayon::prelude::*;
use std::array::from_fn;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
pub(crate) use storage::{Storage, map_huge};
use tandem_spec::panel::{Field, PanelMemory, Panels, fields};
use tandem_spec::{TensorSource, TensorType, Weight};

/// Rows of a panel.
pub fn panel_rows(isa: Isa) -> usize {
    if isa.has_avx512() { 16 } else { 8 }
}

/// A weight matrix `[n_rows, n_cols]`, packed for one instruction set.
pub struct Matrix {
    isa: Isa,
    ty: TensorType,
    n_rows: usize,
    n_cols: usize,
    /// `[n_panels, n_blocks, block_bytes, R]` in the order of [`fields`], then padding to a cache line.
    data: Storage,
}

impl Matrix {
    /// Packs all rows of `weight`. An error where the memory is not there.
    pub fn pack(weight: &Weight, source: &dyn TensorSource, isa: Isa) -> Result<Self, Error> {
        Ok(Self::pack_stack(weight, 1, source, isa)?.swap_remove(0))
    }

    /// Packs the `n` matrices of equal size that `weight` is a stack of. They lie side by side, so that a GPU copies
    /// many at a time, whatever other blocks are packed meanwhile. An error where the memory is not there.
    pub fn pack_stack(weight: &Weight, n: usize, source: &dyn TensorSource, isa: Isa) -> Result<Vec<Self>, Error> {
        let n_rows = weight.n_rows() / n;
        assert_eq!(n * n_rows, weight.n_rows(), "rows of {}, a stack of {n}", weight.name);
        let memory = Storage::stack(n, Self::packed_bytes(n_rows, weight.n_cols, weight.ty, isa))?;
        let one = |(i, data)| Self::pack_rows(data, weight, i * n_rows..(i + 1) * n_rows, source, isa);
        Ok(memory.into_iter().enumerate().map(one).collect())
    }

    /// Packs rows `rows` of `weight` (counted in the weight's own order) into `data`, in parallel on the current rayon
    /// pool.
    fn pack_rows(mut data: Storage, weight: &Weight, rows: Range<usize>, source: &dyn TensorSource, isa: Isa) -> Self {
        assert!(isa.is_available(), "packing for {}, which this processor lacks", isa.name());
        assert!(rows.end <= weight.n_rows(), "rows {rows:?} of {}, which has {}", weight.name, weight.n_rows());
        let row_bytes = weight.row_bytes();
        let (panel_rows, no_row) = (panel_rows(isa), vec![0; row_bytes]);
        data.par_chunks_exact_mut(panel_rows * row_bytes).take(rows.len().div_ceil(panel_rows)).enumerate().for_each(
            |(panel, out)| {
                let first = rows.start + panel * panel_rows;
                let row =
                    |lane: usize| if first + lane < rows.end { weight.row(source, first + lane) } else { &no_row[..] };
                match panel_rows {
                    16 => pack_panel::<16>(weight.ty, from_fn(row), out),
                    _ => pack_panel::<8>(weight.ty, from_fn(row), out),
                }
            },
        );
        Self { isa, ty: weight.ty, n_rows: rows.len(), n_cols: weight.n_cols, data }
    }

    /// Bytes that a packed matrix takes.
    pub fn packed_bytes(n_rows: usize, n_cols: usize, ty: TensorType, isa: Isa) -> usize {
        let row_bytes = ty.row_bytes(n_cols).expect("rows are whole blocks: checked when the file was read");
        (n_rows.next_multiple_of(panel_rows(isa)) * row_bytes).next_multiple_of(storage::ALIGN)
    }

    /// Rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Columns.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Tensor type.
    pub fn ty(&self) -> TensorType {
        self.ty
    }

    /// Rows of a panel; the last panel may hold fewer.
    pub fn panel_rows(&self) -> usize {
        panel_rows(self.isa)
    }

    /// Panels.
    pub fn n_panels(&self) -> usize {
        self.n_rows.div_ceil(self.panel_rows())
    }

    /// The bytes of `rows`, in whole panels.
    pub(crate) fn row_bytes(&self, rows: Range<usize>) -> &[u8] {
        self.panel_bytes(rows.start / self.panel_rows()..rows.end.div_ceil(self.panel_rows()))
    }

    /// The bytes of `panels`.
    fn panel_bytes(&self, panels: Range<usize>) -> &[u8] {
        let geometry = self.ty.row();
        let panel_bytes = self.panel_rows() * self.n_cols / geometry.block_len * geometry.block_bytes;
        &self.data[panels.start * panel_bytes..panels.end * panel_bytes]
    }

    /// Bytes allocated: [`Matrix::packed_bytes`] of its shape.
    pub fn n_bytes(&self) -> usize {
        self.data.len()
    }

    /// The matrix as another backend reads it.
    pub fn panels(self: &Arc<Self>) -> Panels {
        let (ty, n_rows, n_cols, panel_rows) = (self.ty, self.n_rows, self.n_cols, self.panel_rows());
        Panels { ty, n_rows, n_cols, panel_rows, memory: self.clone() }
    }

    /// Decodes row `row` into `out` `[n_cols]`, exactly as the file's type says.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n_rows && out.len() == self.n_cols, "row {row} of {}, {} columns", self.n_rows, out.len());
        let (panel_rows, geometry) = (self.panel_rows(), self.ty.row());
        let (panel, lane) = (row / panel_rows, row % panel_rows);
        let blocks = self.panel_bytes(panel..panel + 1).chunks_exact(panel_rows * geometry.block_bytes);
        let mut block = [0u8; 256];
        let block = &mut block[..geometry.block_bytes];
        for (packed, out) in blocks.zip(out.chunks_exact_mut(geometry.block_len)) {
            let mut at = 0;
            for f in fields(self.ty) {
                for i in (0..f.len).step_by(f.unit) {
                    let from = at + i * panel_rows + lane * f.unit;
                    block[f.offset + i..][..f.unit].copy_from_slice(&packed[from..][..f.unit]);
                }
                at += f.len * panel_rows;
            }
            self.ty.decode(block, out);
        }
    }

    /// `out[t][r] = sum_c self[r][c] * x[t][c]` for all rows `r` of `panels` and all rows `t` of `x`.
    /// Several threads may multiply different panels into the same `out` at the same time.
    pub fn mul(&self, panels: Range<usize>, x: &Activations, out: &OutRows) {
        assert_eq!(x.n_cols(), self.n_cols, "columns of the activations and of the matrix");
        assert!(panels.end <= self.n_panels(), "panels {panels:?} of {}", self.n_panels());
        if panels.is_empty() || x.n_rows() == 0 {
            return;
        }
        let rows = panels.start * self.panel_rows()..self.n_rows.min(panels.end * self.panel_rows());
        assert!(
            out.rows.start <= rows.start && rows.end <= out.rows.end && x.n_rows() <= out.n_tokens,
            "products [{}, {rows:?}] do not fit [{}, {:?}]",
            x.n_rows(),
            out.n_tokens,
            out.rows
        );
        kernel::mul(self, panels, x, out);
    }
}

impl PanelMemory for Matrix {
    fn bytes(&self) -> &[u8] {
        &self.data
    }

    fn mapping(&self) -> Range<usize> {
        self.data.mapping()
    }
}

/// Interleaves `rows` into a panel.
fn pack_panel<const R: usize>(ty: TensorType, rows: [&[u8]; R], out: &mut [u8]) {
    assert!(rows.iter().all(|row| row.len() * R == out.len()), "rows of a panel differ in length");
    // A float is a block of its own: a row of them interleaves as one long field does.
    let floats = [Field { len: rows[0].len(), ..fields(ty)[0] }];
    let (block_bytes, fields) = match fields(ty) {
        [_] => (rows[0].len(), &floats[..]),
        fields => (ty.row().block_bytes, fields),
    };
    for (block, out) in out.chunks_exact_mut(block_bytes * R).enumerate() {
        let mut at = 0;
        for f in fields {
            // SAFETY: the field lies within this block of every row, and `R` of them fit the packed block.
            unsafe {
                let from = rows.map(|row| row.as_ptr().add(block * block_bytes + f.offset));
                let to = out.as_mut_ptr().add(at);
                match f.unit {
                    4 if f.len.is_multiple_of(8) => interleave_words(from, f.len, to),
                    4 => interleave::<R, 4>(from, f.len, to),
                    2 => interleave::<R, 2>(from, f.len, to),
                    _ => interleave::<R, 1>(from, f.len, to),
                }
            }
            at += f.len * R;
        }
    }
}

/// Writes units of `UNIT` bytes of all rows `from` `[R, len]` to `to` `[len / UNIT, R, UNIT]`.
///
/// # Safety
/// The pointers hold these shapes.
#[inline(always)]
unsafe fn interleave<const R: usize, const UNIT: usize>(from: [*const u8; R], len: usize, to: *mut u8) {
    for i in (0..len).step_by(UNIT) {
        for lane in 0..R {
            // SAFETY: the unit lies within the shapes.
            unsafe {
                let unit = from[lane].add(i).cast::<[u8; UNIT]>().read();
                to.add(i * R + lane * UNIT).cast::<[u8; UNIT]>().write(unit);
            }
        }
    }
}

/// [`interleave`] of 4-byte units, two of two rows at a time: half the loads and stores.
///
/// # Safety
/// As there; `len` is a multiple of 8.
#[inline(always)]
unsafe fn interleave_words<const R: usize>(from: [*const u8; R], len: usize, to: *mut u8) {
    const LOW: u64 = u32::MAX as u64;
    for i in (0..len).step_by(8) {
        for lane in (0..R).step_by(2) {
            // SAFETY: both units of both rows lie within the shapes.
            unsafe {
                let [a, b] = [lane, lane + 1].map(|lane| from[lane].add(i).cast::<u64>().read_unaligned());
                let to = to.add(i * R + lane * 4);
                to.cast::<u64>().write_unaligned(a & LOW | b << 32);
                to.add(4 * R).cast::<u64>().write_unaligned(a >> 32 | b & !LOW);
            }
        }
    }
}

/// Where products go: columns `[n_tokens, rows]` f32 of a range of rows of a matrix, tokens `stride` elements apart.
pub struct OutRows<'a> {
    ptr: *mut f32,
    stride: usize,
    n_tokens: usize,
    rows: Range<usize>,
    /// Whether the products of one row of activations may go past the caches.
    past_caches: bool,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: `OutRows::new` makes its caller promise that threads write disjoint columns.
unsafe impl Sync for OutRows<'_> {}
// SAFETY: as above.
unsafe impl Send for OutRows<'_> {}

impl OutRows<'_> {
    /// Products of the matrix rows `rows`, for `n_tokens` rows of activations: the first product of the first token
    /// at `ptr`, tokens `stride` elements apart.
    ///
    /// # Safety
    /// The memory is valid for writes while this lives; threads that use it (or another one of the same memory) at the
    /// same time multiply disjoint panels into it, and nobody reads a panel's columns before its product is complete.
    pub unsafe fn new(ptr: *mut f32, stride: usize, n_tokens: usize, rows: Range<usize>) -> Self {
        assert!(n_tokens <= 1 || stride >= rows.len(), "rows overlap");
        Self { ptr, stride, n_tokens, rows, past_caches: false, lifetime: PhantomData }
    }

    /// The same, where the products of one row of activations may go past the caches if `yes`: what no worker reads
    /// leaves them to others, and its lines are not read before they are written.
    pub fn past_caches(self, yes: bool) -> Self {
        Self { past_caches: yes, ..self }
    }

    /// First product of panel row `row` for `token`.
    ///
    /// # Safety
    /// Both lie within the shape given to [`OutRows::new`].
    #[inline(always)]
    unsafe fn at(&self, token: usize, row: usize) -> *mut f32 {
        // SAFETY: the caller promises that the element exists.
        unsafe { self.ptr.add(token * self.stride + (row - self.rows.start)) }
    }
}

//! Rows of activations prepared for [`crate::Matrix::mul`]: as they are (f32), and rounded to 8 bits in
//! blocks of 32 for quantised weights. Owns the rounding and the layout; refuses nothing, its sizes are
//! the caller's promise and are asserted.

use std::cell::UnsafeCell;

/// Elements that share a scale.
pub const BLOCK_LEN: usize = 32;

/// 32 activations: `x[i] = scale * codes[i]`. The sums pay for the offsets of unsigned weight codes.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Block {
    /// Largest magnitude of the block over 127.
    pub scale: f32,
    /// `scale * (half_sums[0] + half_sums[1])`.
    pub sum: f32,
    /// Sums of `codes[..16]` and `codes[16..]`.
    pub half_sums: [i16; 2],
    /// Rounded to nearest, -127 to 127.
    pub codes: [i8; BLOCK_LEN],
}

const _: () = assert!(size_of::<Block>() == 44);

impl Block {
    /// Rounds 32 values to 8 bits.
    #[inline]
    pub fn quantise(x: &[f32; BLOCK_LEN]) -> Self {
        let max = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        let scale = max / 127.0;
        let inverse = if scale > 0.0 { 127.0 / max } else { 0.0 };
        // 1.5 * 2^23: adding it leaves the nearest integer (ties to even) in the low mantissa bits.
        const ROUND: f32 = 12_582_912.0;
        let mut codes = [0i8; BLOCK_LEN];
        for (c, v) in codes.iter_mut().zip(x) {
            *c = (v * inverse + ROUND).to_bits() as i8;
        }
        let sum = |c: &[i8]| c.iter().map(|v| i16::from(*v)).sum::<i16>();
        let half_sums = [sum(&codes[..16]), sum(&codes[16..])];
        let sum = scale * (i32::from(half_sums[0]) + i32::from(half_sums[1])) as f32;
        Self { scale, sum, half_sums, codes }
    }
}

/// Which forms of the activations the matrices of a use read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forms {
    /// f32 rows: for weights in F32, F16, BF16.
    pub floats: bool,
    /// 8-bit blocks: for quantised weights.
    pub codes: bool,
}

/// Rows of activations `[n_rows, n_cols]`. The buffers hold the largest batch and are allocated once;
/// [`Activations::reshape`] sets the shape of a use. Different workers may write different parts at the
/// same time through a shared reference (see [`Activations::write`]).
pub struct Activations {
    forms: Forms,
    n_rows: usize,
    n_cols: usize,
    /// `[n_rows, n_cols]` f32 at most.
    floats: Box<[UnsafeCell<f32>]>,
    /// `[n_cols / 32, n_rows]` at most: block-major, so that a kernel streams the rows of one block of columns.
    blocks: Box<[UnsafeCell<Block>]>,
}

// SAFETY: shared writes go through `write`, whose contract makes concurrent parts disjoint.
unsafe impl Sync for Activations {}

fn cells<T: Clone + Default>(n: usize) -> Box<[UnsafeCell<T>]> {
    (0..n).map(|_| UnsafeCell::new(T::default())).collect()
}

impl Activations {
    /// Buffers for at most `max_elements` = rows x columns elements in `forms`.
    pub fn new(max_elements: usize, forms: Forms) -> Self {
        Self {
            forms,
            n_rows: 0,
            n_cols: 0,
            floats: cells(if forms.floats { max_elements } else { 0 }),
            blocks: cells(if forms.codes { max_elements / BLOCK_LEN } else { 0 }),
        }
    }

    /// Bytes that [`Activations::new`] allocates.
    pub fn n_bytes(max_elements: usize, forms: Forms) -> usize {
        usize::from(forms.floats) * max_elements * size_of::<f32>()
            + usize::from(forms.codes) * (max_elements / BLOCK_LEN) * size_of::<Block>()
    }

    /// Sets the shape of the next use; what was written before is lost. With codes, `n_cols` is a multiple of 32.
    pub fn reshape(&mut self, n_rows: usize, n_cols: usize) {
        if self.forms.floats {
            assert!(n_rows * n_cols <= self.floats.len(), "activations [{n_rows}, {n_cols}] exceed their buffer");
        }
        if self.forms.codes {
            assert!(n_cols.is_multiple_of(BLOCK_LEN), "{n_cols} columns are not whole blocks of {BLOCK_LEN}");
            assert!(
                n_rows * n_cols <= self.blocks.len() * BLOCK_LEN,
                "activations [{n_rows}, {n_cols}] exceed their buffer"
            );
        }
        (self.n_rows, self.n_cols) = (n_rows, n_cols);
    }

    /// Rows of the current shape.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Columns of the current shape.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Stores `values` at columns `col..` of `row`, in every form. With codes, `col` and the length are
    /// multiples of 32.
    ///
    /// # Safety
    /// While it runs, no other thread reads or writes these elements.
    #[inline]
    pub unsafe fn write(&self, row: usize, col: usize, values: &[f32]) {
        assert!(row < self.n_rows && col + values.len() <= self.n_cols, "write outside of the activations");
        if self.forms.floats {
            for (cell, v) in self.floats[row * self.n_cols + col..].iter().zip(values) {
                // SAFETY: the caller promises that nobody else touches these elements now.
                unsafe { *cell.get() = *v };
            }
        }
        if self.forms.codes {
            assert!(col.is_multiple_of(BLOCK_LEN) && values.len().is_multiple_of(BLOCK_LEN), "write of half a block");
            for (i, chunk) in values.as_chunks::<BLOCK_LEN>().0.iter().enumerate() {
                let cell = &self.blocks[(col / BLOCK_LEN + i) * self.n_rows + row];
                // SAFETY: as above.
                unsafe { *cell.get() = Block::quantise(chunk) };
            }
        }
    }

    /// First element of the f32 rows `[n_rows, n_cols]`.
    pub(crate) fn floats(&self) -> *const f32 {
        assert!(self.forms.floats, "these activations were made without f32 rows");
        self.floats.as_ptr().cast()
    }

    /// First of the blocks `[n_cols / 32, n_rows]`.
    pub(crate) fn blocks(&self) -> *const Block {
        assert!(self.forms.codes, "these activations were made without 8-bit blocks");
        self.blocks.as_ptr().cast()
    }
}

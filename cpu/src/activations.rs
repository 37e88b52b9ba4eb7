//! Rows of activations prepared for [`crate::Matrix::mul`]: as they are (f32), and rounded to 8 bits in
//! blocks of 32 for quantised weights. Owns the rounding and the layout; refuses nothing, its sizes are
//! the caller's promise and are asserted.

use std::cell::UnsafeCell;
use std::collections::TryReserveError;
use tandem_spec::TensorType;

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forms {
    /// f32 rows: for weights in F32, F16, BF16.
    pub floats: bool,
    /// 8-bit blocks: for quantised weights.
    pub codes: bool,
}

impl Forms {
    /// The form that a weight of type `ty` is multiplied with.
    pub fn of(ty: TensorType) -> Self {
        Self { floats: !ty.is_quantised(), codes: ty.is_quantised() }
    }

    /// The forms of both.
    pub fn or(self, other: Self) -> Self {
        Self { floats: self.floats || other.floats, codes: self.codes || other.codes }
    }
}

/// Memory for activations, allocated once for the largest use. [`ActivationBuffer::view`] lays a use into it.
pub struct ActivationBuffer {
    floats: Box<[UnsafeCell<f32>]>,
    blocks: Box<[UnsafeCell<Block>]>,
}

// SAFETY: writes go through `Activations::write`, whose contract makes concurrent parts disjoint.
unsafe impl Sync for ActivationBuffer {}

fn cells<T: Clone + Default>(n: usize) -> Result<Box<[UnsafeCell<T>]>, TryReserveError> {
    let mut cells = Vec::new();
    cells.try_reserve_exact(n)?;
    cells.extend((0..n).map(|_| UnsafeCell::new(T::default())));
    Ok(cells.into_boxed_slice())
}

impl ActivationBuffer {
    /// Memory for `max_elements` = rows x columns elements in `forms`, or an error where there is not enough.
    pub fn new(max_elements: usize, forms: Forms) -> Result<Self, TryReserveError> {
        let floats = cells(if forms.floats { max_elements } else { 0 })?;
        let blocks = cells(if forms.codes { max_elements / BLOCK_LEN } else { 0 })?;
        Ok(Self { floats, blocks })
    }

    /// Bytes that [`ActivationBuffer::new`] allocates.
    pub fn n_bytes(max_elements: usize, forms: Forms) -> usize {
        usize::from(forms.floats) * max_elements * size_of::<f32>()
            + usize::from(forms.codes) * (max_elements / BLOCK_LEN) * size_of::<Block>()
    }

    /// Rows `[n_rows, n_cols]` in `forms`, in the memory from element `start` on. With codes, `start` and `n_cols`
    /// are multiples of 32. Views of the same part of the buffer and of the same shape show the same rows.
    pub fn view(&self, start: usize, n_rows: usize, n_cols: usize, forms: Forms) -> Activations<'_> {
        let end = start + n_rows * n_cols;
        let fits =
            |n: usize| assert!(end <= n, "activations {start} + [{n_rows}, {n_cols}] exceed their buffer of {n}");
        if forms.floats {
            fits(self.floats.len());
        }
        if forms.codes {
            assert!(n_cols.is_multiple_of(BLOCK_LEN), "{n_cols} columns are not whole blocks of {BLOCK_LEN}");
            assert!(start.is_multiple_of(BLOCK_LEN), "activations at {start} start inside a block");
            fits(self.blocks.len() * BLOCK_LEN);
        }
        let floats: &[_] = if forms.floats { &self.floats[start..end] } else { &[] };
        let blocks: &[_] = if forms.codes { &self.blocks[start / BLOCK_LEN..end / BLOCK_LEN] } else { &[] };
        Activations { forms, n_rows, n_cols, floats, blocks }
    }
}

/// Rows of activations `[n_rows, n_cols]` in an [`ActivationBuffer`]. Different workers may write different parts
/// at the same time (see [`Activations::write`]).
#[derive(Clone, Copy)]
pub struct Activations<'a> {
    forms: Forms,
    n_rows: usize,
    n_cols: usize,
    /// `[n_rows, n_cols]`, or empty.
    floats: &'a [UnsafeCell<f32>],
    /// `[n_cols / 32, n_rows]`, or empty: block-major, so that a kernel streams the rows of one block of columns.
    blocks: &'a [UnsafeCell<Block>],
}

// SAFETY: as for the buffer.
unsafe impl Send for Activations<'_> {}
// SAFETY: as for the buffer.
unsafe impl Sync for Activations<'_> {}

impl Activations<'_> {
    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Number of columns.
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

//! Rows of activations prepared for [`crate::Matrix::mul`]: as they are (f32), and rounded to 8 bits in blocks of 32
//! or of 256 columns, whichever the weights' blocks are. Owns the rounding and the layout; refuses nothing, its
//! sizes are the caller's promise and are asserted.

use crate::Isa;
use std::cell::UnsafeCell;
use std::collections::TryReserveError;
use tandem_spec::TensorType;

/// Columns of a [`Block`].
pub const BLOCK_LEN: usize = 32;
/// Columns of a [`SuperBlock`].
pub const SUPER_BLOCK_LEN: usize = 256;

/// What 32 activations have in common: `x[i] = scale * codes[i]`. Sums pay for the offsets of unsigned weight codes.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Block {
    /// Largest magnitude of the block over 127.
    pub scale: f32,
    /// `scale` times the sum of the codes.
    pub sum: f32,
    /// Sum of the codes.
    pub code_sum: i32,
}

/// The codes of a [`Block`], rounded to nearest, -127 to 127. They lie apart from it: 16 rows of activations are a tile
/// of AMX, which loads rows that straddle cache lines at half the pace.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct BlockCodes(pub [i8; BLOCK_LEN]);

/// What 256 activations have in common: `x[i] = scale * codes[i]`. One scale for the columns of a K-quant block lets
/// kernels add up its products in integers.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct SuperBlock {
    /// Largest magnitude of the block over 127.
    pub scale: f32,
    /// Sums of 32 codes each.
    pub sums_32: [i16; 8],
    /// Sums of 16 codes each.
    pub sums_16: [i16; 16],
}

/// Columns of [`Codes`].
pub(crate) const CODES_LEN: usize = 64;

/// Codes that [`ActivationBuffer`] has room for beyond the last ones: AMX reads 16 or 32 rows at a time.
const ROWS_BEHIND: usize = 31;

/// 64 codes of a [`SuperBlock`], rounded to nearest, -127 to 127. They lie apart from it, so that the codes that many
/// rows of activations have for the same columns follow each other. Their length is that of a row of an AMX tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Codes(pub [i8; CODES_LEN]);

// Kernels read two sums as one aligned 32-bit number.
const _: () = assert!(size_of::<SuperBlock>() == 52);

/// Largest magnitude of `x`, and what to multiply `x` with to get codes. A NaN makes the magnitude NaN.
#[inline(always)]
fn magnitude(x: &[f32]) -> (f32, f32) {
    // Magnitudes order like their bits, and NaN comes last.
    let max = f32::from_bits(x.iter().fold(0, |max, v| max.max(v.to_bits() as i32 & i32::MAX)) as u32);
    (max, if max > 0.0 { 127.0 / max } else { 0.0 })
}

#[inline(always)]
fn round(x: &[f32; BLOCK_LEN], inverse: f32) -> [i8; BLOCK_LEN] {
    // 1.5 * 2^23: adding it leaves the nearest integer (ties to even) in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let mut codes = [0; BLOCK_LEN];
    for (code, v) in codes.iter_mut().zip(x) {
        *code = (v * inverse + ROUND).to_bits() as i8;
    }
    codes
}

#[inline(always)]
fn sum(codes: &[i8]) -> i16 {
    codes.iter().map(|c| i16::from(*c)).sum()
}

impl Block {
    const ZERO: Self = Self { scale: 0.0, sum: 0.0, code_sum: 0 };

    /// Rounds `x`.
    #[inline(always)]
    fn new(x: &[f32; BLOCK_LEN]) -> (Self, BlockCodes) {
        let (max, inverse) = magnitude(x);
        let (scale, codes) = (max / 127.0, round(x, inverse));
        let code_sum = i32::from(sum(&codes));
        (Self { scale, sum: scale * code_sum as f32, code_sum }, BlockCodes(codes))
    }
}

impl SuperBlock {
    const ZERO: Self = Self { scale: 0.0, sums_32: [0; 8], sums_16: [0; 16] };
}

/// Rounds the blocks of `x`, `stride` blocks apart in `blocks` and in `codes`.
///
/// # Safety
/// Nobody else touches these blocks and codes now.
#[inline(always)]
unsafe fn round_32(x: &[f32], blocks: &[UnsafeCell<Block>], codes: &[UnsafeCell<BlockCodes>], stride: usize) {
    let cells = blocks.iter().step_by(stride).zip(codes.iter().step_by(stride));
    for (x, (block, codes)) in x.as_chunks::<BLOCK_LEN>().0.iter().zip(cells) {
        // SAFETY: as the caller promises.
        unsafe { (*block.get(), *codes.get()) = Block::new(x) };
    }
}

/// Rounds the super-blocks of `x`, `stride` blocks apart in `blocks`, and their codes, `stride` apart in `codes`.
///
/// # Safety
/// Nobody else touches these blocks and codes now.
#[inline(always)]
unsafe fn round_256(x: &[f32], blocks: &[UnsafeCell<SuperBlock>], codes: &[UnsafeCell<Codes>], stride: usize) {
    let mut codes = codes.iter().step_by(stride);
    for (x, cell) in x.as_chunks::<SUPER_BLOCK_LEN>().0.iter().zip(blocks.iter().step_by(stride)) {
        let (max, inverse) = magnitude(x);
        let mut block = SuperBlock { scale: max / 127.0, ..SuperBlock::ZERO };
        for (k, (x, cell)) in x.as_chunks::<CODES_LEN>().0.iter().zip(&mut codes).enumerate() {
            let mut both = Codes([0; CODES_LEN]);
            for (half, x) in x.as_chunks::<BLOCK_LEN>().0.iter().enumerate() {
                let codes = round(x, inverse);
                let sums = [sum(&codes[..16]), sum(&codes[16..])];
                let k = 2 * k + half;
                block.sums_16[2 * k..2 * k + 2].copy_from_slice(&sums);
                block.sums_32[k] = sums[0] + sums[1];
                both.0[half * BLOCK_LEN..][..BLOCK_LEN].copy_from_slice(&codes);
            }
            // SAFETY: as the caller promises.
            unsafe { *cell.get() = both };
        }
        // SAFETY: as the caller promises.
        unsafe { *cell.get() = block };
    }
}

/// [`round_32`] with wider vectors.
///
/// # Safety
/// As there.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn round_32_avx2(x: &[f32], blocks: &[UnsafeCell<Block>], codes: &[UnsafeCell<BlockCodes>], stride: usize) {
    // SAFETY: as the caller promises.
    unsafe { round_32(x, blocks, codes, stride) }
}

/// [`round_256`] with wider vectors.
///
/// # Safety
/// As there.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn round_256_avx2(x: &[f32], blocks: &[UnsafeCell<SuperBlock>], codes: &[UnsafeCell<Codes>], stride: usize) {
    // SAFETY: as the caller promises.
    unsafe { round_256(x, blocks, codes, stride) }
}

/// Which forms of the activations the matrices of a use read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forms {
    /// f32 rows: for weights in F32, F16, BF16.
    pub floats: bool,
    /// 8 bits, a scale for 32 columns: for weights in blocks of 32, and IQ4_XS.
    pub codes_32: bool,
    /// 8 bits, a scale for 256 columns: for K-quants.
    pub codes_256: bool,
}

impl Forms {
    /// The form that a weight of type `ty` is multiplied with.
    pub fn of(ty: TensorType) -> Self {
        let codes_256 = ty.row().block_len == SUPER_BLOCK_LEN && ty != TensorType::IQ4_XS;
        Self { floats: !ty.is_quantised(), codes_32: ty.is_quantised() && !codes_256, codes_256 }
    }

    /// The forms of both.
    pub fn or(self, other: Self) -> Self {
        Self {
            floats: self.floats || other.floats,
            codes_32: self.codes_32 || other.codes_32,
            codes_256: self.codes_256 || other.codes_256,
        }
    }

    /// Columns are written in multiples of this many, which begin at a multiple of it: 1, 32 or 256.
    pub fn columns_together(self) -> usize {
        match self {
            Self { codes_256: true, .. } => SUPER_BLOCK_LEN,
            Self { codes_32: true, .. } => BLOCK_LEN,
            _ => 1,
        }
    }
}

/// Memory for activations, allocated once for the largest use. [`ActivationBuffer::view`] lays a use into it.
pub struct ActivationBuffer {
    floats: Box<[UnsafeCell<f32>]>,
    blocks: Box<[UnsafeCell<Block>]>,
    block_codes: Box<[UnsafeCell<BlockCodes>]>,
    super_blocks: Box<[UnsafeCell<SuperBlock>]>,
    super_codes: Box<[UnsafeCell<Codes>]>,
}

// SAFETY: writes go through `Activations::write`, whose contract makes concurrent parts disjoint.
unsafe impl Sync for ActivationBuffer {}

fn cells<T: Copy>(n: usize, value: T) -> Result<Box<[UnsafeCell<T>]>, TryReserveError> {
    let mut cells = Vec::new();
    cells.try_reserve_exact(n)?;
    cells.extend((0..n).map(|_| UnsafeCell::new(value)));
    Ok(cells.into_boxed_slice())
}

/// Numbers of floats, blocks, their codes, super-blocks and their codes of an [`ActivationBuffer`].
fn cells_of(max_elements: usize, forms: Forms) -> [usize; 5] {
    let n = |wanted: bool, len: usize, behind: usize| if wanted { max_elements / len + behind } else { 0 };
    let of_32 = [0, ROWS_BEHIND].map(|behind| n(forms.codes_32, BLOCK_LEN, behind));
    let codes = n(forms.codes_256, CODES_LEN, ROWS_BEHIND);
    [n(forms.floats, 1, 0), of_32[0], of_32[1], n(forms.codes_256, SUPER_BLOCK_LEN, 0), codes]
}

impl ActivationBuffer {
    /// Memory for `max_elements` = rows x columns elements in `forms`, or an error where there is not enough.
    pub fn new(max_elements: usize, forms: Forms) -> Result<Self, TryReserveError> {
        let n = cells_of(max_elements, forms);
        Ok(Self {
            floats: cells(n[0], 0.0)?,
            blocks: cells(n[1], Block::ZERO)?,
            block_codes: cells(n[2], BlockCodes([0; BLOCK_LEN]))?,
            super_blocks: cells(n[3], SuperBlock::ZERO)?,
            super_codes: cells(n[4], Codes([0; CODES_LEN]))?,
        })
    }

    /// Bytes that [`ActivationBuffer::new`] allocates.
    pub fn n_bytes(max_elements: usize, forms: Forms) -> usize {
        let of_32 = [size_of::<Block>(), size_of::<BlockCodes>()];
        let sizes = [size_of::<f32>(), of_32[0], of_32[1], size_of::<SuperBlock>(), size_of::<Codes>()];
        cells_of(max_elements, forms).into_iter().zip(sizes).map(|(n, size)| n * size).sum()
    }

    /// Bytes that were allocated.
    pub fn allocated(&self) -> usize {
        size_of_val(&*self.floats)
            + size_of_val(&*self.blocks)
            + size_of_val(&*self.block_codes)
            + size_of_val(&*self.super_blocks)
            + size_of_val(&*self.super_codes)
    }

    /// Rows `[n_rows, n_cols]` in `forms`, in the memory from element `start` on; `start` and `n_cols` are multiples of
    /// [`Forms::columns_together`]. Views of the same part of the buffer and of the same shape show the same rows.
    pub fn view(&self, start: usize, n_rows: usize, n_cols: usize, forms: Forms) -> Activations<'_> {
        let together = forms.columns_together();
        assert!(n_cols.is_multiple_of(together), "{n_cols} columns are not whole blocks of {together}");
        assert!(start.is_multiple_of(together), "activations at {start} start inside a block of {together}");
        Activations {
            forms,
            n_rows,
            n_cols,
            floats: part(&self.floats, forms.floats, 1, start, n_rows * n_cols),
            blocks: part(&self.blocks, forms.codes_32, BLOCK_LEN, start, n_rows * n_cols),
            block_codes: part(&self.block_codes, forms.codes_32, BLOCK_LEN, start, n_rows * n_cols),
            super_blocks: part(&self.super_blocks, forms.codes_256, SUPER_BLOCK_LEN, start, n_rows * n_cols),
            super_codes: part(&self.super_codes, forms.codes_256, CODES_LEN, start, n_rows * n_cols),
        }
    }
}

/// Elements `start .. start + n` of a form stored `len` elements a cell, if it is wanted.
fn part<T>(cells: &[UnsafeCell<T>], wanted: bool, len: usize, start: usize, n: usize) -> &[UnsafeCell<T>] {
    if !wanted {
        return &[];
    }
    let range = start / len..(start + n) / len;
    assert!(range.end <= cells.len(), "activations {start} + {n} exceed their buffer of {}", cells.len() * len);
    &cells[range]
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
    /// Likewise.
    block_codes: &'a [UnsafeCell<BlockCodes>],
    /// `[n_cols / 256, n_rows]`, or empty.
    super_blocks: &'a [UnsafeCell<SuperBlock>],
    /// `[n_cols / 64, n_rows]`, or empty.
    super_codes: &'a [UnsafeCell<Codes>],
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

    /// Stores `values` at columns `col..` of `row`, in every form; `col` and the length are multiples of
    /// [`Forms::columns_together`].
    ///
    /// # Safety
    /// While it runs, no other thread reads or writes these elements.
    pub unsafe fn write(&self, row: usize, col: usize, values: &[f32]) {
        assert!(row < self.n_rows && col + values.len() <= self.n_cols, "write outside of the activations");
        let together = self.forms.columns_together();
        assert!(
            col.is_multiple_of(together) && values.len().is_multiple_of(together),
            "write of {} columns at {col}, not whole blocks of {together}",
            values.len()
        );
        if values.is_empty() {
            return;
        }
        if self.forms.floats {
            for (cell, v) in self.floats[row * self.n_cols + col..].iter().zip(values) {
                // SAFETY: the caller promises that nobody else touches these elements now.
                unsafe { *cell.get() = *v };
            }
        }
        #[cfg(target_arch = "x86_64")]
        let avx2 = Isa::Avx2.is_available();
        #[cfg(not(target_arch = "x86_64"))]
        let avx2 = false;
        if self.forms.codes_32 {
            let at = col / BLOCK_LEN * self.n_rows + row;
            let (blocks, codes) = (&self.blocks[at..], &self.block_codes[at..]);
            match avx2 {
                // SAFETY: the processor has the features; nobody else touches these blocks now.
                #[cfg(target_arch = "x86_64")]
                true => unsafe { round_32_avx2(values, blocks, codes, self.n_rows) },
                // SAFETY: nobody else touches these blocks now.
                _ => unsafe { round_32(values, blocks, codes, self.n_rows) },
            }
        }
        if self.forms.codes_256 {
            let blocks = &self.super_blocks[col / SUPER_BLOCK_LEN * self.n_rows + row..];
            let codes = &self.super_codes[col / CODES_LEN * self.n_rows + row..];
            match avx2 {
                // SAFETY: the processor has the features; nobody else touches these blocks now.
                #[cfg(target_arch = "x86_64")]
                true => unsafe { round_256_avx2(values, blocks, codes, self.n_rows) },
                // SAFETY: nobody else touches these blocks now.
                _ => unsafe { round_256(values, blocks, codes, self.n_rows) },
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
        assert!(self.forms.codes_32, "these activations were made without blocks of 32");
        self.blocks.as_ptr().cast()
    }

    /// First of the codes `[n_cols / 32, n_rows]` of the blocks of 32; 31 more than these may be read.
    pub(crate) fn block_codes(&self) -> *const BlockCodes {
        assert!(self.forms.codes_32, "these activations were made without blocks of 32");
        self.block_codes.as_ptr().cast()
    }

    /// First of the blocks `[n_cols / 256, n_rows]`.
    pub(crate) fn super_blocks(&self) -> *const SuperBlock {
        assert!(self.forms.codes_256, "these activations were made without blocks of 256");
        self.super_blocks.as_ptr().cast()
    }

    /// First of the codes `[n_cols / 64, n_rows]` of the blocks of 256; 31 more than these may be read.
    pub(crate) fn super_codes(&self) -> *const Codes {
        assert!(self.forms.codes_256, "these activations were made without blocks of 256");
        self.super_codes.as_ptr().cast()
    }
}

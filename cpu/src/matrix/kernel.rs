//! Panels times activations: walks panels, blocks and rows of activations, whatever the type and the instruction set.
//! A type decodes 32 columns of a panel at a time into a [`Tile`]; the tile stays in registers while it is
//! applied to a row of activations after the other.

use super::simd::Simd;
#[cfg(target_arch = "x86_64")]
use super::simd::avx2::Avx2;
use super::simd::portable::Portable;
use super::{Matrix, OutRows};
use crate::Isa;
use crate::activations::{Activations, BLOCK_LEN, Block};
use std::ops::Range;
use tandem_spec::TensorType;

/// Columns 32 wide of a panel, decoded.
pub(super) trait Tile<S: Simd>: Copy {
    /// `acc + self . x` for each row of the panel.
    unsafe fn apply(&self, x: *const Block, acc: S::F) -> S::F;
}

/// `weight = scale * code + offset` with unsigned codes of at most `BITS` <= 6 bits.
#[derive(Clone, Copy)]
pub(super) struct Affine<S: Simd, const BITS: u32> {
    /// Codes `[8, LANES, 4]`.
    pub w: [S::V; 8],
    pub scale: S::F,
    pub offset: S::F,
}

impl<S: Simd, const BITS: u32> Tile<S> for Affine<S, BITS> {
    #[inline(always)]
    unsafe fn apply(&self, x: *const Block, acc: S::F) -> S::F {
        // SAFETY: the caller has the instruction set and a valid block.
        unsafe {
            let acc = S::fma(self.offset, S::splat((*x).sum), acc);
            S::fma(S::dot::<BITS>(&self.w, x), S::mul(self.scale, S::splat((*x).scale)), acc)
        }
    }
}

/// `weight = scale * code` with signed 8-bit codes.
#[derive(Clone, Copy)]
pub(super) struct Signed<S: Simd> {
    /// Codes `[8, LANES, 4]`.
    pub w: [S::V; 8],
    pub scale: S::F,
}

impl<S: Simd> Tile<S> for Signed<S> {
    #[inline(always)]
    unsafe fn apply(&self, x: *const Block, acc: S::F) -> S::F {
        // SAFETY: the caller has the instruction set and a valid block.
        unsafe { S::fma(S::dot_signed(&self.w, x), S::mul(self.scale, S::splat((*x).scale)), acc) }
    }
}

/// `weight = scale * halves[column / 16] * (code - OFFSET)` with unsigned codes of at most `BITS` <= 6 bits.
#[derive(Clone, Copy)]
pub(super) struct Halved<S: Simd, const BITS: u32, const OFFSET: i32> {
    /// Codes `[8, LANES, 4]`.
    pub w: [S::V; 8],
    pub halves: S::Halves,
    pub scale: S::F,
}

impl<S: Simd, const BITS: u32, const OFFSET: i32> Tile<S> for Halved<S, BITS, OFFSET> {
    #[inline(always)]
    unsafe fn apply(&self, x: *const Block, acc: S::F) -> S::F {
        // SAFETY: the caller has the instruction set and a valid block.
        unsafe {
            let dot = S::dot_halves::<BITS, OFFSET>(&self.w, self.halves, x);
            S::fma(dot, S::mul(self.scale, S::splat((*x).scale)), acc)
        }
    }
}

/// A [`Halved`] tile and a minimum per half: `weight = tile + min_scale * mins[column / 16]`.
#[derive(Clone, Copy)]
pub(super) struct HalvedMin<S: Simd, const BITS: u32> {
    pub tile: Halved<S, BITS, 0>,
    pub mins: S::Halves,
    pub min_scale: S::F,
}

impl<S: Simd, const BITS: u32> Tile<S> for HalvedMin<S, BITS> {
    #[inline(always)]
    unsafe fn apply(&self, x: *const Block, acc: S::F) -> S::F {
        // SAFETY: the caller has the instruction set and a valid block.
        unsafe {
            let min_scale = S::mul(self.min_scale, S::splat((*x).scale));
            self.tile.apply(x, S::fma(S::dot_half_sums(self.mins, x), min_scale, acc))
        }
    }
}

/// A quantised type: how its packed blocks become tiles.
pub(super) trait Quant {
    /// Bytes of a block of one row.
    const BLOCK_BYTES: usize;
    /// Tiles of a block: its columns / 32.
    const TILES: usize;
    /// What the tiles of a block have in common.
    type Head<S: Simd>;
    /// A tile.
    type Tile<S: Simd>: Tile<S>;

    /// Decodes what the tiles of the packed block at `p` have in common.
    unsafe fn head<S: Simd>(p: *const u8) -> Self::Head<S>;
    /// Decodes tile `k` of the packed block at `p`.
    unsafe fn tile<S: Simd>(p: *const u8, head: &Self::Head<S>, k: usize) -> Self::Tile<S>;
}

/// A float type: how its packed elements become f32.
pub(super) trait Float {
    /// Bytes of an element.
    const BYTES: usize;
    /// Loads `LANES` elements.
    unsafe fn load<S: Simd>(p: *const u8) -> S::F;
}

/// Rows of activations that share a decoded tile; their sums (`TOKENS * LANES` f32) stay in the first-level cache.
const TOKENS: usize = 32;

/// Multiplies quantised panels.
#[inline(always)]
unsafe fn mul_quant<S: Simd, Q: Quant>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
    let n_blocks = m.n_cols / (Q::TILES * BLOCK_LEN);
    let (block_bytes, n_tokens, blocks) = (Q::BLOCK_BYTES * S::LANES, x.n_rows(), x.blocks());
    let panel_of = |panel: usize| m.bytes()[panel * n_blocks * block_bytes..][..n_blocks * block_bytes].as_ptr();
    for first in (0..n_tokens).step_by(TOKENS) {
        let n = TOKENS.min(n_tokens - first);
        for panel in panels.clone() {
            // SAFETY: the pointers stay within the panel (its length was checked when it was sliced) and within the blocks
            // `[n_cols / 32, n_tokens]` of the activations, whose columns `mul` compared; the caller has the instruction set.
            unsafe {
                let mut p = panel_of(panel);
                let mut row = blocks.add(first);
                if n == 1 {
                    let mut acc = S::zero();
                    for _ in 0..n_blocks {
                        let head = Q::head::<S>(p);
                        for k in 0..Q::TILES {
                            acc = Q::tile::<S>(p, &head, k).apply(row, acc);
                            row = row.add(n_tokens);
                        }
                        p = p.add(block_bytes);
                    }
                    store::<S>(out, first, panel, m.n_rows, acc);
                } else {
                    let mut acc = [S::zero(); TOKENS];
                    for _ in 0..n_blocks {
                        let head = Q::head::<S>(p);
                        for k in 0..Q::TILES {
                            let tile = Q::tile::<S>(p, &head, k);
                            for (t, acc) in acc[..n].iter_mut().enumerate() {
                                *acc = tile.apply(row.add(t), *acc);
                            }
                            row = row.add(n_tokens);
                        }
                        p = p.add(block_bytes);
                    }
                    for (t, acc) in acc[..n].iter().enumerate() {
                        store::<S>(out, first + t, panel, m.n_rows, *acc);
                    }
                }
            }
        }
    }
}

/// Multiplies float panels: sums stay in registers, four rows of activations at a time.
#[inline(always)]
unsafe fn mul_float<S: Simd, W: Float>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
    let (n_cols, n_tokens, floats) = (m.n_cols, x.n_rows(), x.floats());
    let panel_bytes = n_cols * W::BYTES * S::LANES;
    for panel in panels {
        let p = m.bytes()[panel * panel_bytes..][..panel_bytes].as_ptr();
        for first in (0..n_tokens).step_by(4) {
            // SAFETY: columns are below `n_cols`, the width of the panel and of the activations (`mul` compared them), rows
            // below `n_tokens`; the caller has the instruction set.
            unsafe {
                let weight = |col: usize| W::load::<S>(p.add(col * W::BYTES * S::LANES));
                let row = |t: usize| floats.add((first + t) * n_cols);
                if first + 4 <= n_tokens {
                    let mut acc = [S::zero(); 4];
                    for col in 0..n_cols {
                        let w = weight(col);
                        for t in 0..4 {
                            acc[t] = S::fma(w, S::splat(*row(t).add(col)), acc[t]);
                        }
                    }
                    for t in 0..4 {
                        store::<S>(out, first + t, panel, m.n_rows, acc[t]);
                    }
                } else {
                    for t in 0..n_tokens - first {
                        let mut acc = [S::zero(); 4];
                        let whole = n_cols / 4 * 4;
                        for col in (0..whole).step_by(4) {
                            for j in 0..4 {
                                acc[j] = S::fma(weight(col + j), S::splat(*row(t).add(col + j)), acc[j]);
                            }
                        }
                        for col in whole..n_cols {
                            acc[0] = S::fma(weight(col), S::splat(*row(t).add(col)), acc[0]);
                        }
                        let sum = S::add(S::add(acc[0], acc[1]), S::add(acc[2], acc[3]));
                        store::<S>(out, first + t, panel, m.n_rows, sum);
                    }
                }
            }
        }
    }
}

/// Writes the sums of one panel and one row of activations.
#[inline(always)]
unsafe fn store<S: Simd>(out: &OutRows, token: usize, panel: usize, n_rows: usize, acc: S::F) {
    let row = panel * S::LANES;
    // SAFETY: `mul` checked that the output holds `n_rows` columns and all rows of the activations.
    unsafe {
        let to = out.at(token, row);
        if row + S::LANES <= n_rows {
            S::store_f32(to, acc);
        } else {
            let mut lanes = [0f32; super::simd::MAX_LANES];
            S::store_f32(lanes.as_mut_ptr(), acc);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n_rows - row);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn quant_avx2<Q: Quant>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
    // SAFETY: the features are enabled.
    unsafe { mul_quant::<Avx2, Q>(m, panels, x, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn float_avx2<W: Float>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
    // SAFETY: the features are enabled.
    unsafe { mul_float::<Avx2, W>(m, panels, x, out) }
}

fn quant<Q: Quant>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
    match m.isa {
        // SAFETY: packing checked that the processor has the instruction set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { quant_avx2::<Q>(m, panels, x, out) },
        // SAFETY: plain Rust.
        _ => unsafe { mul_quant::<Portable, Q>(m, panels, x, out) },
    }
}

fn float<W: Float>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
    match m.isa {
        // SAFETY: packing checked that the processor has the instruction set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { float_avx2::<W>(m, panels, x, out) },
        // SAFETY: plain Rust.
        _ => unsafe { mul_float::<Portable, W>(m, panels, x, out) },
    }
}

/// Chooses the kernel of the matrix's type and instruction set.
pub(super) fn mul(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
    use TensorType::*;
    let kernel = match m.ty {
        F32 => float::<super::float::F32>,
        F16 => float::<super::float::F16>,
        BF16 => float::<super::float::Bf16>,
        Q4_0 => quant::<super::q4_0::Q4_0>,
        Q4_1 => quant::<super::q4_0::Q4_1>,
        Q5_0 => quant::<super::q4_0::Q5_0>,
        Q5_1 => quant::<super::q4_0::Q5_1>,
        Q8_0 => quant::<super::q8_0::Q8_0>,
        Q2_K => quant::<super::q2_k::Q2K>,
        Q3_K => quant::<super::q3_k::Q3K>,
        Q4_K => quant::<super::q4_k::Q4K>,
        Q5_K => quant::<super::q4_k::Q5K>,
        Q6_K => quant::<super::q6_k::Q6K>,
        IQ4_NL => quant::<super::iq4::Iq4Nl>,
        IQ4_XS => quant::<super::iq4::Iq4Xs>,
        MXFP4 => quant::<super::iq4::Mxfp4>,
        ty => panic!("no CPU kernel for tensor type {ty}: the model reader refuses it"),
    };
    kernel(m, panels, x, out);
}

//! Panels times activations: walks panels, blocks and rows of activations, whatever the type and the instruction set.
//! A type decodes 32 columns of a panel at a time into eight vectors of codes; they stay in registers while
//! they are applied to one row of activations after the other.

use super::simd::{MAX_LANES, Simd, portable::Portable};
#[cfg(target_arch = "x86_64")]
use super::simd::{avx2::Avx2, avx512::Avx512};
use super::{Matrix, OutRows};
use crate::Isa;
use crate::activations::{Activations, BLOCK_LEN, Block, Codes, SUPER_BLOCK_LEN, SuperBlock};
use std::mem::MaybeUninit;
use std::ops::Range;
use tandem_spec::TensorType;

/// Pointers to `T` elements.
#[inline(always)]
unsafe fn consecutive<X, const T: usize>(first: *const X) -> [*const X; T] {
    let mut pointers = [first; T];
    for t in 0..T {
        // SAFETY: the caller has `T` elements.
        pointers[t] = unsafe { first.add(t) };
    }
    pointers
}

/// 32 columns of a panel whose scales belong to these columns alone.
pub(super) trait Tile<S: Simd> {
    /// Adds `self . x[t]` for each row of the panel to `acc[t]`; `x` `[T]`.
    unsafe fn apply<const T: usize>(&self, x: *const Block, acc: &mut [S::F; T]);
}

/// `weight = scale * code + offset` with unsigned codes of at most `BITS` <= 6 bits.
pub(super) struct Affine<S: Simd, const BITS: u32> {
    /// Codes `[8, LANES, 4]`.
    pub w: [S::V; 8],
    pub scale: S::F,
    pub offset: S::F,
}

impl<S: Simd, const BITS: u32> Tile<S> for Affine<S, BITS> {
    #[inline(always)]
    unsafe fn apply<const T: usize>(&self, x: *const Block, acc: &mut [S::F; T]) {
        // SAFETY: the caller has the instruction set and valid blocks.
        unsafe {
            let dots = S::dot(BITS, &self.w, consecutive::<_, T>(x));
            for t in 0..T {
                let x = x.add(t);
                let sum = S::fma(self.offset, S::splat((*x).sum), acc[t]);
                acc[t] = S::fma(dots[t], S::mul(self.scale, S::splat((*x).scale)), sum);
            }
        }
    }
}

/// `weight = scale * code` with signed 8-bit codes.
pub(super) struct Signed<S: Simd> {
    w: S::Signed,
    scale: S::F,
}

impl<S: Simd> Signed<S> {
    /// Codes `w` `[8, LANES, 4]`.
    #[inline(always)]
    pub unsafe fn new(w: &[S::V; 8], scale: S::F) -> Self {
        // SAFETY: the caller has the instruction set.
        unsafe { Self { w: S::signed(w), scale } }
    }
}

impl<S: Simd> Tile<S> for Signed<S> {
    #[inline(always)]
    unsafe fn apply<const T: usize>(&self, x: *const Block, acc: &mut [S::F; T]) {
        // SAFETY: the caller has the instruction set and valid blocks.
        unsafe {
            let dots = S::dot_signed(&self.w, consecutive::<_, T>(x));
            for t in 0..T {
                acc[t] = S::fma(dots[t], S::mul(self.scale, S::splat((*x.add(t)).scale)), acc[t]);
            }
        }
    }
}

/// A quantised type that is multiplied with activations in blocks of 32.
pub(super) trait Quant {
    /// Bytes of a block of one row.
    const BLOCK_BYTES: usize;
    /// Tiles of a block: its columns / 32.
    const TILES: usize;
    /// Decoded columns.
    type Tile<S: Simd>: Tile<S>;

    /// Decodes tile `k` of the packed block at `p`.
    unsafe fn tile<S: Simd>(p: *const u8, k: usize) -> Self::Tile<S>;
}

/// Scales of a packed K-quant block of 256 columns.
pub(super) struct Scales<S: Simd> {
    /// Scale of the integer scales.
    pub d: S::F,
    /// Scale of the minima (or offsets), to be added.
    pub min_d: S::F,
    /// `[16, LANES]`, or `[8, LANES]` where 32 columns share a scale.
    pub scales: [MaybeUninit<i8>; 16 * MAX_LANES],
    /// Likewise.
    pub mins: [MaybeUninit<i8>; 16 * MAX_LANES],
}

impl<S: Simd> Scales<S> {
    #[inline(always)]
    pub fn new(d: S::F, min_d: S::F) -> Self {
        let none = [MaybeUninit::uninit(); 16 * MAX_LANES];
        Self { d, min_d, scales: none, mins: none }
    }
}

/// A K-quant: `weight = d * scale * code + min_d * min`, with integer scales and minima of 16 or 32 columns each; it is
/// multiplied with activations in blocks of 256, so that everything but `d` and `min_d` is summed in integers.
pub(super) trait SuperQuant {
    /// Bytes of a block of one row.
    const BLOCK_BYTES: usize;
    /// Bits of the unsigned codes, at most 6.
    const BITS: u32;
    /// Whether scales belong to 16 columns, not 32.
    const HALVES: bool;

    /// Decodes the scales of the packed block at `p`: all 16 (or 8) of both kinds.
    unsafe fn scales<S: Simd>(p: *const u8) -> Scales<S>;
    /// Codes `[8, LANES, 4]` of columns `32 k ..` of the packed block at `p`.
    unsafe fn codes<S: Simd>(p: *const u8, k: usize) -> [S::V; 8];
}

/// A float type: how its packed elements become f32.
pub(super) trait Float {
    /// Bytes of an element.
    const BYTES: usize;
    /// Loads `LANES` elements.
    unsafe fn load<S: Simd>(p: *const u8) -> S::F;
}

/// Rows of activations that share decoded weights; their sums (`2 * TOKENS * LANES` f32) stay in the first-level cache.
const TOKENS: usize = 32;

/// Rows of activations that take turns: what hides the latency of dependent additions.
const TOGETHER: usize = 4;

/// Asks for the bytes that lie some way behind the `n` bytes of a tile at `p`.
#[inline(always)]
unsafe fn prefetch<S: Simd>(p: *const u8, n: usize) {
    for at in (0..n).step_by(64) {
        // SAFETY: the address need not be valid.
        unsafe { S::prefetch(p.wrapping_add(PREFETCH + at)) };
    }
}

/// How far ahead, in bytes. One core of a Sapphire Rapids reads 13.9 GB/s of Q4_K with 3072, 11.7 with 1536, 8.7
/// with 0.
const PREFETCH: usize = 3072;

/// Multiplies panels of a type with scales of its own for every 32 columns.
#[inline(always)]
unsafe fn mul_quant<S: Simd, Q: Quant>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
    let n_blocks = m.n_cols / (Q::TILES * BLOCK_LEN);
    let (block_bytes, n_tokens, x) = (Q::BLOCK_BYTES * S::LANES, x.n_rows(), x.blocks());
    let tile_bytes = block_bytes / Q::TILES;
    for first in (0..n_tokens).step_by(TOKENS) {
        let n = TOKENS.min(n_tokens - first);
        for panel in panels.clone() {
            let blocks = m.data[panel * n_blocks * block_bytes..][..n_blocks * block_bytes].chunks_exact(block_bytes);
            // SAFETY: each of `blocks` is a slice of all the bytes that `Q` reads; `x` walks the blocks
            // `[n_cols / 32, n_tokens]` of the activations, whose columns `mul` compared with the matrix's; the
            // caller has the instruction set.
            unsafe {
                let mut x = x.add(first);
                if n == 1 {
                    let mut acc = [S::zero()];
                    for block in blocks {
                        for k in 0..Q::TILES {
                            prefetch::<S>(block.as_ptr().wrapping_add(k * tile_bytes), tile_bytes);
                            Q::tile::<S>(block.as_ptr(), k).apply(x, &mut acc);
                            x = x.add(n_tokens);
                        }
                    }
                    store::<S>(out, first, panel, m.n_rows, acc[0]);
                } else {
                    let mut acc = [S::zero(); TOKENS];
                    for block in blocks {
                        for k in 0..Q::TILES {
                            prefetch::<S>(block.as_ptr().wrapping_add(k * tile_bytes), tile_bytes);
                            let tile = Q::tile::<S>(block.as_ptr(), k);
                            let (groups, rest) = acc[..n].as_chunks_mut::<TOGETHER>();
                            let mut x_group = x;
                            for acc in groups {
                                tile.apply(x_group, acc);
                                x_group = x_group.add(TOGETHER);
                            }
                            for acc in rest.as_chunks_mut::<1>().0 {
                                tile.apply(x_group, acc);
                                x_group = x_group.add(1);
                            }
                            x = x.add(n_tokens);
                        }
                    }
                    for (t, acc) in acc[..n].iter().enumerate() {
                        store::<S>(out, first + t, panel, m.n_rows, *acc);
                    }
                }
            }
        }
    }
}

/// Multiplies panels of a K-quant.
#[inline(always)]
unsafe fn mul_super<S: Simd, Q: SuperQuant>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
    let n_blocks = m.n_cols / SUPER_BLOCK_LEN;
    let (block_bytes, n_tokens) = (Q::BLOCK_BYTES * S::LANES, x.n_rows());
    let (x, codes, tile_bytes) = (x.super_blocks(), x.super_codes(), block_bytes / 8);
    for first in (0..n_tokens).step_by(TOKENS) {
        let n = TOKENS.min(n_tokens - first);
        for panel in panels.clone() {
            let blocks = m.data[panel * n_blocks * block_bytes..][..n_blocks * block_bytes].chunks_exact(block_bytes);
            // SAFETY: each of `blocks` is a slice of all the bytes that `Q` reads; `x` walks the blocks
            // `[n_cols / 256, n_tokens]` of the activations, `codes` their codes `[n_cols / 32, n_tokens]`; `mul`
            // compared the columns with the matrix's. The caller has the instruction set.
            unsafe {
                let (mut x, mut codes) = (x.add(first), codes.add(first));
                if n == 1 {
                    let mut acc = S::zero();
                    for block in blocks {
                        let p = block.as_ptr();
                        let scales = Q::scales::<S>(p);
                        let mut sum = [S::no_sum()];
                        for k in 0..8 {
                            prefetch::<S>(p.wrapping_add(k * tile_bytes), tile_bytes);
                            dot_tile::<S, Q, 1>(&Q::codes::<S>(p, k), tile_scales::<S, Q>(&scales, k), codes, &mut sum);
                            codes = codes.add(n_tokens);
                        }
                        acc = finish::<S, Q>(&scales, &pairs::<S, Q>(&scales), x, sum[0], acc);
                        x = x.add(n_tokens);
                    }
                    store::<S>(out, first, panel, m.n_rows, acc);
                } else {
                    let mut acc = [S::zero(); TOKENS];
                    for block in blocks {
                        let p = block.as_ptr();
                        let scales = Q::scales::<S>(p);
                        let mut sums = [S::no_sum(); TOKENS];
                        for k in 0..8 {
                            prefetch::<S>(p.wrapping_add(k * tile_bytes), tile_bytes);
                            let (w, scales) = (Q::codes::<S>(p, k), tile_scales::<S, Q>(&scales, k));
                            let (groups, rest) = sums[..n].as_chunks_mut::<TOGETHER>();
                            let mut x_group = codes;
                            for sums in groups {
                                dot_tile::<S, Q, TOGETHER>(&w, scales, x_group, sums);
                                x_group = x_group.add(TOGETHER);
                            }
                            for sum in rest.as_chunks_mut::<1>().0 {
                                dot_tile::<S, Q, 1>(&w, scales, x_group, sum);
                                x_group = x_group.add(1);
                            }
                            codes = codes.add(n_tokens);
                        }
                        let pairs = pairs::<S, Q>(&scales);
                        for (t, (acc, sum)) in acc[..n].iter_mut().zip(&sums).enumerate() {
                            *acc = finish::<S, Q>(&scales, &pairs, x.add(t), *sum, *acc);
                        }
                        x = x.add(n_tokens);
                    }
                    for (t, acc) in acc[..n].iter().enumerate() {
                        store::<S>(out, first + t, panel, m.n_rows, *acc);
                    }
                }
            }
        }
    }
}

/// Scales of tile `k`, one for each half of its columns.
#[inline(always)]
unsafe fn tile_scales<S: Simd, Q: SuperQuant>(scales: &Scales<S>, k: usize) -> [S::Scale; 2] {
    // SAFETY: the caller has the instruction set and scales that `Q` decoded; `k` is below 8.
    unsafe {
        let scales: *const i8 = scales.scales.as_ptr().cast();
        if Q::HALVES {
            let first = scales.add(2 * k * S::LANES);
            [S::scale(first), S::scale(first.add(S::LANES))]
        } else {
            [S::scale(scales.add(k * S::LANES)); 2]
        }
    }
}

/// Adds `scale * code . x[t]` over a tile to `sums[t]`; `x` `[T]`.
#[inline(always)]
unsafe fn dot_tile<S: Simd, Q: SuperQuant, const T: usize>(
    w: &[S::V; 8],
    scales: [S::Scale; 2],
    x: *const Codes,
    sums: &mut [S::Sum; T],
) {
    // SAFETY: the caller has the instruction set and valid codes.
    unsafe {
        let x = consecutive::<_, T>(x).map(|x| x.cast());
        if Q::HALVES {
            S::dot_scaled_halves(Q::BITS, w, scales, x, sums);
        } else {
            S::dot_scaled(Q::BITS, w, scales[0], x, sums);
        }
    }
}

/// Minima as 16-bit pairs: 8, or 4 where 32 columns share one.
#[inline(always)]
unsafe fn pairs<S: Simd, Q: SuperQuant>(scales: &Scales<S>) -> [S::V; 8] {
    // SAFETY: the caller has the instruction set and scales that `Q` decoded.
    unsafe {
        let mins: *const i8 = scales.mins.as_ptr().cast();
        let mut pairs = [S::splat_u8(0); 8];
        for i in 0..if Q::HALVES { 8 } else { 4 } {
            pairs[i] = S::pairs(mins.add(2 * i * S::LANES));
        }
        pairs
    }
}

/// `acc +` the products of a block: its integer sums, scaled, and its minima times the sums of activations.
#[inline(always)]
unsafe fn finish<S: Simd, Q: SuperQuant>(
    scales: &Scales<S>,
    pairs: &[S::V; 8],
    x: *const SuperBlock,
    sum: S::Sum,
    acc: S::F,
) -> S::F {
    // SAFETY: the caller has the instruction set and a valid block, which has sums for all pairs.
    unsafe {
        let mins = if Q::HALVES {
            S::dot_pairs(pairs, (&raw const (*x).sums_16).cast())
        } else {
            S::dot_pairs(&pairs[..4], (&raw const (*x).sums_32).cast())
        };
        let products = S::fma(mins, scales.min_d, S::mul(S::sum_to_f32(sum), scales.d));
        S::fma(products, S::splat((*x).scale), acc)
    }
}

/// Multiplies float panels: sums stay in registers, four rows of activations at a time.
#[inline(always)]
unsafe fn mul_float<S: Simd, W: Float>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
    let (n_cols, n_tokens, floats) = (m.n_cols, x.n_rows(), x.floats());
    let panel_bytes = n_cols * W::BYTES * S::LANES;
    for panel in panels {
        let p = m.data[panel * panel_bytes..][..panel_bytes].as_ptr();
        for first in (0..n_tokens).step_by(4) {
            // SAFETY: columns are below `n_cols`, the width of the panel (a slice that was checked) and of the
            // activations (`mul` compared them), rows below `n_tokens`; the caller has the instruction set.
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

/// A family of kernels, compiled for each instruction set and chosen by the matrix's.
macro_rules! family {
    ($name:ident, $kind:ident, $body:ident) => {
        fn $name<Q: $kind>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
            fn avx512<Q: $kind>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
                // SAFETY: the features are enabled.
                unsafe { $body::<Avx512, Q>(m, panels, x, out) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2<Q: $kind>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
                // SAFETY: the features are enabled.
                unsafe { $body::<Avx2, Q>(m, panels, x, out) }
            }
            match m.isa {
                // SAFETY: packing checked that the processor has the instruction set.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => unsafe { avx512::<Q>(m, panels, x, out) },
                // SAFETY: packing checked that the processor has the instruction set.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => unsafe { avx2::<Q>(m, panels, x, out) },
                // SAFETY: plain Rust.
                _ => unsafe { $body::<Portable, Q>(m, panels, x, out) },
            }
        }
    };
}

family!(quant, Quant, mul_quant);
family!(super_quant, SuperQuant, mul_super);
family!(float, Float, mul_float);

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
        Q2_K => super_quant::<super::q2_k::Q2K>,
        Q3_K => super_quant::<super::q3_k::Q3K>,
        Q4_K => super_quant::<super::q4_k::Q4K>,
        Q5_K => super_quant::<super::q4_k::Q5K>,
        Q6_K => super_quant::<super::q6_k::Q6K>,
        IQ4_NL => quant::<super::iq4::Iq4Nl>,
        IQ4_XS => quant::<super::iq4::Iq4Xs>,
        MXFP4 => quant::<super::iq4::Mxfp4>,
        ty => panic!("no CPU kernel for tensor type {ty}: the model reader refuses it"),
    };
    kernel(m, panels, x, out);
}

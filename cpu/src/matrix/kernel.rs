//! Panels times activations: walks panels, blocks and rows of activations, whatever the type and the instruction set.
//! A type decodes 32 columns of a panel at a time into eight vectors of codes; they stay in registers while
//! they are applied to one row of activations after the other.

use super::simd::{MAX_LANES, Simd, portable::Portable};
use super::{Matrix, OutRows};
#[cfg(target_arch = "x86_64")]
use super::{
    amx,
    simd::{avx2::Avx2, avx512::Avx512},
};
use crate::Isa;
use crate::activations::{Activations, BLOCK_LEN, Block, BlockCodes, Codes, SUPER_BLOCK_LEN, SuperBlock};
use crate::gemm::prefetch;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::atomic::{Ordering, compiler_fence};
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

/// Sums of the codes of `T` blocks.
#[inline(always)]
unsafe fn code_sums<const T: usize>(x: *const Block) -> [i32; T] {
    let mut sums = [0; T];
    for t in 0..T {
        // SAFETY: the caller has `T` blocks.
        sums[t] = unsafe { (*x.add(t)).code_sum };
    }
    sums
}

/// 32 columns of a panel whose scales belong to these columns alone: `weight = scale * code + offset`.
pub(super) struct Decoded<S: Simd> {
    /// Codes `[8, LANES, 4]`.
    pub w: [S::V; 8],
    pub scale: S::F,
    pub offset: S::F,
}

impl<S: Simd> Decoded<S> {
    /// Codes without offset.
    #[inline(always)]
    pub unsafe fn without_offset(w: [S::V; 8], scale: S::F) -> Self {
        // SAFETY: the caller has the instruction set.
        unsafe { Self { w, scale, offset: S::zero() } }
    }
}

/// [`Decoded`] columns, prepared for many products.
pub(super) trait Tile<S: Simd> {
    /// The code of weight 0, where all blocks have the same. It is taken off in integers, and offsets are 0.
    const ZERO: Option<u8>;

    unsafe fn new(decoded: Decoded<S>) -> Self;
    /// Adds `self . x[t]` for each row of the panel to `acc[t]`; `x` and its `codes` `[T]`.
    unsafe fn apply<const T: usize>(&self, x: *const Block, codes: *const BlockCodes, acc: &mut [S::F; T]);
}

/// Unsigned codes of at most `BITS` <= 6 bits: less `ZERO`, or with offsets where that is 0.
pub(super) struct Unsigned<S: Simd, const BITS: u32, const ZERO: u8>(Decoded<S>);

impl<S: Simd, const BITS: u32, const ZERO: u8> Tile<S> for Unsigned<S, BITS, ZERO> {
    const ZERO: Option<u8> = if ZERO == 0 { None } else { Some(ZERO) };

    #[inline(always)]
    unsafe fn new(decoded: Decoded<S>) -> Self {
        Self(decoded)
    }
    #[inline(always)]
    unsafe fn apply<const T: usize>(&self, x: *const Block, codes: *const BlockCodes, acc: &mut [S::F; T]) {
        // SAFETY: the caller has the instruction set and valid blocks.
        unsafe {
            let dots = S::dot(BITS, ZERO, &self.0.w, consecutive::<_, T>(codes).map(|x| x.cast()), code_sums(x));
            for t in 0..T {
                let (x, mut sum) = (x.add(t), acc[t]);
                if ZERO == 0 {
                    sum = S::fma(self.0.offset, S::splat((*x).sum), sum);
                }
                acc[t] = S::fma(dots[t], S::mul(self.0.scale, S::splat((*x).scale)), sum);
            }
        }
    }
}

/// Signed 8-bit codes, without offset.
pub(super) struct Signed<S: Simd> {
    w: S::Signed,
    scale: S::F,
}

impl<S: Simd> Tile<S> for Signed<S> {
    const ZERO: Option<u8> = Some(0);

    #[inline(always)]
    unsafe fn new(decoded: Decoded<S>) -> Self {
        // SAFETY: the caller has the instruction set.
        unsafe { Self { w: S::signed(&decoded.w), scale: decoded.scale } }
    }
    #[inline(always)]
    unsafe fn apply<const T: usize>(&self, x: *const Block, codes: *const BlockCodes, acc: &mut [S::F; T]) {
        // SAFETY: the caller has the instruction set and valid blocks.
        unsafe {
            let dots = S::dot_signed(&self.w, consecutive::<_, T>(codes).map(|x| x.cast()), code_sums(x));
            for t in 0..T {
                acc[t] = S::fma(dots[t], S::mul(self.scale, S::splat((*x.add(t)).scale)), acc[t]);
            }
        }
    }
}

/// A quantised type that is multiplied with activations in blocks of 32. The kernels here ask ahead for the first line
/// of each block, tiles for the others ([`load_and_prefetch`]).
pub(super) trait Quant {
    /// Bytes of a block of one row.
    const BLOCK_BYTES: usize;
    /// Tiles of a block: its columns / 32.
    const TILES: usize;
    /// Columns prepared for products.
    type Tile<S: Simd>: Tile<S>;

    /// Decodes tile `k` of the packed block at `p`, loaded by [`load_and_prefetch`]: without it nothing asks ahead.
    unsafe fn tile<S: Simd>(p: *const u8, k: usize) -> Decoded<S>;
}

/// Scales of a packed K-quant block of 256 columns.
pub(super) struct Scales<S: Simd> {
    /// Scale of the integer scales.
    pub d: S::F,
    /// Scale of the minima (or offsets), to be added.
    pub min_d: S::F,
    /// `[16, LANES]`, or `[8, LANES]` where 32 columns share a scale.
    pub scales: [MaybeUninit<i8>; 16 * MAX_LANES],
    /// Likewise, if there are any.
    pub mins: [MaybeUninit<i8>; 16 * MAX_LANES],
}

impl<S: Simd> Scales<S> {
    #[inline(always)]
    pub fn new(d: S::F, min_d: S::F) -> Self {
        let none = [MaybeUninit::uninit(); 16 * MAX_LANES];
        Self { d, min_d, scales: none, mins: none }
    }
}

/// A K-quant: `weight = d * scale * code + min_d * min`, or `d * scale * (code - ZERO)`, with integer scales and minima
/// of 16 or 32 columns each; it is multiplied with activations in blocks of 256, so that everything but `d` and `min_d`
/// is summed in integers.
pub(super) trait SuperQuant {
    /// Bytes of a block of one row.
    const BLOCK_BYTES: usize;
    /// Bits of the unsigned codes, at most 6.
    const BITS: u32;
    /// Whether scales belong to 16 columns, not 32.
    const HALVES: bool;
    /// The code of weight 0, where all blocks have the same: there are no minima then.
    const ZERO: Option<u8> = None;

    /// Decodes the scales of the packed block at `p`: all 16 (or 8) of both kinds.
    unsafe fn scales<S: Simd>(p: *const u8) -> Scales<S>;
    /// Codes `[LANES, 4]` of columns `32 k + 4 g ..` of the packed block at `p`.
    unsafe fn code<S: Simd>(p: *const u8, k: usize, g: usize) -> S::V;
    /// Codes `[8, LANES, 4]` of columns `32 k ..` of the packed block at `p`.
    #[inline(always)]
    unsafe fn codes<S: Simd>(p: *const u8, k: usize) -> [S::V; 8] {
        // SAFETY: the caller has the instruction set and a packed block.
        unsafe {
            let mut w = [S::splat_u8(0); 8];
            for g in 0..8 {
                w[g] = Self::code::<S>(p, k, g);
            }
            w
        }
    }
}

/// A float type: how its packed elements become f32.
pub(super) trait Float {
    /// Bytes of an element.
    const BYTES: usize;
    /// Loads `LANES` elements.
    unsafe fn load<S: Simd>(p: *const u8) -> S::F;
}

/// Rows of activations that share decoded weights; their sums (`2 * TOKENS * LANES` f32) stay in the first-level cache.
const TOKENS: usize = 64;

/// Calls `$body` with groups of `$T` neighbouring elements `$sums` of `$all`, the first of them element `$t`: rows of
/// activations that take turns hide the latency of each other's additions. Eight need the registers of AVX-512: on Zen
/// 3 they cost 35 % of Q6_K; one core of a Sapphire Rapids multiplies 10 to 20 % more K-quants with eight than with
/// four.
macro_rules! in_groups {
    ($S:ident, $all:expr, |$T:ident, $t:ident, $sums:ident| $body:expr) => {{
        let all = &mut $all;
        let mut $t = 0;
        if $S::LANES == 16 {
            while let Some($sums) = all[$t..].first_chunk_mut() {
                const $T: usize = 8;
                $body;
                $t += $T;
            }
        }
        while let Some($sums) = all[$t..].first_chunk_mut() {
            const $T: usize = 4;
            $body;
            $t += $T;
        }
        while let Some($sums) = all[$t..].first_chunk_mut() {
            const $T: usize = 1;
            $body;
            $t += $T;
        }
    }};
}

/// Asks for the lines that lie some way behind part `i`, of `n` bytes, of the block at `p`.
#[inline(always)]
unsafe fn prefetch_behind<S: Simd>(p: *const u8, i: usize, n: usize) {
    // Numbers that are known where `i` is: with branches here the compiler would part loads from their products.
    for line in (i * n).div_ceil(64)..((i + 1) * n).div_ceil(64) {
        // SAFETY: the address need not be valid.
        unsafe { S::prefetch_behind(p.wrapping_add(64 * line)) };
    }
}

/// Vector `i` of those at `p`, and the line that lies some way behind is asked for.
#[inline(always)]
pub(super) unsafe fn load_and_prefetch<S: Simd>(p: *const u8, i: usize) -> S::V {
    let at = 4 * S::LANES * i;
    // SAFETY: the caller has the instruction set and the bytes.
    unsafe {
        if at.is_multiple_of(64) {
            S::prefetch_behind(p.wrapping_add(at));
        }
        if S::LANES == 16 {
            // Keeps lines asked for one by one: two cores of a Sapphire Rapids read Q8_0 at 98 % of what they can so,
            // with all lines of a block at its head at 92 %. With AVX2 they read 4 % less so.
            compiler_fence(Ordering::SeqCst);
        }
        S::load(p.add(at))
    }
}

/// Panels ahead whose line of sums is asked for.
const SUMS_AHEAD: usize = 4;

/// Asks for the line of a later panel's sums, if the cache is to have it: with 1024 columns of Q4_K, stores that miss
/// cost 6 % of the time.
#[inline(always)]
unsafe fn prefetch_sums<S: Simd>(out: &OutRows, token: usize, panel: usize) {
    if S::LANES == 16 && !out.past_caches {
        // SAFETY: the panel's own line lies within the output; that of the later one need not be valid.
        prefetch(unsafe { out.at(token, panel * S::LANES) }.wrapping_add(SUMS_AHEAD * S::LANES));
    }
}

/// Calls `$body` for each `$k` below 8, the tiles of a block for one row of activations. On AVX-512 they are unrolled:
/// a shift by a number that is not a constant takes two instructions.
macro_rules! for_tiles {
    ($S:ident, |$k:ident| $body:expr) => {
        if $S::LANES == 16 {
            for_tiles!(@unrolled $k $body, 0 1 2 3 4 5 6 7);
        } else {
            for $k in 0..8 {
                $body;
            }
        }
    };
    (@unrolled $k:ident $body:expr, $($tile:literal)*) => {
        $({
            let $k = $tile;
            $body;
        })*
    };
}

/// Multiplies panels of a type with scales of its own for every 32 columns.
#[inline(always)]
unsafe fn mul_quant<S: Simd, Q: Quant>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
    let n_blocks = m.n_cols / (Q::TILES * BLOCK_LEN);
    let (block_bytes, n_tokens) = (Q::BLOCK_BYTES * S::LANES, x.n_rows());
    let (x, codes) = (x.blocks(), x.block_codes());
    for first in (0..n_tokens).step_by(TOKENS) {
        let n = TOKENS.min(n_tokens - first);
        for panel in panels.clone() {
            let blocks = m.data[panel * n_blocks * block_bytes..][..n_blocks * block_bytes].chunks_exact(block_bytes);
            // SAFETY: each of `blocks` is a slice of all the bytes that `Q` reads; `x` and `codes` walk the blocks
            // `[n_cols / 32, n_tokens]` of the activations, whose columns `mul` compared with the matrix's; the
            // caller has the instruction set.
            unsafe {
                let (mut x, mut codes) = (x.add(first), codes.add(first));
                if n == 1 {
                    prefetch_sums::<S>(out, first, panel);
                    let mut acc = [S::zero()];
                    for block in blocks {
                        S::prefetch_behind(block.as_ptr());
                        for k in 0..Q::TILES {
                            Q::Tile::<S>::new(Q::tile(block.as_ptr(), k)).apply(x, codes, &mut acc);
                            (x, codes) = (x.wrapping_add(n_tokens), codes.wrapping_add(n_tokens));
                        }
                    }
                    store_one::<S>(out, first, panel, m.n_rows, acc[0]);
                } else {
                    let mut acc = [S::zero(); TOKENS];
                    for block in blocks {
                        S::prefetch_behind(block.as_ptr());
                        for k in 0..Q::TILES {
                            let tile = Q::Tile::<S>::new(Q::tile(block.as_ptr(), k));
                            in_groups!(S, acc[..n], |T, t, acc| tile.apply::<T>(x.add(t), codes.add(t), acc));
                            (x, codes) = (x.wrapping_add(n_tokens), codes.wrapping_add(n_tokens));
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
            // SAFETY: `x` walks the blocks `[n_cols / 256, n_tokens]` of the activations, `codes` their codes
            // `[n_cols / 64, n_tokens]`, two tiles each; `mul` compared the columns. The caller has the instruction
            // set.
            unsafe {
                let (mut x, mut codes) = (x.add(first), codes.add(first));
                if n == 1 {
                    prefetch_sums::<S>(out, first, panel);
                    let mut acc = S::zero();
                    for block in blocks {
                        let p = block.as_ptr();
                        let scales = Q::scales::<S>(p);
                        let mut sum = [S::no_sum()];
                        for_tiles!(S, |k| {
                            let tile_scales = tile_scales::<S, Q>(&scales, k);
                            if S::LANES == 16 {
                                let x = codes.cast::<i8>().add(k % 2 * BLOCK_LEN);
                                dot_half::<S, Q>(p, k, 0, tile_scales[0], x, &mut sum);
                                dot_half::<S, Q>(p, k, 1, tile_scales[1], x, &mut sum);
                            } else {
                                let mut w = [S::splat_u8(0); 8];
                                for g in 0..8 {
                                    w[g] = code_and_prefetch::<S, Q>(p, k, g);
                                }
                                dot_tile::<S, Q, 1>(&w, tile_scales, codes, k % 2, &mut sum);
                            }
                            codes = codes.wrapping_add(k % 2 * n_tokens);
                        });
                        acc = finish::<S, Q>(&scales, &pairs::<S, Q>(&scales), x, sum[0], acc);
                        x = x.wrapping_add(n_tokens);
                    }
                    store_one::<S>(out, first, panel, m.n_rows, acc);
                } else {
                    let mut acc = [S::zero(); TOKENS];
                    for block in blocks {
                        let p = block.as_ptr();
                        let scales = Q::scales::<S>(p);
                        let mut sums = [S::no_sum(); TOKENS];
                        for k in 0..8 {
                            prefetch_behind::<S>(p, k, tile_bytes);
                            let (w, scales) = (Q::codes::<S>(p, k), tile_scales::<S, Q>(&scales, k));
                            in_groups!(S, sums[..n], |T, t, sums| {
                                dot_tile::<S, Q, T>(&w, scales, codes.add(t), k % 2, sums)
                            });
                            codes = codes.wrapping_add(k % 2 * n_tokens);
                        }
                        let pairs = pairs::<S, Q>(&scales);
                        for (t, (acc, sum)) in acc[..n].iter_mut().zip(&sums).enumerate() {
                            *acc = finish::<S, Q>(&scales, &pairs, x.add(t), *sum, *acc);
                        }
                        x = x.wrapping_add(n_tokens);
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

/// Adds `scale * code . x[t]` over a tile, which meets half `half` of the codes, to `sums[t]`; `x` `[T]`.
#[inline(always)]
unsafe fn dot_tile<S: Simd, Q: SuperQuant, const T: usize>(
    w: &[S::V; 8],
    scales: [S::Scale; 2],
    x: *const Codes,
    half: usize,
    sums: &mut [S::Sum; T],
) {
    // SAFETY: the caller has the instruction set and valid codes.
    unsafe {
        let x = consecutive::<_, T>(x).map(|x| x.cast::<i8>().add(half * BLOCK_LEN));
        if Q::HALVES {
            S::dot_scaled_halves(Q::BITS, w, scales, x, sums);
        } else {
            S::dot_scaled(Q::BITS, w, scales[0], x, sums);
        }
    }
}

/// Codes `[LANES, 4]` of columns `32 k + 4 g ..` of the packed block at `p`, and the lines that lie some way behind are
/// asked for.
#[inline(always)]
unsafe fn code_and_prefetch<S: Simd, Q: SuperQuant>(p: *const u8, k: usize, g: usize) -> S::V {
    // SAFETY: the caller has the instruction set and a packed block.
    unsafe {
        prefetch_behind::<S>(p, 8 * k + g, (Q::BLOCK_BYTES * S::LANES).div_ceil(64));
        let code = Q::code::<S>(p, k, g);
        // Keeps lines asked for one by one: in bursts they hold up the loads between them. Two cores of a Sapphire
        // Rapids read 30 to 31 GB/s so, without 28 to 30.
        compiler_fence(Ordering::SeqCst);
        code
    }
}

/// Adds `scale * code . x` over half `half` of tile `k` to `sum`, for one row of activations. Products come between the
/// loads of codes, not behind those of a whole tile: two cores of a Sapphire Rapids read Q6_K at 86 to 94 % of what
/// they can so, at 81 to 86 % by tiles.
#[inline(always)]
unsafe fn dot_half<S: Simd, Q: SuperQuant>(
    p: *const u8,
    k: usize,
    half: usize,
    scale: S::Scale,
    x: *const i8,
    sum: &mut [S::Sum; 1],
) {
    // SAFETY: the caller has the instruction set, a packed block and the 32 codes of the tile.
    unsafe {
        let mut w = [S::splat_u8(0); 4];
        for g in 0..4 {
            w[g] = code_and_prefetch::<S, Q>(p, k, 4 * half + g);
        }
        S::dot_scaled_half(Q::BITS, &w, scale, [x.add(half * BLOCK_LEN / 2)], sum);
    }
}

/// Minima, or the scales where there are none, as 16-bit pairs: 8, or 4 where 32 columns share one.
#[inline(always)]
pub(super) unsafe fn pairs<S: Simd, Q: SuperQuant>(scales: &Scales<S>) -> [S::V; 8] {
    // SAFETY: the caller has the instruction set and scales that `Q` decoded.
    unsafe {
        let mins: *const i8 = if Q::ZERO.is_some() { &scales.scales } else { &scales.mins }.as_ptr().cast();
        let mut pairs = [S::splat_u8(0); 8];
        for i in 0..if Q::HALVES { 8 } else { 4 } {
            pairs[i] = S::pairs(mins.add(2 * i * S::LANES));
        }
        pairs
    }
}

/// `acc +` the products of a block: its integer sums, scaled, and its minima times the sums of activations.
#[inline(always)]
pub(super) unsafe fn finish<S: Simd, Q: SuperQuant>(
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
        let sum = S::sum_to_f32(sum);
        match Q::ZERO {
            // Integers, and exact as long as they fit 24 bits.
            Some(zero) => finish_signed::<S>(scales, x, S::fma(mins, S::splat(-f32::from(zero)), sum), acc),
            None => {
                let products = S::fma(mins, scales.min_d, S::mul(sum, scales.d));
                S::fma(products, S::splat((*x).scale), acc)
            }
        }
    }
}

/// [`finish`] of the integer sums `sum` over codes less [`SuperQuant::ZERO`].
#[inline(always)]
pub(super) unsafe fn finish_signed<S: Simd>(scales: &Scales<S>, x: *const SuperBlock, sum: S::F, acc: S::F) -> S::F {
    // SAFETY: the caller has the instruction set and a valid block.
    unsafe { S::fma(S::mul(sum, scales.d), S::splat((*x).scale), acc) }
}

/// Multiplies float panels: sums stay in registers, eight of them, so that they hide the latency of additions.
#[inline(always)]
unsafe fn mul_float<S: Simd, W: Float>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
    /// `T` rows of activations from `x`, each with `SUMS` sums.
    #[inline(always)]
    unsafe fn rows<S: Simd, W: Float, const T: usize, const SUMS: usize>(
        n_cols: usize,
        p: *const u8,
        x: *const f32,
    ) -> [S::F; T] {
        // SAFETY: columns are below `n_cols`, rows below T.
        unsafe {
            let mut acc = [[S::zero(); SUMS]; T];
            let whole = n_cols - n_cols % SUMS;
            for col in (0..whole).step_by(SUMS) {
                for j in 0..SUMS {
                    let p = p.add((col + j) * W::BYTES * S::LANES);
                    if T == 1 && (j * W::BYTES * S::LANES).is_multiple_of(64) {
                        S::prefetch_behind(p);
                    }
                    let w = W::load::<S>(p);
                    for t in 0..T {
                        acc[t][j] = S::fma(w, S::splat(*x.add(t * n_cols + col + j)), acc[t][j]);
                    }
                }
            }
            for col in whole..n_cols {
                let w = W::load::<S>(p.add(col * W::BYTES * S::LANES));
                for t in 0..T {
                    acc[t][0] = S::fma(w, S::splat(*x.add(t * n_cols + col)), acc[t][0]);
                }
            }
            let mut sums = [S::zero(); T];
            for t in 0..T {
                for j in 0..SUMS {
                    sums[t] = S::add(sums[t], acc[t][j]);
                }
            }
            sums
        }
    }
    let (n_cols, n_tokens, floats) = (m.n_cols, x.n_rows(), x.floats());
    let panel_bytes = n_cols * W::BYTES * S::LANES;
    for panel in panels {
        let p = m.data[panel * panel_bytes..][..panel_bytes].as_ptr();
        let mut first = 0;
        while first < n_tokens {
            // SAFETY: the panel has `n_cols` columns, like the activations (`mul` compared them), rows are below
            // `n_tokens`; the caller has the instruction set.
            unsafe {
                let x = floats.add(first * n_cols);
                let put = |sums: &[S::F]| {
                    match sums {
                        [sum] => store_one::<S>(out, first, panel, m.n_rows, *sum),
                        _ => (0..sums.len()).for_each(|t| store::<S>(out, first + t, panel, m.n_rows, sums[t])),
                    }
                    sums.len()
                };
                first += match n_tokens - first {
                    8.. => put(&rows::<S, W, 8, 1>(n_cols, p, x)),
                    4.. => put(&rows::<S, W, 4, 2>(n_cols, p, x)),
                    _ => put(&rows::<S, W, 1, 8>(n_cols, p, x)),
                };
            }
        }
    }
}

/// Writes the sums of one panel and one row of activations.
#[inline(always)]
pub(super) unsafe fn store<S: Simd>(out: &OutRows, token: usize, panel: usize, n_rows: usize, acc: S::F) {
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

/// [`store`] for one row of activations, past the caches if `out` says so.
#[inline(always)]
unsafe fn store_one<S: Simd>(out: &OutRows, token: usize, panel: usize, n_rows: usize, acc: S::F) {
    let row = panel * S::LANES;
    // SAFETY: as there.
    unsafe {
        let to = out.at(token, row);
        if out.past_caches && row + S::LANES <= n_rows && (to as usize).is_multiple_of(64) {
            S::store_past_caches(to, acc);
        } else {
            store::<S>(out, token, panel, n_rows, acc);
        }
    }
}

/// A family of kernels, compiled for each instruction set and chosen by the matrix's. `$tiles` is the one for many rows
/// of activations on AMX.
macro_rules! family {
    ($name:ident, $kind:ident, $body:ident, $tiles:path) => {
        fn $name<Q: $kind>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
            fn tiles<Q: $kind>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
                // SAFETY: the features are enabled; AMX is there, as the caller says.
                unsafe { $tiles(m, panels, x, out) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
            fn avx512<Q: $kind>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
                // SAFETY: the features are enabled.
                unsafe { $body::<Avx512, Q>(m, panels, x, out) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
            fn avx_vnni<Q: $kind>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
                // SAFETY: the features are enabled.
                unsafe { $body::<Avx2<true>, Q>(m, panels, x, out) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2<Q: $kind>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
                // SAFETY: the features are enabled.
                unsafe { $body::<Avx2<false>, Q>(m, panels, x, out) }
            }
            let kernel: unsafe fn(&Matrix, Range<usize>, &Activations, &OutRows) = match m.isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Amx if x.n_rows() >= amx::MIN_ROWS => tiles::<Q>,
                #[cfg(target_arch = "x86_64")]
                Isa::Amx | Isa::Avx512 => avx512::<Q>,
                #[cfg(target_arch = "x86_64")]
                Isa::AvxVnni => avx_vnni::<Q>,
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => avx2::<Q>,
                _ => $body::<Portable, Q>,
            };
            // SAFETY: packing checked that the processor has the instruction set.
            unsafe { kernel(m, panels, x, out) }
        }
    };
}

family!(quant, Quant, mul_quant, amx::mul_quant::<Q>);
family!(super_quant, SuperQuant, mul_super, amx::mul_super::<Q>);
family!(float, Float, mul_float, mul_float::<Avx512, Q>);

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
    #[cfg(target_arch = "x86_64")]
    if out.past_caches {
        // What went past the caches is written before anything that tells others of it.
        // SAFETY: every x86-64 has it.
        unsafe { std::arch::x86_64::_mm_sfence() };
    }
}

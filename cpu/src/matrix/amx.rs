//! Panels times many rows of activations on AMX: a tile of 16 rows of activations times one of 16 panel rows. Owns the
//! tile instructions; layouts, scales and sums are those of [`super::kernel`]. Refuses nothing: its callers saw to it
//! that the processor has AMX and that this process may use it.
//!
//! K-quant codes times their integer scales fit 16 bits: their low and high bytes are two products over all 256
//! columns, and no scale is applied between. The code of weight 0 is taken off before, so that only types with minima
//! need sums of activations. Types with a scale for every 32 columns have one product for each 32, and twice the time
//! of a product goes to scaling it.

use super::kernel::{Decoded, Quant, Scales, SuperQuant, Tile, finish, finish_signed, pairs, store};
use super::simd::avx512::Avx512;
use super::{Matrix, OutRows};
use crate::activations::{Activations, BLOCK_LEN, Block, BlockCodes, CODES_LEN, Codes, SUPER_BLOCK_LEN};
use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Fewest rows of activations that tiles are used for. One core of a Sapphire Rapids multiplies 16 rows at 204 against
/// `vpdpbusd`'s 213 GMAC/s (Q4_K), 64 rows at 451 against 229.
pub(super) const MIN_ROWS: usize = 24;

/// Rows of activations, and of a panel, in a tile.
const ROWS: usize = 16;

/// Most rows of activations that share decoded weights.
const MAX_TOKENS: usize = 512;

/// Bytes of activations that stay in the second-level cache while panels pass.
const CACHED: usize = 1 << 20;

/// Rows of activations that share decoded weights: so many that decoding is cheap, so few that they stay in the cache.
fn tokens_together(n_cols: usize) -> usize {
    (CACHED / n_cols).next_multiple_of(2 * ROWS).clamp(64, MAX_TOKENS)
}

/// Products of a tile `[rows of activations, rows of a panel]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Products([__m512i; ROWS]);

/// The tiles of this thread, configured while it lives.
struct Tiles;

impl Tiles {
    /// Tiles for products over `columns` <= 64: 1 and 4 hold activations `[16, columns]`, 2 and 5 codes `[columns / 4,
    /// 16, 4]` of a panel, the others 32-bit integers `[16, 16]`.
    #[inline(always)]
    unsafe fn new(columns: usize) -> Self {
        #[repr(C, align(64))]
        struct Config {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(64);
        config.rows[..8].fill(16);
        for (x, w) in [(1, 2), (4, 5)] {
            (config.row_bytes[x], config.rows[w]) = (columns as u16, columns as u8 / 4);
        }
        // SAFETY: the caller has AMX; the configuration is 64 bytes of palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly, preserves_flags)) };
        Self
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: made where there is AMX.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// Codes of a K-quant block, less [`SuperQuant::ZERO`], times their integer scales: low bytes, then high bytes, each
/// `[4, 16, 16, 4]` for 4 times 64 columns of 16 rows.
type Scaled = [__m512i; 2 * SUPER_BLOCK_LEN / 4];

/// Decodes the packed block at `p` with its `scales`.
#[inline(always)]
unsafe fn scaled_codes<Q: SuperQuant>(p: *const u8, scales: &Scales<Avx512>, scaled: &mut Scaled) {
    // SAFETY: the caller has the instruction set, a packed block and its scales.
    unsafe {
        let (low_bytes, n) = (_mm512_set1_epi16(0xff), SUPER_BLOCK_LEN / 4);
        // Scales of 16 rows, each in both 16-bit units of its lane.
        let scale = |i: usize| {
            let scale = _mm512_cvtepi8_epi32(_mm_loadu_si128(scales.scales.as_ptr().cast::<__m128i>().add(i)));
            _mm512_mask_blend_epi16(0xaaaa_aaaa, scale, _mm512_slli_epi32(scale, 16))
        };
        for k in 0..8 {
            let mut w = Q::codes::<Avx512>(p, k);
            for w in &mut w {
                *w = _mm512_sub_epi8(*w, _mm512_set1_epi8(Q::ZERO.unwrap_or(0) as i8));
            }
            let scale = if Q::HALVES { [scale(2 * k), scale(2 * k + 1)] } else { [scale(k); 2] };
            for g in 0..8 {
                let even = _mm512_mullo_epi16(_mm512_srai_epi16(_mm512_slli_epi16(w[g], 8), 8), scale[g / 4]);
                let odd = _mm512_mullo_epi16(_mm512_srai_epi16(w[g], 8), scale[g / 4]);
                let low = _mm512_or_si512(_mm512_and_si512(even, low_bytes), _mm512_slli_epi16(odd, 8));
                let high = _mm512_or_si512(_mm512_srli_epi16(even, 8), _mm512_andnot_si512(low_bytes, odd));
                (scaled[8 * k + g], scaled[n + 8 * k + g]) = (low, high);
            }
        }
    }
}

/// Products over 256 columns: `scaled` with the codes at `x` of two times 16 rows, the next 64 columns `stride` bytes
/// on. `out`: of low bytes and of high bytes with the first 16 rows, then with the second.
///
/// # Safety
/// The pointers hold these shapes, and tiles are configured.
#[inline(always)]
unsafe fn multiply_256(scaled: &Scaled, x: *const Codes, stride: usize, out: *mut [Products; 4]) {
    // SAFETY: as the caller promises.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm3",
            "tilezero tmm6",
            "tilezero tmm7",
            "2:",
            "tileloadd tmm1, [{x} + {row}*1]",
            "tileloadd tmm2, [{w} + {row}*1]",
            "tileloadd tmm5, [{w} + {row}*1 + 4096]",
            "tdpbsud tmm0, tmm1, tmm2",
            "tdpbssd tmm3, tmm1, tmm5",
            "tileloadd tmm4, [{x} + {row}*1 + 1024]",
            "tdpbsud tmm6, tmm4, tmm2",
            "tdpbssd tmm7, tmm4, tmm5",
            "add {x}, {stride}",
            "add {w}, 1024",
            "dec {n}",
            "jnz 2b",
            "tilestored [{out} + {row}*1], tmm0",
            "tilestored [{out} + {row}*1 + 1024], tmm3",
            "tilestored [{out} + {row}*1 + 2048], tmm6",
            "tilestored [{out} + {row}*1 + 3072], tmm7",
            x = inout(reg) x => _,
            w = inout(reg) scaled.as_ptr() => _,
            n = inout(reg) SUPER_BLOCK_LEN / CODES_LEN => _,
            stride = in(reg) stride,
            row = in(reg) 64usize,
            out = in(reg) out,
            out("tmm0") _,
            out("tmm1") _,
            out("tmm2") _,
            out("tmm3") _,
            out("tmm4") _,
            out("tmm5") _,
            out("tmm6") _,
            out("tmm7") _,
            options(nostack),
        );
    }
}

/// Multiplies panels of a K-quant.
///
/// # Safety
/// The caller has AMX and AVX-512, and compared the shapes.
#[inline(always)]
pub(super) unsafe fn mul_super<Q: SuperQuant>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
    let n_blocks = m.n_cols / SUPER_BLOCK_LEN;
    let (block_bytes, n_tokens) = (Q::BLOCK_BYTES * ROWS, x.n_rows());
    let (x, codes, stride) = (x.super_blocks(), x.super_codes(), n_tokens * size_of::<Codes>());
    // SAFETY: `x` are the blocks `[n_blocks, n_tokens]` of the activations, `codes` their codes `[4 n_blocks,
    // n_tokens]` and at least 31 behind them, so that whole tiles can be read; the rows beyond `n_tokens` are not used.
    // The caller has the instruction sets.
    unsafe {
        let tiles = Tiles::new(CODES_LEN);
        let mut scaled = [_mm512_setzero_si512(); 2 * SUPER_BLOCK_LEN / 4];
        let mut products = MaybeUninit::<[Products; 4]>::uninit();
        let together = tokens_together(m.n_cols);
        for first in (0..n_tokens).step_by(together) {
            let n = together.min(n_tokens - first);
            for panel in panels.clone() {
                let blocks =
                    m.data[panel * n_blocks * block_bytes..][..n_blocks * block_bytes].chunks_exact(block_bytes);
                let mut acc = [_mm512_setzero_ps(); MAX_TOKENS];
                for (b, block) in blocks.enumerate() {
                    let p = block.as_ptr();
                    let scales = Q::scales::<Avx512>(p);
                    let pairs = pairs::<Avx512, Q>(&scales);
                    scaled_codes::<Q>(p, &scales, &mut scaled);
                    for (i, acc) in acc[..n].chunks_mut(2 * ROWS).enumerate() {
                        let token = first + 2 * ROWS * i;
                        multiply_256(&scaled, codes.add(4 * b * n_tokens + token), stride, products.as_mut_ptr());
                        for (half, acc) in acc.chunks_mut(ROWS).enumerate() {
                            let low = products.as_ptr().cast::<Products>().add(2 * half);
                            let (high, x) = (low.add(1), x.add(b * n_tokens + token + half * ROWS));
                            for (t, acc) in acc.iter_mut().enumerate() {
                                let sum = _mm512_add_epi32((*low).0[t], _mm512_slli_epi32((*high).0[t], 8));
                                let sum = _mm512_cvtepi32_ps(sum);
                                *acc = match Q::ZERO {
                                    Some(_) => finish_signed(&scales, x.add(t), sum, *acc),
                                    None => finish::<Avx512, Q>(&scales, &pairs, x.add(t), sum, *acc),
                                };
                            }
                        }
                    }
                }
                for (t, acc) in acc[..n].iter().enumerate() {
                    store::<Avx512>(out, first + t, panel, m.n_rows, *acc);
                }
            }
        }
        drop(tiles);
    }
}

/// Products over 32 columns: the codes `[8, 16, 4]` of two panels with the codes at `x` of 16 rows.
///
/// # Safety
/// The pointers hold these shapes, and tiles are configured.
#[inline(always)]
unsafe fn multiply_32([w0, w1]: [&[__m512i; 8]; 2], x: *const BlockCodes, out: *mut [Products; 2]) {
    // SAFETY: as the caller promises.
    unsafe {
        asm!(
            "tileloadd tmm1, [{x} + {x_row}*1]",
            "tileloadd tmm2, [{w0} + {row}*1]",
            "tilezero tmm0",
            "tilezero tmm3",
            "tdpbssd tmm0, tmm1, tmm2",
            "tileloadd tmm5, [{w1} + {row}*1]",
            "tdpbssd tmm3, tmm1, tmm5",
            "tilestored [{out} + {row}*1], tmm0",
            "tilestored [{out} + {row}*1 + 1024], tmm3",
            x = in(reg) x,
            w0 = in(reg) w0,
            w1 = in(reg) w1,
            x_row = in(reg) size_of::<BlockCodes>(),
            row = in(reg) 64usize,
            out = in(reg) out,
            out("tmm0") _,
            out("tmm1") _,
            out("tmm2") _,
            out("tmm3") _,
            out("tmm5") _,
            options(nostack),
        );
    }
}

/// Decodes columns `32 k ..` of the panel at `p`, into signed codes where all blocks have the same [`Tile::ZERO`].
#[inline(always)]
unsafe fn decode<Q: Quant>(p: *const u8, k: usize) -> Decoded<Avx512> {
    // SAFETY: the caller has the instruction set, a panel and these columns.
    unsafe {
        let mut tile = Q::tile::<Avx512>(p.add(k / Q::TILES * Q::BLOCK_BYTES * ROWS), k % Q::TILES);
        if let Some(zero) = Q::Tile::<Avx512>::ZERO {
            for w in &mut tile.w {
                *w = _mm512_sub_epi8(*w, _mm512_set1_epi8(zero as i8));
            }
        }
        tile
    }
}

/// Adds the products of columns `32 k ..` of the panels at `panels`, `N` blocks of 32, with the rows of activations
/// from `x` and `codes`, blocks `stride` apart, to `acc`, sums of both panels for each of these rows.
///
/// # Safety
/// The pointers hold these shapes, with codes for whole tiles of rows; tiles are configured.
#[inline(always)]
unsafe fn add_products<Q: Quant, const N: usize>(
    panels: [*const u8; 2],
    k: usize,
    (x, codes, stride): (*const Block, *const BlockCodes, usize),
    acc: &mut [[__m512; 2]],
) {
    // SAFETY: as the caller promises.
    unsafe {
        // Loops, and not closures, which would be compiled without the instruction set.
        let mut weights = [const { MaybeUninit::<[Decoded<Avx512>; 2]>::uninit() }; N];
        for (i, w) in weights.iter_mut().enumerate() {
            w.write([decode::<Q>(panels[0], k + i), decode::<Q>(panels[1], k + i)]);
        }
        let weights: *const [Decoded<Avx512>; 2] = weights.as_ptr().cast();
        let mut products = MaybeUninit::<[[Products; 2]; N]>::uninit();
        let products: *mut [Products; 2] = products.as_mut_ptr().cast();
        for (i, acc) in acc.chunks_mut(ROWS).enumerate() {
            let (x, codes) = (x.add(i * ROWS), codes.add(i * ROWS));
            for k in 0..N {
                let [w0, w1] = &*weights.add(k);
                multiply_32([&w0.w, &w1.w], codes.add(k * stride), products.add(k));
            }
            for (t, acc) in acc.iter_mut().enumerate() {
                for k in 0..N {
                    let (w, products, x) = (&*weights.add(k), &*products.add(k), x.add(k * stride + t));
                    let (scale, sum) = (_mm512_set1_ps((*x).scale), _mm512_set1_ps((*x).sum));
                    for p in 0..2 {
                        if Q::Tile::<Avx512>::ZERO.is_none() {
                            acc[p] = _mm512_fmadd_ps(w[p].offset, sum, acc[p]);
                        }
                        let dot = _mm512_cvtepi32_ps(products[p].0[t]);
                        acc[p] = _mm512_fmadd_ps(dot, _mm512_mul_ps(w[p].scale, scale), acc[p]);
                    }
                }
            }
        }
    }
}

/// Multiplies panels of a type with scales of its own for every 32 columns, two at a time: they share the tiles and
/// scales of the activations. Of an odd number the last one is its own second.
///
/// # Safety
/// The caller has AMX and AVX-512, and compared the shapes.
#[inline(always)]
pub(super) unsafe fn mul_quant<Q: Quant>(m: &Matrix, panels: Range<usize>, x: &Activations, out: &OutRows) {
    /// Blocks of 32 columns whose products are added together, so that sums are loaded and stored once for them.
    const TOGETHER: usize = 2;
    /// Most rows of activations that share decoded weights here, where the sums of all of them are used for every 64
    /// columns: they stay in the first-level cache.
    const MOST_SCALED: usize = 192;
    let (n_blocks, block_bytes, n_tokens) = (m.n_cols / BLOCK_LEN, Q::BLOCK_BYTES * ROWS, x.n_rows());
    let (x, codes, panel_bytes) = (x.blocks(), x.block_codes(), n_blocks / Q::TILES * block_bytes);
    // SAFETY: `x` are the blocks `[n_blocks, n_tokens]` of the activations, `codes` their codes and at least 31 behind
    // them, so that whole tiles can be read; the rows beyond `n_tokens` are not used. The caller has the instruction
    // sets.
    unsafe {
        let tiles = Tiles::new(BLOCK_LEN);
        let together = tokens_together(m.n_cols).min(MOST_SCALED);
        for first in (0..n_tokens).step_by(together) {
            let n = together.min(n_tokens - first);
            for panel in panels.clone().step_by(2) {
                let pair = [panel, (panel + 1).min(panels.end - 1)];
                let p = pair.map(|panel| m.data[panel * panel_bytes..][..panel_bytes].as_ptr());
                let activations = |k: usize| (x.add(k * n_tokens + first), codes.add(k * n_tokens + first), n_tokens);
                let (mut acc, whole) = ([[_mm512_setzero_ps(); 2]; MOST_SCALED], n_blocks - n_blocks % TOGETHER);
                for k in (0..whole).step_by(TOGETHER) {
                    add_products::<Q, TOGETHER>(p, k, activations(k), &mut acc[..n]);
                }
                for k in whole..n_blocks {
                    add_products::<Q, 1>(p, k, activations(k), &mut acc[..n]);
                }
                for (t, acc) in acc[..n].iter().enumerate() {
                    for (panel, acc) in pair.iter().zip(acc) {
                        store::<Avx512>(out, first + t, *panel, m.n_rows, *acc);
                    }
                }
            }
        }
        drop(tiles);
    }
}

//! Q6_K: blocks of 256 in 8 tiles with two 8-bit scales each. Packed: d `[R]` f16; scales `[16, R]` i8; qh `[2, 8, R, 4]`,
//! two bits for each of the four tiles of a half; ql `[2, 2, 8, R, 4]`, tiles s and s + 2 of a half in the low and
//! high nibbles of `[half, s]`.

use super::kernel::{Halved, Quant};
use super::simd::Simd;

pub(super) struct Q6K;

impl Quant for Q6K {
    const BLOCK_BYTES: usize = 210;
    const TILES: usize = 8;
    /// d
    type Head<S: Simd> = S::F;
    type Tile<S: Simd> = Halved<S, 6, 32>;

    #[inline(always)]
    unsafe fn head<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: as the trait asks.
        unsafe { S::load_f16(p) }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd>(p: *const u8, d: &S::F, k: usize) -> Self::Tile<S> {
        let (half, s) = (k / 4, k % 4);
        // SAFETY: as the trait asks.
        unsafe {
            let (low4, low2) = (S::splat_u8(15), S::splat_u8(3));
            let (ql, qh) = (82 + 64 * half + 32 * (s % 2), 18 + 32 * half);
            let mut w = [low4; 8];
            for g in 0..8 {
                let low = S::shr16(S::load(p.add((ql + 4 * g) * S::LANES)), 4 * (s as u32 / 2));
                let high = S::shr16(S::load(p.add((qh + 4 * g) * S::LANES)), 2 * s as u32);
                w[g] = S::or(S::and(low, low4), S::shl16(S::and(high, low2), 4));
            }
            let scales = p.add((2 + 2 * k) * S::LANES).cast();
            Halved { w, halves: S::halves(scales, scales.add(S::LANES)), scale: *d }
        }
    }
}

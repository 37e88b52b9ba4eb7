//! Q3_K: blocks of 256 in 8 tiles with two 6-bit scales each. Packed: d `[R]` f16; scales `[12, R]` u8, six-bit numbers
//! as in the file; hmask `[8, R, 4]`, bit k for tile k; qs `[2, 8, R, 4]`, two bits for each of the four tiles of a half.

use super::kernel::{Halved, Quant};
use super::simd::{MAX_LANES, Simd};

pub(super) struct Q3K;

/// Scales of a block.
pub(super) struct Head<S: Simd> {
    d: S::F,
    /// `[16, LANES]`
    scales: [u8; 16 * MAX_LANES],
}

impl Quant for Q3K {
    const BLOCK_BYTES: usize = 110;
    const TILES: usize = 8;
    type Head<S: Simd> = Head<S>;
    type Tile<S: Simd> = Halved<S, 3, 4>;

    #[inline(always)]
    unsafe fn head<S: Simd>(p: *const u8) -> Head<S> {
        // SAFETY: as the trait asks; the array holds four vectors of `4 * LANES` bytes.
        unsafe {
            let mut head = Head { d: S::load_f16(p), scales: [0; 16 * MAX_LANES] };
            let low = [S::load(p.add(2 * S::LANES)), S::load(p.add(6 * S::LANES))];
            let high = S::load(p.add(10 * S::LANES));
            let (low4, low2, bias) = (S::splat_u8(15), S::splat_u8(3), S::splat_u8(32));
            for i in 0..4 {
                let low = S::and(S::shr16(low[i % 2], 4 * (i as u32 / 2)), low4);
                let high = S::shl16(S::and(S::shr16(high, 2 * i as u32), low2), 4);
                let scales = S::sub_u8(S::or(low, high), bias);
                S::store(head.scales.as_mut_ptr().add(i * 4 * S::LANES), scales);
            }
            head
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd>(p: *const u8, head: &Head<S>, k: usize) -> Self::Tile<S> {
        let (half, s) = (k / 4, k % 4);
        // SAFETY: as the trait asks.
        unsafe {
            let (low2, one) = (S::splat_u8(3), S::splat_u8(1));
            let mut w = [low2; 8];
            for g in 0..8 {
                let low = S::and(S::shr16(S::load(p.add((46 + 32 * half + 4 * g) * S::LANES)), 2 * s as u32), low2);
                let high = S::and(S::shr16(S::load(p.add((14 + 4 * g) * S::LANES)), k as u32), one);
                w[g] = S::or(low, S::shl16(high, 2));
            }
            let scales: *const i8 = head.scales.as_ptr().add(2 * k * S::LANES).cast();
            Halved { w, halves: S::halves(scales, scales.add(S::LANES)), scale: head.d }
        }
    }
}

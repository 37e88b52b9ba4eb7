//! Q2_K: blocks of 256 in 8 tiles with two 4-bit scales and two 4-bit minima each. Packed: d `[R]` f16; dmin `[R]` f16; scales
//! `[16, R]` u8, scale in the low nibble, minimum in the high one; qs `[2, 8, R, 4]`, two bits for each of the four
//! tiles of a half.

use super::kernel::{Halved, HalvedMin, Quant};
use super::simd::{MAX_LANES, Simd};

pub(super) struct Q2K;

/// Scales of a block.
pub(super) struct Head<S: Simd> {
    d: S::F,
    minus_dmin: S::F,
    /// `[16, LANES]`
    scales: [u8; 16 * MAX_LANES],
    /// `[16, LANES]`
    mins: [u8; 16 * MAX_LANES],
}

impl Quant for Q2K {
    const BLOCK_BYTES: usize = 84;
    const TILES: usize = 8;
    type Head<S: Simd> = Head<S>;
    type Tile<S: Simd> = HalvedMin<S, 2>;

    #[inline(always)]
    unsafe fn head<S: Simd>(p: *const u8) -> Head<S> {
        // SAFETY: as the trait asks; the arrays hold four vectors of `4 * LANES` bytes.
        unsafe {
            let mut head = Head {
                d: S::load_f16(p),
                minus_dmin: S::mul(S::load_f16(p.add(2 * S::LANES)), S::splat(-1.0)),
                scales: [0; 16 * MAX_LANES],
                mins: [0; 16 * MAX_LANES],
            };
            let low4 = S::splat_u8(15);
            for i in 0..4 {
                let v = S::load(p.add((4 + 4 * i) * S::LANES));
                S::store(head.scales.as_mut_ptr().add(i * 4 * S::LANES), S::and(v, low4));
                S::store(head.mins.as_mut_ptr().add(i * 4 * S::LANES), S::and(S::shr16(v, 4), low4));
            }
            head
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd>(p: *const u8, head: &Head<S>, k: usize) -> Self::Tile<S> {
        let (half, s) = (k / 4, k % 4);
        // SAFETY: as the trait asks.
        unsafe {
            let low2 = S::splat_u8(3);
            let mut w = [low2; 8];
            for g in 0..8 {
                w[g] = S::and(S::shr16(S::load(p.add((20 + 32 * half + 4 * g) * S::LANES)), 2 * s as u32), low2);
            }
            let scales: *const i8 = head.scales.as_ptr().add(2 * k * S::LANES).cast();
            let mins: *const i8 = head.mins.as_ptr().add(2 * k * S::LANES).cast();
            HalvedMin {
                tile: Halved { w, halves: S::halves(scales, scales.add(S::LANES)), scale: head.d },
                mins: S::halves(mins, mins.add(S::LANES)),
                min_scale: head.minus_dmin,
            }
        }
    }
}

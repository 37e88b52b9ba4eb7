//! Q4_K and Q5_K: blocks of 256 in 8 tiles with a 6-bit scale and a 6-bit minimum each. Packed: d `[R]` f16; dmin `[R]` f16;
//! scales `[12, R]` u8, six-bit numbers as in the file; Q5_K: qh `[8, R, 4]`, bit k for tile k; qs `[4, 8, R, 4]`, tile
//! `2 p` in the low nibbles of `[p]`, tile `2 p + 1` in the high ones.

use super::kernel::{Affine, Quant};
use super::simd::{MAX_LANES, Simd};

pub(super) struct Q4K;
pub(super) struct Q5K;

/// Scales of a block.
pub(super) struct Head<S: Simd> {
    d: S::F,
    minus_dmin: S::F,
    /// `[8, LANES]`
    scales: [u8; 8 * MAX_LANES],
    /// `[8, LANES]`
    mins: [u8; 8 * MAX_LANES],
}

#[inline(always)]
unsafe fn head<S: Simd>(p: *const u8) -> Head<S> {
    // SAFETY: the caller has the instruction set and a packed block; the arrays hold two vectors of `4 * LANES` bytes.
    unsafe {
        let mut head = Head {
            d: S::load_f16(p),
            minus_dmin: S::mul(S::load_f16(p.add(2 * S::LANES)), S::splat(-1.0)),
            scales: [0; 8 * MAX_LANES],
            mins: [0; 8 * MAX_LANES],
        };
        // Bytes 0..4, 4..8 and 8..12 of the scales of all rows: the file's packing treats the four of a group alike.
        let [a, b, c] = [4, 8, 12].map(|at| at * S::LANES);
        let (a, b, c) = (S::load(p.add(a)), S::load(p.add(b)), S::load(p.add(c)));
        let (low6, low4, high2) = (S::splat_u8(63), S::splat_u8(15), S::splat_u8(0x30));
        S::store(head.scales.as_mut_ptr(), S::and(a, low6));
        S::store(head.mins.as_mut_ptr(), S::and(b, low6));
        let scales = S::or(S::and(c, low4), S::and(S::shr16(a, 2), high2));
        let mins = S::or(S::and(S::shr16(c, 4), low4), S::and(S::shr16(b, 2), high2));
        S::store(head.scales.as_mut_ptr().add(4 * S::LANES), scales);
        S::store(head.mins.as_mut_ptr().add(4 * S::LANES), mins);
        head
    }
}

/// Scale and offset of tile `k`.
#[inline(always)]
unsafe fn scale_offset<S: Simd>(head: &Head<S>, k: usize) -> (S::F, S::F) {
    // SAFETY: `k` is below 8; the caller has the instruction set.
    unsafe {
        let scale = S::to_f32(S::load_u8(head.scales.as_ptr().add(k * S::LANES)));
        let min = S::to_f32(S::load_u8(head.mins.as_ptr().add(k * S::LANES)));
        (S::mul(head.d, scale), S::mul(head.minus_dmin, min))
    }
}

impl Quant for Q4K {
    const BLOCK_BYTES: usize = 144;
    const TILES: usize = 8;
    type Head<S: Simd> = Head<S>;
    type Tile<S: Simd> = Affine<S, 4>;

    #[inline(always)]
    unsafe fn head<S: Simd>(p: *const u8) -> Head<S> {
        // SAFETY: as the trait asks.
        unsafe { head(p) }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd>(p: *const u8, head: &Head<S>, k: usize) -> Affine<S, 4> {
        // SAFETY: as the trait asks.
        unsafe {
            let (scale, offset) = scale_offset(head, k);
            let (mask, shift) = (S::splat_u8(15), 4 * (k as u32 % 2));
            let mut w = [mask; 8];
            for g in 0..8 {
                let v = S::load(p.add((16 + 32 * (k / 2) + 4 * g) * S::LANES));
                w[g] = S::and(S::shr16(v, shift), mask);
            }
            Affine { w, scale, offset }
        }
    }
}

impl Quant for Q5K {
    const BLOCK_BYTES: usize = 176;
    const TILES: usize = 8;
    type Head<S: Simd> = Head<S>;
    type Tile<S: Simd> = Affine<S, 5>;

    #[inline(always)]
    unsafe fn head<S: Simd>(p: *const u8) -> Head<S> {
        // SAFETY: as the trait asks.
        unsafe { head(p) }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd>(p: *const u8, head: &Head<S>, k: usize) -> Affine<S, 5> {
        // SAFETY: as the trait asks.
        unsafe {
            let (scale, offset) = scale_offset(head, k);
            let (mask, one, shift) = (S::splat_u8(15), S::splat_u8(1), 4 * (k as u32 % 2));
            let mut w = [mask; 8];
            for g in 0..8 {
                let high = S::and(S::shr16(S::load(p.add((16 + 4 * g) * S::LANES)), k as u32), one);
                let low = S::load(p.add((48 + 32 * (k / 2) + 4 * g) * S::LANES));
                w[g] = S::or(S::and(S::shr16(low, shift), mask), S::shl16(high, 4));
            }
            Affine { w, scale, offset }
        }
    }
}

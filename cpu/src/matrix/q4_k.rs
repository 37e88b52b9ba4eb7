//! Q4_K and Q5_K: blocks of 256 with a 6-bit scale and a 6-bit minimum for every 32 columns. Packed: d `[R]` f16; dmin
//! `[R]` f16; scales `[12, R]` u8, six-bit numbers as in the file; Q5_K: qh `[8, R, 4]`, bit k for columns `32 k ..`;
//! qs `[4, 8, R, 4]`, columns `64 p ..` in the low nibbles of `[p]`, columns `64 p + 32 ..` in the high ones.

use super::kernel::{Scales, SuperQuant};
use super::simd::Simd;

pub(super) struct Q4K;
pub(super) struct Q5K;

#[inline(always)]
unsafe fn scales<S: Simd>(p: *const u8) -> Scales<S> {
    // SAFETY: the caller has the instruction set and a packed block; the arrays hold at least two vectors of
    // `4 * LANES` bytes.
    unsafe {
        let mut s = Scales::<S>::new(S::load_f16(p), S::mul(S::load_f16(p.add(2 * S::LANES)), S::splat(-1.0)));
        let (scales, mins): (*mut u8, *mut u8) = (s.scales.as_mut_ptr().cast(), s.mins.as_mut_ptr().cast());
        // Bytes 0..4, 4..8 and 8..12 of the scales of all rows: the file's packing treats the four of a group alike.
        let [a, b, c] = [4, 8, 12].map(|at| at * S::LANES);
        let (a, b, c) = (S::load(p.add(a)), S::load(p.add(b)), S::load(p.add(c)));
        let (low6, low4, high2) = (S::splat_u8(63), S::splat_u8(15), S::splat_u8(0x30));
        S::store(scales, S::and(a, low6));
        S::store(mins, S::and(b, low6));
        let second = 4 * S::LANES;
        S::store(scales.add(second), S::or(S::and(c, low4), S::and(S::shr16(a, 2), high2)));
        S::store(mins.add(second), S::or(S::and(S::shr16(c, 4), low4), S::and(S::shr16(b, 2), high2)));
        s
    }
}

impl SuperQuant for Q4K {
    const BLOCK_BYTES: usize = 144;
    const BITS: u32 = 4;
    const HALVES: bool = false;

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8) -> Scales<S> {
        // SAFETY: as the trait asks.
        unsafe { scales(p) }
    }

    #[inline(always)]
    unsafe fn code<S: Simd>(p: *const u8, k: usize, g: usize) -> S::V {
        // SAFETY: as the trait asks.
        unsafe {
            let (mask, shift) = (S::splat_u8(15), 4 * (k as u32 % 2));
            let v = S::load(p.add((16 + 32 * (k / 2) + 4 * g) * S::LANES));
            S::and(S::shr16(v, shift), mask)
        }
    }
}

impl SuperQuant for Q5K {
    const BLOCK_BYTES: usize = 176;
    const BITS: u32 = 5;
    const HALVES: bool = false;

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8) -> Scales<S> {
        // SAFETY: as the trait asks.
        unsafe { scales(p) }
    }

    #[inline(always)]
    unsafe fn code<S: Simd>(p: *const u8, k: usize, g: usize) -> S::V {
        // SAFETY: as the trait asks.
        unsafe {
            let (mask, one, shift) = (S::splat_u8(15), S::splat_u8(1), 4 * (k as u32 % 2));
            let high = S::and(S::shr16(S::load(p.add((16 + 4 * g) * S::LANES)), k as u32), one);
            let low = S::load(p.add((48 + 32 * (k / 2) + 4 * g) * S::LANES));
            S::or(S::and(S::shr16(low, shift), mask), S::shl16(high, 4))
        }
    }
}

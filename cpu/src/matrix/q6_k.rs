//! Q6_K: blocks of 256 with an 8-bit scale for every 16 columns, codes less 32. Packed: d `[R]` f16; scales `[16, R]`
//! i8; qh `[2, 8, R, 4]`, two bits for each 32 columns of a half; ql `[2, 2, 8, R, 4]`, columns `128 h + 32 s ..` in
//! the low nibbles of `[h, s]`, columns `128 h + 64 + 32 s ..` in the high ones.

use super::kernel::{Scales, SuperQuant};
use super::simd::Simd;

pub(super) struct Q6K;

impl SuperQuant for Q6K {
    const BLOCK_BYTES: usize = 210;
    const BITS: u32 = 6;
    const HALVES: bool = true;
    const ZERO: Option<u8> = Some(32);

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8) -> Scales<S> {
        // SAFETY: as the trait asks; the arrays hold four vectors of `4 * LANES` bytes.
        unsafe {
            let d = S::load_f16(p);
            let mut s = Scales::<S>::new(d, S::zero());
            for i in 0..4 {
                let v = S::load(p.add((2 + 4 * i) * S::LANES));
                S::store(s.scales.as_mut_ptr().cast::<u8>().add(4 * i * S::LANES), v);
            }
            s
        }
    }

    #[inline(always)]
    unsafe fn code<S: Simd>(p: *const u8, k: usize, g: usize) -> S::V {
        let (half, s) = (k / 4, k % 4);
        // SAFETY: as the trait asks.
        unsafe {
            let (low4, low2) = (S::splat_u8(15), S::splat_u8(3));
            let (ql, qh) = (82 + 64 * half + 32 * (s % 2), 18 + 32 * half);
            let low = S::shr16(S::load(p.add((ql + 4 * g) * S::LANES)), 4 * (s as u32 / 2));
            let high = S::shr16(S::load(p.add((qh + 4 * g) * S::LANES)), 2 * s as u32);
            S::or(S::and(low, low4), S::shl16(S::and(high, low2), 4))
        }
    }
}

//! Q3_K: blocks of 256 with a 6-bit scale (less 32) for every 16 columns, codes less 4. Packed: d `[R]` f16; scales
//! `[12, R]` u8, six-bit numbers as in the file; hmask `[8, R, 4]`, bit k for columns `32 k ..`; qs `[2, 8, R, 4]`, two
//! bits for each 32 columns of a half.

use super::kernel::{Scales, SuperQuant};
use super::simd::Simd;

pub(super) struct Q3K;

impl SuperQuant for Q3K {
    const BLOCK_BYTES: usize = 110;
    const BITS: u32 = 3;
    const HALVES: bool = true;
    const ZERO: Option<u8> = Some(4);

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8) -> Scales<S> {
        // SAFETY: as the trait asks; the arrays hold four vectors of `4 * LANES` bytes.
        unsafe {
            let d = S::load_f16(p);
            let mut s = Scales::<S>::new(d, S::zero());
            let low = [S::load(p.add(2 * S::LANES)), S::load(p.add(6 * S::LANES))];
            let high = S::load(p.add(10 * S::LANES));
            let (low4, low2, bias) = (S::splat_u8(15), S::splat_u8(3), S::splat_u8(32));
            for i in 0..4 {
                let low = S::and(S::shr16(low[i % 2], 4 * (i as u32 / 2)), low4);
                let high = S::shl16(S::and(S::shr16(high, 2 * i as u32), low2), 4);
                let scales = S::sub_u8(S::or(low, high), bias);
                S::store(s.scales.as_mut_ptr().cast::<u8>().add(4 * i * S::LANES), scales);
            }
            s
        }
    }

    #[inline(always)]
    unsafe fn code<S: Simd>(p: *const u8, k: usize, g: usize) -> S::V {
        let (half, s) = (k / 4, k % 4);
        // SAFETY: as the trait asks.
        unsafe {
            let (low2, one) = (S::splat_u8(3), S::splat_u8(1));
            let low = S::and(S::shr16(S::load(p.add((46 + 32 * half + 4 * g) * S::LANES)), 2 * s as u32), low2);
            let high = S::and(S::shr16(S::load(p.add((14 + 4 * g) * S::LANES)), k as u32), one);
            S::or(low, S::shl16(high, 2))
        }
    }
}

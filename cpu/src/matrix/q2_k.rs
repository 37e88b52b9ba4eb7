//! Q2_K: blocks of 256 with a 4-bit scale and a 4-bit minimum for every 16 columns. Packed: d `[R]` f16; dmin `[R]`
//! f16; scales `[16, R]` u8, scale in the low nibble, minimum in the high one; qs `[2, 8, R, 4]`, two bits for each 32
//! columns of a half.

use super::kernel::{Scales, SuperQuant};
use super::simd::Simd;

pub(super) struct Q2K;

impl SuperQuant for Q2K {
    const BLOCK_BYTES: usize = 84;
    const BITS: u32 = 2;
    const HALVES: bool = true;

    #[inline(always)]
    unsafe fn scales<S: Simd>(p: *const u8) -> Scales<S> {
        // SAFETY: as the trait asks; the arrays hold four vectors of `4 * LANES` bytes.
        unsafe {
            let mut s = Scales::<S>::new(S::load_f16(p), S::mul(S::load_f16(p.add(2 * S::LANES)), S::splat(-1.0)));
            let low4 = S::splat_u8(15);
            for i in 0..4 {
                let v = S::load(p.add((4 + 4 * i) * S::LANES));
                S::store(s.scales.as_mut_ptr().cast::<u8>().add(4 * i * S::LANES), S::and(v, low4));
                S::store(s.mins.as_mut_ptr().cast::<u8>().add(4 * i * S::LANES), S::and(S::shr16(v, 4), low4));
            }
            s
        }
    }

    #[inline(always)]
    unsafe fn code<S: Simd>(p: *const u8, k: usize, g: usize) -> S::V {
        let (half, s) = (k / 4, k % 4);
        // SAFETY: as the trait asks.
        unsafe {
            let low2 = S::splat_u8(3);
            S::and(S::shr16(S::load(p.add((20 + 32 * half + 4 * g) * S::LANES)), 2 * s as u32), low2)
        }
    }
}

//! Q8_0: blocks of 32. Packed: d `[R]` f16; codes `[8, R, 4]` i8.

use super::kernel::{Decoded, Quant, Signed, load_and_prefetch};
use super::simd::Simd;

pub(super) struct Q8_0;

impl Quant for Q8_0 {
    const BLOCK_BYTES: usize = 34;
    const TILES: usize = 1;
    type Tile<S: Simd> = Signed<S>;

    #[inline(always)]
    unsafe fn tile<S: Simd>(p: *const u8, _: usize) -> Decoded<S> {
        // SAFETY: as the trait asks.
        unsafe {
            let mut w = [S::splat_u8(0); 8];
            for g in 0..8 {
                w[g] = load_and_prefetch::<S>(p.add(2 * S::LANES), g);
            }
            Decoded::without_offset(w, S::load_f16(p))
        }
    }
}

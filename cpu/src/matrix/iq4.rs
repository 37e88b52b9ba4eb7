//! IQ4_NL, IQ4_XS and MXFP4: four-bit indices into a table. Packed: IQ4_NL d `[R]` f16, qs `[4, R, 4]`; IQ4_XS (blocks
//! of 256 in 8 tiles) d `[R]` f16, scales_h `[R]` u16, scales_l `[4, R]` u8, qs `[8, 4, R, 4]`; MXFP4 e `[R]` u8, qs
//! `[4, R, 4]`. Nibbles as in Q4_0.

use super::kernel::{Decoded, Quant, Signed, Unsigned};
use super::q4_0::nibbles;
use super::simd::Simd;

const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Twice the E2M1 values, plus 12: unsigned codes.
const MXFP4_VALUES_PLUS_12: [i8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

#[inline(always)]
unsafe fn lookup<S: Simd>(table: &[i8; 16], qs: *const u8) -> [S::V; 8] {
    // SAFETY: the caller has the instruction set and `16 * LANES` bytes.
    unsafe {
        let mut w = nibbles::<S>(qs);
        for g in 0..8 {
            w[g] = S::lookup(table, w[g]);
        }
        w
    }
}

pub(super) struct Iq4Nl;
pub(super) struct Iq4Xs;
pub(super) struct Mxfp4;

impl Quant for Iq4Nl {
    const BLOCK_BYTES: usize = 18;
    const TILES: usize = 1;
    type Tile<S: Simd> = Signed<S>;

    #[inline(always)]
    unsafe fn tile<S: Simd>(p: *const u8, _: usize) -> Decoded<S> {
        // SAFETY: as the trait asks.
        unsafe { Decoded::without_offset(lookup::<S>(&IQ4_VALUES, p.add(2 * S::LANES)), S::load_f16(p)) }
    }
}

impl Quant for Iq4Xs {
    const BLOCK_BYTES: usize = 136;
    const TILES: usize = 8;
    type Tile<S: Simd> = Signed<S>;

    #[inline(always)]
    unsafe fn tile<S: Simd>(p: *const u8, k: usize) -> Decoded<S> {
        // SAFETY: as the trait asks.
        unsafe {
            if k == 0 {
                // The rest of the scales.
                S::prefetch_behind(p.add(4 * S::LANES));
            }
            let low = S::shr16(S::load_u8(p.add((4 + k / 2) * S::LANES)), 4 * (k as u32 % 2));
            let high = S::and(S::shr16(S::load_u16(p.add(2 * S::LANES)), 2 * k as u32), S::splat_i32(3));
            let scale = S::or(S::and(low, S::splat_i32(15)), S::shl16(high, 4));
            let scale = S::to_f32(S::sub_i32(scale, S::splat_i32(32)));
            let w = lookup::<S>(&IQ4_VALUES, p.add((8 + 16 * k) * S::LANES));
            Decoded::without_offset(w, S::mul(S::load_f16(p), scale))
        }
    }
}

impl Quant for Mxfp4 {
    const BLOCK_BYTES: usize = 17;
    const TILES: usize = 1;
    type Tile<S: Simd> = Unsigned<S, 5, 12>;

    #[inline(always)]
    unsafe fn tile<S: Simd>(p: *const u8, _: usize) -> Decoded<S> {
        // SAFETY: as the trait asks.
        unsafe {
            let w = lookup::<S>(&MXFP4_VALUES_PLUS_12, p.add(S::LANES));
            Decoded::without_offset(w, S::exp2_minus_128(S::load_u8(p)))
        }
    }
}

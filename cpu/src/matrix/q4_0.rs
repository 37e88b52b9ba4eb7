//! Q4_0, Q4_1, Q5_0 and Q5_1: blocks of 32. Packed: d `[R]` f16; m `[R]` f16 (Q4_1, Q5_1); qh `[R]` u32 (Q5_0, Q5_1),
//! bit i the fifth bit of column i; qs `[4, R, 4]`, column `4 i + j` in the low nibble of `[i, _, j]`, column
//! `16 + 4 i + j` in the high one.

use super::kernel::{Decoded, Quant, Unsigned, load_and_prefetch};
use super::simd::Simd;

/// The 32 four-bit codes at `qs` `[4, R, 4]`.
#[inline(always)]
pub(super) unsafe fn nibbles<S: Simd>(qs: *const u8) -> [S::V; 8] {
    // SAFETY: the caller has the instruction set and `16 * R` bytes.
    unsafe {
        let mask = S::splat_u8(15);
        let mut w = [mask; 8];
        for i in 0..4 {
            let v = load_and_prefetch::<S>(qs, i);
            w[i] = S::and(v, mask);
            w[i + 4] = S::and(S::shr16(v, 4), mask);
        }
        w
    }
}

/// The 32 five-bit codes of fifth bits at `qh` `[R]` u32 and the rest at `qs` `[4, R, 4]`.
#[inline(always)]
unsafe fn nibbles_and_fifth<S: Simd>(qh: *const u8, qs: *const u8) -> [S::V; 8] {
    // SAFETY: the caller has the instruction set and the bytes.
    unsafe {
        let (mut w, bits) = (nibbles::<S>(qs), load_and_prefetch::<S>(qh, 0));
        for g in 0..8 {
            w[g] = S::or(w[g], S::fifth_bits(bits, g));
        }
        w
    }
}

pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q5_0;
pub(super) struct Q5_1;

impl Quant for Q4_0 {
    const BLOCK_BYTES: usize = 18;
    const TILES: usize = 1;
    type Tile<S: Simd> = Unsigned<S, 4, 8>;

    #[inline(always)]
    unsafe fn tile<S: Simd>(p: *const u8, _: usize) -> Decoded<S> {
        // SAFETY: as the trait asks.
        unsafe { Decoded::without_offset(nibbles::<S>(p.add(2 * S::LANES)), S::load_f16(p)) }
    }
}

impl Quant for Q4_1 {
    const BLOCK_BYTES: usize = 20;
    const TILES: usize = 1;
    type Tile<S: Simd> = Unsigned<S, 4, 0>;

    #[inline(always)]
    unsafe fn tile<S: Simd>(p: *const u8, _: usize) -> Decoded<S> {
        // SAFETY: as the trait asks.
        unsafe {
            Decoded {
                w: nibbles::<S>(p.add(4 * S::LANES)),
                scale: S::load_f16(p),
                offset: S::load_f16(p.add(2 * S::LANES)),
            }
        }
    }
}

impl Quant for Q5_0 {
    const BLOCK_BYTES: usize = 22;
    const TILES: usize = 1;
    type Tile<S: Simd> = Unsigned<S, 5, 0>;

    #[inline(always)]
    unsafe fn tile<S: Simd>(p: *const u8, _: usize) -> Decoded<S> {
        // SAFETY: as the trait asks.
        unsafe {
            let scale = S::load_f16(p);
            Decoded {
                w: nibbles_and_fifth::<S>(p.add(2 * S::LANES), p.add(6 * S::LANES)),
                scale,
                offset: S::mul(scale, S::splat(-16.0)),
            }
        }
    }
}

impl Quant for Q5_1 {
    const BLOCK_BYTES: usize = 24;
    const TILES: usize = 1;
    type Tile<S: Simd> = Unsigned<S, 5, 0>;

    #[inline(always)]
    unsafe fn tile<S: Simd>(p: *const u8, _: usize) -> Decoded<S> {
        // SAFETY: as the trait asks.
        unsafe {
            Decoded {
                w: nibbles_and_fifth::<S>(p.add(4 * S::LANES), p.add(8 * S::LANES)),
                scale: S::load_f16(p),
                offset: S::load_f16(p.add(2 * S::LANES)),
            }
        }
    }
}

//! AVX2, FMA and F16C: eight rows. `vpmaddubsw` adds two products of an unsigned code and a signed activation into 16 bits
//! and saturates, so sums are widened before they can reach 2^15: with codes of 4 bits after 8 products pairs
//! (8 * 2 * 15 * 127 = 30480), with 5 bits after 4, with 6 bits after 2, with 8 bits (128 * 127 * 2 = 32512) at once.

use super::Simd;
use crate::activations::Block;
use std::arch::x86_64::*;

/// Eight rows in 256-bit registers.
#[derive(Clone, Copy)]
pub(in crate::matrix) struct Avx2;

/// Activation codes `4 g .. 4 g + 4` for every row.
#[inline(always)]
unsafe fn codes(x: *const Block, g: usize) -> __m256i {
    // SAFETY: the caller has AVX2 and a valid block; `g` is below 8.
    unsafe { _mm256_set1_epi32((&raw const (*x).codes).cast::<i32>().add(g).read_unaligned()) }
}

/// 16-bit sums of products of `n` groups of four columns from group `g`, few enough not to saturate.
#[inline(always)]
unsafe fn dot16(w: &[__m256i; 8], x: *const Block, g: usize, n: usize) -> __m256i {
    // SAFETY: the caller has AVX2 and a valid block; `g + n` is at most 8.
    unsafe {
        let mut sum = _mm256_maddubs_epi16(w[g], codes(x, g));
        for g in g + 1..g + n {
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[g], codes(x, g)));
        }
        sum
    }
}

/// Groups of four columns whose products of `BITS`-bit codes fit 16 bits.
const fn groups(bits: u32) -> usize {
    match bits {
        0..=4 => 8,
        5 => 4,
        6 => 2,
        _ => panic!("unsigned codes have at most 6 bits"),
    }
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    type V = __m256i;
    type F = __m256;
    /// Each scale twice in the two 16-bit units of its lane.
    type Halves = [__m256i; 2];

    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m256i {
        // SAFETY: as the trait asks.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut u8, v: __m256i) {
        // SAFETY: as the trait asks.
        unsafe { _mm256_storeu_si256(p.cast(), v) }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> __m256i {
        // SAFETY: as the trait asks.
        unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_u16(p: *const u8) -> __m256i {
        // SAFETY: as the trait asks.
        unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn splat_u8(x: u8) -> __m256i {
        // SAFETY: as the trait asks.
        unsafe { _mm256_set1_epi8(x as i8) }
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> __m256i {
        // SAFETY: as the trait asks.
        unsafe { _mm256_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn and(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: as the trait asks.
        unsafe { _mm256_and_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: as the trait asks.
        unsafe { _mm256_or_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn shr16(a: __m256i, n: u32) -> __m256i {
        // SAFETY: as the trait asks.
        unsafe { _mm256_srl_epi16(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn shl16(a: __m256i, n: u32) -> __m256i {
        // SAFETY: as the trait asks.
        unsafe { _mm256_sll_epi16(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn sub_u8(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: as the trait asks.
        unsafe { _mm256_sub_epi8(a, b) }
    }
    #[inline(always)]
    unsafe fn sub_i32(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: as the trait asks.
        unsafe { _mm256_sub_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[i8; 16], index: __m256i) -> __m256i {
        // SAFETY: as the trait asks.
        unsafe { _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())), index) }
    }
    #[inline(always)]
    unsafe fn fifth_bits(bits: __m256i, group: usize) -> __m256i {
        // SAFETY: as the trait asks.
        unsafe {
            // Byte `group / 2` of each lane, four times; then one bit of it in each byte.
            let lanes = _mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0x0404_0404, 0x0808_0808, 0x0c0c_0c0c));
            let spread = _mm256_shuffle_epi8(bits, _mm256_add_epi8(lanes, _mm256_set1_epi8((group / 2) as i8)));
            let select = _mm256_set1_epi32(if group % 2 == 0 { 0x0804_0201 } else { 0x8040_2010u32 as i32 });
            _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, select), select), _mm256_set1_epi8(16))
        }
    }
    #[inline(always)]
    unsafe fn to_f32(v: __m256i) -> __m256 {
        // SAFETY: as the trait asks.
        unsafe { _mm256_cvtepi32_ps(v) }
    }
    #[inline(always)]
    unsafe fn exp2_minus_128(v: __m256i) -> __m256 {
        // SAFETY: as the trait asks.
        unsafe {
            // The exponent field is `v - 1`; 2^-128 and 2^-127 are subnormal.
            let normal = _mm256_slli_epi32(_mm256_sub_epi32(v, _mm256_set1_epi32(1)), 23);
            let subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(1 << 21), v);
            let is_normal = _mm256_cmpgt_epi32(v, _mm256_set1_epi32(1));
            _mm256_castsi256_ps(_mm256_blendv_epi8(subnormal, normal, is_normal))
        }
    }
    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: as the trait asks.
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        // SAFETY: as the trait asks.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_f32(p: *const u8) -> __m256 {
        // SAFETY: as the trait asks.
        unsafe { _mm256_loadu_ps(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> __m256 {
        // SAFETY: as the trait asks.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> __m256 {
        // SAFETY: as the trait asks.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())), 16)) }
    }
    #[inline(always)]
    unsafe fn store_f32(p: *mut f32, v: __m256) {
        // SAFETY: as the trait asks.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as the trait asks.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as the trait asks.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: as the trait asks.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn halves(a: *const i8, b: *const i8) -> Self::Halves {
        // SAFETY: as the trait asks.
        unsafe {
            let twice = |p: *const i8| {
                let v = _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()));
                _mm256_blend_epi16(v, _mm256_slli_epi32(v, 16), 0xaa)
            };
            [twice(a), twice(b)]
        }
    }
    #[inline(always)]
    unsafe fn dot<const BITS: u32>(w: &[__m256i; 8], x: *const Block) -> __m256 {
        // SAFETY: as the trait asks.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let n = const { groups(BITS) };
            let mut sum = _mm256_madd_epi16(dot16(w, x, 0, n), ones);
            for g in (n..8).step_by(n) {
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(dot16(w, x, g, n), ones));
            }
            _mm256_cvtepi32_ps(sum)
        }
    }
    #[inline(always)]
    unsafe fn dot_signed(w: &[__m256i; 8], x: *const Block) -> __m256 {
        // SAFETY: as the trait asks.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let mut sum = _mm256_setzero_si256();
            for g in 0..8 {
                // |w| * (sign(w) x): `vpmaddubsw` wants one unsigned factor.
                let products = _mm256_maddubs_epi16(_mm256_abs_epi8(w[g]), _mm256_sign_epi8(codes(x, g), w[g]));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(products, ones));
            }
            _mm256_cvtepi32_ps(sum)
        }
    }
    #[inline(always)]
    unsafe fn dot_halves<const BITS: u32, const OFFSET: i32>(
        w: &[__m256i; 8],
        scales: Self::Halves,
        x: *const Block,
    ) -> __m256 {
        // SAFETY: as the trait asks.
        unsafe {
            let n = const { if groups(BITS) < 4 { groups(BITS) } else { 4 } };
            let mut sum = if OFFSET == 0 {
                _mm256_setzero_si256()
            } else {
                // An 8-bit scale times at most 32 fits 16 bits.
                let offsets = _mm256_mullo_epi16(
                    _mm256_blend_epi16(scales[0], scales[1], 0xaa),
                    _mm256_set1_epi16(-OFFSET as i16),
                );
                _mm256_madd_epi16(offsets, half_sums(x))
            };
            for half in 0..2 {
                for g in (4 * half..4 * half + 4).step_by(n) {
                    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(dot16(w, x, g, n), scales[half]));
                }
            }
            _mm256_cvtepi32_ps(sum)
        }
    }
    #[inline(always)]
    unsafe fn dot_half_sums(scales: Self::Halves, x: *const Block) -> __m256 {
        // SAFETY: as the trait asks.
        unsafe {
            let scales = _mm256_blend_epi16(scales[0], scales[1], 0xaa);
            _mm256_cvtepi32_ps(_mm256_madd_epi16(scales, half_sums(x)))
        }
    }
}

/// Both half sums of a block for every row.
#[inline(always)]
unsafe fn half_sums(x: *const Block) -> __m256i {
    // SAFETY: the caller has AVX2 and a valid block.
    unsafe { _mm256_set1_epi32((&raw const (*x).half_sums).cast::<i32>().read_unaligned()) }
}

//! AVX2, FMA and F16C: eight rows. `vpmaddubsw` adds two products of an unsigned code and a signed activation into
//! 16 bits and saturates, so sums are widened before they can reach 2^15: with codes of 4 bits after 8 instructions
//! (8 * 2 * 15 * 127 = 30480), with 5 bits after 4, with 6 bits after 2, with 8 bits (2 * 128 * 127 = 32512) at once.
//! AVX-VNNI, where the processor has it, does away with that.

use super::Simd;
use std::arch::x86_64::*;

/// Bytes behind a line at which another is asked for.
const BEHIND: usize = 3072;

/// Eight rows in 256-bit registers. With `VNNI`, `vpdpbusd` and `vpdpwssd` of AVX-VNNI do the products: they add four
/// (two) of them to 32 bits without saturation.
#[derive(Clone, Copy)]
pub(in crate::matrix) struct Avx2<const VNNI: bool>;

/// Signed codes. With VNNI: codes plus 128 as magnitudes, and nothing else. Without: magnitudes and signs; with `s` the
/// sign of a code (0 or -1), `w x = |w| (x ^ s) - s |w|`: `vpxor` runs in every vector unit, where `vpsignb` would
/// compete with the multiplications.
#[derive(Clone, Copy)]
pub(in crate::matrix) struct Signed {
    magnitudes: [__m256i; 8],
    signs: [__m256i; 8],
    /// `-sum_i s[i] |w[i]|`
    correction: __m256i,
}

/// Activation codes `4 g .. 4 g + 4` for every row.
#[inline(always)]
unsafe fn codes(x: *const i8, g: usize) -> __m256i {
    // SAFETY: the caller has AVX2 and 32 codes; `g` is below 8.
    unsafe { _mm256_set1_epi32(x.cast::<i32>().add(g).read_unaligned()) }
}

/// 16-bit sums of products of `n` groups of four columns from group `g`, few enough not to saturate.
#[inline(always)]
unsafe fn dot16(w: &[__m256i], x: *const i8, g: usize, n: usize) -> __m256i {
    // SAFETY: the caller has AVX2 and 32 codes; `g + n` is at most 8.
    unsafe {
        let mut sum = _mm256_maddubs_epi16(w[g], codes(x, g));
        for g in g + 1..g + n {
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[g], codes(x, g)));
        }
        sum
    }
}

/// 32-bit sums of products of groups `range` of four columns, added to `sum`.
#[inline(always)]
unsafe fn dot_vnni(w: &[__m256i], x: *const i8, range: std::ops::Range<usize>, mut sum: __m256i) -> __m256i {
    // SAFETY: the caller has AVX-VNNI and 32 codes.
    unsafe {
        for g in range {
            sum = _mm256_dpbusd_avx_epi32(sum, w[g], codes(x, g));
        }
        sum
    }
}

/// `sum + scale * products` of groups `range` of four columns.
#[inline(always)]
unsafe fn dot32<const VNNI: bool>(
    bits: u32,
    w: &[__m256i],
    scale: __m256i,
    x: *const i8,
    range: std::ops::Range<usize>,
    mut sum: __m256i,
) -> __m256i {
    // SAFETY: the caller has AVX2, with VNNI if it says so, and 32 codes.
    unsafe {
        if VNNI {
            let products = dot_vnni(w, x, range, _mm256_setzero_si256());
            return _mm256_add_epi32(sum, _mm256_mullo_epi32(products, scale));
        }
        let n = groups(bits).min(range.len());
        for g in range.step_by(n) {
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(dot16(w, x, g, n), scale));
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

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    const LANES: usize = 8;
    type V = __m256i;
    type F = __m256;
    type Signed = Signed;
    /// With VNNI in 32 bits, without in both 16-bit units of its lane.
    type Scale = __m256i;
    /// 32-bit integers.
    type Sum = __m256i;

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
            let select = _mm256_set1_epi32(if group.is_multiple_of(2) { 0x0804_0201 } else { 0x8040_2010u32 as i32 });
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
    unsafe fn dot<const T: usize>(
        bits: u32,
        zero: u8,
        w: &[__m256i; 8],
        x: [*const i8; T],
        x_sums: [i32; T],
    ) -> [__m256; T] {
        // SAFETY: as the trait asks.
        unsafe {
            let mut dots = [_mm256_setzero_ps(); T];
            for t in 0..T {
                let first = _mm256_set1_epi32(-i32::from(zero) * x_sums[t]);
                dots[t] = _mm256_cvtepi32_ps(match VNNI {
                    true => dot_vnni(w, x[t], 0..8, first),
                    false => dot32::<false>(bits, w, _mm256_set1_epi16(1), x[t], 0..8, first),
                });
            }
            dots
        }
    }
    #[inline(always)]
    unsafe fn signed(w: &[__m256i; 8]) -> Signed {
        // SAFETY: as the trait asks.
        unsafe {
            let zero = _mm256_setzero_si256();
            let mut signed = Signed { magnitudes: [zero; 8], signs: [zero; 8], correction: zero };
            if VNNI {
                // Not `map`, whose closure is compiled without the instruction set.
                for g in 0..8 {
                    signed.magnitudes[g] = _mm256_xor_si256(w[g], _mm256_set1_epi8(-128));
                }
                return signed;
            }
            for g in 0..8 {
                signed.magnitudes[g] = _mm256_abs_epi8(w[g]);
                signed.signs[g] = _mm256_cmpgt_epi8(zero, w[g]);
                let negative = _mm256_and_si256(signed.magnitudes[g], signed.signs[g]);
                let pairs = _mm256_maddubs_epi16(negative, _mm256_set1_epi8(1));
                signed.correction = _mm256_add_epi16(signed.correction, pairs);
            }
            signed.correction = _mm256_madd_epi16(signed.correction, _mm256_set1_epi16(1));
            signed
        }
    }
    #[inline(always)]
    unsafe fn dot_signed<const T: usize>(w: &Signed, x: [*const i8; T], x_sums: [i32; T]) -> [__m256; T] {
        // SAFETY: as the trait asks.
        unsafe {
            let mut sums = [w.correction; T];
            if VNNI {
                for t in 0..T {
                    sums[t] = dot_vnni(&w.magnitudes, x[t], 0..8, _mm256_set1_epi32(-128 * x_sums[t]));
                }
            } else {
                // Rows of activations take turns: magnitudes and signs do not all fit the registers.
                for g in 0..8 {
                    let (magnitudes, signs) = (w.magnitudes[g], w.signs[g]);
                    for t in 0..T {
                        let x = _mm256_xor_si256(codes(x[t], g), signs);
                        let products = _mm256_maddubs_epi16(magnitudes, x);
                        sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
                    }
                }
            }
            let mut dots = [_mm256_setzero_ps(); T];
            for t in 0..T {
                dots[t] = _mm256_cvtepi32_ps(sums[t]);
            }
            dots
        }
    }
    #[inline(always)]
    unsafe fn scale(p: *const i8) -> __m256i {
        // SAFETY: as the trait asks.
        unsafe {
            let v = _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()));
            if VNNI {
                return v;
            }
            _mm256_blend_epi16(v, _mm256_slli_epi32(v, 16), 0xaa)
        }
    }
    #[inline(always)]
    unsafe fn no_sum() -> __m256i {
        // SAFETY: as the trait asks.
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    unsafe fn sum_to_f32(sum: __m256i) -> __m256 {
        // SAFETY: as the trait asks.
        unsafe { _mm256_cvtepi32_ps(sum) }
    }
    #[inline(always)]
    unsafe fn dot_scaled<const T: usize>(
        bits: u32,
        w: &[__m256i; 8],
        scale: __m256i,
        x: [*const i8; T],
        sums: &mut [__m256i; T],
    ) {
        for t in 0..T {
            // SAFETY: as the trait asks.
            unsafe { sums[t] = dot32::<VNNI>(bits, w, scale, x[t], 0..8, sums[t]) };
        }
    }
    #[inline(always)]
    unsafe fn dot_scaled_half<const T: usize>(
        bits: u32,
        w: &[__m256i; 4],
        scale: __m256i,
        x: [*const i8; T],
        sums: &mut [__m256i; T],
    ) {
        for t in 0..T {
            // SAFETY: as the trait asks.
            unsafe { sums[t] = dot32::<VNNI>(bits, w, scale, x[t], 0..4, sums[t]) };
        }
    }
    /// Row by row: half by half, Q6_K times 512 rows had 85 to 92 GMAC/s instead of 92 to 98 on one core.
    #[inline(always)]
    unsafe fn dot_scaled_halves<const T: usize>(
        bits: u32,
        w: &[__m256i; 8],
        scales: [__m256i; 2],
        x: [*const i8; T],
        sums: &mut [__m256i; T],
    ) {
        for t in 0..T {
            // SAFETY: as the trait asks.
            unsafe {
                let sum = dot32::<VNNI>(bits, w, scales[0], x[t], 0..4, sums[t]);
                sums[t] = dot32::<VNNI>(bits, w, scales[1], x[t], 4..8, sum);
            }
        }
    }
    #[inline(always)]
    unsafe fn pairs(p: *const i8) -> __m256i {
        // SAFETY: as the trait asks.
        unsafe {
            let (a, b) = (_mm_loadl_epi64(p.cast()), _mm_loadl_epi64(p.add(8).cast()));
            _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b))
        }
    }
    #[inline(always)]
    unsafe fn dot_pairs(pairs: &[__m256i], x: *const i16) -> __m256 {
        // SAFETY: as the trait asks.
        unsafe {
            let mut sum = _mm256_setzero_si256();
            for i in 0..pairs.len() {
                let x = _mm256_set1_epi32(x.cast::<i32>().add(i).read_unaligned());
                sum = match VNNI {
                    true => _mm256_dpwssd_avx_epi32(sum, pairs[i], x),
                    false => _mm256_add_epi32(sum, _mm256_madd_epi16(pairs[i], x)),
                };
            }
            _mm256_cvtepi32_ps(sum)
        }
    }
    #[inline(always)]
    unsafe fn prefetch_behind(p: *const u8) {
        // Zen 3, which has no AVX-VNNI, reaches the memory roof by itself; asking as well cost 10 % there.
        if VNNI {
            // SAFETY: a prefetch of an invalid address does nothing.
            unsafe { _mm_prefetch(p.wrapping_add(BEHIND).cast(), _MM_HINT_T1) }
        }
    }
}

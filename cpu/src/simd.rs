//! f32 vectors: every float kernel is written once against [`Simd`] and instantiated for AVX-512, AVX2 and plain
//! arrays. Owns the vector operations, `exp` and the choice of the widest vector; knows no block.

use crate::Isa;

/// A vector of f32. The unsafe functions need pointers to `LANES` valid elements, of any alignment.
#[allow(clippy::missing_safety_doc)]
pub(crate) trait Simd: Copy {
    /// Elements.
    const LANES: usize;
    /// All elements `x`.
    fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    /// Loads bf16 elements.
    unsafe fn load_bf16(p: *const u16) -> Self;
    unsafe fn store(self, p: *mut f32);
    fn add(self, b: Self) -> Self;
    fn sub(self, b: Self) -> Self;
    fn mul(self, b: Self) -> Self;
    fn div(self, b: Self) -> Self;
    fn max(self, b: Self) -> Self;
    fn min(self, b: Self) -> Self;
    /// `self * b + c`.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// Sum of the elements.
    fn sum(self) -> f32;
    /// Largest element.
    #[inline(always)]
    fn largest(self) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; 16];
        assert!(Self::LANES <= lanes.len());
        // SAFETY: the array is long enough.
        unsafe { self.store(lanes.as_mut_ptr()) };
        for half in [8, 4, 2, 1] {
            let (low, high) = lanes.split_at_mut(half);
            low.iter_mut().zip(high).for_each(|(a, b)| *a = if *b > *a { *b } else { *a });
        }
        lanes[0]
    }
    /// Sums of four vectors.
    #[inline(always)]
    fn sums(x: [Self; 4]) -> [f32; 4] {
        x.map(Self::sum)
    }
    /// `2^n` for the integer `n` in the low mantissa bits of each element of `self`, which is `1.5 * 2^23 + n`.
    fn exp2_of_rounded(self) -> Self;
}

impl<const N: usize> Simd for [f32; N] {
    const LANES: usize = N;
    #[inline(always)]
    fn splat(x: f32) -> Self {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: as the trait says.
        unsafe { p.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: as the trait says.
        let bits = unsafe { p.cast::<[u16; N]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as the trait says.
        unsafe { p.cast::<Self>().write_unaligned(self) }
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        std::array::from_fn(|i| self[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        std::array::from_fn(|i| self[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        std::array::from_fn(|i| self[i] * b[i])
    }
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        std::array::from_fn(|i| self[i] / b[i])
    }
    #[inline(always)]
    fn max(self, b: Self) -> Self {
        std::array::from_fn(|i| if self[i] > b[i] { self[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, b: Self) -> Self {
        std::array::from_fn(|i| if self[i] < b[i] { self[i] } else { b[i] })
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        std::array::from_fn(|i| self[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        self.iter().sum()
    }
    #[inline(always)]
    fn exp2_of_rounded(self) -> Self {
        self.map(|x| f32::from_bits(x.to_bits().wrapping_add(127) << 23))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Simd;
    use std::arch::x86_64::*;

    /// Eight elements.
    #[derive(Clone, Copy)]
    pub struct F32x8(__m256);

    /// Sixteen elements.
    #[derive(Clone, Copy)]
    pub struct F32x16(__m512);

    // SAFETY (all unsafe blocks of this module): values of these types are made only inside functions that
    // `super::run` entered after it was told an instruction set that the processor has.
    /// Sums of four vectors, one a lane.
    #[allow(clippy::undocumented_unsafe_blocks)]
    #[inline(always)]
    unsafe fn sums(x: [__m256; 4]) -> [f32; 4] {
        unsafe {
            let x = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
            std::mem::transmute(_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x)))
        }
    }

    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Simd for F32x8 {
        const LANES: usize = 8;
        #[inline(always)]
        fn splat(x: f32) -> Self {
            unsafe { Self(_mm256_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            unsafe { Self(_mm256_loadu_ps(p)) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> Self {
            unsafe {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)))
            }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe { _mm256_storeu_ps(p, self.0) }
        }
        #[inline(always)]
        fn add(self, b: Self) -> Self {
            unsafe { Self(_mm256_add_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn sub(self, b: Self) -> Self {
            unsafe { Self(_mm256_sub_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn mul(self, b: Self) -> Self {
            unsafe { Self(_mm256_mul_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn div(self, b: Self) -> Self {
            unsafe { Self(_mm256_div_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn max(self, b: Self) -> Self {
            unsafe { Self(_mm256_max_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn min(self, b: Self) -> Self {
            unsafe { Self(_mm256_min_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn mul_add(self, b: Self, c: Self) -> Self {
            unsafe { Self(_mm256_fmadd_ps(self.0, b.0, c.0)) }
        }
        #[inline(always)]
        fn sum(self) -> f32 {
            unsafe {
                let x = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
                let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
                _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
            }
        }
        #[inline(always)]
        fn sums(x: [Self; 4]) -> [f32; 4] {
            unsafe { sums(x.map(|x| x.0)) }
        }
        #[inline(always)]
        fn exp2_of_rounded(self) -> Self {
            unsafe {
                let biased = _mm256_add_epi32(_mm256_castps_si256(self.0), _mm256_set1_epi32(127));
                Self(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased)))
            }
        }
    }

    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Simd for F32x16 {
        const LANES: usize = 16;
        #[inline(always)]
        fn splat(x: f32) -> Self {
            unsafe { Self(_mm512_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            unsafe { Self(_mm512_loadu_ps(p)) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> Self {
            unsafe {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
            }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe { _mm512_storeu_ps(p, self.0) }
        }
        #[inline(always)]
        fn add(self, b: Self) -> Self {
            unsafe { Self(_mm512_add_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn sub(self, b: Self) -> Self {
            unsafe { Self(_mm512_sub_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn mul(self, b: Self) -> Self {
            unsafe { Self(_mm512_mul_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn div(self, b: Self) -> Self {
            unsafe { Self(_mm512_div_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn max(self, b: Self) -> Self {
            unsafe { Self(_mm512_max_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn min(self, b: Self) -> Self {
            unsafe { Self(_mm512_min_ps(self.0, b.0)) }
        }
        #[inline(always)]
        fn mul_add(self, b: Self, c: Self) -> Self {
            unsafe { Self(_mm512_fmadd_ps(self.0, b.0, c.0)) }
        }
        #[inline(always)]
        fn sum(self) -> f32 {
            unsafe { _mm512_reduce_add_ps(self.0) }
        }
        #[inline(always)]
        fn sums(x: [Self; 4]) -> [f32; 4] {
            unsafe { sums(x.map(|x| _mm256_add_ps(_mm512_castps512_ps256(x.0), _mm512_extractf32x8_ps::<1>(x.0)))) }
        }
        #[inline(always)]
        fn exp2_of_rounded(self) -> Self {
            unsafe {
                let biased = _mm512_add_epi32(_mm512_castps_si512(self.0), _mm512_set1_epi32(127));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased)))
            }
        }
    }
}

/// A function over vectors of any width, with its arguments. `run` and what it calls are `#[inline(always)]`, so
/// that they are compiled for the instruction set of the caller.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;
    /// The function.
    fn run<V: Simd>(self) -> Self::Output;
}

/// Runs `kernel` with the widest vectors of `isa` that divide `width`, the length of its inner rows. A kernel
/// that handles tails itself passes 0.
#[inline]
pub(crate) fn run<K: Kernel>(isa: Isa, width: usize, kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
        fn avx512<K: Kernel>(kernel: K) -> K::Output {
            kernel.run::<x86::F32x16>()
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2<K: Kernel>(kernel: K) -> K::Output {
            kernel.run::<x86::F32x8>()
        }
        if isa.has_avx512() && width.is_multiple_of(16) {
            // SAFETY: `Backend::load` refuses an instruction set that the processor lacks.
            return unsafe { avx512(kernel) };
        }
        if isa != Isa::Portable && width.is_multiple_of(8) {
            // SAFETY: as above; AVX-512 implies AVX2 and FMA.
            return unsafe { avx2(kernel) };
        }
    }
    if width.is_multiple_of(8) { kernel.run::<[f32; 8]>() } else { kernel.run::<[f32; 1]>() }
}

/// `e^x` to about one unit in the last place; 0 below -87.3 and finite above 88.3, where it saturates.
#[inline(always)]
pub(crate) fn exp<V: Simd>(x: V) -> V {
    // 1.5 * 2^23: adding it rounds to an integer, which then lies in the low mantissa bits.
    let magic = V::splat(12_582_912.0);
    let x = x.max(V::splat(-87.33)).min(V::splat(88.3));
    let rounded = x.mul_add(V::splat(std::f32::consts::LOG2_E), magic);
    let n = rounded.sub(magic);
    // ln 2 in two parts: the first has few bits, so that its products with n are exact.
    let r = n.mul_add(V::splat(-0.693_359_4), x);
    let r = n.mul_add(V::splat(2.121_944_4e-4), r);
    // Minimax polynomial of degree 5 for (e^r - 1 - r) / r^2 on [-ln 2 / 2, ln 2 / 2] (Cephes expf).
    let mut p = V::splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = p.mul_add(r, V::splat(c));
    }
    let p = p.mul_add(r.mul(r), r).add(V::splat(1.0));
    p.mul(rounded.exp2_of_rounded())
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid<V: Simd>(x: V) -> V {
    let one = V::splat(1.0);
    one.div(one.add(exp(V::splat(0.0).sub(x))))
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn silu<V: Simd>(x: V) -> V {
    x.div(V::splat(1.0).add(exp(V::splat(0.0).sub(x))))
}

/// Calls `$body` with `$i` at every `LANES`-th index below `$n`, then one by one for the tail; `$V` names the vector.
macro_rules! for_lanes {
    ($V:ident, $n:expr, |$i:ident| $body:expr) => {{
        let (n, whole) = ($n, $n - $n % $V::LANES);
        for $i in (0..whole).step_by($V::LANES) {
            $body
        }
        {
            type $V = [f32; 1];
            for $i in whole..n {
                $body
            }
        }
    }};
}
pub(crate) use for_lanes;

/// `sum a[i] * b[i]`.
#[inline(always)]
pub(crate) fn dot<V: Simd>(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let (a_ptr, b_ptr) = (a.as_ptr(), b.as_ptr());
    let mut sums = [V::splat(0.0); 4];
    let step = 4 * V::LANES;
    let whole = a.len() - a.len() % step;
    for i in (0..whole).step_by(step) {
        for (k, sum) in sums.iter_mut().enumerate() {
            // SAFETY: `i + step <= len`, the length of both.
            *sum = unsafe { V::load(a_ptr.add(i + k * V::LANES)).mul_add(V::load(b_ptr.add(i + k * V::LANES)), *sum) };
        }
    }
    let tail: f32 = a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a * b).sum();
    sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum() + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exp<'a>(&'a mut [f32]);
    impl Kernel for Exp<'_> {
        type Output = ();
        #[inline(always)]
        fn run<V: Simd>(self) {
            let p = self.0.as_mut_ptr();
            // SAFETY: indices stay below the length.
            for_lanes!(V, self.0.len(), |i| unsafe { exp(V::load(p.add(i))).store(p.add(i)) });
        }
    }

    /// `exp` is right to 2e-7 relative over the range of normal results, for every vector width, tails included.
    #[test]
    fn exp_is_accurate() {
        for isa in Isa::ALL.into_iter().filter(|i| i.is_available()) {
            let x: Vec<f32> = (-87_000..88_000).map(|i| i as f32 / 1000.0 + 1e-4).chain([0.0, -0.0]).collect();
            let mut y = x.clone();
            run(isa, 0, Exp(&mut y));
            for (x, y) in x.iter().zip(&y) {
                let want = f64::from(*x).exp();
                assert!((f64::from(*y) / want - 1.0).abs() < 2e-7, "{isa:?}: exp({x}) = {y}, want {want}");
            }
            let mut y = vec![-1e30, f32::NEG_INFINITY, 1e30, -100.0];
            run(isa, 0, Exp(&mut y));
            assert!(y[0] < 2e-38 && y[1] < 2e-38 && y[3] < 2e-38 && y[2] > 1e38 && y[2].is_finite(), "{isa:?}: {y:?}");
        }
    }
}

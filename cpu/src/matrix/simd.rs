//! The vector operations that the kernels are written in, one implementation per instruction set. Types know their
//! layout, instruction sets know their registers, and the two meet only in this trait.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
pub(super) mod portable;

/// Most lanes of any instruction set.
pub(super) const MAX_LANES: usize = 16;

/// Vectors of `LANES` rows. A `V` holds four bytes of each row: four codes, or one 32-bit integer.
///
/// # Safety
/// Every method needs the instruction set that implements it; pointers must be valid for the bytes named. The
/// methods carry `inline(always)` and no feature attribute, so that they compile to single instructions inside the
/// kernels, which do carry it.
pub(super) trait Simd: Copy {
    /// Rows of a panel.
    const LANES: usize;
    /// `[LANES, 4]` bytes.
    type V: Copy;
    /// `[LANES]` f32.
    type F: Copy;
    /// Signed 8-bit codes `[8, LANES, 4]`, prepared for many products.
    type Signed: Copy;
    /// Integer scales `[LANES]`.
    type Scale: Copy;
    /// Sums of scaled integer products `[LANES]`.
    type Sum: Copy;

    /// Loads `4 * LANES` bytes.
    unsafe fn load(p: *const u8) -> Self::V;
    /// Stores `4 * LANES` bytes.
    unsafe fn store(p: *mut u8, v: Self::V);
    /// Loads `LANES` bytes, one into each 32-bit lane, zero-extended.
    unsafe fn load_u8(p: *const u8) -> Self::V;
    /// Loads `LANES` 16-bit integers, one into each 32-bit lane, zero-extended.
    unsafe fn load_u16(p: *const u8) -> Self::V;
    /// The same byte everywhere.
    unsafe fn splat_u8(x: u8) -> Self::V;
    /// The same 32-bit integer in each lane.
    unsafe fn splat_i32(x: i32) -> Self::V;
    unsafe fn and(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn or(a: Self::V, b: Self::V) -> Self::V;
    /// Shifts 16-bit units right by `n`; what crosses a byte is the caller's to mask.
    unsafe fn shr16(a: Self::V, n: u32) -> Self::V;
    /// Shifts 16-bit units left by `n`.
    unsafe fn shl16(a: Self::V, n: u32) -> Self::V;
    unsafe fn sub_u8(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub_i32(a: Self::V, b: Self::V) -> Self::V;
    /// Bytes of `table`, by the bytes of `index` (0 to 15).
    unsafe fn lookup(table: &[i8; 16], index: Self::V) -> Self::V;
    /// Bytes `0x10` where bit `4 * group + j` of a lane's 32 bits is set (j the byte in the lane), else 0.
    unsafe fn fifth_bits(bits: Self::V, group: usize) -> Self::V;
    /// 32-bit integers to f32.
    unsafe fn to_f32(v: Self::V) -> Self::F;
    /// `2^(v - 128)` of integers 0 to 255.
    unsafe fn exp2_minus_128(v: Self::V) -> Self::F;

    unsafe fn zero() -> Self::F;
    unsafe fn splat(x: f32) -> Self::F;
    /// Loads `LANES` f32.
    unsafe fn load_f32(p: *const u8) -> Self::F;
    /// Loads `LANES` halves.
    unsafe fn load_f16(p: *const u8) -> Self::F;
    /// Loads `LANES` bfloat16.
    unsafe fn load_bf16(p: *const u8) -> Self::F;
    /// Stores `LANES` f32.
    unsafe fn store_f32(p: *mut f32, v: Self::F);
    /// Stores `LANES` f32 at the beginning of a cache line: past the caches if they fill it, visible to others after a
    /// fence.
    #[inline(always)]
    unsafe fn store_past_caches(p: *mut f32, v: Self::F) {
        // SAFETY: as the trait asks.
        unsafe { Self::store_f32(p, v) }
    }
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;

    /// `sum_{i < 32} (w[i] - zero) * x[t][i]` of unsigned codes of at most `bits` <= 6 bits; `x_sums[t]` is `sum_i
    /// x[t][i]`.
    unsafe fn dot<const T: usize>(
        bits: u32,
        zero: u8,
        w: &[Self::V; 8],
        x: [*const i8; T],
        x_sums: [i32; T],
    ) -> [Self::F; T];
    /// Prepares signed codes.
    unsafe fn signed(w: &[Self::V; 8]) -> Self::Signed;
    /// `sum_{i < 32} w[i] * x[t][i]` of signed codes.
    unsafe fn dot_signed<const T: usize>(w: &Self::Signed, x: [*const i8; T], x_sums: [i32; T]) -> [Self::F; T];

    /// Loads scales `[LANES]` i8.
    unsafe fn scale(p: *const i8) -> Self::Scale;
    unsafe fn no_sum() -> Self::Sum;
    unsafe fn sum_to_f32(sum: Self::Sum) -> Self::F;
    /// Adds `scale * sum_{i < 32} w[i] * x[t][i]` of unsigned codes of at most `bits` <= 6 bits to `sums[t]`.
    unsafe fn dot_scaled<const T: usize>(
        bits: u32,
        w: &[Self::V; 8],
        scale: Self::Scale,
        x: [*const i8; T],
        sums: &mut [Self::Sum; T],
    );
    /// The same over 16 columns.
    unsafe fn dot_scaled_half<const T: usize>(
        bits: u32,
        w: &[Self::V; 4],
        scale: Self::Scale,
        x: [*const i8; T],
        sums: &mut [Self::Sum; T],
    );
    /// The same over 32 columns with a scale for each half of them.
    #[inline(always)]
    unsafe fn dot_scaled_halves<const T: usize>(
        bits: u32,
        w: &[Self::V; 8],
        scales: [Self::Scale; 2],
        x: [*const i8; T],
        sums: &mut [Self::Sum; T],
    ) {
        let [a, b, c, d, e, f, g, h] = *w;
        // SAFETY: as the caller promises for 32 columns.
        unsafe {
            Self::dot_scaled_half(bits, &[a, b, c, d], scales[0], x, sums);
            Self::dot_scaled_half(bits, &[e, f, g, h], scales[1], x.map(|x| x.add(16)), sums);
        }
    }
    /// 16-bit pairs `[LANES, 2]` of the i8 `[LANES]` at `p` and the next `LANES`.
    unsafe fn pairs(p: *const i8) -> Self::V;
    /// `sum_i pairs[i / 2][i % 2] * x[i]` over 16-bit numbers `[2 * pairs.len()]`.
    unsafe fn dot_pairs(pairs: &[Self::V], x: *const i16) -> Self::F;
    /// Asks for cache lines some way behind the one at `p`, which need not be valid.
    unsafe fn prefetch_behind(p: *const u8);
}

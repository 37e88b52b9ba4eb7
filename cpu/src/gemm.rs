//! Small f32 products of tiles that lie in the cache, written for the register file: queries times keys and
//! probabilities times values. The second factor may be bf16.

use crate::simd::Simd;

/// Elements of a factor: f32, or bf16 as its 16 bits.
pub(crate) trait Element: Copy {
    /// Loads `V::LANES` elements.
    ///
    /// # Safety
    /// They are valid.
    unsafe fn load<V: Simd>(p: *const Self) -> V;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<V: Simd>(p: *const f32) -> V {
        // SAFETY: as the caller promises.
        unsafe { V::load(p) }
    }
}

impl Element for u16 {
    #[inline(always)]
    unsafe fn load<V: Simd>(p: *const u16) -> V {
        // SAFETY: as the caller promises.
        unsafe { V::load_bf16(p) }
    }
}

/// `c[i][j] = sum_k a[i][k] * b[j][k]` for `a` `[m, k]`, `b` `[n, k]`; rows `lda`, `ldb`, `ldc` apart.
///
/// # Safety
/// The pointers hold these shapes, and `k` is a multiple of `V::LANES`.
#[inline(always)]
pub(crate) unsafe fn product_transposed<V: Simd, B: Element>(
    [m, n, k]: [usize; 3],
    (a, lda): (*const f32, usize),
    (b, ldb): (*const B, usize),
    (c, ldc): (*mut f32, usize),
) {
    /// Rows `0..4` (the last `4 - ROWS` are not there) times columns `0..COLS`.
    #[inline(always)]
    unsafe fn block<V: Simd, B: Element, const ROWS: usize, const COLS: usize>(
        k: usize,
        (a, lda): (*const f32, usize),
        (b, ldb): (*const B, usize),
        (c, ldc): (*mut f32, usize),
    ) {
        // SAFETY: the caller's shapes include ROWS rows and COLS columns here.
        unsafe {
            let mut sums = [[V::splat(0.0); 4]; COLS];
            for i in (0..k).step_by(V::LANES) {
                for col in 0..COLS {
                    let b = B::load::<V>(b.add(col * ldb + i));
                    for row in 0..ROWS {
                        sums[col][row] = V::load(a.add(row * lda + i)).mul_add(b, sums[col][row]);
                    }
                }
            }
            for col in 0..COLS {
                let sums = V::sums(sums[col]);
                for row in 0..ROWS {
                    *c.add(row * ldc + col) = sums[row];
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn rows<V: Simd, B: Element, const ROWS: usize>(
        n: usize,
        k: usize,
        a: (*const f32, usize),
        (b, ldb): (*const B, usize),
        (c, ldc): (*mut f32, usize),
    ) {
        let whole = n - n % 3;
        // SAFETY: columns stay below n.
        unsafe {
            for col in (0..whole).step_by(3) {
                block::<V, B, ROWS, 3>(k, a, (b.add(col * ldb), ldb), (c.add(col), ldc));
            }
            for col in whole..n {
                block::<V, B, ROWS, 1>(k, a, (b.add(col * ldb), ldb), (c.add(col), ldc));
            }
        }
    }
    for row in (0..m).step_by(4) {
        // SAFETY: rows stay below m.
        unsafe {
            let (a, c) = ((a.add(row * lda), lda), (c.add(row * ldc), ldc));
            match m - row {
                1 => rows::<V, B, 1>(n, k, a, (b, ldb), c),
                2 => rows::<V, B, 2>(n, k, a, (b, ldb), c),
                3 => rows::<V, B, 3>(n, k, a, (b, ldb), c),
                _ => rows::<V, B, 4>(n, k, a, (b, ldb), c),
            }
        }
    }
}

/// `c[i][j] += sum_k a[i][k] * b[k][j]` for `a` `[m, k]`, `b` `[k, n]`; rows `lda`, `ldb`, `ldc` apart.
///
/// # Safety
/// The pointers hold these shapes, and `n` is a multiple of `V::LANES`.
#[inline(always)]
pub(crate) unsafe fn add_product<V: Simd, B: Element>(
    [m, n, k]: [usize; 3],
    (a, lda): (*const f32, usize),
    (b, ldb): (*const B, usize),
    (c, ldc): (*mut f32, usize),
) {
    /// Rows `0..ROWS` times columns `0..COLS * LANES`.
    #[inline(always)]
    unsafe fn block<V: Simd, B: Element, const ROWS: usize, const COLS: usize>(
        k: usize,
        (a, lda): (*const f32, usize),
        (b, ldb): (*const B, usize),
        (c, ldc): (*mut f32, usize),
    ) {
        // SAFETY: the caller's shapes include ROWS rows and COLS vectors here.
        unsafe {
            let mut sums = [[V::splat(0.0); COLS]; ROWS];
            for row in 0..ROWS {
                for col in 0..COLS {
                    sums[row][col] = V::load(c.add(row * ldc + col * V::LANES));
                }
            }
            for i in 0..k {
                let mut values = [V::splat(0.0); COLS];
                for col in 0..COLS {
                    values[col] = B::load::<V>(b.add(i * ldb + col * V::LANES));
                }
                for row in 0..ROWS {
                    let a = V::splat(*a.add(row * lda + i));
                    for col in 0..COLS {
                        sums[row][col] = values[col].mul_add(a, sums[row][col]);
                    }
                }
            }
            for row in 0..ROWS {
                for col in 0..COLS {
                    sums[row][col].store(c.add(row * ldc + col * V::LANES));
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn rows<V: Simd, B: Element, const ROWS: usize>(
        n: usize,
        k: usize,
        a: (*const f32, usize),
        (b, ldb): (*const B, usize),
        (c, ldc): (*mut f32, usize),
    ) {
        let whole = n - n % (2 * V::LANES);
        // SAFETY: columns stay below n.
        unsafe {
            for col in (0..whole).step_by(2 * V::LANES) {
                block::<V, B, ROWS, 2>(k, a, (b.add(col), ldb), (c.add(col), ldc));
            }
            for col in (whole..n).step_by(V::LANES) {
                block::<V, B, ROWS, 1>(k, a, (b.add(col), ldb), (c.add(col), ldc));
            }
        }
    }
    for row in (0..m).step_by(4) {
        // SAFETY: rows stay below m.
        unsafe {
            let (a, c) = ((a.add(row * lda), lda), (c.add(row * ldc), ldc));
            match m - row {
                1 => rows::<V, B, 1>(n, k, a, (b, ldb), c),
                2 => rows::<V, B, 2>(n, k, a, (b, ldb), c),
                3 => rows::<V, B, 3>(n, k, a, (b, ldb), c),
                _ => rows::<V, B, 4>(n, k, a, (b, ldb), c),
            }
        }
    }
}

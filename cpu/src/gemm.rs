//! Small f32 products, written for the register file: queries times keys and probabilities times values. The second
//! factor may be bf16. Two are for tiles that lie in the cache, two read the second factor once, from front to back.

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
pub(crate) unsafe fn product_transposed<V: Simd>(
    [m, n, k]: [usize; 3],
    (a, lda): (*const f32, usize),
    (b, ldb): (*const f32, usize),
    (c, ldc): (*mut f32, usize),
) {
    /// Rows `0..4` (the last `4 - ROWS` are not there) times columns `0..COLS`.
    #[inline(always)]
    unsafe fn block<V: Simd, const ROWS: usize, const COLS: usize>(
        k: usize,
        (a, lda): (*const f32, usize),
        (b, ldb): (*const f32, usize),
        (c, ldc): (*mut f32, usize),
    ) {
        // SAFETY: the caller's shapes include ROWS rows and COLS columns here.
        unsafe {
            let mut sums = [[V::splat(0.0); 4]; COLS];
            for i in (0..k).step_by(V::LANES) {
                for col in 0..COLS {
                    let b = V::load(b.add(col * ldb + i));
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
    unsafe fn rows<V: Simd, const ROWS: usize>(
        n: usize,
        k: usize,
        a: (*const f32, usize),
        (b, ldb): (*const f32, usize),
        (c, ldc): (*mut f32, usize),
    ) {
        let whole = n - n % 3;
        // SAFETY: columns stay below n.
        unsafe {
            for col in (0..whole).step_by(3) {
                block::<V, ROWS, 3>(k, a, (b.add(col * ldb), ldb), (c.add(col), ldc));
            }
            for col in whole..n {
                block::<V, ROWS, 1>(k, a, (b.add(col * ldb), ldb), (c.add(col), ldc));
            }
        }
    }
    for row in (0..m).step_by(4) {
        // SAFETY: rows stay below m.
        unsafe {
            let (a, c) = ((a.add(row * lda), lda), (c.add(row * ldc), ldc));
            match m - row {
                1 => rows::<V, 1>(n, k, a, (b, ldb), c),
                2 => rows::<V, 2>(n, k, a, (b, ldb), c),
                3 => rows::<V, 3>(n, k, a, (b, ldb), c),
                _ => rows::<V, 4>(n, k, a, (b, ldb), c),
            }
        }
    }
}

/// `c[i][j] += sum_k a[i][k] * b[k][j]` for `a` `[m, k]`, `b` `[k, n]`; rows `lda`, `ldb`, `ldc` apart.
///
/// # Safety
/// The pointers hold these shapes, and `n` is a multiple of `V::LANES`.
#[inline(always)]
pub(crate) unsafe fn add_product<V: Simd>(
    [m, n, k]: [usize; 3],
    (a, lda): (*const f32, usize),
    (b, ldb): (*const f32, usize),
    (c, ldc): (*mut f32, usize),
) {
    /// Rows `0..ROWS` times columns `0..COLS * LANES`.
    #[inline(always)]
    unsafe fn block<V: Simd, const ROWS: usize, const COLS: usize>(
        k: usize,
        (a, lda): (*const f32, usize),
        (b, ldb): (*const f32, usize),
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
                    values[col] = V::load(b.add(i * ldb + col * V::LANES));
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
    unsafe fn rows<V: Simd, const ROWS: usize>(
        n: usize,
        k: usize,
        a: (*const f32, usize),
        (b, ldb): (*const f32, usize),
        (c, ldc): (*mut f32, usize),
    ) {
        let whole = n - n % (2 * V::LANES);
        // SAFETY: columns stay below n.
        unsafe {
            for col in (0..whole).step_by(2 * V::LANES) {
                block::<V, ROWS, 2>(k, a, (b.add(col), ldb), (c.add(col), ldc));
            }
            for col in (whole..n).step_by(V::LANES) {
                block::<V, ROWS, 1>(k, a, (b.add(col), ldb), (c.add(col), ldc));
            }
        }
    }
    for row in (0..m).step_by(4) {
        // SAFETY: rows stay below m.
        unsafe {
            let (a, c) = ((a.add(row * lda), lda), (c.add(row * ldc), ldc));
            match m - row {
                1 => rows::<V, 1>(n, k, a, (b, ldb), c),
                2 => rows::<V, 2>(n, k, a, (b, ldb), c),
                3 => rows::<V, 3>(n, k, a, (b, ldb), c),
                _ => rows::<V, 4>(n, k, a, (b, ldb), c),
            }
        }
    }
}

/// Asks for the cache line at `p`, which need not be valid.
#[inline(always)]
pub(crate) fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch of an invalid address does nothing.
        unsafe { _mm_prefetch(p.cast::<i8>(), _MM_HINT_T0) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Asks for a cache line some way behind element `i` of `p`, which neither need be valid, once for every 64 bytes.
/// Asked for one by one between loads: a token of two cores of a Sapphire Rapids behind 4096 others reads keys and
/// values at 25 GB/s so, at 16 with the lines of two rows at a time; distances from 6 to 20 and 2 to 4 KB are alike.
#[inline(always)]
pub(crate) fn prefetch_behind<V: Simd, T>(p: *const T, i: usize) {
    #[cfg(target_arch = "x86_64")]
    if (i * size_of::<T>()).is_multiple_of(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        let behind = |bytes: usize| p.wrapping_add(i).cast::<i8>().wrapping_add(bytes);
        // SAFETY: a prefetch of an invalid address does nothing.
        unsafe {
            if V::LANES == 16 {
                // Twice: into the second-level cache, later into the first.
                _mm_prefetch(behind(6656), _MM_HINT_T1);
                _mm_prefetch(behind(3072), _MM_HINT_T0);
            } else {
                _mm_prefetch(behind(8192), _MM_HINT_T0);
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (p, i);
}

/// `c[i][j] = sum_k a[i][k] * b[j][k]` for `a` `[m, k]`, `b` `[n, k]`, `c` with rows `ldc` apart; reads `b` in order.
/// Sums are made in the order of [`product_transposed`], so that a prompt gives the same in any chunks.
///
/// # Safety
/// The pointers hold these shapes, and `k` is a multiple of `V::LANES`.
#[inline(always)]
pub(crate) unsafe fn stream_product_transposed<V: Simd, B: Element>(
    [m, n, k]: [usize; 3],
    a: *const f32,
    b: *const B,
    (c, ldc): (*mut f32, usize),
) {
    /// `ROWS` rows times `COLS` columns; the first rows that walk these columns ask for what lies behind them.
    #[inline(always)]
    unsafe fn block<V: Simd, B: Element, const ROWS: usize, const COLS: usize>(
        k: usize,
        a: *const f32,
        b: *const B,
        (c, ldc): (*mut f32, usize),
        is_first: bool,
    ) {
        // SAFETY: the caller's shapes include ROWS rows and COLS columns here.
        unsafe {
            let mut sums = [[V::splat(0.0); 4]; COLS];
            for i in (0..k).step_by(V::LANES) {
                for col in 0..COLS {
                    if is_first {
                        prefetch_behind::<V, B>(b.wrapping_add(col * k), i);
                    }
                    let b = B::load::<V>(b.add(col * k + i));
                    for row in 0..ROWS {
                        sums[col][row] = V::load(a.add(row * k + i)).mul_add(b, sums[col][row]);
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
    unsafe fn columns<V: Simd, B: Element, const COLS: usize>(
        m: usize,
        k: usize,
        a: *const f32,
        b: *const B,
        (c, ldc): (*mut f32, usize),
    ) {
        for row in (0..m).step_by(4) {
            // SAFETY: rows stay below m.
            unsafe {
                let (a, c) = (a.add(row * k), (c.add(row * ldc), ldc));
                match m - row {
                    1 => block::<V, B, 1, COLS>(k, a, b, c, row == 0),
                    2 => block::<V, B, 2, COLS>(k, a, b, c, row == 0),
                    3 => block::<V, B, 3, COLS>(k, a, b, c, row == 0),
                    _ => block::<V, B, 4, COLS>(k, a, b, c, row == 0),
                }
            }
        }
    }
    let pairs = n - n % 2;
    // SAFETY: columns stay below n.
    unsafe {
        for col in (0..pairs).step_by(2) {
            columns::<V, B, 2>(m, k, a, b.add(col * k), (c.add(col), ldc));
        }
        if pairs < n {
            columns::<V, B, 1>(m, k, a, b.add(pairs * k), (c.add(pairs), ldc));
        }
    }
}

/// `c[i][j] += sum_k a[i][k] * b[k][j]` for `a` `[m, k]` with rows `lda` apart, `b` `[k, n]`, `c` `[m, n]`; reads `b`
/// in order.
///
/// # Safety
/// The pointers hold these shapes, and `n` is a multiple of `V::LANES`.
#[inline(always)]
pub(crate) unsafe fn stream_add_product<V: Simd, B: Element>(
    [m, n, k]: [usize; 3],
    (a, lda): (*const f32, usize),
    b: *const B,
    c: *mut f32,
) {
    /// `ROWS` rows times `DEPTH` rows of `b`; the first that walk these ask for what lies behind them.
    #[inline(always)]
    unsafe fn rows<V: Simd, B: Element, const ROWS: usize, const DEPTH: usize>(
        n: usize,
        (a, lda): (*const f32, usize),
        b: *const B,
        c: *mut f32,
        is_first: bool,
    ) {
        // SAFETY: the caller's shapes include ROWS rows and DEPTH rows of `b` here.
        unsafe {
            let mut factors = [[V::splat(0.0); DEPTH]; ROWS];
            for row in 0..ROWS {
                for i in 0..DEPTH {
                    factors[row][i] = V::splat(*a.add(row * lda + i));
                }
            }
            for col in (0..n).step_by(V::LANES) {
                let mut values = [V::splat(0.0); DEPTH];
                for i in 0..DEPTH {
                    if is_first {
                        prefetch_behind::<V, B>(b.wrapping_add(i * n), col);
                    }
                    values[i] = B::load::<V>(b.add(i * n + col));
                }
                for row in 0..ROWS {
                    let c = c.add(row * n + col);
                    let mut sum = V::load(c);
                    for i in 0..DEPTH {
                        sum = values[i].mul_add(factors[row][i], sum);
                    }
                    sum.store(c);
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn all_rows<V: Simd, B: Element, const DEPTH: usize>(
        m: usize,
        n: usize,
        (a, lda): (*const f32, usize),
        b: *const B,
        c: *mut f32,
    ) {
        for row in (0..m).step_by(4) {
            // SAFETY: rows stay below m.
            unsafe {
                let (a, c) = ((a.add(row * lda), lda), c.add(row * n));
                match m - row {
                    1 => rows::<V, B, 1, DEPTH>(n, a, b, c, row == 0),
                    2 => rows::<V, B, 2, DEPTH>(n, a, b, c, row == 0),
                    3 => rows::<V, B, 3, DEPTH>(n, a, b, c, row == 0),
                    _ => rows::<V, B, 4, DEPTH>(n, a, b, c, row == 0),
                }
            }
        }
    }
    // As many rows of `b` at a time as their factors fit the registers.
    let depth = if V::LANES == 16 { 4 } else { 2 };
    let whole = k - k % depth;
    // SAFETY: rows of `b` stay below k.
    unsafe {
        for i in (0..whole).step_by(depth) {
            match depth {
                4 => all_rows::<V, B, 4>(m, n, (a.add(i), lda), b.add(i * n), c),
                _ => all_rows::<V, B, 2>(m, n, (a.add(i), lda), b.add(i * n), c),
            }
        }
        for i in whole..k {
            all_rows::<V, B, 1>(m, n, (a.add(i), lda), b.add(i * n), c);
        }
    }
}

//! Reading ahead: workers that wait for another device or for each other bring weights that they will multiply with
//! from main memory into their caches. Changes no result; bounded in bytes, and ends when there is nothing to wait for.

use crate::Matrix;
use std::ops::Range;

/// What one worker reads ahead at most: a half or a quarter of the second-level cache of today's processors; where that
/// is smaller, the rest lies in the third. Nothing where there is no instruction for it.
pub const MAX_BYTES: usize = if cfg!(target_arch = "x86_64") { 512 << 10 } else { 0 };
/// The part of these bytes that takes about ten microseconds to come where all cores read: a divisor.
const BRIEF: usize = 4;
/// Bytes between two looks at whether the wait is over.
const STRIDE: usize = 4096;

/// What a worker may still read ahead, and until when.
pub(crate) struct Ahead<'a> {
    left: usize,
    is_over: &'a dyn Fn() -> bool,
}

impl<'a> Ahead<'a> {
    /// Until `is_over`.
    pub fn until(is_over: &'a dyn Fn() -> bool) -> Self {
        Self { left: MAX_BYTES, is_over }
    }

    /// Until `is_over`, and no longer than about ten microseconds: who is awaited for longer may need this core.
    pub fn briefly_until(is_over: &'a dyn Fn() -> bool) -> Self {
        Self { left: MAX_BYTES / BRIEF, is_over }
    }

    /// Asks for `rows` (whole panels, the last one maybe cut) of `matrix`; `false`: it is time to stop.
    pub fn rows(&mut self, matrix: &Matrix, rows: Range<usize>) -> bool {
        for part in matrix.row_bytes(rows).chunks(STRIDE) {
            if self.left < part.len() || (self.is_over)() {
                return false;
            }
            self.left -= part.len();
            fetch(part);
        }
        true
    }
}

/// Asks for the first `n_bytes` of `rows` of `matrix`, which will be read soon: memory is slow to begin.
pub(crate) fn ask_for_first(matrix: &Matrix, rows: Range<usize>, n_bytes: usize) {
    let bytes = matrix.row_bytes(rows);
    fetch(&bytes[..bytes.len().min(n_bytes)]);
}

/// Asks for the cache lines of `bytes`, into all caches: with the hint that leaves out the first level a token of a
/// hybrid plan takes 1 to 3 % longer on 16 threads, as if some lines were not fetched.
#[inline(always)]
fn fetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.iter().step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch changes nothing.
        unsafe { _mm_prefetch((&raw const *line).cast(), _MM_HINT_T0) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

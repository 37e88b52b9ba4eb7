//! Reading ahead: workers that wait for another device bring weights that they will multiply with from main memory into
//! their caches. Changes no result; bounded in bytes, and ends when there is nothing to wait for.

use crate::Matrix;
use std::ops::Range;

/// What one worker reads ahead at most: less than a second-level cache of any current processor holds.
pub const MAX_BYTES: usize = 256 << 10;
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

    /// Asks for `rows` (whole panels, the last one maybe cut) of `matrix`; `false`: it is time to stop.
    pub fn rows(&mut self, matrix: &Matrix, rows: Range<usize>) -> bool {
        let panel_rows = matrix.panel_rows();
        for part in matrix.panel_bytes(rows.start / panel_rows..rows.end.div_ceil(panel_rows)).chunks(STRIDE) {
            if self.left < part.len() || (self.is_over)() {
                return false;
            }
            self.left -= part.len();
            part.iter().step_by(64).for_each(|line| fetch(line));
        }
        true
    }
}

/// Asks for the first `n_bytes` of `rows` (from a whole panel on) of `matrix`, which will be read soon: memory is slow
/// to begin.
pub(crate) fn begin(matrix: &Matrix, rows: Range<usize>, n_bytes: usize) {
    let panel_rows = matrix.panel_rows();
    let bytes = matrix.panel_bytes(rows.start / panel_rows..rows.end.div_ceil(panel_rows));
    bytes[..bytes.len().min(n_bytes)].iter().step_by(64).for_each(|line| fetch(line));
}

/// Asks for a cache line, past the first-level cache.
#[inline(always)]
fn fetch(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch of an invalid address does nothing.
        unsafe { _mm_prefetch(line.cast(), _MM_HINT_T1) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

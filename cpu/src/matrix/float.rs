//! F32, F16 and BF16 panels: elements `[n_cols, R]`.

use super::kernel::Float;
use super::simd::Simd;

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;

impl Float for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: as the trait asks.
        unsafe { S::load_f32(p) }
    }
}

impl Float for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: as the trait asks.
        unsafe { S::load_f16(p) }
    }
}

impl Float for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: as the trait asks.
        unsafe { S::load_bf16(p) }
    }
}

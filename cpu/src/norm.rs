//! Element-wise pieces of the blocks: RMS norm, gated norm, SwiGLU, gates and sums. Hot loops over slices.

use crate::Isa;
use crate::simd::{self, Kernel, Simd, dot, for_lanes, sigmoid, silu};

/// `out = x / sqrt(mean(x^2) + eps) * weight`.
pub(crate) fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    out.copy_from_slice(x);
    rms_norm_in_place(isa, out, weight, eps);
}

/// `x = x / sqrt(mean(x^2) + eps) * weight`.
pub(crate) fn rms_norm_in_place(isa: Isa, x: &mut [f32], weight: &[f32], eps: f32) {
    struct RmsNorm<'a>(&'a mut [f32], &'a [f32], f32);
    impl Kernel for RmsNorm<'_> {
        type Output = ();
        #[inline(always)]
        fn run<V: Simd>(self) {
            let Self(x, weight, eps) = self;
            assert_eq!(x.len(), weight.len());
            let factor = 1.0 / (dot::<V>(x, x) / x.len() as f32 + eps).sqrt();
            let (px, pw) = (x.as_mut_ptr(), weight.as_ptr());
            for_lanes!(V, x.len(), |i| {
                // SAFETY: `i + LANES` is at most the length of both.
                unsafe { V::load(px.add(i)).mul(V::splat(factor)).mul(V::load(pw.add(i))).store(px.add(i)) }
            });
        }
    }
    simd::run(isa, 0, RmsNorm(x, weight, eps));
}

/// `x = x / sqrt(mean(x^2) + eps) * weight * silu(gate)`.
pub(crate) fn gated_norm(isa: Isa, x: &mut [f32], weight: &[f32], gate: &[f32], eps: f32) {
    struct GatedNorm<'a>(&'a mut [f32], &'a [f32], &'a [f32], f32);
    impl Kernel for GatedNorm<'_> {
        type Output = ();
        #[inline(always)]
        fn run<V: Simd>(self) {
            let Self(x, weight, gate, eps) = self;
            assert!(x.len() == weight.len() && x.len() == gate.len());
            let factor = 1.0 / (dot::<V>(x, x) / x.len() as f32 + eps).sqrt();
            let (px, pw, pg) = (x.as_mut_ptr(), weight.as_ptr(), gate.as_ptr());
            for_lanes!(V, x.len(), |i| {
                // SAFETY: `i + LANES` is at most the length of all three.
                unsafe {
                    let normed = V::load(px.add(i)).mul(V::splat(factor)).mul(V::load(pw.add(i)));
                    normed.mul(silu(V::load(pg.add(i)))).store(px.add(i));
                }
            });
        }
    }
    simd::run(isa, 0, GatedNorm(x, weight, gate, eps));
}

/// `gate = silu(gate) * up`.
pub(crate) fn silu_mul(isa: Isa, gate: &mut [f32], up: &[f32]) {
    struct SiluMul<'a>(&'a mut [f32], &'a [f32]);
    impl Kernel for SiluMul<'_> {
        type Output = ();
        #[inline(always)]
        fn run<V: Simd>(self) {
            let Self(gate, up) = self;
            assert_eq!(gate.len(), up.len());
            let (pg, pu) = (gate.as_mut_ptr(), up.as_ptr());
            for_lanes!(V, gate.len(), |i| {
                // SAFETY: `i + LANES` is at most the length of both.
                unsafe { silu(V::load(pg.add(i))).mul(V::load(pu.add(i))).store(pg.add(i)) }
            });
        }
    }
    simd::run(isa, 0, SiluMul(gate, up));
}

/// `x *= sigmoid(gate)`.
pub(crate) fn sigmoid_mul(isa: Isa, x: &mut [f32], gate: &[f32]) {
    struct SigmoidMul<'a>(&'a mut [f32], &'a [f32]);
    impl Kernel for SigmoidMul<'_> {
        type Output = ();
        #[inline(always)]
        fn run<V: Simd>(self) {
            let Self(x, gate) = self;
            assert_eq!(x.len(), gate.len());
            let (px, pg) = (x.as_mut_ptr(), gate.as_ptr());
            for_lanes!(V, x.len(), |i| {
                // SAFETY: `i + LANES` is at most the length of both.
                unsafe { V::load(px.add(i)).mul(sigmoid(V::load(pg.add(i)))).store(px.add(i)) }
            });
        }
    }
    simd::run(isa, 0, SigmoidMul(x, gate));
}

/// `x += factor * y`.
pub(crate) fn add_scaled(isa: Isa, x: &mut [f32], factor: f32, y: &[f32]) {
    struct AddScaled<'a>(&'a mut [f32], f32, &'a [f32]);
    impl Kernel for AddScaled<'_> {
        type Output = ();
        #[inline(always)]
        fn run<V: Simd>(self) {
            let Self(x, factor, y) = self;
            assert_eq!(x.len(), y.len());
            let (px, py) = (x.as_mut_ptr(), y.as_ptr());
            for_lanes!(V, x.len(), |i| {
                // SAFETY: `i + LANES` is at most the length of both.
                unsafe { V::load(py.add(i)).mul_add(V::splat(factor), V::load(px.add(i))).store(px.add(i)) }
            });
        }
    }
    simd::run(isa, 0, AddScaled(x, factor, y));
}

/// `out = factor * x`; with `l2_eps`, `out = factor * x / sqrt(sum(x^2) + l2_eps)`.
pub(crate) fn scale(isa: Isa, x: &[f32], factor: f32, l2_eps: Option<f32>, out: &mut [f32]) {
    struct Scale<'a>(&'a [f32], f32, Option<f32>, &'a mut [f32]);
    impl Kernel for Scale<'_> {
        type Output = ();
        #[inline(always)]
        fn run<V: Simd>(self) {
            let Self(x, factor, l2_eps, out) = self;
            assert_eq!(x.len(), out.len());
            let factor = match l2_eps {
                Some(eps) => factor / (dot::<V>(x, x) + eps).sqrt(),
                None => factor,
            };
            let (px, po) = (x.as_ptr(), out.as_mut_ptr());
            for_lanes!(V, x.len(), |i| {
                // SAFETY: `i + LANES` is at most the length of both.
                unsafe { V::load(px.add(i)).mul(V::splat(factor)).store(po.add(i)) }
            });
        }
    }
    simd::run(isa, 0, Scale(x, factor, l2_eps, out));
}

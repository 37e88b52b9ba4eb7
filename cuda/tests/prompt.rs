//! On a GPU: every block in the prompt kernels against the exact reference, for every case of the table.

use crate::blocks;
use crate::gpu::gpu;
use std::sync::Arc;
use tandem_cuda::{Compiler, Device, Products};
use tandem_spec::testing::{Case, Shape, cases};
use tandem_spec::{KvDtype, TensorType};

/// Largest normalised error of any row over the steps of a case.
fn error_of(case: &Case, device: &Arc<Device>, compiler: Compiler) -> f64 {
    let (block, source) = case.block();
    let expected = case.expected(&block, &source, &case.inputs());
    blocks::error_of(case, (block, source), &expected, device, compiler, 1)
}

/// Float weights meet f32 activations; the rest is rounding of f32 sums and of differences with the stream.
const BOUND_F32: f64 = 2e-5;
/// Activations of F16 weights are rounded to f16, about 3e-4 a product.
const BOUND_F16: f64 = 4e-3;
/// All other products round activations and weights to bf16, about 2e-3 a product, and the row with the smallest
/// result has the largest share: the gated norm of the delta net amplifies the first rows' rounding.
const BOUND_BF16: f64 = 2e-2;

/// Activations of 8 bits with a scale for 256 before K-quants: 3 percent in the worst row of most cases; the gated norm
/// enlarges that of rows whose delta-net output is small.
const BOUND_INT8: f64 = 0.05;
const BOUND_INT8_DELTA_NET: f64 = 0.12;

#[test]
fn every_block_agrees_with_the_reference_in_the_prompt_kernels() {
    let Some((device, compiler)) = gpu() else { return };
    let mut failed = Vec::new();
    for case in cases().iter().filter(|c| !matches!(c.shape, Shape::Embed { .. })) {
        let only = |types: &[TensorType]| case.kv_dtype == KvDtype::F32 && case.types.iter().all(|t| types.contains(t));
        let bound = match () {
            () if only(&[TensorType::F32]) => BOUND_F32,
            () if only(&[TensorType::F32, TensorType::F16]) => BOUND_F16,
            () => BOUND_BF16,
        };
        let error = error_of(case, &device, compiler());
        println!("{:40} {error:.2e}{}", case.name, if error <= bound { "" } else { "  FAILED" });
        if error.is_nan() || error > bound {
            failed.push(format!("{}: {error:.2e} over {bound:.0e}", case.name));
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

/// Activations of 8 bits, as in the kernels for single tokens: their rounding is most of the error.
#[test]
fn every_block_agrees_with_the_reference_in_the_prompt_kernels_with_int8() {
    let Some((_, compiler)) = gpu() else { return };
    let device = Arc::new(Device::open(0).expect("opened before").with_products(Products::Int8));
    let mut failed = Vec::new();
    let quantised = |c: &Case| c.types.iter().any(|ty| ty.is_quantised()) && !matches!(c.shape, Shape::Embed { .. });
    let cases: Vec<Case> = cases().into_iter().filter(quantised).collect();
    blocks::compile(&cases, &device, &compiler());
    for case in &cases {
        let bound = if matches!(case.shape, Shape::DeltaNet(_)) { BOUND_INT8_DELTA_NET } else { BOUND_INT8 };
        let error = error_of(case, &device, compiler());
        println!("{:40} {error:.2e}{}", case.name, if error <= bound { "" } else { "  FAILED" });
        if error.is_nan() || error > bound {
            failed.push(format!("{}: {error:.2e} over {bound:.0e}", case.name));
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

/// Batches that are large enough for the products of a library, and their tails.
#[test]
fn large_batches_agree_with_the_reference() {
    let Some((device, compiler)) = gpu() else { return };
    for name in ["attention 0.8B", "delta_net 0.8B", "ffn 0.8B"] {
        let case = cases().into_iter().find(|c| c.name == name).unwrap_or_else(|| panic!("no case {name}"));
        let steps = vec![vec![(0, 259)], vec![(1, 300), (0, 7)]];
        let case = Case { steps, n_slots: 2, ..case };
        let error = error_of(&case, &device, compiler());
        println!("{name:40} {error:.2e}");
        assert!(error <= BOUND_BF16, "{name}: {error:.2e} over {BOUND_BF16:.0e}");
    }
}
